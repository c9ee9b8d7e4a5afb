"""Preprocesses raw scans into training volumes, bit for bit like MLPerf's reference, and verifies them.

    python3 preprocess_dataset.py --data_dir RAW --results_dir OUT
    python3 preprocess_dataset.py --data_dir RAW --results_dir OUT --dataset msd --split_ratios 0.6 0.2 0.2
    python3 preprocess_dataset.py --data_dir SERIES --labels_dir MASKS --results_dir OUT --dataset dicom \\
        --labels 86,87=1:muscle --intensity_window -160 240 --intensity minmax
    python3 preprocess_dataset.py --results_dir OUT --mode verify [--checksums FILE]

It can be interrupted at any time and started again: finished cases that are intact are skipped, and files get their
final names only when they are complete. `dataset.json` appears when every case is finished.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import registry
from common.cli import Parser, renamed_values
from common.errors import UserError, run_program
from common.messages import logger
from data_loading.readers import READERS
from data_loading.spec import INTENSITIES, RENAMED_INTENSITIES

if TYPE_CHECKING:
    from data_loading.readers.base import RawDataset, Reader


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    # argparse takes -1=2 for a flag unless it contains a space.
    words = [f" {word}" if re.match(r"-\d[^=]*=", word) else word for word in words]
    arguments = vars(make_parser().parse_args(words))
    mode, results_dir, checksums = (arguments.pop(name) for name in ("mode", "results_dir", "checksums"))
    dataset, data_dir = arguments.pop("dataset"), arguments.pop("data_dir")
    num_workers, seed = arguments.pop("num_workers"), arguments.pop("seed")
    if num_workers < 1 or seed < 0:
        raise UserError("--num_workers must be at least 1 and --seed at least 0")
    if mode == "verify":
        from data_loading.verification import verify

        return verify(results_dir, checksums)
    if data_dir is None or not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such folder; give the folder of the raw scans")
    for contents, folder in (("raw scans", data_dir), ("masks", arguments.get("labels_dir"))):
        if folder and folder.exists() and results_dir.exists() and results_dir.samefile(folder):
            raise UserError(f"--results_dir {results_dir} is the folder of the {contents}; choose another folder")
    # --help and mistakes on the command line are answered before these imports, which take half a second.
    from data_loading.writer import preprocess

    raw = read_raw(dataset, data_dir, seed, arguments)
    for note in raw.notes:
        logger.info(note)
    preprocess(raw, results_dir, num_workers)
    return 0


def read_raw(dataset: str, data_dir: Path, seed: int, flags: dict[str, Any]) -> RawDataset:
    """Finds the cases of a raw data set.

    Args:
        dataset: the reader's name in `READERS`.
        flags: values of the given reader options, by the names of their flags.

    Raises:
        UserError: an unknown name, an option that the reader does not accept, or an error of the reader.
    """
    read = find_reader(dataset)
    accepted = READERS[dataset].options
    if unknown := [name for name in flags if name not in accepted]:
        listed = ", ".join(f"--{name}" for name in sorted(accepted))
        raise UserError(f"--{unknown[0]} does not apply to --dataset {dataset}, which accepts {listed}")
    from data_loading.readers.base import ReaderOptions

    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    try:
        raw = read(data_dir, ReaderOptions(seed=seed, **flags))
    except OSError as error:  # a folder without permission, a disk that fails
        raise UserError(f"{error.filename or data_dir}: cannot be read: {error.strerror or error}") from None
    provenance = {"dataset": dataset, "seed": seed, **flags}
    if labels_dir := flags.get("labels_dir"):
        # Relative, as data that is moved as a whole remains the same data.
        provenance["labels_dir"] = os.path.relpath(labels_dir.resolve(), data_dir.resolve())
    return replace(raw, provenance=provenance)


def find_reader(dataset: str) -> Reader:
    """Returns the reader called `dataset`. Raises UserError for an unknown name or a missing package."""
    if dataset not in READERS:
        near = difflib.get_close_matches(dataset, READERS, n=3) or sorted(READERS)
        raise UserError(f"--dataset {dataset!r}: unknown data set; available: {', '.join(near)}")
    entry = READERS[dataset]
    return registry.load(entry.function, f"--dataset {dataset}", entry.extra)


def make_parser() -> Parser:
    """Returns the command line. Options of readers are absent from the result unless they are given."""
    parser = Parser(
        prog="preprocess_dataset.py",
        description="Preprocesses raw scans into training volumes, and verifies them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_dir", type=Path, metavar="PATH", help="folder of the raw scans (not needed to verify)")
    add("--results_dir", type=Path, metavar="PATH", required=True, help="folder for the volumes and dataset.json")
    add("--mode", choices=("preprocess", "verify"), default="preprocess", help="(default: preprocess)")
    add("--dataset", metavar="NAME", default="kits19", help=f"{', '.join(sorted(READERS))} (default: kits19)")
    add("--num_workers", type=int, metavar="N", default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--seed", type=int, metavar="N", default=0, help="seed of the split (default: 0)")
    add("--checksums", type=Path, metavar="PATH", help="verify: JSON file {name: MD5} to compare with")
    _add_reader_options(parser)
    return parser


def _add_reader_options(parser: Parser) -> None:
    """Adds the flags of `ReaderOptions`."""
    add = parser.add_argument_group("options of data sets", argument_default=argparse.SUPPRESS).add_argument
    split_ratios = add(
        "--split_ratios",
        type=float,
        nargs="+",
        metavar="RATIO",
        help="shares of the patients: train and evaluation, or train, evaluation and test, such as 0.6 0.2 0.2 "
        "(default: 0.8 0.2; kits19: MLPerf's list)",
    )
    add(
        "--labels",
        type=str.strip,
        nargs="+",
        metavar="VALUES=CLASS",
        help="select, merge and name classes, such as 86,87=1:muscle 5=2; all other values are background "
        "(default: one class per value, in ascending order)",
    )
    add(
        "--drop_empty",
        action=argparse.BooleanOptionalAction,
        help="leave out training cases whose mask is empty (default: only for dicom and with --slices_per_case)",
    )
    add("--labels_dir", type=Path, metavar="PATH", help="dicom, images, nifti: folder of the masks")
    slices_per_case = add(
        "--slices_per_case", type=int, metavar="N", help="dicom, nifti: divide each scan into cases of N slices"
    )
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="images: resize to H x W pixels")
    intensity_window = add(
        "--intensity_window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="clip values to this range (CT: HU)"
    )
    add(
        "--intensity",
        type=renamed_values("--intensity", RENAMED_INTENSITIES),
        choices=INTENSITIES,
        help="zscore: by mean and standard deviation of each scan; minmax: to [0, 1], by the window or the range of "
        "each scan; none: unchanged (default: zscore; kits19: MLPerf's mean and standard deviation)",
    )
    add("--spacing", type=float, nargs=3, metavar=("D_MM", "H_MM", "W_MM"), help="resample to this spacing")
    add("--orientation", metavar="CODE", help="reorient the axes of every scan, such as RAS")
    add(
        "--foreground_crop",
        action="store_true",
        help="crop to the bounding box of all voxels above the window's LOW (above the mean without a window)",
    )
    add(
        "--ignore_label",
        type=int,
        metavar="VALUE",
        help="value of voxels without a class in the masks: they count in no loss and no score (default: none; "
        'nnunet: the label "ignore")',
    )
    parser.add_old_spelling("--split", split_ratios)
    parser.add_old_spelling("--slab", slices_per_case)
    parser.add_old_spelling("--window", intensity_window)


if __name__ == "__main__":
    sys.exit(run_program(main, "preprocess_dataset.py"))
