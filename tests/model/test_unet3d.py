"""The benchmark network: names, layers and numbers that MLPerf's checkpoints and target were made with."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from model.deep_supervision import as_tuple
from model.layers import BlockConfig, UpBlock
from model.normalization import InstanceNormActivation
from model.registry import NETWORKS, build_network, check_window
from model.slabs import SlabConv3d
from model.unet3d import MLPERF_FILTERS, Unet3d

TINY = (4, 6, 8)
# `fingerprint` of the logits of `tiny_network(…)` for `ramp(1, 1, 8, 8, 8)`: one row per class, one column per slab.
GOLDEN = {
    ("instancenorm", "relu"): [
        [0.2836244, 0.6580863, 0.6130425, 0.7331787],
        [-0.0028267, 0.0220333, -0.0199081, -0.0843293],
        [-0.3341014, -0.4214770, -0.5494087, -0.7066362],
    ],
    ("batchnorm", "leaky_relu"): [
        [0.2825453, 0.6587332, 0.6101821, 0.7311455],
        [-0.0043752, 0.0220447, -0.0218576, -0.0856722],
        [-0.3337428, -0.4193033, -0.5496390, -0.7059279],
    ],
}


@pytest.fixture(scope="module")
def meta_network() -> Unet3d:
    """The network at its real size, on the meta device."""
    with torch.device("meta"):
        return Unet3d(1, 3)


def tiny_network(normalization: str = "instancenorm", activation: str = "relu") -> Unet3d:
    torch.manual_seed(5)
    return Unet3d(1, 3, normalization, activation, filters=TINY)


def ramp(*shape: int) -> Tensor:
    """A smooth image without random numbers."""
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float32)).view(shape)


def fingerprint(logits: Tensor) -> Tensor:
    """(1, K, D, H, W) -> (K, 4): means over slabs in depth, weighted unevenly, so that a shift or flip shows."""
    weights = torch.linspace(0.5, 1.5, logits[0, 0].numel(), dtype=torch.float64).view(logits.shape[2:])
    return (logits[0].detach().double() * weights).unflatten(1, (4, -1)).mean((2, 3, 4))


def test_31190243_parameters(meta_network: Unet3d) -> None:
    assert sum(p.numel() for p in meta_network.parameters()) == 31_190_243
    assert MLPERF_FILTERS == (32, 64, 128, 256, 320, 320)


def documented_names() -> set[str]:
    """Parameter names of the field's checkpoints, as MLPerf's reference documents them."""
    blocks = ["input_block", *(f"downsample.{i}" for i in range(4)), "bottleneck", *(f"upsample.{i}" for i in range(5))]
    names = {"output.conv.weight", "output.conv.bias"}
    for block, conv in itertools.product(blocks, ("conv1", "conv2")):
        names |= {f"{block}.{conv}.0.weight", f"{block}.{conv}.1.weight", f"{block}.{conv}.1.bias"}
    for i in range(5):
        names |= {f"upsample.{i}.upsample_conv.0.weight", f"upsample.{i}.upsample_conv.0.bias"}
    return names


def test_parameters_carry_the_fields_names(meta_network: Unet3d) -> None:
    assert {name for name, _ in meta_network.named_parameters()} == documented_names()
    assert set(meta_network.state_dict()) == documented_names()  # instance norm keeps no running statistics


def test_batchnorm_adds_only_its_statistics() -> None:
    network = tiny_network(normalization="batchnorm")
    extra = {name.rpartition(".")[2] for name in network.state_dict()} - {"weight", "bias"}
    assert extra == {"running_mean", "running_var", "num_batches_tracked"}
    assert {type(m) for m in network.modules() if "Norm" in type(m).__name__} == {nn.BatchNorm3d}


def test_feature_maps_of_every_block(meta_network: Unet3d) -> None:
    shapes = {name: tuple(p.shape) for name, p in meta_network.named_parameters()}
    encoder = {f"downsample.{i}": pair for i, pair in enumerate(itertools.pairwise((32, 64, 128, 256, 320)))}
    for block, (channels, filters) in {"input_block": (1, 32), **encoder, "bottleneck": (320, 320)}.items():
        assert shapes[f"{block}.conv1.0.weight"] == (filters, channels, 3, 3, 3)
        assert shapes[f"{block}.conv2.0.weight"] == (filters, filters, 3, 3, 3)
    for i, (below, here) in enumerate(itertools.pairwise((320, 320, 256, 128, 64, 32))):
        assert shapes[f"upsample.{i}.upsample_conv.0.weight"] == (below, here, 2, 2, 2)
        assert shapes[f"upsample.{i}.conv1.0.weight"] == (here, 2 * here, 3, 3, 3)
        assert shapes[f"upsample.{i}.conv2.0.weight"] == (here, here, 3, 3, 3)
    assert shapes["output.conv.weight"] == (3, 32, 1, 1, 1)


def test_convolutions_strides_biases_and_padding(meta_network: Unet3d) -> None:
    seen = 0
    for name, conv in meta_network.named_modules():
        if isinstance(conv, nn.Conv3d) and name != "output.conv":
            halves = re.fullmatch(r"(downsample\.\d|bottleneck)\.conv1\.0", name) is not None
            assert conv.stride == ((2, 2, 2) if halves else (1, 1, 1)), name
            assert conv.kernel_size == (3, 3, 3)
            assert conv.padding == (1, 1, 1)
            assert conv.bias is None
            assert (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1, 1), 1, "zeros")
            seen += 1
    assert seen == 22


def test_transposed_convolutions_have_a_bias_and_nothing_after_them(meta_network: Unet3d) -> None:
    for block in meta_network.upsample:
        assert isinstance(block, UpBlock)
        (conv,) = block.upsample_conv
        assert isinstance(conv, nn.ConvTranspose3d)
        assert (conv.kernel_size, conv.stride, conv.padding) == ((2, 2, 2), (2, 2, 2), (0, 0, 0))
        assert conv.bias is not None
    output = meta_network.output.conv
    assert (output.kernel_size, output.stride, output.bias is not None) == ((1, 1, 1), (1, 1, 1), True)
    assert len(list(meta_network.output.children())) == 1


@pytest.mark.parametrize(
    ("normalization", "activation", "layers", "slope"),
    [
        ("instancenorm", "relu", [SlabConv3d, InstanceNormActivation], 0.0),
        ("instancenorm", "leaky_relu", [SlabConv3d, InstanceNormActivation], 0.01),
        ("batchnorm", "leaky_relu", [SlabConv3d, nn.BatchNorm3d, nn.LeakyReLU], 0.01),
    ],
)
def test_every_block_is_convolution_norm_activation(
    normalization: str, activation: str, layers: list[type[nn.Module]], slope: float
) -> None:
    network = tiny_network(normalization, activation)
    blocks = [m for name, m in network.named_modules() if re.search(r"\.conv[12]$", name)]
    assert len(blocks) == 2 * (len(TINY) + len(TINY) - 1)
    for block in blocks:
        assert [isinstance(layer, kind) for layer, kind in zip(block, layers, strict=True)] == [True] * len(layers)
        assert block[1].affine
        assert getattr(block[-1], "slope", None) == slope or getattr(block[-1], "negative_slope", None) == slope


def test_instance_norm_keeps_the_field_s_epsilon_and_no_statistics(meta_network: Unet3d) -> None:
    norms = [m for m in meta_network.modules() if isinstance(m, nn.InstanceNorm3d)]
    assert len(norms) == 22
    assert {(m.eps, m.track_running_stats, m.affine) for m in norms} == {(1e-5, False, True)}


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_below_zero(activation: str) -> None:
    block = tiny_network(activation=activation).input_block.conv1
    image = ramp(1, 1, 4, 4, 4)
    normed = F.instance_norm(block[0](image), weight=block[1].weight, bias=block[1].bias)
    slope = {"relu": 0.0, "leaky_relu": 0.01}[activation]
    expected = torch.where(normed > 0, normed, slope * normed)
    assert (normed < -0.5).any()
    torch.testing.assert_close(block(image), expected)


@pytest.mark.parametrize("normalization", ["instancenorm", "batchnorm"])
@pytest.mark.parametrize("shape", [(8, 8, 8), (4, 8, 12), (16, 4, 4)])
def test_shape_in_is_shape_out(normalization: str, shape: tuple[int, int, int]) -> None:
    network = Unet3d(2, 5, normalization, filters=TINY)
    assert network(ramp(2, 2, *shape)).shape == (2, 5, *shape)


@pytest.mark.parametrize("resolutions", [2, 3, 6])
def test_any_number_of_resolutions(resolutions: int) -> None:
    network = Unet3d(1, 2, filters=[2] * resolutions)
    assert network.divisor == 2 ** (resolutions - 1)
    assert len(network.upsample) == resolutions - 1
    shape = (network.divisor, network.divisor, 2 * network.divisor)
    assert network(ramp(1, 1, *shape)).shape == (1, 2, *shape)


def test_up_block_joins_upsampled_then_skip() -> None:
    block = UpBlock(3, 2, BlockConfig(normalization="instancenorm", activation="relu"))
    seen: list[Tensor] = []
    block.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, skip = ramp(1, 3, 2, 2, 2), 7 + ramp(1, 2, 4, 4, 4)
    assert block(x, skip).shape == (1, 2, 4, 4, 4)
    torch.testing.assert_close(seen[0][:, :2], block.upsample_conv(x), rtol=0, atol=0)
    torch.testing.assert_close(seen[0][:, 2:], skip, rtol=0, atol=0)


def test_each_skip_reaches_the_block_of_its_resolution() -> None:
    network = tiny_network()
    produced: dict[str, Tensor] = {}
    received: list[Tensor] = []
    for name, module in (("input", network.input_block), ("down", network.downsample[0])):
        module.register_forward_hook(lambda module, inputs, output, name=name: produced.__setitem__(name, output))
    for block in network.upsample:
        block.register_forward_pre_hook(lambda module, inputs: received.append(inputs[1]))
    network(ramp(1, 1, 8, 8, 8))
    assert received[0] is produced["down"]
    assert received[1] is produced["input"]


def test_parameters_begin_as_pytorch_s_own_layers_do() -> None:
    network = tiny_network()
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            # kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(fan in), for the weight as for the bias
            bound = 1 / math.sqrt(module.weight[0].numel())
            largest = module.weight.abs().max().item()
            assert 0.5 * bound < largest <= bound
        if isinstance(module, nn.InstanceNorm3d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


@pytest.mark.parametrize("normalization", ["instancenorm", "batchnorm"])
def test_channels_last_gives_the_same_numbers(normalization: str) -> None:
    network = tiny_network(normalization)
    image = ramp(2, 1, 8, 8, 8)
    logits = network(image)
    logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    network.to(memory_format=torch.channels_last_3d)
    again = network(image.contiguous(memory_format=torch.channels_last_3d))
    again.square().mean().backward()
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=2e-6)
    assert len(expected) == len(list(network.parameters()))
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", GOLDEN, ids="-".join)
def test_golden_output(kind: tuple[str, str]) -> None:
    """Measured once; fails if the arithmetic, the order of the parameters or their initial values change."""
    logits = tiny_network(*kind)(ramp(1, 1, 8, 8, 8))
    torch.testing.assert_close(fingerprint(logits), torch.tensor(GOLDEN[kind]).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "nearest"),
    [
        ((8, 8, 8), None),
        ((4, 4, 8), None),
        ((8, 8, 7), "8 8 8"),
        ((13, 8, 8), "12 8 8"),
        ((15, 8, 8), "16 8 8"),
        ((1, 8, 8), "4 8 8"),
        ((4, 4, 4), "4 4 8"),  # a single voxel at the bottleneck has no variance
        ((3, 1, 5), "4 4 8"),
    ],
)
def test_check_window_names_the_nearest_shape(shape: tuple[int, int, int], nearest: str | None) -> None:
    network = tiny_network()
    if nearest is None:
        network.check_window(shape, "--input_shape")
        assert network(ramp(1, 1, *shape)).shape[2:] == shape
    else:
        message = (
            f"--input_shape {' '.join(map(str, shape))}: .* halves its window 2 times.* multiple of 4 .*{nearest}$"
        )
        with pytest.raises(UserError, match=message):
            network.check_window(shape, "--input_shape")
        network.check_window([int(n) for n in nearest.split()], "--input_shape")


def test_mlperf_s_own_window_passes_and_its_neighbours_do_not(meta_network: Unet3d) -> None:
    check_window(meta_network, (128, 128, 128), "--val_input_shape", channels=1, classes=3)
    check_window(meta_network, [32, 32, 64], "--val_input_shape", channels=1, classes=3)
    with pytest.raises(UserError, match=r"--val_input_shape 128 128 120: .*nearest is 128 128 128"):
        check_window(meta_network, (128, 128, 120), "--val_input_shape", channels=1, classes=3)


def test_a_network_without_restrictions_takes_any_window() -> None:
    check_window(nn.Identity(), (3, 5, 7), "--input_shape", channels=2, classes=2)


def test_build_network_by_name() -> None:
    network = build_network("unet3d(filters=(2, 4))", 2, 4, normalization="batchnorm", activation="leaky_relu")
    assert isinstance(network, Unet3d)
    assert network.input_block.conv1[0].weight.shape == (2, 2, 3, 3, 3)
    assert network.output.conv.out_channels == 4
    assert isinstance(network.input_block.conv1[1], nn.BatchNorm3d)
    assert isinstance(network.input_block.conv1[2], nn.LeakyReLU)
    assert "unet3d" in NETWORKS


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unet2d", "--model 'unet2d': unknown name; available: slicewise, unet3d"),
        ("unet3d(filter=(2, 4))", "unknown argument 'filter'; it takes filters"),
        ("unet3d(filters=(4,))", "filters must be two or more positive numbers"),
        ("unet3d(filters=(4, 0))", "filters must be two or more positive numbers"),
        ("unet3d(filters=(4, 8.5))", "filters must be two or more positive numbers"),
        ("unet3d(filters=4)", "not iterable; it takes filters"),
        ("unet3d(channels=4)", "channels=4, but the data set needs channels=1; leave it out"),
    ],
)
def test_a_wrong_spec_is_a_users_mistake(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        build_network(spec, 1, 3)


@pytest.mark.parametrize(("normalization", "activation"), [("groupnorm", "relu"), ("instancenorm", "gelu")])
def test_unknown_kinds_are_refused(normalization: str, activation: str) -> None:
    with pytest.raises(UserError, match="unknown normalization"):
        Unet3d(1, 3, normalization, activation)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("outputs", [1, 2])
def test_blocks_that_are_computed_again_give_the_same_gradients_bit_for_bit(
    outputs: int, layout: torch.memory_format
) -> None:
    def gradients(recomputes: bool) -> tuple[list[Tensor], list[Tensor], int]:
        torch.manual_seed(5)
        network = Unet3d(1, 3, filters=TINY, deep_supervision=outputs).to(memory_format=layout)
        if recomputes:
            network.recompute_activations("--checkpoint_activations")
        calls: list[None] = []
        network.bottleneck.register_forward_pre_hook(lambda *_: calls.append(None))
        image = ramp(2, 1, 8, 8, 8).contiguous(memory_format=layout)
        logits = as_tuple(network(image))
        torch.stack([(each**2).mean() for each in logits]).sum().backward()
        found = [p.grad for p in network.parameters() if p.grad is not None]
        return list(logits), found, len(calls)

    (logits, plain, once), (same_logits, again, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    for a, b in zip([*logits, *plain], [*same_logits, *again], strict=True):
        assert torch.equal(a, b)


def test_only_training_computes_blocks_again_and_not_with_batch_norm() -> None:
    network, calls = tiny_network(), []
    network.recompute_activations("--checkpoint_activations")
    network.bottleneck.register_forward_pre_hook(lambda *_: calls.append(None))
    network.eval()(ramp(1, 1, 8, 8, 8)).sum().backward()
    assert len(calls) == 1
    with pytest.raises(UserError, match="--checkpoint_activations: batch norm would count each batch twice"):
        tiny_network("batchnorm").recompute_activations("--checkpoint_activations")
