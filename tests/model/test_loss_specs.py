"""Losses by spec: arguments set by the program, Generalized Dice by its formula, what a spec from a file may name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.registry import Spec
from model.losses import DiceCELoss, DiceLoss, build_loss

HERE = "tests.model.test_loss_specs"
CLASSES = 3


class Recording(nn.Module):
    """Records the arguments of its constructor and calls."""

    def __init__(self, include_background: bool, softmax: bool = False, sigmoid: bool = False) -> None:
        super().__init__()
        self.made_with = (include_background, softmax, sigmoid)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.called_with = (logits.dtype, labels.dtype, labels.shape)
        return logits.mean()


def no_loss() -> int:
    return 3


def pair() -> Any:
    return lambda logits, labels: (logits.mean(), labels)


def batch(present: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, 4, 5, 6) and labels (2, 1, 4, 5, 6) of the first `present` classes."""
    generator = torch.Generator().manual_seed(present)
    logits = torch.randn(2, CLASSES, 4, 5, 6, generator=generator)
    return logits.requires_grad_(), torch.randint(present, (2, 1, 4, 5, 6), generator=generator, dtype=torch.uint8)


def build(spec: str, include_background: bool = False) -> nn.Module:
    return build_loss(Spec(spec, trusted=True), include_background, CLASSES)


def test_the_tables_losses_are_built_as_they_are() -> None:
    assert isinstance(build("dice_ce"), DiceCELoss)
    dice = build("dice", include_background=True)
    assert isinstance(dice, DiceLoss)
    assert dice.first_class == 0
    assert isinstance(build_loss("dice_ce", False, CLASSES), DiceCELoss), "out of a checkpoint too"


@pytest.mark.parametrize(
    ("spec", "made_with"),
    [
        ("Recording", (True, True, False)),
        ("Recording(sigmoid=True)", (True, False, True)),  # the user's choice of probabilities replaces softmax
        ("Recording(include_background=False)", (False, True, False)),
    ],
)
def test_what_the_spec_leaves_out_is_set_by_the_program(spec: str, made_with: tuple[bool, ...]) -> None:
    loss = build(f"{HERE}:{spec}", include_background=True)
    logits, labels = batch()
    loss(logits.half(), labels)
    assert loss.loss.made_with == made_with  # type: ignore[union-attr]
    assert loss.loss.called_with == (torch.float32, torch.uint8, labels.shape)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{HERE}:no_loss", "cannot compare logits of 3 classes with labels: 'int' object is not callable"),
        (f"{HERE}:pair", "returns a tuple, not a single number"),
        ("torch.nn:CrossEntropyLoss(reduction='none')", r"returns \(1, 8, 8, 8\), not a single number; .*reduction"),
        ("torch.nn:Conv3d(in_channels=1, out_channels=1, kernel_size=1)", "has parameters of its own, which nothing"),
        ("dise", "'dise': unknown name; available: dice, dice_ce"),
        ("dice_ce(weight=2)", "unknown argument 'weight'; it takes include_background=False"),
    ],
)
def test_anything_but_a_loss_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--loss .*{message}"):
        build(spec)


def test_torchs_own_losses_get_class_indices() -> None:
    logits, labels = batch()
    expected = nn.functional.cross_entropy(logits, labels[:, 0].long(), label_smoothing=0.1)
    torch.testing.assert_close(build("torch.nn:CrossEntropyLoss(label_smoothing=0.1)")(logits, labels), expected)


@pytest.mark.parametrize(
    "spec",
    [
        "os:system(command='touch {path}')",
        f"{HERE}:Recording",
        "monai.losses:PerceptualLoss(spatial_dims=3)",
        "torch.nn:Conv3d",
        "monai.losses:torch",
        "torch:load",
    ],
)
def test_a_spec_out_of_a_file_stays_within_the_allowlist(spec: str, tmp_path: Any) -> None:
    if spec.startswith("monai"):
        pytest.importorskip("monai")
    with pytest.raises(UserError, match=r"comes from a file.*give --loss on the command line|has no callable torch"):
        build_loss(spec.format(path=tmp_path / "executed"), False, CLASSES)
    assert not (tmp_path / "executed").exists()


# MONAI's


@pytest.fixture(scope="module")
def _monai() -> None:
    pytest.importorskip("monai")


@pytest.mark.usefixtures("_monai")
@pytest.mark.parametrize("include_background", [False, True])
def test_monais_dice_is_ours_but_for_the_smoothing(include_background: bool) -> None:
    logits, labels = batch()
    spec = "monai.losses:DiceLoss(smooth_nr=1e-6, smooth_dr=1e-6)"
    theirs = build_loss(spec, include_background, CLASSES)  # as out of a checkpoint
    torch.testing.assert_close(theirs(logits, labels), DiceLoss(include_background)(logits, labels))
    torch.testing.assert_close(theirs(logits.half(), labels), theirs(logits.half().float(), labels))


@pytest.mark.usefixtures("_monai")
@pytest.mark.parametrize("include_background", [False, True])
def test_generalized_dice_weighs_a_class_by_its_volume_squared(include_background: bool) -> None:
    logits, labels = batch()
    first = 0 if include_background else 1
    smoothing = 1e-5
    losses = []
    for p, truth in zip(logits.softmax(1), labels, strict=True):
        one_hot = torch.stack([(truth[0] == k).float() for k in range(first, CLASSES)]).flatten(1)
        p = p[first:].flatten(1)
        weight = 1 / one_hot.sum(1) ** 2
        top = 2 * (weight * (p * one_hot).sum(1)).sum() + smoothing
        losses.append(1 - top / ((weight * (p.sum(1) + one_hot.sum(1))).sum() + smoothing))
    computed = build("monai.losses:GeneralizedDiceLoss", include_background)(logits, labels)
    torch.testing.assert_close(computed, torch.stack(losses).mean())


@pytest.mark.usefixtures("_monai")
@pytest.mark.parametrize("spec", ["GeneralizedDiceLoss", "GeneralizedDiceLoss(batch=True)", "GeneralizedDiceFocalLoss"])
@pytest.mark.parametrize("present", [1, 2])
def test_generalized_dice_is_finite_for_an_absent_class(spec: str, present: int) -> None:
    logits, labels = batch(present)
    loss = build(f"monai.losses:{spec}")(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.usefixtures("_monai")
@pytest.mark.parametrize("spec", ["TverskyLoss(alpha=0.3, beta=0.7)", "FocalLoss(gamma=1.5)", "DiceCELoss"])
def test_the_right_answer_costs_less(spec: str) -> None:
    loss = build(f"monai.losses:{spec}")
    _, labels = batch()
    right = 20 * nn.functional.one_hot(labels[:, 0].long(), CLASSES).movedim(-1, 1).float()
    assert loss(right, labels) < 1e-3
    assert loss(right.roll(1, dims=1), labels) > 0.5
