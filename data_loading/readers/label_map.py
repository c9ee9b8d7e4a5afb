"""Maps the values of masks to classes: `--labels 86,87=1:muscle 5=2` selects, merges and names them.

A key in double quotes is a name, whatever it holds: `--labels '"left, lower"=1' '"12"=2'`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import normalised
from data_loading.spec import IGNORED

# A value of the mask, or the name of a structure that has a file or a segment of its own.
Key = int | str
MAX_VALUE = 255  # of a class
# A file with more distinct values than this is considered an image, not a mask.
MAX_VALUES_FOUND = 64
KEY = r'"[^"]+"|[^,="]*'
ENTRY = re.compile(rf"((?:{KEY})(?:,(?:{KEY}))*)=(\d+)(?::(.+))?")
RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")
# Masks are read as 32-bit integers.
LOWEST, HIGHEST = -(2**31), 2**31 - 1
# Each value of a range is a key of its own.
LONGEST_RANGE = 1 << 16
# Values this far apart are replaced one at a time, those closer together by a table.
LONGEST_TABLE = 1 << 24


@dataclass(frozen=True)
class LabelMap:
    """Maps the values of masks, or the names of their files, to classes; everything else is background.

    Attributes:
        pairs: (value or name, class).
        classes: class names, the background first.
        by_size: the user did not number the classes, so where two claim a voxel, the smaller structure gets it.
    """

    pairs: tuple[tuple[Key, int], ...]
    classes: tuple[str, ...]
    by_size: bool = False

    @classmethod
    def parse(cls, entries: Sequence[str], known: Sequence[str] = ()) -> LabelMap:
        """Parses `--labels`.

        Args:
            entries: KEYS=CLASS or KEYS=CLASS:NAME each; keys are values, ranges such as 1-9, or names, which stand in
                double quotes if they hold commas or equals signs, or are numbers.
            known: class names of the data set, if it has any: they may be used as keys, and name the new classes.

        Raises:
            UserError: a malformed entry, a value that is listed twice or that the data set lacks, or classes that are
                not numbered 1, 2, …
        """
        pairs: dict[Key, int] = {}
        names: dict[int, str] = {}
        merged: dict[int, list[str]] = {}
        for entry in entries:
            match = ENTRY.fullmatch(entry)
            if not match:
                raise _bad_entry(entry, "expected VALUES=CLASS, such as 86,87=1 or 5=2:liver")
            value = int(match[2])
            for keys, name in _parse_keys(match[1], entry, known):
                if twice := [key for key in keys if key in pairs]:
                    raise _bad_entry(entry, f"{twice[0]} is listed twice")
                pairs.update(dict.fromkeys(keys, value))
                merged.setdefault(value, []).append(name)
            if match[3] and names.setdefault(value, match[3]) != match[3]:
                raise _bad_entry(entry, f"class {value} is already named {names[value]}")
        if sorted(merged) != list(range(1, len(merged) + 1)) or not merged or len(merged) > MAX_VALUE:
            raise UserError(f"--labels: classes must be numbered 1, 2, … without a gap, found {sorted(merged)}")
        classes = [names.get(value) or "+".join(merged[value]) for value in sorted(merged)]
        if len(set(classes)) != len(classes):
            raise UserError(f"--labels: two classes have the same name: {', '.join(classes)}")
        return cls(tuple(pairs.items()), ("background", *classes))

    @classmethod
    def from_keys(cls, keys: Iterable[Key], source: str) -> LabelMap:
        """Makes one class from each value or name found in the masks, except 0, in ascending order.

        Args:
            source: where the masks come from, for the error message.

        Raises:
            UserError: there are none, or too many for masks.
        """
        found = sorted(set(keys) - {0}, key=lambda key: (isinstance(key, str), key))
        if not found:
            raise UserError(f"{source}: every mask is empty; choose another folder")
        if len(found) > MAX_VALUES_FOUND:
            raise UserError(
                f"{source}: the masks hold {len(found)} values; select and merge with --labels, such as 128-255=1"
            )
        pairs = tuple((key, value) for value, key in enumerate(found, 1))
        return cls(pairs, ("background", *map(str, found)), by_size=True)

    def with_ignored(self, value: int) -> LabelMap:
        """Returns a map that also replaces the ignore label by `IGNORED`, which is no class."""
        return replace(self, pairs=(*self.pairs, (value, IGNORED)))

    def class_of(self, name: str) -> int:
        """Returns the class of a structure by its name, 0 if it is not listed."""
        return dict(self.pairs).get(normalised(name), 0)

    def apply(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        """Returns a mask of any shape with its whole numbers replaced by classes."""
        pairs = {key: value for key, value in self.pairs if isinstance(key, int)}
        if not pairs:
            return np.zeros(mask.shape, np.uint8)
        low, high = max(min(pairs) - 1, LOWEST), min(max(pairs) + 1, HIGHEST)
        if high - low > LONGEST_TABLE:
            found = np.zeros(mask.shape, np.uint8)
            for key, value in pairs.items():
                found[mask == key] = value
            return found
        # What lies outside the keys is clipped to an end of the table, which is background.
        table = np.zeros(high - low + 1, np.uint8)
        for key, value in pairs.items():
            table[key - low] = value
        index = np.clip(mask.astype(np.int32, copy=False), low, high)
        index -= low
        return table[index]

    def has_names(self) -> bool:
        """Returns whether structures are listed by name."""
        return any(isinstance(key, str) for key, _ in self.pairs)

    def check_names(self, keys: Collection[Key], source: str) -> None:
        """Raises UserError if a listed name is in no mask at all: most likely it is misspelt."""
        missing = [key for key, _ in self.pairs if isinstance(key, str) and key not in keys]
        if missing:
            available = ", ".join(sorted(quoted(key) for key in keys if isinstance(key, str))) or "values only"
            raise UserError(f"--labels {missing[0]}: no mask of that name in {source}; available: {available}")


def quoted(name: str) -> str:
    """Returns a name as a key of `--labels`."""
    return name if re.fullmatch(r'[^,="]+', name) and not RANGE.fullmatch(name) else f'"{name}"'


def _parse_keys(text: str, entry: str, known: Sequence[str]) -> Iterable[tuple[Sequence[Key], str]]:
    """Yields the keys of each part of an entry with the part's name, such as (128, …, 255) and "128-255"."""
    for part in re.findall(KEY, text) if '"' in text else text.split(","):
        if not part and '"' in text:  # findall also finds the empty string after a key
            continue
        name = normalised(part.strip('"'))
        match = RANGE.fullmatch(part)
        if not match:
            if known and name not in known:
                raise _bad_entry(entry, f"unknown label {name!r}; available: {', '.join(known)}")
            if not name:
                raise _bad_entry(entry, "a key is empty")
            yield [known.index(name) if known else name], name
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        lowest, highest = (0, len(known) - 1) if known else (LOWEST, HIGHEST)
        if not lowest <= first <= last <= highest:
            raise _bad_entry(entry, f"{part} is not a label from {lowest} to {highest}")
        if last - first >= LONGEST_RANGE:
            raise _bad_entry(entry, f"{part} holds more than {LONGEST_RANGE} values")
        keys = range(first, last + 1)
        yield keys, "+".join(known[first : last + 1]) if known else part


def _bad_entry(entry: str, reason: str) -> UserError:
    return UserError(f"--labels {entry}: {reason}")
