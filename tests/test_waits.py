"""A training step leaves the device alone until its end: how often the host waits, what it sends.

A GPU stands still whenever the host has to read from it before it can go on, and while it is sent
what the host makes in mid-step. Both scripts' own loops run here on the device "meta" (waits.py
says what that can see), and each wait and each blocking copy of their steps is counted.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import train_cl
import train_cpt
from nano_moca import batch as batch_module
from nano_moca import model as model_module
from nano_moca.convert import export
from nano_moca.distributed import World
from nano_moca.flags import parse_flags
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from waits import Watch, attend_nowhere

META = torch.device("meta")
STEPS = 2
CEILING = 2  # waits of a step


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, golden: Path, tmp_path: Path
            ) -> Callable[..., list[Watch]]:
    """Run a script's loop on meta: one `Watch` for each of its steps."""
    def run(script: object, *words: str) -> list[Watch]:
        watches: list[Watch] = []

        def steps(*arguments: object) -> Iterator:
            # From where a step asks for its records to where it asks for the next ones.
            for step in original_prefetch(*arguments):
                with Watch() as watch:
                    watches.append(watch)
                    yield step

        original_prefetch = script.prefetch
        world = World(0, 1, META, torch.float32)
        monkeypatch.setattr(script, "prefetch", steps)
        monkeypatch.setattr(script, "init_distributed", lambda *_: world)
        monkeypatch.setattr(model_module, "attend", attend_nowhere)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no meta
        monkeypatch.setattr(export, "save_model", lambda *_: None)
        for name in ("save_progress", "close_run"):
            monkeypatch.setattr(script, name, lambda *_: None)
        words = [*words, "--steps", str(STEPS), "--output", str(tmp_path / "run"), "--no-report",
                 "--model", str(golden / "qwen2.5-vl")]
        script.train(parse_flags(script.Flags, words, ""))
        assert len(watches) == STEPS
        return watches

    return run


def check(watches: list[Watch]) -> None:
    """No step waits more often than it may, and none sends anything while the host waits."""
    for watch in watches:
        assert 1 <= sum(watch.waits.values()) <= CEILING, watch.waits
        assert not watch.copies, watch.copies


@pytest.mark.parametrize("words", [
    ("--accumulate", "2", "--checkpointing"), ("--objective", "next-token")], ids=" ".join)
def test_stage_1_waits_twice(watched: Callable, mixed: Path, words: tuple[str, ...]) -> None:
    """For the counts at the step's beginning, and for losses and norm at its end; with images and
    with text alone, however many micro-batches there are."""
    check(watched(train_cpt, "--data", str(mixed), "--batch-tokens", "300", *words))


@pytest.mark.parametrize("words", [
    ("--chunk", "8"), ("--chunk", "0", "--pooling", "last")], ids=" ".join)
def test_stage_2_waits_once(watched: Callable, words: tuple[str, ...]) -> None:
    """For loss and norm at the step's end, whether or not the gradient is cached."""
    check(watched(train_cl, "--batch", "4", "--hard-negatives", "1", *words))


def test_pixels_are_sent_as_bytes(moca, records) -> None:
    """An image token's four patches are 2,352 bytes on their way, not 18,816; and what goes with
    them is little."""
    batch = moca.processor.batch(records)
    assert batch.pixels.nbytes == 4 * 3 * 14 * 14 * len(batch.image_index)
    with Watch() as watch:
        batch.to(META)
    others = watch.sent - batch.pixels.nbytes
    assert not watch.waits and not watch.copies
    assert 0 < others < 100 * len(batch.image_index) + 50 * len(batch.tokens)


def test_what_a_gpu_gets_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory a copy is no background copy, whatever it is called."""
    done = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *_, **how: done.append(how) or self)
    batch_module.send(torch.ones(2), "cuda:1")
    assert done == ["pinned", {"non_blocking": True}]
    batch_module.send(torch.ones(2), "cpu")
    assert done[2:] == [{"non_blocking": True}]


def test_the_watch_sees() -> None:
    """What is counted: reads, copies from ordinary memory, indexes of the host's. What is not: work
    on the device, and what is sent in the background. What cannot be, stops."""
    x = torch.ones(3, device=META)
    with Watch() as watch:
        assert float(x.sum()) == x.sum().item() == 1
        assert x.tolist() == [1, 1, 1] and bool(x[0])
        assert len(x.cpu()) == len(x.to("cpu")) == 3
    assert sum(watch.waits.values()) == 6 and not watch.copies

    index = torch.tensor([0, 2])
    sends = [lambda: index.to(META), lambda: torch.tensor([1, 2], device=META), lambda: x[index],
             lambda: x[[0, 2]]]
    for send in sends:
        with Watch() as watch:
            send()
        assert watch.copies and not watch.waits

    with Watch() as watch:
        parameter = torch.nn.Parameter(x)
        (parameter * index.to(META, non_blocking=True).sum()).sum().backward()
        clip_grad_norm_([parameter], 1.0)
    assert not watch.copies and not watch.waits and watch.sent == index.nbytes

    for stops in (lambda: x[x > 0], lambda: x.nonzero(),
                  lambda: torch.repeat_interleave(torch.ones(3, dtype=torch.int64, device=META))):
        with pytest.raises(RuntimeError), Watch():
            stops()
