"""What a checkpoint says of its image processor: obeyed or refused, key by key.

The files are preprocessor_config.json and, from transformers 5 on, a part of
processor_config.json. Were a key passed over, the model would see other pixels than it
was trained with, and nothing would say so.
"""

from pathlib import Path

import numpy as np

from nano_moca.config import Config
from nano_moca.files import MocaError, read_json

# What an image processor's file may say, beside the sizes of config.json: how pixels are
# computed; and, with other values, the limits of an image's area in pixels, also called
# edges, the mean and deviation of each channel, CLIP's if it does not say, and what has
# no effect.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
SETTINGS: dict[str, tuple | None] = {
    "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,), "do_convert_rgb": (True,),
    "resample": (3,), "rescale_factor": (1 / 255, float(np.float32(1 / 255))),
    "image_processor_type": ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast",
                             "Qwen2VLImageProcessorPil", "Qwen2_5_VLImageProcessor")}
SETTINGS |= dict.fromkeys([
    "size", "min_pixels", "max_pixels", "image_mean", "image_std", "processor_class", "crop_size",
    "pad_size", "data_format", "input_data_format", "default_to_square", "feature_extractor_type"])
EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}


def read_settings(folder: Path, config: Config, min_pixels: int | None = None,
                  max_pixels: int | None = None) -> dict:
    """The settings of a checkpoint's image processor, checked. The limits of an image's
    area are the file's unless given. MocaError for files that do not serve."""
    # transformers 5 writes one file for all processors, and reads it first; in older
    # folders such a file has no image processor.
    file = folder / "processor_config.json"
    image = read_json(file).get("image_processor") if file.exists() else None
    if not isinstance(image, dict):
        file = folder / "preprocessor_config.json"
        image = read_json(file)

    # A limit that is given replaces the file's.
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    return image_settings(image | limits, config, str(file))


def image_settings(content: dict, config: Config, file: str) -> dict:
    """The settings in an image processor's file, with the limits of an image's area.
    MocaError for a key that is unknown, or that says what is not done here."""
    # The sizes have to be those of the weights.
    vision = config.vision
    table = SETTINGS | {"patch_size": (vision.patch,), "merge_size": (vision.merge,),
                        "temporal_patch_size": (vision.frames,)}

    # As in transformers, what stands beside a size comes before what stands in it.
    size = content.get("size") or {}
    if not isinstance(size, dict):
        raise MocaError(f"{file}: size is {size!r}: give shortest_edge and longest_edge")
    settings = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    for key, value in (size | content).items():
        key = EDGES.get(key, key)
        possible = table.get(key, (None, False))  # an unknown key may say that it is off
        if possible and value not in possible:
            raise MocaError(f"{file}: {key} is {value!r} and not {possible[0]!r}, the only way "
                            "that is known here: take the file of this checkpoint")
        if key != "size" and (value is not None or key not in settings):
            settings[key] = value

    # Numbers are looked at as a whole, with what a caller gave in place of the file's.
    low, high = settings["min_pixels"], settings["max_pixels"]
    if type(low) is not int or type(high) is not int or not 0 < low <= high < 10**9:
        raise MocaError(f"{file}: min_pixels {low!r} and max_pixels {high!r}: correct it, or "
                        "--min-pixels and --max-pixels, to whole numbers above 0 in this order")

    # Pixels are 0..1 here, and are divided by their deviation.
    for key, clip, least in (("image_mean", CLIP_MEAN, 0), ("image_std", CLIP_STD, 0.001)):
        values = settings.setdefault(key, clip)
        values = values if isinstance(values, list) else []
        if [type(n) in (int, float) and least <= n <= 1 for n in values] != [True, True, True]:
            raise MocaError(f"{file}: {key} is {settings[key]!r}: give three numbers up to 1")
    return settings
