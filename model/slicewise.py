"""A 2-D network, slice by slice, with neighbouring slices as channels (2.5-D) where asked.

--model 'slicewise(network="monai.networks.nets:FlexibleUNet(backbone=\"efficientnet-b0\")", context=3)'
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import UserError


class Slicewise(nn.Module):
    """(N, C, D, H, W) -> (N, K, D, H, W): each slice along D goes through one 2-D network on its own.

    A slice is seen with its neighbours, slices k - 1, k, k + 1 for a context of 3, as `context * C` channels: slice
    by slice, each with its C. Beyond the ends the last slice repeats. A volume that is flipped along D has its
    neighbours in reverse as well. H and W are what the network takes; D may be anything, 1 for a data set of pictures.

    Args:
        channels: C, of the image.
        classes: K, the background included.
        network: the spec of a network (N, context * C, H, W) -> (N, K, H, W).
        build: makes one of (spec, channels, classes, dimensions).
        context: slices that are seen at once, an odd number.

    Raises:
        UserError: an even context, or whatever is wrong with the network's spec.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        network: str,
        build: Callable[[str, int, int, int], nn.Module],
        context: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(context, int) or context < 1 or context % 2 == 0:
            raise UserError(f"--model slicewise(context={context!r}): expected an odd number of slices, such as 3")
        if not isinstance(network, str):
            raise UserError(f"--model slicewise(network={network!r}): expected a spec in quotes")
        self.context = context
        self.network = build(network, context * channels, classes, 2)

    def forward(self, image: Tensor) -> Tensor:
        n, _, depth, _, _ = image.shape
        slices = torch.arange(depth, device=image.device)
        reach = self.context // 2
        seen = [image[:, :, (slices + away).clamp(0, depth - 1)] for away in range(-reach, reach + 1)]
        # (N, context * C, D, H, W) -> (N * D, context * C, H, W)
        planes = torch.cat(seen, dim=1).transpose(1, 2).flatten(0, 1)
        logits: Tensor = self.network(planes)
        return logits.unflatten(0, (n, depth)).transpose(1, 2)
