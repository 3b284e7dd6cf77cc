"""What else may go wrong with a run, tried by hand: no test, for many of its events are slow.

    python tests/hostile_runs.py [PART ...]

Parts are paths, in_the_way, nobody (needs root), disks, resumed, flags, said, together, older.

Each event is one attempt. It is right if it works and loses nothing, or is refused in one
line: never a traceback, never a user's file changed, never a hang. Prints what is wrong, and a
table of kinds. Most runs are stubs that write what a run writes; some are real.
"""

import collections
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import train_cl
import train_cpt
from nano_moca import MocaError, files as files_module
from nano_moca.convert.export import REPORT
from nano_moca.distributed import World
from nano_moca.files import MARKER, fresh_folder, put_text, replace_folder, write_json
from nano_moca.flags import CommonFlags, parse_flags
from nano_moca.trainer import Log, guarded

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "qwen2.5-vl"
FLAGS = "--steps 3 --save-every 2 --batch-tokens 120 --device cpu --no-report --on-error skip"
TRIED: list[tuple[str, str, str]] = []  # (kind, name, what is wrong)
ONLY = os.environ.get("ONLY", "")  # part of an event's name


class TooLong(BaseException):
    """A hang."""


def hang(*_: object) -> None:
    raise TooLong


def attempt(
    kind: str,
    name: str,
    act: Callable[[], object],
    expect: str = "either",
    safe: tuple[Path, ...] = (),
    named: str = "",
) -> None:
    """Try it. expect: "refused", "works", or either. safe: what may not change. named: what the
    message has to say."""
    if ONLY not in f"{kind}: {name}":
        return
    before = contents(safe)
    said, errors = io.StringIO(), io.StringIO()
    wrong, ended, message = "", "works", ""
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            act()
    except MocaError as error:
        ended, message = "refused", str(error)
    except SystemExit as error:
        ended, message = "refused" if error.code else "works", errors.getvalue().strip("\n")
    except TooLong:
        wrong = "hangs"
    except OSError as error:  # main_guard makes it a line
        ended, message = "refused", f"{error.filename}: {error.strerror}"
        if not error.filename:
            wrong = f"names no file: {error!r}"
    except BaseException as error:
        wrong = f"{type(error).__name__}: {str(error)[:150]!r}"
    finally:
        signal.alarm(0)
    if not wrong and "\n" in message:
        wrong = f"several lines: {message!r}"
    if not wrong and expect not in ("either", ended):
        wrong = f"{ended}, and should be {expect}: {message}"
    if not wrong and ended == "refused" and named not in message:
        wrong = f"does not say {named!r}: {message}"
    after = contents(safe)
    if after != before:
        changed = [name for name in before if after.get(name) != before[name]]
        changed += [name for name in after if name not in before]
        wrong += f" CHANGED: {changed[:3]}"
    TRIED.append((kind, name, wrong))
    if wrong:
        print(f"WRONG  {kind}: {name}: {wrong}", flush=True)
    elif os.environ.get("SHOW"):
        print(f"right  {kind}: {name}: {ended} {message}", flush=True)


def contents(places: tuple[Path, ...]) -> dict[str, object]:
    """All bytes in some files and folders."""
    found: dict[str, object] = {}
    for place in places:
        for path in (place, *place.rglob("*")):
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file() and path.name != MARKER:
                found[str(path)] = path.read_bytes()
    return found


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A new folder to work in."""
    before = os.getcwd()
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def put(path: str | Path, text: str = "a year of work") -> Path:
    """A user's file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


WORLD = World(0, 1, torch.device("cpu"), torch.float32)


def stub(flags: CommonFlags) -> None:
    """Write all names that a run writes, as it does."""
    output = Path(flags.output)
    put_text(output / "skipped.jsonl.part", "")
    with open(output / "skipped.jsonl.part", "a") as file:
        file.write('{"count": 1}\n')
    log = Log(output / "log.jsonl", WORLD, 2, None)
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
        fresh = fresh_folder(output / "checkpoint")
        (fresh / "rank-00000.pt").write_text("weights")
        replace_folder(output / "checkpoint")
        log.publish()
        put_text(output / "skipped.jsonl", '{"count": 1}\n')
    (output / "skipped.jsonl.part").unlink()
    fresh = fresh_folder(output / "model")
    (fresh / "model.safetensors").write_text("weights")
    for name in REPORT:
        (output / name).unlink(missing_ok=True)
    replace_folder(output / "model")
    for name in REPORT:
        write_json(output / name, {})


def go(stage: type = train_cpt.Flags, **values: object) -> None:
    """The checks, and a run of the stub."""
    values = {"data": "d.jsonl", "model": "m", "device": "cpu"} | values
    if "held_out" in values:
        train_cl.load_tasks  # noqa: B018
    guarded(stub)(stage(**values))


def real(output: str | Path, *more: object, script: object = train_cpt) -> None:
    """A short run in this process."""
    words = ["--model", str(GOLDEN), "--output", str(output), *FLAGS.split(), *map(str, more)]
    if script is train_cl:
        words[words.index("--batch-tokens") : words.index("--batch-tokens") + 2] = ["--batch", "4"]
    script.train(parse_flags(script.Flags, words, ""))


def data(folder: Path, count: int = 8, bad: bool = True) -> Path:
    """Records of stage 1."""
    lines = [json.dumps({"text": f"red anchor and {n} bells"}) for n in range(count)]
    return put(folder / "texts.jsonl", "\n".join(lines + ["{oops"] * bad) + "\n")


def pairs(folder: Path, task: str = "t") -> Path:
    """Pairs of stage 2."""
    lines = [
        json.dumps(
            {
                "task": task,
                "kind": "text-only",
                "query": {"text": f"star {n}"},
                "positive": {"text": f"bell {n}"},
            }
        )
        for n in range(8)
    ]
    return put(folder / "pairs.jsonl", "\n".join(lines) + "\n")


# --- paths --------------------------------------------------------------------------------------


def paths() -> None:
    """--output and what is read."""
    kind = "output and inputs"
    names = ["model", "checkpoint", "log.jsonl", "skipped.jsonl", *REPORT]
    spellings = {
        "plain": "o",
        "slash": "o/",
        "dots": "z/../o",
        "dot": "./o/.",
        "link": "lo",
        "absolute": "{home}/o",
        "double": "o//",
        "link to a link": "llo",
    }
    for (how, output), name in itertools.product(spellings.items(), ("model", "log.jsonl")):
        flag = "model" if name == "model" else "data"
        for ending in ("", ".new", ".old", ".part"):
            with home() as here:
                put("m/model.safetensors"), put("d.jsonl"), Path("z").mkdir()
                place = put(f"o/{name}{ending}/w.jsonl" if name == "model" else f"o/{name}{ending}")
                Path("lo").symlink_to("o"), Path("llo").symlink_to("lo"), put(f"o/{MARKER}", "")
                value = str(place.parent if name == "model" else place)
                attempt(
                    kind,
                    f"{how}, --{flag} {value}",
                    lambda: go(output=output.format(home=here), **{flag: value}),
                    "refused",
                    (here / "o", here / "d.jsonl", here / "m"),
                    named="--output",
                )
    for name in names:
        with home() as here:
            (
                put(f"o/{MARKER}", ""),
                put("m/model.safetensors"),
                put(f"o/{name}/x.jsonl" if "." not in name else f"o/{name}"),
            )
            put("real.jsonl"), Path("lnk").symlink_to(f"o/{name}")
            for flag in ("data", "model", "processor", "held_out"):
                attempt(
                    kind,
                    f"--{flag} a link to o/{name}",
                    lambda: go(train_cl.Flags, output="o", **{flag: "lnk"}),
                    "refused",
                    (here / "o",),
                )
    with home() as here:
        put("m/model.safetensors"), put("d.jsonl"), put("o/x"), put(f"o/{MARKER}", "")
        for output, values, expect in (
            ("m", {}, "refused"),
            ("m/", {}, "refused"),
            ("m/.", {}, "refused"),
            ("m/sub", {}, "works"),
            ("m/model.safetensors", {}, "refused"),
            ("d.jsonl", {}, "refused"),
            ("d.jsonl/x", {}, "refused"),
            ("O", {}, "works"),
            (".", {}, "works"),
            ("new/a/b/c", {}, "works"),
            ("..", {"model": str(here)}, "either"),
            ("o2", {"data": " d.jsonl"}, "works"),
            ("o3", {"data": "d.jsonl,"}, "either"),
        ):
            attempt(
                kind,
                f"--output {output!r} {values}",
                lambda: go(output=output, **values),
                expect,
                (here / "m" / "model.safetensors", here / "d.jsonl"),
            )
    with home() as here:
        put("m/model.safetensors"), put("d.jsonl"), put("o/model/model.safetensors")
        put("folder/a.jsonl"), put("o/log.jsonl"), put(f"o/{MARKER}", "")
        Path("folder/b.jsonl").symlink_to("../o/log.jsonl")
        Path("hub/snapshots").mkdir(parents=True)
        Path("hub/snapshots/model.safetensors").symlink_to("../../o/model/model.safetensors")
        Path("hub/snapshots/tokenizer.json").symlink_to("../../o/log.jsonl")
        Path("hub2").mkdir(), Path("hub2/config.json").symlink_to("../o/log.jsonl")
        safe = (here / "o",)
        attempt(
            kind,
            "a file in the data's folder is a link to the log",
            lambda: go(output="o", data="folder"),
            "refused",
            safe,
        )
        attempt(
            kind,
            "the weights are links into it",
            lambda: go(output="o", model="hub/snapshots"),
            "refused",
            safe,
        )
        attempt(
            kind,
            "the model's config is a link into it",
            lambda: go(output="o", model="hub2"),
            "refused",
            safe,
        )
    with home() as here:
        put("m/model.safetensors"), put("d.jsonl"), Path("o").mkdir()
        put("elsewhere/keep"), Path("o/model").symlink_to("../elsewhere")
        attempt(
            kind,
            "model/ is a link to a user's folder",
            lambda: go(output="o"),
            "refused",
            (here / "elsewhere",),
        )
        shutil.rmtree("elsewhere"), Path("elsewhere").mkdir(), put("elsewhere.old/keep")
        attempt(
            kind,
            "beside where model/ leads a user's folder",
            lambda: go(output="o"),
            "refused",
            (here / "elsewhere.old",),
        )
    with home() as here:
        put("m/model.safetensors"), put("d.jsonl"), put(f"o/{MARKER}", "")
        go(output="x")
        for place in ("x/model", "x/checkpoint"):
            attempt(
                kind,
                f"a run inside another's {place}",
                lambda: go(output=place),
                "refused",
                (here / "x",),
            )


def in_the_way() -> None:
    """A user's things under a run's names."""
    kind = "in the way"
    names = ["model", "checkpoint", "log.jsonl", "skipped.jsonl", *REPORT]
    things = {
        "empty file": lambda p: put(p, ""),
        "file": put,
        "folder with a file": lambda p: put(p / "a"),
        "empty folder": lambda p: p.mkdir(),
        "folder in a folder": lambda p: (p / "a").mkdir(parents=True),
        "hidden file": lambda p: put(p / ".env"),
        "broken link": lambda p: p.symlink_to("gone"),
        "link to itself": lambda p: p.symlink_to(p.name),
        "fifo": os.mkfifo,
        "link to an empty folder": lambda p: (Path("e").mkdir(), p.symlink_to(Path("e").resolve())),
        "link to a user's file": lambda p: (put("mine"), p.symlink_to(Path("mine").resolve())),
        "link to a user's folder": lambda p: (put("mine/x"), p.symlink_to(Path("mine").resolve())),
        "marked by a word": lambda p: (put(p / "a"), put(p / MARKER, "b\n\nc\n.\n")),
        "marked by bytes": lambda p: (put(p / "a"), (p / MARKER).write_bytes(b"\xff[\n\0")),
        "marked by a folder": lambda p: (put(p / "a"), (p / MARKER).mkdir()),
        "marked by a fifo": lambda p: (put(p / "a"), os.mkfifo(p / MARKER)),
    }
    for name, ending, (what, make), marked in itertools.product(
        names[:3], ("", ".new", ".old", ".part"), things.items(), (False, True)
    ):
        with home() as here:
            put("m/model.safetensors"), put("d.jsonl"), Path("o").mkdir()
            if marked:
                put(f"o/{MARKER}", "")
            make(Path(f"o/{name}{ending}"))
            empty = "empty" in what or "fifo" == what or "itself" in what or "broken" in what
            ours = marked and "." in name
            safe = () if empty or ours else (here / "o", here / "mine")
            attempt(
                kind,
                f"{what} as {name}{ending}{', marked' * marked}",
                lambda: go(output="o"),
                "either",
                safe,
            )
            # Whatever stands there after, it may not be half a run.
            if TRIED and not TRIED[-1][2] and Path("o/log.jsonl").is_file() and name != "log.jsonl":
                if not Path("o/scores.json").exists():
                    print("WRONG  half a run:", TRIED[-1]), TRIED.append((kind, "half", "half"))
    for what, make in things.items():
        with home() as here:
            put("m/model.safetensors"), put("d.jsonl"), Path("o").mkdir()
            make(Path("o") / MARKER)
            attempt(
                kind,
                f"{what} as {MARKER}",
                lambda: go(output="o"),
                "either",
                (here / "mine", here / "m"),
            )
        with home() as here:
            put("m/model.safetensors"), put("d.jsonl")
            make(Path("o"))
            attempt(
                kind,
                f"{what} as --output",
                lambda: go(output="o"),
                "either",
                (here / "mine/x", here / "m"),
            )
    for output in (
        "/dev/null",
        "/dev/full",
        "/proc/self/x",
        "/dev/stdin",
        "/sys/x",
        "a" * 300,
        "b/" * 2100,
        "\udce9",
        "new\nline",
        "-",
        "~",
        "*",
        "con:",
        " lead",
    ):
        with home() as here:
            put("m/model.safetensors"), put("d.jsonl")
            attempt(
                kind,
                f"--output {output[:20]!r}",
                lambda: go(output=output),
                "either",
                (here / "m",),
            )


def nobody() -> None:
    """Without permission, in a child that is no longer root."""
    kind = "no permission"

    def as_nobody(act: Callable[[], object]) -> Callable[[], None]:
        def child() -> None:
            read, write = os.pipe()
            process = os.fork()
            if not process:
                os.setgid(65534), os.setuid(65534)
                said = b"W"
                try:
                    act()
                except (MocaError, OSError) as error:
                    said = b"R" + str(error).encode()
                except BaseException as error:
                    said = b"T" + repr(error).encode()
                os.write(write, said)
                os._exit(0)
            os.close(write)
            said = os.read(read, 9999).decode()
            os.waitpid(process, 0), os.close(read)
            if said[0] == "R":
                raise MocaError(said[1:])
            if said[0] == "T":
                raise RuntimeError(said[1:])

        return child

    def make(here: Path) -> None:
        here.chmod(0o777)
        put("m/model.safetensors"), put("d.jsonl"), Path("o").mkdir()
        for path in here.rglob("*"):
            path.chmod(0o777)

    changes = {
        "o read only": lambda: Path("o").chmod(0o555),
        "o closed": lambda: Path("o").chmod(0),
        "o marked, read only": lambda: (
            put(f"o/{MARKER}", "").chmod(0o666),
            Path("o").chmod(0o555),
        ),
        "the marker of another": lambda: put(f"o/{MARKER}", "").chmod(0o600),
        "log of another": lambda: (
            put(f"o/{MARKER}", "").chmod(0o666),
            put("o/log.jsonl").chmod(0o600),
        ),
        "model/ read only": lambda: (Path("o/model").mkdir(), Path("o/model").chmod(0o555)),
        "model/ closed": lambda: (put("o/model/a"), Path("o/model").chmod(0)),
        "model/ write only": lambda: (put("o/model/a"), Path("o/model").chmod(0o333)),
        "where model/ leads, read only": lambda: (
            Path("far").mkdir(),
            Path("far/model").mkdir(),
            Path("far/model").chmod(0o777),
            Path("o/model").symlink_to("../far/model"),
            Path("far").chmod(0o555),
        ),
        "model/ leads to what is not there": lambda: (
            Path("far").mkdir(),
            Path("far").chmod(0o555),
            Path("o/model").symlink_to("../far/model"),
        ),
        "marker of model/ closed": lambda: (
            put(f"o/model/{MARKER}", "*").chmod(0),
            Path("o/model").chmod(0o777),
        ),
    }
    for name, change in changes.items():
        with home() as here:
            make(here), change()
            log = []

            def act() -> None:
                guarded(lambda flags: (log.append(1), stub(flags)))(
                    train_cpt.Flags(output="o", data="d.jsonl", model="m", device="cpu")
                )

            def before_the_work() -> None:
                try:
                    act()
                except (MocaError, OSError) as error:
                    if log:
                        raise RuntimeError(f"only after the work began: {error}") from None
                    raise

            attempt(kind, name, as_nobody(before_the_work), "refused", (here / "m",), named="o")
    for output in ("/o", "/root/o", "/proc/o", "closed/o"):
        with home() as here:
            make(here), Path("closed").mkdir(), Path("closed").chmod(0o700)
            attempt(
                kind,
                f"--output {output}",
                as_nobody(lambda: go(output=output)),
                "refused",
                (here / "m",),
                named="o",
            )


def disks() -> None:
    """Outputs elsewhere, full disks."""
    kind = "another disk"
    far = Path(tempfile.mkdtemp(dir="/dev/shm"))
    with home() as here:
        put("m/model.safetensors"), put("d.jsonl")
        for name in ("o", "o2/checkpoint", "o3/model"):
            place = far / name.replace("/", "-")
            place.mkdir(), Path(name).parent.mkdir(exist_ok=True), Path(name).symlink_to(place)
            output = name.split("/")[0]
            for time_ in ("first", "second"):
                attempt(kind, f"{name} on a tmpfs, {time_}", lambda: go(output=output), "works")
                if not Path(name).is_symlink():
                    print("WRONG  link lost", name)
        Path("o4").mkdir(), put(far / "log", ""), Path("o4/log.jsonl").symlink_to(far / "log")
        put(f"o4/{MARKER}", "")
        attempt(kind, "log.jsonl on a tmpfs", lambda: go(output="o4"), "works")
    shutil.rmtree(far)

    import resource

    kind = "full disk"
    with home() as here:
        data(here), real("o", "--data", "texts.jsonl"), put("o/scores.json", "{}")
        shutil.copytree("o", "keep")
        sizes = {
            name: (Path("o") / name).stat().st_size
            for name in (
                "log.jsonl",
                "skipped.jsonl",
                "checkpoint/rank-00000.pt",
                "model/model.safetensors",
                "model/config.json",
                "model/tokenizer.json",
                "model/preprocessor_config.json",
                "model/tokenizer_config.json",
                "model/modules.json",
            )
        }
        for name, size in sizes.items():

            def fill() -> None:
                shutil.rmtree("o"), shutil.copytree("keep", "o")
                writing = files_module.os.fsync

                def full(handle: int) -> None:
                    place = os.readlink(f"/proc/self/fd/{handle}")
                    if name.split("/")[-1] in place:
                        raise OSError(28, "No space left on device")
                    writing(handle)

                files_module.os.fsync = full
                try:
                    real("o", "--data", "texts.jsonl", "--seed", "1")
                finally:
                    files_module.os.fsync = writing

            attempt(kind, f"at the flush of {name}", fill, "either", named=name.split("/")[0])
            if "model/" in name and contents((Path("o/model"),)) != {
                key.replace("keep", "o", 1): value
                for key, value in contents((Path("keep/model"),)).items()
            }:
                TRIED.append((kind, name, "the old model is gone")), print("WRONG", TRIED[-1])
        for limit in (10, 100, 300, 1000, 5000, 60_000, 100_000, 200_000, 1_000_000, 4_000_000):

            def fill() -> None:
                shutil.rmtree("o"), shutil.copytree("keep", "o")
                before = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                try:
                    real("o", "--data", "texts.jsonl", "--seed", "1")
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, before)

            attempt(kind, f"files of {limit} bytes at most", fill, "refused", named="o/")


# --- what is resumed ------------------------------------------------------------------------------


def resumed() -> None:
    """Edited checkpoints."""
    kind = "edited checkpoint"
    with home() as here:
        data(here), pairs(here)
        same = ("--data", "texts.jsonl")
        real("o", *same)
        real("o2", "--data", "pairs.jsonl", script=train_cl)
        file = Path("o/checkpoint/rank-00000.pt")
        whole = {
            name: torch.load(Path(name) / "checkpoint/rank-00000.pt", weights_only=True)
            for name in ("o", "o2")
        }

        def state(**values: object) -> Callable[[dict], object]:
            return lambda saved: saved["state"].update(values)

        def position(**values: object) -> Callable[[dict], object]:
            return lambda saved: saved["state"]["data"].update(values)

        def line(number: int, value: object) -> Callable[[dict], object]:
            return lambda saved: saved["state"]["log"].__setitem__(number, value)

        def weights(number: int, change: Callable) -> Callable[[dict], object]:
            return lambda saved: saved["parameters"].__setitem__(
                number, change(saved["parameters"][number])
            )

        def moment(name: str, change: Callable) -> Callable[[dict], object]:
            return lambda saved: saved["moments"][1].update(
                {name: change(saved["moments"][1][name])}
            )

        nan = math.nan
        common = {
            **{f"flags {value!r}": state(flags=value) for value in (3, None, [], "seed", ["seed"])},
            **{
                f"flags with a key of {value!r}": (
                    lambda value: lambda saved: saved["state"]["flags"].update({value: 1})
                )(value)
                for value in (3, None, "a\nb", "", "--x")
            },
            **{
                f"step {value!r}": state(step=value)
                for value in ("3", -1, 0, 2.5, nan, None, [3], True, 10**30, 2, 4)
            },
            **{f"data {value!r}": state(data=value) for value in ([], 3, None, "epoch", {})},
            **{
                f"log {value!r}": state(log=value)
                for value in (
                    3,
                    None,
                    "lines",
                    {},
                    ["a", "b", "c"],
                    [{}, {}, {}],
                    [1, 2, 3],
                    [],
                    [None] * 3,
                )
            },
            **{
                f"skipped {value!r}": state(skipped=value)
                for value in (3, None, ["a"], {}, b"x", "a\n" * 99, "no end")
            },
            "a line too few": lambda saved: saved["state"]["log"].pop(),
            "a line too many": lambda saved: saved["state"]["log"].append(
                saved["state"]["log"][-1]
            ),
            "a line twice": lambda saved: saved["state"]["log"].__setitem__(
                1, saved["state"]["log"][0]
            ),
            "a line that is a list": line(1, [1]),
            "a line without loss": line(1, {"step": 2}),
            "a line of words": line(0, {"step": "1", "loss": "much"}),
            "a line with a list": lambda saved: saved["state"]["log"][0].update(loss=[1]),
            "a line with a tensor": lambda saved: saved["state"]["log"][0].update(
                loss=torch.ones(1)
            ),
            "a line with None": lambda saved: saved["state"]["log"][0].update(loss=None),
            **{
                f"data's skipped {value!r}": position(skipped=value)
                for value in ("1", -1, 10**9, nan, None, 1.5, [1])
            },
            **{
                f"data's usable {value!r}": position(usable=value)
                for value in ("1", -1, nan, None, 1.5)
            },
            **{
                f"data's records {value!r}": position(records=value)
                for value in ("9", 0, nan, None, True)
            },
            **{
                f"data's fingerprint {value!r}": position(fingerprint=value)
                for value in (3, b"x", [1], None)
            },
            "state is a list": lambda saved: saved.update(state=[1]),
            "state has other keys": lambda saved: saved["state"].update({3: 4}),
            "weights of half the bits": weights(0, lambda t: t.half()),
            "weights of double the bits": weights(2, lambda t: t.double()),
            "weights of bfloat16": weights(1, lambda t: t.bfloat16()),
            "integers": weights(0, lambda t: t.long()),
            "complex": weights(0, lambda t: t + 0j),
            "transposed": weights(0, lambda t: t.T.contiguous()),
            "flat": weights(0, torch.flatten),
            "nan": weights(0, lambda t: t * nan),
            "inf": weights(0, lambda t: t + math.inf),
            "no tensor": weights(0, lambda t: t.tolist()[:1]),
            "None": weights(0, lambda t: None),
            "sparse": weights(0, lambda t: t.to_sparse()),
            "moments of nan": moment("exp_avg", lambda t: t * nan),
            "moments of doubles": moment("exp_avg", lambda t: t.double()),
            "negative squares": moment("exp_avg_sq", lambda t: t - 1),
            "moments' step -3": moment("step", lambda t: t * 0 - 3),
            "moments' step nan": moment("step", lambda t: t * nan),
            "moments' step a number": moment("step", float),
            "moments' step of doubles": moment("step", lambda t: t.double()),
            "all moments cleared": lambda saved: [m.clear() for m in saved["moments"]],
            "moments cleared and counted": lambda saved: (
                [m.clear() for m in saved["moments"]],
                saved.update({"moment count": 0}),
            ),
            "moments are numbers": lambda saved: saved.update(moments=[1] * len(saved["moments"])),
            "moments is a dict": lambda saved: saved.update(moments={}),
            "the count is a word": lambda saved: saved.update({"moment count": "x"}),
        }
        only_1 = {
            **{
                f"next {value!r}": position(next=value)
                for value in ("1", -1, 10**9, nan, None, 1.5, True)
            },
            **{f"epoch {value!r}": position(epoch=value) for value in ("1", -1, 10**30, nan, None)},
        }
        only_2 = {
            f"place {value!r}": position(step=value) for value in ("1", -1, nan, None, 1.5, 10**30)
        }
        for output, script, source in (
            ("o", train_cpt, "texts.jsonl"),
            ("o2", train_cl, "pairs.jsonl"),
        ):
            file = Path(output) / "checkpoint/rank-00000.pt"
            own = only_1 if script is train_cpt else only_2
            if script is train_cl:
                common = {
                    name: change
                    for name, change in common.items()
                    if name.startswith(("step", "log", "data", "flags", "a line"))
                }
            for name, change in (common | own).items():
                import copy

                spoilt = copy.deepcopy(whole[output])
                change(spoilt)
                torch.save(spoilt, file)
                shutil.rmtree("try", ignore_errors=True), shutil.copytree(output, "try")
                attempt(
                    kind,
                    f"{output}: {name}",
                    lambda: real(
                        "try", "--data", source, "--resume", "--steps", "4", script=script
                    ),
                    "refused" if name not in ("state has other keys", "no end") else "either",
                    (here / "try",),
                    named="",
                )

        # Files that are none.
        torch.save(whole["o"], Path("o/checkpoint/rank-00000.pt"))
        content = Path("o/checkpoint/rank-00000.pt").read_bytes()

        class Evil:
            """Runs a command when it is unpickled."""

            def __reduce__(self) -> tuple:
                return os.system, ("touch evil",)

        for name, spoilt in {
            "empty": b"",
            "cut at a half": content[: len(content) // 2],
            "without its end": content[:-1],
            "cut at the head": content[100:],
            "text": b"hello",
            "zeros": bytes(len(content)),
            "a pickle": pickle.dumps(Evil()),
            "an old pickle": pickle.dumps({"state": {}}, 0),
            "JSON": b"{}",
            "a zip of nothing": b"PK\x05\x06" + bytes(18),
            "a flipped bit": content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
        }.items():
            shutil.rmtree("try", ignore_errors=True), shutil.copytree("o", "try")
            Path("try/checkpoint/rank-00000.pt").write_bytes(spoilt)
            attempt(
                kind,
                name,
                lambda: real("try", *same, "--resume", "--steps", "4"),
                "either" if "bit" in name else "refused",
                () if "bit" in name else (here / "try",),
            )
        torch.save({"parameters": Evil(), "moments": [], "state": {}}, "evil.pt")
        shutil.copy("evil.pt", "try/checkpoint/rank-00000.pt")
        attempt(kind, "code in it", lambda: real("try", *same, "--resume"), "refused")
        if Path("evil").exists():
            print("WRONG  code was run"), TRIED.append((kind, "code", "was run"))
        for name, change in {
            "no file": lambda c: (c / "rank-00000.pt").unlink(),
            "two files": lambda c: shutil.copy(c / "rank-00000.pt", c / "rank-00001.pt"),
            "another number": lambda c: (c / "rank-00000.pt").rename(c / "rank-00001.pt"),
            "a folder": lambda c: ((c / "rank-00000.pt").unlink(), (c / "rank-00000.pt").mkdir()),
            "a fifo": lambda c: ((c / "rank-00000.pt").unlink(), os.mkfifo(c / "rank-00000.pt")),
            "endless": lambda c: (
                (c / "rank-00000.pt").unlink(),
                (c / "rank-00000.pt").symlink_to("/dev/zero"),
            ),
            "a copy beside it": lambda c: shutil.copy(c / "rank-00000.pt", c / "rank-0 (1).pt"),
            "notes beside it": lambda c: put(c / "notes"),
            "the checkpoint is a file": lambda c: (shutil.rmtree(c), put(c)),
            "the checkpoint is empty": lambda c: (shutil.rmtree(c), c.mkdir()),
        }.items():
            shutil.rmtree("try", ignore_errors=True), shutil.copytree("o", "try")
            change(Path("try/checkpoint"))
            attempt(kind, name, lambda: real("try", *same, "--resume", "--steps", "4"), "refused")
        shutil.rmtree("try", ignore_errors=True), shutil.copytree("o", "try")
        put("others.jsonl", Path("texts.jsonl").read_text().replace("red", "tan"))
        put("fewer.jsonl", "\n".join(Path("texts.jsonl").read_text().splitlines()[1:]) + "\n")
        for more in (
            ("--seed", 1),
            ("--data", "others.jsonl"),
            ("--data", "fewer.jsonl"),
            ("--batch-tokens", 200),
            ("--learning-rate", 0.01),
            ("--steps", 2),
            ("--attention", "causal"),
            ("--dtype", "bfloat16"),
            ("--accumulate", 2),
            ("--max-tokens", 99),
            ("--warmup", 0.5),
            ("--cap", 5),
            ("--processor", GOLDEN),
            ("--model", GOLDEN.parent / "qwen3-vl"),
            ("--min-pixels", 784),
        ):
            attempt(
                "resumed with others",
                " ".join(map(str, more)),
                lambda: real("try", *same, "--resume", *more),
                "refused",
                (here / "try",),
            )
        attempt(
            "resumed with others",
            "--device, --save-every, --checkpointing",
            lambda: real(
                "try", *same, "--resume", "--steps", 4, "--save-every", 1, "--checkpointing"
            ),
            "works",
        )


# --- flags and what is said -----------------------------------------------------------------------


def flags() -> None:
    """Every flag, with values that nobody means."""
    kind = "flags"
    import dataclasses

    values = [
        "",
        " ",
        "\t\n",
        "nan",
        "inf",
        "-inf",
        "-1",
        "9" * 30,
        "1" * 5000,
        "1e400",
        "0x10",
        "1_0",
        "٣",
        "½",
        "a\nb",
        "\x1b[2J",
        "\udce9",
        "-0",
        "1e-400",
        "None",
        "true",
        "0",
    ]
    for stage in (train_cpt.Flags, train_cl.Flags):
        for field in dataclasses.fields(stage):
            flag = "--" + field.name.replace("_", "-")
            for value in values:

                def act() -> None:
                    errors = io.StringIO()
                    with contextlib.redirect_stderr(errors):
                        try:
                            flags = parse_flags(stage, [f"{flag}={value}"], "")
                        except SystemExit as error:
                            said = errors.getvalue()
                            # A usage of several lines, or a control character, would be wrong.
                            if (
                                said.count("\n") != 1
                                or not said[:-1].isprintable()
                                or len(said) > 600
                            ):
                                raise RuntimeError(f"says {said[:300]!r} {len(said)}") from None
                            if error.code != 2 or flag not in said:
                                raise RuntimeError(f"code {error.code}: {said}") from None
                            return
                    found = getattr(flags, field.name)
                    if (
                        field.type in (int, float)
                        and not math.isfinite(found)
                        and field.name != "clip"
                    ):
                        raise RuntimeError(f"takes {found}")

                attempt(kind, f"{stage.__module__} {flag} {value[:12]!r}", act, "works")
    for words in (
        ["--no\nsuch"],
        ["--no\x1b[2J"],
        ["x\r\ny"],
        ["--Steps", "3"],
        ["--step", "3"],
        ["--steps"],
        ["--resume=1"],
        ["--steps", "3", "4"],
        ["-s"],
        ["--"],
        ["--", "a\nb"],
        ["-1"],
        ["@file"],
        ["--steps=3=4"],
        ["\udce9"],
        ["--" + "x" * 9999],
    ):

        def act() -> None:
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
                parse_flags(train_cpt.Flags, words, "")
            said = errors.getvalue()
            if said and (said.count("\n") != 1 or not said[:-1].isprintable() or len(said) > 600):
                raise RuntimeError(f"says {said[:200]!r} {len(said)}")

        attempt(kind, f"words {str(words)[:30]}", act, "works")
    with home() as here:
        data(here, bad=False), pairs(here)
        for more in (
            ("--seed", 2**63 - 1),
            ("--clip", "inf"),
            ("--clip", 1e-9),
            ("--learning-rate", 0),
            ("--learning-rate", 1),
            ("--warmup", 1),
            ("--warmup", 0),
            ("--text-mask", 1),
            ("--image-mask", 1),
            ("--mae-weight", 1e4),
            ("--max-tokens", 8),
            ("--steps", 2**63 - 1),
            ("--save-every", 2**63 - 1),
            ("--max-tokens", 2**63 - 1),
            ("--min-pixels", 2**63 - 1),
            ("--max-pixels", 1),
            ("--cap", 2**63 - 1),
            ("--cap", 1),
        ):
            ends = str(more[1]) in ("9223372036854775807",) and more[0] == "--steps"
            if ends:
                continue
            attempt(
                "flags, real",
                " ".join(map(str, more)),
                lambda: real("o", "--data", "texts.jsonl", "--steps", 1, *more),
                "either",
            )
        for more in (
            ("--seed", 2**63 - 1),
            ("--chunk", 2**63 - 1),
            ("--hard-negatives", 2**63 - 1),
            ("--batch", 2**63 - 1),
            ("--alpha", 10),
            ("--alpha", 0),
            ("--temperature", 1e-4),
            ("--cap", 4),
            ("--temperature", 10),
            ("--cap", 1),
        ):
            attempt(
                "flags, real",
                " ".join(map(str, more)),
                lambda: real("o2", "--data", "pairs.jsonl", "--steps", 1, *more, script=train_cl),
                "either",
            )


def said() -> None:
    """Real processes: encodings, closed pipes, names."""
    kind = "what is said"
    words = FLAGS.replace("--no-report ", "").split()

    def process(script: str, more: list, env: dict, shell: str = "") -> Callable[[], None]:
        def act() -> None:
            command = [sys.executable, str(ROOT / script), "--model", str(GOLDEN), *more]
            if shell:
                import shlex

                command = ["bash", "-c", "set -o pipefail; " + shlex.join(command) + shell]
            done = subprocess.run(
                command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env}
            )
            error = done.stderr.decode(errors="replace")
            if (
                "Traceback" in error
                or "Exception ignored" in error
                or done.returncode not in (0, 1)
            ):
                raise RuntimeError(f"{done.returncode}: {error[-300:]}")
            if done.returncode:
                raise MocaError(error)

        return act

    two = "--steps 2 --save-every 2 --batch 4 --device cpu".split()
    for encoding in ("ascii", "latin-1", "utf-8", "cp1252"):
        with home() as here:
            data(here), pairs(here, "task Ω 日本 \ud83d\n[x]")
            env = {"PYTHONIOENCODING": encoding}
            attempt(
                kind,
                f"{encoding}, stage 1",
                process(
                    "train_cpt.py", ["--data", "texts.jsonl", "--output", "日本 Ω", *words], env
                ),
                "works",
            )
            attempt(
                kind,
                f"{encoding}, stage 2",
                process("train_cl.py", ["--data", "pairs.jsonl", "--output", "ö ü", *two], env),
                "works",
            )
            if not Path("ö ü/scores.json").exists():
                TRIED.append((kind, encoding, "no scores")), print("WRONG", TRIED[-1])
    with home() as here:
        data(here), pairs(here)
        for shell in (" | head -1", " | true", " >&-", " > /dev/full"):
            shutil.rmtree("o", ignore_errors=True)
            attempt(
                kind,
                f"stage 1{shell}",
                process(
                    "train_cpt.py", ["--data", "texts.jsonl", "--output", "o", *words], {}, shell
                ),
                "works",
            )
            if not Path("o/scores.json").exists():
                TRIED.append((kind, shell, "no scores")), print("WRONG", TRIED[-1])
        attempt(
            kind,
            "stage 2 2>&-",
            process("train_cl.py", ["--data", "pairs.jsonl", "--output", "o3", *two], {}, " 2>&-"),
            "works",
        )
        attempt(
            kind,
            "an output that is not Unicode",
            process("train_cpt.py", ["--data", "texts.jsonl", "--output", b"caf\xe9", *words], {}),
            "either",
        )
        os.rename("texts.jsonl", b"t\xe9\n.jsonl")
        attempt(
            kind,
            "data that are not Unicode",
            process("train_cpt.py", ["--data", b"t\xe9\n.jsonl", "--output", "o2", *words], {}),
            "works",
        )


def together() -> None:
    """Several processes at once."""
    kind = "at once"
    with home() as here:
        put("m/model.safetensors"), put("d.jsonl"), Path("l").symlink_to("o")
        read, write = os.pipe()
        process = os.fork()
        if not process:
            guarded(lambda flags: (os.write(write, b"x"), time.sleep(60)))(
                train_cpt.Flags(output="o", model="m", data="d.jsonl")
            )
        os.read(read, 1)
        for output in ("o", "l", "./o", str(here / "o")):
            attempt(kind, f"a second run in {output}", lambda: go(output=output), "refused")
            attempt(
                kind,
                f"a run of stage 2 in {output}",
                lambda: go(train_cl.Flags, output=output),
                "refused",
            )
        os.kill(process, signal.SIGKILL), os.waitpid(process, 0)
        attempt(kind, "after a kill", lambda: go(output="o"), "works")

        # Many write one file.
        writers = []
        for number in range(4):
            process = os.fork()
            if not process:
                try:
                    for turn in range(200):
                        write_json(
                            Path("scores.json"), {"by": number, "turn": turn, "x": "y" * 999}
                        )
                        json.loads(Path("scores.json").read_text())
                    os._exit(0)
                except BaseException as error:
                    print(f"writer {number}: {error!r}", flush=True)
                    os._exit(1)
            writers.append(process)
        codes = [os.waitpid(process, 0)[1] for process in writers]

        def four() -> None:
            if any(codes):
                raise RuntimeError(f"{codes}")

        attempt(kind, "four write one file", four, "works")
        left = [
            p.name
            for p in here.iterdir()
            if p.name.startswith("scores.json") and p.name != "scores.json"
        ]
        attempt(kind, "and leave no other", lambda: left and hang(), "works")
        os.umask(0o022)
        write_json(Path("mode"), {})
        attempt(
            kind,
            "a file for all to read",
            lambda: Path("mode").stat().st_mode & 0o777 == 0o644 or hang(),
            "works",
        )
        put("mine.new"), put("mine")
        attempt(
            kind,
            "a user's mine.new beside mine",
            lambda: write_json(Path("mine"), {}),
            "works",
            (here / "mine.new",),
        )


def older() -> None:
    """An output of the version before markers."""
    kind = "an older output"
    for names in (
        ("model/config.json", "checkpoint/rank-00000.pt", "log.jsonl"),
        ("log.jsonl",),
        ("model/config.json",),
        ("checkpoint/rank-00000.pt", "log.jsonl"),
    ):
        for more in ({}, {"resume": True}):
            with home() as here:
                put("m/model.safetensors"), put("d.jsonl")
                for name in names:
                    put(f"o/{name}")
                attempt(
                    kind,
                    f"{names} {more}",
                    lambda: go(output="o", **more),
                    "refused",
                    (here / "o",),
                    named="move",
                )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parts = {
        part.__name__: part
        for part in (paths, in_the_way, nobody, disks, resumed, flags, said, together, older)
    }
    for name in sys.argv[1:] or parts:
        parts[name]()
    counts = collections.Counter((kind, bool(wrong)) for kind, _, wrong in TRIED)
    for kind in dict.fromkeys(kind for kind, _, _ in TRIED):
        print(
            f"{kind:22s} {counts[kind, False] + counts[kind, True]:5d} tried"
            f" {counts[kind, True]:4d} wrong"
        )
    print(f"{len(TRIED)} tried, {sum(bool(wrong) for *_, wrong in TRIED)} wrong")
    sys.exit(any(wrong for *_, wrong in TRIED))
