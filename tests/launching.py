"""How tests run a training script from the outside: its command line, ranks, kills, comparisons.

Most runs are the command's own lines in a process forked from a server that has imported torch
once. A test module says by `SCRIPT` which script it tests, by `DEFAULTS` which flags its runs
share, and by a fixture `data` what they learn from; the fixtures below then start that script.
"""

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from nano_moca import batches
from nano_moca.files import MARKER
from nano_moca.flags import main_guard
from nano_moca.report import stage1, stage2

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
PATIENCE = 120  # seconds until a run counts as hanging
# reports at the end on few records, and without pictures: they are looked at once
SMALL = {stage1: {"REPORT_TOKENS": 150, "plot_losses": None, "plot_restorations": None},
         stage2: {"REPORT_PAIRS": 4, "plot_losses": None, "plot_retrieval": None,
                  "plot_similarity": None}}


def shrink() -> None:
    """Make both scripts' reports small."""
    for report, changes in SMALL.items():
        for name, value in changes.items():
            setattr(report, name, value if value is not None else lambda *_: None)


def lose_a_gradient() -> None:
    """A fault: of two ranks one has no gradient."""
    if os.environ.get("RANK") == "1":
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda loss: backward(0 * loss)


def count_a_record_twice() -> None:
    """A fault: of two ranks both have the first record of a step."""
    balance = batches.balance

    def unfair(costs: list[int], parts: int) -> list[list[int]]:
        first, *others = balance(costs, parts)
        return [first, *(sorted({*share, first[0]}) for share in others)]

    batches.balance = unfair


FAULTS = {"a lost gradient": lose_a_gradient, "a record twice": count_a_record_twice}


def child(name: str, words: list[str], said: Path, environment: dict[str, str],
          file_size: int | None, fault: str | None) -> None:
    """In a forked process: what `python NAME.py WORDS` does, but for the size of its report."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    script = importlib.import_module(name)
    sys.argv = [script.__file__, *words]
    if file_size is not None:  # no file may grow beyond it: as on a full disk
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    shrink()
    if name == "train_cpt":
        script.FIRST_LOOK = 2
    if fault:
        FAULTS[fault]()
    main_guard(lambda: script.train(script.parse_flags(script.Flags, None, "")))


@dataclass
class Job:
    """A run under way: its ranks' processes, and the file that their output goes to."""

    ranks: list[multiprocessing.process.BaseProcess]
    said: Path

    def wait(self) -> int:
        """The exit code; as torchrun does, the other ranks are killed when one fails."""
        end = time.monotonic() + PATIENCE
        while (codes := [rank.exitcode for rank in self.ranks]) and None in codes:
            if any(codes) or time.monotonic() > end:
                break
            time.sleep(0.02)
        self.kill()
        assert any(codes) or None not in codes, f"hangs after: {self.output}"
        return next((code for code in codes if code), 0)

    def kill(self) -> None:
        """SIGKILL, at once."""
        for rank in self.ranks:
            rank.kill()
            rank.join()

    @property
    def output(self) -> str:
        """Standard output and error so far."""
        return self.said.read_text() if self.said.exists() else ""


def words(golden: Path, output: Path | str, defaults: str, *flags: str | Path) -> list[str]:
    """The command line of a run."""
    start = ["--model", str(golden / "qwen2.5-vl"), "--output", str(output), *defaults.split()]
    return [*start, *map(str, flags)]


@pytest.fixture(scope="module")
def launch(golden: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
           ) -> Iterator[Callable[..., Job]]:
    """Start a run: launch(output, *flags, ranks=, file_size=, fault=, script=)."""
    defaults = request.module.DEFAULTS
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "train_cpt", "train_cl"])
    folder, jobs = tmp_path_factory.mktemp("said"), []

    def launch(output: Path | str, *flags: str | Path, ranks: int = 1,
               file_size: int | None = None, fault: str | None = None,
               script: ModuleType = request.module.SCRIPT) -> Job:
        said, processes = folder / str(len(jobs)), []
        line = words(golden, output, defaults, *flags)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}  # as torchrun sets them
            environment = address | {name: str(value) for name, value in place.items()}
            environment = environment if ranks > 1 else {}
            processes.append(context.Process(
                target=child, args=(script.__name__, line, said, environment, file_size, fault),
                daemon=True))
            processes[-1].start()
        jobs.append(Job(processes, said))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.kill()


@pytest.fixture(scope="module")
def run(launch: Callable[..., Job], data: Path) -> Callable[..., Path]:
    """A run over the module's data (or other flags') that has to succeed: run(output, *flags)."""

    def run(output: Path, *flags: str | Path, **more: int | str) -> Path:
        job = launch(output, "--data", data, *flags, **more)
        assert job.wait() == 0, job.output
        return output

    return run


@pytest.fixture(scope="module")
def plain(golden: Path, data: Path, tmp_path_factory: pytest.TempPathFactory,
          request: pytest.FixtureRequest) -> Path:
    """The output of the real command on one rank: what all variations are compared with."""
    output, script = tmp_path_factory.mktemp("plain") / "run", request.module.SCRIPT
    line = words(golden, output, request.module.DEFAULTS, "--data", data)
    done = command_line([sys.executable, script.__file__, *line])
    assert done.returncode == 0, done.stderr
    assert "0 of 6 steps done" in done.stdout and "Traceback" not in done.stderr
    return output


def torchrun(script: ModuleType, line: list[str]) -> subprocess.CompletedProcess:
    """The script by torchrun, on two ranks."""
    return command_line([
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr",
        "127.0.0.1", "--master_port", free_port(), script.__file__, *line])


def command_line(words: list) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(job: Job, condition: Callable[[], bool]) -> None:
    """Until the condition holds, while the job runs."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert job.ranks[0].exitcode is None and time.monotonic() < end, job.output
        time.sleep(0.002)


def listed(folder: Path) -> list[str]:
    """The names in a folder, but for the marker of what a run wrote."""
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


def read_log(output: Path) -> list[dict]:
    """The steps of a run."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def read_weights(output: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's model."""
    return load_file(output / "model" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    """Between the weights of two runs."""
    ours, theirs = read_weights(one), read_weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance between two sets of weights."""
    assert ours.keys() == theirs.keys()
    return sum(float((ours[key] - theirs[key]).double().square().sum()) for key in ours) ** 0.5


def write_data(path: Path, records: list[dict | str]) -> Path:
    """A JSON lines file; a text is a line as it is."""
    lines = (line if isinstance(line, str) else json.dumps(line) for line in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def figures(line: dict) -> dict:
    """What a step logged, but for its speed."""
    return {name: value for name, value in line.items() if name != "tokens_per_second"}


# What sums in another order may do to six steps. A float32 is rounded to 6e-8 of itself. A sum of
# n terms in another order differs by about sqrt(n) times that, for the longest sums here (10^4 to
# 10^6 terms) by 6e-6 to 6e-5 of its terms' size; where the terms nearly cancel, by more of the sum
# itself. AdamW divides each gradient by its own size, so that even the smallest ones, which are
# mostly rounding, move their weight by the learning rate; each of the following steps inherits it.
# So the weights are judged by how far they end apart, relative to how far they went; and the
# gradient norm, a sum over all weights that only matters after clipping, by a wider margin.
# Measured (AVX2 processor; ATEN_CPU_CAPABILITY default and avx2; one and two threads; one and two
# ranks, --accumulate 2, --chunk 4): losses within 8e-6 of each other, gradient norms 1e-4, weights
# 3e-5; one processor's kernels against the other's 1.4e-4, 1.2e-3 and 3e-4. (With AVX-512 gradient
# norms were 1.4e-4 apart.) With a rank's gradient lost, or a record counted twice, losses are 7e-2
# or more apart, gradient norms 0.3 and weights 0.16: see test_faults_are_seen.
TOLERANCES = {"loss": 1e-3, "mlm_loss": 1e-3, "mae_loss": 1e-3, "grad_norm": 1e-2}
WEIGHT_TOLERANCE = 3e-3


def assert_same_run(one: Path, other: Path, start: Path = GOLDEN / "qwen2.5-vl") -> None:
    """The same figures at every step and the same weights at the end, but for rounding.

    start: the model that both began with.
    """
    ours, theirs = read_log(one), read_log(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        for name in figures(mine):  # what is not rounded, such as task and tokens, is equal
            expected = its[name]
            if name in TOLERANCES:
                expected = pytest.approx(expected, rel=TOLERANCES[name], abs=1e-7)
            assert mine[name] == expected, (mine["step"], name)
    begun, ended = load_file(start / "model.safetensors"), read_weights(other)
    apart, went = distance(read_weights(one), ended), distance(begun, ended)
    assert apart <= WEIGHT_TOLERANCE * went, (apart, went)


def assert_equal_run(one: Path, other: Path) -> None:
    """The same figures at every step, once each, and weights that are equal to the bit."""
    ours, theirs = read_log(one), read_log(other)
    assert [line["step"] for line in ours] == list(range(1, len(theirs) + 1))
    assert list(map(figures, ours)) == list(map(figures, theirs))
    assert largest_difference(one, other) == 0
    scores = (json.loads((output / "scores.json").read_text()) for output in (one, other))
    assert next(scores).keys() == next(scores).keys()
