"""Reference convergence points (RCPs): samples that MLPerf's reference needed, and the fewest that a result may need.

The figures are those of `mlperf_logging.rcp_checker` with its defaults, computed by its own code: it drops published
batch sizes that converge more slowly than their neighbours suggest, and interpolates.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.compat import reference_point
from runtime.arguments import RunConfig
from runtime.eval_schedule import RULE_SAMPLES
from runtime.logging.throughput import measured_samples_per_s
from runtime.mlperf.rulesets import DEFAULT_RULESET, counts_samples

BENCHMARK = "unet3d"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The reference for results of one global batch size; figures in the ruleset's unit, samples or epochs of 168.

    Attributes:
        source: where the figures come from: one published batch size, or two.
        mean: convergence of the reference.
        least: the smallest accepted mean; a result below it fails.
        published: convergence of every published run at this batch size, or at the one that stands for it.
    """

    batch_size: int
    ruleset: str
    source: str
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
        """Returns the factor for a result's time: above 1 if it converged faster than the reference; None if too fast.

        Args:
            mean: convergence of the result, in the ruleset's unit.
        """
        if mean < self.least:
            return None
        return max(1.0, self.mean / mean)


def find_reference(batch_size: int, ruleset: str = DEFAULT_RULESET) -> Reference | None:
    """Returns the reference for a global batch size; None if it is larger than all published ones."""
    point = reference_point(BENCHMARK, ruleset, batch_size)
    if point is None:
        return None
    figures, source, published = point
    return Reference(
        batch_size=batch_size,
        ruleset=ruleset,
        source=source,
        mean=float(figures["RCP Mean"]),
        least=float(figures["RCP Mean"] / figures["Max Speedup"]),
        published=tuple(map(float, published)),
    )


def expectation(batch_size: int, ruleset: str, samples_per_s: float | None) -> str:
    """Returns one line with the expected length of a run, in samples and, if their rate is known, in hours."""
    reference = find_reference(batch_size, ruleset)
    if reference is None:
        return f"ruleset {ruleset} has no RCP for a batch as large as {batch_size}: such a result cannot be submitted"
    line = f"to converge: {reference.mean_samples:,.0f} samples on average, {reference.least_samples:,.0f} the least "
    line += f"accepted ({reference.source}, ruleset {ruleset})"
    if samples_per_s:
        hours = reference.mean_samples / samples_per_s / 3600
        line += f"; {hours:.2g} h of training at the {samples_per_s:.4g} samples/s of benchmark.json"
    return line


def expected_length(config: RunConfig, groups: int) -> str:
    """Returns `expectation` for a run, with the rate that `--benchmark` measured in its log folder, if any.

    Args:
        groups: of ranks that share each sample, or the number of ranks if none do.
    """
    rate = measured_samples_per_s(config.log_dir)
    return expectation(config.batch_size * groups * config.ga_steps, config.ruleset, rate)
