"""`make demo`: the whole benchmark on synthetic patients, in minutes on two cores, with every command shown.

    python3 demo.py --work_dir demo

First the benchmark: a few timed steps of the full network, beside published results. Then the whole path, with a
network that two cores can train: phantom patients -> preprocessing -> training to a target -> evaluation of the
checkpoint in a second process -> prediction of a patient that training never saw -> MLPerf's compliance checker ->
the report.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_program

PROJECT = Path(__file__).resolve().parent
RECIPES = PROJECT / "recipes"
# Of twenty patients, MLPerf's list evaluates 00000, 00003, 00005, 00006 and 00012. The field of view is that of a small
# patient: at the benchmark's spacing it has 128 x 128 x 128 voxels, preprocessing's minimum; two cores can train on it.
PATIENT = ("--shape", "64", "80", "80", "--field_of_view", "205", "154", "154")
CASES = 20
# Scores are printed with six decimals; weights and arithmetic are the same.
SCORE_TOLERANCE = 2e-6


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="demo.py", description="The whole benchmark on synthetic patients, in minutes on two cores.")
    parser.add_argument("--work_dir", type=Path, default=Path("demo"), help="folder for everything the demo writes")
    parser.add_argument("--seed", type=int, default=0, help="of the patients and of training (default: 0)")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "demo.args", help="arguments of the training")
    parser.add_argument(
        "--benchmark", type=Path, default=RECIPES / "demo_benchmark.args", help="arguments of the benchmark"
    )
    arguments = parser.parse_args(argv)
    work = arguments.work_dir.resolve()
    (work / "logs").mkdir(parents=True, exist_ok=True)

    seconds: dict[str, float] = {}
    printed = {
        stage: run(stage, [sys.executable, *map(str, command)], seconds)
        for stage, command in stages(work, arguments).items()
    }
    report = work / "logs" / "report.html"
    events = [json.loads(line) for line in (work / "logs" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = read_scores(printed["evaluation"])
    check(events, scores, report)
    print_benchmark(json.loads((work / "benchmark" / "benchmark.json").read_text(encoding="utf-8")))
    print_table(seconds, events, scores, unseen_dice(work))
    print(f"\nmask of the new patient  {work / 'new_patient_mask.nii.gz'}\nlogs, checkpoint         {work / 'logs'}")
    print(f"report                   {report}", flush=True)
    return 0


def stages(work: Path, arguments: Any) -> dict[str, list[Any]]:
    """Returns each stage's command, without the interpreter."""
    raw, new, data, logs = work / "raw", work / "new_patient", work / "data", work / "logs"
    checkpoint, seed = logs / "checkpoint.pth", arguments.seed
    phantoms = ["-m", "data_loading.phantom", *PATIENT]
    return {
        "benchmark": ["main.py", f"@{arguments.benchmark}", "--log_dir", work / "benchmark"],
        "phantom patients": [*phantoms, "--cases", CASES, "--seed", seed, "--results_dir", raw],
        "a new patient": [*phantoms, "--cases", 1, "--seed", seed + 1, "--results_dir", new],
        "preprocessing": ["preprocess_dataset.py", "--data_dir", raw, "--results_dir", data],
        "training": [
            *("main.py", f"@{arguments.recipe}", "--data_dir", data, "--seed", seed),
            *("--log_dir", logs, "--save_ckpt_path", checkpoint),
        ],
        "evaluation": [
            *("main.py", "--exec_mode", "evaluate", "--data_dir", data),
            *("--load_ckpt_path", checkpoint, "--log_dir", logs),
        ],
        "prediction": [
            *("main.py", "--exec_mode", "predict", "--load_ckpt_path", checkpoint),
            *("--scan", new / "case_00000" / "imaging.nii.gz", "--output", work / "new_patient_mask.nii.gz"),
        ],
        "compliance": [
            *("-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "4.0.0"),
            *("--log_output", logs / "compliance.log", logs / "unet3d.log"),
        ],
    }


def run(stage: str, command: list[str], seconds: dict[str, float]) -> str:
    """Shows a command, runs it, and returns its output; progress goes straight to the terminal.

    Raises:
        UserError: the command failed.
    """
    print(f"\n== {stage}\n$ {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    lines = []
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    seconds[stage] = time.perf_counter() - started
    if process.returncode != 0:
        raise UserError(f"{stage} failed with exit status {process.returncode}")
    return "".join(lines)


def read_scores(output: str) -> dict[str, float]:
    """Parses the `name value` lines of `--exec_mode evaluate`."""
    return {match[1]: float(match[2]) for match in re.finditer(r"^([\w ]+) ([-\d.e]+)$", output, re.MULTILINE)}


def check(events: list[dict[str, Any]], scores: dict[str, float], report: Path) -> None:
    """Refuses a demo that did not reach its target, or whose second process scored otherwise than training."""
    best = max(event["mean_dice"] for event in events if event["event"] == "EvaluationStopped")
    stopped = next(event for event in events if event["event"] == "RunStopped")
    if stopped["status"] != "success":
        raise UserError(f"the demo's training did not reach its target: {stopped['reason']}; see {report.parent}")
    if abs(best - scores["mean_dice"]) > SCORE_TOLERANCE:
        raise UserError(f"training scored {best:.6f} but the saved checkpoint {scores['mean_dice']:.6f}")
    if not report.exists():
        raise UserError(f"{report} was not written")


def unseen_dice(work: Path) -> list[float]:
    """Returns the Dice of kidney and tumour in the mask of the new patient, on its own scan's grid."""
    import numpy as np

    from data_loading.io.volume import read_nifti

    paths = (work / "new_patient_mask.nii.gz", work / "new_patient" / "case_00000" / "segmentation.nii.gz")
    mask, truth = (read_nifti(path, np.uint8).array for path in paths)
    overlaps = (2 * ((mask == k) & (truth == k)).sum() / ((mask == k).sum() + (truth == k).sum()) for k in (1, 2))
    return [float(overlap) for overlap in overlaps]


def print_benchmark(figures: dict[str, Any]) -> None:
    """Prints the speed of the full network on this machine, beside published results."""
    from submission.published_results import PUBLISHED_RESULTS, SAMPLE_TFLOP

    print(
        f"\nThe full network, 31,190,243 parameters: {figures['latency_mean_ms'] / 1e3:.2f} s per step, "
        f"{figures['forward_backward_ms'] / figures['latency_mean_ms']:.0%} of it forward and backward; "
        f"{figures['verdict']}, at {figures['share_of_peak']:.0%} of the speed of a large matrix product here"
    )
    print(f"\n{'':<48}{'samples/s per device':>22}{'TFLOP/s':>10}{'minutes to target':>19}")
    ours = figures["tflops_per_s"]
    here = "this machine, converted to windows of 128^3"
    print(f"{here:<48}{ours / SAMPLE_TFLOP:>22.3f}{ours:>10.2f}")
    for result in PUBLISHED_RESULTS:
        if result.samples_per_s:
            rate = result.samples_per_s
            print(f"{result.name:<48}{rate:>22.2f}{rate * SAMPLE_TFLOP:>10.0f}{result.minutes or 0:>19.1f}")


def print_table(
    seconds: dict[str, float], events: list[dict[str, Any]], scores: dict[str, float], unseen: list[float]
) -> None:
    """Prints what each stage took and found."""
    epochs = [event for event in events if event["event"] == "EpochStopped"]
    trained = sum(event["samples"] for event in epochs)
    rate = trained / sum(event["seconds"] for event in epochs)
    figures = {
        "benchmark": "the full network, above",
        "phantom patients": f"{CASES} synthetic CT scans with masks, as NIfTI",
        "preprocessing": "15 patients to train, 5 to evaluate",
        "training": f"{trained} windows, {rate:.2f} per second, loss {epochs[-1]['loss']:.3f}",
        "evaluation": f"mean Dice {scores['mean_dice']:.4f} (kidney {scores['L1 dice']:.4f}, "
        f"tumour {scores['L2 dice']:.4f}), same as in training",
        "prediction": f"a patient that training never saw: kidney {unseen[0]:.4f}, tumour {unseen[1]:.4f}",
        "compliance": "passed by MLPerf's checker (ruleset 4.0.0, open division)",
    }
    print(f"\n{'step':<18}{'seconds':>8}  figure")
    for stage, figure in figures.items():
        print(f"{stage:<18}{seconds[stage]:>8.1f}  {figure}")
    print(f"{'total':<18}{sum(seconds.values()):>8.1f}")


if __name__ == "__main__":
    sys.exit(run_program(main, "demo.py"))
