"""The networks suite: fused norms are timed against the same network without them, and what is missing is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import networks
from benchmarks.harness import NOT_MEASURED, Options, Table
from model.normalization import InstanceNormActivation

CPU = torch.device("cpu")


class Small(nn.Module):
    """One norm with its activation."""

    def __init__(self, in_channels: int, out_channels: int, features: tuple[int, ...]) -> None:
        super().__init__()
        width = features[0]
        self.layers = nn.Sequential(
            nn.Conv3d(in_channels, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True), nn.ReLU()
        )
        self.output = nn.Conv3d(width, out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.output(self.layers(image))
        return result


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Table:
    specs = {
        "own": "unet3d(filters=FILTERS)",
        "other": "tests.benchmarks.test_networks_suite:Small(features=FILTERS)",
        "absent": "no_such_package:Network(width=WIDTH)",
    }
    monkeypatch.setattr(networks, "NETWORKS", specs)
    (found,) = networks.run(Options(device=CPU, quick=True, work_dir=tmp_path))
    return found


def test_a_row_per_network_with_times_or_the_reason(table: Table) -> None:
    assert [row[0] for row in table.rows] == ["own", "other", "absent"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    own, other, absent = table.rows
    assert other[1] == (27 + 1 + 1 + 1) * 8 + (8 + 1) * 3
    assert other[2] == "1 of 1, 1 of them with the activation behind"
    assert all(math.isfinite(value) and value > 0 for value in (own[4], *other[4:]))
    assert own[3] == other[3] == 2
    assert own[5:] == ["", ""]
    assert absent[1].startswith(f"{NOT_MEASURED}: ")
    assert "there is no module no_such_package" in absent[1]


def test_both_sides_of_a_pair_compute_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = networks.build
    monkeypatch.setattr(networks, "build", lambda spec: built.append(build(spec)) or built[-1])
    scale = networks.Scale((8,), (8, 8, 8), 2, 1)
    spec = "tests.benchmarks.test_networks_suite:Small(features=(8,))"
    losses = [networks.make_step(spec, CPU, scale, 2, is_fused=fused)().item() for fused in (True, False)]
    assert [isinstance(one.layers[1], InstanceNormActivation) for one in built] == [True, False]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
