"""Networks with several outputs: what they return in either mode, and the loss over all of their outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.registry import Spec
from model.deep_supervision import OutputsLoss, labels_like, output_weights, unify_outputs
from model.losses import DiceCELoss
from model.registry import build_network, check_window, freeze_unused
from model.unet3d import Unet3d

HERE = "tests.model.test_deep_supervision"
RESENC = (
    "dynamic_network_architectures.architectures.unet:ResidualEncoderUNet(n_stages=3, features_per_stage=(4, 6, 8), "
    "conv_op='torch.nn:Conv{dimensions}d', kernel_sizes=3, strides=(1, 2, 2), n_blocks_per_stage=1, "
    "n_conv_per_stage_decoder=1, conv_bias=True, norm_op='torch.nn:InstanceNorm{dimensions}d', "
    "norm_op_kwargs={{'affine': True}}, nonlin='torch.nn:LeakyReLU', deep_supervision=True)"
)
DYNUNET = (
    "monai.networks.nets:DynUNet(kernel_size=(3, 3, 3, 3), strides=(1, 2, 2, 2), upsample_kernel_size=(2, 2, 2), "
    "filters=(4, 6, 8, 8), deep_supervision=True, deep_supr_num=2)"
)
SEGRESNET_DS = "monai.networks.nets:SegResNetDS(init_filters=8, blocks_down=(1, 1, 1), dsdepth=3)"


class Several(nn.Module):
    """Gives its outputs as a list, or along an axis of one tensor, in both modes."""

    def __init__(self, channels: int, classes: int, stacked: bool = False, spatial_dims: int = 3) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.heads = nn.ModuleList(conv(channels, classes, 1) for _ in range(3))
        self.stacked = stacked

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if self.stacked:
            return torch.stack([head(image) for head in self.heads], dim=1)
        return [head(image[..., :: 2**i, :: 2**i]) for i, head in enumerate(self.heads)]


def build(spec: str) -> nn.Module:
    torch.manual_seed(0)
    return build_network(Spec(spec, trusted=True), 2, 3)


def sample(*size: int) -> tuple[Tensor, Tensor]:
    """An image (2, 2, D, H, W) and labels (2, 1, D, H, W)."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 2, *size, generator=generator)
    return image, torch.randint(3, (2, 1, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("count", "weights"),
    [(1, [1]), (2, [2 / 3, 1 / 3]), (3, [4 / 7, 2 / 7, 1 / 7]), (4, [8 / 15, 4 / 15, 2 / 15, 1 / 15])],
)
def test_weights_halve_and_sum_to_1(count: int, weights: list[float]) -> None:
    assert output_weights(count) == pytest.approx(weights, abs=1e-15)


def test_labels_are_those_at_the_centres_of_coarser_voxels() -> None:
    labels = torch.arange(12, dtype=torch.uint8).view(1, 1, 1, 1, 12)
    assert labels_like(labels, torch.empty(1, 3, 1, 1, 12)) is labels
    for size, kept in ((6, [1, 3, 5, 7, 9, 11]), (4, [1, 4, 7, 10]), (3, [2, 6, 10])):
        coarser = labels_like(labels, torch.empty(1, 3, 1, 1, size))
        assert coarser.dtype == torch.uint8
        assert coarser.flatten().tolist() == kept


def test_slabs_have_the_labels_of_the_whole() -> None:
    labels, half = sample(16, 4, 4)[1], torch.empty(2, 3, 2, 1, 1)
    parts = [labels_like(slab, half) for slab in labels.chunk(2, dim=2)]
    assert torch.equal(torch.cat(parts, dim=2), labels_like(labels, torch.empty(2, 3, 4, 1, 1)))


def test_the_loss_is_the_weighted_mean_over_the_outputs_as_a_plain_loop_computes_it() -> None:
    _, labels = sample(4, 8, 8)
    generator = torch.Generator().manual_seed(2)
    outputs = tuple(
        torch.randn(2, 3, 4 // step, 8 // step, 8 // step, generator=generator, dtype=torch.float64, requires_grad=True)
        for step in (1, 2, 4)
    )
    loss = OutputsLoss(DiceCELoss())(outputs, labels)
    gradients = torch.autograd.grad(loss, outputs)
    total = 0.0
    for logits, step, weight, gradient in zip(outputs, (1, 2, 4), (4 / 7, 2 / 7, 1 / 7), gradients, strict=True):
        first = step // 2
        own = DiceCELoss()(logits, labels[:, :, first::step, first::step, first::step])
        torch.testing.assert_close(gradient, weight * torch.autograd.grad(own, logits)[0], rtol=1e-12, atol=0)
        total += weight * own.item()
    assert loss.item() == pytest.approx(total, abs=1e-14)


def test_logits_alone_get_the_loss_itself() -> None:
    logits, labels = torch.randn(2, 3, 4, 4, 4), sample(4, 4, 4)[1]
    assert torch.equal(OutputsLoss(DiceCELoss())(logits, labels), DiceCELoss()(logits, labels))
    assert torch.equal(OutputsLoss(DiceCELoss())((logits,), labels), DiceCELoss()(logits, labels))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_network_gives_all_outputs_in_training_and_the_first_in_evaluation(stacked: bool) -> None:
    network = build(f"{HERE}:Several(stacked={stacked})")
    image, _ = sample(2, 4, 8)
    outputs = network(image)
    assert isinstance(outputs, tuple)
    assert len(outputs) == 3
    logits = network.eval()(image)
    assert torch.equal(logits, outputs[0])
    assert torch.equal(copy.deepcopy(network)(image), logits), "also a copy"
    assert list(network.state_dict()) == [f"heads.{i}.{name}" for i in range(3) for name in ("weight", "bias")]
    check_window(network, (2, 4, 8), "--input_shape", channels=2, classes=3)
    assert freeze_unused(network, 2, (2, 4, 8)) == []


@pytest.mark.parametrize("stacked", [False, True])
def test_outputs_of_a_2d_network_become_volumes(stacked: bool) -> None:
    network = build(f"slicewise(network='{HERE}:Several(stacked={stacked})', context=3)")
    image, _ = sample(3, 4, 8)
    outputs = network(image)
    assert [tuple(logits.shape) for logits in outputs] == [
        (2, 3, 3, 4 // step, 8 // step) for step in ((1, 1, 1) if stacked else (1, 2, 4))
    ]
    assert torch.equal(network.eval()(image), outputs[0])


def test_a_tensor_of_logits_passes_unchanged() -> None:
    layer = nn.Conv3d(2, 3, 1)
    unify_outputs(layer, 3)
    assert layer(torch.randn(1, 2, 2, 2, 2)).shape == (1, 3, 2, 2, 2)


def test_unet3d_has_heads_on_the_decoders_lower_levels_and_is_otherwise_the_same() -> None:
    network, plain = build("unet3d(filters=(4, 6, 8, 10), deep_supervision=3)"), build("unet3d(filters=(4, 6, 8, 10))")
    assert isinstance(network, Unet3d)
    own, others = network.state_dict(), plain.state_dict()
    heads = {name: tuple(tensor.shape) for name, tensor in own.items() if name not in others}
    assert heads == {
        "heads.0.conv.weight": (3, 6, 1, 1, 1),
        "heads.0.conv.bias": (3,),
        "heads.1.conv.weight": (3, 8, 1, 1, 1),
        "heads.1.conv.bias": (3,),
    }
    assert all(torch.equal(own[name], tensor) for name, tensor in others.items()), "the same initial weights"
    image, labels = sample(8, 8, 16)
    outputs = network(image)
    assert [tuple(logits.shape[2:]) for logits in outputs] == [(8, 8, 16), (4, 4, 8), (2, 2, 4)]
    assert torch.equal(outputs[0], plain(image))
    assert torch.equal(network.eval()(image), outputs[0])
    features: dict[int, Tensor] = {}
    for index, block in enumerate(network.upsample):
        block.register_forward_hook(lambda module, inputs, output, index=index: features.update({index: output}))
    outputs = network.train()(image)
    for logits, head, level in zip(outputs[1:], network.heads, (1, 0), strict=True):
        assert torch.equal(logits, F.conv3d(features[level], head.conv.weight, head.conv.bias))  # type: ignore[union-attr, arg-type]
    OutputsLoss(DiceCELoss())(outputs, labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("count", [0, 3, 2.0, None, True])
def test_unet3d_has_at_most_one_output_per_resolution_of_its_decoder(count: object) -> None:
    with pytest.raises(UserError, match="with 3 filters it is a number of outputs from 1 to 2"):
        build(f"unet3d(filters=(2, 4, 6), deep_supervision={count})")


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    ("spec", "sizes"),
    [(DYNUNET, (16, 16, 16)), (SEGRESNET_DS, (16, 8)), (RESENC.format(dimensions=3), (16, 8))],
    ids=["DynUNet", "SegResNetDS", "ResidualEncoderUNet"],
)
def test_other_libraries_networks_train_on_all_outputs(spec: str, sizes: tuple[int, ...], trusted: bool) -> None:
    package = spec.partition(".")[0]
    pytest.importorskip(package, reason=f"pip install {package}")
    torch.manual_seed(0)
    network = build_network(Spec(spec, trusted=trusted), 2, 3)
    check_window(network, (16, 16, 16), "--input_shape", channels=2, classes=3)
    freeze_unused(network, 2, (16, 16, 16))
    image, labels = sample(16, 16, 16)
    outputs = network.train()(image)
    assert tuple(logits.shape[-1] for logits in outputs) == sizes
    OutputsLoss(DiceCELoss())(outputs, labels).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert network.eval()(image).shape == (2, 3, 16, 16, 16)


@pytest.mark.parametrize("named", ["torch.nn:Conv9d", "torch.nn:functional", "torch.nn:Parameter"])
def test_an_argument_names_a_class_of_torch_nn_or_is_refused(named: str) -> None:
    with pytest.raises(UserError, match=rf"--model {HERE}:Several: '{named}'|{HERE}:Several: .* no callable"):
        build(f"{HERE}:Several(stacked='{named}')")
    network = build(f"{HERE}:Several(stacked='torch.nn:Conv3d')")
    assert network.stacked is nn.Conv3d  # type: ignore[comparison-overlap]
