"""The published marks that a result is held against: MLPerf Training's logs of rounds v2.0 to v4.0."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """A published result; None: not published, or not measured.

    Attributes:
        devices: accelerators that trained.
        samples_per_s: of training, a device.
        evaluation_s: of the 42 cases.
        minutes: to the target.
    """

    who: str
    devices: int
    samples_per_s: float | None
    evaluation_s: float | None
    minutes: float | None


PUBLISHED_RESULTS = (
    PublishedResult("NVIDIA (MXNet), 8 x H200, v4.0", 8, 76.05, 1.67, 11.5),
    PublishedResult("NVIDIA (MXNet), 8 x H100, v4.0", 8, 72.2, 1.80, 12.1),
    PublishedResult("NVIDIA (MXNet), 8 x A100, v2.0", 8, 36.4, 3.27, 23.8),
    PublishedResult("Habana (PyTorch), 8 x Gaudi2, v3.0", 8, 40.5, 4.35, 20.5),
    PublishedResult("the largest: NVIDIA, 768 x H100 (672 training)", 768, None, None, 0.773),
)
