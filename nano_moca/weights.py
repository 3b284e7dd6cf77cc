"""Checkpoints in, strictly.

Tensors are called differently by the versions that wrote them, and lie in one file
or in many: convert/shards.py finds them, in every layout that there was. What
AutoModel saved (and so sentence-transformers) has no output head. If the model's
head is its embedding, nothing is lost; otherwise the checkpoint is refused.

Every tensor that the model needs must be there exactly once, with its shape, and
nothing else may be: if a missing key goes unnoticed, the model runs and its output
is nonsense (transformers 5 loads MoCa's own checkpoints that way). So names and
shapes are matched first, from the files' headers. Then tensors are read one at a
time, so that memory never holds the weights twice, and each rank of a sharded model
keeps its part. The vision tower's MLPs get zeros behind them when they are loaded,
and lose them when they are saved (`stored_part`). We save (convert/export.py)
Qwen2-VL and 2.5 under the hub's older names, which all readers know, and Qwen3-VL
under its own (`Config.saved_names`).

A checkpoint may come from a stranger, or of a run that diverged: the shards that an
index names lie in its folder, and weights are floating-point numbers and finite.

Left out: other formats than safetensors, and quantised weights.
"""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download  # arrives with tokenizers
from safetensors import safe_open
from torch import Tensor

from nano_moca.config import Config
from nano_moca.distributed import copy_into_shard
from nano_moca.families import build_model
from nano_moca.files import MocaError, reason
from nano_moca.model import VLM

EMBEDDING = "language.embed_tokens.weight"
HEAD = "lm_head.weight"
KERNEL = "visual.patch_embed.weight"  # a convolution's, and our matrix [E, 1176]
# Of a checkpoint on the hub: what a processor needs, and beside it the weights.
PROCESSOR_FILES = ("*.json", "*.jinja", "merges.txt")
CHECKPOINT_FILES = (*PROCESSOR_FILES, "*.safetensors")
TRAINED = ("F64", "F32", "F16", "BF16")  # the types that training gives, as files call them
Found = dict[str, tuple[Path, str]]  # {our name: (file, stored name)}


def find_checkpoint(name: str | Path, patterns: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
    """A local folder as it is; a hub id like "Qwen/Qwen2.5-VL-3B-Instruct" as its
    download, of the files that fit `patterns`. MocaError if it is neither."""
    name = str(name)
    if os.path.isdir(name):
        return Path(name)
    if len(Path(name).parts) != 2 or name.startswith((".", "/")):
        raise MocaError(f"{name} is not a folder: give a checkpoint folder or a hub id owner/name")

    # Network, permission, spelling: whatever goes wrong, one line says which.
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        raise MocaError(f"{name} is not a folder, nor on the hub ({reason(error)})") from None


def stored_name(ours: str, config: Config) -> str:
    """What one of our tensors is called in the layout that we save."""
    name = ours.replace("patch_embed.", "patch_embed.proj.")
    tower, _, rest = name.partition(".")
    return f"{config.saved_names.get(tower, tower)}.{rest}"


def stored_part(ours: str, config: Config) -> tuple[slice, ...]:
    """Which part of a parameter the files hold: () for all of it. In memory the vision
    tower's MLPs are padded, see `VisionConfig.padded_mlp_width`."""
    kept = slice(config.vision.mlp_width)
    vision_mlp = ours.startswith("visual.blocks.") and ".mlp." in ours
    if vision_mlp and "down_proj.weight" in ours:
        return slice(None), kept
    if vision_mlp and ("gate_proj" in ours or "up_proj" in ours):
        return (kept,)
    return ()


def find_weights(folder: Path, model: VLM, allow_extra: bool = False) -> Found:
    """Where each parameter is stored, and a tied head too if it is. Only the files'
    headers are read, and the model may be on the meta device: so it can be asked before
    anything is given memory.

    allow_extra: read over tensors that the model has no place for. MocaError lists
    what does not fit.
    """
    from nano_moca.convert.shards import our_name, read_header  # each layout that there was

    # The files hold the vocabulary as it was before it grew for a mask token. A tied
    # head may be stored too: load_weights compares it with the embedding.
    needed: dict[str, tuple[int, ...]] = {}
    for name, weight in model.named_weights():
        # The shape of the stored part, found by indexing a tensor that has no
        # memory.
        shape = torch.empty(weight.shape, device="meta")[stored_part(name, model.config)].shape
        needed[name] = tuple(shape)
    table = (model.config.stored_vocabulary, model.config.width)
    asked = needed | {EMBEDDING: table, HEAD: table, KERNEL: model.config.vision.kernel}

    # All that does not fit is collected, so that one message shows the pattern.
    found: Found = {}
    wrong: list[str] = []
    for stored, file, shape, dtype in read_header(folder):
        name = our_name(stored)
        if name is None or (allow_extra and name not in asked):
            continue

        # Of two tensors for one parameter, nobody can say which is right.
        if name not in asked:
            wrong.append(f"unexpected {stored} in {file.name} (--allow-extra reads over it)")
        elif name in found:
            wrong.append(f"{found[name][1]} and {stored} in {file.name} are one")
        elif shape != asked[name]:
            wrong.append(f"{stored} is {list(shape)}, config.json asks for {list(asked[name])}")
        elif dtype not in TRAINED:
            wrong.append(f"{stored} in {file.name} is {dtype}, not one of {', '.join(TRAINED)}")
        found[name] = (file, stored)

    wrong += [f"missing {stored_name(name, model.config)}" for name in needed if name not in found]
    if wrong:
        # The first four say what kind of misfit it is.
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise MocaError(f"{folder}: the weights do not fit: {'; '.join(wrong[:4])}{more}: take "
                        "config.json and all weights, with the output head, from one checkpoint")
    return found


def empty_model(config: Config, dtype: torch.dtype = torch.float32) -> VLM:
    """A model on the meta device: names and shapes, and no memory yet. Before it
    gets memory, it can be put into another module and divided among the ranks."""
    with torch.device("meta"):
        return build_model(config).to(dtype)


def load_weights(model: VLM, folder: Path, new_mask_token: int | None = None,
                 allow_extra: bool = False) -> None:
    """Copy a checkpoint's weights into a model that has memory (after `to_empty`).

    new_mask_token: the id of a mask token that the checkpoint lacks; it gets an
    embedding. allow_extra: as in `find_weights`. MocaError for what is missing,
    unexpected, misshapen, damaged or not finite.
    """
    found = find_weights(folder, model, allow_extra)

    # One tensor at a time; of a sharded parameter, each rank keeps its part.
    for name, parameter in model.named_weights():
        tensor = read_tensor(*found[name])
        if name in (EMBEDDING, HEAD) and new_mask_token is not None:
            tensor = add_mask_token(tensor, new_mask_token, parameter.shape[0])
        if part := stored_part(name, model.config):
            padded = tensor.new_zeros(parameter.shape)
            padded[part] = tensor
            tensor = padded
        copy_into_shard(parameter, tensor.view(parameter.shape))

    # If config.json says tied and the files hold another head, one of them is wrong.
    if model.config.tied and HEAD in found:
        head = read_tensor(*found[HEAD])
        embedding = read_tensor(*found[EMBEDDING])
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise MocaError(f"{folder}: {HEAD} differs from {found[EMBEDDING][1]}: "
                            "set tie_word_embeddings to false in config.json")


def read_tensor(file: Path, stored: str) -> Tensor:
    """One tensor, by its stored name; MocaError if it holds NaN or infinity."""
    # The file is opened anew each time: closing it gives its mapped pages back.
    with safe_open(file, "pt") as tensors:
        tensor = tensors.get_tensor(stored)

    # If any value is not finite, the least or the greatest is not. To find these two
    # costs 0.1 s a GB, and asking each value 5 s.
    if not torch.stack(tensor.aminmax()).float().isfinite().all():
        raise MocaError(f"{file}: {stored} holds NaN or infinity: use another checkpoint")
    return tensor


def add_mask_token(stored: Tensor, token: int, vocabulary: int) -> Tensor:
    """The embedding or head [V, D] with a row for the mask token.

    stored: as in the file, [V, D], or shorter if the vocabulary grew. token: the
    mask token's id. vocabulary: V.
    """
    # It starts as the mean embedding of all tokens before it, and so does any other
    # row that was added.
    mean = stored[:token].float().mean(0).to(stored.dtype)  # [D]
    weight = torch.cat([stored, mean.expand(vocabulary - len(stored), -1)])  # [V, D]
    weight[token] = mean
    return weight


def stored_dtype(config: Config) -> torch.dtype:
    """The dtype that the checkpoint's config.json names, or float32."""
    raw = config.raw | (config.raw.get("text_config") or {})
    return getattr(torch, raw.get("torch_dtype") or raw.get("dtype") or "float32")
