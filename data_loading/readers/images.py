"""`--dataset images`: two folders of 2-D pictures and masks with equal stems, grey or colour.

    preprocess_dataset.py --dataset images --data_dir PICTURES --labels_dir MASKS --size 256 256 --results_dir OUT

A picture is a volume of one slice; colours are three channels. Needs `pip install '.[images]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import UserError
from common.files import replacing
from data_loading.io.scan_discovery import is_picture
from data_loading.io.volume import WORKING_BYTES_PER_VOXEL, Geometry, Volume, check_same_geometry, free_memory_bytes
from data_loading.readers.base import OWN_SPLIT, IntensityFlags, RawCase, RawDataset, split_of, with_flags
from data_loading.readers.labels import HIGHEST, LabelMap
from data_loading.readers.nifti import by_stem, check_paired, folder_of_masks
from data_loading.spec import DatasetSpec

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
GREY = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B")
# Rows run down and columns to the right, as in a picture of an axial slice; a pixel is 1 mm.
AXES = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])


# Black for the background; then a colour each, told apart however one sees them, over again after the last.
_DISTINCT = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
COLOURS = ((0, 0, 0), *(_DISTINCT[value % len(_DISTINCT)] for value in range(HIGHEST)))


@dataclass(frozen=True)
class PictureCase(RawCase):
    """A picture and its mask; `channels` is 1 or 3."""

    channels: int = 1

    def options(self) -> str:
        return f"{super().options()} channels {self.channels}"

    def read(self) -> tuple[Volume, Volume]:
        """The picture (channels, 1, H, W) and its mask of classes. Raises UserError where a file is damaged."""
        image = read_picture(self.image, self.channels)
        label = read_mask(self.label)
        check_same_geometry(image.geometry, label.geometry, self.case)
        return image, self.classified(label)


def read_images(
    data_dir: Path,
    evaluation_ids: Sequence[str],
    seed: int,
    *,
    labels_dir: Path | None = None,
    labels: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    split: Sequence[float] = OWN_SPLIT,
    drop_empty: bool = False,
    **values: Unpack[IntensityFlags],
) -> RawDataset:
    """Every picture is a patient; where one is in colour, all have three channels.

    Raises:
        UserError: a picture without its mask or the other way round.
    """
    masks_dir = folder_of_masks(labels_dir, data_dir, "images")
    pictures = by_stem(((path.stem, path) for path in files_in(data_dir)), f"--data_dir {data_dir}")
    masks = by_stem(((path.stem, path) for path in files_in(masks_dir)), f"--labels_dir {masks_dir}")
    check_paired(pictures, masks, data_dir, masks_dir, "picture")
    channels = 3 if any(is_colour(path) for path in pictures.values()) else 1
    if labels:
        chosen = LabelMap.parse(labels)
    else:
        found = {value for path in masks.values() for value in np.unique(read_mask(path).array).tolist()}
        chosen = LabelMap.of_found(found, f"--labels_dir {masks_dir}")
    cases: list[RawCase] = [
        PictureCase(name, path, masks[name], chosen, channels=channels) for name, path in pictures.items()
    ]
    spec = with_flags(DatasetSpec(data_dir.resolve().name.lower(), chosen.classes, channels), size, **values)
    return RawDataset(spec, cases, split_of(cases, split, seed, f"--data_dir {data_dir}"), drop_empty)


def files_in(folder: Path) -> list[Path]:
    """The pictures of a folder."""
    return sorted(path for path in folder.iterdir() if is_picture(path) and path.is_file())


def is_colour(path: Path) -> bool:
    """By its header. Raises UserError where that is damaged."""
    with _open(path) as picture:
        return picture.mode not in (*GREY, "LA")


def read_picture(path: Path, channels: int) -> Volume:
    """A picture as (channels, 1, H, W) float32, its values as stored; of a transparent one the colours alone.

    Raises:
        UserError: no picture, damaged, larger than memory, or in colour where it should be grey.
    """
    with _open(path) as picture:
        if picture.mode in GREY and picture.mode != "1":
            grey = _pixels(path, picture).astype(np.float32)[np.newaxis]
            return _volume(np.repeat(grey, channels, axis=0))
        if channels == 1 and picture.mode not in ("1", "LA"):
            raise UserError(f"{path}: in colour ({picture.mode}), but the network knows grey pictures")
        array = _pixels(path, picture, "L" if channels == 1 else "RGB").astype(np.float32)
    return _volume(array[np.newaxis] if channels == 1 else np.moveaxis(array, -1, 0))


def read_mask(path: Path) -> Volume:
    """A mask as (1, 1, H, W) uint8: grey values, or the indices of a palette.

    Raises:
        UserError: no picture, damaged, in colour, or with values above 255.
    """
    with _open(path) as picture:
        array = _pixels(path, picture)
    if array.ndim == 3:
        if not (array[..., :1] == array[..., : min(3, array.shape[2])]).all() or array.shape[2] == 2:
            raise UserError(f"{path}: a mask in colour; give one grey value, or one index of a palette, a class")
        array = array[..., 0]
    if array.min() < 0 or array.max() > HIGHEST or (array != np.rint(array)).any():
        found = f"{array.min():g} to {array.max():g}"
        raise UserError(f"{path}: a mask holds whole numbers from 0 to {HIGHEST}, this one {found}")
    return _volume(array.astype(np.uint8)[np.newaxis])


def picture_geometry(path: Path) -> Geometry:
    """By the header alone; the sides of one that its camera says to turn may be the other way round."""
    with _open(path) as picture:
        return Geometry(AXES, (1, picture.height, picture.width), (1.0, 1.0, 1.0))


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Writes a mask (1, 1, H, W) as PNG, atomically: each class is an index of a palette, so that one sees it."""
    picture = Image.fromarray(mask[0, 0], "L")
    picture.putpalette([level for colour in COLOURS for level in colour])
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _volume(array: NDArray[Any]) -> Volume:
    channels, rows, columns = array.shape
    geometry = Geometry(AXES, (1, rows, columns), (1.0, 1.0, 1.0))
    return Volume(np.ascontiguousarray(array.reshape(channels, 1, rows, columns)), geometry)


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore"):  # of large pictures, which are held against memory below
            # Pillow reads many more, and runs other programs for some.
            picture = Image.open(path, formats=FORMATS)
            pages = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
            pixels = picture.width * picture.height
    except Exception as error:  # each format has its own
        raise UserError(f"{path}: not a readable picture ({error})") from None
    if pages > 1:
        raise UserError(f"{path}: holds {pages} pictures; save each for itself, or the stack as NIfTI")
    needed, free = pixels * 4 * WORKING_BYTES_PER_VOXEL, free_memory_bytes()
    if needed > free:
        raise UserError(
            f"{path}: {picture.width} x {picture.height} pixels need {needed / 2**30:.1f} GiB to work on, "
            f"and {free / 2**30:.1f} GiB are free"
        )
    return picture


def _pixels(path: Path, picture: Image.Image, mode: str = "") -> NDArray[Any]:
    """(H, W) or (H, W, C), upright as its camera says."""
    try:
        upright = ImageOps.exif_transpose(picture)
        return np.asarray(upright.convert(mode) if mode else upright)
    except Exception as error:  # as above
        raise UserError(f"{path}: damaged ({error}); export it again") from None
