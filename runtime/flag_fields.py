"""Dataclass fields that describe command-line flags, and the parser that is built from them."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common.cli import Parser, number
from common.errors import UserError
from common.registry import Spec

# Names of values in `--help` where a flag has none of its own.
METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME", Spec: "SPEC"}

# Windows editors begin a file with it.
BYTE_ORDER_MARK = "\ufeff"

# Converters of common kinds of numbers, for the `type` of a flag.
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
        mode: the `--exec_mode` that takes the flag, or several, separated by spaces; "" if all do.
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
    """Returns the names of the fields whose `Flag` has these attribute values, in their order."""
    return tuple(
        f.name
        for f in fields(config_class)
        if all(getattr(f.metadata["flag"], name) == value for name, value in wanted.items())
    )


class ArgumentFileParser(Parser):
    """Reads `@FILE`: flags and their values as a shell splits them, with # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        line = arg_line.removeprefix(BYTE_ORDER_MARK)
        for hash_sign in re.finditer(r"(?:^|(?<=\s))#", line):  # not that of /data/run#3
            with suppress(ValueError):  # within quotes
                return shlex.split(line[: hash_sign.start()])
        try:
            return shlex.split(line)
        except ValueError as error:
            raise UserError(f"an argument file has the line {arg_line!r}: {error}") from None


def read_argument_file(path: Path) -> list[str]:
    """Returns the arguments in a file as `@FILE` reads them; files that are named in it are not read.

    Raises:
        OSError: it cannot be read.
        UserError: it is not UTF-8 text, or a line has an open quotation.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"argument file {path}: not UTF-8 text") from None
    parser = ArgumentFileParser()
    return [argument for line in lines for argument in parser.convert_arg_line_to_args(line)]


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
    for f in fields(config_class):
        meta: Flag = f.metadata["flag"]
        group = parser.add_argument_group(meta.group) if meta.group else group
        if meta.help:
            action = group.add_argument(f"--{f.name}", *meta.aliases, **_argparse_options(f, hints[f.name]))
            if meta.old:
                parser.add_old_spelling(meta.old, action)
    return parser


def _argparse_options(f: Field[Any], hint: Any) -> dict[str, Any]:
    """Returns keyword arguments of `add_argument` for a field with this annotation."""
    meta: Flag = f.metadata["flag"]
    default = _typed_default(f)
    text = f"{meta.help} (default: {default})" if default else meta.help
    if hint is bool:
        return {"action": meta.action, "help": text}
    kind, nargs, members = hint, meta.nargs, get_args(hint)
    if members:  # tuple[X, ...], tuple[X, X] or X | None
        kind = members[0]
        if get_origin(hint) is tuple:
            nargs = nargs or ("*" if members[-1] is ... else len(members))
    return {
        "type": meta.type or (trusted_spec if kind is Spec else kind),
        "choices": meta.choices,
        "nargs": nargs,
        "metavar": meta.metavar or (None if meta.choices else METAVARS[kind]),
        "help": text,
    }


def _typed_default(f: Field[Any]) -> str:
    """Returns the default as a user would type it; "" if the default is to leave the flag out."""
    if isinstance(f.default, tuple):
        return " ".join(map(str, f.default))
    return "" if f.default in (MISSING, None) or isinstance(f.default, bool) else str(f.default)
