"""Which mistakes in the core does a test command notice? Plants 25, one at a time, in copies of the project.

    python3 -m tests.mutants                       # the tests of `make test`
    python3 -m tests.mutants --all                 # those of `make test-all`
    python3 -m tests.mutants --only 3 7 --seed 1   # some mutants, of another seed

Mutants are drawn from the core at random: a sign (+ and -), a bound (< and <=), an off-by-one, a dropped reduction
over ranks, and a tensor whose device was forgotten. Prints a table with the first test that fails for each. Some
mutants change nothing that can be observed, such as `x < 1` for a float that is never exactly 1: read each survivor
before writing a test for it.
"""

from __future__ import annotations

import ast
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import Parser
from common.errors import run_program

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    *("model/unet3d.py", "model/layers.py", "model/normalization.py", "model/losses.py", "model/metrics.py"),
    *(
        "data_loading/preprocessing.py",
        "data_loading/sampler.py",
        "data_loading/transforms.py",
        "data_loading/split.py",
    ),
    *("data_loading/pytorch_loader.py", "data_loading/device_loader.py"),
    *("runtime/training.py", "runtime/evaluation.py", "runtime/inference.py", "runtime/lr_schedule.py"),
    *("runtime/eval_schedule.py", "runtime/optimizer.py", "runtime/seeding.py", "runtime/mixup.py"),
    *("runtime/distributed/world.py", "runtime/distributed/step_sync.py"),
)
PER_KIND = 5
# What a mutant costs at most: the tests themselves, and one that makes them hang.
LIMIT_S = 1800
BOUNDS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
}
REDUCTIONS = ("sum", "max", "gather", "broadcast")


@dataclass(frozen=True)
class Mutant:
    """A mistake: the text from `start` to `end` of a file becomes `new`.

    Attributes:
        kind: sign, bound, off by one, reduction, or device.
        file: relative to the project.
    """

    kind: str
    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def plant(self, project: Path) -> None:
        path = project / self.file
        text = path.read_text(encoding="utf-8")
        assert text[self.start : self.end] == self.old, f"{path} has changed"
        path.write_text(text[: self.start] + self.new + text[self.end :], encoding="utf-8")


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """Yields every mutant of a source."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line.decode()))

    def position(line: int, column: int) -> int:
        return starts[line - 1] + len(text.splitlines()[line - 1].encode()[:column].decode())

    def begin(node: ast.expr) -> int:
        return position(node.lineno, node.col_offset)

    def end(node: ast.expr) -> int:
        return position(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def mutant(kind: str, node: ast.expr, first: int, last: int, new: str) -> Mutant:
        return Mutant(kind, file, node.lineno, first, last, text[first:last], new)

    for node in computing_nodes(ast.parse(text)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            sign, other = ("+", "-") if isinstance(node.op, ast.Add) else ("-", "+")
            at = text.index(sign, end(node.left), begin(node.right))
            yield mutant("sign", node, at, at + 1, other)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in BOUNDS:
            bound, other = BOUNDS[type(node.ops[0])]
            at = text.index(bound, end(node.left), begin(node.comparators[0]))
            yield mutant("bound", node, at, at + len(bound), other)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield mutant("off by one", node, begin(node), end(node), str(node.value + 1))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            owner, argument = ast.unparse(node.func.value), ast.unparse(node.args[0])
            if node.func.attr in REDUCTIONS and owner.endswith("world"):
                alone = f"[{argument}]" if node.func.attr == "gather" else f"({argument})"
                yield mutant("reduction", node, begin(node), end(node), alone)
            elif owner == "dist" and node.func.attr in ("all_reduce", "broadcast") and not awaits(node):
                yield mutant("reduction", node, begin(node), end(node), "None")
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            for before, keyword in zip(given[len(node.args) - 1 :], node.keywords, strict=False):
                if keyword.arg == "device" and node.args:
                    yield mutant("device", node, end(before), end(keyword.value), "")


def awaits(call: ast.Call) -> bool:
    """Whether the result of a collective is used, to wait for it."""
    return any(keyword.arg == "async_op" for keyword in call.keywords)


def computing_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes below one, without annotations, messages and what is raised."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Raise | ast.Assert):
                yield child
                yield from computing_nodes(child)


def draw(seed: int) -> list[Mutant]:
    """Draws `PER_KIND` mutants of each kind from the core, from as many files as possible."""
    found = [mutant for file in CORE for mutant in mutants_of(file, (ROOT / file).read_text(encoding="utf-8"))]
    rng = random.Random(seed)
    drawn: list[Mutant] = []
    for kind in ("sign", "bound", "off by one", "reduction", "device"):
        candidates = [mutant for mutant in found if mutant.kind == kind]
        rng.shuffle(candidates)
        used: list[str] = []
        for _ in range(PER_KIND):
            candidates.sort(key=lambda mutant: used.count(mutant.file))  # stable: random within a file's count
            drawn.append(candidates.pop(0))
            used.append(drawn[-1].file)
    return drawn


def first_failure(mutant: Mutant, options: Sequence[str]) -> tuple[str, float]:
    """Returns the first test that fails in a copy of the project with the mutant, "" if none does, and the seconds."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        project = Path(folder, "project")
        copy_project(project)
        mutant.plant(project)
        began = time.monotonic()
        # The likeliest and quickest tests first.
        own = f"tests/{Path(mutant.file).parts[0]}"
        others = [option for name in (own, "tests/faults", "tests/integration") for option in ("--ignore", name)]
        failed = ""
        for tests in ([own], others, ["tests/faults", "tests/integration"]):
            failed = failed or run_tests(project, [*options, *tests])
        return failed, time.monotonic() - began


def run_tests(project: Path, options: Sequence[str]) -> str:
    """Returns the first test that fails, "" if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *options]
    try:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    failed = re.search(r"^(?:FAILED|ERROR) ([^\s@]+)", done.stdout, re.MULTILINE)
    if done.returncode and not failed:
        return f"pytest ended with status {done.returncode}"
    return failed[1] if failed else ""


def copy_project(to: Path) -> None:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "demo", "build", "*.egg-info")
    shutil.copytree(ROOT, to, ignore=ignored)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="tests.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the table")
    parser.add_argument("--all", action="store_true", help="run the slow tests too")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    arguments = parser.parse_args(argv)
    tests = ["-n", "2", "--dist", "loadgroup", *([] if arguments.all else ["-m", "not slow"])]
    print("| | mutant | place | seconds | first test that fails |\n|---|---|---|---|---|")
    caught = drawn = 0
    for number, mutant in enumerate(draw(arguments.seed), start=1):
        if arguments.only and number not in arguments.only:
            continue
        test, seconds = ("", 0.0) if arguments.list else first_failure(mutant, tests)
        caught, drawn = caught + bool(test), drawn + 1
        change = f"{mutant.kind}: `{mutant.old}` → `{mutant.new}`".replace("\n", " ")
        print(
            f"| {number} | {change} | {mutant.file}:{mutant.line} | {seconds:.0f} | {test or '**none**'} |", flush=True
        )
    print(f"\n{caught} of {drawn} noticed")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "tests.mutants"))
