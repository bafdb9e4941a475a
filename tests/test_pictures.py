# SPDX-License-Identifier: Apache-2.0
"""One function opens pictures at every entrance, as transformers does; what it cannot read, it names."""

from __future__ import annotations

import base64
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcompress.eval.data import open_picture as eval_opens
from PIL import Image
from transformers.image_utils import load_image

from mmcompress import pictures
from mmcompress.cli import main
from mmcompress.cli.common import open_image
from mmcompress.explain.prompt import _clip, _pictures
from mmcompress.pictures import PictureError, is_picture, open_picture, picture_size, to_rgb
from mmcompress.visualize.show import _frames

NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
COLOUR = Image.fromarray(NOISE[..., :3])
GREY = COLOUR.convert("L")
GREYS = np.asarray(GREY)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animated(path: Path, **options: Any) -> None:
    COLOUR.save(path, save_all=True, append_images=[COLOUR.rotate(180)], duration=50, **options)


def see_through(path: Path) -> None:
    """A palette with transparency, one entry of it by halves."""
    picture = COLOUR.quantize(16)
    picture.save(path, transparency=bytes([0, 128, *[255] * 14]))


EIGHT_BITS: dict[str, Any] = {
    **{f"orientation{o}.jpg": lambda p, o=o: COLOUR.save(p, exif=turned(o), quality=95) for o in range(1, 9)},
    "turned.png": lambda p: COLOUR.save(p, exif=turned(6)),
    "turned.webp": lambda p: COLOUR.save(p, exif=turned(8), lossless=True),
    "turned.tiff": lambda p: COLOUR.save(p, exif=turned(3)),
    "grey.png": GREY.save,
    "bits.png": GREY.convert("1").save,
    "palette.png": COLOUR.quantize(16).save,
    "see_through.png": see_through,
    "colour_key.png": lambda p: COLOUR.save(p, transparency=COLOUR.getpixel((3, 3))),
    "alpha.png": Image.fromarray(NOISE, "RGBA").save,
    "grey_alpha.png": Image.fromarray(NOISE[..., :2], "LA").save,
    "alpha.webp": lambda p: Image.fromarray(NOISE, "RGBA").save(p, lossless=True),
    "print.jpg": COLOUR.convert("CMYK").save,
    "print.tiff": COLOUR.convert("CMYK").save,
    "video.jpg": COLOUR.convert("YCbCr").save,
    "moving.gif": animated,
    "moving.png": animated,
    "moving.webp": lambda p: animated(p, lossless=True),
    "pages.tiff": animated,
    "bmp.bmp": COLOUR.save,
    "Ünï 图 name.JPG": COLOUR.save,
}
DEEP: dict[str, Any] = {
    "grey16.png": Image.fromarray(GREYS.astype(np.uint16) * 257).save,
    "grey16.tiff": Image.fromarray(GREYS.astype(np.uint16) * 257).save,
    "big_endian.pgm": lambda p: p.write_bytes(b"P5 20 12 65535\n" + (GREYS.astype(">u2") * 257).tobytes()),
    "int32.tiff": Image.fromarray(GREYS.astype(np.int32) * 257).save,
    "int32_of_8_bits.tiff": GREY.convert("I").save,
    "float_to_1.tiff": Image.fromarray(GREYS.astype(np.float32) / 255).save,
    "float_to_255.tiff": GREY.convert("F").save,
    "float_to_65535.tiff": Image.fromarray(GREYS.astype(np.float32) * 257).save,
}


def all_ways(path: Path) -> dict[str, np.ndarray]:
    """What every entrance sees of a file."""
    content = path.read_bytes()
    found = {
        "path": open_picture(path),
        "text": open_picture(str(path)),
        "bytes": open_picture(content),
        "view": open_picture(memoryview(content)),
        "file": open_picture(io.BytesIO(content)),
        "read before": open_picture(io.BytesIO(content)),
        "address": open_picture("data:image/png;base64," + base64.b64encode(content).decode()),
        "image": open_picture(Image.open(path)),
        "drawn": open_picture(lambda: Image.open(path)),
        "eval": eval_opens(path),
        "command line": open_image(path),
        "explanation": _pictures(path)[0][0],
        "explanation of bytes": _pictures([content])[0][0],
        "video": Image.fromarray(_clip([path]).frames[0]),
        "page": _frames(path)[0][0],
    }
    with path.open("rb") as file:
        file.read()
        found["file read before"] = open_picture(file)
    assert {p.mode for p in found.values()} == {"RGB"}
    return {name: np.asarray(p) for name, p in found.items()}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_every_entrance_sees_what_transformers_sees(name: str, tmp_path: Path) -> None:
    EIGHT_BITS[name](tmp_path / name)
    right = np.asarray(load_image(str(tmp_path / name)))
    for way, seen in all_ways(tmp_path / name).items():
        assert np.array_equal(seen, right), way


@pytest.mark.parametrize("name", DEEP)
def test_greys_of_more_than_eight_bits_are_those_of_eight(name: str, tmp_path: Path) -> None:
    DEEP[name](tmp_path / name)
    assert 0 < GREYS.min() < 20 and GREYS.max() > 240
    for way, seen in all_ways(tmp_path / name).items():
        assert np.array_equal(seen, np.repeat(GREYS[..., None], 3, 2)), way


def test_an_image_lies_on_its_side_until_it_is_turned(tmp_path: Path) -> None:
    COLOUR.save(tmp_path / "a.png", exif=turned(6))
    upright = COLOUR.rotate(-90, expand=True)
    assert np.array_equal(open_picture(tmp_path / "a.png"), upright)
    lying = Image.open(tmp_path / "a.png")
    assert np.array_equal(to_rgb(lying), COLOUR)
    assert np.array_equal(_frames(lying)[0][0], COLOUR)  # what a processor is given, it is shown on


def test_sixteen_bit_greys_lose_their_low_byte_as_colours_do() -> None:
    values = np.array([[0, 255, 256, 40_000, 65_535]], np.uint16)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    row = np.repeat(values[..., None], 3, 2).astype(">u2").tobytes()
    header = (5).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    colour = np.asarray(open_picture(png + chunk(b"IEND", b"")))
    assert np.array_equal(colour[0, :, 0], [0, 0, 1, 156, 255])
    assert np.array_equal(open_picture(values), colour)


ARRAYS: dict[str, Any] = {
    "height, width, 3": (NOISE[..., :3], COLOUR),
    "3, height, width": (NOISE[..., :3].transpose(2, 0, 1), COLOUR),
    "a tensor": (torch.from_numpy(NOISE[..., :3].copy()).permute(2, 0, 1), COLOUR),
    "strides": (NOISE[::-1, ::-1, :3][::-1, ::-1], COLOUR),
    "alpha": (NOISE, COLOUR),
    "one channel": (GREYS[..., None], GREY),
    **{f"grey {t}": (GREYS.astype(t), GREY) for t in ("uint8", "int16", "int32", "int64", "uint32", "float64")},
    "grey uint16": (GREYS.astype(np.uint16) * 257, GREY),
    "grey to 1": (GREYS / 255, GREY),
    "int32 of 16 bits": (GREYS.astype(np.int32) * 257, GREY),
    "bits": (GREYS > 127, GREY.point(lambda v: 255 * (v > 127))),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_pictures(kind: str) -> None:
    given, right = ARRAYS[kind]
    assert np.array_equal(open_picture(given), right.convert("RGB"))
    assert is_picture(given) and np.array_equal(_pictures(given)[0][0], right.convert("RGB"))


def files_that_cannot_be_read(folder: Path) -> dict[str, str]:
    """Names and what the error says beside them."""
    COLOUR.resize((200, 200)).save(folder / "whole.jpg")
    COLOUR.save(folder / "whole.png")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-400])
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:300])
    (folder / "head.png").write_bytes((folder / "whole.png").read_bytes()[:20])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>404 Not Found</html>")
    (folder / "folder.png").mkdir()
    damaged = bytearray((folder / "whole.png").read_bytes())
    damaged[60] ^= 255
    (folder / "damaged.png").write_bytes(damaged)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    for name, values in {
        "negative.tiff": np.full((4, 4), -1, np.int32),
        "above.tiff": np.full((4, 4), 65_536, np.int32),
        "nan.tiff": np.full((4, 4), np.nan, np.float32),
        "infinite.tiff": np.full((4, 4), np.inf, np.float32),
        "over_white.tiff": np.full((4, 4), 1.02, np.float32),
    }.items():
        Image.fromarray(values).save(folder / name)
    whites = dict.fromkeys(("negative", "above", "nan", "infinite", "over_white"), "nothing says what white is")
    return {
        "cut.jpg": "truncated",
        "cut.png": "not a readable picture",
        "head.png": "not a readable picture",
        "damaged.png": "not a readable picture",
        "empty.png": "empty",
        "page.jpg": "no picture format",
        "folder.png": "a folder",
        "missing.png": "no such file",
        "huge.png": "decompression bomb",
        **{f"{name}.tiff": why for name, why in whites.items()},
    }


def test_what_cannot_be_read_is_named_with_the_reason_at_every_entrance(tmp_path: Path) -> None:
    for name, why in files_that_cannot_be_read(tmp_path).items():
        for opens in (open_picture, eval_opens, open_image, lambda p: _pictures([p]), lambda p: _frames(p)):
            with pytest.raises(PictureError) as caught:
                opens(tmp_path / name)
            assert name in str(caught.value) and why in str(caught.value), (name, str(caught.value))


def test_command_lines_say_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, why in files_that_cannot_be_read(tmp_path).items():
        for command in (["run"], ["explain"]):
            line = [*command, "llava-shapes", "--image", str(tmp_path / name), "--question", "what ?"]
            assert main(line) == 2
            error = capsys.readouterr().err
            assert f"{tmp_path / name}" in error and why in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("https://example.org/a.png", PictureError, "https://example.org/a.png is an address"),
        ("file:///tmp/a.png", PictureError, "is an address"),
        ("iVBORw0KGgo" * 4000, PictureError, r"\(44000 characters\): no such file"),
        ("a\0b.png", PictureError, "no such file"),
        ("data:image/png;base64,AAAA", PictureError, "no picture format"),
        (b"", PictureError, r"a picture of 0 bytes is not a readable picture \(it is empty\)"),
        (io.StringIO("text"), PictureError, "not a readable picture"),
        (lambda: 3, PictureError, "not a readable picture"),
        (np.zeros((4, 4, 2), np.uint8), PictureError, r"shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.float32), PictureError, "type float32: give uint8"),
        (np.zeros((0, 4, 3), np.uint8), PictureError, r"shape \(0, 4, 3\)"),
        (np.array([[-1, 5]], np.int8), PictureError, "greys run from -1 to 5"),
        (None, TypeError, "a picture of type NoneType"),
        (3, TypeError, "a picture of type int"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        open_picture(given)


def test_names_of_callers_come_first() -> None:
    with pytest.raises(PictureError, match=r"^q\.tsv, row 3 is not a readable picture"):
        open_picture(b"no picture", "q.tsv, row 3")


def test_sizes_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    COLOUR.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no")
    monkeypatch.setattr(pictures, "to_rgb", None)
    assert picture_size(tmp_path / "a.png") == picture_size((tmp_path / "a.png").read_bytes()) == (20, 12)
    assert picture_size(lambda: COLOUR) == (20, 12)
    assert picture_size(tmp_path / "b.png") == picture_size(tmp_path / "c.png") == picture_size(b"") == (0, 0)
