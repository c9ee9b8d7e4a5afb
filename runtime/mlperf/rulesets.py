"""MLPerf rulesets with unet3d, and the unit in which each logs epochs."""

from __future__ import annotations

# Those for which mlperf-logging 4.1.68 has rules and reference convergence points of unet3d.
RULESETS = ("1.0.0", "1.1.0", "2.0.0", "2.1.0", "3.0.0", "3.1.0", "4.0.0")
DEFAULT_RULESET = "4.0.0"
FIRST_IN_SAMPLES = "3.1.0"
# Runs of a result.
RUNS = 40


def counts_samples(ruleset: str) -> bool:
    """Returns whether the ruleset logs epochs, and values counted in epochs, in samples."""
    return RULESETS.index(ruleset) >= RULESETS.index(FIRST_IN_SAMPLES)


def epoch_unit(ruleset: str, samples_per_epoch: int) -> int:
    """Returns the value of one epoch in the log: 1 up to ruleset 3.0.0, its samples from 3.1.0 on."""
    return samples_per_epoch if counts_samples(ruleset) else 1
