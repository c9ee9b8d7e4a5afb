"""Writes reports: `LOG_DIR/report.html`, a self-contained page, with its images as PNG files in `LOG_DIR/report/`.

    python3 -m report LOGS
    python3 -m report LOGS1 LOGS2 LOGS3      # comparison: LOGS1/comparison.html

`--exec_mode report` does the same. Only these pages and images are written; the run's own files are not changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from common.errors import UserError
from common.files import replacing
from common.messages import logger
from common.registry import Spec
from report.compliance import check
from report.folds import are_folds, join_folds, write_folds
from report.records import Run, names_of, read_run
from runtime.arguments import RunConfig
from runtime.distributed.world import World

PAGE_NAME, IMAGES_NAME, COMPARISON_NAME = "report.html", "report", "comparison.html"


def main(config: RunConfig, given: frozenset[str], world: World) -> int:
    """Runs `--exec_mode report`: writes the page of one run, or of several, and prints its path.

    Args:
        given: names of the flags that were on the command line.
    """
    if not world.is_main:
        return 0
    if config.compare:
        path = write_comparison([config.log_dir, *config.compare])
    else:
        path = write_report(
            config.log_dir,
            device=world.device,
            checkpoint=next(iter(config.load_ckpt_path), None),
            data_dir=config.data_dir if "data_dir" in given else None,
            model=config.model if "model" in given else None,
        )
    print(path, flush=True)
    return 0


def write_report(
    log_dir: Path,
    *,
    device: torch.device,
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    model: Spec | None = None,
) -> Path:
    """Writes the page of the newest run in a log folder.

    Args:
        device: where the cases shown are predicted.
        checkpoint: predicts the cases shown; None: the run's own.
        data_dir: preprocessed data set; None: the one the run used.
        model: spec of the network, if the user gave one; None: the checkpoint's.

    Returns:
        Path of the page.

    Raises:
        UserError: no log, a folder that cannot be written, or matplotlib is missing.
    """
    run = read_run(log_dir)
    from report import cases, charts, page  # matplotlib is optional

    def make(folder: Path) -> str:
        drawn, shown, no_images = charts.draw_run(run, folder), [], ""
        try:
            shown = cases.draw_cases(run, folder, device=device, checkpoint=checkpoint, data_dir=data_dir, model=model)
        except UserError as error:
            no_images = str(error)
        except torch.OutOfMemoryError:
            no_images = "the device ran out of memory"
        compliance = check(log_dir / "unet3d.log", run.ruleset)
        return page.run_page(run, drawn, compliance=compliance, shown=shown, no_images=no_images)

    return _write_page(log_dir, PAGE_NAME, make)


def write_comparison(log_dirs: Sequence[Path]) -> Path:
    """Writes the comparison of several runs into the first one's folder.

    Raises:
        UserError: as `write_report` does, or a folder is given twice.
    """
    _check_distinct(log_dirs)
    runs = [read_run(log_dir) for log_dir in log_dirs]
    if are_folds(runs):
        _report_folds(runs)
    from report import comparison  # matplotlib is optional

    return _write_page(log_dirs[0], COMPARISON_NAME, lambda folder: comparison.comparison_page(runs, folder))


def _check_distinct(log_dirs: Sequence[Path]) -> None:
    """Raises UserError if two paths lead to one folder: its run would count as two, and its cases as repeated."""
    seen: dict[str, Path] = {}
    for log_dir in log_dirs:
        real = os.path.realpath(log_dir)
        if real in seen:
            what = "is given twice" if seen[real] == log_dir else f"and {seen[real]} are one folder"
            raise UserError(f"--log_dir {log_dir} {what}; give each run once")
        seen[real] = log_dir


def _report_folds(runs: Sequence[Run]) -> None:
    """Prints the result over the cases of all folds and writes the table of the best evaluations."""
    names = names_of(runs)
    for last in (False, True):
        if joined := join_folds(runs, names, last=last):
            logger.info(f"{'last' if last else 'best'} evaluations: {joined.describe()}")
            if not last:
                logger.info(f"cases {write_folds(runs[0].folder, joined)}")
                for problem in joined.problems:
                    logger.warning(problem)


def _write_page(log_dir: Path, name: str, make: Callable[[Path], str]) -> Path:
    """Writes LOG_DIR/NAME atomically; `make` returns the page and writes its images to the folder it is given."""
    folder, path = log_dir / IMAGES_NAME, log_dir / name
    try:
        folder.mkdir(exist_ok=True)
        text = make(folder)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--log_dir {log_dir}: the report cannot be written: {error.strerror or error}") from None
    return path
