"""The table of networks, building one from a spec, and what can be known of it without computing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import registry
from common.errors import UserError
from model.unet3d import Unet3d

NETWORKS: registry.Table[nn.Module] = {
    "unet3d": Unet3d,
    "slicewise": "model.slicewise:Slicewise",
}

# What networks of the field call what the data set fixes, the least ambiguous name first.
CHANNELS = ("in_channels", "n_channels", "input_channels", "in_chans", "channels")
CLASSES = ("out_channels", "classes", "num_classes", "n_classes")
# What would fetch weights, and the value with which it fetches none: the default of some is to fetch.
NO_DOWNLOAD = {
    "pretrained": False,
    "encoder_weights": None,
    "weights": None,
    "weights_backbone": None,
    "pretrained_backbone": False,
    "pretrained_url": None,
    "use_pretrained": False,
}
# A checkpoint may name these: its weights are in it, so that nothing is fetched.
KNOWN = registry.Known(
    ("monai.networks.nets", "segmentation_models_pytorch"),
    nn.Module,
    (CHANNELS, CLASSES),
    NO_DOWNLOAD,
    never=("path_or_repo_id", "checkpoint"),  # such a class fetches or unpickles whatever it is told
)
# Windows are tried at multiples of these.
MULTIPLES = (2, 4, 8, 16, 32, 64, 128)


def build_network(
    spec: str, channels: int, classes: int, normalization: str, activation: str, dimensions: int = 3
) -> nn.Module:
    """The network that `--model` names, (N, C, D, H, W) -> logits (N, K, D, H, W), with torch's default initialisation.

    Channels, classes and dimensions are filled in by the names of the parameters, and weights are fetched only where
    the spec says so itself.

    Args:
        spec: may import what is not in the table where it is `registry.Typed`, else the `KNOWN` alone.
        dimensions: 2 for a network of (N, C, H, W).

    Raises:
        UserError: unknown name or arguments, a spec that may not import, or a network that takes no channels.
    """
    found = registry.find(spec, NETWORKS, "--model", KNOWN)
    network = found.call(_filled_in(found, channels, classes, normalization, activation, dimensions), NO_DOWNLOAD)
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {found.name} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def _filled_in(
    found: registry.Named[nn.Module], channels: int, classes: int, normalization: str, activation: str, dimensions: int
) -> dict[str, Any]:
    parameters = found.parameters
    room: dict[str, Any] = {"spatial_dims": dimensions}
    for names, value in ((CHANNELS, channels), (CLASSES, classes)):
        # One that takes anything (**) may be given them in the spec: what it makes of them is found by `check_window`.
        if name := next((name for name in names if name in parameters), None):
            room[name] = value
        elif not found.takes_any:
            raise UserError(
                f"--model {found.name} takes none of {', '.join(names)}, which come from the data; "
                f"it takes {registry.takes(parameters)}"
            )
    room |= {"normalization": normalization, "activation": activation}
    # For a network of networks: what it is given comes out of the same spec, with the same rights.
    room["build"] = partial(_build_inner, type(found.spec), normalization, activation)
    return {name: value for name, value in room.items() if name in parameters}


def _build_inner(
    rights: type[str], normalization: str, activation: str, spec: str, channels: int, classes: int, dimensions: int
) -> nn.Module:
    return build_network(rights(spec), channels, classes, normalization, activation, dimensions)


def check_window(network: nn.Module, shape: Sequence[int], flag: str, channels: int, classes: int) -> None:
    """Refuses a window that the network cannot take, and a network whose output is no logits of it.

    A network with a `check_window(shape, flag)` of its own is asked; any other is tried on the meta device, where
    nothing is computed.

    Raises:
        UserError: names the nearest window that works, or what the network says where none does.
    """
    if own := getattr(network, "check_window", None):
        own(shape, flag)
        return
    shadow = to_meta(network)
    problem = _problem(shadow, shape, channels, classes)
    # It makes tensors of its own elsewhere than its input's device: nothing can be known without computing.
    if not problem or "meta" in problem:
        return
    told = f"{flag} {' '.join(map(str, shape))}: this network cannot take such a window"
    for candidate in _near(shape):
        if not _problem(shadow, candidate, channels, classes):
            nearest = list(candidate)
            for axis, size in enumerate(shape):  # what need not change does not
                tried = [*nearest[:axis], size, *nearest[axis + 1 :]]
                nearest = nearest if _problem(shadow, tried, channels, classes) else tried
            raise UserError(f"{told} ({problem}); the nearest is {' '.join(map(str, nearest))}")
    raise UserError(f"{told}: {problem}")


def _near(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    candidates = {
        tuple(max(least, round(size / multiple)) * multiple for size in shape)
        for multiple in MULTIPLES
        for least in (1, 2)
    }
    yield from sorted(candidates, key=lambda one: sum(abs(a - b) for a, b in zip(one, shape, strict=True)))


def _problem(shadow: nn.Module, shape: Sequence[int], channels: int, classes: int) -> str:
    """Why the network cannot train with a window, in a phrase; "" where it can."""
    # Two samples: batch norm needs two values a channel, which a batch may give.
    image = torch.empty(2, channels, *shape, device="meta")
    try:
        with torch.no_grad():
            logits = shadow.train()(image)
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    if not isinstance(logits, Tensor):
        return f"its output is a {type(logits).__name__}, not a tensor of logits"
    if logits.shape != (2, classes, *shape):
        return f"of {tuple(image.shape)} it makes {tuple(logits.shape)}, not {(2, classes, *shape)}"
    return ""


def to_meta(network: nn.Module) -> nn.Module:
    """A copy on the meta device, where tensors have shapes and no values; takes no memory."""
    tensors: Mapping[int, Any] = {
        id(t): nn.Parameter(t.detach().to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in (*network.parameters(), *network.buffers())
    }
    return copy.deepcopy(network, dict(tensors))


def freeze_unused(network: nn.Module, channels: int, shape: Sequence[int]) -> list[str]:
    """Freezes the parameters that the logits do not depend on (an encoder's classifier, say): DDP waits for all others.

    Returns:
        Their names.
    """
    if isinstance(network, Unet3d):
        return []
    shadow = to_meta(network).train()
    try:
        shadow(torch.empty(2, channels, *shape, device="meta")).sum().backward()
    except Exception:  # as in `check_window`: nothing can be known without computing
        return []
    unused = [name for name, p in shadow.named_parameters() if p.requires_grad and p.grad is None]
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    return unused
