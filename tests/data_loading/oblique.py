"""Geometries for property tests: oblique, flipped, permuted and anisotropic."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_loading.io.volume import Geometry


@st.composite
def geometries(draw: st.DrawFn, least: int = 2, most: int = 6) -> Geometry:
    """Draws any permutation and flips of the axes, rotated by up to 25 degrees, with spacings of 0.5 to 5 mm."""
    order = draw(st.permutations(range(3)))
    signs = [draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)]
    spacing = [draw(st.floats(0.5, 5.0)) for _ in range(3)]
    shape = [draw(st.integers(least, most)) for _ in range(3)]
    axis = np.array([draw(st.floats(-1, 1)) for _ in range(3)])
    rotation = Rotation.from_rotvec(np.deg2rad(draw(st.floats(0, 25))) * axis / max(float(np.linalg.norm(axis)), 1e-6))
    affine = np.eye(4)
    affine[:3, :3] = rotation.as_matrix() @ (np.eye(3)[:, order] * signs) @ np.diag(spacing)
    affine[:3, 3] = [draw(st.floats(-500, 500)) for _ in range(3)]
    d, h, w = shape
    return Geometry(affine, (d, h, w), (spacing[0], spacing[1], spacing[2]))
