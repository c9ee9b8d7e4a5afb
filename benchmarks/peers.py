"""`--suite peers`: this project's recipe against MONAI's usual way, on the same cases, cores and minutes.

    python3 -m benchmarks --suite peers --data_dir DATA [--recipe recipes/hippocampus_cpu.args]

DATA is a preprocessed folder. Each pair of runs begins with this project's, which ends as its recipe says; MONAI then
trains for as long. Both are scored after training, on whole evaluation cases, by the same function.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Table
from benchmarks.monai_peer import DESCRIPTION, train_and_score
from common.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
PAIRS = 3
# So that the recipe runs to its end.
UNREACHABLE = "1.0"


def run(options: Options) -> list[Table]:
    """Runs the suite: mean Dice after the same time.

    Raises:
        UserError: no `--data_dir`, or a run failed.
    """
    if options.data_dir is None:
        raise UserError("--suite peers needs --data_dir, a preprocessed folder")
    rows: list[list[Any]] = []
    for seed in range(1 if options.quick else PAIRS):
        ours, seconds = train_recipe(options, seed)
        theirs, steps = train_and_score(options.data_dir, options.recipe, seconds, seed)
        rows.append([str(seed), seconds / 60, ours, theirs, ours - theirs, steps])
    rows.append(["median", *(statistics.median(row[column] for row in rows) for column in range(1, 6))])
    notes = [f"Ours: `{options.recipe.name}`. MONAI: {DESCRIPTION}."]
    columns = ["seed", "minutes of training", "mean Dice, ours", "mean Dice, MONAI", "difference", "MONAI's steps"]
    return [Table("The same cases, cores and minutes", columns, rows, notes)]


def train_recipe(options: Options, seed: int) -> tuple[float, float]:
    """Trains as the recipe says, to its last epoch; returns the best mean Dice, and the seconds of training epochs."""
    log_dir = options.work_dir / f"seed_{seed}"
    command = [sys.executable, str(PROJECT / "main.py"), f"@{options.recipe}", "--data_dir", str(options.data_dir)]
    command += ["--log_dir", str(log_dir), "--seed", str(seed), "--quality_threshold", UNREACHABLE, "--no_report"]
    command += ["--epochs", "1", "--start_eval_at", "1"] if options.quick else []
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the recipe's run failed: {done.stderr.strip().splitlines()[-1]}")
    events = [json.loads(line) for line in (log_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    best = max(event["mean_dice"] for event in events if event["event"] == "EvaluationStopped")
    return best, sum(event["seconds"] for event in events if event["event"] == "EpochStopped")
