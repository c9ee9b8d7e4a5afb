"""MONAI's usual way, as its tutorials train: its residual UNet, Adam at 1e-3, a cached data set, random crops."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.dataloader import DataLoader
from monai.data.dataset import CacheDataset
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandCropByPosNegLabeld, SpatialPadd
from monai.transforms.intensity.dictionary import RandShiftIntensityd
from monai.utils.misc import set_determinism
from torch import nn

from data_loading.dataset import read_case, read_spec_and_split
from model.metrics import dice_of_classes
from runtime.arguments import RunConfig, parse_arguments

# `peers.MONAI` describes what follows.
CHANNELS, STRIDES = (16, 32, 64, 128, 256), (2, 2, 2, 2)
KEYS = ("image", "label")
EVALUATIONS = 5


def train_and_score(data_dir: Path, recipe: Path, seconds: float, seed: int) -> tuple[float, int]:
    """Trains for a time, evaluations not counted; returns the best mean Dice and the number of steps.

    Args:
        recipe: gives the crop, the window and the batch size.
    """
    set_determinism(seed)
    config, _ = parse_arguments([f"@{recipe}", "--data_dir", str(data_dir)])
    spec, split = read_spec_and_split(data_dir, [])
    classes = len(spec.classes)
    network = UNet(
        spatial_dims=3,
        in_channels=spec.channels,
        out_channels=classes,
        channels=CHANNELS,
        strides=STRIDES,
        num_res_units=2,
        norm="BATCH",
    )
    loss, optimizer = DiceCELoss(to_onehot_y=True, softmax=True), torch.optim.Adam(network.parameters(), 1e-3)
    loader = make_loader(data_dir, split["train"], config)
    steps, used, scores = 0, 0.0, list[float]()
    due = [seconds * (0.5 + 0.5 * (number + 1) / EVALUATIONS) for number in range(EVALUATIONS)]
    batches: Iterator[Any] = iter(())
    while due:
        started = time.perf_counter()
        if (batch := next(batches, None)) is None:
            batch = next(batches := iter(loader))
        optimizer.zero_grad()
        loss(network(batch["image"]), batch["label"]).backward()
        optimizer.step()
        steps, used = steps + 1, used + time.perf_counter() - started
        if used >= due[0]:
            due.pop(0)
            scores.append(mean_dice(network, data_dir, config))
    return max(scores), steps


def make_loader(data_dir: Path, cases: Sequence[str], config: RunConfig) -> Any:
    """Returns MONAI's loader of random crops from volumes in memory."""
    items = [dict(zip(KEYS, read_case(data_dir, case), strict=True)) for case in cases]
    size = config.input_shape
    transforms = Compose(
        [
            SpatialPadd(KEYS, size, mode="edge"),
            RandCropByPosNegLabeld(KEYS, label_key="label", spatial_size=size, pos=1, neg=1, num_samples=1),
            RandShiftIntensityd(["image"], offsets=0.1, prob=0.5),
        ]
    )
    cached = CacheDataset(items, transforms, progress=False)
    return DataLoader(cached, batch_size=config.batch_size, shuffle=True, drop_last=len(items) >= config.batch_size)


@torch.inference_mode()
def mean_dice(network: nn.Module, data_dir: Path, config: RunConfig) -> float:
    """Returns the mean over evaluation cases and foreground classes: MONAI's sliding windows, this project's Dice."""
    network.eval()
    scores = []
    spec, split = read_spec_and_split(data_dir, [])
    for case in split["evaluation"]:
        image, label = read_case(data_dir, case)
        window, batch = config.val_input_shape, config.val_batch_size
        logits: Any = sliding_window_inference(
            torch.from_numpy(image)[None],
            roi_size=window,
            sw_batch_size=batch,
            predictor=network,
            overlap=config.overlap,
            mode="gaussian",
        )
        scores.append(dice_of_classes(logits.argmax(1, keepdim=True), torch.from_numpy(label)[None], len(spec.classes)))
    network.train()
    return float(np.mean([score.mean().item() for score in scores]))
