"""`python -m nano_moca.convert`: published pairs become JSON lines of ours.

--data holds a folder for each subset, with parquet files of these columns:

    qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path

The last two may be absent; they hold a text or path, or a Python list of them, which is
parsed and never run. --output, which train_cl.py takes as --data, will hold

    <subset>.jsonl    the pairs, instructions and line ends as they are
    images/           what the archives in --images held, and links to the rest of it

"<|image_1|>" becomes our mark where there is an image, and goes where there is none. A
negative without a text takes the first text of the others, or else the positive's (as
released). --output appears when all is done, or not at all. The disk has to have room for
what is unpacked; memory grows with nothing but the names in an archive. An archive that
would write elsewhere is refused, as are two pictures of one path.
"""

import ast
import filecmp
import json
import os
import shutil
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from nano_moca.batch import KINDS, MARK
from nano_moca.convert.rows import open_file
from nano_moca.convert.sources import PICTURES, find_files, split_sources
from nano_moca.data import find_image
from nano_moca.files import (
    MocaError, beside, fresh_folder, one_line, read_json, reason, regular_file, replace_folder,
    writing)
from nano_moca.flags import flag, main_guard, parse_flags
from nano_moca.plan.claims import check_ours

LONG = "visrag_ind visrag_syn tevatron_colpali TAT-DQA ArxivQA"
SHORT = (
    "InfoSeek_it2t InfoSeek_it2it Classification Retrieval VQA ImageNet_1K ImageNet-1K N24News "
    "HatefulMemes VOC2007 SUN397 OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W VisDial "
    "CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA MSCOCO")
SUBSETS = dict.fromkeys(LONG.split(), KINDS[0]) | dict.fromkeys(SHORT.split(), KINDS[1])
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
COPIES = ("original", "diverse_instruction", "train")  # of the same pairs: the best first
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
IMAGE = "<|image_1|>"
MOST_CHARACTERS = 2**20  # of a list of negatives: the parser takes many times its size


@dataclass
class Flags:
    """What the command takes."""

    data: str = flag("", "a folder of subsets, or of one; several: a,b")
    output: str = flag("pairs", "the folder to make")
    images: str = flag(None, "zip or tar files, folders of them, or images/ itself; several: a,b")
    kinds: str = flag(None, 'JSON file {"subset": "image-text", ...}, for subsets beyond the table')
    on_error: str = flag("stop", "what to do with an unusable row", choices=("stop", "skip"))


# --- images -----------------------------------------------------------------------


def gather_images(places: list[str], folder: Path) -> None:
    """Fill the folder with what archives hold, and with links to what else lies in the
    places; a place that is a file is itself."""
    (folder / PICTURES).touch()
    entries: list[Path] = []
    for place in map(Path, places):
        entries += place.iterdir() if place.is_dir() else [regular_file(place)]

    # The archives first: nothing is unpacked through a link, into a folder of the user's.
    archives = [entry for entry in entries if entry.name.lower().endswith(ARCHIVES)]
    for archive in sorted(archives):
        try:
            unpack(archive, folder)
        except Exception as error:  # of as many kinds as there are formats
            raise MocaError(f"{archive} cannot be unpacked ({reason(error)}): copy it again, or "
                            "make room on the disk") from None
    for entry in sorted({*entries} - {*archives}):
        with writing(folder / entry.name):
            (folder / entry.name).symlink_to(entry.absolute())


def unpack(archive: Path, folder: Path) -> None:
    """Add what an archive holds. An error of any kind if it cannot be unpacked, would
    write outside the folder, or has another file of a name that is there."""
    scratch = folder.with_name("unpacked")
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as opened:
            # Python would give other names to these, or lose one of two.
            names = [name for name in opened.namelist() if not name.endswith("/")]
            bad = [name for name in names if name[:1] == "/" or ".." in Path(name).parts]
            if bad or len({*names}) < len(names):
                raise ValueError(f"names that lead outside, {bad[:1]}, or come twice")
            opened.extractall(scratch)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")  # refuses what leads outside

    # Two archives may hold the same pictures.
    for file in sorted(scratch.rglob("*")):
        place = folder / file.relative_to(scratch)
        if file.is_dir() and not file.is_symlink():
            place.mkdir(exist_ok=True)
        elif os.path.lexists(place) and not filecmp.cmp(file, place, shallow=False):
            raise ValueError(f"it has another {place.relative_to(folder)} than the others")
        else:
            file.replace(place)
    shutil.rmtree(scratch, ignore_errors=True)


# --- pairs ------------------------------------------------------------------------


def find_subsets(sources: list[str]) -> dict[str, list[Path]]:
    """{subset: its parquet files}. Of several copies of the same pairs, the first of
    COPIES; a line says which were left out."""
    folders: dict[Path, list[Path]] = {}
    seen: set = set()  # no file is read twice
    for source in sources:
        for file in find_files(Path(source), "*", (".parquet",), seen):
            folders.setdefault(file.absolute().parent, []).append(file)

    subsets: dict[str, list[Path]] = {}
    for folder, files in folders.items():
        chosen = files
        for copy in reversed(COPIES):
            chosen = [file for file in files if file.name.startswith(copy)] or chosen
        for file in sorted({*files} - {*chosen}):
            print(one_line(f"{file} is left out: of this folder only {chosen[0].name} and files "
                           "named like it are taken"))
        if folder.name in subsets:
            raise MocaError(f"{folder}: another folder has this name too: give one of them")
        subsets[folder.name] = chosen
    return subsets


def read_list(value: object, source: str) -> list[str]:
    """Negatives: none, a text, or a Python list of texts. Nothing is executed."""
    if isinstance(value, str):
        # One that begins as a list of texts may be cut short.
        written = value.strip()
        whole = written.startswith("[") and written.endswith("]")
        if not (whole or written.startswith(("['", '["'))):
            return [value]
        try:
            value = ast.literal_eval(written) if len(written) < MOST_CHARACTERS else "too long"
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = "no literal"
    value = [] if value is None else value
    if not isinstance(value, list) or not {*map(type, value)} <= {str, type(None)}:
        raise MocaError(f"{source}: its negatives are not a list of texts: correct the row")
    return value


def make_side(text: str | None, path: str | None, folder: Path, source: str) -> dict:
    """A text and the path of its image, if it has one, as a record of ours."""
    # An image whose place nobody says stands in front.
    text, path = text or "", path or ""
    if not isinstance(text, str) or not isinstance(path, str):
        raise MocaError(f"{source}: a text or path is not a string: correct the row")
    if path and IMAGE not in text:
        text = IMAGE + text
    text = text.replace(IMAGE, MARK if path else "")
    if not text.strip() or text.count(MARK) > 1:
        raise MocaError(f"{source}: a text is empty, or has several images: correct the row")
    if not path:
        return {"text": text}

    # An archive may hold the folder images/ too.
    inner = path.removeprefix("images/")
    for outer in ("images", "images/images"):
        if os.path.isfile(find_image(inner, folder / outer, source)):
            return {"text": text, "images": [f"{outer}/{inner}"]}
    raise MocaError(f"{source}: {path} is missing: name its folder or archive in --images")


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
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as lines:
        for file in files:
            rows = open_file(file, COLUMNS)
            if not {*COLUMNS[:4]} <= {*getattr(rows, "names", ())}:
                raise MocaError(f"{file} lacks a column of {COLUMNS[:4]}: take it away")
            for index in range(len(rows)):
                try:
                    fields, _, source = rows[index]
                    line = {"task": name, "kind": kind, **make_line(fields, folder, source)}
                    lines.write(json.dumps(line) + "\n")
                    written += 1
                except MocaError as error:
                    if not skip:
                        raise
                    print(f"skipped: {error}")
                    skipped += 1
    print(one_line(f"{name}: {written} pairs of kind {kind}, {skipped} rows skipped"), flush=True)


def convert(flags: Flags) -> None:
    """Convert all subsets, or none."""
    # Nothing is guessed.
    kinds = SUBSETS | (read_json(Path(flags.kinds), "see --kinds") if flags.kinds else {})
    subsets = find_subsets(split_sources(flags.data))
    for name in subsets:
        if kinds.get(name) not in KINDS:
            raise MocaError(f"--kinds: nobody says which kind {name} is: give a JSON file of "
                            f'{{"{name}": "{KINDS[1]}"}}; there are {", ".join(KINDS)}')

    # And nothing is replaced.
    output = Path(flags.output)
    if output.exists() or not subsets:
        raise MocaError(f"--output {output} exists, or --data {flags.data} holds no parquet "
                        "file: give another folder")
    for ending in (".new", ".old"):
        check_ours(beside(output, ending), beside(output, ending).is_dir())
    places = [] if flags.images is None else split_sources(flags.images, "--images")
    warnings.simplefilter("ignore")  # of lists with a backslash that escapes nothing
    try:
        with writing(output):
            folder = fresh_folder(output)
            (folder / "images").mkdir()
            gather_images(places, folder / "images")
            for name, files in subsets.items():
                write_subset(name, kinds[name], files, folder, flags.on_error == "skip")
            replace_folder(output)
    finally:
        shutil.rmtree(beside(output, ".new"), ignore_errors=True)


if __name__ == "__main__":
    main_guard(lambda: convert(parse_flags(Flags, None, __doc__, "nano_moca.convert")))
