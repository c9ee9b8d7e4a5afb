"""What preprocessing prints about each case and about the whole data set, and warns of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from common.messages import counted
from data_loading.index import CaseRecord
from data_loading.io.orientation import orientation_of
from data_loading.spec import DatasetSpec


def describe_case(case: str, record: CaseRecord | None) -> str:
    """Returns the line of a finished case; a record of None means that it was dropped."""
    if record is None:
        return f"{case}: dropped, its mask is empty"
    shape = record.transform.shape if record.transform else ()
    labels_cut = record.statistics.get("labelled_voxels_cut")
    ignored = record.statistics.get("ignored_voxels")
    return (
        f"{case}: shape {shape}, mean {record.statistics['mean']:.2f}, std {record.statistics['std']:.2f}"
        f"{f', {ignored:g} voxels with the ignore label' if ignored else ''}"
        f"{f', {labels_cut:g} labelled voxels outside the foreground crop' if labels_cut else ''}"
        f"{''.join(f'; {line}' for line in record.notes)}"
    )


def print_summary(split: dict[str, list[str]], records: dict[str, CaseRecord], done: str, results_dir: Path) -> None:
    """Prints the median case and the number of cases of each subset; `done` says how many of them are new."""
    shapes = np.array([record.transform.shape for record in records.values() if record.transform])
    means = [record.statistics["mean"] for record in records.values()]
    stds = [record.statistics["std"] for record in records.values()]
    print(
        f"median shape {tuple(np.median(shapes, axis=0).astype(int).tolist())}, "
        f"mean {np.median(means):.2f}, std {np.median(stds):.2f}"
    )
    parts = {"train": "to train", "evaluation": "to evaluate", "test": "to test"}
    counts = ", ".join(f"{len(split[subset])} {what}" for subset, what in parts.items() if subset in split)
    print(f"{counted(len(records), 'case')} ({done}): {counts}, in {results_dir}")


def describe_classes(spec: DatasetSpec, records: Mapping[str, CaseRecord]) -> str:
    """Returns a line with the voxels of each class, which shows a class that is none, such as a grey of a soft edge."""
    known = [record.voxels for record in records.values() if record.voxels]
    totals = [(name, [voxels[value] for voxels in known]) for value, name in enumerate(spec.classes)]
    listed = ", ".join(
        f"{name} {sum(counts)} in {counted(sum(count > 0 for count in counts), 'case')}" for name, counts in totals
    )
    if spec.ignore_label is not None:
        ignored = [n for record in records.values() if (n := record.statistics.get("ignored_voxels"))]
        listed += f"; with the ignore label {sum(ignored):g} in {counted(len(ignored), 'case')}"
    unknown = len(records) - len(known)
    return f"voxels of the classes: {listed}" + (f" (not counted: {counted(unknown, 'older case')})" if unknown else "")


def data_warnings(spec: DatasetSpec, split: dict[str, list[str]], records: dict[str, CaseRecord]) -> Iterator[str]:
    """Yields warnings about well-formed data that is probably a mistake."""
    seen: dict[str, tuple[str, str]] = {}
    for subset, cases in split.items():
        for case in cases:
            first, other = seen.setdefault(records[case].digests["x"], (subset, case))
            if first != subset:
                yield f"{case} ({subset}) is the same scan as {other} ({first}); scores will be too good"
    orientations = Counter(
        orientation_of(record.transform.cropped.affine) for record in records.values() if record.transform
    )
    if len(orientations) > 1:
        counts = ", ".join(f"{count} {orientation}" for orientation, count in orientations.most_common())
        most_common = orientations.most_common(1)[0][0]
        yield f"the scans have different orientations ({counts}); --orientation {most_common} unifies them"
    for value, name in enumerate(spec.classes[1:], 1):
        if split["train"] and not any(value in records[case].boxes for case in split["train"]):
            yield f"class {value} ({name}) is in no training case"
