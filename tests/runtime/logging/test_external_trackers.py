"""TensorBoard, W&B and MLflow, each with the real package: a run is recorded, then read back by the package itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from common.errors import UserError
from runtime.arguments import RunConfig
from runtime.logging import events as ev
from runtime.logging import mlflow as mlflow_tracker
from runtime.logging.base import Recorder, make_trackers
from runtime.logging.events import EventDispatcher
from runtime.logging.mlflow import MLflow
from tests.conftest import ROOT

MakeConfig = Callable[..., RunConfig]
OFFLINE = "wandb(project='kits', mode='offline')"
CLASSES = ["background", "kidney", "a tumour, or a cyst"]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the tester has set for these tools must not reach the tests, and nothing the tester's home."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "MLFLOW_TRACKING_URI":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # Set by the tracker, and to be forgotten after the test.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))


def png(path: Path) -> Path:
    """A picture of 3 x 2 grey pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = zlib.compress(b"\0abc\0abc")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def run(config: RunConfig, files: list[Path], exit_status: int = 0, status: str = "success") -> list[ev.Event]:
    """Two epochs of two steps of two micro-batches, each evaluated; one loss is no number."""
    events: list[ev.Event] = [
        ev.InitStarted(config, {"torch": "2.13", "command": ["main.py", "--epochs", "2"]}, False),
        ev.InitStopped(
            config=config,
            seeds={"master": 1234},
            division="open",
            rule_violations=["one", "two"],
            platform="1xABACUS",
            tensors=["a"],
            samples_per_epoch=8,
            notes=[],
        ),
        ev.RunStarted(),
        ev.DataOpened(
            train_samples=8,
            eval_samples=2,
            samples_per_epoch=8,
            global_batch_size=4,
            gradient_accumulation_steps=2,
            classes=CLASSES,
        ),
    ]
    for epoch in (1, 2):
        events.append(ev.EpochStarted(epoch, 0.1 * epoch, 4))
        for batch in range(4):
            events.append(ev.MicroBatchEnd(epoch, batch, 2))
            if batch % 2:
                loss = math.nan if (epoch, batch) == (2, 3) else 1.0 / (epoch + batch)
                events.append(
                    ev.StepEnd(epoch=epoch, batch=batch, loss=loss, gradient_norm=0.5 * epoch, loss_scale=65536.0)
                )
        events.append(ev.EpochStopped(epoch=epoch, loss=0.5 / epoch, learning_rate=0.1 * epoch, samples=8, seconds=2.0))
        events.append(
            ev.EvaluationStopped(
                epoch=epoch, mean_dice=0.3 * epoch, dice=[0.4 * epoch, 0.2 * epoch], loss=0.25, seconds=1.5
            )
        )
    stopped = ev.RunStopped(
        status=status, reason="mean Dice 0.6000 reached 0.6", epoch=2, seconds=61.0, exit_status=exit_status
    )
    return [*events, stopped, ev.RunFinalized([str(file) for file in files])]


# What a tool must have of that run: name: {epoch or step: value}.
CURVES = {
    "step/loss": {1: 0.5, 2: 0.25, 3: 1 / 3, 4: math.nan},
    "step/gradient_norm": {1: 0.5, 2: 0.5, 3: 1.0, 4: 1.0},
    "step/loss_scale": dict.fromkeys((1, 2, 3, 4), 65536.0),
    "train/loss": {1: 0.5, 2: 0.25},
    "train/learning_rate": {1: 0.1, 2: 0.2},
    "train/samples_per_s": {1: 4.0, 2: 4.0},
    "evaluation/mean_dice": {1: 0.3, 2: 0.6},
    "evaluation/dice_kidney": {1: 0.4, 2: 0.8},
    "evaluation/dice_a tumour, or a cyst": {1: 0.2, 2: 0.4},
    "evaluation/loss": {1: 0.25, 2: 0.25},
    "evaluation/seconds": {1: 1.5, 2: 1.5},
}


def hold(found: dict[str, dict[int, float]], expected: dict[str, dict[int, float]] = CURVES) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, nan_ok=True), name


def record(folder: Path, spec: str, events: list[ev.Event]) -> None:
    (tracker,) = make_trackers([spec], folder)
    for event in events:
        tracker.on(event)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new database of MLflow's, which takes it seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> str:
    """The URI of LOG_DIR/mlflow.db, which is there and empty."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """What a run leaves: a checkpoint, a log, a picture."""
    (tmp_path / "checkpoint.pth").write_bytes(b"weights")
    (tmp_path / "log.jsonl").write_text("{}\n")
    return [tmp_path / "checkpoint.pth", tmp_path / "log.jsonl", png(tmp_path / "report" / "curves.png")]


# TensorBoard


def scalars(folder: Path) -> tuple[EventAccumulator, dict[str, dict[int, float]]]:
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    return read, {name: {point.step: point.value for point in read.Scalars(name)} for name in read.Tags()["scalars"]}


def text(read: EventAccumulator, name: str) -> str:
    (point,) = read.Tensors(f"{name}/text_summary")
    return str(point.tensor_proto.string_val[0].decode())


def test_tensorboard_has_the_curves_the_configuration_and_the_pictures(
    tmp_path: Path, make_config: MakeConfig, files: list[Path]
) -> None:
    record(tmp_path, "tensorboard", run(make_config(learning_rate=0.125, model="a|b"), files))
    read, found = scalars(tmp_path)
    hold(found)
    assert "| learning_rate | 0.125 |" in text(read, "config")
    assert "| model | a&#124;b |" in text(read, "config"), "a bar would end the table's cell"
    assert "| torch | 2.13 |" in text(read, "environment")
    assert "| seed | 1234 |" in text(read, "run")
    assert text(read, "end") == "target reached after 2 epochs: mean Dice 0.6000 reached 0.6"
    assert str(tmp_path / "checkpoint.pth") in text(read, "files")
    (picture,) = read.Images("pictures/curves")
    assert (picture.width, picture.height, picture.step) == (3, 2, 2)
    assert picture.encoded_image_string == files[2].read_bytes()


@pytest.mark.parametrize("spec", ["tensorboard(every=2)", "tensorboard(every=3)"])
def test_one_step_in_so_many_is_recorded(tmp_path: Path, make_config: MakeConfig, spec: str) -> None:
    record(tmp_path, spec, run(make_config(), []))
    steps = (2, 4) if "2" in spec else (3,)
    curves = {n: {x: v for x, v in c.items() if x in steps or not n.startswith("step/")} for n, c in CURVES.items()}
    hold(scalars(tmp_path)[1], curves)


# Weights & Biases


def records(folder: Path) -> list[Record]:
    """What an offline run has stored: LevelDB's log format, after a header of 7 bytes."""
    # `finish` may return before W&B's process has written its last; a program's end waits for it, by this call.
    wandb.teardown()
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a block's rest that holds no header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last; 2 and 3 go on in the next
            found.append(Record.FromString(whole))
            whole = b""
    return found


def items(update: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def history(stored: list[Record]) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for record in stored:
        row = items(record.history.item)
        axis = "step" if "step" in row else "epoch"
        for name, value in row.items():
            if name.partition("/")[0] in ("step", "train", "evaluation") and "/" in name:
                curves.setdefault(name, {})[row[axis]] = float(value)
    return curves


def test_wandb_offline_has_the_curves_the_configuration_and_the_artefacts(
    tmp_path: Path, make_config: MakeConfig, files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, OFFLINE, run(make_config(learning_rate=0.125), files))
    stored = records(tmp_path)
    hold(history(stored))
    config = {name: value for record in stored for name, value in items(record.config.update).items()}
    assert config["learning_rate"] == 0.125
    assert config["environment"]["torch"] == "2.13"
    assert config["run"] == {
        "seed": 1234,
        "division": "open",
        "rule_violations": ["one", "two"],
        "platform": "1xABACUS",
        "classes": CLASSES,
        "train_samples": 8,
        "eval_samples": 2,
        "global_batch_size": 4,
    }
    summary = {name: value for record in stored for name, value in items(record.summary.update).items()}
    assert (summary["status"], summary["reason"]) == ("success", "mean Dice 0.6000 reached 0.6")
    kept = {r.request.log_artifact.artifact.type or r.artifact.type: r for r in stored if r.HasField("artifact")}
    manifests = {kind: {e.path for e in r.artifact.manifest.contents} for kind, r in kept.items()}
    assert manifests == {"model": {"checkpoint.pth"}, "record": {"log.jsonl", "curves.png"}}
    assert [record.exit.exit_code for record in stored if record.HasField("exit")] == [0]
    assert {record.run.project for record in stored if record.HasField("run")} == {"kits"}
    assert any((tmp_path / "wandb").glob("offline-run-*/files/media/images/pictures/curves_*.png"))
    # What was to be uploaded is a copy: the checkpoint may be replaced before `wandb sync`.
    assert b"weights" in {path.read_bytes() for path in (tmp_path / "wandb" / "artifacts").rglob("*") if path.is_file()}
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "home").exists(), "nothing is written outside the folders given"


@pytest.mark.parametrize("exit_status", [0, 3, 143])
def test_wandb_has_the_exit_status_of_an_aborted_run(tmp_path: Path, make_config: MakeConfig, exit_status: int) -> None:
    """One of 0 has used up its epochs in order, below its target."""
    record(tmp_path, OFFLINE, run(make_config(), [], exit_status, status="aborted"))
    assert [record.exit.exit_code for record in records(tmp_path) if record.HasField("exit")] == [exit_status]


def test_wandb_is_offline_unless_asked(tmp_path: Path, make_config: MakeConfig) -> None:
    record(tmp_path, "wandb", run(make_config(), []))
    assert {record.run.project for record in records(tmp_path) if record.HasField("run")} == {"unet3d"}


# MLflow


def mlflow_run(uri: str, experiment: str = "unet3d") -> tuple[MlflowClient, Run]:
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    (found,) = client.search_runs([known.experiment_id])
    return client, found


def metrics(client: MlflowClient, found: Run) -> dict[str, dict[int, float]]:
    return {
        name: {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)}
        for name in found.data.metrics
    }


def test_mlflow_has_the_curves_the_configuration_and_the_artefacts(
    tmp_path: Path, make_config: MakeConfig, files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path}/of_ours.db"
    spec = f"mlflow(uri={uri!r}, experiment='kits', name='first')"
    record(tmp_path, spec, run(make_config(learning_rate=0.125, model="x" * 9000), files))
    client, found = mlflow_run(uri, "kits")
    # MLflow refuses commas in names.
    hold(metrics(client, found), {name.replace(",", "_"): values for name, values in CURVES.items()})
    assert found.data.params["learning_rate"] == "0.125"
    assert set(found.data.params) == {field.name for field in dataclasses.fields(RunConfig)}
    assert len(found.data.params["model"]) == 5000
    assert found.data.tags["environment.torch"] == "2.13"
    assert found.data.tags["run.seed"] == "1234"
    assert (found.data.tags["run.status"], found.info.status) == ("success", "FINISHED")
    assert found.info.run_name == "first"
    kept = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert kept == {"checkpoint.pth", "log.jsonl", "pictures"}
    assert [file.path for file in client.list_artifacts(found.info.run_id, "pictures")] == ["pictures/curves.png"]
    (weights,) = (tmp_path / "of_ours_artifacts").rglob("checkpoint.pth")
    assert weights.read_bytes() == b"weights"
    assert capfd.readouterr() == ("", ""), "a new database is made in silence"
    assert not Path("mlruns").exists()


def test_mlflow_keeps_its_database_in_the_log_folder_and_marks_aborted_runs(
    tmp_path: Path, make_config: MakeConfig, database: str
) -> None:
    for exit_status in (0, 3, 143):  # the second finds the experiment
        record(tmp_path, "mlflow", run(make_config(), [], exit_status, status="aborted"))
    client = MlflowClient(tracking_uri=database)
    known = client.get_experiment_by_name("unet3d")
    assert known is not None
    statuses = [found.info.status for found in client.search_runs([known.experiment_id])]  # the latest first
    assert statuses == ["KILLED", "FAILED", "FINISHED"]


def test_mlflow_takes_many_metrics_at_once(tmp_path: Path, make_config: MakeConfig, database: str) -> None:
    events = run(make_config(), [])
    steps: list[ev.Event] = [
        ev.StepEnd(epoch=1, batch=2 * step + 1, loss=1.0, gradient_norm=1.0, loss_scale=1.0) for step in range(1200)
    ]
    record(tmp_path, "mlflow", [*events[:4], ev.EpochStarted(1, 0.1, 2400), *steps, *events[-2:]])
    client, found = mlflow_run(database)
    assert len(metrics(client, found)["step/loss"]) == 1200


@pytest.mark.usefixtures("database")
def test_a_server_that_fails_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tracker,) = make_trackers(["mlflow"], tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    announce = EventDispatcher([tracker])
    for event in run(make_config(), []):
        announce(event)
    warned = capsys.readouterr().err.splitlines()
    assert warned == [
        "warning: MLflow failed (ConnectionError: the server is gone); its record may be incomplete, training goes on"
    ]


@pytest.mark.usefixtures("database")
def test_a_server_that_does_not_answer_keeps_nobody_waiting(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tracker,) = make_trackers(["mlflow"], tmp_path)
    answered = threading.Event()
    monkeypatch.setattr(MlflowClient, "create_run", lambda *_, **__: answered.wait(60))
    monkeypatch.setattr(mlflow_tracker, "CLOSE_S", 0.1)
    try:
        *events, closed = run(make_config(), [])
        for event in events:
            tracker.on(event)
        with pytest.raises(TimeoutError, match=r"did not accept everything within 0\.1 s"):
            tracker.on(closed)
        assert isinstance(tracker, MLflow)
    finally:
        answered.set()


# All of them


@pytest.mark.parametrize("spec", ["tensorboard", OFFLINE, "mlflow"])
def test_a_run_that_breaks_off_is_closed(tmp_path: Path, make_config: MakeConfig, database: str, spec: str) -> None:
    events = run(make_config(), [], exit_status=1, status="aborted")
    record(tmp_path, spec, [*events[:6], *events[-2:]])
    if spec == "mlflow":
        _, found = mlflow_run(database)
        assert found.info.status == "FAILED"
        assert found.data.tags["run.status"] == "aborted"
    elif spec == "tensorboard":
        assert text(scalars(tmp_path)[0], "end").startswith("stopped after 2 epochs")
    else:
        assert any(record.HasField("exit") for record in records(tmp_path))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tensorboard(every=0)", r"every=0; expected a whole number, 1 or more"),
        ("tensorboard(evry=2)", r"unknown argument 'evry'; it takes every=1$"),
        ("wandb(projekt='a')", r"it takes project='unet3d', mode=None, entity=None, .*, every=1$"),
        ("wandb(mode='sometimes')", r"--trackers \"wandb\(mode='sometimes'\)\": "),
        ("mlflow(uri='file:///tmp/runs')", r"MlflowException: The filesystem tracking backend"),
        ("mlflow(uri='sqlite:////dev/null/no.db')", r"--trackers \"mlflow\(uri='sqlite:////dev/null/no.db'\)\": "),
    ],
)
def test_a_tracker_that_cannot_begin_is_reported_before_the_run(tmp_path: Path, spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_trackers([spec], tmp_path)


def test_every_value_of_a_recorder_is_recorded_with_its_epoch_or_step(make_config: MakeConfig) -> None:
    class Notes(Recorder):
        def __init__(self) -> None:
            super().__init__(every=1)
            self.axes: dict[str, set[str]] = {}

        def begin(self, facts: dict[str, dict[str, Any]]) -> None:
            assert list(facts) == ["config", "environment", "run"]

        def log_values(self, axis: str, at: int, values: dict[str, float]) -> None:
            for name in values:
                self.axes.setdefault(axis, set()).add(name)

        def end(self, event: ev.RunStopped) -> None: ...

        def close(self, files: list[Path]) -> None: ...

    notes = Notes()
    for event in run(make_config(), []):
        notes.on(event)
    steps = {name for name in CURVES if name.startswith("step/")}
    assert notes.axes == {"step": steps, "epoch": set(CURVES) - steps}


def test_a_missing_package_is_one_line_with_what_to_install(tmp_path: Path) -> None:
    """In a process of its own: here the modules have been imported."""
    tools = ("tensorboard", "wandb", "mlflow")
    program = f"""
import sys, pathlib
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {tools!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from runtime.logging.base import make_trackers
from common.errors import UserError
for tool in {tools!r}:
    try:
        make_trackers([tool], pathlib.Path({str(tmp_path)!r}))
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    line = "--trackers {0}: needs {0}, which is not installed; pip install '.[{0}]'"
    assert done.stdout.splitlines() == [line.format(tool) for tool in tools]


def test_no_tool_is_imported_unless_it_is_named() -> None:
    tools = {"tensorboard", "wandb", "mlflow", "prediction", "report", "submission"}
    program = f"import sys, main; print({tools} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_nobody_s_telemetry() -> None:
    """Both packages send telemetry by default; it is disabled before they are imported."""
    program = """
import runtime.logging.mlflow, runtime.logging.wandb
from mlflow.telemetry.client import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
from wandb.env import error_reporting_enabled
print(is_telemetry_disabled(), get_telemetry_client(), error_reporting_enabled())
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "True None False\n", done.stderr
