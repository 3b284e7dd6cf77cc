"""`python -m nano_moca.evaluate`: vectors in the file's order, and errors of one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nano_moca
from nano_moca import MARK, Moca, MocaError, Record
from nano_moca.builtin import BuiltinPairs
from nano_moca.evaluate import __main__ as main_module
from nano_moca.evaluate import vectors
from nano_moca.evaluate.__main__ import main
from nano_moca.evaluate.vectors import AT_ONCE

GOLDEN = Path(__file__).resolve().parent / "golden"
ROOT = GOLDEN.parents[1]
MODEL = GOLDEN / "qwen2.5-vl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the golden images."""
    shutil.copytree(GOLDEN / "images", tmp_path / "images")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    """items.jsonl of objects, or of a string as it stands."""
    path = folder / "items.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(text + "\n" for text in texts))
    return path


def embed(items: Path, *flags: str) -> np.ndarray:
    """Run the command in this process."""
    output = items.parent / "made" / "vectors.npy"
    main(["embed", "--model", str(MODEL), "--device", "cpu", "--input", str(items),
          "--output", str(output), *flags])
    assert sorted(file.name for file in output.parent.iterdir()) == [
        "vectors.npy", "vectors.npy.vectors"]
    return np.load(output)


def golden_items() -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / "records.jsonl").read_text().splitlines()]


def alone(moca: Moca, item: dict) -> np.ndarray:
    """The embedding of one item by itself."""
    images = [GOLDEN / image for image in item.get("images", [])]
    return moca.embed([{"text": item["text"], "images": images}])[0].numpy()


def test_vectors_are_in_the_files_order_and_those_of_each_item_alone(folder: Path, moca: Moca):
    words = [{"text": "word " * (1 + 7 * number % 11) + str(number)} for number in range(AT_ONCE)]
    items = golden_items() + words  # more than one part, and lengths in disorder
    vectors = embed(write(folder, *items))
    assert vectors.shape == (len(items), 64) and vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    expected = np.stack([alone(moca, item) for item in items])
    assert np.abs(vectors - expected).max() < 2e-6
    nearest = (vectors @ expected.T).argmax(1)
    assert (nearest == np.arange(len(items))).all()


@pytest.mark.parametrize("attention, pooling", [("causal", "last"), ("causal", "mean")])
def test_attention_and_pooling_are_those_asked_for(folder: Path, attention: str, pooling: str):
    items = golden_items()[:3]
    vectors = embed(write(folder, *items), "--attention", attention, "--pooling", pooling)
    moca = nano_moca.load(MODEL, "cpu", attention=attention, pooling=pooling)
    assert np.abs(vectors - np.stack([alone(moca, item) for item in items])).max() < 2e-6


def test_dtype_and_pixel_limits_change_what_is_computed(folder: Path):
    items = write(folder, golden_items()[1])  # an image of 84 x 84
    plain = embed(items)
    half, larger, smaller = (embed(items, *flags) for flags in (
        ("--dtype", "bfloat16"), ("--min-pixels", "20000"), ("--max-pixels", "3136")))
    assert 1e-6 < np.abs(plain - half).max() < 0.05
    assert np.abs(np.linalg.norm(half, axis=1) - 1).max() < 1e-6
    assert np.abs(plain - larger).max() > 1e-4 and np.abs(plain - smaller).max() > 1e-4


def test_a_longer_text_is_shortened_to_the_limit_that_is_asked_for(
        folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What is asked for reaches `load`."""
    asked = []

    def load(*words: object, **more: object) -> Moca:
        asked.append({name: value for name, value in more.items() if value})
        return replace(nano_moca.load(*words), max_tokens=more.get("max_tokens"))

    monkeypatch.setattr(vectors, "load", load)
    items = write(folder, {"text": "one two three four five six seven eight nine ten"})
    whole, short = embed(items), embed(items, "--max-tokens", "3")
    moca = replace(nano_moca.load(MODEL, "cpu"), max_tokens=3)
    text = json.loads(items.read_text())["text"]
    assert np.abs(short - moca.embed([text]).numpy()).max() < 2e-6 < np.abs(short - whole).max()
    embed(items, "--processor", str(MODEL), "--allow-extra")
    assert asked == [{}, {"max_tokens": 3}, {"processor": str(MODEL), "allow_extra": True}]


def test_the_prompt_stands_beside_images_without_words(folder: Path, moca: Moca, capsys):
    image = ["images/0-rgb-84x84.png"]
    items = write(folder, {"text": MARK, "images": image}, {"text": MARK * 2, "images": image * 2},
                  {"text": f"{MARK} words", "images": image}, {"text": "a question"})
    plain = embed(items)
    assert "4 unit vectors of width 64, 0 of them with the prompt" in capsys.readouterr().out
    prompted = embed(items, "--prompt", "Represent $1 page.")
    assert "4 unit vectors of width 64, 2 of them with the prompt" in capsys.readouterr().out
    expected = [{"text": f"{MARK}\nRepresent $1 page.", "images": image},
                {"text": f"{MARK * 2}\nRepresent $1 page.", "images": image * 2}]
    assert np.abs(prompted[:2] - np.stack([alone(moca, item) for item in expected])).max() < 2e-6
    assert np.abs(prompted[:2] - plain[:2]).max() > 1e-3
    assert np.abs(prompted[2:] - plain[2:]).max() < 2e-6


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_what_was_interrupted_goes_on_where_it_stopped(
        folder: Path, calls: int, monkeypatch: pytest.MonkeyPatch):
    """Each item is embedded once, before the interruption or after it."""
    items = write(folder, *({"text": f"item {number} " * (1 + number % 3)} for number in range(8)))
    whole = embed(items)
    shutil.rmtree(folder / "made" / "vectors.npy.vectors")
    done, made, stop = Moca.embed, [], [calls]

    def counting(moca: Moca, records: list[Record]) -> torch.Tensor:
        if len(made) == stop[0]:
            raise KeyboardInterrupt
        made.append([record.text for record in records])
        return done(moca, records)

    monkeypatch.setattr(Moca, "embed", counting)
    monkeypatch.setattr(vectors, "AT_ONCE", 3)
    with pytest.raises(KeyboardInterrupt):
        embed(items)
    output = folder / "made" / "vectors.npy"
    assert len(list((folder / "made" / "vectors.npy.vectors").glob("*.npy"))) == calls
    assert np.array_equal(np.load(output), whole)  # of before, until there is a new one
    stop[0] = 9
    assert np.abs(embed(items) - whole).max() < 2e-6
    texts = sorted(text for part in made for text in part)
    assert len(texts) == len(set(texts)) == 8
    stop[0] = len(made)  # and once more costs nothing
    assert np.abs(embed(items) - whole).max() < 2e-6


@pytest.mark.parametrize("name", ["mlp.down_proj", "norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_named_and_not_written(
        folder: Path, checkpoint: Path, name: str, value: float, monkeypatch: pytest.MonkeyPatch):
    """Whatever let such weights pass, the result is looked at too."""
    moca = nano_moca.load(checkpoint, "cpu")
    for key, weight in moca.model.named_parameters():
        if name in key:
            weight.data.view(-1)[0] = value
    monkeypatch.setattr(vectors, "load", lambda *_, **__: moca)
    items = write(folder, {"text": "good"})
    with pytest.raises(MocaError, match=rf"{items}:1: .*not finite"):
        embed(items)
    assert not [file for file in folder.rglob("*.npy*") if file.is_file()]


def test_columns_that_nobody_reads_are_not_read(folder: Path):
    """A date that Python has not, such as tools put in when they were not told one."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def table(path: Path, **columns: list) -> Path:
        made = pyarrow.table(columns)
        dates = pyarrow.array([2**61] * len(made), pyarrow.timestamp("ms"))
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(made.append_column("crawled", dates), path)
        return path

    items = table(folder / "items.parquet", text=["one", "two"], images=[[], []])
    assert embed(items).shape == (2, 64)
    table(folder / "M" / "GQA" / "test.parquet", qry_text=["a"], qry_img_path=[""],
          tgt_text=[["b", "c"]], tgt_img_path=[["", ""]])
    page = (folder / "images" / "0-rgb-84x84.png").read_bytes()
    table(folder / "V" / "pages" / "corpus" / "test.parquet", **{"corpus-id": [1], "image": [page]})
    table(folder / "V" / "pages" / "queries" / "test.parquet", **{"query-id": [1], "query": ["a"]})
    table(folder / "V" / "pages" / "qrels" / "test.parquet",
          **{"query-id": [1], "corpus-id": [1], "score": [1]})
    for command, data in (("mmeb", "M"), ("vidore", "V")):
        main([command, "--model", str(MODEL), "--device", "cpu", "--data", str(folder / data),
              "--output", str(folder / f"{command}.json")])
    assert json.loads((folder / "vidore.json").read_text())["tasks"]["pages"]["ndcg@5"] == 1


# --- what is written ------------------------------------------------------------------------------

def test_what_is_read_is_not_written_over(folder: Path, checkpoint: Path):
    """The input, an image beside it, each file of the model; by whatever path or link."""
    items = write(folder, {"text": MARK, "images": ["images/0-rgb-84x84.png"]})
    weights = checkpoint / "model.safetensors"
    link, further = folder / "link.npy", folder / "linked"
    link.symlink_to(weights)
    further.symlink_to(folder)
    hard = folder / "hard.npy"
    os.link(items, hard)
    read = [path for path in [*folder.rglob("*"), *checkpoint.rglob("*")] if path.is_file()]
    before = {path: path.read_bytes() for path in read}
    for output in (items, weights, checkpoint / "config.json", link, hard, further / "items.jsonl",
                   folder / "images" / ".." / "items.jsonl"):
        with pytest.raises(MocaError, match=f"--output {output} is a file of --") as caught:
            main(["embed", "--model", str(checkpoint), "--device", "cpu", "--input", str(items),
                  "--output", str(output)])
        assert "\n" not in str(caught.value)
    with pytest.raises(MocaError, match=r"0-rgb-84x84.png, an image of .*items.jsonl:1: "):
        main(["embed", "--model", str(checkpoint), "--device", "cpu", "--input", str(items),
              "--output", str(folder / "images" / "0-rgb-84x84.png")])
    assert {path: path.read_bytes() for path in before} == before
    assert not list(folder.rglob("*.new"))


def test_what_an_earlier_evaluation_wrote_is_written_again(folder: Path):
    """Though it lies beside what is read."""
    items = write(folder / "images", {"text": "words"})
    data = folder / "data"
    (data / "GQA").mkdir(parents=True)
    row = {"qry_text": "a", "qry_img_path": "", "tgt_text": ["b", "c"], "tgt_img_path": ["", ""]}
    (data / "GQA" / "test.jsonl").write_text(json.dumps(row))
    for _ in range(2):
        common = ["--model", str(MODEL), "--device", "cpu", "--output"]
        main(["embed", *common, str(items.parent / "v.npy"), "--input", str(items)])
        main(["embed", *common, str(items.parent / "v.npy"), "--input", str(items.parent)])
        main(["mmeb", *common, str(data / "scores.json"), "--data", str(data)])
    (folder / "other.npy").write_bytes(b"")  # of somebody else, and nothing that is read
    main(["embed", *common, str(folder / "other.npy"), "--input", str(items)])


@pytest.mark.parametrize("before", [False, True])
def test_what_an_output_is_written_as_first_is_not_taken_from_anybody(folder: Path, before: bool):
    """A picture called <output>.new; also where an evaluation has been before."""
    picture = (folder / "images" / "0-rgb-84x84.png").rename(folder / "v.new")
    content = picture.read_bytes()
    words = ["embed", "--model", str(MODEL), "--device", "cpu", "--output", str(folder / "v"),
             "--input"]
    if before:
        picture.rename(folder / "elsewhere")
        main([*words, str(write(folder, {"text": "words"}))])
        (folder / "elsewhere").rename(picture)
    with pytest.raises(MocaError, match="v.new"):
        main([*words, str(write(folder, {"text": MARK, "images": ["v.new"]}))])
    assert picture.read_bytes() == content


def test_an_earlier_output_that_is_an_input_now_is_not_written_over(folder: Path):
    items = write(folder, {"text": "words"})
    words = ["embed", "--model", str(MODEL), "--device", "cpu", "--input"]
    output = folder / "v.jsonl"
    main([*words, str(items), "--output", str(output)])
    output.write_text(items.read_text() * 2)
    with pytest.raises(MocaError, match="--input"):
        main([*words, str(output), "--output", str(output)])
    assert output.read_text() == items.read_text() * 2


def test_two_evaluations_do_not_write_one_output(folder: Path):
    fcntl = pytest.importorskip("fcntl")
    items = write(folder, {"text": "words"})
    embed(items)
    kept = folder / "made" / "vectors.npy.vectors"
    with open(kept / ".nano_moca", "a") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        with pytest.raises(MocaError, match="another run is at work"):
            embed(items)
    embed(items)


def test_a_file_in_the_place_of_kept_vectors_is_known_before_the_work(
        folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(main_module, "make_embedder", lambda _: pytest.fail("the work began"))
    (folder / "v.vectors").write_text("of the user")
    with pytest.raises(MocaError, match="v.vectors cannot be written"):
        main(["embed", "--model", "m", "--input", "i", "--output", str(folder / "v")])
    assert (folder / "v.vectors").read_text() == "of the user"


def test_an_output_with_a_last_slash_is_a_file(folder: Path):
    items = write(folder, {"text": "words"})
    main(["embed", "--model", str(MODEL), "--device", "cpu", "--input", str(items), "--output",
          f"{folder}/made/"])
    assert np.load(folder / "made").shape == (1, 64)


@pytest.mark.parametrize("command", ["embed", "builtin", "mmeb"])
@pytest.mark.parametrize("place", ["a folder", "a folder, and vectors", "in a file", "a pipe",
                                   "too long", "a dead link"])
def test_an_output_that_cannot_be_written_is_known_before_the_work(
        folder: Path, command: str, place: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(main_module, "make_embedder", lambda _: pytest.fail("the work began"))
    output = folder / "out" / "o"
    output.parent.mkdir()
    if place.startswith("a folder"):
        output.mkdir()
        if "vectors" in place:
            (folder / "out" / "o.vectors").mkdir()
    elif place == "in a file":
        output.write_text("a file")
        output = output / "o"
    elif place == "a pipe":
        os.mkfifo(output)
    elif place == "too long":
        output = folder / ("o" * 255)
    else:
        output.symlink_to(folder / "gone" / "o")
    before = sorted(folder.rglob("*"))
    words = {"embed": ["--input", str(write(folder, {"text": "words"}))], "builtin": [],
             "mmeb": ["--data", str(folder)]}[command]
    with pytest.raises(MocaError, match=str(output)) as caught:
        main([command, "--model", str(MODEL), "--output", str(output), *words])
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) in (before, sorted([*before, folder / "items.jsonl"]))


@pytest.mark.parametrize("size", [1, 100, 129, 4000, 10100])  # of 10,368 bytes
def test_a_full_disk_names_the_vectors_and_leaves_what_stood_there(
        folder: Path, size: int, full_disk: Callable):
    """Wherever in the file the room ends: also in its last bytes."""
    items = write(folder, *({"text": f"item {number}"} for number in range(40)))
    output = folder / "vectors.npy"
    output.write_bytes(b"x")
    words = ["embed", "--model", str(MODEL), "--device", "cpu", "--input", str(items)]
    with full_disk(size), pytest.raises(MocaError, match="vectors.npy.* cannot be written"):
        main([*words, "--output", str(output)])
    assert output.read_bytes() == b"x"
    assert not list(folder.rglob("*.new"))
    main([*words, "--output", str(output)])
    assert output.stat().st_size == 10368 and len(np.load(output)) == 40


def test_a_full_disk_names_the_scores(folder: Path, full_disk: Callable):
    (folder / "D" / "GQA").mkdir(parents=True)
    row = {"qry_text": "a", "qry_img_path": "", "tgt_text": ["b", "c"], "tgt_img_path": ["", ""]}
    (folder / "D" / "GQA" / "test.jsonl").write_text(json.dumps(row) + "\n")
    output = folder / "s.json"
    words = ["mmeb", "--model", str(MODEL), "--device", "cpu", "--data", str(folder / "D"),
             "--output", str(output)]
    main(words)
    good = output.read_bytes()
    with full_disk(200), pytest.raises(MocaError, match="s.json cannot be written"):
        main(words)
    assert output.read_bytes() == good  # whole, of before


IMAGE = {"text": MARK, "images": ["images/0-rgb-84x84.png"]}


@pytest.mark.parametrize("line, part", [
    ('{"text": "cut sh', "not JSON"),
    ("", "not JSON"),
    ('["a list"]', '"text"'),
    ({"images": []}, '"text"'),
    ({"text": "  "}, "empty"),
    ({"text": MARK}, "image"),
    (IMAGE | {"text": "no mark"}, "image"),
    (IMAGE | {"images": ["images/none.png"]}, "none.png"),
    (IMAGE | {"images": ["../outside.png"]}, "outside"),
    (IMAGE | {"images": ["/etc/hostname"]}, "outside"),
    (IMAGE | {"images": [7]}, "image"),
    (IMAGE | {"images": ["items.jsonl"]}, "items.jsonl"),
], ids=lambda value: json.dumps(value)[:40])
def test_what_cannot_be_used_is_named_with_file_and_line(folder: Path, line: object, part: str):
    items = write(folder, {"text": "good"}, line, IMAGE)
    with pytest.raises(MocaError) as caught:
        embed(items)
    message = str(caught.value)
    assert f"{items}:2" in message and part in message and "\n" not in message
    assert not [file for file in folder.rglob("*.npy*") if file.is_file()]


@pytest.mark.parametrize("content", [None, ""])
def test_an_absent_or_empty_file_is_an_error_that_names_it(folder: Path, content: str | None):
    items = folder / "items.jsonl"
    if content is not None:
        items.write_text(content)
    with pytest.raises(MocaError, match="items.jsonl"):
        embed(items)


@pytest.mark.parametrize("argv", [
    ["embed", "--model", "m", "--input", "i", "--output", "o", "--atention", "causal"],
    ["embed", "--model", "m", "--input", "i", "--output", "o", "--att", "causal"],
    ["embed", "--model", "m", "--input", "i", "--output", "o", "--pooling", "max"],
    ["embed", "--model", "m", "--input", "i", "--output", "o", "--min-pixels", "many"],
    ["embed", "--model", "m", "--output", "o"],
    ["embedd"],
    [],
], ids=" ".join)
def test_a_flag_that_is_wrong_is_one_line_and_exit_code_2(argv: list[str], capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_as_a_command_an_error_is_one_line_and_exit_code_1(folder: Path):
    items = write(folder, {"text": "good"}, {"text": ""})
    output = folder / "vectors.npy"
    output.write_bytes(b"what was there")
    done = subprocess.run(
        [sys.executable, "-m", "nano_moca.evaluate", "embed", "--model", MODEL, "--device", "cpu",
         "--input", items, "--output", output],
        cwd=GOLDEN.parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {items}:2: ") and done.stderr.count("\n") == 1
    assert output.read_bytes() == b"what was there" and not list(folder.rglob("*.new"))


# --- from PDFs to a search ------------------------------------------------------------------------

# As the docs show it, but for the model, which is `runs/cl/model` there.
PAGES_TO_PICTURES = '''\
mkdir pages
for file in *.pdf; do pdftoppm -r 100 -png "$file" "pages/${file%.pdf}"; done
'''
LIST_THEM = '''\
for page in pages/*.png; do
    echo '{"text": "<|vision_start|><|image_pad|><|vision_end|>", "images": ["'"$page"'"]}'
done > items.jsonl
'''
EMBED_THEM = '''\
python -m nano_moca.evaluate embed --model runs/cl/model --input items.jsonl --output pages.npy \\
    --prompt "Represent the given document image." --min-pixels 200704 --max-pixels 802816
'''
SEARCH = '''\
import json
import numpy as np
import nano_moca

pages = np.load("pages.npy")  # [pages, width], unit vectors in the order of items.jsonl
items = [json.loads(line) for line in open("items.jsonl")]
moca = nano_moca.load("runs/cl/model")
query = moca.embed(["Which region grew fastest?"]).numpy()
scores = (query @ pages.T)[0]
for number in np.argsort(-scores)[:5]:
    print(f"{scores[number]:.3f}", items[number]["images"][0])
'''
WITH_FAISS = '''\
index = faiss.IndexFlatIP(pages.shape[1])
index.add(pages)
scores, numbers = index.search(query, 5)
'''
PARTS = (PAGES_TO_PICTURES, LIST_THEM, EMBED_THEM, SEARCH, WITH_FAISS)


def test_from_pdfs_to_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Two small PDFs of built-in pages, in a folder that holds nothing else at first: each of
    their pages is found by the picture that it was made of."""
    pairs = BuiltinPairs("page-retrieval", "test", 0)
    scenes = [pairs[number].positive.images[0] for number in range(5)]
    (tmp_path / "runs" / "cl").mkdir(parents=True)
    (tmp_path / "runs" / "cl" / "model").symlink_to(ROOT / "notebooks" / "embedder")
    monkeypatch.chdir(tmp_path)
    for name, part in (("a report", scenes[:3]), ("notes", scenes[3:])):
        part[0].save(f"{name}.pdf", save_all=True, append_images=part[1:], resolution=100)

    names = ["a report-1", "a report-2", "a report-3", "notes-1", "notes-2"]
    if shutil.which("pdftoppm"):
        subprocess.run(["bash", "-c", PAGES_TO_PICTURES], check=True)
    else:  # what it would make
        Path("pages").mkdir()
        for name, scene in zip(names, scenes, strict=True):
            scene.save(f"pages/{name}.png")
    subprocess.run(["bash", "-c", LIST_THEM], check=True)
    main(shlex.split(EMBED_THEM.replace("\\\n", ""))[3:] + ["--device", "cpu"])
    capsys.readouterr()
    exec(SEARCH, {})
    found = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert sorted(file for _, file in found) == [f"pages/{name}.png" for name in names]
    scores = [float(score) for score, _ in found]
    assert scores == sorted(scores, reverse=True)

    # In the order of items.jsonl, and of these pixels at this size.
    pages = np.load(tmp_path / "pages.npy")
    moca = nano_moca.load(ROOT / "notebooks" / "embedder", "cpu", min_pixels=200704,
                          max_pixels=802816)
    text = f"{MARK}\nRepresent the given document image."
    shown = moca.embed([{"text": text, "images": [scene]} for scene in scenes]).numpy()
    assert (pages @ shown.T).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_faiss_finds_what_numpy_finds():
    faiss = pytest.importorskip("faiss")
    random = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    pages, query = random / np.linalg.norm(random, axis=1, keepdims=True), random[:1]
    names = {"faiss": faiss, "pages": pages, "query": query}
    exec(WITH_FAISS, names)  # the docs' own lines
    assert names["numbers"][0].tolist() == np.argsort(-(query @ pages.T)[0])[:5].tolist()


def test_the_docs_quote_what_is_tested_here():
    """Word for word, wherever they show it."""
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = file.read_text(encoding="utf-8")
        if "pdftoppm -r" in text:
            assert [part for part in PARTS if part not in text] == []
