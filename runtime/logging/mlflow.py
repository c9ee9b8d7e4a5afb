"""`--trackers 'mlflow(uri="sqlite:///mlflow.db")'`: MLflow, with a database or a server."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Read on import: the package reports its use to its developers.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
# Give up on a server that does not answer after a minute instead of ten; a user's own settings come first.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from common.errors import interrupted_exit
from runtime.logging import events as ev
from runtime.logging.base import Recorder

# MLflow's limits: metrics and parameters per call, characters per value.
MAX_METRICS, MAX_PARAMETERS, MAX_LENGTH = 1000, 100, 5000
# Interval at which the values of the steps are sent.
SEND_S = 10.0
# Limit for the last calls at the end of the run, including a checkpoint's upload.
CLOSE_S = 300.0


class MLflow(Recorder):
    """A new MLflow run for each run, including a resumed one. A thread makes the calls, so that training never waits.

    Args:
        uri: of the database or server; None: $MLFLOW_TRACKING_URI, or else LOG_DIR/mlflow.db.
        experiment: its name; created if it does not exist, with its artifacts beside the database.
        name: of the run.
        every: record one step in `every`.
    """

    def __init__(
        self, log_dir: Path, uri: str | None = None, experiment: str = "unet3d", name: str | None = None, every: int = 1
    ) -> None:
        super().__init__(every)
        for logger in ("mlflow", "alembic"):  # they log twenty lines when they create a database
            logging.getLogger(logger).setLevel(logging.WARNING)
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{log_dir.resolve() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = find_experiment(self._client, experiment, uri)
        self._name = name
        self._run = ""
        self._status = "FAILED"
        self._metrics: list[Metric] = []
        self._sent_at = time.monotonic()
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def on(self, event: ev.Event) -> None:
        super().on(event)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # raised at the next event
                self._error = self._error or error

    def begin(self, facts: dict[str, dict[str, Any]]) -> None:
        self._jobs.put(partial(self._create, facts))

    def _create(self, facts: dict[str, dict[str, Any]]) -> None:
        self._run = self._client.create_run(self._experiment, run_name=self._name).info.run_id
        parameters = [Param(name, _short(value)) for name, value in facts["config"].items()]
        tags = [
            RunTag(f"{kind}.{name}", _short(value))
            for kind in ("environment", "run")
            for name, value in facts[kind].items()
        ]
        for at in range(0, len(parameters), MAX_PARAMETERS):
            self._log(params=parameters[at : at + MAX_PARAMETERS])
        self._log(tags=tags)

    def _log(self, **values: Any) -> None:
        self._client.log_batch(self._run, **values)

    def log_values(self, axis: str, index: int, values: dict[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        # MLflow refuses other characters in a name; a class name may have them.
        self._metrics += [Metric(re.sub(r"[^\w.\-/ ]", "_", name), v, now_ms, index) for name, v in values.items()]
        if axis == "epoch" or time.monotonic() - self._sent_at > SEND_S or len(self._metrics) > MAX_METRICS // 2:
            self._send()

    def _send(self) -> None:
        for at in range(0, len(self._metrics), MAX_METRICS):
            self._jobs.put(partial(self._log, metrics=self._metrics[at : at + MAX_METRICS]))
        self._metrics = []
        self._sent_at = time.monotonic()

    def end(self, event: ev.RunStopped) -> None:
        self._send()
        tags = [RunTag("run.status", event.status), RunTag("run.reason", _short(event.reason))]
        self._jobs.put(partial(self._log, tags=tags))
        is_interrupted = event.exit_status > interrupted_exit(0)
        self._status = "KILLED" if is_interrupted else "FAILED" if event.exit_status else "FINISHED"

    def close(self, files: list[Path]) -> None:
        def upload() -> None:
            for file in files:
                self._client.log_artifact(self._run, str(file), "pictures" if file.suffix == ".png" else None)

        self._jobs.put(upload)
        self._jobs.put(lambda: self._client.set_terminated(self._run, self._status))
        self._jobs.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise TimeoutError(f"MLflow did not accept everything within {CLOSE_S:g} s")


def find_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Returns the experiment's id. A new one keeps its artifacts beside a database, or where its server decides."""
    if known := client.get_experiment_by_name(name):
        return str(known.experiment_id)
    database = Path(uri.removeprefix("sqlite:///"))
    folder = database.resolve().with_name(f"{database.stem}_artifacts").as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=folder))


def _short(value: Any) -> str:
    return str(value)[:MAX_LENGTH]
