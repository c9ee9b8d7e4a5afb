"""Private names and message texts of other libraries: each still is what `common.compat` expects.

A failure after an upgrade means that the function of that name must follow the new version.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from common import compat
from common.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "data_loading", "model", "runtime", "prediction", "report", "submission", "export", "benchmarks")


class Acting(Dataset[int]):
    """Does something in the worker instead of returning a sample."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        self.act()
        return index


def error_of(act: Callable[[], Any], timeout_s: float = 0) -> Exception:
    loader = DataLoader(
        Acting(act), num_workers=1, timeout=timeout_s, multiprocessing_context="fork", persistent_workers=True
    )
    with pytest.raises((RuntimeError, UserError, OSError, EOFError)) as caught:
        next(iter(loader))
    compat.end_dataloader_workers(loader)
    return caught.value


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise UserError("case_00001_x.npy: damaged: restore it")


def fail() -> None:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x + torch.ones(2, 2),
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
    ],
)
def test_what_the_meta_device_cannot_do(act: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        act(torch.empty(2, 2, device="meta"))
    assert compat.is_meta_device_problem(" ".join(str(caught.value).split())[:200])


def test_a_wrong_shape_on_the_meta_device_is_an_ordinary_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.cat((torch.empty(2, 2, device="meta"), torch.empty(2, 3, device="meta")))
    assert not compat.is_meta_device_problem(str(caught.value))


def test_a_killed_dataloader_worker() -> None:
    error = error_of(kill)
    assert compat.is_dataloader_worker_error(error)
    assert not compat.is_dataloader_timeout(error)


def test_a_dataloader_worker_that_hangs() -> None:
    error = error_of(lambda: time.sleep(2), timeout_s=0.2)
    assert compat.is_dataloader_worker_error(error)
    assert compat.is_dataloader_timeout(error)


def test_an_error_that_a_dataloader_worker_raises_keeps_its_type_and_message() -> None:
    error = error_of(refuse)
    assert isinstance(error, UserError)
    assert compat.dataloader_worker_message(error) == "case_00001_x.npy: damaged: restore it"


def test_workers_end_by_themselves_after_an_error() -> None:
    """torch terminates those that have not ended in 5 s."""
    loader = DataLoader(Acting(refuse), num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    with pytest.raises(UserError):
        next(iter(loader))
    workers = multiprocessing.active_children()
    compat.end_dataloader_workers(loader)
    assert [worker.exitcode for worker in workers] == [0, 0]
    compat.end_dataloader_workers(loader)  # once is enough


def test_any_other_error_is_not_of_a_dataloader_worker() -> None:
    assert not compat.is_dataloader_worker_error(error_of(fail))
    assert not compat.is_dataloader_worker_error(RuntimeError("CUDA error: out of memory"))


def test_the_loss_scale_is_read_without_a_wait() -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scale = compat.loss_scale(scaler)
    assert scale is not None
    assert scale.item() == scaler.get_scale()
    assert compat.loss_scale(torch.amp.GradScaler("cpu", enabled=False)) is None


def test_functions_are_not_intercepted_within_without_torch_function() -> None:
    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Spy():
        torch.add(torch.ones(1), 1)
        count = len(seen)
        assert count > 0
        with compat.without_torch_function():
            torch.add(torch.ones(1), 1)
        assert len(seen) == count


def test_trees() -> None:
    tree = {"a": [1, (2,)], "b": 3}
    assert sorted(compat.tree_leaves(tree)) == sorted(compat.tree_iter(tree)) == [1, 2, 3]
    assert compat.tree_map(lambda value: value + 1, tree) == {"a": [2, (3,)], "b": 4}


@pytest.mark.parametrize(("error", "is_sound"), [(0.0, True), (1e-3, True), (1.0, False), (1e30, False)])
def test_bf16_gradients_are_compared_with_those_of_fp32(
    error: float, is_sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = torch.nn.grad.conv3d_weight

    def with_error(image: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        gradient = exact(image.float(), arguments[0], arguments[1].float(), **named)
        return gradient + error if image.dtype == torch.bfloat16 else gradient

    monkeypatch.setattr(torch.nn.grad, "conv3d_weight", with_error)
    assert compat.bf16_gradients_are_sound() is is_sound


def test_whether_the_cpu_computes_bf16() -> None:
    assert compat.cpu_computes_bf16() in (True, False)


def test_a_gloo_error_is_recognised_and_its_guess_left_out() -> None:
    """The real error: tests/runtime/distributed/test_world.py kills a rank."""
    closed = "[pair.cc:534] gloo: Connection closed by peer [127.0.0.1]:5"
    error = RuntimeError(f"{closed}. This is typically caused by an out-of-memory kill.\nmore")
    assert compat.is_gloo_error(error)
    assert compat.gloo_cause(error) == f"{closed}."
    assert not compat.is_gloo_error(RuntimeError("CUDA error: out of memory"))


class Leaving(nn.Module):
    """A network that leaves out its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used: torch.Tensor = self.used(x)
        return used


def test_a_step_that_leaves_out_parameters_is_recognised() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Leaving())
        model(torch.ones(1)).sum().backward()
        with pytest.raises(RuntimeError) as caught:
            model(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()
    assert compat.is_unused_parameter_error(caught.value)
    assert not compat.is_unused_parameter_error(RuntimeError("CUDA error: out of memory"))


def test_a_missing_dicom_decoder() -> None:
    """In a process in which none of the decoders can be imported, as where they are not installed."""
    pytest.importorskip("pydicom", reason="pip install '.[dicom]'")
    program = """
import sys
for name in ("gdcm", "pylibjpeg", "openjpeg", "libjpeg", "PIL"):
    sys.modules[name] = None
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless
from common.compat import is_missing_dicom_decoder
slice_ = Dataset()
slice_.file_meta = FileMetaDataset()
slice_.file_meta.TransferSyntaxUID = JPEG2000Lossless
slice_.Rows = slice_.Columns = 4
slice_.BitsAllocated = slice_.BitsStored = 16
slice_.HighBit, slice_.PixelRepresentation, slice_.SamplesPerPixel = 15, 0, 1
slice_.PhotometricInterpretation = "MONOCHROME2"
slice_.PixelData = encapsulate([b"damaged "])
slice_["PixelData"].VR = "OB"
try:
    slice_.pixel_array
except (NotImplementedError, RuntimeError) as error:
    print(is_missing_dicom_decoder(error), is_missing_dicom_decoder(RuntimeError("the frame is cut short")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False\n", "")


def test_mlperfs_logger_takes_our_clock() -> None:
    from mlperf_logging.mllog import mllog

    before = mllog._current_time_ms
    with compat.mllog_clock(lambda: 1_700_000_000_000):
        assert mllog._current_time_ms() == 1_700_000_000_000
    assert mllog._current_time_ms is before


def test_mlperfs_reference_points() -> None:
    found = compat.reference_point("unet3d", "4.0.0", 56)
    assert found is not None
    point, how, published = found
    assert how == "RCP of batch 56"
    assert point["RCP Mean"] / point["Max Speedup"] < point["RCP Mean"]
    assert len(published) > 10
    assert compat.reference_point("unet3d", "4.0.0", 10**6) is None


def private_uses(source: str) -> list[str]:
    """Attributes and modules with a leading underscore that are not of the file's own objects, and texts of errors."""
    own = {"self", "cls"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = node.value
            if not (isinstance(root, ast.Name) and root.id in own):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            found += [str(node.module)] if any(part[:1] == "_" != part[1:2] for part in parts) else []
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            right = node.comparators[0]
            if isinstance(right, ast.Call) and ast.unparse(right) == "str(error)":
                found.append(ast.unparse(node))
    return found


# Documented by Python itself, despite the underscore; and the type of `add_argument_group`, which has no other name.
DOCUMENTED = {"os._exit", "sys._current_frames", "argparse._ArgumentGroup"}


def test_private_names_and_texts_of_errors_are_used_in_compat_alone() -> None:
    found = {
        f"{path.relative_to(PROJECT)}: {use}"
        for path in [*PROJECT.glob("*.py"), *(file for name in PACKAGES for file in (PROJECT / name).rglob("*.py"))]
        if path != PROJECT / "common" / "compat.py"
        for use in private_uses(path.read_text(encoding="utf-8"))
        if use not in DOCUMENTED
    }
    assert found == set()


def test_errors_does_not_import_torch() -> None:
    """A program that only reports a user's mistake must not wait for it."""
    program = "import sys, common.errors, common.messages, common.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("kind", "value"),
    [("<f8", 0.1), (">f4", 1.5), ("<f2", float("inf")), ("<i8", 2**40), (">i8", -3), ("|u1", 200), ("?", True)],
)
def test_numpy_scalars_become_pythons_numbers(kind: str, value: float, tmp_path: Path) -> None:
    scalar = np.array(value, kind)[()]
    torch.save({"value": scalar}, tmp_path / "file.pt")
    with compat.numpy_scalars_readable():
        read = torch.load(tmp_path / "file.pt", weights_only=True)["value"]
    assert read == scalar.item()
    assert type(read) is type(scalar.item())
    with pytest.raises(pickle.UnpicklingError):  # outside of the context
        torch.load(tmp_path / "file.pt", weights_only=True)


def test_tensors_move_by_a_share_towards_their_ends() -> None:
    tensors = [torch.tensor([0.0, 4.0]), torch.tensor(8.0)]
    compat.foreach_lerp(tensors, [torch.tensor([1.0, 0.0]), torch.tensor(16.0)], 0.25)
    assert [tensor.tolist() for tensor in tensors] == [[0.25, 3.0], 10.0]
