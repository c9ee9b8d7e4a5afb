"""`submission score`: computes the score of 40 runs by MLPerf's rules and compares it with published results.

The 4 fastest and the 4 slowest runs are dropped; runs that did not converge count as the slowest. The score is the
mean run_stop - run_start of the others, scaled by the reference's convergence / own convergence if that is above 1.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError
from common.messages import logger
from runtime.mlperf.convergence import Reference, find_reference
from submission.inspection import find_problems, read_results, results_folder, runs_folder
from submission.logs import Log, Problem
from submission.published_results import PUBLISHED_RESULTS, PublishedResult

DROPPED = 4


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of one run.

    Attributes:
        name: of its log file.
        clock_ms: from run_start to run_stop.
        converged_at: samples or epochs to the target, as the ruleset counts; None if it did not converge.
    """

    name: str
    clock_ms: int
    converged_at: float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of the rules' arithmetic.

    Attributes:
        mean_ms, std_ms: of the runs that count, unscaled.
        converged_mean: mean samples or epochs to the target; as in MLPerf's checker, without the 4 smallest and the 4
            largest values, whatever the runs' times.
        scaling: factor for the mean; None if there is no valid result.
        kept: names of the runs that count.
    """

    mean_ms: float
    std_ms: float
    converged_mean: float
    scaling: float | None
    kept: tuple[str, ...]

    @property
    def result_ms(self) -> float:
        return self.mean_ms * (self.scaling or math.nan)


def compute(runs: Sequence[RunOutcome], reference: Reference | None, is_closed: bool = True) -> Score:
    """Computes the score of a result; in the open division it is not scaled.

    Args:
        reference: None if there is none for the batch size; then there is no valid closed result.

    Raises:
        UserError: more runs did not converge than may be dropped, or no run remains.
    """
    failed = [run for run in runs if run.converged_at is None]
    if len(failed) > DROPPED or len(runs) <= 2 * DROPPED:
        raise UserError(f"{len(failed)} of {len(runs)} runs did not converge: no result (at most {DROPPED} may)")
    by_time = sorted(runs, key=lambda run: math.inf if run.converged_at is None else run.clock_ms)
    kept = by_time[DROPPED:-DROPPED]
    lengths = sorted(math.inf if run.converged_at is None else run.converged_at for run in runs)[DROPPED:-DROPPED]
    times = [run.clock_ms for run in kept]
    converged_mean = sum(lengths) / len(lengths)
    scaling = 1.0 if not is_closed else reference.scaling(converged_mean) if reference else None
    return Score(
        mean_ms=sum(times) / len(times),
        std_ms=statistics.stdev(times),
        converged_mean=converged_mean,
        scaling=scaling,
        kept=tuple(run.name for run in kept),
    )


def outcomes(logs: Sequence[Log]) -> list[RunOutcome]:
    """Returns the outcomes of the runs; the logs must be complete."""
    return [
        RunOutcome(log.path.name, log.clock_ms, float(log.epochs * log.unit) if log.converged else None) for log in logs
    ]


def run(options: argparse.Namespace) -> int:
    """Prints the runs, the score and the comparison and draws the plot; returns 1 if there is no valid result."""
    folder = results_folder(options.result_dir, options.system)
    logs, problems = read_results(folder)
    problems += find_problems(logs, options.ruleset)
    if problems:
        print_problems(problems)
        return 1
    reference = find_reference(int(logs[0].values["global_batch_size"]), options.ruleset)
    runs = outcomes(logs)
    score = compute(runs, reference, logs[0].is_closed)
    print("\n".join([*run_table(logs, score), "", *summary(logs, score, reference), "", *comparison(logs, score)]))
    path = options.plot or runs_folder(options.result_dir, folder.parent.name) / "convergence.png"
    try:
        from submission.plot import draw

        path.parent.mkdir(parents=True, exist_ok=True)
        draw([run.converged_at for run in runs], reference, path)
        print(f"\nplot: {path}")
    except ModuleNotFoundError as error:
        logger.warning(f"no plot: {error.name} is not installed; pip install '.[report]'")
    except OSError as error:
        logger.warning(f"no plot: {path} cannot be written: {error.strerror or error}")
    return 0 if score.scaling else 1


def print_problems(problems: Sequence[Problem]) -> None:
    """Prints each problem with its file and line, and their number."""
    print("\n".join(map(str, problems)))
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)}: no result", flush=True)


def run_table(logs: Sequence[Log], score: Score) -> list[str]:
    """Formats one line per run: time, convergence, seed, and whether it counts."""
    lines = [f"{'run':14}  {'minutes':>10}  {'epochs':>6}  {'samples':>9}  {'Dice':>6}  {'seed':>10}"]
    for log in logs:
        note = "" if log.path.name in score.kept else "dropped" if log.converged else "dropped: not converged"
        dice = log.evaluations[-1][1] if log.evaluations else math.nan
        samples = log.epochs * log.values["samples_per_epoch"]
        lines.append(
            f"{log.path.name:14}  {log.clock_ms / 60_000:10.4f}  {log.epochs:6}  {samples:9,}  {dice:6.4f}  "
            f"{log.values['seed']:10}  {note}".rstrip()
        )
    return lines


def summary(logs: Sequence[Log], score: Score, reference: Reference | None) -> list[str]:
    """Formats the score, its spread, and the convergence against the reference's."""
    lines = [
        f"mean of {len(score.kept)} runs: {score.mean_ms:,.3f} ms, standard deviation {score.std_ms:,.0f} ms "
        f"({score.std_ms / max(score.mean_ms, 1):.1%})"
    ]
    if reference:
        lines.append(
            f"convergence: {score.converged_mean:,.1f} {reference.unit}; {reference.source}, "
            f"ruleset {reference.ruleset}: mean {reference.mean:,.1f}, least accepted {reference.least:,.1f}"
        )
    if score.scaling:
        how = f"scaled by {score.scaling:.5f}" if logs[0].is_closed else "open division: not scaled"
        lines.append(f"score: {score.result_ms:,.3f} ms = {score.result_ms / 60_000:.4f} minutes ({how})")
    elif reference:
        shorter = 1 - score.converged_mean / reference.least
        lines.append(f"FAILED: {shorter:.1%} below the least accepted: no result of the closed division")
    else:
        batch = logs[0].values["global_batch_size"]
        lines.append(f"FAILED: there is no RCP for a batch size as large as {batch}: submit one first")
    return lines


def comparison(logs: Sequence[Log], score: Score) -> list[str]:
    """Formats this result beside the published ones; unknown values are dashes."""
    values = logs[0].values
    match = re.match(r"(\d+)x", str(values["submission_platform"]))
    devices = int(match[1]) if match else 1
    samples = sum(record.key == "epoch_stop" for log in logs for record in log.records) * values["samples_per_epoch"]
    training_s = sum(log.seconds_in("epoch") for log in logs)
    own = PublishedResult(
        name=f"this {values['submission_division']} result, {values['submission_platform']}",
        devices=devices,
        samples_per_s=samples / training_s / devices if training_s else None,
        evaluation_s=sum(log.seconds_in("eval") for log in logs) / max(sum(len(log.evaluations) for log in logs), 1),
        minutes=None if score.scaling is None else score.result_ms / 60_000,
    )
    results = [own, *PUBLISHED_RESULTS]
    width = max(len(result.name) for result in results)
    lines = [f"{'published results':{width}}  samples/s/device  evaluation s     minutes  device-minutes"]
    for result in results:
        cost = None if result.minutes is None else result.minutes * result.devices
        lines.append(
            f"{result.name:{width}}  {_plain(result.samples_per_s):>16}  {_plain(result.evaluation_s):>12}  "
            f"{_plain(result.minutes):>10}  {_plain(cost):>14}"
        )
    if not logs[0].is_closed:
        lines.append(
            "the published results are from the closed division: an open result may do other work and not be comparable"
        )
    return lines


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
