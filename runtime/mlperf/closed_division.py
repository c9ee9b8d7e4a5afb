"""Closed or open division: checks a run against the closed division's rules (MLPerf Training rules for unet3d)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from common.messages import logger, note
from data_loading.integrity import fingerprint, recorded_md5s
from data_loading.mlperf_md5 import MLPERF_FINGERPRINT, compare, describe_known, doubtful_cases
from runtime.arguments import RunConfig, as_plain, format_value
from runtime.eval_schedule import RULE_SAMPLES, EvalSchedule, make_schedule
from runtime.flag_fields import flag_names
from runtime.io_flags import PLACEHOLDER_ORG

CLOSED_CASES = {"train": 168, "evaluation": 42}
# A run must end within this number of epochs of 168 samples.
RULE_LAST_EPOCH = 10_000
# What the rules fix, by flag. Batch size, learning rates, momentum, warm-up, decay and weight decay are free.
CLOSED_FLAGS: dict[str, Any] = {
    name: as_plain(RunConfig.__dataclass_fields__[name].default) for name in flag_names(RunConfig, closed=True)
}
# Cases that one message names.
NAMED_CASES = 3


@dataclass(frozen=True)
class RuleViolation:
    """One point in which a run does not follow the rules.

    Attributes:
        item: the flag or property.
        actual: its value in this run.
        required: the value that the rules require; "" where `actual` makes it clear.
    """

    item: str
    actual: str
    required: str

    def __str__(self) -> str:
        return f"{self.item} {self.actual}" + (f", not {self.required}" if self.required else "")


# The log of a resumed run starts in another file; programs that read logs look for this violation.
RESUMED = RuleViolation("the run", "was resumed", "")


@dataclass(frozen=True, kw_only=True)
class DatasetIdentity:
    """Identity of a preprocessed data set, as far as it is known without reading a volume.

    Attributes:
        name: the name in its spec.
        split: case ids by subset.
        fingerprint: digest of the recorded MD5s of its files; "" if any is not recorded.
        known_differences: a line for each file that differs from MLPerf's as is known of the published scan; [] unless
            all others are MLPerf's.
        doubtful_cases: why, by case.
    """

    name: str
    split: Mapping[str, Sequence[str]]
    fingerprint: str
    known_differences: Sequence[str] = ()
    doubtful_cases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the division of a run depends on.

    Attributes:
        evaluation_ids: numbers of the KiTS19 cases that the rules evaluate on.
        samples_per_epoch: over all ranks.
        other_violations: those that follow from neither flags nor cases.
    """

    config: RunConfig
    dataset: DatasetIdentity
    evaluation_ids: Sequence[str]
    schedule: EvalSchedule
    samples_per_epoch: int
    other_violations: Sequence[RuleViolation] = ()


def identify_dataset(config: RunConfig, name: str, split: Mapping[str, Sequence[str]]) -> DatasetIdentity:
    """Returns the identity of the run's data set; reads the data set's index, and no volume."""
    cases = [case for subset in split.values() for case in subset]
    digests = {} if config.loader == "synthetic" else recorded_md5s(config.data_dir, cases)
    compared = compare(digests)
    return DatasetIdentity(
        name=name,
        split=split,
        fingerprint=fingerprint(digests) if digests else "",
        known_differences=[describe_known(file, digests[file]) for file in compared.known if compared.accepted],
        doubtful_cases=doubtful_cases(digests),
    )


def settle_division(run: RunFacts) -> tuple[str, list[str]]:
    """Returns the run's division and its rule violations as text.

    Prints a table of the violations if `--division closed` is refused.

    Raises:
        UserError: `--division closed`, but rules are violated.
    """
    violations = rule_violations(run)
    for difference in run.dataset.known_differences:
        note(f"accepted as one of MLPerf's files: {difference}")
    is_closed = run.config.division == "closed"
    obstacles = [*violations, *closed_division_violations(run.config)] if is_closed else violations
    if is_closed and obstacles:
        logger.info(format_violations(obstacles))
    return choose_division(run.config.division, obstacles), list(map(str, violations))


def rule_violations(run: RunFacts) -> list[RuleViolation]:
    """Returns everything that makes this run an open one; empty for a closed run."""
    violations = _dataset_violations(run.dataset, run.evaluation_ids)
    if run.config.loader == "synthetic":
        violations.append(RuleViolation("--loader", "synthetic", "one of the data set's volumes"))
    values = run.config.to_json()
    for flag, required in CLOSED_FLAGS.items():
        if values[flag] != required:
            violations.append(RuleViolation(f"--{flag}", format_value(values[flag]), format_value(required)))
    schedule, rule = run.schedule, make_schedule(run.schedule.epochs, run.samples_per_epoch)
    if (schedule.first_evaluation, schedule.interval) != (rule.first_evaluation, rule.interval):
        first = schedule.first_evaluation
        actual = f"from epoch {first} every {schedule.interval}" if first else "never"
        violations.append(RuleViolation("evaluation", actual, f"from {rule.first_evaluation} every {rule.interval}"))
    last = math.ceil(RULE_LAST_EPOCH * RULE_SAMPLES / run.samples_per_epoch)
    if schedule.epochs > last:
        violations.append(RuleViolation("--epochs", str(schedule.epochs), f"at most {last}"))
    return [*violations, *run.other_violations]


def _dataset_violations(dataset: DatasetIdentity, evaluation_ids: Sequence[str]) -> list[RuleViolation]:
    violations = [RuleViolation("data set", dataset.name, "kits19")] if dataset.name != "kits19" else []
    for subset, count in CLOSED_CASES.items():
        cases = len(dataset.split.get(subset, ()))
        if cases != count:
            violations.append(RuleViolation(f"{subset} cases", str(cases), str(count)))
    if violations:  # the cases and files of another data set need no further report
        return violations
    expected = {f"case_{number}" for number in evaluation_ids}
    all_ids = {f"case_{number:05d}" for number in range(sum(CLOSED_CASES.values()))}
    for subset, ids in {"train": all_ids - expected, "evaluation": expected}.items():
        if unexpected := sorted(set(dataset.split[subset]) - ids):
            more = f" and {len(unexpected) - NAMED_CASES} more" if len(unexpected) > NAMED_CASES else ""
            named = f"with {', '.join(unexpected[:NAMED_CASES])}{more}"
            violations.append(RuleViolation(f"{subset} cases", named, "MLPerf's"))
    if not dataset.fingerprint:
        required = "MLPerf's; preprocess_dataset.py records them"
        violations.append(RuleViolation("the files' MD5s", "not recorded", required))
    elif dataset.fingerprint != MLPERF_FINGERPRINT and not dataset.known_differences:
        required = f"{MLPERF_FINGERPRINT[:12]}…; preprocess_dataset.py --mode verify names the files"
        violations.append(RuleViolation("the files' fingerprint", f"{dataset.fingerprint[:12]}…", required))
    return violations


def closed_division_violations(config: RunConfig) -> list[RuleViolation]:
    """Returns what does not make a run an open one, but keeps it from being a closed-division result."""
    violations = []
    if config.submission_org == PLACEHOLDER_ORG:
        violations.append(RuleViolation("--submission_org", "a placeholder", "the submitting organization"))
    if config.seed >= 0:
        violations.append(RuleViolation("--seed", str(config.seed), "-1, drawn from the system's entropy"))
    if "mlperf" not in config.trackers:
        required = "a list with mlperf, which writes the log"
        violations.append(RuleViolation("--trackers", format_value(config.trackers), required))
    return violations


def format_violations(violations: Sequence[RuleViolation]) -> str:
    """Returns a table with the columns item, this run, required."""
    rows = [("item", "this run", "required"), *((v.item, v.actual, v.required) for v in violations)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{item:{widths[0]}}  {actual:{widths[1]}}  {required}" for item, actual, required in rows)


def choose_division(requested: str, violations: Sequence[RuleViolation]) -> str:
    """Returns the division of a run; `auto` is closed if there are no violations.

    Raises:
        UserError: closed is requested in spite of violations.
    """
    if requested == "closed" and violations:
        raise UserError(f"--division closed, but: {'; '.join(map(str, violations))}")
    return requested if requested != "auto" else "open" if violations else "closed"
