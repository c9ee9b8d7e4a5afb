"""A 2-D network slice by slice: each slice sees its neighbours and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.registry import Spec
from model.registry import build_network, check_window
from model.slicewise import Slicewise


class Plane(nn.Module):
    """A 1x1 convolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


def slicewise(channels: int, classes: int, context: int) -> Slicewise:
    torch.manual_seed(0)
    return Slicewise(channels, classes, "plane", lambda _, c, k, dimensions: Plane(c, k), context)


def test_a_slice_sees_its_neighbours_and_repeats_the_last() -> None:
    network = slicewise(2, 4, 3)
    image = torch.randn(2, 2, 5, 3, 4)
    logits = network(image)
    assert logits.shape == (2, 4, 5, 3, 4)
    for k, around in enumerate([(0, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 4)]):
        seen = torch.cat([image[:, :, index] for index in around], dim=1)
        torch.testing.assert_close(logits[:, :, k], network.network(seen))


def test_without_context_it_is_the_2d_network_of_each_slice() -> None:
    network, image = slicewise(1, 2, 1), torch.randn(1, 1, 3, 4, 4)
    torch.testing.assert_close(network(image)[:, :, 1], network.network(image[:, :, 1]))


def test_an_image_is_a_volume_of_one_slice() -> None:
    network, image = slicewise(3, 2, 3), torch.randn(2, 3, 1, 4, 6)
    torch.testing.assert_close(network(image)[:, :, 0], network.network(torch.cat([image[:, :, 0]] * 3, dim=1)))


def test_a_volume_that_is_flipped_has_its_neighbours_reversed() -> None:
    network, image = slicewise(1, 2, 3), torch.randn(1, 1, 4, 2, 2)
    with torch.no_grad():  # a network that treats the slices above and below the same
        weight = network.network.conv.weight  # type: ignore[union-attr]
        weight[:, 2] = weight[:, 0]
    torch.testing.assert_close(network(image.flip(2)).flip(2), network(image))


@pytest.mark.parametrize("context", [0, 2, -1, 1.5, "3"])
def test_an_even_context_is_refused(context: object) -> None:
    with pytest.raises(UserError, match="odd number of slices"):
        slicewise(1, 2, context)  # type: ignore[arg-type]


@pytest.mark.parametrize("trusted", [True, False])
def test_by_spec_the_2d_network_has_the_slices_as_channels_and_its_windows_are_checked(trusted: bool) -> None:
    pytest.importorskip("monai")
    inner = "monai.networks.nets:UNet(channels=(2, 4), strides=(2,))"
    spec = f"slicewise(network='{inner}', context=3)"
    network = build_network(Spec(spec, trusted=trusted), 2, 3)
    assert next(network.parameters()).shape[1] == 6
    assert network(torch.randn(1, 2, 5, 4, 6)).shape == (1, 3, 5, 4, 6)
    check_window(network, (1, 4, 6), "--input_shape", channels=2, classes=3)
    with pytest.raises(UserError, match=r"the nearest is 5 4 6$"):
        check_window(network, (5, 5, 6), "--input_shape", channels=2, classes=3)


@pytest.mark.parametrize(
    "spec",
    [
        "slicewise(network='os:system(command=\"touch {path}\")')",
        "slicewise(network='tests.model.test_slicewise:Plane')",
    ],
)
def test_a_spec_inside_an_untrusted_spec_is_untrusted(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"comes from a file.*give --model on the command line"):
        build_network(spec.format(path=tmp_path / "executed"), 2, 3)
    assert not (tmp_path / "executed").exists()


def test_a_spec_inside_a_trusted_spec_is_trusted() -> None:
    spec = Spec("slicewise(network='tests.model.test_slicewise:Plane', context=5)", trusted=True)
    assert build_network(spec, 2, 3)(torch.zeros(1, 2, 3, 4, 4)).shape == (1, 3, 3, 4, 4)


def test_wrong_arguments_are_one_line() -> None:
    for spec, message in (
        ("slicewise", "missing 1 required .*'network'; it takes network, context=1$"),
        ("slicewise(network=3)", "expected a spec in quotes"),
        ("slicewise(network='unet3d')", "unet3d takes volumes; give a network of 2-D slices"),
        ("slicewise(network='slicewise(network=1)')", "slicewise takes volumes"),
        ("slicewise(network='nothing_like_it')", "unknown name; available: slicewise, unet3d"),
    ):
        with pytest.raises(UserError, match=message):
            build_network(Spec(spec, trusted=True), 1, 2)
