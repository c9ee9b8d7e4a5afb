"""One page a run: `LOG_DIR/report.html`, a file that opens without a network; its pictures as PNG in `LOG_DIR/report/`.

    python3 main.py --exec_mode report --log_dir LOGS
    python3 main.py --exec_mode report --log_dir LOGS1 LOGS2 LOGS3      # compared: LOGS1/comparison.html

What lives here: `records` reads logs, `figures` and `cases` draw, `page` and `comparison` write. It reads what runs
have left and changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from common.errors import UserError
from common.files import replacing
from common.registry import Spec
from report.compliance import check
from report.records import read_run
from runtime.arguments import RunConfig
from runtime.distributed.world import World

PAGE, PICTURES, COMPARISON = "report.html", "report", "comparison.html"


def report(config: RunConfig, given: frozenset[str], world: World) -> int:
    """`--exec_mode report`: writes the page of one run, or the comparison of several, and prints where it is."""
    if not world.is_main:
        return 0
    if config.compare:
        written = write_comparison([config.log_dir, *config.compare])
    else:
        checkpoint = next(iter(config.load_ckpt_path), None)
        data_dir = config.data_dir if "data_dir" in given else None
        model = config.model if "model" in given else None
        written = write_report(config.log_dir, checkpoint, data_dir, world.device, model)
    print(written, flush=True)
    return 0


def write_report(
    log_dir: Path, checkpoint: Path | None, data_dir: Path | None, device: torch.device, model: Spec | None = None
) -> Path:
    """Writes the page of a log folder's newest run.

    Args:
        checkpoint, data_dir: for the pictures of cases; None: where the run had them.
        model: the network's spec, where it was given here; None: the checkpoint's.

    Raises:
        UserError: no log there, a folder that cannot be written, or no matplotlib.
    """
    run = read_run(log_dir)
    _need_matplotlib()
    from report import cases, figures, page

    shown, left_out = [], ""
    with _written(log_dir) as folder:
        charts = figures.draw_run(run, folder)
        try:
            shown = cases.draw_cases(run, checkpoint, data_dir, device, folder, model)
        except UserError as error:
            left_out = str(error)
        except torch.OutOfMemoryError:
            left_out = "the device has no memory left"
        told = check(log_dir / "unet3d.log", run.ruleset)
        return _write(log_dir / PAGE, page.run_page(run, charts, shown, left_out, told))


def write_comparison(log_dirs: Sequence[Path]) -> Path:
    """Writes several runs' comparison into the first one's folder. Raises UserError as `write_report` does."""
    runs = [read_run(log_dir) for log_dir in log_dirs]
    _need_matplotlib()
    from report import comparison

    with _written(log_dirs[0]) as folder:
        return _write(log_dirs[0] / COMPARISON, comparison.comparison_page(runs, folder))


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("the report is drawn by matplotlib, which is not installed: pip install '.[report]'") from None


@contextmanager
def _written(log_dir: Path) -> Iterator[Path]:
    """The folder of the pictures; a disk that is full or may not be written is told in one line."""
    folder = log_dir / PICTURES
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    except OSError as error:
        raise UserError(f"--log_dir {log_dir}: the report cannot be written: {error.strerror or error}") from None


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
