"""`log.jsonl`, one JSON object per event; `run.json` and `run.args`, what is known of a run before its first step."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from runtime.arguments import to_argument_file
from runtime.logging import events as ev

# Single batches, steps and cases; nothing is written after the last event.
UNRECORDED = ev.PhaseEnd | ev.MicroBatchEnd | ev.StepEnd | ev.CaseEvaluated | ev.Waiting | ev.RunFinalized


class JsonLinesTracker:
    """`LOG_DIR/log.jsonl`: every event except single batches, steps and cases, each flushed at once."""

    def __init__(self, log_dir: Path) -> None:
        self._file = (log_dir / "log.jsonl").open("x", encoding="utf-8")

    def on(self, event: ev.Event) -> None:
        if isinstance(event, UNRECORDED):
            return
        values = {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
        if "config" in values:
            values["config"] = values["config"].to_json()
        line = {"event": type(event).__name__, "time_s": time.time(), **values}
        print(json.dumps(_strict(line), allow_nan=False), file=self._file, flush=True)

    def close_files(self) -> None:
        self._file.close()


def _strict(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFileTracker:
    """Written before the first step, in `LOG_DIR`.

    `run.json`: configuration, environment, seeds, division and the digest of the data. `run.args`: the flags, with
    which `main.py @run.args` repeats the run.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._content: dict[str, Any] = {}

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.InitStarted):
            self._content |= {"config": event.config.to_json(), "environment": event.environment}
        if isinstance(event, ev.InitStopped):
            self._content |= {
                "seeds": event.seeds,
                "division": event.division,
                "rule_violations": event.rule_violations,
                "data_digest": event.data_digest,
            }
            self._content |= {"platform": event.platform, "samples_per_epoch": event.samples_per_epoch}
            (self._log_dir / "run.json").write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
            flags = to_argument_file(event.config, event.seeds["master"])
            (self._log_dir / "run.args").write_text(flags, encoding="utf-8")
