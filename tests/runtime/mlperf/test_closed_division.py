"""Closed or open division: a run by the rules has no violations, and each violation is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.messages import notes_held, take_notes
from data_loading import mlperf_md5
from data_loading.index import INDEX_NAME, CaseRecord, DatasetIndex, write_json
from data_loading.mlperf_md5 import MLPERF_FINGERPRINT, published_md5
from data_loading.spec import KITS19
from runtime.arguments import RunConfig, parse_arguments
from runtime.eval_schedule import EvalSchedule, make_schedule
from runtime.mlperf.closed_division import (
    CLOSED_FLAGS,
    RESUMED,
    DatasetIdentity,
    RuleViolation,
    RunFacts,
    choose_division,
    closed_division_violations,
    format_violations,
    identify_dataset,
    rule_violations,
    settle_division,
)
from runtime.mlperf.convergence import find_reference

MakeConfig = Callable[..., RunConfig]

IDS = (Path(__file__).resolve().parents[3] / "evaluation_cases.txt").read_text(encoding="utf-8").split()
SPLIT = {
    "train": [f"case_{number:05d}" for number in range(210) if f"{number:05d}" not in IDS],
    "evaluation": [f"case_{number}" for number in IDS],
}
SCHEDULE = make_schedule(10_000, 168, None, None)


def test_the_fixed_flags_and_their_values() -> None:
    assert CLOSED_FLAGS == {
        "exclude": (),
        "max_grad_norm": None,
        "ema_decay": None,
        "class_sampling_weights": (),
        "test_time_flips": "",
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
        "folds": 0,
        "splits": None,
        "freeze": (),
        "lr_schedule": "multistep",
        "steps_per_epoch": None,
        "callbacks": (),
        "benchmark": False,
    }


def violations_of(
    config: RunConfig,
    name: str = "kits19",
    split: dict[str, list[str]] = SPLIT,
    schedule: EvalSchedule = SCHEDULE,
    samples_per_epoch: int = 168,
    fingerprint: str = MLPERF_FINGERPRINT,
) -> list[str]:
    """The violations, as phrases."""
    run = RunFacts(
        config=config,
        dataset=DatasetIdentity(name=name, split=split, fingerprint=fingerprint),
        evaluation_ids=IDS,
        schedule=schedule,
        samples_per_epoch=samples_per_epoch,
    )
    return list(map(str, rule_violations(run)))


def test_a_run_by_the_rules_violates_nothing(make_config: MakeConfig) -> None:
    assert violations_of(make_config()) == []


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
        {"prewarm_steps": 0},
        {"compile": True},
        {"plain_operators": ("norm",)},
        {"cudnn_benchmark": True},
        {"save_ckpt_path": Path("c.pth")},
        {"submission_org": "ACME"},
    ],
    ids=str,
)
def test_what_the_rules_leave_free_is_free(changed: dict[str, Any], make_config: MakeConfig) -> None:
    assert violations_of(make_config(**changed)) == []


@pytest.mark.parametrize(
    ("changed", "phrase"),
    [
        ({"loader": "synthetic"}, "--loader synthetic, not one of the data set's volumes"),
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
        ({"exclude": ("23", "68")}, "--exclude 23 68, not none"),
        ({"benchmark": True}, "--benchmark True, not False"),
    ],
    ids=str,
)
def test_each_fixed_flag_is_named(changed: dict[str, Any], phrase: str, make_config: MakeConfig) -> None:
    assert violations_of(make_config(**changed)) == [phrase]


def test_another_data_set_and_other_counts(make_config: MakeConfig) -> None:
    split = {"train": SPLIT["train"][:-1], "evaluation": [*SPLIT["evaluation"], "one more"]}
    assert violations_of(make_config(), "hippocampus", split) == [
        "data set hippocampus, not kits19",
        "train cases 167, not 168",
        "evaluation cases 43, not 42",
    ]
    assert "evaluation cases 0, not 42" in violations_of(make_config(), split={})


@pytest.mark.parametrize(
    "schedule",
    [
        replace(SCHEDULE, first_evaluation=999),
        replace(SCHEDULE, interval=10),
    ],
)
def test_another_schedule_is_reported_with_the_rules(schedule: EvalSchedule, make_config: MakeConfig) -> None:
    (phrase,) = violations_of(make_config(), schedule=schedule)
    assert phrase == (
        f"evaluation from epoch {schedule.first_evaluation} every {schedule.interval}, not from 1000 every 20"
    )


def test_a_run_without_evaluations_is_reported(make_config: MakeConfig) -> None:
    schedule = replace(SCHEDULE, first_evaluation=None)
    assert violations_of(make_config(), schedule=schedule) == ["evaluation never, not from 1000 every 20"]


def test_the_rules_schedule_is_that_of_the_runs_samples(make_config: MakeConfig) -> None:
    """166 samples an epoch (batch 2 on 83 ranks, say): the rule's epochs are 1013 and 21."""
    assert violations_of(make_config(), schedule=EvalSchedule(9999, 1013, 21), samples_per_epoch=166) == []
    assert len(violations_of(make_config(), samples_per_epoch=166)) == 1


def test_every_violation_is_reported(make_config: MakeConfig) -> None:
    config = make_config(optimizer="adam", overlap=0.25, benchmark=True)
    assert len(violations_of(config, "phantom", {"train": [], "evaluation": []}, EvalSchedule(1, 1, 1))) == 7


def test_the_cap_on_epochs_is_the_rules(make_config: MakeConfig) -> None:
    """10,000 epochs of 168 samples: at 128 samples an epoch 13,125."""
    last = make_schedule(13_125, 128, None, None)
    assert violations_of(make_config(), schedule=last, samples_per_epoch=128) == []
    assert violations_of(make_config(), schedule=replace(last, epochs=13_126), samples_per_epoch=128) == [
        "--epochs 13126, not at most 13125"
    ]


def test_other_cases_are_named(make_config: MakeConfig) -> None:
    """The right numbers of cases, but two have changed places, or do not belong to KiTS19."""
    moved, held = SPLIT["train"][0], SPLIT["evaluation"][0]
    split = {"train": [held, *SPLIT["train"][1:]], "evaluation": [moved, *SPLIT["evaluation"][1:]]}
    assert violations_of(make_config(), split=split) == [
        f"train cases with {held}, not MLPerf's",
        f"evaluation cases with {moved}, not MLPerf's",
    ]
    strangers = [f"case_{number:05d}" for number in range(300, 305)]
    split = {"train": [*strangers, *SPLIT["train"][5:]], "evaluation": SPLIT["evaluation"]}
    assert violations_of(make_config(), split=split) == [
        "train cases with case_00300, case_00301, case_00302 and 2 more, not MLPerf's"
    ]


def test_volumes_must_be_mlperfs_and_known_to_be(make_config: MakeConfig) -> None:
    assert violations_of(make_config(), fingerprint="0123456789abcdef") == [
        "the files' fingerprint 0123456789ab…, not e7c2853b7ae3…; preprocess_dataset.py --mode verify names the files"
    ]
    (unknown,) = violations_of(make_config(), fingerprint="")
    assert unknown.startswith("the files' MD5s not recorded")


def write_index(folder: Path, digests: dict[str, str]) -> None:
    """Writes an index of the 210 cases with these MD5s, and no volume."""
    records = {
        case: CaseRecord(
            transform=None,
            boxes={},
            digests={kind: digests[f"{case}_{kind}.npy"] for kind in "xy"},
            source_stamp=[],
            statistics={},
        )
        for cases in SPLIT.values()
        for case in cases
    }
    write_json(folder / INDEX_NAME, DatasetIndex(spec=KITS19, split=SPLIT, cases=records).to_json())


@pytest.mark.parametrize(
    ("changed", "is_closed"),
    [
        ([], True),
        (["case_00043_x.npy"], True),
        (["case_00043_y.npy"], False),
        (["case_00043_x.npy", "case_00043_y.npy"], False),
        (["case_00043_x.npy", "case_00044_x.npy"], False),
    ],
)
def test_the_one_known_difference_is_accepted_and_logged(
    make_config: MakeConfig, tmp_path: Path, changed: list[str], is_closed: bool
) -> None:
    write_index(tmp_path, {**published_md5(), **dict.fromkeys(changed, "0" * 32)})
    config = make_config(data_dir=tmp_path, submission_org="ACME", seed=-1)
    run = RunFacts(
        config=config,
        dataset=identify_dataset(config, "kits19", SPLIT),
        evaluation_ids=IDS,
        schedule=SCHEDULE,
        samples_per_epoch=168,
    )
    with notes_held():
        assert settle_division(run)[0] == ("closed" if is_closed else "open")
        notes = take_notes()
    assert len(notes) == (is_closed and bool(changed))
    assert run.dataset.doubtful_cases == mlperf_md5.DOUBTFUL_CASES
    if notes:
        assert notes[0].startswith(
            f"accepted as one of MLPerf's files: case_00043_x.npy: MD5 {'0' * 32}, not MLPerf's "
        )
        assert "issue 545" in notes[0]


def test_a_result_has_no_placeholders(make_config: MakeConfig) -> None:
    assert closed_division_violations(make_config(submission_org="ACME", seed=-1)) == []
    violations = closed_division_violations(make_config(seed=7, trackers=("jsonl",)))
    assert [violation.item for violation in violations] == ["--submission_org", "--seed", "--trackers"]


def test_the_table_has_item_run_and_requirement() -> None:
    table = format_violations([RuleViolation("--overlap", "0.25", "0.5"), RuleViolation("the run", "was resumed", "")])
    assert table.splitlines() == [
        "item       this run     required",
        "--overlap  0.25         0.5",
        "the run    was resumed  ",
    ]


OVERLAP = RuleViolation("--overlap", "0.25", "0.5")


@pytest.mark.parametrize(
    ("asked", "reasons", "division"),
    [
        ("auto", [], "closed"),
        ("auto", [OVERLAP], "open"),
        ("closed", [], "closed"),
        ("open", [], "open"),
        ("open", [OVERLAP], "open"),
    ],
)
def test_the_division_follows_from_the_reasons(asked: str, reasons: list[RuleViolation], division: str) -> None:
    assert choose_division(asked, reasons) == division


def test_closed_with_violations_is_refused_with_every_reason() -> None:
    with pytest.raises(UserError, match=r"^--division closed, but: train cases 1, not 168; --overlap 0\.25, not 0\.5$"):
        choose_division("closed", [RuleViolation("train cases", "1", "168"), OVERLAP])


def test_settling_reports_all_violations_in_one_table(
    tmp_path: Path,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--data_dir holds no files: MD5s that are not recorded are a violation, and no volume is read."""

    def settle(asked: str) -> tuple[str, list[str]]:
        config = make_config(data_dir=tmp_path, division=asked, overlap=0.25)
        return settle_division(
            RunFacts(
                config=config,
                dataset=identify_dataset(config, "kits19", SPLIT),
                evaluation_ids=IDS,
                schedule=SCHEDULE,
                samples_per_epoch=168,
                other_violations=[RESUMED],
            )
        )

    unknown = "the files' MD5s not recorded, not MLPerf's; preprocess_dataset.py records them"
    reasons = [unknown, "--overlap 0.25, not 0.5", "the run was resumed"]
    assert settle("auto") == settle("open") == ("open", reasons)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--submission_org a placeholder, not the submitting organization"):
        settle("closed")
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table] == [
        "item",
        "the files' MD5s",
        "--overlap",
        "the run",
        "--submission_org",
    ]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError):
        settle("closed")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("recipe", "ranks", "batch", "mean", "least"),
    [
        ("1xgpu", 1, 28, "345,167", "318,186"),
        ("8xgpu", 8, 56, "357,404", "334,053"),
        ("12xgpu", 12, 84, "416,640", "389,598"),
    ],
)
def test_the_recipes_are_by_the_rules_and_say_what_to_expect(
    recipe: str, ranks: int, batch: int, mean: str, least: str
) -> None:
    path = Path(__file__).resolve().parents[3] / "recipes" / f"kits19_{recipe}.args"
    config, _ = parse_arguments([f"@{path}", "--data_dir", "DATA", "--submission_org", "ACME"])
    schedule = make_schedule(config.epochs, 168, config.start_eval_at, config.evaluate_every)
    assert violations_of(config, schedule=schedule) == []
    assert closed_division_violations(config) == []
    assert config.batch_size * ranks * config.ga_steps == batch
    assert config.epochs == 10_000
    reference = find_reference(batch)
    assert reference
    assert (f"{reference.mean:,.0f}", f"{reference.least:,.0f}") == (mean, least)
    text = path.read_text(encoding="utf-8")
    epochs = [f"{round(samples / 168):,} epochs" for samples in (reference.mean, reference.least)]
    assert all(phrase in text for phrase in (f"mean {mean}", f"least accepted {least}", *epochs))
