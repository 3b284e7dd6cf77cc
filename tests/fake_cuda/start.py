"""Compile the stub, and start a program on the make-believe device."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]  # of the repository
STUB = "FAKE_CUDA_STUB"  # names the compiled stub to a program that was started with it


def missing() -> str:
    """Why there can be no make-believe device here; empty if there can be one."""
    if sys.platform != "linux":
        return "the stub is preloaded in Linux's way"
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this PyTorch is built for real GPUs, whose functions the stub would shadow"
    if compiler() is None:
        return "no C++ compiler"
    return ""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    names = (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


def compile_stub(folder: Path) -> Path:
    """The compiled stub, in `folder`; takes about two seconds."""
    library = folder / "libfake_cuda.so"
    installed = Path(torch.__file__).resolve().parent
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{installed / 'include'}"]
    linked = [f"-L{installed / 'lib'}", "-lc10", f"-Wl,-rpath,{installed / 'lib'}"]
    words = [compiler(), *flags, str(HERE / "stub.cpp"), "-o", str(library), *linked]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the stub does not compile with this PyTorch:\n{done.stderr[-2000:]}")
    return library


def environment(stub: Path) -> dict[str, str]:
    """In which a program finds the stub, the package and the tests."""
    paths = [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    preload = f"{stub} {os.environ.get('LD_PRELOAD', '')}".strip()
    return os.environ | {
        "LD_PRELOAD": preload, STUB: str(stub), "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",  # functions stay as they are: there is nothing to compile for
        "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def started() -> bool:
    """Whether this program runs with the stub."""
    return STUB in os.environ


def run_again(program: Path, words: Sequence[str], folder: Path) -> int:
    """Run a Python program with the stub, which is compiled in `folder`; its exit code."""
    command = [sys.executable, str(program.resolve()), *words]
    return subprocess.run(command, env=environment(compile_stub(folder)), cwd=folder).returncode
