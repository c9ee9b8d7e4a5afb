"""The memory-bound operators of a training step as Triton kernels for CUDA, each with a plain twin that defines it.

`normalization.py`, `losses.py` and `convolutions.py` hold the twins, in PyTorch's operators; the tests compare the two.
Every sum has two stages, partial sums per program and then their total, without atomics: the same bits on every run.
"""

from model.kernels.triton.add import add_part
from model.kernels.triton.image import image_forward, image_weight_gradient
from model.kernels.triton.join import join_backward, join_forward
from model.kernels.triton.loss import sums_backward, sums_forward
from model.kernels.triton.narrow import (
    narrow_forward,
    narrow_input_gradient,
    narrow_weight_gradient,
    takes_rows,
)
from model.kernels.triton.norm import norm_backward, norm_forward
from model.kernels.triton.output import output_backward, output_forward

__all__ = [
    "add_part",
    "image_forward",
    "image_weight_gradient",
    "join_backward",
    "join_forward",
    "narrow_forward",
    "narrow_input_gradient",
    "narrow_weight_gradient",
    "norm_backward",
    "norm_forward",
    "output_backward",
    "output_forward",
    "sums_backward",
    "sums_forward",
    "takes_rows",
]
