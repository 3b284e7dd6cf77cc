"""The tensors of a checkpoint on the disk: in which files they lie, and what they are called.

Names have changed over the years. These layouts are read, in one file model.safetensors
or in shards with model.safetensors.index.json:

    transformers up to 4.51, hub  model.layers...          visual...        lm_head.*
    some from 4.52 on             model.language_model...  model.visual...  lm_head.*
    saved as AutoModel            language_model...        visual...
    MoCa's released checkpoints   any, with mae_* tensors or without

Only headers are read here. Which tensors a model needs is in weights.py.
"""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nano_moca.files import MocaError, read_json, regular_file

# How a stored name begins, and how ours does; the first that fits counts.
LAYOUTS = (("model.language_model.", "language."), ("model.visual.", "visual."),
           ("language_model.", "language."), ("visual.", "visual."), ("model.", "language."))
Header = list[tuple[str, Path, tuple[int, ...], str]]  # stored name, file, shape, type


def our_name(stored: str) -> str | None:
    """The name of a stored tensor in `VLM`; None for stage 1's leftovers (mae_*)."""
    if stored.startswith(("mae_", "model.mae_")):
        return None

    # The patch embedding is stored as a convolution, and is a matrix here.
    stored = stored.replace("patch_embed.proj.", "patch_embed.")
    for theirs, ours in LAYOUTS:
        if stored.startswith(theirs):
            return ours + stored.removeprefix(theirs)
    return stored


def find_shards(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: model.safetensors, or those that the
    index names. A folder with both is refused. (transformers reads the first then; but
    one of the two is the older, and nothing says which.) Other .safetensors are not
    read, here as there."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not os.path.lexists(index):
        return [single]
    promised = read_json(index).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise MocaError(f"{index} holds no weight_map: copy it again")

    # What is written may not lead out of the folder. A link may: it is the user's own,
    # and the hub's cache is made of them.
    shards = sorted(set(map(str, promised.values())))
    for shard in shards:
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise MocaError(f"{index}: {shard} is outside the folder: use another checkpoint")
    if single.exists() and single.name not in shards:
        raise MocaError(f"{folder} holds two sets of weights, {single.name} and what {index.name} "
                        "names: remove one of them")
    return [folder / shard for shard in shards]


def read_header(folder: Path) -> Header:
    """Name, file, shape and type of each stored tensor; MocaError for what is absent
    or broken."""
    header: Header = []
    for file in find_shards(folder):
        # This reads names and shapes, and no weights.
        try:
            with safe_open(regular_file(file), "pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    header.append((name, file, tuple(part.get_shape()), part.get_dtype()))
        except (SafetensorError, OSError, MemoryError) as error:
            raise MocaError(f"{file} is absent or damaged ({error}): copy it again") from None
    return header
