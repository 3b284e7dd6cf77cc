"""What a saved model says of itself to other tools.

If it said nothing, they would open a bidirectional model as a causal one, and compute
other vectors. So beside the weights lie

    config.json          nested, as transformers from 4.52 on reads it: text_config says
                         `is_causal`, which from 5.4 on it obeys
    modules.json, ...    the steps by which sentence-transformers 6 comes to our vectors
    tokenizer_config.json, generation_config.json, chat template, ...
                         the starting checkpoint's own, with the mask token added

Left out: the flat config.json that transformers before 4.52 needs. Neither it nor those
versions know of bidirectional attention.
"""

import shutil
from pathlib import Path

from nano_moca.batch import MARK
from nano_moca.files import read_json, write_json
from nano_moca.processor import MASK, Processor

# What stands at the top of config.json; all else is the decoder's.
TOP = ("architectures", "model_type", "vision_config", "nano_moca", "tie_word_embeddings",
       "image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id",
       "vision_end_token_id", "dtype", "torch_dtype", "transformers_version")
# What a starting checkpoint may have, and training does not change.
CARRIED = ("generation_config.json", "chat_template.json", "chat_template.jinja", "vocab.json",
           "merges.txt", "special_tokens_map.json", "added_tokens.json",
           "video_preprocessor_config.json")

# The text that sentence-transformers makes of an item with an image: the parts as they
# are, in their order, and nothing else (the checkpoint's own template writes a dialogue).
TEMPLATE = ("{% for message in messages %}{% if message.content is string %}{{ message.content }}"
            "{% else %}{% for part in message.content %}{% if part.type == 'image' %}" + MARK +
            "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}")
# The steps to a unit vector: hidden states, pooling, normalisation.
STEPS = (("", "sentence_transformers.base.modules.transformer.Transformer"),
         ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
         ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"))


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
