"""`python -m nano_moca.convert SOURCE ... --output FOLDER`: published pairs to ours.

A source holds a folder for each subset, with parquet files of these columns:

    qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path

The last two may be absent; they hold one text or path, or a Python list of them, which
is parsed and never run. What is written, and can be given to train_cl.py as --data:

    FOLDER/<subset>.jsonl    the pairs, with instructions and line ends as they are
    FOLDER/images/           links to the folders in --images, and what its archives held

"<|image_1|>" becomes our mark where an image is, and goes where none is. A negative
without a text takes the first text of the others, or else the positive's (as released).
A row that cannot be used stops everything, or is skipped and listed; FOLDER appears when
all is done. Memory stays small; the disk holds what is unpacked beside its archive.
"""

import argparse
import ast
import json
import os
import shutil
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO

from nano_moca.batch import KINDS, MARK
from nano_moca.convert.sources import find_files
from nano_moca.convert.tables import ParquetRows
from nano_moca.data import find_image
from nano_moca.files import MocaError, fresh_folder, read_json, reason, replace_folder, writing
from nano_moca.flags import Parser, main_guard

LONG = "visrag_ind visrag_syn tevatron_colpali TAT-DQA ArxivQA"
SHORT = (
    "InfoSeek_it2t InfoSeek_it2it Classification Retrieval VQA ImageNet_1K ImageNet-1K N24News "
    "HatefulMemes VOC2007 SUN397 OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W VisDial "
    "CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA MSCOCO")
SUBSETS = dict.fromkeys(LONG.split(), KINDS[0]) | dict.fromkeys(SHORT.split(), KINDS[1])
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
COPIES = ("original", "diverse_instruction", "train")  # of the same pairs, the best first
IMAGE = "<|image_1|>"
MOST_CHARACTERS = 2**20  # of a list of negatives
MOST_BYTES = 2**28  # of an image in an archive


# --- images -----------------------------------------------------------------------


def members(archive: Path) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    """(name, size, content) of all that a zip or tar file holds but folders; the content
    is None if it is no ordinary file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir():
                    link = stat.S_ISLNK(entry.external_attr >> 16)
                    with zipped.open(entry) as content:
                        yield entry.filename, entry.file_size, None if link else content
        return

    # A stream, of which nothing is remembered.
    with tarfile.open(archive, "r|*") as tarred:
        for entry in tarred:
            tarred.members = []
            if not entry.isdir():
                content = tarred.extractfile(entry) if entry.isreg() else None
                yield entry.name, entry.size, content


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive into `folder`/images, and nowhere else."""
    try:
        for name, size, content in members(archive):
            # It may be written through no link, to another folder of the user's.
            path = find_image(f"images/{name.removeprefix('images/')}", folder, str(archive))
            inside = Path(os.path.realpath(path)).is_relative_to(folder.resolve())
            if content is None or size > MOST_BYTES or not inside:
                raise MocaError(f"{archive}: {name} is no ordinary file, is larger than "
                                f"{MOST_BYTES} bytes, or is in --images twice: take it out")
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as file:
                    shutil.copyfileobj(content, file)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error
            ) as error:
        raise MocaError(f"{archive} cannot be unpacked ({reason(error)}): copy it again") from None


def gather_images(places: list[Path], folder: Path) -> None:
    """Make `folder`/images of folders, which are linked, and archives."""
    (folder / "images").mkdir()
    for place in places:
        if not place.is_dir():
            unpack(place, folder)
            continue
        inner = place / "images" if (place / "images").is_dir() else place
        for entry in sorted(inner.iterdir()):
            with writing(folder / "images" / entry.name):
                (folder / "images" / entry.name).symlink_to(os.path.abspath(entry))


# --- pairs ------------------------------------------------------------------------


def find_subsets(sources: list[Path]) -> dict[str, list[Path]]:
    """{subset: its parquet files}; of several copies of the same pairs the first of
    COPIES, and a line says which were left out."""
    folders: dict[str, list[Path]] = {}
    for source in sources:
        for file in find_files(source, "*.parquet", [".parquet"]):
            folders.setdefault(os.path.abspath(file.parent), []).append(file)

    subsets: dict[str, list[Path]] = {}
    for folder, files in folders.items():
        for copy in COPIES:
            chosen = [file for file in files if file.name.startswith(copy)]
            if chosen:
                break
        subset = Path(folder).name
        if subset in subsets:
            raise MocaError(f"{folder}: another folder is called {subset} too: give one of them")
        subsets[subset] = chosen or files
        left = sorted({*files} - {*subsets[subset]})
        if left:
            print(f"{folder}: copies of the same pairs are left out:", *(f.name for f in left))
    return subsets


def read_list(value: object, source: str) -> list[str]:
    """Negatives: none, a text, or a Python list of texts. Nothing is executed."""
    if isinstance(value, str):
        written = value.strip()
        if not (written.startswith("[") and written.endswith("]")):
            return [value]

        # The parser takes many times a text's size in memory.
        try:
            value = ast.literal_eval(written) if len(written) < MOST_CHARACTERS else "too long"
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = "no literal"
    value = [] if value is None else value
    if not isinstance(value, list) or not {*map(type, value)} <= {str, type(None)}:
        raise MocaError(f"{source}: its negatives are no list of texts: correct the row")
    return value


def make_side(text: str | None, path: str | None, folder: Path, source: str) -> dict:
    """A text and the path of its image, if it has one, as a record of ours."""
    # An image whose place nobody says stands in front.
    text, path = text or "", path or ""
    if path and IMAGE not in text:
        text = IMAGE + text
    text = text.replace(IMAGE, MARK if path else "")
    if not text.strip() or text.count(MARK) > 1:
        raise MocaError(f"{source}: a text is empty, or has several images: correct the row")
    if not path:
        return {"text": text}

    path = f"images/{path.removeprefix('images/')}"
    if not find_image(path, folder, source).is_file():
        raise MocaError(f"{source}: {path} is missing: name its folder or archive in --images")
    return {"text": text, "images": [path]}


def make_line(fields: dict, folder: Path, source: str) -> dict:
    """A row as a line of ours, still without task and kind."""
    texts = read_list(fields.get("neg_text"), source)
    paths = read_list(fields.get("neg_image_path"), source)
    spare = next(filter(None, texts), fields["pos_text"])
    negatives = []
    for text, path in zip_longest(texts, paths):
        if text or path:
            negatives.append(make_side(text or spare, path, folder, source))
    query = make_side(fields["qry"], fields["qry_image_path"], folder, source)
    positive = make_side(fields["pos_text"], fields["pos_image_path"], folder, source)
    return {"query": query, "positive": positive, "negatives": negatives}


def write_subset(name: str, kind: str, files: list[Path], folder: Path, skip: bool) -> None:
    """Write `folder`/<name>.jsonl, and say how many pairs it has."""
    written, skipped = 0, 0
    with (open(folder / f"{name}.jsonl", "w", encoding="utf-8") as lines,
          open(folder / "skipped.jsonl", "a", encoding="utf-8") as reasons):
        for file in files:
            rows = ParquetRows(file, COLUMNS)
            if not {*COLUMNS[:4]} <= {*rows.names}:
                raise MocaError(f"{file} lacks a column of {', '.join(COLUMNS[:4])}: take it away")
            for index in range(len(rows)):
                try:
                    fields, _, source = rows[index]
                    line = {"task": name, "kind": kind, **make_line(fields, folder, source)}
                    lines.write(json.dumps(line) + "\n")
                    written += 1
                except MocaError as error:
                    if not skip:
                        raise
                    skipped += 1
                    reasons.write(json.dumps({"count": skipped, "reason": str(error)}) + "\n")
    print(f"{name}: {written} pairs of kind {kind}, {skipped} rows skipped", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Read the flags; convert all subsets, or none."""
    parser = Parser(prog="nano_moca.convert", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE",
                        help="a folder of subsets, or of one")
    parser.add_argument("--output", required=True, type=Path, help="the folder to make")
    parser.add_argument("--images", nargs="*", type=Path, default=[], metavar="PLACE",
                        help="folders, zip and tar files that hold images/ or what is in it")
    parser.add_argument("--kinds", type=Path, help='JSON {"subset": "image-text", ...}: kinds '
                        "of subsets that are not in the table, or other ones")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                        help="what to do with an unusable row")
    args = parser.parse_args(argv)

    # Nothing is guessed, and nothing replaced.
    kinds = SUBSETS | (read_json(args.kinds) if args.kinds else {})
    subsets = find_subsets(args.sources)
    for name in subsets:
        if kinds.get(name) not in KINDS:
            raise MocaError(f"--kinds: {name} has no kind: give a JSON file of "
                            f'{{"{name}": one of {", ".join(KINDS)}}}')
    if args.output.exists() or not subsets:
        raise MocaError(f"--output {args.output} exists, or no SOURCE holds parquet files: give "
                        "a new folder, and the data")

    # A row that is not escaped by Python's rules is read all the same, without a word.
    warnings.simplefilter("ignore", SyntaxWarning)
    with writing(args.output):
        folder = fresh_folder(args.output)
        gather_images(args.images, folder)
        for name, files in subsets.items():
            write_subset(name, kinds[name], files, folder, args.on_error == "skip")
        replace_folder(args.output)


if __name__ == "__main__":
    main_guard(main)
