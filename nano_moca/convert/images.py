"""Images as they lie about, opened: whatever a viewer shows, as RGB pixels.

A picture may be turned by its metadata, see-through, cut short, a program instead of an
image, or larger than the memory. processor.py asks for its size first, and for its
pixels when a batch is packed.
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from nano_moca.batch import ImageLike
from nano_moca.files import MocaError, reason, regular_file

# What may be opened; Pillow knows formats that are programs (PostScript) too. And by
# which words a PNG may say, behind its pixels, how it is turned.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
MAX_PIXELS = 89_478_485  # beyond it Pillow warns of a decompression bomb
MAX_BYTES = 10**9  # of a file: no such picture has as many


def open_image(image: ImageLike, source: str, decode: bool = False) -> Image.Image:
    """An image as a viewer shows it: RGB, upright, and white where it is transparent; or,
    unless asked to `decode`, a blank one of its size, from its header alone.

    MocaError, with source and file, if it is absent, broken, too large, or of more than 8
    bits.
    """
    kind = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
    name = image if isinstance(image, (str, Path)) else f"given as {kind.strip()}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            picture = read_image(image)
            if not decode:
                blank = Image.new("1", picture.size)
                blank.info = picture.info
                picture = blank

            # Converted in memory, it may still call a colour transparent that once was.
            see_through = picture.has_transparency_data
            see_through &= picture.format is not None or picture.mode not in ("L", "RGB")

            # If the metadata are damaged, viewers show it as it is stored.
            picture.load()
            with suppress(Exception):
                picture = ImageOps.exif_transpose(picture)

            # As Qwen's own loader does.
            if decode and see_through:
                colours = picture.convert("RGBA")
                picture = Image.new("RGB", picture.size, "white")
                picture.paste(colours, mask=colours)
            return picture.convert("RGB") if decode else picture
    except MocaError as error:
        raise MocaError(f"{source}: the image {error}") from None
    # Pillow raises a dozen kinds for files that are no good images.
    except Exception as error:
        what = reason(error).partition(" <")[0]  # without an object's address
        raise MocaError(f"{source}: the image {name} cannot be used ({what}): give a sound file, "
                        "its bytes, or an array, uint8 [height, width, 3]") from None


def read_image(image: ImageLike) -> Image.Image:
    """A PIL image; of a file, only its header is decoded. No file stays open: a process
    may hold only so many. Errors of many kinds."""
    if isinstance(image, (str, Path)):
        image = regular_file(Path(image), MAX_BYTES).read_bytes()

    # The metadata of a PNG may stand behind its pixels, found only by decoding them. A
    # picture that was handed over is decoded at once: it stays where it is anyway.
    is_array = isinstance(image, (np.ndarray, torch.Tensor))
    later = isinstance(image, Image.Image)
    if not is_array and not later:
        content = bytes(memoryview(image))
        later = any(name in content for name in PNG_METADATA)
        image = Image.open(io.BytesIO(content), formats=FORMATS)

    # Pillow takes no array but [height, width] or [height, width, colours] of bytes.
    height, width = image.shape[:2] if is_array else image.size
    if height * width > MAX_PIXELS:
        raise ValueError(f"it has {height * width} pixels, of at most {MAX_PIXELS}")
    image = Image.fromarray(np.asarray(image)) if is_array else image

    # Converting 16 or 32 bits would clip them: all white, or all black. A picture that
    # was opened elsewhere may be a program.
    if image.mode.startswith(("I", "F")) or image.format == "EPS":
        raise ValueError(f"its format is {image.format}, its mode {image.mode}, not 8 bits each")
    if later and "exif" not in image.info:
        image.load()
    return image
