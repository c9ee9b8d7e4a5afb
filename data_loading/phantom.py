"""Synthetic patients in the raw KiTS19 layout, so that the whole benchmark runs without a download.

    python3 -m data_loading.phantom --results_dir RAW --cases 20
    python3 -m data_loading.phantom --results_dir RAW --segmentations KITS19    # CT-like images for given masks

writes RAW/case_00000/{imaging,segmentation}.nii.gz and so on. As in KiTS19, d runs from head to feet, h from front
to back and w from the patient's right to the left. Anatomy is given in body units: h and w run from -1 to 1 between
opposite points of the skin, d from -1 in the first slice to 1 in the last.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.cli import Parser
from common.errors import UserError, run_program
from common.memory import free_memory_bytes
from common.messages import counted
from common.progress import track
from data_loading.io.volume import Geometry, Volume, read_nifti, write_nifti

DEFAULT_SHAPE = (64, 128, 128)  # half of the reference's 128-cubed crop: under a second per case
MIN_AXIS, MAX_AXIS = 16, 32767  # at 16 a tumour is still three voxels wide; NIfTI-1 stores sizes as int16
MAX_CASES = 100_000  # KiTS19's folder names have five digits
SLAB = 16  # slices painted at once: 17 MB of float32 at 512 x 512, however long the scan
PEAK_BYTES_PER_VOXEL = 8  # 7 were measured: 1 for the mask, and 3 copies of the image's 2 during gzip

KIDNEY_HU, TUMOUR_HU = (155, 195), (82, 108)  # the contrast phase of KiTS19; tumours take up less than kidneys
LOWEST_HU, HIGHEST_HU = -1024, 3071  # 12 bits, as scanners store
NOISE_HU = (10, 15)  # sigma in an abdominal scan of usual dose
SHADING_HU = 8  # sigma of the slow variation: less than what separates organs
BLUR_VOXELS = 0.7  # in-plane only: neighbours in a slice mix, slices 1 to 5 mm apart hardly do
WAVES = 5  # cosines along each axis of a smooth field: its bumps are about a fourth of the view wide
WOBBLE = 0.1  # sigma of an organ's squared radius: outlines bulge by about 5 %
LABELS_END = 0.8  # given kidneys and tumours stay within this radius of the body's axis, inside fat and muscle

Floats = NDArray[np.float32]
Body = tuple[Floats, Floats, Floats]  # every voxel's position in body units: d (D,), h and w (H, W)
Case = tuple[int, Path | None]  # its number, and the path of its mask


class Organ(NamedTuple):
    """An ellipsoid, (d, h, w) in body units; an infinite radius makes a column. Its HU is drawn from the band."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    hu: tuple[float, float]


# Later organs cover earlier ones. The liver shares the tumours' HU, marrow and vessels the kidneys', so that no
# threshold solves the task.
ORGANS = (
    Organ((0.0, 0.0, 0.0), (math.inf, 1.00, 1.00), (-110, -90)),  # fat, wall of muscle, fat around the organs
    Organ((0.0, 0.0, 0.0), (math.inf, 0.88, 0.88), (45, 65)),
    Organ((0.0, 0.0, 0.0), (math.inf, 0.76, 0.76), (-110, -90)),
    # Bowel in front, some of it filled with contrast, and gas in it.
    *(Organ((0.3 + x / 9, -0.36 + 0.09 * (-1) ** x, x / 5), (0.5, 0.15, 0.13), (10, 130)) for x in range(-2, 3)),
    Organ((0.5, -0.50, 0.10), (0.25, 0.08, 0.14), (-900, -600)),
    *(Organ((0.0, 0.66, x), (math.inf, 0.17, 0.19), (45, 65)) for x in (-0.24, 0.24)),  # muscles of the back
    *(Organ((0.6, 0.44, x), (0.9, 0.14, 0.10), (45, 65)) for x in (-0.22, 0.22)),  # psoas muscles
    Organ((-0.5, -0.28, 0.30), (0.45, 0.27, 0.27), (15, 45)),  # stomach
    Organ((-0.5, -0.10, -0.40), (0.70, 0.55, 0.36), (90, 125)),  # liver
    Organ((-0.6, 0.20, 0.56), (0.38, 0.28, 0.16), (110, 145)),  # spleen
    Organ((0.0, 0.50, 0.00), (math.inf, 0.19, 0.150), (350, 600)),  # vertebrae: cortex, marrow, process, canal
    Organ((0.0, 0.50, 0.00), (math.inf, 0.14, 0.105), (170, 250)),
    Organ((0.0, 0.77, 0.00), (math.inf, 0.11, 0.040), (350, 600)),
    Organ((0.0, 0.70, 0.00), (math.inf, 0.06, 0.060), (20, 40)),
    Organ((0.0, 0.24, 0.07), (math.inf, 0.07, 0.055), (150, 200)),  # aorta and vena cava
    Organ((0.0, 0.23, -0.09), (math.inf, 0.06, 0.065), (120, 170)),
    *(Organ((0.0, 0.8 * math.cos(x), 0.8 * math.sin(x)), (0.6, 0.04, 0.06), (300, 500)) for x in range(1, 7)),  # ribs
)


def make_phantom(
    seed: int, case: int, shape: tuple[int, int, int], view_mm: tuple[float, float, float] | None = None
) -> tuple[Volume, Volume]:
    """Returns one synthetic patient, a pure function of its arguments.

    Args:
        seed, case: integers from 0; together they determine every random choice.
        shape: voxels (D, H, W), 16 to 32767 each.
        view_mm: (D, H, W) field of view; None draws 200-350 mm along D, 350-420 mm along H and W. The patient fills it.

    Returns:
        The image, (1, D, H, W) int16 in HU, and its mask, (1, D, H, W) uint8: 0 background, 1 kidney, 2 tumour, all
        of which occur. Both have the same geometry, oriented as in KiTS19.
    """
    body_rng, rng, _ = np.random.default_rng([seed, case]).spawn(3)
    depth, width = rng.uniform(200, 350), rng.uniform(350, 420)
    view_mm = view_mm or (depth, width, width)
    # Through float32, which is what the file stores: reading it back changes nothing.
    sd, sh, sw = (float(np.float32(mm / n)) for mm, n in zip(view_mm, shape, strict=True))
    affine = np.array([[0, 0, -sw, 0], [0, -sh, 0, 0], [-sd, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
    geometry = Geometry(affine, shape, (sd, sh, sw))
    labels = _draw_labels(rng, _draw_body(body_rng, geometry), shape)
    mask = Volume(labels[np.newaxis], geometry)
    return paint(mask, seed, case), mask


def paint(mask: Volume, seed: int, case: int) -> Volume:
    """Returns a CT-like image around given kidneys and tumours.

    Args:
        mask: (1, D, H, W) uint8, 0 background, 1 kidney, 2 tumour; its axes run as in KiTS19.
        seed, case: as in `make_phantom`.

    Returns:
        The image, (1, D, H, W) int16 in HU, in the mask's geometry.

    Raises:
        UserError: the mask has several channels or other labels.
    """
    labels: NDArray[np.uint8] = mask.array[0]
    if len(mask.array) != 1 or labels.max() > 2:
        found = f"{len(mask.array)} channels and labels up to {mask.array.max()}"
        raise UserError(f"expected one channel with labels 0 background, 1 kidney, 2 tumour; found {found}")
    body_rng, _, rng = np.random.default_rng([seed, case]).spawn(3)
    body = _draw_body(body_rng, mask.geometry, labels)
    organs = [(_varied(organ, rng), rng.uniform(*organ.hu)) for organ in ORGANS]
    kidney_hu, tumour_hu, noise_hu = (rng.uniform(*band) for band in (KIDNEY_HU, TUMOUR_HU, NOISE_HU))
    shading = _smooth_field(rng, labels.shape)
    image = np.empty(labels.shape, dtype=np.int16)
    for slices, limit in _slabs(rng, labels.shape):
        hu = np.full(limit.shape, -1000, dtype=np.float32)  # air
        for organ, organ_hu in organs:
            _fill(hu, organ_hu, organ, body, slices=slices, limit=limit)
        hu[labels[slices] == 1] = kidney_hu
        hu[labels[slices] == 2] = tumour_hu
        hu = ndimage.gaussian_filter(hu, (0, BLUR_VOXELS, BLUR_VOXELS))
        hu += SHADING_HU * shading(slices)
        hu += np.float32(noise_hu) * rng.standard_normal(hu.shape, dtype=np.float32)
        image[slices] = np.rint(hu).clip(LOWEST_HU, HIGHEST_HU)
    return Volume(image[np.newaxis], mask.geometry)


def main(argv: list[str] | None = None) -> int:
    """Writes the cases that the command line requests; returns the exit status.

    Raises:
        UserError: a bad argument, no masks, a bad mask, an output folder that cannot be written, too little memory.
    """
    arguments = _parse(argv)
    results, masks = arguments.results_dir, arguments.segmentations
    cases: list[Case] = [(case, None) for case in range(arguments.cases or 0)]
    if masks:
        cases = _find_masks(masks)[: arguments.cases]
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results_dir {results}: cannot be created: {error.strerror}") from None
    if masks and results.samefile(masks):
        raise UserError(f"--results_dir {results} holds the masks themselves; name another folder")
    make = functools.partial(_make_case, results, arguments.seed, arguments.shape, arguments.field_of_view)
    workers = min(arguments.num_workers, len(cases))
    for _ in track(_run(make, cases, workers), len(cases), "phantoms", "case"):
        pass
    print(f"{counted(len(cases), 'case')} in {results}")
    return 0


def _draw_body(rng: np.random.Generator, geometry: Geometry, labels: NDArray[np.uint8] | None = None) -> Body:
    """Draws the patient's pose and size; the body is enlarged if given labels would be outside it."""
    shape, spacing = geometry.shape, geometry.spacing_mm
    # No patient is quite straight (radians) or centred (within 2 % of the view, in mm).
    turn = rng.normal(0, 0.07)
    h, w = ((np.arange(shape[i]) - shape[i] * rng.normal(0.5, 0.02)) * spacing[i] for i in (1, 2))
    # The body fills the view's width, and is about 0.8 as deep.
    width = rng.uniform(0.44, 0.48) * shape[2] * spacing[2]
    rows = (h[:, None] * math.cos(turn) + w * math.sin(turn)) / (width * rng.uniform(0.74, 0.84))
    columns = (w * math.cos(turn) - h[:, None] * math.sin(turn)) / width
    if labels is not None:
        reach = np.hypot(rows, columns).max(where=labels.any(axis=0), initial=LABELS_END)
        rows, columns = rows * LABELS_END / reach, columns * LABELS_END / reach
    return np.linspace(-1, 1, shape[0], dtype=np.float32), rows.astype(np.float32), columns.astype(np.float32)


def _draw_labels(rng: np.random.Generator, body: Body, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Draws two kidneys, enlarged so that small crops contain them, and a tumour on one or, rarely, on both."""
    kidneys: list[tuple[int, Organ]] = []
    tumours: list[tuple[int, Organ]] = []
    tumour_on = rng.uniform(-1, 1)
    for side in (-1, 1):
        size = rng.uniform(0.95, 1.2)
        kidney = _varied(Organ((0.1, 0.28, 0.43 * side), (0.50 * size, 0.27 * size, 0.23 * size), (0, 0)), rng)
        (d, h, w), (rd, rh, rw) = kidney.centre, kidney.radii
        # The hilum: fat enters from the middle of the body.
        kidneys += [(1, kidney), (0, Organ((d, h, w - side * rw), (0.35 * rd, 0.4 * rh, 0.6 * rw), (0, 0)))]
        # Beneath the surface in any direction, but preferably not towards spine or wall.
        away = rng.standard_normal(3) * (1, 1, 0.5)
        away *= np.asarray(kidney.radii) * 0.8 / np.linalg.norm(away)
        scale = rng.uniform(0.9, 1.2)
        if side * tumour_on < 0.2:
            tumours.append((2, Organ(tuple(kidney.centre + away), (0.26 * scale, 0.27 * scale, 0.22 * scale), (0, 0))))
    labels = np.zeros(shape, dtype=np.uint8)
    for slices, limit in _slabs(rng, shape):
        for label, organ in kidneys + tumours:
            _fill(labels[slices], label, organ, body, slices=slices, limit=limit)
    return labels


def _varied(organ: Organ, rng: np.random.Generator) -> Organ:
    """Returns the organ of another patient: slightly displaced, up to 5 % larger or smaller."""
    d, h, w = np.asarray(organ.centre) + rng.uniform(-1, 1, 3) * (0.10, 0.02, 0.02)
    rd, rh, rw = np.asarray(organ.radii) * rng.uniform(0.95, 1.05)
    return Organ((d, h, w), (rd, rh, rw), organ.hu)


def _fill(values: NDArray[Any], value: float, organ: Organ, body: Body, *, slices: slice, limit: Floats) -> None:
    """Writes `value` to a slab's voxels (S, H, W) inside the organ, whose squared radius is `limit` instead of 1."""
    along, rows, columns = ((x - c) / r for x, c, r in zip(body, organ.centre, organ.radii, strict=True))
    along, across = along[slices, None, None] ** 2, rows**2 + columns**2
    # Only the organ's bounding box is compared: most organs are small.
    for box in ndimage.find_objects((across + along.min() < limit.max()).astype(np.uint8)):
        values[:, *box][along + across[box] < limit[:, *box]] = value


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...]) -> Callable[[slice], Floats]:
    """Returns a function from slices to a slab of a random field of mean 0 and variance about 1 over the view."""
    # In float64: sums that processors compute in different orders then round to the same float32.
    bases = [np.cos(np.pi * np.outer((np.arange(n) + 0.5) / n, np.arange(WAVES))) for n in shape]
    weights = rng.standard_normal((WAVES,) * 3)
    weights[0, 0, 0] = 0
    # A cosine's mean square is 1/2, a constant's 1.
    power = np.where(np.arange(WAVES) == 0, 1.0, 0.5)
    weights /= math.sqrt(np.einsum("ijk,i,j,k", weights**2, power, power, power))
    return lambda slices: (bases[1] @ np.tensordot(bases[0][slices], weights, 1) @ bases[2].T).astype(np.float32)


def _slabs(rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[tuple[slice, Floats]]:
    """Yields each slab's slices, and the squared radius (S, H, W) at which organs end there."""
    wobble = _smooth_field(rng, shape)
    for start in range(0, shape[0], SLAB):
        slices = slice(start, start + SLAB)
        yield slices, 1 + WOBBLE * wobble(slices)


def _run(make: Callable[[Case], None], cases: list[Case], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(make, cases)
        return
    # Spawned: forking is unsafe with the threads of tqdm and BLAS. Only the parent reports Ctrl-C.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(make, cases)
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, most likely because memory ran out; use a smaller --num_workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _make_case(
    results: Path,
    seed: int,
    shape: tuple[int, int, int],
    view_mm: tuple[float, float, float] | None,
    numbered: Case,
) -> None:
    case, source = numbered
    folder = results / f"case_{case:05d}"
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link, which may point outside --results_dir; remove it")
    if source is None:
        image, mask = make_phantom(seed, case, shape, view_mm)
    else:
        mask = read_nifti(source, np.uint8)
        try:
            image = paint(mask, seed, case)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    try:
        folder.mkdir(exist_ok=True)
        write_nifti(folder / "segmentation.nii.gz", mask)
        write_nifti(folder / "imaging.nii.gz", image)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _find_masks(folder: Path) -> list[Case]:
    found = sorted(folder.glob(f"case_{'[0-9]' * 5}/segmentation.nii.gz"))
    if not found:
        wrong = "holds no masks" if folder.is_dir() else "no such folder"
        raise UserError(f"--segmentations {folder}: {wrong}; expected case_00000/segmentation.nii.gz and so on in it")
    return [(int(path.parent.name.removeprefix("case_")), path) for path in found]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("data_loading.phantom", description="Synthetic patients in the raw KiTS19 layout.")
    parser.add_argument("--results_dir", type=Path, required=True, help="folder for the case folders")
    parser.add_argument(
        "--cases", type=int, metavar="N", help="number of cases; with --segmentations a maximum (default: all)"
    )
    parser.add_argument("--shape", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels (default: 64 128 128)")
    parser.add_argument(
        "--field_of_view",
        type=float,
        nargs=3,
        metavar=("D", "H", "W"),
        help="field of view in mm (default: drawn, 200-350 along D and 350-420 along H and W)",
    )
    parser.add_argument("--segmentations", type=Path, help="paint on the masks DIR/case_*/segmentation.nii.gz instead")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default: 1)")
    arguments = parser.parse_args(argv)
    if arguments.segmentations is None and arguments.cases is None:
        raise UserError("give --cases N, the number of synthetic patients, or --segmentations DIR, masks to paint on")
    if arguments.segmentations is not None and arguments.shape is not None:
        raise UserError(
            "--shape applies to synthetic patients; images painted on --segmentations have the shapes of their masks"
        )
    if arguments.field_of_view is not None and (arguments.segmentations or not min(arguments.field_of_view) > 0):
        raise UserError(
            "--field_of_view applies to synthetic patients, in mm above 0; given masks have their own spacing"
        )
    if arguments.cases is not None and not 1 <= arguments.cases <= MAX_CASES:
        raise UserError(f"--cases must be 1 to {MAX_CASES}, not {arguments.cases}")
    if arguments.num_workers < 1 or arguments.seed < 0:
        raise UserError("--num_workers must be at least 1 and --seed at least 0")
    shape = arguments.shape = tuple(arguments.shape or DEFAULT_SHAPE)
    if min(shape) < MIN_AXIS or max(shape) > MAX_AXIS:
        raise UserError(f"--shape must be {MIN_AXIS} to {MAX_AXIS} voxels along each axis, not {shape}")
    needed = math.prod(shape) * PEAK_BYTES_PER_VOXEL * min(arguments.num_workers, arguments.cases or 1)
    if needed > free_memory_bytes():
        raise UserError(f"--shape {shape} needs {needed / 2**30:.0f} GiB of memory, more than is free")
    return arguments


if __name__ == "__main__":
    sys.exit(run_program(main, "data_loading.phantom"))
