"""README and docs are true: counts, files, links, flags, pictures, commands, figures.

What is counted or measured is written by this file: `python tests/test_readme.py`, from the
repository's root, puts the figures of notebooks/figures/ablations.json, what the README's lines of
Python print, and the counts of lines of code where they belong. The tests ask that nothing be
left to do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import train_cl
import train_cpt
from measures import (
    PACKAGE, ROOT, SCRIPTS, beside_files, code_lines, imports, is_beside, module_name, road_files,
)
from nano_moca.ablate import SYMBOLS, UNLABELLED, measure
from nano_moca.flags import parse_flags

pytestmark = pytest.mark.repository
README, CODE = ROOT / "README.md", ROOT / "docs" / "code.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(page for name in ("RESULTS.md", "LOG.md", "notebooks/change_it.md")
                    if (page := ROOT / name).exists())]


def read(page: Path) -> str:
    """A page's text."""
    return page.read_text(encoding="utf-8")


# --- what is counted or measured ------------------------------------------------------


def builtin_scores() -> dict:
    """The committed table of the ablations, by arm and seed."""
    return json.loads(read(ROOT / "notebooks" / "figures" / "ablations.json"))


# The arms of the README's table, in the words that it has for them; and the paper's figures, read
# off its plots.
ROWS = {"full": "**both stages**", "mae": "no MLM: stage 1 on patches only",
        "mlm": "no MAE: stage 1 on words only",
        "next": "stage 1's data, the next token as its task",
        "none": "no stage 1", "causal": "no stage 1, attention kept causal"}
PAPER = {"full": 67.5, "mae": 66.2, "mlm": 66.8, "next": "", "none": 65.4, "causal": 66.4}


def result_lines(results: dict) -> str:
    """One result, on the symbols that no labelled pair showed: a table, and what follows."""
    values = {name: measure(results[name], SYMBOLS) for name in ROWS}
    runs = sorted({len(found) for found in values.values()})
    count = f"{runs[0]} to {runs[-1]}" if len(runs) > 1 else f"{runs[0]}"
    lines = [f"| | recall@10: mean of {count} runs (least to most) "
             "| the paper, on its own scale: 3B, MMEB |",
             "| --- | --- | --- |"]
    for name, found in values.items():
        said = f"{found.mean():.2f} ({found.min():.2f} to {found.max():.2f})"
        lines.append(f"| {ROWS[name]} | {said} | {PAPER[name]} |")
    chance = measure(results["full"], (SYMBOLS[0], "chance recall@10")).mean()
    lines.append(f"| colours seen, symbols guessed | {4 * chance:.2f} | |")
    lines.append(f"| guessing | {chance:.2f} | |")

    # What follows from these figures, whichever way they fall.
    full, mae, mlm, _, none, causal = values.values()
    agrees = "Unlike in the paper, the two losses of stage 1 together are not the best."
    if full.mean() > max(mlm.mean(), mae.mean()):
        agrees = "As in the paper, the two losses of stage 1 together are the best."
    if mae.mean() > mlm.mean():
        agrees += " There words alone beat patches alone; here it is the other way round."
    if abs(causal.mean() - none.mean()) < 0.02:
        agrees += ("\nThere a model without stage 1 is better if it stays causal; here that makes "
                   "no difference.")
    return "\n".join(lines) + f"\n\n{agrees}\n"


def limit_lines(results: dict) -> str:
    """What it finds hard: places, and a search among all kinds of answers at once."""
    def percent(figure: str, *tasks: str) -> str:
        return f"{100 * measure(results['full'], (tasks, figure)).mean():.0f} %"

    named, new, placed = (percent("twins beaten", *(f"{task}, {what}" for task in
                                              ("scene-to-caption", "caption-to-scene")))
                     for what in ("labelled symbols", "unlabelled symbols", "places"))
    own, mixed = (percent(figure, "mixed shelf") for figure in ("own shelf recall@1", "recall@1"))
    return ("- *Where* is harder for it than *what*. The right answer beats a near twin "
            f"(guessing: 50 %) in {named} of the cases\n  if one symbol differs, {new} if these "
            f"are symbols of stage 1 alone, and {placed} if the same symbols stand in other "
            "places.\n"
            "- Keep one kind of thing in an index. The right answer comes first in "
            f"{own} of the searches among answers of one kind,\n  and in {mixed} among pictures, "
            "pages and texts together.\n")


def printed(code: str) -> str:
    """What lines of Python print, run from the repository's root."""
    output, before = io.StringIO(), Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(output):
            exec(code, {})
    finally:
        os.chdir(before)
    return output.getvalue()


def with_figures(text: str) -> str:
    """The README with the figures of the ablations as they are now."""
    results = builtin_scores()
    writers: dict[str, Callable[[dict], str]] = {"result": result_lines, "limits": limit_lines}
    for name, write in writers.items():
        before, after = re.split(rf"(?<=: {name} -->\n).*?(?=<!-- end -->)", text, flags=re.S)
        text = before + write(results) + after
    return text


def with_output(text: str) -> str:
    """The README with what its Python prints now."""
    return re.sub(r"(```python\n(.*?)```\n\n```text\n).*?(```)",
                  lambda found: found[1] + printed(found[2]) + found[3], text, count=1,
                  flags=re.S)


def with_counts(text: str) -> str:
    """README or docs/code.md with the lines of code as they are now."""
    road, beside = (sum(map(code_lines, files)) for files in (road_files(), beside_files()))
    text = re.sub(r"(?<=training are )[\d,]+(?= lines)", f"{road:,}", text)
    text = re.sub(r"(?<=training are )\d+ files with [\d,]+(?= lines)",
                  f"{len(road_files())} files with {road:,}", text)
    text = re.sub(r"(?<=stand )[\d,]+(?= lines in other)", f"{beside:,}", text)
    return re.sub(r"(?<=^\| )`([\w/]+\.py)` \| \d+",
                  lambda found: f"`{found[1]}` | {code_lines(ROOT / found[1])}", text, flags=re.M)


@pytest.mark.parametrize("page", [README, CODE], ids=lambda page: page.name)
def test_lines_are_counted_right(page: Path) -> None:
    """`python tests/test_readme.py` has nothing to change."""
    assert with_counts(read(page)) == read(page)


def test_figures_are_the_measured_ones() -> None:
    """Each mean, range and number of runs follows from ablations.json; pictures are counted."""
    assert with_figures(read(README)) == read(README)
    scores = builtin_scores()["full"]["seed 0"]["tasks"][UNLABELLED[1]]
    assert f"among {scores['candidates']} that were not trained on" in read(README)


def test_the_lines_of_python_print_what_is_said() -> None:
    """Word for word; numbers may differ a little, by the processor. The right one comes first."""
    text = read(README)
    code, said = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.S).groups()
    assert len(code.splitlines()) <= 12
    number = r"-?\d+\.\d+"
    now = printed(code)
    assert re.sub(number, "#", now) == re.sub(number, "#", said)
    cosines = [[float(one) for one in re.findall(number, lines)] for lines in (now, said)]
    assert np.allclose(*cosines, atol=0.02)
    assert cosines[0].index(max(cosines[0])) == 0


def test_minutes_are_no_longer_than_in_the_table() -> None:
    """Both stages' minutes; the runs of the ablations had another beside them, so took longer."""
    stages = [float(minutes) for minutes in
              re.findall(r"# stage \d: ([\d.]+) minutes", read(README))]
    measured = np.mean([run["minutes"] for run in builtin_scores()["full"].values()], axis=0)
    assert len(stages) == 2
    assert all(0.25 * theirs < ours < 1.2 * theirs
               for ours, theirs in zip(stages, measured, strict=True))


# --- files, links, flags, pictures ----------------------------------------------------


def test_the_table_lists_every_file() -> None:
    """A row for each, marked where it stands beside the road; files without code need none."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| \d+ \| (\*beside:\*)?", read(CODE), re.M)
    paths = [*SCRIPTS, *(path for path in PACKAGE.rglob("*.py") if code_lines(path))]
    assert {name: bool(mark) for name, mark in rows} == {
        str(path.relative_to(ROOT)): is_beside(path) for path in paths}


def test_files_import_only_from_files_above() -> None:
    """The order is an order: no file of the table needs one that stands below it."""
    order = [module_name(ROOT / name) for name in
             re.findall(r"^\| `([\w/]+\.py)` \|", read(CODE), re.M)]
    for number, name in enumerate(order):
        path = ROOT.joinpath(*name.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        for needed in imports(file, everywhere=False) - {"nano_moca"}:
            place = order.index(needed) if needed in order else -1  # a room without code
            assert place < number, f"{name} imports {needed}"


def test_the_tree_names_every_file_of_the_package() -> None:
    """Files and folders of nano_moca/ once each, and what lies beside it."""
    tree = read(README).split("## The files")[1].split("```")[1]
    named = re.findall(r"[\w/]+\.py|\w+/", tree)
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()}
    there -= {"__init__.py", "__pycache__/"}
    top = {"train_cpt.py", "train_cl.py", "nano_moca/", "notebooks/", "docs/", "tests/"}
    assert sorted(set(named)) == sorted(there | top)


def anchors(page: Path) -> set[str]:
    """What of a page a link may point to: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
            for heading in headings}


LINKS = sorted({(str(page.relative_to(ROOT)), link) for page in LINKED
                for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", read(page))})


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_and_pictures_exist(page: str, link: str) -> None:
    """Every relative link leads to a file, and to a heading of it where one is named."""
    name, _, heading = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    assert not heading or heading in anchors(target)


def test_docs_are_found_from_the_readme() -> None:
    """No page of docs/ that the README does not lead to, at once or over another."""
    found, new = set(), {README}
    while new:
        found |= new
        new = {(page.parent / link.partition("#")[0]).resolve() for page in new
               for link in re.findall(r"\]\(((?!http)[^)\s]+\.md[^)\s]*)\)", read(page))}
        new = {page for page in new if page.exists()} - found
    assert set(PAGES) <= found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    """Every --flag that is named belongs to one of the commands, or to a tool that is named."""
    files = [*SCRIPTS, *PACKAGE.rglob("*.py"), ROOT / "tests" / "real_weights.py"]
    sources = "".join(map(read, files))
    names = re.findall(r"^    (\w+): [\w ]+ = flag\(", sources, re.M)
    known = {"--" + name.replace("_", "-") for name in names}
    known |= set(re.findall(r'add_argument\("(--[\w-]+)"', sources))
    known |= {"--help", "--nproc_per_node"}  # argparse, torchrun
    known |= {"--max-restarts", "--standalone"}  # torchrun
    known |= {"--runner", "--convert"}  # vllm
    assert {field.name for field in fields(train_cl.Flags)} <= set(names)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", read(page))) <= known


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


# --- commands and other claims --------------------------------------------------------


def commands(page: Path, start: str) -> list[list[str]]:
    """The commands of a page's shell blocks that begin so, as words."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", read(page), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(start)]


def test_recipes_are_flags_of_the_scripts() -> None:
    """Each is understood; stage 1's mask as the paper does."""
    recipes = commands(ROOT / "docs" / "real_models.md", "torchrun")
    assert len(recipes) == 4
    for _, _, _, script, *words in recipes:
        kind = {"train_cpt.py": train_cpt, "train_cl.py": train_cl}[script].Flags
        flags = parse_flags(kind, words, "")
        assert getattr(flags, "unhidden", 0) == 0
        assert (flags.min_pixels, flags.max_pixels) == (256 * 28 * 28, 1024 * 28 * 28)


def test_commands_on_data_of_ones_own(tmp_path: Path) -> None:
    """Those of docs/your_data.md, on a tiny example: two steps, two numpy lines."""
    from nano_moca.builtin import BuiltinRecords, builtin_tasks

    def write(name: str, items: list[dict]) -> None:
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (tmp_path / name).write_text(lines, encoding="utf-8")

    def as_json(record: object, name: str) -> dict:
        for image in record.images:
            image.save(tmp_path / f"{name}.png")
        return {"text": record.text, "images": [f"{name}.png"] * len(record.images)}

    records, task = BuiltinRecords(), builtin_tasks()["caption-to-scene"]
    pairs = [task[number] for number in range(16)]
    write("records.jsonl", [as_json(records[i], f"record-{i}") for i in range(120)])
    answers = [as_json(pair.positive, f"page-{i}") for i, pair in enumerate(pairs)]
    queries = [as_json(pair.query, "") for pair in pairs]
    write("pages.jsonl", answers)
    write("queries.jsonl", queries)
    write("pairs.jsonl", [{"task": "mine", "kind": "image-text", "query": query,
                           "positive": answer} for query, answer in zip(queries, answers)])

    page = ROOT / "docs" / "your_data.md"
    todo = [*commands(page, "python train"), *commands(page, "python -m nano_moca.evaluate")]
    assert len(todo) == 4
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _, *words in todo:
        if words[0] != "-m":
            words = [str(ROOT / words[0]), *words[1:], "--steps", "2", "--no-report"]
        subprocess.run([sys.executable, *words, "--device", "cpu"], cwd=tmp_path, check=True,
                       env=environment, capture_output=True)
    names: dict = {}
    python = re.search(r"```python\n(.*?)```", read(page), re.S)[1]
    exec(python.replace('load("', f'load("{tmp_path}/'), names)
    assert names["best"].shape == (16, 5) and names["best"].max() < 16


def test_counts_of_the_built_in_data() -> None:
    """Those of docs/built_in_data.md; of documents about, as Python's documentation changes."""
    import nano_moca
    from nano_moca.builtin import (
        COLOURS, KNOWN, KNOWN_COLOURS, NAMES, BuiltinRecords, builtin_tasks)
    from nano_moca.builtin.base import BASE_FLAGS

    # What its sentences say.
    page = read(ROOT / "docs" / "built_in_data.md")
    base = nano_moca.load(ROOT / "nano_moca" / "base", "cpu").model
    assert f"{sum(one.numel() for one in base.parameters()) / 1e6:.1f} million" in page
    pages, texts = BuiltinRecords.PAGES, BuiltinRecords.TEXTS
    assert (f"captions ({1 - pages - texts:.0%}), pages ({pages:.0%}), passages ({texts:.0%}) | "
            f"{len(NAMES)} | {len(COLOURS)} | {len(BuiltinRecords()):,} records").replace(
                "%", " %") in page
    assert f"| {len(KNOWN)} | {len(KNOWN_COLOURS)} | trained for " in page
    assert f"trained for {BASE_FLAGS[BASE_FLAGS.index('--steps') + 1]} steps" in page

    # And its table.
    rows = re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| .* \| (\d+), (\d+) \|$", page, re.M)
    train, test = builtin_tasks("train"), builtin_tasks("test")
    assert {name: kind for name, kind, *_ in rows} == {
        name: task.kind for name, task in train.items()}
    for name, _, *counts in rows:
        tolerance = 0.1 if name == "long-text" else 0
        assert list(map(int, counts)) == [
            pytest.approx(len(task[name]), rel=tolerance) for task in (train, test)]


def test_what_the_base_can_say() -> None:
    """That it knows two thirds of the symbols, and no others: docs/built_in_data.md."""
    import nano_moca
    from nano_moca.builtin import KNOWN, LABELLED, NEW, SPLITS, Palette

    base = nano_moca.load(ROOT / "nano_moca" / "base", "cpu")
    shares = []
    for symbols in (KNOWN, NEW):
        random = np.random.default_rng((0, SPLITS["test"], len(symbols)))
        palette = Palette(symbols, LABELLED.colours, part="test")
        scenes = [palette.scene(random) for _ in range(60)]
        said = base.caption([{"text": nano_moca.MARK, "images": [scene.image()]}
                             for scene in scenes], 20)
        shares.append(np.mean([one == scene.caption() for one, scene in zip(said, scenes)]))
    assert shares[0] > 0.95 and shares[1] == 0


if __name__ == "__main__":
    for page in (README, CODE):
        text = with_counts(read(page))
        if page == README:
            text = with_output(with_figures(text))
        print(page.relative_to(ROOT), "as it was" if text == read(page) else "written anew")
        page.write_text(text, encoding="utf-8")
