"""Interrupted and resumed runs, evaluations still due, and errors."""

from __future__ import annotations

import signal

import pytest

from common.errors import Interrupted, UserError
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule
from runtime.logging.events import (
    EvaluationStopped,
    Event,
)
from runtime.train_state import Stop
from tests.runtime.loop import (
    ALONE,
    CPU,
    MakeBatches,
    MakeState,
    Run,
    SameWeights,
    TwoRanks,
)


def test_a_signal_stops_the_run_at_the_end_of_a_step(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, run = make_state(), Run({}, signals={4: signal.SIGTERM})
    stopped = run.start(state, make_batches(3, 1), EvalSchedule(9, 9, 1))
    assert run.stop == Stop("aborted", "interrupted by SIGTERM", 143)
    assert stopped.exit_status == 143
    assert (stopped.epoch, state.epoch, state.batch) == (1, 1, 2), "the second step of epoch 2"
    assert run.names()[-3:] == ["EpochStarted 2", "BlockStopped 1", "RunStopped 1"]


def test_a_signal_stops_an_evaluation(make_state: MakeState, make_batches: MakeBatches) -> None:
    class InterruptedRun(Run):
        def evaluate(self, epoch: int) -> EvaluationStopped:
            super().evaluate(epoch)
            raise Interrupted(signal.SIGINT)

    state, run = make_state(), InterruptedRun({})
    run.start(state, make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert run.stop == Stop("aborted", "interrupted by SIGINT", 130)
    assert (state.epoch, state.batch, state.evaluated) == (2, 0, 0), "the evaluation is still due"
    assert run.names()[-2:] == ["EvaluationStarted 2", "RunStopped 2"]


def test_an_interrupted_run_continues_as_without_the_interruption(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    """At any step of two epochs, without a checkpoint in between."""
    whole, straight = make_state(momentum=0.9), Run({})
    straight.start(whole, make_batches(3, 1), EvalSchedule(2, 1, 1))
    for steps in range(6):
        state = make_state(momentum=0.9)
        first, second = Run({}, signals={steps: signal.SIGTERM}), Run({})
        first.start(state, make_batches(3, 1), EvalSchedule(2, 1, 1))
        assert first.stop.exit_status == 143
        second.start(state, make_batches(3, 1), EvalSchedule(2, 1, 1))
        assert same_weights(state.network, whole.network)
        assert first.losses() + second.losses() == straight.losses()
        scored = [event.epoch for event in first.events + second.events if isinstance(event, EvaluationStopped)]
        assert scored == [1, 2]


@pytest.mark.parametrize(
    ("evaluated", "epochs", "names"),
    [
        (0, 4, ["EvaluationStarted 2", "EvaluationStopped 2", "BlockStarted 3"]),
        (1, 4, ["EvaluationStarted 2", "EvaluationStopped 2", "BlockStarted 3"]),
        (2, 4, ["BlockStarted 3"]),
        (0, 2, ["EvaluationStarted 2", "EvaluationStopped 2", "RunStopped 2"]),
    ],
)
def test_an_evaluation_still_due_from_an_earlier_process_comes_first_and_once(
    evaluated: int, epochs: int, names: list[str], make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, run = make_state(), Run({})
    state.epoch, state.evaluated = 2, evaluated
    run.start(state, make_batches(1, 1), EvalSchedule(epochs, 2, 2))
    assert run.names()[: len(names)] == names
    assert run.names().count("EvaluationStopped 2") == (evaluated < 2)
    assert run.names().count("EvaluationStopped 4") == (epochs == 4)
    assert state.evaluated == epochs


def test_no_evaluation_is_due_for_an_epoch_without_one(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, run = make_state(), Run({})
    state.epoch, state.evaluated = 3, 2
    run.start(state, make_batches(1, 1), EvalSchedule(4, 2, 2))
    assert run.names()[0] == "BlockStarted 4"


def test_an_evaluation_still_due_may_end_the_run(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, run = make_state(), Run({2: 0.95})
    state.epoch = 2
    assert run.start(state, make_batches(1, 1), EvalSchedule(9, 2, 2)).status == "success"
    assert run.names() == ["EvaluationStarted 2", "EvaluationStopped 2", "RunStopped 2"]


def test_trackers_receive_a_score_after_the_state_has_it(make_state: MakeState, make_batches: MakeBatches) -> None:
    """Otherwise, a checkpoint saved on this event would repeat the evaluation when resumed."""
    state, found = make_state(), []

    class WatchingRun(Run):
        def on(self, event: Event) -> None:
            super().on(event)
            if isinstance(event, EvaluationStopped):
                found.append(state.evaluated)

    WatchingRun({}).start(state, make_batches(1, 1), EvalSchedule(3, 1, 1))
    assert found == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (ValueError("a bug of ours"), "ValueError: a bug of ours", 1),
        (UserError("case_00001: damaged"), "UserError: case_00001: damaged", 2),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", 130),
        # An error in a worker process of the loader comes with the traceback of that process.
        (UserError("Caught UserError in worker 0.\nTraceback:\ncase_00001: gone"), "UserError: case_00001: gone", 2),
    ],
)
def test_any_exception_closes_the_log_and_is_raised_again(
    error: BaseException, reason: str, status: int, make_state: MakeState, make_batches: MakeBatches
) -> None:
    class Failing(Run):
        def evaluate(self, epoch: int) -> EvaluationStopped:
            raise error

    run = Failing({})
    with pytest.raises(type(error)) as caught:
        run.start(make_state(), make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert caught.value is error
    assert (run.last().status, run.last().reason, run.last().epoch) == ("aborted", reason, 2)
    assert run.last().exit_status == status


@pytest.mark.parametrize(
    ("world", "reason", "status"),
    [
        (TwoRanks(0, 2, CPU), "another rank was lost", 4),
        (ALONE, "RuntimeError: gloo: Connection closed by peer", 1),
    ],
)
def test_a_log_does_not_guess_which_rank_was_lost(
    world: World, reason: str, status: int, make_state: MakeState, make_batches: MakeBatches
) -> None:
    """The last line on stderr names the rank, after the reports of all ranks have been collected."""

    class Failing(Run):
        def evaluate(self, epoch: int) -> EvaluationStopped:
            raise RuntimeError("gloo: Connection closed by peer")

    run = Failing({})
    run.world = world
    with pytest.raises(RuntimeError, match=r"^gloo"):
        run.start(make_state(), make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert (run.last().reason, run.last().exit_status) == (reason, status)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. \nmore of it",
            r"^DataLoader worker \(pid 7\) is killed by signal: Killed\. .*--resume$",
        ),
        (
            "Expected to have finished reduction in the prior iteration before starting a new one. \nmore of it",
            "^the network left out parameters in this rank's last step, perhaps by stochastic depth",
        ),
    ],
    ids=["a killed loader worker", "stochastic depth on several ranks"],
)
def test_errors_of_torch_that_the_user_can_mend_are_user_errors(
    text: str, message: str, make_state: MakeState, make_batches: MakeBatches
) -> None:
    """torch raises that of a loader worker wherever the main thread is, also in the middle of a step."""
    state = make_state()

    def interrupt(*_: object) -> None:
        raise RuntimeError(text)

    state.network.register_forward_pre_hook(interrupt)
    run = Run({})
    with pytest.raises(UserError, match=message):
        run.start(state, make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert (run.last().status, run.last().epoch, run.last().exit_status) == ("aborted", 0, 2)
