"""MLPerf's 3D U-Net: 31,190,243 parameters for 1 channel and 3 classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from model.convolutions import fork
from model.deep_supervision import Outputs
from model.layers import ACTIVATIONS, NORMALIZATIONS, BlockConfig, DoubleConv, OutputLayer, UpBlock
from model.normalization import InstanceNormActivation
from model.slabs import SlabConv3d, Slabs

# Feature maps per resolution, the bottleneck last.
MLPERF_FILTERS = (32, 64, 128, 256, 320, 320)


class Unet3d(nn.Module):
    """Encoder, bottleneck and decoder with skip connections; each resolution halves the one above.

    Args:
        channels: C of the image.
        classes: K, including the background.
        normalization: "instancenorm" (affine) or "batchnorm".
        activation: "relu" or "leaky_relu" (slope 0.01).
        filters: feature maps per resolution, the bottleneck last.
        fused: False computes norm and activation with PyTorch's own operators, for comparison; same numbers.
        deep_supervision: number of outputs in training: the first at full resolution, each further one at the next
            lower resolution of the decoder. The bottleneck has none.

    Raises:
        UserError: fewer than two resolutions, more outputs than resolutions of the decoder, or an unknown normalization
            or activation.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        normalization: str = "instancenorm",
        activation: str = "relu",
        filters: Sequence[int] = MLPERF_FILTERS,
        fused: bool = True,
        deep_supervision: int = 1,
    ) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS or activation not in ACTIVATIONS:
            raise UserError(
                f"unet3d: unknown normalization {normalization!r} or activation {activation!r}; "
                f"available: {', '.join(NORMALIZATIONS)} and {', '.join(ACTIVATIONS)}"
            )
        filters = tuple(filters)
        if len(filters) < 2 or not all(isinstance(n, int) and n > 0 for n in filters):
            raise UserError(f"unet3d: filters must be two or more positive numbers, got {filters}")
        if type(deep_supervision) is not int or not 1 <= deep_supervision < len(filters):
            raise UserError(
                f"unet3d: deep_supervision={deep_supervision!r}; with {len(filters)} filters it is a number of outputs "
                f"from 1 to {len(filters) - 1}"
            )
        config = BlockConfig(normalization=normalization, activation=activation, fused=fused)
        first, *inner, bottleneck = filters
        self.input_block = DoubleConv(channels, first, 1, config)
        self.downsample = nn.ModuleList(
            DoubleConv(above, here, 2, config) for above, here in zip(filters, inner, strict=False)
        )
        self.bottleneck = DoubleConv(filters[-2], bottleneck, 2, config)
        self.upsample = nn.ModuleList(
            UpBlock(below, here, config) for below, here in zip(filters[:0:-1], filters[-2::-1], strict=True)
        )
        self.output = OutputLayer(first, classes)
        # After all else, so that the initial weights of all else do not depend on them.
        self.heads = nn.ModuleList(OutputLayer(n, classes) for n in filters[1:deep_supervision])
        self.divisor = 2 ** (len(filters) - 1)
        self.recomputes = False
        self._slabs: Slabs | None = None

    def recompute_activations(self, flag: str) -> None:
        """Makes training keep each block's inputs alone, and compute the block again in the backward pass.

        Args:
            flag: what asks for it, for the message.
        """
        if any(isinstance(module, nn.BatchNorm3d) for module in self.modules()):
            raise UserError(f"{flag}: batch norm would count each batch twice; use --normalization instancenorm")
        self.recomputes = True

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if not (self.recomputes and self.training):
            output: Tensor = block(*inputs)
            return output
        # No block draws random numbers.
        again: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return again

    def forward(self, image: Tensor) -> Outputs:
        """(N, C, D, H, W) -> logits (N, K, D, H, W); D, H and W must be multiples of `divisor`.

        In training with deep supervision a tuple, whose output i has the size of the image divided by 2^i.
        """
        x, skips = self._run(self.input_block, image), []
        for block in (*self.downsample, self.bottleneck):
            x, skip = fork(x)
            skips.append(skip)
            x = self._run(block, x)
        lower: list[Tensor] = []
        for level, block, skip in zip(reversed(range(len(skips))), self.upsample, reversed(skips), strict=True):
            x = self._run(block, x, skip)
            if self.training and 0 < level <= len(self.heads):
                lower.append(self.heads[level - 1](x))
        return (self.output(x), *reversed(lower)) if lower else self.output(x)

    def check_window(self, shape: Sequence[int], flag: str) -> None:
        """Raises UserError for a window that cannot be halved often enough, naming the nearest one that can.

        Args:
            shape: (D, H, W).
            flag: where the shape comes from, for the message.
        """
        nearest = [max(1, round(n / self.divisor)) * self.divisor for n in shape]
        # Instance norm of a single voxel is 0 / 0, so the bottleneck needs at least two.
        if all(n == self.divisor for n in nearest):
            nearest[-1] = 2 * self.divisor
        if list(shape) != nearest:
            raise UserError(
                f"{flag} {' '.join(map(str, shape))}: this network halves its window {len(self.upsample)} times, "
                f"so each side must be a multiple of {self.divisor} and one at least twice that; "
                f"the nearest is {' '.join(map(str, nearest))}"
            )

    def check_slabs(self, depth: int, count: int, flag: str) -> None:
        """Raises UserError if a window of this depth cannot be cut into `count` equal slabs, naming what fits.

        Args:
            flag: where `count` comes from, for the message.
        """
        if any(isinstance(module, nn.BatchNorm3d) for module in self.modules()):
            raise UserError(f"{flag} {count}: batch norm cannot be computed by slabs; use --normalization instancenorm")
        if depth % (count * self.divisor):
            fitting = [n for n in range(1, count) if depth % (n * self.divisor) == 0][-1]
            nearest = max(1, round(depth / (count * self.divisor))) * count * self.divisor
            raise UserError(
                f"{flag} {count}: each slab needs a plane at the lowest resolution, so the depth of --input_shape must "
                f"be a multiple of {count} x {self.divisor}, not {depth}; use {flag} {fitting}, or a depth of {nearest}"
            )

    def share_windows(self, slabs: Slabs) -> None:
        """Makes training map this rank's slab of a window to the logits of that slab; evaluation is unchanged."""
        self._slabs = slabs
        self.train(self.training)

    def train(self, mode: bool = True) -> Unet3d:
        """As `nn.Module.train`; of shared windows, training's inputs are slabs, also those of parts that are frozen."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, SlabConv3d | InstanceNormActivation):
                module.slabs = self._slabs if mode else None
        return self
