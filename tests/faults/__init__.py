"""Fault injection: `make faults` injects every fault listed in docs/reliability.md and writes that page's table.

Each kind of fault has a module of functions that return a `Row`; the tests call the same functions with fewer tries.
This package may import every package and program. To add a fault: write a function that returns a `Row` and list it in
`FAULTS` of `__main__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        fault: the injected fault.
        promise: the expected reaction of the program.
        test: the test that injects the fault in `make test`.
        tried, kept: number of injections, and in how many of them the promise held.
        seconds: longest time from the fault to the program's end or recovery; None where it is not measured.
        lost: upper bound of the lost work; "" where no work can be lost.
        failures: one line per broken promise; begins with the name of the try and a colon.
    """

    fault: str
    promise: str
    test: str
    tried: int
    kept: int
    seconds: float | None = None
    lost: str = ""
    failures: tuple[str, ...] = ()


def failed_tries(failures: Sequence[str]) -> int:
    """Returns the number of different tries among the failures, by the text before the colon."""
    return len({failure.split(":")[0] for failure in failures})
