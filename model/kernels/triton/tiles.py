"""How the kernels divide a sample's voxels among programs."""

from __future__ import annotations

import triton

# Programs per sample: enough to fill a large GPU (132 SMs on H200) at batch 1, few enough to sum in one step.
PROGRAMS = 512


def tiles(channels: int, voxels: int, tile: int) -> tuple[int, int, int, int]:
    """Returns channels padded to a power of two, voxels per tile, programs per sample and voxels per program.

    Args:
        tile: elements of a tile.
    """
    padded = triton.next_power_of_2(channels)
    rows = max(1, tile // padded)
    return padded, rows, *shares(voxels, rows, PROGRAMS)


def shares(voxels: int, rows: int, programs: int) -> tuple[int, int]:
    """Returns the number of programs, at most `programs`, and voxels per program: whole tiles of `rows` voxels each."""
    per_program = triton.cdiv(triton.cdiv(voxels, rows), programs) * rows
    return triton.cdiv(voxels, per_program), per_program
