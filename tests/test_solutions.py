"""The five changes of notebooks/change_it.md can be made, and their checks know it.

Each patch of solutions/ still applies to the package, and with it notebooks/check_change.py
says "right", which includes some steps of the stage that is changed. Without it the check
says what is missing; with a patch of solutions/traps/, which does what first comes to
mind, it says what is wrong.

All run in copies of the repository. One process imports torch, and forks one for each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train_cpt
from nano_moca.files import MocaError
from nano_moca.flags import CommonFlags, flag
from nano_moca.plan.resume import check_same_run

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = sorted((ROOT / "tests" / "solutions").glob("*.patch"))
# What the check says of each trap.
TRAPS = {
    "1_the_last_step_stands_still": "the last step's rate is 0",
    "2_the_report_masks_scattered_groups": "report still judges",
    "2_one_grid_for_all_images": "its own rows and columns",
    "3_short_vectors_are_not_unit": "not of unit length",
    "4_no_family_when_testing": "FAMILIES",
    "5_the_report_is_not_in_pixels": "does not judge in pixels",
    "5_one_mean_per_group": "per patch, not per group",
}
PAGE = ROOT / "notebooks" / "change_it.md"

# Forks a process for each line: the folder of a copy, and the number of the check.
DRIVER = """
import json, os, sys
import matplotlib.pyplot, numpy, PIL.Image, safetensors.torch, tokenizers, tqdm
import torch, torch.distributed.fsdp, torch.distributed.device_mesh

torch.set_num_threads(1)
for line in sys.stdin:
    folder, number = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.chdir(folder)
        sys.path.insert(0, os.path.join(folder, "notebooks"))
        import check_change
        os.write(write, check_change.check(number).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        print(json.dumps(said.read()), flush=True)
    os.waitpid(child, 0)
"""
Ask = Callable[[str], str]


def copy_of_the_repository(folder: Path) -> Path:
    """What the checks need of it."""
    for name in ("nano_moca", "train_cpt.py", "train_cl.py", "notebooks/check_change.py"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return folder


def apply(patch: Path, folder: Path) -> None:
    """Change a copy. A patch that does not apply any more is named, with what git says."""
    # Git must not take a repository around the folder for ours. One line of context will do.
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(["git", "apply", "-C1", str(patch)], cwd=folder, capture_output=True,
                          text=True, env=alone)
    assert not done.returncode, (
        f"{patch.relative_to(ROOT)} no longer applies to the package: make the change again and "
        f"write it with `git diff nano_moca train_cpt.py train_cl.py`. {done.stderr}")


def numbered(name: str) -> str:
    """The number of the change that a patch belongs to."""
    return name.partition("_")[0]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """What the check says of a copy with a patch (a name below solutions/), or of the
    package as it is ("1" to "5")."""
    if not hasattr(os, "fork") or not shutil.which("git"):
        pytest.skip("needs git, and a system that forks")
    base = tmp_path_factory.mktemp("changes")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    with subprocess.Popen([sys.executable, "-c", DRIVER], text=True, cwd=base, env=environment,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:

        def answer(name: str) -> str:
            folder = copy_of_the_repository(base / name.replace("/", "-"))
            if len(name) > 1:
                apply(ROOT / "tests" / "solutions" / f"{name}.patch", folder)
            number = numbered(name.rpartition("/")[2])
            driver.stdin.write(json.dumps([str(folder), number]) + "\n")
            driver.stdin.flush()
            line = driver.stdout.readline()
            assert line, "the process that forks the checks has ended: see its error"
            return json.loads(line)

        yield answer
        driver.stdin.close()


def test_there_is_a_patch_for_each() -> None:
    """Five solutions, and no trap that is not asked about."""
    assert [numbered(patch.stem) for patch in SOLUTIONS] == list("12345")
    traps = (ROOT / "tests" / "solutions" / "traps").glob("*.patch")
    assert {patch.stem for patch in traps} == TRAPS.keys()


@pytest.mark.parametrize("name", [patch.stem for patch in SOLUTIONS])
def test_a_solution_is_right(ask: Ask, name: str) -> None:
    """The check is content with it, and the stage runs with it."""
    assert ask(name) == "right"


@pytest.mark.parametrize("number", list("12345"))
def test_the_package_as_it_is_is_not(ask: Ask, number: str) -> None:
    """The check says what is missing, and does not merely break."""
    answer = ask(number)
    assert answer.startswith("not yet: ") and "it stops with" not in answer


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_seen(ask: Ask, name: str) -> None:
    """The check says which it is."""
    answer = ask(f"traps/{name}")
    assert answer.startswith("not yet: ") and TRAPS[name] in answer


def test_a_checkpoint_from_before_a_flag_does_not_go_on_under_it() -> None:
    """It counts as one with the flag's default, as the page says."""
    Changed = dataclasses.make_dataclass(
        "Changed", [("schedule", str, flag("linear", "a new flag"))], bases=(CommonFlags,))
    data = {"records": 9, "fingerprint": "a"}
    state = {"step": 1, "flags": dataclasses.asdict(CommonFlags()), "data": data, "log": [{}],
             "skipped": ""}
    with pytest.raises(MocaError, match="--schedule was linear"):
        check_same_run(Changed(schedule="cosine"), state | {"digest": ""}, data)
    with pytest.raises(MocaError, match="not as it was saved"):  # the flags are the same
        check_same_run(Changed(), state | {"digest": ""}, data)

    # But all masked words were hidden before there was --unhidden.
    state["flags"] = dataclasses.asdict(train_cpt.Flags())
    del state["flags"]["unhidden"]
    with pytest.raises(MocaError, match="--unhidden was 0.0"):
        check_same_run(train_cpt.Flags(), state | {"digest": ""}, data)
    with pytest.raises(MocaError, match="not as it was saved"):
        check_same_run(train_cpt.Flags(unhidden=0.0), state | {"digest": ""}, data)


def test_the_page_names_what_there_is() -> None:
    """Files, links and functions that it names exist, and each change has its check."""
    text = PAGE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(((?!http|#)[^)#]+)\)", text):
        assert (PAGE.parent / link).exists(), f"a dead link: {link}"
    code = {path: path.read_text(encoding="utf-8") for folder in (ROOT, ROOT / "tests",
            ROOT / "notebooks") for path in folder.glob("*.py")}
    code |= {path: path.read_text(encoding="utf-8") for path in ROOT.glob("nano_moca/**/*.py")}
    patches = "\n".join(patch.read_text(encoding="utf-8") for patch in SOLUTIONS)
    words = set(re.findall(r"[\w-]+", "\n".join(code.values()) + patches))
    for name in re.findall(r"`([\w./-]+)`", text):
        if name.endswith((".py", ".md", ".json", ".patch")):
            assert any(ROOT.glob(f"**/{name}")) or name in ("log.jsonl", "scores.json"), name
        elif re.fullmatch(r"[A-Za-z_][\w.]*", name):
            missing = set(name.split(".")) - words
            assert not missing, f"{name} is in no code"
    for number in "12345":
        assert f"check_change.py {number}" in text


def test_the_page_gives_no_solution_away() -> None:
    """No line of code that a solution adds stands on it."""
    text = PAGE.read_text(encoding="utf-8")
    for patch in SOLUTIONS:
        for line in re.findall(r"^\+ +(.+)", patch.read_text(encoding="utf-8"), re.M):
            assert len(line) < 30 or line.strip() not in text, line
