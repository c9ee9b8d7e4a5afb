"""The memory order of weights and activations: NCDHW (PyTorch's default) or NDHWC (channels last)."""

from __future__ import annotations

import torch
from torch import nn

MEMORY_FORMATS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}
# For the weights of a 2-D network.
PLANE_FORMATS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last}


def to_device(network: nn.Module, device: torch.device, layout: str) -> nn.Module:
    """Moves the network to the device, in place, and its weights into the layout's memory order."""
    network.to(device)
    for p in (*network.parameters(), *network.buffers()):
        if memory_format := PLANE_FORMATS[layout] if p.dim() == 4 else MEMORY_FORMATS[layout] if p.dim() == 5 else None:
            # A clone gets the strides that its gradient will have; `contiguous` leaves a single channel's as they are.
            p.data = p.data.clone(memory_format=memory_format)
    for p in network.parameters():
        # A 1x1x1 kernel is in both orders; its gradient has NCDHW's strides, and DDP copies if the weight's differ.
        if p.dim() == 5 and p[0, 0].numel() == 1:
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    return network
