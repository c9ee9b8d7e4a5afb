"""The table of networks, and building one from a spec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import plugins
from model.unet3d import Unet3d

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet3d": Unet3d}


def build_network(spec: str, channels: int, classes: int, normalization: str, activation: str) -> nn.Module:
    """The network that `--model` names, (N, C, D, H, W) -> logits (N, K, D, H, W), with torch's default initialisation.

    Raises:
        UserError: unknown name or arguments.
    """
    room: dict[str, Any] = {"channels": channels, "classes": classes}
    room |= {"normalization": normalization, "activation": activation}
    return plugins.build(spec, NETWORKS, "--model", **room)


def check_window(network: nn.Module, shape: Sequence[int], flag: str) -> None:
    """Lets a network that restricts its windows refuse one, with a UserError that names the nearest that works."""
    if isinstance(network, Unet3d):
        network.check_window(shape, flag)
