"""A saved model: its weights, and what it says of itself to other tools.

A model whose config.json says bfloat16 is saved in it, though it was trained in float32:
2^-9 of a weight is rounded away, and with a learning rate of 2e-6 that is what thousands
of steps may move it. So stage 2 begins from rounded weights. A "dtype" of float32 in the
config.json of the model that stage 1 starts from keeps all, in twice the bytes.

If a model said nothing of itself, other tools would open a bidirectional one as a causal
one, and compute other vectors. So beside the weights, in files of 5 GB with an index, lie

    config.json          nested, as transformers from 4.52 on reads it: text_config says
                         `is_causal`, which from 5.4 on it obeys
    modules.json, ...    the steps by which sentence-transformers 6 comes to our vectors
    tokenizer_config.json, generation_config.json, chat template, ...
                         the starting checkpoint's own, with the mask token added

Left out: the flat config.json that transformers before 4.52 needs. Neither it nor those
versions know of bidirectional attention.
"""

import copy
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nano_moca.batch import MARK
from nano_moca.config import Config
from nano_moca.distributed import World
from nano_moca.files import (fresh_folder, one_line, read_json, replace_folder, write_json,
                             writing)
from nano_moca.model import VLM
from nano_moca.processor import MASK, Processor
from nano_moca.weights import KERNEL, stored_dtype, stored_name, stored_part

SHARD_SIZE = "5GB"
# What stands at the top of config.json; all else is the decoder's.
TOP = ("architectures", "model_type", "vision_config", "nano_moca", "tie_word_embeddings",
       "image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id",
       "vision_end_token_id", "dtype", "torch_dtype", "transformers_version")
# What a starting checkpoint may have, and training does not change.
CARRIED = ("generation_config.json", "chat_template.json", "chat_template.jinja", "vocab.json",
           "merges.txt", "special_tokens_map.json", "added_tokens.json",
           "video_preprocessor_config.json")
# What a report of a run writes beside its model.
REPORT = ("scores.json", "loss.png", "reconstruction.png", "retrieval.png", "similarity.png")

# The text that sentence-transformers makes of an item with an image: the parts as they
# are, in their order, and nothing else (the checkpoint's own template writes a dialogue).
TEMPLATE = ("{% for message in messages %}{% if message.content is string %}{{ message.content }}"
            "{% else %}{% for part in message.content %}{% if part.type == 'image' %}" + MARK +
            "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}")
# The steps to a unit vector: hidden states, pooling, normalisation.
STEPS = (("", "sentence_transformers.base.modules.transformer.Transformer"),
         ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
         ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"))


def save_model(folder: Path, world: World, vlm: VLM, processor: Processor,
               trained_with: dict | None = None) -> None:
    """Write the folder that transformers and `nano_moca.load` read, with weights in the
    dtype of the original checkpoint.

    trained_with: {"attention": ..., "pooling": ..., "max_tokens": ...}, which
    `nano_moca.load` takes as its defaults; stage 1 has no pooling.
    """
    # All ranks gather the tensors, the main rank writes them: beside the old model, and
    # renamed when all is complete.
    fresh = fresh_folder(folder) if world.main else None
    tensors = {name: parameter.detach() for name, parameter in vlm.named_weights()}
    save_weights(fresh, tensors, vlm.config, trained_with)
    if world.main:
        with writing(folder):
            processor.save(fresh)
            write_companions(fresh, processor)

            # A report on the old model would be taken for one on this one.
            for name in REPORT:
                (folder.parent / name).unlink(missing_ok=True)
            replace_folder(folder)
        print(f"{one_line(folder)}: the model is saved", flush=True)
    world.wait()


def save_weights(folder: Path | None, tensors: dict[str, Tensor], config: Config,
                 trained_with: dict | None = None) -> None:
    """Write config.json, and the weights in the dtype that it names, shard by shard. All
    ranks call this, and one of them writes: it never holds more than a shard.

    folder: None on the ranks that do not write. tensors: by our names. trained_with:
    {"attention": ..., "pooling": ..., "max_tokens": ...}, written as "nano_moca" for
    `nano_moca.load`; None keeps what was there.
    """
    # Which tensors share a file follows from their sizes, without padding: so far nothing is
    # gathered.
    dtype = stored_dtype(config)
    ours = {stored_name(name, config): name for name in tensors}
    sizes = {}
    for stored, name in ours.items():
        shape = torch.empty(tensors[name].shape, dtype=dtype, device="meta")
        sizes[stored] = shape[stored_part(name, config)].clone()
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_SIZE)

    # One tensor at a time is complete, on the GPU, and one shard, in host memory. The copy
    # matters on a CPU too: what full_tensor returns may be a view of a longer tensor.
    kernel = stored_name(KERNEL, config)
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for stored in names:
            tensor = tensors[ours[stored]]
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if folder:
                part = tensor[stored_part(ours[stored], config)]
                shard[stored] = part.to("cpu", dtype, copy=True)
        if kernel in shard:
            shard[kernel] = shard[kernel].view(config.vision.kernel)  # a convolution's again
        if folder:
            with writing(folder / file):
                save_file(shard, folder / file, {"format": "pt"})

    # Where a reader finds which tensor.
    if not folder:
        return
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)

    # The checkpoint's own config.json, with what may have changed.
    raw = copy.deepcopy(config.raw)
    (raw.get("text_config") or raw)["vocab_size"] = config.vocabulary
    if trained_with is not None:
        raw["nano_moca"] = trained_with
    raw["tie_word_embeddings"] = config.tied
    write_json(folder / "config.json", raw)


def write_companions(folder: Path, processor: Processor) -> None:
    """Complete a folder that holds weights, config.json, and the processor's files.

    MocaError if the starting checkpoint's tokenizer_config.json is malformed.
    """
    raw = nested(read_json(folder / "config.json"), processor.config.rope_theta)
    write_json(folder / "config.json", raw)
    carry_over(folder, processor.source)
    describe_steps(folder, raw, processor.config.width)

    # safetensors lets only the owner read: give all files the rights of one of ours.
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def nested(raw: dict, rope_theta: float) -> dict:
    """The content of a config.json, flat or nested, in the nested form. rope_theta: the
    value in use, which the file may leave out."""
    text = {key: value for key, value in raw.items() if key not in TOP + ("text_config",)}
    text |= raw.get("text_config") or {}

    # Stage 1 and 2 write what they trained; else it is as the starting checkpoint said.
    if "nano_moca" in raw:
        text["is_causal"] = raw["nano_moca"].get("attention") == "causal"

    # Newer and older readers look for these two in other places.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    text = {"rope_scaling": rope, "rope_theta": rope_theta} | text
    text["tie_word_embeddings"] = raw["tie_word_embeddings"]
    text["model_type"] = f"{raw['model_type']}_text"
    return {key: raw[key] for key in TOP if key in raw} | {"text_config": text}


def carry_over(folder: Path, source: str) -> None:
    """Copy what the starting checkpoint has beside its tokenizer.json, and name the
    mask token in tokenizer_config.json, so that others read the same ids as we do.

    source: that tokenizer.json; "" for a tokenizer that came from no file.
    """
    start = Path(source).parent
    for name in CARRIED:
        if source and (start / name).is_file():
            shutil.copyfile(start / name, folder / name)

    # The added tokens, the mask token among them, in the form of tokenizer_config.json.
    decoder = {}
    for token in read_json(folder / "tokenizer.json")["added_tokens"]:
        decoder[str(token.pop("id"))] = token

    # The nano base, for one, has no such file: say what ends and what pads a text.
    path = start / "tokenizer_config.json"
    settings = read_json(path) if source and path.is_file() else {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>"}
    settings |= {"mask_token": MASK, "added_tokens_decoder": decoder}
    write_json(folder / path.name, settings)


def describe_steps(folder: Path, raw: dict, width: int) -> None:
    """How sentence-transformers comes to our vectors [N, D].

    raw: config.json's content, nested. width: D.
    """
    # After stage 1 there is no pooling yet: it gets the usual one.
    trained = raw.get("nano_moca", {})
    causal = raw["text_config"].get("is_causal", True)
    pooling = trained.get("pooling") or ("last" if causal else "mean")

    # Texts are shortened and images resized (by PIL) as in training.
    run = {"method": "forward", "method_output_name": "last_hidden_state"}
    write_json(folder / "sentence_bert_config.json", {
        "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
        "modality_config": {"text": run, "image": run, "message": run | {"format": "structured"}},
        "processing_kwargs": {"chat_template": {"chat_template": TEMPLATE},
                              "text": {"max_length": trained.get("max_tokens")}},
        "processor_kwargs": {"use_fast": False}})
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {
        "embedding_dimension": width, "pooling_mode": {"last": "lasttoken"}.get(pooling, pooling)})

    # All three steps, in their order.
    modules = [{"idx": number, "name": str(number), "path": path, "type": kind}
               for number, (path, kind) in enumerate(STEPS)]
    write_json(folder / "modules.json", modules)
