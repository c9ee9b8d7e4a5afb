"""`LOG_DIR/unet3d.log`, MLPerf's log, and the names that its rulesets give the network's tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlperf_logging.mllog.mllog import MLLogger
from torch import nn

from runtime.logging import events as ev
from runtime.mlperf.rulesets import epoch_unit


class _Handler(logging.FileHandler):
    """Raises where the disk is full; by itself `logging` prints a traceback on stderr for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        raise  # logging calls it while it handles the error


class MLPerfTracker:
    """`LOG_DIR/unet3d.log`: MLPerf's log, with its keys in the reference's order.

    Rulesets from 3.1.0 on count epochs in samples (`epoch_num` = epoch x samples per epoch), as their reference
    convergence points do; rulesets up to 3.0.0 count epochs. `epoch` beside it is always the number of the epoch.
    A resumed run counts the epochs before it like its own, as it does not know whether they had other samples.
    """

    def __init__(self, log_dir: Path) -> None:
        # Not getLogger, which would return an earlier run's logger with its handler.
        logger = logging.Logger("unet3d.mlperf")
        self._file = _Handler(log_dir / "unet3d.log", mode="x", encoding="utf-8")
        logger.addHandler(self._file)
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

    def close_files(self) -> None:
        self._file.close()

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
            metadata = (
                {"rule_violations": event.rule_violations}
                if key == "submission_division" and event.rule_violations
                else None
            )
            self._log.event(key, value, metadata=metadata)
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


def tensor_names(network: nn.Module) -> list[str]:
    """Returns the `weights_initialization` names of a network's modules, in the network's order.

    The benchmark network's become MLPerf's (`downsample.2.conv1.0` -> `down2_block_0_conv`; the bottleneck counts as
    the last down block); another network's keep their own names with underscores.
    """
    kinds = {nn.Conv3d: "conv", nn.InstanceNorm3d: "instancenorm", nn.BatchNorm3d: "batchnorm"}
    downs = len(getattr(network, "downsample", ()))
    names = []
    for path, module in network.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        kind = next((kind for base, kind in kinds.items() if isinstance(module, base)), "")
        match = re.fullmatch(r"(input_block|bottleneck|(?:down|up)sample\.\d+)\.(?:conv(\d)|upsample_conv)\.\d", path)
        if match:
            block = match[1].replace("bottleneck", f"down{downs}").replace("sample.", "").removesuffix("_block")
            names.append(f"{block}_deconv" if match[2] is None else f"{block}_block_{int(match[2]) - 1}_{kind}")
        else:
            names.append(path.replace(".", "_"))
    return names
