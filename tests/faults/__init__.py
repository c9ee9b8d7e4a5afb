"""`make faults`: injects every fault that docs/reliability.md promises about, and writes that table's figures.

One file a kind of fault, each with functions that return a `Row`; tests call the same functions with fewer tries.
May import every room and the programs. To add one: a function that returns a `Row`, and its line in `__main__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table.

    Attributes:
        fault: what was injected.
        promise: what happens then.
        test: the test that injects it in `make test`.
        tried, kept: how often it was injected, and how often the promise held.
        seconds: the longest that it took from the fault to the program's end or recovery; None: no such time.
        lost: work that was lost at most, "" where none can be.
        failures: a line for each time that the promise did not hold.
    """

    fault: str
    promise: str
    test: str
    tried: int
    kept: int
    seconds: float | None = None
    lost: str = ""
    failures: tuple[str, ...] = ()
