"""Progress of anything that takes more than a few seconds: a bar on a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from tqdm import tqdm

from common.messages import is_main_rank

T = TypeVar("T")
INTERVAL_S = 30.0


class Progress(Protocol):
    """What a `tqdm` bar and `ProgressLines` have in common. `n` is the number of units done."""

    n: float

    def update(self, n: float = 1) -> object: ...

    def set_description(self, desc: str) -> object: ...

    def set_postfix_str(self, s: str, refresh: bool = True) -> object: ...

    def close(self) -> object: ...


class ProgressLines:
    """Prints `evaluate: 12 of 42 cases, 1:31 elapsed, 3:47 left` on stderr, at most once every `INTERVAL_S`.

    A task that is finished sooner prints nothing; neither does any rank but rank 0.
    """

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.n: float = 0
        self._total, self._desc = total, desc
        self._units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
        self._postfix = ""
        self._started_at = self._printed_at = time.monotonic()

    def update(self, n: float = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self._printed_at < INTERVAL_S or self.n <= 0 or not is_main_rank():
            return
        self._printed_at = now
        elapsed_s = now - self._started_at
        left_s = elapsed_s * (self._total - self.n) / self.n
        times = f"{tqdm.format_interval(elapsed_s)} elapsed, {tqdm.format_interval(left_s)} left"
        line = f"{self._desc}: {self.n:.0f} of {self._total} {self._units}, {times}"
        print(", ".join(filter(None, [line, self._postfix])), file=sys.stderr, flush=True)

    def set_description(self, desc: str) -> None:
        self._desc = desc

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self._postfix = s

    def close(self) -> None:
        pass


def make_progress(total: int, desc: str, unit: str, *, bar: bool | None = None, leave: bool = True) -> Progress:
    """Returns the progress of a task.

    Args:
        total: number of units.
        unit: name of one unit, such as "case".
        bar: draw a bar; None: if stderr is a terminal.
        leave: keep the bar on the terminal when it is complete.
    """
    if (sys.stderr.isatty() and is_main_rank()) if bar is None else bar:
        drawn: Progress = tqdm(total=total, desc=desc, unit=unit, leave=leave, dynamic_ncols=True)
        return drawn
    return ProgressLines(total, desc, unit)


def track(items: Iterable[T], total: int, desc: str, unit: str) -> Iterator[T]:
    """Yields the items and shows how many are done."""
    progress = make_progress(total, desc, unit)
    try:
        for item in items:
            yield item
            progress.update()
    finally:
        progress.close()
