"""Several ranks per sample (`--ranks_per_sample`): losses and gradients are those of whole windows on one rank."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from model.slabs import halo_bytes
from model.unet3d import MLPERF_FILTERS, Unet3d
from runtime import build
from runtime.arguments import RunConfig, parse_arguments
from runtime.distributed.sample_parallel import GroupSlabs, SampleGroups
from runtime.distributed.world import World
from runtime.flag_fields import trusted_spec
from runtime.run_spec import make_run_spec

RunRanks = Callable[..., list[str]]

CPU = torch.device("cpu")
FILTERS = (3, 4, 5)
# Four slabs of four planes, one plane at the lowest resolution.
SHAPE = (16, 8, 12)
BATCH = 2

# Every rank computes both: a step on all samples with whole windows, and its slab's part of that step.
STEP = f"""
import copy, json, sys, torch, warnings
from model.losses import DiceCELoss, SlabLoss
from model.unet3d import Unet3d
from runtime.distributed.sample_parallel import SampleGroups
from runtime.memory_format import to_device

DTYPE, LAYOUT, FUSED, RANKS, AMP = SETTINGS
if AMP:  # autocast on a CPU gives the gradient of a 1x1x1 kernel other strides than its weight's
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
order = torch.channels_last_3d if LAYOUT == "NDHWC" else torch.contiguous_format
groups = SampleGroups.divide(world.rank, world.size, RANKS)
slabs = groups.connect(world)

torch.manual_seed(3)
network = Unet3d(2, 3, activation="leaky_relu", filters={FILTERS}, fused=FUSED).to(DTYPE)
to_device(network, torch.device("cpu"), LAYOUT)
for name, parameter in network.named_parameters():
    if parameter.dim() == 1:  # scales of 1 and shifts of 0 would hide mistakes
        torch.nn.init.normal_(parameter, 0.5, 0.3)
# A mean that differs along depth: every slab's own differs from the window's.
image = torch.randn(groups.count * {BATCH}, 2, *{SHAPE}, dtype=DTYPE) + torch.arange({SHAPE[0]})[:, None, None] / 4
image = image.to(memory_format=order)
label = (image[:, :1] > 1).byte() + (image[:, :1] > 3).byte()
mine = slice(groups.index * {BATCH}, (groups.index + 1) * {BATCH})
planes = slice(groups.slab * {SHAPE[0]} // RANKS, (groups.slab + 1) * {SHAPE[0]} // RANKS)

def step(model, loss, image, label):
    with torch.autocast("cpu", torch.bfloat16, enabled=AMP):
        logits = model(image)
    value = loss(logits, label)
    value.backward()
    return logits.detach(), value.detach()

whole, shared = copy.deepcopy(network), network
whole_losses, whole_logits = [], []
for group in range(groups.count):
    part = slice(group * {BATCH}, (group + 1) * {BATCH})
    logits, value = step(whole, DiceCELoss(), image[part], label[part])
    whole_logits.append(logits)
    whole_losses.append(value)
shared.share_windows(slabs)
loss = SlabLoss(DiceCELoss(), slabs)
logits, value = step(world.wrap(shared), loss, image[mine, :, planes], label[mine, :, planes])

def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()

errors = {{"loss": error(value, whole_losses[groups.index]),
          "logits": error(logits, whole_logits[groups.index][:, :, planes])}}
for (name, ours), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
    errors[name] = error(ours.grad, theirs.grad / groups.count)
shared.eval(), whole.eval()
with torch.no_grad():
    evaluated = torch.equal(shared(image[:1]), whole(image[:1]))
layout = logits.is_contiguous(memory_format=order) == whole_logits[0].is_contiguous(memory_format=order)
print(json.dumps([errors, evaluated, layout, slabs.halo_bytes]))
"""


def compute_step(
    run_ranks: RunRanks, dtype: str, layout: str, *, ranks: int, size: int, fused: bool = True, amp: bool = False
) -> list[dict[str, float]]:
    """Returns every rank's errors, relative to the largest value, and checks what must hold in any case."""
    code = f"SETTINGS = (torch.{dtype}, {layout!r}, {fused}, {ranks}, {amp})\n{STEP}"
    results = [json.loads(out) for out in run_ranks("import torch\n" + code, ranks=size)]
    assert all(evaluated for _, evaluated, _, _ in results), "evaluation takes whole windows"
    assert all(layout for _, _, layout, _ in results), "the memory format stays"
    element = 2 if amp else torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    per_boundary = BATCH * halo_bytes(FILTERS, 2, SHAPE[1:], element_bytes=element)
    sent = [sent for *_, sent in results]
    assert sum(sent) == size // ranks * (ranks - 1) * per_boundary
    assert ranks < 3 or sent[1] == per_boundary
    return [errors for errors, *_ in results]


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 4), (2, 4)])
def test_a_step_is_that_of_whole_windows(ranks: int, size: int, run_ranks: RunRanks) -> None:
    """In float64, where only mistakes are visible; two groups of two ranks are two ranks."""
    for errors in compute_step(run_ranks, "float64", "NCDHW", ranks=ranks, size=size):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize(("layout", "fused"), [("NDHWC", True), ("NDHWC", False), ("NCDHW", True)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_in_fp32_only_rounding_differs(layout: str, fused: bool, ranks: int, run_ranks: RunRanks) -> None:
    for errors in compute_step(run_ranks, "float32", layout, ranks=ranks, size=ranks, fused=fused):
        assert max(errors.values()) < 1e-5, errors
        assert errors["loss"] < 1e-6


def test_in_16_bit_planes_are_sent_in_16_bit(run_ranks: RunRanks) -> None:
    """bf16 has 8 bits; a plane that is missing changes the logits by more than their own size."""
    for errors in compute_step(run_ranks, "float32", "NDHWC", ranks=2, size=2, amp=True):
        assert errors["loss"] < 1e-2, errors
        assert errors["logits"] < 5e-2, errors


# Groups


def test_consecutive_ranks_share_a_sample() -> None:
    found = [SampleGroups.divide(rank, 6, 3) for rank in range(6)]
    assert [(groups.index, groups.slab) for groups in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert {(groups.count, groups.ranks) for groups in found} == {(2, 3)}


def test_ranks_that_cannot_be_divided(world: World) -> None:
    with pytest.raises(UserError, match="the number of ranks that train, 6, must be a multiple of it; start 8 of them"):
        SampleGroups.divide(0, 6, 4)


def test_one_rank_to_a_sample_has_no_connection(world: World) -> None:
    groups = SampleGroups.divide(world.rank, world.size, 1)
    assert (groups.count, groups.index, groups.slab, groups.connect(world)) == (1, 0, 0, None)


def test_the_copy_of_a_network_keeps_the_connection() -> None:
    """As the estimate of its memory makes one; a process group cannot be copied."""
    network = Unet3d(1, 2, filters=(2, 3, 4))
    slabs = GroupSlabs(World(0, 2, CPU, group=threading.Lock()))
    network.share_windows(slabs)
    connected = [module for module in copy.deepcopy(network).modules() if getattr(module, "slabs", None) is not None]
    assert connected
    assert all(module.slabs is slabs for module in connected)


# Settings of a run


@pytest.fixture
def share(make_config: Callable[..., RunConfig]) -> Callable[..., None]:
    """`share(field=value)`: builds the step and the state of a run with two ranks per sample."""

    def build_run(**changed: Any) -> None:
        flags = {"loader": "synthetic", "data_dir": Path("synthetic"), "model": trusted_spec("unet3d(filters=(2,3,4))")}
        flags |= {"input_shape": (16, 8, 8), "val_input_shape": (8, 8, 8), "batch_size": 2, "quality_threshold": 0.9}
        run = make_run_spec(make_config(**(flags | changed)), World(0, 1, CPU))
        groups = SampleGroups(1, 0, 2, 0)
        run = dataclasses.replace(run, groups=groups, slabs=GroupSlabs(World(0, 2, CPU)))
        build.make_step_config(run)
        build.build_state(dataclasses.replace(run, world=World(0, 1, CPU)))

    return build_run


def test_a_run_that_can_share(share: Callable[..., None]) -> None:
    share()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": trusted_spec("slicewise(network='tests.runtime.test_mixup:Plane')")}, "only --model unet3d"),
        ({"checkpoint_activations": True}, "--checkpoint_activations does not go with --ranks_per_sample"),
        ({"normalization": "batchnorm"}, "batch norm cannot be computed by slabs; use --normalization instancenorm"),
        ({"loss": trusted_spec("torch.nn:CrossEntropyLoss")}, "only the losses dice_ce and dice"),
        ({"augment": (trusted_spec("manifold_mixup"),)}, "does not go with --ranks_per_sample"),
        (
            {"input_shape": (12, 8, 8)},
            r"a multiple of 2 x 4, not 12; use --ranks_per_sample 1, or a depth of 16",
        ),
    ],
)
def test_what_cannot_be_shared(changed: dict[str, Any], message: str, share: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=message):
        share(**changed)


def test_shared_windows_are_not_compiled() -> None:
    with pytest.raises(UserError, match="--compile does not go with --ranks_per_sample"):
        parse_arguments(["--data_dir", "DATA", "--compile", "--ranks_per_sample", "2"])


def test_the_network_names_the_slabs_that_fit() -> None:
    network = Unet3d(1, 3, filters=(2, 3, 4))
    network.check_slabs(32, 8, "--ranks_per_sample")
    with pytest.raises(UserError, match=r"be a multiple of 16 x 4, not 32; use --ranks_per_sample 8, or a depth of 64"):
        network.check_slabs(32, 16, "--ranks_per_sample")


def test_bytes_of_the_full_network_by_hand() -> None:
    """One sample of the benchmark in 16 bit; planes of each resolution times feature maps, see `halo_bytes`."""
    maps = [
        2 * 1 + 4 * 32 + 2 * 32 + 4 * (64 + 32),
        4 * 64 + 2 * 64 + 4 * (128 + 64),
        4 * 128 + 2 * 128 + 4 * (256 + 128),
        4 * 256 + 2 * 256 + 4 * (512 + 256),
        4 * 320 + 2 * 320 + 4 * (640 + 320),
        4 * 320,
    ]
    expected = 2 * sum(count * (128 >> level) ** 2 for level, count in enumerate(maps))
    assert halo_bytes(MLPERF_FILTERS, 1, (128, 128), element_bytes=2) == expected == 36_233_216
