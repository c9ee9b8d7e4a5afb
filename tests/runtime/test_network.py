"""The network of a run: what flags change about it, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.messages import notes_held, take_notes
from data_loading.spec import KITS19
from model.normalization import InstanceNormActivation
from model.unet3d import Unet3d
from runtime import build
from runtime.arguments import RunConfig
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.world import World
from runtime.flag_fields import trusted_spec
from runtime.network import load_trained, prepare_network
from runtime.run_spec import make_run_spec

HERE = "tests.runtime.test_network"


class Normed(nn.Sequential):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(nn.Conv3d(channels, 2, 1), nn.InstanceNorm3d(2), nn.ReLU(), nn.Conv3d(2, classes, 1))


@pytest.fixture
def prepare(make_config: Callable[..., RunConfig]) -> Callable[..., nn.Module]:
    """`prepare(spec, flag=value)`: the network of a run on synthetic data, whose step has been built too."""

    def prepared(spec: str, **changed: Any) -> nn.Module:
        flags = {"loader": "synthetic", "data_dir": Path("synthetic"), "model": trusted_spec(spec), "batch_size": 2}
        flags |= {"input_shape": (8, 8, 8), "val_input_shape": (8, 8, 8), "layout": "NDHWC"}
        run = make_run_spec(make_config(**(flags | changed)), World(0, 1, torch.device("cpu")))
        build.make_step_config(run)
        take_notes()
        return prepare_network(run)

    return prepared


def test_norms_of_other_networks_are_fused_in_channels_last_unless_the_flag_forbids_it(
    prepare: Callable[..., nn.Module],
) -> None:
    def fused(**flags: Any) -> bool:
        network = prepare(f"{HERE}:Normed", **flags)
        return any(isinstance(module, InstanceNormActivation) for module in network.modules())

    assert fused()
    assert not fused(fuse_norms=False)
    assert not fused(layout="NCDHW")


@pytest.mark.parametrize(
    ("name", "best_dice", "batch", "noted"),
    [("last", 0.5, 6, True), ("best", 0.5, 6, False), ("best", -1.0, 6, True), ("last", 0.5, 0, False)],
)
def test_weights_within_an_epoch_are_not_taken_for_those_at_its_end(
    name: str, best_dice: float, batch: int, noted: bool, make_config: Callable[..., RunConfig]
) -> None:
    weights = Unet3d(1, 3, filters=(2, 3)).state_dict()
    checkpoint = Checkpoint(
        path=Path("c.pth"), best=weights, last=weights, last_epoch=4, batch=batch, best_dice=best_dice
    )
    config = make_config(model=trusted_spec("unet3d(filters=(2,3))"), val_input_shape=(8, 8, 8), checkpoint=name)
    with notes_held():
        load_trained(checkpoint, config, KITS19, torch.device("cpu"))
        notes = take_notes()
    assert notes == ["c.pth: the last weights, after batch 6 of epoch 5"] * noted


def test_blocks_of_unet3d_are_computed_again_on_demand(prepare: Callable[..., nn.Module]) -> None:
    for asked in (False, True):
        network = prepare("unet3d(filters=(2,4))", checkpoint_activations=asked)
        assert isinstance(network, Unet3d)
        assert network.recomputes is asked


@pytest.mark.parametrize(
    ("spec", "changed", "message"),
    [
        (f"{HERE}:Normed", {}, "--checkpoint_activations: only the blocks of --model unet3d can be computed again"),
        ("unet3d(filters=(2,4))", {"compile": True}, "--checkpoint_activations does not go with --compile"),
        (
            "unet3d(filters=(2,4))",
            {"augment": (trusted_spec("manifold_mixup"),)},
            "not go with --checkpoint_activations",
        ),
        ("unet3d(filters=(2,4))", {"normalization": "batchnorm"}, "batch norm would count each batch twice"),
    ],
)
def test_blocks_that_cannot_be_computed_again(
    spec: str, changed: dict[str, Any], message: str, prepare: Callable[..., nn.Module]
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(spec, checkpoint_activations=True, **changed)
