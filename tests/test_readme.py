"""The README is true: its line counts, files, flags, pictures and commands."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from dataclasses import fields
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

import train_cl
import train_cpt
from nano_moca.ablate import ARMS, SHOWN

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# not on the road that training runs on
BESIDE = {"builtin.py", "evaluate.py", "benchmark.py", "ablate.py"}


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    source = path.read_text(encoding="utf-8")
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER}
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type not in blank for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


SCRIPTS = [ROOT / "train_cpt.py", ROOT / "train_cl.py"]


def road_files() -> list[Path]:
    """What the two stages run on."""
    package = sorted(path for path in (ROOT / "nano_moca").glob("*.py") if path.name not in BESIDE)
    return [*SCRIPTS, *package]


def test_the_first_sentence_counts_right() -> None:
    """Its number of files and of lines, and the lines beside the road."""
    files, lines = re.search(r"the (\d+) files .*? are ([\d,]+)\s+lines", README, re.S).groups()
    assert int(files) == len(road_files()) - len(SCRIPTS)
    assert int(lines.replace(",", "")) == sum(map(code_lines, road_files()))
    beside = sum(code_lines(ROOT / "nano_moca" / name) for name in BESIDE)
    assert f"another {beside} lines" in README


def test_the_table_lists_every_file_with_its_lines() -> None:
    """A row a file, in the order in which they import each other."""
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M))
    paths = [*SCRIPTS, *(ROOT / "nano_moca").glob("*.py")]
    assert {name: int(count) for name, count in rows.items()} == {
        str(path.relative_to(ROOT)): code_lines(path) for path in paths}


def test_files_import_only_from_files_above() -> None:
    """The reading order is an order: no file of the table needs one that stands below it."""
    order = re.findall(r"^\| `nano_moca/(\w+)\.py` \|", README, re.M)
    for name in order:
        source = (ROOT / "nano_moca" / f"{name}.py").read_text(encoding="utf-8")
        source = source.replace("if TYPE_CHECKING:", "\0").split("\0")[0]  # annotations only
        for needed in re.findall(r"^from nano_moca\.(\w+) import", source, re.M):
            assert order.index(needed) < order.index(name), f"{name} imports {needed}"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_links_and_pictures_exist(link: str) -> None:
    """Every relative link leads to a file."""
    assert (ROOT / link).exists()


def test_flags_exist() -> None:
    """Every --flag that the README names is one of the scripts' or of a tool it names."""
    known = {"--" + field.name.replace("_", "-")
             for script in (train_cpt, train_cl) for field in fields(script.Flags)}
    known |= {"--help", "--nproc_per_node", "--input", "--prompt", "--images"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known


def test_no_line_is_too_long() -> None:
    """At most 100 characters a line of code."""
    for path in [*SCRIPTS, *(path for folder in ("nano_moca", "tests", "notebooks")
                             for path in (ROOT / folder).glob("*.py"))]:
        lines = path.read_text(encoding="utf-8").splitlines()
        long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
        assert not long, f"{path}: lines {long}"


def test_the_drawing_is_still_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its script draws from the code as it is looks like the committed picture."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import stages

    stages.draw_stages(tmp_path / "stages.png")
    with (Image.open(tmp_path / "stages.png") as drawn,
          Image.open(ROOT / "notebooks" / "figures" / "stages.png") as committed):
        now, then = (np.asarray(picture.convert("RGB").resize((90, 92)), np.float32)
                     for picture in (drawn, committed))
    assert np.abs(now - then).max() < 40  # fonts and edges may differ a little, no part of it


def test_the_table_of_arms_is_the_measured_one() -> None:
    """Each mean, range and number of runs follows from ablations.json."""
    results = json.loads((ROOT / "notebooks" / "figures" / "ablations.json").read_text())
    arms = {arm.about: list(results[key].values()) for key, arm in ARMS.items() if key in results}
    section = README.split("## What it is worth")[1].split("\n## ")[0]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")]
            for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 9
    for about, scenes, pages, documents, runs, *_ in rows[2:]:
        tasks = [run["tasks"] for run in arms[about]]
        values = [mean(run[task]["recall@1"] for task in SHOWN) for run in tasks]
        assert int(runs) == len(values)
        ends = [min(values), max(values)] if len(values) > 1 else []
        said = [float(number) for number in re.findall(r"[\d.]+", scenes)]
        assert said == [float(f"{value:.2f}") for value in (mean(values), *ends)], about
        for figure, task in ((pages, "page-retrieval"), (documents, "long-text")):
            assert figure == f"{mean(run[task]['recall@10'] for run in tasks):.2f}", about
