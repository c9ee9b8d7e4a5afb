"""Verifies a preprocessed folder against its own index, a list of MD5s, and MLPerf's published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.progress import track
from data_loading.dataset import map_array
from data_loading.index import INDEX_NAME, PARTIAL_INDEX_NAME, read_index
from data_loading.integrity import file_md5, file_stamp, record_verified, recorded_digests
from data_loading.mlperf_md5 import MLPERF_CASES, Comparison, compare, describe_known, doubtful_cases, published_md5
from data_loading.spec import KITS19, DatasetSpec

# Of KiTS21's and KiTS23's masks; KiTS19's have none.
CYST_LABEL = 3


def verify(results_dir: Path, checksums: Path | None) -> int:
    """Compares every file's MD5 with `dataset.json`, `checksums` and, for KiTS19, MLPerf's published ones.

    Prints each file that differs, and what is known about it.

    Returns:
        Exit status: 0 when everything agrees, 1 when something differs or preprocessing was interrupted.

    Raises:
        UserError: nothing to verify, or `checksums` is not a JSON file of {name: MD5}.
    """
    files = sorted(path for kind in "xy" for path in results_dir.glob(f"*_{kind}.npy") if path.is_file())
    if not files:
        raise UserError(f"--results_dir {results_dir}: no preprocessed cases in it")
    stamps = {path.name: file_stamp(path) for path in files}
    found = {path.name: file_md5(path) for path in track(files, len(files), "MD5", "file")}
    is_intact, spec = True, KITS19  # a folder without an index was written by the reference
    if (results_dir / PARTIAL_INDEX_NAME).is_file() and not (results_dir / INDEX_NAME).is_file():
        _compare(found, recorded_digests(read_index(results_dir / PARTIAL_INDEX_NAME).cases), PARTIAL_INDEX_NAME)
        print(f"{results_dir}: preprocessing was interrupted; run it again, it completes the folder")
        return 1
    if (results_dir / INDEX_NAME).is_file():
        index = read_index(results_dir / INDEX_NAME)
        spec = index.spec
        recorded = recorded_digests(index.cases)
        is_intact &= _compare(found, recorded, INDEX_NAME)
        # The next run need not hash these, even if they were copied or touched.
        intact = {name: stamps[name] for name, md5 in found.items() if recorded.get(name) == md5}
        record_verified(results_dir, index.cases, intact)
    if checksums is not None:
        is_intact &= _compare(found, _read_checksums(checksums), checksums.name)
    is_intact &= _compare_with_mlperf(results_dir, found, spec)
    return 0 if is_intact else 1


def _compare_with_mlperf(results_dir: Path, found: Mapping[str, str], spec: DatasetSpec) -> bool:
    """Prints how the files compare with MLPerf's; returns False if they are KiTS19's and one is not as it should be.

    A part of KiTS19 is in order. Files of another data set, or preprocessed in another way, are not compared, unless
    they claim to be all 420.
    """
    compared = compare(found)
    if not compared.identical or replace(spec, name=KITS19.name) != KITS19:
        claims_all = not compared.missing and spec.name == KITS19.name
        reason = "these are other scans, or were preprocessed in another way"
        print(
            f"{len(found)} files: none has its MD5 of MLPerf's list; {reason}"
            if claims_all
            else f"{len(found)} files: not compared with MLPerf's MD5s of KiTS19; {reason}"
        )
        return not claims_all
    for name in compared.different:
        print(f"{name}: DIFFERENT from MLPerf's list ({found[name]}, expected {published_md5()[name]})")
    for name in compared.known:
        print(describe_known(name, found[name]))
    if hint := _mask_hint(results_dir, compared):
        print(hint)
    for case, why in doubtful_cases(found).items():
        print(f"{case}: doubtful ({why})")
    absent = f", {len(compared.missing)} of {2 * MLPERF_CASES} not here" if compared.missing else ""
    known = f", {len(compared.known)} with a known difference" if compared.known else ""
    print(f"MLPerf's list: {len(compared.identical)} identical, {len(compared.different)} different{known}{absent}")
    return not compared.different


def _mask_hint(results_dir: Path, compared: Comparison) -> str:
    """Returns a line about masks of KiTS21 or KiTS23 in place of KiTS19's; "" if there are none.

    These were drawn anew, and have cysts as label 3.
    """
    masks = [name for name in compared.different if name.endswith("_y.npy")]
    others = [name for name in compared.identical if name.endswith("_y.npy")]
    remedy = "fetch KiTS19's with python3 -m data_loading.download_kits19 and preprocess again"
    for name in masks:
        with suppress(UserError):  # damaged
            if map_array(results_dir / name, np.uint8).max() == CYST_LABEL:
                return f"{name} has label {CYST_LABEL}, a cyst: masks of KiTS21 or KiTS23, not of KiTS19; {remedy}"
    if len(masks) > len(others) + 1:
        scans = sum(name.endswith("_x.npy") for name in compared.identical)
        return (
            f"{len(masks)} masks differ, while {scans} scans are MLPerf's: most likely masks of KiTS21 or KiTS23, "
            f"which were drawn anew; {remedy}"
        )
    return ""


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some programs begin UTF-8 with a mark
        return {str(name): str(md5) for name, md5 in content.items()}
    except OSError as error:
        raise UserError(f"--checksums {path}: cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise UserError(f"--checksums {path}: not a JSON file of {{name: MD5}}") from None


def _compare(found: dict[str, str], expected: dict[str, str], source: str) -> bool:
    different = [name for name, md5 in sorted(expected.items()) if name in found and found[name] != md5]
    missing = sorted(set(expected) - set(found))
    for name in different:
        print(f"{name}: DIFFERENT from {source} ({found[name]}, expected {expected[name]})")
    for name in missing:
        print(f"{name}: MISSING ({source} lists it)")
    same = len(expected) - len(different) - len(missing)
    print(f"{source}: {same} identical, {len(different)} different, {len(missing)} missing")
    return not different and not missing
