"""Networks by spec: arguments that the program sets, valid windows, and what a spec from a file may name."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.registry import Spec
from model.normalization import InstanceNormActivation
from model.registry import NO_DOWNLOAD, build_network, check_window, freeze_unused, to_meta

HERE = "tests.model.test_registry"
SEGRESNET = "monai.networks.nets:SegResNet(init_filters=8, blocks_down=(1,1), blocks_up=(1,))"


class Net(nn.Module):
    """Halves its window once and records its arguments."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: int = 4, spatial_dims: int = 2, pretrained: bool = True
    ) -> None:
        super().__init__()
        self.given = (in_channels, out_channels, channels, spatial_dims, pretrained)
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.down = conv(in_channels, channels, 3, 2, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.out = conv(channels, out_channels, 1)
        self.unused = conv(channels, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(self.up(self.down(image)))


class Anything(Net):
    def __init__(self, **settings: int) -> None:
        super().__init__(settings["width"], settings["classes_out"], spatial_dims=3)


class WithActivation(Net):
    """Has the signature of segmentation_models_pytorch's networks, whose `activation` is the output's."""

    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_weights: str | None = "imagenet",
        in_channels: int = 3,
        classes: int = 1,
        activation: str | None = None,
        normalization: str | None = None,
        **settings: object,
    ) -> None:
        super().__init__(in_channels, classes, spatial_dims=3)
        self.settings = (encoder_name, encoder_weights, activation, normalization, settings)


class NeedsAFile(Net):
    """Reads its weights where they are asked for, and finds none."""

    def __init__(self, in_channels: int, classes: int, encoder_weights: str | None = "imagenet") -> None:
        if encoder_weights:
            raise FileNotFoundError("no connection")
        super().__init__(in_channels, classes, spatial_dims=3)


class NoClasses(nn.Module):
    def __init__(self, in_channels: int, depth: int = 2) -> None:
        super().__init__()


class Pair(Net):
    def forward(self, image: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(image), None


class OnTheHost(Net):
    """Has a constant on the host, so that it cannot run on the meta device."""

    def forward(self, image: Tensor) -> Tensor:
        if image.device.type == "meta":
            raise RuntimeError("expected all tensors on one device, found cpu and meta")
        return super().forward(image)


class ByName(Net):
    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": super().forward(image)}


class WithScores(Net):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(image)
        return logits, logits.mean((2, 3, 4))


def no_network(channels: int, classes: int) -> dict[str, int]:
    return {}


def build(spec: str, channels: int = 2, classes: int = 3, activation: str = "relu") -> nn.Module:
    return build_network(Spec(spec, trusted=True), channels, classes, activation=activation)


def test_channels_classes_and_dimensions_are_passed_by_name_and_nothing_is_downloaded() -> None:
    network = build(f"{HERE}:Net(channels=5)")
    assert isinstance(network, Net)
    assert network.given == (2, 3, 5, 3, False), "`channels` is its own if it also has `in_channels`"
    assert build(f"{HERE}:Net(pretrained=True)").given[-1] is True, "the spec asks for it"  # type: ignore[union-attr, index]


def test_another_librarys_network_gets_channels_and_classes_alone_and_sets_all_else_itself() -> None:
    spec = f"{HERE}:WithActivation"
    network = build(spec, activation="leaky_relu")
    assert isinstance(network, WithActivation)
    assert network.given[:2] == (2, 3)
    assert network.settings == ("resnet34", None, None, None, {}), "its activation is the output's"
    arguments = "encoder_name='mit_b0', in_channels=2, classes=3, activation='softmax', normalization='x', depth=2"
    own = build(f"{spec}({arguments})")
    assert isinstance(own, WithActivation)
    assert own.given[:2] == (2, 3)
    assert own.settings == ("mit_b0", None, "softmax", "x", {"depth": 2})
    assert isinstance(build(f"{HERE}:NeedsAFile"), NeedsAFile), "weights are left out unless the spec asks for them"


def test_the_projects_network_takes_the_flags_where_its_spec_sets_nothing() -> None:
    def slope(spec: str) -> float:
        network = build(spec, activation="leaky_relu")
        return next(module.slope for module in network.modules() if isinstance(module, InstanceNormActivation))

    assert slope("unet3d(filters=(2,4))") == 0.01
    assert slope("unet3d(filters=(2,4), activation='relu', channels=2)") == 0.0
    with pytest.raises(UserError, match="unet3d: classes=5, but the data set needs classes=3"):
        build("unet3d(classes=5)")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Net(in_channels=1)", "Net: in_channels=1, but the data set needs in_channels=2; leave it out"),
        ("Net(out_channels=None)", "Net: out_channels=None, but the data set needs out_channels=3; leave it out"),
        ("Net(spatial_dims=2)", "Net: spatial_dims=2, but the data set needs spatial_dims=3; leave it out"),
        (
            "NeedsAFile(encoder_weights='imagenet')",
            "NeedsAFile cannot read its weights: no connection; without encoder_weights it starts from random weights",
        ),
        ("Net(chanels=1)", "unknown argument 'chanels'; it takes channels=4"),
        (
            "NoClasses",
            "has none of the parameters out_channels, classes, num_classes, n_classes, which the data set determines; "
            "it takes in_channels, depth=2",
        ),
        ("no_network", "returns a dict, not a torch.nn.Module"),
        ("Nett", "has no callable Nett; similar: Net"),
    ],
)
def test_a_wrong_spec_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        build(f"{HERE}:{spec}")


def test_a_network_with_kwargs_gets_its_arguments_from_the_spec_and_is_tried() -> None:
    network = build(f"{HERE}:Anything(width=2, classes_out=3)")
    check_window(network, (4, 4, 4), "--input_shape", channels=2, classes=3)
    with pytest.raises(UserError, match=r"it maps \(2, 2, 4, 4, 4\) to \(2, 3, 4, 4, 4\), not to \(2, 5, 4, 4, 4\)"):
        check_window(network, (4, 4, 4), "--input_shape", channels=2, classes=5)


@pytest.mark.parametrize(
    ("window", "nearest"), [((8, 8, 8), None), ((7, 8, 6), "8 8 6"), ((2, 3, 5), "2 4 4"), ((1, 4, 4), "2 4 4")]
)
def test_a_window_that_does_not_fit_names_the_nearest(window: tuple[int, int, int], nearest: str | None) -> None:
    network = build(f"{HERE}:Net")
    if nearest is None:
        check_window(network, window, "--input_shape", channels=2, classes=3)
        return
    with pytest.raises(UserError, match=rf"^--input_shape {' '.join(map(str, window))}: .*; the nearest is {nearest}$"):
        check_window(network, window, "--input_shape", channels=2, classes=3)
    check_window(network, [int(size) for size in nearest.split()], "--input_shape", channels=2, classes=3)


def test_an_output_that_is_not_a_tensor_is_refused_and_a_network_that_cannot_be_tried_passes() -> None:
    with pytest.raises(UserError, match="one of its outputs is a NoneType, not logits"):
        check_window(build(f"{HERE}:Pair"), (4, 4, 4), "--input_shape", channels=2, classes=3)
    with pytest.raises(UserError, match="its output is a dict, not logits"):
        check_window(build(f"{HERE}:ByName"), (4, 4, 4), "--input_shape", channels=2, classes=3)
    with pytest.raises(UserError, match=r"a further output is \(2, 3\), not logits \(2, 3, D, H, W\)"):
        check_window(build(f"{HERE}:WithScores"), (4, 4, 4), "--input_shape", channels=2, classes=3)
    check_window(build(f"{HERE}:OnTheHost"), (4, 4, 4), "--input_shape", channels=2, classes=3)


def test_checking_computes_nothing_and_changes_nothing() -> None:
    network = build(f"{HERE}:Net").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    meta_network = to_meta(network)
    check_window(network, (4, 4, 4), "--input_shape", channels=2, classes=3)
    assert not network.training
    assert all(p.device.type == "meta" for p in meta_network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_parameters_that_do_not_affect_the_logits_are_frozen() -> None:
    network = build(f"{HERE}:Net")
    assert freeze_unused(network, 2, (4, 4, 4)) == ["unused.weight", "unused.bias"]
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["unused.weight", "unused.bias"]
    assert freeze_unused(build("unet3d(filters=(2,4))"), 2, (4, 4, 4)) == []


class LayerDrop(nn.Module):
    """Leaves out a layer in half of the training steps."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.sometimes = nn.Conv3d(in_channels, in_channels, 1)
        self.unused = nn.Conv3d(in_channels, in_channels, 1, bias=False)
        self.output = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        is_left_out = self.training and torch.rand(()).item() < 0.5
        logits: Tensor = self.output(image if is_left_out else image + self.sometimes(image))
        return logits


@pytest.mark.parametrize("seed", range(6))
def test_layers_that_are_sometimes_left_out_are_trained(seed: int) -> None:
    network = build(f"{HERE}:LayerDrop")
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    assert freeze_unused(network, 2, (4, 4, 4)) == ["unused.weight"]
    assert torch.equal(torch.get_rng_state(), state)


class WeightNorm(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            super().__init__(torch.nn.utils.weight_norm(nn.Conv3d(in_channels, out_channels, 1)))


class Lazy(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.LazyConv3d(out_channels, 1))


class ExtraState(nn.Conv3d):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_a_state_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(UserError, match="ExtraState: _extra_state of its state is no tensor"):
        build(f"{HERE}:ExtraState")


def test_a_network_that_cannot_be_copied_is_not_checked_and_lazy_layers_are_refused() -> None:
    network = build(f"{HERE}:WeightNorm")
    check_window(network, (4, 4, 4), "--input_shape", channels=2, classes=3)
    assert freeze_unused(network, 2, (4, 4, 4)) == []
    with warnings.catch_warnings(action="ignore"), pytest.raises(UserError, match="has lazy layers"):
        build(f"{HERE}:Lazy")


@pytest.mark.parametrize(
    "spec",
    [
        "monai.networks.nets:SegResNet(act='torch.optim:SGD')",
        "os:system(command='touch {path}')",
        f"{HERE}:Net",
        "torch.nn:Conv3d(kernel_size=1)",
        "monai.networks.nets:Transchex",  # downloads what its arguments name
        "monai.networks.nets:get_efficientnet_image_size",  # a function
        "monai.networks.nets:torch",
        "monai.networks.nets.unet:UNet",  # not the allowed module itself
        "monai.networks.nets:SegResNet(act='../../file')",
    ],
)
def test_a_spec_out_of_a_file_stays_within_the_allowlist(spec: str, tmp_path: object) -> None:
    if spec.startswith("monai"):
        pytest.importorskip("monai")
    path = f"{tmp_path}/executed"
    with pytest.raises(UserError, match=r"comes from a file.*give --model on the command line|has no callable torch"):
        build_network(spec.format(path=path), 2, 3)
    assert not __import__("os").path.exists(path)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    "spec", [SEGRESNET, "monai.networks.nets:UNet(channels=(2, 4), strides=(2,))", "unet3d(filters=(2, 4))"]
)
def test_allowed_networks_come_from_the_command_line_and_from_files(spec: str, trusted: bool) -> None:
    pytest.importorskip("monai")
    torch.manual_seed(0)
    network = build_network(Spec(spec, trusted=trusted), 2, 4)
    check_window(network, (4, 4, 8), "--input_shape", channels=2, classes=4)
    assert network(torch.randn(1, 2, 4, 4, 8)).shape == (1, 4, 4, 4, 8)


@pytest.mark.parametrize("name", ["Unet", "UnetPlusPlus", "DeepLabV3Plus", "FPN", "Segformer"])
def test_networks_of_segmentation_models_pytorch_train_slice_by_slice(name: str) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="pip install segmentation-models-pytorch")
    spec = f"slicewise(network='segmentation_models_pytorch:{name}(encoder_name=\"resnet18\")')"
    network = build_network(spec, 2, 3, activation="relu")  # as from a checkpoint
    check_window(network, (2, 64, 64), "--input_shape", channels=2, classes=3)
    assert freeze_unused(network, 2, (2, 64, 64)) == []
    logits = network.train()(torch.randn(1, 2, 2, 64, 64))
    assert logits.shape == (1, 3, 2, 64, 64)
    assert logits.min() < 0 < logits.max(), "no activation at the output"
    logits.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_missing_argument_of_monais_is_one_line() -> None:
    pytest.importorskip("monai")
    with pytest.raises(UserError, match=r"'channels' and 'strides'; it takes channels, strides, kernel_size=3"):
        build("monai.networks.nets:UNet")


def test_a_file_cannot_make_an_allowed_network_download_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    asked = []

    class Fetching(nets.SegResNet):  # type: ignore[misc, name-defined]
        def __init__(self, in_channels: int, out_channels: int, pretrained: bool, weights: str | None = "all") -> None:
            asked.append((pretrained, weights))
            super().__init__(3, 8, in_channels, out_channels)

    Fetching.__module__ = "monai.networks.nets.dummy"
    monkeypatch.setattr(nets, "Fetching", Fetching, raising=False)
    spec = "monai.networks.nets:Fetching(pretrained=True, weights='all')"
    build_network(spec, 1, 2)
    build_network(Spec(spec, trusted=True), 1, 2)
    assert asked == [(False, None), (True, "all")]
    assert {"pretrained", "encoder_weights", "weights"} <= set(NO_DOWNLOAD)
