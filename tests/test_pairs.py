"""Stage 2's data: pairs from files, and the plan of batches of one task (batches.py)."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nano_moca import MARK, Moca, MocaError, Record
from nano_moca.batch import KINDS, Pair
from nano_moca.batches import PairBatches, excluded_candidates
from nano_moca.data import load_tasks, record_key


def line(task: str = "find", kind: str = "text-only", query: object = None,
         positive: object = None, **more: object) -> dict:
    """A line of stage 2's data."""
    query, positive = query or {"text": "a question"}, positive or {"text": "an answer"}
    return {"task": task, "kind": kind, "query": query, "positive": positive, **more}


def write(path: Path, lines: list) -> Path:
    """A JSON lines file; a text is a line as it is."""
    texts = (text if isinstance(text, str) else json.dumps(text) for text in lines)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def pairs(name: str, count: int, negatives: int = 0) -> list[Pair]:
    """Pairs of texts that say which they are."""
    return [Pair(Record(f"{name} {i}?"), Record(f"{name} {i}."),
                 [Record(f"{name} {i} not {k}") for k in range(negatives)]) for i in range(count)]


@pytest.fixture
def batches(moca: Moca) -> Callable[..., PairBatches]:
    """PairBatches over named tasks: batches({name: size}, batch=, ...)."""

    def batches(sizes: dict[str, int], batch: int = 4, negatives: int = 0, hard: int = 2,
                **more: object) -> PairBatches:
        tasks = {name: pairs(name, size, negatives) for name, size in sizes.items()}
        return PairBatches(tasks, moca.processor, batch, 64, hard, **{"seed": 0, **more})

    return batches


def texts(moca: Moca, items: list) -> list[str]:
    """What encoded records say."""
    return [moca.processor.tokenizer.decode(item.tokens.tolist()) for item in items]


# --- files --------------------------------------------------------------------------------------

def test_a_file_says_its_tasks(tmp_path: Path) -> None:
    """Lines fall into tasks by name, in order, with images relative to the file; parquet too."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    picture = {"text": MARK, "images": ["a.png"]}
    lines = [line("one", query={"text": f"q{i}"}) for i in range(3)]
    lines += [line("two", "image-text", picture, negatives=[{"text": "no"}, picture])]
    write(tmp_path / "data.jsonl", lines)
    tasks = load_tasks(str(tmp_path), 0)
    assert {name: (len(task), task.kind) for name, task in tasks.items()} == {
        "one": (3, "text-only"), "two": (1, "image-text")}
    assert [pair.query.text for pair in tasks["one"]] == ["q0", "q1", "q2"]
    pair = tasks["two"][0]
    assert pair.query.images == [tmp_path / "a.png"] == pair.negatives[1].images
    assert pair.query.source.endswith("data.jsonl:4 query")

    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "parquet").mkdir()
    inside = [{**each, "negatives": each.get("negatives", [])} for each in lines[:3]]
    parquet.write_table(arrow.Table.from_pylist(inside), tmp_path / "parquet" / "data.parquet")
    tasks = load_tasks(str(tmp_path / "parquet"), 0)
    assert [pair.query.text for pair in tasks["one"]] == ["q0", "q1", "q2"]


@pytest.mark.parametrize(("bad", "says"), [
    ("{not json", "not JSON"), ("[1]", '"task"'), (line(task=3), '"task"'),
    (line(kind="images"), "long-document"), ({"query": {"text": "a"}}, '"task"'),
    (line("good", "image-text"), "task good is image-text here and text-only before"),
])
def test_lines_without_a_task(tmp_path: Path, bad: object, says: str) -> None:
    """Named with file and line when the file is opened; or listed, and the others used."""
    path = write(tmp_path / "data.jsonl", [line("good"), bad, line("good")])
    with pytest.raises(MocaError, match="data.jsonl:2") as caught:
        load_tasks(str(path), 0)
    assert says in str(caught.value)
    unusable: list[MocaError] = []
    assert len(load_tasks(str(path), 0, unusable)["good"]) == 2
    assert len(unusable) == 1 and "data.jsonl:2" in str(unusable[0])


@pytest.mark.parametrize(("bad", "says"), [
    (line(query="text"), "2 query"), (line(positive={"images": []}), "2 positive"),
    (line(negatives={"text": "a"}), "negatives"), (line(negatives=0), "negatives"),
    (line(negatives=""), "negatives"), (line(negatives={}), "negatives"),
    (line(negatives=["a"]), "2 negative 1"),
    (line(query={"text": "a", "images": ["../a.png"]}), "outside"),
    (line(query={"text": MARK, "images": ["none.png"]}), "none.png"),
    (line(positive={"text": " "}), "empty"), (line(positive={"text": MARK}), "1 image marks"),
])
def test_pairs_that_cannot_be_used(tmp_path: Path, moca: Moca, bad: dict, says: str) -> None:
    """The first stops the run and is named; with a file to list them in, the others are used."""
    path = write(tmp_path / "data.jsonl", [line(), bad, line(query={"text": "third"})])
    with pytest.raises(MocaError, match="data.jsonl:2") as caught:
        next(PairBatches(load_tasks(str(path), 0), moca.processor, 3, 64, 2, 0))
    assert says in str(caught.value)
    listed = tmp_path / "skipped.jsonl"
    tasks = load_tasks(str(path), 0)
    drawn = next(PairBatches(tasks, moca.processor, 3, 64, 2, 0, skipped=listed))
    assert drawn.batch == 2 and drawn.state["skipped"] == 1
    (reason,) = map(json.loads, listed.read_text().splitlines())
    assert says in reason["reason"] and reason["count"] == 1


def test_nothing_can_be_used(tmp_path: Path, moca: Moca) -> None:
    """An epoch without a usable pair ends in an error, not in an endless search."""
    path = write(tmp_path / "data.jsonl", [line(query={"text": " "})] * 4)
    batches = PairBatches(load_tasks(str(path), 0), moca.processor, 2, 64, 2, 0,
                          skipped=tmp_path / "skipped.jsonl")
    with pytest.raises(MocaError, match="no pair"):
        next(batches)


# --- the plan -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_has_each_pair_once(batches: Callable, seed: int) -> None:
    """Random sizes of tasks and batches: in each epoch no pair twice, none left out but a last
    partial batch of its task, which is another in the next epoch; tasks in proportion."""
    random = np.random.default_rng(seed)
    batch = int(random.integers(2, 9))
    sizes = {f"t{i}": int(random.integers(batch, 60)) for i in range(random.integers(1, 6))}
    plan = batches(sizes, batch, seed=seed)
    left_out = []
    for epoch in range(3):
        drawn: dict[str, list[int]] = {name: [] for name in sizes}
        for name, number in plan.plan(epoch):
            members = plan.members(name, number)
            assert len(members) == batch
            drawn[name] += members
        for name, size in sizes.items():
            assert len(drawn[name]) == len({*drawn[name]}) == size // batch * batch
            assert {*drawn[name]} <= {*range(size)}
        left_out.append([sorted({*range(size)} - {*drawn[name]}) for name, size in sizes.items()])
    orders = [[name for name, _ in plan.plan(epoch)] for epoch in range(3)]
    if len(sizes) > 1 and len(orders[0]) > 12:
        assert orders[0] != orders[1], "tasks follow each other alike in every epoch"
    if all(size % batch and size > 3 * batch for size in sizes.values()):
        assert left_out[0] != left_out[1] or left_out[1] != left_out[2]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_tasks_in_proportion_to_a_power_of_their_size(batches: Callable, alpha: float, seed: int
                                                      ) -> None:
    """A task's steps are size^alpha of all, to one step; and however often a task's turn comes, no
    pair comes a second time before all (but for a partial batch) came once."""
    random = np.random.default_rng((seed, 1))
    sizes = {f"t{i}": 4 * int(random.integers(1, 40)) for i in range(random.integers(2, 6))}
    plan = batches(sizes, 4, alpha=alpha, seed=seed)
    weights = {name: (size // 4) ** alpha for name, size in sizes.items()}
    taken: Counter = Counter()
    drawn: dict[str, list[int]] = {name: [] for name in sizes}
    for epoch in range(4):
        steps = plan.plan(epoch)
        assert len(steps) == sum(sizes.values()) // 4
        counts = Counter(name for name, _ in steps)
        for name, weight in weights.items():
            share = len(steps) * weight / sum(weights.values())
            assert abs(counts[name] - share) < 1
        for name, number in sorted(steps, key=lambda step: step[1]):
            assert number == taken[name], "a batch of a task is skipped or comes twice"
            taken[name] += 1
            drawn[name] += plan.members(name, number)
    for name, size in sizes.items():
        for turn in range(len(drawn[name]) // size):
            assert len({*drawn[name][turn * size : (turn + 1) * size]}) == size


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_divide_a_step(batches: Callable, moca: Moca, world: int) -> None:
    """All ranks take part in the same batch of one task; together they have each pair once."""
    sizes = {"a": 20, "b": 30}
    one = batches(sizes, 7, negatives=2)
    ranks = [batches(sizes, 7, negatives=2, rank=r, world_size=world) for r in range(world)]
    for _ in range(8):
        alone, parts = next(one), [next(rank) for rank in ranks]
        assert {part.task for part in parts} == {alone.task}
        assert {part.batch for part in parts} == {7} and {part.tokens for part in parts} == {
            alone.tokens}
        assert sorted(sum((part.local_index.tolist() for part in parts), [])) == list(range(7))
        for part in parts:
            for i, pair in enumerate(part.local_index.tolist()):  # the same pairs as alone
                for offset, other in ((0, 0), (len(part.local_index), 7)):
                    assert np.array_equal(part.records[offset + i].tokens,
                                          alone.records[other + pair].tokens)
        assert alone.state == parts[0].state
        said = texts(moca, alone.records)
        assert all(text.startswith(alone.task) for text in said), "a batch mixes tasks"


def test_a_plan_resumes(batches: Callable) -> None:
    """From a state, the steps that would have come."""
    first, second = batches({"a": 9, "b": 21}), batches({"a": 9, "b": 21})
    for _ in range(9):
        drawn = next(first)
    second.state = drawn.state
    for _ in range(5):
        one, two = next(first), next(second)
        assert one.task == two.task and one.state == two.state
        assert all(np.array_equal(a.tokens, b.tokens)
                   for a, b in zip(one.records, two.records, strict=True))


def test_a_task_smaller_than_a_batch(batches: Callable) -> None:
    """It would never come: an error that names it."""
    with pytest.raises(MocaError, match="task small has 3 pairs"):
        batches({"large": 20, "small": 3})


def test_hard_negatives_take_turns(batches: Callable, moca: Moca) -> None:
    """At most as many as asked for; each of a pair's comes in some pass; none when 0."""
    plan, turns = batches({"a": 4}, negatives=3, hard=2), Counter()
    for _ in range(3):
        drawn = next(plan)
        assert len(drawn.records) == 4 + 4 + 8
        turns.update(texts(moca, drawn.records[8:]))
    assert len(turns) == 12 and {*turns.values()} == {2}
    assert len(next(batches({"a": 4}, negatives=1, hard=2)).records) == 4 + 4 + 4
    assert len(next(batches({"a": 4}, negatives=3, hard=0)).records) == 8


# --- candidates that are excluded ---------------------------------------------------------------

def test_equal_positives_are_no_negatives(moca: Moca) -> None:
    """Equal in text and image; and a hard negative counts for its own query only, unless it is the
    positive itself."""
    red, green = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (56, 56), "green")
    answers = [Record("yes", [], "1"), Record("no", [], "2"), Record("yes", [], "3"),
               Record(MARK, [red]), Record(MARK, [green]), Record(MARK, [red.copy()])]
    hard = [[Record("yes"), Record("other")], [], [Record("no")], [], [Record(MARK, [red])], []]
    task = [Pair(Record(f"{i}?"), answer, near)
            for i, (answer, near) in enumerate(zip(answers, hard, strict=True))]
    drawn = next(PairBatches({"a": task}, moca.processor, 6, 64, 2, 0))
    order = [int(text[0]) for text in texts(moca, drawn.records[:6])]  # the pair at each place
    assert [order[i] for i in drawn.local_index.tolist()] == order
    alike = {(0, 2), (2, 0), (3, 5), (5, 3)}
    owners = [(pair, near) for pair in order for near in hard[pair]]
    for row, query in enumerate(order):
        for column, pair in enumerate(order):
            assert drawn.excluded[row, column] == ((query, pair) in alike)
        for column, (pair, near) in enumerate(owners, 6):
            allowed = pair == query and record_key(near) != record_key(answers[query])
            assert drawn.excluded[row, column] == (not allowed)
    assert drawn.excluded.shape == (6, 6 + 4) and drawn.excluded.dtype == torch.bool


def test_answers_of_the_same_query_are_no_negatives(moca: Moca) -> None:
    """One image, several captions: no right answer of a query is its negative, be it another pair's
    positive, the positive of a pair with another query, or a hard negative of its own."""
    red, green = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (56, 56), "green")
    given = [  # (query, positive, hard negatives)
        (red, "a red thing", ["a warm square", "a cold square"]), (red.copy(), "a warm square", []),
        (green, "a green thing", ["a red thing"]), (green, "a warm square", ["a green thing"]),
        (red, "a red thing", ["no"])]
    task = [Pair(Record(MARK, [query]), Record(positive), list(map(Record, near)))
            for query, positive, near in given]
    excluded = excluded_candidates(task, [*range(5)]).tolist()
    right = {0: {0, 1, 4}, 1: {0, 1, 4}, 4: {0, 1, 4}, 2: {2, 3}, 3: {2, 3}}  # pairs of each query
    for own in range(5):
        answers = {given[pair][1] for pair in right[own]}
        for other in range(5):
            compared = other == own or given[other][1] not in answers
            assert excluded[own][other] != compared, (own, other)
        owners = [(pair, near) for pair, (_, _, hard) in enumerate(given) for near in hard]
        for column, (pair, near) in enumerate(owners, 5):
            assert excluded[own][column] != (pair == own and near not in answers), (own, near)

    # a rank with some of the pairs leaves out the same
    some = excluded_candidates(task, [3, 1]).tolist()
    assert [row[:5] for row in some] == [excluded[3][:5], excluded[1][:5]]


def test_a_sample_of_each_task(tmp_path: Path) -> None:
    """--cap: at most so many pairs of each task over all sources, by the seed."""
    rows = [line("large", query={"text": f"q{n}"}) for n in range(40)]
    rows += [line("small", "image-text", query={"text": f"s{n}"}) for n in range(3)]
    first = write(tmp_path / "a.jsonl", rows)
    second = write(tmp_path / "b.jsonl", [line("large", query={"text": f"z{n}"}) for n in range(9)])

    def drawn(seed: int) -> dict[str, list[str]]:
        tasks = load_tasks(f"{first},{second}", seed, cap=10)
        assert {name: task.kind for name, task in tasks.items()} == {
            "large": "text-only", "small": "image-text"}
        return {name: [pair.query.text for pair in task] for name, task in tasks.items()}

    tasks = drawn(0)
    assert len({*tasks["large"]}) == 10 and tasks["small"] == ["s0", "s1", "s2"]
    assert tasks == drawn(0) != drawn(1)
    assert any(text[0] == "z" for seed in range(5) for text in drawn(seed)["large"])
    assert {name: len(task) for name, task in load_tasks(f"{first},{second}", 0).items()} == {
        "large": 49, "small": 3}


def test_a_checkpoint_knows_its_pairs(tmp_path: Path, moca: Moca) -> None:
    """The state has the fingerprint of the files."""
    marks = []
    for word in ("good", "well"):
        path = write(tmp_path / "a.jsonl", [line(query={"text": word})] * 4)
        batches = PairBatches(load_tasks(str(path), 0), moca.processor, 2, 64, 2, 0)
        marks.append(next(batches).state["fingerprint"])
    assert marks[0] != marks[1] and len(marks[0]) == 64


def test_kinds() -> None:
    """The three of the paper."""
    assert KINDS == ("long-document", "image-text", "text-only")
