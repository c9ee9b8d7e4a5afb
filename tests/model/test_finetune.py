"""Starting from other weights, and training a part: frozen tensors do not change by a bit, whatever is called."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from model.finetune import ALL_BUT_OUTPUT, freeze, load_part, output_layer
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


def small(classes: int = 3) -> Unet3d:
    return Unet3d(1, classes, filters=(3, 4))


@pytest.mark.parametrize(("make", "name"), [(small, "output.conv"), (Odd, "output")])
def test_the_output_layer_is_the_last_that_is_computed(make: Callable[[], nn.Module], name: str) -> None:
    network = make()
    before = copy.deepcopy(network.state_dict())
    assert output_layer(network, 1, WINDOW) == name
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert network.training


def test_weights_of_the_same_network_are_taken_over_whole() -> None:
    ours, theirs = small(), small()
    assert load_part(ours, theirs.state_dict(), "output.conv", "--init_from c") == "all of the network"
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_a_head_of_other_classes_stays_and_is_reported() -> None:
    ours, theirs = small(2), small(5)
    head = ours.output.conv.weight.clone()
    loaded = load_part(ours, theirs.state_dict(), "output.conv", "--init_from c")
    assert loaded == "all but output.conv, which is new: 2 classes instead of 5"
    assert torch.equal(ours.output.conv.weight, head)
    for name, value in theirs.state_dict().items():
        if not name.startswith("output.conv."):
            assert torch.equal(ours.state_dict()[name], value)


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
        load_part(ours, weights, "output.conv", "--init_from c")
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("patterns", [(ALL_BUT_OUTPUT,), ("body.*",), (r"body\.0\..*", r"body\.1\.(weight|bias)")])
def test_what_is_frozen_stays_to_the_bit_while_the_rest_learns(patterns: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network = Odd()
    freeze(network, patterns, "output")
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
    freeze(network, ["body.*"], "output")
    for changed in (network, copy.deepcopy(network)):
        changed.train()
        assert not any(module.training for module in changed.body.modules()), "batch norm and dropout of what is frozen"
        assert changed.dropout.training
        assert changed.output.training
    partly = Odd()
    freeze(partly, [r"body\.0\.weight"], "output")
    partly.train()
    assert partly.body[1].training
    assert partly.body[2].training


def test_a_copy_of_a_frozen_network_returns_itself_from_train() -> None:
    network = Odd()
    freeze(network, ["body.*"], "output")
    changed = copy.deepcopy(network)
    assert changed.body.train() is changed.body


def test_what_is_frozen_is_reported() -> None:
    assert freeze(Odd(), [ALL_BUT_OUTPUT], "output") == (
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
        freeze(Odd(), patterns, "output")
