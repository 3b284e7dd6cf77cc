"""The CUDA path, forward and backward, without a GPU: what would be refused there is refused here,
and what would wait is counted.

How that is done stands in fake_cuda/__init__.py. It needs a process of its own, in which
cuda_paths.py runs every path once; what it prints is judged here. Skipped where there is no C++
compiler. That the guard can fail is tested beside it: FAULTS are put into the path one by one, and
cuda_mutations.py, by hand, puts some into the source.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_paths import CHECKS, FAULTS, PATHS, SCRIPTS
from fake_cuda import start

# The device is made of PyTorch's inner parts, which move: on these versions it must work, and
# where it does not start on another one, that is said, and all this skipped.
TESTED = ("2.13",)

# How often the host stops on the way, waits and blocking copies together (see fake_cuda/device.py).
# Exact, so that none comes back: where fewer are found, lower the number.
STOPS = {
    **dict.fromkeys(PATHS, 0),
    # In float32 the indexes of equal lengths are made and sent when attention asks for them.
    "stage 1, float32 and causal": 8, "stage 1, float32 without Triton": 8, "stage 2, float32": 11,
    # What is wanted on the host.
    "report": 2, "embed": 1, "embed, last token": 1, "caption": 4}

# The same for one step of the scripts under FSDP2: at most so many waits (for the counts that
# stage 1 divides by, and for what the log says), and no blocking copy.
WAITS = {"train_cpt.py": 2, "train_cl.py": 1}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
          ) -> dict[str, dict]:
    """What cuda_paths.py prints: by path, its error, and how often the host stopped."""
    if why := start.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("fake-cuda")
    tested = torch.__version__.startswith(TESTED)
    try:
        stub = start.compile_stub(folder)
    except RuntimeError as error:
        if tested:
            raise
        pytest.skip(str(error))

    # It runs what the tests ask for that were chosen, by path or -k.
    names: set[str] = set()
    for item in request.session.items:
        if item.path == Path(__file__):
            names.update(item.callspec.params.values())
    program = Path(__file__).with_name("cuda_paths.py")
    done = subprocess.run([sys.executable, str(program), *sorted(names)], cwd=folder,
                          env=start.environment(stub), capture_output=True, text=True)
    if done.returncode and not tested:
        pytest.skip(f"no make-believe CUDA on PyTorch {torch.__version__}: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_refused(found: dict[str, dict], path: str) -> None:
    """Every operator and kernel gets what it asks for, on one device; every parameter gets a
    gradient."""
    assert not found[path]["error"]


@pytest.mark.parametrize("path", PATHS)
def test_the_host_stops_as_seldom_as_it_did(found: dict[str, dict], path: str) -> None:
    stops = found[path]["waits"] + found[path]["blocking"]
    assert stops == STOPS[path], found[path]["where"]


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_a_step_of_each_script(found: dict[str, dict], script: str) -> None:
    """The scripts' own loops run under FSDP2, and the host stops seldom."""
    assert not found[script]["error"]
    assert found[script]["waits"] <= WAITS[script], found[script]["where"]
    assert not found[script]["blocking"], found[script]["where"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_sees(found: dict[str, dict], fault: str) -> None:
    """Faults are refused, and named."""
    _, said = FAULTS[fault]
    assert said in found[fault]["error"]


@pytest.mark.parametrize("check", CHECKS)
def test_the_guard_counts(found: dict[str, dict], check: str) -> None:
    """Whatever is on the wrong device is noticed, and so is each kind of copy and wait."""
    assert not found[check]["error"]
