"""The project's design rules, checked on the source (see docs/design.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
# A module imports only from levels below its own, and from its own package.
LEVELS = (
    ("common",),
    ("model", "data_loading"),
    ("runtime",),
    ("prediction", "report", "launch"),
    ("submission", "export"),  # charts of `report`, runs by `launch`; networks as `prediction` loads them
    ("main", "preprocess_dataset"),
    ("demo", "benchmarks"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
TRITON_FILES = ("add", "image", "join", "loss", "narrow", "norm", "output", "tiles")
# Optional packages, and the only modules that import them.
OPTIONAL = {
    "PIL": {"data_loading/readers/images.py"},
    "apex": {"runtime/optimizer.py"},
    "highdicom": {"data_loading/io/dicom_seg.py"},
    "isal": {"data_loading/io/nifti_bytes.py"},
    "matplotlib": {
        "report/figures.py",
        "submission/plot.py",
    },
    "mlflow": {"runtime/logging/mlflow.py"},
    "monai": {
        "benchmarks/monai_peer.py",
        "data_loading/library_transforms.py",
        "data_loading/nnunet_augmentation.py",
    },
    "onnx": {"export/onnx_file.py"},
    "onnxruntime": {"export/predict_onnx.py"},
    "onnxscript": {"export/onnx_file.py"},
    "pydicom": {f"data_loading/io/{name}.py" for name in ("dicom", "dicom_headers", "dicom_pixels")},
    "requests": {"data_loading/http_download.py"},
    "safetensors": {"export/safetensors_file.py"},
    "tensorboard": {"runtime/logging/tensorboard.py"},
    "torch.utils.tensorboard": {"runtime/logging/tensorboard.py"},
    "torchio": {"data_loading/library_transforms.py"},
    "triton": {f"model/kernels/triton/{name}.py" for name in TRITON_FILES},
    "urllib3": {"data_loading/http_download.py"},
    "wandb": {"runtime/logging/wandb.py"},
}
FILE_LINES = 350
FUNCTION_LINES = 80
POSITIONAL_VALUES = 4
PARAMETERS = 7
POSITIONAL_FIELDS = 4
# In regular expressions that do not match themselves.
HOMEMADE_WORDS = ("t[o]ld", "t[e]lls", "so [m]any", "made[-]up", "al[i]ke", "mend[e]d")


@cache
def package_files(*names: str) -> list[Path]:
    """Every source file of the packages and programs, tests left out; of all of them by default."""
    found = []
    for name in names or LEVEL_OF:
        program = PROJECT / f"{name}.py"
        found += [program] if program.exists() else (PROJECT / name).rglob("*.py")
    return sorted(found)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def package_of(path: Path) -> str:
    return path.relative_to(PROJECT).parts[0].removesuffix(".py")


# Imports


def is_module(name: str) -> bool:
    path = PROJECT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of all imports, `from a import b` as both a and a.b, and of modules named in strings."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, _ = node.value.partition(":")
            is_path = re.fullmatch(r"\w+(\.\w+)*", module) and (colon or "." in module)
            if is_path and module.partition(".")[0] in LEVEL_OF and is_module(module):
                names.add(module)
    return names


def touched(tree: ast.Module) -> set[str]:
    """Imported names, and dotted attribute chains such as `torch.distributed.all_reduce`."""
    return imported(tree) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def belongs_to(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def upward(source: str, package: str) -> list[str]:
    """The imports of a source of `package` that do not point downwards."""
    tops = {name: name.partition(".")[0] for name in imported(ast.parse(source))}
    return sorted(
        name
        for name, top in tops.items()
        if (top != package and top in LEVEL_OF and LEVEL_OF[top] >= LEVEL_OF[package]) or name.startswith(".")
    )


def touches_ranks(tree: ast.Module) -> bool:
    packages = ("torch.distributed", "torch.nn.parallel", "nn.parallel", "dist")
    return any(belongs_to(name, package) for name in touched(tree) for package in packages)


@pytest.mark.parametrize("package", LEVEL_OF)
def test_imports_point_downwards(package: str) -> None:
    found = {name_of(file): upward(file.read_text(encoding="utf-8"), package) for file in package_files(package)}
    assert found, "no such package"
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import runtime.training", "model", ["runtime.training"]),
        ("def f():\n    from data_loading import spec", "model", ["data_loading", "data_loading.spec"]),
        ("TABLE = {'x': 'report.page:run_page'}", "runtime", ["report.page"]),
        ("TABLE = {'x': 'report:write_report'}", "runtime", ["report"]),
        ("from . import spec", "data_loading", [".", "..spec"]),
        ("PAGE, FOLDER = 'report.html', 'report'", "runtime", []),
        ("import common.errors, torch", "model", []),
        ("from model.layers import UpBlock", "model", []),
        ("import main", "common", ["main"]),
    ],
)
def test_an_import_that_points_upwards_is_found(source: str, package: str, found: list[str]) -> None:
    assert upward(source, package) == found


def test_only_distributed_uses_torch_distributed() -> None:
    found = {name_of(file) for file in package_files() if touches_ranks(tree_of(file))}
    # launch/torchrun.py replaces torch's launcher; it is not part of a run.
    assert found == {"runtime/distributed/world.py", "launch/torchrun.py"}


@pytest.mark.parametrize(
    ("source", "is_found"),
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
def test_every_use_of_torch_distributed_is_found(source: str, is_found: bool) -> None:
    assert touches_ranks(ast.parse(source)) is is_found


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_are_imported_only_where_named(package: str) -> None:
    importers = {
        name_of(file) for file in package_files() if any(belongs_to(name, package) for name in imported(tree_of(file)))
    }
    assert importers == OPTIONAL[package]


def test_model_and_data_loading_do_not_log() -> None:
    for package, names in {
        "model": ("mlperf_logging", "logging", "warnings"),
        "data_loading": ("mlperf_logging",),
    }.items():
        for file in package_files(package):
            assert not [n for n in imported(tree_of(file)) for name in names if belongs_to(n, name)], name_of(file)


def test_building_a_network_prints_and_logs_nothing_and_loads_no_other_package() -> None:
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
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Files and functions


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """All functions but Triton's kernels, whose parameters are what a GPU is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "triton.jit" not in map(ast.unparse, node.decorator_list):
            yield node


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public module-level classes and functions without a docstring.

    Left out: a program's `main` (the module's docstring describes it), one or two statements, a record of bare fields.
    """
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_") or node.name == "main":
            continue
        if isinstance(node, ast.FunctionDef):
            is_trivial = len(node.body) <= 2
        else:
            is_trivial = all(isinstance(member, ast.AnnAssign) for member in node.body)
        if ast.get_docstring(node) is None and not is_trivial:
            yield node.name


@pytest.mark.parametrize("path", package_files(), ids=name_of)
def test_a_file_is_short_and_documented(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= FILE_LINES
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(tree_of(path))}
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}
    assert "fmt: skip" not in source
    assert "fmt: off" not in source
    assert ast.get_docstring(tree_of(path)), "a file opens with what it is"
    assert list(undocumented(tree_of(path))) == []


def test_every_package_describes_itself() -> None:
    packages = [file for file in package_files() if file.name == "__init__.py"]
    found = {name_of(file) for file in packages if len((ast.get_docstring(tree_of(file)) or "").splitlines()) < 3}
    assert len(packages) > 10
    assert found == set()


# Calls that cannot be mixed up


def own_names() -> set[str]:
    """Names of the functions, methods and classes that this project defines, but for functions with `*args`."""
    nodes = [node for file in package_files() for node in ast.walk(tree_of(file))]
    return {node.name for node in nodes if isinstance(node, ast.ClassDef)} | {
        node.name for node in nodes if isinstance(node, ast.FunctionDef) and not node.args.vararg
    }


def crowded_calls(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Calls of the project's own functions with more than four positional values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > POSITIONAL_VALUES:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in own and name != "apply":  # torch.autograd.Function.apply takes no keywords
                yield name


def crowded_functions(tree: ast.Module) -> Iterator[str]:
    """Functions with more than seven parameters."""
    for node in functions(tree):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if len([one for one in arguments if one.arg not in ("self", "cls")]) > PARAMETERS:
            yield node.name


def crowded_dataclasses(tree: ast.Module) -> Iterator[str]:
    """Dataclasses with more than four fields that may be given by position."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [
                m
                for m in node.body
                if isinstance(m, ast.AnnAssign)
                and "ClassVar" not in ast.unparse(m.annotation)
                and "kw_only=True" not in ast.unparse(m)
            ]
            decorators = [ast.unparse(one) for one in node.decorator_list]
            is_positional = any(one.startswith("dataclass") and "kw_only=True" not in one for one in decorators)
            if is_positional and len(fields) > POSITIONAL_FIELDS:
                yield node.name


# Its parameters are the arguments of a spec, which are always given by name.
WIDE_CONSTRUCTORS = {"runtime/logging/wandb.py"}


def test_no_call_passes_more_than_four_positional_values() -> None:
    own = own_names()
    # Inside a kernel, Triton's functions take pointers and sizes by position.
    files = [file for file in package_files() if file.parent.name != "triton"]
    found = {name_of(file) for file in files if any(crowded_calls(tree_of(file), own))}
    assert found == set()


def test_no_function_has_more_than_seven_parameters() -> None:
    found = {name_of(file) for file in package_files() if any(crowded_functions(tree_of(file)))}
    assert found == WIDE_CONSTRUCTORS


def test_dataclasses_with_more_than_four_fields_are_keyword_only() -> None:
    found = {name_of(file) for file in package_files() if any(crowded_dataclasses(tree_of(file)))}
    assert found == set()


# Words


def test_code_and_docs_use_the_fields_words() -> None:
    words = re.compile(rf"\b({'|'.join(HOMEMADE_WORDS)})\b")
    kinds = ("*.py", "*.md", "*.sh", "*.sbatch", "*.yaml", "*.toml", "*.args", "Makefile", "Dockerfile", "*.ipynb")
    listed = subprocess.run(["git", "ls-files", "-z", *kinds], cwd=PROJECT, capture_output=True, text=True, check=False)
    files = [PROJECT / name for name in listed.stdout.split("\0") if name]
    if not files:
        pytest.skip("not a git checkout")
    found = {name_of(file) for file in files if file.exists() and words.search(file.read_text(encoding="utf-8"))}
    assert found == set()
