"""The U-Net's blocks. Attribute names match the MLPerf reference, so that its checkpoints load."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from model.convolutions import IMAGE_CHANNELS, ImageConv3d, NarrowConv3d, OutputConv3d, is_narrow, upsample_and_join
from model.normalization import InstanceNormActivation
from model.slabs import SlabConv3d

NORMALIZATIONS = ("instancenorm", "batchnorm")
# Name -> slope below zero.
ACTIVATIONS = {"relu": 0.0, "leaky_relu": 0.01}


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings shared by all blocks of a network.

    Attributes:
        normalization: one of `NORMALIZATIONS`.
        activation: one of `ACTIVATIONS`.
        fused: whether instance norm and activation are one operator (see `InstanceNormActivation`).
    """

    normalization: str
    activation: str
    fused: bool = True

    def norm_activation(self, channels: int) -> list[nn.Module]:
        """Creates norm and activation, as one module or two."""
        slope = ACTIVATIONS[self.activation]
        if self.normalization == "instancenorm":
            return [InstanceNormActivation(channels, slope, self.fused)]
        return [nn.BatchNorm3d(channels), nn.LeakyReLU(slope, inplace=True)]


def conv_block(in_channels: int, out_channels: int, stride: int, config: BlockConfig) -> nn.Sequential:
    """3x3x3 convolution (without bias, since the norm adds one), affine norm, activation."""
    convolution: SlabConv3d
    if in_channels <= IMAGE_CHANNELS and stride == 1:
        convolution = ImageConv3d(in_channels, out_channels)
    elif is_narrow(in_channels, out_channels, stride):
        convolution = NarrowConv3d(in_channels, out_channels)
    else:
        convolution = SlabConv3d(in_channels, out_channels, stride)
    return nn.Sequential(convolution, *config.norm_activation(out_channels))


class DoubleConv(nn.Module):
    """Two convolution blocks, the first with `stride`. (N, C, D, H, W) -> (N, F, D/stride, H/stride, W/stride)."""

    def __init__(self, in_channels: int, filters: int, stride: int, config: BlockConfig) -> None:
        super().__init__()
        self.conv1 = conv_block(in_channels, filters, stride, config)
        self.conv2 = conv_block(filters, filters, 1, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class UpBlock(nn.Module):
    """Doubles the resolution, concatenates the encoder's features and convolves twice.

    x (N, C, D, H, W) and skip (N, F, 2D, 2H, 2W) -> (N, F, 2D, 2H, 2W). The transposed convolution has a bias, no norm
    and no activation; the Sequential around it is there for the reference's parameter names.
    """

    def __init__(self, in_channels: int, filters: int, config: BlockConfig) -> None:
        super().__init__()
        up = nn.ConvTranspose3d(in_channels, filters, kernel_size=2, stride=2)
        self.upsample_conv = nn.Sequential(up)
        self.conv1 = conv_block(2 * filters, filters, 1, config)
        self.conv2 = conv_block(filters, filters, 1, config)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        (up,) = self.upsample_conv
        assert isinstance(up, nn.ConvTranspose3d)
        return self.conv2(self.conv1(upsample_and_join(x, skip, up)))


class OutputLayer(nn.Module):
    """1x1x1 convolution with bias: (N, C, D, H, W) -> (N, K, D, H, W)."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = OutputConv3d(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
