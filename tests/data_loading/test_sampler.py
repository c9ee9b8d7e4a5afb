"""Split and order: seeded, complete, disjoint."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_loading.sampler import EpochSampler, PseudoLabelCap, batches_per_epoch, sample_rng
from data_loading.split import leave_out, split_cases, split_patients


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
    orders = [
        EpochSampler(cases=cases, batch_size=batch_size, rank=rank, ranks=ranks, seed=seed) for rank in range(ranks)
    ]
    if rounds == 0:
        with pytest.raises(UserError):
            orders[0].batches(epoch)
        return
    shards = [order.batches(epoch) for order in orders]
    assert all(len(order) == len(shard) == rounds for order, shard in zip(orders, shards, strict=True))
    assert all(len(batch) == batch_size for shard in shards for batch in shard)
    assert {number for shard in shards for batch in shard for number, _ in batch} == {epoch}
    met = [case for shard in shards for batch in shard for _, case in batch]
    assert len(set(met)) == len(met) == rounds * batch_size * ranks
    assert set(met) <= set(range(cases))
    # Dealt out in turn: together they are what a single rank meets first.
    alone = [
        batch[0][1] for batch in EpochSampler(cases=cases, batch_size=1, rank=0, ranks=1, seed=seed).batches(epoch)
    ]
    flat = [[case for batch in shard for _, case in batch] for shard in shards]
    assert [case for turn in zip(*flat, strict=True) for case in turn] == alone[: len(met)]
    assert shards == [order.batches(epoch) for order in orders]


@settings(max_examples=80, deadline=None)
@given(
    cases=st.integers(1, 20),
    batch_size=st.integers(1, 4),
    ranks=st.integers(1, 3),
    steps=st.integers(1, 9),
    seed=st.integers(0, 2**63),
    epochs=st.integers(1, 6),
)
def test_with_steps_the_epochs_are_one_endless_stream(
    cases: int, batch_size: int, ranks: int, steps: int, seed: int, epochs: int
) -> None:
    orders = [
        EpochSampler(cases=cases, batch_size=batch_size, rank=rank, ranks=ranks, seed=seed, fixed_batches=steps)
        for rank in range(ranks)
    ]
    shards = [[batch for epoch in range(1, epochs + 1) for batch in order.batches(epoch)] for order in orders]
    assert all(len(shard) == epochs * steps for shard in shards)
    stream = [key for turn in zip(*shards, strict=True) for batch in turn for key in batch]
    assert len(set(stream)) == len(stream) == epochs * steps * batch_size * ranks, "no sample twice, on any rank"
    # Pass by pass each case once: so at no moment is a case two samples ahead of another.
    assert [number for number, _ in stream] == [place // cases + 1 for place in range(len(stream))]
    for number in range(1, len(stream) // cases + 1):
        assert sorted(case for at, case in stream if at == number) == list(range(cases))
    # The permutations are those of epochs without steps.
    if batch_size <= cases:
        assert (
            EpochSampler(cases=cases, batch_size=batch_size, rank=0, ranks=1, seed=seed).batches(1)[0] == shards[0][0]
        )


def test_epochs_and_seeds_have_their_own_orders() -> None:
    orders = {
        (seed, epoch): tuple(
            case
            for batch in EpochSampler(cases=168, batch_size=2, rank=0, ranks=1, seed=seed).batches(epoch)
            for _, case in batch
        )
        for seed in (0, 1, 2)
        for epoch in (1, 2, 3)
    }
    assert len(set(orders.values())) == 9


def test_every_case_is_left_out_alike() -> None:
    # 7 cases in batches of 2: one a epoch is dropped, and not always the same.
    dropped = [
        (
            set(range(7))
            - {
                case
                for batch in EpochSampler(cases=7, batch_size=2, rank=0, ranks=1, seed=0).batches(epoch)
                for _, case in batch
            }
        ).pop()
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
    message = f"too few training cases ({cases}) for {ranks} rank(s) x batch size {batch_size}; {advice}"
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


def test_cases_are_left_out_by_id_or_by_kits19s_number() -> None:
    split = {"train": ["case_00001", "case_00023", "7"], "evaluation": ["case_00007", "case_00068"]}
    assert leave_out(split, ()) == split
    assert leave_out(split, ("23", "case_00068", "00001")) == {"train": ["7"], "evaluation": ["case_00007"]}
    assert leave_out(split, ("7",))["evaluation"] == split["evaluation"], "an id goes before a number"
    with pytest.raises(UserError, match=r"^--exclude 23 24: there is no case_00024; the data set has 7 to case_00068$"):
        leave_out(split, ("23", "24"))
    with pytest.raises(UserError, match=r"^--exclude 1 23 7: no training case is left$"):
        leave_out(split, ("1", "23", "7"))


def test_every_sample_has_its_own_randomness() -> None:
    keys = [(seed, epoch, case) for seed in range(4) for epoch in range(1, 5) for case in range(4)]
    firsts = {key: sample_rng(*key).random() for key in keys}
    assert len(set(firsts.values())) == len(keys)
    assert firsts == {key: sample_rng(*key).random() for key in keys}


def test_order_split_and_samples_of_one_seed_have_nothing_in_common() -> None:
    permutation = [case for _, case in EpochSampler(cases=50, batch_size=50, rank=0, ranks=1, seed=3).batches(1)[0]]
    assert permutation != sample_rng(3, 1, 0).permutation(50).tolist()
    assert permutation != np.random.default_rng(3).permutation(50).tolist()
    held_out = split_cases([f"{number:02d}" for number in range(50)], 0.2, 3)[1]
    assert held_out != sorted(f"{number:02d}" for number in permutation[:10])


def own(count: int) -> dict[str, str]:
    """Cases that are each a patient's only one."""
    return {f"{number:03d}": f"{number:03d}" for number in range(count)}


def sizes(split: dict[str, list[str]]) -> list[int]:
    return [len(cases) for cases in split.values()]


def test_128_patients_are_78_25_and_25() -> None:
    split = split_patients(own(128), (0.6, 0.2, 0.2), 0)
    assert list(split) == ["train", "evaluation", "test"]
    assert sizes(split) == [78, 25, 25]
    assert split == split_patients(dict(reversed(own(128).items())), (0.6, 0.2, 0.2), 0)
    assert split != split_patients(own(128), (0.6, 0.2, 0.2), 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=60), st.integers(0, 99), st.sampled_from([2, 3]))
def test_no_patient_is_on_two_sides_and_no_case_is_lost(whose: list[int], seed: int, parts: int) -> None:
    patients = {f"case{number}": f"p{patient}" for number, patient in enumerate(whose)}
    count = len(set(whose))
    shares = (0.7, 0.3) if parts == 2 else (0.5, 0.25, 0.25)
    if count < (2 if parts == 2 else 4):
        with pytest.raises(
            UserError, match=r"a split needs at least 2|leaves none of \d patients for (evaluation|test)"
        ):
            split_patients(patients, shares, seed)
        return
    split = split_patients(patients, shares, seed)
    assert sorted(case for cases in split.values() for case in cases) == sorted(patients)
    of_part = [{patients[case] for case in cases} for cases in split.values()]
    assert sum(map(len, of_part)) == count
    held_out = min(max(round(count * 0.3), 1), count - 1) if parts == 2 else count // 4
    assert [len(part) for part in of_part[1:]] == [held_out] * (parts - 1)


def test_two_shares_split_as_the_decathlon_always_was() -> None:
    for count in (2, 5, 13, 200):
        train, evaluation = split_cases(list(own(count)), 0.2, 3)
        assert split_patients(own(count), (0.8, 0.2), 3) == {"train": train, "evaluation": evaluation}


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((1, 0), [5, 0]),
        ((0, 1), [0, 5]),
        ((0, 0, 1), [0, 0, 5]),
        ((1, 0, 0), [5, 0, 0]),
        ((0.6, 0.4, 0), [3, 2, 0]),
        ((0, 0.5, 0.5), [0, 2, 3]),
    ],
)
def test_a_share_of_0_leaves_a_part_out(shares: tuple[float, ...], expected: list[int]) -> None:
    assert sizes(split_patients(own(5), shares, 0)) == expected
    assert sizes(split_patients(own(1), (1, 0), 0)) == [1, 0]


@pytest.mark.parametrize(
    ("count", "shares", "message"),
    [
        (9, (0.6, 0.2, 0.3), "--split_ratios 0.6 0.2 0.3: give two or three ratios that add up to 1"),
        (9, (1.2, -0.2), "give two or three ratios that add up to 1"),
        (9, (1,), "give two or three ratios"),
        (9, (0.25, 0.25, 0.25, 0.25), "give two or three ratios"),
        (9, (float("nan"), 0.5), "give two or three ratios"),
        (4, (0.6, 0.2, 0.2), "a ratio of 0.2 leaves none of 4 patients for evaluation"),
        (1, (0.8, 0.2), "a split needs at least 2 cases, found 1; --split_ratios 1 0 trains on all"),
    ],
)
def test_shares_that_are_none_are_one_clear_line(count: int, shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_patients(own(count), shares, 0)


def test_one_patient_with_several_cases_cannot_be_split() -> None:
    with pytest.raises(UserError, match="found 3, all of one patient; --split_ratios 1 0 trains on all"):
        split_patients(dict.fromkeys(["a", "b", "c"], "p"), (0.8, 0.2), 0)


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
    capped, cases = PseudoLabelCap(count=count, max_share=share), others + count
    try:
        orders = [
            EpochSampler(
                cases=cases,
                batch_size=batch_size,
                rank=rank,
                ranks=ranks,
                seed=seed,
                fixed_batches=None,
                pseudo_labels=capped,
            )
            for rank in range(ranks)
        ]
        batches = [order.batches(3) for order in orders]
    except UserError:
        # One round more than there is would need other cases, or more of these than there is room for.
        room = int(share * batch_size + 1e-9)
        assert others < (batch_size - room) * ranks or cases < batch_size * ranks
        return
    assert {len(own) for own in batches} == {len(orders[0])}
    assert all(len(batch) == batch_size for own in batches for batch in own)
    flat = [key for own in batches for batch in own for key in batch]
    assert len(set(flat)) == len(flat), "no sample twice"
    held = [sum(case >= others for _, case in batch) for own in batches for batch in own]
    assert max(held) <= share * batch_size + 1e-9
    assert max(held) - min(held) <= 1, "evenly over the batches"
    assert batches == [order.batches(3) for order in orders]


@pytest.mark.parametrize("steps", [None, 7])
def test_capped_cases_and_the_others_each_come_in_turn(steps: int | None) -> None:
    order = EpochSampler(
        cases=20,
        batch_size=4,
        rank=0,
        ranks=1,
        seed=1,
        fixed_batches=steps,
        pseudo_labels=PseudoLabelCap(count=10, max_share=0.25),
    )
    assert len(order) == (steps or 3), "10 others, 3 of them in a batch"
    met = [case for epoch in range(1, 101) for batch in order.batches(epoch) for _, case in batch]
    counts = np.bincount(met, minlength=20)
    for kind in (counts[:10], counts[10:]):
        assert kind.max() - kind.min() <= 1
    assert counts[10:].sum() * 3 == counts[:10].sum()


def test_capped_cases_have_an_order_of_their_own() -> None:
    """As many as the others, they would otherwise come in the same order, each always beside the same case."""
    cap = PseudoLabelCap(count=20, max_share=0.5)
    batches = EpochSampler(cases=40, batch_size=2, rank=0, ranks=1, seed=1, pseudo_labels=cap).batches(1)
    capped, others = zip(*([case for _, case in batch] for batch in batches), strict=True)
    assert sorted(capped) == list(range(20, 40))
    assert sorted(others) == list(range(20))
    assert [case - 20 for case in capped] != list(others)


def test_where_there_is_room_they_are_met_as_often_as_the_others() -> None:
    met = [
        case
        for epoch in range(1, 51)
        for batch in EpochSampler(
            cases=12,
            batch_size=4,
            rank=0,
            ranks=1,
            seed=1,
            fixed_batches=None,
            pseudo_labels=PseudoLabelCap(count=2, max_share=0.5),
        ).batches(epoch)
        for _, case in batch
    ]
    counts = np.bincount(met, minlength=12)
    assert counts.max() - counts.min() <= 1


def test_without_such_cases_the_order_is_what_it_was() -> None:
    assert EpochSampler(
        cases=9,
        batch_size=2,
        rank=0,
        ranks=2,
        seed=7,
        fixed_batches=None,
        pseudo_labels=PseudoLabelCap(count=0, max_share=0.3),
    ).batches(4) == EpochSampler(cases=9, batch_size=2, rank=0, ranks=2, seed=7).batches(4)


def test_a_share_that_leaves_no_batch_is_one_line() -> None:
    with pytest.raises(
        UserError,
        match=r"^too few manually labelled cases \(2 beside 8 pseudo-labelled ones\) .* a share of 0\.25 may ",
    ):
        batches_per_epoch(10, 4, 1, PseudoLabelCap(count=8, max_share=0.25))
