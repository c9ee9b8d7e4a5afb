"""Split and order: seeded, complete, disjoint."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loading.sampling import Capped, EpochOrder, batches_per_epoch, sample_rng, split_cases
from errors import UserError


@settings(max_examples=80, deadline=None)
@given(
    cases=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 2**63),
    epoch=st.integers(1, 5000),
)
def test_the_ranks_share_one_permutation(cases: int, batch_size: int, ranks: int, seed: int, epoch: int) -> None:
    rounds = cases // (batch_size * ranks)
    orders = [EpochOrder(cases, batch_size, rank, ranks, seed) for rank in range(ranks)]
    if rounds == 0:
        with pytest.raises(UserError):
            orders[0].batches(epoch)
        return
    shards = [order.batches(epoch) for order in orders]
    assert all(len(order) == len(shard) == rounds for order, shard in zip(orders, shards, strict=True))
    assert all(len(batch) == batch_size for shard in shards for batch in shard)
    met = [case for shard in shards for batch in shard for case in batch]
    assert len(set(met)) == len(met) == rounds * batch_size * ranks
    assert set(met) <= set(range(cases))
    # Dealt out in turn: together they are what a single rank meets first.
    alone = [batch[0] for batch in EpochOrder(cases, 1, 0, 1, seed).batches(epoch)]
    flat = [[case for batch in shard for case in batch] for shard in shards]
    assert [case for turn in zip(*flat, strict=True) for case in turn] == alone[: len(met)]
    assert shards == [order.batches(epoch) for order in orders]


def test_epochs_and_seeds_have_their_own_orders() -> None:
    orders = {
        (seed, epoch): tuple(map(tuple, EpochOrder(168, 2, 0, 1, seed).batches(epoch)))
        for seed in (0, 1, 2)
        for epoch in (1, 2, 3)
    }
    assert len(set(orders.values())) == 9


def test_every_case_is_left_out_alike() -> None:
    # 7 cases in batches of 2: one a epoch is dropped, and not always the same.
    dropped = [
        (set(range(7)) - {case for batch in EpochOrder(7, 2, 0, 1, 0).batches(epoch) for case in batch}).pop()
        for epoch in range(1, 701)
    ]
    counts = np.bincount(dropped, minlength=7)
    assert (abs(counts - 100) < 4 * (700 / 7 * 6 / 7) ** 0.5).all()


@pytest.mark.parametrize(
    ("cases", "batch_size", "ranks", "expected"),
    [(168, 2, 1, 84), (168, 7, 8, 3), (168, 4, 9, 4), (2, 2, 1, 1), (64, 2, 2, 16)],
)
def test_the_incomplete_round_is_dropped(cases: int, batch_size: int, ranks: int, expected: int) -> None:
    assert batches_per_epoch(cases, batch_size, ranks) == expected


@pytest.mark.parametrize(
    ("cases", "batch_size", "ranks", "advice"),
    [
        (5, 2, 4, "use at most 2 rank(s) or a --batch_size of at most 1"),
        (3, 2, 4, "use at most 1 rank(s)"),
        (3, 4, 2, "use a --batch_size of at most 1"),
        (1, 2, 2, "use more cases"),
        (0, 1, 1, "use more cases"),
    ],
)
def test_too_few_cases_are_one_clear_line(cases: int, batch_size: int, ranks: int, advice: str) -> None:
    message = f"{cases} training cases do not give {ranks} rank(s) one batch of {batch_size} each; {advice}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        batches_per_epoch(cases, batch_size, ranks)


@settings(max_examples=80, deadline=None)
@given(
    cases=st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=40, unique=True),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63),
)
def test_a_split_is_disjoint_and_complete(cases: list[str], share: float, seed: int) -> None:
    training, evaluation = split_cases(cases, share, seed)
    assert sorted(training + evaluation) == sorted(cases)
    assert training == sorted(training)
    assert evaluation == sorted(evaluation)
    assert len(evaluation) == min(max(round(len(cases) * share), 1), len(cases) - 1)
    # The order in which a folder is listed changes nothing.
    assert split_cases(cases[::-1], share, seed) == (training, evaluation)


def test_a_split_is_drawn_by_its_seed() -> None:
    cases = [f"scan_{number:03d}" for number in range(200)]
    splits = [split_cases(cases, 0.2, seed)[1] for seed in range(50)]
    assert all(len(evaluation) == 40 for evaluation in splits)
    assert len(set(map(tuple, splits))) == 50
    # Every case is held out about as often as another.
    counts = np.bincount([int(case[-3:]) for evaluation in splits for case in evaluation], minlength=200)
    assert counts.max() <= 10 + 4.5 * (50 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("cases", [[], ["scan_0"]])
def test_a_split_needs_two_cases(cases: list[str]) -> None:
    with pytest.raises(UserError, match=f"a split needs at least 2 cases, found {len(cases)}"):
        split_cases(cases, 0.2, 0)


def test_every_sample_has_its_own_randomness() -> None:
    keys = [(seed, epoch, case) for seed in range(4) for epoch in range(1, 5) for case in range(4)]
    firsts = {key: sample_rng(*key).random() for key in keys}
    assert len(set(firsts.values())) == len(keys)
    assert firsts == {key: sample_rng(*key).random() for key in keys}


def test_order_split_and_samples_of_one_seed_have_nothing_in_common() -> None:
    permutation = EpochOrder(50, 50, 0, 1, 3).batches(1)[0]
    assert permutation != sample_rng(3, 1, 0).permutation(50).tolist()
    assert permutation != np.random.default_rng(3).permutation(50).tolist()
    held_out = split_cases([f"{number:02d}" for number in range(50)], 0.2, 3)[1]
    assert held_out != sorted(f"{number:02d}" for number in EpochOrder(50, 50, 0, 1, 3).batches(1)[0][:10])


# Cases of which a batch may hold only a share


@settings(max_examples=150, deadline=None)
@given(
    others=st.integers(1, 30),
    count=st.integers(1, 30),
    share=st.floats(0, 1),
    batch_size=st.integers(1, 6),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_a_batch_never_holds_more_than_its_share(
    others: int, count: int, share: float, batch_size: int, ranks: int, seed: int
) -> None:
    capped, cases = Capped(count, share), others + count
    try:
        orders = [EpochOrder(cases, batch_size, rank, ranks, seed, capped) for rank in range(ranks)]
        batches = [order.batches(3) for order in orders]
    except UserError:
        # One round more than there is would need other cases, or more of these than there is room for.
        room = int(share * batch_size + 1e-9)
        assert others < (batch_size - room) * ranks or cases < batch_size * ranks
        return
    assert {len(own) for own in batches} == {len(orders[0])}
    flat = [case for own in batches for batch in own for case in batch]
    assert len(set(flat)) == len(flat)
    assert all(len(batch) == batch_size for own in batches for batch in own)
    held = [sum(case >= others for case in batch) for own in batches for batch in own]
    assert max(held) <= share * batch_size + 1e-9
    assert max(held) - min(held) <= 1, "evenly over the batches"
    assert batches == [order.batches(3) for order in orders]
    # None of the others is left out for one of these.
    met = sum(case < others for case in flat)
    assert met == others or sum(held) == 0 or len(flat) < others


def test_all_others_are_met_once_an_epoch_and_these_in_turn() -> None:
    order = EpochOrder(20, 4, 0, 1, 1, Capped(10, 0.25))
    assert len(order) == 3, "10 others, 3 of them in a batch"
    met = [sorted(case for batch in order.batches(epoch) for case in batch) for epoch in range(1, 200)]
    counts = np.bincount(np.concatenate(met), minlength=20)
    assert (counts[:10] >= counts[10:].max()).all()
    assert counts[10:].min() > 20, "each of them has its turn"


def test_without_such_cases_the_order_is_what_it_was() -> None:
    assert EpochOrder(9, 2, 0, 2, 7, Capped(0, 0.3)).batches(4) == EpochOrder(9, 2, 0, 2, 7).batches(4)


def test_a_share_that_leaves_no_batch_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^2 training cases and 8 pseudo-labelled ones, .* a share of 0\.25, "):
        batches_per_epoch(10, 4, 1, Capped(8, 0.25))
