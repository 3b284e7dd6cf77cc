"""What a trained model is for: vectors of a list of items. Run as `python -m nano_moca.evaluate`.

    python -m nano_moca.evaluate embed --model DIR|HUB_ID --input items.jsonl --output vectors.npy

items.jsonl holds {"text": ..., "images": [...]} a line, the images beside it. vectors.npy is
float32 [lines, width] of unit length, in the file's order: the best match of a query is the item
with the largest dot product.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nano_moca import Moca, Record, load
from nano_moca.data import make_record, open_data
from nano_moca.trainer import Parser, run

AT_ONCE = 64  # items between two ticks of the bar; `Moca.embed` packs them up to its token budget


def model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that runs a model."""
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--attention", choices=("bidirectional", "causal"), default="bidirectional")
    parser.add_argument("--pooling", choices=("mean", "last"), default="mean")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    for limit in ("--min-pixels", "--max-pixels"):
        parser.add_argument(limit, type=int, metavar="N", help="default: the checkpoint's")


def load_model(args: argparse.Namespace) -> Moca:
    """The model that the flags ask for."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return load(args.model, args.device, dtype, args.attention, args.pooling, args.min_pixels,
                args.max_pixels)


def embed_records(moca: Moca, records: list[Record]) -> np.ndarray:
    """Unit vectors [N, D] float32, in the order of the records.

    All records are checked before the first is embedded. They go through the model by length, the
    longest first: too little memory shows at once, and items of one length share an attention call.
    """
    lengths = [len(moca.processor.encode(record).tokens) for record in records]
    order = sorted(range(len(records)), key=lambda i: -lengths[i])
    parts = [order[first : first + AT_ONCE] for first in range(0, len(order), AT_ONCE)]
    vectors = np.empty((len(records), moca.model.config.width), np.float32)
    for part in tqdm(parts, unit_scale=AT_ONCE, unit="item", disable=None):
        vectors[part] = moca.embed([records[i] for i in part]).numpy()
    return vectors


def embed(args: argparse.Namespace) -> None:
    """The command `embed`. The file gets its name when it is whole."""
    output = Path(args.output)
    records = [make_record(fields, part.path.parent, where)
               for part in open_data(args.input) for fields, where in part]
    output.parent.mkdir(parents=True, exist_ok=True)
    vectors = embed_records(load_model(args), records)
    fresh = output.with_name(output.name + ".new")
    with open(fresh, "wb") as file:
        np.save(file, vectors)
    fresh.replace(output)
    print(f"{output}: {vectors.shape[0]} unit vectors of width {vectors.shape[1]}")


def main(argv: list[str] | None = None) -> None:
    """Choose the command and run it."""
    parser = Parser(description="Embed and score with a trained model.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("embed", allow_abbrev=False, help="items.jsonl to vectors.npy")
    command.set_defaults(run=embed)
    model_flags(command)
    command.add_argument("--input", required=True, help="JSON lines of text and images")
    command.add_argument("--output", required=True, help="the .npy file to write")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run(main)
