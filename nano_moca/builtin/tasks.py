"""The records of stage 1 and the labelled pairs of stage 2, from scenes and documents.

Nothing is stored. A record or pair is a function of (seed, split, index): any process
can make any of them, in any order, and gets the same. Stage 1's records are a million
without labels; stage 2's pairs are at most 500 for each task, as labels are dear.

*Documents* are headings and bodies of Python's documentation, long texts. Every other
pair is of scenes or pages, and has near twins as hard negatives. In the splits for
testing, a scene's three twins are pairs of their own: 150 scenes make 600, each of
which has to be told from its twins.
"""

import importlib
import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from nano_moca.batch import MARK, Pair, Record
from nano_moca.builtin.scenes import (
    ALL, FACTORS, KNOWN, LABELLED, NEW, NEW_COLOURS, PARTS, Palette, Scene)
from nano_moca.files import MocaError

END = "<|im_end|>"
# What stands beside a picture that is an answer, as in MMEB, and beside one that asks.
SHOWN = "Represent what this picture shows from left to right."
ASKED = "Find a caption of what this picture shows from left to right."
# And what seeds them. The last: stage 2's pairs, with candidates of other kinds.
SPLITS = {"train": 0, "development": 1, "test": 2, "base": 3, "all-kinds": 0}
MODULES = (
    "argparse bisect calendar collections csv datetime decimal difflib fractions functools heapq "
    "itertools json logging math os os.path pathlib random re shutil statistics string subprocess "
    "tempfile textwrap threading unittest zipfile")


@lru_cache(maxsize=1)
def documents() -> list[tuple[str, str]]:
    """(heading, body) pairs of Python's documentation: the language's topics, and the
    library's docstrings."""
    from pydoc_data.topics import topics

    # The language's.
    pairs = [(name.replace("-", " "), body) for name, body in sorted(topics.items())]

    # The library's.
    for module in MODULES.split():
        for name, thing in inspect.getmembers(importlib.import_module(module), callable):
            # The original: pytest puts another function in its place.
            if name == "excepthook":
                thing = threading.__excepthook__
            body = inspect.getdoc(thing) or ""
            if not name.startswith("_") and len(body) > 80:
                pairs.append((f"{module}.{name}", body))
    return pairs


def opening(body: str) -> str:
    """The first words of a document: what stage 2 learns to find."""
    return " ".join(body.split()[:30])


def split_documents(split: str) -> list[tuple[str, str]]:
    """(body, heading) of each document, of those with one opening the first: of every ten
    seven to train on (in whatever split trains), one to develop, two to test."""
    found = {opening(body): (body, heading) for heading, body in reversed(documents())}
    first, end = {"development": (7, 8), "test": (8, 10)}.get(split, (0, 7))
    chosen = []
    for number, words in enumerate(sorted(found)):
        if first <= number % 10 < end:
            chosen.append(found[words])
    return chosen


@dataclass
class BuiltinRecords(Sequence):
    """Stage 1's default records: scenes, pages and texts."""

    split: str = "train"  # or "development", "test", "base": what the base knows
    seed: int = 0

    PAGES = 0.05  # their share; the rest are scenes
    TEXTS = 0.03
    WORDS = 20  # of a passage of text

    def __post_init__(self) -> None:
        """MocaError for a split that is none."""
        if self.split not in SPLITS:
            raise MocaError(f"--data builtin:{self.split}: the splits are {', '.join(SPLITS)}")
        self.palette = LABELLED if self.split == "base" else ALL
        if self.split in PARTS:
            self.palette = replace(self.palette, part=self.split)
        self.documents = split_documents(self.split)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Record:
        source = f"builtin {self.split} {index}"
        random = np.random.default_rng((self.seed, SPLITS[self.split], index))
        roll = random.random()
        if roll < self.TEXTS:
            return Record(self.passage(random) + END, [], source)

        # Else a picture: a page, or a scene of one to three cells, since the smaller ones
        # teach naming much sooner.
        if roll < self.TEXTS + self.PAGES:
            scene = self.palette.scene(random, rows=2)
        else:
            scene = self.palette.scene(random, columns=int(random.integers(1, 4)))
        return Record(f"{MARK}{scene.caption()}{END}", [scene.image()], source)

    def passage(self, random: np.random.Generator) -> str:
        """Some successive words of a document, after its heading."""
        body, heading = self.documents[random.integers(len(self.documents))]
        words = body.split()
        first = int(random.integers(max(1, len(words) - self.WORDS)))
        return f"{heading}: {' '.join(words[first : first + self.WORDS])}"


@dataclass
class BuiltinPairs(Sequence):
    """The labelled pairs of one of stage 2's default tasks.

    A new task is a name in KINDS and a branch in __getitem__ that returns
    `make_pair(query, [answer, *hard negatives], source)` of scenes and strings. Its
    answers should be many: equal ones are not compared, and what is tested must not be
    what was trained on.
    """

    name: str
    split: str
    seed: int  # the splits for testing are the same for every seed
    palette: Palette = LABELLED
    factors: Sequence[str] = FACTORS  # in which a scene's twins differ from it

    KINDS = {"scene-to-caption": "image-text", "caption-to-scene": "image-text",
             "page-retrieval": "long-document", "long-text": "long-document",
             "text-pairs": "text-only"}
    FAMILIES = ("scene-to-caption", "caption-to-scene", "text-pairs")  # of a scene and its twins
    SIZES = {"train": 500, "all-kinds": 500, "development": 600, "test": 600}
    PAGES = 200  # queries for pages, when testing
    TEXTS = 200  # pairs of texts, when training: they are learned sooner

    def __post_init__(self) -> None:
        self.kind = self.KINDS[self.name]
        self.testing = self.split in ("development", "test")
        if self.testing:
            self.palette = replace(self.palette, part=self.split)
        self.key = (0 if self.testing else self.seed, SPLITS[self.split], 10)
        self.documents = split_documents(self.split) if self.name == "long-text" else []

    def __len__(self) -> int:
        if self.name == "long-text":
            return len(self.documents)
        if self.name == "page-retrieval" and self.testing:
            return self.PAGES
        if self.name == "text-pairs" and not self.testing:
            return self.TEXTS
        return self.SIZES[self.split]

    def __getitem__(self, index: int) -> Pair:
        # This error is what ends a for loop over a sequence.
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = f"builtin {self.split} {self.name} {index}"

        # A heading with a dot is the name of a function or class.
        if self.name == "long-text":
            body, heading = self.documents[index]
            question = f"What does {heading} do?" if "." in heading else f"How do {heading} work?"
            return make_pair(question, [opening(body)], source)

        # When testing, the four scenes of a family come from the same random numbers.
        in_family = self.testing and self.name in self.FAMILIES
        random = np.random.default_rng((*self.key, index // 4 if in_family else index))
        if self.name == "page-retrieval":
            page = self.palette.scene(random, 2, 2)
            query, near = self.palette.page_query(page, random)
            return make_pair(query, [page, near, *self.other_kinds(page.caption())], source)

        # A scene and a twin as hard negative; when testing, one of a family of four alone.
        factors = self.factors if in_family else [self.factors[index % len(self.factors)]]
        scenes = self.palette.family(self.palette.scene(random), factors, random)
        if in_family:
            scenes = [scenes[index % 4]]

        # The task says which of its forms is the query, and which the answers. Each query
        # says what is wanted, as MMEB's do.
        captions = list(map(Scene.caption, scenes))
        if self.name == "scene-to-caption":
            answers = [*captions, *self.other_kinds(scenes[0])]
            return make_pair(scenes[0], answers, source, ASKED)
        if self.name == "caption-to-scene":
            answers = [*scenes, *self.other_kinds(captions[0])]
            return make_pair(captions[0], answers, source, "Find a picture: ")
        descriptions = [scene.description(random) for scene in scenes]
        answers = [*descriptions, *self.other_kinds(scenes[0], captions[0])]
        return make_pair(captions[0], answers, source, "Find other words: ")

    def other_kinds(self, *answers: Scene | str) -> list[Scene | str]:
        """Hard negatives that say the right thing in a form that was not asked for: what
        tells pictures from texts on a shelf that holds both. Only in the split
        "all-kinds": the paper has none."""
        return list(answers) if self.split == "all-kinds" else []


def make_pair(query: Scene | str, answers: Sequence[Scene | str], source: str,
              wanted: str = "") -> Pair:
    """A pair of records. answers: the right one, then the hard negatives. wanted: the
    query's instruction, before a text and after a picture."""
    records = []
    for number, item in enumerate((query, *answers)):
        # A picture has no caption beside it: that would give the answer away.
        if isinstance(item, Scene):
            said = SHOWN if number else wanted
            records.append(Record(f"{MARK}{said}{END}", [item.image()], source))
        else:
            said = "" if number else wanted
            records.append(Record(said + item + END, [], source))
    return Pair(records[0], records[1], records[2:])


def builtin_tasks(split: str = "train", seed: int = 0) -> dict[str, BuiltinPairs]:
    """Stage 2's default data by task. MocaError for a split without pairs."""
    if split not in BuiltinPairs.SIZES:
        raise MocaError(f"--data builtin:{split}: the splits are {', '.join(BuiltinPairs.SIZES)}")
    return {name: BuiltinPairs(name, split, seed) for name in BuiltinPairs.KINDS}


def factor_tasks(split: str) -> dict[str, BuiltinPairs]:
    """Scenes and captions in families that differ in one factor alone: what no labelled
    pair showed, and beside it what they did. Symbols are tested in scenes of a single
    colour, and a scene's twins have the same: colours alone find the right quarter."""
    full = replace(LABELLED, one_colour=1.0, empty=0.0)
    families = {"unlabelled symbols": (replace(full, names=NEW), "name"),
                "labelled symbols": (full, "name"),
                "unlabelled colours": (Palette(KNOWN, NEW_COLOURS, 0.0, 0.0), "colour"),
                "places": (replace(full, one_colour=0.6), "place")}
    tasks = {}
    for name in ("scene-to-caption", "caption-to-scene"):
        for what, (palette, factor) in families.items():
            tasks[f"{name}, {what}"] = BuiltinPairs(name, split, 0, palette, [factor] * 3)
    return tasks
