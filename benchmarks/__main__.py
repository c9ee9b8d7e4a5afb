"""Measures this project on this machine.

    python3 -m benchmarks --suite loader|step|networks|evaluate|preprocess|scaling|storage|all [--json FILE] [--quick]
    python3 -m benchmarks --suite gpu --minutes 9 --json FILE
    python3 -m benchmarks --suite peers --data_dir DATA

Prints one markdown table per suite; --json also writes them, with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser, number
from common.errors import UserError, interrupted_exit, run_program
from common.files import replacing

if TYPE_CHECKING:
    from benchmarks.harness import Table

SUITES = ("loader", "step", "networks", "evaluate", "preprocess", "scaling", "storage")
# Not part of "all": it repeats parts of the others within a few minutes of one GPU.
GPU_SUITE = "gpu"
# Nor is this: it trains on real data.
PEERS_SUITE = "peers"
MINUTES = 60.0
FLAGS_OF_SUITES = {
    "minutes": (GPU_SUITE,),
    "parts": (GPU_SUITE,),
    "data_dir": (PEERS_SUITE,),
    "recipe": (PEERS_SUITE,),
    "cases": ("storage", "all"),
    "accelerator": ("storage", "all"),
    "full_size": ("storage", "all"),
}
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "hippocampus_cpu.args"
# Those of the storage suite, whose step times are in benchmarks/storage.py, which imports torch.
ACCELERATORS = ("a100", "h100", "b200")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: anything that would otherwise fail only after measuring.
    """
    parser = Parser(prog="python3 -m benchmarks", description="Measures this project on this machine.")
    parser.add_argument("--suite", choices=(*SUITES, GPU_SUITE, PEERS_SUITE, "all"), required=True)
    parser.add_argument("--json", type=Path, help="also write the tables, with hardware, versions and commit")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, to see that everything runs; the figures mean nothing"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--work_dir", type=Path, help="folder for synthetic data (default: a temporary folder)")
    parser.add_argument("--cases", type=int, help="number of volumes of the storage suite (default: 168)")
    parser.add_argument("--num_workers", type=int, help="number of loader processes (default: one per core)")
    parser.add_argument(
        "--minutes", type=number(float, 0.1), help=f"time that the gpu suite may take (default: {MINUTES:g})"
    )
    parser.add_argument("--parts", nargs="+", default=[], metavar="TITLE", help="parts of the gpu suite (default: all)")
    parser.add_argument("--data_dir", type=Path, help="preprocessed folder that the peers suite trains on")
    parser.add_argument("--recipe", type=Path, help=f"argument file of the peers suite (default: {RECIPE.name})")
    parser.add_argument(
        "--accelerator", nargs="+", default=[], choices=ACCELERATORS, help="those that the storage suite emulates (all)"
    )
    parser.add_argument(
        "--full_size",
        action="store_true",
        help="the storage suite's data set is five times this machine's memory, or as much as half of the free disk",
    )
    arguments = parser.parse_args(argv)
    for flag, suites in FLAGS_OF_SUITES.items():
        if getattr(arguments, flag) and arguments.suite not in suites:
            raise UserError(f"--{flag} has no effect on --suite {arguments.suite}, only on {' and '.join(suites)}")
    if arguments.suite == PEERS_SUITE and arguments.device == "cuda":
        raise UserError("--suite peers compares runs on the CPU; drop --device cuda")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: its folder does not exist")
    if arguments.json and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder; give a file, such as {arguments.json / 'tables.json'}")
    if arguments.json and arguments.json.exists():
        raise UserError(f"--json {arguments.json} exists; give another name, or remove it")
    if arguments.work_dir and not arguments.work_dir.is_dir():
        raise UserError(f"--work_dir {arguments.work_dir}: no such folder")
    if arguments.cases is not None and arguments.cases < 2:
        raise UserError(f"--cases must be at least 2, not {arguments.cases}")
    if arguments.full_size and (arguments.quick or arguments.cases is not None):
        raise UserError("--full_size sets the number of volumes; drop --cases and --quick")
    if arguments.num_workers is not None and arguments.num_workers < 0:
        raise UserError(f"--num_workers must be at least 0, not {arguments.num_workers}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    import torch  # takes seconds

    from benchmarks.harness import Options
    from runtime.environment import describe_environment

    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and arguments.suite != PEERS_SUITE else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no GPU here")
    if arguments.suite == GPU_SUITE and name == "cpu" and not arguments.quick:
        raise UserError("--suite gpu measures a GPU, and there is none; with --quick it shows that its parts run")
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    environment = describe_environment(device, 1)
    print(
        f"{environment['device']}, {environment['cpu']} ({environment['cpu_cores']} cores), "
        f"torch {environment['torch']}, commit {environment['commit']}\n",
        flush=True,
    )
    results: dict[str, list[Table]] = {}
    problems = []
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        options = Options(
            device=device,
            quick=arguments.quick,
            work_dir=Path(folder),
            cases=arguments.cases,
            num_workers=arguments.num_workers,
            deadline=time.monotonic() + 60 * (arguments.minutes or MINUTES),
            parts=tuple(arguments.parts),
            data_dir=arguments.data_dir and arguments.data_dir.resolve(),
            recipe=(arguments.recipe or RECIPE).resolve(),
            accelerators=tuple(arguments.accelerator),
            full_size=arguments.full_size,
        )
        for suite in SUITES if arguments.suite == "all" else (arguments.suite,):
            results[suite] = []
            for table in importlib.import_module(f"benchmarks.{suite}").run(options):
                print(table.to_markdown(), flush=True)
                results[suite].append(table)
                problems += [table.problem] if table.problem else []
                if arguments.json:  # after each table, so that what fails later loses none
                    write_json(arguments.json, environment, arguments.quick, results)
    if problems:
        raise UserError("; ".join(problems))
    return 0


def write_json(path: Path, environment: dict[str, Any], quick: bool, results: dict[str, list[Table]]) -> None:
    """Writes the suites' tables, with hardware, versions and commit."""
    suites = {suite: [dataclasses.asdict(table) for table in tables] for suite, tables in results.items()}
    content = {"environment": environment, "quick": quick, "suites": suites}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # As Ctrl-C does, so that the synthetic data, up to half of a disk, is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(interrupted_exit(number)))
    sys.exit(run_program(main, "benchmarks"))
