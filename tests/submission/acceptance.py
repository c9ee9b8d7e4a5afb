"""Acceptance test of a whole submission, from its runs to its score, in minutes on a CPU instead of days on GPUs.

    python3 -m tests.submission.acceptance --work_dir WORK            # 2 x 40 real runs on tiny volumes, open division
    python3 -m tests.submission.acceptance --work_dir WORK --closed   # 2 x 40 synthetic logs of closed runs

Each submission is packed and checked by MLPerf's four checkers at rulesets 3.0.0 and 4.0.0. Runs on tiny volumes belong
to the open division; the additional requirements of the closed one, RCPs and seeds, need synthetic logs of full length.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from common.cli import Parser
from common.errors import run_program
from runtime.mlperf.rulesets import RUNS
from submission.__main__ import main as submission
from submission.inspection import sha256_of
from submission.record import FinishedRun, Series
from tests.submission.synthetic_runs import TINY_RUN, TRAINING, SyntheticRun, write_blocks

EVALUATION_CASES = Path(__file__).resolve().parents[2] / "evaluation_cases.txt"
ORG, SYSTEM = "ACME", "abacus"
# By ruleset: a batch size that has an RCP, and the epochs of 168 samples after which runs converge on average.
CLOSED = {"3.0.0": (80, 1700), "4.0.0": (28, 2100)}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="tests.submission.acceptance", description=__doc__)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--closed", action="store_true", help="use synthetic logs of closed-division runs")
    options = parser.parse_args(argv)
    statuses = []
    for ruleset in CLOSED:
        result_dir = options.work_dir / f"{'closed' if options.closed else 'open'}_{ruleset}" / ORG
        print(f"ruleset {ruleset}", flush=True)
        if options.closed:
            make_closed(result_dir, ruleset)
        else:
            make_open(options.work_dir / "data", result_dir, ruleset)
        common = ["--result_dir", str(result_dir), "--ruleset", ruleset]
        statuses.append(submission(["pack", *common]))
        statuses.append(submission(["score", *common]))
    return int(any(statuses))


def make_open(data_dir: Path, result_dir: Path, ruleset: str) -> None:
    """Makes 40 runs with main.py."""
    if not data_dir.exists():
        write_blocks(data_dir, EVALUATION_CASES.read_text(encoding="utf-8").split())
    arguments = [*TINY_RUN, "--data_dir", str(data_dir), "--submission_org", ORG, "--ruleset", ruleset]
    submission(["run", "--result_dir", str(result_dir), "--system", SYSTEM, "--", *arguments])


def make_closed(result_dir: Path, ruleset: str) -> None:
    """Writes 40 logs and a series.json, as `submission run` would."""
    batch, mean_epochs = CLOSED[ruleset]
    arguments = ["--submission_org", ORG, "--data_dir", "data", "--batch_size", str(batch), "--ruleset", ruleset]
    results = result_dir / "results" / SYSTEM / "unet3d"
    own = result_dir.with_name(f"{ORG}.runs") / SYSTEM
    results.mkdir(parents=True)
    own.mkdir(parents=True)
    series = Series(system=SYSTEM, arguments=arguments, launch=["python3"], configuration={"ruleset": ruleset})
    rng = random.Random(0)
    for number in range(RUNS):
        epochs = mean_epochs + 20 * rng.randint(-20, 20)
        clock_ms = round(epochs * TRAINING / 0.07) + rng.randint(0, 10_000)
        run = SyntheticRun(seed=rng.randrange(2**31), epochs=epochs, clock_ms=clock_ms, arguments=arguments)
        path = run.write_log(results / f"result_{number}.txt")
        series.runs.append(
            FinishedRun(
                folder=f"run_{number}",
                seed=0,
                status="success",
                epochs=epochs,
                clock_ms=clock_ms,
                sha256=sha256_of(path),
            )
        )
        print(f"log {number + 1} of {RUNS}", end="\r", flush=True)
    series.save(own)


if __name__ == "__main__":
    sys.exit(run_program(main, "tests.submission.acceptance"))
