"""What stands around the training loops: schedule, flags, log, checkpoints, prefetch, picture."""

import copy
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from nano_moca import Moca, MocaError
from nano_moca.batches import prefetch
from nano_moca.checkpoint import digest, snapshot, write_checkpoint
from nano_moca.convert.export import save_model
from nano_moca.distributed import World, init_distributed
from nano_moca.files import find_folder, fresh_folder, replace_folder
from nano_moca.flags import CommonFlags, flag, parse_flags
from nano_moca.report.curves import plot_losses
from nano_moca.plan.resume import check_same_run, load_checkpoint
from nano_moca.trainer import Log, update, warmup_then_linear

ALONE = World(0, 1, torch.device("cpu"), torch.float32)


@dataclass
class Flags:
    """One flag of each kind."""

    name: str = flag("here", "a text")
    some_steps: int = flag(10, "a count", low=1)
    share: float = flag(0.5, "a share", low=0, high=1)
    kind: str = flag("one", "a choice", choices=("one", "two"))
    place: str = flag(None, "a choice without default", choices=("cpu", "cuda"))
    resume: bool = flag(False, "a switch")


# --- schedule -----------------------------------------------------------------------------------

def test_warmup_then_linear() -> None:
    """Up in equal steps to 1, down in equal steps, the last step still moves."""
    rates = [warmup_then_linear(step, 10, 0.4) for step in range(10)]
    expected = [0.25, 0.5, 0.75, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_schedule_stays_in_range(steps: int, warmup: float) -> None:
    """Above 0 and at most 1 at every step, once at its peak, whatever the lengths."""
    rates = [warmup_then_linear(step, steps, warmup) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1
    peak = rates.index(1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


# --- flags --------------------------------------------------------------------------------------

def test_flags_that_fit() -> None:
    """Defaults without words; each kind of value by its own flag, dashes for underscores."""
    assert parse_flags(Flags, [], "") == Flags("here", 10, 0.5, "one", None, False)
    words = "--name there --some-steps 3 --share 1 --kind two --place cpu --resume".split()
    flags = parse_flags(Flags, words, "")
    assert flags == Flags("there", 3, 1.0, "two", "cpu", True) and type(flags.share) is float


def test_help_shows_defaults_that_say_something(capsys: pytest.CaptureFixture) -> None:
    """Numbers, zero among them, and names; neither None nor False."""
    with pytest.raises(SystemExit):
        parse_flags(CommonFlags, ["--help"], "About.")
    text = " ".join(capsys.readouterr().out.split())  # however wide the terminal
    assert "(default: 2000)" in text and "masks and new weights (default: 0)" in text
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize("words", [
    "--unknown 1", "--some 3", "--some-steps 0", "--some-steps x", "--some-steps 1.5",
    "--some-steps", "--share 1.5", "--share -0.1", "--share nan", "--kind three", "--place tpu",
    "--resume yes", "stray",
])
def test_flags_that_do_not_fit(words: str, capsys: pytest.CaptureFixture) -> None:
    """An unknown flag, an abbreviation, an impossible value: exit code 2 and one line that
    names it."""
    with pytest.raises(SystemExit) as caught:
        parse_flags(Flags, words.split(), "")
    captured = capsys.readouterr()
    assert caught.value.code == 2 and not captured.out
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words.split()[0] in captured.err or words == "--resume yes"


def test_help_shows_defaults(capsys: pytest.CaptureFixture) -> None:
    """--help lists every flag with its default, and ends with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        parse_flags(Flags, ["--help"], "What it is for.")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "What it is for." in shown
    assert all(word in shown for word in ("--some-steps", "(default: 10)", "--share", "--resume"))


def test_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """--device cuda where there is none is one line; without the flag the CPU is taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MocaError, match="--device cpu"):
        init_distributed("cuda", None)
    assert init_distributed(None, None) == ALONE


def test_flags_of_an_older_checkpoint() -> None:
    """A checkpoint that does not know --no-report resumes, with the flag and without; a flag
    that changes the result is named when it differs."""
    older = asdict(CommonFlags())
    del older["no_report"]
    data = {"records": 9, "fingerprint": "a"}
    state = {"step": 1, "flags": older, "data": data, "log": [{}], "skipped": ""}
    check_same_run(CommonFlags(no_report=True, steps=7, output="elsewhere"),
                   state | {"digest": digest(state)}, data)
    check_same_run(CommonFlags(), state | {"digest": digest(state)}, data)
    with pytest.raises(MocaError, match="--learning-rate was 0.002"):
        check_same_run(CommonFlags(learning_rate=1.0), state | {"digest": digest(state)}, data)


# --- log ----------------------------------------------------------------------------------------

def read_log(path: Path) -> list[dict]:
    """The objects of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(path: Path, done: int, steps: int) -> Log:
    """Log the steps after `done`, as a run does."""
    saved = {"step": done, "log": [{"step": step, "loss": 1 / step} for step in range(1, done + 1)]}
    log = Log(path, ALONE, steps, saved if done else None)
    for step in range(done + 1, steps + 1):
        log.write({"step": step, "loss": 1 / step})
    log.bar.close()
    return log


def test_log_cuts_what_is_made_again(tmp_path: Path) -> None:
    """After a resume at step 3 the lines of later steps go, and lines from before stay as they
    were."""
    path = tmp_path / "log.jsonl"
    logged(path, 0, 6)
    before = path.read_bytes().splitlines()
    logged(path, 3, 3)
    assert path.read_bytes().splitlines() == before[:3]
    log = logged(path, 3, 6)
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4, 5, 6]
    assert log.lines == read_log(path)


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: logged(path, 0, 2),
                                   lambda path: path.write_text('{"loss": 9}\n' * 6)])
def test_log_of_another_run(tmp_path: Path, spoil: Callable) -> None:
    """A log that is gone, shorter, or of other steps is written again from the checkpoint's."""
    path = tmp_path / "log.jsonl"
    logged(path, 0, 6)
    spoil(path)
    logged(path, 3, 6)
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_log_beside_an_earlier_one(tmp_path: Path) -> None:
    """A new run's log takes the place of an earlier run's when it is published, and goes on."""
    path = tmp_path / "log.jsonl"
    logged(path, 0, 6)
    before = path.read_bytes()
    logged(path, 0, 1)
    log = Log(path, ALONE, 3, None)
    log.write({"step": 1, "loss": 9.0})
    assert path.read_bytes() == before
    assert read_log(tmp_path / "log.jsonl.part") == [{"step": 1, "loss": 9.0}]
    for step in (2, 3):
        log.publish()
        log.write({"step": step, "loss": 9.0})
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("cut", [1, 10])
def test_log_with_a_last_line_cut_off(tmp_path: Path, cut: int) -> None:
    """A crash in the middle of a line does no harm: it belongs to a step that is made again."""
    path = tmp_path / "log.jsonl"
    logged(path, 0, 4)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in logged(path, 3, 6).lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4, 5, 6]


def test_log_is_on_disk_at_once(tmp_path: Path) -> None:
    """Each line can be read as soon as it is written; other ranks write nothing."""
    log = Log(tmp_path / "log.jsonl", ALONE, 3, None)
    log.write({"step": 1, "loss": 0.5})
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 0.5}]
    log.bar.close()


# --- checkpoints --------------------------------------------------------------------------------

def toy(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model and its optimiser."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    return model, torch.optim.AdamW(model.parameters(), 0.1, betas=(0.9, 0.95))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """One optimiser step a seed."""
    for seed in seeds:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


RUN = {"step": 0, "flags": {}, "data": {}}  # what files of one checkpoint have in common


def save_checkpoint(folder: Path, world: World, model: nn.Module,
                    optimizer: torch.optim.Optimizer, state: dict) -> None:
    """At once: no thread."""
    content = snapshot(world, model, optimizer, RUN | state)
    fresh_folder(folder)
    write_checkpoint(folder, world, content)


def test_checkpoint_is_exact(tmp_path: Path) -> None:
    """Weights, both moments, step counts and state come back to the bit: what follows is the
    same."""
    model, optimizer = toy(0)
    steps(model, optimizer, range(3))
    state = {"step": 3, "data": {"epoch": 1, "next": 2}, "flags": {"rate": 1e-3, "place": None}}
    save_checkpoint(tmp_path / "checkpoint", ALONE, model, optimizer, state)
    other, other_optimizer = toy(1)
    restored = load_checkpoint(tmp_path / "checkpoint", ALONE, other, other_optimizer)
    assert restored.pop("digest") and restored == state
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.equal(theirs)
        moments, loaded = optimizer.state[mine], other_optimizer.state[theirs]
        assert moments.keys() == loaded.keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(moments[key].equal(loaded[key]) for key in moments)
    steps(model, optimizer, range(3, 6))
    steps(other, other_optimizer, range(3, 6))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_no_checkpoint(tmp_path: Path) -> None:
    """Where there is none, nothing is loaded and nothing changes."""
    model, optimizer = toy(0)
    before = copy.deepcopy(model)
    assert load_checkpoint(tmp_path / "checkpoint", ALONE, model, optimizer) is None
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def damage_cut(content: bytes) -> bytes:
    """The first half."""
    return content[: len(content) // 2]


def damage_empty(content: bytes) -> bytes:
    """Nothing."""
    return b""


def damage_head(content: bytes) -> bytes:
    """Other bytes at the beginning."""
    return bytes(255 - byte for byte in content[:60]) + content[60:]


def damage_json(content: bytes) -> bytes:
    """Another kind of file."""
    return b'{"step": 1}'


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_head, damage_json])
def test_damaged_checkpoint(tmp_path: Path, damage) -> None:
    """A damaged file is refused in one line that names it, and the model is left as it was."""
    model, optimizer = toy(0)
    steps(model, optimizer, range(1))
    save_checkpoint(tmp_path / "checkpoint", ALONE, model, optimizer, {})
    file = tmp_path / "checkpoint" / "rank-00000.pt"
    file.write_bytes(damage(file.read_bytes()))
    other, other_optimizer = toy(1)
    before = copy.deepcopy(other)
    with pytest.raises(MocaError, match="rank-00000.pt") as caught:
        load_checkpoint(tmp_path / "checkpoint", ALONE, other, other_optimizer)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, other.parameters(), before.parameters()))


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    """Other shapes, or fewer tensors, are refused before anything is copied."""
    model, optimizer = toy(0)
    steps(model, optimizer, range(1))
    save_checkpoint(tmp_path / "checkpoint", ALONE, model, optimizer, {})
    for other in (nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4)),
                  nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2)),
                  nn.Linear(5, 7)):
        before = copy.deepcopy(other)
        with pytest.raises(MocaError, match="another model"):
            load_checkpoint(tmp_path / "checkpoint", ALONE, other,
                            torch.optim.AdamW(other.parameters()))
        assert all(map(torch.equal, other.parameters(), before.parameters()))


class Crash(Exception):
    """The machine stops here."""


@pytest.mark.parametrize("moment", range(8))
def test_crash_while_a_folder_is_replaced(tmp_path: Path, moment: int,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before or after any rename or removal, what stands under the name (once `find_folder`
    looked) is the whole old folder or the whole new one; and the next attempt succeeds."""
    folder, calls = tmp_path / "checkpoint", itertools.count()

    def write(text: str) -> None:
        fresh = fresh_folder(folder)
        for name in ("a", "b"):
            (fresh / name).write_text(text)
        replace_folder(folder)

    def read() -> set[str]:
        return {(find_folder(folder) / name).read_text() for name in ("a", "b")}

    def crashing(call):
        def instead(*args, **keywords):
            if next(calls) == moment:
                raise Crash
            return call(*args, **keywords)
        return instead

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crashing(shutil.rmtree))
        patch.setattr(Path, "rename", crashing(Path.rename))
        patch.setattr(os, "fsync", crashing(os.fsync))
        try:
            write("new")
            finished = True
        except Crash:
            finished = False
    assert read() == {"new"} if finished else read() in ({"old"}, {"new"})
    write("newer")
    assert read() == {"newer"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_crash_between_the_renames(tmp_path: Path) -> None:
    """The one moment when no folder has the name: the old one is put back and loaded."""
    model, optimizer = toy(0)
    steps(model, optimizer, range(1))
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, ALONE, model, optimizer, {"step": 1})
    folder.rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new" / "rank-00000.pt").write_bytes(b"half")
    assert load_checkpoint(folder, ALONE, model, optimizer)["step"] == 1
    save_checkpoint(folder, ALONE, model, optimizer, {"step": 2})
    assert load_checkpoint(folder, ALONE, model, optimizer)["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_disk_full_at_a_checkpoint(tmp_path: Path, full_disk) -> None:
    """The old checkpoint stays, none that is half written takes its name."""
    model = nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "checkpoint", ALONE, model, optimizer, {"step": 1})
    with full_disk(100_000), pytest.raises((OSError, MocaError)):
        save_checkpoint(tmp_path / "checkpoint", ALONE, model, optimizer, {"step": 2})
    assert load_checkpoint(tmp_path / "checkpoint", ALONE, model, optimizer)["step"] == 1


@pytest.mark.parametrize("before", [True, False])
def test_disk_full_at_the_model(tmp_path: Path, moca: Moca, full_disk, before: bool) -> None:
    """The old model stays or there is none: none that is half written takes its name."""
    if before:
        save_model(tmp_path / "model", ALONE, moca.model, moca.processor)
    content = {file.name: file.read_bytes() for file in (tmp_path / "model").glob("*.*")}
    with full_disk(200_000), pytest.raises((OSError, MocaError)):
        save_model(tmp_path / "model", ALONE, moca.model, moca.processor)
    assert content == {file.name: file.read_bytes() for file in (tmp_path / "model").glob("*.*")}
    assert (tmp_path / "model").exists() == before


# --- small helpers ------------------------------------------------------------------------------

def test_prefetch() -> None:
    """Values come in order, made at most one ahead and none that was not asked for; an exception
    arrives where its value would have."""
    made = []

    def numbers() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number
        raise MocaError("the fourth is broken")

    assert list(prefetch(numbers(), 2)) == [0, 1]
    time.sleep(0.2)  # a third would be made in a thread
    assert made == [0, 1]
    made.clear()
    values = prefetch(numbers(), 5)
    assert not made
    assert next(values) == 0 and len(made) <= 2
    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(MocaError, match="fourth"):
        next(values)


def test_update_clips() -> None:
    """The norm before is told; gradients beyond the limit are scaled to it, others are not; the
    weights move by the schedule's rate, and the gradients are gone."""
    flags = CommonFlags(learning_rate=0.5, steps=10, warmup=0.4, clip=1.0)
    for given, moved in (((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4))):
        model = nn.Linear(2, 1, bias=False)
        optimizer, before = torch.optim.SGD(model.parameters(), 1.0), model.weight.detach().clone()
        model.weight.grad = torch.tensor([given])
        losses, told = update(2, torch.tensor([1.0, 5.0]), flags, model, optimizer, [])
        assert losses == [1.0, 5.0]
        assert told == {"lr": 0.25, "grad_norm": pytest.approx(math.hypot(*given))}
        expected = before - 0.25 * torch.tensor([moved])
        torch.testing.assert_close(model.weight.detach(), expected)
        assert model.weight.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_update_refuses_what_is_not_finite(value: float) -> None:
    """Loss or gradient: step, quantity and records are named, and the weights stay."""
    model = nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(model.parameters(), 1.0), model.weight.detach().clone()
    for loss, gradient, name in ((value, 1.0, "loss"), (1.0, value, "gradient norm")):
        model.weight.grad = torch.tensor([[1.0, gradient]])
        with pytest.raises(MocaError, match=f"step 7: the {name} .*a.jsonl:1, a.jsonl:2"):
            losses = torch.tensor([0.5, loss])
            update(7, losses, CommonFlags(), model, optimizer, ["a.jsonl:1", "a.jsonl:2"])
        assert model.weight.equal(before)


@pytest.mark.parametrize("count", [1, 45])
def test_plot_losses(tmp_path: Path, count: int) -> None:
    """A picture with a panel a loss, for one step and for many."""
    lines = [{"step": step, "loss": 3 / step, "mae_loss": 0.0} for step in range(1, count + 1)]
    plot_losses(tmp_path / "loss.png", lines, ["loss", "mae_loss"])
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.width > picture.height > 200
        assert len(set(picture.convert("L").resize((64, 32)).tobytes())) > 4  # not blank
