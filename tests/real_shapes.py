"""Qwen2.5-VL-3B's true shapes with random weights: how much memory and time does loading take?

    python tests/real_shapes.py FOLDER        (needs 8 GB of disk there and 12 GB of memory)

Not part of the test suite. Writes bfloat16 weights into FOLDER, once as one file and once in shards
of 5 GB, loads each in a process of its own, embeds one image of 1024 patches with a few words, and
prints seconds and peak memory as a multiple of the weights' size.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

import nano_moca
from nano_moca import weights
from nano_moca.config import BASE
from nano_moca.convert import export
from nano_moca.convert.configs import parse_config


def config_3b() -> dict:
    """config.json of Qwen2.5-VL-3B-Instruct, with the nano tokenizer's special ids."""
    nano = json.loads((BASE / "config.json").read_text())
    vision = nano["vision_config"] | dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048,
        window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    return nano | dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, rope_theta=1e6, torch_dtype="bfloat16",
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, vision_config=vision)


def write(folder: Path, shard_size: str) -> int:
    """Random weights and the nano tokenizer. Returns the weights' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = parse_config(config_3b())
    tensors = {}
    for name, parameter in weights.empty_model(config).named_parameters():
        tensors[name] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02)
        if parameter.dim() == 1 and "norm" in name:
            tensors[name].fill_(1.0)
    export.SHARD_SIZE = shard_size
    export.save_weights(folder, tensors, config)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(BASE / name, folder / name)
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_kb() -> int:
    """This process's peak memory. (getrusage would count the parent's, from before the exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def use(folder: Path) -> None:
    """Load, embed, and print what it took (runs in a process of its own)."""
    before = peak_kb()
    began = time.perf_counter()
    moca = nano_moca.load(folder, "cpu", torch.bfloat16)
    loaded = time.perf_counter()
    load_peak = peak_kb()
    image = Image.effect_noise((448, 448), 64)  # 32 x 32 patches of 14 pixels
    item = {"text": nano_moca.MARK + "Represent the given document image.", "images": [image]}
    assert len(moca.processor.encode(nano_moca.as_records([item])[0]).tokens) > 256
    vector = moca.embed([item])
    done = time.perf_counter()
    assert vector.shape == (1, 2048) and abs(float(vector.norm()) - 1) < 1e-3
    peak = peak_kb()
    print(json.dumps({"load_s": loaded - began, "embed_s": done - loaded, "imports_kb": before,
                      "load_peak_kb": load_peak, "peak_kb": peak}))


def main(folder: Path) -> None:
    """Both layouts, one after the other."""
    for layout, shard_size in (("one file", "100GB"), ("shards", "5GB")):
        size = write(folder / "model", shard_size)
        files = len(list((folder / "model").glob("*.safetensors")))
        run = subprocess.run([sys.executable, __file__, "--use", str(folder / "model")],
                             capture_output=True, text=True, check=True)
        took = json.loads(run.stdout)
        print(f"{layout} ({files}): {size / 1e9:.2f} GB; loading {took['load_s']:.0f} s, "
              f"peak {took['load_peak_kb'] * 1024 / size:.2f} x their size (of which imports "
              f"{took['imports_kb'] * 1024 / size:.2f}); embedding a 1024-patch image "
              f"{took['embed_s']:.0f} s, peak {took['peak_kb'] * 1024 / size:.2f} x", flush=True)
        shutil.rmtree(folder / "model")


if __name__ == "__main__":
    if sys.argv[1] == "--use":
        use(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
