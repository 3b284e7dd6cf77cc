"""The benchmark on a tiny checkpoint: it compares equals. How fast they are is not tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nano_moca import Moca
from nano_moca.benchmark import BATCHES, Flags, benchmark, make_mixes

TINY = Flags(records=3)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen2-vl", None])
def test_transformers_and_we_compute_the_same_hidden_states(golden: Path, capsys, name: str | None):
    pytest.importorskip("transformers")
    assert 0 < benchmark(replace(TINY, model=name and str(golden / name), width=128)) < 1e-3
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[-1][:2] == ["our", "time:"] and "mm" in rows[-1]
    for mix in ("mixed", "sorted", "equal"):
        lines = [row for row in rows if row and row[0] == mix]
        assert len(lines) == 2  # forward, and forward with backward
        for *_, theirs, ours, ratio in lines:
            theirs, ours = (float(number.replace(",", "")) for number in (theirs, ours))
            assert float(ratio) == pytest.approx(ours / theirs, abs=0.1)


def test_the_three_mixes_are_what_they_are_called(moca: Moca):
    mixes = make_mixes(moca.processor, TINY)
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
