"""The number format in which `--amp` computes on each device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from common.compat import bf16_gradients_are_sound, cpu_computes_bf16, cpu_computes_fp16
from common.messages import is_main_rank, logger

WRONG_GRADIENTS = "this CPU's bf16 convolutions give wrong gradients on small feature maps in this PyTorch"

# How many times slower than in fp32 a CPU emulates a 3x3x3 convolution: bf16 measured with AVX2, fp16 with AVX-512.
EMULATION = {"bf16": 500, "fp16": 350}


@dataclass(frozen=True)
class Precision:
    """The number format of the network's arithmetic.

    Attributes:
        device: where the network computes.
        dtype: bfloat16, float16, or None for fp32.
        note: one line for the user if `--amp` does not do what they may expect, else "".
    """

    device: torch.device
    dtype: torch.dtype | None
    note: str = ""

    def autocast(self) -> AbstractContextManager[None]:
        """Returns the context of the network's forward pass; the loss is computed outside it, in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def applied_to(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Returns a function that computes the network's forward pass in this format."""

        def forward(batch: Tensor) -> Tensor:
            with self.autocast():
                logits: Tensor = network(batch)
            return logits

        return forward

    def make_scaler(self) -> torch.amp.GradScaler:
        """Returns a loss scaler, enabled for fp16 only: bf16 and fp32 have enough range."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def choose_precision(amp: bool, amp_dtype: str, device: torch.device) -> Precision:
    """Returns the format that `--amp` and `--amp_dtype` select on this device.

    `auto` is bf16 if the device has bf16 arithmetic, else fp16 with a scaler. On a CPU without bf16 instructions it is
    fp32, since 16-bit convolutions are emulated there, hundreds of times slower than fp32; so it is where their
    gradients are wrong (see `compat.bf16_gradients_are_sound`). A format that is asked for by name is taken, with a
    warning if it is emulated.
    """
    if not amp:
        return Precision(device, None)
    is_native = {"bf16": cpu_computes_bf16, "fp16": cpu_computes_fp16}
    if device.type == "cpu" and amp_dtype in is_native and not is_native[amp_dtype]():
        _warn_of_emulation(amp_dtype)
    if amp_dtype == "fp16":
        return Precision(device, torch.float16)
    if amp_dtype == "bf16":
        is_sound = device.type != "cpu" or bf16_gradients_are_sound()
        return Precision(device, torch.bfloat16, "" if is_sound else f"--amp_dtype bf16: {WRONG_GRADIENTS}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision(device, torch.bfloat16 if native else torch.float16)
    if not cpu_computes_bf16():
        note = "--amp: this CPU has no 16-bit arithmetic, computing in fp32 (--amp_dtype bf16 would emulate it)"
        return Precision(device, None, note)
    if not bf16_gradients_are_sound():
        return Precision(device, None, f"--amp: {WRONG_GRADIENTS}, computing in fp32")
    return Precision(device, torch.bfloat16)


@cache  # once, although prediction chooses for every scan
def _warn_of_emulation(amp_dtype: str) -> None:
    """Warns at once and not in a note, which is shown after the first, slow step."""
    if is_main_rank():
        logger.warning(
            f"--amp_dtype {amp_dtype}: this CPU has no {amp_dtype} arithmetic and emulates it, about "
            f"{EMULATION[amp_dtype]} times slower than fp32; use --amp_dtype auto"
        )
