"""Fine-tuning: loads pretrained weights and freezes parts of a network.

A frozen part gets no gradient and no optimizer state, and stays in evaluation mode whenever `train()` is called, so
that batch norm's statistics and dropout do not change either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MethodType

from torch import Tensor, nn

from common.errors import UserError

# A value of `--freeze`: everything but the layers that produce the logits.
ALL_BUT_OUTPUT = "all_but_output"


def output_layers(network: nn.Module, larger: nn.Module) -> list[str]:
    """Returns the names of the layers whose shape depends on the number of classes: one for each output.

    Args:
        larger: the same network for one class more.
    """
    other = larger.state_dict()
    return layers_of(name for name, tensor in network.state_dict().items() if tensor.shape != other[name].shape)


def layers_of(names: Iterable[str]) -> list[str]:
    """Returns the layers that tensors of these names belong to, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def is_part_of(name: str, layers: Sequence[str]) -> bool:
    """Returns whether a tensor of this name belongs to one of the layers; "" is the network itself."""
    return any(name.startswith(f"{layer}.") if layer else "." not in name for layer in layers)


def differences(network: nn.Module, weights: Mapping[str, Tensor], ignored: Sequence[str] = ()) -> list[str]:
    """Describes how weights do not fit the network, one phrase per kind of difference; empty if they fit.

    Args:
        ignored: names of layers whose shapes may differ, and of which some may be missing.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in weights]
    if any(is_part_of(name, ignored) for name in own if name in weights):  # otherwise they belong to something else
        missing = [name for name in missing if not is_part_of(name, ignored)]
    extra = [name for name in weights if name not in own]
    wrong = [name for name in _other_shapes(own, weights) if not is_part_of(name, ignored)]
    details = [f"{what} {names[0]}" for what, names in (("lacks", missing), ("also holds", extra)) if names]
    return details + [f"has {n} as {tuple(weights[n].shape)}, not {tuple(own[n].shape)}" for n in wrong[:1]]


def _other_shapes(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in own if name in weights and own[name].shape != weights[name].shape]


def load_part(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    outputs: Sequence[str],
    source: str,
    *,
    channels: int,
    trained_channels: int | None = None,
) -> str:
    """Loads weights of the same network, which may have been trained on other channels and classes.

    Output layers with another number of classes keep their initial weights, and so do those that the weights lack, as
    deep supervision's beside a plain network's; for an input layer see `_refit_input`.

    Args:
        outputs: names of the output layers.
        source: where the weights come from, for the message.
        channels: C of this network's images.
        trained_channels: C of the images that the weights were trained on, if that is known.

    Returns:
        A phrase that states what was loaded and what is new.

    Raises:
        UserError: the weights belong to another network.
    """
    own = network.state_dict()
    refitted = {
        name: fitting
        for name in _other_shapes(own, weights)
        if not is_part_of(name, outputs) and (fitting := _refit_input(weights[name], own[name], channels))
    }
    found = {before for _, before in refitted.values()}
    if len(found) > 1 or trained_channels not in (None, *found):
        refitted = {}  # what differs is no input layer
    weights = {**weights, **{name: weight for name, (weight, _) in refitted.items()}}
    if details := differences(network, weights, outputs):
        raise UserError(f"{source}: not the network of --model and --normalization: it {' and '.join(details)}")
    other = _other_shapes(own, weights)
    new = [name for name in own if name in other or name not in weights]
    network.load_state_dict({name: weights[name] for name in own if name not in new}, strict=False)
    summary = "all of the network"
    if new:
        layers = layers_of(new)
        summary = f"all but {', '.join(layers)}, which {'is' if len(layers) == 1 else 'are'} new"
    if other:
        sizes = zip(own[other[0]].shape, weights[other[0]].shape, strict=True)
        now, before = next((size, stored) for size, stored in sizes if size != stored)
        summary += f": {now} classes instead of {before}"
    if refitted:
        (before,) = found
        summary += (
            f"; {', '.join(refitted)} for {channels} input channel(s) instead of {before}: the mean over the channels, "
            f"repeated, times {before}/{channels}"
        )
    return summary


def _refit_input(stored: Tensor, own: Tensor, channels: int) -> tuple[Tensor, int] | None:
    """Returns the weight of a convolution of the image for another number of channels; None for any other layer.

    The weight (O, S * C, …), with the channels of S slices one after another, is averaged over C, repeated, and scaled
    by old / new C: an image whose channels are all the same gives the response that it gave before.

    Args:
        stored: the weight that was trained.
        own: the weight in this network, of the same shape but for its second axis.
        channels: the new C.

    Returns:
        The weight for this network, and the C that it was trained on.
    """
    if stored.dim() < 3 or own.dim() != stored.dim() or stored.shape[0] != own.shape[0]:
        return None
    slices, rest = divmod(own.shape[1], channels)
    if rest or stored.shape[2:] != own.shape[2:] or stored.shape[1] % slices:
        return None
    before = stored.shape[1] // slices
    mean = stored.unflatten(1, (slices, before)).mean(2, keepdim=True)
    repeated = mean.expand(-1, -1, channels, *own.shape[2:]).flatten(1, 2)
    return repeated * (before / channels), before


def freeze(network: nn.Module, patterns: Sequence[str], outputs: Sequence[str]) -> str:
    """Freezes every parameter whose whole name matches a pattern. Call before wrapping in DDP or making the optimizer.

    Args:
        patterns: regular expressions, or `ALL_BUT_OUTPUT`.
        outputs: names of the output layers.

    Returns:
        A phrase that states what is frozen and what is trained.

    Raises:
        UserError: an invalid regular expression, one without a match, or nothing is left to train.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    frozen: set[str] = set()
    for pattern in patterns:
        try:
            found = {
                name
                for name in parameters
                if (not is_part_of(name, outputs) if pattern == ALL_BUT_OUTPUT else re.fullmatch(pattern, name))
            }
        except re.error as error:
            raise UserError(f"--freeze {pattern!r} is not a regular expression: {error}") from None
        if not found:
            names = ", ".join(list(parameters)[:3])
            raise UserError(f"--freeze {pattern!r} does not match any parameter's whole name, such as {names}")
        frozen |= found
    if len(frozen) == len(parameters):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad = False
    _keep_in_eval(network)
    count = sum(parameters[name].numel() for name in frozen)
    trained = [name for name in parameters if name not in frozen]
    listed = ", ".join(trained[:4]) + (", …" if len(trained) > 4 else "")
    return f"{len(frozen)} of {len(parameters)} tensors ({count:,} values) are frozen; trained: {listed}"


def _keep_in_eval(module: nn.Module) -> None:
    """Puts every submodule whose parameters are all frozen into evaluation mode, and makes its `train()` do nothing."""
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
            # A bound method, so that a deep copy gets one bound to itself.
            child.train = MethodType(_unchanged, child)  # type: ignore[method-assign]
        else:
            _keep_in_eval(child)


def _unchanged(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `nn.Module.train` in a frozen part."""
    return module
