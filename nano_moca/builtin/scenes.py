"""Scenes and pages: pictures whose every detail a caption can say.

A *scene* is compositional: four cells, each empty or one of 48 symbols in one of 8
colours, with the caption "red anchor, blue star, nothing, yellow snowman". A *page*
is a larger grid of the same symbols, found by a query that names two or three of its
items.

Each colour and each symbol is one word, and one token of the nano base, so that a
masked word cannot be guessed from its own other half. Near *twins* of a scene have two
cells swapped, one colour changed or one symbol changed: they are the hard negatives.

Left out: sizes, rotation, overlap. What is where is enough to test composition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# A character, and the one word of its Unicode name that identifies it.
NAMES = tuple(
    "spade heart diamond club star telephone airplane umbrella snowman anchor skull queen knight "
    "note sun cloud moon scissors envelope pencil voltage yin peace house flag swords gear springs "
    "beverage florette snowflake check ballot infinity omega lamda pi section ampersand at "
    "question seven triangle square circle male female arrow".split())
CHARACTERS = "♠♥♦♣★☎✈☂☃⚓☠♛♞♪☀☁☾✂✉✏⚡☯☮⌂⚑⚔⚙♨☕✿❄✓✗∞Ωλπ§&@?7▲■●♂♀➔"
SYMBOLS = dict(zip(NAMES, CHARACTERS, strict=True))
# The nano base knows alternate ones: the first, third, fifth, ...
KNOWN = NAMES[::2]
NEW = NAMES[1::2]
COLOURS: dict[str, tuple[int, int, int]] = dict(
    red=(240, 40, 40), orange=(255, 140, 0), yellow=(250, 230, 40), green=(40, 200, 60),
    cyan=(40, 220, 230), blue=(60, 90, 255), purple=(170, 60, 230), white=(245, 245, 245))
CELL = 56  # pixels of a cell's side
INK = 50  # pixels of a symbol's longer side
GROUND = 16  # grey of the ground
EMPTY = 0.2  # share of empty cells
Cell = tuple[str, str] | None  # (colour, symbol)


@lru_cache(maxsize=None)
def glyph(name: str) -> np.ndarray:
    """A symbol's ink, [CELL, CELL] float32 in 0..1, scaled so that it fills its cell."""
    import matplotlib

    # Drawn large and cut out, since the font's symbols are of very unlike sizes.
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(file), 160)
    large = Image.new("L", (400, 400))
    ImageDraw.Draw(large).text((100, 100), SYMBOLS[name], fill=255, font=font)

    # Then shrunk into the middle of the cell.
    ink = large.crop(large.getbbox())
    ink = ImageOps.contain(ink, (INK, INK), Image.Resampling.LANCZOS)
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
        height = CELL * len(self.cells) // self.columns
        pixels = np.full((height, CELL * self.columns, 3), GROUND, np.float32)
        for number, cell in enumerate(self.cells):
            if cell is None:
                continue

            # Where ink is partial, at the edges, a blend of ground and colour.
            colour, name = cell
            contrast = np.array(COLOURS[colour]) - GROUND  # [3]
            ink = glyph(name)[..., None] * contrast  # [CELL, CELL, 3]
            y, x = CELL * np.array(divmod(number, self.columns))
            pixels[y : y + CELL, x : x + CELL] += ink
        return Image.fromarray(pixels.astype(np.uint8))

    def caption(self) -> str:
        """What is in the cells, in reading order."""
        return ", ".join(" ".join(cell) if cell else "nothing" for cell in self.cells)

    def description(self, random: np.random.Generator) -> str:
        """The same of four cells in another wording: what is in which corner, in any
        order."""
        spots = ("top left", "top right", "bottom left", "bottom right")
        items = [f"{spot} a {' '.join(cell)}" for spot, cell in zip(spots, self.cells) if cell]

        # Shuffled, so that the place of a word in the text says nothing.
        order = random.permutation(len(items))
        return ", ".join(items[i] for i in order)


def random_scene(random: np.random.Generator, names: Sequence[str] = NAMES, rows: int = 2,
                 columns: int = 2) -> Scene:
    """Symbols and colours at random; never all empty, and with two unlike cells if it
    has two."""
    colours = list(COLOURS)
    while True:
        cells: list[Cell] = [None] * (rows * columns)
        for number in range(len(cells)):
            if random.random() >= EMPTY:
                colour = colours[random.integers(len(colours))]
                name = names[random.integers(len(names))]
                cells[number] = (colour, name)

        # From an empty scene there is nothing to learn; in equal cells, nothing to swap.
        if any(cells) and (len(set(cells)) > 1 or len(cells) == 1):
            return Scene(tuple(cells), columns)


def twins(scene: Scene, random: np.random.Generator, names: Sequence[str] = NAMES) -> list[Scene]:
    """Three near misses: two cells swapped, one colour changed, one symbol changed."""
    # The swap, of two cells that differ: the same words in another order.
    cells = scene.cells
    unlike = []
    for i in range(len(cells)):
        for j in range(i):
            if cells[i] != cells[j]:
                unlike.append((i, j))
    i, j = unlike[random.integers(len(unlike))]
    swapped = list(cells)
    swapped[i], swapped[j] = cells[j], cells[i]

    # Then one word replaced: first a colour, then a symbol.
    family = [swapped]
    full = [number for number, cell in enumerate(cells) if cell]
    for part, words in enumerate((COLOURS, names)):
        number = int(random.choice(full))
        changed = list(cells[number])
        others = [word for word in words if word != changed[part]]
        changed[part] = str(random.choice(others))
        twin = list(cells)
        twin[number] = tuple(changed)
        family.append(twin)
    return [replace(scene, cells=tuple(twin)) for twin in family]


def page_query(page: Scene, random: np.random.Generator, names: Sequence[str] = NAMES
               ) -> tuple[str, Scene]:
    """A question that names two or three of a page's items, and a near page that lacks
    the first of them."""
    # Sorted, since the order of a set changes from process to process.
    items = sorted(set(page.cells) - {None})
    order = random.permutation(len(items))
    chosen = [items[i] for i in order[: random.integers(2, 4)]]

    # The near page has another symbol of the same colour wherever that item stands.
    colour = chosen[0][0]
    others = [name for name in names if (colour, name) not in items]
    other = (colour, str(random.choice(others)))
    near = tuple(other if cell == chosen[0] else cell for cell in page.cells)
    *first, last = map(" ".join, chosen)
    return f"a page with {', '.join(first)} and {last}", replace(page, cells=near)
