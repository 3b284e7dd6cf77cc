"""Scenes and pages: pictures whose every detail a caption can say.

A *scene* is compositional: three cells in a row, each empty or one of 72 symbols in one
of 8 colours, with the caption "a red anchor, an orange star, nothing". A *page* has four
or six cells, and is found by a query that names two of its items.

A scene has three *factors*: names, colours, and places. A change of one factor alone
gives a near twin, which serves as hard negative; and families of such twins test
one factor at a time. Half of all scenes have a single colour, so that nobody
can get by on colours.

Each colour and each symbol is one word, and one token of the nano base, so that a
masked word cannot be guessed from its own other half. A cell is four merged groups of
patches: if some are masked, the others still show what it holds.

Left out: sizes, rotation, overlap. What is where is enough to test composition.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# A character, and one word for it.
NAMES = tuple(
    "spade alpha heart diamond beta club star gamma telephone airplane theta umbrella atom "
    "sigma anchor skull phi queen knight psi note sun two cloud moon three envelope pencil "
    "four bolt house five flag gear mars fountain cup venus flower snowflake percent tick "
    "cross pound omega lambda yen pi ampersand plus seven triangle taurus square circle "
    "gemini arrow shamrock leo dollar hand flask rook king coffin bishop euro trefoil hash "
    "ring dagger infinity".split())
CHARACTERS = "♠α♥♦β♣★Γ☎✈θ☂⚛Σ⚓☠φ♛♞ψ♪☀2☁☾3✉✏4⚡⌂5⚑⚙♂♨☕♀✿❄%✓✗£Ωλ¥π&+7▲♉■●♊➔☘♌$☛⚗♜♚⚰♝€☢#◯†∞"
SYMBOLS = dict(zip(NAMES, CHARACTERS, strict=True))
COLOURS: dict[str, tuple[int, int, int]] = dict(
    red=(240, 40, 40), orange=(255, 140, 0), yellow=(250, 230, 40), green=(40, 200, 60),
    cyan=(40, 220, 230), blue=(60, 90, 255), purple=(170, 60, 230), white=(245, 245, 245))
# Two of every three symbols, and every other colour, are known to the nano base and occur
# in labelled pairs; the others, in stage 1's unlabelled data alone.
NEW = NAMES[2::3]
KNOWN = tuple(name for name in NAMES if name not in NEW)
KNOWN_COLOURS, NEW_COLOURS = tuple(COLOURS)[::2], tuple(COLOURS)[1::2]
FACTORS = ("place", "colour", "name")
PARTS = ("train", "train", "development", "test")  # of the data, by shares
CELL = 56  # pixels of a cell's side
INK = 50  # pixels of a symbol's longer side
GROUND = 16  # grey of the ground
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


def in_words(cell: Cell) -> str:
    """A cell in English: "a red sun", "an orange sun", "nothing"."""
    if cell is None:
        return "nothing"
    article = "an" if cell[0] == "orange" else "a"
    return f"{article} {' '.join(cell)}"


@dataclass(frozen=True)
class Scene:
    """Cells in reading order, `columns` to a row."""

    cells: tuple[Cell, ...]
    columns: int = 3

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
        return ", ".join(map(in_words, self.cells))

    def description(self, random: np.random.Generator) -> str:
        """The same of three cells in another wording: what is in which place, in any
        order."""
        spots = ("left", "middle", "right")
        items = [f"{spot} {in_words(cell)}" for spot, cell in zip(spots, self.cells) if cell]

        # Shuffled, so that the place of a word in the text says nothing.
        order = random.permutation(len(items))
        return ", ".join(items[i] for i in order)


@dataclass(frozen=True)
class Palette:
    """Draws scenes of given symbols and colours that belong to one part of the data."""

    names: Sequence[str] = NAMES
    colours: Sequence[str] = tuple(COLOURS)
    one_colour: float = 0.6  # share of scenes in a single colour
    empty: float = 0.15  # share of empty cells
    part: str = "train"

    def has(self, scene: Scene) -> bool:
        """Whether a scene belongs to this part: half of all do to "train", a quarter each to
        "test" and "development".

        What decides is which symbols it holds: of what is tested, no other arrangement or
        colouring is in the training data either.
        """
        names = sorted(cell[1] for cell in scene.cells if cell)
        return PARTS[zlib.crc32(" ".join(names).encode()) % len(PARTS)] == self.part

    def scene(self, random: np.random.Generator, rows: int = 1, columns: int = 3) -> Scene:
        """Symbols and colours at random; never all empty, and no thing twice, so that there
        is something to learn and something to swap."""
        one = random.random() < self.one_colour
        while True:
            cells: list[Cell] = [None] * (rows * columns)
            colour = str(random.choice(self.colours))
            for number in range(len(cells)):
                if random.random() >= self.empty:
                    colour = colour if one else str(random.choice(self.colours))
                    cells[number] = (colour, str(random.choice(self.names)))

            full = [cell for cell in cells if cell]
            scene = Scene(tuple(cells), columns)
            if full and len(set(full)) == len(full) and self.has(scene):
                return scene

    def change(self, scene: Scene, factor: str, random: np.random.Generator) -> Scene:
        """A near miss that differs in one factor: two cells swapped, one colour changed or
        one symbol changed."""
        cells = list(scene.cells)
        full = [number for number, cell in enumerate(cells) if cell]
        number = int(random.choice(full))
        colour, name = cells[number]

        # The same words in another order, or one word replaced.
        if factor == "place":
            other = int(random.integers(len(cells)))
            cells[number], cells[other] = cells[other], cells[number]
        elif factor == "colour":
            cells[number] = (str(random.choice(self.colours)), name)
        else:
            cells[number] = (colour, str(random.choice(self.names)))
        return replace(scene, cells=tuple(cells))

    def family(self, scene: Scene, factors: Sequence[str], random: np.random.Generator
               ) -> list[Scene]:
        """The scene and one near miss for each of `factors`, all different."""
        family = [scene]
        for factor in factors:
            twin = scene
            while twin in family or not self.has(twin):
                twin = self.change(scene, factor, random)
            family.append(twin)
        return family

    def page_query(self, page: Scene, random: np.random.Generator) -> tuple[str, Scene]:
        """A question that names two of a page's items, and a near page that lacks the
        first of them."""
        # Sorted, since the order of a set changes from process to process.
        items = sorted(set(page.cells) - {None})
        order = random.permutation(len(items))
        chosen = [items[i] for i in order[:2]]

        # The near page has another symbol of the same colour wherever that item stands.
        near = page
        while chosen[0] in near.cells or not self.has(near):
            other = (chosen[0][0], str(random.choice(self.names)))
            cells = [other if cell == chosen[0] else cell for cell in page.cells]
            near = replace(page, cells=tuple(cells))
        named = " and ".join(map(in_words, chosen))
        return f"Find a page with {named}", near


ALL = Palette()
LABELLED = Palette(KNOWN, KNOWN_COLOURS)
