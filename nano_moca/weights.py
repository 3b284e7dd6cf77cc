"""Checkpoints in and out, strictly.

The names of tensors have changed over the years. These layouts are read, in one file
model.safetensors or in shards with model.safetensors.index.json:

    transformers up to 4.51, hub  model.layers...          visual...        lm_head.*
    transformers 4.52 and later   model.language_model...  model.visual...  lm_head.*
    MoCa's released checkpoints   either, with mae_* tensors or without

Every tensor that the model needs must be there exactly once, with its shape, and
nothing else may be: if a missing key goes unnoticed, the model runs and its output
is nonsense (transformers 5 loads MoCa's own checkpoints that way). So names and
shapes are matched first, from the files' headers. Then tensors are read one at a
time, so that memory never holds the weights twice, and each rank of a sharded model
keeps its part. We save in the first layout, which every reader knows.

Left out: other formats than safetensors, and quantised weights.
"""

import copy
import math
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download  # arrives with tokenizers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nano_moca.config import Config
from nano_moca.distributed import copy_into_shard
from nano_moca.files import MocaError, read_json, write_json
from nano_moca.model import VLM

# How a stored name begins, and how ours does; the first that fits counts.
LAYOUTS = (("model.language_model.", "language."), ("model.visual.", "visual."),
           ("visual.", "visual."), ("model.", "language."))
EMBEDDING = "language.embed_tokens.weight"
HEAD = "lm_head.weight"
SHARD_SIZE = "5GB"
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # of a checkpoint on the hub
Header = dict[str, tuple[Path, tuple[int, ...]]]  # {stored name: (file, shape)}


def find_checkpoint(name: str | Path) -> Path:
    """A local folder as it is; a hub id like "Qwen/Qwen2.5-VL-3B-Instruct" as its
    download. MocaError if it is neither."""
    path = Path(name)
    if path.is_dir():
        return path
    if len(path.parts) != 2 or str(name).startswith((".", "/")):
        raise MocaError(f"{name} is not a folder: give a checkpoint folder or a hub id owner/name")

    # Network, permission, spelling: whatever goes wrong, one line says which.
    try:
        return Path(snapshot_download(str(name), allow_patterns=DOWNLOADED))
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MocaError(f"{name} is not a folder, nor on the hub ({reason})") from None


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


def stored_name(ours: str) -> str:
    """The other way round, into the layout that we save."""
    name = ours.replace("patch_embed.", "patch_embed.proj.")
    if name.startswith("language."):
        name = "model." + name.removeprefix("language.")
    return name


def read_header(folder: Path) -> Header:
    """File and shape of each stored tensor; MocaError for what is absent or broken."""
    # An index names the shards; without one there is a single file.
    index = folder / "model.safetensors.index.json"
    promised = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(promised, dict):
        raise MocaError(f"{index} holds no weight_map: copy it again")
    shards = sorted(set(map(str, promised.values()))) or ["model.safetensors"]

    header: Header = {}
    for shard in shards:
        # This reads names and shapes, and no weights.
        file = folder / shard
        found: Header = {}
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    found[key] = (file, tuple(tensors.get_slice(key).get_shape()))
        except (SafetensorError, OSError) as error:
            raise MocaError(f"{file} is absent or damaged ({error}): copy it again") from None

        # Of two tensors with one name, nobody can say which is right.
        doubled = header.keys() & found.keys()
        if doubled:
            raise MocaError(f"{file}: {min(doubled)} is in another shard too: copy the shards "
                            "again")
        header |= found
    return header


def match_names(header: Header, model: VLM, folder: Path) -> dict[str, str]:
    """{our name: stored name} of every parameter; MocaError lists what does not fit."""
    config = model.config
    asked = {name: tuple(weight.shape) for name, weight in model.named_parameters()}

    # The files hold the vocabulary as it was before it grew for a mask token.
    for name in asked.keys() & {EMBEDDING, HEAD}:
        asked[name] = (config.stored_vocabulary, asked[name][1])

    # All that does not fit is collected, so that one message shows the pattern.
    names: dict[str, str] = {}
    wrong: list[str] = []
    for stored, (file, shape) in header.items():
        # A tied head may be stored too: load_weights compares it with the embedding.
        name = our_name(stored)
        if name is None or (name == HEAD and config.tied):
            continue

        # A convolution's kernel [E, 3, frames, patch, patch] is our matrix [E, 1176].
        if name == "visual.patch_embed.weight":
            shape = (shape[0], math.prod(shape[1:]))

        if name not in asked:
            wrong.append(f"unexpected {stored} in {file.name}")
        elif name in names:
            wrong.append(f"{names[name]} and {stored} are one")
        elif shape != asked[name]:
            wrong.append(f"{stored} is {list(shape)}, config.json asks for {list(asked[name])}")
        names[name] = stored

    wrong += [f"missing {stored_name(name)}" for name in asked if name not in names]
    if wrong:
        # The first four say what kind of misfit it is.
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise MocaError(f"{folder}: the weights do not fit: {'; '.join(wrong[:4])}{more}: "
                        "take config.json and weights from one checkpoint")
    return names


def empty_model(config: Config, dtype: torch.dtype = torch.float32) -> VLM:
    """A model on the meta device: names and shapes, and no memory yet. Before it
    gets memory, it can be put into another module and divided among the ranks."""
    with torch.device("meta"):
        return VLM(config).to(dtype)


def load_weights(model: VLM, folder: Path, new_mask_token: int | None = None) -> None:
    """Copy a checkpoint's weights into a model that has memory (after `to_empty`).

    new_mask_token: the id of a mask token that the checkpoint lacks; it gets an
    embedding. MocaError for what is missing, unexpected, misshapen or damaged.
    """
    header = read_header(folder)
    names = match_names(header, model, folder)

    # One tensor at a time; of a sharded parameter, each rank keeps its part.
    for name, parameter in model.named_parameters():
        tensor = read_tensor(header, names[name])
        if name in (EMBEDDING, HEAD) and new_mask_token is not None:
            tensor = add_mask_token(tensor, new_mask_token, parameter.shape[0])
        copy_into_shard(parameter, tensor.view(parameter.shape))

    # If config.json says tied and the files hold another head, one of them is wrong.
    if model.config.tied and HEAD in header:
        head = read_tensor(header, HEAD)
        embedding = names[EMBEDDING]
        if not torch.equal(head, read_tensor(header, embedding)):
            raise MocaError(f"{folder}: {HEAD} differs from {embedding}: "
                            "set tie_word_embeddings to false in config.json")


def read_tensor(header: Header, stored: str) -> Tensor:
    """One tensor, by its stored name."""
    # The file is opened anew each time: closing it gives its mapped pages back.
    file, _ = header[stored]
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(stored)


def add_mask_token(stored: Tensor, token: int, vocabulary: int) -> Tensor:
    """The embedding or head [V, D] with a row for the mask token.

    stored: as in the file, [V, D], or shorter if the vocabulary grew. token: the
    mask token's id. vocabulary: V.
    """
    # It starts as the mean of all tokens before it, and so does what was added.
    mean = stored[:token].float().mean(0).to(stored.dtype)  # [D]
    weight = torch.cat([stored, mean.expand(vocabulary - len(stored), -1)])  # [V, D]
    weight[token] = mean
    return weight


def save_weights(folder: Path, tensors: dict[str, Tensor], config: Config,
                 trained_with: dict | None = None) -> None:
    """Write config.json, and the weights in shards of 5 GB.

    tensors: by our names, not sharded. trained_with: {"attention": ..., "pooling":
    ...}, written as "nano_moca" for `nano_moca.load`; None keeps what was there.
    """
    # The stored names, and the patch embedding as a convolution's kernel again.
    vision = config.vision
    kernel = (-1, 3, vision.frames, vision.patch, vision.patch)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "patch_embed" in name:
            tensor = tensor.view(kernel)
        stored[stored_name(name)] = tensor
    save_torch_state_dict(stored, folder, max_shard_size=SHARD_SIZE)

    # The checkpoint's own config.json, with what may have changed.
    raw = copy.deepcopy(config.raw)
    (raw.get("text_config") or raw)["vocab_size"] = config.vocabulary
    if trained_with is not None:
        raw["nano_moca"] = trained_with
    raw["tie_word_embeddings"] = config.tied
    write_json(folder / "config.json", raw)


def stored_dtype(config: Config) -> torch.dtype:
    """The dtype that the checkpoint's config.json names, or float32."""
    raw = config.raw | (config.raw.get("text_config") or {})
    return getattr(torch, raw.get("torch_dtype") or raw.get("dtype") or "float32")
