"""Closed or open: what of a run departs from the closed division's rules (MLPerf Training rules for unet3d)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import UserError
from common.messages import logger
from data_loading.integrity import MLPERF_FINGERPRINTS, recorded_fingerprint
from runtime.arguments import RunConfig
from runtime.eval_schedule import RULE_SAMPLES, EvalSchedule, make_schedule
from runtime.flags import PLACEHOLDER_ORG

CLOSED_CASES = {"train": 168, "evaluation": 42}
# Every run must have ended after so many epochs of 168 samples.
RULE_LAST_EPOCH = 10_000
# What the rules fix, by flag; batch size, rates, momentum, warm-up, decay and weight decay are free.
CLOSED_FLAGS = {
    "optimizer": "sgd",
    "augment": ("mlperf",),
    "oversampling": 0.4,
    "input_shape": (128, 128, 128),
    "val_input_shape": (128, 128, 128),
    "overlap": 0.5,
    "quality_threshold": 0.908,
    "model": "unet3d",
    "normalization": "instancenorm",
    "activation": "relu",
    "loss": "dice_ce",
    "include_background": False,
    "load_ckpt_path": (),
    "init_from": None,
    "freeze": (),
    "lr_schedule": "multistep",
    "steps_per_epoch": None,
    "callbacks": (),
    "benchmark": False,
}
NAMED_CASES = 3


@dataclass(frozen=True)
class RuleViolation:
    """Where a run is not by the rules: what, how it is, how it must be ("" where that says itself)."""

    what: str
    yours: str
    rule: str

    def __str__(self) -> str:
        return f"{self.what} {self.yours}" + (f", not {self.rule}" if self.rule else "")


# Its log has a beginning elsewhere; who reads logs looks for it.
RESUMED = RuleViolation("the run", "was resumed", "")


@dataclass(frozen=True)
class Data:
    """What is known of a data set without reading a volume.

    Attributes:
        name: of its spec.
        split: cases by subset.
        fingerprint: over the recorded MD5s of its files; "" where some have none.
    """

    name: str
    split: Mapping[str, Sequence[str]]
    fingerprint: str


def rule_violations(
    config: RunConfig,
    data: Data,
    evaluation_ids: Sequence[str],
    fingerprint: str,
    schedule: EvalSchedule,
    samples_per_epoch: int,
) -> list[RuleViolation]:
    """Everything that makes this run an open one; empty for a closed run.

    Args:
        evaluation_ids: numbers of KiTS19's cases that the rules evaluate on.
        fingerprint: of MLPerf's preprocessed files.
    """
    found = _of_data(data, evaluation_ids, fingerprint)
    if config.loader == "synthetic":
        found.append(RuleViolation("--loader", "synthetic", "one of the data set's volumes"))
    values = config.to_json()
    for flag, expected in CLOSED_FLAGS.items():
        value = values[flag]
        if value != expected:
            found.append(RuleViolation(f"--{flag}", _plain(value), _plain(expected)))
    rule = make_schedule(schedule.epochs, samples_per_epoch, None, None)
    if (schedule.first_evaluation, schedule.interval) != (rule.first_evaluation, rule.interval):
        yours = f"from epoch {schedule.first_evaluation} every {schedule.interval}"
        found.append(RuleViolation("evaluation", yours, f"from {rule.first_evaluation} every {rule.interval}"))
    last = math.ceil(RULE_LAST_EPOCH * RULE_SAMPLES / samples_per_epoch)
    if schedule.epochs > last:
        found.append(RuleViolation("--epochs", str(schedule.epochs), f"at most {last}"))
    return found


def _of_data(data: Data, evaluation_ids: Sequence[str], fingerprint: str) -> list[RuleViolation]:
    found = [RuleViolation("data set", data.name, "kits19")] if data.name != "kits19" else []
    for subset, count in CLOSED_CASES.items():
        cases = len(data.split.get(subset, ()))
        if cases != count:
            found.append(RuleViolation(f"{subset} cases", str(cases), str(count)))
    if found:  # of another set's files and cases nothing more need be told
        return found
    expected = {f"case_{number}" for number in evaluation_ids}
    every = {f"case_{number:05d}" for number in range(sum(CLOSED_CASES.values()))}
    for subset, ids in {"train": every - expected, "evaluation": expected}.items():
        if strange := sorted(set(data.split[subset]) - ids):
            more = f" and {len(strange) - NAMED_CASES} more" if len(strange) > NAMED_CASES else ""
            found.append(RuleViolation(f"{subset} cases", f"with {', '.join(strange[:NAMED_CASES])}{more}", "MLPerf's"))
    if not data.fingerprint:
        rule = "MLPerf's; preprocess_dataset.py records them"
        found.append(RuleViolation("the files' MD5s", "not recorded", rule))
    elif data.fingerprint != fingerprint:
        found.append(RuleViolation("the files' fingerprint", f"{data.fingerprint[:12]}…", f"{fingerprint[:12]}…"))
    return found


def closed_division_violations(config: RunConfig) -> list[RuleViolation]:
    """What makes no run an open one, but no result of the closed division either."""
    found = []
    if config.submission_org == PLACEHOLDER_ORG:
        found.append(RuleViolation("--submission_org", "a placeholder", "who submits"))
    if config.seed >= 0:
        found.append(RuleViolation("--seed", str(config.seed), "-1, drawn from the system's entropy"))
    if "mlperf" not in config.trackers:
        found.append(RuleViolation("--trackers", _plain(config.trackers), "mlperf among them, which writes the log"))
    return found


def _plain(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def format_violations(found: Sequence[RuleViolation]) -> str:
    """A table for people: what, yours, the rule's."""
    rows = [("what", "yours", "the rule's"), *((one.what, one.yours, one.rule) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{what:{widths[0]}}  {yours:{widths[1]}}  {rule}" for what, yours, rule in rows)


def choose_division(asked: str, reasons: Sequence[RuleViolation]) -> str:
    """`auto` is closed where nothing departs. Raises UserError when closed is asked for and something does."""
    if asked == "closed" and reasons:
        raise UserError(f"--division closed, but: {'; '.join(map(str, reasons))}")
    return asked if asked != "auto" else "open" if reasons else "closed"


def settle_division(
    config: RunConfig,
    name: str,
    split: Mapping[str, Sequence[str]],
    evaluation_ids: Sequence[str],
    schedule: EvalSchedule,
    samples_per_epoch: int,
    others: Sequence[RuleViolation],
) -> tuple[str, list[str]]:
    """The run's division and what makes it an open one; reads the data set's index, and no volume.

    Args:
        name, split: of the data set.
        others: departures that no flag and no case tells.

    Raises:
        UserError: `--division closed`, but the rules are broken.
    """
    cases = [case for subset in split.values() for case in subset]
    known = "" if config.loader == "synthetic" else recorded_fingerprint(config.data_dir, cases)
    _, fingerprint = MLPERF_FINGERPRINTS["whole set"]
    found = rule_violations(config, Data(name, split, known), evaluation_ids, fingerprint, schedule, samples_per_epoch)
    found += others
    breaches = [*found, *closed_division_violations(config)] if config.division == "closed" else found
    if config.division == "closed" and breaches:
        logger.info(format_violations(breaches))
    return choose_division(config.division, breaches), list(map(str, found))
