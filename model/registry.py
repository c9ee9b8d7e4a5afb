"""The table of networks; builds one from a spec, and checks it on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from common.compat import is_meta_device_problem
from common.errors import UserError, one_line
from common.registry import Allowlist, ResolvedSpec, Spec, Table, resolve
from model.deep_supervision import Outputs, as_tuple, unify_outputs
from model.unet3d import Unet3d

NETWORKS: Table[nn.Module] = {
    "unet3d": Unet3d,
    "slicewise": "model.slicewise:Slicewise",
}

# Parameter names that networks use for the numbers set by the data set, the least ambiguous first.
CHANNELS = ("in_channels", "n_channels", "input_channels", "in_chans", "channels")
CLASSES = ("out_channels", "classes", "num_classes", "n_classes")
DIMENSIONS = ("spatial_dims",)
# Parameters that control a download of weights, with the value that prevents it: some networks download by default.
NO_DOWNLOAD = {
    "pretrained": False,
    "encoder_weights": None,
    "weights": None,
    "weights_backbone": None,
    "pretrained_backbone": False,
    "pretrained_url": None,
    "use_pretrained": False,
}
# Networks that a checkpoint may name; its weights are in the file, so nothing needs a download.
ALLOWED = Allowlist(
    modules=("monai.networks.nets", "segmentation_models_pytorch", "dynamic_network_architectures.architectures.unet"),
    base=nn.Module,
    required_parameters=(CHANNELS, CLASSES),
    forbidden_parameters=("path_or_repo_id", "checkpoint"),  # such a class downloads or unpickles what they name
    overrides=NO_DOWNLOAD,
    classes_of=("torch.nn",),  # such as nnU-Net's conv_op
)
# Training passes after which a parameter counts as unused: stochastic depth leaves out some layers in each.
PASSES = 8
# Multiples tried when looking for the nearest valid window.
MULTIPLES = (2, 4, 8, 16, 32, 64, 128)


def build_network(
    spec: Spec | str,
    channels: int,
    classes: int,
    *,
    normalization: str = "instancenorm",
    activation: str = "relu",
    dimensions: int = 3,
) -> nn.Module:
    """Builds the network that `--model` names, with torch's default initialization; it returns `Outputs`.

    Channels, classes and dimensions are passed under whichever parameter names the network uses, unless the spec sets
    them itself; weights are downloaded only if the spec asks for it.

    Args:
        spec: an untrusted one is limited to `NETWORKS` and `ALLOWED`.
        channels: C of the image.
        classes: K, including the background.
        normalization: one of `layers.NORMALIZATIONS`, for a network of the table that takes it.
        activation: one of `layers.ACTIVATIONS`, for a network of the table that takes it.
        dimensions: 3 for (N, C, D, H, W) -> logits (N, K, D, H, W), 2 for (N, C, H, W) -> (N, K, H, W).

    Raises:
        UserError: unknown name or arguments, a spec that may not import or that contradicts the data set, a network
            without a channels parameter, or pretrained weights that cannot be read.
    """
    resolved = resolve(spec, NETWORKS, "--model", ALLOWED)
    fixed = _from_data(resolved, channels, classes, dimensions)
    if resolved.name in NETWORKS:
        if dimensions != 3:
            raise UserError(f"--model slicewise: {resolved.name} takes volumes; give a network of 2-D slices")
        # Only here: another library may mean something else by these names, such as an activation of the output.
        inner = partial(build_network, normalization=normalization, activation=activation)
        flags = {"normalization": normalization, "activation": activation}
        own: dict[str, Any] = {name: value for name, value in flags.items() if name not in resolved.arguments}
        # For a network inside this one: its spec is part of this spec, and trusted exactly as far.
        own["build"] = lambda text, c, k, n: inner(replace(resolved.spec, text=text), c, k, dimensions=n)
        fixed |= {name: value for name, value in own.items() if name in resolved.parameters}
    asked = ", ".join(name for name in NO_DOWNLOAD if resolved.arguments.get(name))
    try:
        network = resolved.call(fixed, NO_DOWNLOAD)
    except OSError as error:  # what downloads and missing files raise
        hint = f"; without {asked} it starts from random weights" if asked else ""
        raise UserError(f"--model {resolved.name} cannot read its weights: {one_line(error)}{hint}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {resolved.name} returns a {type(network).__name__}, not a torch.nn.Module")
    if any(isinstance(p, UninitializedParameter) for p in network.parameters()):
        raise UserError(f"--model {resolved.name} has lazy layers, whose shapes are not known yet; give their channels")
    if foreign := [name for name, value in network.state_dict().items() if not isinstance(value, Tensor)]:
        raise UserError(
            f"--model {resolved.name}: {foreign[0]} of its state is no tensor; a checkpoint holds tensors only"
        )
    unify_outputs(network, dimensions)
    return network


def _from_data(resolved: ResolvedSpec[nn.Module], channels: int, classes: int, dimensions: int) -> dict[str, Any]:
    """Returns the arguments that the data set determines and that the spec does not set itself.

    Raises:
        UserError: the spec sets one to another value, or the network takes no channels or no classes.
    """
    filled: dict[str, Any] = {}
    for names, value in ((CHANNELS, channels), (CLASSES, classes), (DIMENSIONS, dimensions)):
        name = next((name for name in names if name in resolved.parameters), None)
        if name is None:
            # A network with **kwargs may get them in the spec under any name; `check_window` checks the result.
            if names is not DIMENSIONS and not resolved.takes_any:
                raise UserError(
                    f"--model {resolved.name} has none of the parameters {', '.join(names)}, which the data set "
                    f"determines; it takes {resolved.signature()}"
                )
        elif name not in resolved.arguments:
            filled[name] = value
        elif (given := resolved.arguments[name]) != value:
            raise UserError(
                f"--model {resolved.name}: {name}={given!r}, but the data set needs {name}={value}; leave it out"
            )
    return filled


def check_window(network: nn.Module, shape: Sequence[int], flag: str, *, channels: int, classes: int) -> None:
    """Checks that the network maps a window of this shape to logits of the same shape.

    Calls the network's own `check_window(shape, flag)` if it has one; otherwise runs it on the meta device, where
    nothing is computed.

    Args:
        shape: (D, H, W).
        flag: where the shape comes from, for the message.

    Raises:
        UserError: it does not; the message gives the nearest window that works, or the network's own error.
    """
    if own := getattr(network, "check_window", None):
        own(shape, flag)
        return
    try:
        meta_network = to_meta(network)
    except Exception:  # a network that cannot be copied, such as with torch.nn.utils.weight_norm
        return
    problem = _problem(meta_network, shape, channels, classes)
    # A network that creates tensors on another device than its input's cannot be checked without computing.
    if not problem or is_meta_device_problem(problem):
        return
    message = f"{flag} {' '.join(map(str, shape))}: this network cannot take such a window"
    for candidate in _near(shape):
        if not _problem(meta_network, candidate, channels, classes):
            nearest = list(candidate)
            for axis, size in enumerate(shape):  # keep every side that works as it is
                tried = [*nearest[:axis], size, *nearest[axis + 1 :]]
                nearest = nearest if _problem(meta_network, tried, channels, classes) else tried
            raise UserError(f"{message} ({problem}); the nearest is {' '.join(map(str, nearest))}")
    raise UserError(f"{message}: {problem}")


def _near(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns shapes whose sides are multiples of a common number, the nearest first."""
    candidates = {
        tuple(max(least, round(size / multiple)) * multiple for size in shape)
        for multiple in MULTIPLES
        for least in (1, 2)
    }
    return sorted(candidates, key=lambda one: sum(abs(a - b) for a, b in zip(one, shape, strict=True)))


def _problem(meta_network: nn.Module, shape: Sequence[int], channels: int, classes: int) -> str:
    """Returns why the network on the meta device cannot train with this window; "" if it can."""
    # Two samples: batch norm needs two values per channel, which a batch may provide.
    image = torch.empty(2, channels, *shape, device="meta")
    try:
        with torch.no_grad():
            output: Any = meta_network.train()(image)
    except Exception as error:  # any network of any library
        return one_line(error)[:200]
    logits, *coarser = output if isinstance(output, tuple) else (output,)
    for each in (logits, *coarser):
        if not isinstance(each, Tensor):
            return f"{'one of its outputs' if coarser else 'its output'} is a {type(each).__name__}, not logits"
    if logits.shape != (2, classes, *shape):
        return f"it maps {tuple(image.shape)} to {tuple(logits.shape)}, not to {(2, classes, *shape)}"
    for each in coarser:
        if each.shape[:2] != (2, classes) or each.dim() != logits.dim():
            return f"a further output is {tuple(each.shape)}, not logits (2, {classes}, D, H, W)"
    return ""


def to_meta(network: nn.Module) -> nn.Module:
    """Copies a network to the meta device, where tensors have a shape but no values and take no memory."""
    tensors: dict[int, Any] = {
        id(t): nn.Parameter(t.detach().to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in (*network.parameters(), *network.buffers())
    }
    return copy.deepcopy(network, tensors)


def freeze_unused(network: nn.Module, channels: int, shape: Sequence[int]) -> list[str]:
    """Freezes parameters that do not affect the logits, such as an encoder's classifier; DDP would wait for them.

    Args:
        shape: (D, H, W) of a valid window.

    Returns:
        Their names.
    """
    if isinstance(network, Unet3d):
        return []
    unused = [name for name, p in network.named_parameters() if p.requires_grad]
    try:
        meta_network = to_meta(network).train()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same parameters in every run; GPUs keep their seeds
            for _ in range(PASSES):
                outputs: Outputs = meta_network(torch.empty(2, channels, *shape, device="meta"))
                torch.stack([logits.sum() for logits in as_tuple(outputs)]).sum().backward()
                unused = [name for name in unused if meta_network.get_parameter(name).grad is None]
                if not unused:
                    break
    except Exception:  # as in `check_window`: unknown without computing
        return []
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    return unused
