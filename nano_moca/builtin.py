"""The built-in data and tasks, made of parts that are already here, and the nano base model.

Nothing is downloaded. Pictures are drawn from symbols of the DejaVu font that matplotlib carries,
texts are Python's own documentation. The miniature keeps the paper's premises, or it would show
nothing:

- *Scenes* are compositional: four cells, each empty or one of 48 symbols in one of 8 colours, with
  the caption "red anchor, blue star, nothing, yellow snowman". There are about 2 x 10^10, so
  test scenes are new, and near twins as hard negatives (two cells swapped, one colour or one symbol
  changed) defeat a model that only knows which words occur.
- The *base* model knows half of the symbols; stage 1 brings the others, unlabelled and in far
  greater number.
- Every colour and symbol is one word and one token, so that a hidden word cannot be guessed from
  its own other half.
- *Pages* are larger grids of the same symbols, found by a query that names two or three of their
  items;
- *documents* are headings and bodies of Python's documentation: long texts, and text-only pairs.

`python -m nano_moca.builtin` makes the base: it learns the tokenizer and trains a causal captioner
from scratch, in about half an hour on one core.
"""

import importlib
import inspect
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tokenizers import Tokenizer, pre_tokenizers, trainers
from torch import nn

from nano_moca.config import BASE, MocaError, load_config
from nano_moca.data import Pair
from nano_moca.model import VLM
from nano_moca.processor import MARK, Record
from nano_moca.trainer import parse_flags, run
from nano_moca.weights import fresh_folder, replace_folder, save_weights

# A character and the one word of its Unicode name that identifies it. The base knows alternate ones
# (KNOWN: the first, third, fifth, ...).
NAMES = tuple(
    "spade heart diamond club star telephone airplane umbrella snowman anchor skull queen knight "
    "note sun cloud moon scissors envelope pencil voltage yin peace house flag swords gear springs "
    "beverage florette snowflake check ballot infinity omega lamda pi section ampersand at "
    "question seven triangle square circle male female arrow".split())
SYMBOLS = dict(zip(NAMES, "♠♥♦♣★☎✈☂☃⚓☠♛♞♪☀☁☾✂✉✏⚡☯☮⌂⚑⚔⚙♨☕✿❄✓✗∞Ωλπ§&@?7▲■●♂♀➔", strict=True))
KNOWN, NEW = NAMES[::2], NAMES[1::2]
COLOURS = dict(
    red=(240, 40, 40), orange=(255, 140, 0), yellow=(250, 230, 40), green=(40, 200, 60),
    cyan=(40, 220, 230), blue=(60, 90, 255), purple=(170, 60, 230), white=(245, 245, 245),
)
CELL, INK, GROUND = 56, 50, 16  # pixels of a cell, of a symbol's longer side; grey of the ground
EMPTY = 0.2  # share of empty cells
END = "<|im_end|>"
SPLITS = {"train": 0, "development": 1, "test": 2, "base": 3}
Cell = tuple[str, str] | None  # (colour, symbol)


@lru_cache(maxsize=None)
def glyph(name: str) -> np.ndarray:
    """A symbol's ink, [CELL, CELL] float32 in 0..1, scaled so that it fills its cell."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(file), 160)
    big = Image.new("L", (400, 400))
    ImageDraw.Draw(big).text((100, 100), SYMBOLS[name], fill=255, font=font)
    ink = ImageOps.contain(big.crop(big.getbbox()), (INK, INK), Image.Resampling.LANCZOS)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(ink, ((CELL - ink.width) // 2, (CELL - ink.height) // 2))
    return np.asarray(cell, np.float32) / 255


@dataclass(frozen=True)
class Scene:
    """Cells in reading order, `columns` to a row."""

    cells: tuple[Cell, ...]
    columns: int = 2

    def image(self) -> Image.Image:
        """The picture: each symbol in its colour on near-black."""
        height, width = CELL * len(self.cells) // self.columns, CELL * self.columns
        pixels = np.full((height, width, 3), GROUND, np.float32)
        for index, cell in enumerate(self.cells):
            if cell:
                y, x = (CELL * place for place in divmod(index, self.columns))
                ink = glyph(cell[1])[..., None]  # [CELL, CELL, 1]
                pixels[y : y + CELL, x : x + CELL] += ink * (np.array(COLOURS[cell[0]]) - GROUND)
        return Image.fromarray(pixels.astype(np.uint8))

    def caption(self) -> str:
        """What is in the cells, in reading order."""
        return ", ".join(" ".join(cell) if cell else "nothing" for cell in self.cells)

    def description(self, random: np.random.Generator) -> str:
        """The same in another wording: where things are, in any order; of four cells."""
        places = ("top left", "top right", "bottom left", "bottom right")
        named = [f"{place} a {' '.join(cell)}" for place, cell in zip(places, self.cells) if cell]
        return ", ".join(named[i] for i in random.permutation(len(named)))


def random_scene(random: np.random.Generator, names: Sequence[str] = NAMES, rows: int = 2,
                 columns: int = 2) -> Scene:
    """Symbols and colours at random; never all empty, and with two unlike cells if it has two."""
    colours = tuple(COLOURS)
    while True:
        cells = tuple(None if random.random() < EMPTY else
                      (colours[random.integers(len(colours))], names[random.integers(len(names))])
                      for _ in range(rows * columns))
        if len({None, *cells}) > 1 and (len(set(cells)) > 1 or rows * columns == 1):
            return Scene(cells, columns)


def twins(scene: Scene, random: np.random.Generator, names: Sequence[str] = NAMES) -> list[Scene]:
    """Three near misses: two cells swapped, one colour changed, one symbol changed."""
    cells, count = scene.cells, len(scene.cells)
    unequal = [(i, j) for i in range(count) for j in range(i) if cells[i] != cells[j]]
    i, j = unequal[random.integers(len(unequal))]
    changes = [{i: cells[j], j: cells[i]}]  # {where: the new cell}
    full = [index for index, cell in enumerate(cells) if cell]
    for part, words in enumerate((COLOURS, names)):
        index = int(random.choice(full))
        cell = list(cells[index])
        cell[part] = str(random.choice([word for word in words if word != cell[part]]))
        changes.append({index: tuple(cell)})
    return [replace(scene, cells=tuple(change.get(at, cell) for at, cell in enumerate(cells)))
            for change in changes]


def page_query(page: Scene, random: np.random.Generator, names: Sequence[str] = NAMES
               ) -> tuple[str, Scene]:
    """A question that names two or three of a page's items, and a near page that lacks one."""
    items = sorted({cell for cell in page.cells if cell})
    chosen = [items[i] for i in random.permutation(len(items))[: random.integers(2, 4)]]
    (colour, name), *_ = chosen
    other = str(random.choice([other for other in names if (colour, other) not in items]))
    near = tuple((colour, other) if cell == (colour, name) else cell for cell in page.cells)
    named = [" ".join(item) for item in chosen]
    return f"a page with {', '.join(named[:-1])} and {named[-1]}", replace(page, cells=near)


@lru_cache(maxsize=1)
def documents() -> list[tuple[str, str]]:
    """(heading, body) pairs of Python's documentation: the language's topics, and the library's
    docstrings."""
    from pydoc_data.topics import topics

    pairs = [(name.replace("-", " "), text) for name, text in sorted(topics.items())]
    modules = (
        "argparse bisect calendar collections csv datetime decimal difflib fractions functools "
        "heapq itertools json logging math os os.path pathlib random re shutil statistics string "
        "subprocess tempfile textwrap threading unittest zipfile")
    for module in modules.split():
        for name, thing in inspect.getmembers(importlib.import_module(module), callable):
            if name == "excepthook":
                thing = threading.__excepthook__  # the original: pytest puts another in its place
            text = inspect.getdoc(thing) or ""
            if not name.startswith("_") and len(text) > 80:
                pairs.append((f"{module}.{name}", text))
    return pairs


class Builtin(Sequence):
    """Stage 1's default records, each a function of (seed, split, index): scenes, pages and
    texts."""

    PAGES, TEXTS = 0.05, 0.05  # their shares; the rest are scenes
    WORDS = 40  # of a passage of text

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        """split: "train", "development", "test", or "base", which has only the symbols that the
        base knows."""
        if split not in SPLITS:
            raise MocaError(f"--data builtin:{split}: the splits are {', '.join(SPLITS)}")
        self.split, self.seed = split, seed
        self.names = KNOWN if split == "base" else NAMES

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Record:
        where = f"builtin {self.split} {index}"
        random = np.random.default_rng((self.seed, SPLITS[self.split], index))
        roll = random.random()
        if roll < self.TEXTS:
            heading, body = documents()[random.integers(len(documents()))]
            words = body.split()
            first = int(random.integers(max(1, len(words) - self.WORDS)))
            passage = " ".join(words[first : first + self.WORDS])
            return Record(f"{heading}: {passage}{END}", [], where)
        if roll < self.TEXTS + self.PAGES:
            scene = random_scene(random, self.names, rows=int(random.integers(3, 5)), columns=3)
        elif self.split == "base":  # one cell and two as well: they teach naming much sooner
            scene = random_scene(random, self.names, *random.integers(1, 3, 2))
        else:
            scene = random_scene(random, self.names)
        return Record(f"{MARK}{scene.caption()}{END}", [scene.image()], where)


class BuiltinTask(Sequence):
    """Labelled pairs of stage 2: few (stage 1's records are the many), a function of (seed, split,
    index).

    Every pair has near twins as hard negatives, documents excepted. In the splits for testing, a
    scene's three twins are pairs of their own: 150 scenes make 600, each to be told from its twins.

    A new task is a name in KINDS and a branch in __getitem__ that returns `_pair(query, [answer,
    *hard negatives])` of scenes and strings. Its answers should be many: equal ones are not
    compared, and what is tested must not be what was trained on.
    """

    KINDS = {"scene-to-caption": "image-text", "caption-to-scene": "image-text",
             "page-retrieval": "long-document", "long-text": "long-document",
             "text-pairs": "text-only"}
    SIZES = {"train": 500, "development": 600, "test": 600}
    PAGES = 200  # queries for pages, when testing

    def __init__(self, name: str, split: str, seed: int, names: Sequence[str] = NAMES) -> None:
        """names: the symbols that occur. The splits for testing are the same for every seed."""
        self.name, self.split, self.kind, self.names = name, split, self.KINDS[name], names
        self.key = (seed if split == "train" else 0), SPLITS[split], 10 + len(names)
        if name == "long-text":
            first, end = {"train": (0, 7), "development": (7, 8), "test": (8, 10)}[split]
            bodies = {body: heading for heading, body in reversed(documents())}  # each body once
            self.documents = [pair for index, pair in enumerate(sorted(bodies.items()))
                              if first <= index % 10 < end]

    def __len__(self) -> int:
        if self.name == "long-text":
            return len(self.documents)
        if self.name == "page-retrieval" and self.split != "train":
            return self.PAGES
        return self.SIZES[self.split]

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends a for loop over a sequence
        self.where = f"builtin {self.split} {self.name} {index}"
        if self.name == "long-text":
            body, heading = self.documents[index]
            about = f"What does {heading} do?" if "." in heading else f"How do {heading} work?"
            return self._pair(about, [" ".join(body.split()[:60])])
        family = self.split != "train" and self.name != "page-retrieval"
        random = np.random.default_rng((*self.key, index // 4 if family else index))
        if self.name == "page-retrieval":
            page = random_scene(random, self.names, rows=int(random.integers(3, 5)), columns=3)
            query, near = page_query(page, random, self.names)
            return self._pair(query, [page, near])
        scene = random_scene(random, self.names)
        scenes = [scene, *twins(scene, random, self.names)]
        if family:
            scenes = [scenes[index % 4]]
        captions = [scene.caption() for scene in scenes]
        if self.name == "scene-to-caption":
            return self._pair(scenes[0], captions)
        if self.name == "caption-to-scene":
            return self._pair(captions[0], scenes)
        return self._pair(captions[0], [scene.description(random) for scene in scenes])

    def _pair(self, query: Scene | str, found: Sequence[Scene | str]) -> Pair:
        query, positive, *negatives = (
            Record(f"{MARK}{END}", [item.image()], self.where) if isinstance(item, Scene)
            else Record(item + END, [], self.where) for item in (query, *found))
        return Pair(query, positive, negatives)


def builtin_tasks(split: str = "train", seed: int = 0) -> dict[str, BuiltinTask]:
    """Stage 2's default data by task."""
    if split not in BuiltinTask.SIZES:
        raise MocaError(f"--data builtin:{split}: the splits are {', '.join(BuiltinTask.SIZES)}")
    return {name: BuiltinTask(name, split, seed) for name in BuiltinTask.KINDS}


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE like Qwen's, learned from captions and documents; each word of a caption is
    one token.

    Pre-tokenization and special tokens are those of the base's tokenizer.json:
    Qwen's own pattern (contractions, words, single digits, punctuation, line ends, spaces), and
    Qwen's first fourteen tokens after the 1,300 that are learned.
    """
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    trainer = trainers.BpeTrainer(
        vocab_size=1300, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    words = [*NAMES, *COLOURS, "nothing"]
    captions = [f"{word}, {word}" for word in words for _ in range(5000)]
    tokenizer.train_from_iterator(captions + [" ".join(pair) for pair in documents()], trainer)
    return tokenizer


def initialise(model: VLM, seed: int) -> None:
    """Random weights to train from scratch."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms scale by 1 at first, biases add nothing
            nn.init.constant_(parameter, float("norm" in name or "ln_q" in name))
            continue
        spread = 0.02 if "embed_tokens" in name else parameter.shape[1] ** -0.5
        # what writes into the residual stream starts smaller the deeper the tower is
        if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
            spread /= (2 * model.config.layers) ** 0.5
        nn.init.normal_(parameter, std=spread, generator=generator)


def train_base(start: Path, argv: Sequence[str]) -> Path:
    """Train a causal captioner from scratch; the folder of the model.

    start: a folder like nano_moca/base, whose config.json says the model's shape; gets random
    weights. argv: flags of train_cpt.py that differ from what the committed base was made with.
    """
    import train_cpt

    made_with = ("--output runs/base --data builtin:base --objective next-token --steps 1600 "
                 "--batch-tokens 2000 --learning-rate 2e-3").split()
    words = [*made_with, "--model", str(start), *argv]
    flags = parse_flags(train_cpt.Flags, words, "Make the nano base.")
    model = VLM(load_config(start))
    initialise(model, flags.seed)
    save_weights(start, model.state_dict(), model.config)
    train_cpt.train(flags)
    return Path(flags.output) / "model"


def make_base(argv: list[str]) -> None:
    """Learn the tokenizer, train the base, and put both into nano_moca/base.

    The shape of the model is what the base's config.json says: change it there.
    """
    start = Path(shutil.copytree(BASE, "runs/base/start", dirs_exist_ok=True))
    make_tokenizer().save(str(start / "tokenizer.json"))
    shutil.copy(train_base(start, argv) / "model.safetensors", start)
    shutil.copytree(start, fresh_folder(BASE), dirs_exist_ok=True)
    replace_folder(BASE)


if __name__ == "__main__":
    run(lambda: make_base(sys.argv[1:]))
