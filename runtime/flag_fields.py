"""Dataclass fields that describe command-line flags, and the parser that is built from them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common.cli import Parser, number
from common.errors import UserError
from common.registry import Spec

# Names of values in `--help` where a flag has none of its own.
METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME", Spec: "SPEC"}

# Converters of common kinds of numbers.
POSITIVE = number(int, 1)
COUNT = number(int, 0)
SHARE = number(float, 0, 1)
NONNEGATIVE = number(float, 0)


def trusted_spec(text: str) -> Spec:
    """Returns a spec that the user typed: it may import whatever it names."""
    return Spec(text, trusted=True)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Describes one flag; kept in the field's metadata under "flag".

    Attributes:
        help: text of `--help`, to which a default that can be typed is added; "" for a field that is not a flag.
        type: converts one value; by default the field's annotation does.
        choices: the allowed values.
        nargs: number of values; by default that of the annotated tuple.
        metavar: name of a value in `--help`: its unit or kind.
        action: of argparse, for a switch with a negative form.
        aliases: further spellings, such as "-v".
        old: the former spelling, accepted for one version.
        group: title of the section of `--help` that starts with this flag.
        mode: the only `--exec_mode` that takes the flag; "" if all do.
        closed: MLPerf's closed division requires the default.
        network: belongs to a trained network: evaluation and prediction take it from the checkpoint.
        resume: effect of a changed value on a resumed run: "structural" (refused), "order" (reported; the rest of
            the epoch is skipped), "reported", or "incidental" (no result depends on it, not mentioned).
    """

    help: str
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    nargs: str | int | None = None
    metavar: str | tuple[str, ...] | None = None
    action: Any = "store_true"
    aliases: tuple[str, ...] = ()
    old: str = ""
    group: str = ""
    mode: str = ""
    closed: bool = False
    network: bool = False
    resume: Literal["structural", "order", "reported", "incidental"] = "reported"


def flag(default: Any, help: str, **details: Any) -> Any:
    """Returns a dataclass field for a flag.

    Args:
        default: the value where the flag is not given; a function is called for it.
        details: the other attributes of `Flag`.
    """
    if details.get("mode"):
        details["resume"] = "incidental"  # training does not read it
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"flag": Flag(help=help, **details)})


def flag_names(config_class: type, **wanted: Any) -> tuple[str, ...]:
    """Names of the fields whose `Flag` has these attributes, in their order."""
    return tuple(
        one.name
        for one in fields(config_class)
        if all(getattr(one.metadata["flag"], name) == value for name, value in wanted.items())
    )


class ArgumentFileParser(Parser):
    """Reads `@FILE`: flags and their values as a shell splits them, with # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UserError(f"an argument file has the line {arg_line!r}: {error}") from None


def make_parser(config_class: type, prog: str, description: str) -> Parser:
    """Returns the parser for a dataclass of `flag` fields; it sets only what the command line gives."""
    parser = ArgumentFileParser(
        prog=prog,
        description=description,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints = get_type_hints(config_class)
    group: argparse.ArgumentParser | argparse._ArgumentGroup = parser
    for one in fields(config_class):
        described: Flag = one.metadata["flag"]
        group = parser.add_argument_group(described.group) if described.group else group
        if described.help:
            action = group.add_argument(f"--{one.name}", *described.aliases, **_argparse_options(one, hints[one.name]))
            if described.old:
                parser.add_old_spelling(described.old, action)
    return parser


def _argparse_options(one: Field[Any], hint: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field with this annotation."""
    described: Flag = one.metadata["flag"]
    default = _typed_default(one)
    text = f"{described.help} (default: {default})" if default else described.help
    if hint is bool:
        return {"action": described.action, "help": text}
    kind, nargs, members = hint, described.nargs, get_args(hint)
    if members:  # tuple[X, ...], tuple[X, X] or X | None
        kind = members[0]
        if get_origin(hint) is tuple:
            nargs = nargs or ("*" if members[-1] is ... else len(members))
    return {
        "type": described.type or (trusted_spec if kind is Spec else kind),
        "choices": described.choices,
        "nargs": nargs,
        "metavar": described.metavar or (None if described.choices else METAVARS[kind]),
        "help": text,
    }


def _typed_default(one: Field[Any]) -> str:
    """The default as it would be typed; "" where it is the flag's absence."""
    if isinstance(one.default, tuple):
        return " ".join(map(str, one.default))
    return "" if one.default in (MISSING, None) or isinstance(one.default, bool) else str(one.default)
