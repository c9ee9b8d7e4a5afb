"""`--suite peers`: this project's recipe against MONAI's usual way, on the same cases, cores and minutes.

    python3 -m benchmarks --suite peers --data_dir DATA [--recipe recipes/hippocampus_cpu.args]

DATA is a preprocessed folder. Each pair of runs begins with this project's, which ends as its recipe says; MONAI then
trains for as long, both on the CPU. Both are scored on whole evaluation cases by the same function, several times
towards the end of training, and the best score counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Table, environment_of_runs, reason_of_failure
from common import registry
from common.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
PAIRS = 3
# So that the recipe runs to its end.
UNREACHABLE = "1.0"
MONAI = (
    "UNet with residual units and batch norm, DiceCELoss, Adam at 1e-3, CacheDataset, crops of the same size half on "
    "foreground, intensity shifts, the recipe's batch size; the best of five evaluations from half of the time on"
)


def run(options: Options) -> list[Table]:
    """Runs the suite: mean Dice after the same time.

    Raises:
        UserError: no `--data_dir`, MONAI is not installed, or the first run failed; a later one ends the table.
    """
    train_and_score = registry.load("benchmarks.monai_peer:train_and_score", "--suite peers", extra="monai")
    if options.data_dir is None:
        raise UserError("--suite peers needs --data_dir, a preprocessed folder")
    rows: list[list[Any]] = []
    problem = ""
    for seed in range(1 if options.quick else PAIRS):
        try:
            ours, evaluations, seconds = train_recipe(options, seed)
            theirs, steps = train_and_score(options.data_dir, options.recipe, seconds, seed)
        except UserError as error:
            if not rows:
                raise
            problem = f"seed {seed}: {error}"
            break
        rows.append([str(seed), seconds / 60, ours, theirs, ours - theirs, steps])
    rows.append(["median", *(statistics.median(row[column] for row in rows) for column in range(1, 6))])
    notes = [f"Ours: `{options.recipe.name}`, the best of its {evaluations} evaluations. MONAI: {MONAI}."]
    columns = ["seed", "minutes of training", "mean Dice, ours", "mean Dice, MONAI", "difference", "MONAI's steps"]
    return [Table("The same cases, cores and minutes", columns, rows, notes, problem=problem)]


def train_recipe(options: Options, seed: int) -> tuple[float, int, float]:
    """Trains as the recipe says, to its last epoch.

    Returns:
        The best mean Dice, the number of evaluations, and the seconds of the training epochs.
    """
    log_dir = options.work_dir / f"seed_{seed}"
    command = [sys.executable, str(PROJECT / "main.py"), f"@{options.recipe}", "--data_dir", str(options.data_dir)]
    command += ["--log_dir", str(log_dir), "--seed", str(seed), "--quality_threshold", UNREACHABLE, "--no_report"]
    command += ["--epochs", "1", "--start_eval_at", "1"] if options.quick else []
    environment = environment_of_runs(options.device)
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the recipe's run exited with {done.returncode}: {reason_of_failure(done)}")
    events = [json.loads(line) for line in (log_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [event["mean_dice"] for event in events if event["event"] == "EvaluationStopped"]
    return max(scores), len(scores), sum(event["seconds"] for event in events if event["event"] == "EpochStopped")
