"""Instance norms in networks of any library, replaced by this project's operator where the result is the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.registry import Spec
from model.deep_supervision import OutputsLoss
from model.fused_norms import fuse_norms
from model.losses import DiceCELoss
from model.normalization import InstanceNormActivation
from model.registry import build_network
from runtime.memory_format import to_device
from tests.model.test_deep_supervision import DYNUNET, RESENC, sample

CPU = torch.device("cpu")


class OwnNorm(nn.InstanceNorm3d):
    """A subclass, which may compute something else."""


class Every(nn.Module):
    """One norm for each way in which its output can be used, all of 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.InstanceNorm3d
        self.plain = nn.Sequential(norm(2, affine=True), nn.ReLU())
        self.in_place = nn.Sequential(norm(2, eps=1e-3), nn.LeakyReLU(0.2, inplace=True))
        self.first, self.second = norm(2), norm(2, affine=True)
        self.between = nn.LeakyReLU(0.1)  # behind both, and nothing else
        self.residual, self.behind_sum = norm(2), nn.ReLU(inplace=True)
        self.functional = norm(2)
        self.twice_used, self.of_twice_used = norm(2), nn.ReLU()
        self.changed, self.of_changed = norm(2), nn.LeakyReLU(0.1)
        self.with_other, self.shared = norm(2), nn.ReLU()
        self.twice_called = norm(2)
        self.hooked = norm(2)
        self.hooked.register_forward_hook(lambda module, inputs, output: output + 1)
        self.running = norm(2, track_running_stats=True)
        self.subclass = OwnNorm(2)
        self.at_the_end, self.of_the_end = norm(2), nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.in_place(self.plain(x) + x)
        x = x + self.between(self.second(self.between(self.first(x)) * x))
        total = self.residual(x)
        total += x  # in place, on the norm's output
        x = F.relu(self.functional(self.behind_sum(total)) + 0.5)
        normed = self.twice_used(x)
        x = self.of_twice_used(normed) + normed
        positive = self.of_changed(self.changed(x))
        positive += x  # in place, on the activation's output
        x = self.shared(self.with_other(positive)) + self.shared(positive)
        x = self.hooked(self.twice_called(self.twice_called(x) + x) * x)
        x = self.subclass(self.running(x) + x)
        end = self.at_the_end(x)
        return self.of_the_end(end), end


# Norms and the slope with which they are computed.
CHANGED = {
    "plain.0": 0.0,
    "in_place.0": 0.2,
    "first": 0.1,
    "second": 0.1,
    "residual": 1.0,
    "functional": 1.0,
    "twice_used": 1.0,
    "changed": 1.0,
    "with_other": 1.0,
    "at_the_end": 1.0,
}


def every() -> Every:
    torch.manual_seed(0)
    network = Every()
    for name, parameter in network.named_parameters():
        nn.init.uniform_(parameter, -0.5, 1.5 if "weight" in name else 0.5)
    return network


def slopes(network: nn.Module) -> dict[str, float]:
    return {n: m.slope for n, m in network.named_modules() if isinstance(m, InstanceNormActivation)}


def image_of(*shape: int) -> Tensor:
    image = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return image.contiguous(memory_format=torch.channels_last_3d)


def gradients(network: nn.Module, image: Tensor, labels: Tensor | None = None) -> list[Tensor]:
    """The outputs in training, and the gradients of image and parameters, in float64."""
    image = image.clone().requires_grad_()
    outputs = network(image)
    tensors = list(outputs) if isinstance(outputs, tuple) else [outputs]
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in tensors]
    loss = sum((t * w).mean() for t, w in zip(tensors, weights, strict=True))
    if labels is not None:
        loss = OutputsLoss(DiceCELoss())(outputs, labels)
    parameters = [p for p in network.parameters() if p.requires_grad]
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, [image, *parameters], allow_unused=True)
    return [t.detach().double() for t in (*tensors, *found) if t is not None]


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest value."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs)


def test_a_norm_takes_the_activation_behind_it_where_nothing_else_uses_either() -> None:
    network = every()
    assert fuse_norms(network, 2, (4, 4, 4)) == "10 of 14, 4 of them with the activation behind"
    assert slopes(network) == CHANGED
    assert [name for name, m in network.named_modules() if type(m) is nn.Identity] == [
        "plain.1",
        "in_place.1",
        "between",
    ]
    assert type(network.twice_called) is type(network.hooked) is type(network.running) is nn.InstanceNorm3d
    assert type(network.subclass) is OwnNorm
    assert fuse_norms(network, 2, (4, 4, 4)) == "0 of 4, 0 of them with the activation behind", "nothing is left"


def test_the_result_and_all_gradients_are_those_of_float64() -> None:
    network, image = every(), image_of(2, 2, 4, 6, 5)
    exact = gradients(copy.deepcopy(network).double(), image.double())
    rounding = largest_error(gradients(copy.deepcopy(network), image), exact)
    fuse_norms(network, 2, (4, 6, 5))
    assert largest_error(gradients(network, image), exact) < max(2e-6, 2 * rounding)


def test_names_stay_and_checkpoints_fit_in_both_directions() -> None:
    plain, fused = every(), every()
    fuse_norms(fused, 2, (4, 4, 4))
    assert list(fused.state_dict()) == list(plain.state_dict())
    for parameter in fused.parameters():
        nn.init.uniform_(parameter)
    plain.load_state_dict(fused.state_dict())
    image = image_of(1, 2, 4, 4, 4)
    torch.testing.assert_close(plain.eval()(image), fused.eval()(image))
    fused.load_state_dict(every().state_dict())
    torch.testing.assert_close(every().eval()(image), fused(image))


class NoNorm(nn.Conv3d):
    pass


class NotOnMeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(2)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "meta":
            raise RuntimeError("cannot")
        return self.norm(x)


def test_without_norms_nothing_is_said_and_a_network_that_cannot_be_tried_stays() -> None:
    assert fuse_norms(NoNorm(2, 2, 1), 2, (4, 4, 4)) == ""
    network = NotOnMeta()
    assert fuse_norms(network, 2, (4, 4, 4)) == "0 of 1, because this network cannot be run without computing"
    assert type(network.norm) is nn.InstanceNorm3d


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (DYNUNET, "14 of 14, 14 of them with the activation behind"),
        (DYNUNET.replace("deep_supr_num=2", "deep_supr_num=2, res_block=True"), "18 of 18, 6 of them with"),
        (RESENC.format(dimensions=3), "11 of 11, 6 of them with"),
        ("monai.networks.nets:UNet(channels=(4, 8), strides=(2,), act='RELU')", "2 of 2, 2 of them with"),
    ],
    ids=["DynUNet", "DynUNet with residuals", "ResidualEncoderUNet", "UNet"],
)
def test_other_libraries_networks(spec: str, found: str) -> None:
    package = spec.partition(".")[0]
    pytest.importorskip(package, reason=f"pip install {package}")
    torch.manual_seed(1)
    network = build_network(Spec(spec, trusted=True), 2, 3)
    image, labels = sample(16, 16, 16)
    image = image.contiguous(memory_format=torch.channels_last_3d)
    to_device(network, CPU, "NDHWC")
    exact = gradients(copy.deepcopy(network).double(), image.double(), labels)
    rounding = largest_error(gradients(copy.deepcopy(network), image, labels), exact)
    assert fuse_norms(network, 2, (16, 16, 16)).startswith(found)
    assert largest_error(gradients(network, image, labels), exact) < max(1e-5, 4 * rounding)
