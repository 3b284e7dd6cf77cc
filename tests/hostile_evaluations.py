"""Hostile and unlucky inputs of evaluations and reports, many of them: no test, started by hand.

    python tests/hostile_evaluations.py [--only KIND]

Each is tried in this process, on the golden model, in a folder of its own. Right is what works as
documented, or one line that names the flag, file or row, and leaves alone what it may not touch.
Prints what was wrong, and a table: kind, tried, right.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from PIL import Image

import nano_moca
from nano_moca import MARK, Moca, MocaError, Record, ablate, benchmark
from nano_moca.batch import Pair
from nano_moca.convert.export import save_model
from nano_moca.distributed import World
from nano_moca.evaluate import vectors
from nano_moca.evaluate.command import main
from nano_moca.flags import parse_flags
from nano_moca.report import stage1, stage2
from nano_moca.report.curves import plot_losses
from nano_moca.report.ranking import rank_pairs

MODEL = ROOT / "tests" / "golden" / "qwen2.5-vl"
WORLD = World(0, 1, torch.device("cpu"), torch.float32)
LINES = [
    {"step": step, "loss": 1 / step, "accuracy": 0.5, "mlm_loss": 1 / step, "mae_loss": 0.5}
    for step in range(1, 4)
]
COUNTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
ONLY = ""


class Ended(Exception):
    """How a command ends for a user: one line, or a traceback (then it is wrong)."""


def as_a_user(run: Callable[[], object]) -> object:
    """What main_guard makes of the errors of a command."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return run()
    except MocaError as error:
        raise Ended(str(error)) from None
    except OSError as error:
        raise Ended(f"{error.filename or 'writing'}: {error.strerror or error}") from None
    except SystemExit as error:
        if error.code:
            raise Ended(said.getvalue().strip()) from None
        return None


def tried(
    kind: str,
    name: str,
    run: Callable[[Path], object],
    *expected: str | None,
    safe: Callable[[Path], object] | None = None,
) -> None:
    """Try one. expected: words that the one line may hold, any of them; None: it may work.
    safe: what has to be the same before and after."""
    if ONLY not in kind:
        return
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    wrong, before = "", None
    said, heard = io.StringIO(), io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(said):
            warnings.simplefilter("always")
            step = run(folder)  # prepares, and returns what is tried
            before = safe(folder) if safe else None
            with contextlib.redirect_stderr(heard):
                as_a_user(step)
        if None not in expected:
            wrong = f"it works: {said.getvalue()[-200:]!r}"
        ours = [warning for warning in caught if warning.category is not DeprecationWarning]
        if ours:
            wrong = f"warns: {ours[0].message}"
    except Ended as error:
        message = str(error)
        words = [word for word in expected if word]
        if "\n" in message or not any(word in message for word in words):
            wrong = f"it says {message[:300]!r}"
        elif len(message) > 20_000:
            wrong = f"a line of {len(message)} characters"
    except AssertionError as error:
        wrong = f"not so: {error} {traceback.format_exc().splitlines()[-3].strip()}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__}: {str(error)[:200]} ({place.filename}:{place.lineno})"
    try:
        if not wrong and safe and safe(folder) != before:
            wrong = "what it may not touch is changed"
    except OSError:
        wrong = "what it may not touch is gone"
    COUNTS[kind]["tried"] += 1
    COUNTS[kind]["right"] += not wrong
    if wrong:
        print(f"WRONG  {kind}: {name}: {wrong}", flush=True)
    subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)


def lines(path: Path, *rows: object) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(
    command: str, folder: Path, *more: object, model: object = MODEL, output: object = "out"
) -> list[str]:
    """A command line."""
    given = [command, "--model", model, "--device", "cpu", "--output", folder / str(output), *more]
    return list(map(str, given))


def embed(folder: Path, *rows: object, more: tuple = (), **kinds: object) -> Callable:
    """The command `embed` on these rows."""
    items = lines(folder / "items.jsonl", *rows)
    return lambda: main(words("embed", folder, "--input", items, *more, **kinds))


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, but for what an evaluation is meant to write."""
    return {
        str(path): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and ".vectors" not in str(path)
    }


# --- outputs --------------------------------------------------------------------------------------


def outputs() -> None:
    """What --output may not be, and what it may."""
    kind = "outputs"
    good = {"text": "a cat"}

    def at(
        name: str, *more: object, make: Callable[[Path], object] = lambda folder: 0
    ) -> Callable[[Path], Callable]:
        def prepare(folder: Path) -> Callable:
            step = embed(folder, good, more=more, output=name)
            make(folder)
            return step

        return prepare

    def a_file(name: str, text: str = "of the user") -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_text(text)

    tried(kind, "the current folder", at("."), "ordinary file", safe=files)
    tried(kind, "in a file", at("f/out", make=a_file("f")), "f", safe=files)
    tried(kind, "a fifo", at("p", make=lambda f: os.mkfifo(f / "p")), "/p is not an ordinary")
    tried(
        kind,
        "a link to a fifo",
        at("l", make=lambda f: (os.mkfifo(f / "p"), (f / "l").symlink_to("p"))),
        "ordinary",
    )
    tried(kind, "a link to itself", at("l", make=lambda f: (f / "l").symlink_to("l")), "/l", None)
    tried(
        kind,
        "a link to the input",
        at("l", make=lambda f: (f / "l").symlink_to("items.jsonl")),
        "--input",
        safe=files,
    )

    def input_is_new(folder: Path) -> Callable:
        items = lines(folder / "v.new", good).rename(folder / "v.new")
        items.rename(folder / "v.jsonl")
        os.link(folder / "v.jsonl", folder / "v.new")
        return lambda: main(words("embed", folder, "--input", folder / "v.jsonl", output="v"))

    tried(kind, "the input is called <output>.new", input_is_new, "v.new", safe=files)
    tried(
        kind,
        "somebody's file is called <output>.new",
        at("v", make=a_file("v.new")),
        "v.new",
        safe=files,
    )

    def picture_is_new(folder: Path) -> Callable:
        Image.new("RGB", (56, 56)).save(folder / "v.new", "png")
        return embed(folder, {"text": MARK, "images": ["v.new"]}, output="v")

    tried(kind, "a picture is called <output>.new", picture_is_new, "v.new", safe=files)

    def picture_is_new_again(folder: Path) -> Callable:
        step = embed(folder, good, output="v")
        as_a_user(step)
        Image.new("RGB", (56, 56)).save(folder / "v.new", "png")
        return embed(folder, {"text": MARK, "images": ["v.new"]}, output="v")

    tried(
        kind,
        "a picture is called <output>.new, after a first evaluation",
        picture_is_new_again,
        "v.new",
        safe=lambda f: (f / "v.new").read_bytes(),
    )
    tried(
        kind,
        "a file in the place of the kept vectors",
        at("v", make=a_file("v.vectors")),
        "v.vectors",
        safe=lambda f: (f / "v.vectors").read_bytes(),
    )

    def file_vectors_early(folder: Path) -> Callable:
        (folder / "v.vectors").write_text("")
        items = lines(folder / "items.jsonl", good)
        return lambda: main(words("embed", folder, "--input", items, output="v", model="absent"))

    tried(kind, "... known before the work", file_vectors_early, "v.vectors")
    tried(
        kind,
        "a folder where nothing may be written",
        at("ro/v", make=lambda f: ((f / "ro").mkdir(), (f / "ro").chmod(0o500))),
        "ro",
        *[None] * (os.geteuid() == 0),
    )
    tried(
        kind,
        "kept vectors that may not be written",
        at("v", make=lambda f: ((f / "v.vectors").mkdir(), (f / "v.vectors").chmod(0o500))),
        "v.vectors",
        *[None] * (os.geteuid() == 0),
    )
    tried(kind, "a parent that is not there", at("a/b/c/v"), None)
    tried(kind, "a name of 255 characters", at("v" * 255), "v" * 255)
    tried(kind, "a name of 250 characters", at("v" * 250), "v" * 250, None)
    tried(kind, "a name that is no Unicode", at("v\udcff\udc80"), None)
    tried(kind, "a name of two lines", at("a\nerror: b"), None)
    tried(kind, "/dev/full", at("/dev/full"), "/dev/full")
    tried(kind, "a file of /proc", at("/proc/self/comm"), "/proc/self/comm")

    def in_model(folder: Path, name: str) -> Callable:
        model = Path(shutil.copytree(MODEL, folder / "model"))
        items = lines(folder / "items.jsonl", good)
        return lambda: main(words("embed", folder, "--input", items, model=model, output=name))

    for name in ("model/tokenizer.json", "model/../model/config.json"):
        tried(kind, name, lambda f, name=name: in_model(f, name), "--model", safe=files)
    tried(kind, "the model's folder", lambda f: in_model(f, "model"), "--model", safe=files)

    def twice(folder: Path, name: str) -> Callable:
        """After a good run, what it wrote is the next one's input."""
        step = embed(folder, good, output=name)
        as_a_user(step)
        lines(folder / name, good, good)
        return lambda: main(words("embed", folder, "--input", folder / name, output=name))

    tried(
        kind,
        "an earlier output that is now the input",
        lambda f: twice(f, "v.jsonl"),
        "--input",
        safe=lambda f: (f / "v.jsonl").read_bytes(),
    )

    def other_disk(folder: Path) -> Callable:
        place = Path(tempfile.mkdtemp(dir="/dev/shm"))
        (folder / "v").symlink_to(place / "v")

        def run() -> None:
            embed(folder, good, output="v")()
            assert (folder / "v").is_symlink() and np.load(place / "v").shape == (1, 64)
            shutil.rmtree(place)

        return run

    tried(kind, "a link to another disk", other_disk, None)

    for command, given in (("mmeb", "images"), ("vidore", "data")):

        def over(folder: Path, command: str = command, given: str = given) -> Callable:
            data = mmeb(folder) if command == "mmeb" else vidore(folder)
            (folder / "im").mkdir()
            Image.new("RGB", (56, 56)).save(folder / "im" / "0.png")
            more = ("--images", folder / "im") if given == "images" else ()
            target = "im/0.png" if given == "images" else "V/t/0.png"
            return lambda: main(words(command, folder, "--data", data, *more, output=target))

        tried(kind, f"{command}: a picture", over, f"--{given}", safe=files)


# --- texts and names ------------------------------------------------------------------------------

NAMES = {
    "dollars": "US$ and AU$",
    "a formula": r"$\frac{1}{$",
    "backslashes": "\\\\ \\n \\x",
    "braces": "}{",
    "no Unicode": b"\xff\xfe task".decode(errors="surrogateescape"),
    "lines": "a\nerror: b",
    "250 characters": "n" * 250,
    "emoji": "👩‍💻🏳️‍🌈",
    "right to left": "\u202eabc עברית",
    "dots": "a...",
    "a space": " ",
    "percents": "%s %d {0}",
    "Chinese": "文档检索任务",
    "a comma": "a, english",
    "control": "\x1b[2J\x07",
    "a star": "[a-z]*",
    "a dash": "--model",
    "tasks": "tasks",
}


def mmeb(folder: Path, *rows: object, name: str = "GQA") -> Path:
    """MMEB's files: by default one good row."""
    good = {"qry_text": "a", "qry_img_path": "", "tgt_text": ["b", "c"], "tgt_img_path": ["", ""]}
    lines(folder / "M" / name / "test.jsonl", *(rows or [good]))
    return folder / "M"


def vidore(
    folder: Path,
    corpus: list | None = None,
    queries: list | None = None,
    qrels: list | None = None,
    name: str = "t",
) -> Path:
    """ViDoRe's files: by default two pages and one query."""
    task = folder / "V" / name
    task.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (56, 56), (number * 90, 9, 9)).save(task / f"{number}.png")
    parts = {
        "corpus": [{"corpus-id": n, "image": f"{n}.png"} for n in range(2)],
        "queries": [{"query-id": 0, "query": "a"}],
        "qrels": [{"query-id": 0, "corpus-id": 1, "score": 1}],
    }
    for part, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        lines(task / part / "test.jsonl", *(parts[part] if rows is None else rows))
    return task.parent


def scored(
    command: str,
    folder: Path,
    data: Path,
    *more: object,
    right: Callable[[dict], object] = lambda tasks: True,
) -> Callable:
    """A benchmark, and a look at its scores."""

    def run() -> None:
        main(words(command, folder, "--data", data, *more))
        content = json.loads((folder / "out").read_text())
        assert right(content["tasks"]), content

    return run


def names() -> None:
    """Names of tasks: they are folders, or stand in a data file."""
    kind = "names of tasks"
    for what, name in NAMES.items():
        tried(
            kind,
            f"mmeb: {what}",
            lambda f, name=name: scored(
                "mmeb", f, mmeb(f, name=name), right=lambda tasks: list(tasks) == [name]
            ),
            None,
        )
    texts = [
        *NAMES.values(),
        "ab" * 5000,
        "",
        "..",
        ".",
        "/etc/passwd",
        "\ud800",
        "x" * 30 + "1",
        "x" * 30 + "2",
        "\x00",
        "\u0301" * 300,
        "ﷺ" * 40,
        "\U000e0041",
        "a\tb",
        "NaN",
        "null",
    ]
    for start in range(0, len(texts), 11):
        part = texts[start : start + 11]
        tried(kind, f"report: {ascii(part)[:60]}", lambda f, part=part: reported(f, part), None)


def report_flags(folder: Path, data: Path, **more: object) -> argparse.Namespace:
    """What a report asks of a run's flags."""
    output = folder / "run"
    output.mkdir(exist_ok=True)
    return argparse.Namespace(
        **{
            "output": str(output),
            "data": str(data),
            "held_out": None,
            "on_error": "stop",
            "objective": "restore",
            **more,
        }
    )


def reported(
    folder: Path,
    tasks: list[str],
    pictures: int = 3,
    record: Callable[[int], dict] = lambda n: {"text": f"question {n}"},
    moca: Moca | None = None,
    complete: bool = True,
    **more: object,
) -> Callable:
    """Stage 2's report on pairs of these tasks: all are scored, and drawn."""
    rows = []
    for name in tasks:
        for number in range(3):
            rows.append(
                {
                    "task": name,
                    "kind": "text-only",
                    "query": record(number),
                    "positive": {"text": f"answer {number}"},
                }
            )
    data = lines(folder / "pairs.jsonl", *rows)

    def run() -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            stage2.write_report(
                report_flags(folder, data, **more),
                WORLD,
                moca or nano_moca.load(MODEL, "cpu", max_tokens=64),
                LINES,
            )
        scores = json.loads((folder / "run" / "scores.json").read_text())
        if complete:
            assert set(scores["tasks"]) == set(tasks), list(scores["tasks"])
        drawn = len(list((folder / "run").glob("*.png")))
        assert drawn == pictures, said.getvalue()
        assert said.getvalue().isprintable() or "\x1b" not in said.getvalue()
        assert said.getvalue().count("no picture") == (3 - drawn if tasks else 0), said.getvalue()

    return run


def reports() -> None:
    """Pictures and words of records, a matplotlib that fails, a model that gives NaN."""
    kind = "reports"

    def with_image(folder: Path, image: Image.Image | bytes, name: str = "a.png") -> dict:
        path = folder / name
        image.save(path) if isinstance(image, Image.Image) else path.write_bytes(image)
        return {"text": f"{MARK} words", "images": [name]}

    for what, size in (
        ("one pixel", (1, 1)),
        ("3 x 500", (3, 500)),
        ("6000 x 5000", (6000, 5000)),
        ("1500 x 9", (1500, 9)),
    ):

        def prepare(folder: Path, size: tuple = size) -> Callable:
            fields = with_image(folder, Image.new("RGB", size, "red"))
            return reported(folder, ["one"], record=lambda n: fields)

        tried(kind, f"a picture of {what}", prepare, None)
    for mode in ("LA", "P", "CMYK", "1"):

        def prepare(folder: Path, mode: str = mode) -> Callable:
            name = "a.tif" if mode == "CMYK" else "a.png"
            fields = with_image(folder, Image.new(mode, (60, 60)), name)
            return reported(folder, ["one"], record=lambda n: fields)

        tried(kind, f"a picture of mode {mode}", prepare, None)

    # one broken record costs its task, and no other
    def broken(folder: Path, content: bytes) -> Callable:
        fields = with_image(folder, content)
        rows = [
            {"task": name, "kind": "image-text", "query": query, "positive": {"text": "b"}}
            for name, query in (("first", {"text": "a"}), ("bad", fields), ("last", {"text": "c"}))
        ]
        data = lines(folder / "pairs.jsonl", *rows)

        def run() -> None:
            stage2.write_report(
                report_flags(folder, data), WORLD, nano_moca.load(MODEL, "cpu"), LINES
            )
            scores = json.loads((folder / "run" / "scores.json").read_text())
            assert set(scores["tasks"]) == {"first", "last"}, list(scores["tasks"])

        return run

    whole = io.BytesIO()
    Image.effect_noise((80, 80), 90).convert("RGB").save(whole, "png")
    for what, content in (
        ("empty", b""),
        ("text", b"not a picture"),
        ("cut", whole.getvalue()[:900]),
    ):
        tried(
            kind,
            f"a broken picture in one task of three: {what}",
            lambda f, content=content: broken(f, content),
            None,
        )

    for what, text in (
        ("Chinese", "文档检索任务" * 200),
        ("Japanese", "日本語の文書を探す"),
        ("emoji", "👩‍💻" * 99),
        ("one word of 100,000", "a" * 100_000),
        ("dollars", "$x$ and $"),
        ("marks upon marks", "a" + "\u0301" * 3000),
        ("tabs", "\t\ta\tb"),
        ("right to left", "\u202e\u202d עברית"),
    ):
        tried(
            kind,
            f"words: {what}",
            lambda f, text=text: reported(f, ["one"], record=lambda n: {"text": text + str(n)}),
            None,
        )
    tried(kind, "no pair", lambda f: reported(f, [], pictures=1), None)

    def nan(folder: Path) -> Callable:
        moca = nano_moca.load(MODEL, "cpu")
        moca.model.language.norm.weight.data.fill_(float("nan"))
        return reported(folder, ["one"], moca=moca)

    tried(kind, "a model that gives NaN", nan, None)

    # matplotlib, in processes of their own
    code = (
        "import sys; sys.path[:0] = [{tests!r}]\n{first}\n"
        "import hostile_evaluations as hostile; from pathlib import Path\n"
        "hostile.reported(Path({folder!r}), ['one'], {pictures})(); print('fine')"
    )
    cases = {
        "cannot be imported": ("sys.modules['matplotlib'] = None", 0),
        "its figures cannot be imported": ("sys.modules['matplotlib.figure'] = None", 0),
        "no folder for its settings": (
            "import os; os.environ.update(HOME='/proc', "
            "MPLCONFIGDIR='/proc/none', XDG_CACHE_HOME='/proc')",
            3,
        ),
        "a backend that there is not": ("import os; os.environ['MPLBACKEND'] = 'none'", 0),
        "no fonts": (
            "import matplotlib.font_manager as f\n"
            "def none(*_, **__): raise ValueError('no font')\n"
            "f.FontManager.findfont = f.findfont = none; f.fontManager.findfont = none",
            0,
        ),
    }
    for what, (first, pictures) in cases.items():

        def alone(folder: Path, first: str = first, pictures: int = pictures) -> Callable:
            program = code.format(
                tests=str(ROOT / "tests"), first=first, folder=str(folder), pictures=pictures
            )

            def run() -> None:
                done = subprocess.run(
                    [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True
                )
                assert done.stdout.endswith("fine\n"), done.stderr[-300:]

            return run

        tried(kind, f"matplotlib: {what}", alone, None)

    # stage 1, and the curves
    def restored(folder: Path, seed: int, text: str, nan: bool = False) -> Callable:
        from types import SimpleNamespace

        from nano_moca.model import ReconstructionModel

        moca = nano_moca.load(MODEL, "cpu")
        model = ReconstructionModel(moca.model)
        if nan:
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
        picture = Image.new("RGB", (84, 84), "red")
        items = [
            (n, moca.processor.encode(Record(f"{MARK} {text} {n}", [picture]))) for n in range(3)
        ]

        class Unseen:
            state = {"epoch": 0}

            def __next__(self) -> object:
                return SimpleNamespace(micro_batches=[items])

        flags = report_flags(folder, folder, text_mask=0.4, image_mask=0.5, seed=seed)

        def run() -> None:
            stage1.write_report(flags, WORLD, model, moca.processor, Unseen(), LINES, False)
            scores = json.loads((folder / "run" / "scores.json").read_text())
            assert len(scores) == 11, scores
            assert len(list((folder / "run").glob("*.png"))) == 2

        return run

    for what, text in (
        ("dollars", "$a$ $ \\frac"),
        ("Chinese", "文档检索任务 红色的星星"),
        ("emoji", "👩‍💻 🏳️‍🌈"),
    ):
        tried(kind, f"stage 1: {what}", lambda f, text=text: restored(f, 0, text), None)
    tried(kind, "stage 1: a model that gives NaN", lambda f: restored(f, 0, "words", True), None)
    for what, made in (
        ("no line", []),
        ("one line", LINES[:1]),
        ("50,000 lines", LINES * 17_000),
        ("huge values", [{"step": 1, "loss": 1e300}, {"step": 2, "loss": -1e300}]),
    ):

        def curve(folder: Path, made: list = made) -> Callable:
            def run() -> None:
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    plot_losses(folder / "loss.png", made, ["loss"])
                drawn = (folder / "loss.png").exists()
                assert drawn != said.getvalue().startswith("no picture loss.png: ")

            return run

        tried(kind, f"curves: {what}", curve, None)
    tried(
        kind,
        "a ranking of nothing",
        lambda f: (
            lambda: rank_pairs(
                [Pair(Record("a"), Record("b"), [])], lambda r: np.zeros((len(r), 4), np.float32)
            ).scores()
        ),
        None,
    )


# --- benchmarks' files ----------------------------------------------------------------------------


def benchmarks() -> None:
    """Files of MMEB and ViDoRe."""
    kind = "MMEB's files"
    good = {"qry_text": "a", "qry_img_path": "", "tgt_text": ["b", "c"], "tgt_img_path": ["", ""]}
    for what, row in {
        "a number as text": good | {"qry_text": 7},
        "a list as query": good | {"qry_text": ["a"]},
        "null candidates": good | {"tgt_text": None},
        "paths of two kinds": good | {"tgt_img_path": ["", 0.5]},
        "a path of 10,000": good | {"qry_text": "<|image_1|>", "qry_img_path": "a" * 10_000},
        "a path with a zero": good | {"qry_text": "<|image_1|>", "qry_img_path": "a\0.png"},
        "a path of half a pair": good | {"qry_text": "<|image_1|>", "qry_img_path": "\ud800.png"},
        "a path that is a folder": good | {"qry_text": "<|image_1|>", "qry_img_path": "GQA"},
        "a path that is absolute": good
        | {"qry_text": "<|image_1|>", "qry_img_path": "/etc/hostname"},
        "a text of half a pair": good | {"qry_text": "\udfff"},
        "a number as candidates": good | {"tgt_text": 1},
        "a nested list": good | {"tgt_text": [["b"], ["c"]]},
        "NaN as text": good | {"tgt_text": ["b", float("nan")]},
        "a text of spaces": good | {"tgt_text": ["b", " \n"]},
        "two marks": good | {"qry_text": "<|image_1|><|image_1|>", "qry_img_path": "0.png"},
        "a text of 6 MB": good | {"qry_text": "ab " * 2_000_000},
    }.items():
        tried(kind, what, lambda f, row=row: scored("mmeb", f, mmeb(f, good, row)), "test.jsonl:2")
    for what, row in {
        "2,000 candidates": good
        | {"tgt_text": [str(n) for n in range(2000)], "tgt_img_path": [""] * 2000},
        "other columns": good | {"extra": {"a": [None]}},
        "all the same": good | {"tgt_text": ["a", "a"]},
        "special tokens": good | {"tgt_text": ["<|im_end|>", "<|im_start|>"]},
    }.items():
        tried(kind, what, lambda f, row=row: scored("mmeb", f, mmeb(f, good, row)), None)

    def folder_of(folder: Path, make: Callable[[Path], object]) -> Callable:
        data = mmeb(folder)
        make(data)
        return scored("mmeb", folder, data, right=lambda tasks: list(tasks) == ["GQA"])

    tried(kind, "an empty folder beside", lambda f: folder_of(f, lambda d: (d / "x").mkdir()), None)
    tried(
        kind, "hidden folders", lambda f: folder_of(f, lambda d: mmeb(d.parent, name=".git")), None
    )
    tried(
        kind,
        "a folder of logs",
        lambda f: folder_of(f, lambda d: lines(d / "run" / "log.jsonl", {"step": 1})),
        None,
    )
    tried(
        kind,
        "a dead link beside",
        lambda f: folder_of(f, lambda d: (d / "x").symlink_to("none")),
        None,
    )
    tried(
        kind,
        "a link to itself beside",
        lambda f: folder_of(f, lambda d: (d / "x").symlink_to("x")),
        None,
    )
    tried(
        kind,
        "a folder that may not be listed",
        lambda f: folder_of(f, lambda d: ((d / "x").mkdir(), (d / "x").chmod(0))),
        "x",
        *[None] * (os.geteuid() == 0),
    )
    tried(
        kind,
        "a fifo as file",
        lambda f: folder_of(f, lambda d: os.mkfifo(d / "GQA" / "test2.jsonl")),
        "test2.jsonl",
    )
    tried(
        kind,
        "a .parquet of text",
        lambda f: folder_of(f, lambda d: (d / "GQA" / "test.parquet").write_text("no")),
        "test.parquet",
    )
    tried(
        kind,
        "the data is a file",
        lambda f: scored("mmeb", f, mmeb(f) / "GQA" / "test.jsonl"),
        "test.jsonl",
    )

    def table(folder: Path, make: Callable) -> Callable:
        import pyarrow
        from pyarrow import parquet

        (folder / "M" / "GQA").mkdir(parents=True)
        made = make(pyarrow)
        if isinstance(made, tuple):
            with pyarrow.OSFile(str(folder / "M" / "GQA" / "test.arrow"), "wb") as sink:
                with pyarrow.ipc.new_stream(sink, made[0].schema) as writer:
                    writer.write_table(made[0])
        else:
            parquet.write_table(made, folder / "M" / "GQA" / "test-00000.parquet")
        return scored("mmeb", folder, folder / "M")

    columns = {
        "qry_text": ["a"],
        "qry_img_path": [""],
        "tgt_text": [["b", "c"]],
        "tgt_img_path": [["", ""]],
    }
    tried(kind, "parquet", lambda f: table(f, lambda pa: pa.table(columns)), None)
    tried(kind, "arrow", lambda f: table(f, lambda pa: (pa.table(columns),)), None)
    tried(
        kind,
        "parquet without a column",
        lambda f: table(f, lambda pa: pa.table({"qry_text": ["a"]})),
        "test-00000.parquet",
    )
    tried(
        kind,
        "parquet of null",
        lambda f: table(f, lambda pa: pa.table(columns | {"tgt_text": [None]})),
        "test-00000.parquet",
    )
    tried(
        kind,
        "parquet of numbers",
        lambda f: table(f, lambda pa: pa.table(columns | {"tgt_text": [[1, 2]]})),
        "test-00000.parquet",
    )
    tried(
        kind,
        "large strings",
        lambda f: table(
            f,
            lambda pa: pa.table(columns).cast(
                pa.schema(
                    [
                        ("qry_text", pa.large_string()),
                        ("qry_img_path", pa.string()),
                        ("tgt_text", pa.list_(pa.string())),
                        ("tgt_img_path", pa.list_(pa.string())),
                    ]
                )
            ),
        ),
        None,
    )

    kind = "ViDoRe's files"
    page, query = {"corpus-id": 7, "image": "0.png"}, {"query-id": 5, "query": "b"}
    right = {"query-id": 0, "corpus-id": 1, "score": 1}
    pages = [{"corpus-id": n, "image": f"{n}.png"} for n in range(2)]
    for what, row in {
        "null": None,
        "a list": [1],
        "an object": {"a": 1},
        "NaN": float("nan"),
        "true": True,
        "a fraction": 1.5,
    }.items():
        tried(
            kind,
            f"a page's id is {what}",
            lambda f, row=row: scored(
                "vidore", f, vidore(f, corpus=[*pages, page | {"corpus-id": row}])
            ),
            "corpus/test.jsonl:3",
        )
        tried(
            kind,
            f"a query's id is {what}",
            lambda f, row=row: scored(
                "vidore",
                f,
                vidore(f, queries=[{"query-id": 0, "query": "a"}, query | {"query-id": row}]),
            ),
            "queries/test.jsonl:2",
        )
    for what, row in {
        "negative": -1,
        "NaN": float("nan"),
        "a text": "1",
        "null": None,
        "a list": [1],
        "infinite": float("inf"),
    }.items():
        tried(
            kind,
            f"a relevance is {what}",
            lambda f, row=row: scored(
                "vidore", f, vidore(f, qrels=[right, right | {"corpus-id": 0, "score": row}])
            ),
            "qrels/test.jsonl:2",
        )
    tried(
        kind,
        "an id of 1 MB that is unknown",
        lambda f: scored("vidore", f, vidore(f, qrels=[right, right | {"query-id": "x" * 2**20}])),
        "qrels/test.jsonl:2",
    )
    tried(
        kind,
        "no right page",
        lambda f: scored("vidore", f, vidore(f, qrels=[right | {"score": 0}])),
        "qrels",
    )
    tried(
        kind,
        "judged twice, the same",
        lambda f: scored("vidore", f, vidore(f, qrels=[right, right])),
        None,
    )
    tried(
        kind,
        "ids as text here and number there",
        lambda f: scored(
            "vidore", f, vidore(f, qrels=[{"query-id": "0", "corpus-id": "1", "score": 2}])
        ),
        None,
    )
    tried(
        kind,
        "a page twice",
        lambda f: scored("vidore", f, vidore(f, corpus=[*pages, pages[0]])),
        "corpus",
    )
    tried(
        kind,
        "ids equal as text",
        lambda f: scored("vidore", f, vidore(f, corpus=[*pages, page | {"corpus-id": "1"}])),
        "corpus",
    )
    for what, given in {
        "null": [None, None],
        "mixed": [None, "english"],
        "unknown": ["klingon", "english"],
        "a list": [["english"], "english"],
        "empty": ["", "english"],
        "a number": [7, "english"],
    }.items():

        def languages(folder: Path, given: list = given) -> Callable:
            asked = [
                {"query-id": n, "query": f"a {n}", "language": say} for n, say in enumerate(given)
            ]
            judged = [right | {"query-id": n} for n in range(2)]
            return scored(
                "vidore",
                folder,
                vidore(folder, queries=asked, qrels=judged),
                right=lambda tasks: tasks["t"]["queries"] == 2,
            )

        tried(
            kind,
            f"languages: {what}",
            languages,
            *(["queries/test.jsonl:1"] if what == "a list" else [None]),
        )
    tried(
        kind,
        "a language in some rows only",
        lambda f: scored(
            "vidore",
            f,
            vidore(
                f,
                queries=[{"query-id": 0, "query": "a"}, query | {"language": "english"}],
                qrels=[right, right | {"query-id": 5}],
            ),
        ),
        None,
    )
    for what, image in {
        "a fifo": "p",
        "a folder": "corpus",
        "base64": "aGFsbG8=" * 999,
        "a link to /dev/zero": "z",
    }.items():

        def shown(folder: Path, image: str = image) -> Callable:
            data = vidore(folder, corpus=[*pages, page | {"image": image}])
            os.mkfifo(data / "t" / "p")
            (data / "t" / "z").symlink_to("/dev/zero")
            return scored("vidore", folder, data)

        tried(kind, f"a page is {what}", shown, "corpus/test.jsonl:3")
    tried(
        kind,
        "a hidden file in corpus",
        lambda f: (
            lambda data: (lines(data / "t" / "corpus" / ".x.jsonl", 1), scored("vidore", f, data))[
                1
            ]
        )(vidore(f)),
        None,
    )
    tried(
        kind,
        "qrels of another task",
        lambda f: scored("vidore", f, vidore(f, qrels=[right | {"corpus-id": 99}])),
        "qrels/test.jsonl:1",
    )
    tried(
        kind,
        "a query without words",
        lambda f: scored("vidore", f, vidore(f, queries=[{"query-id": 0, "query": " "}])),
        "queries/test.jsonl:1",
    )
    tried(
        kind,
        "a prompt with an image's mark",
        lambda f: scored("vidore", f, vidore(f), "--prompt", MARK),
        "corpus/test.jsonl:1",
        "--prompt",
    )
    tried(
        kind,
        "a prompt that is no Unicode",
        lambda f: scored("vidore", f, vidore(f), "--prompt", "\udcff"),
        "corpus/test.jsonl:1",
        "--prompt",
    )

    kind = "items of embed"
    for what, row in {
        "a number": 7,
        "null": None,
        "text null": {"text": None},
        "images a text": {"text": MARK, "images": "0.png"},
        "half a pair": {"text": "\ud83d"},
        "9 MB": {"text": "a" * 9_000_000},
        "images of numbers": {"text": MARK, "images": [1]},
        "deep": {"text": [[[[]]]]},
    }.items():
        tried(kind, what, lambda f, row=row: embed(f, {"text": "good"}, row), "items.jsonl:2")
    tried(
        kind,
        "a mark in the prompt",
        lambda f: (
            Image.new("RGB", (56, 56)).save(f / "0.png"),
            embed(f, {"text": MARK, "images": ["0.png"]}, more=("--prompt", MARK)),
        )[1],
        "items.jsonl:1",
        "--prompt",
    )
    tried(kind, "zeros and controls", lambda f: embed(f, {"text": "a\0\x1b[31m\x7f"}), None)
    tried(
        kind,
        "the input is a fifo",
        lambda f: (
            os.mkfifo(f / "p.jsonl"),
            lambda: main(words("embed", f, "--input", f / "p.jsonl")),
        )[1],
        "p.jsonl",
    )
    tried(kind, "the input is empty", lambda f: embed(f), "items.jsonl")


# --- flags ----------------------------------------------------------------------------------------


def flags() -> None:
    """Of every command: values that cannot be, and that contradict each other."""
    kind = "flags"
    needed = {
        "embed": ["--input", "i"],
        "builtin": [],
        "mmeb": ["--data", "d"],
        "vidore": ["--data", "d"],
    }
    for command, own in needed.items():
        for flag, value in (
            ("--max-tokens", "-1"),
            ("--min-pixels", "9" * 400),
            ("--model", ""),
            ("--output", "  "),
            ("--attention", "both"),
            ("--unknown", "1"),
        ):
            tried(
                kind,
                f"{command} {flag} {value[:9]!r}",
                lambda f, w=(command, own, flag, value): (
                    lambda: main(
                        [w[0], "--model", "m", "--output", str(f / "o"), *w[1], w[2], w[3]]
                    )
                ),
                flag,
            )
    for given in ([], ["beir"], ["--model", "m"], ["embed"], [""], ["embed", "embed"]):
        tried(
            kind,
            f"words {given}",
            lambda f, given=given: lambda: main(given),
            "--",
            "COMMAND",
            "command",
            "empty",
        )
    for given in (["--help"], ["embed", "--help"], ["mmeb", "-h"]):
        tried(kind, f"words {given}", lambda f, given=given: lambda: main(given), None)
    good = {"text": "a b c d e f"}
    tried(
        kind,
        "limits that contradict",
        lambda f: embed(f, good, more=("--min-pixels", "90000", "--max-pixels", "3136")),
        "pixels",
    )
    tried(
        kind,
        "limits of one pixel",
        lambda f: embed(f, good, more=("--min-pixels", "1", "--max-pixels", "1")),
        None,
        "pixels",
    )
    tried(kind, "a limit of one token", lambda f: embed(f, good, more=("--max-tokens", "1")), None)
    tried(
        kind,
        "a flag twice",
        lambda f: embed(f, good, more=("--pooling", "mean", "--pooling", "last")),
        None,
    )
    tried(
        kind,
        "a processor that is not there",
        lambda f: embed(f, good, more=("--processor", f / "none")),
        "none",
    )
    tried(
        kind,
        "a processor that is a file",
        lambda f: embed(f, good, more=("--processor", f / "items.jsonl")),
        "items.jsonl",
    )
    tried(
        kind,
        "a model that is a file",
        lambda f: embed(f, good, model=f / "items.jsonl"),
        "items.jsonl",
    )
    if not torch.cuda.is_available():
        tried(kind, "no such device", lambda f: embed(f, good, more=("--device", "cuda")), "cuda")

    kind = "ablate, benchmark"

    def arms(folder: Path, table: object, *more: str) -> Callable:
        output = folder / "runs"
        output.mkdir()
        if table is not None:
            (output / "ablations.json").write_text(
                table if isinstance(table, str) else json.dumps(table)
            )
        for stage in ("cl-none-0",):
            (output / stage / "model").mkdir(parents=True)
            (output / stage / "scores.json").write_text("{}")
            lines(output / stage / "log.jsonl", {"tokens": 9, "tokens_per_second": 3})
            tasks = {task: {"recall@1": 0.5} for task in ablate.SHOWN}
            (output / stage / "test.json").write_text(json.dumps({"tasks": tasks}))
        given = ["--arms", "none", "--seeds", "1", "--output", str(output), *more]
        return lambda: ablate.ablate(parse_flags(ablate.Flags, given, ""))

    whole = {
        "none": {"seed 3": {"minutes": 1, "tasks": {t: {"recall@1": 1.0} for t in ablate.SHOWN}}}
    }
    tried(kind, "as it should be", lambda f: arms(f, whole), None)
    for what, made in {
        "cut": '{"none": {',
        "a list": "[1]",
        "empty": "",
        "a text for an arm": {"none": "x"},
        "a number for a run": {"none": {"seed 7": 3}},
        "no recall": {"none": {"seed 7": {"tasks": {}}}},
        "an arm of another version": {"deleted-arm": whole["none"]},
    }.items():
        tried(
            kind,
            f"ablations.json: {what}",
            lambda f, made=made: arms(f, made),
            "ablations.json",
            safe=lambda f: (f / "runs" / "ablations.json").read_bytes(),
        )

    def damaged(folder: Path, name: str, content: str) -> Callable:
        step = arms(folder, None)
        (folder / "runs" / "cl-none-0" / name).write_text(content)
        return step

    for name, content in (
        ("test.json", "{}"),
        ("test.json", ""),
        ("test.json", '{"tasks": 1}'),
        ("log.jsonl", "{}\n"),
        ("log.jsonl", "no\n"),
        ("log.jsonl", "[]\n"),
    ):
        tried(kind, f"{name} is {content!r}", lambda f, w=(name, content): damaged(f, *w), name)
    for given in ("", "both,", "all", "both;none", "none, both"):
        tried(
            kind,
            f"--arms {given!r}",
            lambda f, given=given: arms(f, None, "--arms", given),
            "--arms",
        )
    tried(kind, "--seeds 0", lambda f: arms(f, None, "--seeds", "0"), "--seeds")
    tried(
        kind,
        "ablations.json is a folder",
        lambda f: (
            arms(f, None),
            (f / "runs" / "ablations.json").mkdir(),
            lambda: ablate.ablate(
                parse_flags(
                    ablate.Flags,
                    ["--arms", "none", "--seeds", "1", "--output", str(f / "runs")],
                    "",
                )
            ),
        )[2],
        "ablations.json",
    )
    for given in (
        "--width 130",
        "--width 99999999999",
        "--records 0",
        "--model none",
        "--dtype int8",
        "--records 99999999999",
    ):
        tried(
            kind,
            f"benchmark {given}",
            lambda f, given=given: (
                lambda: benchmark.benchmark(parse_flags(benchmark.Flags, given.split(), ""))
            ),
            given.split()[0],
            "none",
            *(["hidden_size", "num_heads"] if "width" in given else []),
        )


# --- kept vectors, bad luck -----------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    """As a file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def luck() -> None:
    """Damaged vectors, NaN, full disks, two at once, kill and resume."""
    kind = "kept vectors"
    rows = [{"text": f"item {number}"} for number in range(5)]
    huge = (
        b"\x93NUMPY\x01\x00v\x00"
        + (
            "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 64), }".ljust(117)
            + "\n"
        ).encode()
    )
    for what, content in {
        "empty": b"",
        "another's": npy(np.ones((5, 64), np.float32) * np.nan),
        "infinite": npy(np.full((5, 64), np.inf, np.float32)),
        "too wide": npy(np.ones((5, 65), np.float32)),
        "halves": npy(np.ones((5, 64), np.float16)),
        "by columns": npy(np.asfortranarray(np.zeros((5, 64), np.float32))),
        "huge": huge,
        "zeros": npy(np.zeros((5, 64), np.float32)),
        "not of unit length": npy(np.full((5, 64), 3, np.float32)),
        "a pickle": b"\x80\x04N.",
        "more behind": None,
        "complex": npy(np.ones((5, 64), np.complex64)),
        "big endian": npy(np.ones((5, 64), ">f4")),
        "structured": npy(np.zeros(5, [("a", "f4")])),
    }.items():

        def damage(folder: Path, content: bytes | None = content) -> Callable:
            as_a_user(embed(folder, *rows))
            good = np.load(folder / "out")
            (file,) = (folder / "out.vectors").glob("*.npy")
            file.write_bytes(file.read_bytes() + b"x" if content is None else content)

            def run() -> None:
                embed(folder, *rows)()
                assert np.array_equal(np.load(folder / "out"), good)

            return run

        tried(kind, what, damage, None)
    for what, make in {
        "a fifo": os.mkfifo,
        "a folder": Path.mkdir,
        "a link to /dev/zero": lambda p: p.symlink_to("/dev/zero"),
        "a dead link": lambda p: p.symlink_to("none"),
        "unreadable": lambda p: (p.write_bytes(b""), p.chmod(0)),
    }.items():

        def replaced(folder: Path, make: Callable = make) -> Callable:
            as_a_user(embed(folder, *rows))
            (file,) = (folder / "out.vectors").glob("*.npy")
            file.unlink()
            make(file)
            return embed(folder, *rows)

        tried(kind, what, replaced, None, ".npy")

    kind = "a model that gives NaN"
    for command in ("embed", "mmeb", "vidore", "builtin"):

        def nan(folder: Path, command: str = command) -> Callable:
            moca = nano_moca.load(MODEL, "cpu")
            moca.model.language.norm.weight.data[0] = float("nan")
            load = vectors.load

            def run() -> None:
                vectors.load = lambda *_, **__: moca
                try:
                    if command == "embed":
                        embed(folder, *rows)()
                    elif command == "builtin":
                        main(words("builtin", folder))
                    else:
                        data = mmeb(folder) if command == "mmeb" else vidore(folder)
                        scored(command, folder, data)()
                finally:
                    vectors.load = load
                    assert not (folder / "out").exists()

            return run

        tried(kind, command, nan, "not finite")

    kind = "full disks"
    for command in ("embed", "mmeb", "vidore"):
        for size in (0, 60, 1000):

            def full(folder: Path, command: str = command, size: int = size) -> Callable:
                if command == "embed":
                    step = embed(folder, *rows)
                else:
                    data = mmeb(folder) if command == "mmeb" else vidore(folder)
                    step = scored(command, folder, data)
                (folder / "out").write_text("of before")
                (folder / "out.vectors").mkdir()

                def run() -> None:
                    before = resource.getrlimit(resource.RLIMIT_FSIZE)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
                    try:
                        step()
                    finally:
                        resource.setrlimit(resource.RLIMIT_FSIZE, before)
                        assert (folder / "out").read_bytes() == b"of before" or (
                            command != "embed" and json.loads((folder / "out").read_text())
                        )
                        assert not list(folder.rglob("*.new"))

                return run

            tried(
                kind, f"{command}, {size} bytes", full, "cannot be written", *[None] * (size > 900)
            )

    kind = "two at once"
    for command in ("embed", "mmeb", "vidore"):

        def two(folder: Path, command: str = command) -> Callable:
            data = mmeb(folder) if command == "mmeb" else vidore(folder)
            items = lines(folder / "items.jsonl", *({"text": f"item {n}"} for n in range(400)))
            given = ["--input", items] if command == "embed" else ["--data", data]
            line = [sys.executable, "-m", "nano_moca.evaluate", *words(command, folder, *given)]

            def run() -> None:
                done = [
                    subprocess.Popen(
                        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                    )
                    for _ in range(2)
                ]
                said = [process.communicate()[1] for process in done]
                codes = sorted(process.returncode for process in done)
                assert codes in ([0, 0], [0, 1]) and (folder / "out").exists(), said
                for text, process in zip(said, done, strict=True):
                    if process.returncode:
                        assert text.count("\n") == 1 and "another run is at work" in text, said

            return run

        tried(kind, command, two, None)

    kind = "kill and resume"
    for command in ("embed", "mmeb", "vidore"):
        for after in (1, 2):

            def kill(folder: Path, command: str = command, after: int = after) -> Callable:
                items = lines(folder / "items.jsonl", *({"text": f"item {n}"} for n in range(200)))
                data = mmeb(folder) if command == "mmeb" else vidore(folder)
                given = ["--input", items] if command == "embed" else ["--data", data]
                line = words(command, folder, *given)
                code = (
                    "import os, sys; from nano_moca.evaluate import vectors, __main__ as m\n"
                    "vectors.AT_ONCE = 1\nsave = vectors.replacing\nmade = []\n"
                    "def count(path):\n    made.append(path)\n"
                    f"    if len(made) > {after}: os.kill(os.getpid(), 9)\n    return save(path)\n"
                    f"vectors.replacing = count\nm.main({line!r})"
                )

                def run() -> None:
                    done = subprocess.run(
                        [sys.executable, "-c", code], cwd=ROOT, capture_output=True
                    )
                    assert done.returncode == -9, done.stderr[-300:]
                    main(line)
                    main([*line[: -len(given) - 1], str(folder / "fresh"), *map(str, given)])
                    read = (
                        (lambda p: np.load(p))
                        if command == "embed"
                        else (lambda p: json.loads(p.read_text())["tasks"])
                    )
                    one, other = read(folder / "out"), read(folder / "fresh")
                    assert (
                        np.allclose(one, other, atol=2e-6) if command == "embed" else one == other
                    )

                return run

            tried(kind, f"{command} after {after}", kill, None)


# --- what goes out --------------------------------------------------------------------------------


def exports() -> None:
    """What lies beside the starting checkpoint."""
    kind = "exports"

    def saved(folder: Path, make: Callable[[Path], object]) -> Callable:
        start = Path(shutil.copytree(MODEL, folder / "start"))
        make(start)

        def run() -> None:
            moca = nano_moca.load(start, "cpu")
            save_model(
                folder / "run" / "model",
                WORLD,
                moca.model,
                moca.processor,
                {"attention": "bidirectional", "pooling": "mean", "max_tokens": 9},
            )
            nano_moca.load(folder / "run" / "model", "cpu").embed(["a"])

        return run

    name = "tokenizer_config.json"
    for what, make in {
        "nothing beside": lambda s: 0,
        "a fifo": lambda s: os.mkfifo(s / "vocab.json"),
        "a link to /dev/zero": lambda s: (s / "merges.txt").symlink_to("/dev/zero"),
        "a dead link": lambda s: (s / "merges.txt").symlink_to("none"),
        "a folder": lambda s: (s / "vocab.json").mkdir(),
        "modules.json": lambda s: (s / "modules.json").write_text("no"),
        "1_Pooling": lambda s: (s / "1_Pooling").mkdir(),
        "a chat template of no Unicode": lambda s: (s / "chat_template.jinja").write_bytes(b"\xff"),
    }.items():
        tried(kind, what, lambda f, make=make: saved(f, make), None)
    for what, content in {"no JSON": "{", "a list": "[]", "empty": "", "text": '"a"'}.items():
        tried(
            kind,
            f"{name}: {what}",
            lambda f, content=content: saved(f, lambda s: (s / name).write_text(content)),
            name,
        )


def run_all() -> None:
    """The table."""
    global ONLY
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    ONLY = parser.parse_args().only
    torch.set_num_threads(1)
    for part in (outputs, names, reports, benchmarks, flags, luck, exports):
        part()
    total = collections.Counter()
    print(f"{'kind':28s} tried  right")
    for kind, counts in COUNTS.items():
        total.update(counts)
        print(f"{kind:28s} {counts['tried']:5d} {counts['right']:6d}")
    print(f"{'all':28s} {total['tried']:5d} {total['right']:6d}")
    sys.exit(total["tried"] != total["right"])


if __name__ == "__main__":
    run_all()
