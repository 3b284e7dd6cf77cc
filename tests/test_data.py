"""Records from files, and how a step's records are drawn and divided: the promises of data.py and
of stage 1's part of batches.py."""

import codecs
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from nano_moca import MARK, Moca, MocaError, Record
from nano_moca.batches import StepRecords, TokenBatches, balance
from nano_moca.convert.rows import JsonLines
from nano_moca.data import load_records, load_tasks, make_record, open_rows

LINES = [
    {"text": "words alone", "images": []},
    {"text": f"{MARK} a picture", "images": ["a.png"]},
    {"text": "日本語, émoji 🐍 and a line\nbreak", "images": []},
    {"text": f"{MARK}{MARK} two", "images": ["a.png", "folder/b.png"]},
]


def write_lines(path: Path, lines: list[dict]) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                    encoding="utf-8")
    return path


def numbers(step: StepRecords) -> list[int]:
    """The numbers of a step's records, in the order of the run."""
    return sorted(number for part in step.micro_batches for number, _ in part)


def sources(step: StepRecords) -> list[str]:
    """The sources of a step's records, in the order of the run."""
    found = []
    for part in step.micro_batches:
        found += [(number, record.source) for number, record in part]
    return [source for _, source in sorted(found)]


@pytest.fixture
def make(mixed: Path, moca: Moca):
    """`TokenBatches` over the mixed data: make(budget, seed, rank, world_size, accumulate)."""

    def batches(budget: int = 150, seed: int = 0, *ranks: int, data: Path = mixed,
                skipped: Path | None = None) -> TokenBatches:
        records = load_records(str(data), seed)
        return TokenBatches(
            records, moca.processor, budget, 1280, seed, *ranks, skipped=skipped)

    return batches


# --- files --------------------------------------------------------------------------------------

def test_json_lines_and_parquet_hold_the_same_records(tmp_path: Path) -> None:
    """The same fields in either kind of file are the same records, over row groups too."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    write_lines(tmp_path / "a.jsonl", LINES)
    parquet.write_table(pyarrow.Table.from_pylist(LINES), tmp_path / "b.parquet", row_group_size=3)
    from_lines = load_records(str(tmp_path / "a.jsonl"), 0)
    from_parquet = load_records(str(tmp_path / "b.parquet"), 0)
    assert len(from_lines) == len(from_parquet) == len(LINES)
    for index in (3, 0, 2, 1):
        ours, theirs = from_lines[index], from_parquet[index]
        assert (ours.text, ours.images) == (theirs.text, theirs.images)
        assert ours.text == LINES[index]["text"]
        assert ours.images == [tmp_path.resolve() / image for image in LINES[index]["images"]]
        assert ours.source.endswith(f"a.jsonl:{index + 1}")
        assert theirs.source.endswith(f"b.parquet row {index + 1}")


def test_parquet_images_as_bytes(tmp_path: Path, golden: Path, moca: Moca) -> None:
    """The hub's image columns, {"bytes", "path"}, hold the picture that a path would."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    picture = golden / "images" / "0-rgb-84x84.png"
    row = {"text": f"{MARK} x", "images": [{"bytes": picture.read_bytes(), "path": "gone.png"}]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    read = moca.processor.batch([load_records(str(tmp_path / "a.parquet"), 0)[0]])
    expected = moca.processor.batch([Record(f"{MARK} x", [picture])])
    assert read.patches.equal(expected.patches) and read.tokens.equal(expected.tokens)


def test_folder_of_files(tmp_path: Path) -> None:
    """A folder is all its files in the order of their names; images lie beside their own file."""
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "2.jsonl", LINES[1:2])
    write_lines(tmp_path / "a.jsonl", LINES[:1])
    (tmp_path / "notes.txt").write_text("no data")
    records = load_records(str(tmp_path), 0)
    assert [records[n].text for n in range(len(records))] == [x["text"] for x in LINES[:2]]
    assert records[1].images == [tmp_path.resolve() / "b" / "a.png"]


def test_last_line_without_end(tmp_path: Path) -> None:
    """A file whose last line has no line end holds that line too."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    records = load_records(str(tmp_path / "a.jsonl"), 0)
    assert [records[n].text for n in range(len(records))] == ["one", "two"]


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    """An absent file, an empty one, a folder without data, a broken parquet file: one line."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    for name in ("absent.jsonl", "empty.jsonl", "folder", "broken.parquet"):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        with pytest.raises(MocaError, match=name) as caught:
            open_rows(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("line", "words"), [
    ('{"text": "a"', "not JSON"),
    ("", "not JSON"),
    ("[1, 2]", 'no "text"'),
    ('{"text": "a", "text": "b"}', "twice"),
    ('{"text": "a", "images": [{"path": "b", "path": "c"}]}', "twice"),
    ('{"text": 5}', 'no "text"'),
    ('{"images": []}', 'no "text"'),
    ('{"text": "a", "images": "a.png"}', "not a list"),
    ('{"text": "a", "images": [5]}', "neither path nor bytes"),
    ('{"text": "a", "images": [{"path": null}]}', "neither path nor bytes"),
    ('{"text": "a", "images": ["../a.png"]}', "outside"),
    ('{"text": "a", "images": ["/etc/passwd"]}', "outside"),
    ('{"text": "a", "images": ["b/../../a.png"]}', "outside"),
    ('{"text": "a", "images": [{"path": ".."}]}', "outside"),
])
def test_lines_that_are_no_record(tmp_path: Path, line: str, words: str) -> None:
    """Each is an error that names file and line and says what is wrong."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "last"}}\n')
    records = load_records(str(tmp_path / "a.jsonl"), 0)
    assert records[0].text == "fine"
    with pytest.raises(MocaError, match=words) as caught:
        records[1]
    assert "a.jsonl:2: " in str(caught.value) and "\n" not in str(caught.value)


def test_links_are_the_users_own(tmp_path: Path, golden: Path, moca: Moca) -> None:
    """An image is followed wherever links in the folder lead: a linked folder, a linked file, and a
    data file that is itself a link, as in the hub's cache; ".." that stays inside is nothing."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    (folder / "out").symlink_to(golden / "images")
    (blobs / "12ab").write_bytes((golden / "images" / "0-rgb-84x84.png").read_bytes())
    (folder / "c.png").symlink_to("../blobs/12ab")
    names = ["out/0-rgb-84x84.png", "c.png", "out/../c.png", "./c.png"]
    write_lines(blobs / "34cd", [{"text": MARK, "images": [name]} for name in names])
    (folder / "a.jsonl").symlink_to("../blobs/34cd")
    for data in (folder, folder / "a.jsonl"):
        records = load_records(str(data), 0)
        assert len(records) == 4
        packed = [moca.processor.batch([records[n]]).patches for n in range(4)]
        assert all(patches.equal(packed[0]) for patches in packed)
    assert records[3].source == f"{folder / 'a.jsonl'}:4"


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A line that is not UTF-8 is named; the lines around it are read."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n{"text": "c"}\n')
    lines = JsonLines(tmp_path / "a.jsonl")
    assert [lines[0][0], lines[2][0]] == [{"text": "a"}, {"text": "c"}]
    with pytest.raises(MocaError, match="a.jsonl:2"):
        lines[1]


ONE, TWO = b'{"text": "one"}', b'{"text": "two"}'


@pytest.mark.parametrize("content", [
    ONE + b"\n" + TWO + b"\n\n\n", b"\n \t\n" + ONE + b"\n" + TWO,
    ONE + b"\r\n" + TWO + b"\r\n  \r\n\r\n", codecs.BOM_UTF8 + ONE + b"\n" + TWO + b"\n",
    codecs.BOM_UTF8 + b"\r\n" + ONE + b"\n" + TWO, ONE + b"\r" + TWO + b"\r\r",
    b"\n" * 3000 + ONE + b"\n" + TWO + b"\n" * 3000, ONE + b"\n" + TWO + "\n\u00a0\u3000".encode(),
])
def test_blank_edges_of_a_file(tmp_path: Path, content: bytes) -> None:
    """Blank lines before and after, however they are written, and a byte order mark are nothing."""
    (tmp_path / "a.jsonl").write_bytes(content)
    lines = JsonLines(tmp_path / "a.jsonl")
    assert [fields["text"] for fields, _, _ in lines] == ["one", "two"]
    with pytest.raises(IndexError):
        lines[2]


def test_a_blank_line_between(tmp_path: Path) -> None:
    """May be a lost record: it is named by its number in the file, as are those after it."""
    (tmp_path / "a.jsonl").write_bytes(b"\n" + ONE + b"\n\n" + TWO + b"\n\n")
    lines = JsonLines(tmp_path / "a.jsonl")
    assert len(lines) == 3 and lines[2][2].endswith("a.jsonl:4")
    with pytest.raises(MocaError, match="a.jsonl:3: not JSON"):
        lines[1]


@pytest.mark.parametrize("now", ["gone", "a folder", "a loop", "shorter"])
def test_a_file_that_changes(tmp_path: Path, now: str) -> None:
    """Under a run: a row that can no longer be read is named."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(ONE + b"\n" + TWO + b"\n")
    lines = JsonLines(path)
    path.unlink()
    if now == "a folder":
        path.mkdir()
    elif now == "a loop":
        path.symlink_to(path)
    elif now == "shorter":
        path.write_bytes(ONE)
    with pytest.raises(MocaError, match="a.jsonl:2: not JSON"):
        lines[1]


def test_line_ends_inside_a_text(tmp_path: Path) -> None:
    """What only Unicode calls a line end does not end a line."""
    text = "a\u2028b\u2029c\x85d\x0be\x1cf"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text[:7]}, ensure_ascii=False) + "\n" + json.dumps({"text": text}),
        encoding="utf-8")
    records = load_records(str(tmp_path / "a.jsonl"), 0)
    assert len(records) == 2 and records[1].text == text


def test_what_is_no_data(tmp_path: Path) -> None:
    """Hidden files and folders, editors' copies, a run's log and list, a cache: passed over.
    Folders named like files, as Spark writes them, are folders; empty files hold nothing."""
    row = [{"text": "no data"}]
    for name in (".a.jsonl", "._a.jsonl", "a.jsonl~", "#a.jsonl#", ".a.jsonl.swp", "a.jsonl.bak",
                 "~$a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".git/x.parquet",
                 "__MACOSX/._a.jsonl", "train.jsonl/.part-0.jsonl.crc", "cache-12ab.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, row)
    (tmp_path / "train.jsonl" / "_SUCCESS").touch()
    (tmp_path / "empty.jsonl").touch()
    write_lines(tmp_path / "train.jsonl" / "part-0.jsonl", LINES[:1])
    write_lines(tmp_path / "train.jsonl" / "part-1.jsonl", LINES[2:3])
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "log.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2}])
    write_lines(tmp_path / "run" / "skipped.jsonl", [{"count": 1, "reason": "x"}])
    (tmp_path / "other").mkdir()
    write_lines(tmp_path / "other" / "log.jsonl", [{"text": "a log of other things"}])
    rows = open_rows(tmp_path)
    assert [fields["text"] for fields, _, _ in rows] == [
        "a log of other things", LINES[0]["text"], LINES[2]["text"]]


def test_what_is_passed_over_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture) -> None:
    """Files that may be data, of a kind that is not read: once, in one line, by one rank. Pictures
    are no data, and suffixes may be written large."""
    write_lines(tmp_path / "a.JSONL", LINES[:1])
    for name in ("b.jsonl.gz", "sub/c.gz", "d.csv", "e\n.x\ny", "f.PNG", "g.jpeg", "NOTES"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for _ in range(2):
        assert len(open_rows(tmp_path)) == 1
    said = capsys.readouterr().out
    assert said == (f"{tmp_path}: passed over: 1 .csv, 2 .gz, 1 .x\\ny, 1 NOTES: only .jsonl, "
                    ".parquet, .arrow are read\n")
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "h.json").touch()
    open_rows(tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "a.JSONL").unlink()
    (tmp_path / "i.json").touch()
    with pytest.raises(MocaError, match="no records"):
        open_rows(tmp_path)
    assert "2 .json," in capsys.readouterr().out


@pytest.mark.parametrize("name", ["more", "v2.1", "old.zst"])
def test_a_link_to_nothing(tmp_path: Path, name: str) -> None:
    """May have been a folder of data, whatever it is called; a picture that nobody names is not
    missed."""
    write_lines(tmp_path / "a.jsonl", LINES)
    (tmp_path / "lost.png").symlink_to("nowhere")
    assert len(open_rows(tmp_path)) == 4
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(MocaError, match=name):
        open_rows(tmp_path)


def test_links_in_a_folder(tmp_path: Path) -> None:
    """Linked files and folders are read, none twice, and a link to where it lies has an end."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    write_lines(data / "a.jsonl", [{"text": "a"}])
    write_lines(data / "sub" / "b.jsonl", [{"text": "b"}])
    write_lines(elsewhere / "c.jsonl", [{"text": "c"}])
    (data / "far").symlink_to(elsewhere)
    (data / "sub" / "up").symlink_to(data)
    (data / "sub" / "self").symlink_to(".")
    (data / "twin").symlink_to(data / "sub")
    (data / "again.jsonl").symlink_to("sub/b.jsonl")
    (data / "hard.jsonl").hardlink_to(data / "a.jsonl")
    (elsewhere / "back").symlink_to(data)
    for folder in (data, data / "sub" / "up"):
        assert sorted(fields["text"] for fields, _, _ in open_rows(folder)) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["fifo", "zero", "lost", "lost folder", "loop"])
def test_what_cannot_be_read(tmp_path: Path, kind: str) -> None:
    """A pipe, a device, a link to nothing: an error that names it, and no waiting."""
    write_lines(tmp_path / "a.jsonl", LINES)
    bad = tmp_path / ("bad" if kind == "lost folder" else "bad.jsonl")
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "zero":
        bad.symlink_to("/dev/zero")
    else:
        bad.symlink_to(bad if kind == "loop" else tmp_path / "nowhere")
    with pytest.raises(MocaError, match=bad.name):
        open_rows(tmp_path)
    with pytest.raises(MocaError, match=bad.name):
        open_rows(bad)


@pytest.mark.parametrize("locked", ["sub", "sub/b.jsonl", "."])
def test_without_permission(tmp_path: Path, locked: str) -> None:
    """A folder or file that may not be read is named: nothing is left out."""
    write_lines(tmp_path / "a.jsonl", LINES)
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "sub" / "b.jsonl", LINES)
    os.chmod(tmp_path / locked, 0)
    child = os.fork()
    if not child:  # root may read all: be nobody
        code = 1
        try:
            if not os.getuid():
                for folder in (tmp_path.parent, tmp_path.parent.parent):
                    os.chmod(folder, 0o755)
                os.chmod(tmp_path, 0 if locked == "." else 0o755)
                os.setuid(65534)
            open_rows(tmp_path)
        except MocaError as error:
            code = 0 if str(tmp_path / locked) in str(error) else 2
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chmod(tmp_path / locked, 0o755)
    assert ended == 0


def test_several_sources(tmp_path: Path) -> None:
    """Files and folders with commas between, one after the other; a name may hold a comma; an empty
    or absent one is refused by name."""
    (tmp_path / "b,c").mkdir()
    write_lines(tmp_path / "a.jsonl", LINES[:1])
    write_lines(tmp_path / "b,c" / "d.jsonl", LINES[2:3])
    (tmp_path / "b").symlink_to("b,c")
    records = load_records(f"{tmp_path / 'b'},{tmp_path / 'a.jsonl'}", 0)
    assert [records[0].text, records[1].text, len(records)] == [
        LINES[2]["text"], LINES[0]["text"], 2]
    assert load_records(str(tmp_path / "b,c"), 0)[0].text == LINES[2]["text"]
    twice = [(tmp_path / "b", tmp_path / "b" / "d.jsonl"), (tmp_path / "a.jsonl",) * 2,
             (tmp_path / "a.jsonl", tmp_path)]
    for bad in ("", ",", f"{tmp_path / 'a.jsonl'},", *(",".join(map(str, two)) for two in twice)):
        for load in (load_records, load_tasks):
            with pytest.raises(MocaError, match="--data: "):
                load(bad, 0)
    with pytest.raises(MocaError, match="absent"):
        load_records(f"{tmp_path / 'a.jsonl'},{tmp_path / 'absent'}", 0)
    for unheard in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(MocaError):
            load_records(f"{tmp_path / 'a.jsonl'},{unheard}", 0)

    # A file that two sources hold by links is read once.
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "own.jsonl", [{"text": name}])
    (tmp_path / "two" / "soft.jsonl").symlink_to("../one/own.jsonl")
    (tmp_path / "two" / "hard.jsonl").hardlink_to(tmp_path / "one" / "own.jsonl")
    records = load_records(f"{tmp_path / 'one'},{tmp_path / 'two'}", 0)
    assert [records[n].text for n in range(len(records))] == ["one", "two"]
    for load in (load_records, load_tasks):
        with pytest.raises(MocaError, match="takes no --cap"):  # never capped in silence
            load("builtin", 0, cap=5)


def test_a_fingerprint_tells_data_apart(tmp_path: Path, moca: Moca) -> None:
    """Other content of the same length, another name, another order of sources; not another place.
    It is part of what a checkpoint keeps."""
    def mark(path: Path | str) -> str:
        batches = TokenBatches(load_records(str(path), 0), moca.processor, 50, 64, 0)
        return next(batches).state["fingerprint"]

    lines = [{"text": f"line {n:06d}"} for n in range(40_000)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = mark(write_lines(tmp_path / "one" / "a.jsonl", lines))
    assert first == mark(write_lines(tmp_path / "two" / "a.jsonl", lines)) and len(first) == 64
    assert first != mark(write_lines(tmp_path / "two" / "b.jsonl", lines))
    for place in (0, 39_999):
        other = [*lines]
        other[place] = {"text": "line abcdef"}
        assert first != mark(write_lines(tmp_path / "two" / "a.jsonl", other))
    other = [{"text": line["text"].upper()} for line in lines]
    assert first != mark(write_lines(tmp_path / "two" / "a.jsonl", other))
    one, two = tmp_path / "one", tmp_path / "two"
    assert mark(f"{one},{two}") != mark(f"{two},{one}")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON lines need none; other files say what to install."""
    monkeypatch.setitem(sys.modules, "nano_moca.convert.tables", None)
    write_lines(tmp_path / "a.jsonl", LINES)
    assert len(open_rows(tmp_path)) == 4
    for name in ("b.arrow", "c.parquet"):
        (tmp_path / name).touch()
        with pytest.raises(MocaError, match=f"{name}.*pip install pyarrow"):
            open_rows(tmp_path / name)


# --- dividing -----------------------------------------------------------------------------------

def test_balance() -> None:
    """Every item goes to one share, and shares differ by no more than the costliest item; the first
    of several that are cheapest takes the next."""
    random = np.random.default_rng(0)
    for parts in (1, 2, 3, 8):
        for _ in range(20):
            costs = random.integers(1, 20, random.integers(parts, 40)).tolist()
            shares = balance(costs, parts)
            assert sorted(item for share in shares for item in share) == list(range(len(costs)))
            totals = [sum(costs[item] for item in share) for share in shares]
            assert len(shares) == parts and min(totals) > 0
            assert max(totals) - min(totals) <= max(costs)
            plain: list[list[int]] = [[] for _ in range(parts)]
            for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
                sums = [sum(costs[other] for other in share) for share in plain]
                plain[sums.index(min(sums))].append(item)
            assert shares == [sorted(share) for share in plain]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (3, 2)])
def test_ranks_share_the_batch_of_one(make, world: int, accumulate: int) -> None:
    """At every step the ranks' shares together are one rank's batch, and no record comes twice."""
    one = make(300)
    many = [make(300, 0, rank, world, accumulate) for rank in range(world)]
    for _ in range(6):
        alone, shares = next(one), [next(batches) for batches in many]
        assert numbers(alone) == sorted(n for share in shares for n in numbers(share))
        assert sorted(sources(alone)) == sorted(s for share in shares for s in sources(share))
        assert {share.tokens for share in shares} == {alone.tokens}
        assert all(share.state == alone.state for share in shares)
        for share in shares:
            assert len(share.micro_batches) == accumulate and all(share.micro_batches)


# --- drawing ------------------------------------------------------------------------------------

def test_each_record_once_an_epoch(make) -> None:
    """Twelve records: every twelve in a row are all of them, whatever the steps' borders."""
    batches, drawn = make(150), []
    while len(drawn) < 36:
        drawn += sources(next(batches))
    epochs = [drawn[start : start + 12] for start in (0, 12, 24)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_numbers_count_the_run(make) -> None:
    """A record's number, the seed of its masks, is its place in the run: never the same twice."""
    batches = make(150)
    drawn = [number for _ in range(8) for number in numbers(next(batches))]
    assert drawn == list(range(len(drawn))) and len(drawn) > 12


def test_budget(make) -> None:
    """A step holds at most the budget, the next record would not have fitted; a record larger than
    the budget comes alone."""
    batches = make(150)
    steps = [next(batches) for _ in range(10)]
    for step, after in zip(steps[:-1], steps[1:], strict=True):
        lengths = [len(record.tokens) for _, record in step.micro_batches[0]]
        first = min((n, len(record.tokens)) for n, record in after.micro_batches[0])
        assert step.tokens == sum(lengths) <= 150
        assert step.tokens + first[1] > 150
    alone = make(5)
    assert [len(numbers(next(alone))) for _ in range(4)] == [1, 1, 1, 1]


def test_seeds_and_epochs_change_the_order(make) -> None:
    """The same seed draws the same, another seed another order."""
    first, again, other = (sources(next(make(300, seed))) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_state_resumes_the_draws(make, steps: int) -> None:
    """From a step's state, through JSON, a fresh process draws exactly what follows."""
    batches = make(150)
    for _ in range(steps):
        state = json.loads(json.dumps(next(batches).state))
    resumed = make(150)
    resumed.state = state
    for _ in range(8):
        ours, theirs = next(batches), next(resumed)
        assert numbers(ours) == numbers(theirs) and sources(ours) == sources(theirs)
        assert ours.state == theirs.state


def test_unusable_records(make, mixed: Path, tmp_path: Path) -> None:
    """Without a list the first one stops the run; with one it is counted and listed, all others
    come once an epoch."""
    for picture in mixed.parent.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    lines = mixed.read_text().splitlines()
    lines[3:3] = ["no JSON", json.dumps({"text": MARK, "images": ["absent.png"]})]
    (tmp_path / "cut.png").write_bytes((mixed.parent / "0.png").read_bytes()[:200])
    lines.append(json.dumps({"text": MARK, "images": ["cut.png"]}))
    data, skipped = tmp_path / "data.jsonl", tmp_path / "skipped.jsonl"
    data.write_text("\n".join(lines) + "\n")

    batches = make(data=data)
    with pytest.raises(MocaError, match=r"data\.jsonl:(4|5|15)"):
        for _ in range(20):  # a picture that is cut short shows when it is decoded
            for part in next(batches).micro_batches:
                batches.processor.pack([record for _, record in part])

    batches, drawn = make(data=data, skipped=skipped), []
    while len(drawn) < 24:
        step = next(batches)
        drawn += sources(step)
    assert len(set(drawn[:12])) == len(set(drawn[12:24])) == 12
    listed = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [line["count"] for line in listed] == list(range(1, len(listed) + 1))
    for place in (4, 5, 15):
        assert any(f"data.jsonl:{place}: " in line["reason"] for line in listed[:3])
    assert step.state["skipped"] == len(listed)


def test_nothing_usable(make, tmp_path: Path) -> None:
    """If every record is unusable, skipping them ends in an error, not in a search without end."""
    data = tmp_path / "data.jsonl"
    data.write_text("no\nno\n")
    with pytest.raises(MocaError, match="no record"):
        next(make(data=data, skipped=tmp_path / "skipped.jsonl"))


@pytest.mark.parametrize("fields", [
    {"text": "a", "image": "x.png"}, {"text": f"{MARK}", "image": ["x.png"]}, {"image": "x.png"}])
def test_a_misspelt_key_loses_no_image(fields: dict) -> None:
    """It would be embedded as text alone."""
    with pytest.raises(MocaError, match='line 3: no "text", or "image" in place of "images"'):
        make_record(fields, Path("."), "line 3")
