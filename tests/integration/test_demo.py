"""`make demo`: every stage in the test's process, with a network that learns next to nothing in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import demo
from common.errors import UserError
from tests import programs

TRAINING = """
--model 'unet3d(filters=(4,8,16))'
--input_shape 32 32 32
--val_input_shape 64 64 64
--overlap 0
--batch_size 2
--steps_per_epoch 10
--epochs 12
--start_eval_at 12
--learning_rate 0.3
--oversampling 1
--quality_threshold 0.02
--num_workers 0
--prewarm_steps 0
"""
BENCHMARK = """
--loader synthetic --benchmark --model 'unet3d(filters=(4,8))' --input_shape 16 16 16 --val_input_shape 16 16 16
--steps_per_epoch 4 --warmup_steps 1 --num_workers 0
"""


@pytest.mark.slow
def test_the_demo_shows_all_of_it_and_ends_with_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[report]'")

    def run(stage: str, command: list[str], seconds: dict[str, float]) -> str:
        seconds[stage] = 1.0
        done = programs.call(*command[1:])
        assert done.returncode == 0, f"{stage}: {done.stderr}"
        assert "warning" not in done.stdout + done.stderr
        return done.stdout

    monkeypatch.setattr(demo, "run", run)
    (tmp_path / "demo.args").write_text(TRAINING)
    (tmp_path / "benchmark.args").write_text(BENCHMARK)
    recipes = ["--recipe", str(tmp_path / "demo.args"), "--benchmark", str(tmp_path / "benchmark.args")]
    assert demo.main(["--work_dir", str(tmp_path / "work"), *recipes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report                   {tmp_path / 'work' / 'logs' / 'report.html'}"
    assert any(line.startswith("NVIDIA (MXNet), 8 x H200, v4.0") and "76.05" in line for line in lines)
    assert any("a patient that training never saw: kidney 0." in line for line in lines)
    assert (tmp_path / "work" / "new_patient_mask.nii.gz").exists()


def events(status: str, dice: float) -> list[dict[str, Any]]:
    return [
        {"event": "EvaluationStopped", "mean_dice": dice / 2},
        {"event": "EvaluationStopped", "mean_dice": dice},
        {"event": "RunStopped", "status": status, "reason": "why"},
    ]


def test_a_demo_that_is_not_what_it_shows_fails(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    with pytest.raises(UserError, match=r"was not written"):
        demo.check(events("success", 0.6), {"mean_dice": 0.6}, report)
    report.touch()
    demo.check(events("success", 0.6), {"mean_dice": 0.6}, report)
    with pytest.raises(UserError, match=r"did not reach its target: why"):
        demo.check(events("aborted", 0.6), {"mean_dice": 0.6}, report)
    with pytest.raises(UserError, match=r"training scored 0\.600000 but the saved checkpoint 0\.599000"):
        demo.check(events("success", 0.6), {"mean_dice": 0.599}, report)


def test_a_stage_that_fails_ends_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    seconds: dict[str, float] = {}
    assert demo.run("first", ["echo", "L1 dice 0.75\nmean_dice 0.5"], seconds) == "L1 dice 0.75\nmean_dice 0.5\n"
    assert demo.read_scores("epoch 3\nL1 dice 0.75\nmean_dice 0.5\n") == {"epoch": 3, "L1 dice": 0.75, "mean_dice": 0.5}
    with pytest.raises(UserError, match="second failed with exit status 1"):
        demo.run("second", ["false"], seconds)
    assert "== first\n$ echo" in capsys.readouterr().out
    assert list(seconds) == ["first", "second"]


def test_published_rates_in_the_benchmark_s_table(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"latency_mean_ms": 2000.0, "forward_backward_ms": 1900.0, "verdict": "compute-bound"}
    demo.print_benchmark({**figures, "share_of_peak": 0.5, "tflops_per_s": 0.286})
    out = capsys.readouterr().out
    assert "2.00 s per step, 95% of it forward and backward; compute-bound, at 50% of the speed of" in out
    rows = {line[:20].strip(): line.split() for line in out.splitlines()}
    assert rows["this machine, conver"][-2:] == ["0.100", "0.29"]
    assert rows["NVIDIA (MXNet), 8 x"][-3:] == ["36.40", "104", "23.8"], "the last of them"
