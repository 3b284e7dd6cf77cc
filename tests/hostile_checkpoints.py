"""Hostile and unlucky inputs to all that is read as a checkpoint or an image, tried by hand.

    python tests/hostile_checkpoints.py [WORD ...]     only kinds or names that hold a word

Each input runs in a fork of its own, with limits of time and memory. Right is: it works as the
docs say, with finite unit vectors; or one MocaError of one line that says the expected words;
and nothing else is printed. A table of kinds is printed, and what went wrong before it.

These are other inputs than the tests', of the same kinds; what was wrong here has got a test.
"""

import io
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nano_moca
from nano_moca import MARK, MocaError, Record
from nano_moca.convert import export
from nano_moca.families import build_model

GOLDEN = ROOT / "tests" / "golden"
SECONDS, MEGABYTES = 20, 600  # of one input; a text of millions of characters may take more
Run = Callable[[Path], object]
CASES: list[tuple[str, str, str, Run, tuple[str, ...]]] = []  # kind, name, right, run, words

torch.set_num_threads(1)


def works(kind: str, name: str, run: Run) -> None:
    CASES.append((kind, name, "works", run, ()))


def refused(kind: str, name: str, run: Run, *words: str) -> None:
    CASES.append((kind, name, "refused", run, words))


def either(kind: str, name: str, run: Run, *words: str) -> None:
    """It may work or be refused, but nothing else."""
    CASES.append((kind, name, "either", run, words))


# ---- one input in a fork of its own


def outcome(run: Run, seconds: int) -> tuple[str, str, float, float]:
    """What came of it, what was said, seconds, and megabytes beyond what there was before."""
    with tempfile.TemporaryDirectory() as scratch:
        receive, send = os.pipe()
        printed = Path(scratch, "printed")
        begun = time.time()
        child = os.fork()
        if not child:
            os.close(receive)
            os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY), 1)
            os.dup2(1, 2)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (size + 8 * 2**30,) * 2)
            Path(scratch, "files").mkdir()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    run(Path(scratch, "files"))
                said = ("works", "")
            except MocaError as error:
                said = ("refused", str(error))
            except BaseException as error:
                said = ("traceback", f"{type(error).__name__}: {error}"[:300])
            sys.stdout.flush()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(send, pickle.dumps((*said, (after - before) / 1024))[:60_000])
            os._exit(0)
        os.close(send)
        ready, _, _ = select.select([receive], [], [], seconds)
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = os.read(receive, 70_000) if ready else b""
        os.close(receive)
        took = time.time() - begun
        if not content:
            return "hangs" if not ready else "dies", "", took, 0
        try:
            what, said, memory = pickle.loads(content)
        except Exception:
            return "refused", "a line without end", took, 0
        if printed.stat().st_size:
            return "prints", printed.read_text(errors="replace")[:300], took, memory
        return what, said, took, memory


def judge(kind: str, right: str, words: tuple[str, ...], what: str, said: str, memory: float
          ) -> str:
    """Why it is wrong; nothing if it is right."""
    if what not in ("works", "refused") or (right != "either" and what != right):
        return f"{what}, not {right}"
    if memory > (4000 if kind == "long text" else MEGABYTES):
        return f"{memory:.0f} MB"
    if what == "refused" and ("\n" in said or len(said) > 6000 or not said.isprintable()):
        return f"{len(said)} characters, or more than a line"
    if what == "refused" and not all(word in said for word in words):
        return f"does not say {words}"
    return ""


# ---- checkpoints


def make_qwen3(folder: Path) -> Path:
    """A tiny Qwen3-VL, with the golden tokenizer."""
    raw = {
        "model_type": "qwen3_vl", "tie_word_embeddings": True, "image_token_id": 612,
        "video_token_id": 613, "vision_start_token_id": 609, "vision_end_token_id": 610,
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": 704, "hidden_size": 32, "head_dim": 16,
            "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
                "mrope_interleaved": True}},
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
            "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2]}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = nano_moca.families.load_config(folder)
    model = build_model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in name))
    export.save_weights(folder, model.state_dict(), config)
    shutil.copy(GOLDEN / "qwen2.5-vl" / "tokenizer.json", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 4096,
        "max_pixels": 40960}))
    return folder


HOME = Path(tempfile.mkdtemp())
SOURCES = {"2": GOLDEN / "qwen2-vl", "2.5": GOLDEN / "qwen2.5-vl",
           "flat": GOLDEN / "qwen2.5-vl-untied", "3": make_qwen3(HOME / "qwen3")}


def use(moca: nano_moca.Moca) -> torch.Tensor:
    """Vectors of a text and of a picture; an AssertionError if they are none."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 90, 3), np.uint8)
    vectors = moca.embed(["a text", {"text": f"{MARK} a picture", "images": [pixels]}])
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-3), "no unit vectors"
    return vectors


EXPECTED = {name: use(nano_moca.load(source, "cpu")) for name, source in SOURCES.items()}


def loading(source: str, change: Callable[[Path], None], same: bool = True, **given: object) -> Run:
    """Load a changed copy and use it; its vectors are as before if `same`."""
    def run(folder: Path) -> None:
        copy = Path(shutil.copytree(SOURCES[source], folder / "model"))
        copy = change(copy) or copy
        vectors = use(nano_moca.load(copy, "cpu", **given))
        assert not same or torch.allclose(vectors, EXPECTED[source], atol=1e-5), "other vectors"

    return run


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change a JSON file."""
    def run(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content = change(content) or content
        (folder / name).write_text(json.dumps(content))

    return run


def put(name: str, content: bytes) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return run


def instead(name: str, how: str) -> Callable[[Path], None]:
    """Something else than a file."""
    def run(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how == "loop":
            path.symlink_to(path.name)
        elif how == "two loops":
            path.symlink_to("other")
            (folder / "other").symlink_to(path.name)
        elif how == "socket":
            os.mknod(path, 0o140600)
        elif how == "sparse":
            with open(path, "wb") as file:
                file.truncate(40 * 2**30)
        else:
            path.symlink_to(how)

    return run


def at(raw: dict, place: str) -> dict:
    for key in filter(None, place.split(".")):
        raw = raw.setdefault(key, {})
    return raw


# ---- kinds: config.json

ODD = [None, True, "64", "", [], {}, [64], -64, 0, 10**9, 2.0**40, 0.5, float("nan"),
       float("-inf"), 10**400 // 7**400, "٣", "ab" * 10**5, {"a": [[{}]] * 9}]


def config_values() -> Iterator[tuple[str, str, str, object]]:
    """source, place, key, value: each refused."""
    dice = random.Random(5)
    counts = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
              "intermediate_size"]
    for source in SOURCES:
        text = "" if source == "flat" else "text_config"
        for key in counts:
            yield source, text, key, dice.choice(ODD)
        tower = ["depth", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size"]
        tower += {"2": ["embed_dim", "mlp_ratio"], "3": ["num_position_embeddings"]}.get(
            source, ["window_size", "out_hidden_size"])
        for key in tower:
            yield source, "vision_config", key, dice.choice(ODD)
        yield source, text, "rms_norm_eps", dice.choice([0, -1e-6, "1e-06", None, [], 1, 1e-300])
        yield source, text, "hidden_act", dice.choice(["SiLU", " silu", ["silu"], 0, "swish"])
        yield source, "", "tie_word_embeddings", dice.choice(["True", 1, 0.0, [], {}, "no"])
        yield source, text, "torch_dtype", dice.choice(["int4", "torch.float32", 32, [], False])
        yield source, text, "dtype", dice.choice(["fp16", {}, 0])
        for rope in ("", 0, False, [], "mrope", ["default"], 3.5):
            if dice.random() < 0.5:
                yield source, text, "rope_scaling", rope
        yield source, "vision_config", "hidden_act", dice.choice(["relu", None, []])
        yield source, "", "vision_config", dice.choice([[], 0, "", False, "vision"])
        yield source, "", "nano_moca", dice.choice([[], 0, "", False, "mean"])
    for source in ("2", "2.5", "3"):
        yield source, "", "text_config", dice.choice([[], "", False, 0, "text"])
        yield source, "text_config.rope_parameters", "rope_theta", dice.choice([
            "1e4", 0, -1, None, [1e4], 1e300, True])
        yield source, "text_config.rope_parameters", "mrope_section", dice.choice([
            [8], [8, 0], [9, 0, -1], [2.0, 3.0, 3.0], ["2", "3", "3"], {"0": 2}, [[2, 3, 3]]])
        yield source, "text_config.rope_parameters", "rope_type", dice.choice([
            "llama3", "dynamic", None, [], 1])
    yield "2.5", "text_config", "head_dim", 32
    yield "2", "text_config", "head_dim", "16"
    yield "flat", "", "head_dim", 8
    yield "2.5", "text_config", "use_sliding_window", 1
    yield "2.5", "text_config", "num_key_value_heads", [2]
    yield "2.5", "text_config", "layer_types", ["full_attention"] * 3
    yield "2.5", "vision_config", "fullatt_block_indexes", [0, 1, 4]
    yield "2.5", "vision_config", "fullatt_block_indexes", [1, float("nan")]
    yield "2.5", "vision_config", "fullatt_block_indexes", "13"
    yield "3", "vision_config", "deepstack_visual_indexes", [2, 0]
    yield "3", "vision_config", "deepstack_visual_indexes", [0, 0.0]
    yield "3", "text_config", "num_key_value_heads", 3
    yield "3", "text_config", "head_dim", 15
    yield "3", "text_config", "model_type", "qwen3_vl_moe_text"
    yield "2", "", "model_type", "Qwen2_VL"
    yield "2", "", "model_type", {"qwen2_vl": 1}
    yield "2.5", "vision_config", "in_channels", 4
    yield "3", "vision_config", "in_channels", 1
    yield "2", "", "nano_moca", None
    yield "2.5", "nano_moca", "attention", ["causal"]
    yield "2.5", "nano_moca", "attention", ""
    yield "2.5", "nano_moca", "pooling", {"mean": 1}
    yield "2.5", "nano_moca", "pooling", False
    yield "2.5", "nano_moca", "pooling", []
    yield "2.5", "nano_moca", "max_tokens", 1e3
    yield "2.5", "nano_moca", "max_tokens", False


for source, place, key, value in config_values():
    def change(raw: dict, place: str = place, key: str = key, value: object = value) -> None:
        at(raw, place)[key] = value

    shown = f"{source}: {place}.{key} = {value!r}"[:90]
    refused("config value", shown, loading(source, edit("config.json", change)),
            "model", key if key != "in_channels" else "")

for name, change in {
        "eps as whole part of a file": lambda raw: raw["text_config"].update(rms_norm_eps=1e-6),
        "theta as a whole number": lambda raw: at(raw, "text_config.rope_parameters").update(
            rope_theta=10000),
        "unknown keys, one of them unicode": lambda raw: raw.update({"ключ\ud800": [1], "x": {}}),
        "null where nothing is said": lambda raw: raw["text_config"].update(
            layer_types=None, rope_scaling=None, use_sliding_window=None),
        "rope_scaling empty": lambda raw: raw["text_config"].update(rope_scaling={}),
        "head_dim as it is": lambda raw: raw["text_config"].update(head_dim=16),
        "architectures nonsense": lambda raw: raw.update(architectures=7, auto_map="x.py"),
        "in_channels": lambda raw: raw["vision_config"].update(in_channels=3),
        "nano_moca empty": lambda raw: raw.update(nano_moca={})}.items():
    works("config value", name, loading("2.5", edit("config.json", change)))

GOOD = (SOURCES["2.5"] / "config.json").read_text()
LARGE = {"num_hidden_layers": 1000, "num_attention_heads": 10**4, "intermediate_size": 10**6}


def largest(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= LARGE | {
        "hidden_size": 10**5, "vocab_size": 10**8, "num_key_value_heads": 10**4,
        "layer_types": None, "rope_parameters": {"mrope_section": [1, 2, 2]}}
    raw["vision_config"] |= {
        "depth": 1000, "hidden_size": 96000, "out_hidden_size": 10**5, "patch_size": 1000,
        "temporal_patch_size": 16, "spatial_merge_size": 16, "window_size": 16000}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"patch_size": 1000, "temporal_patch_size": 16, "merge_size": 16}))


refused("config value", "the largest that may be", loading("2.5", largest), "do not fit")
refused("config value", "a list of a million blocks", loading("2.5", edit(
    "config.json", lambda raw: raw["vision_config"].update(
        fullatt_block_indexes=[1] * 10**6 + [True]))), "fullatt_block_indexes")

for name, content in {
        "nothing": b"", "spaces": b" \n" * 999, "UTF-16": GOOD.encode("utf-16"),
        "UTF-32": GOOD.encode("utf-32"), "Latin-1": '{"a": "é"}'.encode("latin-1"),
        "two objects": (GOOD + GOOD).encode(), "a comment": f"// x\n{GOOD}".encode(),
        "a comma": GOOD.rstrip()[:-1].encode() + b",}", "true": b"true", "a text": b'"qwen2_vl"',
        "single quotes": GOOD.replace('"', "'").encode(), "a pickle": pickle.dumps({"a": 1}),
        "gzip": zlib.compress(GOOD.encode()), "cut": GOOD.encode()[:-2],
        "deep objects": b'{"vision_config":' * 30_000, "digits": b'{"a": -%s}' % (b"7" * 9999),
        "a list of pairs": b'[["model_type", "qwen2_vl"]]'}.items():
    refused("config file", name, loading("2.5", put("config.json", content)), "config.json")
either("config file", "byte order mark", loading(
    "2.5", put("config.json", GOOD.encode("utf-8-sig"))), "config.json")
works("config file", "a key twice, the last counts", loading("2.5", put(
    "config.json", GOOD.replace('"vocab_size"', '"vocab_size": 5, "vocab_size"').encode())))
works("config file", "a link", loading("2.5", lambda folder: [
    (folder / "config.json").rename(folder / "c"),
    (folder / "config.json").symlink_to("c")][:0] or None))
for how in ("pipe", "folder", "loop", "two loops", "socket", "/dev/zero", "/dev/tty", "sparse",
            "/proc/kcore", "/proc/self", "nowhere", "/etc/passwd"):
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json",
                 "processor_config.json", "model.safetensors", "model.safetensors.index.json"):
        refused("no ordinary file", f"{name} as {how}", loading("2.5", instead(name, how)),
                name.replace("pre", ""))

# ---- kinds: weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, KERNEL = "model.norm.weight", "visual.patch_embed.proj.weight"
INDEX = "model.safetensors.index.json"


def reweigh(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return run


def shards(change: Callable[[Path, dict], object], count: int = 3) -> Callable[[Path], None]:
    """Cut the weights in files and change these or the index."""
    def run(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, weight_map = sorted(tensors), {}
        for number in range(count):
            part = names[number::count]
            save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
            weight_map |= dict.fromkeys(part, f"{number}.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        index = change(folder, index) or index
        (folder / INDEX).write_text(json.dumps(index))

    return run


def spoil(name: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[name] = tensors[name].to(dtype).clone()
        tensors[name].view(-1)[len(tensors[name].view(-1)) // 2] = value

    return change


BIAS = "model.layers.2.self_attn.k_proj.bias"
for source in SOURCES:
    prefix = "model.language_model." if source == "3" else "model."
    norm = f"{prefix}norm.weight"
    for name, change, word in (
            ("NaN in a norm", spoil(norm, float("nan")), norm),
            ("infinity in bfloat16", spoil(norm, float("inf"), torch.bfloat16), norm),
            ("a norm of int16", lambda t, n=norm: t.update({n: t[n].short()}), "I16"),
            ("a norm of two rows", lambda t, n=norm: t.update({n: t[n].expand(2, -1)}), norm),
            ("a norm without values", lambda t, n=norm: t.update({n: t[n][:0]}), norm),
            ("a norm of no dimension", lambda t, n=norm: t.update({n: t[n][0]}), norm),
            ("no norm", lambda t, n=norm: t.pop(n), norm),
            ("another layer", lambda t, p=prefix: t.update(
                {f"{p}layers.50.mlp.up_proj.weight": torch.zeros(3)}), "layers.50")):
        refused("weights", f"{source}: {name}", loading(source, reweigh(change)), word)
    tower = "model.visual." if source == "3" else "visual."
    kernel = f"{tower}patch_embed.proj.weight"
    for name, change in {
            "of other axes": lambda t, n=kernel: t.update({n: t[n].permute(0, 2, 3, 4, 1)}),
            "flat": lambda t, n=kernel: t.update({n: t[n].flatten(1)}),
            "of no dimension": lambda t, n=kernel: t.update({n: torch.tensor(1.0)}),
            "of one dimension": lambda t, n=kernel: t.update({n: t[n].flatten()}),
            "of frames before channels": lambda t, n=kernel: t.update({n: t[n].transpose(1, 2)})
            }.items():
        refused("weights", f"{source}: a kernel {name}", loading(source, reweigh(change)), kernel)

for dtype in (torch.uint8, torch.int64, torch.uint64, torch.float8_e5m2fnuz, torch.complex64,
              torch.float8_e8m0fnu):
    refused("weights", f"all of {dtype}", loading("2", reweigh(lambda t, d=dtype: t.update(
        {name: tensor.abs().to(d) for name, tensor in t.items()}))), "model.safetensors")
for name, run, words in (
        ("float16 that overflows in float32", spoil(EMBEDDING, 1e39, torch.float64), EMBEDDING),
        ("both names of a tower", lambda t: t.update({
            f"model.{n}": v.clone() for n, v in list(t.items()) if n.startswith("visual.")}),
         "are one"),
        ("a patch embedding twice", lambda t: t.update({
            KERNEL.replace(".proj", ""): t[KERNEL].flatten(1).clone()}), "patch_embed"),
        ("a head that is not the embedding", lambda t: t.update({HEAD: t[EMBEDDING] * 1.01}),
         "lm_head"),
        ("a head of other rows", lambda t: t.update({HEAD: t[EMBEDDING][:-1] + 0}), "lm_head"),
        ("a head with NaN", lambda t: t.update({HEAD: t[EMBEDDING] * float("nan")}), "lm_head"),
        ("a name of a megabyte", lambda t: t.update({"x" * 10**6: t[NORM] + 0}), "unexpected"),
        ("a name with a line end", lambda t: t.update({"x\nall is well": t[NORM] + 0}), "unexp"),
        ("GPTQ's tensors", lambda t: t.update({
            "model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 14, dtype=torch.int32)}), "qwei"),
        ("LoRA's tensors", lambda t: t.update({
            "base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(8, 64)}), "lora_A")):
    refused("weights", name, loading("2.5", reweigh(run)), words)

huge = 1e37
refused("weights", "finite, but their products are not", loading("2.5", reweigh(
    lambda t: t.update({n: v * huge for n, v in t.items() if "proj" in n}))), "")
refused("weights", "of zeros only", loading("2.5", reweigh(
    lambda t: t.update({n: v * 0 for n, v in t.items()}))), "")
refused("weights", "beyond float16, loaded in it", loading(
    "2.5", reweigh(spoil("model.layers.1.mlp.up_proj.weight", 70_000)), same=False,
    dtype=torch.float16), "")
for name, change in {
        "an equal head": lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
        "mae tensors with NaN": lambda t: t.update({"mae_x": torch.full((2,), float("nan"))}),
        "without mae, in float64": lambda t: t.update({n: v.double() for n, v in t.items()}),
        "named as in AutoModel": lambda t: [t.update({n.replace("model.", "language_model."): v
            for n, v in t.items() if n.startswith("model.")}),
            [t.pop(n) for n in list(t) if n.startswith("model.")]]}.items():
    works("weights", name, loading("2.5", reweigh(change)))
EXTRA = {"score.weight": torch.full((2, 64), float("nan")), "a.b": torch.zeros(3).char(),
         "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
refused("weights", "extra tensors", loading("2.5", reweigh(lambda t: t.update(EXTRA))),
        "--allow-extra")
works("weights", "extra tensors, allowed", loading(
    "2.5", reweigh(lambda t: t.update(EXTRA)), allow_extra=True))
refused("weights", "extra and missing, allowed", loading(
    "2.5", reweigh(lambda t: t.update(x=t.pop(NORM))), allow_extra=True), NORM)
refused("weights", "a differing head, extra allowed", loading(
    "2.5", reweigh(lambda t: t.update({HEAD: t[EMBEDDING] + 1})), allow_extra=True), "lm_head")
works("weights", "many extra tensors, allowed", loading("2.5", reweigh(lambda t: t.update(
    {f"x{i}": torch.zeros(1) for i in range(50_000)})), allow_extra=True))
refused("weights", "many extra tensors", loading("2.5", reweigh(lambda t: t.update(
    {f"x{i}": torch.zeros(1) for i in range(50_000)}))), "49996 more")


def forge(header: object, data: bytes = b"", length: int | None = None) -> Callable:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(header) if length is None else length
    return put("model.safetensors", struct.pack("<Q", size) + header + data)


def sparse_header(folder: Path) -> None:
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 10 * 2**30) + b'{"')
        file.truncate(11 * 2**30)


def entry(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WEIGHTS = (SOURCES["2.5"] / "model.safetensors").read_bytes()
refused("header", "10 GB long", loading("2.5", sparse_header), "model.safetensors")
for name, change in {
        "negative offsets": forge({NORM: entry([4], [-16, 0])}, bytes(16)),
        "offsets that run back": forge({NORM: entry([4], [16, 0])}, bytes(16)),
        "a gap": forge({NORM: entry([4], [0, 16]), "b": entry([4], [20, 36])}, bytes(40)),
        "the same bytes twice": forge({NORM: entry([4], [0, 16]), "b": entry([4], [0, 16])},
                                      bytes(16)),
        "a fraction as shape": forge({NORM: entry([4.5], [0, 16])}, bytes(16)),
        "a shape that overflows": forge({NORM: entry([2**33, 2**33, 0], [0, 0])}),
        "no shape": forge({NORM: {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
        "dtype as number": forge({NORM: entry([4], [0, 16], 5)}, bytes(16)),
        "a name twice": forge(b'{"a":%s,"a":%s}' % ((json.dumps(
            entry([4], [0, 16])).encode(),) * 2), bytes(16)),
        "a list": forge([1, 2]), "deep": forge(b'{"a":' * 9000), "no header": forge(b"", b"", 0),
        "metadata of numbers": forge({"__metadata__": {"a": 1}}),
        "Latin-1": forge('{"é": 1}'.encode("latin-1")),
        "a byte": put("model.safetensors", b"\x01"), "nothing": put("model.safetensors", b""),
        "half": put("model.safetensors", WEIGHTS[:len(WEIGHTS) // 2]),
        "a byte too many": put("model.safetensors", WEIGHTS + b"\0"),
        "a pickle": put("model.safetensors", pickle.dumps(list(range(999)))),
        "a zip": put("model.safetensors", b"PK\x03\x04" + bytes(500)),
        "an LFS pointer": put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"
                              b"oid sha256:4d7a\nsize 7\n")}.items():
    refused("header", name, loading("2.5", change), "model")


def fuzz_header(seed: int) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        dice, content = random.Random(seed), bytearray(WEIGHTS)
        for _ in range(dice.randint(1, 5)):
            content[dice.randrange(9, 4000)] = dice.randrange(256)
        (folder / "model.safetensors").write_bytes(content)

    return run


for seed in range(6):
    either("header", f"bytes changed, {seed}", loading("2.5", fuzz_header(seed)), "model")

for name, change, words in (
        ("one level up", lambda f, i: i["weight_map"].update({NORM: "../0.safetensors"}), "outs"),
        ("up and in again", lambda f, i: i["weight_map"].update(
            {NORM: "../model/0.safetensors"}), "outside"),
        ("absolute, in the folder", lambda f, i: i["weight_map"].update(
            {NORM: str(f / "0.safetensors")}), "outside"),
        ("two slashes", lambda f, i: i["weight_map"].update({NORM: "//etc/passwd"}), "outside"),
        ("a URL", lambda f, i: i["weight_map"].update(
            {NORM: "https://example.com/0.safetensors"}), "0.safetensors"),
        ("a file URL", lambda f, i: i["weight_map"].update({NORM: "file:///etc/passwd"}), "passw"),
        ("backslashes", lambda f, i: i["weight_map"].update({NORM: "..\\0.safetensors"}), "..\\"),
        ("a drive", lambda f, i: i["weight_map"].update({NORM: "C:\\0.safetensors"}), "C:"),
        ("home", lambda f, i: i["weight_map"].update({NORM: "~/0.safetensors"}), "~"),
        ("a surrogate", lambda f, i: i["weight_map"].update({NORM: "\ud800"}), INDEX[:5]),
        ("a megabyte", lambda f, i: i["weight_map"].update({NORM: "a/" * 500_000}), "model"),
        ("a number", lambda f, i: i["weight_map"].update({NORM: 7}), "model"),
        ("a list of shards", lambda f, i: i["weight_map"].update({NORM: ["0.safetensors"]}), "mo"),
        ("the same file in two spellings", lambda f, i: i["weight_map"].update(
            {NORM: "./0.safetensors"}), "are one"),
        ("pickled shards", lambda f, i: [(f / "x.bin").write_bytes(pickle.dumps(1)),
                                         i["weight_map"].update({NORM: "x.bin"})][:0], "x.bin"),
        ("config.json as a shard", lambda f, i: i["weight_map"].update({NORM: "config.json"}),
         "config.json"),
        ("a shard that is not there", lambda f, i: (f / "1.safetensors").unlink(), "1.safetens"),
        ("a shard cut short", lambda f, i: os.truncate(f / "2.safetensors", 99_999), "2.safete"),
        ("a shard of zero bytes", lambda f, i: os.truncate(f / "0.safetensors", 0), "0.safetens"),
        ("NaN in the last shard", lambda f, i: save_file({
            n: t * float("nan") for n, t in load_file(f / "2.safetensors").items()},
            f / "2.safetensors"), "2.safetensors"),
        ("a shard twice", lambda f, i: [shutil.copy(f / "0.safetensors", f / "4.safetensors"),
                                        i["weight_map"].update(x="4.safetensors")][:0], "are one"),
        ("two sets", lambda f, i: [shutil.copy(SOURCES["2.5"] / "model.safetensors", f)][:0],
         "two sets"),
        ("an older set's link", lambda f, i: (f / "model.safetensors").symlink_to(
            "1.safetensors"), "two sets"),
        ("no weight_map", lambda f, i: {"metadata": {}}, INDEX),
        ("weight_map as list", lambda f, i: {"weight_map": list(i["weight_map"])}, INDEX),
        ("a shard left out", lambda f, i: {"weight_map": {
            n: s for n, s in i["weight_map"].items() if s[0] != "1"}}, "missing")):
    refused("shards", name, loading("2.5", shards(change)), words)
for name, change in {
        "in order": lambda f, i: None, "a link to outside": lambda f, i: [
            (f / "1.safetensors").rename(f.parent / "b"),
            (f / "1.safetensors").symlink_to(f.parent / "b")][:0],
        "an index of wrong places": lambda f, i: i["weight_map"].update(
            {n: f"{(int(s[0]) + 1) % 3}.safetensors" for n, s in i["weight_map"].items()}),
        "sizes that are wrong": lambda f, i: i.update(metadata={"total_size": -5}),
        "an index without metadata": lambda f, i: {"weight_map": i["weight_map"]},
        "other files beside": lambda f, i: [(f / "pytorch_model.bin").write_bytes(b"x"),
            (f / "adapter.safetensors").write_bytes(b"x")][:0]}.items():
    works("shards", name, loading("2.5", shards(change)))
refused("shards", "an index that is a dangling link, beside weights", loading(
    "2.5", instead(INDEX, "blobs/abc")), INDEX)

# ---- kinds: where the folder lies

for name in ("with space", "with\nline end", "percent %s {}", "ünïcødé", "-dash", "a" * 200,
             "#hash?query", "quote'\"s", "trailing."):
    works("folder", name, loading("2.5", lambda folder, n=name: folder.rename(
        folder.parent / n)))
    refused("folder", f"{name}: and broken", loading("2.5", lambda folder, n=name: [
        os.truncate(folder / "model.safetensors", 77), folder.rename(folder.parent / n)][1]),
        "model.safetensors")
for name, value in {"nothing": "", "spaces": "  ", "a long name": "x" * 300, "a dot": ".",
                    "a long path": "x/" * 3000, "zero byte": "a\0b", "a slash": "/", "None": None,
                    "a number": 7, "bytes": b"abc", "home": "~/nowhere", "a device": "/dev/null",
                    "a URL": "https://huggingface.co/Qwen/Qwen2-VL", "a surrogate": "\ud800"
                    }.items():
    refused("folder", f"load({name})", lambda _, v=value: nano_moca.load(v, "cpu"))
for name, given in {
        "attention": {"attention": "both"}, "attention of a list": {"attention": ["causal"]},
        "pooling": {"pooling": "cls"}, "pooling of a list": {"pooling": ["mean"]},
        "min_pixels nan": {"min_pixels": float("nan")}, "max_pixels 0": {"max_pixels": 0},
        "max_pixels text": {"max_pixels": "lots"}, "min over max": {"min_pixels": 10**7},
        "max_tokens 0": {"max_tokens": 0}, "max_tokens nan": {"max_tokens": float("nan")},
        "processor nowhere": {"processor": "./nowhere"}, "processor spaces": {"processor": " "},
        "processor without files": {"processor": "/etc"}}.items():
    refused("argument", name, lambda _, g=given: nano_moca.load(SOURCES["2.5"], "cpu", **g))
for device in ("gpu", "cuda:99", "CPU ", "tpu", "xyz:0", "cuda"):
    refused("argument", f"device {device}",
            lambda _, d=device: use(nano_moca.load(SOURCES["2.5"], d)), device.strip())
works("argument", "limits of one pixel", lambda _: use(
    nano_moca.load(SOURCES["2.5"], "cpu", min_pixels=1, max_pixels=1)))
works("argument", "another folder's processor", lambda _: use(
    nano_moca.load(SOURCES["2.5"], "cpu", processor=SOURCES["2"])))
refused("argument", "a processor of other patches", lambda _: use(
    nano_moca.load(SOURCES["2.5"], "cpu", processor=SOURCES["3"])), "patch_size")

# ---- kinds: the image processor's files

PRE, PRO = "preprocessor_config.json", "processor_config.json"
for key, values in {
        "do_resize": [0, None, "True", [True]], "do_rescale": ["yes", {}],
        "do_normalize": [False, [], 0.0], "do_convert_rgb": [None, ""],
        "resample": [0, "3", True, [3]], "rescale_factor": [1, 0.0, "1/255", True],
        "patch_size": [28, "14", [14, 14]], "merge_size": [4, 0], "temporal_patch_size": [1, None],
        "image_processor_type": ["Qwen3VLImageProcessor", 5, "", {}],
        "size": [0, "", False, [], 3136, "shortest_edge", {"shortest_edge": [56]},
                 {"longest_edge": -1}, {"size": {"longest_edge": 9}}, {"crop_size": 9},
                 {"height": 56, "width": 56}, {"do_resize": False}, {"x" * 10**5: 1}],
        "min_pixels": ["56", 10**400, 1e3, float("nan"), [1]], "max_pixels": [True, -5, 2.0**20],
        "image_mean": [0.5, "0.5", [0.5] * 4, [None] * 3, [float("inf")] * 3, [[0.5]] * 3, {},
                       [-1e-9, 0, 0], [1.001, 0, 0], list(range(10**5))],
        "image_std": [[0.0] * 3, [0.5, 0.5], [float("nan")] * 3, [255, 255, 255], []],
        "do_center_crop": [True, 1], "do_pad": [True, "constant"], "quality": [90],
        "fps": [2], "max_frames": [768], "x" * 10**6: [1], "line\nend": [{}], "": [1]}.items():
    for value in values:
        word = {"size": PRE}.get(key, key[:50].replace("\n", "\\n"))
        refused("processor file", f"{key[:30]} = {value!r}"[:80], loading(
            "2.5", edit(PRE, lambda raw, k=key, v=value: raw.update({k: v}))), word)
for name, content in {"nothing": b"", "a list": b"[]", "null": b"null", "cut": b'{"min_pixels": 3',
                      "UTF-16": "{}".encode("utf-16"), "deep": b"[" * 99_999}.items():
    refused("processor file", f"the file is {name}", loading("2.5", put(PRE, content)), PRE)
    refused("processor file", f"the newer file is {name}", loading("2.5", put(PRO, content)), PRO)
for value in ([], "x", 0, False, 7, ["min_pixels"]):
    refused("processor file", f"image_processor is {value!r}", loading("2.5", put(
        PRO, json.dumps({"image_processor": value}).encode())), PRO)
for key, value in {"unknown but off": False, "unknown but null": None, "crop_size": {"height": 9},
                   "processor_class": "X",  "size": {},
                   "min_pixels": None, "rescale_factor": 0.00392156862745098}.items():
    works("processor file", f"{key} = {value!r}", loading(
        "2.5", edit(PRE, lambda raw, k=key, v=value: raw.update({k: v}))))
works("processor file", "newer file without an image processor", loading(
    "2.5", put(PRO, b'{"processor_class": "X", "image_processor": null}')))

# ---- kinds: tokenizer.json

TOKENIZER = json.loads((SOURCES["2.5"] / "tokenizer.json").read_text())


def tokens(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return edit("tokenizer.json", change)


def without(name: str) -> Callable[[dict], None]:
    """Another name in its place, so that the others keep their ids."""
    return lambda raw: token(raw, name).update(content="<|other|>")


def token(raw: dict, name: str) -> dict:
    return next(t for t in raw["added_tokens"] if t["content"] == name)


def added(name: str, number: int, **more: object) -> dict:
    return token(TOKENIZER, "<|image_pad|>") | {"content": name, "id": number} | more


for name, content in {
        "nothing": b"", "an object": b"{}", "a list": b"[]", "cut": json.dumps(
            TOKENIZER).encode()[:9_000], "a pickle": pickle.dumps(TOKENIZER),
        "UTF-16": json.dumps(TOKENIZER).encode("utf-16"), "deep": b'{"model":' * 50_000,
        "null": b"null", "sentencepiece": b"\n\x0e\n\x05<unk>\x15" + bytes(99)}.items():
    refused("tokenizer", f"the file is {name}", loading("2.5", put("tokenizer.json", content)),
            "tokenizer.json")
for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
    refused("tokenizer", f"without {name}", loading("2.5", tokens(without(name))), name)
    # the library counts on from the vocabulary's last id, whatever a file says
    either("tokenizer", f"{name} moved", loading("2.5", tokens(
        lambda raw, n=name: token(raw, n).update(id=650))), name)
for name in ("<|im_end|>", "<|endoftext|>", "<|im_start|>"):
    works("tokenizer", f"without {name}", loading("2.5", tokens(without(name)), same=False))
for name, change in {
        "no model": lambda raw: raw.pop("model"), "another model": lambda raw: raw.update(
            model={"type": "Markov"}), "ids as texts": lambda raw: raw["model"].update(
            vocab={k: str(v) for k, v in raw["model"]["vocab"].items()}),
        "negative ids": lambda raw: raw["model"]["vocab"].update(a=-1),
        "merges of unknown parts": lambda raw: raw["model"]["merges"].append("\u2603 \u2603"),
        "a pattern that is none": lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(
            pattern={"Regex": "(["}),
        "added tokens of no list": lambda raw: raw.update(added_tokens={"a": 1}),
        "an id beyond 32 bits": lambda raw: raw["added_tokens"].append(added("<|x|>", 2**32)),
        "an empty vocabulary": lambda raw: [raw["model"].update(vocab={}, merges=[]), raw.update(
            added_tokens=[])][:0],
        "only special tokens": lambda raw: raw["model"].update(vocab={}, merges=[]),
        "no letters": lambda raw: raw["model"].update(
            vocab={"<|im_end|>": 0}, merges=[]),
        "words, and one unknown": lambda raw: raw.update(model={
            "type": "WordLevel", "vocab": {"the": 0}, "unk_token": "?"}),
        "pieces": lambda raw: raw.update(model={
            "type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": None}),
        "all text replaced by nothing": lambda raw: raw.update(normalizer={
            "type": "Replace", "pattern": {"Regex": "[a-z ]+"}, "content": ""}),
        "a normalizer that is none": lambda raw: raw.update(normalizer={"type": "Nonsense"}),
        "a charsmap that is none": lambda raw: raw.update(normalizer={
            "type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "a charsmap of rubbish": lambda raw: raw.update(normalizer={
            "type": "Precompiled", "precompiled_charsmap": "/////w8PDw8PDw8PDw8="}),
        "another model's": lambda raw: json.loads(
            (ROOT / "nano_moca" / "base" / "tokenizer.json").read_text())}.items():
    refused("tokenizer", name, loading("2.5", tokens(change)))
for name, change in {
        "truncation and padding": lambda raw: raw.update(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                        "stride": 0},
            padding={"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}),
        "a post-processor": lambda raw: raw.update(post_processor={
            "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "single": [{"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
            "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [602],
                                              "tokens": ["<|im_end|>"]}}}),
        "dropout": lambda raw: raw["model"].update(dropout=0.5),
        "a mask token that is special": lambda raw: raw["added_tokens"].append(
            added("<|mask|>", 614)),
        "a mask token that is not": lambda raw: raw["added_tokens"].append(
            added("<|mask|>", 614, special=False)),
        "special tokens that are not": lambda raw: [t.update(special=False)
                                                    for t in raw["added_tokens"]][:0],
        "an added token of words": lambda raw: raw["added_tokens"].append(
            added("zebra", 620, special=False))}.items():
    works("tokenizer", name, loading("2.5", tokens(change)))
for name, change in {
        "an id beyond the embedding": lambda raw: raw["added_tokens"].append(added("<|x|>", 704)),
        "a mask token in the vocabulary": lambda raw: raw["model"]["vocab"].update(
            {"<|mask|>": 700}),
        "a token twice, two ids": lambda raw: raw["added_tokens"].append(
            added("<|image_pad|>", 650)),
        "a token twice, one id": lambda raw: raw["added_tokens"].append(
            added("<|image_pad|>", 612)),
        "two tokens, one id": lambda raw: raw["added_tokens"].append(added("<|x|>", 612)),
        "an empty token": lambda raw: raw["added_tokens"].append(added("", 620)),
        "an added token that is part of a mark": lambda raw: raw["added_tokens"].append(
            added("pad|>", 620)),
        "a token that swallows marks": lambda raw: raw["added_tokens"].insert(
            0, added(MARK, 620)),
        "no version": lambda raw: raw.pop("version"),
        "version 9": lambda raw: raw.update(version="9.0")}.items():
    either("tokenizer", name, loading("2.5", tokens(change)))


def fuzz_tokenizer(seed: int) -> Callable[[dict], None]:
    """Some value somewhere replaced."""
    def change(raw: dict) -> None:
        dice = random.Random(seed)
        for _ in range(dice.randint(1, 3)):
            part = raw
            while isinstance(part, (dict, list)) and part:
                keys = list(part) if isinstance(part, dict) else range(len(part))
                key = dice.choice(keys)
                if not isinstance(part[key], (dict, list)) or dice.random() < 0.3:
                    part[key] = dice.choice([None, 0, -1, 2**40, "", "x", [], {}, True, 0.5])
                    break
                part = part[key]

    return change


for seed in range(40):
    either("tokenizer", f"values changed, {seed}",
           loading("2.5", tokens(fuzz_tokenizer(seed)), same=False))

# ---- kinds: images

MOCA = nano_moca.load(SOURCES["2.5"], "cpu")
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 100, 3), np.uint8))
SMOOTH = Image.new("RGB", (100, 60), "navy")
SMOOTH.paste("orange", (0, 0, 50, 20))


def saved(image: Image.Image, form: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def picture(image: object, name: str = "a.png", expected: Image.Image | None = None,
            tolerance: float = 0) -> Run:
    """Bytes as a file and as they are, or anything as it is; shown as expected."""
    def run(folder: Path) -> None:
        made = image(folder) if callable(image) else image
        forms = [made]
        if isinstance(made, bytes) and name:
            (folder / name).write_bytes(made)
            forms = [folder / name, str(folder / name), made]
        for form in forms:
            batch = MOCA.processor.batch([Record(f"{MARK} x", [form], "row 8")])
            assert batch.patches.isfinite().all(), "patches"
            if expected is not None:
                right = MOCA.processor.batch([Record(f"{MARK} x", [expected])])
                assert torch.equal(batch.grids, right.grids), "another grid"
                off = (batch.patches - right.patches).abs().mean().item()
                assert off <= tolerance, f"off by {off}"
            vectors = MOCA.embed([{"text": MARK, "images": [form]}])
            assert torch.allclose(vectors.norm(dim=-1), torch.ones(1), atol=1e-3)

    return run


def tagged(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # how a viewer turns them, by Pillow's names
for form, tolerance in {"JPEG": 0.15, "PNG": 0, "WEBP": 0.15, "TIFF": 0}.items():
    for orientation, method in TURNS.items():
        content = saved(SMOOTH, form, exif=tagged(orientation))
        works("orientation", f"{form} {orientation}", picture(
            content, f"a.{form}", SMOOTH.transpose(Image.Transpose(method)), tolerance))
for seed in range(4):
    content = bytearray(saved(SMOOTH, "JPEG", exif=tagged(6)))
    content[20 + seed * 3] ^= 0xFF
    either("orientation", f"damaged, {seed}", picture(bytes(content)))

ALPHA = Image.fromarray(np.tile(np.linspace(0, 255, 100).astype(np.uint8), (60, 1)))
CLEAR = PICTURE.copy()
CLEAR.putalpha(ALPHA)
SHOWN = Image.new("RGB", CLEAR.size, "white")
SHOWN.paste(CLEAR, mask=CLEAR)
GREY = CLEAR.convert("LA")
GREYS = Image.new("RGB", GREY.size, "white")
GREYS.paste(GREY.convert("RGB"), mask=ALPHA)
for form in ("PNG", "WEBP", "TIFF"):
    more = {"lossless": True, "exact": True} if form == "WEBP" else {}
    works("transparency", f"RGBA {form}", picture(saved(CLEAR, form, **more), "a.x", SHOWN))
works("transparency", "RGBA GIF", picture(saved(CLEAR, "GIF"), "a.gif"))
works("transparency", "LA PNG", picture(saved(GREY, "PNG"), "a.x", GREYS))
works("transparency", "LA in memory", picture(GREY, "", GREYS))
works("transparency", "RGBA in memory", picture(CLEAR, "", SHOWN))
works("transparency", "array of four", picture(np.asarray(CLEAR), "", SHOWN))
works("transparency", "PA in memory", picture(PICTURE.quantize(8).convert("PA")))
FLAT = Image.new("RGB", (60, 60), (10, 20, 30))
WHITE = Image.new("RGB", (60, 60), "white")
works("transparency", "tRNS of RGB", picture(saved(
    FLAT, "PNG", transparency=(10, 20, 30)), "a.png", WHITE))
works("transparency", "tRNS of L", picture(saved(
    FLAT.convert("L"), "PNG", transparency=FLAT.convert("L").getpixel((0, 0))), "a.png", WHITE))
works("transparency", "tRNS of P", picture(saved(
    FLAT.quantize(2), "PNG", transparency=bytes([0] * 256)), "a.png", WHITE))
works("transparency", "tRNS of 1", picture(saved(
    Image.new("1", (60, 60), 0), "PNG", transparency=0), "a.png", WHITE))
works("transparency", "premultiplied", picture(CLEAR.convert("RGBa"), "", SHOWN, 0.02))

for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBX", "HSV"):
    works("mode", f"{mode} in memory", picture(PICTURE.convert(mode)))
for mode in ("I", "F", "I;16", "LAB"):
    either("mode", f"{mode} in memory", picture(
        Image.new(mode, (60, 60)) if mode == "I;16" else PICTURE.convert(
            "L").convert(mode) if mode != "LAB" else Image.new("LAB", (60, 60))), "row 8")
for mode, form in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("1", "PNG"),
                   ("1", "TIFF"), ("1", "BMP"), ("L", "JPEG2000"), ("LA", "PNG"), ("P", "BMP"),
                   ("P", "GIF"), ("1", "PPM"), ("RGB", "AVIF"), ("L", "WEBP")):
    works("mode", f"{mode} {form}", picture(saved(PICTURE.convert(mode), form)))
deep = Image.fromarray(np.full((60, 60), 40_000, np.uint16))
for form in ("PNG", "TIFF", "JPEG2000"):
    refused("mode", f"16 bit {form}", picture(saved(deep, form)), "row 8")
refused("mode", "16 bit PGM", picture(b"P5 60 60 65535\n" + bytes(7200)), "row 8")
refused("mode", "float TIFF", picture(saved(deep.convert("F"), "TIFF")), "row 8")
works("mode", "16 bit PPM in colour", picture(b"P6 60 60 65535\n" + bytes(21600)))

PS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n%%EndComments\nshowpage\n%%EOF\n"
foreign = {
    "EPS": PS, "EPS of DOS": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(PS)) + bytes(20) + PS,
    "PDF": saved(PICTURE, "PDF"), "SVG": b'<?xml version="1.0"?><svg width="60" height="60"/>',
    "HTML": b"<!DOCTYPE html><html>404</html>", "WMF": b"\xd7\xcd\xc6\x9a" + bytes(90),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 60, 60, 8, 3) + bytes(9999),
    "ICNS": b"icns" + bytes(60), "FITS": b"SIMPLE  =                    T" + bytes(2850),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99), "GRIB": b"GRIB" + bytes(3) + b"\1" + bytes(99),
    "MP4": b"\0\0\0\x20ftypisom" + bytes(99), "an LFS pointer": b"version https://git-lfs.g\n",
    "a zip": b"PK\3\4" + bytes(99), "a script": b"#!/bin/sh\necho x\n", "nothing": b"",
    "zeros": bytes(5000), "XBM": b"#define a_width 60\n#define a_height 60\nstatic char a[]={0};",
    "FLI": struct.pack("<IHHHH", 128, 0xAF11, 1, 60, 60) + bytes(116)}
for form in ("ICO", "PCX", "TGA", "SGI", "DDS", "IM", "MSP", "SPIDER", "XBM", "ICNS", "BLP",
             "DIB", "QOI"):
    try:
        mode = {"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P"}.get(form, "RGB")
        foreign[f"{form} of Pillow"] = saved(PICTURE.resize((64, 64)).convert(mode), form)
    except Exception:
        pass
for name, content in foreign.items():
    refused("format", f"{name} called .png", picture(content), "row 8")
    refused("format", f"{name} called .jpg", picture(content, "b.jpg"), "row 8")


def handed_over(content: bytes) -> Callable[[Path], object]:
    def run(folder: Path) -> Image.Image:
        with warnings.catch_warnings(action="ignore"):
            return Image.open(io.BytesIO(content))

    return run


refused("format", "EPS opened by the caller", picture(handed_over(PS)), "row 8")
for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"):
    works("format", f"{form} called .txt", picture(saved(PICTURE, form), "a.txt"))
    content = saved(PICTURE, form)
    refused("format", f"{form}, a third of it", picture(content[:len(content) // 3]), "row 8")
    either("format", f"{form} and rubbish behind", picture(content + bytes(999)), "row 8")
for form, more in (("GIF", {}), ("WEBP", {}), ("TIFF", {}), ("PNG", {})):
    works("format", f"{form} of 9 frames", picture(saved(
        PICTURE.quantize(9), form, save_all=True, append_images=[SMOOTH.quantize(9)] * 8, **more)))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(
        ">I", zlib.crc32(name + content))


def png(width: int, height: int, data: bytes, *more: bytes, depth: int = 1) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(
        b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


bomb = zlib.compress(bytes(200 * 2**20))
for name, content in {
        "2^31 wide": png(2**31 - 1, 1, b"0"), "0 wide": png(0, 60, b""),
        "100,000 x 100,000": png(10**5, 10**5, b"0"), "12,000 x 8,000": png(12_000, 8_000, b"0"),
        "a text of 200 MB": png(60, 60, bytes(60 * 9), chunk(b"zTXt", b"a\0\0" + bomb)),
        "an ICC profile of 200 MB": png(60, 60, bytes(60 * 9), chunk(b"iCCP", b"a\0\0" + bomb)),
        "EXIF of 200 MB": png(60, 60, bytes(60 * 9), chunk(
            b"zTXt", b"Raw profile type exif\0\0" + bomb)),
        "GIF 65,535 x 65,535": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0)
        + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\1\0\0;",
        "BMP of negative size": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40,
                                                    -60, -60, 1, 24, 0, 0, 0, 0, 0, 0),
        "PPM 10^9 wide": b"P6 1000000000 1000000000 255\n" + bytes(99),
        "PPM of a long number": b"P6 " + b"9" * 10**6 + b" 1 255\n",
        "201 to 1": saved(Image.new("L", (2010, 10)), "PNG")}.items():
    either("bomb", name, picture(content), "row 8")


def sparse_png(folder: Path) -> Path:
    path = folder / "sparse.png"
    path.write_bytes(saved(PICTURE, "PNG"))
    os.truncate(path, 30 * 2**30)
    return path


refused("bomb", "30 GB with a sound beginning", picture(sparse_png), "sparse.png")
for name, made in {
        "an array of stride 0": lambda _: np.broadcast_to(np.uint8(7), (100_000, 100_000, 3)),
        "a tensor of stride 0": lambda _: torch.zeros(1, 1, 1).byte().expand(10**5, 10**5, 3),
        "an array of 12,000 x 9,000": lambda _: np.broadcast_to(np.uint8(7), (12_000, 9000, 3)),
        "a picture not yet decoded": handed_over(png(13_000, 13_000, b"0"))}.items():
    refused("bomb", name, picture(made), "row 8")

for how in ("pipe", "folder", "loop", "two loops", "socket", "/dev/zero", "/dev/tty", "nowhere",
            "/proc/kcore", "/proc/self/mem", "/etc/passwd", "/sys/kernel/notes"):
    for suffix in ("a.png", "a.jpg"):
        def special(folder: Path, how: str = how, suffix: str = suffix) -> Path:
            instead(suffix, how)(folder)
            return folder / suffix

        refused("no image file", f"{suffix} is {how}", picture(special), "row 8")
for value in (None, 7, 10**12, True, 2.5, "", " ", "x" * 300, "x" * 10**7, "https://a.b/c.png",
              "data:image/png;base64," + "A" * 10**6, "a\nb.png", "a\0.png", "\ud800.png",
              Path("."), Path("/"), [], {}, {"bytes": b"x"}, [b"x"], object, object(), slice(3),
              memoryview(b"x"), bytearray(b"x"), io.BytesIO(b"x"), io.StringIO("x"), b"",
              b"a.png", "~/a.png", "file:///etc/passwd", (60, 60), range(9), lambda: 1):
    if not callable(value):
        refused("no image", repr(value)[:60], picture(value), "row 8")
CONTENT = saved(SMOOTH, "PNG")
BEHIND = CONTENT[:-12] + chunk(b"eXIf", tagged(6).tobytes()[6:]) + CONTENT[-12:]
TURNED = SMOOTH.transpose(Image.Transpose.ROTATE_270)
works("in memory", "bytes, turned behind the pixels", picture(BEHIND, "a.png", TURNED))
for kind in (bytearray, memoryview, io.BytesIO):
    either("in memory", kind.__name__, picture(
        lambda _, k=kind: k(BEHIND), "", TURNED), "row 8")
for name, array in {
        "bool": np.zeros((60, 60), bool), "int8": np.zeros((60, 60), np.int8),
        "bool in colour": np.zeros((60, 60, 3), bool), "uint16": np.zeros((60, 60, 3), np.uint16),
        "floats": np.random.rand(60, 60, 3), "NaN": np.full((60, 60, 3), np.nan),
        "complex": np.zeros((60, 60), complex), "objects": np.full((60, 60, 3), 7, object),
        "texts": np.full((60, 60), "a"), "dates": np.zeros((60, 60), "datetime64[s]"),
        "empty": np.zeros((0, 0, 3), np.uint8), "no height": np.zeros((0, 60, 3), np.uint8),
        "no colour": np.zeros((60, 60, 0), np.uint8), "one number": np.uint8(7),
        "no dimension": np.array(7, np.uint8), "a row": np.zeros(60, np.uint8),
        "channels first": np.zeros((3, 60, 60), np.uint8), "five": np.zeros((60, 60, 5), np.uint8),
        "four dimensions": np.zeros((1, 60, 60, 3), np.uint8),
        "fields": np.zeros((60, 60), [("r", "u1"), ("g", "u1"), ("b", "u1")])}.items():
    right = either if name == "bool" else refused
    right("array", name, picture(array), "row 8")
for name, tensor in {
        "float32": torch.rand(60, 60, 3), "channels first": torch.zeros(3, 60, 60).byte(),
        "bfloat16": torch.zeros(60, 60).bfloat16(), "meta": torch.zeros(60, 60, 3, device="meta"),
        "sparse": torch.eye(60).byte().to_sparse(), "bool": torch.zeros(60, 60, 3).bool(),
        "float8": torch.zeros(60, 60, 3).to(torch.float8_e4m3fn),
        "int64": torch.zeros(60, 60).long(),
        "empty": torch.zeros(0, 3).byte(), "gradient": torch.zeros(60, 60, requires_grad=True)
        }.items():
    refused("array", f"tensor, {name}", picture(tensor), "row 8")
PIXELS = np.asarray(PICTURE)
for name, array in {
        "Fortran's order": np.asfortranarray(PIXELS), "turned": PIXELS[::-1, ::-1],
        "every third of a larger": np.repeat(PIXELS, 3, axis=1)[:, ::3],
        "read only": PIXELS.view(), "a tensor of odd strides": torch.from_numpy(
            PIXELS.copy()).permute(1, 0, 2).contiguous().permute(1, 0, 2),
        "a parameter": torch.nn.Parameter(torch.from_numpy(PIXELS.copy()), requires_grad=False),
        "transposed": np.ascontiguousarray(PIXELS.transpose(2, 0, 1)).transpose(1, 2, 0),
        "a subclass": PIXELS.view(type("Mine", (np.ndarray,), {}))}.items():
    expected = PICTURE.rotate(180) if name == "turned" else PICTURE
    works("array", name, picture(array, "", expected))


def closed(folder: Path) -> Image.Image:
    PICTURE.save(folder / "c.png")
    image = Image.open(folder / "c.png")
    image.close()
    return image


def vanished(folder: Path) -> Image.Image:
    PICTURE.save(folder / "c.png")
    image = Image.open(folder / "c.png")
    (folder / "c.png").unlink()
    return image


refused("in memory", "a closed picture", picture(closed), "row 8")
works("in memory", "a picture whose file is gone", picture(vanished, "", PICTURE))
refused("in memory", "a picture cut short", picture(handed_over(CONTENT[:90])), "row 8")
works("in memory", "a lazy picture", picture(handed_over(BEHIND), "", TURNED))
works("in memory", "a subclass of a path", picture(
    lambda folder: [PICTURE.save(folder / "c.png"), type("P", (type(folder),), {})(
        folder / "c.png")][1], "", PICTURE))
works("in memory", "a numpy text", picture(
    lambda folder: [PICTURE.save(folder / "c.png"), np.str_(folder / "c.png")][1], "", PICTURE))

# ---- kinds: texts and items


def embedding(items: object, count: int | None = None, **given: object) -> Run:
    def run(folder: Path) -> None:
        made = items() if callable(items) else items
        moca = nano_moca.load(SOURCES["2.5"], "cpu", **given) if given else MOCA
        vectors = moca.embed(made)
        assert vectors.shape[0] == (len(made) if count is None else count), "another number"
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=1e-3)

    return run


for text in ("\ud800", "a\udfffb", "\udce4", "", " ", "\n\t\r", "\u3000\u2003", "\x1c\x1f", "\x85",
             "<|mask|>", "a<|video_pad|>", "<|image_pad|>", MARK, MARK * 2, f"{MARK} <|image_pad|>",
             "<|vision_start|><|image_pad|>", "a" * 5_000_001, " " * 10_000_000, "é" * 10_000_000):
    refused("text", repr(text)[:50], embedding([text]), "item 0")
for text in ("\x00", "\x00\x01\x7f\x1b[31m", "\u200b", "\u202e\ufeff", "\U0010ffff", "e\u0301",
             "<|im_end|>", "<|endoftext|>" * 5, "<|vision_start|><|vision_end|>",
             "<|im_start|>user", "𓀀" * 50, "a\r\n" * 100, "<|image_pad",
             "<|IMAGE_PAD|>", "<｜image_pad｜>", "0" * 3000,
             "\ufffd", "क्षि" * 30, "👩‍👩‍👧‍👦" * 20, "NaN", "null", "{}", "%s%n", "'; DROP TABLE"):
    works("text", repr(text)[:50], embedding([text]))
for name, text in {"one word": "a" * 4_999_999, "spaces within": "a" + " " * 4_000_000 + "b",
                   "line ends": "\n" * 2_000_000 + "x", "snowmen": "☃" * 1_000_000,
                   "marks": "\u0301" * 500_000, "digits": "7" * 3_000_000}.items():
    works("long text", name, embedding([text], max_tokens=50))
works("long text", "a hundred thousand special tokens", embedding(
    ["<|im_end|>" * 100_000], max_tokens=50))
for name, item in {
        "None": None, "a number": 7, "bytes": b"a", "a list": ["a"], "nested": [["a"]],
        "nothing in it": {}, "text of None": {"text": None}, "text of bytes": {"text": b"a"},
        "another key": {"caption": "a"}, "image, not images": {"text": "a", "image": PICTURE},
        "upper case": {"text": "a", "Images": [PICTURE]}, "only images": {"images": [PICTURE]},
        "images of text": {"text": MARK, "images": "a.png"}, "images of a path": {
            "text": MARK, "images": Path("a.png")}, "images of a picture": {
            "text": MARK, "images": PICTURE}, "images of 0": {"text": "a", "images": 0},
        "images of an iterator": {"text": MARK, "images": iter([PICTURE])},
        "images of an object": {"text": MARK, "images": {"0": PICTURE}},
        "an image too many": {"text": MARK, "images": [PICTURE] * 2},
        "an image too few": {"text": MARK * 2, "images": [PICTURE]},
        "images in images": {"text": MARK, "images": [[PICTURE]]},
        "an image of None": {"text": MARK, "images": [None]},
        "a record of None": Record(None), "a named record of None": Record(None, [], "item 1: x"),
        "a named record of a number": Record(5, [], "item 1: x"),
        "a named record of a text as images": Record(MARK, "a", "item 1: x"),
        "a class": Record, "a picture": PICTURE, "a path": Path("a.png"), "an array": PIXELS,
        "a tensor": torch.zeros(3)}.items():
    refused("item", name, embedding(["fine", item]), "item 1")
for name, items in {"a text": "x", "an empty text": "", "bytes": b"x", "a record": Record("x"),
                    "an object": {"text": "x"}, "None": None, "a number": 3, "a picture": PICTURE,
                    "a path": Path("x"), "a class": list, "an empty object": {},
                    "a bytearray": bytearray(b"x")}.items():
    refused("items", name, lambda _, i=items: MOCA.embed(i))
for name, items, count in (
        ("none", [], 0), ("a tuple", ("a", "b"), 2), ("a generator", lambda: (
            word for word in "ab"), 2), ("an array of texts", np.array(["a", "b"]), 2),
        ("keys", lambda: {"a": 1}.keys(), 1), ("an iterator of none", lambda: iter(()), 0),
        ("a map", lambda: map(str, range(3)), 3), ("a subclass of str", [np.str_("a")], 1),
        ("a named record without images", [Record("a", None, "here")], 1),
        ("images of None", [{"text": "a", "images": None}], 1),
        ("a tuple of images", [{"text": MARK, "images": (PICTURE,)}], 1),
        ("64 images", [{"text": MARK * 64, "images": [SMOOTH.resize((56, 56))] * 64}], 1)):
    works("items", name, embedding(items, count))


# ---- the table

def main() -> None:
    chosen, table, wrong = sys.argv[1:], {}, 0
    for kind, name, right, run, words in CASES:
        if chosen and not any(word in f"{kind} {name}" for word in chosen):
            continue
        what, said, took, memory = outcome(run, SECONDS * (1 + 2 * (kind == "long text")))
        why = judge(kind, right, words, what, said, memory)
        row = table.setdefault(kind, [0, 0, 0.0, 0.0])
        row[0] += 1
        row[1] += not why
        row[2:] = max(row[2], took), max(row[3], memory)
        if why or chosen:
            print(f"{'WRONG' if why else 'right'} {kind}: {name.encode('unicode_escape').decode()}"
                  f": {why or what} ({took:.1f} s, {memory:.0f} MB): {said[:200]!r}", flush=True)
        wrong += bool(why)
    print("\n| kind | tried | right | slowest, s | most memory, MB |\n|---|---|---|---|---|")
    for kind, (tried, good, took, memory) in table.items():
        print(f"| {kind} | {tried} | {good} | {took:.1f} | {memory:.0f} |")
    tried = sum(row[0] for row in table.values())
    print(f"| all | {tried} | {tried - wrong} | | |")
    shutil.rmtree(HOME)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
