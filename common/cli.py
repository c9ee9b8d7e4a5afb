"""Command-line parsing: one-line errors, and old spellings that keep working for one version."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from common.errors import UserError
from common.messages import logger

# The version that drops the old spellings.
REMOVED_IN = "0.3"


# Near flags that are named for a mistyped one.
SUGGESTIONS = 3


class Parser(argparse.ArgumentParser):
    """Reports a command-line mistake as a `UserError` instead of a page of usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown flags at once, here and not in `parse_args`: a subcommand's parser knows its own flags."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = near_flags(unknown, re.findall(r"--[\w-]+", self.format_usage()))
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near}?" if near else ""))
        return known, unknown

    def error(self, message: str) -> NoReturn:
        cause = sys.exception()
        cause = cause.__cause__ or cause.__context__ if isinstance(cause, argparse.ArgumentError) else cause
        if isinstance(cause, OSError):  # the only files that argparse opens
            message = f"argument file {cause.filename}: {cause.strerror}"
        message = message.replace("ignored explicit argument", "takes no value, not")
        raise UserError(f"{message} ({self.prog} --help lists the flags)")

    def add_old_spelling(self, old: str, new: argparse.Action) -> None:
        """Accepts `old`, such as "--subset", for the flag that `add_argument` returned; `--help` does not list it."""
        self.add_argument(old, action=_OldSpelling, new=new, default=argparse.SUPPRESS)


def near_flags(words: Sequence[str], flags: Sequence[str]) -> str:
    """Returns the flags that resemble the mistyped ones among the words, as "--a or --b"; "" if none does.

    Args:
        words: what the parser did not recognise, flags with their values.
        flags: those that exist.
    """
    by_name = {flag.strip("-").replace("-", "_"): flag for flag in flags}
    found: list[str] = []
    for word in words:
        name = word.partition("=")[0].strip("-").lower().replace("-", "_")
        if word.startswith("-") and name:
            longer = [other for other in by_name if other.startswith(f"{name}_")]
            found += [other for other in by_name if "".join(part[0] for part in other.split("_")) == name]
            found += difflib.get_close_matches(name, by_name, n=SUGGESTIONS) or longer[:SUGGESTIONS]
        elif name in by_name:  # without its dashes
            found.append(name)
    return " or ".join(dict.fromkeys(by_name[name] for name in found))


class _OldSpelling(argparse.Action):
    """Warns, then does what the flag under its new name does."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: Any, default: str) -> None:
        super().__init__(
            option_strings,
            new.dest,
            nargs=new.nargs,
            const=new.const,
            default=default,
            type=new.type,
            choices=new.choices,
            help=argparse.SUPPRESS,
            metavar=new.metavar,
        )
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        warn_renamed(str(option), self.new.option_strings[0])
        self.new(parser, namespace, values, option)


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf, *, open_ended: bool = False
) -> Callable[[str], Any]:
    """Returns an argparse `type`: a finite number from `low` to `high`, or below `high` with `open_ended`."""
    limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:.10g}"
    limit = f"at least {low:g} and below {high:g}" if open_ended else limit

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}") from None
        if not low <= value <= high or (open_ended and value == high):
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        return value

    return convert


def renamed_values(flag: str, renamed: Mapping[str, str]) -> Callable[[str], str]:
    """Returns an argparse `type` that replaces old names among a flag's values, and warns about each.

    Args:
        renamed: from old to new; a value may be a spec, whose arguments "(…)" stay as they are.
    """

    def convert(text: str) -> str:
        name, bracket, arguments = text.partition("(")
        if name not in renamed:
            return text
        warn_renamed(f"{flag} {name}", f"{flag} {renamed[name]}")
        return f"{renamed[name]}{bracket}{arguments}"

    return convert


def warn_renamed(old: str, new: str) -> None:
    logger.warning(f"{old} is now {new}; the old spelling will be removed in {REMOVED_IN}")
