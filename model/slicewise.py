"""Applies a 2-D network slice by slice, optionally with neighbouring slices as channels (2.5-D).

--model 'slicewise(network="monai.networks.nets:FlexibleUNet(backbone=\"efficientnet-b0\")", context=3)'
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import UserError
from model.deep_supervision import Outputs


class Slicewise(nn.Module):
    """Passes each slice along D through one 2-D network: (N, C, D, H, W) -> logits (N, K, D, H, W), or `Outputs` of it.

    With a context of 3, the network sees slices k - 1, k and k + 1 as `context * C` channels, ordered by slice. Beyond
    the ends the last slice repeats. Flipping the volume along D also reverses the order of the neighbours. H and W are
    limited only by the 2-D network; D may be anything, such as 1 for a data set of images.

    Args:
        channels: C of the image.
        classes: K, including the background.
        network: spec of a network (N, context * C, H, W) -> (N, K, H, W).
        build: builds it from (spec, channels, classes, dimensions).
        context: number of slices seen at once, odd.

    Raises:
        UserError: an even context, or an invalid spec.
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

    def forward(self, image: Tensor) -> Outputs:
        n, _, depth, _, _ = image.shape
        slices = torch.arange(depth, device=image.device)
        reach = self.context // 2
        shifted = [image[:, :, (slices + offset).clamp(0, depth - 1)] for offset in range(-reach, reach + 1)]
        # (N, context * C, D, H, W) -> (N * D, context * C, H, W)
        planes = torch.cat(shifted, dim=1).transpose(1, 2).flatten(0, 1)
        outputs: Outputs = self.network(planes)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (n, depth)).transpose(1, 2)
        return tuple(logits.unflatten(0, (n, depth)).transpose(1, 2) for logits in outputs)
