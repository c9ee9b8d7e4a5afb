"""Mixup and manifold mixup: a batch is mixed with itself in another order, and so are the losses.

    --augment mlperf 'mixup(alpha=0.2)'
    --augment mlperf 'manifold_mixup(alpha=0.2)'

Zhang et al. 2018 (arXiv:1710.09412), Verma et al. 2019 (arXiv:1806.05236). With lambda ~ Beta(alpha, alpha) and one
permutation a micro-batch, the loss is lambda L(f, y) + (1 - lambda) L(f, y permuted): Dice is not linear in its target,
so that mixed labels would be another loss. Evaluation is untouched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.compat import tree_iter, tree_map, without_torch_function
from common.errors import UserError
from model.registry import to_meta
from runtime.objective import Predict, plain


class Mixup:
    """Mixes the images.

    Args:
        alpha: of the Beta distribution; small: mostly one of the two, 1: uniform.

    Raises:
        UserError: alpha is not above 0.
    """

    # Whether modules of the network are hooked.
    looks_inside = False

    def __init__(self, alpha: float = 0.2) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
            raise UserError(f"--augment mixup(alpha={alpha!r}): expected a number above 0")
        self.alpha = float(alpha)

    def __call__(self, network: nn.Module, predict: Predict, loss: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        """As `Objective`; a batch of one is left as it is."""
        if len(image) == 1:
            return plain(network, predict, loss, image, label)
        # Drawn on the host, so that it does not wait for the device.
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        order = torch.randperm(len(image))
        return self.mixed(network, predict, loss, image, label, share, order)

    def mixed(
        self,
        network: nn.Module,
        predict: Predict,
        loss: nn.Module,
        image: Tensor,
        label: Tensor,
        share: float,
        order: Tensor,
    ) -> Tensor:
        """The loss of what is drawn: lambda and the permutation."""
        order = order.to(image.device)
        logits = self.logits(network, predict, image, lambda tensor: mix(tensor, share, order))
        value: Tensor = share * loss(logits, label) + (1 - share) * loss(logits, label[order])
        return value

    def logits(
        self, network: nn.Module, predict: Predict, image: Tensor, mix_tensor: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Of the mixed images."""
        return predict(mix_tensor(image))


class ManifoldMixup(Mixup):
    """Mixes at a layer that is drawn each time: the input, or behind any leaf module but the last.

    Every tensor that is computed before the cut and used after it is mixed, skips too.
    """

    looks_inside = True

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__(alpha)
        self._cuts: int | None = None

    def logits(
        self, network: nn.Module, predict: Predict, image: Tensor, mix_tensor: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Of the network with a cut somewhere."""
        if self._cuts is None:
            self._cuts = count_cuts(network, image)
        return self.cut_at(int(torch.randint(self._cuts, ())), network, predict, image, mix_tensor)

    def cut_at(
        self, cut: int, network: nn.Module, predict: Predict, image: Tensor, mix_tensor: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Of the network with a cut behind so many leaf modules' calls; 0: the input."""
        if cut == 0:
            return predict(mix_tensor(image))
        crossing = _Crossing(cut, image, mix_tensor)
        hooks = [handle for module in leaves(network) for handle in crossing.hook(module)]
        try:
            with crossing:
                return predict(image)
        finally:
            for handle in hooks:
                handle.remove()


def mix(tensor: Tensor, share: float, order: Tensor) -> Tensor:
    """share * tensor + (1 - share) * tensor, its samples in that order.

    Where the first axis is N times longer than the batch, as of slices or patches of each sample, a sample's stay
    together.
    """
    grouped = tensor.unflatten(0, (len(order), -1)) if len(tensor) != len(order) else tensor
    return torch.lerp(grouped[order], grouped, share).reshape(tensor.shape)


def leaves(network: nn.Module) -> list[nn.Module]:
    """Modules without modules in them."""
    return [module for module in network.modules() if next(module.children(), None) is None]


def count_cuts(network: nn.Module, image: Tensor) -> int:
    """Places for a cut: the input, and behind each call of a leaf module in a forward but the last.

    Raises:
        UserError: the network cannot be traced on the meta device.
    """
    shadow = to_meta(network).train()
    calls: list[None] = []
    for module in leaves(shadow):
        module.register_forward_hook(lambda *_: calls.append(None))
    try:
        with torch.no_grad():
            shadow(image.to("meta"))
    except Exception as error:
        told = " ".join(str(error).split())
        raise UserError(f"--augment manifold_mixup: this network cannot be looked into ({told}); use mixup") from None
    return max(1, len(calls))


class _Crossing(TorchFunctionMode):
    """Mixes what crosses the cut: before it, notes all that follows from the image; after it, hands out mixed copies.

    Functions are seen by torch's function mode; the modules' hooks see what goes into and comes out of operators of
    one's own (`torch.autograd.Function`), which the mode does not.
    """

    def __init__(self, cut: int, image: Tensor, mix_tensor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._left = cut
        self._batch = len(image)
        self._mix = mix_tensor
        # By identity; a tensor that nobody holds any longer cannot cross.
        self._before: dict[int, weakref.ref[Tensor]] = {}
        self._mixed: dict[int, tuple[Tensor, Tensor]] = {}
        self._note(image)

    def hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda _, inputs: self._enter(inputs)),
            module.register_forward_hook(lambda _, inputs, output: self._leave(inputs, output)),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._left == 0:
            args, kwargs = tree_map(self._after, (args, kwargs))
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        if any(self._is_before(value) for value in tree_iter((args, kwargs))):
            tree_map(self._note, made)
        return made

    def _enter(self, inputs: Any) -> Any:
        return tree_map(self._after, inputs) if self._left == 0 else inputs

    def _leave(self, inputs: Any, output: Any) -> Any:
        if self._left == 0:
            return output
        if any(self._is_before(value) for value in tree_iter(inputs)):
            tree_map(self._note, output)
        self._left -= 1
        return tree_map(self._after, output) if self._left == 0 else output

    def _note(self, value: Any) -> Any:
        if (
            isinstance(value, Tensor)
            and value.dim()
            and len(value)
            and len(value) % self._batch == 0
            and value.is_floating_point()
        ):
            self._before[id(value)] = weakref.ref(value)
        return value

    def _is_before(self, value: Any) -> bool:
        noted = self._before.get(id(value))
        return noted is not None and noted() is value

    def _after(self, value: Any) -> Any:
        if not self._is_before(value):
            return value
        if id(value) not in self._mixed:
            with without_torch_function():
                self._mixed[id(value)] = value, self._mix(value)  # kept with it, so that no other gets its id
        return self._mixed[id(value)][1]
