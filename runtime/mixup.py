"""Mixup and manifold mixup: a batch is mixed with itself in another order, and so are the losses.

    --augment mlperf 'mixup(alpha=0.2)'
    --augment mlperf 'manifold_mixup(alpha=0.2)'

Zhang et al. 2018 (arXiv:1710.09412), Verma et al. 2019 (arXiv:1806.05236). With lambda ~ Beta(alpha, alpha) and one
permutation per micro-batch, the loss is lambda L(f, y) + (1 - lambda) L(f, y permuted). The losses are mixed, not the
labels: Dice is not linear in its target. Evaluation is not affected.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.compat import tree_iter, tree_map, without_torch_function
from common.errors import UserError, one_line
from model.deep_supervision import Outputs
from model.kernels import dispatch
from model.registry import to_meta
from runtime.objective import Predict, plain


@dataclass(frozen=True)
class Mix:
    """A linear combination of a batch and its permutation.

    Attributes:
        share: lambda, in [0, 1].
        order: the permutation of the batch's N samples, (N,) int64 on the batch's device.
    """

    share: float
    order: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        """Returns share * tensor + (1 - share) * tensor[order].

        If the first axis is a multiple of N, as for slices or patches of each sample, those of a sample stay together.
        """
        samples = len(self.order)
        grouped = tensor.unflatten(0, (samples, -1)) if len(tensor) != samples else tensor
        return torch.lerp(grouped[self.order], grouped, self.share).reshape(tensor.shape)


class Mixup:
    """An `Objective` that mixes the images.

    Args:
        alpha: parameter of the Beta distribution: when small, lambda is mostly near 0 or 1; at 1, it is uniform.

    Raises:
        UserError: alpha is not above 0.
    """

    # Whether it hooks into modules of the network.
    looks_inside = False

    def __init__(self, alpha: float = 0.2) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
            raise UserError(f"--augment mixup(alpha={alpha!r}): expected a number above 0")
        self.alpha = float(alpha)

    def __call__(self, network: nn.Module, predict: Predict, loss: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        """Returns the mixed loss; see `Objective`. A batch of one sample is not mixed."""
        if len(image) == 1:
            return plain(network, predict, loss, image=image, label=label)
        mix = self.draw(image)
        logits = self.logits(network, predict, image, mix)
        value: Tensor = mix.share * loss(logits, label) + (1 - mix.share) * loss(logits, label[mix.order])
        return value

    def draw(self, image: Tensor) -> Mix:
        """Draws lambda and the permutation; on the host, which therefore need not wait for the device."""
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        # Without `non_blocking` the host would wait for all that the device has yet to compute.
        return Mix(share, torch.randperm(len(image)).to(image.device, non_blocking=True))

    def logits(self, network: nn.Module, predict: Predict, image: Tensor, mix: Mix) -> Outputs:
        """Returns the logits of the mixed images."""
        return predict(mix(image))


class ManifoldMixup(Mixup):
    """Mixes at a layer drawn for each micro-batch: the input, or the output of any leaf module but the last.

    Every tensor computed before this cut and used after it is mixed, those of skip connections included.
    """

    looks_inside = True

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__(alpha)
        self._cuts: int | None = None

    def logits(self, network: nn.Module, predict: Predict, image: Tensor, mix: Mix) -> Outputs:
        """Returns the logits of the network with a cut at random."""
        if self._cuts is None:
            self._cuts = count_cuts(network, image)
        return self.logits_with_cut(network, predict, image, mix, cut=int(torch.randint(self._cuts, ())))

    def logits_with_cut(self, network: nn.Module, predict: Predict, image: Tensor, mix: Mix, *, cut: int) -> Outputs:
        """Returns the logits of the network, mixed after `cut` calls of leaf modules; 0: at the input."""
        if cut == 0:
            return predict(mix(image))
        crossing = _Crossing(cut, image, mix)
        hooks = [handle for module in leaf_modules(network) for handle in crossing.hook(module)]
        try:
            # The joining kernel writes its output behind torch's back, and is called outside of all leaf modules.
            with crossing, dispatch.plain(["join"]):
                outputs = predict(image)
            # The loss uses outputs from before the cut after it, as the coarse ones of deep supervision may be.
            mixed: Outputs = tree_map(crossing.mixed_copy, outputs)
            return mixed
        finally:
            for handle in hooks:
                handle.remove()


def leaf_modules(network: nn.Module) -> list[nn.Module]:
    """Returns the modules without submodules."""
    return [module for module in network.modules() if next(module.children(), None) is None]


def count_cuts(network: nn.Module, image: Tensor) -> int:
    """Counts the possible cuts: the input, and after each call of a leaf module in a forward pass but the last.

    Raises:
        UserError: the network cannot be traced on the meta device.
    """
    traced = to_meta(network).train()
    calls: list[None] = []
    for module in leaf_modules(traced):
        module.register_forward_hook(lambda *_: calls.append(None))
    try:
        with torch.no_grad():
            traced(image.to("meta"))
    except Exception as error:
        raise UserError(f"--augment manifold_mixup: cannot trace this network ({one_line(error)}); use mixup") from None
    return max(1, len(calls))


class _Crossing(TorchFunctionMode):
    """Mixes the tensors that cross the cut.

    Before the cut it records all tensors computed from the image; after it, functions receive mixed copies of these.
    torch's function mode intercepts functions; hooks on the modules see the inputs and outputs of custom operators
    (`torch.autograd.Function`), which the mode does not.
    """

    def __init__(self, cut: int, image: Tensor, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._calls_left = cut
        self._batch = len(image)
        self._mix = mix
        # By identity; weak, since a tensor without references cannot cross the cut.
        self._before: dict[int, weakref.ref[Tensor]] = {}
        self._mixed: dict[int, tuple[Tensor, Tensor]] = {}
        self._record(image)

    def hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda _, inputs: self._enter(inputs)),
            module.register_forward_hook(lambda _, inputs, output: self._leave(inputs, output)),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._calls_left == 0:
            args, kwargs = tree_map(self.mixed_copy, (args, kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if any(self._is_before(value) for value in tree_iter((args, kwargs))):
            tree_map(self._record, result)
        return result

    def _enter(self, inputs: Any) -> Any:
        return tree_map(self.mixed_copy, inputs) if self._calls_left == 0 else inputs

    def _leave(self, inputs: Any, output: Any) -> Any:
        if self._calls_left == 0:
            return output
        if any(self._is_before(value) for value in tree_iter(inputs)):
            tree_map(self._record, output)
        self._calls_left -= 1
        return tree_map(self.mixed_copy, output) if self._calls_left == 0 else output

    def _record(self, value: Any) -> Any:
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
        recorded = self._before.get(id(value))
        return recorded is not None and recorded() is value

    def mixed_copy(self, value: Any) -> Any:
        """Returns the mixed copy of a tensor from before the cut; anything else as it is."""
        if not self._is_before(value):
            return value
        if id(value) not in self._mixed:
            with without_torch_function():
                # The original is kept alive, so that its id stays unique.
                self._mixed[id(value)] = value, self._mix(value)
        return self._mixed[id(value)][1]
