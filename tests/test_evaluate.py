"""`python -m nano_moca.evaluate`: vectors in the file's order, and errors of one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nano_moca
from nano_moca import MARK, Moca, MocaError
from nano_moca.evaluate.__main__ import main
from nano_moca.evaluate.vectors import AT_ONCE

GOLDEN = Path(__file__).resolve().parent / "golden"
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
    assert [file.name for file in output.parent.iterdir()] == ["vectors.npy"]
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
    assert not list(folder.rglob("vectors.npy*"))


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
    assert output.read_bytes() == b"what was there" and len(list(folder.iterdir())) == 3
