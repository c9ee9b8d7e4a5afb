"""Closed or open: a run by the rules has no departures, and each departure is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import UserError
from runtime.arguments import RunConfig
from runtime.division import choose_division, departures
from runtime.training import Schedule, make_schedule

MakeConfig = Callable[..., RunConfig]

SPLIT = {"train": [f"t{i}" for i in range(168)], "evaluation": [f"e{i}" for i in range(42)]}
SCHEDULE = make_schedule(10_000, 168, None, None)


def test_a_run_by_the_rules_departs_from_nothing(make_config: MakeConfig) -> None:
    assert departures(make_config(), "kits19", SPLIT, SCHEDULE, 168) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 28},
        {"ga_steps": 4},
        {"learning_rate": 2.0},
        {"init_learning_rate": 1e-3},
        {"momentum": 0.95},
        {"weight_decay": 1e-4},
        {"lr_warmup_epochs": 1000},
        {"lr_decay_epochs": (2000,)},
        {"lr_decay_factor": 0.5},
        {"seed": 7},
        {"epochs": 4000},
        {"layout": "NDHWC"},
        {"amp": True},
        {"amp_dtype": "fp16"},
        {"num_workers": 0},
        {"loader": "device"},
        {"val_batch_size": 9},
        {"untimed_steps": 0},
        {"compile": True},
        {"cudnn_benchmark": True},
        {"save_ckpt_path": Path("c.pth")},
        {"submission_org": "ACME"},
    ],
    ids=str,
)
def test_what_the_rules_leave_free_is_free(changed: dict[str, Any], make_config: MakeConfig) -> None:
    assert departures(make_config(**changed), "kits19", SPLIT, SCHEDULE, 168) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"loader": "synthetic"}, "--loader synthetic, not the data set's volumes"),
        ({"optimizer": "lamb"}, "--optimizer lamb, not sgd"),
        ({"augment": ("mlperf(flips='')",)}, "--augment mlperf(flips=''), not mlperf"),
        ({"augment": ("mlperf", "rot90")}, "--augment mlperf rot90, not mlperf"),
        ({"loss": "dice"}, "--loss dice, not dice_ce"),
        ({"oversampling": 0.5}, "--oversampling 0.5, not 0.4"),
        ({"input_shape": (128, 128, 64)}, "--input_shape 128 128 64, not 128 128 128"),
        ({"val_input_shape": (64, 128, 128)}, "--val_input_shape 64 128 128, not 128 128 128"),
        ({"overlap": 0.25}, "--overlap 0.25, not 0.5"),
        ({"quality_threshold": 0.9}, "--quality_threshold 0.9, not 0.908"),
        ({"model": "unet3d(filters=(4,8))"}, "--model unet3d(filters=(4,8)), not unet3d"),
        ({"normalization": "batchnorm"}, "--normalization batchnorm, not instancenorm"),
        ({"activation": "leaky_relu"}, "--activation leaky_relu, not relu"),
        ({"include_background": True}, "--include_background True, not False"),
        ({"load_ckpt_path": (Path("c.pth"),)}, "--load_ckpt_path c.pth, not none"),
        ({"benchmark": True}, "--benchmark True, not False"),
    ],
    ids=str,
)
def test_each_fixed_flag_is_named(changed: dict[str, Any], told: str, make_config: MakeConfig) -> None:
    assert departures(make_config(**changed), "kits19", SPLIT, SCHEDULE, 168) == [told]


def test_another_data_set_and_other_counts(make_config: MakeConfig) -> None:
    split = {"train": SPLIT["train"][:-1], "evaluation": [*SPLIT["evaluation"], "one more"]}
    assert departures(make_config(), "hippocampus", split, SCHEDULE, 168) == [
        "data set hippocampus, not kits19",
        "167 train cases, not 168",
        "43 evaluation cases, not 42",
    ]
    assert "0 evaluation cases, not 42" in departures(make_config(), "kits19", {}, SCHEDULE, 168)


@pytest.mark.parametrize(
    "schedule",
    [
        replace(SCHEDULE, first_evaluation=999),
        replace(SCHEDULE, interval=10),
        replace(SCHEDULE, first_evaluation=None),
    ],
)
def test_another_schedule_is_told_beside_the_rules(schedule: Schedule, make_config: MakeConfig) -> None:
    (told,) = departures(make_config(), "kits19", SPLIT, schedule, 168)
    assert told == (
        f"evaluation from epoch {schedule.first_evaluation} every {schedule.interval}, not from 1000 every 20"
    )


def test_the_rules_schedule_is_that_of_the_runs_samples(make_config: MakeConfig) -> None:
    """166 samples an epoch (batch 2 on 83 ranks, say): the rule's epochs are 1013 and 21."""
    assert departures(make_config(), "kits19", SPLIT, Schedule(9999, 1013, 21), 166) == []
    assert len(departures(make_config(), "kits19", SPLIT, SCHEDULE, 166)) == 1


def test_every_departure_is_told(make_config: MakeConfig) -> None:
    config = make_config(optimizer="adam", overlap=0.25, benchmark=True)
    assert len(departures(config, "phantom", {"train": [], "evaluation": []}, Schedule(1, 1, 1), 168)) == 7


@pytest.mark.parametrize(
    ("asked", "reasons", "division"),
    [
        ("auto", [], "closed"),
        ("auto", ["--overlap 0.25, not 0.5"], "open"),
        ("closed", [], "closed"),
        ("open", [], "open"),
        ("open", ["--overlap 0.25, not 0.5"], "open"),
    ],
)
def test_the_division_follows_from_the_reasons(asked: str, reasons: list[str], division: str) -> None:
    assert choose_division(asked, reasons) == division


def test_closed_with_a_departure_is_refused_with_every_reason() -> None:
    with pytest.raises(UserError, match=r"^--division closed, but: 1 train cases, not 168; --overlap 0\.25, not 0\.5$"):
        choose_division("closed", ["1 train cases, not 168", "--overlap 0.25, not 0.5"])
