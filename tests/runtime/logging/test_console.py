"""What a person sees: lines on stdout, bars on stderr only if verbose; a pipe holds no control characters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, partialmethod
from typing import Any

import pytest
from tqdm import tqdm

from common import progress
from runtime.arguments import RunConfig, parse_arguments
from runtime.logging import events as ev
from runtime.logging.console import ConsoleTracker, EvaluationTracker
from runtime.train_state import target_not_reached

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def config() -> RunConfig:
    return parse_arguments(["--data_dir", "DATA"])[0]


def init_stopped(config: RunConfig, reasons: list[str], notes: list[str]) -> ev.InitStopped:
    division = "open" if reasons else "closed"
    return ev.InitStopped(
        config=config,
        seeds={"master": 1234},
        division=division,
        rule_violations=reasons,
        platform="1xABACUS",
        tensors=["a"],
        samples_per_epoch=168,
        notes=notes,
    )


def evaluation(epoch: int) -> list[ev.Event]:
    return [
        ev.EvaluationStarted(epoch, 2),
        ev.CaseEvaluated(epoch, "case_00000"),
        ev.CaseEvaluated(epoch, "case_00003"),
        ev.EvaluationStopped(epoch=epoch, mean_dice=0.65, dice=[0.7, 0.6], loss=0.1234, seconds=2.04),
    ]


def run(config: RunConfig) -> list[ev.Event]:
    return [
        ev.InitStarted(config, {}, False),
        init_stopped(config, [], []),
        ev.RunStarted(),
        ev.DataOpened(
            train_samples=168,
            eval_samples=42,
            samples_per_epoch=168,
            global_batch_size=2,
            gradient_accumulation_steps=1,
            classes=["background", "kidney", "tumour"],
        ),
        ev.BlockStarted(1, 1),
        ev.EpochStarted(1, 0.125, 2),
        ev.MicroBatchEnd(1, 0, 2),
        ev.MicroBatchEnd(1, 1, 2),
        ev.EpochStopped(epoch=1, loss=0.5, learning_rate=0.125, samples=4, seconds=1.0),
        *evaluation(1),
        ev.BlockStopped(1, 1),
        ev.RunStopped(status="success", reason="mean Dice 0.6500 reached 0.6", epoch=1, seconds=61.26),
    ]


def send(tracker: ev.Tracker, events: list[ev.Event]) -> None:
    for event in events:
        tracker.on(event)


def test_a_quiet_run_is_three_lines_on_stdout_and_nothing_on_stderr(config: RunConfig, capsys: Captured) -> None:
    send(ConsoleTracker(verbose=False, epochs=1), run(config))
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "division closed; seed 1234; 1xABACUS",
        "epoch 1: mean Dice 0.6500 (L1 0.7000, L2 0.6000), loss 0.1234, 2.0 s",
        "target reached after 1 epoch and 61.3 s: mean Dice 0.6500 reached 0.6",
    ]
    assert out.endswith("\n")
    assert "\r" not in out
    assert "\x1b" not in out


def test_a_verbose_run_has_the_same_lines_and_bars_on_stderr(config: RunConfig, capsys: Captured) -> None:
    send(ConsoleTracker(verbose=False, epochs=1), run(config))
    quiet = capsys.readouterr().out
    send(ConsoleTracker(verbose=True, epochs=1), run(config))
    out, err = capsys.readouterr()
    assert out == quiet
    assert "epoch 1/1 rate 0.125" in err
    assert "2/2" in err
    assert "loss 0.5000" in err
    assert "evaluate" in err


def test_reasons_for_the_open_division_and_notes_are_printed(config: RunConfig, capsys: Captured) -> None:
    ConsoleTracker(verbose=False, epochs=1).on(init_stopped(config, ["one", "two"], ["look here", "and there"]))
    assert capsys.readouterr().out.splitlines() == [
        "note: look here",
        "note: and there",
        "division open (one; two); seed 1234; 1xABACUS",
    ]


def test_a_bar_of_a_resumed_run_counts_what_remains(config: RunConfig, capsys: Captured) -> None:
    tracker = ConsoleTracker(verbose=True, epochs=10)
    send(
        tracker,
        [ev.EpochStarted(8, 0.1, 5), ev.RunStopped(status="aborted", reason="stopped by hand", epoch=8, seconds=1.0)],
    )
    assert "0/15" in capsys.readouterr().err


def test_a_bar_of_a_run_resumed_within_an_epoch_is_where_the_run_is(config: RunConfig, capsys: Captured) -> None:
    stopped = ev.RunStopped(status="aborted", reason="stopped by hand", epoch=8, seconds=1.0)
    send(ConsoleTracker(verbose=True, epochs=10), [ev.EpochStarted(8, 0.1, 5), ev.MicroBatchEnd(8, 3, 2), stopped])
    assert "4/15" in capsys.readouterr().err


class Eager(tqdm):  # type: ignore[type-arg]
    """Draws every update."""

    __init__ = partialmethod(tqdm.__init__, mininterval=0)  # type: ignore[assignment]


def test_each_step_s_loss_and_the_last_dice_stand_beside_the_bar(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "tqdm", Eager)
    tracker = ConsoleTracker(verbose=True, epochs=3)
    send(tracker, [*evaluation(1), ev.EpochStarted(2, 0.1, 2)])  # resumed with an evaluation to come
    send(
        tracker,
        [
            ev.StepEnd(epoch=2, batch=0, loss=0.75, gradient_norm=1.0, loss_scale=1.0),
            ev.MicroBatchEnd(2, 1, 2),
            ev.RunStopped(status="aborted", reason="by hand", epoch=2, seconds=1.0),
        ],
    )
    drawn = capsys.readouterr().err
    assert "Dice 0.6500, loss 0.7500" in drawn
    assert "2/4" in drawn


def test_an_evaluation_that_breaks_off_leaves_no_bar(capsys: Captured) -> None:
    send(
        ConsoleTracker(verbose=True, epochs=3),
        [*evaluation(1)[:2], ev.RunStopped(status="aborted", reason="by hand", epoch=1, seconds=1.0)],
    )
    assert capsys.readouterr().err.endswith("\r")


@pytest.mark.parametrize("verbose", [False, True])
def test_a_run_that_ends_before_its_first_epoch(verbose: bool, capsys: Captured) -> None:
    ConsoleTracker(verbose, epochs=3).on(
        ev.RunStopped(status="aborted", reason="the target was not reached in 3 epochs", epoch=3, seconds=0.0)
    )
    expected = "training done after 3 epochs and 0.0 s: no evaluation was due; see --start_eval_at and --evaluate_"
    assert capsys.readouterr().out.startswith(expected)


def test_a_resumed_run_ends_with_its_best_evaluation_of_all(capsys: Captured) -> None:
    ended = ev.RunStopped(status="aborted", reason=target_not_reached(3), epoch=3, seconds=1.0)
    ConsoleTracker(verbose=False, epochs=3, best=(2, 0.7)).on(ended)
    assert "best mean Dice 0.7000 in epoch 2" in capsys.readouterr().out
    scores = next(event for event in evaluation(3) if isinstance(event, ev.EvaluationStopped))
    for earlier, line in ((0.9, "0.9000 in epoch 2"), (0.1, f"{scores.mean_dice:.4f} in epoch 3")):
        send(ConsoleTracker(verbose=False, epochs=3, best=(2, earlier)), [scores, ended])
        assert f"best mean Dice {line}" in capsys.readouterr().out


def test_a_run_without_evaluation_cases_is_no_failure(config: RunConfig, capsys: Captured) -> None:
    opened = next(event for event in run(config) if isinstance(event, ev.DataOpened))
    ended = ev.RunStopped(status="aborted", reason=target_not_reached(1), epoch=1, seconds=2.0)
    send(ConsoleTracker(verbose=False, epochs=1), [replace(opened, eval_samples=0), ended])
    assert capsys.readouterr().out == "training done after 1 epoch and 2.0 s: there are no evaluation cases\n"


@pytest.mark.parametrize(
    ("flags", "reason", "line"),
    [
        ({}, "interrupted by SIGTERM", "stopped after 3 epochs and 1.0 s: interrupted by SIGTERM"),
        ({"benchmark": True}, target_not_reached(3), "benchmark done after 3 epochs and 1.0 s"),
        (
            {"quality_threshold": 0.9},
            target_not_reached(3),
            "target not reached after 3 epochs and 1.0 s: best mean Dice 0.6500 in epoch 2, target 0.9; more --epochs "
            "with --resume continue the run, or try another --learning_rate",
        ),
    ],
)
def test_a_run_below_its_target_says_so_and_what_to_try(
    flags: dict[str, Any], reason: str, line: str, config: RunConfig, capsys: Captured
) -> None:
    tracker = ConsoleTracker(verbose=False, epochs=3)
    worse = ev.EvaluationStopped(epoch=3, mean_dice=0.25, dice=[0.2, 0.3], loss=0.5, seconds=1.0)
    begun = init_stopped(replace(config, **flags), [], [])
    send(tracker, [begun, *evaluation(2), worse, ev.RunStopped(status="aborted", reason=reason, epoch=3, seconds=1.0)])
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_an_evaluation_is_name_value_lines(capsys: Captured) -> None:
    send(EvaluationTracker(verbose=False), evaluation(7))
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "epoch 7",
        "L1 dice 0.700000",
        "L2 dice 0.600000",
        "mean_dice 0.650000",
        "eval_loss 0.123400",
    ]


def test_a_verbose_evaluation_counts_its_cases_on_stderr(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=0))  # every update is drawn
    send(EvaluationTracker(verbose=True), evaluation(7))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert [count for count in ("0/2", "1/2", "2/2") if count in err] == ["0/2", "1/2", "2/2"]
    assert err.endswith("\r"), "the bar is wiped at the end"
