"""Scores the evaluation cases: an exact mean, the same on any number of ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from data_loading.data_loader import EvaluationCase
from model.ensemble import mean_logits, members_of
from model.losses import LossOfSlabs
from model.metrics import dice_of_classes, predicted_classes
from runtime.distributed.world import World
from runtime.inference import Slab, WindowedVolume, predict_windows, remainder_crop, stride_of, tile
from runtime.logging.events import CaseEvaluated, EvaluationStarted, EvaluationStopped, Event
from runtime.precision import Precision
from runtime.test_time_flips import NO_FLIPS, Flips, mean_over_flips

T = TypeVar("T")


def do_nothing() -> None:
    """The default of hooks that are called while an evaluation is under way."""


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig:
    """How sliding windows cover a case, and how each is predicted; see `DatasetSpec` for what belongs to the data set.

    Attributes:
        window: voxels (D, H, W).
        overlap: of neighbouring windows, in [0, 1).
        batch_size: number of windows per forward pass.
        classes: K, the background included.
        padding_value, crops_remainder, ignore_label: as in the data set's spec.
        flips: of each window, over which the logits are averaged.
    """

    window: tuple[int, int, int]
    overlap: float
    batch_size: int
    classes: int
    padding_value: float | None
    crops_remainder: bool
    ignore_label: int | None = None
    flips: Flips = NO_FLIPS

    def kept(self, shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """Returns the part of a volume of this shape (D, H, W) that is scored."""
        if self.crops_remainder:
            return remainder_crop(shape, stride_of(self.window, self.overlap))
        return slice(None), slice(None), slice(None)

    def windows(self, shape: Sequence[int]) -> int:
        """Returns the number of windows of a volume of this shape (D, H, W)."""
        kept = [len(range(size)[part]) for size, part in zip(shape, self.kept(shape), strict=True)]
        return len(tile(kept, self.window, self.overlap, self.padding_value)[1])


@dataclass(frozen=True, kw_only=True)
class CaseAssignment:
    """Assignment of cases to ranks; every rank holds the same one, except for its own `subgroup`.

    Attributes:
        cases: in the order of the table of scores.
        members: for each case, the ranks that share its windows; the first of them writes the case's score.
        subgroup: the world of the ranks that share this rank's cases.
    """

    cases: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    subgroup: World

    @classmethod
    def make(cls, cases: Sequence[str], windows: Sequence[int], world: World) -> CaseAssignment:
        """Assigns the cases; every rank must call it.

        Args:
            windows: number of windows of each case.
        """
        members = assign_cases(windows, world.size)
        shared = [ranks for ranks in members if len(ranks) > 1]
        subgroup = world.split(shared) if shared else World(0, 1, world.device)
        return cls(cases=tuple(cases), members=members, subgroup=subgroup)

    def of_rank(self, rank: int) -> list[int]:
        """Returns the indices of the cases of which this rank scores windows."""
        return [index for index, ranks in enumerate(self.members) if rank in ranks]


def assign_cases(windows: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns each case's ranks: longest case first, to the least loaded rank; spare ranks help with the longest cases.

    A case never has more ranks than windows.

    Args:
        windows: number of windows of each case.
    """
    longest_first = sorted(range(len(windows)), key=lambda index: (-windows[index], index))
    members: list[list[int]] = [[] for _ in windows]
    load = [0] * ranks
    for index in longest_first:
        rank = load.index(min(load))
        members[index].append(rank)
        load[rank] += windows[index]
    for rank in range(len(windows), ranks if windows else 0):
        longest = max(longest_first, key=lambda index: windows[index] / len(members[index]))
        if windows[longest] > len(members[longest]):
            members[longest].append(rank)
    return tuple(map(tuple, members))


class CaseMetric(Protocol):
    """Further figures of each case, beside loss and Dice.

    Attributes:
        size: number of figures per case.
    """

    size: int

    def __call__(self, case: str, prediction: Tensor, label: Tensor) -> Tensor:
        """(size,) float64 on the label's device; the predicted and the true classes are (1, 1, D, H, W) uint8."""
        ...

    def keep(self, figures: dict[str, list[float]]) -> None:
        """Receives the figures of every case once all ranks know them."""
        ...


@dataclass(frozen=True, kw_only=True)
class CaseScorer:
    """Scores whole cases by sliding windows.

    Attributes:
        network: or an `Ensemble`, whose members' probabilities are averaged over the whole case.
        metric: further figures to compute for each case.
        check: called before each batch of windows; what it raises ends the evaluation and leaves the state as it was.
        check_waiting: called while this rank waits for the others; likewise.
    """

    network: nn.Module
    loss: nn.Module
    windows: SlidingWindowConfig
    precision: Precision
    metric: CaseMetric | None = None
    check: Callable[[], None] = do_nothing
    check_waiting: Callable[[], None] = do_nothing

    @torch.inference_mode()
    def score(self, cases: Iterable[EvaluationCase], subgroup: World) -> Iterator[Tensor]:
        """Scores each case: the loss of its logits, its Dice per foreground class, then the metric's figures.

        The logits of a case are never all in memory, unless its loss needs them, see `LossOfSlabs`.

        Args:
            subgroup: the ranks that share the windows of these cases; each gets the whole score.

        Yields:
            (K + metric.size,) float64 on the device, one per case.
        """
        waiting: deque[tuple[str, Tensor]] = deque()
        device, windows = self.precision.device, self.windows

        members = members_of(self.network)

        def cut() -> Iterator[list[WindowedVolume]]:
            for case in cases:
                kept = windows.kept(case.image.shape[2:])
                waiting.append((case.case, case.label[..., *kept].to(device, non_blocking=True)))
                image = case.image[..., *kept].to(device, non_blocking=True)
                yield [
                    WindowedVolume(
                        image,
                        windows.window,
                        windows.overlap,
                        padding_value=windows.padding_value,
                        member=subgroup.rank,
                        members=subgroup.size,
                    )
                    for _ in members
                ]

        def predict(forward: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
            self.check()
            return forward(batch)

        def total(own: Tensor) -> Tensor:
            return subgroup.sum(own, self.check_waiting)

        def slabs_of(network: nn.Module, volumes: Iterator[WindowedVolume]) -> Iterator[Slab]:
            predictor = mean_over_flips(partial(predict, self.precision.applied_to(network)), windows.flips)
            return predict_windows(volumes, predictor, windows.batch_size, total)

        first, *others = map(slabs_of, members, columns_of(cut(), len(members)))
        for slab in first:  # not zip, which would hold an earlier slab
            logits = mean_logits([slab.logits, *(next(slabs).logits for slabs in others)])
            if slab.planes.start == 0:
                name, label = waiting.popleft()
                loss, prediction = LossOfSlabs(self.loss), torch.empty_like(label)
            true = label[:, :, slab.planes]
            loss.add(logits, true)
            prediction[:, :, slab.planes] = predicted_classes(logits, true, windows.ignore_label)
            if slab.planes.stop == label.shape[2]:
                figures = [loss.value().double().view(1), dice_of_classes(prediction, label, windows.classes)[0]]
                yield torch.cat([*figures, self.metric(name, prediction, label)] if self.metric else figures)


def columns_of(rows: Iterator[list[T]], count: int) -> list[Iterator[T]]:
    """Returns an iterator for each column of rows; unlike `itertools.tee`, they hold nothing that all have taken."""
    waiting: list[deque[T]] = [deque() for _ in range(count)]

    def column(own: deque[T]) -> Iterator[T]:
        while own or take_row():
            yield own.popleft()

    def take_row() -> bool:
        row = next(rows, None)
        for queue, item in zip(waiting, row or [], strict=row is not None):
            queue.append(item)
        return row is not None

    return [column(own) for own in waiting]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Scores every case once and shares the scores with all ranks. Called with the epoch, on every rank.

    Each rank fills its own rows of a table of zeros. Adding zeros is exact, so the sum over the ranks is the whole
    table to the bit, and every rank takes the same mean of it: each case weighs 1 / number of cases.
    """

    scorer: CaseScorer
    assignment: CaseAssignment
    load_case: Callable[[str], EvaluationCase]
    world: World
    emit: Callable[[Event], None]

    def __call__(self, epoch: int) -> EvaluationStopped:
        """Returns the scores; reporting them is up to the caller."""
        cases, network, metric = self.assignment.cases, self.scorer.network, self.scorer.metric
        classes = self.scorer.windows.classes
        self.emit(EvaluationStarted(epoch, len(cases)))
        started = time.perf_counter()
        network.eval()
        self.world.broadcast_buffers(network)
        # The table stays on the device, so that the host can load the next case while this one is computed.
        width = classes + (metric.size if metric else 0)
        table = torch.zeros(len(cases), width, dtype=torch.float64, device=self.world.device)
        mine = self.assignment.of_rank(self.world.rank)
        scores = self.scorer.score((self.load_case(cases[index]) for index in mine), self.assignment.subgroup)
        for index, row in zip(mine, scores, strict=True):
            if self.assignment.members[index][0] == self.world.rank:
                table[index] = row
                self.emit(CaseEvaluated(epoch, cases[index]))
        network.train()
        # The one host sync of an evaluation.
        table = self.world.sum(table, self.scorer.check_waiting).cpu()
        if metric:
            metric.keep({case: row[classes:] for case, row in zip(cases, table.tolist(), strict=True)})
        table = table[:, :classes]
        # Column by column in case order, not a tensor reduction: its order of additions may depend on the machine.
        loss, *dice = [sum(column) / len(cases) for column in table.T.tolist()]
        return EvaluationStopped(
            epoch=epoch,
            mean_dice=sum(dice) / len(dice),
            dice=dice,
            loss=loss,
            seconds=time.perf_counter() - started,
            per_case={case: row[1:] for case, row in zip(cases, table.tolist(), strict=True)},
        )
