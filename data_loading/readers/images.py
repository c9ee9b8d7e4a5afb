"""`--dataset images`: two folders of 2-D images and masks with equal stems, in grey or colour.

    preprocess_dataset.py --dataset images --data_dir IMAGES --labels_dir MASKS --size 256 256 --results_dir OUT

An image is a volume of one slice; colours are three channels. Needs `pip install '.[images]'`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import UserError
from common.files import replacing
from data_loading.io.scan_discovery import is_image_file
from data_loading.io.volume import WORKING_BYTES_PER_VOXEL, Geometry, Volume, check_memory, check_same_geometry
from data_loading.readers.base import RawCase, RawDataset, ReaderOptions, apply_options, split_by_patient
from data_loading.readers.label_map import MAX_VALUE, LabelMap
from data_loading.readers.mask_matching import check_labels_dir, pair_by_stem
from data_loading.spec import DatasetSpec

# Pillow reads many more formats, some of them by running other programs.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B")
# Rows run down and columns to the right, as in an image of an axial slice; a pixel is 1 mm.
AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
# RGB of the classes in written masks: black for the background, then colours that colour-blind readers can also
# distinguish (Okabe and Ito's), repeated.
OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
PALETTE = ((0, 0, 0), *(OKABE_ITO[value % len(OKABE_ITO)] for value in range(MAX_VALUE)))


@dataclass(frozen=True, kw_only=True)
class ImageCase(RawCase):
    """An image and its mask; `channels` is 1 or 3."""

    channels: int

    def settings(self) -> str:
        return f"{super().settings()} channels {self.channels}"

    def read(self) -> tuple[Volume, Volume]:
        """Reads the image (channels, 1, H, W) and its mask of classes. Raises UserError if a file is damaged."""
        image = read_image(self.image, self.channels)
        label = read_mask(self.label)
        check_same_geometry(image.geometry, label.geometry, self.case)
        return image, self.to_classes(label)


def read_images(data_dir: Path, options: ReaderOptions) -> RawDataset:
    """Finds the images and their masks. Every image is a patient; if one is in colour, all have three channels.

    Raises:
        UserError: an image without its mask or a mask without its image, a damaged file, or a bad option.
    """
    masks_dir = check_labels_dir(options.labels_dir, data_dir, "images")
    images, masks = (
        [path for path in sorted(folder.iterdir()) if is_image_file(path) and path.is_file()]
        for folder in (data_dir, masks_dir)
    )
    pairs = pair_by_stem(images, masks, data_dir=data_dir, labels_dir=masks_dir, kind="image")
    channels = 3 if any(is_colour(image) for _, image, _ in pairs) else 1
    if options.labels:
        labels = LabelMap.parse(options.labels)
    else:
        values = {value for _, _, mask in pairs for value in np.unique(read_mask(mask).array).tolist()}
        labels = LabelMap.from_keys(values, f"--labels_dir {masks_dir}")
    cases = [
        ImageCase(case=name, image=image, label=mask, labels=labels, channels=channels) for name, image, mask in pairs
    ]
    spec = DatasetSpec(name=data_dir.resolve().name.lower(), classes=labels.classes, channels=channels)
    return RawDataset(
        spec=apply_options(spec, options),
        cases=cases,
        split=split_by_patient(cases, options, f"--data_dir {data_dir}"),
        drop_empty=bool(options.drop_empty),
    )


def is_colour(path: Path) -> bool:
    """Returns whether an image is in colour, from its header. Raises UserError if that is damaged."""
    with _open(path) as image:
        return image.mode not in (*GREY_MODES, "LA")


def read_image(path: Path, channels: int) -> Volume:
    """Reads an image as (channels, 1, H, W) float32, with its values as stored; transparency is ignored.

    Raises:
        UserError: not an image, damaged, larger than free memory, or in colour when one channel is wanted.
    """
    with _open(path) as image:
        if image.mode in GREY_MODES and image.mode != "1":
            grey = _pixels(path, image).astype(np.float32)[np.newaxis]
            return _to_volume(np.repeat(grey, channels, axis=0))
        if channels == 1 and image.mode not in ("1", "LA"):
            raise UserError(f"{path}: in colour ({image.mode}), but the network takes grey images")
        array = _pixels(path, image, "L" if channels == 1 else "RGB").astype(np.float32)
    return _to_volume(array[np.newaxis] if channels == 1 else np.moveaxis(array, -1, 0))


def read_mask(path: Path) -> Volume:
    """Reads a mask as (1, 1, H, W) uint8: grey values, or the indices of a palette.

    Raises:
        UserError: not an image, damaged, in colour, or with values above 255.
    """
    with _open(path) as image:
        array = _pixels(path, image)
    if array.ndim == 3:
        if not (array[..., :1] == array[..., : min(3, array.shape[2])]).all() or array.shape[2] == 2:
            raise UserError(f"{path}: a mask in colour; expected one grey value or one palette index per class")
        array = array[..., 0]
    if array.min() < 0 or array.max() > MAX_VALUE or (array != np.rint(array)).any():
        found = f"{array.min():g} to {array.max():g}"
        raise UserError(f"{path}: a mask must hold whole numbers from 0 to {MAX_VALUE}, found {found}")
    return _to_volume(array.astype(np.uint8)[np.newaxis])


def read_image_geometry(path: Path) -> Geometry:
    """Reads the geometry from the header only, without the camera's rotation, which may swap height and width."""
    with _open(path) as image:
        return Geometry(AFFINE, (1, image.height, image.width), (1.0, 1.0, 1.0))


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Writes a mask (1, 1, H, W) as PNG, atomically. Classes are palette indices, so that viewers show colours."""
    image = Image.fromarray(mask[0, 0], "L")
    image.putpalette([level for colour in PALETTE for level in colour])
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def _to_volume(array: NDArray[Any]) -> Volume:
    channels, rows, columns = array.shape
    geometry = Geometry(AFFINE, (1, rows, columns), (1.0, 1.0, 1.0))
    return Volume(np.ascontiguousarray(array.reshape(channels, 1, rows, columns)), geometry)


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore"):  # about large images, which are compared with free memory below
            image = Image.open(path, formats=FORMATS)
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    except Exception as error:  # each format raises its own types
        raise UserError(f"{path}: not a readable image ({error})") from None
    if pages > 1:
        raise UserError(f"{path}: holds {pages} images; save each as a file, or the stack as NIfTI")
    size = f"{image.width} x {image.height} pixels"
    check_memory(f"{path}: {size}", image.width * image.height * 4 * WORKING_BYTES_PER_VOXEL)
    return image


def _pixels(path: Path, image: Image.Image, mode: str = "") -> NDArray[Any]:
    """Returns (H, W) or (H, W, C), rotated upright by the camera's orientation tag."""
    try:
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright.convert(mode) if mode else upright)
    except Exception as error:  # each format raises its own types
        raise UserError(f"{path}: damaged ({error}); export it again") from None
