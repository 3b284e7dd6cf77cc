"""Checkpoints in and out, strictly.

The names of tensors have changed over the years; these layouts are read, in one file
model.safetensors or in shards with model.safetensors.index.json:

    transformers up to 4.51, hub files   model.layers...          visual...        lm_head.*
    transformers 4.52 and later          model.language_model...  model.visual...  lm_head.*
    MoCa's released checkpoints          either, with mae_* tensors or without

Every tensor that the model needs must be there exactly once, with its shape, and nothing else may
be: if a missing key goes unnoticed, the model runs and its output is nonsense (transformers 5 loads
MoCa's own checkpoints that way). Tensors are read one at a time, so that memory never holds the
weights twice, and each rank of a sharded model keeps its part. We save in the first layout, which
every reader knows.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download  # arrives with tokenizers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nano_moca.config import Config, MocaError, read_json, write_json
from nano_moca.model import VLM, fill

LAYOUTS = (  # how a stored name begins, how ours does; the first that fits counts
    ("model.language_model.", "language."),
    ("model.visual.", "visual."),
    ("visual.", "visual."),
    ("model.", "language."),
)
VOCABULARY_ROWS = ("language.embed_tokens.weight", "lm_head.weight")
SHARD_SIZE = "5GB"


def find_checkpoint(name: str | Path) -> Path:
    """A local folder as it is; a hub id like "Qwen/Qwen2.5-VL-3B-Instruct" as its download."""
    if Path(name).is_dir():
        return Path(name)
    if len(Path(name).parts) != 2 or str(name).startswith((".", "/")):
        raise MocaError(f"{name} is not a folder: give a checkpoint folder or a hub id owner/name")
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # network, permission, spelling: one line says which
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MocaError(f"{name} is not a folder, nor on the hub ({reason})") from None


def our_name(stored: str) -> str | None:
    """The name a stored tensor has in `VLM`; None for stage 1's leftovers (mae_*)."""
    if stored.startswith(("mae_", "model.mae_")):
        return None
    stored = stored.replace("patch_embed.proj.", "patch_embed.")
    for theirs, ours in LAYOUTS:
        if stored.startswith(theirs):
            return ours + stored.removeprefix(theirs)
    return stored


def stored_name(ours: str) -> str:
    """The other way round, into the layout we save."""
    name = ours.replace("patch_embed.", "patch_embed.proj.")
    return "model." + name.removeprefix("language.") if name.startswith("language.") else name


def read_header(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The file and shape of every stored tensor; MocaError for absent or broken files."""
    index = folder / "model.safetensors.index.json"
    promised = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(promised, dict):
        raise MocaError(f"{index} holds no weight_map: copy it again")
    found = {}
    for name in sorted(set(map(str, promised.values()))) or ["model.safetensors"]:
        file = folder / name
        try:
            with safe_open(file, "pt") as tensors:
                here = {key: (file, tuple(tensors.get_slice(key).get_shape()))
                        for key in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise MocaError(f"{file} is absent or damaged ({error}): copy it again") from None
        for key in found.keys() & here.keys():
            raise MocaError(f"{file}: {key} is in another shard too: copy the shards again")
        found |= here
    return found


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor. The file is opened anew: closing it gives its mapped pages back."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)


def match_names(header: dict, model: VLM, folder: Path) -> dict[str, str]:
    """{our name: stored name} for every parameter, or MocaError with all that does not fit."""
    config, names, wrong = model.config, {}, []
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for stored, (file, shape) in header.items():
        name = our_name(stored)
        if name is None or (name == "lm_head.weight" and config.tied):
            continue  # build compares a tied head with the embedding
        asked = shapes.get(name)
        if asked and name in VOCABULARY_ROWS:  # a grown vocabulary has more rows than the file
            asked = (config.stored_vocabulary, asked[1])
        if name == "visual.patch_embed.weight":  # a convolution's kernel: flatten it
            shape = (shape[0], math.prod(shape[1:]))
        if asked is None:
            wrong.append(f"unexpected {stored} in {file.name}")
        elif name in names:
            wrong.append(f"{names[name]} and {stored} are one")
        elif shape != asked:
            wrong.append(f"{stored} is {list(shape)}, config.json asks for {list(asked)}")
        names[name] = stored
    wrong += [f"missing {stored_name(name)}" for name in shapes if name not in names]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise MocaError(f"{folder}: the weights do not fit: {'; '.join(wrong[:4])}{more}: take "
                        "config.json and weights from one checkpoint")
    return names


def build(folder: Path, config: Config, device: torch.device | str, dtype: torch.dtype,
          prepare: Callable[[VLM], nn.Module] = lambda vlm: vlm, mask_row: int | None = None
          ) -> nn.Module:
    """The model of a checkpoint with its weights, or what `prepare` wraps around it (and shards).

    Until `prepare` is done the model has no memory; then each parameter, or this rank's part of it,
    is allocated once and filled. What `prepare` adds is left for the caller to fill.

    mask_row: the id of a mask token that the checkpoint lacks. Its embedding, and the rows that a
    grown vocabulary adds, start as the mean of the rows before it.
    """
    with torch.device("meta"):  # shapes and names only
        model = VLM(config).to(dtype)
    header = read_header(folder)
    names = match_names(header, model, folder)
    whole = prepare(model)
    whole.to_empty(device=device)
    for name, parameter in model.named_parameters():
        tensor = read_tensor(header[names[name]][0], names[name])
        if name in VOCABULARY_ROWS and mask_row is not None:
            mean = tensor[:mask_row].float().mean(0).to(tensor.dtype)  # [D]
            added = parameter.shape[0] - len(tensor)
            tensor = torch.cat([tensor, mean.expand(added, -1)])
            tensor[mask_row] = mean
        fill(parameter, tensor.view(parameter.shape))
    if config.tied and "lm_head.weight" in header:
        keys = "lm_head.weight", names["language.embed_tokens.weight"]
        if not torch.equal(*(read_tensor(header[key][0], key) for key in keys)):
            raise MocaError(f"{folder}: {keys[0]} differs from {keys[1]}: set tie_word_embeddings "
                            "to false in config.json")
    return whole


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Whatever a library raises when the disk is full or read-only becomes one line."""
    try:
        yield
    except Exception as error:  # OSError, RuntimeError, SafetensorError, tokenizers' Exception
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MocaError(f"{folder} cannot be written ({reason}): make room on the disk") from None


def find_folder(folder: Path) -> Path:
    """`folder`, put back from its `.old` if a crash fell between `replace_folder`'s two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    return folder


def fresh_folder(folder: Path) -> Path:
    """An empty `<folder>.new` to write into; `replace_folder` gives it the name when it is
    whole."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def replace_folder(folder: Path) -> None:
    """Put `<folder>.new` in the place of `folder`; a crash at any moment leaves a whole one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for file in fresh.iterdir():  # on the disk before it gets its name
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    find_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_weights(folder: Path, tensors: dict[str, Tensor], config: Config) -> None:
    """Write config.json and weights, in shards of 5 GB. tensors: whole, by our names."""
    patch = config.vision.patch
    kernel = (-1, 3, config.vision.frames, patch, patch)  # the patch embedding as a convolution's
    stored = {stored_name(name): tensor.view(kernel) if "patch_embed" in name else tensor
              for name, tensor in tensors.items()}
    save_torch_state_dict(stored, folder, max_shard_size=SHARD_SIZE)
    # the checkpoint's own config.json, with what may have changed
    raw = json.loads(json.dumps(config.raw))
    (raw.get("text_config") or raw)["vocab_size"] = config.vocabulary
    write_json(folder / "config.json", raw | {"tie_word_embeddings": config.tied})


def stored_dtype(config: Config) -> torch.dtype:
    """The dtype that the checkpoint's config.json names, float32 if none."""
    raw = config.raw | (config.raw.get("text_config") or {})
    return getattr(torch, raw.get("torch_dtype") or raw.get("dtype") or "float32")
