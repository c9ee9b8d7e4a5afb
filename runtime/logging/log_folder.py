"""The files of a log folder: an earlier run's are kept under a number, and a run's own are listed at its end."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from common.files import rotate

LOG_NAMES = ("unet3d.log", "log.jsonl", "run.json", "run.args", "benchmark.json", "rates.csv")

# Tables of evaluations, which would seem to be the new run's.
TABLE_NAMES = ("evaluation.csv", "folds.csv")


def rotate_logs(log_dir: Path) -> None:
    """Makes the log folder and renames an earlier run's files to the next free number (unet3d.1.log, …).

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(log_dir, os.W_OK):
            raise PermissionError(13, "permission denied")
        rotate([log_dir / name for name in (*LOG_NAMES, *TABLE_NAMES, "tensorboard")])
    except OSError as error:
        raise UserError(f"--log_dir {log_dir}: cannot be written: {error.strerror or error}") from None


def run_files(log_dir: Path, checkpoint: Path | None) -> list[str]:
    """Returns the files that a run has written, for trackers to upload: checkpoint, logs, report and pictures."""
    logs = [log_dir / name for name in (*LOG_NAMES, "report.html")]
    files = [*([checkpoint] if checkpoint else []), *logs, *sorted(log_dir.glob("report/*.png"))]
    written_at = {}
    for file in files:
        with suppress(OSError):  # missing, or a checkpoint that is being replaced while the run is aborted
            written_at[file] = file.stat().st_mtime
    # An earlier run's report or checkpoint may still be there; run.json is the first file of this run.
    began_at = written_at.get(log_dir / "run.json", math.inf)
    return [str(file) for file, time_s in written_at.items() if time_s >= began_at]
