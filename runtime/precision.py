"""The number format in which `--amp` computes on each device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from common.compat import bf16_gradients_are_sound, cpu_computes_bf16

WRONG_GRADIENTS = "this CPU's bf16 convolutions give wrong gradients on small feature maps in this PyTorch"


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

    def make_scaler(self) -> torch.amp.GradScaler:
        """Returns a loss scaler, enabled for fp16 only: bf16 and fp32 have enough range."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def choose_precision(amp: bool, amp_dtype: str, device: torch.device) -> Precision:
    """Returns the format that `--amp` and `--amp_dtype` select on this device.

    `auto` is bf16 if the device has bf16 arithmetic, else fp16 with a scaler. On a CPU without bf16 instructions it is
    fp32, since 16-bit convolutions are emulated there (measured on AVX2: 500 times slower than fp32); so it is where
    their gradients are wrong (see `compat.bf16_gradients_are_sound`).
    """
    if not amp:
        return Precision(device, None)
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
