"""Which of a mask's values are which class: `--labels 86,87=1:muscle 5=2` merges, chooses and names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

# A value of the mask, or the name of an organ that has a file or a segment of its own.
Key = int | str
HIGHEST = 255
# What finds more than so many values by itself has no mask before it but a picture.
MOST_FOUND = 64
TOKEN = re.compile(r"([^=]+)=(\d+)(?::(.+))?")
RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class LabelMap:
    """From a mask's values, or its files' names, to classes; what is not listed is background.

    Attributes:
        pairs: (value or name, class).
        classes: names, the background first.
    """

    pairs: tuple[tuple[Key, int], ...]
    classes: tuple[str, ...]

    @classmethod
    def parse(cls, tokens: Sequence[str], known: Sequence[str] = ()) -> LabelMap:
        """Reads `--labels`: KEYS=CLASS or KEYS=CLASS:NAME each, with values, ranges such as 1-9, or names as keys.

        Args:
            known: the data set's own classes, whose names may stand for their values and name what is not named.

        Raises:
            UserError: anything else, a value that is listed twice or that the data set does not have, or classes
                that are not 1, 2, …
        """
        pairs: dict[Key, int] = {}
        names: dict[int, str] = {}
        parts: dict[int, list[str]] = {}
        for token in tokens:
            match = TOKEN.fullmatch(token)
            if not match:
                raise _wrong(token, "expected VALUES=CLASS, such as 86,87=1 or 5=2:liver")
            value = int(match[2])
            for key in _keys(match[1], token, known):
                if key in pairs:
                    raise _wrong(token, f"{key} is there twice")
                pairs[key] = value
                named = known[key] if isinstance(key, int) and known else str(key)
                parts.setdefault(value, []).append(named)
            if match[3] and names.setdefault(value, match[3]) != match[3]:
                raise _wrong(token, f"class {value} is {names[value]} already")
        if sorted(parts) != list(range(1, len(parts) + 1)) or not parts or len(parts) > HIGHEST:
            raise UserError(f"--labels: classes must be 1, 2, … without a gap, found {sorted(parts)}")
        classes = [names.get(value) or "+".join(parts[value]) for value in sorted(parts)]
        if len(set(classes)) != len(classes):
            raise UserError(f"--labels: two classes have one name: {', '.join(classes)}")
        return cls(tuple(pairs.items()), ("background", *classes))

    @classmethod
    def of_found(cls, keys: Iterable[Key], where: str) -> LabelMap:
        """A class for each value or name that the masks hold, but for 0, in rising order.

        Raises:
            UserError: there is none, or so many that these are no masks.
        """
        found = sorted(set(keys) - {0}, key=lambda key: (isinstance(key, str), key))
        if not found:
            raise UserError(f"{where}: every mask is empty; choose another folder")
        if len(found) > MOST_FOUND:
            raise UserError(
                f"{where}: the masks hold {len(found)} values; choose and merge with --labels, such as 128-255=1"
            )
        return cls(tuple((key, value) for value, key in enumerate(found, 1)), ("background", *map(str, found)))

    def of(self, name: str) -> int:
        """The class of an organ by its name, 0 where it is not listed."""
        return dict(self.pairs).get(name, 0)

    def apply(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The classes of a mask's values."""
        table = np.zeros(HIGHEST + 1, np.uint8)
        for key, value in self.pairs:
            if isinstance(key, int):
                table[key] = value
        return table[mask]

    def check_covers(self, keys: Collection[Key], where: str) -> None:
        """Raises UserError where a listed name or value is in no mask at all: most likely it is misspelt."""
        missing = [key for key, _ in self.pairs if isinstance(key, str) and key not in keys]
        if missing:
            there = ", ".join(sorted(key for key in keys if isinstance(key, str))) or "values alone"
            raise UserError(f"--labels {missing[0]}: no mask of that name in {where}; there is {there}")


def _keys(text: str, token: str, known: Sequence[str]) -> Iterable[Key]:
    for part in text.split(","):
        match = RANGE.fullmatch(part)
        if not match:
            if not part or (known and part not in known):
                raise _wrong(token, f"{part!r} is no label; there is {', '.join(known)}" if known else "a key is empty")
            yield known.index(part) if known else part
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        highest = len(known) - 1 if known else HIGHEST
        if not first <= last <= highest:
            raise _wrong(token, f"{part} is no label of 0 to {highest}")
        yield from range(first, last + 1)


def _wrong(token: str, why: str) -> UserError:
    return UserError(f"--labels {token}: {why}")
