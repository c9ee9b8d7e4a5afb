"""`--trackers 'wandb(project="kits", mode="offline")'`: Weights & Biases.

Offline unless asked for otherwise, in LOG_DIR/wandb; `wandb sync LOG_DIR/wandb/offline-run-*` uploads it later.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Read on import: the package reports its own errors to its developers.
os.environ["WANDB_ERROR_REPORTING"] = "false"

from wandb import Artifact, Image, Settings, init

from common.messages import logger
from runtime.logging import events as ev
from runtime.logging.base import Recorder

# Timeouts without a network; what was not uploaded stays in the log folder.
INIT_S = 30.0
FINISH_S = 300.0
MODES = ("offline", "online", "disabled", "shared")


class WeightsAndBiases(Recorder):
    """A new W&B run for each run, including a resumed one.

    Args:
        project, entity, name, group, tags: passed on to W&B.
        mode: "offline", "online" or "disabled"; None: $WANDB_MODE, or else offline.
        every: record one step in `every`.
    """

    def __init__(
        self,
        log_dir: Path,
        project: str = "unet3d",
        mode: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        every: int = 1,
    ) -> None:
        super().__init__(every)
        # Write only to the given folders: by default W&B copies artifacts to the home folder.
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str(log_dir.resolve() / "wandb"))
        (log_dir / "wandb").mkdir(exist_ok=True)
        settings = Settings(
            init_timeout=INIT_S,
            login_timeout=INIT_S,
            finish_timeout=FINISH_S,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
        )
        self._run = init(
            project=project,
            entity=entity,
            name=name,
            group=group,
            tags=list(tags),
            dir=str(log_dir),
            mode=mode or os.environ.get("WANDB_MODE") or "offline",  # type: ignore[arg-type]
            reinit="create_new",
            settings=settings,
        )
        if not self._run.offline and self._run.url:
            logger.info(f"wandb: {self._run.url}")
        for axis, prefixes in (("step", ("step",)), ("epoch", ("train", "evaluation"))):
            self._run.define_metric(axis, hidden=True)
            for prefix in prefixes:
                self._run.define_metric(f"{prefix}/*", step_metric=axis)
        self._run.define_metric("evaluation/mean_dice", step_metric="epoch", summary="max,last")
        self._exit_code = 1

    def begin(self, facts: dict[str, dict[str, Any]]) -> None:
        self._run.config.update({**facts["config"], "environment": facts["environment"], "run": facts["run"]})

    def log_values(self, axis: str, index: int, values: dict[str, float]) -> None:
        self._run.log({axis: index, **values})

    def end(self, event: ev.RunStopped) -> None:
        self._run.summary.update({"status": event.status, "reason": event.reason, "seconds": event.seconds})
        self._exit_code = event.exit_status

    def close(self, files: list[Path]) -> None:
        for kind, name in (("model", "checkpoint"), ("record", "record")):
            chosen = [file for file in files if (file.suffix == ".pth") == (kind == "model")]
            if chosen and not self._run.disabled:
                artifact = Artifact(f"{name}-{self._run.id}", type=kind)
                for file in chosen:
                    artifact.add_file(str(file))
                self._run.log_artifact(artifact)
        if pictures := [file for file in files if file.suffix == ".png"]:
            self._run.log({f"pictures/{file.stem}": Image(str(file)) for file in pictures})
        self._run.finish(exit_code=self._exit_code)
