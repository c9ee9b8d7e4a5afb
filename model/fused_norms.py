"""Instance norms of any network, with the (leaky) ReLU behind each, computed by this project's operator.

`nn.InstanceNorm3d` copies a channels-last tensor to NCDHW and back in both directions (pytorch/pytorch#59168). What the
norms' outputs are used for is found by running the network on the meta device and recording its operations, so that
neither its blocks' structure nor their names matter. A norm becomes an `InstanceNormActivation` in place, and the
activation behind it an `nn.Identity`: no name in the state dict changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from common.compat import TorchDispatchMode, is_unhooked, tree_leaves, written_arguments
from model.normalization import InstanceNormActivation
from model.registry import to_meta

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)


@dataclass
class _Uses:
    """What one forward pass does with the norms' outputs; modules by name.

    Attributes:
        calls: number of calls of each norm and activation.
        users: of each norm's output: names of activations, and "" for any other operation.
        feeding: for each activation, the norms whose outputs it got, once per call.
        modified: norms behind whose activation the result was changed in place; ours needs it in the backward pass.
    """

    calls: Counter[str] = field(default_factory=Counter)
    users: dict[str, set[str]] = field(default_factory=dict)
    feeding: dict[str, list[str]] = field(default_factory=dict)
    modified: set[str] = field(default_factory=set)


class _Recorder(TorchDispatchMode):
    """Follows the storages of the norms' and activations' outputs through all operations of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = _Uses()
        self._normed: dict[StorageWeakRef, str] = {}
        self._activated: dict[StorageWeakRef, str] = {}
        self._alive: list[Any] = []  # a storage that is freed could be mistaken for the next one at its address
        self._activation = ""

    def watch_norm(self, norm: nn.Module, name: str) -> None:
        def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.uses.calls[name] += 1
            self.uses.users.setdefault(name, set())
            self._normed[self._storage(output)] = name

        norm.register_forward_hook(after)

    def watch_activation(self, activation: nn.Module, name: str) -> None:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.uses.calls[name] += 1
            self._activation = name

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._activation = ""
            before, behind = self._storage(inputs[0]), self._storage(output)
            if norm := self._normed.get(before):
                self.uses.feeding.setdefault(name, []).append(norm)
                self._activated[behind] = norm
            if behind == before:  # in place: from now on it is the activation's output that is used
                self._normed.pop(before, None)

        activation.register_forward_pre_hook(before)
        activation.register_forward_hook(after)

    def finish(self, output: Any) -> _Uses:
        """Returns the record; what the network returns has been used."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (norm := self._normed.get(self._storage(tensor))):
                self.uses.users[norm].add("")
        return self.uses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (norm := self._normed.get(self._storage(tensor))):
                self.uses.users[norm].add(self._activation)
        for tensor in tree_leaves(written_arguments(func, args, kwargs or {})):
            if isinstance(tensor, Tensor) and (norm := self._activated.get(self._storage(tensor))):
                self.uses.modified.add(norm)
        return func(*args, **(kwargs or {}))

    def _storage(self, tensor: Tensor) -> StorageWeakRef:
        self._alive.append(tensor)
        return StorageWeakRef(tensor.untyped_storage())


def fuse_norms(network: nn.Module, channels: int, shape: Sequence[int]) -> str:
    """Lets `InstanceNormActivation` compute the network's instance norms, in place, wherever the result is the same.

    A norm that is called more than once in a forward pass, has hooks or running statistics, or is of a subclass stays
    as it is. An activation is computed with its norm if it alone uses the norm's output, and never anything else.

    Args:
        channels: C of the image.
        shape: (D, H, W) of a valid window.

    Returns:
        A phrase that states how many were found and changed; "" if there are none to change.
    """
    norms = {name: module for name, module in network.named_modules() if _is_plain_norm(module)}
    others = [
        m for m in network.modules() if isinstance(m, nn.InstanceNorm3d) and type(m) is not InstanceNormActivation
    ]
    if not norms:
        return ""
    try:
        passes = [_record(network, norms, channels, shape, training=training) for training in (True, False)]
    except Exception:  # any network of any library, as in `check_window`: unknown without computing
        return f"0 of {len(others)}, because this network cannot be run without computing"
    calls = Counter[str]()
    for uses in passes:
        calls |= uses.calls
    once = [name for name in norms if calls[name] == 1]
    followers = _followers(passes, once)
    for name in once:
        norm, activation = norms[name], followers.get(name)
        # A slope of 1 is the norm alone.
        slope = _slope(network.get_submodule(activation)) if activation else 1.0
        norm.__class__ = InstanceNormActivation
        norm.slope, norm.fused = slope, True
    for name in set(followers.values()):
        network.get_submodule(name).__class__ = nn.Identity
    return f"{len(once)} of {len(others)}, {len(followers)} of them with the activation behind"


def _record(
    network: nn.Module, norms: dict[str, nn.Module], channels: int, shape: Sequence[int], *, training: bool
) -> _Uses:
    meta_network = to_meta(network).train(training)
    recorder = _Recorder()
    for name in norms:
        recorder.watch_norm(meta_network.get_submodule(name), name)
    for name, module in network.named_modules():
        if type(module) in ACTIVATIONS:
            recorder.watch_activation(meta_network.get_submodule(name), name)
    with torch.no_grad(), recorder:
        output = meta_network(torch.empty(2, channels, *shape, device="meta"))
    return recorder.finish(output)


def _followers(passes: Sequence[_Uses], norms: Sequence[str]) -> dict[str, str]:
    """Returns for each norm the activation to compute with it: its only user, which never gets anything else."""
    calls, fed = Counter[str](), Counter[str]()
    users: dict[str, set[str]] = {name: set() for name in norms}
    for uses in passes:
        calls.update(uses.calls)
        for name in norms:
            users[name] |= uses.users.get(name, set()) | ({""} if name in uses.modified else set())
    alone = {name: next(iter(used)) for name, used in users.items() if len(used) == 1}
    for uses in passes:
        for activation, feeding in uses.feeding.items():
            fed[activation] += sum(alone.get(name) == activation for name in feeding)
    return {
        name: activation for name, activation in alone.items() if activation and fed[activation] == calls[activation]
    }


def _slope(activation: nn.Module) -> float:
    return float(activation.negative_slope) if isinstance(activation, nn.LeakyReLU) else 0.0


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) is nn.InstanceNorm3d and not module.track_running_stats and is_unhooked(module)
