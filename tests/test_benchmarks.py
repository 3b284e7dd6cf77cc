"""`python -m nano_moca.evaluate builtin|mmeb|vidore`: scores beside plain loops over the same
vectors; what is wrong with the data; and what an interrupted evaluation keeps."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nano_moca import MARK, Moca, MocaError, Record, files
from nano_moca.builtin import NAMES, NEW, BuiltinPairs, builtin_tasks, factor_tasks
from nano_moca.evaluate import vectors
from nano_moca.evaluate.command import main
from nano_moca.evaluate.vidore import ndcg

MODEL = Path(__file__).resolve().parent / "golden" / "qwen2.5-vl"
WIDTH = 64  # of its vectors
Vectors = Callable[[Record], np.ndarray]  # a made-up model: a record -> its vector [WIDTH]
Rows = list[dict]


def score(command: str, output: Path, *flags: object, model: Path = MODEL) -> dict:
    """Run a command in this process; what it writes."""
    main([command, "--model", str(model), "--device", "cpu", "--output", str(output),
          *map(str, flags)])
    return json.loads(output.read_text())


def one_line(run: Callable[[], object]) -> str:
    """The message of the MocaError that a call ends with."""
    with pytest.raises(MocaError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, rows: Rows, kind: str) -> Path:
    """Rows as JSON lines or parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.with_name(f"{path.name}.{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Vectors], list[Record]]:
    """`seen = stub(vector)`: models embed by `vector` from now on; what they were given is in
    `seen`."""
    def use(vector: Vectors) -> list[Record]:
        seen: list[Record] = []

        def embed(_: Moca, records: list[Record]) -> torch.Tensor:
            seen.extend(records)
            return torch.from_numpy(np.stack([vector(record) for record in records]))

        monkeypatch.setattr(Moca, "embed", embed)
        return seen
    return use


def axis(number: int) -> np.ndarray:
    """A unit vector: products of such are exact, and so are their ties."""
    return np.eye(WIDTH, dtype=np.float32)[int(number)]


def content(record: Record) -> tuple:
    """What a record says and shows: equal for equal ones, whatever form the image has."""
    def pixels(image: object) -> bytes:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        return repr(image.size).encode() + image.convert("RGB").tobytes()
    return record.text, *map(pixels, record.images)


def by_content(spread: int | None = None) -> Vectors:
    """An encoder without meaning: a random unit vector for each content, or one of `spread`
    axes."""
    def vector(record: Record) -> np.ndarray:
        digest = hashlib.sha256(repr(content(record)).encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest, "big"))
        if spread:
            return axis(int(random.integers(spread)))
        made = random.normal(size=WIDTH).astype(np.float32)
        return made / np.linalg.norm(made)
    return vector


def constant(_: Record) -> np.ndarray:
    """A collapsed model. No round numbers: the order in which products are summed may not
    matter."""
    vector = np.random.default_rng(7).normal(size=WIDTH).astype(np.float32)
    return vector / np.linalg.norm(vector)


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """A product of vectors, exactly summed."""
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


# --- mmeb ----------------------------------------------------------------------------------------

PICTURE = "<|image_1|>\nRepresent the given image."


def mmeb_row(query: str | tuple, *candidates: str | tuple) -> dict:
    """A row of MMEB; each side is a text, or (text, image path)."""
    sides = [(side, "") if isinstance(side, str) else side for side in (query, *candidates)]
    (text, path), *rest = sides
    return {"qry_text": text, "qry_img_path": path, "tgt_text": [text for text, _ in rest],
            "tgt_img_path": [path for _, path in rest]}


MMEB_ROWS = [
    mmeb_row("a cat on a mat", "a cat on a mat!", "seven brown foxes", "nothing"),
    mmeb_row("a cat on a mat", "nothing", "a cat on a mat.", "seven brown foxes"),
    mmeb_row(("<|image_1|> What is this?", "0.png"), (PICTURE, "0.png"), (PICTURE, "1.png")),
    mmeb_row(("<|image_1|> What is this?", "1.png"), (PICTURE, "0.png"), (PICTURE, "1.png")),
    mmeb_row(("<|image_1|>\nFind it.", "sub/2.png"), "a dog", (PICTURE, "sub/2.png"), "a cat"),
    mmeb_row("<|image_1|> a mark without a picture", "a mark without a picture", "a dog"),
    mmeb_row("the same again", "the same again", "a dog", "the same again", "a cat"),  # a tie
    mmeb_row("the picture", (PICTURE, "0.png"), (PICTURE, "1.png"), (PICTURE, "sub/2.png")),
    mmeb_row("one word", "one word", "another wording", "1", "2", "3"),
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three pictures of noise."""
    folder, random = tmp_path / "pictures", np.random.default_rng(1)
    (folder / "sub").mkdir(parents=True)
    for name in ("0.png", "1.png", "sub/2.png"):
        Image.fromarray(random.integers(0, 255, (56, 56, 3), np.uint8)).save(folder / name)
    return folder


def mmeb_by_loop(rows: Rows, vector: Callable[[str, str], np.ndarray]) -> float:
    """Precision@1 from its definition; vector: (text, image path) -> [D]."""
    right = 0
    for row in rows:
        query = vector(row["qry_text"], row["qry_img_path"])
        first, *others = [dot(query, vector(text, path)) for text, path in
                          zip(row["tgt_text"], row["tgt_img_path"], strict=True)]
        for other in others:  # what this test says must not hang on the last bits
            assert not abs(first - other) < 1e-5 or first == other
        right += not math.isnan(first) and all(first > other for other in others)
    return right / len(rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_mmeb_scores_as_a_plain_loop_does(tmp_path: Path, pictures: Path, kind: str, moca: Moca):
    write(tmp_path / "data" / "Mine" / "test-00000-of-00002", MMEB_ROWS[:5], kind)
    write(tmp_path / "data" / "Mine" / "test-00001-of-00002", MMEB_ROWS[5:], kind)
    write(tmp_path / "data" / "Mine" / "train", MMEB_ROWS[:1], kind)  # not of the test
    scores = score("mmeb", tmp_path / "scores.json", "--data", tmp_path / "data",
                   "--images", pictures)["tasks"]["Mine"]
    made: dict[tuple[str, str], np.ndarray] = {}

    def vector(text: str, path: str) -> np.ndarray:
        if (text, path) not in made:
            words = text.replace("<|image_1|>", MARK if path else "")
            images = [pictures / path] if path else []
            made[text, path] = moca.embed([{"text": words, "images": images}])[0].numpy()
        return made[text, path]

    expected = mmeb_by_loop(MMEB_ROWS, vector)
    assert 0 < expected < 1
    chance = sum(1 / len(row["tgt_text"]) for row in MMEB_ROWS) / len(MMEB_ROWS)
    pairs = [list(zip(row["tgt_text"], row["tgt_img_path"], strict=True)) for row in MMEB_ROWS]
    twice = sum(first in others for first, *others in pairs)
    assert scores == {"precision@1": pytest.approx(expected, abs=1e-12),
                      "queries": len(MMEB_ROWS), "chance": pytest.approx(chance, abs=1e-12),
                      "right candidate given twice": twice}


@pytest.mark.parametrize("path", ["", None])
def test_a_mark_of_mmeb_is_a_picture_or_nothing(tmp_path: Path, pictures: Path, path: str | None,
                                                stub: Callable):
    seen = stub(by_content())
    rows = [mmeb_row(("<|image_1|> look\n", "0.png"), ("<|image_1|>words", path), " other \n")]
    write(pictures / "Mine" / "test", rows, "jsonl")  # --images is --data unless given
    score("mmeb", tmp_path / "scores.json", "--data", pictures)
    assert {(record.text, len(record.images)) for record in seen} == {  # spaces and line ends stay
        (f"{MARK} look\n", 1), ("words", 0), (" other \n", 0)}


@pytest.mark.parametrize("candidates", [2, 3, 4, 5, 6, 7, 9, 17, 33, 40])
def test_repeated_candidates_are_ties_and_a_tie_is_wrong(tmp_path: Path, candidates: int,
                                                         stub: Callable):
    stub(by_content())
    rows = [mmeb_row(f"query {n}", f"answer {n}", *[f"answer {n}"] * (candidates - 1))
            for n in range(20)]
    write(tmp_path / "data" / "Mine" / "test", rows, "jsonl")
    made = score("mmeb", tmp_path / "scores.json", "--data", tmp_path / "data")["tasks"]["Mine"]
    assert made == {"precision@1": 0, "queries": 20, "chance": pytest.approx(1 / candidates),
                    "right candidate given twice": 20}


def test_mmeb_gives_nothing_for_a_constant(tmp_path: Path, stub: Callable):
    stub(constant)
    rows = [mmeb_row(f"query {n}", *(f"answer {n} {m}" for m in range(1 + n))) for n in range(1, 9)]
    write(tmp_path / "data" / "Mine" / "test", rows, "jsonl")
    made = score("mmeb", tmp_path / "scores.json", "--data", tmp_path / "data")
    assert made["tasks"]["Mine"]["precision@1"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad", ["right", "wrong", "query"])
def test_one_vector_that_is_not_finite_is_named_and_never_scored(
        tmp_path: Path, bad: str, value: float, stub: Callable):
    """One number of one vector is enough; nothing is written, and nothing kept."""
    def vector(record: Record) -> np.ndarray:
        made = axis(record.text == "wrong")
        made[7] = value if record.text == bad else 0
        return made

    stub(vector)
    rows = [mmeb_row("words", "words", "others"), mmeb_row("query", "right", "wrong")]
    file = write(tmp_path / "data" / "Mine" / "test", rows, "jsonl")
    output = tmp_path / "scores.json"
    message = one_line(lambda: score("mmeb", output, "--data", tmp_path / "data"))
    assert f"{file}:2" in message and "not finite" in message
    assert not output.exists() and not list(tmp_path.rglob("*.npy"))


GOOD = mmeb_row("a", "b", "c")


@pytest.mark.parametrize("row", [
    {key: value for key, value in GOOD.items() if key != "tgt_text"},
    {key: value for key, value in GOOD.items() if key != "qry_img_path"},
    ["no", "object"], "words", None, 7,
    mmeb_row("only one candidate", "a"),
    mmeb_row("no candidate"),
    GOOD | {"tgt_text": ["b", "c", "d"]},
    GOOD | {"tgt_text": ["b", None]},
    GOOD | {"tgt_text": 7},
    GOOD | {"qry_text": None},
    GOOD | {"qry_text": ""},
    GOOD | {"qry_text": "<|image_1|>"},
    GOOD | {"qry_text": "no mark", "qry_img_path": "0.png"},
    GOOD | {"qry_text": "<|image_pad|>"},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": "none.png"},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": "../outside.png"},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": "Mine/test.jsonl"},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": 7},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": "a" * 5000},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": "\ud800.png"},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": ["0.png"]},
    GOOD | {"qry_text": "<|image_1|>", "qry_img_path": {"path": "0.png"}},
    GOOD | {"tgt_text": ["<|image_1|>", "c"], "tgt_img_path": [["0.png"], ""]},
], ids=lambda row: json.dumps(row)[:60])
def test_a_row_that_is_no_row_of_mmeb_is_named(tmp_path: Path, pictures: Path, row: object,
                                               stub: Callable):
    stub(by_content())
    file = write(pictures / "Mine" / "test", [GOOD, row, GOOD], "jsonl")
    output = tmp_path / "scores.json"
    message = one_line(lambda: score("mmeb", output, "--data", pictures))
    assert f"{file}:2" in message
    assert not output.exists()


def test_without_images_the_flag_is_named(tmp_path: Path, pictures: Path, stub: Callable):
    """Task folders and images come apart: the second is easily forgotten."""
    stub(by_content())
    rows = [mmeb_row((PICTURE, "0.png"), "a", "b")]
    file = write(tmp_path / "data" / "Mine" / "test", rows, "jsonl")
    command = ["mmeb", tmp_path / "scores.json", "--data", tmp_path / "data"]
    message = one_line(lambda: score(*command))
    assert message.startswith(f"{file}:1: ") and "--images" in message
    assert score(*command, "--images", pictures)["tasks"]["Mine"]["queries"] == 1


def test_hidden_folders_are_no_tasks(tmp_path: Path, stub: Callable):
    """What tools leave in a folder: an index of their own, a copy of an older state."""
    stub(by_content())
    for name in ("Mine", ".cache", ".Mine.old"):
        write(tmp_path / "data" / name / "test", [GOOD], "jsonl")
    made = score("mmeb", tmp_path / "scores.json", "--data", tmp_path / "data")
    assert list(made["tasks"]) == ["Mine"]


def test_a_missing_picture_is_one_line_of_the_command_and_no_black_square(tmp_path: Path):
    rows = [GOOD, mmeb_row((PICTURE, "gone/0.png"), "a", "b")]
    file = write(tmp_path / "data" / "Mine" / "test", rows, "jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "nano_moca.evaluate", "mmeb", "--model", MODEL, "--device", "cpu",
         "--data", tmp_path / "data", "--output", tmp_path / "scores.json"],
        cwd=MODEL.parents[2], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {file}:2: ") and done.stderr.count("\n") == 1
    assert "gone/0.png" in done.stderr and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("names", [[], ["Mine/train.jsonl"], ["Mine/test.jsonl"]])
def test_mmeb_without_rows_says_so(tmp_path: Path, names: list[str]):
    for name in names:  # a file of another split, or an empty one
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_text("" if "test" in name else json.dumps(GOOD))
    output = tmp_path / "scores.json"
    message = one_line(lambda: score("mmeb", output, "--data", tmp_path / "data"))
    assert str(tmp_path / "data") in message and not output.exists()


def test_mmeb_averages_are_those_the_benchmark_reports(tmp_path: Path, stub: Callable, capsys):
    stub(lambda record: axis(record.text == "no"))
    quarters = {"ImageNet-1K": 1, "N24News": 2, "ObjectNet": 4, "OK-VQA": 3, "GQA": 0,
                "MSCOCO_t2i": 2, "EDIS": 3, "MSCOCO": 1, "RefCOCO": 4, "My own": 4}
    for name, right in quarters.items():
        rows = [mmeb_row("query", *(("yes", "no") if n < right else ("no", "yes")))
                for n in range(4)]
        write(tmp_path / "data" / name / "test", rows, "jsonl")
    made = score("mmeb", tmp_path / "scores.json", "--data", tmp_path / "data")
    assert {name: task["precision@1"] for name, task in made["tasks"].items()} == {
        name: right / 4 for name, right in quarters.items()}
    means = made["average precision@1"]
    assert means == {
        "classification (3 of 10 tasks)": pytest.approx((1 + 2 + 4) / 12),
        "VQA (2 of 10 tasks)": pytest.approx((3 + 0) / 8),
        "retrieval (2 of 12 tasks)": pytest.approx((2 + 3) / 8),
        "visual grounding (2 of 4 tasks)": pytest.approx((1 + 4) / 8),
        "in distribution (5 of 20 tasks)": pytest.approx((1 + 2 + 3 + 2 + 1) / 20),
        "out of distribution (4 of 16 tasks)": pytest.approx((4 + 0 + 3 + 4) / 16),
        "overall (9 of 36 tasks)": pytest.approx((1 + 2 + 4 + 3 + 0 + 2 + 3 + 1 + 4) / 36)}
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*quarters, *means))


def test_mmeb_knows_each_task_once(tmp_path: Path, stub: Callable):
    """The names by kind as the benchmark's paper lists them, in distribution before out of it."""
    stub(by_content())
    kinds = {
        "classification": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A "
                          "ImageNet-R ObjectNet Country211",
        "VQA": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA "
               "TextVQA",
        "retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS "
                     "WebQA OVEN FashionIQ EDIS Wiki-SS-NQ",
        "visual grounding": "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"}
    for name in " ".join(kinds.values()).split():
        write(tmp_path / "data" / name / "test", [GOOD], "jsonl")
    made = score("mmeb", tmp_path / "scores.json", "--data", tmp_path / "data")
    counts = {"classification": 10, "VQA": 10, "retrieval": 12, "visual grounding": 4,
              "in distribution": 20, "out of distribution": 16, "overall": 36}
    assert set(made["average precision@1"]) == {
        f"{name} ({count} of {count} tasks)" for name, count in counts.items()}


# --- vidore --------------------------------------------------------------------------------------

PAGES = 7
PROMPT = "Represent the given document image."  # the default


def page_image(number: int) -> Image.Image:
    """A page whose shade is its number."""
    return Image.new("RGB", (56, 56), (30 * number, 0, 200))


def page_number(record: Record) -> int | None:
    """Which page a record shows; None for a query."""
    if not record.images:
        return None
    image = record.images[0]
    image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    return image.getpixel((0, 0))[0] // 30


def png(number: int) -> bytes:
    """A page as the bytes of a file."""
    file = io.BytesIO()
    page_image(number).save(file, "png")
    return file.getvalue()


RELEVANCE = {  # of query -> page
    "one page": {2: 1},
    "graded": {0: 2, 3: 1, 5: 3, 6: 0},
    "more than five": {0: 1, 1: 1, 2: 3, 3: 1, 4: 2, 5: 1},
    "nothing is right": {1: 0},
    "nobody judged": {},
    "the last": {6: 1, 2: 1},
}


def write_vidore(task: Path, kind: str = "jsonl", ids: type = int, queries: dict = RELEVANCE
                 ) -> Path:
    """A task of BEIR form; in parquet the images are {bytes, path}, else files beside it."""
    task.mkdir(parents=True)
    names = list(queries)
    for number in range(PAGES):
        page_image(number).save(task / f"page {number}.png")
    write(task / "corpus" / "test", [
        {"corpus-id": ids(100 + number), "image": f"page {number}.png" if kind == "jsonl"
         else {"bytes": png(number), "path": None}} for number in range(PAGES)], kind)
    write(task / "queries" / "test", [
        {"query-id": ids(number), "query": name} for number, name in enumerate(names)], kind)
    write(task / "qrels" / "test", [
        {"query-id": ids(number), "corpus-id": ids(100 + page), "score": gain}
        for number, name in enumerate(names) for page, gain in queries[name].items()], kind)
    return task


def dcg(gains: Iterable[float]) -> float:
    """The first five gains, each over log2(1 + rank)."""
    return sum(gain / math.log2(1 + rank) for rank, gain in enumerate(gains, 1) if rank <= 5)


def ndcg_by_search(similarities: list[float], relevance: dict[int, float]) -> float:
    """nDCG@5 from its definition: the worst of all orders that the similarities allow."""
    keys = [-math.inf if math.isnan(value) else value for value in similarities]
    gains = [relevance.get(page, 0) for page in range(len(keys))]
    groups = [[page for page in range(len(keys)) if keys[page] == key]
              for key in sorted(set(keys), reverse=True)]
    orders = itertools.product(*(set(itertools.permutations([gains[page] for page in group]))
                                 for group in groups))
    worst = min(dcg(itertools.chain(*order)) for order in orders)
    return worst / max(dcg(order) for order in set(itertools.permutations(gains)))


def chance_by_search(relevance: dict[int, float]) -> float:
    """The mean of nDCG@5 over all orders."""
    gains = [relevance.get(page, 0) for page in range(PAGES)]
    all_orders = [dcg(order) for order in itertools.permutations(gains)]
    return sum(all_orders) / len(all_orders) / max(all_orders)


JUDGED = {name: pages for name, pages in RELEVANCE.items() if any(pages.values())}
SIMILARITIES = {  # of each query with the pages
    "all apart": lambda query, page: (5 * page + query) % 7,
    "ties": lambda query, page: (page + query) % 3,
    "all equal": lambda query, page: 1,
    # for every query: a product is NaN if any of a page's numbers is
    "some NaN": lambda query, page: math.nan if page % 3 == 0 else (page + query) % 2,
    "all NaN": lambda query, page: math.nan,
    "best last": lambda query, page: -page,
}


@pytest.mark.parametrize("name", SIMILARITIES)
def test_vidore_scores_as_the_definition_says(tmp_path: Path, name: str, stub: Callable):
    names = list(RELEVANCE)

    def vector(record: Record) -> np.ndarray:
        page = page_number(record)
        if page is None:  # query q looks at axis q, where each page has its similarity with q
            return axis(names.index(record.text))
        return np.pad([SIMILARITIES[name](query, page) for query in range(len(names))],
                      (0, WIDTH - len(names))).astype(np.float32)

    seen = stub(vector)
    write_vidore(tmp_path / "data" / "pages")
    if "NaN" in name:  # no vector of a model: see above
        for query, relevance in JUDGED.items():
            row = [SIMILARITIES[name](names.index(query), page) for page in range(PAGES)]
            gains = [relevance.get(page, 0) for page in range(PAGES)]
            assert ndcg(np.array(row, float), np.array(gains, float)) == pytest.approx(
                ndcg_by_search(row, relevance), abs=1e-9)
        return
    made = score("vidore", tmp_path / "scores.json", "--data", tmp_path / "data")
    similarities = [[SIMILARITIES[name](names.index(query), page) for page in range(PAGES)]
                    for query in JUDGED]
    expected = [ndcg_by_search(row, RELEVANCE[query])
                for row, query in zip(similarities, JUDGED, strict=True)]
    chance = [chance_by_search(pages) for pages in JUDGED.values()]
    assert made["tasks"] == {"pages": {
        "ndcg@5": pytest.approx(np.mean(expected), abs=1e-9), "queries": len(JUDGED),
        "chance": pytest.approx(np.mean(chance), abs=1e-9), "pages": PAGES,
        "queries without a right page": 2}}
    assert len(seen) == PAGES + len(JUDGED)


def test_vidore_gives_nothing_when_all_pages_are_one(tmp_path: Path, stub: Callable):
    """One right page among 43 equal ones, in whatever order their products are summed: 0."""
    stub(lambda record: constant(record) if record.images else by_content()(record))
    rows = [{"corpus-id": n, "image": f"{n}.png"} for n in range(43)]
    write(tmp_path / "data" / "pages" / "corpus" / "test", rows, "jsonl")
    for number in range(43):
        Image.new("RGB", (56, 56)).save(tmp_path / "data" / "pages" / f"{number}.png")
    rows = [{"query-id": n, "query": f"query {n}"} for n in range(43)]
    write(tmp_path / "data" / "pages" / "queries" / "test", rows, "jsonl")
    rows = [{"query-id": n, "corpus-id": n, "score": 1} for n in range(43)]
    write(tmp_path / "data" / "pages" / "qrels" / "test", rows, "jsonl")
    made = score("vidore", tmp_path / "scores.json", "--data", tmp_path / "data")
    assert made["tasks"]["pages"]["ndcg@5"] == 0


@pytest.mark.parametrize("kind, ids", [("jsonl", int), ("jsonl", str), ("parquet", int),
                                       ("parquet", str)])
def test_vidore_reads_both_forms_of_images_and_ids(tmp_path: Path, kind: str, ids: type,
                                                   moca: Moca):
    write_vidore(tmp_path / "data" / "pages", kind, ids)
    scores, other = (score("vidore", tmp_path / "scores.json", "--data", tmp_path / "data", *flags)
                     for flags in ([], ["--prompt", "other words"]))
    for made, prompt in ((scores, PROMPT), (other, "other words")):
        pages = moca.embed([{"text": f"{MARK}\n{prompt}", "images": [page_image(number)]}
                            for number in range(PAGES)]).numpy()
        queries = moca.embed(list(JUDGED)).numpy()
        expected = [ndcg_by_search([dot(query, page) for page in pages], relevance)
                    for query, relevance in zip(queries, JUDGED.values(), strict=True)]
        assert made["tasks"]["pages"]["ndcg@5"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_the_prompt_stands_beside_each_page_and_no_query(tmp_path: Path, stub: Callable):
    write_vidore(tmp_path / "data" / "pages")
    for flags, prompt in (([], PROMPT), (["--prompt", "other words"], "other words")):
        seen = stub(by_content())
        score("vidore", tmp_path / "scores.json", "--data", tmp_path / "data", *flags)
        assert sorted(record.text for record in seen) == sorted(
            [f"{MARK}\n{prompt}"] * PAGES + list(JUDGED))


def test_vidore_averages_over_its_tasks(tmp_path: Path, stub: Callable):
    def vector(record: Record) -> np.ndarray:
        page = page_number(record)
        return axis(1 if record.text == "one page" and page is None or page == 2 else 0)

    stub(vector)
    write_vidore(tmp_path / "data" / "found", queries={"one page": {2: 1}})
    write_vidore(tmp_path / "data" / "lost", queries={"one page": {3: 1}})
    (tmp_path / "data" / "no task").mkdir()
    made = score("vidore", tmp_path / "scores.json", "--data", tmp_path / "data")
    assert {name: task["ndcg@5"] for name, task in made["tasks"].items()} == {"found": 1, "lost": 0}
    assert made["average ndcg@5"] == {"overall (2 of 2 tasks)": 0.5}


def write_languages(task: Path, found: dict[str, list[bool]], say: str = "language") -> Path:
    """A task with a query for each truth value, in these languages: whether it finds its page.

    For `stub(look)`: a query finds page 2, and should find page 2 or page 3.
    """
    write_vidore(task)
    rows = [(language, hit) for language, hits in found.items() for hit in hits]
    write(task / "queries" / "test", [
        {"query-id": number, "query": f"one page, {number}", say: language}
        for number, (language, _) in enumerate(rows)], "jsonl")
    write(task / "qrels" / "test", [
        {"query-id": number, "corpus-id": 102 if hit else 103, "score": 1}
        for number, (_, hit) in enumerate(rows)], "jsonl")
    return task


def look(record: Record) -> np.ndarray:
    """Pages 0 and 1 before page 2, and page 2 before page 3; the query on all of them."""
    page = page_number(record)
    values = [1.0] if page is None else [0.9 - page / 10]
    return np.pad(values, (0, WIDTH - 1)).astype(np.float32)


HIT, MISS = 1 / math.log2(1 + 3), 1 / math.log2(1 + 4)  # nDCG@5 of the third and fourth place


def test_vidore_scores_english_and_all_languages(tmp_path: Path, stub: Callable):
    """All: the mean over languages, however many queries each has."""
    stub(look)
    found = {"french": [False], "english": [True, True, False], "german": [True, False]}
    write_languages(tmp_path / "data" / "mine", found)
    made = score("vidore", tmp_path / "scores.json", "--data", tmp_path / "data")
    english = (2 * HIT + MISS) / 3
    every = (MISS + english + (HIT + MISS) / 2) / 3
    assert {name: task["ndcg@5"] for name, task in made["tasks"].items()} == {
        "mine": pytest.approx(every), "mine, english": pytest.approx(english)}
    assert {name: task["queries"] for name, task in made["tasks"].items()} == {
        "mine": 6, "mine, english": 3}
    assert made["average ndcg@5"] == {"overall (1 of 1 tasks)": pytest.approx(every)}


@pytest.mark.parametrize(("found", "say"), [
    ({"english": [True, False]}, "language"), ({"french": [True], "german": [False]}, "language"),
    ({"english": [True], "french": [False]}, "locale")])
def test_vidore_gives_english_only_beside_other_languages(tmp_path: Path, found: dict, say: str,
                                                          stub: Callable):
    stub(look)
    write_languages(tmp_path / "data" / "mine", found, say)
    made = score("vidore", tmp_path / "scores.json", "--data", tmp_path / "data")
    assert list(made["tasks"]) == ["mine"]
    assert made["tasks"]["mine"]["ndcg@5"] == pytest.approx((HIT + MISS) / 2)


def test_vidore_v2_is_seven_tasks_in_the_paper_and_four_in_mteb(tmp_path: Path, stub: Callable):
    """By the hub's names; other tasks are in neither average."""
    stub(look)
    data = tmp_path / "data"
    write_languages(data / "esg_reports_human_labeled_v2", {"english": [True, False, False]})
    for name, french in (("esg_reports_v2", True), ("economics_reports_v2", False),
                         ("biomedical_lectures_v2", True)):
        write_languages(data / name, {"english": [True], "french": [french], "german": [False]})
    write_languages(data / "another", {"english": [True]})
    made = score("vidore", tmp_path / "scores.json", "--data", data)
    labeled, two, one = (HIT + 2 * MISS) / 3, (2 * HIT + MISS) / 3, (HIT + 2 * MISS) / 3
    assert made["average ndcg@5"] == {
        "ViDoRe-v2 as in the paper (7 of 7 tasks)": pytest.approx(
            (labeled + 2 * two + one + 3 * HIT) / 7),
        "ViDoRe(v2) as in mteb (4 of 4 tasks)": pytest.approx((labeled + 2 * two + one) / 4),
        "overall (5 of 5 tasks)": pytest.approx((labeled + 2 * two + one + HIT) / 5)}
    shutil.rmtree(data / "economics_reports_v2")
    made = score("vidore", tmp_path / "scores.json", "--data", data)
    assert list(made["average ndcg@5"]) == ["ViDoRe-v2 as in the paper (5 of 7 tasks)",
                                            "ViDoRe(v2) as in mteb (3 of 4 tasks)",
                                            "overall (4 of 4 tasks)"]


CORPUS, QUERY, JUDGEMENT = ({"corpus-id": 100, "image": "page 0.png"},
                            {"query-id": 0, "query": "words"},
                            {"query-id": 0, "corpus-id": 100, "score": 1})


@pytest.mark.parametrize("part, row", [
    ("corpus", {"corpus-id": 107}),
    ("corpus", ["a list"]),
    ("corpus", CORPUS | {"corpus-id": 107, "image": "none.png"}),
    ("corpus", CORPUS | {"corpus-id": 107, "image": "../outside.png"}),
    ("corpus", CORPUS | {"corpus-id": 107, "image": None}),
    ("corpus", CORPUS | {"corpus-id": 107, "image": {"bytes": None, "path": None}}),
    ("corpus", CORPUS | {"corpus-id": 107, "image": "corpus/test.jsonl"}),
    *(("corpus", CORPUS | {"corpus-id": name}) for name in (None, [7], True, 1.5, math.nan)),
    ("queries", {"query": "no id"}),
    ("queries", QUERY | {"query-id": {}}),
    ("queries", QUERY | {"language": ["english"]}),
    ("qrels", JUDGEMENT | {"query-id": "x" * 10_000}),
    ("queries", QUERY | {"query": ""}),
    ("queries", QUERY | {"query": None}),
    ("queries", QUERY | {"query": f"{MARK} no image"}),
    ("qrels", {"query-id": 0, "corpus-id": 100}),
    ("qrels", JUDGEMENT | {"query-id": 99}),
    ("qrels", JUDGEMENT | {"corpus-id": 99}),
    ("qrels", JUDGEMENT | {"corpus-id": None}),
    ("qrels", JUDGEMENT | {"corpus-id": [100]}),
    ("qrels", JUDGEMENT | {"score": "much"}),
    ("qrels", JUDGEMENT | {"score": None}),
    ("qrels", JUDGEMENT | {"score": -1}),
    ("qrels", JUDGEMENT | {"score": math.nan}),
    ("qrels", JUDGEMENT | {"score": math.inf}),
    ("qrels", JUDGEMENT | {"score": 10**400}),
], ids=lambda value: json.dumps(value)[:60])
def test_a_row_that_is_no_row_of_vidore_is_named(tmp_path: Path, part: str, row: object,
                                                 stub: Callable):
    stub(by_content())
    task = write_vidore(tmp_path / "data" / "pages", queries={"words": {0: 1}})
    file = task / part / "test.jsonl"
    good = "" if part == "queries" else file.read_text()  # there is one query
    file.write_text(good + json.dumps(row) + "\n")
    output = tmp_path / "scores.json"
    message = one_line(lambda: score("vidore", output, "--data", tmp_path / "data"))
    assert f"{file}:{good.count(chr(10)) + 1}" in message and len(message) < 600
    assert not output.exists()


@pytest.mark.parametrize(("part", "row"), [("corpus", CORPUS), ("queries", QUERY)])
def test_vidore_takes_nothing_twice(tmp_path: Path, part: str, row: dict, stub: Callable):
    stub(by_content())
    task = write_vidore(tmp_path / "data" / "pages")
    write(task / part / "other", [row], "jsonl")
    message = one_line(lambda: score("vidore", tmp_path / "scores.json", "--data", task.parent))
    assert str(task / part) in message and "twice" in message


@pytest.mark.parametrize("part", ["corpus", "queries", "qrels"])
@pytest.mark.parametrize("left", ["no folder", "no file", "no row"])
def test_vidore_names_the_part_that_is_not_there(tmp_path: Path, part: str, left: str,
                                                 stub: Callable):
    stub(by_content())
    task = write_vidore(tmp_path / "data" / "pages")
    (task / part / "test.jsonl").write_text("")
    if left != "no row":
        (task / part / "test.jsonl").unlink()
    if left == "no folder":
        (task / part).rmdir()
    output = tmp_path / "scores.json"
    message = one_line(lambda: score("vidore", output, "--data", tmp_path / "data"))
    assert str(task / part) in message and not output.exists()


def test_vidore_without_a_right_page_for_any_query_says_so(tmp_path: Path, stub: Callable):
    stub(by_content())
    task = write_vidore(tmp_path / "data" / "pages", queries={"words": {0: 0}})
    output = tmp_path / "scores.json"
    message = one_line(lambda: score("vidore", output, "--data", tmp_path / "data"))
    assert str(task) in message and not output.exists()


# --- builtin -------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pairs of each task of the embedded default."""
    monkeypatch.setattr(BuiltinPairs, "SIZES", {"train": 24, "development": 24, "test": 24})
    monkeypatch.setattr(BuiltinPairs, "PAGES", 12)


BUILTIN = {*BuiltinPairs.KINDS, *factor_tasks("test"), "mixed shelf"}


def builtin_by_loop(task: BuiltinPairs, vector: Vectors) -> dict[str, float]:
    """The scores of a task from their definitions."""
    candidates = {content(record): vector(record) for pair in task
                  for record in (pair.positive, *pair.negatives)}
    ranks = []
    for pair in task:
        query, own = vector(pair.query), content(pair.positive)
        right = dot(query, candidates[own])
        ranks.append(1 + sum(not dot(query, found) < right for key, found in candidates.items()
                             if key != own))
    gains = [1 / math.log2(1 + rank) if rank <= 5 else 0 for rank in ranks]
    return {"recall@1": np.mean([rank == 1 for rank in ranks]),
            "recall@10": np.mean([rank <= 10 for rank in ranks]), "ndcg@5": np.mean(gains),
            "queries": len(ranks), "candidates": len(candidates),
            "chance recall@1": 1 / len(candidates),
            "chance recall@10": min(1, 10 / len(candidates))}


@pytest.mark.parametrize("split", ["test", "development"])
@pytest.mark.parametrize("spread", [None, 9])
def test_builtin_scores_as_a_plain_loop_does(tmp_path: Path, small: None, split: str,
                                             spread: int | None, stub: Callable):
    """Vectors at random, and vectors full of ties."""
    stub(vector := by_content(spread))
    made = score("builtin", tmp_path / "scores.json", "--split", split)
    assert set(made["tasks"]) == BUILTIN
    for name in ("scene-to-caption", "page-retrieval", "text-pairs"):
        expected = builtin_by_loop(builtin_tasks(split)[name], vector)
        assert made["tasks"][name] == pytest.approx(expected, abs=1e-9)
    mean = np.mean([task["recall@1"] for task in made["tasks"].values()])
    assert made["average recall@1"] == {"overall (14 of 14 tasks)": pytest.approx(mean)}


def test_families_are_scored_by_their_twins_too(tmp_path: Path, small: None, stub: Callable):
    """Of each query, how many of its three twins are farther than the right answer."""
    stub(vector := by_content(9))  # with ties, which are not beaten
    made = score("builtin", tmp_path / "scores.json")["tasks"]
    for name, task in factor_tasks("test").items():
        beaten = 0
        for index in range(24):
            pair, first = task[index], index // 4 * 4
            own = dot(vector(pair.query), vector(pair.positive))
            beaten += sum(dot(vector(pair.query), vector(task[twin].positive)) < own
                          for twin in range(first, first + 4) if twin != index)
        assert made[name]["twins beaten"] == pytest.approx(beaten / 72)
        assert made[name] == pytest.approx(
            builtin_by_loop(task, vector) | {"twins beaten": beaten / 72}, abs=1e-9)


def test_the_mixed_shelf_holds_the_answers_of_all_tasks(tmp_path: Path, small: None,
                                                        stub: Callable):
    """Each task counts alike, on the shelf of all kinds as on its own."""
    stub(vector := by_content())
    made = score("builtin", tmp_path / "scores.json")["tasks"]
    tasks = builtin_tasks("test")
    shelf = {content(record): vector(record) for task in tasks.values() for pair in task
             for record in (pair.positive, *pair.negatives)}
    hits = {name: [] for name in tasks}
    for name, task in tasks.items():
        for pair in task:
            own = dot(vector(pair.query), shelf[content(pair.positive)])
            before = sum(not dot(vector(pair.query), found) < own for found in shelf.values())
            hits[name].append(before <= 10)  # itself among them
    mixed = made["mixed shelf"]
    assert mixed["candidates"] == len(shelf)
    assert mixed["recall@10"] == pytest.approx(np.mean([np.mean(hit) for hit in hits.values()]))
    own_shelf = np.mean([made[name]["recall@10"] for name in tasks])
    assert mixed["own shelf recall@10"] == pytest.approx(own_shelf)


def test_the_splits_and_the_unlabelled_symbols_are_other_scenes(tmp_path: Path, small: None,
                                                         stub: Callable):
    by_split = {}
    for split in ("test", "development"):
        seen = stub(by_content())
        score("builtin", tmp_path / f"{split}.json", "--split", split)
        by_split[split] = {record.text for record in seen if record.text.count(",") == 2}
    assert min(map(len, by_split.values())) > 48
    assert not by_split["test"] & by_split["development"]
    old = set(NAMES) - set(NEW)  # the base's own; scenes without them are those of new symbols
    assert sum(not old & set(re.findall(r"\w+", text)) for text in by_split["test"]) >= 24


def test_builtin_gives_all_to_a_model_that_knows(tmp_path: Path, small: None, stub: Callable):
    """It sees in each query the answer, of the kind that is asked for."""
    tasks = builtin_tasks("test") | factor_tasks("test")
    meant = {content(pair.query): pair.positive for task in tasks.values() for pair in task}
    stub(lambda record: by_content()(meant.get(content(record), record)))
    made = score("builtin", tmp_path / "scores.json")["tasks"]
    for name in BUILTIN:
        assert made[name]["recall@1"] == made[name]["recall@10"] == made[name]["ndcg@5"] == 1, name


def test_builtin_gives_nothing_for_a_constant(tmp_path: Path, small: None, stub: Callable):
    stub(constant)
    for name, task in score("builtin", tmp_path / "scores.json")["tasks"].items():
        assert task["recall@1"] == task["recall@10"] == task["ndcg@5"] == 0, name


def test_twins_are_among_the_candidates(tmp_path: Path, small: None, stub: Callable):
    """A model that knows which words occur, but not where: a scene and the twin in which two cells
    are swapped are one to it. Two of a family's four scenes are such twins."""
    captions = {content(pair.query): pair.positive.text
                for pair in builtin_tasks("test")["scene-to-caption"]}

    def bag(record: Record) -> np.ndarray:
        words = captions.get(content(record), record.text).replace("<|im_end|>", "")
        return by_content()(Record(" ".join(sorted(words.replace(",", "").split()))))

    seen = stub(bag)
    made = score("builtin", tmp_path / "scores.json")["tasks"]["scene-to-caption"]
    assert made["recall@1"] == 0.5 and made["recall@10"] == 1 and made["candidates"] == 24
    assert set(captions.values()) <= {record.text for record in seen}


# --- what an interrupted evaluation keeps --------------------------------------------------------

@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What was embedded so far, by the golden model, three records at a time."""
    seen: list[Record] = []
    embed = Moca.embed

    def counting(moca: Moca, records: list[Record]) -> torch.Tensor:
        vectors = embed(moca, records)
        seen.extend(records)
        return vectors

    monkeypatch.setattr(Moca, "embed", counting)
    monkeypatch.setattr(vectors, "AT_ONCE", 3)
    return seen


@pytest.fixture
def mmeb_data(tmp_path: Path, pictures: Path) -> Path:
    """Two tasks of MMEB with their pictures."""
    write(pictures / "GQA" / "test", MMEB_ROWS, "jsonl")
    write(pictures / "EDIS" / "test", [mmeb_row("a dog", "dogs", "no dog")], "jsonl")
    return pictures


def kept_files(output: Path) -> dict[str, bytes]:
    """The vectors kept beside an output."""
    return {file.name: file.read_bytes() for file in Path(f"{output}.vectors").iterdir()}


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_what_was_interrupted_goes_on_where_it_stopped(
        tmp_path: Path, mmeb_data: Path, counted: list[Record], calls: int,
        monkeypatch: pytest.MonkeyPatch):
    whole = score("mmeb", tmp_path / "whole.json", "--data", mmeb_data)
    everything = sorted(record.text for record in counted)
    counted.clear()
    output, embed = tmp_path / "parts.json", Moca.embed

    def breaking(moca: Moca, records: list[Record]) -> torch.Tensor:
        if len(counted) >= 3 * calls:
            raise KeyboardInterrupt
        return embed(moca, records)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Moca, "embed", breaking)
        score("mmeb", output, "--data", mmeb_data)
    first = len(counted)
    assert score("mmeb", output, "--data", mmeb_data) == whole
    assert sorted(record.text for record in counted) == everything and first <= 3 * calls
    assert kept_files(output) == kept_files(tmp_path / "whole.json")
    assert score("mmeb", output, "--data", mmeb_data) == whole
    assert len(counted) == len(everything)  # nothing was left to do


def test_a_file_cut_short_by_a_crash_is_not_taken_for_vectors(
        tmp_path: Path, mmeb_data: Path, counted: list[Record], monkeypatch: pytest.MonkeyPatch):
    def cut(file: Path) -> None:
        os.truncate(file, 100)
        raise KeyboardInterrupt

    output = tmp_path / "scores.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "flush", cut)
        score("mmeb", output, "--data", mmeb_data)
    counted.clear()
    made = score("mmeb", output, "--data", mmeb_data)
    assert made == score("mmeb", tmp_path / "other.json", "--data", mmeb_data)
    assert len(kept_files(output)) == len(kept_files(tmp_path / "other.json"))


def other_vectors(good: bytes, shape: tuple[int, ...], kind: type = np.float32) -> bytes:
    """The bytes of a .npy file of the first numbers of a good one."""
    file = io.BytesIO()
    numbers = np.resize(np.load(io.BytesIO(good)), shape)
    np.save(file, numbers.astype(kind), allow_pickle=kind is object)
    return file.getvalue()


DAMAGES = {
    "empty": lambda good: b"",
    "its magic alone": lambda good: good[:8],
    "cut in its head": lambda good: good[:50],
    "cut after its head": lambda good: good[:128],
    "the last byte lost": lambda good: good[:-1],
    "zeros": lambda good: bytes(len(good)),
    "an archive": lambda good: b"PK\x03\x04" + good,
    "text": lambda good: b"vectors\n" * 99,
    "a head without brackets": lambda good: good.replace(b"{", b"(", 1),
    "one row": lambda good: other_vectors(good, (1, WIDTH)),
    "one vector": lambda good: other_vectors(good, (WIDTH,)),
    "one number": lambda good: other_vectors(good, ()),
    "doubles": lambda good: other_vectors(good, np.load(io.BytesIO(good)).shape, np.float64),
    "objects": lambda good: other_vectors(good, np.load(io.BytesIO(good)).shape, object),
    "zeros for numbers": lambda good: good[:128] + bytes(len(good) - 128),
    "one number of another": lambda good: good[:-4] + np.float32(2).tobytes(),
    "NaN": lambda good: good[:-4] + np.float32(np.nan).tobytes(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_kept_vectors_that_are_damaged_are_made_again(
        tmp_path: Path, mmeb_data: Path, counted: list[Record], damage: str):
    """The part that was damaged, and no other."""
    output = tmp_path / "scores.json"
    made, good = score("mmeb", output, "--data", mmeb_data), kept_files(output)
    name = sorted(good)[1]
    damaged = DAMAGES[damage](good[name])
    assert damaged != good[name]
    Path(f"{output}.vectors", name).write_bytes(damaged)
    counted.clear()
    assert score("mmeb", output, "--data", mmeb_data) == made
    assert 0 < len(counted) <= 3 and kept_files(output) == good


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_in_the_place_of_kept_vectors_is_not_read(tmp_path: Path, mmeb_data: Path):
    """Nobody writes into it: to open it would never end."""
    output = tmp_path / "scores.json"
    made = score("mmeb", output, "--data", mmeb_data)
    file = sorted(Path(f"{output}.vectors").glob("*.npy"))[0]
    file.unlink()
    os.mkfifo(file)
    assert score("mmeb", output, "--data", mmeb_data) == made and file.is_file()


def test_a_folder_in_the_place_of_kept_vectors_is_named(tmp_path: Path, mmeb_data: Path):
    output = tmp_path / "scores.json"
    score("mmeb", output, "--data", mmeb_data)
    (file, *_) = Path(f"{output}.vectors").iterdir()
    file.unlink()
    (file / "of the user's").mkdir(parents=True)
    assert str(file) in one_line(lambda: score("mmeb", output, "--data", mmeb_data))
    assert (file / "of the user's").is_dir()


@pytest.mark.parametrize("flags", [
    ["--attention", "causal"], ["--pooling", "last"], ["--dtype", "bfloat16"],
    ["--min-pixels", "10000"], ["--max-pixels", "3136"],
], ids=" ".join)
def test_other_settings_never_meet_what_was_kept(
        tmp_path: Path, mmeb_data: Path, counted: list[Record], flags: list[str]):
    score("mmeb", tmp_path / "scores.json", "--data", mmeb_data)
    number = len(counted)
    made = score("mmeb", tmp_path / "scores.json", "--data", mmeb_data, *flags)
    assert len(counted) == 2 * number
    assert made == score("mmeb", tmp_path / "fresh.json", "--data", mmeb_data, *flags)


def test_other_code_never_meets_what_was_kept(
        tmp_path: Path, mmeb_data: Path, counted: list[Record], monkeypatch: pytest.MonkeyPatch):
    """Every file of the package counts, in its folders too."""
    package = tmp_path / "package"
    (package / "report").mkdir(parents=True)
    monkeypatch.setattr(vectors, "__file__", str(package / "evaluate" / "vectors.py"))
    score("mmeb", tmp_path / "scores.json", "--data", mmeb_data)
    number = len(counted)
    score("mmeb", tmp_path / "scores.json", "--data", mmeb_data)
    assert len(counted) == number
    (package / "report" / "ranking.py").write_text("")
    score("mmeb", tmp_path / "scores.json", "--data", mmeb_data)
    assert len(counted) == 2 * number


@pytest.mark.parametrize("moved", [False, True])
def test_another_model_never_meets_what_was_kept(
        tmp_path: Path, mmeb_data: Path, counted: list[Record], checkpoint: Path, moved: bool):
    """Other weights, in files of the same size: at the same path, or at another."""
    output = tmp_path / "scores.json"
    score("mmeb", output, "--data", mmeb_data, model=checkpoint)
    number = len(counted)
    if moved:
        checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    tensors = load_file(checkpoint / "model.safetensors")
    other = {key: tensor.roll(1, 0) for key, tensor in tensors.items()}
    size = (checkpoint / "model.safetensors").stat().st_size
    save_file(other, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert (checkpoint / "model.safetensors").stat().st_size == size
    made = score("mmeb", output, "--data", mmeb_data, model=checkpoint)
    assert len(counted) == 2 * number
    assert made == score("mmeb", tmp_path / "fresh.json", "--data", mmeb_data, model=checkpoint)


def test_another_picture_at_the_same_path_is_embedded(
        tmp_path: Path, mmeb_data: Path, counted: list[Record]):
    """Even one of the same size in bytes and of the same time, as copying tools make them."""
    path = mmeb_data / "0.png"  # the format follows the content, not the name
    for shade in (10, 200):
        Image.new("RGB", (56, 56), (shade, 0, 0)).save(path, "bmp")
        os.utime(path, (1_000_000_000, 1_000_000_000))
        if shade == 10:
            size = path.stat().st_size
            score("mmeb", tmp_path / "scores.json", "--data", mmeb_data)
            counted.clear()
    assert path.stat().st_size == size
    made = score("mmeb", tmp_path / "scores.json", "--data", mmeb_data)
    shown = [record for record in counted if path in record.images]
    assert len(shown) == 2 and len(counted) < 12  # its parts, and no other
    assert made == score("mmeb", tmp_path / "fresh.json", "--data", mmeb_data)
    assert kept_files(tmp_path / "fresh.json").items() <= kept_files(
        tmp_path / "scores.json").items()


# --- flags ---------------------------------------------------------------------------------------

EVERYWHERE = ("model", "output", "attention", "pooling", "dtype", "device", "processor")
OWN = {"embed": ("input", "prompt"), "builtin": ("split",), "mmeb": ("data", "images"),
       "vidore": ("data", "prompt")}
NEEDED = {"embed": ["--input", "i"], "builtin": [], "mmeb": ["--data", "d"],
          "vidore": ["--data", "d"]}


@pytest.mark.parametrize(("command", "name"), [
    (command, name) for command, names in OWN.items() for name in EVERYWHERE + names])
def test_an_empty_value_is_refused_by_its_flag(command: str, name: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in ([f"--{name}", ""], [f"--{name}="], [f"--{name}", " \t"]):
        with pytest.raises(SystemExit) as caught:
            main([command, "--model", "m", "--output", "o", *NEEDED[command], *words])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and f"--{name}" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["min-pixels", "max-pixels", "max-tokens"])
@pytest.mark.parametrize("value", ["0", "-5", "1e3", "9" * 400, "", "nan", "99999999999"])
def test_a_limit_that_cannot_be_is_refused_by_its_flag(name: str, value: str, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["builtin", "--model", "m", "--output", "o", f"--{name}={value}"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and f"--{name}" in error


@pytest.mark.parametrize("argv", [
    "builtin --model m",
    "builtin --output o",
    "builtin --model m --output o --split train",
    "builtin --model m --output o --data d",
    "builtin --model m --output o --input i",
    "mmeb --model m --output o",
    "mmeb --model m --output o --data d --prompt p",
    "mmeb --model m --output o --data d --image i",
    "mmeb --model m --output o --data d --attention both",
    "mmeb --model m --output o --data d --dtype float16",
    "mmeb --model m --output o --data d --device tpu",
    "mmeb --model m --output o --data d --min-pixels 0",
    "mmeb --model m --output o --data d --max-pixels -1",
    "mmeb --model m --output o --data d --max-pixels 1e6",
    "vidore --model m --output o",
    "vidore --model m --output o --data d --images i",
    "vidore --model m --output o --data d --pooling max",
    "vidore --model m --output o --data d --prompt",
    "vidore --model m --output o --data d extra",
    "beir --model m --output o --data d",
])
def test_a_flag_that_is_wrong_is_one_line_and_exit_code_2(argv: str, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["mmeb", "vidore"])
@pytest.mark.parametrize("data", ["none", "empty", "empty/file.jsonl"])
def test_data_that_holds_no_task_is_named(tmp_path: Path, command: str, data: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.jsonl").write_text("{}")
    output = tmp_path / "scores.json"
    message = one_line(lambda: score(command, output, "--data", tmp_path / data))
    assert str(tmp_path / data) in message and not output.exists()


def test_a_model_that_is_not_there_is_named(tmp_path: Path):
    message = one_line(lambda: score("builtin", tmp_path / "scores.json", model=tmp_path / "none"))
    assert "none" in message and not (tmp_path / "scores.json").exists()
