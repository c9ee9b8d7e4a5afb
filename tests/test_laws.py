"""The house's laws (docs: the design), read from the source with `ast`; deleting a law's obedience must fail here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1]
ROOMS = ("data_loading", "model", "runtime")
PROGRAMS = ("main", "planning", "wiring", "preprocess_dataset")
LINE_LIMIT = 350


def core_files() -> list[Path]:
    """Every source file of the core: programs, shared files and rooms, without the extras."""
    files = [*HOUSE.glob("*.py"), *(file for room in ROOMS for file in (HOUSE / room).rglob("*.py"))]
    return sorted(file for file in files if "extras" not in file.relative_to(HOUSE).parts)


def room_files(room: str) -> list[Path]:
    return sorted((HOUSE / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(HOUSE))


def imported(source: str) -> set[str]:
    """Dotted names of every import anywhere in the source, `from a import b` as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def touched(source: str) -> set[str]:
    """Imported names, and dotted attribute chains such as `torch.distributed.all_reduce`."""
    chains = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return imported(source) | chains


def is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offenders(files: list[Path], packages: tuple[str, ...]) -> list[str]:
    return [
        f"{name_of(file)}: {name}"
        for file in files
        for name in sorted(imported(file.read_text(encoding="utf-8")))
        if any(is_of(name, package) for package in packages)
    ]


def touches_ranks(source: str) -> list[str]:
    packages = ("torch.distributed", "torch.nn.parallel", "nn.parallel", "dist")
    return sorted(name for name in touched(source) if any(is_of(name, package) for package in packages))


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_has_files_and_a_door_plate(room: str) -> None:
    plate = ast.get_docstring(ast.parse((HOUSE / room / "__init__.py").read_text(encoding="utf-8")))
    assert plate is not None
    assert len(plate.splitlines()) >= 3
    assert len(room_files(room)) >= 5


def test_model_imports_neither_the_data_nor_the_run() -> None:
    assert offenders(room_files("model"), ("data_loading", "runtime", *PROGRAMS)) == []


def test_data_loading_imports_neither_the_model_nor_the_run() -> None:
    assert offenders(room_files("data_loading"), ("model", "runtime", *PROGRAMS)) == []


def test_no_room_imports_a_program() -> None:
    assert offenders(room_files("runtime"), PROGRAMS) == []


def test_only_distributed_touches_the_ranks() -> None:
    found = {name_of(file) for file in core_files() if touches_ranks(file.read_text(encoding="utf-8"))}
    assert found == {"runtime/distributed/world.py"}


def test_the_core_never_imports_extras() -> None:
    found = [
        f"{name_of(file)}: {name}"
        for file in core_files()
        for name in imported(file.read_text(encoding="utf-8"))
        if "extras" in name.split(".")
    ]
    assert found == []


def test_models_and_loaders_know_no_logger() -> None:
    assert offenders([*room_files("model"), *room_files("data_loading")], ("mlperf_logging",)) == []
    assert offenders(room_files("model"), ("logging", "warnings")) == []


def test_rooms_are_imported_by_their_whole_name() -> None:
    relative = [
        f"{name_of(file)}: {name}"
        for file in core_files()
        for name in imported(file.read_text(encoding="utf-8"))
        if name.startswith(".")
    ]
    assert relative == [], "a relative import would slip past these laws"


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import torch.distributed as d", True),
        ("from torch import distributed", True),
        ("from torch.distributed import all_reduce", True),
        ("def f():\n    from torch.nn.parallel import DistributedDataParallel", True),
        ("import torch\nx = torch.distributed.get_rank()", True),
        ("from torch import nn\nm = nn.parallel.DistributedDataParallel(m)", True),
        ("import torch\nfrom torch import nn\nx = torch.nn.functional.relu", False),
        ("from torch.utils.data import DataLoader", False),
    ],
)
def test_the_law_on_ranks_sees_every_way_in(source: str, seen: bool) -> None:
    assert bool(touches_ranks(source)) is seen


def test_building_a_network_prints_and_logs_nothing_and_loads_no_other_room() -> None:
    program = """
import logging, sys
records = []
class Recorder(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger().addHandler(Recorder(level=0))
logging.getLogger().setLevel(0)
import torch
before = len(records)
from model.registry import build_network
build_network("unet3d(filters=(4, 8, 8))", 1, 3)(torch.zeros(1, 1, 8, 8, 8))
assert records[before:] == [], records
others = {name.partition(".")[0] for name in sys.modules} & {"runtime", "data_loading", "mlperf_logging", "main"}
assert not others, others
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        cwd=HOUSE,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def undocumented(source: str) -> Iterator[str]:
    """Public module-level classes and functions without a docstring.

    Left out: a program's `main` (the module's docstring is its), one or two statements, a record of bare fields.
    """
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_") or node.name == "main":
            continue
        if isinstance(node, ast.FunctionDef):
            is_trivial = len(node.body) <= 2
        else:
            is_trivial = all(isinstance(member, ast.AnnAssign) for member in node.body)
        if ast.get_docstring(node) is None and not is_trivial:
            yield node.name


@pytest.mark.parametrize("path", core_files(), ids=name_of)
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINE_LIMIT
    assert ast.get_docstring(ast.parse(source)), "a file opens with what it is"
    assert list(undocumented(source)) == []
