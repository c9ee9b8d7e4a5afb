"""The Triton kernels compiled for a GPU of the architecture in ARCHITECTURE (90: Hopper), which needs none.

The interpreter is Python; only compilation shows type errors of Triton's and kernels that exceed a GPU's registers.
`test_triton.py` runs this file.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from model.kernels import triton as triton_kernels
from model.losses import DiceSums
from model.normalization import NormState

ARCHITECTURE = int(os.environ["ARCHITECTURE"])
# Per thread.
REGISTERS = 255
Compiled = dict[str, int]
POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


class Driver:
    """The part of a driver that compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_with_numbers(kernel: JITFunction, arguments: dict[str, object]) -> None:
    """Compiles a kernel with every number as a constant, as torch.compile does to see which tensors it writes.

    If that fails, torch.compile takes all of them as written, and then refuses those that are parameters.
    """
    signature, constants = {}, {}
    for name in kernel.arg_names:
        value = arguments[name]
        if isinstance(value, Tensor):
            signature[name] = f"*{POINTERS[value.dtype]}"
        else:
            signature[name], constants[name] = "constexpr", value
    triton.compile(ASTSource(kernel, signature, constants), target=Driver().get_current_target())


@pytest.fixture(scope="module")
def with_numbers() -> set[str]:
    """Names of the kernels that were compiled with numbers."""
    return set()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_numbers: set[str]) -> Compiled:
    """Compiles every launched kernel instead of running it: its name -> bytes that its registers spill."""
    spilled: Compiled = {}
    launch = JITFunction.run
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if self.__name__ not in with_numbers:  # once: what fails there is in the source, whatever the shape
            with_numbers.add(self.__name__)
            compile_with_numbers(self, {**dict(zip(self.arg_names, args, strict=False)), **options})
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
        (found,) = re.findall(rf"{self.__name__}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
        registers, stack, local = map(int, found)
        # Some stack may be for the call of a division: only a kernel that uses every register spills any.
        spilled[self.__name__] = stack + local if registers == REGISTERS else 0

    monkeypatch.setattr(JITFunction, "run", compile_only)
    triton.runtime.driver.set_active(Driver())
    return spilled


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 32, 16, 16, 16), torch.bfloat16),
        ((2, 32, 16, 16, 16), torch.float32),
        ((1, 320, 4, 4, 4), torch.bfloat16),
        ((1, 3, 1, 1, 2), torch.float16),
    ],
    ids=str,
)
def test_norm(compiled: Compiled, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight, mean = torch.ones(shape[1]), torch.zeros(shape[:2])
    triton_kernels.norm_forward(x, weight, weight, eps=1e-5, slope=0.0)
    triton_kernels.norm_backward(x, NormState(x, x, weight, weight, mean, mean), 0.0)
    sums, maps = {"_moments", "_finish_moments", "_gradient_sums", "_finish_gradient_sums"}, {"_normalize", "_gradient"}
    assert compiled == dict.fromkeys(sums | maps, 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 16, 16, 16), torch.bfloat16),
        ((2, 3, 16, 16, 16), torch.float32),
        ((1, 2, 1, 1, 1), torch.bfloat16),
        ((1, 20, 3, 3, 3), torch.float32),
    ],
    ids=str,
)
def test_loss_sums(compiled: Compiled, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    logits = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    labels = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.uint8)
    triton_kernels.sums_forward(logits, labels)
    triton_kernels.sums_backward(logits, labels, DiceSums(torch.zeros(shape[0]), *torch.zeros(3, *shape[:2])))
    assert compiled == dict.fromkeys(("_sums", "_sums_gradient"), 0)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def test_the_convolution_of_the_image(compiled: Compiled) -> None:
    x = tensor(1, 1, 16, 16, 16, dtype=torch.float32)
    triton_kernels.image_forward(x, tensor(32, 1, 3, 3, 3))
    triton_kernels.image_weight_gradient(x, tensor(1, 32, 16, 16, 16))
    assert compiled == dict.fromkeys(("_image_forward", "_image_weight_gradient"), 0)


@pytest.mark.skipif(ARCHITECTURE != 90, reason="used on Hopper only")
@pytest.mark.parametrize("channels", [32, 64])
def test_convolutions_to_few_channels(compiled: Compiled, channels: int) -> None:
    x = tensor(1, channels, 2, 4, 128)
    triton_kernels.narrow_forward(x, tensor(32, channels, 3, 3, 3))
    triton_kernels.narrow_weight_gradient(x, tensor(1, 32, 2, 4, 128))
    assert compiled == dict.fromkeys(("_narrow_forward", "_narrow_weight_gradient"), 0)


@pytest.mark.parametrize(("channels", "filters"), [(64, 32), (320, 256)])
def test_upsampling_into_a_joined_tensor(compiled: Compiled, channels: int, filters: int) -> None:
    x, weight = tensor(1, channels, 4, 4, 4), tensor(channels, filters, 2, 2, 2)
    triton_kernels.join_forward(x, tensor(1, filters, 8, 8, 8), weight, torch.zeros(filters))
    joined = tensor(1, 2 * filters, 8, 8, 8)
    triton_kernels.join_backward(joined, x, weight)
    triton_kernels.add_part(tensor(1, filters, 8, 8, 8), joined[:, filters:])
    names = ("_join_forward", "_join_input_gradient", "_join_weight_gradient", "_add_part")
    assert compiled == dict.fromkeys(names, 0)


def test_the_convolution_to_the_classes(compiled: Compiled) -> None:
    x, weight = tensor(1, 32, 16, 16, 16), tensor(3, 32, 1, 1, 1)
    triton_kernels.output_forward(x, weight, torch.zeros(3))
    triton_kernels.output_backward(tensor(1, 3, 16, 16, 16), x, weight)
    assert compiled == dict.fromkeys(("_output_forward", "_output_backward"), 0)
