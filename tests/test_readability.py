"""The code is as easy to read as it is meant to be: a mirror, as line length has one.

Signposts, density, budget, rooms and letters, measured. Not part of a plain `pytest`, for a
change that tries something out need not keep to it: see tests/README.md.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from measures import (
    PACKAGE, ROOT, SCRIPTS, Density, beside_files, code_lines, imports, is_beside, module_file,
    module_name, road_files,
)

pytestmark = pytest.mark.repository
ALL = [*SCRIPTS, *sorted(PACKAGE.rglob("*.py"))]


@pytest.fixture(scope="module")
def road() -> Density:
    """Both scripts and what they run on, counted."""
    density = Density()
    for path in road_files():
        density.add(path)
    return density


def test_budget() -> None:
    """What a reader has to hold in mind: about 2,200 lines. And what he need not, which is longer
    than the 1,100 that it was meant to have: three families, the files of others, what guards a
    run, goes on with it and computes its memory, adapters, a benchmark of GPUs."""
    assert sum(map(code_lines, road_files())) <= 2240
    assert sum(map(code_lines, beside_files())) <= 3290


def test_paragraphs(road: Density) -> None:
    """Code comes in paragraphs, each opened by a sentence and preceded by a blank line."""
    assert road.per_100(road.comments) >= 8
    assert road.per_100(road.blank) >= 5


def test_statements_say_one_thing(road: Density) -> None:
    """Few comprehensions, none inside another, and small statements."""
    assert road.per_100(road.comprehensions) <= 4
    assert road.nested == 0
    assert road.nodes / road.statements <= 15.5


def test_line_length(road: Density) -> None:
    """At most 100 characters, and few lines near that."""
    assert road.long / road.lines <= 0.15
    for path in [*ALL, *(path for folder in ("tests", "notebooks")
                         for path in (ROOT / folder).glob("*.py"))]:
        lines = path.read_text(encoding="utf-8").splitlines()
        long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
        assert not long, f"{path}: lines {long}"


def test_imports_run_one_way() -> None:
    """No circle, lazy imports included; and nothing in the package imports a script."""
    needs = {module_name(path): imports(path, everywhere=True) for path in ALL}
    scripts = {module_name(path) for path in SCRIPTS}
    for name, needed in needs.items():
        assert not needed & scripts, f"{name} imports a script"

    # take away what needs nothing that is left; a circle is what remains
    left = dict(needs)
    while ready := [name for name, needed in left.items() if not needed & left.keys() - {name}]:
        for name in ready:
            del left[name]
    assert not left, f"a circle: {sorted(left)}"


def test_the_road_is_closed() -> None:
    """What the scripts import at their top, and what that imports, is the road that is counted:
    the beside is imported where it is used, and the report's part of it can be turned off."""
    closed: set[str] = set()
    waiting = [module_name(path) for path in SCRIPTS]
    while waiting:
        name = waiting.pop()
        if name not in closed:
            closed.add(name)
            waiting += imports(module_file(name), everywhere=False)
            if "." in name:
                waiting.append(name.rpartition(".")[0])  # a package's __init__ runs first
    assert closed == {module_name(path) for path in road_files()}


@pytest.mark.parametrize("script", ["train_cpt", "train_cl"])
def test_training_needs_nothing_beside_the_road(script: str, mixed: Path, tmp_path: Path) -> None:
    """With one's own data and no report, no file beside the road is even loaded, but for those that
    read what others wrote, write what others read, and look at what the run may touch."""
    data = mixed
    if script == "train_cl":
        data = tmp_path / "pairs.jsonl"
        pair = {"task": "t", "kind": "text-only", "query": {"text": "a"}, "positive": {"text": "b"}}
        data.write_text(f"{json.dumps(pair)}\n" * 4)
    words = ["--data", str(data), "--steps", "1", "--output", str(tmp_path / "run"), "--no-report",
             "--model", str(PACKAGE / "base"), *(["--batch", "2"] if script == "train_cl" else [])]
    code = (f"import sys, {script} as script\n"
            f"script.train(script.parse_flags(script.Flags, {words!r}, ''))\n"
            "print(*(name for name in sys.modules if name.startswith('nano_moca')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert "nano_moca.model" in loaded
    beside = {name for name in loaded if is_beside(module_file(name))}
    assert {name.removeprefix("nano_moca.").partition(".")[0] for name in beside} == {
        "convert", "plan"}


JUMPS = """
import inspect, sys, threading, tqdm
from pathlib import Path
import {script} as script

root, calls = str(Path({root!r})), set()

def inside(frame):
    return frame is not None and frame.f_code.co_filename.startswith(root)

def note(frame, event, _):  # a call that leads from one file of ours into another
    if event != "call" or not inside(frame):
        return
    caller = frame.f_back
    while caller is not None and not inside(caller):
        caller = caller.f_back
    if caller is not None and caller.f_code.co_filename != frame.f_code.co_filename:
        calls.add((caller.f_code.co_filename, frame.f_code))

class Done(Exception):
    pass

def update(bar, *_):  # the progress bar moves once per step: watch the second step
    if sys.getprofile():
        raise Done
    sys.setprofile(note)

tqdm.tqdm.update = update
threading.setprofile(note)  # and all that the thread does that draws ahead
words = ["--output", {output!r}, "--no-report", "--model", {base!r}, *{words!r}]
try:
    script.train(script.parse_flags(script.Flags, words, ""))
except Done:
    sys.setprofile(None)
# Reading a property or a length is no jump, nor is what autograd calls, nor what names the log if
# the disk is full; and once a run, not once a step, files are imported, an iterator is asked for,
# and the output is let go at the end.
simple = set()
apart = ("__len__", "backward", "<module>", "__iter__", "claim_output", "writing")
for name, module in list(sys.modules.items()):
    if name.startswith("nano_moca"):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            for thing in vars(kind).values():
                function = getattr(thing, "fget", None) or getattr(thing, "func", None)
                if function is not None:
                    simple.add(function.__code__)
print(sorted(code.co_name for _, code in calls
             if code not in simple and code.co_name not in apart))
"""


@pytest.mark.parametrize(("script", "words"), [
    ("train_cpt", ["--batch-tokens", "300"]), ("train_cl", ["--batch", "8"])])
def test_jumps_of_a_step(script: str, words: list[str], tmp_path: Path) -> None:
    """One training step calls few functions of other files than its own."""
    code = JUMPS.format(script=script, words=words, root=str(ROOT), base=str(PACKAGE / "base"),
                        output=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    jumps = ast.literal_eval(done.stdout.splitlines()[-1])
    assert {"attend", "pack"} <= set(jumps), "the step was not seen"
    assert len(jumps) <= 20, jumps


def test_shapes_obey_the_glossary() -> None:
    """Every letter in a shape comment is one that the glossary explains."""
    glossary = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    letters = set(re.findall(r"^    ([A-Za-z])    ", glossary, re.M))
    assert {"T", "N", "P", "J", "R", "G", "D", "V", "H", "K", "d", "B", "W"} <= letters
    for path in ALL:
        for line in path.read_text(encoding="utf-8").splitlines():
            for shape in re.findall(r"# \[([^\]]+)\]", line):
                used = set(re.findall(r"(?<![\w'\"])[A-Za-z](?![\w'\"])", shape))
                assert used <= letters, f"{path.name}: [{shape}] has {used - letters}"


def test_public_functions_are_documented_and_annotated() -> None:
    """Each has a docstring and annotated arguments; a kernel's are pointers and constants."""
    for path in ALL:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name.endswith("_kernel"):
                continue
            arguments = [*node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if not a.annotation and a.arg not in
                    ("self", "cls", "ctx")]
            assert not bare, f"{path.name}: {node.name}({', '.join(bare)})"
            if not node.name.startswith("_") and not node.decorator_list:
                inner = node.name in ("check", "pad", "words_restored", "patch_error", "forward")
                assert inner or ast.get_docstring(node), f"{path.name}: {node.name}"
