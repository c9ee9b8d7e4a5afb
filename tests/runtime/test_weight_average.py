"""`--ema_decay`: the average itself, and its way through evaluation, checkpoint and resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from runtime.checkpoint.format import load
from runtime.checkpoint.resume import restore
from runtime.logging.events import EvaluationStopped
from runtime.scores import evaluate_if_due, return_to_evaluated
from runtime.train_state import PendingEvaluation, TrainState
from runtime.weight_average import WeightAverage
from tests.runtime.checkpoint.conftest import clone, keep_best, keep_state, same, train_epochs
from tests.runtime.conftest import EvalSchedule, make_loop
from tests.runtime.loop import MakeBatches, MakeState, SameWeights


def averaging(state: TrainState, decay: float = 0.9) -> TrainState:
    state.average = WeightAverage(state.network, decay)
    return state


def test_the_average_follows_its_recurrence() -> None:
    """Against plain Python: a += (1 - d) * (w - a), with d = min(0.6, (1 + n) / (10 + n))."""
    network = nn.BatchNorm1d(1)
    average = WeightAverage(network, 0.6)
    expected = 1.0
    for step in range(1, 30):
        network.weight.data.fill_(step**2)
        network.num_batches_tracked.fill_(step)
        average.update(step)
        expected += (1 - min(0.6, (1 + step) / (10 + step))) * (step**2 - expected)
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-6)
        assert average.weights["num_batches_tracked"].item() == step
    assert network.weight.item() == 29**2


def test_a_buffer_that_the_network_replaces_is_averaged() -> None:
    network = nn.BatchNorm1d(1)
    average = WeightAverage(network, 0.0)
    network.running_mean = torch.full((1,), 5.0)
    average.update(1)
    assert average.weights["running_mean"].item() == 5.0


def test_training_itself_is_the_same(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    plain, averaged = make_state(), averaging(make_state())
    train_epochs(plain, make_batches(3, 1), 1, 1)
    train_epochs(averaged, make_batches(3, 1), 1, 1)
    assert same_weights(averaged.network, plain.network)
    assert averaged.average is not None
    assert not same(averaged.average.weights, clone(plain))


def test_the_warm_up_of_the_average_counts_the_steps_of_all_epochs(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    """In closed form: the weights of step n count (1 - d_n) * d_n+1 * ... * d_6, those of the start d_1 * ... * d_6."""
    state = averaging(make_state(), decay=0.999)
    assert state.average is not None
    bias = state.network.output.conv.bias
    passed = [bias.detach().double()]
    state.optimizer.register_step_post_hook(lambda *_: passed.append(bias.detach().double()))
    train_epochs(state, make_batches(3, 1), 1, 2)
    decays = [0.0, *((1 + step) / (10 + step) for step in range(1, 7))]
    shares = [(1 - decay) * math.prod(decays[step + 1 :]) for step, decay in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    expected: Tensor = sum(share * weights for share, weights in zip(shares, passed, strict=True))
    torch.testing.assert_close(state.average.weights["output.conv.bias"].double(), expected, rtol=1e-5, atol=0)


def test_an_evaluation_scores_the_average_which_becomes_the_best(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = averaging(make_state())
    train_epochs(state, make_batches(3, 1), 1, 1)
    assert state.average is not None
    own, scored = clone(state), []

    def evaluate(epoch: int) -> EvaluationStopped:
        scored.append(clone(state))
        return EvaluationStopped(epoch=epoch, mean_dice=0.5, dice=[0.5], loss=0.1, seconds=0.0)

    loop = make_loop(make_batches(3, 1), schedule=EvalSchedule(1, 1, 1), evaluate=evaluate)
    assert evaluate_if_due(state, loop) is None
    assert same(scored[0], state.average.weights)
    assert state.best_network is not None
    assert same(state.best_network, state.average.weights)
    assert same(clone(state), own), "training goes on with its own weights"


def test_a_damaged_state_returns_to_the_evaluated_average(make_state: MakeState) -> None:
    """A resumed run would otherwise average on with NaN."""
    state = averaging(make_state())
    assert state.average is not None
    evaluated = {name: tensor + 0.5 for name, tensor in clone(state).items()}
    state.epoch, state.pending = 6, PendingEvaluation(5, evaluated)
    for tensor in (*state.network.state_dict().values(), *state.average.weights.values()):
        tensor.fill_(math.nan)
    return_to_evaluated(state)
    assert state.epoch == 5
    assert same(clone(state), evaluated)
    assert same(state.average.weights, evaluated)


def test_a_damaged_state_returns_with_a_loss_scale_that_steps_again(make_state: MakeState) -> None:
    """A run that resumed with a collapsed scale would end at its first step."""
    state = make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-15)
    state.scaler.scale(torch.ones(()))
    state.epoch, state.pending = 6, PendingEvaluation(5, clone(state))
    return_to_evaluated(state)
    assert state.scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def test_a_resumed_average_equals_that_of_a_run_that_never_stopped(
    tmp_path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    straight, first, second = (averaging(make_state()) for _ in range(3))
    train_epochs(straight, make_batches(3, 1), 1, 3)
    train_epochs(first, make_batches(3, 1), 1, 2, leave_after=1)
    keep_state(tmp_path / "c.pth", first)
    restore(second, load(tmp_path / "c.pth"))
    train_epochs(second, make_batches(3, 1), 2, 3)
    assert straight.average is not None
    assert second.average is not None
    assert same(second.average.weights, straight.average.weights)


def test_a_checkpoint_gives_the_average_as_its_last_state(
    tmp_path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = averaging(make_state())
    train_epochs(state, make_batches(3, 1), 1, 1)
    assert state.average is not None
    keep_state(tmp_path / "c.pth", state)
    loaded = load(tmp_path / "c.pth")
    assert same(loaded.state("last")[0], state.average.weights)
    assert same(loaded.state("best")[0], state.average.weights), "nothing was evaluated yet"
    assert same(loaded.last, clone(state)), "from which training goes on"
    keep_best(state, 1, 0.5)
    keep_state(tmp_path / "c.pth", state)
    assert same(load(tmp_path / "c.pth").best, state.average.weights)


@pytest.mark.parametrize("averaged_before", [False, True])
def test_a_resumed_run_may_begin_or_cease_to_average(
    averaged_before: bool, tmp_path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    before, after = make_state(), make_state()
    averaging(before if averaged_before else after)
    train_epochs(before, make_batches(3, 1), 1, 1)
    keep_state(tmp_path / "c.pth", before)
    restore(after, load(tmp_path / "c.pth"))
    assert same(clone(after), clone(before))
    assert same(after.evaluated_weights, clone(before)), "an average begins with the weights"
