"""Trackers only watch: the MLPerf log, JSON lines, run.json, and the table of `--trackers`. Rank 0 alone has any."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog.mllog import MLLogger

from common import registry
from common.errors import UserError
from common.files import rotate
from runtime.logging import events as ev
from runtime.mlperf.rulesets import epoch_unit

LOG_NAMES = ("unet3d.log", "log.jsonl", "run.json", "benchmark.json", "rates.csv", "tensorboard")


def rotate_logs(log_dir: Path) -> None:
    """Makes the log folder and keeps an earlier run's files under the next free number (unet3d.1.log, …).

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(log_dir, os.W_OK):
            raise PermissionError(13, "permission denied")
        rotate([log_dir / name for name in LOG_NAMES])
    except OSError as error:
        raise UserError(f"--log_dir {log_dir}: cannot be written: {error.strerror or error}") from None


class _Handler(logging.FileHandler):
    """Tells its caller of a disk that is full; logging's own way is a traceback on stderr for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        raise  # logging calls it while it handles the error


class MLPerfTracker:
    """`LOG_DIR/unet3d.log`: MLPerf's log, keys in the reference's order.

    From ruleset 3.1.0 on epochs are logged in samples (`epoch_num` = epoch x samples an epoch), the unit of these
    rulesets' reference convergence points, up to 3.0.0 in epochs; `epoch` beside it is always the plain number.
    """

    def __init__(self, log_dir: Path) -> None:
        logger = logging.Logger("unet3d.mlperf")  # not getLogger: no handler of another run can hang on to it
        logger.addHandler(_Handler(log_dir / "unet3d.log", mode="x", encoding="utf-8"))
        self._log = MLLogger(logger, root_dir=re.escape(str(Path(__file__).resolve().parents[2])))
        self._unit = 1
        self._handlers: dict[type[ev.Event], Callable[[Any], None]] = {
            ev.InitStarted: self._init_started,
            ev.InitStopped: self._init_stopped,
            ev.RunStarted: lambda event: self._log.start("run_start"),
            ev.DataOpened: self._data_opened,
            ev.BlockStarted: self._block_started,
            ev.BlockStopped: lambda event: self._log.end("block_stop", metadata=self._first(event.first_epoch)),
            ev.EpochStarted: lambda event: self._log.start("epoch_start", metadata=self._epoch(event.epoch)),
            ev.EpochStopped: lambda event: self._log.end("epoch_stop", metadata=self._epoch(event.epoch)),
            ev.EvaluationStarted: lambda event: self._log.start("eval_start", metadata=self._epoch(event.epoch)),
            ev.EvaluationStopped: self._evaluation_stopped,
            ev.RunStopped: self._run_stopped,
        }

    def on(self, event: ev.Event) -> None:
        if handler := self._handlers.get(type(event)):
            handler(event)

    def _epoch(self, epoch: int) -> dict[str, int]:
        return {"epoch_num": epoch * self._unit, "epoch": epoch}

    def _first(self, epoch: int) -> dict[str, int]:
        return {"first_epoch_num": epoch * self._unit}

    def _init_started(self, event: ev.InitStarted) -> None:
        self._log.event("cache_clear", event.caches_were_cleared)
        self._log.start("init_start")

    def _init_stopped(self, event: ev.InitStopped) -> None:
        config = event.config
        unit = self._unit = epoch_unit(config.ruleset, event.samples_per_epoch)
        values = {
            "seed": event.seeds["master"],
            "submission_benchmark": "unet3d",
            "submission_org": config.submission_org,
            "submission_division": event.division,
            "submission_status": config.submission_status,
            "submission_platform": event.platform,
            "opt_name": config.optimizer,
            "opt_base_learning_rate": config.learning_rate,
            "opt_learning_rate_warmup_epochs": config.lr_warmup_epochs * unit,
            "opt_learning_rate_decay_boundary_epochs": [e * unit for e in config.lr_decay_epochs],
            "opt_learning_rate_decay_factor": config.lr_decay_factor,
            "opt_weight_decay": config.weight_decay,
            "opt_momentum": config.momentum,
            "oversampling": config.oversampling,
            "training_input_shape": list(config.input_shape),
            "validation_input_shape": list(config.val_input_shape),
            "validation_overlap": config.overlap,
        }
        for key, value in values.items():
            reasons = {"departures": event.reasons} if key == "submission_division" and event.reasons else None
            self._log.event(key, value, metadata=reasons)
        for tensor in event.tensors:
            self._log.event("weights_initialization", metadata={"tensor": tensor})
        self._log.end("init_stop")

    def _data_opened(self, event: ev.DataOpened) -> None:
        for key in (
            "train_samples",
            "eval_samples",
            "samples_per_epoch",
            "global_batch_size",
            "gradient_accumulation_steps",
        ):
            self._log.event(key, getattr(event, key))

    def _block_started(self, event: ev.BlockStarted) -> None:
        count = {"epoch_count": event.epochs * self._unit}
        self._log.start("block_start", metadata=self._first(event.first_epoch) | count)

    def _evaluation_stopped(self, event: ev.EvaluationStopped) -> None:
        self._log.event("eval_accuracy", event.mean_dice, metadata=self._epoch(event.epoch))
        self._log.end("eval_stop", metadata=self._epoch(event.epoch))

    def _run_stopped(self, event: ev.RunStopped) -> None:
        self._log.end("run_stop", metadata={"status": event.status, "reason": event.reason} | self._epoch(event.epoch))


def tensor_names(network: torch.nn.Module) -> list[str]:
    """The `weights_initialization` names of a network's modules, in its order.

    The benchmark network's become MLPerf's (`downsample.2.conv1.0` -> `down2_block_0_conv`; the bottleneck counts as
    the last down block); another network's keep their own names with underscores.
    """
    kinds = {"Conv3d": "conv", "InstanceNormActivation": "instancenorm", "BatchNorm3d": "batchnorm"}
    downs = len(getattr(network, "downsample", ()))
    names = []
    for path, module in network.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        kind = kinds.get(type(module).__name__, "")
        match = re.fullmatch(r"(input_block|bottleneck|(?:down|up)sample\.\d+)\.(?:conv(\d)|upsample_conv)\.\d", path)
        if match:
            block = match[1].replace("bottleneck", f"down{downs}").replace("sample.", "").removesuffix("_block")
            names.append(f"{block}_deconv" if match[2] is None else f"{block}_block_{int(match[2]) - 1}_{kind}")
        else:
            names.append(path.replace(".", "_"))
    return names


class JsonLinesTracker:
    """`LOG_DIR/log.jsonl`: every event but single batches and steps, a JSON object a line, flushed at once."""

    def __init__(self, log_dir: Path) -> None:
        self._file = (log_dir / "log.jsonl").open("x", encoding="utf-8")

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.PhaseEnd | ev.MicroBatchEnd | ev.StepEnd | ev.CaseEvaluated | ev.RunFinalized):
            return
        values = {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
        if "config" in values:
            values["config"] = values["config"].to_json()
        line = {"event": type(event).__name__, "time_s": time.time(), **values}
        print(json.dumps(_strict(line), allow_nan=False), file=self._file, flush=True)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFileTracker:
    """`LOG_DIR/run.json`: configuration, environment, seeds and division, known before the first step."""

    def __init__(self, log_dir: Path) -> None:
        self._path = log_dir / "run.json"
        self._content: dict[str, Any] = {}

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.InitStarted):
            self._content |= {"config": event.config.to_json(), "environment": event.environment}
        if isinstance(event, ev.InitStopped):
            self._content |= {"seeds": event.seeds, "division": event.division, "departures": event.reasons}
            self._content |= {"platform": event.platform, "samples_per_epoch": event.samples_per_epoch}
            self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


TRACKERS: registry.Table[ev.Tracker] = {
    "mlperf": MLPerfTracker,
    "jsonl": JsonLinesTracker,
    "tensorboard": "runtime.logging.tensorboard:TensorBoard",
    "wandb": "runtime.logging.wandb:WeightsAndBiases",
    "mlflow": "runtime.logging.mlflow:MLflow",
}


def make_trackers(specs: Sequence[str], log_dir: Path) -> list[ev.Tracker]:
    """What `--trackers` names; each gets the log folder.

    Raises:
        UserError: an unknown name or argument, a missing package, or whatever a tracker cannot begin with.
    """
    made: list[ev.Tracker] = []
    for spec in specs:
        try:
            made.append(registry.build(registry.Spec(spec, trusted=True), TRACKERS, "--trackers", log_dir=log_dir))
        except UserError:
            raise
        except Exception as error:  # what other people's constructors raise is anything
            raise UserError(f"--trackers {spec!r}: {type(error).__name__}: {error}") from error
    return made


def left_behind(log_dir: Path, checkpoint: Path | None) -> list[str]:
    """What a run has written, for those who keep it elsewhere: checkpoint, logs, report and pictures."""
    logs = [log_dir / name for name in (*LOG_NAMES[:5], "report.html")]
    files = [*([checkpoint] if checkpoint else []), *logs, *sorted(log_dir.glob("report/*.png"))]
    written_at = {}
    for file in files:
        with suppress(OSError):  # not there, or a checkpoint that is being replaced as the run breaks off
            written_at[file] = file.stat().st_mtime
    # An earlier run's report or checkpoint may lie there still; run.json is this one's first file.
    began_at = written_at.get(log_dir / "run.json", math.inf)
    return [str(file) for file, time_s in written_at.items() if time_s >= began_at]
