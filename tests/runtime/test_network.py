"""The network of a run: what flags change about it, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.messages import take_notes
from model.normalization import InstanceNormActivation
from model.unet3d import Unet3d
from runtime import build
from runtime.arguments import RunConfig
from runtime.distributed.world import World
from runtime.flag_fields import trusted_spec
from runtime.network import prepare_network
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
