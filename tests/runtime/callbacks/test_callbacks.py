"""Callbacks of `--callbacks`: stopping, kept checkpoints, reports, and their state in a resumed run."""

from __future__ import annotations

import csv
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import Interrupted, UserError
from runtime.callbacks.base import Callback, RunContext, build_callbacks
from runtime.checkpoint.format import load, snapshot
from runtime.distributed.world import World
from runtime.logging.events import EvaluationStopped, Event, StepEnd, TrainDiceEnd
from runtime.train_state import Stop, TrainState, on_host
from runtime.weight_average import WeightAverage

MakeState = Callable[..., TrainState]
Make = Callable[..., Callback]


def scored(epoch: int, dice: float, loss: float = 1.0) -> EvaluationStopped:
    return EvaluationStopped(epoch=epoch, mean_dice=dice, dice=[dice, dice], loss=loss, seconds=1.0)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def make(tmp_path: Path, events: list[Event]) -> Make:
    def build(spec: str, rank: int = 0) -> Callback:
        def make_evaluate_fn(cases: Any, emit: Any) -> Callable[[int], EvaluationStopped]:
            return lambda epoch: EvaluationStopped(
                epoch=epoch, mean_dice=0.1 * len(cases), dice=[0.2, 0.3], loss=0.4, seconds=5.0
            )

        def take(state: TrainState, sums: list[float]) -> dict[str, Any]:
            return snapshot(state, sums, config={"a": 1}, seed=1, data="")

        world = World(rank, 2, torch.device("cpu"))
        context = RunContext(
            log_dir=tmp_path,
            world=world,
            training_cases=["c", "a", "b"],
            make_evaluate_fn=make_evaluate_fn,
            emit=events.append,
            snapshot=take,
        )
        (made,) = build_callbacks([spec], context)
        return made

    return build


# Early stopping


def evaluations_until_stop(callback: Callback, state: TrainState, values: list[float]) -> int:
    for epoch, value in enumerate(values, 1):
        if stop := callback.on_evaluation_end(scored(epoch, value), state):
            assert (stop.status, stop.exit_status) == ("aborted", 0)
            assert "no progress in" in stop.reason
            return epoch
    return 0


@pytest.mark.parametrize(
    ("spec", "values", "at"),
    [
        ("early_stopping(patience=2)", [0.1, 0.2, 0.2, 0.3, 0.3, 0.3], 6),
        ("early_stopping(patience=1)", [0.1, 0.2, 0.1], 3),
        ("early_stopping(patience=2)", [math.nan, math.nan], 2),
        ("early_stopping(patience=2, min_delta=0.05)", [0.5, 0.52, 0.54, 0.9], 3),
        ("early_stopping(patience=2)", [0.5, 0.4, 0.6, 0.5, 0.7], 0),
        ("early_stopping(patience=1, mode='min')", [0.5, 0.4, 0.6], 3),
    ],
)
def test_a_run_without_progress_ends(
    make: Make, make_state: MakeState, spec: str, values: list[float], at: int
) -> None:
    state = make_state()
    assert evaluations_until_stop(make(spec), state, values) == at


def test_early_stopping_can_use_the_loss(make: Make, make_state: MakeState) -> None:
    state, callback = make_state(), make("early_stopping(patience=1, metric='loss')")
    assert callback.on_evaluation_end(scored(1, 0.1, loss=2.0), state) is None
    assert callback.on_evaluation_end(scored(2, 0.1, loss=1.0), state) is None
    stop = callback.on_evaluation_end(scored(3, 0.9, loss=1.5), state)
    assert stop is not None
    assert "the best loss: 1.0000 at epoch 2" in stop.reason


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_patience_is_counted_across_a_resume(make: Make, make_state: MakeState, cut: int) -> None:
    values, state = [0.3, 0.2, 0.2, 0.2], make_state()
    first = make("early_stopping(patience=3)")
    for epoch, value in enumerate(values[:cut], 1):
        first.on_evaluation_end(scored(epoch, value), state)
    resumed = make_state()
    resumed.callback_state.update(state.callback_state)
    assert evaluations_until_stop(make("early_stopping(patience=3)"), resumed, values[cut:]) == 4 - cut


def test_a_stopped_run_stops_again_before_its_first_epoch(make: Make, make_state: MakeState) -> None:
    state = make_state()
    evaluations_until_stop(make("early_stopping(patience=1)"), state, [0.3, 0.2])
    assert make("early_stopping(patience=2)").on_train_start(state) is None, "with more patience it continues"
    assert make("early_stopping(patience=1)").on_train_start(state) is not None


@pytest.mark.parametrize("change", ["metric='loss'", "mode='min'"])
def test_another_metrics_best_does_not_count_after_a_resume(make: Make, make_state: MakeState, change: str) -> None:
    state = make_state()
    evaluations_until_stop(make("early_stopping(patience=2)"), state, [0.2, 0.1])
    changed = make(f"early_stopping(patience=2, {change})")
    assert changed.on_train_start(state) is None
    for epoch in (3, 4, 5, 6):  # each better than the one before, by either metric
        assert changed.on_evaluation_end(scored(epoch, 1 - epoch / 10, loss=20.0 - epoch), state) is None


def test_early_stopping_goes_on_from_a_checkpoint_that_names_no_metric(make: Make, make_state: MakeState) -> None:
    state = make_state()
    state.callback_state["early_stopping"] = {"best": 0.9, "epoch": 1, "stale": 1}
    assert evaluations_until_stop(make("early_stopping(patience=2)"), state, [0.8]) == 1


# Top k


def kept(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "top").iterdir())


def test_the_best_and_the_last_are_kept_and_other_files_are_unchanged(
    make: Make, make_state: MakeState, tmp_path: Path
) -> None:
    state, callback = make_state(), make("top_k(k=2)")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "epoch_00001_0.1000.pth").write_text("another's")
    (tmp_path / "top" / "mine.txt").write_text("mine")
    for epoch, value in enumerate([0.5, 0.3, math.nan, 0.4, 0.5, 0.2], 2):
        state.epoch, state.scored = epoch, {"weight": torch.full((1,), float(epoch))}
        callback.on_evaluation_end(scored(epoch, value), state)
    assert kept(tmp_path) == [
        "epoch_00001_0.1000.pth",
        "epoch_00002_0.5000.pth",
        "epoch_00006_0.5000.pth",
        "last.pth",
        "mine.txt",
    ]
    assert load(tmp_path / "top" / "epoch_00006_0.5000.pth").last_epoch == 6
    assert load(tmp_path / "top" / "last.pth").last_epoch == 7
    # Each is evaluated and predicted with the weights in its name, not with the run's best.
    for name, epoch in (("epoch_00002_0.5000.pth", 2), ("epoch_00006_0.5000.pth", 6), ("last.pth", 7)):
        weights, of_epoch = load(tmp_path / "top" / name).state("best")
        assert (weights["weight"].item(), of_epoch) == (epoch, epoch)
    assert load(tmp_path / "top" / "last.pth").callback_state["top_k"]["kept"] == [
        [0.5, "epoch_00002_0.5000.pth"],
        [0.5, "epoch_00006_0.5000.pth"],
    ]


def test_a_resumed_run_knows_its_own_files(make: Make, make_state: MakeState, tmp_path: Path) -> None:
    state, first = make_state(), make("top_k(k=2, metric='loss')")
    first.on_evaluation_end(scored(1, 0.9, loss=3.0), state)
    first.on_evaluation_end(scored(2, 0.9, loss=2.0), state)
    resumed, second = make_state(), make("top_k(k=2, metric='loss')")
    resumed.callback_state.update(state.callback_state)
    second.on_evaluation_end(scored(2, 0.9, loss=2.0), resumed)  # repeated after the resume
    second.on_evaluation_end(scored(3, 0.1, loss=1.0), resumed)
    assert kept(tmp_path) == ["epoch_00002_2.0000.pth", "epoch_00003_1.0000.pth", "last.pth"]


@pytest.mark.parametrize("name", ["{folder}/thesis.pth", "../thesis.pth", "thesis.pth"])
def test_a_foreign_checkpoint_has_no_other_file_deleted(
    make: Make, make_state: MakeState, tmp_path: Path, name: str
) -> None:
    """Names come from the checkpoint, which is not trusted."""
    (tmp_path / "top").mkdir()
    precious = [tmp_path / "thesis.pth", tmp_path / "top" / "thesis.pth"]
    for file in precious:
        file.touch()
    state = make_state()
    entry = [-1.0, name.format(folder=tmp_path)]
    state.callback_state["top_k"] = {"kept": [entry], "metric": "mean_dice", "mode": "max"}
    make("top_k(k=1)").on_evaluation_end(scored(1, 0.5), state)
    assert all(file.exists() for file in precious)
    assert state.callback_state["top_k"]["kept"] == [[0.5, "epoch_00001_0.5000.pth"]]


def test_scores_of_another_metric_are_not_ranked_after_a_resume(
    make: Make, make_state: MakeState, tmp_path: Path
) -> None:
    state = make_state()
    make("top_k(k=1)").on_evaluation_end(scored(1, 0.5, loss=3.0), state)
    make("top_k(k=1, metric='loss')").on_evaluation_end(scored(2, 0.4, loss=2.0), state)
    assert kept(tmp_path) == ["epoch_00001_0.5000.pth", "epoch_00002_2.0000.pth", "last.pth"]


def test_only_rank_0_writes(make: Make, make_state: MakeState, tmp_path: Path) -> None:
    for spec in ("top_k(k=1)", "lr_monitor"):
        callback, state = make(spec, rank=1), make_state()
        callback.on_evaluation_end(scored(1, 0.5), state)
        callback.on_step_end(StepEnd(epoch=1, batch=0, loss=0.5, gradient_norm=1.0, loss_scale=1.0), state)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_causes_a_warning(
    make: Make, make_state: MakeState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "top").write_text("a file")
    make("top_k(k=1)").on_evaluation_end(scored(1, 0.5), make_state())
    assert "warning: --callbacks top_k:" in capsys.readouterr().err


# Learning rates and the Dice of training cases


def test_the_learning_rate_in_use_is_written(make: Make, make_state: MakeState, tmp_path: Path) -> None:
    state, callback = make_state(rate=0.25), make("lr_monitor(every=2)")
    for batch in range(5):
        state.optimizer.param_groups[0]["lr"] = 0.1 * batch
        callback.on_step_end(StepEnd(epoch=3, batch=batch, loss=0.5, gradient_norm=2.0, loss_scale=8.0), state)
    with (tmp_path / "rates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["epoch"], row["batch"], float(row["learning_rate"])) for row in rows] == [
        ("3", "1", 0.1),
        ("3", "3", pytest.approx(0.3)),
    ]
    assert (rows[0]["loss_scale"], rows[0]["gradient_norm"]) == ("8.0", "2.0")


def test_training_cases_are_scored_after_each_evaluation(
    make: Make, make_state: MakeState, events: list[Event]
) -> None:
    callback = make("train_dice(cases=2)")
    callback.on_step_end(StepEnd(epoch=1, batch=0, loss=0.5, gradient_norm=1.0, loss_scale=1.0), make_state())
    callback.on_evaluation_end(scored(7, 0.5), make_state())
    assert events == [TrainDiceEnd(epoch=7, mean_dice=0.2, dice=[0.2, 0.3], loss=0.4, seconds=5.0)]


def test_training_cases_are_scored_with_the_averaged_weights(
    make: Make, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--ema_decay`, as the evaluation cases are: the two scores are compared."""
    state, callback, biases = make_state(), make("train_dice"), []
    bias = state.network.output.conv.bias
    state.average = WeightAverage(state.network, 0.9)
    state.average.weights["output.conv.bias"].fill_(2.0)

    def evaluate(epoch: int) -> EvaluationStopped:
        biases.append(bias.tolist())
        return scored(epoch, 0.5)

    own = bias.tolist()
    monkeypatch.setattr(callback, "_evaluate", evaluate)
    assert callback.on_evaluation_end(scored(7, 0.5), state) is None
    assert biases == [[2.0] * 3]
    assert bias.tolist() == own, "training goes on with its own weights"


def test_training_cases_are_scored_with_the_weights_of_a_repeated_evaluation(
    make: Make, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run repeats the one that was under way on other ranks, of an earlier epoch's weights."""
    state, callback, biases = make_state(), make("train_dice"), []
    bias = state.network.output.conv.bias
    state.scored = {**on_host(state.network.state_dict()), "output.conv.bias": torch.full((3,), 2.0)}

    def evaluate(epoch: int) -> EvaluationStopped:
        biases.append(bias.tolist())
        return scored(epoch, 0.5)

    own = bias.tolist()
    monkeypatch.setattr(callback, "_evaluate", evaluate)
    callback.on_evaluation_end(scored(5, 0.5), state)
    assert biases == [[2.0] * 3]
    assert bias.tolist() == own


def test_a_signal_while_training_cases_are_scored_keeps_the_evaluation(
    make: Make, make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run by a Stop, so that the callbacks behind it still hear of the scores."""

    def interrupted(epoch: int) -> EvaluationStopped:
        raise Interrupted(signal.SIGTERM)

    callback = make("train_dice")
    monkeypatch.setattr(callback, "_evaluate", interrupted)
    stop = callback.on_evaluation_end(scored(7, 0.5), make_state())
    assert stop == Stop("aborted", "interrupted by SIGTERM", 128 + signal.SIGTERM)


def test_rates_that_cannot_be_written_cause_one_warning(
    make: Make, make_state: MakeState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rates.csv").symlink_to("/dev/full")
    callback = make("lr_monitor")
    for batch in range(2):
        step = StepEnd(epoch=1, batch=batch, loss=0.5, gradient_norm=1.0, loss_scale=1.0)
        assert callback.on_step_end(step, make_state()) is None
    assert capsys.readouterr().err.count("warning: --callbacks lr_monitor:") == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lr_monitor(every=0)", "every=0; must be a whole number of at least 1"),
        ("early_stoping", "unknown name; available: early_stopping, lr_monitor, top_k, train_dice"),
        ("early_stopping(patience=0)", "patience must be a whole number of at least 1"),
        ("early_stopping(metric='f1')", "unknown metric 'f1'; available: mean_dice, loss"),
        ("top_k(n=2)", "unknown argument 'n'; it takes k=3, metric='mean_dice', mode=None"),
        ("top_k(k=0)", "k=0"),
        ("train_dice(cases=0)", "cases=0"),
    ],
)
def test_a_wrong_spec_is_a_user_error(make: Make, spec: str, message: str) -> None:
    with pytest.raises(UserError, match="--callbacks") as raised:
        make(spec)
    assert message in str(raised.value)
