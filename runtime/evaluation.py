"""Scores the evaluation cases: an exact mean, the same on any number of ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from data_loading.pytorch_loader import EvaluationCase
from model.metrics import dice_score
from runtime.distributed.world import World
from runtime.inference import WindowedVolume, predict_windows, remainder_crop, stride_of, tile
from runtime.logging.events import CaseEvaluated, EvaluationStarted, EvaluationStopped, Event
from runtime.precision import Precision


@dataclass(frozen=True)
class SlidingWindowConfig:
    """How a case is scored; `classes` and what follows are the data set's (see `DatasetSpec`).

    Attributes:
        window, overlap: of the sliding window.
        batch_size: windows that go through the network at once.
        classes: K, the background included.
        padding_value, crops_remainder: as in the spec.
    """

    window: tuple[int, int, int]
    overlap: float
    batch_size: int
    classes: int
    padding_value: float | None
    crops_remainder: bool

    def kept(self, shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """The part of a volume that is scored."""
        if self.crops_remainder:
            return remainder_crop(shape, stride_of(self.window, self.overlap))
        return slice(None), slice(None), slice(None)

    def windows(self, shape: Sequence[int]) -> int:
        """How many windows a volume of this shape (D, H, W) has."""
        kept = [len(range(size)[part]) for size, part in zip(shape, self.kept(shape), strict=True)]
        return len(tile(kept, self.window, self.overlap, self.padding_value)[1])


@dataclass(frozen=True)
class CaseAssignment:
    """Who scores which case; every rank has the same plan but for its own `subgroup`.

    Attributes:
        cases: in the order of the table of scores.
        members: of each case, the ranks that share its windows; the first writes its score.
        partners: the world of the ranks that share this rank's cases.
    """

    cases: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    subgroup: World

    @classmethod
    def make(cls, cases: Sequence[str], windows: Sequence[int], world: World) -> CaseAssignment:
        """Deals the cases out; where there are more ranks than cases, the windows of a case are shared.

        Args:
            windows: of each case.
        """
        members = assign_cases(windows, world.size)
        shared = [ranks for ranks in members if len(ranks) > 1]
        subgroup = world.split(shared) if shared else World(0, 1, world.device)
        return cls(tuple(cases), members, subgroup)

    def of_rank(self, rank: int) -> list[int]:
        """Indices of the cases that this rank has a part in."""
        return [index for index, ranks in enumerate(self.members) if rank in ranks]


def assign_cases(windows: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of each case: longest case first, to the rank that has least to do; spare ranks help the longest.

    A case never has more ranks than windows.
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
    """What else is to be known of each case.

    Attributes:
        size: figures a case.
    """

    size: int

    def __call__(self, case: str, logits: Tensor, label: Tensor) -> Tensor:
        """(size,) float64 on the logits' device; logits (1, K, D, H, W), label (1, 1, D, H, W)."""
        ...

    def keep(self, figures: dict[str, list[float]]) -> None:
        """Takes every case's figures, once they are known on all ranks."""
        ...


def evaluate(
    epoch: int,
    network: nn.Module,
    loss: nn.Module,
    plan: CaseAssignment,
    load_case: Callable[[str], EvaluationCase],
    scoring: SlidingWindowConfig,
    precision: Precision,
    world: World,
    emit: Callable[[Event], None],
    check: Callable[[], None] = lambda: None,
    check_waiting: Callable[[], None] = lambda: None,
    measure: CaseMetric | None = None,
) -> EvaluationStopped:
    """Scores every case once and shares the scores with all ranks.

    Each rank fills its own rows of a table of zeros. Adding zeros is exact, so the sum over the ranks is the whole
    table to the bit, and every rank takes the same mean of it: each case weighs 1 / number of cases.

    Args:
        check: called before each batch of windows; what it raises ends the evaluation; the state stays.
        check_waiting: called while this rank, its part given, waits for others'; likewise.
        measure: what else to find out about each case.

    Returns:
        The scores; it is the caller who announces them.
    """
    cases = plan.cases
    emit(EvaluationStarted(epoch, len(cases)))
    started = time.perf_counter()
    network.eval()
    world.broadcast_buffers(network)
    # The table stays on the device, so that the host can load the next case while this one is computed.
    width = scoring.classes + (measure.size if measure else 0)
    table = torch.zeros(len(cases), width, dtype=torch.float64, device=world.device)
    mine = plan.of_rank(world.rank)
    loaded = (load_case(cases[index]) for index in mine)
    scores = score_cases(loaded, network, loss, scoring, precision, plan.subgroup, check, check_waiting, measure)
    for index, row in zip(mine, scores, strict=True):
        if plan.members[index][0] == world.rank:
            table[index] = row
            emit(CaseEvaluated(epoch, cases[index]))
    network.train()
    # The one host sync of an evaluation.
    table = world.sum(table, check_waiting).cpu()
    if measure:
        measure.keep({case: row[scoring.classes :] for case, row in zip(cases, table.tolist(), strict=True)})
    table = table[:, : scoring.classes]
    # Column by column in case order, not a tensor reduction: its order of additions may depend on the machine.
    means = [sum(column) / len(cases) for column in table.T.tolist()]
    dice = means[1:]
    return EvaluationStopped(
        epoch,
        mean_dice=sum(dice) / len(dice),
        dice=dice,
        loss=means[0],
        seconds=time.perf_counter() - started,
        per_case={case: row[1:] for case, row in zip(cases, table.tolist(), strict=True)},
    )


@torch.inference_mode()
def score_cases(
    cases: Iterable[EvaluationCase],
    network: nn.Module,
    loss: nn.Module,
    scoring: SlidingWindowConfig,
    precision: Precision,
    subgroup: World,
    check: Callable[[], None] = lambda: None,
    check_waiting: Callable[[], None] = lambda: None,
    measure: CaseMetric | None = None,
) -> Iterator[Tensor]:
    """The loss of each case's sliding-window logits and its Dice per foreground class: (K,) float64 on the device.

    Behind them come the figures of `measure`, where it is given.

    Args:
        partners: the ranks that share these cases' windows; each gets the whole score.
        check, check_waiting, measure: as in `evaluate`.
    """
    labels: deque[tuple[str, Tensor]] = deque()

    def cut() -> Iterator[WindowedVolume]:
        for case in cases:
            kept = scoring.kept(case.image.shape[2:])
            labels.append((case.case, case.label[..., *kept].to(precision.device, non_blocking=True)))
            image = case.image[..., *kept].to(precision.device, non_blocking=True)
            yield WindowedVolume(
                image, scoring.window, scoring.overlap, scoring.padding_value, subgroup.rank, subgroup.size
            )

    def predict(windows: Tensor) -> Tensor:
        check()
        with precision.autocast():
            logits: Tensor = network(windows)
        return logits

    for volume in predict_windows(cut(), predict, scoring.batch_size):
        (name, label), logits = labels.popleft(), volume.logits(lambda own: subgroup.sum(own, check_waiting))
        figures = [loss(logits, label).double().view(1), dice_score(logits, label)[0]]
        yield torch.cat([*figures, measure(name, logits, label)] if measure else figures)
