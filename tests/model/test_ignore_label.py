"""Voxels with the ignore label: no loss, exactly no gradient, no score; all others count as if they were alone."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.registry import Spec
from model.losses import DiceCELoss, DiceLoss, SlabLoss, build_loss
from model.metrics import dice_score
from tests.model.test_slabs import Table, ThreadSlabs

IGNORED = 255
LOSSES = [DiceLoss(False, IGNORED), DiceLoss(True, IGNORED), DiceCELoss(False, IGNORED), DiceCELoss(True, IGNORED)]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, 4, 5, 6) and labels (2, 1, 4, 5, 6), of whose planes D the last two are ignored."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(3, (2, 1, 4, 5, 6), generator=generator, dtype=torch.uint8)
    labels[:, :, 2:] = IGNORED
    return logits.requires_grad_(), labels


def plain_twin(loss: nn.Module) -> nn.Module:
    include_background = (loss if isinstance(loss, DiceLoss) else loss.dice).first_class == 0  # type: ignore[union-attr]
    return type(loss)(include_background)


def gradient_of(loss: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    loss(leaf, labels).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_the_other_voxels_alone(loss: nn.Module) -> None:
    logits, labels = batch()
    alone = plain_twin(loss)
    torch.testing.assert_close(loss(logits, labels), alone(logits[:, :, :2], labels[:, :, :2]))
    gradient = gradient_of(loss, logits, labels)
    torch.testing.assert_close(gradient[:, :, :2], gradient_of(alone, logits[:, :, :2], labels[:, :, :2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_at_ignored_voxels_is_exactly_zero(loss: nn.Module, dtype: torch.dtype) -> None:
    gradient = gradient_of(loss, *batch(dtype))
    assert torch.count_nonzero(gradient[:, :, 2:]) == 0
    assert torch.count_nonzero(gradient[:, :, :2]) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_values_at_ignored_voxels_change_nothing_even_infinite_ones(loss: nn.Module) -> None:
    logits, labels = batch()
    changed = logits.detach().clone()
    changed[:, 1, 2] = math.inf
    changed[:, :, 3] = math.nan
    assert torch.equal(loss(changed, labels), loss(logits, labels))
    assert torch.equal(gradient_of(loss, changed, labels), gradient_of(loss, logits, labels))


def test_cross_entropy_is_the_mean_over_counted_voxels_as_in_torch() -> None:
    logits, labels = batch()
    labels[0] = IGNORED  # the samples differ in what counts
    labels[0, 0, 0, 0, 0] = 1
    expected = nn.functional.cross_entropy(logits, labels[:, 0].long(), ignore_index=IGNORED)
    dice = DiceLoss(False, IGNORED)(logits, labels)
    torch.testing.assert_close(DiceCELoss(False, IGNORED)(logits, labels), (expected + dice) / 2)


def test_by_hand() -> None:
    """Two of three voxels count: p(1) = 0.8 where class 1 is true, 0.4 where the background is."""
    probabilities = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64)
    logits = probabilities.log().T.reshape(1, 2, 1, 1, 3)
    labels = torch.tensor([1, 0, IGNORED], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    cross_entropy = -(math.log(0.8) + math.log(0.6)) / 2
    dice = 1 - (2 * 0.8 + 1e-6) / (0.8 + 0.4 + 1 + 1e-6)
    assert DiceCELoss(False, IGNORED)(logits, labels).item() == pytest.approx((cross_entropy + dice) / 2, rel=1e-12)


class MeanOfCounted(nn.Module):
    """A loss of one's own, which divides by the number of counted voxels."""

    def __init__(self, ignore_label: int = 0) -> None:
        super().__init__()
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        counted = (labels != self.ignore_label).float()
        return (logits.square().mean(1, keepdim=True) * counted).sum() / counted.sum()


OWN = Spec("tests.model.test_ignore_label:MeanOfCounted", trusted=True)


@pytest.mark.parametrize(
    "loss",
    [*LOSSES, build_loss("torch.nn:CrossEntropyLoss", False, 3, IGNORED), build_loss(OWN, False, 3, IGNORED)],
)
def test_a_batch_without_a_counted_voxel_has_no_loss(loss: nn.Module) -> None:
    logits, labels = batch()
    labels[:] = IGNORED
    assert loss(logits, labels).item() == 0
    assert torch.count_nonzero(gradient_of(loss, logits, labels)) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_without_ignored_voxels_give_the_plain_loss(loss: nn.Module) -> None:
    logits, labels = batch()
    labels[labels == IGNORED] = 2
    torch.testing.assert_close(loss(logits, labels), plain_twin(loss)(logits, labels))


def test_slabs_count_over_the_whole_window() -> None:
    logits, labels = batch()
    labels[:, :, 1:3] = 1  # the last plane is left ignored
    table = Table(2)

    def own(rank: int) -> Tensor:
        part = slice(2 * rank, 2 * rank + 2)
        loss = SlabLoss(DiceCELoss(False, IGNORED), ThreadSlabs(rank, table))
        return loss(logits.detach()[:, :, part], labels[:, :, part])

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(own, range(2)))
    for value in found:
        torch.testing.assert_close(value, DiceCELoss(False, IGNORED)(logits, labels).detach())


def test_the_score_is_that_of_the_other_voxels_alone() -> None:
    logits, labels = batch()
    assert torch.equal(dice_score(logits, labels, IGNORED), dice_score(logits[:, :, :2], labels[:, :, :2]))
    assert not torch.equal(dice_score(logits, labels, IGNORED), dice_score(logits, labels))


class Counting(nn.Module):
    """A loss that counts every voxel."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.mean()


def test_a_loss_that_counts_every_voxel_is_refused() -> None:
    with pytest.raises(UserError, match=r"Counting' counts every voxel, .*use dice_ce, dice, or a loss with"):
        build_loss(Spec("tests.model.test_ignore_label:Counting", trusted=True), False, 3, IGNORED)
    for spec in ("dice_ce", "dice"):
        assert build_loss(spec, False, 3, IGNORED).ignore_label == IGNORED
    torchs = build_loss(Spec("torch.nn:CrossEntropyLoss", trusted=True), False, 3, IGNORED)
    logits, labels = batch(torch.float32)
    torch.testing.assert_close(
        torchs(logits, labels), nn.functional.cross_entropy(logits[:, :, :2], labels[:, 0, :2].long())
    )
