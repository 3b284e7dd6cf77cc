"""The benchmark at a tiny size: it compares equals. How fast they are is not tested."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from nano_moca.benchmark import BATCHES, Flags, benchmark, make_mixes, random_model

TINY = Flags(width=128, layers=1, records=3, repeats=1)


def test_transformers_and_we_compute_the_same_hidden_states(capsys):
    pytest.importorskip("transformers")
    assert 0 < benchmark(TINY) < 1e-3
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    for mix in ("mixed", "sorted", "equal"):
        lines = [row for row in rows if row and row[0] == mix]
        assert len(lines) == 2  # forward, and forward with backward
        for *_, theirs, ours, ratio in lines:
            theirs, ours = (float(number.replace(",", "")) for number in (theirs, ours))
            assert float(ratio) == pytest.approx(ours / theirs, abs=0.1)
    assert "matrix products" in printed


def test_without_transformers_ours_alone_is_timed(monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    benchmark(TINY)
    printed = capsys.readouterr().out
    assert "pip install transformers" in printed and "equal" in printed


def test_the_three_mixes_are_what_they_are_called():
    _, processor = random_model(TINY)
    mixes = make_mixes(processor, TINY)
    lengths = {mix: [batch.lengths for batch in batches] for mix, batches in mixes.items()}
    assert all(len(batches) == BATCHES and all(len(each) == TINY.records for each in batches)
               for batches in lengths.values())
    flat = {mix: sum(batches, ()) for mix, batches in lengths.items()}
    assert sorted(flat["mixed"]) == list(flat["sorted"]) != list(flat["mixed"])
    assert len(set(flat["equal"])) == 1


def test_the_package_itself_does_without_transformers():
    package = Path(__file__).resolve().parents[1] / "nano_moca"
    users = [file.name for file in package.rglob("*.py")
             if any(line.startswith(("import transformers", "from transformers"))
                    for line in file.read_text().splitlines())]
    assert not users  # the benchmark imports it inside its function
