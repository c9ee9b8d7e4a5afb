"""`--dataset images`: grey and colour, resizing, file formats, and rejected input."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="pip install '.[images]'")
from PIL import Image

from common.errors import UserError
from data_loading.dataset import read_spec_and_split
from data_loading.readers.images import read_image, read_mask
from tests.data_loading.readers.programs import arrays, preprocess, refused

Folders = tuple[Path, Path]


def image_of(number: int, channels: int = 1) -> np.ndarray:
    array = np.random.default_rng(number).integers(0, 256, (6, 8 + number, channels), dtype=np.uint8)
    return array[..., 0] if channels == 1 else array


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((6, 8 + number), np.uint8)
    mask[1:3, 2:5] = 255
    return mask


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Five grey images with black and white masks."""
    data, masks = tmp_path / "raw" / "images", tmp_path / "raw" / "masks"
    data.mkdir(parents=True)
    masks.mkdir()
    for number in range(5):
        Image.fromarray(image_of(number)).save(data / f"{number}.png")
        Image.fromarray(mask_of(number)).save(masks / f"{number}.bmp")
    (data / "Thumbs.db").touch()
    return data, masks


def test_a_grey_image_is_a_volume_of_one_slice(folders: Folders, tmp_path: Path) -> None:
    index = preprocess("images", *folders, tmp_path / "out", "--intensity none --split_ratios 0.6 0.2 0.2")
    assert (index.spec.classes, index.spec.channels) == (("background", "255"), 1)
    assert [len(cases) for cases in index.split.values()] == [3, 1, 1]
    x, y = arrays(tmp_path / "out", "3")
    np.testing.assert_array_equal(x, image_of(3)[np.newaxis, np.newaxis])
    np.testing.assert_array_equal(y[0, 0], mask_of(3) // 255)
    assert read_spec_and_split(tmp_path / "out", [])[0].orientation == "IPL"


def test_one_colour_image_gives_all_of_them_three_channels(folders: Folders, tmp_path: Path) -> None:
    colours = image_of(2, 3)
    Image.fromarray(colours).save(folders[0] / "2.png")
    index = preprocess("images", *folders, tmp_path / "out", "--intensity none")
    assert index.spec.channels == 3
    np.testing.assert_array_equal(arrays(tmp_path / "out", "2")[0][:, 0], np.moveaxis(colours, -1, 0))
    np.testing.assert_array_equal(arrays(tmp_path / "out", "3")[0][:, 0], np.stack([image_of(3)] * 3))


def test_images_are_resized_and_labels_named(folders: Folders, tmp_path: Path) -> None:
    index = preprocess("images", *folders, tmp_path / "out", "--size 12 10 --labels 0=1:ground --intensity minmax")
    assert (index.spec.size, index.spec.classes) == ((12, 10), ("background", "ground"))
    for number in range(5):
        x, y = arrays(tmp_path / "out", str(number))
        assert x.shape == y.shape == (1, 1, 12, 10)
        assert (x.min(), x.max()) == (0, 1)
        assert y.mean() == pytest.approx(1 - 6 / (6 * (8 + number)), abs=0.05)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16", "I", "F"])
def test_every_image_mode_is_read(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (2, 3))
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 4)
        scale = 4
    else:
        image, scale = Image.fromarray(grey).convert(mode), 1
    path = tmp_path / "a.tif"
    image.save(path)
    for channels in (1, 3):
        if channels == 1 and mode in ("RGB", "RGBA", "P"):
            with pytest.raises(UserError, match=r"in colour .*, but the network takes grey images"):
                read_image(path, 1)
            continue
        array = read_image(path, channels).array
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.stack([grey[np.newaxis] * np.float32(scale)] * channels))


def png_of_16_bits(colour_type: int, pixels: np.ndarray) -> bytes:
    """A PNG that Pillow cannot write: (H, W, channels) of 16 bits, colour type 2 for RGB or 4 for grey with alpha."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2)])
def test_16_bits_of_which_8_would_be_lost_are_refused(tmp_path: Path, colour_type: int, channels: int) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png_of_16_bits(colour_type, np.arange(6 * channels).reshape(2, 3, channels)))
    for read in (read_mask, lambda path: read_image(path, 3)):
        with pytest.raises(UserError, match="16 bits per channel in colour or with alpha, of which 8 would be lost"):
            read(path)


def test_a_mask_is_grey_values_or_the_indices_of_a_palette(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "p.png")
    Image.fromarray(np.stack([indices * 100] * 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(indices > 1).save(tmp_path / "bits.png")
    Image.fromarray(indices.astype(np.uint16) * 200).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([indices * 100, indices, indices], -1)).save(tmp_path / "colour.png")
    for name, expected in (("p", indices), ("rgb", indices * 100), ("bits", indices > 1)):
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png").array[0, 0], expected)
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png").array[0, 0], indices.astype(int) * 200)
    with pytest.raises(UserError, match="a mask in colour; expected one grey value"):
        read_mask(tmp_path / "colour.png")


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_constant_transparency_of_a_mask_is_ignored_and_other_reported(tmp_path: Path, mode: str) -> None:
    mask = Image.fromarray(mask_of(3))
    for alpha in (255, 0):
        whole = mask.convert(mode)
        whole.putalpha(alpha)
        whole.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png").array[0, 0], mask_of(3))
    hidden = Image.new("L", mask.size, 255).convert(mode)
    hidden.putalpha(mask)
    hidden.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: a mask whose transparency varies \(alpha 0 to 255\); save the class"):
        read_mask(tmp_path / "a.png")


def save_turned(path: Path, upright: np.ndarray, turns: int = 6) -> None:
    """Saves an image as a camera does that was held sideways (6) or upside down (3)."""
    exif = Image.Exif()
    exif[0x0112] = turns
    Image.fromarray(np.rot90(upright, 1 if turns == 6 else 2)).save(path, exif=exif)


@pytest.mark.parametrize("turned_side", [0, 1])
def test_an_exif_tag_on_one_side_only_is_pointed_out(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], turned_side: int
) -> None:
    for path in folders[1].iterdir():
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    upright = (image_of(2), mask_of(2))[turned_side]
    save_turned(folders[turned_side] / "2.png", upright, turns=3)
    preprocess("images", *folders, tmp_path / "out", "--intensity none")
    output = capsys.readouterr().out
    assert "1 image turned by an EXIF tag that the mask lacks, or the other way round (2.png): if the masks" in output
    # Turned by a quarter, its shape does not fit.
    Image.fromarray(np.rot90(upright)).save(folders[turned_side] / "2.png")
    stored = Image.open(folders[turned_side] / "2.png").getexif()
    assert not stored
    other = folders[1 - turned_side] / "2.png"
    save_turned(other, np.asarray(Image.open(other)))
    output = refused(capsys, "images", *folders)
    assert "2: the image has shape" in output
    assert output.endswith("): an EXIF tag turns only one of them; save both without the tag")


def test_both_sides_turned_the_same_way_are_taken(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        (folders[1] / f"{number}.bmp").unlink()
        for folder, upright in zip(folders, (image_of(number), mask_of(number)), strict=True):
            save_turned(folder / f"{number}.png", upright)
    preprocess("images", *folders, tmp_path / "out", "--intensity none")
    assert "EXIF" not in capsys.readouterr().out
    np.testing.assert_array_equal(arrays(tmp_path / "out", "3")[1][0, 0], mask_of(3) // 255)


def lossy(masks: Path, ending: str, **how: object) -> None:
    for path in sorted(masks.iterdir()):
        large = np.kron(mask_of(int(path.stem)), np.ones((1, 1), np.uint8))
        Image.fromarray(large).save(path.with_suffix(ending), **how)
        if path.suffix != ending:
            path.unlink()


def scaled(masks: Path) -> None:
    for path in masks.iterdir():
        smooth = mask_of(int(path.stem)) // 2 + np.roll(mask_of(int(path.stem)), 1, axis=1) // 2
        Image.fromarray(smooth + (smooth == 254)).save(path)


@pytest.mark.parametrize(
    ("change_masks", "message"),
    [
        (lambda masks: lossy(masks, ".jpg"), "0.jpg: JPEG changes the values of a mask; save it as PNG, or join"),
        (lambda masks: lossy(masks, ".tif", compression="jpeg"), "0.tif: JPEG changes the values of a mask"),
        (scaled, "black and white masks with greys (127), as scaling makes them; join values to classes with --labels"),
    ],
)
def test_masks_that_compression_or_scaling_changed_need_labels(
    folders: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change_masks: Callable[[Path], None],
    message: str,
) -> None:
    change_masks(folders[1])
    assert message in refused(capsys, "images", *folders)
    index = preprocess("images", *folders, tmp_path / "out", "--labels 128-255=1:cell")
    assert index.spec.classes == ("background", "cell")


def test_white_of_1_bit_masks_is_joined_with_that_of_others(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(mask_of(3) > 0).save(folders[1] / "3.bmp")
    assert "white is 1, as in 1-bit images, in others 255" in refused(capsys, "images", *folders)
    preprocess("images", *folders, tmp_path / "out", "--labels 1,255=1")
    np.testing.assert_array_equal(arrays(tmp_path / "out", "3")[1][0, 0], mask_of(3) // 255)
    np.testing.assert_array_equal(arrays(tmp_path / "out", "2")[1][0, 0], mask_of(2) // 255)


def test_files_that_are_not_read_are_counted(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[1] / "notes.txt").touch()
    preprocess("images", *folders, tmp_path / "out")
    output = capsys.readouterr().out
    assert f"--data_dir {folders[0]}: passed over 1 other (1 .db)\n" in output
    assert f"--labels_dir {folders[1]}: passed over 1 other (1 .txt)\n" in output
    for path in sorted(folders[1].glob("*.bmp")):
        path.rename(path.with_suffix(".gif"))
    output = refused(capsys, "images", *folders)
    assert "no mask 0 for 0.png (and 4 more); 0.gif lies there, but its ending is not read" in output


def test_a_photograph_is_rotated_by_its_orientation_tag(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn to the left
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 1).array[0, 0], np.rot90(stored, -1))


def test_other_formats_and_stacks_are_rejected(tmp_path: Path) -> None:
    """Pillow would pass a PostScript file to another program."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match=r"a.png: not a readable image"):
        read_image(tmp_path / "a.png", 1)
    pages = [Image.fromarray(image_of(number)) for number in (1, 1)]
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"b.tif: holds 2 images; save each as a file"):
        read_image(tmp_path / "b.tif", 1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "TIFF", "BMP", "JPEG"]), st.sampled_from(["L", "RGB"]), st.data())
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, kind: str, mode: str, data: st.DataObject
) -> None:
    stream = io.BytesIO()
    Image.fromarray(image_of(0, 3)).convert(mode).save(stream, kind)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / f"a.{kind.lower()}"
    path.write_bytes(content[: data.draw(st.integers(0, 3 * len(content)))])
    with contextlib.suppress(UserError):
        assert read_image(path, 3).array.shape[0] == 3
        assert read_mask(path).array.dtype == np.int32


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


def noise(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint8)).save(path)


BAD: list[tuple[str, Callable[[Path, Path], object], str, str]] = [
    ("no mask", lambda data, masks: (masks / "3.bmp").unlink(), "", "no mask 3 for 3.png; stems must be equal"),
    ("no image", lambda data, masks: (data / "3.png").unlink(), "", "no image 3 for 3.bmp; stems must be equal"),
    ("two with one stem", lambda data, masks: noise(data / "3.jpg"), "", "3.jpg and 3.png have the same stem"),
    (
        "other shape",
        lambda data, masks: Image.fromarray(mask_of(4)).save(masks / "3.bmp"),
        "",
        "3: the image has shape (1, 6, 11) but its mask (1, 6, 12)",
    ),
    ("damaged", lambda data, masks: damage(data / "3.png"), "", "3.png: "),
    (
        "truncated",
        lambda data, masks: (masks / "3.bmp").write_bytes((masks / "3.bmp").read_bytes()[:-20]),
        "",
        "3.bmp: not a readable image: cut off or damaged; export it again",
    ),
    (
        "not an image",
        lambda data, masks: (data / "3.png").write_bytes(b"text"),
        "",
        "3.png: not a readable image: no PNG, JPEG, TIFF or BMP by its content",
    ),
    (
        "images instead of masks",
        lambda data, masks: [noise(path) for path in masks.iterdir()],
        "",
        "values; select and merge with --labels, such as 128-255=1",
    ),
    (
        "empty masks",
        lambda data, masks: [Image.fromarray(0 * mask_of(int(path.stem))).save(path) for path in masks.iterdir()],
        "",
        "every mask is empty",
    ),
    (
        "a flag of scans",
        lambda data, masks: None,
        "--orientation RAS",
        "--orientation does not apply to --dataset images, which accepts --drop_empty, --ignore_label, --intensity, "
        "--intensity_window, --labels, --labels_dir, --size, --split_ratios",
    ),
    ("no size", lambda data, masks: None, "--size 0 5", "--size 0 5: height and width must be at least 1 pixel"),
]


@pytest.mark.parametrize(("change_folders", "flags", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_input_is_reported_in_one_line(
    folders: Folders,
    capsys: pytest.CaptureFixture[str],
    change_folders: Callable[[Path, Path], object],
    flags: str,
    message: str,
) -> None:
    change_folders(*folders)
    assert message in refused(capsys, "images", *folders, flags)


def test_without_pillow_the_message_names_what_to_install(
    folders: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "data_loading.readers.images")
    output = refused(capsys, "images", *folders)
    assert output == "--dataset images: needs PIL, which is not installed; pip install '.[images]'"


def test_an_image_larger_than_memory_is_rejected_by_its_header(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_loading.io.volume.free_memory_bytes", lambda: 100)
    with pytest.raises(UserError, match=r"3.png: 11 x 6 pixels need .* GiB of memory, but only .* GiB are free"):
        read_image(folders[0] / "3.png", 1)


@pytest.mark.real_data
def test_real_membranes_are_darker_than_cells(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real_data("membrane_2d")
    flags = "--size 64 64 --labels 0=1:membrane --split_ratios 0.6 0.2 0.2"
    index = preprocess("images", folder / "images", folder / "masks", tmp_path, flags)
    assert [len(cases) for cases in index.split.values()] == [18, 6, 6]
    for case in index.cases:
        x, y = arrays(tmp_path, case)
        assert 0.1 < y.mean() < 0.4
        assert x[y == 1].mean() < x[y == 0].mean() - 0.5
