"""Old spellings of flags and values: they work, warn in one line each and are absent from --help."""

from __future__ import annotations

import argparse

import pytest

from common.cli import Parser, renamed_values
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
