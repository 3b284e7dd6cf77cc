"""An image is what a viewer shows; only images are opened, and only from ordinary files."""

import io
import os
import random
import struct
import warnings
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from nano_moca import MARK, Moca, MocaError, Record
from nano_moca.convert.images import open_image
from nano_moca.processor import MAX_CHARACTERS, Processor

ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture(scope="module")
def processor(moca: Moca) -> Processor:
    return moca.processor


def picture(width: int = 70, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Random pixels, and random transparency where the mode has any."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(random.integers(0, 256, (height, width), np.uint8)))
    return image


def saved(image: Image.Image, form: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def shown(content: bytes) -> Image.Image:
    """What a viewer shows: upright, on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def exif(orientation: object) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def chunk(name: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def message(image: object) -> str:
    """The one-line error that an image gets, with its record's name."""
    with pytest.raises(MocaError) as caught:
        open_image(image, "line 4", decode=True)
    text = str(caught.value)
    assert text.startswith("line 4: ") and "\n" not in text
    return text


def compare(content: bytes, expected: Image.Image) -> None:
    """Bytes, and the picture that Pillow opens from them: header and pixels."""
    for form in (content, Image.open(io.BytesIO(content))):
        assert open_image(form, "x").size == expected.size
        decoded = open_image(form, "x", decode=True)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))


# ---- as a viewer shows it


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_upright(form: str, orientation: int) -> None:
    """Each orientation of each format; 0 and 9 mean nothing."""
    content = saved(picture(), form, exif=exif(orientation))
    compare(content, shown(content))
    sideways = 5 <= orientation <= 8
    assert open_image(content, "x").size == ((40, 70) if sideways else (70, 40))


@pytest.mark.parametrize("name, content", [
    (b"eXIf", exif(6).tobytes()[6:]),
    (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation="6"/>'),
    (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(
        f"\nexif\n{len(exif(6).tobytes())}\n{exif(6).tobytes().hex()}\n".encode())),
])
@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
def test_metadata_of_a_png(name: bytes, content: bytes, place: str) -> None:
    """A PNG may say its orientation in three ways, and behind its pixels."""
    plain = saved(picture(), "PNG")
    at = 33 if place == "before the pixels" else plain.rindex(b"IEND") - 4
    turned = plain[:at] + chunk(name, content) + plain[at:]
    assert shown(turned).size == (40, 70)
    compare(turned, shown(turned))


def test_a_header_costs_no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a PNG, where Pillow would decode to look for metadata."""
    form = {"PNG": {}, "PNG ": {"exif": exif(8)}, "JPEG": {"exif": exif(8)}, "WEBP": {},
            "TIFF": {"exif": exif(8)}}
    contents = [saved(picture(), name.strip(), **more) for name, more in form.items()]

    def load(image: Image.Image) -> None:
        if type(image) is not Image.Image:  # the blank one is none of a file
            pytest.fail(f"{image.format} was decoded")
        return Image.Image.load(image)

    for plugin in ("PngImagePlugin.PngImageFile", "JpegImagePlugin.JpegImageFile",
                   "WebPImagePlugin.WebPImageFile", "TiffImagePlugin.TiffImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", load)
    sizes = [open_image(content, "x").size for content in contents]
    assert sizes == [(70, 40), (40, 70), (40, 70), (70, 40), (40, 70)]


def test_the_grid_is_that_of_the_shown_image(processor: Processor) -> None:
    """Rows and columns change places, and patches are the upright image's."""
    content = saved(picture(168, 84), "PNG", exif=exif(6))
    upright = saved(shown(content), "PNG")
    turned = processor.batch([Record(MARK, [content])])
    assert turned.grids.tolist() == [[1, 12, 6]]
    assert torch.equal(turned.patches, processor.batch([Record(MARK, [upright])]).patches)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_damaged_metadata(form: str, capfd: pytest.CaptureFixture) -> None:
    """Whatever the EXIF data are, the image is read, header and pixels agree, and nothing is
    printed."""
    dice, tags = random.Random(0), exif(6)
    tags[0x010F] = "the maker of the camera"
    for attempt in range(60):
        damaged = bytearray(tags.tobytes())
        for _ in range(dice.randint(1, 8)):
            damaged[dice.randrange(6, len(damaged))] = dice.randrange(256)
        if attempt % 3 == 0:
            del damaged[dice.randrange(6, len(damaged)) :]
        try:
            with warnings.catch_warnings(action="ignore"):
                content = saved(picture(), form, exif=bytes(damaged))
        except Exception:  # one that Pillow does not write
            continue
        with warnings.catch_warnings(action="error"):
            decoded = open_image(content, "x", decode=True)
            assert decoded.size == open_image(content, "x").size
    assert capfd.readouterr() == ("", "")
    compare(saved(picture(), "JPEG", exif=b"Exif\0\0no tags at all"), shown(
        saved(picture(), "JPEG")))


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("content", [
    saved(picture(mode="RGBA"), "PNG"),
    saved(picture(mode="LA"), "PNG"),
    saved(picture(mode="RGBA"), "WEBP", lossless=True),
    saved(picture(mode="RGBA"), "TIFF"),
    saved(picture().quantize(16), "PNG", transparency=3),
    saved(picture().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    saved(picture().quantize(16), "GIF", transparency=5),
    saved(Image.new("RGB", (30, 30), (9, 8, 7)), "PNG", transparency=(9, 8, 7)),
    saved(picture(mode="L"), "PNG", transparency=100),
    saved(picture(mode="RGBA"), "PNG", exif=exif(5)),
], ids=["RGBA", "LA", "WEBP", "TIFF", "P", "P, alphas", "GIF", "RGB", "L", "turned"])
def test_transparency_is_white(content: bytes) -> None:
    """In each form in which a file may say it."""
    compare(content, shown(content))
    naive = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert (naive != np.asarray(open_image(content, "x", decode=True))).any()


def test_fully_transparent_pixels_are_white() -> None:
    """Whatever colour they hide."""
    hidden = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    assert open_image(hidden, "x", decode=True).getextrema() == ((255, 255),) * 3
    palette = Image.new("RGB", (30, 30), "red").quantize(4).convert("PA")
    palette.putalpha(0)
    assert open_image(palette, "x", decode=True).getextrema() == ((255, 255),) * 3


def test_a_converted_image_keeps_its_colours() -> None:
    """Pillow's convert("RGB") leaves word of a colour that was transparent once."""
    gif = Image.open(io.BytesIO(saved(picture().quantize(8), "GIF", transparency=2)))
    converted = gif.convert("RGB")
    assert "transparency" in converted.info
    np.testing.assert_array_equal(open_image(converted, "x", decode=True), converted)


@pytest.mark.parametrize("form, more", [("GIF", {}), ("TIFF", {}), ("WEBP", {"lossless": True}),
                                        ("PNG", {"default_image": True})])
def test_the_first_frame(form: str, more: dict) -> None:
    """Of several, a still viewer shows the first."""
    first, second = picture().quantize(32), picture().rotate(180).quantize(32)
    several = saved(first, form, save_all=True, append_images=[second], **more)
    np.testing.assert_array_equal(open_image(several, "x", decode=True), first.convert("RGB"))


# ---- what a caller hands over


def test_arrays_and_tensors_are_taken(processor: Processor) -> None:
    """uint8, height first, colours last or none; views too."""
    pixels = np.asarray(picture())
    for array in (pixels, torch.from_numpy(pixels.copy()), pixels[::-1, :, ::-1], pixels[..., 0],
                  np.asarray(picture(mode="RGBA")), torch.from_numpy(pixels[..., 1].copy())):
        ours = processor.batch([Record(MARK, [array])])
        theirs = processor.batch([Record(MARK, [Image.fromarray(np.asarray(array))])])
        assert torch.equal(ours.patches, theirs.patches) and len(ours.patches)


@pytest.mark.parametrize("array, words", [
    (np.zeros((3, 56, 56), np.uint8), ["uint8", "(3, 56, 56)"]),
    (np.zeros((56, 56, 3), np.float32), ["float32", "(56, 56, 3)"]),
    (np.zeros((56, 56)), ["float64"]),
    (np.zeros((56, 56), np.int32), ["int32"]),
    (np.zeros((2, 56, 56, 3), np.uint8), ["(2, 56, 56, 3)"]),
    (np.zeros(5, np.float16), ["float16"]),
    (np.array(["a.png"]), ["(1,)"]),
    (np.zeros(60, np.uint8), ["uint8", "(60,)"]),
    (np.array(7, np.uint8), ["uint8", "()"]),
    (np.broadcast_to(np.uint8(7), (100_000, 100_000, 3)), ["10000000000 pixels"]),
    (torch.zeros(1, 1, 1).byte().expand(12_000, 9_000, 3), ["108000000 pixels"]),
    (torch.zeros(3, 56, 56), ["float32", "[3, 56, 56]"]),
    (torch.zeros(56, 56, 3, dtype=torch.bfloat16), ["bfloat16"]),
    (torch.zeros(56, 56, 3, dtype=torch.uint8, device="meta"), ["meta"]),
])
def test_other_arrays_are_refused(array: object, words: list[str]) -> None:
    """Shape, type and what to give are said."""
    said = message(array)
    assert "uint8 [height, width, 3]" in said  # what is taken
    for word in words:
        assert word in said


@pytest.mark.parametrize("image", [None, 7, 2.5, ["a.png"], {"path": "a.png"}, io.BytesIO(b"x"),
                                   bytearray(b"x"), object()])
def test_other_objects_are_refused(image: object) -> None:
    assert type(image).__name__ in message(image)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_of_other_kinds(kind: type) -> None:
    """They are bytes, and looked through for metadata like these."""
    plain = saved(picture(), "PNG")
    at = plain.rindex(b"IEND") - 4
    turned = plain[:at] + chunk(b"eXIf", exif(6).tobytes()[6:]) + plain[at:]
    assert open_image(kind(turned), "x").size == (40, 70)
    np.testing.assert_array_equal(open_image(kind(turned), "x", decode=True), shown(turned))


def test_pictures_that_were_opened_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is not run, a bomb is not decoded, and a closed one is said to be."""
    for start in ("subprocess.Popen", "subprocess.check_call", "os.system"):
        monkeypatch.setattr(start, lambda *_, **__: pytest.fail("a program was started"))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 56\n%%EndComments\nshowpage\n"
    assert "EPS" in message(Image.open(io.BytesIO(program)))
    with warnings.catch_warnings(action="ignore"):
        bombs = Image.open(io.BytesIO(bomb(12_000, 12_000)))
    assert "144000000 pixels" in message(bombs)
    closed = Image.open(io.BytesIO(saved(picture(), "PNG")))
    closed.close()
    assert "PngImageFile" in message(closed)


def test_names_and_files_without_end(tmp_path: Path) -> None:
    """An image written into its own address, and a file of terabytes with a sound beginning."""
    assert len(message("data:image/png;base64," + "A" * 10**6)) < 6000
    path = tmp_path / "large.png"
    path.write_bytes(saved(picture(), "PNG"))
    os.truncate(path, 2**40)
    assert "large.png" in message(path) and "bytes" in message(path)


def test_paths_that_are_no_images(tmp_path: Path) -> None:
    """A folder, a pipe, a device, links to them, an address, a name that no system takes."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "link.png", "zero.png"):
        assert name in message(tmp_path / name) and name in message(str(tmp_path / name))
    assert tmp_path.name in message(tmp_path)
    for name in ("", "absent.png", "https://example.com/a.png", "a\0b.png", "line\nend.png"):
        message(name)


# ---- which files are opened


@pytest.mark.parametrize("content", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 56\n%%EndComments\nshowpage\n%%EOF\n",
    b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", b"\x89PNG\r\n\x1a\n",
    saved(picture(), "PCX"), saved(picture(), "TGA"), saved(picture(), "SGI"),
    saved(picture(), "ICO"), saved(picture(), "DDS"),
], ids=["PostScript", "PDF", "SVG", "nothing", "a beginning", "PCX", "TGA", "SGI", "ICO", "DDS"])
def test_other_formats_are_refused(content: bytes, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """By content, whatever the name; and no program is started."""
    for start in ("subprocess.Popen", "os.system"):
        monkeypatch.setattr(start, lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.png").write_bytes(content)
    assert "a.png" in message(tmp_path / "a.png")
    assert " at 0x" not in message(content)  # an address: another at each call


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000",
                                  "AVIF", "MPO"])
def test_formats_that_are_opened(form: str) -> None:
    more = {"save_all": True, "append_images": [picture()]} if form == "MPO" else {}
    assert open_image(saved(picture(), form, **more), "x", decode=True).size == (70, 40)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_decompression_bombs(capfd: pytest.CaptureFixture) -> None:
    """Beyond 89 million pixels, an error that names the number, and no warning."""
    for width, height in ((13_000, 13_000), (9_500, 9_500), (60_000, 60_000)):
        for decode in (False, True):
            with pytest.raises(MocaError, match=str(width * height)):
                open_image(bomb(width, height), "x", decode)
    assert open_image(bomb(9_400, 9_500), "x").size == (9_400, 9_500)
    assert capfd.readouterr() == ("", "")


def test_warnings_are_as_before(processor: Processor) -> None:
    """Opening an image changes nothing for the caller's own warnings."""
    before = list(warnings.filters)
    open_image(saved(picture(), "PNG"), "x")
    message(b"no image")
    assert warnings.filters == before


def test_no_file_stays_open(processor: Processor, tmp_path: Path) -> None:
    """A record may have more images than a process may have open files."""
    resource = pytest.importorskip("resource")
    small = saved(Image.new("RGB", (28, 28)), "PNG")
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(small)
    record = Record(MARK * 40, [tmp_path / f"{number}.png" for number in range(40)])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = len(os.listdir("/proc/self/fd")) + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        encoded = processor.encode(record)
        assert encoded.images == record.images  # as they were given, none decoded
        processor.decode([encoded])
        assert len(processor.pack([encoded]).grids) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_decoded_images_are_not_kept(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoded images the patches are kept, until they are packed: a whole picture is in memory
    once at a time."""
    decoded: dict[int, weakref.ref] = {}
    alive = []

    def load(image: Image.Image) -> object:
        decoded[id(image)] = weakref.ref(image)
        alive.append(sum(reference() is not None for reference in decoded.values()))
        return original(image)

    original = PngImagePlugin.PngImageFile.load
    content = saved(picture(), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    encoded = processor.encode(Record(MARK * 6, [content] * 6))
    processor.decode([encoded])
    assert len(alive) >= 6 and max(alive) <= 2 and encoded.images == [content] * 6
    assert len(encoded.patches) == 6
    processor.pack([encoded])
    assert encoded.patches is None


# ---- texts


def test_a_text_without_end(processor: Processor) -> None:
    """It is refused before the tokenizer sees it, with its size and the limit."""
    with pytest.raises(MocaError, match=f"line 8.*{MAX_CHARACTERS + 1}.*{MAX_CHARACTERS}"):
        processor.encode(Record("a" * (MAX_CHARACTERS + 1), [], "line 8"))
