"""The U-Net's blocks. Attribute names are those of the MLPerf reference's checkpoints, so that those load."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMALIZATIONS: dict[str, type[nn.InstanceNorm3d | nn.BatchNorm3d]] = {
    "instancenorm": nn.InstanceNorm3d,
    "batchnorm": nn.BatchNorm3d,
}
ACTIVATIONS = ("relu", "leaky_relu")
LEAKY_SLOPE = 0.01


def make_activation(name: str) -> nn.Module:
    return nn.ReLU(inplace=True) if name == "relu" else nn.LeakyReLU(LEAKY_SLOPE, inplace=True)


def conv_block(in_channels: int, out_channels: int, stride: int, normalization: str, activation: str) -> nn.Sequential:
    """3x3x3 convolution (no bias: the norm's shift replaces it), affine norm, activation."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        NORMALIZATIONS[normalization](out_channels, affine=True),
        make_activation(activation),
    )


class TwoConvs(nn.Module):
    """Two convolution blocks, the first with `stride`. (N, C, D, H, W) -> (N, F, D/stride, H/stride, W/stride)."""

    def __init__(self, in_channels: int, filters: int, stride: int, normalization: str, activation: str) -> None:
        super().__init__()
        self.conv1 = conv_block(in_channels, filters, stride, normalization, activation)
        self.conv2 = conv_block(filters, filters, 1, normalization, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class UpBlock(nn.Module):
    """Doubles the resolution, joins the encoder's features, and convolves twice.

    x (N, C, D, H, W) and skip (N, F, 2D, 2H, 2W) -> (N, F, 2D, 2H, 2W). The transposed convolution has a bias,
    no norm and no activation; it stands in a Sequential because the reference's parameter names say so.
    """

    def __init__(self, in_channels: int, filters: int, normalization: str, activation: str) -> None:
        super().__init__()
        self.upsample_conv = nn.Sequential(nn.ConvTranspose3d(in_channels, filters, kernel_size=2, stride=2))
        self.conv1 = conv_block(2 * filters, filters, 1, normalization, activation)
        self.conv2 = conv_block(filters, filters, 1, normalization, activation)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv2(self.conv1(torch.cat((self.upsample_conv(x), skip), dim=1)))


class OutputLayer(nn.Module):
    """1x1x1 convolution with bias: (N, C, D, H, W) -> (N, K, D, H, W)."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
