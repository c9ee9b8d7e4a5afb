"""The loss and the score, against closed forms worked out by hand and a brute-force computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from model.losses import DiceCELoss, DiceLoss, LossOfSlabs, dice_sums
from model.metrics import dice_ratio, dice_score

SMOOTH = 1e-6


def logits_of(probabilities: list[list[float]], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits (1, K, 1, 1, V) whose softmax is the given one, one row per voxel."""
    return torch.tensor(probabilities, dtype=torch.float64).log().T.reshape(1, -1, 1, 1, len(probabilities)).to(dtype)


def labels_of(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(1, 1, 1, 1, -1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(N, 1, D, H, W) -> (N, K, D, H, W) fp32."""
    return torch.cat([labels == value for value in range(classes)], dim=1).float()


# Four voxels, three classes; class 1 is in truth at voxel 1, class 2 at voxels 2 and 3.
PROBABILITIES = [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4], [0.1, 0.1, 0.8]]
LABELS = [0, 1, 2, 2]
# Per class: (2 * sum p t, sum p + sum t), by hand.
BACKGROUND = (2 * 0.5, 1.1 + 1)
KIDNEY = (2 * 0.7, 1.35 + 1)
TUMOUR = (2 * (0.4 + 0.8), 1.55 + 2)
CROSS_ENTROPY = -(math.log(0.5) + math.log(0.7) + math.log(0.4) + math.log(0.8)) / 4


def ratio(pair: tuple[float, float]) -> float:
    return (pair[0] + SMOOTH) / (pair[1] + SMOOTH)


def test_dice_loss_by_hand() -> None:
    loss = DiceLoss()(logits_of(PROBABILITIES), labels_of(LABELS))
    assert loss.item() == pytest.approx(1 - (ratio(KIDNEY) + ratio(TUMOUR)) / 2, abs=1e-6)


def test_dice_loss_with_the_background_by_hand() -> None:
    loss = DiceLoss(include_background=True)(logits_of(PROBABILITIES), labels_of(LABELS))
    assert loss.item() == pytest.approx(1 - (ratio(BACKGROUND) + ratio(KIDNEY) + ratio(TUMOUR)) / 3, abs=1e-6)


@pytest.mark.parametrize("include_background", [False, True])
def test_the_training_loss_is_half_of_each_by_hand(include_background: bool) -> None:
    classes = [BACKGROUND, KIDNEY, TUMOUR] if include_background else [KIDNEY, TUMOUR]
    dice = 1 - sum(map(ratio, classes)) / len(classes)
    loss = DiceCELoss(include_background)(logits_of(PROBABILITIES), labels_of(LABELS))
    assert loss.shape == ()
    assert loss.item() == pytest.approx((CROSS_ENTROPY + dice) / 2, abs=1e-6)


def test_leaving_the_background_out_is_the_default() -> None:
    arguments = logits_of(PROBABILITIES), labels_of(LABELS)
    assert torch.equal(DiceCELoss()(*arguments), DiceCELoss(include_background=False)(*arguments))
    assert not torch.equal(DiceCELoss()(*arguments), DiceCELoss(include_background=True)(*arguments))


def test_dice_is_taken_per_sample_and_then_averaged() -> None:
    logits, labels, others = logits_of(PROBABILITIES), labels_of(LABELS), labels_of([2, 0, 0, 1])
    both = DiceLoss()(torch.cat((logits, logits)), torch.cat((labels, others)))
    torch.testing.assert_close(both, (DiceLoss()(logits, labels) + DiceLoss()(logits, others)) / 2)
    # Summing over the batch before dividing would give another number.
    pooled = DiceLoss()(torch.cat((logits, logits), dim=4), torch.cat((labels, others), dim=4))
    assert abs(both.item() - pooled.item()) > 1e-3


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 0, 0]])
def test_a_class_absent_from_truth_and_prediction_costs_nothing(labels: list[int]) -> None:
    """Logits that give class 2 a probability of 0: its ratio is 1e-6 / 1e-6 = 1."""
    logits = torch.full((1, 3, 1, 1, 4), -1e4)
    logits[0, labels, 0, 0, range(4)] = 1e4
    assert DiceLoss()(logits, labels_of(labels)).item() == pytest.approx(0, abs=1e-6)
    assert dice_score(logits, labels_of(labels)).tolist() == [[1.0, 1.0]]


def test_a_class_that_only_one_side_has_scores_nothing() -> None:
    logits = torch.zeros(1, 3, 1, 1, 4)
    logits[:, 1] = 5
    predicted_alone, true_alone = dice_score(logits, labels_of([2, 2, 0, 0]))[0].tolist()
    assert predicted_alone == pytest.approx(SMOOTH / (4 + SMOOTH))
    assert true_alone == pytest.approx(SMOOTH / (2 + SMOOTH))


def test_a_perfect_and_a_reversed_prediction() -> None:
    labels = labels_of([0, 1, 2, 1])
    right = 200 * (one_hot(labels, 3) - 0.5)
    assert DiceCELoss()(right, labels).item() == pytest.approx(0, abs=1e-5)
    assert dice_score(right, labels).tolist() == [[1.0, 1.0]]
    assert DiceLoss()(-right, labels).item() > 0.5


@pytest.mark.parametrize("loss", [DiceLoss(), DiceLoss(True), DiceCELoss(), DiceCELoss(True)])
def test_gradient_against_finite_differences(loss: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 2, 2, 2, generator=generator)
    labels = torch.randint(3, (2, 1, 2, 2, 2), generator=generator, dtype=torch.uint8)
    leaf = logits.clone().requires_grad_()
    loss(leaf, labels).backward()
    gradient = leaf.grad
    assert gradient is not None
    step = 1e-2  # the loss computes in float32: a smaller one would measure its rounding
    for index in range(0, logits.numel(), 3):
        shift = torch.zeros_like(logits)
        shift.view(-1)[index] = step
        slope = (loss(logits + shift, labels) - loss(logits - shift, labels)).item() / (2 * step)
        assert gradient.view(-1)[index].item() == pytest.approx(slope, abs=2e-4)


def test_gradient_by_hand() -> None:
    """d CE / d logits = (p - t) / voxels; with Dice weighted out, half of it remains."""
    logits = logits_of(PROBABILITIES).requires_grad_()
    labels = labels_of(LABELS)
    whole = torch.autograd.grad(DiceCELoss()(logits, labels), logits)[0]
    dice = torch.autograd.grad(DiceLoss()(logits, labels), logits)[0]
    expected = (logits.detach().softmax(1) - one_hot(labels, 3)) / 4
    torch.testing.assert_close(2 * whole - dice, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [DiceLoss, DiceCELoss])
def test_16_bit_logits_give_the_fp32_loss_of_the_same_values(dtype: torch.dtype, make: Callable[[], nn.Module]) -> None:
    """Sums over 70,000 voxels overflow fp16 and stall in bf16; in fp32 they do not."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 3, 10, 70, 100, generator=generator).to(dtype)
    labels = torch.randint(3, (1, 1, 10, 70, 100), generator=generator, dtype=torch.uint8)
    loss = make()(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, make()(logits.float(), labels))
    assert torch.isfinite(loss)


def naive_loss(logits: Tensor, labels: Tensor, include_background: bool) -> Tensor:
    """The formula written out, in the logits' type."""
    truth = one_hot(labels, logits.shape[1]).to(logits.dtype)
    probabilities = logits.softmax(1)
    intersection, total = (probabilities * truth).sum((2, 3, 4)), (probabilities + truth).sum((2, 3, 4))
    dice = 1 - (2 * intersection + SMOOTH) / (total + SMOOTH)
    cross_entropy = -(truth * logits.log_softmax(1)).sum() / labels.numel()
    return (cross_entropy + dice[:, 0 if include_background else 1 :].mean()) / 2


def random_case(classes: int, absent: int = 0, label_dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    """Logits (2, K, 5, 6, 7) and labels; the last `absent` classes do not occur."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(2, classes, 5, 6, 7, generator=generator)
    return logits, torch.randint(classes - absent, (2, 1, 5, 6, 7), generator=generator).to(label_dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=["ncdhw", "last"])
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize(("classes", "absent"), [(2, 0), (3, 0), (3, 1), (3, 2), (4, 1), (6, 0)])
def test_one_pass_equals_the_naive_loss_and_its_gradient(
    classes: int, absent: int, include_background: bool, memory_format: torch.memory_format
) -> None:
    logits, labels = random_case(classes, absent)
    leaf = logits.contiguous(memory_format=memory_format).requires_grad_()
    exact = logits.double().requires_grad_()
    loss, expected = DiceCELoss(include_background)(leaf, labels), naive_loss(exact, labels, include_background)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    (gradient,), (right,) = torch.autograd.grad(2.5 * loss, leaf), torch.autograd.grad(2.5 * expected, exact)
    assert gradient.is_contiguous(memory_format=memory_format)
    assert (gradient - right).abs().max() < 2e-6 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sum_s_gradient_has_its_own_weight(dtype: torch.dtype) -> None:
    logits, labels = random_case(4)
    leaf = logits.to(dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    sums = dice_sums(leaf, labels)
    truth, probabilities = one_hot(labels, 4).double(), exact.softmax(1)
    expected = (
        -(truth * exact.log_softmax(1)).sum((1, 2, 3, 4)),
        (truth * probabilities).sum((2, 3, 4)),
        probabilities.sum((2, 3, 4)),
    )
    found = (sums.cross_entropy, sums.intersection, sums.predicted)
    weights = [torch.randn(one.shape, generator=torch.Generator().manual_seed(6)) for one in found]
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=2e-6, atol=1e-6)
    assert torch.equal(sums.true.double(), truth.sum((2, 3, 4)))
    assert not sums.true.requires_grad
    (gradient,) = torch.autograd.grad(found, leaf, weights)
    (right,) = torch.autograd.grad(expected, exact, [weight.double() for weight in weights])
    assert gradient.dtype == dtype
    digit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert (gradient.double() - right).abs().max() < 1.01 * digit * right.abs().max()


def test_labels_may_be_of_any_whole_type() -> None:
    losses = [DiceCELoss()(*random_case(3, label_dtype=dtype)) for dtype in (torch.uint8, torch.int32, torch.int64)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("loss", [DiceLoss(), DiceCELoss()])
def test_only_logits_and_labels_are_kept_for_the_way_back(loss: nn.Module) -> None:
    logits, labels = random_case(3)
    logits.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss(logits, labels)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > logits.shape[0] * logits.shape[1]}
    assert large == {logits.data_ptr(), labels.data_ptr()}


def test_slabs_add_up_in_float64() -> None:
    """Cross-entropies of 2^27, where float32 counts in steps of 16, and log 2."""
    slabs = LossOfSlabs(DiceCELoss())
    for logit in (2.0**27, 0.0):
        slabs.add(torch.tensor([0.0, logit]).view(1, 2, 1, 1, 1), labels_of([0]))
    loss = slabs.value()
    assert loss.dtype == torch.float64
    dice = SMOOTH / (1.5 + SMOOTH)
    assert loss.item() == pytest.approx(((2**27 + math.log(2)) / 2 + 1 - dice) / 2, rel=1e-12)


def test_the_gradient_s_own_gradient_is_refused() -> None:
    logits, labels = random_case(3)
    (gradient,) = torch.autograd.grad(DiceCELoss()(logits.requires_grad_(), labels), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_dice_ratio_is_twice_the_overlap_over_both_sizes() -> None:
    assert dice_ratio(torch.tensor(3.0), torch.tensor(8.0)).item() == pytest.approx((6 + SMOOTH) / (8 + SMOOTH))


def brute_force(logits: NDArray[np.float32], labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    scores = np.zeros((len(logits), logits.shape[1] - 1))
    for sample, (volume, truth) in enumerate(zip(logits, labels, strict=True)):
        predicted = np.array(
            [max(range(len(voxel)), key=lambda k: voxel[k]) for voxel in volume.reshape(len(volume), -1).T]
        )
        for value in range(1, logits.shape[1]):
            ours = {i for i, found in enumerate(predicted) if found == value}
            theirs = {i for i, found in enumerate(truth.ravel()) if found == value}
            scores[sample, value - 1] = (2 * len(ours & theirs) + SMOOTH) / (len(ours) + len(theirs) + SMOOTH)
    return scores


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 3),
    classes=st.integers(2, 5),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    levels=st.integers(2, 50),
)
def test_dice_score_equals_counting_voxel_by_voxel(
    seed: int, samples: int, classes: int, shape: tuple[int, int, int], levels: int
) -> None:
    """Few distinct values give ties, which arg-max resolves to the lower class, and absent classes."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, levels, (samples, classes, *shape)).astype(np.float32)
    labels = rng.integers(0, rng.integers(1, classes + 1), (samples, 1, *shape)).astype(np.uint8)
    scores = dice_score(torch.from_numpy(logits), torch.from_numpy(labels))
    assert scores.dtype == torch.float64
    assert scores.shape == (samples, classes - 1)
    np.testing.assert_allclose(scores.numpy(), brute_force(logits, labels), rtol=1e-14)


def test_dice_score_is_exact_where_float32_cannot_count() -> None:
    """2^24 + 3 of 2^24 + 4 voxels, an odd number above float32's 24 bits."""
    voxels = 2**24 + 4
    logits = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 1, voxels)
    labels = torch.ones(1, 1, 1, 1, voxels, dtype=torch.uint8)
    labels[..., 7] = 0
    expected = (2 * (voxels - 1) + SMOOTH) / (2 * voxels - 1 + SMOOTH)
    assert dice_score(logits, labels).item() == expected
    assert expected < 1
