"""Each fault that the logs of a result can have is reported with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from submission.inspection import find_changed_logs, find_problems, read_results, results_folder, sha256_of
from submission.logs import AFTER, Problem, read_log
from tests.submission.conftest import WriteRun, edit, set_value


def problems_of(result_dir: Path, ruleset: str = "4.0.0") -> list[Problem]:
    logs, problems = read_results(results_folder(result_dir, None))
    return [*problems, *find_problems(logs, ruleset)]


def messages(result_dir: Path, ruleset: str = "4.0.0") -> list[str]:
    return [f"{problem.path.name}:{problem.line}: {problem.message}" for problem in problems_of(result_dir, ruleset)]


def result(result_dir: Path, number: int) -> Path:
    return result_dir / "results" / "abacus" / "unet3d" / f"result_{number}.txt"


def test_forty_good_runs_have_no_problem(result_dir: Path) -> None:
    assert messages(result_dir) == []


def test_a_log_is_read(write_open: WriteRun, tmp_path: Path) -> None:
    log = read_log(write_open(tmp_path / "log", seed=5, epochs=6, clock_ms=12_345))
    assert log.problems == []
    assert (log.clock_ms, log.converged, log.epochs, log.unit) == (12_345, True, 6, 168)
    assert log.evaluations == [(2, 0.5), (4, 0.5), (6, 0.91)]
    assert (log.is_closed, log.rule_violations) == (False, ["--overlap 0.25, not 0.5"])
    # One line per millisecond; the line after epoch_start is its epoch_stop.
    assert log.seconds_in("epoch") == pytest.approx(0.006)


def test_39_runs(result_dir: Path) -> None:
    result(result_dir, 17).unlink()
    assert messages(result_dir) == ["unet3d:0: 39 runs, not 40: result_17.txt missing"]
    result(result_dir, 16).rename(result(result_dir, 40))
    assert messages(result_dir) == [
        "unet3d:0: 39 runs, not 40: result_16.txt, result_17.txt missing",
        "result_40.txt:0: one run too many: a result has 40",
    ]


def test_another_file_among_the_logs(result_dir: Path) -> None:
    (result(result_dir, 0).parent / "notes.txt").write_text("")
    assert [problem.path.name for problem in problems_of(result_dir)] == ["notes.txt"]


@pytest.mark.parametrize(
    ("more", "key"),
    [(["--learning_rate", "0.5"], "opt_base_learning_rate"), (["--batch_size", "14"], "global_batch_size")],
)
def test_a_run_of_another_configuration(more: list[str], key: str, result_dir: Path, write_open: WriteRun) -> None:
    path = write_open(result(result_dir, 3), seed=999, more=more)
    (line,) = messages(result_dir)
    assert line.startswith(f"result_3.txt:{read_log(path).lines[key]}: another configuration: {key} is ")


def test_two_equal_seeds(result_dir: Path) -> None:
    line = edit(result(result_dir, 9), "seed", set_value(105))
    assert messages(result_dir) == [f"result_9.txt:{line}: the same seed 105 as result_5.txt:{line}"]


def test_a_resumed_run(result_dir: Path, write_open: WriteRun) -> None:
    path = write_open(result(result_dir, 4), seed=999, reasons=["the run was resumed"])
    (line,) = messages(result_dir)
    assert line.startswith(f"result_4.txt:{read_log(path).lines['submission_division']}: from a resumed run")


def test_a_log_that_begins_in_the_middle(result_dir: Path) -> None:
    """A resumed run that hid this would log a first epoch other than 1."""
    path = result(result_dir, 4)
    lines = path.read_text().splitlines()
    kept = [line for line in lines if '"epoch": 1}' not in line and '"epoch": 1,' not in line]
    assert len(kept) == len(lines) - 2
    path.write_text("\n".join(kept) + "\n")
    (line,) = messages(result_dir)
    assert "epoch 2, expected epoch 1" in line


@pytest.mark.parametrize("kept", [0, 3, 20, -1])
def test_a_log_that_was_cut(kept: int, result_dir: Path) -> None:
    path = result(result_dir, 2)
    lines = path.read_text().splitlines(keepends=True)[: kept or None][: None if kept else 0]
    path.write_text("".join(lines))
    (line,) = messages(result_dir)
    assert line.startswith(f"result_2.txt:{len(lines)}: {'ends with' if kept else 'empty'}")


def test_a_log_that_was_cut_within_a_line(result_dir: Path) -> None:
    path = result(result_dir, 2)
    text = path.read_text()
    path.write_text(text[:-40])
    assert messages(result_dir) == [f"result_2.txt:{len(text.splitlines())}: a damaged line (the log is cut off here)"]


def test_a_foreign_log(result_dir: Path) -> None:
    result(result_dir, 1).write_text("epoch 1: loss 0.3\n")
    assert messages(result_dir) == ["result_1.txt:1: not a line of an MLPerf log (the log is cut off here)"]
    edit(
        result(result_dir, 2),
        "cache_clear",
        lambda line: line.replace("runtime/logging/mlperf.py", "/workspace/unet3d/main.py"),
    )
    line = edit(result(result_dir, 3), "submission_benchmark", set_value('"resnet"'))
    assert messages(result_dir)[1:] == [
        "result_2.txt:1: not written by this program's runtime/logging/mlperf.py: a foreign log",
        f"result_3.txt:{line}: benchmark 'resnet', not unet3d: a foreign log",
    ]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("run_stop", lambda line: line.replace('"time_ms": 17', '"time_ms": 16'), "before the line above it"),
        ("eval_start", lambda line: line.replace('"epoch": 2', '"epoch": 1'), "epoch 1, expected epoch 2"),
        ("epoch_stop", lambda line: line.replace('"epoch_num": 168', '"epoch_num": 84'), "84, expected 168"),
        ("eval_accuracy", set_value('"0.91"'), "mean Dice is '0.91'"),
        ("seed", set_value("null"), "seed is None"),
        ("seed", lambda line: f"{line}\n{line}", "seed in place of submission_benchmark"),
        ("opt_momentum", lambda line: line.replace("opt_momentum", "momentum"), "in place of opt_momentum"),
        ("block_stop", lambda line: "", "not a line of an MLPerf log"),
        ("eval_start", lambda line: line.replace("eval_start", "eval_begin"), "lines are missing or were added"),
        ("run_stop", lambda line: line.replace("success", "won"), "the status 'won'"),
        ("eval_start", lambda line: line.replace('"epoch_num": 336', '"epoch_num": 2'), "2, expected 336"),
    ],
)
def test_a_doctored_log(key: str, change: Callable[[str], str], message: str, result_dir: Path) -> None:
    line = edit(result(result_dir, 6), key, change)
    (problem,) = problems_of(result_dir)
    assert message in problem.message
    assert problem.path.name == "result_6.txt"
    assert line <= problem.line <= line + 1, "the line itself, or the one after it"


def test_a_plausible_change_is_detected_by_the_series(result_dir: Path, tmp_path: Path) -> None:
    """For example shortened times: the log is valid, but differs from what the run wrote."""
    folder = results_folder(result_dir, None)
    names = [path.name for path in folder.iterdir()]
    originals = {name: tmp_path / name for name in names}
    for name, path in originals.items():
        path.write_bytes((folder / name).read_bytes())
    written = {name: (path, sha256_of(path)) for name, path in originals.items() if name != "result_8.txt"}
    logs, _ = read_results(folder)
    assert [str(problem) for problem in find_changed_logs(logs, written)] == [
        f"{folder / 'result_8.txt'}: not written by a run of this series: a foreign log"
    ]
    line = edit(folder / "result_7.txt", "eval_accuracy", set_value(0.92), which=-1)
    assert problems_of(result_dir) == []
    changed, _ = find_changed_logs(read_results(folder)[0], written)
    assert (changed.path.name, changed.line) == ("result_7.txt", line)
    assert "differs from what the run wrote" in changed.message
    originals["result_7.txt"].unlink()
    assert find_changed_logs(read_results(folder)[0], written)[0].line == 0


def test_five_runs_that_did_not_converge(result_dir: Path, write_open: WriteRun) -> None:
    for number in range(4):
        write_open(result(result_dir, number), seed=900 + number, converges=False)
    assert messages(result_dir) == []
    write_open(result(result_dir, 4), seed=950, converges=False)
    assert len(messages(result_dir)) == 5
    assert "not converged, like 4 others: at most 4 runs may not converge" in messages(result_dir)[0]


def test_units_of_another_ruleset(result_dir: Path, write_open: WriteRun) -> None:
    path = write_open(result(result_dir, 0), seed=999, more=["--ruleset", "3.0.0"])
    line = read_log(path).lines["epoch_start"]
    assert [text for text in messages(result_dir) if "epoch_num" in text] == [
        f"result_0.txt:{line}: epoch_num counts epochs, but ruleset 4.0.0 requires samples"
    ]
    assert len(messages(result_dir, "3.0.0")) == 39
    assert "requires epochs" in messages(result_dir, "3.0.0")[0]


def test_a_closed_run_is_held_to_its_rules(write_closed: WriteRun, tmp_path: Path) -> None:
    path = write_closed(tmp_path / "result_0.txt", seed=1, epochs=1040)
    assert find_problems([read_log(path)], "4.0.0") == []
    good = path.read_text()

    def wrong(key: str, change: Callable[[str], str], which: int = 0) -> str:
        path.write_text(good)
        line = edit(path, key, change, which)
        (problem,) = find_problems([read_log(path)], "4.0.0")
        assert problem.line == line
        return problem.message

    assert "the closed division requires 0.4" in wrong("oversampling", set_value(0.5))
    assert "[128, 128, 128]" in wrong("training_input_shape", set_value("[64, 64, 64]"))
    assert "yet the run continued" in wrong("eval_accuracy", set_value(0.95))
    assert "but the status of run_stop is success" in wrong("eval_accuracy", set_value(0.9), -1)
    for key in ("rule_violations", "departures"):  # the second in logs of 0.1
        violation = wrong(
            "submission_division", lambda line, key=key: line.replace('"lineno"', f'"{key}": ["x"], "lineno"')
        )
        assert violation == "closed, but: x"


def test_a_closed_runs_evaluations_come_when_the_rules_say(write_open: WriteRun, tmp_path: Path) -> None:
    path = write_open(tmp_path / "result_0.txt", seed=1)
    edit(path, "submission_division", set_value('"closed"'))
    found = [problem.message for problem in find_problems([read_log(path)], "4.0.0")]
    assert "an evaluation after epoch 2; required: from 1000 on, every 20" in found


def test_an_aborted_run_may_end_within_an_epoch_whose_time_does_not_count(write_open: WriteRun, tmp_path: Path) -> None:
    whole = write_open(tmp_path / "whole.log", seed=1, converges=False)
    lines = whole.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"epoch_start"' in line)
    rest = [line for line in lines[last + 1 :] if '"epoch_stop"' not in line and '"eval_' not in line]
    cut = tmp_path / "cut.log"
    cut.write_text("".join([*lines[: last + 1], *rest]))
    assert len(rest) < len(lines) - last - 1
    log, expected = read_log(cut), read_log(whole)
    assert log.problems == []
    assert 0 < log.seconds_in("epoch") < expected.seconds_in("epoch")
    cut.write_text(cut.read_text().replace('"aborted"', '"success"'))
    assert any("block_stop after epoch_start" in problem.message for problem in read_log(cut).problems)


def test_a_run_without_an_epoch_is_invalid(result_dir: Path) -> None:
    path = result(result_dir, 0)
    kept = [line for line in path.read_text().splitlines() if not any(f'"{key}"' in line for key in AFTER)]
    path.write_text("\n".join(kept).replace("success", "aborted"))
    assert messages(result_dir) == [f"result_0.txt:{len(kept)}: the run ended before its first epoch"]


def test_the_system_is_chosen(result_dir: Path) -> None:
    with pytest.raises(UserError, match="has no results/other/unet3d"):
        results_folder(result_dir, "other")
    (result_dir / "results" / "second" / "unet3d").mkdir(parents=True)
    with pytest.raises(UserError, match="has results of abacus, second; choose one with --system"):
        results_folder(result_dir, None)
    assert results_folder(result_dir, "abacus").parent.name == "abacus"


def test_a_hostile_log_is_reported_without_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "result_0.txt"
    record = {"time_ms": 1, "key": "run_stop", "value": None, "metadata": {"file": "runtime/logging/mlperf.py"}}
    for content in ("[" * 100_000, json.dumps(record | {"time_ms": []}), json.dumps(record | {"metadata": 3}), "\0"):
        path.write_text(f":::MLLOG {content}\n")
        assert read_log(path).problems[0].line == 1
    path.write_text(f":::MLLOG {json.dumps(record)}\n")
    assert read_log(path).problems


def with_late_scores(path: Path, drop: str = "") -> list[str]:
    """Moves scores as `--eval_ranks` does, those of the last evaluation to the end; returns the log's problems.

    Args:
        drop: key whose first record is left out.
    """
    times = [json.loads(line.removeprefix(":::MLLOG "))["time_ms"] for line in path.read_text().splitlines()]
    kept: list[str] = []
    late: list[str] = []
    for line in path.read_text().splitlines():
        key = json.loads(line.removeprefix(":::MLLOG "))["key"]
        if key in ("eval_accuracy", "eval_stop"):
            late.append(line)
        elif key == "run_stop":
            kept += [*late, line]
        else:
            kept.append(line)
            if key == "epoch_stop":
                kept, late = kept + late, []
    if drop:
        kept.remove(next(line for line in kept if f'"{drop}"' in line))
    retimed = []
    for line, time_ms in zip(kept, times, strict=False):
        retimed.append(":::MLLOG " + json.dumps(json.loads(line.removeprefix(":::MLLOG ")) | {"time_ms": time_ms}))
    path.write_text("\n".join(retimed) + "\n")
    return [problem.message for problem in read_log(path).problems]


def test_scores_may_come_after_later_epochs(write_open: WriteRun, tmp_path: Path) -> None:
    path = write_open(tmp_path / "log", seed=5, epochs=6)
    assert with_late_scores(path) == []
    log = read_log(path)
    assert log.evaluations == [(2, 0.5), (4, 0.5), (6, 0.91)]
    assert [record.key for record in log.records[-4:]] == ["block_stop", "eval_accuracy", "eval_stop", "run_stop"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("eval_start", "eval_accuracy after "),
        ("eval_accuracy", "eval_stop after "),
        ("eval_stop", " after eval_accuracy"),
    ],
)
def test_a_late_evaluation_without_one_of_its_lines(
    key: str, message: str, write_open: WriteRun, tmp_path: Path
) -> None:
    (problem,) = with_late_scores(write_open(tmp_path / "log", seed=5, epochs=6), drop=key)
    assert message in problem
    assert "lines are missing or were added" in problem
