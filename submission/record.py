"""What a series of runs knows of itself, in ORG_DIR.runs/SYSTEM/series.json: enough to go on, and to notice changes."""

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
# Of a run's flags: what may differ from one start of the series to the next.
INCIDENTAL = ("log_dir", "seed", "verbose", "no_report", "local_rank")


@dataclass
class Done:
    """A run that ended by itself, converged or not; `sha256` is of its log as it ended."""

    folder: str
    seed: int
    status: str
    epochs: int
    clock_ms: int
    sha256: str


@dataclass
class Broken:
    """A run that was broken off; its seed is not used again."""

    folder: str
    seed: int | None
    why: str


@dataclass
class Series:
    """A result's runs so far.

    Attributes:
        system: name in results/SYSTEM.
        arguments: of main.py, as given.
        launch: the words that stand before main.py.
        configuration: of every run, by flag; with "commit", "torch" and "launch".
        environment: of the first run, as its run.json has it.
    """

    system: str
    arguments: list[str]
    launch: list[str]
    configuration: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    runs: list[Done] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    @property
    def seeds(self) -> set[int]:
        """All that were ever drawn."""
        return {run.seed for run in self.runs} | {run.seed for run in self.broken if run.seed is not None}

    def save(self, folder: Path) -> None:
        """Raises UserError where the folder cannot be written."""
        try:
            write_json(folder / NAME, {"format": FORMAT, **asdict(self)})
        except OSError as error:
            raise UserError(f"{folder / NAME}: cannot be written: {error.strerror or error}") from None

    def check_same(self, configuration: Mapping[str, Any]) -> None:
        """Raises UserError where the next runs would be of another configuration, naming what differs."""
        now: dict[str, Any] = json.loads(json.dumps(configuration))
        names = sorted(name for name in {*now, *self.configuration} if now.get(name) != self.configuration.get(name))
        if names:
            told = "; ".join(f"{name} {now.get(name)!s}, was {self.configuration.get(name)!s}" for name in names)
            raise UserError(
                f"the series of {self.system} was begun otherwise: {told}; start it as it was, or a new one in another "
                "--result_dir or of another --system"
            )


def load_series(folder: Path) -> Series | None:
    """The series of a folder, None where none was begun. Raises UserError where its record is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT or set(content) != {one.name for one in fields(Series)}:
            raise ValueError("of another version")
        content["runs"] = [Done(**run) for run in content["runs"]]
        content["broken"] = [Broken(**run) for run in content["broken"]]
        return Series(**content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); a series cannot go on without it") from None
