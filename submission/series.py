"""`submission run`: a result's runs one after another, each from scratch, with a seed and a log folder of its own."""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from common.errors import DIVERGED_EXIT, USER_ERROR_EXIT, UserError
from common.files import replacing
from common.messages import logger
from runtime.arguments import RunConfig, parse_arguments
from runtime.environment import commit, cpu_name
from runtime.io_flags import PLACEHOLDER_ORG
from submission.inspection import digest_of, runs_folder
from submission.launching import clear_caches, launch_run, launcher
from submission.logs import BENCHMARK, Log, read_log
from submission.record import INCIDENTAL, Broken, Done, Series, load_series
from submission.system import nvidia

# What the series gives each run itself, or what makes one no run from scratch.
OWN_FLAGS = ("log_dir", "seed", "save_ckpt_path", "load_ckpt_path", "resume", "exec_mode", "benchmark")
# A run that was broken off is done again; one that breaks off again has a cause that a person must find.
ATTEMPTS = 2


def run(options: argparse.Namespace) -> int:
    """Makes the runs that are still to be made, and puts each log in its place."""
    config = check_arguments(options.arguments)
    launch = launcher(options.launch, options.nproc_per_node)
    system = options.system or default_system(options)
    if not re.fullmatch(r"\w[\w.+-]*", system):
        raise UserError(f"--system {system!r} becomes a folder's name: use letters, digits and . _ + -")
    folder = runs_folder(options.result_dir, system)
    results = options.result_dir / "results" / system / BENCHMARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--result_dir {options.result_dir}: cannot be written: {error.strerror}") from None
    with _alone(folder):
        series = begin(folder, system, options.arguments, launch, configuration_of(config, launch))
        if series.runs:
            logger.info(f"{len(series.runs)} of {options.runs} runs are done, in {folder}")
        began, before = time.monotonic(), len(series.runs)
        while len(series.runs) < options.runs:
            done = _make_run(series, folder, options.clear_caches, options.runs)
            _put_in_place(folder / done.folder, results / f"result_{len(series.runs)}.txt")
            series.runs.append(done)
            series.save(folder)
            seconds_a_run = (time.monotonic() - began) / (len(series.runs) - before)
            logger.info(_progress(series, options.runs, seconds_a_run))
        _mend_places(series, folder, results)
    return 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two series in one folder would take each other's runs for broken ones; a full disk is told in one line."""
    try:
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another `submission run` is at work there") from None
            yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


def begin(
    folder: Path, system: str, arguments: Sequence[str], launch: list[str], configuration: dict[str, Any]
) -> Series:
    """The folder's series, or a new one. Raises UserError where it was begun with another configuration."""
    series = load_series(folder)
    if series is None:
        series = Series(system, list(arguments), launch, json.loads(json.dumps(configuration)))
    series.check_same(configuration)
    return series


def check_arguments(arguments: Sequence[str]) -> RunConfig:
    """The runs' configuration. Raises UserError for flags that a series cannot have, or that main.py would refuse."""
    config, own = parse_arguments(arguments)
    if refused := sorted(own & set(OWN_FLAGS)):
        raise UserError(f"--{refused[0]} does not go with a series: each run has its own folder and seed, and is whole")
    if config.submission_org == PLACEHOLDER_ORG:
        raise UserError("the runs' --submission_org is missing: who submits; 40 runs with a placeholder are no result")
    return config


def default_system(options: argparse.Namespace) -> str:
    """The system's name from its devices, such as 8xNVIDIA_H200. Raises UserError where only a person knows."""
    if options.launch is not None:
        raise UserError("--launch needs --system, the name of what it launches on, such as 4xDGX-H200")
    # Not by torch: it would keep a piece of the GPU's memory as long as the series lasts.
    name = f"{options.nproc_per_node}x{nvidia('name') or cpu_name()}"
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")


def configuration_of(config: RunConfig, launch: Sequence[str]) -> dict[str, Any]:
    """What all runs of a result must share: flags, code, library and launch."""
    flags = {name: value for name, value in config.to_json().items() if name not in INCIDENTAL}
    return flags | {"commit": commit(), "torch": torch.__version__, "launch": list(launch)}


def _make_run(series: Series, folder: Path, clear: str | None, total: int) -> Done:
    """One run to its end; one that is broken off is noted and done again from scratch."""
    name = f"run_{len(series.runs)}"
    if (folder / name).exists():  # this program was ended while the run was going
        _set_aside(series, folder, name, "the series was ended in it")
    for _ in range(ATTEMPTS):
        logger.info(f"run {len(series.runs) + 1} of {total}: {folder / name / 'console.txt'}")
        status = launch_run(series.launch, series.arguments, folder / name, clear_caches(clear))
        log = _read(folder / name / "unet3d.log")
        why = _why_broken(status, log, series.seeds)
        if why is None and log is not None:
            if not series.environment:
                series.environment = _environment(folder / name)
            verdict = "success" if log.converged else "aborted"
            seed = int(log.values["seed"])
            return Done(name, seed, verdict, log.epochs, log.clock_ms, digest_of(log.path))
        aside = _set_aside(series, folder, name, str(why))
        if status == USER_ERROR_EXIT:
            raise UserError(f"the run was refused: {_last_line(aside / 'console.txt')}")
        logger.warning(f"{name} {why}; see {aside / 'console.txt'}")
    raise UserError(
        f"{name} was broken off {ATTEMPTS} times, the last one: {series.broken[-1].why}; "
        "mend the cause and start the series again: it goes on from here"
    )


def _read(path: Path) -> Log | None:
    return read_log(path) if path.is_file() else None


def _why_broken(status: int, log: Log | None, used: set[int]) -> str | None:
    """Why this was no run of a result; None: it was one, converged or not."""
    if status not in (0, DIVERGED_EXIT):
        return f"ended with the exit status {status}"
    if log is None:
        return "left no unet3d.log"
    if log.problems:
        return f"left a log that is not whole: line {log.problems[0].line}: {log.problems[0].what}"
    if log.values["seed"] in used:
        return f"drew the seed {log.values['seed']}, which another run of this series had"
    return None


def _set_aside(series: Series, folder: Path, name: str, why: str) -> Path:
    """Keeps a broken run's folder under another name, and its seed in mind."""
    seed = None
    with suppress(OSError, UserError):
        log = _read(folder / name / "unet3d.log")
        seed = log.values.get("seed") if log else None
    number = 1 + len(series.broken)
    while (aside := folder / f"{name}.broken_{number}").exists():
        number += 1
    (folder / name).rename(aside)
    series.broken.append(Broken(aside.name, seed if isinstance(seed, int) else None, why))
    series.save(folder)
    return aside


def _environment(log_dir: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError, KeyError):
        return dict(json.loads((log_dir / "run.json").read_text(encoding="utf-8"))["environment"])
    return {}


def _put_in_place(log_dir: Path, result: Path) -> None:
    try:
        with replacing(result) as temporary:
            shutil.copyfile(log_dir / "unet3d.log", temporary)
    except OSError as error:
        raise UserError(f"{result}: cannot be written: {error.strerror or error}") from None


def _mend_places(series: Series, folder: Path, results: Path) -> None:
    """Puts logs in place that are not: a series may have been ended between a run and its copy."""
    for number, done in enumerate(series.runs):
        if not (results / f"result_{number}.txt").exists():
            _put_in_place(folder / done.folder, results / f"result_{number}.txt")


def _progress(series: Series, total: int, seconds_a_run: float) -> str:
    done = series.runs[-1]
    left = total - len(series.runs)
    told = (
        f"run {len(series.runs)} of {total}: {done.status} after {done.epochs} epochs, {done.clock_ms / 60_000:.2f} min"
    )
    return f"{told}, seed {done.seed}" + (
        f"; about {timedelta(seconds=round(left * seconds_a_run))} left" if left else ""
    )


def _last_line(console: Path) -> str:
    with suppress(OSError, IndexError):
        return console.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
    return "its console is empty"
