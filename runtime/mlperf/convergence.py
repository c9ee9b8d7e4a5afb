"""Reference convergence points (RCPs): how many samples MLPerf's reference needed, and how few a result may need.

The figures are those of `mlperf_logging.rcp_checker`, computed by its own code, as it judges by default: of the
published batch sizes it drops those that converge more slowly than their neighbours promise, and interpolates.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.compat import reference_point
from runtime.arguments import RunConfig
from runtime.eval_schedule import RULE_SAMPLES
from runtime.logging.throughput import measured_samples_per_s
from runtime.mlperf.rulesets import DEFAULT_RULESET, counts_samples

BENCHMARK = "unet3d"


@dataclass(frozen=True)
class Reference:
    """What a batch size is held to; `mean` and `least` in the ruleset's unit, samples or epochs of 168.

    Attributes:
        how: where the figures are from: a published batch size, or two.
        least: the least accepted mean; below it a result fails.
        published: every convergence of the reference at this batch size, or at the one whose figures count.
    """

    batch_size: int
    ruleset: str
    how: str
    mean: float
    least: float
    published: tuple[float, ...]

    @property
    def unit(self) -> str:
        return "samples" if counts_samples(self.ruleset) else "epochs"

    @property
    def mean_samples(self) -> float:
        return self.mean if counts_samples(self.ruleset) else self.mean * RULE_SAMPLES

    @property
    def least_samples(self) -> float:
        return self.least if counts_samples(self.ruleset) else self.least * RULE_SAMPLES

    def scaling(self, mean: float) -> float | None:
        """What a result's time is multiplied with: mean / own where it converged faster; None where too fast."""
        if mean < self.least:
            return None
        return max(1.0, self.mean / mean)


def find_reference(batch_size: int, ruleset: str = DEFAULT_RULESET) -> Reference | None:
    """What MLPerf's checker holds a global batch size to; None where it has nothing for one as large."""
    point = reference_point(BENCHMARK, ruleset, batch_size)
    if point is None:
        return None
    found, how, published = point
    least = found["RCP Mean"] / found["Max Speedup"]
    return Reference(batch_size, ruleset, how, float(found["RCP Mean"]), float(least), tuple(map(float, published)))


def expectation(batch_size: int, ruleset: str, samples_per_s: float | None) -> str:
    """One line: how long such a run is to take, in samples and, where their rate is known, in hours."""
    reference = find_reference(batch_size, ruleset)
    if reference is None:
        return f"ruleset {ruleset} has no RCP for a batch as large as {batch_size}: such a result cannot be submitted"
    told = f"to converge: {reference.mean_samples:,.0f} samples on average, {reference.least_samples:,.0f} the least "
    told += f"accepted ({reference.how}, ruleset {ruleset})"
    if samples_per_s:
        hours = reference.mean_samples / samples_per_s / 3600
        told += f"; {hours:.2g} h of training at the {samples_per_s:.4g} samples/s of benchmark.json"
    return told


def expected_length(config: RunConfig, ranks: int) -> str:
    """`expectation` of a run, with the rate that `--benchmark` measured in its log folder, if it did."""
    rate = measured_samples_per_s(config.log_dir)
    return expectation(config.batch_size * ranks * config.ga_steps, config.ruleset, rate)
