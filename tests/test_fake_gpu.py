"""The stand-in for a GPU notices what it is there for, and is torch where it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.fake_gpu import CPU, GPU, FakeEvent, FakeGpu

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "branch": lambda x: 1 if x[0] > 0 else 2,
    "format": lambda x: f"{x[0]:.3f}",
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "to a type": lambda x: x.to(CPU, torch.float64),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "any": lambda x: any(x > 0),
    "mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.__setitem__(x > 0, torch.ones((), device=GPU)),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "masked select": lambda x: x.masked_select(x > 0),
    "copy to ordinary memory": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "blocking copy to pinned memory": lambda x: torch.empty(3, pin_memory=True).copy_(x),
    "blocking copy to the device": lambda x: torch.zeros(3).to(GPU),
    "copy into": lambda x: x.copy_(torch.zeros(3)),
    "synchronize": lambda x: torch.cuda.synchronize(GPU),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_wait_is_recorded(read: Callable[[Tensor], object], gpu: FakeGpu) -> None:
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            tensor = torch.tensor([1.0, -2.0, 3.0]).to(GPU, non_blocking=True)
            assert gpu.waits == []
            read(tensor)
        assert gpu.waits
        gpu.waits.clear()


def test_numpy_needs_a_copy_first(gpu: FakeGpu) -> None:
    with pytest.raises(TypeError, match="cuda:0"):
        torch.zeros(3, device=GPU).numpy()


QUIET: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda x: (2 * x + 1 / x).exp().clamp(max=3.0) ** 2,
    "reduction": lambda x: torch.stack([x.sum(), x.mean(), x.max(), torch.linalg.vector_norm(x)]),
    "selection": lambda x: torch.where(x > 0, x, 0.0),
    "indexing": lambda x: torch.cat([x[1:], x[1::2], x[(x > 0).long()]]),
    "in place": lambda x: x.clone().mul_(2).add_(x, alpha=0.5),
    "a view in place": lambda x: torch.cat([x.clone()[1:].zero_(), x]),
    "a type": lambda x: x.double().half().float(),
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
}


@pytest.mark.parametrize("compute", QUIET.values(), ids=QUIET)
def test_computing_is_no_wait_and_has_the_numbers_of_a_cpu(compute: Callable[[Tensor], Tensor], gpu: FakeGpu) -> None:
    values = torch.tensor([1.0, -2.0, 3.0])
    result = compute(values.to(GPU, non_blocking=True))
    assert (gpu.waits, result.device, result.is_cuda) == ([], GPU, True)
    assert torch.equal(result.cpu(), compute(values))


MIXED: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: x + torch.zeros(3),
    "a forgotten device": lambda x: x + torch.zeros(()),
    "stack": lambda x: torch.stack([x, torch.zeros(3)]),
    "out": lambda x: torch.add(x, x, out=torch.empty(3)),
    "in place": lambda x: x.add_(torch.zeros(3)),
    "index": lambda x: x[torch.tensor([0])],
    "a list as index": lambda x: x[[0]],
    "convolution": lambda x: torch.nn.functional.conv1d(x[None], torch.ones(1, 1, 1)),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_tensors_of_both_devices_are_refused(mix: Callable[[Tensor], object], gpu: FakeGpu) -> None:
    with pytest.raises(RuntimeError, match="tensors on cpu and cuda:0"):
        mix(torch.zeros(3, device=GPU))


def test_an_asynchronous_copy_arrives_with_its_event_and_no_sooner(gpu: FakeGpu) -> None:
    source, host = torch.ones(3, device=GPU), torch.empty(3, pin_memory=True)
    events = [FakeEvent(), FakeEvent()]
    events[0].record()
    host.copy_(source, non_blocking=True)
    source.zero_()  # comes after the copy in the GPU's order
    events[1].record()
    events[0].synchronize()
    assert host.isnan().all()
    events[1].synchronize()
    assert host.tolist() == [1.0] * 3
    assert gpu.waits == []


def test_gradients_are_on_the_gpu(gpu: FakeGpu) -> None:
    weight = torch.ones(3, device=GPU, requires_grad=True)
    (weight * torch.arange(3.0, device=GPU)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.device == GPU
    assert gpu.waits == []
    assert weight.grad.tolist() == [0.0, 1.0, 2.0]


def test_a_wait_is_told_with_its_function(gpu: FakeGpu) -> None:
    torch.ones((), device=GPU).item()
    assert gpu.waits == ["item in test_a_wait_is_told_with_its_function"]
