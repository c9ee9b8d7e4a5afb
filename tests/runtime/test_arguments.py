"""The command line: every flag and its default, argument files, old spellings, and one-line errors."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.registry import Spec
from runtime.arguments import (
    DESCRIPTION,
    NETWORK_FLAGS,
    RunConfig,
    checkpoint_path,
    parse_arguments,
    to_argument_file,
    with_checkpoint_network,
    with_current_names,
)
from runtime.flag_fields import flag_names, make_parser
from runtime.io_flags import parse_interval

DEFAULTS: dict[str, Any] = {
    "data_dir": Path("DATA"),
    "log_dir": Path("/tmp"),
    "compare": (),
    "save_ckpt_path": None,
    "load_ckpt_path": (),
    "init_from": None,
    "freeze": (),
    "exclude": (),
    "folds": 0,
    "fold": None,
    "folds_of": "all",
    "splits": None,
    "resume": False,
    "ckpt_every": "10m",
    "ckpt_keep": 2,
    "loader": "pytorch",
    "local_rank": 0,
    "exec_mode": "train",
    "eval_split": "evaluation",
    "batch_size": 2,
    "ranks_per_sample": 1,
    "ga_steps": 1,
    "epochs": 1,
    "steps_per_epoch": None,
    "evaluate_every": None,
    "start_eval_at": None,
    "eval_ranks": 0,
    "quality_threshold": 0.908,
    "layout": "NCDHW",
    "input_shape": (128, 128, 128),
    "val_input_shape": (128, 128, 128),
    "val_batch_size": 4,
    "seed": -1,
    "num_workers": 8,
    "worker_timeout": 40,
    "stall_timeout": 40,
    "benchmark": False,
    "warmup_steps": 200,
    "prewarm_steps": 1,
    "compile": False,
    "plain_operators": (),
    "amp": False,
    "amp_dtype": "auto",
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "momentum": 0.9,
    "init_learning_rate": 1e-4,
    "lr_warmup_epochs": 0,
    "lr_decay_epochs": (),
    "lr_decay_factor": 1.0,
    "lr_schedule": "multistep",
    "lamb_betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "max_grad_norm": None,
    "ema_decay": None,
    "model": Spec("unet3d", trusted=True),
    "normalization": "instancenorm",
    "activation": "relu",
    "include_background": False,
    "verbose": False,
    "no_report": False,
    "trackers": ("mlperf", "jsonl"),
    "callbacks": (),
    "augment": (Spec("mlperf", trusted=True),),
    "loss": Spec("dice_ce", trusted=True),
    "oversampling": 0.4,
    "class_sampling_weights": (),
    "overlap": 0.5,
    "cudnn_benchmark": False,
    "cudnn_deterministic": False,
    "fuse_norms": True,
    "checkpoint_activations": False,
    "division": "auto",
    "ruleset": "4.0.0",
    "submission_org": "SUBMISSION_ORG_PLACEHOLDER",
    "submission_platform": None,
    "submission_status": "onprem",
    "scan": None,
    "output": None,
    "series": None,
    "checkpoint": "best",
    "test_time_flips": "",
    "save_probabilities": False,
    "max_memory_gb": None,
    "export_window": "fixed",
}

FLAGS = set(DEFAULTS) - {"compare"}  # holds the folders that --log_dir names after the first
OLD = {"--subset", "--untimed_steps"}


PARSER = make_parser(RunConfig, "main.py", DESCRIPTION)
PREDICT = ["--exec_mode", "predict", "--load_ckpt_path", "c", "d", "--scan", "s", "--output", "o"]
EXPORT = ["--exec_mode", "export", "--load_ckpt_path", "c", "--output"]


def parse(*flags: str) -> RunConfig:
    return parse_arguments(["--data_dir", "DATA", *flags])[0]


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)


def test_every_flag_has_its_default() -> None:
    config, given = parse_arguments(["--data_dir", "DATA"])
    assert {field.name: getattr(config, field.name) for field in fields(config)} == DEFAULTS
    assert given == {"data_dir"}


def test_the_command_line_has_these_flags_and_no_others() -> None:
    flags = {flag for action in PARSER._actions for flag in action.option_strings}
    expected = (
        {f"--{name}" for name in FLAGS}
        | OLD
        | {"--eval_every", "-v", "--no-verbose", "--no-fuse_norms", "-h", "--help"}
    )
    assert flags == expected


def test_help_describes_every_flag_and_no_old_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text or f"--{name}\n" in text or f"--{name}]" in text for name in FLAGS)
    assert not any(flag in text for flag in OLD)
    assert all(action.help for action in PARSER._actions)


def test_help_shows_defaults_that_can_be_typed() -> None:
    text = " ".join(PARSER.format_help().split())
    defaults = re.findall(r"\(default: ([^)]*)\)", text)
    assert {"128 128 128", "0.9 0.999", "mlperf jsonl", "unet3d", "mlperf", "0", "0.0", "10m"} <= set(defaults)
    assert not any(re.search(r"None|True|False|\(|\[|Spec", default) for default in defaults)
    assert "()" not in text


def test_metavars_are_units_or_kinds() -> None:
    values = [action for action in PARSER._actions if action.nargs != 0 and not action.choices]
    kinds = {"D", "H", "W", "N", "X", "LR", "DICE", "SHARE", "FACTOR", "EPOCH", "EPOCHS", "INTERVAL", "BETA1", "BETA2"}
    kinds |= {"PATH", "DIR", "NAME", "SPEC", "REGEX", "CASE", "AXES", "GIB", "SECONDS"}
    used = {
        one for action in values for one in ([action.metavar] if isinstance(action.metavar, str) else action.metavar)
    }
    assert used == kinds


GIVEN: list[tuple[list[str], str, Any]] = [
    (["--log_dir", "LOGS"], "log_dir", Path("LOGS")),
    (["--save_ckpt_path", "last.pth"], "save_ckpt_path", Path("last.pth")),
    (["--load_ckpt_path", "a/b.pth"], "load_ckpt_path", (Path("a/b.pth"),)),
    (["--checkpoint", "last"], "checkpoint", "last"),
    (["--resume"], "resume", True),
    (["--ckpt_every", "0.5m"], "ckpt_every", "0.5m"),
    (["--ckpt_every", "2e"], "ckpt_every", "2e"),
    (["--ckpt_every", "never"], "ckpt_every", "never"),
    (["--ckpt_keep", "3"], "ckpt_keep", 3),
    (["--loader", "synthetic"], "loader", "synthetic"),
    (["--local_rank", "3"], "local_rank", 3),
    (["--batch_size", "7"], "batch_size", 7),
    (["--max_grad_norm", "12"], "max_grad_norm", 12.0),
    (["--ema_decay", "0.99"], "ema_decay", 0.99),
    (["--class_sampling_weights", "1", "3.5"], "class_sampling_weights", (1.0, 3.5)),
    (["--test_time_flips", "WD"], "test_time_flips", "WD"),
    (["--ga_steps", "4"], "ga_steps", 4),
    (["--epochs", "4000"], "epochs", 4000),
    (["--evaluate_every", "20"], "evaluate_every", 20),
    (["--eval_every", "21"], "evaluate_every", 21),
    (["--eval_ranks", "96"], "eval_ranks", 96),
    (["--start_eval_at", "1000"], "start_eval_at", 1000),
    (["--quality_threshold", "0.9"], "quality_threshold", 0.9),
    (["--layout", "NDHWC"], "layout", "NDHWC"),
    (["--input_shape", "64", "32", "96"], "input_shape", (64, 32, 96)),
    (["--val_input_shape", "64", "32", "96"], "val_input_shape", (64, 32, 96)),
    (["--seed", "0"], "seed", 0),
    (["--seed", str(2**31 - 1)], "seed", 2**31 - 1),
    (["--num_workers", "0"], "num_workers", 0),
    (["--worker_timeout", "300"], "worker_timeout", 300),
    (["--stall_timeout", "1"], "stall_timeout", 1),
    (["--benchmark"], "benchmark", True),
    (["--warmup_steps", "0"], "warmup_steps", 0),
    (["--amp"], "amp", True),
    (["--amp", "--amp_dtype", "fp16"], "amp_dtype", "fp16"),
    (["--optimizer", "lamb"], "optimizer", "lamb"),
    (["--learning_rate", "2e-1"], "learning_rate", 0.2),
    (["--momentum", "0"], "momentum", 0.0),
    (["--init_learning_rate", "0.01"], "init_learning_rate", 0.01),
    (["--lr_warmup_epochs", "1000"], "lr_warmup_epochs", 1000),
    (["--lr_decay_epochs", "3", "5"], "lr_decay_epochs", (3, 5)),
    (["--lr_decay_epochs"], "lr_decay_epochs", ()),
    (["--lr_decay_factor", "0.1"], "lr_decay_factor", 0.1),
    (["--optimizer", "lamb", "--lamb_betas", "0.85", "0.9"], "lamb_betas", (0.85, 0.9)),
    (["--optimizer", "lamb", "--lamb_betas", "0", "0"], "lamb_betas", (0.0, 0.0)),
    (["--weight_decay", "0.01"], "weight_decay", 0.01),
    (["--model", "unet3d(filters=(4, 8))"], "model", Spec("unet3d(filters=(4, 8))", trusted=True)),
    (["--loss", "dice"], "loss", Spec("dice", trusted=True)),
    (
        ["--augment", "mlperf", "rot90(p=1)"],
        "augment",
        (Spec("mlperf", trusted=True), Spec("rot90(p=1)", trusted=True)),
    ),
    (["--augment"], "augment", ()),
    (["--normalization", "batchnorm"], "normalization", "batchnorm"),
    (["--activation", "leaky_relu"], "activation", "leaky_relu"),
    (["--include_background"], "include_background", True),
    (["--verbose"], "verbose", True),
    (["-v"], "verbose", True),
    (["--trackers", "jsonl", "wandb(project='kits')"], "trackers", ("jsonl", "wandb(project='kits')")),
    (["--trackers"], "trackers", ()),
    (["--callbacks", "top_k(k=1)", "lr_monitor"], "callbacks", ("top_k(k=1)", "lr_monitor")),
    (["--steps_per_epoch", "50"], "steps_per_epoch", 50),
    (["--init_from", "c.pth"], "init_from", Path("c.pth")),
    (["--exclude", "23", "case_00068"], "exclude", ("23", "case_00068")),
    (["--freeze", "input_block.*", "all_but_output"], "freeze", ("input_block.*", "all_but_output")),
    (["--lr_schedule", "plateau(factor=0.5)"], "lr_schedule", "plateau(factor=0.5)"),
    (["-v", "--no-verbose"], "verbose", False),
    (["--no_report"], "no_report", True),
    (["--oversampling", "1"], "oversampling", 1.0),
    (["--overlap", "0"], "overlap", 0.0),
    (["--cudnn_benchmark"], "cudnn_benchmark", True),
    (["--cudnn_deterministic"], "cudnn_deterministic", True),
    (["--no-fuse_norms"], "fuse_norms", False),
    (["--checkpoint_activations"], "checkpoint_activations", True),
    (["--division", "closed"], "division", "closed"),
    (["--submission_org", "ACME"], "submission_org", "ACME"),
    (["--submission_platform", "2xABACUS"], "submission_platform", "2xABACUS"),
    (["--submission_status", "research"], "submission_status", "research"),
    (["--exec_mode", "evaluate", "--load_ckpt_path", "c.pth"], "exec_mode", "evaluate"),
]


@pytest.mark.parametrize(("flags", "name", "value"), GIVEN, ids=[" ".join(flags) for flags, _, _ in GIVEN])
def test_a_flag_sets_its_field(flags: list[str], name: str, value: Any) -> None:
    config, given = parse_arguments(["--data_dir", "DATA", *flags])
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert name in given
    others = set(given) - {name, "data_dir"}
    assert all(getattr(config, other) == DEFAULTS[other] for other in set(DEFAULTS) - others - {name})


def test_torchruns_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "5")
    config, given = parse_arguments(["--data_dir", "DATA"])
    assert config.local_rank == 5
    assert "local_rank" not in given
    assert parse("--local_rank", "1").local_rank == 1
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(UserError, match="--local_rank: must be an integer, not 'first'"):
        parse()


def test_a_containers_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET3D_DATA_DIR", "/data")
    monkeypatch.setenv("UNET3D_LOG_DIR", "/results")
    config, given = parse_arguments([])
    assert (config.data_dir, config.log_dir, given) == (Path("/data"), Path("/results"), frozenset())
    assert parse_arguments(["--data_dir", "own"])[0].data_dir == Path("own")


def test_verbose_is_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert parse().verbose is True
    assert parse("--no-verbose").verbose is False


def test_synthetic_training_needs_no_data() -> None:
    assert parse_arguments(["--loader", "synthetic"])[0].loader == "synthetic"


def test_flags_count_as_given_even_if_they_equal_the_default() -> None:
    _, given = parse_arguments(["--data_dir", "DATA", "--overlap", "0.5", "--eval_every", "2", "--no-verbose"])
    assert given == {"data_dir", "overlap", "evaluate_every", "verbose"}


# Argument files


def test_an_argument_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.args"
    recipe.write_text(
        "# one GPU\n"
        "\n"
        "--amp\n"
        "--batch_size 7   # as many as fit\n"
        "--input_shape 64 64 64\n"
        "  --model 'unet3d(filters=(4, 8))'\n"
        '--submission_platform "2 x ABACUS #1"   # "of two\n'
        "--log_dir /data/run#3\n"
    )
    config, given = parse_arguments(["--data_dir", "DATA", f"@{recipe}", "--ga_steps", "2"])
    assert (config.amp, config.batch_size, config.input_shape, config.ga_steps) == (True, 7, (64, 64, 64), 2)
    assert config.model.text == "unet3d(filters=(4, 8))"
    assert config.submission_platform == "2 x ABACUS #1"
    assert config.log_dir == Path("/data/run#3")
    named = {"data_dir", "amp", "batch_size", "input_shape", "model", "submission_platform", "log_dir", "ga_steps"}
    assert given == named


def test_the_later_flag_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.args"
    recipe.write_text("--epochs 10\n")
    assert parse(f"@{recipe}", "--epochs", "3").epochs == 3
    assert parse("--epochs", "3", f"@{recipe}").epochs == 10


def test_an_argument_file_may_name_another(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.args", tmp_path / "outer.args"
    inner.write_text("--epochs 10\n--batch_size 3\n")
    outer.write_text(f"@{inner}\n--epochs 20\n")
    config = parse(f"@{outer}")
    assert (config.epochs, config.batch_size) == (20, 3)


def test_quotes_within_quotes_survive(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.args"
    recipe.write_text("""--model "net(name='a b', text='# no comment')"\n--submission_org 'the "best"'\n""")
    config = parse(f"@{recipe}")
    assert config.model.text == "net(name='a b', text='# no comment')"
    assert config.submission_org == 'the "best"'


def one_line(error: UserError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("--model 'unet3d\n", "No closing quotation"),
        ("--batch_size 0\n", "--batch_size: must be at least 1, not 0"),
        ("--no_such_flag\n", "unrecognized arguments: --no_such_flag"),
        ("--learnig_rate 1\n", "unrecognized arguments: --learnig_rate 1; did you mean --learning_rate"),
    ],
)
def test_a_mistake_in_an_argument_file(content: str, expected: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.args"
    recipe.write_text(content)
    with pytest.raises(UserError) as caught:
        parse(f"@{recipe}")
    assert expected in one_line(caught.value)


@pytest.mark.parametrize(("name", "problem"), [("none.args", "No such file or directory"), (".", "Is a directory")])
def test_an_argument_file_that_cannot_be_read(name: str, problem: str, tmp_path: Path) -> None:
    outer = tmp_path / "outer.args"
    outer.write_text(f"@{tmp_path / name}\n")
    for arguments in ([f"@{tmp_path / name}"], [f"@{outer}"]):
        with pytest.raises(UserError, match=f"^argument file {tmp_path / name}: {problem} "):
            parse(*arguments)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_argument_file_as_windows_writes_it(newline: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.args"
    recipe.write_text(f"--epochs 10{newline}--batch_size 3{newline}", encoding="utf-8-sig", newline="")
    config = parse(f"@{recipe}")
    assert (config.epochs, config.batch_size) == (10, 3)
    recipe.write_text(f"# a comment{newline}--epochs 10{newline}", encoding="utf-8-sig", newline="")
    assert parse(f"@{recipe}").epochs == 10
    recipe.write_text(f"--epochs 10{newline}", encoding="utf-16", newline="")
    with pytest.raises(UserError, match="an argument file is not UTF-8 text; save it as UTF-8"):
        parse(f"@{recipe}")


# Mistakes


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ckpt_every", "10"], "'10' is neither minutes (10m), nor epochs (2e), nor never"),
        (["--ckpt_every", "0m"], "'0m' is neither"),
        (["--ckpt_every", "0e"], "'0e' is neither"),
        (["--ckpt_every", "1.5e"], "'1.5e' is neither"),
        (["--ckpt_every", "-1m"], "expected one argument"),
        (["--ckpt_every", "10 m"], "'10 m' is neither"),
        (["--ckpt_every", "10s"], "'10s' is neither"),
        (["--ckpt_keep", "0"], "must be at least 1, not 0"),
        (["--batch_size", "0"], "must be at least 1, not 0"),
        (["--batch_size", "-1"], "must be at least 1, not -1"),
        (["--batch_size", "two"], "must be an integer, not 'two'"),
        (["--batch_size", "1.5"], "must be an integer, not '1.5'"),
        (["--ga_steps", "0"], "must be at least 1, not"),
        (["--epochs", "0"], "must be at least 1, not"),
        (["--evaluate_every", "0"], "must be at least 1, not"),
        (["--start_eval_at", "0"], "must be at least 1, not"),
        (["--quality_threshold", "1.1"], "must be between 0 and 1, not 1.1"),
        (["--quality_threshold", "nan"], "must be between 0 and 1, not nan"),
        (["--layout", "NHWC"], "invalid choice: 'NHWC'"),
        (["--input_shape", "64", "64"], "expected 3 arguments"),
        (["--input_shape", "64", "64", "0"], "must be at least 1, not"),
        (["--val_input_shape", "64", "64", "-64"], "must be at least 1, not"),
        (["--seed", "-2"], "must be between -1 and 2147483647, not"),
        (["--seed", str(2**31)], "must be between -1 and 2147483647, not"),
        (["--num_workers", "-1"], "must be at least 0, not"),
        (["--worker_timeout", "0"], "must be at least 1, not"),
        (["--stall_timeout", "0.5"], "must be an integer, not"),
        (["--warmup_steps", "-1"], "must be at least 0, not"),
        (["--local_rank", "-1"], "must be at least 0, not"),
        (["--amp_dtype", "fp8"], "invalid choice"),
        (["--optimizer", "rmsprop"], "invalid choice"),
        (["--learning_rate", "-1"], "must be at least 0, not"),
        (["--learning_rate", "fast"], "must be a number, not 'fast'"),
        (["--learning_rate", "nan"], "must be at least 0, not"),
        (["--momentum", "1.5"], "must be between 0 and 1, not"),
        (["--lr_warmup_epochs", "-1"], "must be at least 0, not"),
        (["--lr_decay_epochs", "0"], "must be at least 1, not"),
        (["--lr_decay_factor", "-0.1"], "must be at least 0, not"),
        (["--optimizer", "lamb", "--lamb_betas", "0.9"], "expected 2 arguments"),
        (["--optimizer", "lamb", "--lamb_betas", "0.9", "1"], "must be at least 0 and below 1, not 1"),
        (["--weight_decay", "-1"], "must be at least 0, not"),
        (["--normalization", "groupnorm"], "invalid choice"),
        (["--activation", "gelu"], "invalid choice"),
        (["--oversampling", "1.1"], "must be between 0 and 1, not"),
        (["--overlap", "1.5"], "must be between 0 and 1, not"),
        (["--overlap", "-0.1"], "must be between 0 and 1, not"),
        (["--ruleset", "4.1.0"], "invalid choice: '4.1.0'"),
        (["--division", "third"], "invalid choice"),
        (["--submission_status", "lab"], "invalid choice"),
        (["--exec_mode", "train_and_evaluate"], "invalid choice"),
        (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
        (["stray"], "unrecognized arguments: stray"),
        (["--batch", "4"], "unrecognized arguments: --batch"),  # no guessing at shortened flags
        (["--epochs"], "expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_is_one_line_that_names_the_flag(flags: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*flags)
    message = one_line(caught.value)
    assert expected in message
    assert flags[-1] in message or any(flag in message for flag in flags if flag.startswith("--"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--exec_mode", "evaluate"], "--exec_mode evaluate needs --load_ckpt_path"),
        (["--exec_mode", "evaluate", "--load_ckpt_path", "c", "--benchmark"], "--benchmark measures training"),
        (["--exec_mode", "predict"], "--exec_mode predict needs --load_ckpt_path"),
        (["--exec_mode", "predict", "--load_ckpt_path", "c", "--output", "o"], "--exec_mode predict needs --scan"),
        (["--exec_mode", "predict", "--load_ckpt_path", "c", "--scan", "s"], "--exec_mode predict needs --output"),
        ([*PREDICT, "--benchmark"], "--benchmark measures training"),
        (["--load_ckpt_path", "c", "d"], "only --exec_mode evaluate and predict take several checkpoints"),
        (["--eval_ranks", "-1"], "argument --eval_ranks: "),
        (["--eval_ranks", "1", "--exec_mode", "evaluate", "--load_ckpt_path", "c"], "applies only to training"),
        ([*PREDICT, "--eval_ranks", "1"], "--eval_ranks 1 applies only to training: with --exec_mode predict"),
        (["--eval_ranks", "1", "--benchmark"], "--eval_ranks 1: nothing is evaluated with --benchmark"),
        (["--eval_ranks", "1", "--loader", "synthetic"], "nothing is evaluated with --loader synthetic"),
        (["--eval_ranks", "1", "--lr_schedule", "plateau(patience=2)"], "--lr_schedule plateau would depend on when"),
        (["--eval_ranks", "1", "--callbacks", "top_k(k=3)"], "--callbacks top_k(k=3) needs the weights of the"),
        (["--eval_ranks", "1", "--callbacks", "lr_monitor", "train_dice"], "--callbacks train_dice needs the weights"),
        (["--output", "o"], "--output requires --exec_mode predict or export, not train"),
        (
            [
                "--exec_mode",
                "export",
                "--load_ckpt_path",
                "c",
                "--output",
                "n.safetensors",
                "--export_window",
                "dynamic",
            ],
            "--export_window: a .safetensors file holds weights alone",
        ),
        ([*PREDICT, "--export_window", "dynamic"], "--export_window requires --exec_mode export, not predict"),
        (["--exec_mode", "export", "--output", "o"], "--exec_mode export needs --load_ckpt_path"),
        (["--exec_mode", "export", "--load_ckpt_path", "c"], "--exec_mode export needs --output"),
        ([*EXPORT, "NET.pth"], "--output NET.pth: unknown format .pth; give a .onnx or .safetensors file, or a folder"),
        ([*EXPORT, "o.onnx", "--scan", "s"], "--scan requires --exec_mode predict, not export"),
        (["--scan", "s"], "--scan requires --exec_mode predict, not train"),
        (["--eval_split", "test"], "--eval_split requires --exec_mode evaluate, not train"),
        ([*PREDICT, "--eval_split", "test"], "--eval_split requires --exec_mode evaluate, not predict"),
        (["--exec_mode", "evaluate", "--load_ckpt_path", "c", "--eval_split", "all"], "invalid choice: 'all'"),
        (["--amp_dtype", "bf16"], "--amp_dtype bf16 has no effect without --amp"),
        (["--lamb_betas", "0.9", "0.99"], "--lamb_betas applies only to --optimizer lamb, not to sgd"),
        (["--optimizer", "adam", "--lamb_betas", "0.9", "0.99"], "not to adam"),
        (["--lr_decay_epochs", "5", "3"], "--lr_decay_epochs must be in increasing order"),
        (["--lr_decay_epochs", "5", "5"], "--lr_decay_epochs must be in increasing order"),
        (["--cudnn_benchmark", "--cudnn_deterministic"], "drop one of them"),
        (["--overlap", "1"], "--overlap 1: windows must advance"),
        (["--save_ckpt_path", "."], "is a folder; give a file"),
        (["--resume", "--ckpt_every", "never"], "--resume needs checkpoints, but with --ckpt_every never or"),
        (["--resume", "--benchmark"], "--resume needs checkpoints"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictions_are_refused(flags: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*flags)
    assert expected in one_line(caught.value)


def test_prediction_needs_no_data_and_takes_several_checkpoints() -> None:
    config, given = parse_arguments([*PREDICT, "--test_time_flips", "HW", "--max_memory_gb", "0.5", "--series", "4"])
    assert config.load_ckpt_path == (Path("c"), Path("d"))
    assert (config.scan, config.output, config.series) == (Path("s"), Path("o"), "4")
    assert (config.test_time_flips, config.max_memory_gb) == ("HW", 0.5)
    assert "data_dir" not in given
    assert config.to_json()["load_ckpt_path"] == ("c", "d")


@pytest.mark.parametrize("axes", ["DD", "X", "d"])
def test_flips_are_along_axes(axes: str) -> None:
    with pytest.raises(UserError, match=r"--test_time_flips: .*expected some of D, H and W"):
        parse(*PREDICT, "--test_time_flips", axes)


def test_amp_dtype_auto_is_no_contradiction() -> None:
    assert parse("--amp_dtype", "auto").amp is False


def test_a_report_takes_several_log_folders_and_needs_no_data() -> None:
    config, _ = parse_arguments(["--exec_mode", "report", "--log_dir", "L1", "L2", "L3"])
    assert (config.log_dir, config.compare) == (Path("L1"), (Path("L2"), Path("L3")))
    with pytest.raises(UserError, match=r"^--log_dir: only --exec_mode report takes several folders"):
        parse("--log_dir", "L1", "L2")


@pytest.mark.parametrize("flags", [[], ["--exec_mode", "evaluate", "--loader", "synthetic", "--load_ckpt_path", "c"]])
def test_data_dir_is_required(flags: list[str]) -> None:
    with pytest.raises(UserError, match="--data_dir is required"):
        parse_arguments(flags)


def test_a_checkpoint_path_in_a_folder_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    assert parse("--save_ckpt_path", str(path)).save_ckpt_path == path
    with pytest.raises(UserError, match=r"is a folder; give a file, such as .*checkpoint\.pth"):
        parse("--save_ckpt_path", str(tmp_path))


# Where and when to save


@pytest.mark.parametrize(
    ("text", "interval"),
    [("10m", (10.0, 0)), ("0.5m", (0.5, 0)), ("2e", (0.0, 2)), ("10e", (0.0, 10)), ("never", (0.0, 0))],
)
def test_an_interval_is_minutes_or_epochs(text: str, interval: tuple[float, int]) -> None:
    assert parse_interval(text) == interval


def test_a_run_keeps_its_checkpoints_beside_its_logs_by_default() -> None:
    own = Path("elsewhere/c.pth")
    assert checkpoint_path(parse("--log_dir", "LOGS")) == Path("LOGS/checkpoint.pth")
    assert checkpoint_path(parse("--ckpt_every", "never")) is None
    assert checkpoint_path(parse("--benchmark")) is None, "writing would be timed"
    for flags in ((), ("--ckpt_every", "never"), ("--benchmark",), ("--resume", "--ckpt_every", "never")):
        assert checkpoint_path(parse("--save_ckpt_path", str(own), *flags)) == own


# Old spellings


@pytest.mark.parametrize(
    ("old", "new", "name", "value"),
    [
        ("--untimed_steps 3", "--prewarm_steps", "prewarm_steps", 3),
        ("--exec_mode evaluate --load_ckpt_path c --subset test", "--eval_split", "eval_split", "test"),
    ],
)
def test_an_old_flag_works_and_warns(
    old: str, new: str, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config, given = parse_arguments(["--data_dir", "DATA", *old.split()])
    assert getattr(config, name) == value
    assert name in given
    flag = old.split()[-2]
    expected = f"warning: {flag} is now {new}; the old spelling will be removed in 0.3\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("old", "new"), [("rate_monitor", "lr_monitor"), ("training_dice(every=2)", "train_dice(every=2)")]
)
def test_an_old_callback_works_and_warns(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--callbacks", "top_k", old).callbacks == ("top_k", new)
    names = [spec.partition("(")[0] for spec in (old, new)]
    expected = (
        f"warning: --callbacks {names[0]} is now --callbacks {names[1]}; the old spelling will be removed in 0.3\n"
    )
    assert capsys.readouterr().err == expected


def test_a_stored_configuration_gets_the_present_names() -> None:
    stored = {"subset": "test", "untimed_steps": 3, "epochs": 5}
    assert with_current_names(stored) == {"eval_split": "test", "prewarm_steps": 3, "epochs": 5}


# Tables made from the flags' descriptions


def test_flags_of_other_modes() -> None:
    predict = {"scan", "series", "save_probabilities", "max_memory_gb"}
    assert set(flag_names(RunConfig, mode="predict")) == predict
    assert flag_names(RunConfig, mode="predict export") == ("output",)
    assert flag_names(RunConfig, mode="evaluate") == ("eval_split",)
    assert flag_names(RunConfig, mode="export") == ("export_window",)


def test_structural_flags() -> None:
    expected = {"model", "normalization", "activation", "optimizer", "freeze", "exclude", "folds", "fold", "folds_of"}
    assert set(flag_names(RunConfig, resume="structural")) == expected


def test_order_flags() -> None:
    assert set(flag_names(RunConfig, resume="order")) == {
        *("batch_size", "ga_steps", "loader", "ranks_per_sample", "steps_per_epoch")
    }


INCIDENTAL = """
    data_dir log_dir save_ckpt_path load_ckpt_path init_from resume ckpt_every ckpt_keep local_rank exec_mode eval_split
    seed num_workers worker_timeout stall_timeout verbose no_report compare trackers prewarm_steps val_batch_size
    submission_org submission_platform submission_status division scan output series checkpoint
    save_probabilities max_memory_gb eval_ranks splits checkpoint_activations export_window
"""
REPORTED = """
    epochs evaluate_every start_eval_at quality_threshold layout input_shape val_input_shape benchmark warmup_steps
    compile plain_operators amp amp_dtype learning_rate momentum init_learning_rate lr_warmup_epochs lr_decay_epochs
    lr_decay_factor
    lr_schedule lamb_betas weight_decay loss include_background callbacks augment oversampling overlap cudnn_benchmark
    cudnn_deterministic fuse_norms ruleset max_grad_norm ema_decay class_sampling_weights test_time_flips
"""


def test_incidental_flags() -> None:
    assert set(flag_names(RunConfig, resume="incidental")) == set(INCIDENTAL.split())


def test_reported_flags() -> None:
    assert set(flag_names(RunConfig, resume="reported")) == set(REPORTED.split())


# A checkpoint's configuration


STORED: dict[str, Any] = {
    "model": "unet3d(filters=(4,8))",
    "normalization": "batchnorm",
    "activation": "leaky_relu",
    "loss": "dice",
    "include_background": True,
    "layout": "NDHWC",
    "val_input_shape": (16, 16, 32),
    "overlap": 0.25,
    "test_time_flips": "HW",
    "amp": True,
    "amp_dtype": "bf16",
}


def test_evaluation_takes_the_network_from_the_checkpoint() -> None:
    assert set(STORED) == set(NETWORK_FLAGS)
    run = {"batch_size": 64, "data_dir": "elsewhere", "seed": 5, "exec_mode": "train", "num_workers": 3}
    config, given = parse_arguments(["--data_dir", "DATA", "--exec_mode", "evaluate", "--load_ckpt_path", "c"])
    taken = with_checkpoint_network(config, given, {**STORED, **run})
    untrusted = {name: Spec(STORED[name]) for name in ("model", "loss")}
    assert {name: getattr(taken, name) for name in STORED} == STORED | untrusted
    assert not taken.model.trusted
    assert not taken.loss.trusted
    assert {name: getattr(taken, name) for name in run} == {name: getattr(config, name) for name in run}


def test_given_flags_win_over_the_checkpoint() -> None:
    config, given = parse_arguments(
        ["--data_dir", "DATA", "--exec_mode", "evaluate", "--load_ckpt_path", "c", "--overlap", "0.5"]
    )
    taken = with_checkpoint_network(config, given, STORED)
    assert taken.overlap == 0.5
    assert taken.val_input_shape == (16, 16, 32)


def test_a_foreign_checkpoint_stores_nothing() -> None:
    config, given = parse_arguments(["--data_dir", "DATA"])
    assert with_checkpoint_network(config, given, {}) == config


def test_to_json_is_plain_python() -> None:
    record = parse("--save_ckpt_path", "c.pth", "--model", "unet3d(filters=(4,8))").to_json()
    assert set(record) == set(DEFAULTS)
    assert (record["data_dir"], record["save_ckpt_path"], record["load_ckpt_path"]) == ("DATA", "c.pth", ())
    assert type(record["augment"][0]) is str
    assert {type(value) for value in record.values()} <= {str, int, float, bool, tuple, type(None)}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--amp", "--augment", "flips(p=0.5)", "mixup(alpha=0.2)", "--model", "unet3d(filters=(4, 8))"),
        ("--augment", "--callbacks", "top_k(k=2)", "--input_shape", "16", "32", "64", "--log_dir", "my logs"),
        ("--optimizer", "lamb", "--lamb_betas", "0.8", "0.99", "--init_from", "it's.pth", "--freeze", "encoder.*"),
        ("--no-fuse_norms", "--no-verbose"),
    ],
)
def test_the_argument_file_of_a_run_repeats_it(flags: tuple[str, ...], tmp_path: Path) -> None:
    config = parse(*flags)
    (tmp_path / "run.args").write_text(to_argument_file(config, 4711))
    read, _ = parse_arguments([f"@{tmp_path / 'run.args'}"])
    paths = {name: getattr(config, name).absolute() for name in ("data_dir", "log_dir")}
    paths |= {"init_from": config.init_from.absolute()} if config.init_from else {}
    assert read == replace(config, seed=4711, **paths)


def test_defaults_stand_in_the_argument_file_as_comments() -> None:
    lines = to_argument_file(parse("--epochs", "7"), 5).splitlines()
    assert {"--epochs 7", "--seed 5", "# --batch_size 2", "# --model unet3d"} <= set(lines)
    assert not any("resume" in line or "scan" in line or "local_rank" in line for line in lines)


def test_a_run_without_data_repeats_without_data(tmp_path: Path) -> None:
    config, _ = parse_arguments(["--loader", "synthetic"])
    (tmp_path / "run.args").write_text(to_argument_file(config, 1))
    assert parse_arguments([f"@{tmp_path / 'run.args'}"])[0].data_dir == config.data_dir


def test_an_argument_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.args").write_text("--epochs 7\n", encoding="utf-8-sig")
    assert parse(f"@{tmp_path / 'a.args'}").epochs == 7
