"""Writes the preprocessed folder, in several processes; it may be interrupted anywhere and started again.

Finished, intact cases are skipped, and no partly written file ever has its final name. `dataset.json` appears when
every case is finished.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.errors import UserError, failure_of
from common.files import replacing
from common.messages import counted, logger
from common.progress import track
from data_loading.dataset import case_file
from data_loading.dataset_summary import data_warnings, describe_case, describe_classes, print_summary
from data_loading.index import INDEX_NAME, PARTIAL_INDEX_NAME, CaseRecord, DatasetIndex, read_index, write_json
from data_loading.integrity import VERIFIED_NAME, Stamp, file_md5, file_stamp
from data_loading.io.volume import Volume
from data_loading.preprocessing import GridTransform, foreground_boxes, preprocess_label
from data_loading.readers.base import RawCase, RawDataset
from data_loading.scan_checks import preprocess_scan
from data_loading.spec import KITS19, DatasetSpec


def preprocess(raw: RawDataset, results_dir: Path, num_workers: int) -> None:
    """Preprocesses every unfinished case, prints a line for each, and writes `dataset.json` last.

    Raises:
        UserError: bad cases (the others are preprocessed and kept), or a folder that cannot be written.
    """
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        # While cases are missing there must be no dataset.json: training would consider the data set complete.
        if (results_dir / INDEX_NAME).exists():
            os.replace(results_dir / INDEX_NAME, results_dir / PARTIAL_INDEX_NAME)
        # The index gets the current stamps of intact files; earlier stamps no longer count.
        (results_dir / VERIFIED_NAME).unlink(missing_ok=True)
        for stale in results_dir.glob(".*_[xy].npy.*.tmp"):  # left by a run that was killed
            stale.unlink(missing_ok=True)
        records = _intact_records(raw, results_dir)
        _write_index(results_dir / PARTIAL_INDEX_NAME, raw, {}, records)
        todo = [case for case in raw.cases if case.case not in records]
        dropped: list[str] = []
        failures: list[str] = []
        for case, record in track(_run(todo, results_dir, raw, num_workers), len(todo), "preprocessing", "case"):
            if isinstance(record, str):
                # The line that ends the program has the first reason.
                tqdm.write(f"{case}: failed" + (f": {record}" if failures else ""))
                failures.append(record)
                continue
            tqdm.write(describe_case(case, record))
            if record is None:
                dropped.append(case)
                continue
            records[case] = record
            _write_index(results_dir / PARTIAL_INDEX_NAME, raw, {}, records)
        if failures:
            raise UserError(_describe_failures(failures, len(raw.cases)))
        split = _without(raw.split, dropped)
        _write_index(results_dir / INDEX_NAME, raw, split, records, dropped=dropped)
        (results_dir / PARTIAL_INDEX_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--results_dir {results_dir}: cannot be written: {error.strerror or error}") from None
    print(describe_classes(raw.spec, records))
    done_now = len(todo) - len(dropped)
    print_summary(split, records, f"{done_now} now, {len(records) - done_now} already done", results_dir)
    if dropped:
        logger.info(f"{counted(len(dropped), 'training case')} dropped because their masks are empty")
    for message in data_warnings(raw.spec, split, records):
        logger.warning(message)


def _write_index(
    path: Path,
    raw: RawDataset,
    split: dict[str, list[str]],
    records: dict[str, CaseRecord],
    dropped: Sequence[str] = (),
) -> None:
    provenance = {**raw.provenance} | ({"dropped": sorted(dropped)} if dropped else {})
    write_json(path, DatasetIndex(spec=raw.spec, split=split, cases=records, provenance=provenance).to_json())


def _describe_failures(failures: Sequence[str], total: int) -> str:
    """Returns one line for the cases that could not be preprocessed."""
    if total == 1:
        return failures[0]
    return f"{len(failures)} of {total} cases failed, the others are kept; the first: {failures[0]}"


def _without(split: Mapping[str, Sequence[str]], dropped: Collection[str]) -> dict[str, list[str]]:
    """Returns the split without the dropped cases. Raises UserError when no training case is left."""
    left = {subset: [case for case in cases if case not in dropped] for subset, cases in split.items()}
    if dropped and not left["train"]:
        raise UserError("every training case has an empty mask; do the values in --labels occur in the masks?")
    return left


def _intact_records(raw: RawDataset, results_dir: Path) -> dict[str, CaseRecord]:
    """Returns the records of an earlier, perhaps interrupted run whose sources and files are unchanged."""
    partial_index = results_dir / PARTIAL_INDEX_NAME
    if not partial_index.exists():
        return {}
    try:
        index = read_index(partial_index)
    except UserError as error:
        logger.info(f"starting over: {error}")
        return {}
    if replace(index.spec, name=raw.spec.name) != raw.spec:
        return {}
    # Masks of another annotator may have the same names, sizes and times.
    labels_dir, earlier = (made.get("labels_dir") for made in (raw.provenance, index.provenance))
    if earlier not in (None, labels_dir):
        now = f"are in {labels_dir}" if labels_dir else "lie beside the scans"
        logger.info(f"starting over: the masks {now}, no longer in {earlier}, seen from --data_dir")
        return {}
    intact: dict[str, CaseRecord] = {}
    for case in track(raw.cases, len(raw.cases), "checking finished cases", "case"):
        record = index.cases.get(case.case)
        if record and raw.drop_empty and case.case in raw.split["train"] and not any(record.voxels[1:]):
            continue  # its mask may be empty
        if record and record.source_stamp == case.stamp():
            digests, stamps = _hash_files(results_dir, case.case)
            if digests == record.digests:
                # The stamps may differ: the files may have been copied or touched.
                intact[case.case] = replace(record, stamps=stamps, patient=case.patient)
    return intact


def _hash_files(folder: Path, case: str) -> tuple[dict[str, str], dict[str, Stamp]]:
    """Returns MD5s and stamps of a case's existing files, by kind; stamps are taken before the files are read."""
    paths = {kind: path for kind in "xy" if (path := case_file(folder, case, kind)).exists()}
    stamps = {kind: file_stamp(path) for kind, path in paths.items()}
    return {kind: file_md5(path) for kind, path in paths.items()}, stamps


def _run(
    todo: list[RawCase], results_dir: Path, raw: RawDataset, num_workers: int
) -> Iterator[tuple[str, CaseRecord | str | None]]:
    """Yields each case's id with its record, None if it was dropped, or why it could not be preprocessed."""
    droppable = frozenset(raw.split["train"]) if raw.drop_empty else frozenset()
    work = partial(_try_case, results_dir=results_dir, spec=raw.spec, droppable=droppable)
    if num_workers == 1 or len(todo) < 2:
        yield from map(work, todo)
        return
    # spawn: a forked copy of a process that has run torch's thread pool may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(todo)), context, _start_worker) as pool:
        # Only this process reports Ctrl-C: workers started here inherit that SIGINT is ignored.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = [pool.submit(work, case) for case in todo]
        signal.signal(signal.SIGINT, handler)
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a preprocessing process was killed, most likely because memory ran out; use a smaller --num_workers "
                "(finished cases are kept)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # From now on Ctrl-C ends this process at once and silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch  # in the workers only: this process can hand out cases without it

    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process if its parent is killed; otherwise it would wait for work forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _try_case(
    raw: RawCase, results_dir: Path, spec: DatasetSpec, droppable: frozenset[str]
) -> tuple[str, CaseRecord | str | None]:
    """Preprocesses one case; returns the reason instead of a record if its data does not allow it."""
    try:
        return preprocess_case(raw, results_dir, spec, droppable)
    except OSError:  # a full disk ends the run
        raise
    except Exception as error:  # the other cases are still preprocessed
        return raw.case, failure_of(raw.case, error)


def preprocess_case(
    raw: RawCase, results_dir: Path, spec: DatasetSpec, droppable: frozenset[str] = frozenset()
) -> tuple[str, CaseRecord | None]:
    """Reads, preprocesses and saves one case.

    Args:
        droppable: cases that are dropped if their mask is empty.

    Returns:
        The case id, and its record; None if the case was dropped.

    Raises:
        UserError: image and mask do not match, a file is damaged, or the scan's values are (see `preprocess_scan`).
    """
    image, label = raw.read()
    labelled = label.array
    if spec.ignore_label is not None:
        labelled = np.where(labelled == spec.ignore_label, np.uint8(0), labelled)
    if raw.case in droppable and not labelled.any():
        for kind in "xy":  # left by an earlier run with another mask
            case_file(results_dir, raw.case, kind).unlink(missing_ok=True)
        return raw.case, None
    if len(image.array) != spec.channels:
        raise UserError(
            f"{raw.image}: has {counted(len(image.array), 'channel')}, but the data set states {spec.channels}"
        )
    if (highest := int(labelled.max())) >= len(spec.classes):
        raise UserError(f"{raw.label}: label {highest}, but the highest class is {len(spec.classes) - 1}{_hint(spec)}")
    # Plane by plane: bincount converts to 64 bits.
    voxels = np.asarray(sum(np.bincount(plane.ravel(), minlength=len(spec.classes)) for plane in labelled[0]))
    ignored = 0 if spec.ignore_label is None else int(np.count_nonzero(label.array == spec.ignore_label))
    voxels[0] -= ignored
    notes = (*image.notes, *label.notes)
    array, transform = preprocess_scan(image, spec, raw.image, is_whole=raw.is_whole())
    mask = preprocess_label(label, transform, spec)
    labels_cut = _count_cropped_labels(label, transform)
    del image, label, labelled
    _save(case_file(results_dir, raw.case, "x"), array)
    _save(case_file(results_dir, raw.case, "y"), mask)
    digests, stamps = _hash_files(results_dir, raw.case)
    statistics = {"mean": float(array.mean(dtype=np.float64)), "std": float(array.std(dtype=np.float64))}
    if labels_cut:
        statistics["labelled_voxels_cut"] = labels_cut
    if ignored:
        statistics["ignored_voxels"] = ignored
    boxes = foreground_boxes(mask, len(spec.classes))
    return raw.case, CaseRecord(
        transform=transform,
        boxes=boxes,
        digests=digests,
        source_stamp=raw.stamp(),
        statistics=statistics,
        stamps=stamps,
        patient=raw.patient,
        voxels=tuple(voxels.tolist()),
        notes=notes,
    )


def _hint(spec: DatasetSpec) -> str:
    """Returns what a label beyond the classes most likely means."""
    if spec.classes != KITS19.classes:
        return ""
    return (
        "; the masks of KiTS21 and KiTS23 have cysts as label 3: fetch KiTS19's with python3 -m "
        "data_loading.download_kits19, or merge the labels with --labels 1,3=1:kidney 2=2:tumour (open division)"
    )


def _count_cropped_labels(label: Volume, transform: GridTransform) -> int:
    """Returns the number of labelled voxels outside the foreground crop."""
    if not transform.crop:
        return 0
    uncropped = replace(transform, crop=None, resampled_shape=transform.reoriented.shape)
    cropped = replace(transform, resampled_shape=transform.cropped.shape)
    plain = DatasetSpec(name="", classes=())
    before, after = (np.count_nonzero(preprocess_label(label, each, plain)) for each in (uncropped, cropped))
    return int(before - after)


def _save(path: Path, array: NDArray[Any]) -> None:
    """Saves an array atomically."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
