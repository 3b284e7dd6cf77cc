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
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nano_moca.batch import MARK, Pair, Record
from nano_moca.builtin.scenes import KNOWN, NAMES, Scene, page_query, random_scene, twins
from nano_moca.files import MocaError

END = "<|im_end|>"
SPLITS = {"train": 0, "development": 1, "test": 2, "base": 3}  # and what seeds them
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


@dataclass
class BuiltinRecords(Sequence):
    """Stage 1's default records: scenes, pages and texts."""

    split: str = "train"  # or "development", "test", "base": symbols that the base knows
    seed: int = 0

    PAGES = 0.05  # their share; the rest are scenes
    TEXTS = 0.05
    WORDS = 40  # of a passage of text

    def __post_init__(self) -> None:
        """MocaError for a split that is none."""
        if self.split not in SPLITS:
            raise MocaError(f"--data builtin:{self.split}: the splits are {', '.join(SPLITS)}")
        self.names = KNOWN if self.split == "base" else NAMES

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Record:
        source = f"builtin {self.split} {index}"
        random = np.random.default_rng((self.seed, SPLITS[self.split], index))
        roll = random.random()
        if roll < self.TEXTS:
            return Record(self.passage(random) + END, [], source)

        # Else a picture; the base gets scenes of one and two cells as well, since they
        # teach naming much sooner.
        if roll < self.TEXTS + self.PAGES:
            scene = random_scene(random, self.names, int(random.integers(3, 5)), columns=3)
        elif self.split == "base":
            scene = random_scene(random, self.names, *random.integers(1, 3, 2))
        else:
            scene = random_scene(random, self.names)
        return Record(f"{MARK}{scene.caption()}{END}", [scene.image()], source)

    def passage(self, random: np.random.Generator) -> str:
        """Some successive words of a document, after its heading."""
        heading, body = documents()[random.integers(len(documents()))]
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
    names: Sequence[str] = NAMES  # the symbols that occur

    KINDS = {"scene-to-caption": "image-text", "caption-to-scene": "image-text",
             "page-retrieval": "long-document", "long-text": "long-document",
             "text-pairs": "text-only"}
    FAMILIES = ("scene-to-caption", "caption-to-scene", "text-pairs")  # of a scene and its twins
    SIZES = {"train": 500, "development": 600, "test": 600}
    PAGES = 200  # queries for pages, when testing

    def __post_init__(self) -> None:
        self.kind = self.KINDS[self.name]
        seed = self.seed if self.split == "train" else 0
        self.key = (seed, SPLITS[self.split], 10 + len(self.names))

        # Each body once; of every ten, seven to train on, one to develop, two to test.
        self.documents = []  # (body, heading)
        if self.name == "long-text":
            bodies = {body: heading for heading, body in reversed(documents())}
            first, end = {"train": (0, 7), "development": (7, 8), "test": (8, 10)}[self.split]
            for number, document in enumerate(sorted(bodies.items())):
                if first <= number % 10 < end:
                    self.documents.append(document)

    def __len__(self) -> int:
        if self.name == "long-text":
            return len(self.documents)
        if self.name == "page-retrieval" and self.split != "train":
            return self.PAGES
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
            return make_pair(question, [" ".join(body.split()[:60])], source)

        # When testing, the four scenes of a family come from the same random numbers.
        in_family = self.split != "train" and self.name in self.FAMILIES
        number = index // 4 if in_family else index
        random = np.random.default_rng((*self.key, number))
        if self.name == "page-retrieval":
            page = random_scene(random, self.names, int(random.integers(3, 5)), columns=3)
            query, near = page_query(page, random, self.names)
            return make_pair(query, [page, near], source)

        # A scene and its twins as hard negatives; when testing, one of the family alone.
        scene = random_scene(random, self.names)
        scenes = [scene, *twins(scene, random, self.names)]
        if in_family:
            scenes = [scenes[index % 4]]

        # The task says which of its forms is the query, and which the answers.
        captions = list(map(Scene.caption, scenes))
        if self.name == "scene-to-caption":
            return make_pair(scenes[0], captions, source)
        if self.name == "caption-to-scene":
            return make_pair(captions[0], scenes, source)
        descriptions = [scene.description(random) for scene in scenes]
        return make_pair(captions[0], descriptions, source)


def make_pair(query: Scene | str, answers: Sequence[Scene | str], source: str) -> Pair:
    """A pair of records. answers: the right one, then the hard negatives."""
    records = []
    for item in (query, *answers):
        # A scene is its picture alone: its caption would give the answer away.
        if isinstance(item, Scene):
            records.append(Record(f"{MARK}{END}", [item.image()], source))
        else:
            records.append(Record(item + END, [], source))
    return Pair(records[0], records[1], records[2:])


def builtin_tasks(split: str = "train", seed: int = 0) -> dict[str, BuiltinPairs]:
    """Stage 2's default data by task. MocaError for a split without pairs."""
    if split not in BuiltinPairs.SIZES:
        raise MocaError(f"--data builtin:{split}: the splits are {', '.join(BuiltinPairs.SIZES)}")
    return {name: BuiltinPairs(name, split, seed) for name in BuiltinPairs.KINDS}
