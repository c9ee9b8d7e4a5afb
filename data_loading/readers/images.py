"""`--dataset images`: two folders of 2-D images and masks with equal stems, in grey or colour.

    preprocess_dataset.py --dataset images --data_dir IMAGES --labels_dir MASKS --size 256 256 --results_dir OUT

An image is a volume of one slice; colours are three channels. Needs `pip install '.[images]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import UserError
from common.files import replacing
from common.messages import counted
from data_loading.io.file_kinds import is_image_file, passed_over
from data_loading.io.mask_values import check_not_interpolated, find_values, merged, whole_numbers
from data_loading.io.volume import WORKING_BYTES_PER_VOXEL, Geometry, Volume, check_memory, check_same_geometry
from data_loading.readers.base import RawCase, RawDataset, ReaderOptions, apply_options, ignore_voxels, split_by_patient
from data_loading.readers.label_map import MAX_VALUE, LabelMap
from data_loading.readers.mask_matching import check_labels_dir, pair_by_stem
from data_loading.spec import DatasetSpec

# Pillow reads many more formats, some of them by running other programs.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B")
# Of pictures whose channels Pillow gives as 8 bits even if the file has 16.
EIGHT_BIT_MODES = ("L", "LA", "RGB", "RGBA", "RGBX")
# Rows run down and columns to the right, as in an image of an axial slice; a pixel is 1 mm.
AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
ORIENTATION_TAG = 0x0112
DAMAGED = "not a readable image: cut off or damaged; export it again"
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
        try:
            check_same_geometry(image.geometry, label.geometry, self.case)
        except UserError as error:
            if exif_orientation(self.image) == exif_orientation(self.label):
                raise
            reason = str(error).partition(";")[0]
            raise UserError(f"{reason}: an EXIF tag turns only one of them; save both without the tag") from None
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
    notes = [
        passed_over(data_dir, [*images, masks_dir], f"--data_dir {data_dir}: passed over "),
        passed_over(masks_dir, [*masks, data_dir], f"--labels_dir {masks_dir}: passed over "),
        _turned_note(pairs),
    ]
    if options.labels:
        labels = LabelMap.parse(options.labels)
    else:
        labels = _classes_found([mask for _, _, mask in pairs], f"--labels_dir {masks_dir}", options.ignore_label)
    cases = [
        ImageCase(case=name, image=image, label=mask, labels=labels, channels=channels) for name, image, mask in pairs
    ]
    spec = DatasetSpec(name=data_dir.resolve().name.lower(), classes=labels.classes, channels=channels)
    spec, cases = ignore_voxels(apply_options(spec, options), cases, options)
    return RawDataset(
        spec=spec,
        cases=cases,
        split=split_by_patient(cases, options, f"--data_dir {data_dir}"),
        drop_empty=bool(options.drop_empty),
        notes=[*filter(None, notes)],
    )


def _classes_found(masks: Sequence[Path], source: str, ignore_label: int | None) -> LabelMap:
    """Returns a class for each value of the masks but the ignore label.

    Raises:
        UserError: compression or scaling made the values.
    """
    for path in masks:
        if is_lossy(path):
            raise UserError(
                f"{path}: JPEG changes the values of a mask; save it as PNG, or join values to classes with --labels, "
                "such as 128-255=1"
            )
    found = merged(find_values(read_mask(path).array, ignore_label) for path in masks)
    labels = LabelMap.from_keys(found, source)
    if found.keys() >= {1, MAX_VALUE} and found.keys() <= {0, 1, MAX_VALUE}:
        raise UserError(
            f"{source}: in some masks white is 1, as in 1-bit images, in others {MAX_VALUE}; if both are one class, "
            f"give --labels 1,{MAX_VALUE}=1, else list each, such as --labels 1=1 {MAX_VALUE}=2"
        )
    if greys := sorted(found.keys() - {0, MAX_VALUE}) if found.keys() >= {0, MAX_VALUE} else []:
        listed = ", ".join(map(str, greys[:5])) + (", …" if len(greys) > 5 else "")
        raise UserError(
            f"{source}: black and white masks with greys ({listed}), as scaling makes them; join values to classes "
            f"with --labels, such as 128-255=1, or list each, such as {greys[0]}=1 {MAX_VALUE}=2"
        )
    check_not_interpolated(found, source)
    return labels


def _turned_note(pairs: Sequence[tuple[str, Path, Path]]) -> str:
    """Returns a line about images that their EXIF tag turns, while their mask has no such tag; "" if there are none."""
    turned = [image.name for _, image, mask in pairs if exif_orientation(image) != exif_orientation(mask)]
    if not turned:
        return ""
    more = ", …" if len(turned) > 3 else ""
    return (
        f"{counted(len(turned), 'image')} turned by an EXIF tag that the mask lacks, or the other way round "
        f"({', '.join(turned[:3])}{more}): if the masks do not fit, save images and masks without the tag"
    )


def exif_orientation(path: Path) -> int:
    """Returns the camera's orientation tag, 1 for an upright image. Raises UserError if the header is damaged."""
    with _open(path) as image:
        try:
            with warnings.catch_warnings(action="ignore"):
                found = int(image.getexif().get(ORIENTATION_TAG, 1))
        except Exception:  # a damaged tag turns nothing
            return 1
        return found if found in range(1, 9) else 1


def is_lossy(path: Path) -> bool:
    """Returns whether an image is compressed as JPEG, from its header. Raises UserError if that is damaged."""
    with _open(path) as image:
        return image.format in ("JPEG", "MPO") or image.info.get("compression") in ("jpeg", "tiff_jpeg")


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
    """Reads a mask as (1, 1, H, W) int32: grey values, or the indices of a palette; constant transparency is ignored.

    Raises:
        UserError: not an image, damaged, in colour, with transparency that varies, or with values that are not whole.
    """
    with _open(path) as image:
        array = _pixels(path, image)
    if array.ndim == 3:
        colours = array[..., : array.shape[2] - 1 if array.shape[2] in (2, 4) else 3]
        alpha = array[..., -1]
        if array.shape[2] in (2, 4) and alpha.min() != alpha.max():
            raise UserError(
                f"{path}: a mask whose transparency varies (alpha {alpha.min()} to {alpha.max()}); save the "
                "class of each pixel as a grey value, without alpha"
            )
        if not (colours[..., :1] == colours).all():
            raise UserError(f"{path}: a mask in colour; expected one grey value or one palette index per class")
        array = colours[..., 0]
    values, notes = whole_numbers(path, array, np.int32)
    return replace(_to_volume(values[np.newaxis]), notes=notes)


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


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    with ExitStack() as stack:
        try:
            with warnings.catch_warnings(action="ignore"):  # about large images: their size is checked below
                image = stack.enter_context(Image.open(path, formats=FORMATS))
                pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        except UnidentifiedImageError:
            raise UserError(f"{path}: not a readable image: no PNG, JPEG, TIFF or BMP by its content") from None
        except OSError as error:
            if error.strerror:  # not of the file's content
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            raise UserError(f"{path}: {DAMAGED}") from None
        except Exception:  # each format raises its own types
            raise UserError(f"{path}: {DAMAGED}") from None
        if pages > 1:
            raise UserError(f"{path}: holds {pages} images; save each as a file, or the stack as NIfTI")
        if image.mode in EIGHT_BIT_MODES and any("16" in str(tile[3]) for tile in image.tile):
            raise UserError(
                f"{path}: 16 bits per channel in colour or with alpha, of which 8 would be lost; save it in grey with "
                "16 bits, or with 8 bits per channel"
            )
        size = f"{image.width} x {image.height} pixels"
        check_memory(f"{path}: {size}", image.width * image.height * 4 * WORKING_BYTES_PER_VOXEL)
        yield image


def _pixels(path: Path, image: Image.Image, mode: str = "") -> NDArray[Any]:
    """Returns (H, W) or (H, W, C), rotated upright by the camera's orientation tag."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about damaged tags, which are not used
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert(mode) if mode else upright)
    except Exception:  # each format raises its own types
        raise UserError(f"{path}: {DAMAGED}") from None
