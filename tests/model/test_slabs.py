"""The operators on slabs, whose ranks are threads; the whole network on real processes is in
`tests/runtime/distributed/test_sample_parallel.py`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from model.finetune import freeze
from model.losses import DiceCELoss, DiceLoss, LibraryLoss, SlabLoss
from model.normalization import instance_norm_activation
from model.slabs import SlabConv3d
from model.unet3d import Unet3d

ORDERS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}
SHAPE = (2, 5, 12, 6, 4)


@dataclass
class Table:
    """What the threads of a group exchange."""

    count: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=60)

    def all(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = [self.values[rank] for rank in range(self.count)]
        self.barrier.wait()
        return values


@dataclass
class ThreadSlabs:
    """A rank of `model.slabs.Slabs` that is a thread."""

    rank: int
    table: Table

    @property
    def count(self) -> int:
        return self.table.count

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.table.all(self.rank, tensor))

    def exchange(self, to_previous: Tensor | None, to_next: Tensor | None) -> tuple[Tensor, Tensor]:
        sent = self.table.all(self.rank, [None if t is None else t.clone() for t in (to_previous, to_next)])
        nothing = torch.zeros_like(next(t for t in (to_previous, to_next) if t is not None))
        from_previous = sent[self.rank - 1][1] if self.rank > 0 else None
        from_next = sent[self.rank + 1][0] if self.rank < self.count - 1 else None
        return tuple(nothing if t is None else t for t in (from_previous, from_next))  # type: ignore[return-value]


def on_slabs(count: int, run: Callable[[ThreadSlabs, slice], list[Tensor]]) -> list[list[Tensor]]:
    """Runs a function for each slab of a window of 12 planes, in threads; returns the results in their order."""
    table, planes = Table(count), SHAPE[2] // count
    with ThreadPoolExecutor(count) as threads:
        ranks = [
            threads.submit(run, ThreadSlabs(rank, table), slice(rank * planes, (rank + 1) * planes))
            for rank in range(count)
        ]
        return [rank.result() for rank in ranks]


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def window(layout: str, seed: int = 0) -> Tensor:
    """A float64 window whose mean differs along depth."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + torch.arange(SHAPE[2])[:, None, None]).to(memory_format=ORDERS[layout])


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("count", [2, 3, 12])
def test_norm_by_slabs(count: int, layout: str) -> None:
    x, grad = window(layout), window(layout, seed=1)
    weight, bias = torch.linspace(0.5, 2, 5, dtype=torch.float64), torch.linspace(-1, 1, 5, dtype=torch.float64)
    whole = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = torch.nn.functional.instance_norm(whole[0], weight=whole[1], bias=whole[2])
    y = torch.nn.functional.leaky_relu(y, 0.01)
    y.backward(grad)

    def run(slabs: ThreadSlabs, planes: slice) -> list[Tensor]:
        own = [x[:, :, planes].clone(memory_format=ORDERS[layout]), weight.clone(), bias.clone()]
        own = [tensor.requires_grad_() for tensor in own]
        part = instance_norm_activation(*own, eps=1e-5, slope=0.01, slabs=slabs)
        part.backward(grad[:, :, planes])
        assert part.is_contiguous(memory_format=ORDERS[layout])
        return [part.detach(), *(tensor.grad for tensor in own if tensor.grad is not None)]

    parts, dx, dweight, dbias = zip(*on_slabs(count, run), strict=True)
    assert_same(torch.cat(parts, 2), y.detach())
    for found, tensor in zip((torch.cat(dx, 2), sum(dweight), sum(dbias)), whole, strict=True):
        assert isinstance(found, Tensor)
        assert tensor.grad is not None
        assert_same(found, tensor.grad)


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize(("count", "stride"), [(2, 1), (12, 1), (2, 2), (6, 2)])
def test_convolution_by_slabs(count: int, stride: int, layout: str) -> None:
    """Slabs of one plane, too, which is the neighbour of both others."""
    conv = SlabConv3d(5, 3, stride).to(torch.float64, memory_format=ORDERS[layout])
    x = window(layout).requires_grad_()
    y = conv(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    planes_out = y.shape[2] // count

    def run(slabs: ThreadSlabs, planes: slice) -> list[Tensor]:
        own = SlabConv3d(5, 3, stride).to(torch.float64)
        own.load_state_dict(conv.state_dict())
        own.slabs = slabs
        part = x.detach()[:, :, planes].requires_grad_()
        out = own(part)
        out.backward(grad[:, :, slabs.rank * planes_out : (slabs.rank + 1) * planes_out])
        return [out.detach(), *(tensor.grad for tensor in (part, own.weight) if tensor.grad is not None)]

    parts, dx, dweight = zip(*on_slabs(count, run), strict=True)
    assert_same(torch.cat(parts, 2), y.detach())
    assert x.grad is not None
    assert_same(torch.cat(dx, 2), x.grad)
    assert_same(torch.stack(dweight).sum(0), conv.get_parameter("weight").grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [DiceCELoss(), DiceLoss(include_background=True)])
def test_loss_by_slabs(loss: DiceCELoss | DiceLoss) -> None:
    """The gradient is times the number of slabs, since DDP divides by that of the ranks."""
    logits = window("NCDHW").requires_grad_()
    labels = torch.randint(5, (SHAPE[0], 1, *SHAPE[2:]), dtype=torch.uint8)
    value = loss(logits, labels)
    value.backward()

    def run(slabs: ThreadSlabs, planes: slice) -> list[Tensor]:
        part = logits.detach()[:, :, planes].requires_grad_()
        own = SlabLoss(loss, slabs)(part, labels[:, :, planes])
        own.backward()
        assert part.grad is not None
        return [own.detach(), part.grad]

    values, gradients = zip(*on_slabs(3, run), strict=True)
    assert len({one.item() for one in values}) == 1, "every rank has the loss of whole windows, to the bit"
    assert_same(values[0], value.detach())
    assert logits.grad is not None
    assert_same(torch.cat(gradients, 2), 3 * logits.grad)


def test_other_losses_are_refused() -> None:
    with pytest.raises(UserError, match="only the losses dice_ce and dice"):
        SlabLoss(LibraryLoss(torch.nn.CrossEntropyLoss()), ThreadSlabs(0, Table(1)))


def test_in_evaluation_windows_are_whole() -> None:
    """A group of which only one rank calls would wait for ever."""
    x = torch.randn(1, 5, 8, 8, 8)
    network = Unet3d(5, 3, filters=(2, 3, 4)).eval()
    expected = network(x)
    network.share_windows(ThreadSlabs(0, Table(2)))
    assert torch.equal(network(x), expected)
    assert torch.equal(network.train().eval()(x), expected)


@pytest.mark.parametrize("frozen", [[], [r"input_block\..*"], ["all_but_output"]])
def test_a_partly_frozen_network_is_shared_as_a_whole(frozen: list[str]) -> None:
    """Its frozen parts remain in evaluation mode while it trains."""
    network = Unet3d(1, 3, filters=(2, 4, 6)).double()
    if frozen:
        freeze(network, frozen, ["output.conv"])
    x = torch.randn(2, 1, 24, 8, 8, dtype=torch.float64)
    grad = torch.randn(2, 3, 24, 8, 8, dtype=torch.float64)
    logits = network.train()(x)
    logits.backward(grad)

    def run(slabs: ThreadSlabs, planes: slice) -> list[Tensor]:
        own = copy.deepcopy(network)
        own.zero_grad()
        own.share_windows(slabs)
        own.eval().train()
        planes = slice(2 * planes.start, 2 * planes.stop)  # of a window of 24 planes
        part = own(x[:, :, planes])
        part.backward(grad[:, :, planes])
        return [part.detach(), *(p.grad for p in own.parameters() if p.grad is not None)]

    parts, *gradients = zip(*on_slabs(2, run), strict=True)
    assert_same(torch.cat(parts, 2), logits.detach())
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    for found, whole in zip(gradients, expected, strict=True):
        assert_same(torch.stack(found).sum(0), whole)
