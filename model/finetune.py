"""Starting from another network's weights, and training only a part of a network.

Frozen is frozen: no gradient, no optimizer, and what changes by itself while training (batch norm's statistics,
dropout) stays as in an evaluation, whatever `train()` is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MethodType

import torch
from torch import Tensor, nn

from common.errors import UserError
from model.registry import to_meta

# Of `--freeze`: everything but the layer that gives the logits.
ALL_BUT_OUTPUT = "all_but_output"


@torch.no_grad()
def output_layer(network: nn.Module, channels: int, window: Sequence[int]) -> str:
    """The name of the last layer with parameters that a forward pass comes to; computed nowhere (meta device).

    Args:
        channels: of the image.
        window: (D, H, W) that the network takes.
    """
    shadow = to_meta(network).eval()
    called: list[str] = []
    for name, module in shadow.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, inputs, name=name: called.append(name))
    shadow(torch.empty(1, channels, *window, device="meta"))
    return called[-1]


def differences(network: nn.Module, weights: Mapping[str, Tensor], spared: str | None = None) -> list[str]:
    """How the weights are not this network's, a phrase for each kind of difference; empty where they fit.

    Args:
        spared: a layer whose shapes may be others.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    other = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    wrong = [name for name in other if spared is None or not name.startswith(f"{spared}.")]
    details = [f"{what} {names[0]}" for what, names in (("lacks", missing), ("also holds", extra)) if names]
    return details + [f"has {n} as {tuple(weights[n].shape)}, not {tuple(own[n].shape)}" for n in wrong[:1]]


def load_part(network: nn.Module, weights: Mapping[str, Tensor], output: str, who: str) -> str:
    """Takes over weights of the same network; its output layer may be of other classes, and then stays as it is.

    Args:
        output: the name of the output layer.
        who: names the weights, for the message.

    Returns:
        What was taken over and what is new, in a phrase.

    Raises:
        UserError: they are another network's.
    """
    if details := differences(network, weights, output):
        raise UserError(f"{who}: of another network than --model and --normalization give: it {' and '.join(details)}")
    own = network.state_dict()
    other = [name for name in own if own[name].shape != weights[name].shape]
    network.load_state_dict({name: weights[name] for name in own if name not in other}, strict=False)
    if not other:
        return "all of the network"
    (classes_now, *_), (classes_then, *_) = own[other[0]].shape, weights[other[0]].shape
    return f"all but {output}, which is new: {classes_then} classes there, {classes_now} here"


def freeze(network: nn.Module, patterns: Sequence[str], output: str) -> str:
    """Freezes every parameter whose whole name a pattern matches; before the network is wrapped or optimized.

    Args:
        patterns: regular expressions, or `ALL_BUT_OUTPUT`.
        output: the name of the output layer.

    Returns:
        What is frozen and what is trained, in a phrase.

    Raises:
        UserError: no regular expression, one that matches nothing, or nothing is left to train.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    frozen: set[str] = set()
    for pattern in patterns:
        expression = rf"(?!{re.escape(output)}\.).*" if pattern == ALL_BUT_OUTPUT else pattern
        try:
            found = {name for name in parameters if re.fullmatch(expression, name)}
        except re.error as error:
            raise UserError(f"--freeze {pattern!r} is no regular expression: {error}") from None
        if not found:
            names = ", ".join(list(parameters)[:3])
            raise UserError(f"--freeze {pattern!r} matches no parameter's whole name; they are {names}, …")
        frozen |= found
    if len(frozen) == len(parameters):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad = False
    _keep_in_eval(network)
    count = sum(parameters[name].numel() for name in frozen)
    trained = [name for name in parameters if name not in frozen]
    listed = ", ".join(trained[:4]) + (", …" if len(trained) > 4 else "")
    return f"{len(frozen)} of {len(parameters)} tensors ({count:,} numbers) stay as they are; trained: {listed}"


def _keep_in_eval(module: nn.Module) -> None:
    """Every part whose parameters are all frozen, with what it contains, no longer hears of `train()`."""
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
            # A method of the child, so that a deep copy's is the copy's own.
            child.train = MethodType(_stays, child)  # type: ignore[method-assign]
        else:
            _keep_in_eval(child)


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
