"""What a run may touch, and what is left when something goes wrong: inputs that the output would
replace, folders that no run wrote, two runs at once, a run that starts over a finished one, a
disk that is full.

No user's file is lost, and what is refused is refused in one line before the work.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

import train_cl
import train_cpt
from launching import words, write_data
from nano_moca import MocaError, distributed, flags as flags_module, trainer
from nano_moca.checkpoint import digest
from nano_moca.files import (MARKER, discard, first_lines, fresh_folder, put_text, replace_folder,
                             replacing, write_json)
from nano_moca.flags import CommonFlags, main_guard, parse_flags
from nano_moca.plan.claims import check_inputs, check_output, lock
from nano_moca.plan.resume import check_same_run
from nano_moca.trainer import guarded

DEFAULTS = "--steps 3 --save-every 2 --batch-tokens 120 --device cpu --no-report"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eight records of stage 1, in a folder of their own."""
    (tmp_path / "data").mkdir()
    records = [{"text": f"blue star and a yellow snowman number {n}"} for n in range(8)]
    return write_data(tmp_path / "data" / "texts.jsonl", records)


def train(golden: Path, output: Path, *more: str | Path) -> None:
    """A short run of stage 1 in this process."""
    line = words(golden, output, DEFAULTS, *more)
    train_cpt.train(parse_flags(train_cpt.Flags, line, ""))


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files in a folder, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a finished run, beside its data, with something that it skipped."""
    home = tmp_path_factory.mktemp("finished")
    records = [{"text": f"red anchor and {n} bells"} for n in range(8)]
    write_data(home / "texts.jsonl", [*records, "{oops"])
    train(golden, home / "run", "--data", home / "texts.jsonl", "--on-error", "skip")
    assert (home / "run" / "skipped.jsonl").exists(), "nothing was skipped"
    (home / "run" / "scores.json").write_text("{}")
    return home


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "home"))


# --- inputs that the output would replace -------------------------------------------------------

@pytest.mark.parametrize(("output", "values"), [
    ("x", {"model": "x/model"}), ("x", {"model": "x"}), ("x", {"model": "x/model.old"}),
    ("x", {"model": "x/model.new/inner"}), ("x", {"model": "x/checkpoint"}),
    ("x/", {"model": "y/../x/model/"}), ("link", {"model": "x/model"}),
    ("x", {"model": "modellink"}), ("x", {"model": "links"}), ("x", {"processor": "x/model"}),
    ("x", {"data": "x/log.jsonl"}), ("x", {"data": "x/skipped.jsonl"}),
    ("x", {"data": "x/model/records.jsonl"}), ("x", {"data": "a.jsonl,x/log.jsonl"}),
    ("x", {"data": "x/log.jsonl.part"}), ("x", {"data": "x/scores.json"}),
    ("x", {"held_out": "x/skipped.jsonl"}), ("x", {"held_out": "loglink.jsonl"}),
], ids=str)
def test_an_input_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str,
                                    values: dict[str, str]) -> None:
    """Whatever the spelling or the links: refused, and both flags are named."""
    monkeypatch.chdir(tmp_path)
    for folder in ("x/model/inner", "x/model.new/inner", "x/model.old", "x/checkpoint", "y",
                   "links"):
        Path(folder).mkdir(parents=True)
    for file in ("x/log.jsonl", "x/skipped.jsonl", "x/model/model.safetensors", "a.jsonl"):
        Path(file).touch()
    Path("link").symlink_to("x")
    Path("modellink").symlink_to("x/model")
    Path("loglink.jsonl").symlink_to("x/log.jsonl")
    Path("links/model.safetensors").symlink_to("../x/model/model.safetensors")
    with pytest.raises(MocaError, match="--output .* would write over") as caught:
        check_inputs(train_cl.Flags(output=output, **values))
    assert "--" + next(iter(values)).replace("_", "-") in str(caught.value)


@pytest.mark.parametrize(("output", "values"), [
    ("x", {"model": "x/start"}), ("x", {"data": "x/my.jsonl"}), ("x", {"data": "x/records"}),
    ("x/run", {"data": "x"}), ("x/run", {"model": "x"}), ("x", {"data": "builtin:base"}),
    ("x", {"model": "owner/name"}), ("x", {"data": "a,b.jsonl"}), ("x", {"model": "x.old"}),
    ("x", {"data": "x/log.jsonl2"}), ("x", {"data": "x"}), ("x", {}),
], ids=str)
def test_other_inputs_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str,
                               values: dict[str, str]) -> None:
    """What lies beside that, in the output folder or around it, stays allowed."""
    monkeypatch.chdir(tmp_path)
    for folder in ("x/start", "x/records", "x.old"):
        Path(folder).mkdir(parents=True)
    for file in ("x/my.jsonl", "a,b.jsonl", "x/log.jsonl2"):
        Path(file).touch()
    check_inputs(train_cl.Flags(**{"output": output, **values}))


def test_stage_2_by_default_over_stage_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_cl.py --output runs/cpt` would replace the model that it starts from."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MocaError, match="--output runs/cpt .*--model"):
        check_inputs(train_cl.Flags(model=str(train_cl.STAGE_1), output="runs/cpt"))


def test_refused_before_anything_is_written(golden: Path, texts: Path, tmp_path: Path) -> None:
    """Model and output are as they were: no marker, no log."""
    shutil.copytree(golden / "qwen2.5-vl", tmp_path / "run" / "model")
    before = snapshot(tmp_path)
    with pytest.raises(MocaError, match="--model"):
        train(golden, tmp_path / "run", "--data", texts, "--model", tmp_path / "run" / "model")
    assert snapshot(tmp_path) == before


# --- what no run wrote --------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "model", "model.new", "model.old", "checkpoint", "checkpoint.new", "checkpoint.old"])
@pytest.mark.parametrize("marked", [False, True])
def test_a_folder_of_the_users(tmp_path: Path, name: str, marked: bool) -> None:
    """Refused by name, in a new output folder and in one that a run used; also if it is empty but
    for a folder or a hidden file."""
    output = tmp_path / "run"
    for inner in ("notes.txt", ".env", "sub/mine.py"):
        shutil.rmtree(output, ignore_errors=True)
        (output / name / inner).parent.mkdir(parents=True)
        (output / name / inner).write_text("a year of work")
        if marked:
            (output / MARKER).touch()
        with pytest.raises(MocaError, match=name.replace(".", r"\.")):
            check_output(output)


@pytest.mark.parametrize("place", ["model/notes.txt", "checkpoint/notes.txt", "checkpoint/sub/x"])
def test_a_users_file_in_a_runs_folder(again: Path, place: str) -> None:
    """What somebody put beside a run's files is not a run's."""
    check_output(again / "run")
    (again / "run" / place).parent.mkdir(exist_ok=True)
    (again / "run" / place).write_text("mine")
    with pytest.raises(MocaError, match="/".join(place.split("/")[:2])):
        check_output(again / "run")


THINGS = {
    "a broken link": lambda path: path.symlink_to("gone"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to an empty folder": lambda path: path.symlink_to(path.parent.parent / "empty"),
    "a fifo": os.mkfifo if hasattr(os, "mkfifo") else Path.touch,
    "marked by blank lines": lambda path: (path.mkdir(), (path / "a").touch(),
                                           (path / MARKER).write_text("b\n\n.\n")),
    "marked by bytes": lambda path: (path.mkdir(), (path / "a").touch(),
                                     (path / MARKER).write_bytes(b"[\xff\n\0")),
}


@pytest.mark.parametrize("name", ["model.new", "checkpoint.old", "skipped.jsonl.part"])
@pytest.mark.parametrize("thing", THINGS)
def test_things_in_the_way(tmp_path: Path, thing: str, name: str) -> None:
    """What would only stop the run at its first save: links that lead nowhere, pipes, folders
    whose marker was written by somebody else."""
    output = tmp_path / "run"
    for folder in (output, tmp_path / "empty"):
        folder.mkdir()
    THINGS[thing](output / name)
    with pytest.raises(MocaError, match=f"{name}.*move it away"):
        check_output(output)


def test_a_marker_that_cannot_be_opened(tmp_path: Path) -> None:
    """A pipe in its place does not hang the run."""
    os.mkfifo(tmp_path / MARKER)
    with pytest.raises(MocaError, match="not an ordinary file"):
        run_nothing(tmp_path)


@pytest.mark.parametrize("place", ["model", "checkpoint"])
def test_a_run_inside_what_a_run_wrote(again: Path, place: str) -> None:
    """Its folder may be replaced as a whole at any time."""
    before = snapshot(again)
    with pytest.raises(MocaError, match="--output .* is itself"):
        run_nothing(again / "run" / place)
    assert snapshot(again) == before


def test_an_output_of_an_older_version(tmp_path: Path) -> None:
    """Before there were markers: said what to do."""
    for name in ("model/config.json", "checkpoint/rank-00000.pt", "log.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(MocaError, match="by no run of this version .*: move it away, or choose"):
        run_nothing(tmp_path)


def test_links_among_what_is_read(tmp_path: Path) -> None:
    """A data folder's file, or a checkpoint's config, that is a link to what a run writes."""
    for folder in ("x/model", "data", "checkpoint"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").symlink_to("../x/log.jsonl")
    (tmp_path / "checkpoint" / "config.json").symlink_to("../x/model/config.json")
    for name, value in (("data", "data"), ("model", "checkpoint")):
        with pytest.raises(MocaError, match=f"would write over .*--{name}"):
            check_inputs(CommonFlags(output=str(tmp_path / "x"), **{name: str(tmp_path / value)}))


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be an --output: a flag that is not given names nothing."""
    monkeypatch.chdir(tmp_path)
    run_nothing(Path("."))


def test_what_systems_leave_is_no_matter(again: Path, finished: Path, golden: Path) -> None:
    """A .DS_Store is neither a user's work nor a rank."""
    for name in (".DS_Store", "._model.safetensors", ".nfs000123"):
        (again / "run" / "model" / name).write_text("x")
        (again / "run" / "checkpoint" / name).write_text("x")
    train(golden, again / "run", "--data", finished / "texts.jsonl", "--on-error", "skip",
          "--resume", "--steps", "4")


@pytest.mark.parametrize("name", ["log.jsonl", "skipped.jsonl", "scores.json", "loss.png"])
def test_a_file_of_the_users(tmp_path: Path, name: str) -> None:
    """A file of that name in a folder where no run was is the user's."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(MocaError, match=name):
        check_output(tmp_path)


def test_kinds_in_the_way(tmp_path: Path) -> None:
    """A file where a folder belongs, a folder where a file belongs."""
    (tmp_path / MARKER).touch()
    (tmp_path / "model").write_text("mine")
    with pytest.raises(MocaError, match="model"):
        check_output(tmp_path)
    (tmp_path / "model").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(MocaError, match=r"log\.jsonl"):
        check_output(tmp_path)


def test_a_folder_is_marked(tmp_path: Path) -> None:
    """From its first moment, so that a crash leaves no folder that is nobody's; and the names of
    what was put there are known once it is complete."""
    (tmp_path / "model.new").mkdir()
    check_output(tmp_path)
    (tmp_path / "model.new" / f"{MARKER}.new").write_text("*")
    check_output(tmp_path)
    fresh = fresh_folder(tmp_path / "model")
    (fresh / "a").write_text("1")
    check_output(tmp_path)
    replace_folder(tmp_path / "model")
    check_output(tmp_path)
    assert "a" in (tmp_path / "model" / MARKER).read_text().splitlines()


def test_links_to_another_disk(tmp_path: Path, golden: Path, texts: Path) -> None:
    """An output that is a link, and a checkpoint folder that is one, are written where they lead,
    and stay links."""
    (tmp_path / "big" / "run").mkdir(parents=True)
    (tmp_path / "big" / "state").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big" / "run")
    (tmp_path / "big" / "run" / "checkpoint").symlink_to(tmp_path / "big" / "state")
    for more in ((), ("--resume", "--steps", "4")):
        train(golden, tmp_path / "run", "--data", texts, *more)
    assert (tmp_path / "run").is_symlink() and (tmp_path / "run" / "checkpoint").is_symlink()
    assert (tmp_path / "big" / "state" / "rank-00000.pt").is_file()
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == ["run", "state"]


# --- outputs that cannot be written, and two runs in one ------------------------------------------

def run_nothing(output: Path) -> None:
    """The checks, and a run that does nothing."""
    guarded(lambda flags: None)(CommonFlags(output=str(output), model="absent/model"))


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    """It, and one below a file, are named."""
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MocaError, match="file.* cannot be written"):
            run_nothing(output)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission(tmp_path: Path) -> None:
    """A folder or file that may not be written is named before the work."""
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o500)
        with pytest.raises(MocaError, match=path.name):
            run_nothing(tmp_path / "run")
        path.chmod(0o700)


def test_permission_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system calls unwritable is refused."""
    (tmp_path / MARKER).touch()
    (tmp_path / "log.jsonl").touch()
    check_output(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "log.jsonl")
    with pytest.raises(MocaError, match=r"log\.jsonl"):
        check_output(tmp_path)


def test_where_links_lead_permission_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    """A model is written beside where its folder's link leads; a folder that was marked may be
    read only since."""
    for folder in ("run", "far/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "model").symlink_to("../far/model")
    (tmp_path / "run" / MARKER).touch()
    check_output(tmp_path / "run")
    for closed in ("far", "run"):
        monkeypatch.setattr(os, "access", lambda path, mode, at=closed: Path(path).name != at)
        with pytest.raises(MocaError, match=f"{closed} may not be read and written"):
            check_output(tmp_path / "run")


def test_two_programs_write_one_file(tmp_path: Path) -> None:
    """Each its own temporary file; the last one counts, whole; a user's file of a like name, the
    permissions and the folder stay."""
    (tmp_path / "scores.json.new").write_text("mine")
    with replacing(tmp_path / "scores.json") as first:
        first.write_text("first")
        with replacing(tmp_path / "scores.json") as second:
            second.write_text("second")
        assert (tmp_path / "scores.json").read_text() == "second"
    write_json(tmp_path / "more.json", {})
    assert (tmp_path / "scores.json").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores.json", "more.json", "scores.json.new"}
    (tmp_path / "plain").touch()
    assert (tmp_path / "more.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_kill_left_goes(tmp_path: Path) -> None:
    """A file half written, with the next run; and it is nobody's, so it stops none."""
    with replacing(tmp_path / "log.jsonl") as fresh:
        left = fresh.with_name(fresh.name[:-1] + "x")
        left.write_text('{"step":')
        fresh.write_text("")
    (tmp_path / "log.jsonl").unlink()
    run_nothing(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


LOCKED = """
import sys
from pathlib import Path
from nano_moca.flags import CommonFlags
from nano_moca.trainer import guarded

def wait(flags):
    print("at work", flush=True)
    sys.stdin.read()

guarded(wait)(CommonFlags(output=sys.argv[1], model="absent/model"))
"""


def test_one_run_an_output(tmp_path: Path) -> None:
    """While a process is at work in a folder, another run is refused; once it is dead, killed
    even, the next one may."""
    pytest.importorskip("fcntl")
    output = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", LOCKED, str(output)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert first.stdout.readline() == "at work\n"
    with pytest.raises(MocaError, match=f"--output {output}: another run is at work"):
        run_nothing(output)
    run_nothing(tmp_path / "other")
    first.kill()
    first.communicate()
    run_nothing(output)
    run_nothing(output)


def test_other_ranks_take_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main rank's lock is for all ranks of a run."""
    pytest.importorskip("fcntl")
    with open(tmp_path / MARKER, "a") as marker:
        lock(marker, tmp_path)
        monkeypatch.setenv("RANK", "1")
        run_nothing(tmp_path)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(MocaError, match="another run"):
            run_nothing(tmp_path)


# --- a new run over a finished one ----------------------------------------------------------------

class Crash(Exception):
    """The machine stops here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run in this step, before its update."""
    update = trainer.update

    def crashing(number: int, *rest: object) -> dict:
        if number == step:
            raise Crash
        return update(number, *rest)

    monkeypatch.setattr(train_cpt, "update", crashing)


@pytest.mark.parametrize("step", [1, 2])
def test_nothing_is_touched_before_there_is_a_checkpoint(
        again: Path, finished: Path, golden: Path, monkeypatch: pytest.MonkeyPatch, step: int
        ) -> None:
    """A run that ends before its first checkpoint leaves a finished run as it was, and that can
    be resumed."""
    before = snapshot(again / "run")
    same = ("--data", finished / "texts.jsonl", "--on-error", "skip")
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            train(golden, again / "run", *same, "--seed", "1", "--save-every", "5")
    after = snapshot(again / "run")
    assert {name: after[name] for name in before} == before
    assert {*after} - {*before} <= {"log.jsonl.part", "skipped.jsonl.part"}
    train(golden, again / "run", *same, "--resume", "--steps", "4")
    log = [json.loads(line) for line in (again / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert not list((again / "run").glob("*.part"))


def test_the_first_checkpoint_takes_the_place(again: Path, finished: Path, golden: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Log, list and checkpoint are the new run's from then on; its model and scores follow."""
    old = json.loads((again / "run" / "log.jsonl").read_text().splitlines()[0])
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(Crash):
            train(golden, again / "run", "--data", finished / "texts.jsonl", "--seed", "1",
                  "--on-error", "skip")
    log = [json.loads(line) for line in (again / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2] and log[0]["loss"] != old["loss"]
    assert (again / "run" / "scores.json").exists(), "the model is still the old one"
    train(golden, again / "run", "--data", finished / "texts.jsonl", "--seed", "1",
          "--on-error", "skip", "--resume")
    assert not (again / "run" / "scores.json").exists(), "they were the old model's"


@pytest.mark.parametrize("moment", ["checkpoint", "log"])
def test_a_crash_between_checkpoint_and_log(again: Path, finished: Path, golden: Path, moment: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first save over an old run, log and checkpoint are of two runs for a moment: a resumed
    run goes by the checkpoint."""
    same = ("--data", finished / "texts.jsonl", "--seed", "1", "--on-error", "skip")
    train(golden, again / "whole", *same)

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        if moment == "checkpoint":
            patch.setattr(trainer, "write_checkpoint", crash)
        else:
            patch.setattr(trainer.Log, "publish", crash)
        with pytest.raises(Crash):
            train(golden, again / "run", *same)
    if moment == "checkpoint":
        with pytest.raises(MocaError, match="--seed was 0"):
            train(golden, again / "run", *same, "--resume")
        return
    train(golden, again / "run", *same, "--resume")
    ours, theirs = ((again / name / "checkpoint" / "rank-00000.pt") for name in ("run", "whole"))
    ours, theirs = (torch.load(file, weights_only=True) for file in (ours, theirs))
    assert all(map(torch.equal, ours["parameters"], theirs["parameters"]))
    assert [line["loss"] for line in ours["state"]["log"]] == [
        line["loss"] for line in theirs["state"]["log"]]
    assert (again / "run" / "skipped.jsonl").read_bytes() == (
        again / "whole" / "skipped.jsonl").read_bytes()


def spoil_log(path: Path, content: bytes | None) -> None:
    """Another content, or none."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("content", [
    None, b"", b"{}\n", b"[]\n" * 3, b'{"step": 1}', b"\0" * 99, b"\xff\xfe\xfd\n", b"5\n5\n5\n"])
def test_a_damaged_log_is_written_again(again: Path, finished: Path, golden: Path,
                                        content: bytes | None) -> None:
    """The log in the checkpoint counts; so for the list of what was skipped."""
    before = (again / "run" / "log.jsonl").read_bytes()
    listed = (again / "run" / "skipped.jsonl").read_bytes()
    spoil_log(again / "run" / "log.jsonl", content)
    spoil_log(again / "run" / "skipped.jsonl", content)
    train(golden, again / "run", "--data", finished / "texts.jsonl", "--on-error", "skip",
          "--resume", "--steps", "3")
    assert (again / "run" / "log.jsonl").read_bytes() == before
    assert (again / "run" / "skipped.jsonl").read_bytes() == listed


def test_nobody_skips_a_new_run_over_a_list(again: Path, golden: Path, texts: Path) -> None:
    """A list of an earlier run does not stay as if it were this one's."""
    train(golden, again / "run", "--data", texts)
    assert not (again / "run" / "skipped.jsonl").exists()


# --- what is resumed ------------------------------------------------------------------------------

def spoil_checkpoint(output: Path, change: Callable[[dict], object]) -> None:
    """Change what a checkpoint holds."""
    file = output / "checkpoint" / "rank-00000.pt"
    saved = torch.load(file, weights_only=True)
    change(saved)
    torch.save(saved, file)


CHANGES = {
    "an old flag": (lambda saved: saved["state"]["flags"].update(old_flag=3), "--old-flag was 3"),
    "no log": (lambda saved: saved["state"].pop("log"), "log"),
    "no list": (lambda saved: saved["state"].pop("skipped"), "skipped"),
    "no flags": (lambda saved: saved["state"].pop("flags"), "flags"),
    "no data": (lambda saved: saved["state"].pop("data"), "data"),
    "no step": (lambda saved: saved["state"].pop("step"), "step"),
    "another stage": (lambda saved: saved["state"].update(
        data={"step": 1, "usable": 1, "skipped": 0, "records": 9}), "epoch"),
    "no state": (lambda saved: saved.pop("state"), "lacks a part"),
    "no moments": (lambda saved: saved.pop("moments"), "lacks a part"),
    "moments of one weight too few": (lambda saved: saved["moments"].pop(), "lacks a part"),
    "one weight without moments": (lambda saved: saved["moments"][3].clear(), "lacks a part"),
    "one moment too few": (lambda saved: saved["moments"][2].pop("exp_avg_sq"), "lacks a part"),
    "a moment of another shape": (lambda saved: saved["moments"][2].update(
        exp_avg=torch.zeros(3)), "lacks a part"),
    "one weight too few": (lambda saved: saved["parameters"].pop(), "lacks a part"),
    "the part of another rank": (lambda saved: saved.update(rank=1), "lacks a part"),
    "no moments at all, and so counted": (lambda saved: (
        [entries.clear() for entries in saved["moments"]], saved.update({"moment count": 0})),
        "lacks a part"),
    "a negative square": (lambda saved: saved["moments"][1]["exp_avg_sq"].sub_(1), "lacks a part"),
    "a moment before the first": (lambda saved: saved["moments"][1]["step"].neg_(), "lacks a part"),
    "an infinite moment": (lambda saved: saved["moments"][1]["exp_avg"].fill_(float("inf")),
                           "lacks a part"),
    **{f"weights as {name}": (lambda saved, change=change: saved["parameters"].__setitem__(
        4, change(saved["parameters"][4])), "lacks a part") for name, change in {
            "float64": torch.Tensor.double, "bfloat16": torch.Tensor.bfloat16,
            "int32": torch.Tensor.int, "nan": lambda weight: weight * float("nan"),
            "a list": torch.Tensor.tolist, "sparse": torch.Tensor.to_sparse}.items()},
    "a step of words": (lambda saved: saved["state"].update(step="3"), "step"),
    "a place beyond the data": (lambda saved: saved["state"]["data"].update(next=10**6),
                                "not as it was saved"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_with_a_part_missing(again: Path, finished: Path, golden: Path,
                                          kind: str) -> None:
    """One line that says what to do, and the checkpoint stays."""
    change, named = CHANGES[kind]
    spoil_checkpoint(again / "run", change)
    before = snapshot(again / "run")
    with pytest.raises(MocaError, match=named) as caught:
        train(golden, again / "run", "--data", finished / "texts.jsonl", "--resume", "--steps", "4",
              "--on-error", "skip")
    assert "\n" not in str(caught.value) and "start anew" in str(caught.value)
    assert snapshot(again / "run") == before


STATES = {
    **{f"{name} is {value!r}": ({name: value}, name) for name, value in (
        ("step", "2"), ("step", True), ("step", 1.0), ("step", None), ("flags", 7),
        ("flags", ["seed"]), ("data", "epoch"), ("data", None), ("log", "abc"),
        ("log", {}), ("skipped", 0), ("skipped", b"a"), ("digest", None))},
    **{f"{name} is {value!r}, of the right type": ({name: value}, "not as it was saved")
       for name, value in (
           ("step", 0), ("step", -2), ("log", []), ("log", ["a", "b", "c"]), ("log", [{}] * 3),
           ("log", [torch.ones(1)] * 3), ("skipped", "no line's end"), ("digest", "0" * 64),
           ("more", {3: 4}), ("log", [{"step": 1, "loss": "much"}]))},
    **{f"the data's {name} is {value!r}": ({"data": {
        "records": 9, "fingerprint": "a", "next": 3} | {name: value}}, "not as it was saved")
       for name, value in (("next", "1"), ("next", -1), ("next", 10**6), ("next", None),
                           ("next", True), ("next", 10**30), ("next", float("nan")))},
    "an empty place": ({"data": {}}, "fingerprint, next, records"),
    "a flag that is no word": ({"flags": {4: 5}}, "--4 was 5"),
    "a flag of two lines": ({"flags": {"a\nerror: b": 5}}, "--a"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_no_run_saved(kind: str) -> None:
    """A number that is a word, a log of words, a place that is none: one line."""
    data = {"records": 9, "fingerprint": "a", "next": 0}
    state = {"step": 1, "flags": asdict(CommonFlags()), "data": data | {"next": 3},
             "log": [{"step": 1, "loss": 2.5}], "skipped": ""}
    state["digest"] = digest(state)
    check_same_run(CommonFlags(), dict(state), data)
    change, named = STATES[kind]
    with pytest.raises(MocaError, match=named) as caught:
        check_same_run(CommonFlags(), state | change, data)
    assert "\n" not in str(caught.value) and "start anew" in str(caught.value)


@dataclass
class Batches:
    """Only what resume looks at."""

    state: dict


@pytest.mark.parametrize(("before", "now", "refused"), [
    ("a", "b", True), ("a", "a", False), ("", "", False), ("a", "", True)])
def test_other_data_of_the_same_length(before: str, now: str, refused: bool) -> None:
    """By a fingerprint; that of what is drawn and in no file is empty."""
    at_first = {"records": 9, "skipped": 0}
    saved = {"step": 1, "flags": asdict(CommonFlags()), "log": [{}], "skipped": "",
             "data": at_first | {"fingerprint": before}}
    saved["digest"] = digest(saved)
    data = at_first | {"fingerprint": now}
    if refused:
        with pytest.raises(MocaError, match="fingerprint of --data"):
            check_same_run(CommonFlags(), saved, data)
    else:
        check_same_run(CommonFlags(), saved, data)


def test_other_steps_are_said(again: Path, finished: Path, golden: Path,
                              capsys: pytest.CaptureFixture) -> None:
    """They change the schedule: one line says so; the same number needs none."""
    same = ("--data", finished / "texts.jsonl", "--on-error", "skip", "--resume")
    train(golden, again / "run", *same)
    assert "--steps was" not in capsys.readouterr().out
    train(golden, again / "run", *same, "--steps", "5")
    assert "--steps was 3 and is 5" in capsys.readouterr().out


# --- a full disk ----------------------------------------------------------------------------------

def test_a_full_disk_names_the_file(tmp_path: Path, golden: Path, texts: Path, full_disk,
                                    capsys: pytest.CaptureFixture) -> None:
    """The log, and the list of what was skipped. (capsys: what is printed goes to no file.)"""
    with full_disk(150), pytest.raises(MocaError, match=r"log\.jsonl cannot be written"):
        train(golden, tmp_path / "run", "--data", texts)
    texts.write_text(texts.read_text() + "{oops\n" * 30)
    with full_disk(50), pytest.raises(MocaError, match=r"skipped\.jsonl.* cannot be written"):
        train(golden, tmp_path / "run", "--data", texts, "--on-error", "skip")


def test_text_in_place_of_text(tmp_path: Path, full_disk) -> None:
    """Put at once or not at all; no text is no file."""
    file = tmp_path / "list"
    put_text(file, "one\ntwo\n")
    assert first_lines(file) == "one\ntwo\n" and first_lines(file, 1) == "one\n"
    with full_disk(3), pytest.raises(MocaError, match="list cannot be written"):
        put_text(file, "something longer\n")
    assert first_lines(file) == "one\ntwo\n" and [*tmp_path.iterdir()] == [file]
    put_text(file, "")
    assert first_lines(file) == "" and not file.exists()


def test_the_model_survives_a_full_disk(again: Path, finished: Path, golden: Path, full_disk,
                                        monkeypatch) -> None:
    """Room for the checkpoint and not for the model: the old model and its scores stay."""
    before = snapshot(again / "run" / "model")
    monkeypatch.setattr(trainer, "write_checkpoint", lambda *_: None)
    with full_disk(200_000), pytest.raises(MocaError, match="model.* cannot be written"):
        train(golden, again / "run", "--data", finished / "texts.jsonl", "--on-error", "skip")
    assert snapshot(again / "run" / "model") == before
    assert (again / "run" / "scores.json").exists()


# --- flags ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("line", [
    ["--data", ""], ["--output", ""], ["--model", " "], ["--processor", ""], ["--held-out", "\t"],
    ["--output", "\n"], ["--steps", "1" + "0" * 400], ["--steps", "1" + "0" * 5000],
    ["--seed", "9" * 30], ["--seed", "-1"], ["--min-pixels", "0"], ["--max-pixels", "-5"],
    ["--max-pixels", "9" * 40],
    ["--alpha", "inf"], ["--temperature", "nan"], ["--learning-rate", "inf"],
    ["--batch", "1e3"], ["--seed", "1\nerror: all is well"],
    ["--save-every", "0"], ["--steps", ""], ["--without", ""],
])
def test_impossible_values(line: list[str], capsys: pytest.CaptureFixture) -> None:
    """Exit code 2, and one line of bounded length that names the flag."""
    with pytest.raises(SystemExit) as caught:
        parse_flags(train_cl.Flags, line, "")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and line[0] in error


@pytest.mark.parametrize("line", [
    ["--mae-weight", "inf"], ["--mae-weight", "1e400"], ["--mae-weight", "nan"],
    ["--mae-weight", "1e9"], ["--accumulate", "9999999999"], ["--batch-tokens", "1" * 30],
])
def test_impossible_values_of_stage_1(line: list[str], capsys: pytest.CaptureFixture) -> None:
    """So for its own flags."""
    with pytest.raises(SystemExit) as caught:
        parse_flags(train_cpt.Flags, line, "")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and line[0] in error


def test_values_that_stay_possible() -> None:
    """No limit on the gradient's norm, the largest seed, equal limits of pixels."""
    line = f"--clip inf --seed {2**63 - 1} --min-pixels 784 --max-pixels 784 --data a,b".split()
    flags = parse_flags(train_cpt.Flags, line, "")
    assert flags.clip == float("inf") and flags.seed == 2**63 - 1 and flags.data == "a,b"


def test_a_wrong_held_out_is_noticed_at_once(golden: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, and not after the last one."""
    side = {"text": "words"}
    pair = {"task": "t", "kind": "text-only", "query": side, "positive": {"text": "others"}}
    data = write_data(tmp_path / "pairs.jsonl", [pair] * 4)
    for wrong in ("absent.jsonl", "data"):
        line = words(golden, tmp_path / "run", "--steps 1 --batch 2 --device cpu", "--data", data,
                     "--held-out", tmp_path / wrong)
        with pytest.raises(MocaError, match=wrong):
            train_cl.train(parse_flags(train_cl.Flags, line, ""))
        assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_processor_of_another_checkpoint(golden: Path, checkpoint: Path, texts: Path,
                                           tmp_path: Path) -> None:
    """--processor: a model that comes without its tokenizer takes that of another folder."""
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(MocaError, match="tokenizer.json"):
        train(golden, tmp_path / "run", "--data", texts, "--model", checkpoint)
    train(golden, tmp_path / "run", "--data", texts, "--model", checkpoint,
          "--processor", golden / "qwen2.5-vl")
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["nano_moca"]["max_tokens"] == train_cpt.Flags().max_tokens


# --- what is said ---------------------------------------------------------------------------------

LOST = "[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1\nmore\nlines"


@pytest.mark.parametrize(("error", "size", "quiet"), [
    (RuntimeError(LOST), "2", True), (RuntimeError("shapes differ"), "2", False),
    (RuntimeError(LOST), "1", False), (torch.distributed.DistBackendError("nccl\nnccl"), "8", True),
    (ValueError("a bug"), "2", False),
], ids=str)
def test_a_rank_that_lost_another(error: Exception, size: str, quiet: bool, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                  ) -> None:
    """It says so in one line, for the other has said why; a bug keeps its traceback."""
    def fail() -> None:
        raise error

    def exit_now(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(flags_module.os, "_exit", exit_now)
    with pytest.raises(SystemExit if quiet else type(error)):
        main_guard(fail)
    said = capsys.readouterr().err
    expected = "error: rank 1 stops, as another rank has ended or cannot be reached\n"
    assert said == (expected if quiet else "")


def test_what_a_step_names_is_bounded() -> None:
    """A step of thousands of records names five."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(torch.ones(1, 2)).sum().backward()
    sources = [f"data.jsonl:{number}" for number in range(1, 2001)]
    with pytest.raises(MocaError, match="2000 on this rank: data.jsonl:1, data.jsonl:2") as caught:
        trainer.update(1, torch.tensor([torch.nan]), CommonFlags(), model, optimizer, sources)
    assert len(str(caught.value)) < 400


def test_the_plan_is_one_line(capsys: pytest.CaptureFixture) -> None:
    """Whatever a path or a task is called."""
    world = distributed.World(0, 1, torch.device("cpu"), torch.float32)
    flags = CommonFlags(output="a\nerror: b", model="c\x1b[2J")
    trainer.print_plan(flags, world, torch.nn.Linear(1, 1), 0, "tasks\r\nmore")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said[:-1].isprintable() and "a\\nerror: b" in said


@dataclass
class Closed:
    """A standard output that nobody reads any more."""

    handle: int

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        """Nothing."""

    def fileno(self) -> int:
        """What it writes to."""
        return self.handle


def test_nobody_listens(tmp_path: Path, golden: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
                        ) -> None:
    """`| head -1`: the run goes on to its end."""
    with open(tmp_path / "said", "w") as file:
        monkeypatch.setattr(sys, "stdout", Closed(file.fileno()))
        train(golden, tmp_path / "run", "--data", texts)
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_a_character(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is escaped, and what is printed after it is printed."""
    said = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", said)
    main_guard(lambda: print("日本 Ω\nthe scores", flush=True))
    assert b"the scores" in said.buffer.getvalue()


def test_no_terminal_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&- 2>&-`: both may be closed."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    main_guard(lambda: (sys.stdout.write("a"), sys.stderr.write("b")))


@pytest.mark.parametrize("word", ["--" + "x" * 5000, "--steps=" + "7" * 5000, "--a\nb"])
def test_a_long_word_is_cut(word: str, capsys: pytest.CaptureFixture) -> None:
    """What is said of it is a line that can be read."""
    with pytest.raises(SystemExit):
        parse_flags(train_cpt.Flags, [word], "")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 500 and said[:-1].isprintable()


@pytest.mark.parametrize("files", [1, 3])
def test_a_kill_while_a_folder_goes_leaves_one_that_is_known_as_ours(
        files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marker is the last to go, whichever order the disk lists its files in."""
    folder = tmp_path / "run" / "checkpoint"
    for _ in range(2):
        fresh = fresh_folder(folder)
        for number in range(files):
            (fresh / f"rank-{number:05d}.pt").write_text("weights")
        (fresh / "inner").mkdir()
        (fresh / "inner" / "file").write_text("more")
        replace_folder(folder)
    old = folder.with_name("checkpoint.old")
    shutil.copytree(folder, old)

    # Killed before each single file that is removed, and once more a little later.
    removed: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda self, **_: removed.append(self.name))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(Path(path).name))
    discard(old)
    assert removed[-1] == old.name and MARKER not in removed
    assert sorted(removed[:-1]) == sorted(["inner", *(f"rank-{n:05d}.pt" for n in range(files))])
    monkeypatch.undo()
    for file in old.glob("rank-*"):
        check_output(tmp_path / "run")
        file.unlink()
    check_output(tmp_path / "run")


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to a device"])
def test_only_files_are_replaced(kind: str, tmp_path: Path) -> None:
    """A link in the way of a result may lead to what is no file; it stays what it is."""
    real = tmp_path / "real"
    os.mkfifo(real) if kind == "a pipe" else real.mkdir()
    if kind == "a link to a device":
        real = Path("/dev/full")
    (tmp_path / "scores.json").symlink_to(real)
    before = real.stat().st_mode
    with pytest.raises(MocaError, match="not an ordinary file"):
        write_json(tmp_path / "scores.json", {})
    assert real.stat().st_mode == before

