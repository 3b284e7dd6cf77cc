"""Hostile and unlucky data, two hundred of it: no test, started by hand.

    python tests/hostile_data.py [WORD]      (only the kinds with this word)

Each input is read as a run reads it. Right is what the documentation says: its rows, or an error
of one line that names what is wrong, or a row counted as unusable. Wrong is a traceback, a wait
without end, a row lost without a word or read twice, something run, or something written beside
the output. Prints a table, and what went wrong.
"""

import codecs
import collections
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import stat
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

import nano_moca
from nano_moca import MARK, MocaError
from nano_moca.batches import PairBatches, TokenBatches, excluded_candidates
from nano_moca.convert.__main__ import Flags, convert
from nano_moca.data import load_records, load_tasks

GOLDEN = Path(__file__).resolve().parent / "golden" / "qwen2.5-vl"
SECONDS, MEMORY = 25, 6 * 2**30
tried, right = collections.Counter(), collections.Counter()
MOCA = nano_moca.load(GOLDEN, "cpu")
ONE, TWO = b'{"text": "one"}', b'{"text": "two"}'


class Wrong(Exception):
    """What should not have happened."""


def expire(*_: object) -> None:
    raise Wrong(f"no end after {SECONDS} seconds")


def check(condition: object, words: str) -> None:
    """Wrong unless the condition holds."""
    if not condition:
        raise Wrong(words)


@contextlib.contextmanager
def attempt(kind: str, name: str) -> Iterator[Path]:
    """Count one input; gives it a folder."""
    if len(sys.argv) > 1 and sys.argv[1] not in kind:
        yield None
        return
    tried[kind] += 1
    home = Path(tempfile.mkdtemp(prefix="hostile-"))
    before = os.getcwd()
    os.chdir(home)
    signal.alarm(SECONDS)
    try:
        yield home
        right[kind] += 1
    except (Wrong, AssertionError) as error:
        print(f"WRONG {kind}: {name}: {error}"[:400], flush=True)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"WRONG {kind}: {name}: {type(error).__name__} {str(error)[:200]!r} at "
            f"{Path(last.filename).name}:{last.lineno}",
            flush=True,
        )
    finally:
        signal.alarm(0)
        os.chdir(before)
        shutil.rmtree(home, ignore_errors=True)


def said(error: MocaError) -> str:
    """An error's text, which has to be one line."""
    text = str(error)
    check(text.isprintable(), f"not one printable line: {text!r}")
    check(len(text) < 20_000, f"a line of {len(text)} characters")
    return "! " + text


def rows_of(path: str | Path, **how: object) -> list[str]:
    """The texts of all records, "! ..." for one that cannot be used; with images decoded."""
    try:
        records = load_records(str(path), 0, **how)
    except MocaError as error:
        return ["!" + said(error)]
    found = []
    for number in range(len(records)):
        try:
            record = records[number]
            MOCA.processor.decode([MOCA.processor.encode(record, 64)])
            found.append(record.text)
        except MocaError as error:
            found.append(said(error))
    drawn = TokenBatches(records, MOCA.processor, 64, 64, 0, skipped=Path("skips")).order(0)
    check(sorted(drawn.tolist()) == list(range(len(records))), "an epoch is not all rows once")
    return found


def compare(found: list[str], expected: list[str]) -> None:
    """Rows as expected; of an error the words after "!" have to be in it."""
    check(len(found) == len(expected), f"{len(found)} rows, not {len(expected)}: {found}"[:300])
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.startswith("!"):
            words = theirs.lstrip("! ")
            check(
                ours.startswith(theirs[: len(theirs) - len(words)].strip()) and words in ours,
                f"{ours!r}, not an error with {words!r}",
            )
        else:
            check(ours == theirs, f"{ours!r}, not {theirs!r}")


# --- JSON lines ---------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return json.dumps({"text": value}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def fields(**more: object) -> bytes:
    return json.dumps({"text": "one", **more}).encode()


LINES = {  # name: (content, expected)
    "utf-16 with mark": ((ONE + b"\n").decode().encode("utf-16"), ["! d.jsonl:1", "! d.jsonl:2"]),
    "latin-1": (ONE + b"\n" + '{"text": "é"}'.encode("latin-1"), ["one", "! d.jsonl:2"]),
    "bom twice": (codecs.BOM_UTF8 * 2 + ONE, ["! d.jsonl:1"]),
    "bom before the second": (ONE + b"\n" + codecs.BOM_UTF8 + TWO, ["one", "two"]),
    "bom alone": (codecs.BOM_UTF8, ["!! no records"]),
    "blank alone": (b"\n \r\n\t\r\r\n", ["!! no records"]),
    "form feeds around": (b"\x0c\n" + ONE + b"\n\x0b\n\x0c", ["one"]),
    "wide blanks around": ("\u2003\n".encode() + ONE + "\n\u2028\n\u3000\x85\n".encode(), ["one"]),
    "cr then crlf": (ONE + b"\r" + TWO + b"\r\n\r", ["one", "two"]),
    "cr cr lf": (ONE + b"\r\r\n" + TWO, ["one", "! d.jsonl:2", "two"]),
    "lf cr": (ONE + b"\n\r" + TWO + b"\n\r", ["one", "! d.jsonl:2", "two"]),
    "blanks around each": (b" \t" + ONE + b" \t\n  " + TWO + b"  ", ["one", "two"]),
    "U+2028 inside": (text("a\u2028b\u2029") + b"\n" + TWO, ["a\u2028b\u2029", "two"]),
    "U+0085 inside": (text("a\x85b") + b"\n" + TWO, ["a\x85b", "two"]),
    "zeros at the end": (ONE + b"\n" + bytes(500), ["one", "! d.jsonl:2"]),
    "zeros between": (ONE + b"\n" + bytes(9) + b"\n" + TWO, ["one", "! d.jsonl:2", "two"]),
    "zero in a text": (b'{"text": "a\x00b"}', ["! d.jsonl:1"]),
    "escaped zero": (b'{"text": "a\\u0000b"}', ["a\0b"]),
    "ctrl-z": (ONE + b"\n\x1a", ["one", "! d.jsonl:2"]),
    "same key twice": (b'{"text": "one", "text": "two"}\n' + ONE, ["! d.jsonl:1", "one"]),
    "same key twice inside": (
        b'{"text": "one", "images": [{"path": "a", "path": "b"}]}',
        ["! d.jsonl:1"],
    ),
    "nan beside": (b'{"text": "one", "score": NaN}', ["one"]),
    "nan as text": (b'{"text": NaN}', ['! no "text"']),
    "infinity": (b"Infinity\n-Infinity", ["! d.jsonl:1", "! d.jsonl:2"]),
    "depth": (b"[" * 10**6 + b"]" * 10**6 + b"\n" + ONE, ["! d.jsonl:1", "one"]),
    "depth of objects": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, ["! d.jsonl:1"]),
    "digits": (b'{"text": "one", "n": ' + b"1" * 6000 + b"}", ["! d.jsonl:1"]),
    "50 MB": (text("a" * 50_000_000) + b"\n" + ONE, ["! d.jsonl:1", "one"]),
    "50 MB no line end": (b"x" * 50_000_000, ["! d.jsonl:1"]),
    "text number": (b'{"text": 5}', ["! d.jsonl:1"]),
    "text null": (b'{"text": null}', ["! d.jsonl:1"]),
    "text list": (b'{"text": ["a"]}', ["! d.jsonl:1"]),
    "text true": (b'{"text": true}', ["! d.jsonl:1"]),
    "text object": (b'{"text": {"a": 1}}', ["! d.jsonl:1"]),
    "text blank": (b'{"text": " \\n"}', ["! d.jsonl:1"]),
    "text empty": (b'{"text": ""}', ["! d.jsonl:1"]),
    "no object": (b'"text"\n5\nnull\ntrue', ["! :1", "! :2", "! :3", "! :4"]),
    "images null": (fields(images=None), ["one"]),
    "images text": (fields(images="a"), ["! not a list"]),
    "images empty text": (fields(images=""), ["! not a list"]),
    "images 0": (fields(images=0), ["! not a list"]),
    "images false": (fields(images=False), ["! not a list"]),
    "images object": (fields(images={}), ["! not a list"]),
    "images of null": (fields(images=[None]), ["! d.jsonl:1"]),
    "images of lists": (fields(images=[[]]), ["! d.jsonl:1"]),
    "images of numbers": (fields(images=[5, 1.5, True]), ["! d.jsonl:1"]),
    "images of {}": (fields(images=[{}]), ["! d.jsonl:1"]),
    "bytes as number": (fields(images=[{"bytes": 5}]), ["! d.jsonl:1"]),
    "bytes as text": (fields(text=MARK, images=[{"bytes": "aGVsbG8="}]), ["! d.jsonl:1"]),
    "image without a mark": (fields(images=["p.png"]), ["! d.jsonl:1"]),
    "mark without an image": (fields(text=MARK), ["! d.jsonl:1"]),
    "half a surrogate": (b'{"text": "a\\ud800b"}\n' + ONE, ["! d.jsonl:1", "one"]),
    "surrogate bytes": (text("a\ud800b") + b"\n" + ONE, ["! d.jsonl:1", "one"]),
    "a list of rows": (b"[\n" + ONE + b",\n" + TWO + b"\n]", ["! :1", "! :2", "two", "! :4"]),
    "a comma behind": (ONE + b",\n" + TWO, ["! d.jsonl:1", "two"]),
    "two in a line": (ONE + TWO, ["! d.jsonl:1"]),
    "key's case": (b'{"Text": "one"}', ["! d.jsonl:1"]),
    "key with a blank": (b'{"text ": "one"}', ["! d.jsonl:1"]),
    "single quotes": (b"{'text': 'one'}", ["! d.jsonl:1"]),
    "gzip": (__import__("gzip").compress(ONE), None),
    "png": (b"\x89PNG\r\n\x1a\n", None),
    "control characters": (b'{"text": "one", "images": ["a\\u001b[2Jb\\nok"]}', ["! d.jsonl:1"]),
    "overlong utf-8": (b'{"text": "\xc0\xaf"}', ["! d.jsonl:1"]),
    "one brace": (b"{\n" + ONE, ["! d.jsonl:1", "one"]),
    "python": (b'{"text": u"one"}', ["! d.jsonl:1"]),
    "a comment": (b"// rows\n" + ONE, ["! d.jsonl:1", "one"]),
    "negative zero": (b'{"text": "one", "images": -0}', ["! d.jsonl:1"]),
    "long key": (b'{"text": "one", "' + b"k" * 10**6 + b'": 1}', ["one"]),
    "utf-8 in keys": ('{"täxt": 1, "text": "one"}'.encode(), ["one"]),
    "a lone pad": (fields(text="<|image_pad|>"), ["! d.jsonl:1"]),
    "utf-32": (ONE.decode().encode("utf-32"), ["one"]),
    "utf-16 big": (ONE.decode().encode("utf-16-be"), ["one"]),
    "csv": (b"text,images\none,\n", ["! :1", "! :2"]),
    "yaml": (b"- text: one\n", ["! :1"]),
    "two lines a row": (b'{"text":\n"one"}', ["! :1", "! :2"]),
    "200,000 blank": (b"\n" * 200_000 + ONE, ["one"]),
}


def try_lines() -> None:
    """Content of a .jsonl file."""
    for name, (content, expected) in LINES.items():
        with attempt("JSON lines", name) as home:
            if home:
                Image.new("RGB", (56, 56)).save("p.png")
                Path("d.jsonl").write_bytes(content)
                found = rows_of("d.jsonl")
                if expected is None:
                    check(all(row.startswith("!") for row in found), f"{found}")
                else:
                    compare(found, expected)
    for name in ("deleted", "cut", "locked", "grown", "a folder now"):
        with attempt("files that change", name) as home:
            if home:
                Path("d.jsonl").write_bytes(ONE + b"\n" + TWO + b"\n")
                records = load_records("d.jsonl", 0)
                if name == "deleted":
                    Path("d.jsonl").unlink()
                elif name == "cut":
                    Path("d.jsonl").write_bytes(ONE)
                elif name == "grown":
                    Path("d.jsonl").write_bytes(ONE + b"\n" + TWO + b"\n" + TWO)
                elif name == "locked":
                    Path("d.jsonl").unlink()
                    Path("d.jsonl").symlink_to("d.jsonl")
                else:
                    Path("d.jsonl").unlink()
                    Path("d.jsonl").mkdir()
                try:
                    check(records[1].text == "two" and name == "grown", "read what is gone")
                except MocaError as error:
                    check("d.jsonl:2" in said(error), str(error))


# --- folders ------------------------------------------------------------------------------------


def try_folders() -> None:
    """What lies in a data folder."""

    def put(name: str, content: bytes = ONE) -> None:
        file = Path("data", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def passes(*names: str) -> None:
        """These are no data: b.jsonl's row is all."""
        put("b.jsonl", TWO)
        for name in names:
            put(name)
        compare(rows_of("data"), ["two"])

    def names_of(*names: str) -> Callable[[], None]:
        """These are not read, and named."""

        def act() -> None:
            put("b.jsonl", TWO)
            for name in names:
                put(name)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                found = rows_of(Path.cwd() / "data")
            if len(found) == 1:
                check(all(Path(n).suffix in out.getvalue() for n in names), "passed over silently")
                compare(found, ["two"])
                check(out.getvalue().count("\n") == 1, f"not one line: {out.getvalue()!r}")

        return act

    def alone(name: str) -> Callable[[], None]:
        def act() -> None:
            put(name)
            found = rows_of("data")
            check(found == ["one"] or found[0].startswith("!! "), f"{found}")

        return act

    def device(kind: int, name: str) -> None:
        put("b.jsonl", TWO)
        os.mknod(Path("data", name), kind | 0o644, os.makedev(1, 5))
        compare(rows_of("data"), [f"!! {name}"])

    def unix_socket() -> None:
        put("b.jsonl", TWO)
        made = socket.socket(socket.AF_UNIX)
        made.bind("data/s.jsonl")
        compare(rows_of("data"), ["!! s.jsonl"])

    def link(target: str, name: str, expected: list[str]) -> Callable[[], None]:
        def act() -> None:
            put("b.jsonl", TWO)
            Path("out").mkdir()
            Path("out", "c.jsonl").write_bytes(ONE)
            Path("data", name).symlink_to(target)
            compare(rows_of("data"), expected)

        return act

    def hard() -> None:
        put("a.jsonl")
        for name in ("b.jsonl", "c/d.jsonl"):
            Path("data/c").mkdir(exist_ok=True)
            Path("data", name).hardlink_to("data/a.jsonl")
        compare(rows_of("data"), ["one"])

    def many(count: int = 10_000) -> None:
        Path("data").mkdir()
        for number in range(count):
            Path("data", f"{number}.jsonl").write_bytes(ONE)
        compare(rows_of("data"), ["one"] * count)

    def names_unknown() -> None:
        Path("data").mkdir()
        for name, content in ((b"data/\xff\xfe.jsonl", ONE), (b"data/a\n\x1b[2J.jsonl", b"bad")):
            with open(name, "wb") as file:
                file.write(content)
        compare(rows_of("data"), ["! :1: not JSON", "one"])

    def no_utf8_parquet() -> None:
        Path("data").mkdir()
        parquet.write_table(pyarrow.table({"text": ["one"]}), "x.parquet")
        os.rename(b"x.parquet", b"data/\xff.parquet")
        found = rows_of("data")
        check(found == ["one"] or found[0].startswith("!"), f"{found}")

    def forbidden(locked: str) -> Callable[[], None]:
        def act() -> None:
            put("b.jsonl", TWO)
            put("sub/c.jsonl")
            os.chmod(".", 0o755)
            os.chmod(Path("data", locked), 0)
            os.seteuid(65534)
            try:
                found = rows_of(Path.cwd() / "data")
            finally:
                os.seteuid(0)
            check(found[0].startswith("!! ") and locked in found[0], f"{found}")

        return act

    def deep() -> None:
        put("a/" * 500 + "x.jsonl")
        compare(rows_of("data"), ["one"])

    cases: dict[str, Callable] = {
        "hidden": lambda: passes(".x.jsonl", ".h/a.jsonl", "..x.jsonl", ".jsonl"),
        "editors": lambda: passes(
            "x.jsonl~", "#x.jsonl#", ".#x.jsonl", ".x.jsonl.swo", "~$x.jsonl"
        ),
        "mac": lambda: passes("._b.jsonl", ".DS_Store", "__MACOSX/._b.jsonl"),
        "a log of ours": lambda: put("log.jsonl", b'{"step": 1}') or passes(),
        "folder like a file": lambda: (
            put("x.jsonl/y.parquet/a.jsonl") or compare(rows_of("data"), ["one"])
        ),
        "folder's name, given": lambda: (
            put("x.jsonl/a.jsonl") or compare(rows_of("data/x.jsonl"), ["one"])
        ),
        "block device": lambda: device(stat.S_IFBLK, "z.jsonl"),
        "character device": lambda: device(stat.S_IFCHR, "z.parquet"),
        "pipe": lambda: (
            put("b.jsonl"),
            os.mkfifo("data/z.arrow"),
            compare(rows_of("data"), ["!! z.arrow"]),
        ),
        "pipe without suffix": lambda: (
            put("b.jsonl"),
            os.mkfifo("data/z"),
            compare(rows_of("data"), ["one"]),
        ),
        "pipe given": lambda: (os.mkfifo("z"), compare(rows_of("z"), ["!! ordinary"])),
        "socket": unix_socket,
        "hard links": hard,
        "10,000 files": many,
        "names no Unicode": names_unknown,
        "parquet, name no Unicode": no_utf8_parquet,
        "deep": deep,
        "link out": link("../out", "l", ["two", "one"]),
        "link to a file": link("../out/c.jsonl", "x.jsonl", ["two", "one"]),
        "loop": link(".", "l", ["two"]),
        "loop above": link("..", "l", ["two", "one"]),
        "loop of two": link("l.jsonl", "l.jsonl", ["!! l.jsonl"]),
        "lost file": link("gone", "x.parquet", ["!! x.parquet"]),
        "lost folder": link("gone", "more", ["!! more"]),
        "lost folder with a point": link("gone", "v1.0", ["!! v1.0"]),
        "lost archive": link("gone", "x.jsonl.gz", ["!! x.jsonl.gz"]),
        "lost picture": link("gone", "x.png", ["two"]),
        "forbidden folder": forbidden("sub"),
        "forbidden file": forbidden("b.jsonl"),
        "forbidden link": lambda: None,
        "empty": lambda: (Path("data").mkdir(), compare(rows_of("data"), ["!! no records"])),
        "empty files": lambda: (
            put("a.jsonl", b""),
            put("b.jsonl", b"\n"),
            compare(rows_of("data"), ["!! no records"]),
        ),
        "empty beside full": lambda: (
            put("a.jsonl", b""),
            put("b.jsonl"),
            compare(rows_of("data"), ["one"]),
        ),
        "upper case": alone("A.JSONL"),
        "upper case beside": lambda: (
            put("b.jsonl", TWO),
            put("A.JSONL"),
            compare(rows_of("data"), ["one", "two"]),
        ),
        "empty parquet": lambda: (
            put("a.parquet", b""),
            put("b.jsonl"),
            compare(rows_of("data"), ["!! a.parquet"]),
        ),
        "html as parquet": lambda: (
            put("a.parquet", b"<html>404"),
            compare(rows_of("data"), ["!! a.parquet"]),
        ),
        "lfs pointer": lambda: (
            put("a.parquet", b"version https://git-lfs.github.com/spec/v1\n"),
            compare(rows_of("data"), ["!! a.parquet"]),
        ),
    }
    for suffix in (
        ".jsonl.gz",
        ".json",
        ".csv",
        ".tsv",
        ".txt.gz",
        ".zst",
        ".ndjson",
        ".feather",
        ".tar",
        ".jsonl.part",
    ):
        cases[f"beside {suffix}"] = names_of(f"a{suffix}", f"sub/b{suffix}")
        cases[f"alone {suffix}"] = alone(f"a{suffix}")
    cases["a link that is the folder"] = lambda: (
        put("b.jsonl"),
        Path("l").symlink_to("data"),
        compare(rows_of("l"), ["one"]),
    )
    cases["link to a folder, twice"] = lambda: (
        put("s/b.jsonl"),
        [Path("data", n).symlink_to("s") for n in ("a", "z")],
        compare(rows_of("data"), ["one"]),
    )
    cases["folder called a picture"] = lambda: (
        put("x.png/b.jsonl"),
        compare(rows_of("data"), ["one"]),
    )
    cases["folder called hidden"] = lambda: (
        put("b.jsonl", TWO),
        put(".cache/huggingface/b.jsonl"),
        compare(rows_of("data"), ["two"]),
    )
    cases["100,000 pictures"] = lambda: (
        put("b.jsonl", TWO),
        Path("data/p").mkdir(),
        [Path(f"data/p/{n}.png").touch() for n in range(100_000)],
        compare(rows_of("data"), ["two"]),
    )
    cases["a hundred suffixes"] = lambda: (
        put("b.jsonl", TWO),
        [put(f"x.s{n}") for n in range(100)],
        compare(rows_of("data"), ["two"]),
    )
    cases["pictures are not named"] = lambda: passes("a.png", "c.JPG", "d.webp")
    del cases["forbidden link"]
    for name, act in cases.items():
        with attempt("folders", name) as home:
            if home:
                act()


# --- tables -------------------------------------------------------------------------------------


def table(texts: object = ("one", "two"), **more: object) -> pyarrow.Table:
    return pyarrow.table({"text": texts, **more})


def try_tables() -> None:
    """Parquet and Arrow."""
    Array = pyarrow.array
    picture = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(picture, "PNG")
    png = picture.getvalue()
    pictured = [f"{MARK} a"]

    tables = {  # name: (table, expected)
        "no text": (pyarrow.table({"txt": ["a"]}), ['! no "text"']),
        "text int": (table([1, 2]), ["! row 1", "! row 2"]),
        "text null type": (table([None, None]), ["! row 1", "! row 2"]),
        "text with a null": (table(["one", None]), ["one", "! row 2"]),
        "text binary": (table([b"one", b"two"]), ["! row 1", "! row 2"]),
        "text list": (table([["one"], ["two"]]), ["! row 1", "! row 2"]),
        "text large": (table(Array(["one", "two"], pyarrow.large_string())), ["one", "two"]),
        "text view": (table(Array(["one", "two"], pyarrow.string_view())), ["one", "two"]),
        "text dictionary": (table(Array(["one", "two"]).dictionary_encode()), ["one", "two"]),
        "text dictionary null": (
            table(Array(["one", None]).dictionary_encode()),
            ["one", "! row 2"],
        ),
        "images null": (
            table(images=Array([None, None], pyarrow.list_(pyarrow.binary()))),
            ["one", "two"],
        ),
        "images null type": (table(images=Array([None, None])), ["one", "two"]),
        "images empty": (
            table(images=Array([[], []], pyarrow.list_(pyarrow.string()))),
            ["one", "two"],
        ),
        "images with null": (table(pictured, images=[[None]]), ["! row 1"]),
        "images bare binary": (table(pictured, images=[png]), ["! row 1"]),
        "images bare struct": (table(pictured, images=[{"bytes": png, "path": None}]), ["! row 1"]),
        "images list": (table(pictured, images=[[png]]), pictured),
        "images large list": (
            table(pictured, images=Array([[png]], pyarrow.large_list(pyarrow.large_binary()))),
            pictured,
        ),
        "images fixed list": (
            table(pictured, images=Array([[png]], pyarrow.list_(pyarrow.binary(), 1))),
            pictured,
        ),
        "images view": (
            table(pictured, images=Array([[png]], pyarrow.list_(pyarrow.binary_view()))),
            pictured,
        ),
        "images fixed binary": (
            table(pictured, images=Array([[png]], pyarrow.list_(pyarrow.binary(len(png))))),
            pictured,
        ),
        "images structs": (table(pictured, images=[[{"bytes": png, "path": "x"}]]), pictured),
        "images struct nulls": (
            table(
                pictured,
                images=Array(
                    [[{"bytes": None, "path": None}]],
                    pyarrow.list_(
                        pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
                    ),
                ),
            ),
            ["! row 1"],
        ),
        "images empty bytes": (table(pictured, images=[[b""]]), ["! row 1"]),
        "images cut": (table(pictured, images=[[png[:60]]]), ["! row 1"]),
        "images dictionary": (
            table(
                [f"{MARK} a", f"{MARK} b"],
                images=pyarrow.ListArray.from_arrays(
                    [0, 1, 2], Array([png, png]).dictionary_encode()
                ),
            ),
            [f"{MARK} a", f"{MARK} b"],
        ),
        "images map": (
            table(
                pictured,
                images=Array([[("a", png)]], pyarrow.map_(pyarrow.string(), pyarrow.binary())),
            ),
            ["! row 1"],
        ),
        "dates": (table(when=Array([10**15, 1], pyarrow.timestamp("s"))), ["one", "two"]),
        "dates 64": (table(when=Array([10**17, 1], pyarrow.date64())), ["one", "two"]),
        "durations": (table(when=Array([2**62, 1], pyarrow.duration("s"))), ["one", "two"]),
        "decimals": (table(n=Array([1, 2], pyarrow.decimal256(76, 3))), ["one", "two"]),
        "other columns": (table(task=["a", "b"], images_=[1, 2]), ["one", "two"]),
        "zero rows": (table(Array([], pyarrow.string())), ["!! no records"]),
        "surrogates": (
            table(Array([b"a\xed\xa0\x80b", b"two"]).view(pyarrow.string())),
            ["! row 1", "two"],
        ),
        "no columns": (pyarrow.table({}), ["!! no records"]),
    }
    for name, (content, expected) in tables.items():
        for suffix in ("parquet", "arrow", "stream"):
            with attempt(f"{suffix} tables", name) as home:
                if home:
                    file = Path("d." + suffix.replace("stream", "arrow"))
                    try:
                        if suffix == "parquet":
                            parquet.write_table(content, file)
                        else:
                            make = (
                                pyarrow.ipc.new_file
                                if suffix == "arrow"
                                else pyarrow.ipc.new_stream
                            )
                            with make(file, content.schema) as writer:
                                writer.write_table(content)
                    except (pyarrow.ArrowException, OSError):
                        continue  # cannot be written this way
                    compare(rows_of(file), expected)

    def twice() -> None:
        parquet.write_table(
            pyarrow.Table.from_arrays([Array(["a"]), Array(["b"])], ["text", "text"]), "d.parquet"
        )
        compare(rows_of("d.parquet"), ["!"])

    def twice_arrow() -> None:
        content = pyarrow.Table.from_arrays([Array(["a"]), Array(["b"])], ["text", "text"])
        with pyarrow.ipc.new_file("d.arrow", content.schema) as writer:
            writer.write_table(content)
        compare(rows_of("d.arrow"), ["!"])

    def codec(name: str) -> Callable[[], None]:
        def act() -> None:
            parquet.write_table(table(), "d.parquet", compression=name)
            compare(rows_of("d.parquet"), ["one", "two"])

        return act

    def arrow_codec(name: str) -> Callable[[], None]:
        def act() -> None:
            options = pyarrow.ipc.IpcWriteOptions(compression=name)
            with pyarrow.ipc.new_file("d.arrow", table().schema, options=options) as writer:
                writer.write_table(table())
            compare(rows_of("d.arrow"), ["one", "two"])

        return act

    def encrypted(plain_footer: bool) -> Callable[[], None]:
        def act() -> None:
            import base64

            import pyarrow.parquet.encryption as encryption

            class Keys(encryption.KmsClient):
                def __init__(self, config: object) -> None:
                    super().__init__()

                def wrap_key(self, key: bytes, name: str) -> bytes:
                    return base64.b64encode(key)

                def unwrap_key(self, key: bytes, name: str) -> bytes:
                    return base64.b64decode(key)

            settings = encryption.EncryptionConfiguration(
                footer_key="k", column_keys={"k": ["text"]}, plaintext_footer=plain_footer
            )
            properties = encryption.CryptoFactory(Keys).file_encryption_properties(
                encryption.KmsConnectionConfig(), settings
            )
            with parquet.ParquetWriter(
                "d.parquet", table().schema, encryption_properties=properties
            ) as writer:
                writer.write_table(table())
            found = rows_of("d.parquet")
            check(all(row.startswith("!") and "d.parquet" in row for row in found), f"{found}")

        return act

    def damage(how: str) -> Callable[[], None]:
        def act() -> None:
            parquet.write_table(
                table([f"r {n}" for n in range(4000)]), "d.parquet", row_group_size=100
            )
            content = bytearray(Path("d.parquet").read_bytes())
            if how == "cut":
                content = content[:-100]
            elif how == "cut in two":
                content = content[: len(content) // 2]
            elif how == "footer length":
                content[-8:-4] = (2**31 - 1).to_bytes(4, "little")
            elif how == "footer":
                content[-600:-300] = bytes(300)
            elif how == "start":
                content[:300] = bytes(300)
            elif how == "behind":
                content += b"more"
            Path("d.parquet").write_bytes(content)
            found = rows_of("d.parquet")
            check(any(row.startswith("!") for row in found), f"{found[:3]}")
            check(
                all(row.startswith("!") or row == f"r {n}" for n, row in enumerate(found)),
                "other rows",
            )

        return act

    def noise() -> None:
        parquet.write_table(
            table([f"r {n}" for n in range(200)]), "good.parquet", row_group_size=50
        )
        good = Path("good.parquet").read_bytes()
        for seed in range(120):
            random = np.random.default_rng(seed)
            content = bytearray(good)
            for place in random.integers(0, len(good), 3):
                content[place] = random.integers(256)
            Path("d.parquet").write_bytes(content)
            rows_of("d.parquet")

    def arrow_noise() -> None:
        with pyarrow.ipc.new_file("good.arrow", table().schema) as writer:
            writer.write_table(table([f"r {n}" for n in range(50)]))
        good = Path("good.arrow").read_bytes()
        for seed in range(120):
            random = np.random.default_rng(seed)
            content = bytearray(good)
            for place in random.integers(0, len(good), 3):
                content[place] = random.integers(256)
            Path("d.arrow").write_bytes(content)
            rows_of("d.arrow")

    def arrow_cut(indexed: bool) -> Callable[[], None]:
        def act() -> None:
            with (pyarrow.ipc.new_file if indexed else pyarrow.ipc.new_stream)(
                "d.arrow", table().schema
            ) as writer:
                writer.write_table(table([f"r {n}" for n in range(5000)]), 100)
            content = Path("d.arrow").read_bytes()
            Path("d.arrow").write_bytes(content[: len(content) * 2 // 3])
            compare(rows_of("d.arrow"), ["!! d.arrow"])

        return act

    def arrow_cut_at_a_batch() -> None:
        """A stream without its end mark, cut between two batches: rows are lost unseen?"""
        sink = io.BytesIO()
        writer = pyarrow.ipc.new_stream(sink, table().schema)
        writer.write_table(table())
        Path("d.arrow").write_bytes(sink.getvalue())  # never closed
        found = rows_of("d.arrow")
        check(found == ["one", "two"] or found[0].startswith("!!"), f"{found}")

    def groups(count: int) -> Callable[[], None]:
        def act() -> None:
            parquet.write_table(
                table([f"r {n}" for n in range(count)]), "d.parquet", row_group_size=1
            )
            records = load_records("d.parquet", 0)
            order = TokenBatches(records, MOCA.processor, 64, 64, 0).order(0)
            check(sorted(order.tolist()) == list(range(count)), "not all rows")
            for number in order[:3000]:
                check(records[int(number)].text == f"r {number}", "another row")

        return act

    def empty_groups() -> None:
        with parquet.ParquetWriter("d.parquet", table().schema) as writer:
            for content in (
                table(Array([], pyarrow.string())),
                table(),
                table(Array([], pyarrow.string())),
                table(["three"]),
            ):
                writer.write_table(content)
        compare(rows_of("d.parquet"), ["one", "two", "three"])

    def huge() -> None:
        content = table([f"{n:06d}" * 1000 for n in range(40_000)])  # 240 MB in one group
        parquet.write_table(content, "d.parquet", row_group_size=10**6)
        records = load_records("d.parquet", 0)
        order = TokenBatches(records, MOCA.processor, 64, 64, 0).order(0)
        for number in order[:3000]:
            check(records[int(number)].text[:6] == f"{number:06d}", "another row")
        check(pyarrow.total_allocated_bytes() < 2**29, "memory")

    def schemas() -> None:
        Path("data").mkdir()
        parquet.write_table(table(["one"]), "data/a.parquet")
        parquet.write_table(
            pyarrow.table(
                {"images": Array([[]], pyarrow.list_(pyarrow.string())), "text": ["two"]}
            ),
            "data/b.parquet",
        )
        parquet.write_table(pyarrow.table({"text": [3]}), "data/c.parquet")
        compare(rows_of("data"), ["one", "two", "! c.parquet row 1"])

    def gone(suffix: str) -> Callable[[], None]:
        def act() -> None:
            parquet.write_table(
                table([f"r {n}" for n in range(5000)]), "d.parquet", row_group_size=1000
            )
            records = load_records("d.parquet", 0)
            records[0]
            Path("d.parquet").unlink()
            try:
                records[4500]
            except MocaError as error:
                check("d.parquet row 4501" in said(error), str(error))

        return act

    cases = {
        "a column twice": twice,
        "a column twice, Arrow": twice_arrow,
        "noise": noise,
        "noise in Arrow": arrow_noise,
        "encrypted": encrypted(False),
        "encrypted columns": encrypted(True),
        "cut Arrow": arrow_cut(True),
        "cut stream": arrow_cut(False),
        "stream not closed": arrow_cut_at_a_batch,
        "20,000 groups": groups(20_000),
        "100,000 groups": groups(100_000),
        "empty groups": empty_groups,
        "a huge group": huge,
        "several schemas": schemas,
        "deleted": gone("parquet"),
        "feather as arrow": lambda: (
            __import__("pyarrow.feather").feather.write_feather(table(), "d.arrow"),
            compare(rows_of("d.arrow"), ["one", "two"]),
        ),
        "feather 1": lambda: (
            __import__("pyarrow.feather").feather.write_feather(table(), "d.arrow", version=1),
            compare(rows_of("d.arrow"), ["!! d.arrow"]),
        ),
        "parquet as arrow": lambda: (
            parquet.write_table(table(), "d.arrow"),
            compare(rows_of("d.arrow"), ["!! d.arrow"]),
        ),
        "arrow as parquet": lambda: (
            __import__("pyarrow.feather").feather.write_feather(table(), "d.parquet"),
            compare(rows_of("d.parquet"), ["!! d.parquet"]),
        ),
        "empty arrow": lambda: (
            Path("d.arrow").touch(),
            compare(rows_of("d.arrow"), ["!! d.arrow"]),
        ),
    }
    cases |= {f"codec {name}": codec(name) for name in ("gzip", "brotli", "lz4", "snappy", "zstd")}
    cases |= {f"Arrow codec {name}": arrow_codec(name) for name in ("lz4", "zstd")}
    cases |= {
        f"damage: {how}": damage(how)
        for how in ("cut", "cut in two", "footer length", "footer", "start", "behind")
    }
    for name, act in cases.items():
        with attempt("table files", name) as home:
            if home:
                act()


# --- images -------------------------------------------------------------------------------------


def try_images() -> None:
    """Paths of images as they are written."""
    names = {  # name in the data: whether it is found
        "p.png": True,
        "./p.png": True,
        "sub/../p.png": True,
        "sub//q.png": True,
        "sub/q.png/": True,
        "link/r.png": True,
        "l.png": True,
        "../out/r.png": False,
        "sub/../../out/r.png": False,
        "/etc/passwd": False,
        "//etc/passwd": False,
        "~/p.png": False,
        "~root/p.png": False,
        "$HOME/p.png": False,
        "..\\out\\r.png": False,
        "sub\\q.png": False,
        "C:\\p.png": False,
        "http://a.b/p.png": False,
        "file:///p.png": False,
        "data:image/png;base64,AAAA": False,
        "": False,
        " ": False,
        ".": False,
        "..": False,
        "/": False,
        "sub": False,
        "p.png\0": False,
        "\0": False,
        "\ud800.png": False,
        "a\nok: 1.png": False,
        "\x1b[2J.png": False,
        "loop.png": False,
        "P.PNG": False,
        "p.png ": False,
        "a" * 300: False,
        "a/" * 3000 + "p.png": False,
        "dev.png": False,
        "pipe.png": False,
        "broken.png": False,
        "d.jsonl": False,
        "link/../p.png": True,
        "*.png": False,
        "p.png?x=1": False,
        "%2e%2e/out/r.png": False,
    }
    for name, fine in names.items():
        with attempt("image paths", repr(name)[:40]) as home:
            if home:
                for folder in ("data/sub", "out"):
                    Path(folder).mkdir(parents=True)
                for file in ("data/p.png", "data/sub/q.png", "out/r.png"):
                    Image.new("RGB", (56, 56), "red").save(file)
                Path("data/link").symlink_to("../out")
                Path("data/l.png").symlink_to("../out/r.png")
                Path("data/loop.png").symlink_to("loop.png")
                Path("data/dev.png").symlink_to("/dev/zero")
                Path("data/broken.png").symlink_to("gone")
                os.mkfifo("data/pipe.png")
                Path("data/d.jsonl").write_bytes(fields(text=MARK, images=[name]))
                compare(rows_of("data/d.jsonl"), [MARK if fine else "! d.jsonl:1"])


# --- sources ------------------------------------------------------------------------------------


def try_sources() -> None:
    """Several sources, and samples."""

    def put(name: str, *texts: str) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"".join(text(one) + b"\n" for one in texts))

    def setting() -> None:
        put("a.jsonl", "one")
        put("b/c.jsonl", "two", "three")
        put("d,e/f.jsonl", "four")
        Path("g").symlink_to("b")

    cases = {  # path: rows
        "a.jsonl,b": ["one", "two", "three"],
        "b,a.jsonl": ["two", "three", "one"],
        "b/,a.jsonl": ["two", "three", "one"],
        "d,e": ["four"],
        "d,e/f.jsonl": ["four"],
        "a.jsonl,a.jsonl": ["!! once"],
        "b,b/c.jsonl": ["!! once"],
        ".,b": ["!! once"],
        "b,g": ["!! once"],
        "b,./b/": ["!! once"],
        "a.jsonl,": ["!! --data"],
        ",a.jsonl": ["!! --data"],
        "": ["!! --data"],
        ",": ["!! --data"],
        " ": ["!!"],
        "a.jsonl, b": ["!! b"],
        "a.jsonl,gone": ["!! gone"],
        "a.jsonl,builtin": ["!! builtin"],
        "builtin,a.jsonl": ["!! builtin"],
        "gone\nerror": ["!!"],
        "a.jsonl\0": ["!!"],
        "\ud800": ["!!"],
        "x" * 5000: ["!!"],
        "/dev/null": ["!! ordinary"],
        "builtin:no": ["!!"],
    }
    for path, expected in cases.items():
        with attempt("sources", repr(path)[:40]) as home:
            if home:
                setting()
                compare(rows_of(path), expected)
    for cap, expected in ((1, 2), (2, 3), (5, 3), (10**12, 3)):
        with attempt("sources", f"cap {cap}") as home:
            if home:
                setting()
                found = rows_of("a.jsonl,b", cap=cap)
                check(len({*found}) == len(found) == expected, f"{found}")
    with attempt("sources", "cap, skipped rows") as home:
        if home:
            Path("a.jsonl").write_bytes(b"bad\n" * 50 + ONE + b"\n")
            check(len(rows_of("a.jsonl", cap=20)) == 20, "another number")
    with attempt("sources", "a link to another source's file") as home:
        if home:
            put("b/c.jsonl", "two")
            Path("z").mkdir()
            Path("z/c.jsonl").symlink_to("../b/c.jsonl")
            found = rows_of("b,z")
            check(found[0].startswith("!!") or found == ["two"], f"read twice: {found}")
    with attempt("sources", "a hard link in another source") as home:
        if home:
            put("b/c.jsonl", "two")
            Path("z").mkdir()
            Path("z/c.jsonl").hardlink_to("b/c.jsonl")
            found = rows_of("b,z")
            check(found[0].startswith("!!") or found == ["two"], f"read twice: {found}")


# --- pairs --------------------------------------------------------------------------------------


def pair(number: int = 0, **more: object) -> dict:
    return {
        "task": "t",
        "kind": "text-only",
        "query": {"text": f"q{number}"},
        "positive": {"text": f"p{number}"},
        "negatives": [],
        **more,
    }


def draw(rows: list) -> tuple[list, list[str]]:
    """All pairs of one pass, and why others cannot be used."""
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unusable: list[MocaError] = []
    tasks = load_tasks("d.jsonl", 0, unusable)
    reasons = [said(error) for error in unusable]
    pairs = []
    for task in tasks.values():
        for number in range(len(task)):
            try:
                one = task[number]
                for record in (one.query, one.positive, *one.negatives):
                    MOCA.processor.decode([MOCA.processor.encode(record, 64)])
                pairs.append(one)
            except MocaError as error:
                reasons.append(said(error))
    check(
        len(pairs) + len(reasons) == len(rows), f"{len(rows)} rows, {len(pairs)} pairs, {reasons}"
    )
    return pairs, reasons


def try_pairs() -> None:
    """Stage 2's rows."""
    bad = {
        "task number": pair(task=5),
        "task null": pair(task=None),
        "task list": pair(task=["t"]),
        "kind list": pair(kind=["text-only"]),
        "kind object": pair(kind={}),
        "kind case": pair(kind="Text-Only"),
        "kind blank": pair(kind="text-only "),
        "kind null": pair(kind=None),
        "another kind": pair(kind="image-text"),
        "query text": pair(query="q"),
        "query list": pair(query=[]),
        "query null": pair(query=None),
        "query blank": pair(query={"text": " "}),
        "positive number": pair(positive=5),
        "positive list": pair(positive=[{"text": "a"}]),
        "negatives text": pair(negatives="n"),
        "negatives true": pair(negatives=True),
        "negatives object": pair(negatives={"text": "a"}),
        "negatives texts": pair(negatives=["n"]),
        "negatives nulls": pair(negatives=[None]),
        "negatives lists": pair(negatives=[[{"text": "n"}]]),
        "negatives no text": pair(negatives=[{"images": []}]),
        "negatives 0": pair(negatives=0),
        "negatives false": pair(negatives=False),
        "negatives empty text": pair(negatives=""),
        "negatives {}": pair(negatives={}),
        "no query": {"task": "t", "kind": "text-only"},
        "no object": [1],
        "negative image": pair(negatives=[{"text": MARK, "images": ["gone.png"]}]),
    }
    for name, row in bad.items():
        with attempt("pairs", name) as home:
            if home:
                pairs, reasons = draw([pair(1), row, pair(2)])
                check(len(pairs) == 2 and "d.jsonl:2" in reasons[0], f"{reasons}")
    good = {
        "task empty": pair(task=""),
        "task control": pair(task="a\n\x1b[2J"),
        "task unicode": pair(task="日本 $x^2$ <b>"),
        "task half": pair(task="\ud800"),
        "task long": pair(task="t" * 10_000),
        "task path": pair(task="../../etc/passwd"),
        "negatives null": pair(negatives=None),
        "no negatives": {k: v for k, v in pair().items() if k != "negatives"},
        "positive is query": pair(query={"text": "a"}, positive={"text": "a"}),
    }
    for name, row in good.items():
        with attempt("pairs", name) as home:
            if home:
                check(len(draw([row] * 4)[0]) == 4, "not read")
                tasks = load_tasks("d.jsonl", 0)
                list(zip(range(3), PairBatches(tasks, MOCA.processor, 2, 64, 2, 0), strict=False))
                try:
                    PairBatches(tasks, MOCA.processor, 5, 64, 2, 0)
                except MocaError as error:
                    said(error)

    for name, content, words in (
        ("keys twice", b'{"task": "a", "task": "b", "kind": "text-only"}', "d.jsonl:1"),
        ("deep", b"[" * 10**5, "d.jsonl:1"),
    ):
        with attempt("pairs", name) as home:
            if home:
                Path("d.jsonl").write_bytes(content)
                unusable: list[MocaError] = []
                load_tasks("d.jsonl", 0, unusable)
                check(words in said(unusable[0]), "")

    def excluded(*given: tuple) -> list[list[bool]]:
        made = [
            nano_moca.batch.Pair(
                nano_moca.Record(q), nano_moca.Record(p), [nano_moca.Record(n) for n in near]
            )
            for q, p, near in given
        ]
        return excluded_candidates(made, [*range(len(made))]).tolist()

    with attempt("pairs", "a positive is another's hard negative") as home:
        if home:
            found = excluded(("q", "a", ["b"]), ("q", "b", []), ("r", "c", ["a"]))
            check(found[0] == [False, True, False, True, True] and found[2][4] is False, f"{found}")
    with attempt("pairs", "many equal queries") as home:
        if home:
            found = np.array(
                excluded(*(("q", f"p{n % 7}", [f"p{(n + 1) % 7}"]) for n in range(200)))
            )
            check((found | np.eye(200, 400, dtype=bool)).all(), "a right answer is a negative")
    with attempt("pairs", "equal pictures under two paths") as home:
        if home:
            for name in "ab":
                Image.new("RGB", (56, 56)).save(f"{name}.png")
            rows = [
                pair(
                    n, query={"text": MARK, "images": [f"{'ab'[n]}.png"]}, positive={"text": str(n)}
                )
                for n in range(2)
            ]
            check(len(draw(rows)[0]) == 2, "not read")


# --- the converter ------------------------------------------------------------------------------


def published(**more: object) -> dict:
    return {
        "qry": "Find it.\n",
        "qry_image_path": "",
        "pos_text": "<|image_1|>\nSee.\n",
        "pos_image_path": "images/C/a.png",
        "neg_text": "[]",
        "neg_image_path": "[]",
        **more,
    }


def try_converter() -> None:
    """Published pairs, hostile."""
    image = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(image, "PNG")
    png = image.getvalue()

    def run(
        rows: list[dict] | pyarrow.Table,
        images: str | None = "im",
        kinds: str | None = None,
        on_error: str = "skip",
        output: str = "out",
        data: str = "d",
    ) -> str:
        """Convert; returns what was printed, or "! ..." for an error."""
        folder = Path("d/NIGHTS")
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(
            rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows),
            folder / "train-0.parquet",
        )
        Path("im/C").mkdir(parents=True, exist_ok=True)
        Path("im/C/a.png").write_bytes(png)
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), warnings.catch_warnings():
                convert(
                    Flags(data=data, output=output, images=images, kinds=kinds, on_error=on_error)
                )
        except MocaError as error:
            check(not Path(output).is_dir() or output == "here", "half a result")
            check(not Path("out.new").exists(), "out.new stays")
            return said(error)
        for line in out.getvalue().splitlines():
            check(line.isprintable(), f"printed {line!r}")
        return out.getvalue()

    def usable() -> list:
        tasks = load_tasks("out", 0)
        return [task[n] for task in tasks.values() for n in range(len(task))]

    proof = "[__import__('os').system('touch proof')]"
    lists = {
        proof: 0,
        "__import__('os').system('touch proof')": 1,
        "[open('proof', 'w')]": 0,
        "[f'{open(1)}']": 0,
        "[b'a']": 0,
        "[('a',)]": 0,
        "[{'a': 1}]": 0,
        "[1]": 0,
        "[None]": 1,
        "[None, 'a']": 1,
        "['a', 1]": 0,
        "[['a']]": 0,
        "['a'] ": 1,
        " ['a']": 1,
        "['a',]": 1,
        "['a' 'b']": 1,
        "[*'ab']": 0,
        "[...]": 0,
        "[nan]": 0,
        "[1e999]": 0,
        "['a'": 0,
        '["a': 0,
        "[]": 1,
        "": 1,
        " ": 0,
        "()": 1,
        "['" + "a" * 10**6 + "']": 1,
        "[" + "'a'," * 10**5 + "]": 1,
        "[" * 100 + "]" * 100: 0,
        "[" * 10**5 + "]" * 10**5: 0,
        "[" + "-" * 10**5 + "1]": 0,
        "[" + "1+" * 10**5 + "1]": 0,
        "['\\ud800']": 1,
        "['\\x00']": 1,
        "['a'\n,'b']": 1,
        '["a", null]': 0,
        "['a\\d']": 1,
        "[r'a']": 1,
        "[u'a']": 1,
        "[lambda: 0]": 0,
        "[x for x in 'a']": 0,
        "['a'] + ['b']": 0,
        "[set()]": 0,
        "[{'a'}]": 0,
        "['\udcff']": None,
    }
    for written, count in lists.items():
        with attempt("converter: negatives", repr(written)[:30]) as home:
            if home and count is not None:
                out = run(
                    [published(), published(neg_text=written, pos_image_path="images/C/a.png")]
                )
                check(not Path("proof").exists(), "it was run")
                check(f"{1 + count} pairs" in out and f"{1 - count} rows skipped" in out, out[:200])
                usable()

    columns = {
        "ints": (pyarrow.array([1, 2]), 0),
        "list": (pyarrow.array([["a"], ["b", "c"]]), 2),
        "nulls": (pyarrow.array([None, None], pyarrow.string()), 2),
        "structs": (pyarrow.array([{"a": 1}, {"a": 2}]), 0),
        "bytes": (pyarrow.array([b"['a']", b""]), 0),
        "floats": (pyarrow.array([0.5, 1]), 0),
        "lists of ints": (pyarrow.array([[1], [2]]), 0),
        "empty lists": (pyarrow.array([[], []], pyarrow.list_(pyarrow.string())), 2),
        "bool": (pyarrow.array([True, False]), 0),
        "large": (pyarrow.array(["['a']", "[]"], pyarrow.large_string()), 2),
        "dictionary": (pyarrow.array(["['a']", "['a']"]).dictionary_encode(), 2),
    }
    for name, (column, count) in columns.items():
        for which in ("neg_text", "neg_image_path", "qry", "qry_image_path"):
            with attempt("converter: columns", f"{name} as {which}") as home:
                if home:
                    content = pyarrow.Table.from_pylist([published(), published()])
                    content = content.set_column(content.column_names.index(which), which, column)
                    out = run(content)
                    if which == "neg_text":
                        check(f"{count} pairs" in out, out[:300])
                    check("pairs of kind" in out or out.startswith("! "), out[:200])
                    check(
                        "rows skipped" not in out
                        or sum(map(int, __import__("re").findall(r"(\d+) (?:pairs|rows)", out)))
                        == 2,
                        out,
                    )

    rows = {
        "path out": published(pos_image_path="../x"),
        "path out inside": published(pos_image_path="images/../../x"),
        "absolute": published(pos_image_path="/etc/passwd"),
        "missing": published(pos_image_path="images/no.png"),
        "long": published(pos_image_path="images/" + "a" * 400),
        "zero": published(pos_image_path="images/\0"),
        "folder": published(pos_image_path="images/C"),
        "empty": published(qry=""),
        "null": published(qry=None, qry_image_path=None),
        "two marks": published(pos_text="<|image_1|><|image_1|>"),
        "blank path": published(pos_image_path=" "),
        "control": published(pos_image_path="\x1b[2J\nNIGHTS: 5 pairs"),
    }
    for name, row in rows.items():
        with attempt("converter: rows", name) as home:
            if home:
                out = run([published(), row])
                check("1 pairs" in out and "1 rows skipped" in out, out[:300])
        with attempt("converter: rows", f"{name}, stop") as home:
            if home:
                check("row 2" in run([published(), row], on_error="stop"), "not named")

    def archive(name: str, members: list[tuple], expected: str, row: dict | None = None) -> None:
        """members: (name, bytes or kind, link). expected: "pairs", or words of the error."""
        with attempt("converter: archives", name.split("|")[0] + " " + name.split("|")[1]) as home:
            if not home:
                return
            Path("arch").mkdir()
            file = Path("arch", name.split("|")[1])
            if file.suffix.lower() == ".zip":
                with (
                    warnings.catch_warnings(),
                    zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened,
                ):
                    warnings.simplefilter("ignore")
                    for member, content, *_ in members:
                        if content == "link":
                            info = zipfile.ZipInfo(member)
                            info.external_attr = (stat.S_IFLNK | 0o777) << 16
                            opened.writestr(info, "C/a.png")
                        else:
                            opened.writestr(member, content)
            else:
                mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(
                    file.suffix, "w"
                )
                with tarfile.open(file, mode) as opened:
                    for member, content, *target in members:
                        info = tarfile.TarInfo(member)
                        if isinstance(content, bytes):
                            info.size = len(content)
                            opened.addfile(info, io.BytesIO(content))
                        else:
                            info.type = {
                                "link": tarfile.SYMTYPE,
                                "hard": tarfile.LNKTYPE,
                                "device": tarfile.CHRTYPE,
                                "pipe": tarfile.FIFOTYPE,
                            }[content]
                            info.linkname = target[0] if target else ""
                            opened.addfile(info)
            before = {str(p) for p in Path("..").resolve().glob("*")}
            out = run([row or published()], images=f"arch/{file.name}", on_error="stop")
            check(
                "! " not in out and "1 pairs" in out
                if expected == "pairs"
                else expected in out and out.startswith("! "),
                out[:300],
            )
            new = {str(p) for p in Path("..").resolve().glob("*")} - before
            check(
                not [p for p in new if "evil" in p]
                and not Path("evil.png").exists()
                and not Path("/evil.png").exists(),
                "written elsewhere",
            )
            if expected == "pairs":
                check(usable()[0].positive.images[0].read_bytes() == png, "another picture")

    a = ("C/a.png", png)
    for kind in ("x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz", "X.ZIP"):
        archive(f"good|{kind}", [a], "pairs")
        archive(f"below images/|{kind}", [("images/C/a.png", png)], "pairs")
        archive(f"another folder|{kind}", [("deep/images/C/a.png", png)], "missing")
    for kind in ("x.zip", "x.tar"):
        archive(f"leads out|{kind}", [a, ("../evil.png", b"x")], "arch/x")
        archive(f"leads out inside|{kind}", [a, ("C/../../../evil.png", b"x")], "arch/x")
        archive(f"point|{kind}", [("./C/a.png", png)], "pairs")
        archive(f"stranger|{kind}", [a, ("a\x1b[2J\n.png", b"x")], "pairs")
        archive(
            f"folders twice|{kind}",
            [("C/", b""), ("C/", b""), a] if kind == "x.zip" else [a],
            "pairs",
        )
        archive(f"data inside|{kind}", [a, ("C/x.jsonl", b"bad"), ("x.parquet", b"bad")], "pairs")
        archive(f"long name|{kind}", [a, ("C/" + "n" * 300 + ".png", b"x")], "arch/x")
        archive(f"twice the same|{kind}", [a, a], "arch/x" if kind == "x.zip" else "pairs")
        archive(f"a file as folder|{kind}", [("C", b"x"), a], "arch/x")
        archive(
            f"bomb|{kind}.gz" if kind == "x.tar" else f"bomb|{kind}",
            [a, ("C/bomb", bytes(2**28))],
            "pairs",
        )
    archive("twice, other|x.zip", [("C/a.png", b"x"), a], "arch/x")
    archive("absolute|x.zip", [a, ("/evil.png", b"x")], "arch/x")
    archive("absolute|x.tar", [a, ("/evil.png", b"x")], "pairs")
    archive("link out|x.tar", [a, ("l", "link", "/etc")], "arch/x")
    archive("link in|x.tar", [("C/b.png", png), ("C/a.png", "link", "b.png")], "pairs")
    archive("hard link|x.tar", [("C/b.png", png), ("C/a.png", "hard", "C/b.png")], "pairs")
    archive("hard link out|x.tar", [a, ("C/b.png", "hard", "/etc/passwd")], "arch/x")
    archive("device|x.tar", [a, ("C/z", "device")], "arch/x")
    archive("pipe|x.tar", [a, ("C/z", "pipe")], "arch/x")
    archive("link to itself|x.tar", [("C/a.png", "link", "a.png")], "")
    archive("no Unicode|x.tar", [a, ("C/\udcff.png", b"x")], "pairs")
    archive("empty|x.zip", [], "missing")

    def others() -> Iterator[tuple[str, Callable]]:
        def two_archives(second: bytes, expected: str) -> None:
            Path("arch").mkdir()
            for name, content in (("x.zip", png), ("y.zip", second)):
                with zipfile.ZipFile(f"arch/{name}", "w") as opened:
                    opened.writestr("C/a.png", content)
            out = run([published()], images="arch")
            check(expected in out, out[:300])

        yield "same picture in two archives", lambda: two_archives(png, "1 pairs")
        yield "two pictures of one path", lambda: two_archives(b"other", "y.zip")

        def locked() -> None:
            Path("x.zip").write_bytes(b"PK\x03\x04" + bytes(100))
            check("x.zip" in run([published()], images="x.zip"), "not named")

        yield "cut zip", locked

        def existing() -> None:
            Path("here").mkdir()
            check("exists" in run([published()], output="here"), "replaced")
            Path("f").touch()
            check("exists" in run([published()], output="f"), "replaced")
            Path("lost").symlink_to("gone")
            out = run([published()], output="lost")
            check(out.startswith("! ") or Path("gone").is_dir(), out)

        yield "existing output", existing

        def inside(output: str, images: str = "im") -> Callable[[], None]:
            def act() -> None:
                out = run([published()], output=output, images=images)
                if not out.startswith("! "):
                    check("1 pairs" in out and len(load_tasks(output, 0)["NIGHTS"]) == 1, out)

            return act

        yield "output in data", inside("d/out")
        yield "output in images", inside("im/out")
        yield "output in a subset", inside("d/NIGHTS/out")
        yield "images is all", inside("out", "im,d")
        yield (
            "images is here",
            lambda: (
                run([published()]),
                shutil.rmtree("out"),
                check("1 rows skipped" in run([published()], images="."), ""),
            ),
        )

        def images_empty(value: str) -> Callable[[], None]:
            return lambda: check(run([published()], images=value).startswith("! "), "taken")

        for value in ("", ",", "gone", "im,", "im,im", "im,im/C", "gone\n"):
            yield f"images {value!r}", images_empty(value)

        def table_of(content: bytes) -> Callable[[], None]:
            def act() -> None:
                Path("k.json").write_bytes(content)
                out = run([published()], kinds="k.json")
                check(out.startswith("! ") and "k" in out and "Qwen" not in out, out)

            return act

        for content in (
            b"",
            b"[]",
            b"{",
            b'{"NIGHTS": 5}',
            b'{"NIGHTS": ["image-text"]}',
            b'{"NIGHTS": null}',
            b"\xff",
        ):
            yield f"kinds {content!r}", table_of(content)

        def stranger(name: bytes) -> Callable[[], None]:
            def act() -> None:
                folder = os.path.join(b"d", name)
                os.makedirs(folder)
                parquet.write_table(pyarrow.Table.from_pylist([published()]), "x.parquet")
                os.rename("x.parquet", os.path.join(folder, b"train.parquet"))
                Path("k.json").write_text(json.dumps({os.fsdecode(name): "image-text"}))
                out = run([published()], kinds="k.json")
                check("2 pairs" in out or out.count("1 pairs") == 2 or out.startswith("! "), out)

            return act

        for name in (b"a\nNIGHTS: 99 pairs", b"\xff\xfe", b"a\x1b[2J", b"a,b", b"x.jsonl"):
            yield f"subset {name!r}", stranger(name)
        yield (
            "unknown subset",
            lambda: (
                os.makedirs("d/Mine"),
                parquet.write_table(pyarrow.Table.from_pylist([published()]), "d/Mine/a.parquet"),
                check("Mine" in run([published()]), ""),
            )[0],
        )

        def copies(*names: str) -> Callable[[], None]:
            def act() -> None:
                run([published(qry="train")])
                shutil.rmtree("out")
                for name in names:
                    parquet.write_table(
                        pyarrow.Table.from_pylist([published(qry=name)]), f"d/NIGHTS/{name}.parquet"
                    )
                out = run([published(qry="train")])
                check("1 pairs" in out and out.count("left out") == len(names), out)

            return act

        yield "original and train", copies("original-00000-of-00001")
        yield "all three", copies("original-0", "diverse_instruction-0")
        yield "diverse and train", copies("diverse_instruction-0")

        def splits() -> None:
            Path("d/NIGHTS").mkdir(parents=True)
            parquet.write_table(pyarrow.Table.from_pylist([published()]), "d/NIGHTS/more.parquet")
            out = run([published()])
            check("2 pairs" in out or "left out" in out, f"one of two files silently: {out}")

        yield "two files, one of them train", splits
        yield (
            "no rows",
            lambda: check(
                "0 pairs" in (out := run(pyarrow.Table.from_pylist([published()]).slice(0, 0)))
                or out.startswith("!"),
                out,
            ),
        )
        yield (
            "no data",
            lambda: (Path("e").mkdir(), check(run([published()], data="e").startswith("! "), "")),
        )
        yield (
            "a file as data",
            lambda: (
                run([published()]),
                shutil.rmtree("out"),
                check("pairs" in (out := run([published()], data="d/NIGHTS/train-0.parquet")), out),
            ),
        )
        yield (
            "jsonl as data",
            lambda: (
                Path("e/NIGHTS").mkdir(parents=True),
                Path("e/NIGHTS/a.jsonl").write_bytes(ONE),
                check(run([published()], data="e").startswith("! "), ""),
            ),
        )
        yield (
            "an extra column of dates",
            lambda: check(
                "1 pairs"
                in run(
                    pyarrow.Table.from_pylist([published()]).append_column(
                        "w", pyarrow.array([10**15], pyarrow.timestamp("s"))
                    )
                ),
                "",
            ),
        )
        yield (
            "a column too few",
            lambda: check(
                "column" in run([{k: v for k, v in published().items() if k != "qry"}]), ""
            ),
        )

        def damaged() -> None:
            run([published()])
            shutil.rmtree("out")
            Path("d/CIRR").mkdir()
            Path("d/CIRR/a.parquet").write_bytes(b"PAR1 no")
            check("a.parquet" in run([published()]), "not named")

        yield "a broken file", damaged

        def full() -> None:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            run([published()])
            shutil.rmtree("out")
            rows = [published(qry="x" * 1000) for _ in range(50)]
            Path("d/NIGHTS").mkdir(parents=True, exist_ok=True)
            parquet.write_table(
                pyarrow.Table.from_pylist(rows), "d/NIGHTS/train-1.parquet", use_dictionary=True
            )
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
            try:
                out = run([published()])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            check(out.startswith("! ") and "out" in out, out)

        yield "a full disk", full

    for name, act in others():
        with attempt("converter: the command", name) as home:
            if home:
                act()


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, expire)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for group in (
        try_lines,
        try_folders,
        try_tables,
        try_images,
        try_sources,
        try_pairs,
        try_converter,
    ):
        group()
    print("\n| kind | tried | right |\n| --- | --- | --- |")
    for kind, count in tried.items():
        print(f"| {kind} | {count} | {right[kind]} |")
    print(f"| all | {sum(tried.values())} | {sum(right.values())} |")
