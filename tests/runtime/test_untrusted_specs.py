"""A checkpoint that names `os:system` runs nothing, whatever opens it; a spec repeated as a flag is trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_loading.spec import DatasetSpec
from model.unet3d import Unet3d
from runtime.arguments import RunConfig, parse_arguments
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint.writer import save
from runtime.distributed.world import World
from runtime.run import evaluate_checkpoint
from runtime.train_state import TrainState

CLASSES = ("background", "kidney", "tumour")
SMALL = ["--val_input_shape", "4", "4", "8"]


def tiny(channels: int, classes: int, command: str = "") -> Unet3d:
    """A user's own network, named by its import path."""
    return Unet3d(channels, classes, filters=(3, 4))


@pytest.fixture
def folder(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    cases = {f"case_{n}": (rng.normal(size=(1, 4, 6, 8)), rng.integers(0, 3, (1, 4, 6, 8))) for n in range(2)}
    return write_preprocessed(tmp_path / "data", cases)


@pytest.fixture
def write_checkpoint(tmp_path: Path, make_state: Callable[..., TrainState]) -> Callable[..., Path]:
    """`write_checkpoint(model="os:system(…)")`: a valid checkpoint with these flags."""

    def write(**flags: Any) -> Path:
        state = make_state()
        state.best_epoch, state.best_dice, state.best_network = 1, 0.5, state.network.state_dict()
        config = (
            parse_arguments(["--data_dir", "DATA", "--model", "unet3d(filters=(3,4))", *SMALL])[0].to_json() | flags
        )
        spec = DatasetSpec(name="dummy", classes=CLASSES).to_json()
        path = tmp_path / "checkpoint.pth"
        save(path, checkpoints.snapshot(state, [0.0], config=config, seed=1, data="", spec=spec))
        return path

    return write


def open_with_evaluate(config: RunConfig, given: frozenset[str], world: World, folder: Path) -> None:
    evaluate_checkpoint(config, given, world)


def open_with_predict(config: RunConfig, given: frozenset[str], world: World, folder: Path) -> None:
    from prediction.predict import load_ensemble

    load_ensemble(config, given, world)


def open_with_report(config: RunConfig, given: frozenset[str], world: World, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    from report import cases

    best = SimpleNamespace(epoch=1, per_case={"case_0": [0.5, 0.5]})
    run: Any = SimpleNamespace(best=best, config={"data_dir": str(folder)}, seeds={"master": 1}, folder=folder)
    model = config.model if "model" in given else None
    cpu, path = torch.device("cpu"), config.load_ckpt_path[0]
    cases.draw_cases(run, folder, device=cpu, checkpoint=path, data_dir=folder, model=model)


COMMANDS = [open_with_evaluate, open_with_predict, open_with_report]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "flags",
    [
        {"model": "os:system(command='touch {path}')"},
        {"model": "slicewise(network='os:system(command=\"touch {path}\")')"},
        {"model": "tests.runtime.test_untrusted_specs:tiny"},
        {"loss": "os:system(command='touch {path}')"},
    ],
    ids=str,
)
def test_a_spec_from_a_checkpoint_runs_nothing(
    flags: dict[str, str],
    command: Callable[..., None],
    folder: Path,
    write_checkpoint: Callable[..., Path],
    world: World,
    tmp_path: Path,
) -> None:
    witness = tmp_path / "executed"
    path = write_checkpoint(**{name: spec.format(path=witness) for name, spec in flags.items()})
    arguments = ["--data_dir", str(folder), "--exec_mode", "evaluate", "--load_ckpt_path", str(path)]
    config, given = parse_arguments(arguments)
    (flag,) = flags
    if flag == "loss" and command is not open_with_evaluate:  # commands that compute no loss ignore it
        command(config, given, world, folder)
    else:
        with pytest.raises(
            UserError, match=rf"--{flag} .*comes from a file.*give --{flag} on the command line as well"
        ):
            command(config, given, world, folder)
    assert not witness.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_spec_repeated_on_the_command_line_is_trusted(
    command: Callable[..., None], folder: Path, write_checkpoint: Callable[..., Path], world: World
) -> None:
    spec = "tests.runtime.test_untrusted_specs:tiny"
    path = write_checkpoint(model=spec)
    arguments = ["--data_dir", str(folder), "--exec_mode", "evaluate", "--load_ckpt_path", str(path), "--model", spec]
    config, given = parse_arguments(arguments)
    command(config, given, world, folder)


@pytest.mark.parametrize("value", [3, ["unet3d"], None, {"name": "unet3d"}], ids=str)
def test_a_spec_that_is_not_text_is_one_line(
    value: Any, folder: Path, write_checkpoint: Callable[..., Path], world: World
) -> None:
    path = write_checkpoint(model=value)
    config, given = parse_arguments(
        ["--data_dir", str(folder), "--exec_mode", "evaluate", "--load_ckpt_path", str(path)]
    )
    with pytest.raises(UserError, match="expected a string"):
        open_with_evaluate(config, given, world, folder)
