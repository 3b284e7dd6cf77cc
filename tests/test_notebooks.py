"""The notebooks run, their outputs are kept, and what they name exists.

The code cells of each run in one plain Python process of their own, without Jupyter, from the
repository's root. So the notebooks hold no IPython magics, and their assertions are tests of the
package.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDERS = ("", "nano_moca", "nano_moca/builtin", "nano_moca/evaluate", "nano_moca/report",
           "notebooks", "tests")  # where a file that is named alone may lie
LARGEST = 650_000  # bytes of a notebook
SECONDS = 600  # far more than any needs: a stop for one that hangs
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    """A notebook's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path: Path, kind: str) -> list[str]:
    """The text of its cells, "code" or "markdown"."""
    cells = (cell for cell in read(path)["cells"] if cell["cell_type"] == kind)
    return ["".join(cell["source"]) for cell in cells]


def prose(path: Path) -> str:
    """What it says outside its code, blocks of code in the prose excepted."""
    return re.sub(r"^```.*?^```", "", "\n\n".join(sources(path, "markdown")), flags=re.M | re.S)


@cache
def repository() -> dict[Path, str]:
    """Each Python file of the repository with its text."""
    return {path: path.read_text(encoding="utf-8")
            for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}


def named_file(name: str) -> Path | None:
    """The file or folder that a notebook means by `name`, if there is one."""
    places = [ROOT / name, *(ROOT / folder / name for folder in FOLDERS if "/" not in name)]
    return next((place for place in places if place.exists()), None)


@each_notebook
def test_it_runs(path: Path) -> None:
    """Every code cell, in order, in one namespace."""
    code = "\n\n".join(f"# cell {n}\n{text}" for n, text in enumerate(sources(path, "code"), 1))
    for line in code.splitlines():
        assert not re.match(r"\s*[%!]", line), f"an IPython magic: {line}"
    environment = os.environ | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-"], input=code, text=True, capture_output=True,
                          cwd=ROOT, env=environment, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@each_notebook
def test_outputs_are_kept(path: Path) -> None:
    """It was run from top to bottom without an error, and has pictures; nothing of the machine is
    in it."""
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs), "a warning was kept"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any("execution" in cell["metadata"] for cell in cells), "times of execution"
    assert path.stat().st_size < LARGEST
    for output in outputs:
        said = json.dumps({k: v for k, v in output.get("data", {}).items() if "image" not in k})
        said += "".join(output.get("text", ""))
        found = re.search(r"(?<![\w.])/(home|opt|root|tmp|usr|var|work|Users)/[^\s\"]*", said)
        assert not found, f"a path of the machine: {found[0]}"


@each_notebook
def test_files_and_links_exist(path: Path) -> None:
    """Files and folders in backticks, in the repository; links, from where the notebook lies."""
    text = prose(path)
    for link in re.findall(r"\]\(((?!http|#|attachment:)[^)#]+)\)", text):
        assert (path.parent / link).exists(), f"a dead link: {link}"
    for name in re.findall(r"`([\w./-]+)`", text):
        is_path = re.match(r"(nano_moca|notebooks|tests)/", name)
        if is_path or name.endswith((".py", ".ipynb", ".md")):
            assert named_file(name), f"no such file: {name}"


@each_notebook
def test_names_exist(path: Path) -> None:
    """`nano_moca.x.y` can be imported, any other name in backticks stands in the notebook's code or
    in the repository's, and what is listed after a file stands in that file."""
    code = "\n".join([*sources(path, "code"), *repository().values()])
    words = set(re.findall(r"\w+", code))
    for line in prose(path).splitlines():
        file = re.match(r"\s*(?:[-*|]|\d+\.)\s*`([\w/]+\.py)`", line)  # of a table or a list
        inside = (set(re.findall(r"\w+", named_file(file[1]).read_text(encoding="utf-8")))
                  if file and named_file(file[1]) else words)
        for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", line):
            parts = name.split(".")
            if parts[-1] in ("py", "ipynb", "md", "json", "jsonl", "txt", "png", "safetensors"):
                continue  # files: tested above, or written by a run
            if parts[0] == "nano_moca":
                assert resolves(parts), f"the package has no {name}"
            else:
                missing = [part for part in parts if part not in inside]
                assert not missing, f"{name} is not in {file[1] if file else 'any code'}"
        for name, function in re.findall(r"`([\w/]+\.py)`[:,]? +`(\w+)(?:\(\))?`", line):
            assert named_file(name), f"no such file: {name}"
            assert re.search(rf"\b{function}\b", named_file(name).read_text(encoding="utf-8")), (
                f"{function} is not in {name}")


def resolves(parts: list[str]) -> bool:
    """Whether nano_moca.x.y is a module, or something in one."""
    found = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:depth]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


@each_notebook
def test_flags_exist(path: Path) -> None:
    """Every --flag in its prose or its commands is a field of some `Flags`, or is written out where
    the command reads it."""
    everything = "\n".join(text for file, text in repository().items()
                           if "tests" not in file.parts and "notebooks" not in file.parts)
    fields = {"--" + name.replace("_", "-")
              for text in repository().values() if re.search(r"class \w*Flags", text)
              for name in re.findall(r"^    (\w+): .*= flag\(", text, re.M)}
    shared = {"--help", "--nproc_per_node"}
    text = "\n".join(sources(path, "markdown") + sources(path, "code"))
    for name in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)):
        assert name in fields | shared or f'"{name}"' in everything, f"no such flag: {name}"
