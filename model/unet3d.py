"""The benchmark network: MLPerf's 3D U-Net, 31,190,243 parameters for 1 channel and 3 classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from common.errors import UserError
from model.layers import ACTIVATIONS, NORMALIZATIONS, BlockConfig, DoubleConv, OutputLayer, UpBlock

# One entry a resolution, the bottleneck last.
MLPERF_FILTERS = (32, 64, 128, 256, 320, 320)


class Unet3d(nn.Module):
    """Encoder, bottleneck and decoder with skips; each resolution halves the one above.

    Args:
        channels: C, of the image.
        classes: K, the background included.
        normalization: "instancenorm" (affine) or "batchnorm".
        activation: "relu" or "leaky_relu" (slope 0.01).
        filters: feature maps of each resolution, the bottleneck last.
        fused: False computes norm and activation by PyTorch's own operators; the numbers are the same.

    Raises:
        UserError: fewer than two resolutions, or an unknown normalization or activation.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        normalization: str = "instancenorm",
        activation: str = "relu",
        filters: Sequence[int] = MLPERF_FILTERS,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS or activation not in ACTIVATIONS:
            raise UserError(f"unet3d knows no normalization {normalization!r} with activation {activation!r}")
        filters = tuple(filters)
        if len(filters) < 2 or not all(isinstance(n, int) and n > 0 for n in filters):
            raise UserError(f"unet3d: filters must be two or more positive numbers, got {filters}")
        kind = BlockConfig(normalization, activation, fused)
        first, *inner, bottleneck = filters
        self.input_block = DoubleConv(channels, first, 1, kind)
        self.downsample = nn.ModuleList(
            DoubleConv(above, here, 2, kind) for above, here in zip(filters, inner, strict=False)
        )
        self.bottleneck = DoubleConv(filters[-2], bottleneck, 2, kind)
        self.upsample = nn.ModuleList(
            UpBlock(below, here, kind) for below, here in zip(filters[:0:-1], filters[-2::-1], strict=True)
        )
        self.output = OutputLayer(first, classes)
        self.divisor = 2 ** (len(filters) - 1)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, K, D, H, W); D, H and W must be multiples of `divisor`."""
        skips = [self.input_block(image)]
        for block in self.downsample:
            skips.append(block(skips[-1]))
        x = self.bottleneck(skips[-1])
        for block, skip in zip(self.upsample, reversed(skips), strict=True):
            x = block(x, skip)
        return self.output(x)

    def check_window(self, shape: Sequence[int], flag: str) -> None:
        """Raises UserError, naming the nearest shape that works, for a window that cannot be halved often enough."""
        nearest = [max(1, round(n / self.divisor)) * self.divisor for n in shape]
        # Instance norm of a single voxel is 0 / 0: the bottleneck needs at least two.
        if all(n == self.divisor for n in nearest):
            nearest[-1] = 2 * self.divisor
        if list(shape) != nearest:
            works = " ".join(map(str, nearest))
            raise UserError(
                f"{flag} {' '.join(map(str, shape))}: this network halves its window {len(self.upsample)} times, "
                f"each side must be a multiple of {self.divisor} and one at least twice that; the nearest is {works}"
            )
