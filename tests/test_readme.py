"""The README is true: its line counts, files, flags, pictures and commands."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

import train_cl
import train_cpt
from measures import (
    PACKAGE, ROOT, SCRIPTS, beside_files, code_lines, imports, is_beside, module_name, road_files,
)
from nano_moca.ablate import ARMS, SHOWN

pytestmark = pytest.mark.repository
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_sentence_counts_right() -> None:
    """Its number of files and of lines, and the lines beside the road."""
    files, lines = re.search(r"the (\d+) files .*? are ([\d,]+)\s+lines", README, re.S).groups()
    assert int(files) == len(road_files()) - len(SCRIPTS)
    assert int(lines.replace(",", "")) == sum(map(code_lines, road_files()))
    assert f"another {sum(map(code_lines, beside_files())):,} lines" in README


def test_the_table_lists_every_file_with_its_lines() -> None:
    """A row a file, marked where it stands beside the road; files without code need none."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \| (\*beside:\*)?", README, re.M)
    paths = [*SCRIPTS, *(path for path in PACKAGE.rglob("*.py") if code_lines(path))]
    assert {name: (int(count), bool(mark)) for name, count, mark in rows} == {
        str(path.relative_to(ROOT)): (code_lines(path), is_beside(path)) for path in paths}


def test_files_import_only_from_files_above() -> None:
    """The order is an order: no file of the table needs one that stands below it."""
    order = [module_name(ROOT / name) for name in
             re.findall(r"^\| `([\w/]+\.py)` \|", README, re.M)]
    for number, name in enumerate(order):
        path = ROOT.joinpath(*name.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        for needed in imports(file, everywhere=False) - {"nano_moca"}:
            place = order.index(needed) if needed in order else -1  # a room without code
            assert place < number, f"{name} imports {needed}"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_links_and_pictures_exist(link: str) -> None:
    """Every relative link leads to a file."""
    assert (ROOT / link).exists()


def test_flags_exist() -> None:
    """Every --flag that the README names is one of the scripts' or of a tool it names."""
    known = {"--" + field.name.replace("_", "-")
             for script in (train_cpt, train_cl) for field in fields(script.Flags)}
    known |= {"--help", "--nproc_per_node", "--input", "--prompt", "--images", "--gpu"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known


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
