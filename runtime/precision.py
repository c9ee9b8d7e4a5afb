"""Which number format `--amp` computes in on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from common.compat import cpu_computes_bf16


@dataclass(frozen=True)
class Precision:
    """The format of the network's arithmetic.

    Attributes:
        dtype: bfloat16, float16, or None for fp32.
        note: one line for the user where `--amp` does something else than they may expect, else "".
    """

    device: torch.device
    dtype: torch.dtype | None
    note: str = ""

    def autocast(self) -> AbstractContextManager[None]:
        """The context of the network's forward pass; the loss is computed outside, in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def make_scaler(self) -> torch.amp.GradScaler:
        """A loss scaler that does nothing but for fp16: bf16 and fp32 have the range."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def choose_precision(amp: bool, amp_dtype: str, device: torch.device) -> Precision:
    """What `--amp --amp_dtype` mean on this device.

    `auto` takes bf16 where the device computes in it, else fp16 with a scaler; on a CPU without bf16 instructions it
    stays in fp32, since 16-bit convolutions are emulated there (measured on AVX2: 500 times slower than fp32).
    """
    if not amp:
        return Precision(device, None)
    if amp_dtype != "auto":
        return Precision(device, torch.bfloat16 if amp_dtype == "bf16" else torch.float16)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision(device, torch.bfloat16 if native else torch.float16)
    if cpu_computes_bf16():
        return Precision(device, torch.bfloat16)
    return Precision(
        device, None, "--amp: this CPU has no 16-bit arithmetic, computing in fp32 (--amp_dtype bf16 would emulate it)"
    )
