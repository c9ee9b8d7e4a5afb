"""The runs of one result together: 40 whole logs, one configuration, a seed each, as the series wrote them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from runtime.eval_schedule import make_schedule
from runtime.mlperf.rulesets import counts_samples
from submission.logs import BENCHMARK, Log, Problem, read_log

RUNS = 40
MAX_NOT_CONVERGED = 4
# What all runs of a result share, by key.
SHARED = (
    "submission_org",
    "submission_division",
    "submission_status",
    "submission_platform",
    "opt_name",
    "opt_base_learning_rate",
    "opt_learning_rate_warmup_epochs",
    "opt_learning_rate_decay_boundary_epochs",
    "opt_learning_rate_decay_factor",
    "opt_weight_decay",
    "opt_momentum",
    "oversampling",
    "training_input_shape",
    "validation_input_shape",
    "validation_overlap",
    "train_samples",
    "eval_samples",
    "samples_per_epoch",
    "global_batch_size",
    "gradient_accumulation_steps",
)
# What the closed division fixes of them.
CLOSED = {
    "opt_name": "sgd",
    "oversampling": 0.4,
    "training_input_shape": [128, 128, 128],
    "validation_input_shape": [128, 128, 128],
    "validation_overlap": 0.5,
    "train_samples": 168,
    "eval_samples": 42,
}
RESULT = re.compile(r"result_(\d+)\.txt")
# MLPerf's package checker leaves it beside the logs.
SCALING = "scaling.json"


def results_folder(result_dir: Path, system: str | None) -> Path:
    """ORG_DIR/results/SYSTEM/unet3d.

    Raises:
        UserError: there is none, or several systems and none was named.
    """
    found = sorted(path.parent.name for path in result_dir.glob(f"results/*/{BENCHMARK}") if path.is_dir())
    if system is None and len(found) > 1:
        raise UserError(f"--result_dir {result_dir} has results of {', '.join(found)}; name one by --system")
    if not found or (system is not None and system not in found):
        raise UserError(
            f"--result_dir {result_dir}: no results/{system or 'SYSTEM'}/{BENCHMARK} in it; `submission run` makes it"
        )
    return result_dir / "results" / (system or found[0]) / BENCHMARK


def runs_folder(result_dir: Path, system: str) -> Path:
    """ORG_DIR.runs/SYSTEM: what the runs leave beside their logs, which is no part of a submission."""
    whole = result_dir.resolve()
    return whole.with_name(f"{whole.name}.runs") / system


def read_results(folder: Path) -> tuple[list[Log], list[Problem]]:
    """The logs by their number, and what else is in the folder or missing."""
    numbered, problems = {}, []
    for path in sorted(folder.iterdir()):
        if match := RESULT.fullmatch(path.name):
            numbered[int(match[1])] = path
        elif path.name != SCALING:
            problems.append(Problem(path, 0, "no result: only result_0.txt … result_39.txt belong here"))
    missing = sorted(set(range(RUNS)) - set(numbered))
    if missing:
        names = ", ".join(f"result_{number}.txt" for number in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(
            Problem(folder, 0, f"{len(numbered)} run{'s' * (len(numbered) != 1)}, not {RUNS}: {names}{more} missing")
        )
    problems += [
        Problem(numbered[n], 0, f"one run too many: a result has {RUNS}") for n in sorted(numbered) if n >= RUNS
    ]
    return [read_log(numbered[number]) for number in sorted(numbered)], problems


def inspect(logs: Sequence[Log], ruleset: str) -> list[Problem]:
    """Everything wrong with these runs as one result, each log's own problems first."""
    problems = [problem for log in logs for problem in log.problems]
    whole = [log for log in logs if not log.problems]
    problems += [*_differences(whole), *_same_seeds(whole), *_wrong_units(whole, ruleset), *_not_by_the_rules(whole)]
    failed = [log for log in whole if not log.converged]
    if len(failed) > MAX_NOT_CONVERGED:
        problems += [
            Problem(log.path, log.records[-1].line, f"not converged, one of {len(failed)}: {MAX_NOT_CONVERGED} may be")
            for log in failed
        ]
    return problems


def _differences(logs: Sequence[Log]) -> Iterator[Problem]:
    for key in SHARED:
        values = [json.dumps(log.values[key]) for log in logs]
        if len(set(values)) > 1:
            usual, _ = Counter(values).most_common(1)[0]
            for log, value in zip(logs, values, strict=True):
                if value != usual:
                    what = f"{key} is {value}, in most of the runs {usual}: of another configuration"
                    yield Problem(log.path, log.lines[key], what)


def _same_seeds(logs: Sequence[Log]) -> Iterator[Problem]:
    first: dict[Any, Log] = {}
    for log in logs:
        seed = log.values["seed"]
        if seed in first:
            before = first[seed]
            what = f"seed {seed} is that of {before.path.name}:{before.lines['seed']} too"
            yield Problem(log.path, log.lines["seed"], what)
        first.setdefault(seed, log)


def _wrong_units(logs: Sequence[Log], ruleset: str) -> Iterator[Problem]:
    for log in logs:
        samples = int(log.values["samples_per_epoch"])
        if samples > 1 and (log.unit == samples) is not counts_samples(ruleset):
            logged, wanted = ("epochs", "samples") if counts_samples(ruleset) else ("samples", "epochs")
            yield Problem(log.path, log.unit_line, f"epoch_num is in {logged}, ruleset {ruleset} wants {wanted}")


def _not_by_the_rules(logs: Sequence[Log]) -> Iterator[Problem]:
    for log in logs:
        if not log.is_closed:
            continue
        for key, rule in CLOSED.items():
            if log.values[key] != rule:
                what = f"{key} is {json.dumps(log.values[key])}, the closed division's {json.dumps(rule)}"
                yield Problem(log.path, log.lines[key], what)
        if log.rule_violations:
            yield Problem(log.path, log.lines["submission_division"], f"closed, but: {'; '.join(log.rule_violations)}")
        schedule = make_schedule(1, log.values["samples_per_epoch"], None, None)
        first, interval = schedule.first_evaluation, schedule.interval
        scores = [record for record in log.records if record.key == "eval_accuracy"]
        for place, ((epoch, _), record) in enumerate(zip(log.evaluations, scores, strict=True)):
            if first is None or epoch != first + place * interval:
                what = f"an evaluation after epoch {epoch}; the rule: from {first} on every {interval}"
                yield Problem(log.path, record.line, what)
                break


def digest_of(path: Path) -> str:
    """SHA-256 of a log."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(logs: Sequence[Log], recorded: Mapping[str, str], originals: Mapping[str, Path]) -> list[Problem]:
    """Logs that are not what their runs wrote.

    Args:
        recorded: {result_0.txt: SHA-256} as the series noted them when each run ended.
        originals: the logs in the runs' own folders, by the same names.
    """
    problems = []
    for log in logs:
        name = log.path.name
        if name not in recorded:
            problems.append(Problem(log.path, 0, "no run of this series wrote it: a foreign log"))
        elif digest_of(log.path) != recorded[name]:
            line = _first_difference(log.path, originals[name])
            problems.append(Problem(log.path, line, "not what the run wrote: the log was changed afterwards"))
    return problems


def _first_difference(changed: Path, original: Path) -> int:
    """The first line that differs; 0 where nobody can say."""
    try:
        pair = [path.read_text(encoding="utf-8", errors="replace").splitlines() for path in (changed, original)]
    except OSError:
        return 0
    longest = max(map(len, pair))
    one, other = ([*lines, *[""] * (longest - len(lines) + 1)] for lines in pair)
    return next((number for number in range(1, longest + 1) if one[number - 1] != other[number - 1]), 0)
