"""How a step comes to the model: divided by cost, decoded once and beside the model, cut into
chunks; and what cannot be decoded, on whichever rank."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import train_cl
import train_cpt
from nano_moca import MARK, Moca, MocaError, Record
from nano_moca.batch import Pair
from nano_moca.batches import PairBatches, TokenBatches, balance, cut, prefetch
from nano_moca.config import BASE, Config
from nano_moca.convert.configs import parse_config
from nano_moca.data import load_records, load_tasks
from nano_moca.distributed import World
from nano_moca.processor import Processor
from nano_moca.weights import empty_model

CPU = World(0, 1, torch.device("cpu"), torch.float32)  # steps are sent there
TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
         "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
DECODERS = {
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 2},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4}}


def real_config(size: str) -> Config:
    """The shape of Qwen2.5-VL-3B or 7B."""
    nano = json.loads((BASE / "config.json").read_text())
    decoder = DECODERS[size]
    sections = {"type": "mrope", "mrope_section": [16, 24, 24]}
    vision = nano["vision_config"] | TOWER | {"out_hidden_size": decoder["hidden_size"]}
    return parse_config(nano | decoder | {"rope_scaling": sections, "vision_config": vision})


def weights_of(module: torch.nn.Module) -> int:
    """How many it has."""
    return sum(parameter.numel() for parameter in module.parameters())


@lru_cache
def sizes_of(size: str) -> tuple[int, int, int]:
    """The weights of a real model's decoder layers, of its vision tower's blocks, its merger."""
    model = empty_model(real_config(size))
    return (weights_of(model.language.layers), weights_of(model.visual.blocks),
            weights_of(model.visual.merger))


# --- cost -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", ["3B", "7B", "nano", "qwen2-vl"])
def test_an_image_token_costs_what_both_towers_hold(size: str, golden: Path) -> None:
    """Counted on the models themselves: the decoder's layers for each token, the vision tower's
    blocks for each of four patches. Biases and norms, which the formula leaves out, are small: of
    the golden model, which is 64 wide, 2%."""
    if size in DECODERS:
        config = real_config(size)
    else:
        folder = BASE if size == "nano" else golden / size
        config = parse_config(json.loads((folder / "config.json").read_text()))
    model = empty_model(config)
    counted = 1 + 4 * weights_of(model.visual.blocks) / weights_of(model.language.layers)
    assert config.image_token_cost == pytest.approx(counted, rel=0.02)


def test_the_cost_of_a_record(moca: Moca) -> None:
    """A text costs its tokens, an image token as much more as the config says."""
    processor = moca.processor
    text = processor.encode(Record("some words and some more"))
    assert text.cost == len(text.tokens)
    picture = processor.encode(Record(f"{MARK} a picture", [Image.new("RGB", (112, 84))]))
    more = processor.config.image_token_cost - 1
    assert picture.cost == len(picture.tokens) + int(12 * more) > len(picture.tokens)


def flops(size: str, text: int, image: int) -> float:
    """Of a record of `text` words and an image of `image` tokens, forward, from the models' sizes:
    products with weights, and scores and sums of attention, which grow with the square."""
    layers, blocks, merger = sizes_of(size)
    width, depth = {"3B": (2048, 36), "7B": (3584, 28)}[size]
    length, patches = text + image, 4 * image
    decoder = 2 * layers * length + 4 * depth * width * length**2
    attended = 4 * patches + 28 * min(64, patches)  # four blocks see all, the others a window
    return decoder + 2 * blocks * patches + 4 * 1280 * patches * attended + 2 * merger * image


def roofline(size: str, text: int, image: int) -> float:
    """Milliseconds of 3B on an H100, computed from each operation's work and bytes, and with
    elementwise work fused: 125 for 2,880 words; 291 for 186 words and images of 2,997 tokens."""
    word = 125 / 2880
    return word * text + (291 - 186 * word) / 2997 * image


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.7, 1])
@pytest.mark.parametrize(("size", "time"), [("3B", flops), ("7B", flops), ("3B", roofline)])
def test_ranks_are_balanced(size: str, time: Callable, share: float) -> None:
    """Eight ranks, four micro-batches: each takes as long as its slowest rank. At least 95% of the
    ranks' time is used, whatever share of the records has an image."""
    config = real_config(size)
    random = np.random.default_rng(0)
    used = taken = 0.0
    for _ in range(12):
        records: list[tuple[int, int]] = []  # (words, image tokens)
        tokens = 0
        while tokens < 100_000:
            if random.random() < share:
                records.append((int(random.integers(30, 250)), int(random.integers(256, 1024))))
            else:
                records.append((int(min(1280, random.lognormal(6.3, 0.8))), 0))
            tokens += sum(records[-1])
        costs = [text + image + int(image * (config.image_token_cost - 1))
                 for text, image in records]
        shares = balance(costs, 32)
        for micro_batch in range(4):
            times = [sum(time(size, *records[item]) for item in shares[rank::8][micro_batch])
                     for rank in range(8)]
            used += sum(times)
            taken += 8 * max(times)
    assert used / taken >= 0.95


def test_both_stages_divide_by_cost(moca: Moca, mixed: Path, monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
    """If an image token costs a hundred, the ranks' shares differ by no more than one record (or
    pair) does, and by tokens they would not."""
    monkeypatch.setattr(Config, "image_token_cost", 100.0)
    records = load_records(str(mixed), 0)
    ranks = [TokenBatches(records, moca.processor, 300, 1280, 0, rank, 2) for rank in range(2)]
    task = [Pair(record, Record(f"answer {number}"), []) for number, record in enumerate(records)]
    pair_ranks = [PairBatches({"a": task}, moca.processor, 6, 64, 2, 0, rank=rank, world_size=2)
                  for rank in range(2)]
    lopsided = 0
    for _ in range(6):
        shares = [[[record] for _, record in next(rank).micro_batches[0]] for rank in ranks]
        pairs = [next(rank) for rank in pair_ranks]
        pair_shares = [list(zip(step.records[: len(step.local_index)],
                                step.records[len(step.local_index) :], strict=True))
                       for step in pairs]
        for divided in (shares, pair_shares):
            costs = [[sum(record.cost for record in item) for item in share] for share in divided]
            assert abs(sum(costs[0]) - sum(costs[1])) <= max(max(costs[0]), max(costs[1]))
            tokens = [sum(len(record.tokens) for item in share for record in item)
                      for share in divided]
            longest = max(len(record.tokens) for share in divided for item in share
                          for record in item)
            lopsided += abs(tokens[0] - tokens[1]) > longest
    assert lopsided, "the same data are as well divided by tokens: the test sees nothing"


# --- chunks ---------------------------------------------------------------------------------------

def words(moca: Moca, *counts: int) -> list:
    """Encoded records of so many tokens."""
    encoded = [moca.processor.encode(Record("a " * 3000), count) for count in counts]
    assert [len(record.tokens) for record in encoded] == list(counts)
    return encoded


@pytest.mark.parametrize(("budget", "sizes"), [
    (0, [6]), (1000, [6]), (141, [6]), (140, [5, 1]), (50, [3, 1, 2]), (30, [2, 1, 1, 1, 1]),
    (1, [1] * 6)])
def test_chunks_hold_tokens(moca: Moca, budget: int, sizes: list[int]) -> None:
    """In order, as many as the budget holds; one at least, which may be longer."""
    records = words(moca, 10, 20, 20, 60, 30, 1)
    chunks = cut(records, budget)
    assert [len(chunk) for chunk in chunks] == sizes
    assert sum(chunks, []) == records
    assert cut([], budget) == [[]]


def test_short_texts_need_few_chunks(moca: Moca) -> None:
    """96 records of 50 tokens are one chunk of 8,192 tokens, or two of 2,500."""
    records = words(moca, 50) * 96
    assert len(cut(records, 8192)) == 1
    assert [len(chunk) for chunk in cut(records, 2500)] == [50, 46]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [0, 1, 12, 40])
def test_ranks_have_equally_many_chunks(moca: Moca, world: int, chunk: int) -> None:
    """All cache or none does; together the chunks are the rank's records in order, and where a rank
    has none left, a filler is embedded."""
    random = np.random.default_rng(0)
    task = [Pair(Record("why " * int(random.integers(1, 9))),
                 Record("so " * int(random.integers(1, 30))),
                 [Record("no")] * int(random.integers(0, 3))) for _ in range(30)]
    ranks = [PairBatches({"a": task}, moca.processor, 4, 64, 2, 0, chunk=chunk, rank=rank,
                         world_size=world) for rank in range(world)]
    loaders = [train_cl.packed_steps(rank, moca.processor, CPU) for rank in ranks]
    for _ in range(5):
        steps = [next(loader) for loader in loaders]
        assert len({len(packed) for _, packed in steps}) == 1
        for drawn, packed in steps:
            assert sum(drawn.chunks, []) == drawn.records
            for records, batch in zip(drawn.chunks, packed, strict=True):
                lengths = tuple(len(record.tokens) for record in records)
                assert batch.lengths == (lengths or (len(drawn.filler.tokens),))
                assert not chunk or sum(lengths) <= chunk or len(lengths) == 1


# --- decoding -------------------------------------------------------------------------------------

@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each image was decoded, by its path."""
    counts: Counter = Counter()
    lock = threading.Lock()
    real = Processor.patchify

    def patchify(self: Processor, image: Path, source: str) -> object:
        with lock:
            counts[Path(image).name] += 1
        return real(self, image, source)

    monkeypatch.setattr(Processor, "patchify", patchify)
    return counts


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_image_is_decoded_once(moca: Moca, mixed: Path, decoded: Counter, world: int) -> None:
    """In an epoch of twelve records with eight pictures each is decoded by one rank, once, by the
    threads; packing decodes nothing again, and keeps no patches beside the batch."""
    records = load_records(str(mixed), 0)
    flags = train_cpt.Flags()
    accumulate = 12 // world  # so that a step is an epoch: a record for each micro-batch
    steps = [next(TokenBatches(records, moca.processor, 1, 1280, 0, rank, world, accumulate))
             for rank in range(world)]
    assert len(decoded) == 8 and {*decoded.values()} == {1}
    for step in steps:
        for _, packed in train_cpt.masked_steps(iter([step]), moca.processor, flags, CPU):
            assert len(packed) == accumulate
        assert all(record.patches is None for part in step.micro_batches for _, record in part)
    assert {*decoded.values()} == {1}


def test_a_gradient_cache_decodes_once(golden: Path, mixed: Path, tmp_path: Path,
                                       decoded: Counter) -> None:
    """Each chunk is embedded twice and packed once; and after the last step nothing is drawn."""
    lines = []
    for number, line in enumerate(mixed.read_text().splitlines()):
        query = json.loads(line)
        if query.get("images"):
            query["images"] = [str(name) for name in query["images"]]
            lines.append({"task": "a", "kind": "image-text", "query": query,
                          "positive": {"text": f"answer {number}"}})
            (tmp_path / query["images"][0]).write_bytes(
                (mixed.parent / query["images"][0]).read_bytes())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--model", str(golden / "qwen2.5-vl"), "--data", str(tmp_path / "pairs.jsonl"),
             "--output", str(tmp_path / "run"), "--device", "cpu", "--batch", "4", "--steps", "4",
             "--chunk", "20", "--no-report"]
    train_cl.train(train_cl.parse_flags(train_cl.Flags, flags, ""))
    assert len(decoded) == 8 and {*decoded.values()} == {2}  # two epochs of two steps


def test_the_number_of_threads_changes_nothing(moca: Moca, mixed: Path) -> None:
    """One thread or eight: the same batches, to the bit."""
    flags = train_cpt.Flags()
    runs = []
    for threads in (1, 8):
        drawn = TokenBatches(load_records(str(mixed), 0), moca.processor, 300, 1280, 0)
        drawn.threads = ThreadPoolExecutor(threads)
        runs.append(train_cpt.masked_steps(drawn, moca.processor, flags, CPU))
    for _ in range(5):
        (one, (ours,)), (eight, (theirs,)) = map(next, runs)
        assert one.state == eight.state and ours.batch.sources == theirs.batch.sources
        assert ours.batch.patches.equal(theirs.batch.patches)
        assert ours.batch.tokens.equal(theirs.batch.tokens)


def test_threads_by_machine(moca: Moca, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a machine share its processors; one each is for the model."""
    for processors, local, expected in ((2, 1, 1), (1, 1, 1), (16, 1, 8), (128, 8, 8), (16, 8, 1),
                                        (32, 8, 3), (4, 8, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=processors: count)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        drawn = TokenBatches(load_records(str(mixed), 0), moca.processor, 300, 1280, 0)
        assert drawn.threads._max_workers == expected


def test_who_stops_does_not_wait() -> None:
    """A loader that is let go returns although its next step will never come."""
    never, begun = threading.Event(), threading.Event()

    def steps() -> Iterator[int]:
        yield 1
        begun.set()
        never.wait()
        yield 2

    loader = prefetch(steps(), 5)
    assert next(loader) == 1
    begun.wait()
    loader.close()
    never.set()


# --- what cannot be decoded -----------------------------------------------------------------------

BROKEN = (1, 3, 7)  # of twelve records, of which every third is a text


@pytest.fixture
def broken(mixed: Path, tmp_path: Path) -> Path:
    """The mixed data, with three pictures cut short: their size can be read, their pixels not."""
    for path in mixed.parent.iterdir():
        content = path.read_bytes()
        cut_short = path.stem in map(str, BROKEN) and path.suffix == ".png"
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if cut_short else content)
    return tmp_path / mixed.name


class Ranks:
    """Two ranks as threads of this process, which gather as two processes do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.barrier = threading.Barrier(2)
        self.parts: dict[int, object] = {}
        self.number = threading.local()
        monkeypatch.setattr(dist, "new_group", lambda backend, timeout: backend)
        monkeypatch.setattr(dist, "all_gather_object", self.gather)

    def gather(self, parts: list, part: object, group: str) -> None:
        """As torch.distributed does it."""
        assert group == "gloo"  # never the group that the model uses meanwhile
        self.parts[self.number.rank] = part
        self.barrier.wait(30)
        parts[:] = [self.parts[rank] for rank in range(2)]
        self.barrier.wait(30)

    def run(self, work: Callable[[int], object]) -> list:
        """What both ranks return."""

        def as_rank(rank: int) -> object:
            self.number.rank = rank
            return work(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_rank, range(2)))


def test_ranks_skip_the_same_records(moca: Moca, broken: Path, tmp_path: Path, decoded: Counter,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank decodes its own, and both leave out what either could not decode: the records, the
    state and the list are those of one rank. A run that goes on from any step draws the same."""
    def draw(rank: int, world: int, name: str, state: dict | None = None) -> list:
        drawn = TokenBatches(load_records(str(broken), 0), moca.processor, 100, 1280, 0, rank,
                             world, skipped=tmp_path / name, state=state)
        return [next(drawn) for _ in range(10)]

    def numbers(steps: list) -> list[int]:
        return sorted(number for step in steps for part in step.micro_batches
                      for number, _ in part)

    alone = draw(0, 1, "alone")
    assert numbers(alone)[-1] > 24 and alone[-1].state["skipped"] >= 6
    once = sum(decoded.values())
    decoded.clear()
    two = Ranks(monkeypatch).run(lambda rank: draw(rank, 2, f"rank {rank}"))
    assert sum(decoded.values()) <= 1.2 * once, "ranks decode what is not theirs"
    for ours, step in zip(zip(*two, strict=True), alone, strict=True):
        assert {part.tokens for part in ours} == {step.tokens}
        assert all(part.state == step.state for part in ours)
        assert numbers(ours) == numbers([step])
    texts = [(tmp_path / name).read_text() for name in ("alone", "rank 0", "rank 1")]
    assert texts[0] == texts[1] == texts[2]
    reasons = [json.loads(line)["reason"] for line in texts[0].splitlines()]
    assert len(reasons) == alone[-1].state["skipped"]
    assert sum("truncated" in reason for reason in reasons) == len(reasons)

    again = draw(0, 1, "again", dict(alone[2].state))
    for ours, theirs in zip(again[:7], alone[3:], strict=True):
        assert numbers([ours]) == numbers([theirs]) and ours.state == theirs.state


def test_ranks_skip_the_same_pairs(moca: Moca, broken: Path, tmp_path: Path, decoded: Counter,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for pairs: the candidates are those of one rank."""
    lines = []
    for number, line in enumerate(broken.read_text().splitlines()):
        lines.append({"task": "a", "kind": "image-text", "query": {"text": f"question {number}"},
                      "positive": json.loads(line), "negatives": [json.loads(line)]})
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def draw(rank: int, world: int) -> list:
        drawn = PairBatches(load_tasks(str(data), 0), moca.processor, 6, 64, 2, 0, rank=rank,
                            world_size=world, skipped=tmp_path / f"{rank} of {world}")
        loader = train_cl.packed_steps(drawn, moca.processor, CPU)
        return [next(loader) for _ in range(4)]

    alone = draw(0, 1)
    once = sum(decoded.values())
    decoded.clear()
    two = Ranks(monkeypatch).run(lambda rank: draw(rank, 2))
    assert sum(decoded.values()) <= 1.6 * once, "ranks decode what is not theirs"
    for number, (step, _) in enumerate(alone):
        parts = [steps[number][0] for steps in two]
        assert all(part.state == step.state and part.batch == step.batch for part in parts)
        found = sorted(sum((part.local_index.tolist() for part in parts), []))
        assert found == list(range(step.batch))
    counts = [step.batch for step, _ in alone]
    assert sum(counts) == 2 * (12 - len(BROKEN)) and alone[-1][0].state["skipped"] == 6
    assert (tmp_path / "0 of 1").read_text() == (tmp_path / "1 of 2").read_text()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_can_be_decoded(moca: Moca, mixed: Path, tmp_path: Path, stage: int, world: int,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Then skipping ends in an error, not in a search without end, whatever the budget."""
    content = (mixed.parent / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content[: len(content) // 2])
    record = {"text": MARK, "images": ["0.png"]}
    pair = {"task": "a", "kind": "image-text", "query": {"text": "why"}, "positive": record}
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps(record if stage == 1 else pair) + "\n") * 9)

    def draw(rank: int) -> None:
        listed = tmp_path / f"rank {rank}"
        if stage == 1:
            next(TokenBatches(load_records(str(data), 0), moca.processor, 100, 64, 0, rank, world,
                              skipped=listed))
        next(PairBatches(load_tasks(str(data), 0), moca.processor, 4, 64, 2, 0, rank=rank,
                         world_size=world, skipped=listed))

    with pytest.raises(MocaError, match="no record" if stage == 1 else "no pair"):
        Ranks(monkeypatch).run(draw) if world == 2 else draw(0)
    assert len((tmp_path / "rank 0").read_text().splitlines()) >= 8


def test_one_good_record_is_enough(moca: Moca, mixed: Path, tmp_path: Path) -> None:
    """Of nine, over as many epochs as a step has room for."""
    content = (mixed.parent / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content[: len(content) // 2])
    lines = [{"text": MARK, "images": ["0.png"]}] * 8 + [{"text": "good"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = TokenBatches(load_records(str(data), 0), moca.processor, 20, 64, 0,
                         skipped=tmp_path / "skipped")
    step = next(drawn)
    (taken,) = step.micro_batches
    tokens = sum(len(record.tokens) for _, record in taken)
    assert 14 < tokens == step.tokens <= 20 and {record.source for _, record in taken} == {
        f"{data}:9"}
    assert [number // 9 for number, _ in taken] == list(range(len(taken)))
