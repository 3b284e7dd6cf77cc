"""Checkpoints in and out, strictly.

The names of tensors have changed over the years; four layouts are read:

    transformers up to 4.51, and the hub's files      model.layers.0...     visual.blocks.0...     lm_head.weight
    transformers 4.52 and later                       model.language_model...   model.visual...    lm_head.weight
    MoCa's released checkpoints                       either, with mae_* tensors or without
    in one file model.safetensors, or in shards with model.safetensors.index.json

Every tensor that the model needs must be there once, in its shape, and nothing else may be: a missing key that goes
unnoticed is a model that computes nonsense with confidence (transformers 5 loads MoCa's own checkpoints so). Tensors
are read one at a time, so that memory never holds the weights twice, and each rank of a sharded model keeps its part.
Saved files are in the first layout, which every version of transformers and the hub's other readers load.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nano_moca.config import Config, MocaError, read_json
from nano_moca.model import VLM, fill

# (how a stored name begins, how ours does), the first that fits counts
LAYOUTS = (
    ("model.language_model.", "language."),
    ("model.visual.", "visual."),
    ("visual.", "visual."),
    ("model.", "language."),
    ("lm_head.", "lm_head."),
)
VOCABULARY_ROWS = ("language.embed_tokens.weight", "lm_head.weight")
FILES = ("*.json", "*.safetensors")
SHARD_BYTES = 5 * 10**9


def find_checkpoint(name: str | Path) -> Path:
    """A local folder as it is, a hub id ("Qwen/Qwen2.5-VL-3B-Instruct") as its downloaded snapshot."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or len(Path(name).parts) != 2 or str(name).startswith("."):
        raise MocaError(f"{name} is no folder: give a checkpoint's folder or a hub id like owner/name")
    from huggingface_hub import snapshot_download  # arrives with tokenizers

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except Exception as error:  # network, permission, spelling: one line says which
        reason = str(error).strip().splitlines()[0]
        raise MocaError(f"{name} is no folder, and the hub does not give it ({reason})") from None


def our_name(stored: str) -> str | None:
    """The name a stored tensor has in `VLM`; None for one that the model does without (mae_*)."""
    if stored.startswith(("mae_", "model.mae_")):
        return None
    for theirs, ours in LAYOUTS:
        if stored.startswith(theirs):
            return (ours + stored.removeprefix(theirs)).replace("patch_embed.proj.", "patch_embed.")
    return stored


def stored_name(ours: str) -> str:
    """The other way round, into the layout we save."""
    name = ours.replace("patch_embed.", "patch_embed.proj.")
    return "model." + name.removeprefix("language.") if name.startswith("language.") else name


def read_header(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every stored tensor's file and shape, read from the headers; MocaError for absent or broken files."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    promised: dict[str, str] = {}
    if index.is_file():
        promised = read_json(index).get("weight_map") or {}
        files = [folder / name for name in sorted(set(promised.values()))]
    found = {}
    for file in files:
        if not file.is_file():
            raise MocaError(f"{file} does not exist: copy or download it again")
        try:
            with safe_open(file, "pt") as tensors:
                found |= {key: (file, tuple(tensors.get_slice(key).get_shape())) for key in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise MocaError(f"{file} is truncated or damaged ({error}): copy or download it again") from None
    absent = sorted(set(promised) - set(found))
    if absent:
        raise MocaError(f"{index} promises {absent[0]} and {len(absent) - 1} more that no shard holds")
    return found


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor. The file is opened anew each time: closing it gives the mapped pages back to the system."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)


def check_names(header: dict, model: VLM, folder: Path) -> dict[str, str]:
    """Match stored tensors with the model's parameters. Returns {our name: stored name} or says what is wrong."""
    config, names, wrong = model.config, {}, []
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for stored, (file, shape) in header.items():
        name = our_name(stored)
        if name is None or (name == "lm_head.weight" and config.tied):
            continue  # a tied head is compared with the embedding in load_weights
        asked = shapes.get(name)
        if name in VOCABULARY_ROWS and asked:
            asked = (config.stored_vocabulary, asked[1])  # a grown vocabulary has more rows than the file
        elif name == "visual.patch_embed.weight" and len(shape) == 5:  # a convolution's kernel: flatten it
            shape = (shape[0], math.prod(shape[1:]))
        if asked is None:
            wrong.append(f"unexpected {stored} in {file.name}")
        elif name in names:
            wrong.append(f"twice, as {names[name]} and {stored}")
        elif shape != asked:
            wrong.append(f"{stored} has shape {list(shape)}, config.json asks for {list(asked)}")
        names.setdefault(name, stored)
    wrong += [f"missing {stored_name(name)}" for name in shapes if name not in names]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise MocaError(f"{folder}: the weights do not fit: {'; '.join(wrong[:4])}{more}. "
                        "Take config.json and the weights from one checkpoint")
    return names


def load_weights(model: VLM, folder: Path, mask_row: int | None = None) -> None:
    """Fill the model's parameters (allocated, sharded or not) from the checkpoint in `folder`.

    mask_row: the id of a mask token that the checkpoint does not know; its embedding becomes the mean of those
    before it, which is no word and of a usual size. Rows beyond the file's, if the vocabulary grew, likewise.
    """
    header = read_header(folder)
    names = check_names(header, model, folder)
    for name, parameter in model.named_parameters():
        stored = names[name]
        tensor = read_tensor(header[stored][0], stored)
        if name in VOCABULARY_ROWS and mask_row is not None:
            mean = tensor[:mask_row].float().mean(0, keepdim=True).to(tensor.dtype)  # [1, D]
            tensor = torch.cat([tensor, mean.expand(parameter.shape[0] - len(tensor), -1)])
            tensor[mask_row] = mean[0]
        fill(parameter, tensor.view(parameter.shape))
    if model.config.tied and "lm_head.weight" in header:
        stored = names["language.embed_tokens.weight"]
        head, embedding = (read_tensor(header[key][0], key) for key in ("lm_head.weight", stored))
        if not torch.equal(head, embedding):
            raise MocaError(f"{folder}: lm_head.weight differs from {stored} although config.json "
                            "says tie_word_embeddings: set it to false")


def build(folder: Path, config: Config, device: torch.device | str, dtype: torch.dtype,
          prepare: Callable[[VLM], nn.Module] | None = None, mask_row: int | None = None) -> nn.Module:
    """The model of a checkpoint with its weights, or what `prepare` wraps around it (and shards) on the way.

    Until `prepare` is done the model has no memory; then each parameter, or this rank's part of it, is allocated
    once and filled. What `prepare` adds is left for the caller to fill.
    """
    model = meta_model(config, dtype)
    check_names(read_header(folder), model, folder)
    whole = prepare(model) if prepare else model
    whole.to_empty(device=device)
    load_weights(model, folder, mask_row)
    return whole


def meta_model(config: Config, dtype: torch.dtype) -> VLM:
    """A model without memory: shapes and names only."""
    with torch.device("meta"):
        return VLM(config).to(dtype)


def find_folder(folder: Path) -> Path:
    """`folder`, put back from its `.old` if a crash came between the two renames of `replace_folder`."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    return folder


def fresh_folder(folder: Path) -> Path:
    """An empty `<folder>.new` to write into; `replace_folder` gives it the name when it is whole."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def replace_folder(folder: Path) -> None:
    """Put `<folder>.new` in the place of `folder`, so that a crash at any moment leaves a whole one."""
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


def save_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], config: Config, dtype: torch.dtype) -> None:
    """Write config.json and the weights, in shards beyond 5 GB. `tensors` are (our name, full tensor) pairs."""
    shards: list[dict[str, Tensor]] = [{}]
    total = size = 0
    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype)
        if name == "visual.patch_embed.weight":  # back into the convolution's form
            vision = config.vision
            tensor = tensor.view(-1, 3, vision.frames, vision.patch, vision.patch)
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][stored_name(name)] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(saved_config(config, dtype), indent=2) + "\n")


def saved_config(config: Config, dtype: torch.dtype) -> dict:
    """The checkpoint's own config.json with what may have changed: the vocabulary's rows and the dtype."""
    raw = json.loads(json.dumps(config.raw))
    (raw.get("text_config") or raw)["vocab_size"] = config.vocabulary
    raw.pop("dtype", None)
    return raw | {"torch_dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": config.tied}


def stored_dtype(config: Config) -> torch.dtype:
    """The dtype that the checkpoint's config.json names, float32 if none."""
    text = config.raw.get("text_config") or {}
    name = config.raw.get("torch_dtype") or config.raw.get("dtype") or text.get("torch_dtype") or "float32"
    return getattr(torch, name)
