"""What a checkpoint says of its image processor: obeyed or refused, key by key.

The files are preprocessor_config.json and, from transformers 5 on, a part of
processor_config.json. Were a key passed over, the model would see other pixels than it
was trained with, and nothing would say so.
"""

import os
from pathlib import Path

import numpy as np

from nano_moca.config import Config
from nano_moca.convert.configs import Section
from nano_moca.files import MocaError, read_json

# What an image processor's file may say, beside the sizes of config.json: how pixels are
# computed; the limits of an image's area in pixels, also called edges; the mean and
# deviation of each channel, CLIP's if it does not say; and what has no effect.
SWITCHES = {
    "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,), "do_convert_rgb": (True,),
    "resample": (3,), "rescale_factor": (1 / 255, float(np.float32(1 / 255))),
    "image_processor_type": ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast",
                             "Qwen2VLImageProcessorPil", "Qwen2_5_VLImageProcessor")}
LIMITS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FREE = ("size", "image_mean", "image_std", "processor_class", "crop_size", "pad_size",
        "data_format", "input_data_format", "default_to_square", "feature_extractor_type")


def read_settings(folder: Path, config: Config, min_pixels: int | None = None,
                  max_pixels: int | None = None) -> dict:
    """The settings of a checkpoint's image processor, checked. The limits of an image's
    area are the file's unless given. MocaError for files that do not serve."""
    # transformers 5 writes one file for all processors, and reads it first; in older
    # folders such a file has no image processor.
    file = folder / "processor_config.json"
    image = Section({}, "")
    if os.path.lexists(file):
        image = Section(read_json(file), f"{file}: ").part("image_processor")
    if not image.values:
        file = folder / "preprocessor_config.json"
        image = Section(read_json(file), f"{file}: ")

    # A limit that is given replaces the file's.
    settings = image_settings(image, config)
    given = Section({"min-pixels": min_pixels, "max-pixels": max_pixels}, "--")
    settings |= read_limits(given)
    low, high = settings["min_pixels"], settings["max_pixels"]
    if low > high:
        raise MocaError(f"{file}: min_pixels {low} and max_pixels {high}: correct it, or "
                        "--min-pixels and --max-pixels, to numbers in this order")
    return settings


def read_limits(place: Section) -> dict[str, int]:
    """The limits of an image's area that an object gives, under any of their names."""
    limits = {}
    for key, value in place.values.items():
        name = EDGES.get(key, key.replace("-", "_"))
        if name in LIMITS and value is not None:
            limits[name] = place.number(key, LIMITS[name], 1, 10**9 - 1)
    return limits


def image_settings(image: Section, config: Config) -> dict:
    """The settings in an image processor's file, with the limits of an image's area.
    MocaError for a key that is unknown, or that says what is not done here."""
    # The sizes have to be those of the weights.
    vision = config.vision
    switches = SWITCHES | {"patch_size": (vision.patch,), "merge_size": (vision.merge,),
                           "temporal_patch_size": (vision.frames,)}

    # An unknown key may say that it is off. A size has limits, and nothing else.
    size = image.part("size")
    known = {*EDGES, *LIMITS}
    for place, allowed in ((size, known), (image, {*known, *FREE})):
        for key in place.values:
            if key not in allowed:
                place.choice(key, *switches.get(key, (None, False)))

    # As in transformers, what stands beside a size comes before what stands in it.
    settings = {key: value for key, value in image.values.items() if key not in ("size", *known)}
    settings |= LIMITS | read_limits(size) | read_limits(image)

    # Pixels are 0..1 here, and are divided by their deviation.
    for key, clip, least in (("image_mean", CLIP_MEAN, 0.0), ("image_std", CLIP_STD, 0.001)):
        settings[key] = image.numbers(key, clip, least, 1.0)
        image.check(len(settings[key]) == 3, key, "three numbers, one for each channel")
    return settings
