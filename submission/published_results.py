"""Published results for comparison, from the logs of MLPerf Training rounds v2.0 to v4.0."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """A result; None where a value was not published or not measured.

    Attributes:
        devices: number of accelerators used for training.
        samples_per_s: training throughput per device.
        evaluation_s: seconds for the 42 cases.
        minutes: time to the target.
    """

    name: str
    devices: int
    samples_per_s: float | None = None
    evaluation_s: float | None = None
    minutes: float | None


# Forward and backward pass of one window of 128 x 128 x 128 voxels.
SAMPLE_TFLOP = 2.860

PUBLISHED_RESULTS = (
    PublishedResult(
        name="NVIDIA (MXNet), 8 x H200, v4.0", devices=8, samples_per_s=76.05, evaluation_s=1.67, minutes=11.5
    ),
    PublishedResult(
        name="NVIDIA (MXNet), 8 x H100, v4.0", devices=8, samples_per_s=72.2, evaluation_s=1.80, minutes=12.1
    ),
    PublishedResult(
        name="NVIDIA (MXNet), 8 x A100, v2.0", devices=8, samples_per_s=36.4, evaluation_s=3.27, minutes=23.8
    ),
    PublishedResult(
        name="Habana (PyTorch), 8 x Gaudi2, v3.0", devices=8, samples_per_s=40.5, evaluation_s=4.35, minutes=20.5
    ),
    PublishedResult(name="the largest: NVIDIA, 768 x H100 (672 training)", devices=768, minutes=0.773),
)
