"""Raw scans to training volumes, bit for bit as MLPerf's reference makes them; and their verification.

    python3 preprocess_dataset.py --data_dir RAW --results_dir OUT
    python3 preprocess_dataset.py --data_dir RAW --results_dir OUT --dataset msd --split 0.6 0.2 0.2
    python3 preprocess_dataset.py --data_dir SERIES --labels_dir MASKS --results_dir OUT --dataset dicom \\
        --labels 86,87=1:muscle --window -160 240 --intensity unit
    python3 preprocess_dataset.py --results_dir OUT --mode verify [--checksums FILE]

A case that is done and intact is not done again, and nothing half-written is ever left under a final name: interrupt
it at will and start it again. `dataset.json` appears when every case is done.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import registry
from common.cli import Parser
from common.errors import UserError, run_program
from common.messages import logger
from data_loading.readers.base import RawDataset, flags_of
from data_loading.readers.kits19 import RAW_LAYOUTS, RawReader
from data_loading.spec import INTENSITIES
from data_loading.verification import verify
from data_loading.writer import preprocess

EVALUATION_CASES = Path(__file__).resolve().parent / "evaluation_cases.txt"


def main(argv: list[str] | None = None) -> int:
    arguments = vars(make_parser().parse_args(argv))
    mode, data_dir, results_dir = (arguments.pop(name) for name in ("mode", "data_dir", "results_dir"))
    dataset, num_workers, seed, checksums = (
        arguments.pop(name) for name in ("dataset", "num_workers", "seed", "checksums")
    )
    if num_workers < 1 or seed < 0:
        raise UserError("--num_workers must be at least 1 and --seed at least 0")
    if mode == "verify":
        return verify(results_dir, checksums)
    if data_dir is None or not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such folder; give the folder of the raw scans")
    if results_dir.exists():
        for name, folder in (("data_dir", data_dir), ("labels_dir", arguments.get("labels_dir"))):
            if folder and folder.exists() and results_dir.samefile(folder):
                what = "raw scans" if name == "data_dir" else "masks"
                raise UserError(f"--results_dir {results_dir} holds the {what} themselves; name another folder")
    raw = read_raw(dataset, data_dir, seed, arguments)
    for note in raw.notes:
        logger.info(note)
    preprocess(raw, results_dir, num_workers)
    return 0


def read_raw(dataset: str, data_dir: Path, seed: int, flags: dict[str, Any]) -> RawDataset:
    """The raw data set of that name; `flags` are those of its own that were given.

    Raises:
        UserError: an unknown name, a flag that this data set does not take, or what its reader refuses.
    """
    read = find_reader(dataset)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    allowed = flags_of(read)
    for name in flags:
        if name not in allowed:
            listed = ", ".join(f"--{flag}" for flag in sorted(allowed))
            raise UserError(f"--{name} means nothing for --dataset {dataset}, which takes {listed}")
    evaluation_ids = EVALUATION_CASES.read_text(encoding="utf-8").split()
    try:
        raw = read(data_dir, evaluation_ids, seed, **flags)
    except OSError as error:  # a folder that may not be entered, a disk that fails
        raise UserError(f"{error.filename or data_dir}: cannot be read: {error.strerror or error}") from None
    told = {name: value for name, value in flags.items() if not isinstance(value, Path)}
    return replace(raw, made={"dataset": dataset, "seed": seed, **told})


def find_reader(dataset: str) -> RawReader:
    """The reader of that name. Raises UserError where there is none, or a package that it needs is missing."""
    if dataset not in RAW_LAYOUTS:
        near = difflib.get_close_matches(dataset, RAW_LAYOUTS, n=3) or sorted(RAW_LAYOUTS)
        raise UserError(f"--dataset {dataset!r} does not exist; there is {', '.join(near)}")
    entry = RAW_LAYOUTS[dataset]
    reader: RawReader = registry.load(entry, f"--dataset {dataset}", dataset) if isinstance(entry, str) else entry
    return reader


def make_parser() -> argparse.ArgumentParser:
    """The command line; the data sets' own flags are absent unless they are given."""
    parser = Parser(
        prog="preprocess_dataset.py",
        description="Raw scans to training volumes, and their verification.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_dir", type=Path, help="raw scans (not needed to verify)")
    add("--results_dir", type=Path, required=True, help="training volumes and dataset.json")
    add("--mode", choices=("preprocess", "verify"), default="preprocess")
    add("--dataset", default="kits19", help=f"layout of --data_dir: {', '.join(sorted(RAW_LAYOUTS))} (default: kits19)")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--seed", type=int, default=0, help="of the split")
    add("--checksums", type=Path, help="verify: JSON of {file: MD5}, such as MLPerf's checksum.json")
    group = parser.add_argument_group("a data set's own", argument_default=argparse.SUPPRESS)
    add = group.add_argument
    add(
        "--split",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="train and evaluation, or train, evaluation and test, by patient, such as 0.6 0.2 0.2 (default: 0.8 0.2, "
        "of kits19 MLPerf's list)",
    )
    add(
        "--labels",
        nargs="+",
        metavar="VALUES=CLASS",
        help="merges and chooses, the rest is background: 86,87=1:muscle 5=2 (default: each value is a class, in "
        "rising order)",
    )
    add(
        "--drop_empty",
        action=argparse.BooleanOptionalAction,
        help="leave out training cases whose mask is empty (default: of dicom and of slabs alone)",
    )
    add("--labels_dir", type=Path, help="dicom, images, nifti: the masks")
    add("--slab", type=int, metavar="N", help="dicom, nifti: every N slices of a scan are a case")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="images: resized to it")
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="clip to it (CT: in HU)")
    add(
        "--intensity",
        choices=INTENSITIES,
        help="zscore: of each scan; unit: to 0 to 1, of the window, else of each scan",
    )
    add("--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="resample to it, in mm")
    add("--orientation", metavar="RAS", help="turn every scan's axes to run this way")
    add(
        "--foreground_crop",
        action="store_true",
        help="cut to the box of what is above the window's lower end, without a window above the mean",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "preprocess_dataset.py"))
