"""Measures this project on this machine.

    python3 -m benchmarks --suite loader|step|evaluate|preprocess|scaling|storage|all [--json FILE] [--quick]

Prints one markdown table per suite; --json also writes them, with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Options, Table
from common.cli import Parser
from common.errors import UserError, run_program
from runtime.environment import describe_environment

SUITES = ("loader", "step", "evaluate", "preprocess", "scaling", "storage")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: anything that would otherwise fail only after measuring.
    """
    parser = Parser(prog="python3 -m benchmarks", description="Measures this project on this machine.")
    parser.add_argument("--suite", choices=(*SUITES, "all"), required=True)
    parser.add_argument("--json", type=Path, help="also write the tables, with hardware, versions and commit")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, to see that everything runs; the figures mean nothing"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--work_dir", type=Path, help="folder for synthetic data (default: a temporary folder)")
    parser.add_argument("--cases", type=int, help="number of volumes of the storage suite (default: 168)")
    parser.add_argument("--num_workers", type=int, help="number of loader processes (default: one per core)")
    given = parser.parse_args(argv)
    if given.json and not given.json.parent.is_dir():
        raise UserError(f"--json {given.json}: its folder does not exist")
    if given.json and given.json.is_dir():
        raise UserError(f"--json {given.json} is a folder; give a file, such as {given.json / 'tables.json'}")
    if given.work_dir and not given.work_dir.is_dir():
        raise UserError(f"--work_dir {given.work_dir}: no such folder")
    if given.cases is not None and given.cases < 1:
        raise UserError(f"--cases must be at least 1, not {given.cases}")
    if given.num_workers is not None and given.num_workers < 0:
        raise UserError(f"--num_workers must be at least 0, not {given.num_workers}")
    return given


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    name = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no GPU here")
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    environment = describe_environment(device, 1)
    print(
        f"{environment['device']}, {environment['cpu']} ({environment['cpu_cores']} cores), "
        f"torch {environment['torch']}, commit {environment['commit']}\n",
        flush=True,
    )
    results: dict[str, list[Table]] = {}
    with tempfile.TemporaryDirectory(dir=given.work_dir) as folder:
        options = Options(
            device=device, quick=given.quick, work_dir=Path(folder), cases=given.cases, num_workers=given.num_workers
        )
        for suite in SUITES if given.suite == "all" else (given.suite,):
            results[suite] = importlib.import_module(f"benchmarks.{suite}").run(options)
            for table in results[suite]:
                print(table.to_markdown(), flush=True)
            if given.json:  # after each suite, so that a suite that fails loses no other tables
                write_json(given.json, environment, given.quick, results)
    return 0


def write_json(path: Path, environment: dict[str, Any], quick: bool, results: dict[str, list[Table]]) -> None:
    """Writes the suites' tables, with hardware, versions and commit."""
    suites = {suite: [dataclasses.asdict(table) for table in tables] for suite, tables in results.items()}
    content = {"environment": environment, "quick": quick, "suites": suites}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_program(main, "benchmarks"))
