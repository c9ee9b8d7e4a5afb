"""MLPerf's log key by key, JSON lines and run.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import UserError
from model.unet3d import Unet3d
from runtime.arguments import RunConfig
from runtime.logging import events as ev
from runtime.logging.base import make_trackers
from runtime.logging.jsonl import JsonLinesTracker, RunFileTracker
from runtime.logging.mlperf import MLPerfTracker, tensor_names
from tests.runtime.conftest import file_size_limit

MakeConfig = Callable[..., RunConfig]
SAMPLES_PER_EPOCH = 168
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tensors() -> list[str]:
    with torch.device("meta"):
        return tensor_names(Unet3d(1, 3))


def initialisation(config: RunConfig, tensors: list[str], reasons: list[str] | None = None) -> list[ev.Event]:
    seeds = {"master": 1234, "order": 1, "samples": 2, "ranks": (3,)}
    division = "open" if reasons else "closed"
    return [
        ev.InitStarted(config, {"torch": "2.13"}, caches_were_cleared=True),
        ev.InitStopped(
            config=config,
            seeds=seeds,
            division=division,
            rule_violations=reasons or [],
            platform="1xABACUS",
            tensors=tensors,
            samples_per_epoch=SAMPLES_PER_EPOCH,
            notes=[],
            data_digest="0123",
        ),
        ev.RunStarted(),
        ev.DataOpened(
            train_samples=168,
            eval_samples=42,
            samples_per_epoch=SAMPLES_PER_EPOCH,
            global_batch_size=4,
            gradient_accumulation_steps=2,
            classes=["background", "kidney", "tumour"],
        ),
    ]


def blocks(scores: dict[int, float]) -> Iterator[ev.Event]:
    """Blocks that end with an evaluation, by its epoch."""
    first = 1
    for last, score in scores.items():
        yield ev.BlockStarted(first, last - first + 1)
        for epoch in range(first, last + 1):
            yield ev.EpochStarted(epoch, 0.1, 2)
            for batch in (0, 1):
                yield from (
                    ev.PhaseEnd("data"),
                    ev.PhaseEnd("forward and backward"),
                    ev.MicroBatchEnd(epoch, batch, 84),
                )
                yield ev.StepEnd(epoch=epoch, batch=batch, loss=0.5, gradient_norm=1.0, loss_scale=1.0)
            yield ev.EpochStopped(epoch=epoch, loss=0.5, learning_rate=0.1, samples=168, seconds=1.0)
        yield ev.EvaluationStarted(last, 42)
        yield ev.CaseEvaluated(last, "case_00000")
        yield ev.EvaluationStopped(
            epoch=last,
            mean_dice=score,
            dice=[score, score],
            loss=0.2,
            seconds=1.0,
            per_case={"case_00000": [score, score]},
        )
        yield ev.BlockStopped(first, last - first + 1)
        first = last + 1


def whole_run(config: RunConfig, tensors: list[str], scores: dict[int, float]) -> list[ev.Event]:
    status, reason = ("success", "mean Dice reached") if max(scores.values()) >= 0.908 else ("aborted", "not reached")
    stopped = ev.RunStopped(status=status, reason=reason, epoch=max(scores), seconds=60.0)
    return [*initialisation(config, tensors), *blocks(scores), stopped]


def send(tracker: ev.Tracker, events: list[ev.Event]) -> None:
    """Hands over the events; then, as the dispatcher does, closes the files."""
    with ev.EventDispatcher([tracker]):
        for event in events:
            tracker.on(event)


def read_log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith(":::MLLOG ") for line in lines)
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def value_of(records: list[dict[str, Any]], key: str) -> Any:
    (record,) = [record for record in records if record["key"] == key]
    return record["value"]


# MLPerf's log


HEAD = """
    cache_clear init_start seed submission_benchmark submission_org submission_division submission_status
    submission_platform opt_name opt_base_learning_rate opt_learning_rate_warmup_epochs
    opt_learning_rate_decay_boundary_epochs opt_learning_rate_decay_factor opt_weight_decay opt_momentum oversampling
    training_input_shape validation_input_shape validation_overlap
""".split()  # noqa: SIM905, a list literal would be a line a key
DATA = ["train_samples", "eval_samples", "samples_per_epoch", "global_batch_size", "gradient_accumulation_steps"]
EPOCH = ["epoch_start", "epoch_stop"]
EVALUATION = ["eval_start", "eval_accuracy", "eval_stop"]
TAIL = [
    *("block_start", *EPOCH, *EPOCH, *EVALUATION, "block_stop"),
    *("block_start", *EPOCH, *EVALUATION, "block_stop"),
    "run_stop",
]


def test_keys_come_in_the_references_order(tmp_path: Path, make_config: MakeConfig, tensors: list[str]) -> None:
    send(MLPerfTracker(tmp_path), whole_run(make_config(), tensors, {2: 0.5, 3: 0.91}))
    keys = [record["key"] for record in read_log(tmp_path / "unet3d.log")]
    assert len(tensors) == 50
    assert keys == [*HEAD, *["weights_initialization"] * 50, "init_stop", "run_start", *DATA, *TAIL]


def test_values_are_the_runs(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(
        submission_org="ACME",
        submission_status="cloud",
        optimizer="lamb",
        learning_rate=2.0,
        lr_warmup_epochs=5,
        lr_decay_epochs=(10, 20),
        lr_decay_factor=0.5,
        weight_decay=0.01,
        momentum=0.8,
        oversampling=0.3,
        input_shape=(64, 32, 96),
        val_input_shape=(96, 64, 32),
        overlap=0.25,
    )
    send(MLPerfTracker(tmp_path), initialisation(config, ["a", "b"], reasons=["one", "two"]))
    records = read_log(tmp_path / "unet3d.log")
    assert {key: value_of(records, key) for key in [*HEAD, *DATA]} == {
        "cache_clear": True,
        "init_start": None,
        "seed": 1234,
        "submission_benchmark": "unet3d",
        "submission_org": "ACME",
        "submission_division": "open",
        "submission_status": "cloud",
        "submission_platform": "1xABACUS",
        "opt_name": "lamb",
        "opt_base_learning_rate": 2.0,
        "opt_learning_rate_warmup_epochs": 5 * SAMPLES_PER_EPOCH,
        "opt_learning_rate_decay_boundary_epochs": [10 * SAMPLES_PER_EPOCH, 20 * SAMPLES_PER_EPOCH],
        "opt_learning_rate_decay_factor": 0.5,
        "opt_weight_decay": 0.01,
        "opt_momentum": 0.8,
        "oversampling": 0.3,
        "training_input_shape": [64, 32, 96],
        "validation_input_shape": [96, 64, 32],
        "validation_overlap": 0.25,
        "train_samples": 168,
        "eval_samples": 42,
        "samples_per_epoch": SAMPLES_PER_EPOCH,
        "global_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    (division,) = [record for record in records if record["key"] == "submission_division"]
    assert division["metadata"]["rule_violations"] == ["one", "two"]
    tensors = [record["metadata"]["tensor"] for record in records if record["key"] == "weights_initialization"]
    assert tensors == ["a", "b"]


def test_epochs_are_counted_in_samples_with_the_plain_number_beside(
    tmp_path: Path, make_config: MakeConfig, tensors: list[str]
) -> None:
    send(MLPerfTracker(tmp_path), whole_run(make_config(), tensors, {2: 0.5, 3: 0.91}))
    metadata: dict[str, list[Any]] = {}
    for record in read_log(tmp_path / "unet3d.log"):
        own = {name: value for name, value in record["metadata"].items() if name not in ("file", "lineno")}
        metadata.setdefault(record["key"], []).append(own)
    epochs = [{"epoch_num": epoch * 168, "epoch": epoch} for epoch in (1, 2, 3)]
    assert metadata["epoch_start"] == epochs
    assert metadata["epoch_stop"] == epochs
    for key in ("eval_start", "eval_accuracy", "eval_stop"):
        assert metadata[key] == epochs[1:]
    assert metadata["block_start"] == [
        {"first_epoch_num": 168, "epoch_count": 2 * 168},
        {"first_epoch_num": 3 * 168, "epoch_count": 168},
    ]
    assert metadata["block_stop"] == [{"first_epoch_num": 168}, {"first_epoch_num": 3 * 168}]
    assert metadata["run_stop"] == [{"status": "success", "reason": "mean Dice reached"} | epochs[2]]
    assert "rule_violations" not in metadata["submission_division"][0]


def test_up_to_ruleset_3_0_epochs_are_counted_in_epochs(
    tmp_path: Path, make_config: MakeConfig, tensors: list[str]
) -> None:
    """In every line that has them; the rest of the log is the same."""
    for ruleset in ("3.0.0", "3.1.0"):
        (tmp_path / ruleset).mkdir()
        config = make_config(ruleset=ruleset, lr_warmup_epochs=5, lr_decay_epochs=(10, 20))
        send(MLPerfTracker(tmp_path / ruleset), whole_run(config, tensors, {2: 0.5, 3: 0.91}))
    in_epochs, in_samples = (read_log(tmp_path / ruleset / "unet3d.log") for ruleset in ("3.0.0", "3.1.0"))
    assert value_of(in_epochs, "opt_learning_rate_warmup_epochs") == 5
    assert value_of(in_epochs, "opt_learning_rate_decay_boundary_epochs") == [10, 20]
    scaled = ("epoch_num", "first_epoch_num", "epoch_count")
    counted = set()
    for old, new in zip(in_epochs, in_samples, strict=True):
        for name in scaled:
            if name in old["metadata"]:
                counted.add((old["key"], name))
                assert new["metadata"][name] == 168 * old["metadata"][name]
            assert (name in old["metadata"]) is (name in new["metadata"])
        assert old["metadata"].get("epoch") == new["metadata"].get("epoch") == old["metadata"].get("epoch_num")
    keys = [*EPOCH, *EVALUATION, "run_stop"]
    blocks_ = [("block_start", "first_epoch_num"), ("block_start", "epoch_count"), ("block_stop", "first_epoch_num")]
    assert counted == {*((key, "epoch_num") for key in keys), *blocks_}


def test_intervals_points_and_scores(tmp_path: Path, make_config: MakeConfig, tensors: list[str]) -> None:
    send(MLPerfTracker(tmp_path), whole_run(make_config(), tensors, {2: 0.5, 3: 0.91}))
    records = read_log(tmp_path / "unet3d.log")
    for record in records:
        kind = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}.get(record["key"].rpartition("_")[2])
        assert record["event_type"] == (kind or "POINT_IN_TIME"), record["key"]
        assert record["metadata"]["file"] == "runtime/logging/mlperf.py", "no path of this machine in the log"
    assert [record["value"] for record in records if record["key"] == "eval_accuracy"] == [0.5, 0.91]
    times = [record["time_ms"] for record in records]
    assert times == sorted(times)


@pytest.mark.parametrize("ruleset", ["2.1.0", "4.0.0"])
@pytest.mark.parametrize(("score", "passes"), [(0.9081, True), (0.9079, False)])
def test_mlperfs_checker_on_a_closed_run(
    ruleset: str, score: float, passes: bool, tmp_path: Path, make_config: MakeConfig, tensors: list[str]
) -> None:
    """2.1.0 demands the exact names of all tensors; both demand 168 and 42 samples and 0.908 in the closed division."""
    send(MLPerfTracker(tmp_path), whole_run(make_config(), tensors, {2: 0.5, 4: score}))
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", ruleset]
    done = subprocess.run(
        [*command, "--log_output", str(tmp_path / "checker.log"), str(tmp_path / "unet3d.log")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is passes, output
    assert ("SUCCESS" in output) is passes, output
    assert ("Failed checks for eval_accuracy" in output) is not passes, output


def test_two_runs_do_not_write_into_each_others_log(tmp_path: Path, make_config: MakeConfig) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        send(MLPerfTracker(folder), initialisation(make_config(), ["x"]))
    first, second = (len(read_log(folder / "unet3d.log")) for folder in folders)
    assert first == second == len(HEAD) + 1 + 2 + len(DATA)


def test_nothing_reaches_the_console(
    tmp_path: Path, make_config: MakeConfig, tensors: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for tracker in (MLPerfTracker(tmp_path), JsonLinesTracker(tmp_path), RunFileTracker(tmp_path)):
        send(tracker, whole_run(make_config(), tensors, {2: 0.5}))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ends_early", [True, False])
def test_files_are_closed_however_a_run_ends(ends_early: bool, tmp_path: Path) -> None:
    trackers = make_trackers(["mlperf", "jsonl"], tmp_path)
    with suppress(KeyboardInterrupt), ev.EventDispatcher(trackers) as emit:
        emit(ev.RunStarted())
        if ends_early:
            raise KeyboardInterrupt
    assert open_files(tmp_path) == []


def test_files_are_closed_if_a_later_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trackers 'none': unknown name") as caught:
        make_trackers(["mlperf", "jsonl", "none"], tmp_path)
    assert open_files(tmp_path) == []
    assert caught.tb  # keeps the trackers, which would close their files when they are deleted


def open_files(folder: Path) -> list[str]:
    """Returns the files below a folder that this process has open."""
    links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return [target for link in links if link.is_symlink() and (target := os.readlink(link)).startswith(str(folder))]


def test_an_existing_log_is_never_overwritten(tmp_path: Path) -> None:
    for name, tracker in (("unet3d.log", MLPerfTracker), ("log.jsonl", JsonLinesTracker)):
        (tmp_path / name).write_text("an earlier run's")
        with pytest.raises(FileExistsError):
            tracker(tmp_path)
        assert (tmp_path / name).read_text() == "an earlier run's"


# Names of tensors


def mlperf_tensors() -> list[str]:
    """Returns the names that ruleset 2.1.0 demands, by the documented pattern."""
    names = []
    for block in ["input_block", *(f"down{i}" for i in range(5))]:
        prefix = "input" if block == "input_block" else block
        names += [f"{prefix}_block_{i}_{kind}" for i in (0, 1) for kind in ("conv", "instancenorm")]
    for i in range(5):
        names.append(f"up{i}_deconv")
        names += [f"up{i}_block_{j}_{kind}" for j in (0, 1) for kind in ("conv", "instancenorm")]
    return [*names, "output_conv"]


def test_tensor_names_are_mlperfs(tensors: list[str]) -> None:
    assert len(tensors) == len(set(tensors)) == 50
    assert set(tensors) == set(mlperf_tensors())


def test_tensor_names_go_in_the_networks_order(tensors: list[str]) -> None:
    assert tensors[:2] == ["input_block_0_conv", "input_block_0_instancenorm"]
    assert tensors[4] == "down0_block_0_conv"
    assert tensors.index("down3_block_1_instancenorm") < tensors.index("down4_block_0_conv")
    assert tensors[-1] == "output_conv"


def test_tensor_names_of_other_networks() -> None:
    small = tensor_names(Unet3d(1, 2, "batchnorm", filters=(2, 4, 4)))
    assert "down1_block_0_batchnorm" in small, "the bottleneck is the last down block at any depth"
    assert "up1_deconv" in small
    other = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    assert tensor_names(other) == ["0", "2_0"]


# JSON lines and run.json


def test_json_lines_hold_every_event_but_batches_steps_and_cases(
    tmp_path: Path, make_config: MakeConfig, tensors: list[str]
) -> None:
    events = whole_run(make_config(save_ckpt_path=Path("c.pth")), tensors, {2: 0.5, 3: 0.91})
    before = time.time()
    send(JsonLinesTracker(tmp_path), events)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    left_out = ev.PhaseEnd | ev.MicroBatchEnd | ev.StepEnd | ev.CaseEvaluated
    kept = [event for event in events if not isinstance(event, left_out)]
    assert [record["event"] for record in records] == [type(event).__name__ for event in kept]
    assert all(before <= record["time_s"] <= time.time() for record in records)
    for record, event in zip(records, kept, strict=True):
        assert set(record) == {"event", "time_s"} | {field.name for field in dataclasses.fields(event)}
    scores = [record for record in records if record["event"] == "EvaluationStopped"]
    assert scores[1]["per_case"] == {"case_00000": [0.91, 0.91]}
    assert records[0]["config"]["save_ckpt_path"] == "c.pth"
    assert records[0]["config"]["input_shape"] == [128, 128, 128]


def test_json_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path)
    tracker.on(ev.RunStarted())
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    tracker.close_files()


def test_the_run_file_is_complete_before_the_first_step(tmp_path: Path, make_config: MakeConfig) -> None:
    tracker = RunFileTracker(tmp_path)
    begin = initialisation(make_config(), ["x"], reasons=["one"])
    send(tracker, begin[:2])
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["seeds"] == {"master": 1234, "order": 1, "samples": 2, "ranks": [3]}
    assert (content["division"], content["rule_violations"], content["platform"]) == ("open", ["one"], "1xABACUS")
    assert (content["environment"], content["samples_per_epoch"]) == ({"torch": "2.13"}, 168)
    assert content["config"]["batch_size"] == 2
    assert content["data_digest"] == "0123"


def test_a_full_disk_is_reported_to_the_dispatcher(
    tmp_path: Path, make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """It warns once; `logging` by itself prints a traceback on stderr for every line."""
    for tracker in (MLPerfTracker(tmp_path), JsonLinesTracker(tmp_path)):
        with file_size_limit(100), pytest.raises(OSError, match="File too large"):
            send(tracker, initialisation(make_config(), ["x"]))
    assert capfd.readouterr() == ("", "")


def test_a_lost_loss_is_still_a_line(tmp_path: Path) -> None:
    stopped = ev.EpochStopped(epoch=1, loss=math.nan, learning_rate=0.1, samples=8, seconds=1.0)
    send(JsonLinesTracker(tmp_path), [stopped])
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line)["loss"] is None
    assert "NaN" not in line  # JSON has none: strict readers would refuse the whole file
