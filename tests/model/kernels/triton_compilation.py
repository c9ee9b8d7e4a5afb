"""The Triton kernels compiled for Hopper (sm_90), which needs no GPU; `test_triton.py` runs this file.

The interpreter is Python; only compilation shows type errors of Triton's and kernels that exceed a GPU's registers.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model.kernels import triton as triton_kernels
from model.losses import DiceSums
from model.normalization import NormState

# Registers per thread; a kernel that uses all of them spills to memory.
REGISTERS = 255
Compiled = dict[str, int]


class Hopper:
    """The part of a driver that compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiled:
    """Compiles every launched kernel instead of running it: its name -> registers per thread."""
    registers: Compiled = {}
    launch = JITFunction.run
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
        (number,) = re.findall(rf"{self.__name__}:\s+REG:(\d+)", usage.stdout)
        registers[self.__name__] = int(number)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    triton.runtime.driver.set_active(Hopper())
    return registers


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
    assert set(compiled) == {"_moments", "_normalize", "_gradient_sums", "_gradient"}
    assert max(compiled.values()) < REGISTERS, compiled


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
    assert set(compiled) == {"_sums", "_sums_gradient"}
    assert max(compiled.values()) < REGISTERS, compiled
