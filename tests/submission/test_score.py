"""The score, exact to the millisecond; its comparison with published results; its plot."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import pytest

from common.errors import UserError
from runtime.mlperf.convergence import Reference, find_reference
from submission import score
from submission.__main__ import make_parser
from submission.inspection import read_results, results_folder
from submission.logs import Log
from submission.published_results import PUBLISHED_RESULTS
from submission.score import RunOutcome, compute
from tests.submission.conftest import WriteRun, edit, set_value

# 40 synthetic runs. By hand: the 4 fastest (1, 2, 3, 4 ms) and the 4 slowest (9, 8, 7, 6 million ms) are dropped. Of
# the other 32, 16 take 1,000,000 and 16 take 2,000,001 ms: mean 1,500,000.5 ms.
TIMES_MS = [1, 2, 3, 4, *[1_000_000, 2_000_001] * 16, 6_000_000, 7_000_000, 8_000_000, 9_000_000]
# The 4 smallest and largest are dropped; the other 32 have the mean (16 x 355,840 + 16 x 355,850) / 32 = 355,845.
SAMPLES = [*[100_000] * 4, *[355_840, 355_850] * 16, *[900_000] * 4]


def runs(times: list[int] = TIMES_MS, samples: list[float | None] = SAMPLES) -> list[RunOutcome]:  # type: ignore[assignment]
    return [RunOutcome(f"result_{n}.txt", time, at) for n, (time, at) in enumerate(zip(times, samples, strict=True))]


def test_the_score_is_the_hand_computed_one() -> None:
    reference = find_reference(56)
    assert reference
    found = compute(runs(), reference)
    assert found.mean_ms == 1_500_000.5
    assert found.converged_mean == 355_845
    assert found.scaling == pytest.approx((357_404 + 4 / 9) / 355_845, abs=1e-12)
    assert found.scaling == pytest.approx(1.00438, abs=5e-6)
    assert found.result_ms == pytest.approx(1_506_573.98, abs=0.5)  # 1,500,000.5 x 357,404.444 / 355,845
    assert len(found.kept) == 32
    assert not set(found.kept) & {f"result_{number}.txt" for number in (0, 1, 2, 3, 36, 37, 38, 39)}
    kept = [time for time in TIMES_MS if 1_000_000 <= time <= 2_000_001]
    assert found.std_ms == pytest.approx(statistics.stdev(kept))


def test_the_order_of_the_runs_does_not_matter() -> None:
    assert compute(runs()[::-1], None, False).mean_ms == 1_500_000.5


def test_times_and_convergence_are_dropped_independently() -> None:
    """As in MLPerf's two programs: the fastest runs may have needed the most samples."""
    found = compute(runs(samples=SAMPLES[::-1]), find_reference(56))
    assert (found.mean_ms, found.converged_mean) == (1_500_000.5, 355_845)


def test_runs_that_did_not_converge_count_as_the_slowest() -> None:
    """Two of them are dropped with the two slowest that converged, however short they were."""
    times, samples = list(TIMES_MS), list(SAMPLES)
    times[38] = times[39] = 5
    found = compute(runs(times, [*samples[:38], None, None]), None, False)
    assert found.mean_ms == 1_500_000.5
    assert found.converged_mean == 355_845
    with pytest.raises(UserError, match="5 of 40 runs did not converge"):
        compute(runs(times, [*samples[:35], *[None] * 5]), None)


def test_an_open_result_is_not_scaled_and_a_closed_one_needs_a_reference() -> None:
    reference = find_reference(56)
    assert compute(runs(), reference, is_closed=False).result_ms == 1_500_000.5
    assert compute(runs(samples=[1.0] * 40), reference, is_closed=False).scaling == 1
    assert compute(runs(), None).scaling is None


@pytest.mark.parametrize(
    ("own", "scaling"), [(400_000.0, 1.0), (357_405.0, 1.0), (340_000.0, 357_404.444 / 340_000), (334_000.0, None)]
)
def test_scaling_by_the_reference(own: float, scaling: float | None) -> None:
    found = compute(runs(samples=[own] * 40), find_reference(56))
    assert found.scaling == (pytest.approx(scaling) if scaling else None)
    assert math.isnan(found.result_ms) is (scaling is None)


def options(result_dir: Path, plot: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(result_dir=result_dir, system=None, ruleset="4.0.0", plot=plot)


def pretend_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats short runs as closed ones, whose first evaluation would come after a thousand epochs."""
    monkeypatch.setattr(Log, "is_closed", True)
    monkeypatch.setattr(score, "find_problems", lambda logs, ruleset: [])


def test_the_command_prints_runs_score_and_comparison(
    result_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs took 60,000 + 7 n ms; batch 28; 4 or 6 epochs to the target; the reference: mean 5.5, least 4."""
    near = Reference(
        batch_size=28,
        ruleset="4.0.0",
        source="RCP of batch 28",
        mean=168 * 5.5,
        least=168 * 4.0,
        published=(168 * 4.0, 168 * 7.0),
    )
    monkeypatch.setattr(score, "find_reference", lambda batch, ruleset: near)
    pretend_closed(monkeypatch)
    plot = tmp_path / "deep" / "picture.png"
    assert score.run(options(result_dir, plot)) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[1:41]
    assert table[0].split() == ["result_0.txt", "1.0000", "4", "672", "0.9100", "100", "dropped"]
    assert table[4].split() == ["result_4.txt", "1.0005", "4", "672", "0.9100", "104"]
    assert [line.split()[0] for line in table if line.endswith("dropped")] == [
        f"result_{number}.txt" for number in (0, 1, 2, 3, 36, 37, 38, 39)
    ]
    # Runs 4 to 35 count: 60,000 + 7 x 19.5. Of the 20 runs each with 4 and 6 epochs, 16 of each count: mean 5 epochs.
    assert "mean of 32 runs: 60,136.500 ms, standard deviation 66 ms (0.1%)" in lines
    assert "score: 66,150.150 ms = 1.1025 minutes (scaled by 1.10000)" in lines
    assert any("mean 924.0, least accepted 672.0" in line for line in lines)
    (own,) = [line for line in lines if line.startswith("this open result, 1xABACUS")]
    assert own.split()[-2:] == ["1.103", "1.103"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 5_000


def test_a_closed_result_may_not_converge_too_fast(
    result_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert score.run(options(result_dir, tmp_path / "picture.png")) == 0
    assert "score: 60,136.500 ms = 1.0023 minutes (open division: not scaled)" in capsys.readouterr().out
    pretend_closed(monkeypatch)
    assert score.run(options(result_dir, tmp_path / "picture.png")) == 1
    out = capsys.readouterr().out
    assert "FAILED: 99.7% below the least accepted" in out
    assert "score:" not in out
    monkeypatch.setattr(score, "find_reference", lambda batch, ruleset: None)
    assert score.run(options(result_dir, tmp_path / "picture.png")) == 1
    assert "FAILED: there is no RCP for a batch size as large as 28" in capsys.readouterr().out


def test_nothing_is_scored_if_a_run_is_wrong(result_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(result_dir / "results" / "abacus" / "unet3d" / "result_9.txt", "seed", set_value(105))
    assert score.run(options(result_dir)) == 1
    out = capsys.readouterr().out
    assert "result_9.txt:3: the same seed 105" in out
    assert out.endswith("1 problem: no result\n")


def test_published_results_are_those_of_the_rounds() -> None:
    best = PUBLISHED_RESULTS[0]
    assert (best.samples_per_s, best.evaluation_s, best.minutes) == (76.05, 1.67, 11.5)
    assert [result.minutes for result in PUBLISHED_RESULTS] == [11.5, 12.1, 23.8, 20.5, 0.773]
    assert best.devices * (best.minutes or 0) == 92


def test_rates_are_computed_from_the_logs(write_open: WriteRun, result_dir: Path) -> None:
    """In the synthetic logs an epoch of 168 samples takes a millisecond, an evaluation two."""
    logs, _ = read_results(results_folder(result_dir, None))
    lines = score.comparison(logs, compute(score.outcomes(logs), None, False))
    own = lines[1].split()
    assert own[-4:-2] == ["1.68e+05", "0.002"]
    assert lines[-1].endswith("may do other work and not be comparable")


def test_the_old_spelling_of_plot_is_accepted() -> None:
    assert make_parser().parse_args(["score", "--result_dir", "x", "--picture", "y.png"]).plot == Path("y.png")
