"""User errors are reported in one line with exit status 2, without a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from runtime.output_lock import LOG_LOCK
from tests.common.test_locks import held_elsewhere
from tests.integration.conftest import TINY, Program


def error_line(program: Program, *arguments: object) -> str:
    """Runs the program with bad arguments and returns its one-line error message."""
    done = program(*arguments, ok=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("main.py: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data_dir", "/nowhere"), "no such folder"),
        (("--data_dir", "{data}", "--input_shape", 15, 16, 16), "the nearest is 16 16 16"),
        (("--data_dir", "{data}", "--val_input_shape", 16, 16, 2, "--input_shape", 2, 2, 2), "the nearest is 2 2 4"),
        (("--data_dir", "{data}", "--batch_size", 13), "too few training cases (12) for 1 rank(s) x batch size 13"),
        (("--data_dir", "{data}", "--ga_steps", 7), "an epoch has 6 batches"),
        (("--data_dir", "{data}", "--division", "closed"), "data set balls, not kits19"),
        (("--data_dir", "{data}", "--model", "unet3"), "--model 'unet3': unknown name; available: slicewise, unet3d"),
        (("--data_dir", "{data}", "--model", "unet3d(filter=3)"), "it takes filters"),
        (("--data_dir", "{data}", "--loader", "fast"), "unknown loader; available: device, pytorch, synthetic"),
        (("--data_dir", "{data}", "--benchmark"), "leave nothing to time"),
        (("--data_dir", "{data}", "--load_ckpt_path", "/nowhere.pth"), "no such file"),
        (("--data_dir", "{data}", "--save_ckpt_path", "{data}/dataset.json/c.pth"), "its folder cannot be written"),
        (("--data_dir", "{data}", "--log_dir", "{data}/dataset.json/logs"), "cannot be written"),
        (("@/nowhere.args",), "/nowhere.args"),
    ],
)
def test_bad_arguments_are_reported_in_one_line(
    program: Program, balls: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    given = [str(argument).replace("{data}", str(balls)) for argument in arguments]
    logs = [] if "--log_dir" in given else ["--log_dir", tmp_path / "logs"]
    model, shapes = TINY[:2], TINY[2:]
    assert message in error_line(
        program,
        *(logs + given),
        *(() if "--model" in given else model),
        *(() if "--input_shape" in given else shapes),
    )


def test_the_intended_folder_is_suggested(program: Program, balls: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    shutil.copytree(balls, tmp_path / "outer" / "data")
    assert f"did you mean {tmp_path}/outer/data" in error_line(program, "--data_dir", tmp_path / "outer")
    (tmp_path / "outer" / "data" / "logs").mkdir()
    line = error_line(program, "--data_dir", tmp_path / "outer" / "data" / "logs")
    assert f"did you mean {tmp_path}/outer/data" in line


def test_a_checkpoint_of_another_network(program: Program, balls: Path, trained: Path) -> None:
    arguments = ("--exec_mode", "evaluate", "--data_dir", balls, "--load_ckpt_path", trained / "checkpoint.pth")
    line = error_line(program, *arguments, "--model", "unet3d(filters=(4,16))")
    assert "does not fit the network" in line
    assert "bottleneck" in line


def test_code_in_a_checkpoint_is_not_run(program: Program, balls: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"network": _Touch(marker)}, tmp_path / "hostile.pth")
    arguments = ("--exec_mode", "evaluate", "--data_dir", balls, "--load_ckpt_path", tmp_path / "hostile.pth")
    assert "could run code" in error_line(program, *arguments)
    assert not marker.exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_missing_volume_is_named(program: Program, balls: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(balls, data)
    for path in data.glob("*_x.npy"):
        path.unlink()
    line = error_line(program, "--data_dir", data, "--log_dir", tmp_path / "logs", *TINY)
    assert "_x.npy: missing" in line


def test_too_few_cases_for_the_ranks(program: Program, balls: Path, tmp_path: Path) -> None:
    done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--batch_size", 7, ranks=2, ok=False)
    assert done.returncode != 0
    assert "too few training cases (12) for 2 rank(s) x batch size 7" in done.stderr
    assert "UserError" not in done.stderr


def test_a_log_folder_in_use_is_refused_on_every_rank_and_its_files_stay(
    program: Program, balls: Path, tmp_path: Path
) -> None:
    for name in ("unet3d.log", "log.jsonl", "checkpoint.pth"):
        (tmp_path / name).write_text("of the other run")
    with held_elsewhere(tmp_path / LOG_LOCK) as other:
        done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, ranks=2, ok=False)
        assert done.returncode == 2
        error = f"--log_dir {tmp_path} is in use by another run, process {other.pid} on "
        assert done.stderr.count(error) == 2
    left = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != LOG_LOCK}
    assert left == dict.fromkeys(("unet3d.log", "log.jsonl", "checkpoint.pth"), "of the other run")


@pytest.mark.parametrize(
    ("flag", "values"), [("--model", ["unet"]), ("--input_shape", [7, 7, 7]), ("--loss", ["none"])], ids=str
)
def test_a_mistake_leaves_an_earlier_runs_files_alone(
    program: Program, balls: Path, tmp_path: Path, flag: str, values: list[object]
) -> None:
    for name in ("unet3d.log", "log.jsonl", "checkpoint.pth"):
        (tmp_path / name).write_text("of the earlier run")
    done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, flag, *values, ok=False)
    assert done.returncode == 2
    assert flag in done.stderr
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == dict.fromkeys(("unet3d.log", "log.jsonl", "checkpoint.pth"), "of the earlier run")
