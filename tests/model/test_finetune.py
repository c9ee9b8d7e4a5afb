"""Starting from other weights, and training a part: frozen tensors do not change by a bit, whatever is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from model.finetune import ALL_BUT_OUTPUT, freeze, load_part, output_layers
from model.unet3d import Unet3d

WINDOW = (8, 8, 8)


class Odd(nn.Module):
    """Registers its output layer first; has batch norm and dropout, one dropout beside trained parameters."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.output = nn.Conv3d(4, classes, 1)
        self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout3d(0.5))
        self.dropout = nn.Dropout3d(0.5)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(self.body(image)))
        return logits


def small(classes: int = 3, channels: int = 1) -> Unet3d:
    return Unet3d(channels, classes, filters=(3, 4))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (small, ["output.conv"]),
        (partial(Unet3d, 1, filters=(3, 4, 5), deep_supervision=2), ["output.conv", "heads.0.conv"]),
        (Odd, ["output"]),
        (lambda classes: nn.Conv3d(1, classes, 1), [""]),
        (lambda classes: nn.Sequential(nn.ConvTranspose3d(4, classes, 2)), ["0"]),
    ],
)
def test_output_layers_are_those_that_depend_on_the_classes(make: Callable[[int], nn.Module], names: list[str]) -> None:
    assert output_layers(make(3), make(4)) == names
    ours, theirs = make(2), make(5)
    summary = load_part(ours, theirs.state_dict(), names, "c", channels=1)
    assert summary.endswith(f"which {'are' if len(names) > 1 else 'is'} new: 2 classes instead of 5")


def test_weights_of_the_same_network_are_taken_over_whole() -> None:
    ours, theirs = small(), small()
    assert load_part(ours, theirs.state_dict(), ["output.conv"], "--init_from c", channels=1) == "all of the network"
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(("classes", "more"), [(3, ""), (5, ": 3 classes instead of 5")])
def test_deep_supervision_starts_from_a_plain_network(classes: int, more: str) -> None:
    ours = Unet3d(1, 3, filters=(3, 4, 5), deep_supervision=2)
    initial = copy.deepcopy(ours.state_dict())
    theirs = Unet3d(1, classes, filters=(3, 4, 5))
    summary = load_part(ours, theirs.state_dict(), ["output.conv", "heads.0.conv"], "c", channels=1)
    layers = "heads.0.conv, which is new" if classes == 3 else "output.conv, heads.0.conv, which are new"
    assert summary == f"all but {layers}{more}"
    for name, tensor in ours.state_dict().items():
        is_new = name.startswith("heads") or (name.startswith("output") and classes != 3)
        assert torch.equal(tensor, (initial if is_new else theirs.state_dict())[name]), name


def test_weights_without_any_output_are_another_network_s() -> None:
    body = {name: tensor for name, tensor in small().state_dict().items() if not name.startswith("output")}
    with pytest.raises(UserError, match=r"it lacks output\.conv\.weight"):
        load_part(small(), body, ["output.conv"], "c", channels=1)


def test_a_head_of_other_classes_stays_and_is_reported() -> None:
    ours, theirs = small(2), small(5)
    head = ours.output.conv.weight.clone()
    loaded = load_part(ours, theirs.state_dict(), ["output.conv"], "--init_from c", channels=1)
    assert loaded == "all but output.conv, which is new: 2 classes instead of 5"
    assert torch.equal(ours.output.conv.weight, head)
    for name, value in theirs.state_dict().items():
        if not name.startswith("output.conv."):
            assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (4, 2)])
def test_an_input_layer_of_other_channels_keeps_its_response(before: int, after: int) -> None:
    ours, theirs = small(channels=after), small(channels=before)
    summary = load_part(ours, theirs.state_dict(), ["output.conv"], "--init_from c", channels=after)
    name = "input_block.conv1.0.weight"
    assert summary == (
        f"all of the network; {name} for {after} input channel(s) instead of {before}: the mean over the channels, "
        f"repeated, times {before}/{after}"
    )
    stored, own = theirs.state_dict()[name], ours.state_dict()[name]
    for channel in range(after):
        torch.testing.assert_close(own[:, channel], stored.mean(1) * before / after)
    grey = torch.randn(1, 1, *WINDOW)
    torch.testing.assert_close(ours(grey.expand(-1, after, -1, -1, -1)), theirs(grey.expand(-1, before, -1, -1, -1)))


def test_other_channels_and_other_classes_go_together() -> None:
    ours, theirs = small(2, channels=2), small(5)
    summary = load_part(ours, theirs.state_dict(), ["output.conv"], "--init_from c", channels=2)
    assert summary.startswith("all but output.conv, which is new: 2 classes instead of 5; input_block")
    assert torch.equal(ours.bottleneck.conv1[0].weight, theirs.bottleneck.conv1[0].weight)


class Two(nn.Module):
    """Two layers take the image, as where a residual block comes first; or the second takes features beside it."""

    def __init__(self, channels: int, features: int = 0) -> None:
        super().__init__()
        self.one = nn.Conv3d(channels, 4, 3, padding=1)
        self.two = nn.Conv3d(channels + features, 4, 1)
        self.output = nn.Conv3d(4, 3, 1)


def test_every_layer_that_takes_the_image_is_refitted() -> None:
    ours, theirs = Two(3), Two(2)
    summary = load_part(ours, theirs.state_dict(), ["output"], "c", channels=3)
    assert "one.weight, two.weight for 3 input channel(s) instead of 2" in summary
    torch.testing.assert_close(ours.two.weight[:, 2], theirs.two.weight.mean(1) * 2 / 3)


def test_features_beside_the_image_are_not_averaged() -> None:
    with pytest.raises(UserError, match=r"it has two.weight as \(4, 34, 1, 1, 1\), not \(4, 35, 1, 1, 1\)"):
        load_part(Two(3, 32), Two(2, 32).state_dict(), ["output"], "c", channels=3)


def test_a_layer_that_differs_is_no_input_layer_where_the_channels_do_not() -> None:
    ours, theirs = (nn.Sequential(nn.Conv3d(inside, 4, 1), nn.Conv3d(4, 2, 1)) for inside in (2, 4))
    with pytest.raises(UserError, match=r"has 0.weight as \(4, 4, 1, 1, 1\), not \(4, 2, 1, 1, 1\)"):
        load_part(ours, theirs.state_dict(), ["1"], "c", channels=1, trained_channels=1)


def test_slices_keep_their_own_weights() -> None:
    """Three slices of two channels become three slices of four."""
    ours, theirs = (nn.Sequential(nn.Conv2d(3 * channels, 5, 3), nn.Conv2d(5, 2, 1)) for channels in (4, 2))
    load_part(ours, theirs.state_dict(), ["1"], "c", channels=4)
    stored, own = theirs[0].weight, ours[0].weight
    for slice_ in range(3):
        for channel in range(4):
            expected = stored[:, 2 * slice_ : 2 * slice_ + 2].mean(1) * 2 / 4
            torch.testing.assert_close(own[:, 4 * slice_ + channel], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("bottleneck.conv1.0.weight"), "lacks bottleneck.conv1.0.weight"),
        (lambda weights: weights.update(more=torch.zeros(1)), "also holds more"),
        (
            lambda weights: weights.update({"input_block.conv1.0.weight": torch.zeros(9, 1, 3, 3, 3)}),
            r"has input_block.conv1.0.weight as \(9, 1, 3, 3, 3\), not \(3, 1, 3, 3, 3\)",
        ),
    ],
)
def test_another_networks_weights_are_refused_and_nothing_is_loaded(
    change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    ours, weights = small(), dict(small().state_dict())
    before = copy.deepcopy(ours.state_dict())
    change(weights)
    with pytest.raises(UserError, match=f"--init_from c: not the network of --model.*{message}"):
        load_part(ours, weights, ["output.conv"], "--init_from c", channels=1)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("patterns", [(ALL_BUT_OUTPUT,), ("body.*",), (r"body\.0\..*", r"body\.1\.(weight|bias)")])
def test_what_is_frozen_stays_to_the_bit_while_the_rest_learns(patterns: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network = Odd()
    freeze(network, patterns, ["output"])
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    for _ in range(3):
        network.eval()
        network.train()
        network(torch.randn(2, 1, *WINDOW)).square().mean().backward()
        optimizer.step()
    after = network.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"output.weight", "output.bias"}


def test_parts_that_are_frozen_whole_stay_in_eval_and_others_do_not() -> None:
    network = Odd()
    freeze(network, ["body.*"], ["output"])
    for changed in (network, copy.deepcopy(network)):
        changed.train()
        assert not any(module.training for module in changed.body.modules()), "batch norm and dropout of what is frozen"
        assert changed.dropout.training
        assert changed.output.training
    partly = Odd()
    freeze(partly, [r"body\.0\.weight"], ["output"])
    partly.train()
    assert partly.body[1].training
    assert partly.body[2].training


def test_a_copy_of_a_frozen_network_returns_itself_from_train() -> None:
    network = Odd()
    freeze(network, ["body.*"], ["output"])
    changed = copy.deepcopy(network)
    assert changed.body.train() is changed.body


def test_what_is_frozen_is_reported() -> None:
    assert freeze(Odd(), [ALL_BUT_OUTPUT], ["output"]) == (
        "4 of 6 tensors (120 values) are frozen; trained: output.weight, output.bias"
    )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("body",), "does not match any parameter's whole name, such as output.weight, output.bias, body.0.weight"),
        ((".*",), "leaves nothing to train"),
        (("body.*", "(body"), "is not a regular expression"),
        ((ALL_BUT_OUTPUT, "output.*"), "leaves nothing to train"),
    ],
)
def test_a_pattern_that_does_nothing_or_all_is_an_error(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"--freeze .*{message}"):
        freeze(Odd(), patterns, ["output"])
