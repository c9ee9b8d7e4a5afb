"""Raw scans to training volumes, bit for bit as MLPerf's reference makes them; and their verification.

    python3 preprocess_dataset.py --data_dir RAW --results_dir OUT
    python3 preprocess_dataset.py --data_dir RAW --results_dir OUT --dataset msd
    python3 preprocess_dataset.py --results_dir OUT --mode verify [--checksums FILE]

A case that is done and intact is not done again, and nothing half-written is ever left under a final name: interrupt
it at will and start it again. `dataset.json` appears when every case is done.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_loading.dataset import (
    INDEX_NAME,
    PARTIAL_INDEX_NAME,
    CaseRecord,
    DatasetIndex,
    file_of,
    read_index,
    write_json,
)
from data_loading.integrity import (
    MLPERF_CASES,
    MLPERF_FINGERPRINTS,
    VERIFIED_NAME,
    Stamp,
    fingerprint,
    keep_verified,
    md5_of,
    recorded_digests,
    stamp_of,
)
from data_loading.preprocessing import foreground_boxes, preprocess_image, preprocess_label
from data_loading.raw_layouts import RAW_LAYOUTS, RawCase, RawDataset
from data_loading.spec import DatasetSpec
from data_loading.volume import check_same_geometry, read_nifti
from errors import UserError, run_program
from files import replacing

EVALUATION_CASES = Path(__file__).resolve().parent / "evaluation_cases.txt"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Raw scans to training volumes, and their verification.")
    parser.add_argument("--data_dir", type=Path, help="raw scans (not needed to verify)")
    parser.add_argument("--results_dir", type=Path, required=True, help="training volumes and dataset.json")
    parser.add_argument("--mode", choices=("preprocess", "verify"), default="preprocess")
    parser.add_argument("--dataset", choices=sorted(RAW_LAYOUTS), default="kits19", help="layout of --data_dir")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the 80/20 split of --dataset msd")
    parser.add_argument("--checksums", type=Path, help="verify: JSON of {file: MD5}, such as MLPerf's checksum.json")
    arguments = parser.parse_args(argv)
    if arguments.num_workers < 1 or arguments.seed < 0:
        raise UserError("--num_workers must be at least 1 and --seed at least 0")
    if arguments.mode == "verify":
        return verify(arguments.results_dir, arguments.checksums)
    if arguments.data_dir is None or not arguments.data_dir.is_dir():
        raise UserError(f"--data_dir {arguments.data_dir}: no such folder; give the folder of the raw scans")
    if arguments.results_dir.exists() and arguments.results_dir.samefile(arguments.data_dir):
        raise UserError(f"--results_dir {arguments.results_dir} holds the raw scans themselves; name another folder")
    evaluation_ids = EVALUATION_CASES.read_text(encoding="utf-8").split()
    raw = RAW_LAYOUTS[arguments.dataset](arguments.data_dir, evaluation_ids, arguments.seed)
    preprocess(raw, arguments.results_dir, arguments.num_workers)
    return 0


def preprocess(raw: RawDataset, results_dir: Path, num_workers: int) -> None:
    """Preprocesses every case that is not done yet, prints a line each, and writes `dataset.json` last.

    Raises:
        UserError: a bad case (the others stay done), or a folder that cannot be written.
    """
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        # While cases are missing there must be no dataset.json: training would take the set for complete.
        if (results_dir / INDEX_NAME).exists():
            os.replace(results_dir / INDEX_NAME, results_dir / PARTIAL_INDEX_NAME)
        # What is intact gets its stamp in the index, and what a case's former content had vouches for nothing.
        (results_dir / VERIFIED_NAME).unlink(missing_ok=True)
        for stale in results_dir.glob(".*_[xy].npy.*.tmp"):  # of a run that was killed
            stale.unlink(missing_ok=True)
        records = _intact_records(raw, results_dir)
        write_json(results_dir / PARTIAL_INDEX_NAME, DatasetIndex(raw.spec, {}, records).to_json())
        todo = [case for case in raw.cases if case.case not in records]
        for record in tqdm(_run(todo, results_dir, raw.spec, num_workers), total=len(todo), unit="case", disable=None):
            case, made = record
            records[case] = made
            tqdm.write(_line(case, made))
            write_json(results_dir / PARTIAL_INDEX_NAME, DatasetIndex(raw.spec, {}, records).to_json())
        write_json(results_dir / INDEX_NAME, DatasetIndex(raw.spec, raw.split, records).to_json())
        (results_dir / PARTIAL_INDEX_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--results_dir {results_dir}: cannot be written: {error.strerror or error}") from None
    _summarise(raw, records, len(todo), results_dir)


def _intact_records(raw: RawDataset, results_dir: Path) -> dict[str, CaseRecord]:
    """The records of an earlier, perhaps interrupted run whose sources and files are still what they were."""
    partial_index = results_dir / PARTIAL_INDEX_NAME
    if not partial_index.exists():
        return {}
    try:
        index = read_index(partial_index)
    except UserError as error:
        print(f"starting afresh: {error}")
        return {}
    if index.spec != raw.spec:
        return {}
    intact: dict[str, CaseRecord] = {}
    for case in tqdm(raw.cases, desc="checking what is done", unit="case", disable=None):
        record = index.cases.get(case.case)
        if record and record.source_stamp == case.stamp():
            digests, stamps = _describe(results_dir, case.case)
            if digests == record.digests:
                intact[case.case] = replace(record, stamps=stamps)  # copied or touched, it has another stamp by now
    return intact


def _describe(folder: Path, case: str) -> tuple[dict[str, str], dict[str, Stamp]]:
    """MD5s and stamps of a case's files that are there, by kind; the stamps are from before the files are read."""
    paths = {kind: path for kind in "xy" if (path := file_of(folder, case, kind)).exists()}
    stamps = {kind: stamp_of(path) for kind, path in paths.items()}
    return {kind: md5_of(path) for kind, path in paths.items()}, stamps


def _run(
    todo: list[RawCase], results_dir: Path, spec: DatasetSpec, num_workers: int
) -> Iterator[tuple[str, CaseRecord]]:
    work = partial(preprocess_case, results_dir=results_dir, spec=spec)
    if num_workers == 1 or len(todo) < 2:
        yield from map(work, todo)
        return
    # spawn: a forked copy of a process that has run torch's thread pool may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(todo)), context, _start_worker) as pool:
        # Ctrl-C is for this process alone to tell: those started meanwhile inherit that they ignore it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = [pool.submit(work, case) for case in todo]
        signal.signal(signal.SIGINT, handler)
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a preprocessing process was killed, most likely for memory; use a smaller --num_workers "
                "(what is done stays done)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # From now on Ctrl-C ends this process at once and without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Ends this process when its parent was killed: it would wait for more work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def preprocess_case(raw: RawCase, results_dir: Path, spec: DatasetSpec) -> tuple[str, CaseRecord]:
    """Reads, preprocesses and saves one case. Raises UserError when image and mask do not fit or are damaged."""
    image = read_nifti(raw.image, np.float32)
    label = read_nifti(raw.label, np.uint8)
    check_same_geometry(image.geometry, label.geometry, raw.case)
    if image.array.shape[0] != spec.channels or label.array.shape[0] != 1:
        raise UserError(
            f"{raw.case}: expected {spec.channels} image channel(s) and 1 of the mask, "
            f"found {image.array.shape[0]} and {label.array.shape[0]}"
        )
    if not np.isfinite(image.array).all():
        raise UserError(f"{raw.image}: the scan holds NaN or infinity; repair or remove the case")
    if int(label.array.max()) >= len(spec.classes):
        raise UserError(f"{raw.label}: label {label.array.max()}, but the classes end at {len(spec.classes) - 1}")
    array, transform = preprocess_image(image, spec)
    mask = preprocess_label(label, transform, spec)
    del image, label
    _save(file_of(results_dir, raw.case, "x"), array)
    _save(file_of(results_dir, raw.case, "y"), mask)
    digests, stamps = _describe(results_dir, raw.case)
    statistics = {"mean": float(array.mean(dtype=np.float64)), "deviation": float(array.std(dtype=np.float64))}
    boxes = foreground_boxes(mask, len(spec.classes))
    return raw.case, CaseRecord(transform, boxes, digests, raw.stamp(), statistics, stamps)


def _save(path: Path, array: NDArray[Any]) -> None:
    """Saves an array under its final name only once it is whole."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def _line(case: str, record: CaseRecord) -> str:
    shape = record.transform.shape if record.transform else ()
    return f"{case}: shape {shape}, mean {record.statistics['mean']:.2f}, std {record.statistics['deviation']:.2f}"


def _summarise(raw: RawDataset, records: dict[str, CaseRecord], done_now: int, results_dir: Path) -> None:
    shapes = np.array([record.transform.shape for record in records.values() if record.transform])
    means = [record.statistics["mean"] for record in records.values()]
    deviations = [record.statistics["deviation"] for record in records.values()]
    print(
        f"median shape {tuple(np.median(shapes, axis=0).astype(int).tolist())}, "
        f"mean {np.median(means):.2f}, std {np.median(deviations):.2f}"
    )
    print(
        f"{len(records)} cases ({done_now} now, {len(records) - done_now} already done): "
        f"{len(raw.split['train'])} to train, {len(raw.split['evaluation'])} to evaluate, in {results_dir}"
    )


def verify(results_dir: Path, checksums: Path | None) -> int:
    """Compares every file's MD5 with `dataset.json`, with `checksums` and, for the whole KiTS19, with MLPerf's
    fingerprints; names each file that differs.

    Returns:
        0 when everything agrees, 1 when something differs.

    Raises:
        UserError: nothing to verify, or `checksums` is no JSON of {name: MD5}.
    """
    files = sorted([*results_dir.glob("*_x.npy"), *results_dir.glob("*_y.npy")])
    if not files:
        raise UserError(f"--results_dir {results_dir}: no preprocessed cases in it")
    stamps = {path.name: stamp_of(path) for path in files}
    found = {path.name: md5_of(path) for path in tqdm(files, desc="MD5", unit="file", disable=None)}
    is_good = True
    if (results_dir / INDEX_NAME).exists():
        index = read_index(results_dir / INDEX_NAME)
        recorded = recorded_digests(index.cases)
        is_good &= _compare(found, recorded, INDEX_NAME)
        # The next run need not hash these, whatever copied or touched them.
        good = {name: stamps[name] for name, md5 in found.items() if recorded.get(name) == md5}
        keep_verified(results_dir, index.cases, good)
    if checksums is not None:
        is_good &= _compare(found, _read_checksums(checksums), checksums.name)
    if len(found) == 2 * MLPERF_CASES and all(name.startswith("case_") for name in found):
        for what, (kinds, expected) in MLPERF_FINGERPRINTS.items():
            actual = fingerprint({name: md5 for name, md5 in found.items() if name[-5] in kinds})
            print(f"MLPerf's {what}: {'identical' if actual == expected else f'DIFFERENT ({actual})'}")
            is_good &= actual == expected
    else:
        print(f"{len(found)} files: MLPerf's fingerprints are those of KiTS19's {2 * MLPERF_CASES}, not compared")
    return 0 if is_good else 1


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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


if __name__ == "__main__":
    sys.exit(run_program(main, "preprocess_dataset.py"))
