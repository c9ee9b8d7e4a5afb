"""A checkpoint of a small network, without training, and the folder that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_loading.index import INDEX_NAME, DatasetIndex, write_json
from data_loading.spec import DatasetSpec
from model.registry import build_network
from tests import programs
from tests.runtime.conftest import _no_launcher

__all__ = ["_no_launcher"]
NETWORK = "unet3d(filters=(3,4))"
SPEC = DatasetSpec(
    name="made",
    classes=("background", "$left @kidney", "right"),
    spacing_mm=(1.5, 1.0, 1.0),
    intensity_window=(-10.0, 10.0),
    mean=1.0,
    std=2.0,
    min_shape=(8, 8, 8),
    padding_value=-2.0,
    orientation="RAS",
)
# Flags of the network, which a checkpoint of another program does not hold.
FLAGS = ("--model", NETWORK, "--val_input_shape", 8, 6, 4, "--overlap", 0.25, "--test_time_flips", "W")
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoint.pth and dataset.json."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    network = build_network(NETWORK, 1, 3)
    for parameter in network.parameters():  # new norms are 1 and 0, which would hide a swap
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.zeros_(network.get_submodule("output.conv").bias)  # otherwise one class is everywhere
    torch.save(network.state_dict(), folder / "checkpoint.pth")
    write_json(folder / INDEX_NAME, DatasetIndex(spec=SPEC, split={"train": []}, cases={}).to_json())
    return folder


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`export("NET.onnx", …)`: exports the checkpoint with further flags, and returns the output's path."""

    def run(name: str, *flags: object) -> Path:
        output = tmp_path_factory.mktemp("export") / name
        done = export_of(checkpoint, output, *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        return output

    return run


def export_of(checkpoint: Path, output: Path, *flags: object) -> programs.Completed:
    loaded = ("--load_ckpt_path", checkpoint / "checkpoint.pth", "--data_dir", checkpoint)
    return programs.call("main.py", "--exec_mode", "export", *loaded, *FLAGS, "--output", output, *flags)


def logits_of(checkpoint: Path, image: torch.Tensor) -> torch.Tensor:
    """Returns what the checkpoint's network computes."""
    network = build_network(NETWORK, 1, 3)
    network.load_state_dict(torch.load(checkpoint / "checkpoint.pth", weights_only=True))
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(image)
    return logits
