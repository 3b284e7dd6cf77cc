"""Parquet and Arrow files of any size: what is read, in which order, and how little is held."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nano_moca import Moca, MocaError
from nano_moca.batches import PairBatches, StepRecords, TokenBatches, shuffle
from nano_moca.data import Joined, load_records, load_tasks, open_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from nano_moca.convert import sources, tables


def texts(count: int, name: str = "r") -> list[dict]:
    """Rows that say which they are."""
    return [{"text": f"{name} {number}"} for number in range(count)]


def write(path: Path, rows: list[dict], group: int = 1000, **how: object) -> Path:
    """A parquet file in row groups of one size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group, **how)
    return path


def write_arrow(path: Path, rows: list[dict], indexed: bool = False, batch: int = 3) -> Path:
    """An Arrow file: a stream, or one with an index."""
    table = pyarrow.Table.from_pylist(rows)
    kind = pyarrow.ipc.new_file if indexed else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as file, kind(file, table.schema) as writer:
        writer.write_table(table, batch)
    return path


def said(data: Path, **how: object) -> list[str]:
    """The texts of all records."""
    records = load_records(str(data), 0, **how)
    return [records[number].text for number in range(len(records))]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of three rows, so that small files have many."""
    monkeypatch.setattr(tables, "PIECE_ROWS", 3)


# --- what is read -------------------------------------------------------------------------------

@pytest.mark.parametrize("indexed", [False, True])
def test_arrow_files(tmp_path: Path, indexed: bool) -> None:
    """As `datasets` keeps them, and with an index; bytes and paths as in JSON lines."""
    rows = [{"text": f"r {n}", "images": [{"bytes": b"x" * (n + 1), "path": None}], "other": n}
            for n in range(10)]
    write_arrow(tmp_path / "d.arrow", rows, indexed)
    records = load_records(str(tmp_path), 0)
    for number in (7, 0, 9, 3):
        assert records[number].text == f"r {number}"
        assert records[number].images == [b"x" * (number + 1)]
        assert records[number].source.endswith(f"d.arrow row {number + 1}")
    rows = open_rows(tmp_path / "d.arrow")
    assert rows[4][0] == {"text": "r 4", "images": [{"bytes": b"xxxxx", "path": None}], "other": 4}


def test_many_arrow_files(tmp_path: Path) -> None:
    """More files than a process may open at once."""
    resource = pytest.importorskip("resource")
    for number in range(60):
        write_arrow(tmp_path / f"{number:03d}.arrow", texts(2, f"f{number}"))
        write(tmp_path / f"{number:03d}.parquet", texts(2, f"g{number}"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, before[1]))
    try:
        assert len({*said(tmp_path)}) == 240
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_columns_nobody_asked_for(tmp_path: Path) -> None:
    """Are not read, whatever they hold; one that was asked for is named with its row."""
    columns = {"when": pyarrow.array([10**13] * 4, pyarrow.timestamp("s")),
               "zone": pyarrow.array([1] * 4, pyarrow.timestamp("s", tz="Mars/Base")),
               "text": [f"r {n}" for n in range(4)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert said(tmp_path) == [f"r {n}" for n in range(4)]
    assert open_rows(tmp_path, columns=["text"])[2][0] == {"text": "r 2"}
    for column in ("when", "zone"):
        with pytest.raises(MocaError, match=r"a\.parquet row 3 cannot be read"):
            open_rows(tmp_path, columns=[column])[2]
    assert open_rows(tmp_path, columns=["no such"])[2][0] == {}


def test_values_python_cannot_hold(tmp_path: Path) -> None:
    """A text that is no UTF-8 costs its own row."""
    bad = pyarrow.array([b"fine", b"\xff\xfe", b"too"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    records = load_records(str(tmp_path), 0)
    assert [records[0].text, records[2].text] == ["fine", "too"]
    with pytest.raises(MocaError, match=r"row 2 cannot be read"):
        records[1]


def test_damaged_files(tmp_path: Path) -> None:
    """A broken footer is named at once, broken content with its row; one line each."""
    file = write(tmp_path / "a.parquet", texts(3000), 500, compression="zstd")
    content = bytearray(file.read_bytes())
    content[2000:2400] = bytes(400)
    file.write_bytes(content)
    records, bad = load_records(str(tmp_path), 0), 0
    for number in range(0, 3000, 50):
        try:
            assert records[number].text == f"r {number}"
        except MocaError as error:
            assert f"a.parquet row {number + 1} cannot be read" in str(error)
            bad += 1
    assert 0 < bad < 60
    for name in ("b.parquet", "b.arrow"):
        (tmp_path / name).write_bytes(b"ARROW1 PAR1 but no more")
        with pytest.raises(MocaError, match=name) as caught:
            open_rows(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("indexed", [False, True])
def test_offsets_that_lead_out_of_the_file(tmp_path: Path, indexed: bool) -> None:
    """Of a damaged Arrow file: its rows are named, and no memory of others is read."""
    file = write_arrow(tmp_path / "a.arrow", texts(20), indexed, 20)
    content = file.read_bytes()
    offsets = np.cumsum([0, *(len(row["text"]) for row in texts(20))]).astype("<i4").tobytes()
    assert content.count(offsets) == 1
    bad = np.frombuffer(offsets, "<i4").copy()
    bad[10:12] = 2**30, 2**31 - 1
    file.write_bytes(content.replace(offsets, bad.tobytes()))
    records = load_records(str(tmp_path), 0)
    assert records[3].text == "r 3" and records[15].text == "r 15"
    for number in (9, 10, 11):
        with pytest.raises(MocaError, match=f"a.arrow row {number + 1} cannot be read"):
            records[number]


def test_many_and_empty_row_groups(tmp_path: Path) -> None:
    """Ten thousand groups of a row cost seconds, in the order of training; groups of no row are
    nothing; and a file that was replaced by one of other groups is read anew."""
    write(tmp_path / "a.parquet", texts(10_000), 1)
    records = load_records(str(tmp_path), 0)
    order = shuffle(records, np.random.default_rng(0))
    assert sorted(order) == list(range(10_000))
    assert [records[int(n)].text for n in order[:2000]] == [f"r {n}" for n in order[:2000]]
    table = pyarrow.Table.from_pylist(texts(3))
    with parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table[:0], table[:2], table[:0], table[2:], table[:0]):
            writer.write_table(part)
    records = load_records(str(tmp_path), 0)
    assert sorted(shuffle(records, np.random.default_rng(0))) == [0, 1, 2]
    assert said(tmp_path) == ["r 0", "r 1", "r 2"]
    assert len(load_records(str(tmp_path), 0, cap=2)) == 2


def test_rows_in_any_order(tmp_path: Path, small_pieces: None) -> None:
    """Backwards, at random, and by turns from two files: the order costs time only."""
    for name, count in (("a", 25), ("b", 14)):
        write(tmp_path / f"{name}.parquet", texts(count, name), 8)
    write(tmp_path / "empty.parquet", texts(1))
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}),
                        tmp_path / "empty.parquet")
    expected = [row["text"] for row in texts(25, "a") + texts(14, "b")]
    records = load_records(str(tmp_path), 0)
    random = np.random.default_rng(0)
    for order in (range(39), range(38, -1, -1), random.permutation(39), [0, 38, 1, 37, 24, 25]):
        assert [records[int(n)].text for n in order] == [expected[n] for n in order]
    with pytest.raises(IndexError):
        records[39]


# --- in which order -----------------------------------------------------------------------------

@pytest.mark.parametrize("memory", [2**27, 500, 1])
def test_an_order_by_groups(tmp_path: Path, small_pieces: None, memory: int,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row once; another order for another seed; and each group is read once, whatever the
    memory."""
    monkeypatch.setattr(sources, "MEMORY", memory)
    for name in "abcdef":
        write(tmp_path / f"{name}.parquet", texts(50, name), 10)
    records = load_records(str(tmp_path), 0)
    order = shuffle(records, np.random.default_rng(0))
    assert sorted(order) == list(range(300)) and order.dtype == np.int64
    assert not np.array_equal(order, shuffle(records, np.random.default_rng(1)))
    assert np.array_equal(order, shuffle(records, np.random.default_rng(0)))

    # a piece is read once: its rows all come before those of the next piece of its group
    place = np.empty(300, int)
    place[order] = np.arange(300)
    for start in range(0, 300, 10):
        for piece in range(start, start + 9, 3):
            rest = place[piece + 3 : start + 10]
            assert place[piece : piece + 3].max() < rest.min()
    groups_at_once = [len({*order[start : start + 24] // 10}) for start in range(0, 300, 24)]
    assert memory < 2**27 or max(groups_at_once) > 4, "hardly a shuffle"
    starts, start = [], tables.ParquetRows.open_group
    monkeypatch.setattr(tables.ParquetRows, "open_group",
                        lambda *which: starts.append(which) or start(*which))
    for number in order:
        records[int(number)]
    assert len(starts) == 30, "a group was read twice"


def test_lines_beside_tables(tmp_path: Path, small_pieces: None) -> None:
    """JSON lines and Arrow alone are permuted as ever; beside parquet all come once."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(2500)))
    write_arrow(tmp_path / "b.arrow", texts(5, "arrow"))
    records = load_records(str(tmp_path), 0)
    expected = np.random.default_rng(3).permutation(2505)
    assert np.array_equal(shuffle(records, np.random.default_rng(3)), expected)
    write(tmp_path / "c.parquet", texts(40, "p"), 8)
    records = load_records(str(tmp_path), 0)
    assert sorted(shuffle(records, np.random.default_rng(3))) == list(range(2545))


def drawn_from(step: StepRecords) -> list[tuple[int, str]]:
    """The numbers and sources of a step's records."""
    return sorted((number, record.source) for part in step.micro_batches
                  for number, record in part)


def test_ranks_and_resuming(tmp_path: Path, moca: Moca, small_pieces: None) -> None:
    """Two ranks share what one draws; from any state a fresh process goes on with the same."""
    for name in "abc":
        write(tmp_path / f"{name}.parquet", texts(21, name), 7)

    def batches(*ranks: int) -> TokenBatches:
        return TokenBatches(load_records(str(tmp_path), 0), moca.processor, 60, 64, 0, *ranks)

    one, pair = batches(), [batches(0, 2), batches(1, 2)]
    states = []
    for _ in range(14):  # more than an epoch
        step, shares = next(one), [next(rank) for rank in pair]
        assert drawn_from(step) == sorted(drawn_from(shares[0]) + drawn_from(shares[1]))
        states.append(json.loads(json.dumps(step.state)))
    assert states[-1]["epoch"] >= 1
    for place in (0, 3, 8):
        resumed = batches()
        resumed.state = states[place]
        for later in states[place + 1 :]:
            assert next(resumed).state == later


def test_pairs_in_groups(tmp_path: Path, moca: Moca, small_pieces: None) -> None:
    """Stage 2's pairs in parquet: each once a pass, and the same for all ranks."""
    rows = [{"task": "ab"[n % 2], "kind": "text-only", "query": {"text": f"q{n}"},
             "positive": {"text": f"p{n}"}, "negatives": []} for n in range(48)]
    write(tmp_path / "p.parquet", rows, 9)
    tasks = load_tasks(str(tmp_path), 0)
    batches = PairBatches(tasks, moca.processor, 4, 64, 2, 0)
    for name in "ab":
        drawn = sum((batches.members(name, number) for number in range(6)), [])
        assert sorted(drawn) == list(range(24))
    mixed = PairBatches({"mixed": Joined(tasks.values())}, moca.processor, 4, 64, 2, 0)
    drawn = sum((mixed.members("mixed", number) for number in range(12)), [])
    assert sorted(drawn) == list(range(48))


# --- samples ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_a_sample_of_each_source(tmp_path: Path, small_pieces: None, kind: str) -> None:
    """At most so many of each, other ones by another seed, in the order of the file."""
    for name, count in (("a", 40), ("b", 5), ("c", 90)):
        rows = texts(count, name)
        if kind == "jsonl":
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        elif kind == "arrow":
            write_arrow(tmp_path / f"{name}.arrow", rows)
        else:
            write(tmp_path / f"{name}.parquet", rows, 8)
    data = ",".join(str(tmp_path / f"{name}.{kind}") for name in "abc")
    records = load_records(data, 0, cap=20)
    drawn = [records[n].text for n in range(len(records))]
    assert [sum(text[0] == name for text in drawn) for name in "abc"] == [20, 5, 20]
    assert len({*drawn}) == 45
    numbers = [int(text.split()[1]) for text in drawn[:20]]
    assert numbers == sorted(numbers) and numbers != list(range(20))
    again, other = load_records(data, 0, cap=20), load_records(data, 1, cap=20)
    assert drawn == [again[n].text for n in range(45)] != [other[n].text for n in range(45)]
    assert sorted(shuffle(records, np.random.default_rng(0))) == list(range(45))
    assert len(load_records(data, 0)) == len(load_records(data, 0, cap=10**9)) == 135
    if kind == "parquet":  # few groups have to be read
        assert len({number // 8 for number in numbers}) <= 4


# --- memory -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dictionary", [True, False])
def test_a_huge_row_group(tmp_path: Path, dictionary: bool) -> None:
    """One row group of 800 MB in a small file is read in pieces, and never held whole."""
    image = b"IMAGE" + np.random.default_rng(0).bytes(100_000)
    table = pyarrow.table({"text": ["t"] * 1000, "images": pyarrow.array(
        [[image]] * 1000, pyarrow.list_(pyarrow.binary()))})
    how = {} if dictionary else {"use_dictionary": False, "data_page_size": 2**23}
    with parquet.ParquetWriter(tmp_path / "a.parquet", table.schema, compression="zstd",
                               **how) as writer:
        writer.write_table(pyarrow.concat_tables([table] * 8), 8_000)
    assert (tmp_path / "a.parquet").stat().st_size < 2**24
    held = pyarrow.total_allocated_bytes()
    records = load_records(str(tmp_path), 0)
    assert len(records) == 8_000 and pyarrow.total_allocated_bytes() - held < 2**20
    for number in (0, 1023, 1024, 3000, 2500, 7000):
        assert records[number].images[0][:5] == b"IMAGE"
    assert pyarrow.total_allocated_bytes() - held < 2**28


def test_more_than_the_memory(tmp_path: Path) -> None:
    """Values so long that some rows of them are too many: one line that names the row."""
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(1000, np.int32)), pyarrow.array(["a" * 2**22]))
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet",
                        store_schema=False)
    code = f"""
import resource
from nano_moca.data import load_records
from nano_moca import MocaError
records = load_records({str(tmp_path)!r}, 0)
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
try:
    records[5]
except MocaError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "a.parquet row 6 cannot be read" in done.stdout and done.stdout.count("\n") == 1, done
