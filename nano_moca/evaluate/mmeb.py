"""MMEB: 36 tasks in which a query has to find its right candidate among its own few.

    DATA/<task>/test*    qry_text, qry_img_path, tgt_text [list], tgt_img_path [list]

The first candidate is right; images lie under --images. The score is precision@1: how
often the first candidate comes first.
"""

from pathlib import Path
from typing import Any

import numpy as np

from nano_moca.batch import MARK, Record
from nano_moca.data import make_record, open_rows
from nano_moca.files import MocaError
from nano_moca.report.ranking import Embed, Scores, cosines

# In distribution (trained on by those who train on MMEB), and out of it.
KINDS: dict[str, tuple[str, str]] = {
    "classification": ("ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
                       "Place365 ImageNet-A ImageNet-R ObjectNet Country211"),
    "VQA": ("OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
            "ScienceQA VizWiz GQA TextVQA"),
    "retrieval": ("VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
                  "OVEN FashionIQ EDIS Wiki-SS-NQ"),
    "visual grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
Side = tuple[str, str]  # a text, and the path of its image or ""


def score_folder(folder: Path, embed: Embed, flags: Any) -> Scores:
    """The scores of the task in a folder of --data."""
    # Many rows have the same sides: each is embedded once.
    images = Path(flags.images or flags.data)
    records: list[Record] = []
    index_of: dict[Side, int] = {}
    questions: list[list[int]] = []  # a query, its right candidate, the others
    for fields, _, source in open_rows(folder, "test*", COLUMNS):
        try:
            sides = read_sides(fields)
            for text, path in sides:
                if (text, path) not in index_of:
                    index_of[text, path] = len(records)
                    item = {"text": text, "images": [path] if path else []}
                    record = make_record(item, images, source)
                    records.append(record)
                    if path and not record.images[0].exists():
                        raise MocaError(f"{source}: there is no {record.images[0]}: unpack the "
                                        "benchmark's images.zip, and name its folder by --images")
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise MocaError(f"{source}: not an MMEB row ({error!r}): copy it again") from None
        questions.append([index_of[side] for side in sides])

    # The right candidate has to be above all others, which a tie is not.
    vectors = embed(records)
    right, chance, twice = [], [], 0
    for query, answer, *others in questions:
        similarities = cosines(vectors[[query]], vectors[[answer, *others]])[0]  # [C]
        right.append((similarities[0] > similarities[1:]).all())
        chance.append(1 / len(similarities))
        twice += answer in others  # a tie by the data
    yield folder.name, {
        "precision@1": float(np.mean(right)), "queries": len(questions),
        "chance": float(np.mean(chance)), "right candidate given twice": twice}


def read_sides(fields: dict) -> list[Side]:
    """The query of a row, its right candidate, and the others. Raises errors of several
    kinds if it is no row of MMEB."""
    # A single candidate may stand without its list.
    texts = fields["tgt_text"]
    paths = fields["tgt_img_path"]
    texts = [texts] if isinstance(texts, str) else list(texts)
    paths = [paths] if isinstance(paths, str) else list(paths)

    # <|image_1|> marks an image; beside an empty path it means nothing. What else is in
    # a text stays, also the line end that closes it: models were trained with it.
    sides = []
    query = (fields["qry_text"], fields["qry_img_path"])
    for text, path in (query, *zip(texts, paths, strict=True)):
        text = text.replace("<|image_1|>", MARK if path else "")
        sides.append((text, path or ""))
    if len(sides) < 3:
        raise ValueError("fewer than two candidates")
    return sides


def meta_tasks(names: list[str]) -> dict[str, list[str]]:
    """The tasks over which the benchmark reports a mean, by the name of that mean.
    names: of the tasks that are there, which need not be all."""
    # Four kinds, two halves across them, and all.
    inside, outside = map(" ".join, zip(*KINDS.values(), strict=True))
    groups = {kind: " ".join(halves) for kind, halves in KINDS.items()}
    groups |= {"in distribution": inside, "out of distribution": outside,
               "overall": f"{inside} {outside}"}
    return {group: members.split() for group, members in groups.items()}
