"""Every recipe: its commands are valid, its names exist, and its network accepts its windows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import preprocess_dataset
from data_loading.transforms import make_augmentation
from model.losses import build_loss
from model.registry import build_network, check_window
from runtime.arguments import RunConfig, parse_arguments
from runtime.callbacks.base import CALLBACKS
from runtime.logging.base import TRACKERS
from runtime.lr_schedule import LR_SCHEDULES
from runtime.objective import make_objective, split_specs
from tests.integration.conftest import PROJECT

RECIPES = sorted((PROJECT / "recipes").glob("*.args"))
# Placeholders for folders and files in a command.
PLACEHOLDERS = re.compile(r"\b[A-Z][A-Z0-9_]{2,}\b")


def commands(recipe: Path) -> list[list[str]]:
    """Returns the commands in the header comment; joins continued lines."""
    head = [line.removeprefix("#").strip() for line in recipe.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(head).replace("\\\n", " ")
    starts = ("python3 ", "torchrun ", "pip ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(starts)]


def config_of(recipe: Path) -> RunConfig:
    return parse_arguments([f"@{recipe}", "--data_dir", "DATA", "--log_dir", "LOGS"])[0]


def test_there_are_recipes() -> None:
    assert {"hippocampus_exercise", "muscles_ct", "objects_2d", "pancreas_ct"} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_commands_in_its_header_are_valid(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    found = [command for command in commands(recipe) if command[0] != "pip"]
    assert found or recipe.stem == "demo"
    for program, *arguments in found:
        if "main.py" in arguments:
            given = arguments[arguments.index("main.py") + 1 :]
            parse_arguments(given)
            assert all(name == name.upper() or "/" in name for name in PLACEHOLDERS.findall(" ".join(given)))
        elif arguments[0] == "preprocess_dataset.py":
            preprocess_dataset.make_parser().parse_args(arguments[1:])
        elif arguments[:2] == ["-m", "prediction.pseudo_labels"]:
            from prediction.pseudo_labels import make_parser

            make_parser().parse_args(arguments[2:])
        else:
            assert arguments[:1] == ["-m"], (program, arguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_its_names_exist_and_its_network_accepts_its_windows(recipe: Path) -> None:
    config = config_of(recipe)
    for package in ("monai", "torchio"):
        if package in " ".join(map(str, [config.model, config.loss, *config.augment])):
            pytest.importorskip(package, reason=f"pip install '.[{package}]'")
    network = build_network(config.model, 1, 3, normalization=config.normalization, activation=config.activation)
    for flag in ("input_shape", "val_input_shape"):
        check_window(network, getattr(config, flag), f"--{flag}", channels=1, classes=3)
    build_loss(config.loss, config.include_background, 3)
    samples, mixing = split_specs(config.augment)
    make_augmentation(samples)
    make_objective(mixing, config.batch_size, config.compile)
    for specs, table in (
        (config.callbacks, CALLBACKS),
        (config.trackers, TRACKERS),
        ([config.lr_schedule], LR_SCHEDULES),
    ):
        assert {spec.partition("(")[0] for spec in specs} <= set(table)
