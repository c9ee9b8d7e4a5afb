"""Synthetic runs: the program's own tracker writes their logs, with a clock set by the test."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from submission.__main__ import main
from submission.logs import read_log
from tests.submission.synthetic_runs import SyntheticRun

ORG = "ACME"
STUB = Path(__file__).with_name("stub.py")
# An open run; it evaluates after every second epoch.
OPEN = ["--overlap", "0.25", "--submission_org", ORG, "--data_dir", "data", "--batch_size", "28"]
WriteRun = Callable[..., Path]


@pytest.fixture(scope="session")
def write_open() -> WriteRun:
    """Returns `write_open(path, seed=1, epochs=4, …)`, which writes the log of a short run of the open division."""

    def write(
        path: Path,
        seed: int,
        epochs: int = 4,
        clock_ms: int = 60_000,
        converges: bool = True,
        more: Sequence[str] = (),
        reasons: Sequence[str] = ("--overlap 0.25, not 0.5",),
    ) -> Path:
        run = SyntheticRun(
            seed=seed,
            epochs=epochs,
            clock_ms=clock_ms,
            arguments=[*OPEN, *more],
            reasons=reasons,
            first_evaluation=2,
            interval=2,
            converges=converges,
        )
        return run.write_log(path)

    return write


@pytest.fixture(scope="session")
def write_closed() -> WriteRun:
    """Returns a function that writes the log of a closed-division run, of about 2,000 epochs."""

    def write(
        path: Path,
        seed: int,
        epochs: int = 2060,
        clock_ms: int = 3_600_000,
        converges: bool = True,
        more: Sequence[str] = (),
    ) -> Path:
        arguments = ["--submission_org", ORG, "--data_dir", "data", "--batch_size", "28", *more]
        run = SyntheticRun(seed=seed, epochs=epochs, clock_ms=clock_ms, arguments=arguments, converges=converges)
        return run.write_log(path)

    return write


@pytest.fixture(scope="session")
def forty(write_open: WriteRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{result_0.txt: text} of 40 valid runs: seeds 100 …, 4 or 6 epochs, one minute and some milliseconds."""
    folder = tmp_path_factory.mktemp("forty")
    for number in range(40):
        write_open(folder / f"result_{number}.txt", 100 + number, 4 + 2 * (number % 2), 60_000 + 7 * number)
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


@pytest.fixture
def result_dir(forty: dict[str, str], tmp_path: Path) -> Path:
    """A submitter's folder with these 40 logs, of the system `abacus`."""
    folder = tmp_path / ORG / "results" / "abacus" / "unet3d"
    folder.mkdir(parents=True)
    for name, text in forty.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tmp_path / ORG


def edit(path: Path, key: str, change: Callable[[str], str], which: int = 0) -> int:
    """Changes the text of a log's `which`-th line with that key; returns the line number."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = [index for index, line in enumerate(lines) if f'"key": "{key}"' in line][which]
    lines[number] = change(lines[number])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return number + 1


def set_value(value: Any) -> Callable[[str], str]:
    """Returns a change for `edit` that sets the line's value, given as JSON text."""
    return lambda line: re.sub(r'"value": [^,\]]+(?=, "metadata")|"value": \[[^\]]*\]', f'"value": {value}', line)


class Bench:
    """A result folder, and the orders for the runs in it."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.result_dir = folder / ORG
        self.runs = folder / f"{ORG}.runs" / "abacus"
        self.results = self.result_dir / "results" / "abacus" / "unet3d"
        self._orders = folder / "orders.json"
        self.template = template

    def start(self, *options: str, orders: list[dict[str, Any]] | None = None, arguments: list[str] = OPEN) -> int:
        self._orders.write_text(json.dumps({"template": str(self.template), "runs": orders or []}))
        prefix = shlex.join([sys.executable, "-S", str(STUB), str(self._orders)])
        fixed = ["--result_dir", str(self.result_dir), "--system", "abacus", "--launch", prefix]
        return main(["run", *fixed, *options, "--", *arguments])

    def seeds(self) -> list[int]:
        return [int(read_log(path).values["seed"]) for path in sorted(self.results.iterdir())]


@pytest.fixture(scope="session")
def template(write_open: WriteRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_open(tmp_path_factory.mktemp("template") / "unet3d.log", seed=4711)


@pytest.fixture
def bench(tmp_path: Path, template: Path) -> Bench:
    return Bench(tmp_path, template)


@pytest.fixture(scope="session")
def made(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """40 runs made by `submission run`; read only."""
    bench = Bench(tmp_path_factory.mktemp("made"), template)
    assert bench.start() == 0
    return bench


@pytest.fixture
def copied(made: Bench, tmp_path: Path, template: Path) -> Bench:
    """A copy of these 40 runs that a test may change."""
    shutil.copytree(made.result_dir.parent, tmp_path / "work")
    return Bench(tmp_path / "work", template)
