"""Checkpoints that are written while training goes on, and read by other ranks than wrote them.

The toy's weights all equal the number of its steps, so that a checkpoint of two moments would show.
"""

import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launching import free_port
from nano_moca import MocaError, checkpoint, trainer
from nano_moca.checkpoint import digest, snapshot, write_checkpoint
from nano_moca.distributed import World, local_part, shard
from nano_moca.files import fresh_folder
from nano_moca.flags import CommonFlags
from nano_moca.plan.resume import load_checkpoint
from nano_moca.trainer import Log, finish_checkpoint, make_optimizer, save_progress

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
PATIENCE = 60  # seconds until processes count as hanging


@pytest.fixture(autouse=True)
def nothing_under_way() -> Iterator[None]:
    """No test leaves a checkpoint to the next one."""
    yield
    while trainer.UNDER_WAY:
        trainer.UNDER_WAY.pop().exception()


def toy(world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose rows two or three ranks cannot share evenly, all zeros, and its optimiser."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1))
    shard(model, [model[0]], world)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model, make_optimizer(model, 0.1)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, world: World, steps: int) -> None:
    """Steps of which every rank takes the same, on weights that are not all alike."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        value = torch.randn(parameter.shape)
        with torch.no_grad():
            mesh = getattr(parameter, "device_mesh", None)
            parameter.copy_(dist.tensor.distribute_tensor(value, mesh, parameter.placements)
                            if mesh else value)
    for seed in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All weights, moments and counts, complete."""
    tensors = []
    for parameter in model.parameters():
        entries = optimizer.state[parameter]
        for tensor in (parameter, *(entries[key] for key in sorted(entries))):
            complete = getattr(tensor, "full_tensor", tensor.detach)()
            tensors.append(complete.detach().clone())
    return tensors


def as_ranks(count: int, target: Callable, *arguments: object) -> list:
    """Start one process a rank: target(rank, *arguments)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launching", "train_cpt", "train_cl"])
    ranks = [context.Process(target=target, args=(rank, *arguments), daemon=True)
             for rank in range(count)]
    for rank in ranks:
        rank.start()
    return ranks


def join(rank: int, size: int, port: int) -> World:
    """A world of `size` ranks, of which this is one."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                world_size=size)
    return World(rank, size, torch.device("cpu"), torch.float32)


# --- other ranks ----------------------------------------------------------------------------------

SIZES = (1, 2, 3, 2, 1, 3, 1)  # of the worlds, each of which reads what the one before wrote


def hand_on(rank: int, ports: list[int], folder: Path) -> None:
    """In a process: take part in each of the worlds."""
    for number, (size, port) in enumerate(zip(SIZES, ports, strict=True)):
        while number and not (folder / f"{number - 1}").exists():
            time.sleep(0.01)
        if rank >= size:
            continue
        world = join(rank, size, port)
        model, optimizer = toy(world)
        if number == 0:
            learn(model, optimizer, world, 3)
            torch.save(whole(model, optimizer), folder / "whole.pt")
        else:
            assert load_checkpoint(folder / "checkpoint", world, model, optimizer)["step"] == number
        expected = torch.load(folder / "whole.pt")
        found = whole(model, optimizer)
        assert len(found) == len(expected) == 4 * 6
        assert all(map(torch.equal, found, expected)), f"{size} ranks, the world of number {number}"
        state = {"step": number + 1, "flags": {}, "data": {}}
        if world.main:
            fresh_folder(folder / "checkpoint")
        world.wait()
        write_checkpoint(folder / "checkpoint", world, snapshot(world, model, optimizer, state))
        world.wait()
        if size > 1:
            dist.destroy_process_group()
        if world.main:
            (folder / f"{number}").touch()


def test_other_ranks_read_the_same(tmp_path: Path) -> None:
    """Weights, both moments and step counts are equal to the bit on 1, 2 and 3 ranks, whoever wrote
    them; some ranks have no row of a parameter."""
    ranks = as_ranks(max(SIZES), hand_on, [free_port() for _ in SIZES], tmp_path)
    for rank in ranks:
        rank.join(PATIENCE)
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)
    assert (tmp_path / str(len(SIZES) - 1)).exists()


def saved(folder: Path, ranks: int, step: int = 1, seed: int = 0) -> Path:
    """A checkpoint as `ranks` ranks would write it, of rows cut from whole tensors."""
    model, optimizer = toy(ALONE)
    learn(model, optimizer, ALONE, 2)
    flags = asdict(CommonFlags(seed=seed))
    state = {"step": step, "flags": flags, "data": {"next": step}}
    content = snapshot(ALONE, model, optimizer, state)
    fresh_folder(folder)
    for rank in reversed(range(ranks)):

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            share = -(-len(tensor) // ranks) if tensor.dim() else 0
            return tensor[rank * share : (rank + 1) * share].clone() if share else tensor

        part = {**content, "rank": rank, "ranks": ranks,
                "parameters": list(map(rows, content["parameters"])),
                "moments": [{key: rows(value) for key, value in entries.items()}
                            for entries in content["moments"]]}
        if rank:
            torch.save(part, folder.with_name(folder.name + ".new") / f"rank-{rank:05d}.pt")
        else:
            write_checkpoint(folder, World(0, ranks, *list(asdict(ALONE).values())[2:]), part)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_one_rank_reads_any(tmp_path: Path, ranks: int) -> None:
    """Also from more ranks than a parameter has rows."""
    model, optimizer = toy(ALONE)
    learn(model, optimizer, ALONE, 2)
    other, other_optimizer = toy(ALONE)
    load_checkpoint(saved(tmp_path / "checkpoint", ranks), ALONE, other, other_optimizer)
    assert all(map(torch.equal, whole(model, optimizer), whole(other, other_optimizer)))


def test_before_files_told_their_ranks(tmp_path: Path) -> None:
    """A checkpoint without the number of its ranks is as good as before."""
    folder = saved(tmp_path / "checkpoint", 2)
    for file in folder.glob("rank-*.pt"):
        content = torch.load(file, weights_only=True)
        del content["ranks"]
        torch.save(content, file)
    assert load_checkpoint(folder, ALONE, *toy(ALONE))["step"] == 1


def copy_from(other: str) -> Callable[[Path], object]:
    """Put a rank's file of another checkpoint in the place of the second one."""
    def change(folder: Path) -> None:
        file = folder.parent / other / "rank-00001.pt"
        (folder / "rank-00001.pt").write_bytes(file.read_bytes())
    return change


MIXED = {
    "a file is missing": lambda folder: (folder / "rank-00002.pt").unlink(),
    "the first is missing": lambda folder: (folder / "rank-00000.pt").unlink(),
    "one in the middle is missing": lambda folder: (folder / "rank-00001.pt").unlink(),
    "all are missing": lambda folder: [file.unlink() for file in folder.glob("rank-*")],
    "one too many": lambda folder: (folder / "rank-00003.pt").write_bytes(
        (folder / "rank-00002.pt").read_bytes()),
    "two change places": lambda folder: [
        (folder / f"rank-0000{old}.pt").rename(folder / f"rank-0000{new}.pt")
        for old, new in ((1, 9), (2, 1), (9, 2))],
    "another step": copy_from("later"),
    "another run": copy_from("other"),
    "other ranks": copy_from("two"),
    "cut": lambda folder: os.truncate(folder / "rank-00002.pt", 2000),
    "empty": lambda folder: os.truncate(folder / "rank-00001.pt", 0),
}


@pytest.mark.parametrize("kind", MIXED)
def test_files_that_do_not_belong_together(tmp_path: Path, kind: str) -> None:
    """One line, and neither model nor checkpoint is changed."""
    folder = saved(tmp_path / "checkpoint", 3)
    saved(tmp_path / "later", 3, step=2)
    saved(tmp_path / "other", 3, seed=1)
    saved(tmp_path / "two", 2)
    MIXED[kind](folder)
    model, optimizer = toy(ALONE)
    with pytest.raises(MocaError, match="start anew") as caught:
        load_checkpoint(folder, ALONE, model, optimizer)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not any(parameter.any() for parameter in model.parameters()) and not optimizer.state


# --- in the background ----------------------------------------------------------------------------

def progress(output: Path, world: World) -> Callable[[int], None]:
    """A run of the toy: go(step) makes the step and saves."""
    model, optimizer = toy(world)
    flags = CommonFlags(output=str(output), steps=10**6)
    log = Log(output / "log.jsonl", world, flags.steps, None)

    def go(step: int) -> None:
        for parameter in model.parameters():
            moments = optimizer.state[parameter]
            if step == 1:
                moments |= {"exp_avg": torch.zeros_like(parameter), "step": torch.zeros(()),
                            "exp_avg_sq": torch.zeros_like(parameter)}
            for tensor in (parameter, *moments.values()):
                local_part(tensor.detach()).fill_(step)
        log.write({"step": step, "loss": float(step)})
        save_progress(step, flags, world, model, optimizer, {"skipped": 0, "next": step}, log)

    return go


def read_step(output: Path) -> int:
    """The step of an output's checkpoint; it is of this step from end to end."""
    model, optimizer = toy(ALONE)
    state = load_checkpoint(output / "checkpoint", ALONE, model, optimizer)
    if state is None:
        return 0
    assert all((tensor == state["step"]).all() for tensor in whole(model, optimizer))
    assert [line["step"] for line in state["log"]] == list(range(1, state["step"] + 1))
    assert state["data"]["next"] == state["step"]
    assert state.pop("digest") == digest(state)
    return state["step"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """A disk that writes as many files as it is allowed to (release), and then stops."""
    allowed, save = threading.Semaphore(1), torch.save

    def slow(content: dict, file: Path) -> None:
        assert allowed.acquire(timeout=PATIENCE)
        save(content, file)

    monkeypatch.setattr(checkpoint.torch, "save", slow)
    yield allowed
    allowed.release(9)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_training_goes_on_while_a_checkpoint_is_written(
        tmp_path: Path, disk: threading.Semaphore) -> None:
    """Steps change weights, moments and log under way; the checkpoint is the moment at which it was
    begun, and the one before keeps the name until then. A second one waits for the first."""
    go = progress(tmp_path, ALONE)
    go(1)
    until(lambda: read_step(tmp_path) == 1)
    go(2)  # which returns, though the disk has stopped
    assert read_step(tmp_path) == 1, "what is not complete has the name"
    third = threading.Thread(target=go, args=(3,))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "two checkpoints are under way"
    disk.release()
    until(lambda: read_step(tmp_path) == 2)  # exact, though the weights are those of step 3
    third.join(PATIENCE)
    disk.release()
    finish_checkpoint()
    assert read_step(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "log.jsonl"]


def test_no_name_before_all_files_are_there(tmp_path: Path) -> None:
    """The main rank waits for the file of a slower one, and does not take what is still written for
    a file."""
    folder = saved(tmp_path / "checkpoint", 2)
    two = World(0, 2, torch.device("cpu"), torch.float32)
    content = torch.load(folder / "rank-00000.pt", weights_only=True)
    later = (folder / "rank-00001.pt").read_bytes()
    fresh = fresh_folder(tmp_path / "later")
    main = threading.Thread(target=write_checkpoint, args=(tmp_path / "later", two, content))
    main.start()
    until((fresh / "rank-00000.pt").exists)
    (fresh / ".nano_moca.half").write_bytes(later)
    main.join(0.3)
    assert main.is_alive() and not (tmp_path / "later").exists()
    (fresh / ".nano_moca.half").rename(fresh / "rank-00001.pt")
    main.join(PATIENCE)
    assert load_checkpoint(tmp_path / "later", ALONE, *toy(ALONE))["step"] == 1


def test_a_disk_that_gets_full_in_the_background(tmp_path: Path, full_disk: Callable) -> None:
    """One line at the next save, or at the end; the checkpoint before stays, and when there is room
    again the run could go on."""
    go = progress(tmp_path, ALONE)
    go(1)
    finish_checkpoint()
    for then in (lambda: go(3), finish_checkpoint):
        with full_disk(1000):
            go(2)
            trainer.UNDER_WAY[0].exception()
        with pytest.raises(MocaError, match="rank-00000.pt cannot be written") as caught:
            then()
        assert "\n" not in str(caught.value) and read_step(tmp_path) == 1


def test_an_error_in_a_step_waits_for_the_checkpoint(tmp_path: Path, disk: threading.Semaphore
                                                     ) -> None:
    """A run that ends for another reason loses no checkpoint that is under way."""
    @trainer.guarded
    def train(flags: CommonFlags) -> None:
        progress(Path(flags.output), ALONE)(1)
        threading.Timer(0.2, disk.release).start()
        raise MocaError("a step failed")

    disk.acquire()
    with pytest.raises(MocaError, match="a step failed"):
        train(CommonFlags(output=str(tmp_path), model="absent/model"))
    assert read_step(tmp_path) == 1


def endless(rank: int, size: int, port: int, output: Path) -> None:
    """In a process: save at every step; `finished` says of how many it is known to be done."""
    go = progress(output, join(rank, size, port))
    for step in range(1, 10**6):
        go(step)  # which has waited for the checkpoint before
        if rank == 0:
            (output / "next").write_text(str(step - 1))
            (output / "next").replace(output / "finished")


@pytest.mark.parametrize("moment", range(10))
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, moment: int) -> None:
    """At ten moments, on one rank and on two: no finished checkpoint is lost, and what is there is
    of one step."""
    size = 1 + moment % 2
    ranks = as_ranks(size, endless, size, free_port(), tmp_path)
    until(lambda: (tmp_path / "finished").exists())
    time.sleep(random.uniform(0, 0.1))
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == -9, "it ended before it was killed"
    finished = int((tmp_path / "finished").read_text())
    assert read_step(tmp_path) in (finished, finished + 1, finished + 2)
