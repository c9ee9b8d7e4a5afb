"""Old spellings of flags and values work, warn in one line each and are absent from --help; near flags are named."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from common.cli import Parser, near_flags, number, renamed_values
from common.errors import UserError


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="program", argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("group")
    parser.add_old_spelling("--old_number", group.add_argument("--number", type=int))
    parser.add_old_spelling("--old_pair", group.add_argument("--pair", type=float, nargs=2))
    parser.add_old_spelling("--old_switch", group.add_argument("--switch", action="store_true"))
    renamed = renamed_values("--mode", {"rate": "lr"})
    parser.add_old_spelling("--old_mode", group.add_argument("--mode", type=renamed, choices=("lr", "lr(a=1)", "b")))
    return parser


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("--old_number 3", {"number": 3}),
        ("--old_pair 1 2", {"pair": [1.0, 2.0]}),
        ("--old_switch", {"switch": True}),
        ("--old_mode b", {"mode": "b"}),
    ],
)
def test_an_old_spelling_works_and_warns_once(
    line: str, values: dict[str, object], parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vars(parser.parse_args(line.split())) == values
    old = line.split()[0]
    new = old.replace("old_", "")
    expected = f"warning: {old} is now {new}; the old spelling will be removed in 0.3\n"
    assert capsys.readouterr().err == expected
    assert vars(parser.parse_args([new, *line.split()[1:]])) == values
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("old", "new"), [("rate", "lr"), ("rate(a=1)", "lr(a=1)")])
def test_an_old_value_works_and_warns_once(
    old: str, new: str, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.parse_args(["--mode", old]).mode == new
    expected = "warning: --mode rate is now --mode lr; the old spelling will be removed in 0.3\n"
    assert capsys.readouterr().err == expected


def test_help_lists_no_old_spelling(parser: Parser) -> None:
    assert "--number" in parser.format_help()
    assert "old" not in parser.format_help()


def test_a_bad_value_is_refused_under_an_old_spelling_too(parser: Parser) -> None:
    with pytest.raises(UserError, match="--old_number: invalid int value: 'x'"):
        parser.parse_args(["--old_number", "x"])


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--learnig_rate", "1"], "--learning_rate"),
        (["--learning-rate=1"], "--learning_rate"),
        (["-Batch_size", "2"], "--batch_size"),
        (["--lr", "1"], "--learning_rate or --lr_schedule"),
        (["batch_size=2"], "--batch_size"),
        (["--epoch", "3", "--bach_size", "2"], "--epochs or --batch_size"),
        (["--unlike"], ""),
        (["learnig_rate", "-1"], ""),
    ],
)
def test_flags_near_a_mistyped_one(words: list[str], near: str) -> None:
    assert near_flags(words, ["--learning_rate", "--batch_size", "--epochs", "--lr_schedule", "--verbose"]) == near


def test_the_nearest_of_a_switch_and_its_opposite_comes_first() -> None:
    switches = ["--verbose", "--no-verbose"]
    assert near_flags(["--no_verbose"], switches) == "--no-verbose or --verbose"
    assert near_flags(["--verbos"], switches) == "--verbose or --no-verbose"


def test_a_mistyped_flag_names_those_of_its_command(parser: Parser) -> None:
    with pytest.raises(UserError, match=r"^unrecognized arguments: --numbr 3; did you mean --number\?"):
        parser.parse_args(["--numbr", "3"])
    with pytest.raises(UserError, match=r"unrecognized arguments: --old_swich; did you mean --switch\? \("):
        parser.parse_args(["--old_swich"])
    parser.add_argument("--colour", action=argparse.BooleanOptionalAction)
    with pytest.raises(UserError, match=r"--no_colour; did you mean --no-colour or --colour\?"):
        parser.parse_args(["--no_colour"])


def test_a_switch_takes_no_value(parser: Parser) -> None:
    with pytest.raises(UserError, match=r"^argument --switch: takes no value, not '1'"):
        parser.parse_args(["--switch=1"])


def test_a_subcommand_names_its_own_flags() -> None:
    program = Parser(prog="program")
    commands = program.add_subparsers()
    commands.add_parser("pack").add_argument("--nodes")
    commands.add_parser("score").add_argument("--notes")
    with pytest.raises(UserError, match=r"arguments: --noeds 2; did you mean --nodes\? \(program pack --help"):
        program.parse_args(["pack", "--noeds", "2"])


@pytest.mark.parametrize(
    ("converter", "text", "limit"),
    [
        (number(int, 1), "0", "must be at least 1, not 0"),
        (number(float, 0.1), "inf", "must be finite, not inf"),
        (number(int, -1, 2**31 - 1), "-2", "must be between -1 and 2147483647, not -2"),
        (number(float, 0, 1, open_ended=True), "1", "must be at least 0 and below 1, not 1"),
    ],
)
def test_limits_read_as_they_are_typed(converter: Callable[[str], object], text: str, limit: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        converter(text)
    assert str(caught.value) == limit
