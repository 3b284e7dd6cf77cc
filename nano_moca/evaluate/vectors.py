"""Vectors of many records, kept on the disk so that an interrupted evaluation resumes.

They are kept by parts of 64 records in <output>.vectors, each part under a hash of its
content and of what computes it: the model's files, the settings and this package's
code. So another model, another picture at the same path or a changed line of code never
meets old vectors. A part that is damaged is computed again. The folder may be deleted
at any time.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nano_moca.batch import Record
from nano_moca.data import record_key
from nano_moca.evaluate.embedder import Moca, load
from nano_moca.files import MocaError, regular_file, replacing, writing
from nano_moca.report.ranking import Embed
from nano_moca.weights import find_checkpoint

AT_ONCE = 64  # records of a part; `Moca.embed` packs them up to its token budget


def embed_records(moca: Moca, records: list[Record], kept: Path | None = None,
                  identity: str = "") -> np.ndarray:
    """Unit vectors [N, D] float32, in the order of the records.

    All records are checked before the first is embedded. kept: a folder for the vectors
    of each part, to be found again by identity (of the model) and content. MocaError
    names a record whose vector is not finite.
    """
    # The longest first: too little memory shows at once, and records of one length
    # share an attention call.
    encode = moca.processor.encode
    lengths = [len(encode(record, moca.max_tokens).tokens) for record in records]
    order = sorted(range(len(records)), key=lambda index: -lengths[index])

    vectors = np.empty((len(records), moca.model.config.width), np.float32)
    starts = range(0, len(order), AT_ONCE)
    for start in tqdm(starts, unit_scale=AT_ONCE, unit="item", disable=None):
        index = order[start : start + AT_ONCE]
        part = [records[i] for i in index]

        # Kept from an earlier call, if it was stopped or asked the same.
        file = kept / f"{content_hash(part, identity)}.npy" if kept else None
        found = read_vectors(file, vectors[index].shape) if file else None
        if found is None:
            found = moca.embed(part).numpy()
            for record, vector in zip(part, found, strict=True):
                if not np.isfinite(vector).all():
                    raise MocaError(f"{record.source}: its vector is not finite: try --dtype "
                                    "float32, or another checkpoint")
            if file:
                # A pipe or a link there was never ours: it goes, and is not followed.
                with writing(file):
                    file.unlink(missing_ok=True)
                save_vectors(file, found)
        vectors[index] = found
    return vectors


def content_hash(records: list[Record], identity: str) -> str:
    """A name for what a model makes of these records: another for another model or
    content."""
    # A record's key has the path of an image file, but its bytes may change.
    files, keys = [], []
    for record in records:
        keys.append(record_key(record))
        for file in image_files(record):
            files.append(hashlib.sha256(file.read_bytes()).digest())
    content = repr((identity, files, keys)).encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()[:32]


def image_files(record: Record) -> list[Path]:
    """Those of a record's images that are files."""
    return [image for image in record.images if isinstance(image, Path)]


def save_vectors(path: Path, vectors: np.ndarray) -> None:
    """vectors [N, D] as a .npy file, which gets its name once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.lib.format.header_data_from_array_1_0(vectors)
    with replacing(path) as fresh, open(fresh, "wb") as file:
        # Not by np.save: it does not notice if the last bytes find no room.
        np.lib.format.write_array_header_1_0(file, header)
        file.write(vectors.data)


def read_vectors(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The vectors of a file, [N, D]; None if it is absent, or not as it was written."""
    try:
        with open(regular_file(path), "rb") as file:
            vectors = np.lib.format.read_array(file)  # no pickles
    # What numpy raises for a damaged file is of many kinds.
    except Exception:
        return None
    if vectors.shape != shape or vectors.dtype != np.float32:
        return None

    # Of unit length, which NaN has not.
    lengths = np.linalg.norm(vectors, axis=1)
    return vectors if (np.abs(lengths - 1) < 1e-3).all() else None


def make_embedder(flags: Any) -> Embed:
    """The model that the flags ask for, with its vectors kept beside the output."""
    folder = find_checkpoint(flags.model)
    dtype = getattr(torch, flags.dtype) if flags.dtype else None
    moca = load(folder, flags.device, dtype, flags.attention, flags.pooling,
                flags.min_pixels, flags.max_pixels, max_tokens=flags.max_tokens,
                processor=flags.processor, allow_extra=flags.allow_extra)

    # What the vectors depend on, beside the records; this code is part of it.
    files = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    files += Path(__file__).parents[1].rglob("*.py")
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append((file.name, status.st_size, status.st_mtime_ns))
    settings = (moca.attention, moca.pooling, moca.model.head.dtype, moca.max_tokens)
    images = (moca.processor.image, moca.processor.min_pixels, moca.processor.max_pixels)
    words = moca.processor.tokenizer.to_str()
    identity = repr((str(folder.resolve()), sorted(stamps), settings, images, words))
    kept = Path(flags.output + ".vectors")
    return lambda records: embed_records(moca, records, kept, identity)
