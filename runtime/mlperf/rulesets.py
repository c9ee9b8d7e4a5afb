"""The rulesets that know unet3d, and in which unit each wants epochs logged."""

from __future__ import annotations

# Those of mlperf-logging 4.1.68 with rules and reference convergence points of unet3d.
RULESETS = ("1.0.0", "1.1.0", "2.0.0", "2.1.0", "3.0.0", "3.1.0", "4.0.0")
DEFAULT_RULESET = "4.0.0"
FIRST_IN_SAMPLES = "3.1.0"


def counts_samples(ruleset: str) -> bool:
    """Whether the ruleset wants epochs, and what is given in epochs, in samples."""
    return RULESETS.index(ruleset) >= RULESETS.index(FIRST_IN_SAMPLES)


def epoch_unit(ruleset: str, samples_per_epoch: int) -> int:
    """What an epoch is worth in the log: 1 up to ruleset 3.0.0, its samples from 3.1.0 on."""
    return samples_per_epoch if counts_samples(ruleset) else 1
