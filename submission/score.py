"""`submission score`: the rules' arithmetic on 40 runs, and how the result stands.

The 4 fastest and the 4 slowest runs are dropped, those that did not converge among the slowest; the score is the mean
of the others' run_stop - run_start, times the reference's convergence over one's own where that was faster.
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
from submission.inspection import inspect, read_results, results_folder, runs_folder
from submission.logs import Log, Problem
from submission.published_results import PUBLISHED_RESULTS

DROPPED = 4


@dataclass(frozen=True)
class Timed:
    """One run: its time on the clock, and how long it took to converge (in the ruleset's unit); None: it did not."""

    name: str
    clock_ms: int
    converged_at: float | None


@dataclass(frozen=True)
class Score:
    """What the rules make of the runs.

    Attributes:
        mean_ms: of the runs that count, unscaled.
        converged_mean: their convergence's mean; the checker drops 4 and 4 of it by itself, not by time.
        scaling: what the mean is multiplied with; None: they converged too fast, it is no result.
        kept: the names of the runs that count.
    """

    mean_ms: float
    deviation_ms: float
    converged_mean: float
    scaling: float | None
    kept: tuple[str, ...]

    @property
    def result_ms(self) -> float:
        return self.mean_ms * (self.scaling or math.nan)


def compute(runs: Sequence[Timed], reference: Reference | None, is_closed: bool = True) -> Score:
    """The score of a result's runs; the open division is held to no reference, and its times count as they are.

    Args:
        reference: None where there is none for the batch size: no result of the closed division.

    Raises:
        UserError: more runs did not converge than may be dropped, or none is left.
    """
    failed = [run for run in runs if run.converged_at is None]
    if len(failed) > DROPPED or len(runs) <= 2 * DROPPED:
        raise UserError(f"{len(failed)} of {len(runs)} runs did not converge: no result (at most {DROPPED} may)")
    by_time = sorted(runs, key=lambda run: math.inf if run.converged_at is None else run.clock_ms)
    kept = by_time[DROPPED:-DROPPED]
    lengths = sorted(math.inf if run.converged_at is None else run.converged_at for run in runs)[DROPPED:-DROPPED]
    times = [run.clock_ms for run in kept]
    mean = sum(lengths) / len(lengths)
    scaling = (reference.scaling(mean) if reference else None) if is_closed else 1.0
    return Score(sum(times) / len(times), statistics.stdev(times), mean, scaling, tuple(run.name for run in kept))


def timed(logs: Sequence[Log]) -> list[Timed]:
    """The logs' times; each must be whole."""
    return [Timed(log.path.name, log.clock_ms, float(log.epochs * log.unit) if log.converged else None) for log in logs]


def reference_of(logs: Sequence[Log], ruleset: str) -> Reference | None:
    """What these runs' batch size is held to."""
    return find_reference(int(logs[0].values["global_batch_size"]), ruleset)


def run(options: argparse.Namespace) -> int:
    """Prints the score, its table and its place, and draws its picture; 1 where something is wrong with the runs."""
    folder = results_folder(options.result_dir, options.system)
    logs, strange = read_results(folder)
    if problems := [*strange, *inspect(logs, options.ruleset)]:
        print_problems(problems)
        return 1
    reference = reference_of(logs, options.ruleset)
    found = compute(timed(logs), reference, logs[0].is_closed)
    print("\n".join([*run_table(logs, found), "", *summary(logs, found, reference), "", *standing(logs, found)]))
    picture = options.picture or runs_folder(options.result_dir, folder.parent.name) / "convergence.png"
    try:
        from submission.plot import draw

        picture.parent.mkdir(parents=True, exist_ok=True)
        draw([one.converged_at for one in timed(logs)], reference, picture)
        print(f"\npicture {picture}")
    except ModuleNotFoundError as error:
        logger.warning(f"no picture: it needs {error.name}, which is not installed: pip install '.[report]'")
    except OSError as error:
        logger.warning(f"no picture: {picture} cannot be written: {error.strerror or error}")
    return 0 if found.scaling else 1


def print_problems(problems: Sequence[Problem]) -> None:
    """Each in a line, with its file and line, and how many."""
    print("\n".join(map(str, problems)))
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)}: no result", flush=True)


def run_table(logs: Sequence[Log], found: Score) -> list[str]:
    """A line a run: time, convergence, seed, and whether it counts."""
    lines = [f"{'run':14}  {'minutes':>10}  {'epochs':>6}  {'samples':>9}  {'Dice':>6}  {'seed':>10}"]
    for log in logs:
        note = "" if log.path.name in found.kept else "dropped" if log.converged else "dropped: not converged"
        dice = log.evaluations[-1][1] if log.evaluations else math.nan
        samples = log.epochs * log.values["samples_per_epoch"]
        lines.append(
            f"{log.path.name:14}  {log.clock_ms / 60_000:10.4f}  {log.epochs:6}  {samples:9,}  {dice:6.4f}  "
            f"{log.values['seed']:10}  {note}".rstrip()
        )
    return lines


def summary(logs: Sequence[Log], found: Score, reference: Reference | None) -> list[str]:
    """The score, its spread, and its convergence against the reference's."""
    counted = len(found.kept)
    lines = [
        f"mean of {counted} runs: {found.mean_ms:,.3f} ms, deviation {found.deviation_ms:,.0f} ms "
        f"({found.deviation_ms / max(found.mean_ms, 1):.1%})"
    ]
    batch, is_closed = logs[0].values["global_batch_size"], logs[0].is_closed
    if reference:
        theirs = f"{reference.how}, ruleset {reference.ruleset}: mean {reference.mean:,.1f}"
        theirs += f", least accepted {reference.least:,.1f}"
        lines.append(f"convergence: {found.converged_mean:,.1f} {reference.unit}; {theirs}")
    if found.scaling is None:
        if reference is None:
            return [*lines, f"FAILED: there is no RCP for a batch as large as {batch}: submit one first"]
        shorter = 1 - found.converged_mean / reference.least
        return [*lines, f"FAILED: {shorter:.1%} fewer than the least accepted: no result of the closed division"]
    how = f"scaled by {found.scaling:.5f}" if is_closed else "open division: not scaled"
    return [*lines, f"score: {found.result_ms:,.3f} ms = {found.result_ms / 60_000:.4f} minutes ({how})"]


def standing(logs: Sequence[Log], found: Score) -> list[str]:
    """This result beside the published ones; a rate or time that is unknown is a dash."""
    match = re.match(r"(\d+)x", str(logs[0].values["submission_platform"]))
    devices = int(match[1]) if match else 1
    samples = (
        sum(record.key == "epoch_stop" for log in logs for record in log.records) * logs[0].values["samples_per_epoch"]
    )
    training_s = sum(log.seconds_in("epoch") for log in logs)
    rate = samples / training_s / devices if training_s else None
    evaluations = sum(len(log.evaluations) for log in logs)
    evaluation_s = sum(log.seconds_in("eval") for log in logs) / max(evaluations, 1)
    minutes = None if found.scaling is None else found.result_ms / 60_000
    own = f"this {logs[0].values['submission_division']} result, {logs[0].values['submission_platform']}"
    rows: list[tuple[str, int, float | None, float | None, float | None]] = [
        (own, devices, rate, evaluation_s, minutes)
    ]
    rows += [
        (mark.who, mark.devices, mark.samples_per_s, mark.evaluation_s, mark.minutes) for mark in PUBLISHED_RESULTS
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{'published marks':{width}}  samples/s a device  evaluation s     minutes  device-minutes"]
    for who, count, speed, seconds, time in rows:
        cost = None if time is None else time * count
        lines.append(
            f"{who:{width}}  {_plain(speed):>18}  {_plain(seconds):>12}  {_plain(time):>10}  {_plain(cost):>14}"
        )
    if not logs[0].is_closed:
        lines.append("the marks are of the closed division: an open result may be of other work, and not comparable")
    return lines


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
