"""`submission run`: makes the runs of a result one after another, each from scratch with its own seed and folder."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from common.errors import DIVERGED_EXIT, USER_ERROR_EXIT, UserError
from common.files import replacing
from common.messages import counted, logger
from data_loading.dataset import read_spec_and_split
from data_loading.integrity import split_digest
from runtime.arguments import RunConfig, parse_arguments
from runtime.environment import commit, cpu_name
from runtime.io_flags import PLACEHOLDER_ORG
from runtime.output_lock import locked
from runtime.run_spec import evaluation_ids
from submission.inspection import runs_folder, sha256_of
from submission.launching import PROJECT, clear_caches, launch_command, launch_run
from submission.logs import BENCHMARK, Log, read_log
from submission.record import INCIDENTAL_FLAGS, FailedRun, FinishedRun, Series, load_series
from submission.system import nvidia_smi

# Flags that the series sets for each run, or with which a run is not a complete one from scratch.
REFUSED_FLAGS = ("log_dir", "seed", "save_ckpt_path", "load_ckpt_path", "resume", "exec_mode", "benchmark")
# A run that fails is repeated once; after that the user has to find the cause.
ATTEMPTS = 2
OTHER_DATA = "its data set is not that of the earlier runs"


def run(options: argparse.Namespace) -> int:
    """Makes the runs that are still missing and copies their logs into the result folder."""
    config = check_arguments(options.arguments)
    launch = launch_command(options.launch, options.nproc_per_node)
    system = options.system or default_system(options)
    if not re.fullmatch(r"\w[\w.+-]*", system):
        raise UserError(f"--system {system!r} is used as a folder name: use letters, digits and . _ + -")
    folder = runs_folder(options.result_dir, system)
    results = options.result_dir / "results" / system / BENCHMARK
    folder.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    # A second series in the folder would take this one's run for a failed one.
    with locked(folder / "lock", str(folder), "cannot be written"):
        configuration = configuration_of(config, launch)
        series = load_series(folder) or Series(
            system=system, arguments=list(options.arguments), launch=launch, configuration=configuration
        )
        _complete(series)
        series.check_same(configuration)
        if series.configuration["data_digest"] is None:
            series.configuration["data_digest"] = configuration["data_digest"]

        def check() -> None:
            now = configuration_of(check_arguments(options.arguments), launch)
            # A busy disk may keep git from answering, which must not end a series of days.
            series.check_same(now | {"commit": now["commit"] or series.configuration.get("commit")})

        if series.runs:
            logger.info(f"{len(series.runs)} of {options.runs} runs are done, in {folder}")
        started, done_before = time.monotonic(), len(series.runs)
        while len(series.runs) < options.runs:
            done = _make_run(series, folder, options.clear_caches, options.runs, check=check)
            _copy_log(folder / done.folder, results / f"result_{len(series.runs)}.txt")
            series.runs.append(done)
            series.save(folder)
            seconds_per_run = (time.monotonic() - started) / (len(series.runs) - done_before)
            logger.info(_progress(series, options.runs, seconds_per_run))
        for number, done in enumerate(series.runs):
            if not (results / f"result_{number}.txt").exists():
                _copy_log(folder / done.folder, results / f"result_{number}.txt")
    return 0


def check_arguments(arguments: Sequence[str]) -> RunConfig:
    """Parses main.py's arguments. Raises UserError for flags that a series does not allow or main.py would refuse."""
    config, given = parse_arguments(arguments)
    if refused := sorted(given & set(REFUSED_FLAGS)):
        raise UserError(
            f"--{refused[0]} is not allowed in a series: each run is a complete one, with its own folder and seed"
        )
    if config.submission_org == PLACEHOLDER_ORG:
        raise UserError("set --submission_org; a placeholder is not accepted")
    return config


def default_system(options: argparse.Namespace) -> str:
    """Returns the system's name from its devices, such as 8xNVIDIA_H200. Raises UserError with `--launch`."""
    if options.launch is not None:
        raise UserError("--launch requires --system, the name of the system it launches on, such as 4xDGX-H200")
    # Not through torch, which would keep some GPU memory allocated as long as the series runs.
    name = f"{options.nproc_per_node}x{nvidia_smi('name') or cpu_name()}"
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")


def configuration_of(config: RunConfig, launch: Sequence[str]) -> dict[str, Any]:
    """Returns everything that the runs of a result must share, as JSON values: flags, data, code, PyTorch, launch."""
    flags = {name: value for name, value in config.to_json().items() if name not in INCIDENTAL_FLAGS}
    data_dir = resolve_data_dir(config.data_dir)
    values = flags | {"data_dir": str(data_dir), "data_digest": find_data_digest(data_dir)}
    values |= {"commit": commit(), "torch": torch.__version__, "launch": list(launch)}
    return dict(json.loads(json.dumps(values)))


def resolve_data_dir(data_dir: Path | str) -> Path:
    """Returns the folder that main.py reads: it runs in the project's folder, and links in the path may change."""
    return Path(os.path.realpath(PROJECT / data_dir))


def find_data_digest(data_dir: Path) -> str | None:
    """Returns the identity of a preprocessed folder, from its index alone.

    Returns:
        None: the folder cannot be read here. With `--launch` only the machines that train may have it; otherwise
            main.py says what is wrong with it.
    """
    try:
        _, split = read_spec_and_split(data_dir, evaluation_ids())
        return split_digest(data_dir, split)
    except (OSError, UserError):
        return None


def _complete(series: Series) -> None:
    """Completes the record of an earlier version, which has `--data_dir` as it was typed and no digest of the data."""
    values = series.configuration
    if "data_digest" not in values:
        known = {"data_dir": str(resolve_data_dir(str(values["data_dir"])))} if "data_dir" in values else {}
        series.configuration = values | known | {"data_digest": None}


def _make_run(series: Series, folder: Path, clear: str | None, total: int, *, check: Callable[[], None]) -> FinishedRun:
    """Makes one run; if it fails, records that and starts again from scratch.

    Args:
        clear: the command that clears the page cache, if any.
        check: raises UserError if flags, data or code have changed; called before each start, as the runs of a series
            may take days.

    Raises:
        UserError: main.py refused the arguments, the run failed repeatedly, or its data are not those of earlier runs.
    """
    name = f"run_{len(series.runs)}"
    if (folder / name).exists():  # this program ended during the run
        _set_aside(series, folder, name, "the series ended during this run")
    for _ in range(ATTEMPTS):
        check()
        logger.info(f"run {len(series.runs) + 1} of {total}: {folder / name / 'console.txt'}")
        status = launch_run(series.launch, series.arguments, folder / name, clear_caches(clear))
        log, record = _read_log(folder / name), _read_record(folder / name)
        data_digest = str(record.get("data_digest") or "")
        why = _why_failed(status, log, series.seeds)
        if why is None and data_digest and any(done.data_digest not in ("", data_digest) for done in series.runs):
            why = OTHER_DATA
        if why is None and log is not None:
            series.environment = series.environment or record.get("environment", {})
            return FinishedRun(
                folder=name,
                seed=int(log.values["seed"]),
                status="success" if log.converged else "aborted",
                epochs=log.epochs,
                clock_ms=log.clock_ms,
                sha256=sha256_of(log.path),
                data_digest=data_digest,
            )
        aside = _set_aside(series, folder, name, str(why))
        if status == USER_ERROR_EXIT:
            raise UserError(f"main.py refused to run: {_last_line(aside / 'console.txt')}")
        if why == OTHER_DATA:  # again it would take as long, and end so
            raise UserError(
                f"{aside}: {why}; give the machines the same --data_dir and start the series again: it continues from "
                "here"
            )
        logger.warning(f"{name} failed: {why}; see {aside / 'console.txt'}")
    raise UserError(
        f"{name} failed {ATTEMPTS} times; the last cause: {series.broken[-1].why}; "
        "fix the cause and start the series again: it continues from here"
    )


def _read_log(log_dir: Path) -> Log | None:
    path = log_dir / "unet3d.log"
    return read_log(path) if path.is_file() else None


def _why_failed(status: int, log: Log | None, used_seeds: set[int]) -> str | None:
    """Returns why the run cannot be part of a result; None if it can, converged or not."""
    if status not in (0, DIVERGED_EXIT):
        return f"exit status {status}"
    if log is None:
        return "no unet3d.log"
    if log.problems:
        return f"an invalid log: line {log.problems[0].line}: {log.problems[0].message}"
    if log.values["seed"] in used_seeds:
        return f"the same seed {log.values['seed']} as another run of this series"
    return None


def _set_aside(series: Series, folder: Path, name: str, why: str) -> Path:
    """Renames a failed run's folder and records the run with its seed."""
    seed = None
    with suppress(OSError, UserError):
        log = _read_log(folder / name)
        seed = log.values.get("seed") if log else None
    number = 1 + len(series.broken)
    while (aside := folder / f"{name}.broken_{number}").exists():
        number += 1
    (folder / name).rename(aside)
    series.broken.append(FailedRun(folder=aside.name, seed=seed if isinstance(seed, int) else None, why=why))
    series.save(folder)
    return aside


def _read_record(log_dir: Path) -> dict[str, Any]:
    """Returns a run's run.json; {} if there is none, or a damaged one."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        record = dict(json.loads((log_dir / "run.json").read_text(encoding="utf-8")))
        return record | {"environment": dict(record["environment"])}
    return {}


def _copy_log(log_dir: Path, result: Path) -> None:
    with replacing(result) as temporary:
        shutil.copyfile(log_dir / "unet3d.log", temporary)


def _progress(series: Series, total: int, seconds_per_run: float) -> str:
    done = series.runs[-1]
    how = "target reached" if done.status == "success" else "target not reached"
    remaining = timedelta(seconds=round((total - len(series.runs)) * seconds_per_run))
    return (
        f"run {len(series.runs)} of {total}: {how} after {counted(done.epochs, 'epoch')}, "
        f"{done.clock_ms / 60_000:.2f} min, seed {done.seed}"
        + (f"; about {remaining} left" if len(series.runs) < total else "")
    )


def _last_line(console: Path) -> str:
    with suppress(OSError, IndexError):
        return console.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
    return "its console output is empty"
