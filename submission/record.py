"""The record of a series of runs, ORG.runs/SYSTEM/series.json: enough to continue it and to detect changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import UserError
from data_loading.index import write_json

NAME = "series.json"
FORMAT = 1
# Flags of a run that may differ between the starts of a series.
INCIDENTAL_FLAGS = ("log_dir", "seed", "verbose", "no_report", "local_rank")
# Digits of a digest in messages.
SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that ended by itself, converged or not.

    Attributes:
        sha256: digest of its log at that time.
        data_digest: identifies the data that it read, from its run.json; "" if that is not known.
    """

    folder: str
    seed: int
    status: str
    epochs: int
    clock_ms: int
    sha256: str
    data_digest: str = ""  # unknown in records of earlier versions


@dataclass(frozen=True, kw_only=True)
class FailedRun:
    """A run that did not end by itself or left no valid log; its seed is not used again."""

    folder: str
    seed: int | None
    why: str


@dataclass(kw_only=True)
class Series:
    """The runs of a result so far. The field names are the keys of the file.

    Attributes:
        system: name in results/SYSTEM.
        arguments: for main.py, as given.
        launch: the command before main.py.
        configuration: shared by all runs, by flag; with "commit", "torch", "launch" and "data_digest", which is None
            where this machine cannot read the data.
        environment: of the first run, from its run.json.
        broken: the failed runs.
    """

    system: str
    arguments: list[str]
    launch: list[str]
    configuration: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    runs: list[FinishedRun] = field(default_factory=list)
    broken: list[FailedRun] = field(default_factory=list)

    @property
    def seeds(self) -> set[int]:
        """All seeds used so far."""
        runs: list[FinishedRun | FailedRun] = [*self.runs, *self.broken]
        return {run.seed for run in runs if run.seed is not None}

    def save(self, folder: Path) -> None:
        write_json(folder / NAME, {"format": FORMAT, **asdict(self)})

    def check_same(self, configuration: Mapping[str, Any]) -> None:
        """Raises UserError naming the differences if the next runs would have another configuration."""
        before = self.configuration
        names = sorted({*configuration, *before})
        changed = [name for name in names if configuration.get(name) != before.get(name)]
        changes = [
            f"{name} {configuration.get(name)!s}, was {before.get(name)!s}" for name in changed if name != "data_digest"
        ]
        digests = before.get("data_digest"), configuration.get("data_digest")
        if "data_digest" in changed and None not in digests:
            was, now = (str(digest)[:SHOWN_DIGITS] for digest in digests)
            changes.append(f"the data set in {configuration.get('data_dir')} has changed (digest {now}, was {was})")
        if changes:
            raise UserError(
                f"the series of {self.system} was started with another configuration: {'; '.join(changes)}; restore "
                "it, or start a new series with another --result_dir or --system"
            )


def load_series(folder: Path) -> Series | None:
    """Returns the series of a folder, or None if there is none. Raises UserError if its record is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT or set(content) != {one.name for one in fields(Series)}:
            raise ValueError("written by another version")
        content["runs"] = [FinishedRun(**run) for run in content["runs"]]
        content["broken"] = [FailedRun(**run) for run in content["broken"]]
        return Series(**content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); the series cannot be continued") from None
