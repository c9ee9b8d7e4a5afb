"""Ways to damage a file, as disks, transfers, other programs and attackers do.

Each kind is a function (path, rng) that damages the file at `path` and returns a short description; all randomness
comes from `rng`. To add a kind: write the function, list it in `kinds_for` and give it a weight.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Kind = Callable[[Path, np.random.Generator], str]

# Relative frequency of each kind among those applicable to a file; larger for kinds with more variants.
WEIGHTS = {"truncated": 3, "emptied": 1, "wrong type": 3, "hostile header": 6, "flipped bits": 4, "gzip bomb": 1}

NIFTI_HEADER_BYTES = 348
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU"
# 64 MiB of zeros compress to 64 KiB of gzip; a file of 64 such members unpacks to 4 GiB.
BOMB_BYTES, BOMB_MEMBERS = 1 << 26, 64
# File created by a hostile pickle (in its own folder) or by code in a header (in the working folder) if it is executed.
MARKER = "unpickled"

# (first byte, struct format, values): written over a NIfTI-1 header.
NIFTI_FIELDS: dict[str, tuple[int, str, tuple[Any, ...]]] = {
    "32767^3 voxels": (40, "<4h", (3, 32767, 32767, 32767)),
    "1000^3 voxels": (42, "<3h", (1000, 1000, 1000)),
    "one slice less": (42, "<h", (11,)),
    "a negative axis": (42, "<h", (-5,)),
    "an empty axis": (44, "<h", (0,)),
    "no axes": (40, "<h", (0,)),
    "nine axes": (40, "<h", (9,)),
    "NaN in the affine": (280, "<f", (np.nan,)),
    "infinity in the affine": (312, "<f", (np.inf,)),
    "an affine of 9 mm": (280, "<f", (9.0,)),
    "a spacing of NaN": (80, "<f", (np.nan,)),
    "a spacing of infinity": (84, "<f", (np.inf,)),
    "a spacing of 0": (88, "<f", (0.0,)),
    "a different spacing along axis 0": (80, "<f", (2.5,)),
    "a different spacing along axis 1": (84, "<f", (1.2,)),
    "a different spacing along axis 2": (88, "<f", (1e-3,)),
    "spacing in metres": (123, "<B", (1,)),
    "spacing in microns": (123, "<B", (3,)),
    "voxels beyond the end of the file": (108, "<f", (1e6,)),
    "voxels at an offset of a petabyte": (108, "<f", (1e15,)),
    "voxels at a negative offset": (108, "<f", (-352.0,)),
    "voxels inside the header": (108, "<f", (100.0,)),
    "voxels at an offset of NaN": (108, "<f", (np.nan,)),
    "RGB voxels": (70, "<2h", (128, 24)),
    "a type that does not exist": (70, "<h", (9999,)),
    "a type of twice the bits": (70, "<2h", (64, 64)),
    "a type that contradicts its number of bits": (70, "<h", (512,)),
    "a scale of NaN": (112, "<f", (np.nan,)),
    "a scale that overflows": (112, "<2f", (1e38, 1e38)),
    "an intercept of infinity": (112, "<2f", (1.0, np.inf)),
    "a wrong magic number": (344, "4s", (b"abcd",)),
    "the size of a NIfTI-2 header": (0, "<i", (540,)),
    "one field in the opposite byte order": (0, ">i", (348,)),
}

# Hostile .npy headers; the functions take the array's shape, (C, D, H, W), and its dtype.
NPY_HEADERS: dict[str, Callable[[tuple[int, ...], str], str]] = {
    "10^12 voxels": lambda shape, kind: npy_header(kind, (1, 10_000, 10_000, 10_000)),
    "10^30 voxels": lambda shape, kind: npy_header(kind, (10**30, 1, 1, 1)),
    "a negative axis": lambda shape, kind: npy_header(kind, (1, -1, *shape[2:])),
    "no voxels": lambda shape, kind: npy_header(kind, (1, 0, *shape[2:])),
    "swapped axes": lambda shape, kind: npy_header(kind, (1, *reversed(shape[1:]))),
    "one slice less": lambda shape, kind: npy_header(kind, (1, shape[1] - 1, *shape[2:])),
    "three axes": lambda shape, kind: npy_header(kind, shape[1:]),
    "objects": lambda shape, kind: npy_header("|O", shape),
    "fields": lambda shape, kind: npy_header(f"[('a', {kind!r})]", shape).replace('"', ""),
    "Fortran order": lambda shape, kind: npy_header(kind, shape, order=True),
    "the opposite byte order": lambda shape, kind: npy_header(kind.replace("<", ">"), shape),
    "another type of the same size": lambda shape, kind: npy_header(kind.replace("f", "i").replace("u", "i"), shape),
    "code": lambda shape, kind: f"__import__('pathlib').Path({MARKER!r}).touch()",
    "deep nesting": lambda shape, kind: "(" * 20_000,
    "nothing": lambda shape, kind: "",
}

# Replacements for a JSON value; one of another type, or another number, is chosen.
JSON_VALUES: tuple[Any, ...] = (None, True, -1, 0.5, 10**30, float("nan"), float("inf"), "text", [], {}, [[]], {"a": 1})
CASE_IDS = ("../../x", "..", "/etc/passwd", "a/b", "", "a\\u0000b", "\\ud800", "x" * 5000)


def kinds_for(path: Path, has_checksum: bool) -> dict[str, Kind]:
    """Returns the kinds of damage applicable to a file.

    Args:
        has_checksum: whether a checksum covers every byte. Without one, a flipped bit may give another valid file,
            which cannot be detected.
    """
    headers = {".json": _hostile_json, ".npy": _hostile_npy, ".nii": _hostile_nifti, ".gz": _hostile_nifti}
    kinds: dict[str, Kind] = {
        "truncated": _truncate,
        "emptied": _empty,
        "wrong type": _replace_by_another_type,
        "hostile header": headers[path.suffix],
    }
    if has_checksum:
        kinds["flipped bits"] = _flip_bits
    if path.suffix == ".gz":
        kinds["gzip bomb"] = _append_bomb
    return kinds


def damage(path: Path, has_checksum: bool, rng: np.random.Generator) -> tuple[str, str]:
    """Damages a file; returns the kind of damage and its description."""
    kinds = kinds_for(path, has_checksum)
    weights = np.array([WEIGHTS[name] for name in kinds], np.float64)
    kind = str(rng.choice(list(kinds), p=weights / weights.sum()))
    return kind, kinds[kind](path, rng)


def _truncate(path: Path, rng: np.random.Generator) -> str:
    content = path.read_bytes()
    length = int(rng.integers(len(content)))
    path.write_bytes(content[:length])
    return f"cut after {length} of {len(content)} bytes"


def _empty(path: Path, rng: np.random.Generator) -> str:
    path.write_bytes(b"")
    return "emptied"


def _flip_bits(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    bits = sorted(rng.choice(8 * len(content), size=int(rng.integers(1, 4)), replace=False).tolist())
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bits {bits} flipped"


class _Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def _replace_by_another_type(path: Path, rng: np.random.Generator) -> str:
    contents = {
        "a PNG": PNG,
        "text": b"patient,age\n" * 99,
        "a web page": b"<!DOCTYPE html><title>404 Not Found</title>",
        "a pickle": pickle.dumps(_Touch(path.parent / MARKER)),
        "UTF-16": '{"format": 1}'.encode("utf-16"),
        "gzipped zeros": gzip.compress(bytes(4096), mtime=0),
    }
    specials: dict[str, Callable[[], None]] = {
        "a folder": path.mkdir,
        "a dangling link": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a named pipe": lambda: os.mkfifo(path),
    }
    name = str(rng.choice([*contents, *specials]))
    path.unlink()
    if name in contents:
        path.write_bytes(contents[name])
    else:
        specials[name]()
    return f"replaced by {name}"


def _hostile_nifti(path: Path, rng: np.random.Generator) -> str:
    is_gzipped = path.suffix == ".gz"
    content = bytearray(gzip.decompress(path.read_bytes()) if is_gzipped else path.read_bytes())
    name = str(rng.choice([*NIFTI_FIELDS, "random bytes"]))
    if name in NIFTI_FIELDS:
        first, form, values = NIFTI_FIELDS[name]
        struct.pack_into(form, content, first, *values)
    else:
        content[:NIFTI_HEADER_BYTES] = rng.bytes(NIFTI_HEADER_BYTES)
    path.write_bytes(gzip.compress(content, mtime=0) if is_gzipped else content)
    return f"header with {name}"


def _append_bomb(path: Path, rng: np.random.Generator) -> str:
    with path.open("ab") as stream:
        for _ in range(BOMB_MEMBERS):
            stream.write(_bomb())
    return f"{BOMB_BYTES * BOMB_MEMBERS >> 30} GiB of gzipped zeros appended"


@functools.cache
def _bomb() -> bytes:
    return gzip.compress(bytes(BOMB_BYTES), mtime=0)


def npy_header(kind: str, shape: tuple[int, ...], order: bool = False) -> str:
    """Returns the text of a `.npy` header, which numpy evaluates as a Python literal."""
    return repr({"descr": kind, "fortran_order": order, "shape": shape})


def _hostile_npy(path: Path, rng: np.random.Generator) -> str:
    array = np.load(path)
    name = str(rng.choice([*NPY_HEADERS, "a length beyond the file", "format 9"]))
    text = NPY_HEADERS.get(name, lambda shape, kind: npy_header(kind, shape))(array.shape, array.dtype.str)
    length = 65_535 if name == "a length beyond the file" else len(text)
    version = bytes([9 if name == "format 9" else 1, 0])
    path.write_bytes(b"\x93NUMPY" + version + struct.pack("<H", length) + text.encode() + array.tobytes())
    return f"header with {name}"


def _hostile_json(path: Path, rng: np.random.Generator) -> str:
    text = path.read_text(encoding="utf-8")
    way = str(rng.choice([*["value"] * 7, *["case id"] * 3, "nested", "long number"]))
    if way == "nested":
        path.write_text(str(rng.choice(["[", '{"a":'])) * 100_000, encoding="utf-8")
        return "nested 100,000 deep"
    if way == "long number":
        path.write_text(text.replace(": ", ": " + "1" * 5000 + ", ", 1), encoding="utf-8")
        return "a number of 5,000 digits"
    if way == "case id":
        case_id = str(rng.choice(CASE_IDS))
        path.write_text(text.replace("scan_1", case_id), encoding="utf-8")
        return f"case scan_1 renamed {case_id[:20]!r}"
    content = json.loads(text)
    holder, key = _random_location(content, rng)
    old = holder[key]
    others = [value for value in JSON_VALUES if _is_damage(old, value)]
    holder[key] = others[int(rng.integers(len(others)))]
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"{key!r}: {str(old)[:40]!r} became {holder[key]!r}"


def _random_location(content: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Returns a random location in a JSON document: the list or dict that contains it, and its index or key."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = keys[int(rng.integers(len(keys)))]
        below = content[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.2:
            return content, key
        content = below


def _is_damage(old: Any, new: Any) -> bool:
    """Whether the new value has another type or is a different number; a different text may be equally valid."""
    is_number = isinstance(old, int | float) and isinstance(new, int | float)
    return new != old if is_number else type(old) is not type(new)
