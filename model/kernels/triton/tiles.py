"""How the kernels divide a sample's voxels among programs."""

from __future__ import annotations

import triton

# Programs per sample: enough to fill a large GPU (132 SMs on H200) at batch 1, few enough to sum in one step.
PROGRAMS = 512


def tiles(channels: int, voxels: int, tile: int, programs: int = 0) -> tuple[int, int, int, int]:
    """Returns channels padded to a power of two, voxels per tile, programs per sample and voxels per program.

    A program gets whole tiles, except for the last one.

    Args:
        tile: elements of a tile.
        programs: at most this many per sample; 0: `PROGRAMS`.
    """
    padded = triton.next_power_of_2(channels)
    rows = max(1, tile // padded)
    count = triton.cdiv(voxels, rows)
    per_program = triton.cdiv(count, programs or PROGRAMS) * rows
    return padded, rows, triton.cdiv(voxels, per_program), per_program
