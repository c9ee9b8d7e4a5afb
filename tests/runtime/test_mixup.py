"""Mixup: losses are mixed, every tensor that crosses a cut is mixed, and a step depends only on its position."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.registry import Spec
from model import convolutions
from model.kernels import dispatch
from model.losses import DiceCELoss
from model.registry import build_network
from runtime.memory_format import to_device
from runtime.mixup import ManifoldMixup, Mix, Mixup, count_cuts
from runtime.objective import make_objective, plain, split_specs
from runtime.precision import Precision
from runtime.seeding import seed_step
from runtime.train_state import TrainState
from runtime.training import StepConfig
from tests.runtime.conftest import train_step

ORDER = torch.tensor([2, 0, 1])
LOSS = DiceCELoss()
NETWORKS = [
    "unet3d(filters=(2,4,4))",
    "unet3d(filters=(2,4), fused=False)",
    "tests.runtime.test_mixup:Skips",
    "slicewise(network='tests.runtime.test_mixup:Plane', context=3)",
    "monai.networks.nets:SegResNet(init_filters=8, blocks_down=(1,1), blocks_up=(1,))",
    "monai.networks.nets:UNet(channels=(2,4,4), strides=(2,2), num_res_units=1)",
]


class Skips(nn.Module):
    """Uses its image and its first features again in the end, changes tensors in place, and needs no module for it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(in_channels, 3, 1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv3d(3, 3, 1)
        self.last = nn.Conv3d(6 + in_channels, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        early = self.first(image)
        kept = early * 2
        x = self.second(self.act(early))
        x += kept
        return self.last(torch.cat([x.sigmoid_(), kept.view_as(kept), image], dim=1))


class Plane(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 2, 1)
        self.last = nn.Conv2d(2, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(F.relu(self.first(image)) + image.mean(1, keepdim=True))


def build(spec: str) -> nn.Module:
    if "monai" in spec:
        pytest.importorskip("monai")
    torch.manual_seed(0)
    return build_network(Spec(spec, trusted=True), 1, 3)


def batch(samples: int = 3, shape: tuple[int, int, int] = (4, 4, 8)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(samples, 1, *shape, generator=generator)
    return image, torch.randint(3, (samples, 1, *shape), generator=generator, dtype=torch.uint8)


def fixed(kind: type[Mixup], share: float) -> Mixup:
    """An objective that always draws this share and `ORDER`."""
    objective = kind(0.3)
    objective.draw = lambda image: Mix(share, ORDER)  # type: ignore[method-assign]
    return objective


@pytest.mark.parametrize("kind", [Mixup, ManifoldMixup])
@pytest.mark.parametrize(("share", "order"), [(1.0, [0, 1, 2]), (0.0, [2, 0, 1])])
def test_a_share_of_1_or_0_is_the_plain_loss(kind: type[Mixup], share: float, order: list[int]) -> None:
    network, (image, label) = build(NETWORKS[0]), batch()
    loss = fixed(kind, share)(network, network, LOSS, image, label)
    assert torch.equal(loss, plain(network, network, LOSS, image[order], label[order]))


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_of_a_linear_network_logits_are_mixed_and_so_are_the_losses(share: float) -> None:
    network, (image, label) = nn.Conv3d(1, 3, 1), batch()
    logits = share * network(image) + (1 - share) * network(image[ORDER])
    expected = share * LOSS(logits, label) + (1 - share) * LOSS(logits, label[ORDER])
    torch.testing.assert_close(fixed(Mixup, share)(network, network, LOSS, image, label), expected)


def test_every_output_is_mixed_wherever_the_cut_is() -> None:
    """Half of each of two samples: both get the same logits, also from an output that comes before the cut."""
    network, (image, _) = build("unet3d(filters=(2,4,4,4), deep_supervision=3)"), batch(2, (16, 8, 8))
    cuts = count_cuts(network, image)
    assert cuts > 20
    for cut in range(cuts):
        mix = Mix(0.5, torch.tensor([1, 0]))
        outputs = ManifoldMixup().logits_with_cut(network, network, image, mix, cut=cut)
        assert len(outputs) == 3
        for logits in outputs:
            torch.testing.assert_close(logits[0], logits[1])


def test_two_layers_with_a_skip_cut_in_between_by_the_formula() -> None:
    network, (image, _) = build(NETWORKS[2]), batch()
    share = 0.3

    def mixed(tensor: Tensor) -> Tensor:
        return share * tensor + (1 - share) * tensor[ORDER]

    assert isinstance(network, Skips)
    early = network.first(image)
    kept = 2 * early
    # Behind the activation, the second of four leaf modules: three tensors cross.
    x = network.second(mixed(F.relu(early))) + mixed(kept)
    expected = network.last(torch.cat([x.sigmoid(), mixed(kept), mixed(image)], dim=1))
    logits = ManifoldMixup().logits_with_cut(network, network, image, Mix(share, ORDER), cut=2)
    torch.testing.assert_close(logits, expected)
    assert count_cuts(network, image) == 4


def test_at_the_input_manifold_mixup_is_mixup() -> None:
    network, (image, _) = build(NETWORKS[0]), batch()
    cut = ManifoldMixup().logits_with_cut(network, network, image, Mix(0.4, ORDER), cut=0)
    assert torch.equal(cut, network(Mix(0.4, ORDER)(image)))


@pytest.mark.parametrize("spec", NETWORKS)
def test_every_tensor_that_crosses_a_cut_is_mixed_wherever_it_is(spec: str) -> None:
    """A share of 0 is the other order alone: a tensor that crossed unmixed would leave samples of two orders."""
    network, (image, _) = build(spec), batch()
    expected = network(image[ORDER])
    cuts = count_cuts(network, image)
    assert cuts > 1
    for cut in range(cuts):
        logits = ManifoldMixup().logits_with_cut(network, network, image, Mix(0.0, ORDER), cut=cut)
        torch.testing.assert_close(logits, expected, msg=f"cut {cut} of {cuts}")
    left = [module for module in network.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert all(module in (network, getattr(network, "network", None)) for module in left), "only `unify_outputs`"


def join_behind_torch_s_back(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Stands in for the kernel, which writes to memory that no function of torch's computed."""
    n, _, *size = x.shape
    shape = n, 2 * weight.shape[1], *(2 * side for side in size)
    joined = torch.empty(shape, memory_format=torch.channels_last_3d)
    with torch._C.DisableTorchFunction():
        joined.copy_(torch.cat((F.conv_transpose3d(x, weight, bias, stride=2), skip), dim=1))
    return joined


def test_tensors_cross_a_cut_mixed_where_a_kernel_joins_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(join_forward=join_behind_torch_s_back)
    joined: list[str] = []

    def triton_for(x: Tensor, operator: str) -> SimpleNamespace | None:
        joined.append(operator)
        return kernels if operator == "join" and operator not in dispatch._plain else None

    monkeypatch.setattr(convolutions, "triton_for", triton_for)
    monkeypatch.setattr(convolutions, "HALF", (torch.float32,))
    network = build("unet3d(filters=(2,4,6))").train()
    image = torch.randn(2, 1, 8, 8, 8)
    to_device(network, torch.device("cpu"), "NDHWC")
    image = image.to(memory_format=torch.channels_last_3d)
    expected = network(image[[1, 0]])
    order = torch.tensor([1, 0])
    for cut in range(count_cuts(network, image)):
        logits = ManifoldMixup().logits_with_cut(network, network, image, Mix(0.0, order), cut=cut)
        torch.testing.assert_close(logits, expected, msg=f"cut {cut}")
    assert "join" in joined


def test_a_mixed_step_has_the_gradient_of_the_mixed_loss() -> None:
    network, (image, label) = build(NETWORKS[2]).double(), batch()
    objective = ManifoldMixup(1.0)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels[:, 0].long())  # in float64, as ours is not

    parameter = next(network.parameters())

    def loss_at(offset: float) -> Tensor:
        with torch.no_grad():
            parameter.view(-1)[0] += offset
        torch.manual_seed(4)
        return objective(network, network, loss, image.double(), label)  # type: ignore[arg-type]

    loss_at(0.0).backward()
    with torch.no_grad():
        above, below = loss_at(1e-6), loss_at(-2e-6)
    slope = (above - below) / 2e-6
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad.view(-1)[0], slope, rtol=1e-5, atol=1e-8)


def test_groups_of_a_sample_stay_together() -> None:
    tensor = torch.arange(12.0).view(6, 2)  # 3 samples of 2 slices
    torch.testing.assert_close(Mix(0.0, ORDER)(tensor), tensor[[4, 5, 0, 1, 2, 3]])
    torch.testing.assert_close(Mix(0.25, ORDER)(tensor), 0.25 * tensor + 0.75 * tensor[[4, 5, 0, 1, 2, 3]])


def test_shares_follow_beta_and_every_cut_is_drawn() -> None:
    shares, cuts = [], []

    class Recording(ManifoldMixup):
        def draw(self, image: Tensor) -> Mix:
            mix = super().draw(image)
            shares.append(mix.share)
            return mix

        def logits_with_cut(self, *_: Any, cut: int) -> Tensor:
            cuts.append(cut)
            return torch.zeros(3, 3, 4, 4, 8)

    network, objective = build(NETWORKS[2]), Recording(0.5)
    torch.manual_seed(0)
    for _ in range(2000):
        objective(network, network, lambda logits, label: logits.sum(), *batch())  # type: ignore[arg-type]
    drawn = torch.tensor(shares)
    assert abs(drawn.mean() - 0.5) < 0.04
    assert abs(drawn.var() - 1 / (4 * (2 * 0.5 + 1))) < 0.02
    assert torch.bincount(torch.tensor(cuts)).min() > 400


@pytest.mark.parametrize("kind", [Mixup, ManifoldMixup])
def test_a_batch_of_one_is_the_plain_loss(kind: type[Mixup]) -> None:
    network, (image, label) = build(NETWORKS[0]), batch(1)
    assert torch.equal(kind()(network, network, LOSS, image, label), plain(network, network, LOSS, image, label))


@pytest.mark.parametrize("spec", ["mixup(alpha=0.4)", "manifold_mixup(alpha=0.4)"])
def test_a_step_follows_from_its_place_alone(spec: str, make_state: Callable[..., TrainState]) -> None:
    """Whatever was drawn before, as in a run that was resumed; accumulated, under bf16."""
    objective = make_objective([spec], 3, False)
    settings = StepConfig(
        loss=LOSS,
        precision=Precision(torch.device("cpu"), torch.bfloat16),
        ga_steps=2,
        layout="NDHWC",
        seed=7,
        objective=objective,
    )
    # Not (4, 4, 8): at a bottleneck of (2, 2, 4) oneDNN's bf16 weight gradient reads memory that nobody wrote
    # (torch 2.13 on CPUs with AVX-512).
    image, label = batch(shape=(8, 8, 8))

    def steps(start: int, state: TrainState) -> list[Tensor]:
        losses = []
        for index in range(start, 4):
            seed_step(settings.seed, 1, index)
            losses.append(train_step(state, {"image": image, "label": label}, settings, index % 2 == 1))
        return losses

    whole, resumed = make_state(), make_state()
    first = steps(0, whole)
    for index in range(2):
        seed_step(settings.seed, 1, index)
        train_step(resumed, {"image": image, "label": label}, settings, index == 1)
    torch.rand(17)
    assert all(map(torch.equal, first[2:], steps(2, resumed)))
    assert all(map(torch.equal, whole.network.state_dict().values(), resumed.network.state_dict().values()))
    assert len({float(loss) for loss in first}) > 2, "the weights move, and each draws its own"


def test_wrapped_for_averaging_the_gradients_are_the_same() -> None:
    network, bare = build(NETWORKS[0]), build(NETWORKS[0])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network)
        for step in range(3):  # a parameter without a gradient would end the second
            for own, predict in ((network, model), (bare, bare)):
                torch.manual_seed(step)
                ManifoldMixup(1)(own, predict, LOSS, *batch()).backward()
        for ours, theirs in zip(network.parameters(), bare.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        del model
    finally:
        dist.destroy_process_group()


def test_specs_are_distinguished_and_wrong_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    specs = ["mlperf", "mixup(alpha=0.2)", "torchio:RandomGamma(p=0.3)"]
    assert split_specs(specs) == (["mlperf", "torchio:RandomGamma(p=0.3)"], ["mixup(alpha=0.2)"])
    assert make_objective([], 2, True) == plain
    make_objective(["mixup"], 2, True)
    assert capsys.readouterr().err == ""
    make_objective(["manifold_mixup"], 1, False)
    assert "does nothing with a --batch_size of 1" in capsys.readouterr().err
    for wrong, problem in (
        (["mixup", "manifold_mixup"], "only one of them may mix samples"),
        (["mixup(alpha=0)"], "expected a number above 0"),
        (["mixup(beta=1)"], "unknown argument 'beta'; it takes alpha=0.2"),
    ):
        with pytest.raises(UserError, match=problem):
            make_objective(wrong, 2, False)
    with pytest.raises(UserError, match="--compile would bypass"):
        make_objective(["manifold_mixup"], 2, True)
