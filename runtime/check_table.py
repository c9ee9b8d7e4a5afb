"""The result of a pre-flight check, and the table of all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

TABLE_WIDTH = 100


@dataclass(frozen=True)
class Check:
    """A row of the table.

    Attributes:
        what: the subject.
        found: its state, with figures.
        verdict: "ok", "warn" or "fail".
        remedy: what to do about it; "" if nothing.
    """

    what: str
    found: str
    verdict: str = "ok"
    remedy: str = ""


def format_table(checks: Sequence[Check]) -> str:
    """Returns the checks in aligned columns, wrapped at 100 characters."""
    width = max((len(check.what) for check in checks), default=0)
    lines = []
    for check in checks:
        start = f"{check.verdict:4}  {check.what:{width}}  "
        lines += textwrap.wrap(
            check.found + (f"; {check.remedy}" if check.remedy else ""),
            TABLE_WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def failures(checks: Sequence[Check]) -> str:
    """Returns what failed and what to do, in one line for a UserError; "" if nothing failed."""
    return " | ".join(f"{check.what}: {check.found}; {check.remedy}" for check in checks if check.verdict == "fail")


def format_size(count: float) -> str:
    """Formats bytes in the largest binary unit that keeps the number at 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
