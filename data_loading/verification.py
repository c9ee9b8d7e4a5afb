"""Verifies a preprocessed folder against its own index, a list of MD5s, and MLPerf's published ones."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import UserError
from common.progress import track
from data_loading.index import INDEX_NAME, read_index
from data_loading.integrity import (
    MLPERF_CASES,
    MLPERF_FINGERPRINTS,
    file_md5,
    file_stamp,
    fingerprint,
    record_verified,
    recorded_digests,
)


def verify(results_dir: Path, checksums: Path | None) -> int:
    """Compares every file's MD5 with `dataset.json`, `checksums` and, for the whole KiTS19, MLPerf's fingerprints.

    Prints each file that differs.

    Returns:
        Exit status: 0 when everything agrees, 1 when something differs.

    Raises:
        UserError: nothing to verify, or `checksums` is not a JSON file of {name: MD5}.
    """
    files = sorted([*results_dir.glob("*_x.npy"), *results_dir.glob("*_y.npy")])
    if not files:
        raise UserError(f"--results_dir {results_dir}: no preprocessed cases in it")
    stamps = {path.name: file_stamp(path) for path in files}
    found = {path.name: file_md5(path) for path in track(files, len(files), "MD5", "file")}
    is_intact = True
    if (results_dir / INDEX_NAME).exists():
        index = read_index(results_dir / INDEX_NAME)
        recorded = recorded_digests(index.cases)
        is_intact &= _compare(found, recorded, INDEX_NAME)
        # The next run need not hash these, even if they were copied or touched.
        intact = {name: stamps[name] for name, md5 in found.items() if recorded.get(name) == md5}
        record_verified(results_dir, index.cases, intact)
    if checksums is not None:
        is_intact &= _compare(found, _read_checksums(checksums), checksums.name)
    if len(found) == 2 * MLPERF_CASES and all(name.startswith("case_") for name in found):
        for what, (kinds, expected) in MLPERF_FINGERPRINTS.items():
            actual = fingerprint({name: md5 for name, md5 in found.items() if name[-5] in kinds})
            print(f"MLPerf's {what}: {'identical' if actual == expected else f'DIFFERENT ({actual})'}")
            is_intact &= actual == expected
    else:
        print(f"{len(found)} files: not compared with MLPerf's fingerprints, which cover KiTS19's {2 * MLPERF_CASES}")
    return 0 if is_intact else 1


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some programs begin UTF-8 with a mark
        return {str(name): str(md5) for name, md5 in content.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--checksums {path}: not a JSON file of {{name: MD5}} ({error})") from None


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
