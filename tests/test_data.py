"""Records from files, and how a step's records are drawn and divided: the promises of data.py and
of stage 1's part of batches.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from nano_moca import MARK, Moca, MocaError, Record
from nano_moca.batches import StepRecords, TokenBatches, balance
from nano_moca.data import JsonLines, load_records, open_rows

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
    ('{"text": 5}', 'no "text"'),
    ('{"images": []}', 'no "text"'),
    ('{"text": "a", "images": "a.png"}', "not a list"),
    ('{"text": "a", "images": [5]}', "neither path nor bytes"),
    ('{"text": "a", "images": [{"path": null}]}', "neither path nor bytes"),
    ('{"text": "a", "images": ["../a.png"]}', "outside"),
    ('{"text": "a", "images": ["/etc/passwd"]}', "outside"),
])
def test_lines_that_are_no_record(tmp_path: Path, line: str, words: str) -> None:
    """Each is an error that names file and line and says what is wrong."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    records = load_records(str(tmp_path / "a.jsonl"), 0)
    assert records[0].text == "fine"
    with pytest.raises(MocaError, match=words) as caught:
        records[1]
    assert "a.jsonl:2: " in str(caught.value) and "\n" not in str(caught.value)


def test_link_that_leaves_the_folder(tmp_path: Path, golden: Path) -> None:
    """A symbolic link does not lead an image path out of the data's folder either."""
    (tmp_path / "out").symlink_to(golden / "images")
    write_lines(tmp_path / "a.jsonl", [{"text": MARK, "images": ["out/0-rgb-84x84.png"]}])
    with pytest.raises(MocaError, match="outside"):
        load_records(str(tmp_path / "a.jsonl"), 0)[0]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A line that is not UTF-8 is named; the lines around it are read."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n{"text": "c"}\n')
    lines = JsonLines(tmp_path / "a.jsonl")
    assert [lines[0][0], lines[2][0]] == [{"text": "a"}, {"text": "c"}]
    with pytest.raises(MocaError, match="a.jsonl:2"):
        lines[1]


# --- dividing -----------------------------------------------------------------------------------

def test_balance() -> None:
    """Every item goes to one share, and shares differ by no more than the costliest item."""
    random = np.random.default_rng(0)
    for parts in (1, 2, 3, 8):
        for _ in range(20):
            costs = random.integers(1, 200, random.integers(parts, 40)).tolist()
            shares = balance(costs, parts)
            assert sorted(item for share in shares for item in share) == list(range(len(costs)))
            totals = [sum(costs[item] for item in share) for share in shares]
            assert len(shares) == parts and min(totals) > 0
            assert max(totals) - min(totals) <= max(costs)


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
