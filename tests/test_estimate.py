"""`--plan`: is what it computes what is measured, and what is traced on make-believe CUDA?"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import real_shapes
import torch
from PIL import Image

import train_cl
import train_cpt
from nano_moca import estimate as estimate_module
from nano_moca.batch import MARK
from nano_moca.config import BASE
from nano_moca.estimate import GB, KINDS, Ledger, estimate, pretending, print_estimate
from nano_moca.flags import CommonFlags, parse_flags

PICTURE = 112  # pixels: 16 image tokens
LENGTH = 80  # tokens of each record: those, and WORDS


def config_of(size: str, layers: int, folder: Path) -> str:
    """A folder with nothing but the config.json of 3B or 7B, with so many layers in each tower."""
    raw = real_shapes.config_3b() | {"num_hidden_layers": layers}
    vision = raw["vision_config"] | {"depth": layers, "fullatt_block_indexes": [1]}
    if size == "7B":
        raw |= {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
                "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
        vision["out_hidden_size"] = 3584
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw | {"vision_config": vision}))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records and pairs that are what `--plan` assumes: a picture, and text up to the limit."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (PICTURE, PICTURE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")

    lines: dict[str, list[dict]] = {"records": [], "pairs": []}
    for number in range(32):
        text = f"{MARK} {number}" + " word" * LENGTH
        lines["records"].append({"text": text, "images": ["a.png"]})
    for first in range(0, 32, 4):
        query, positive, *negatives = lines["records"][first : first + 4]
        lines["pairs"].append({"task": "a", "kind": "image-text", "query": query,
                               "positive": positive, "negatives": negatives})
    for name, content in lines.items():
        text = "".join(json.dumps(line) + "\n" for line in content)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def measured_peak(run: Callable[[], None]) -> int:
    """Bytes that PyTorch's CPU allocator had given out when they were the most, as it says."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("flags", [
    # the weights count most; then the activations, with and without recomputing
    {"batch_tokens": LENGTH}, {"batch_tokens": 8 * LENGTH},
    {"batch_tokens": 16 * LENGTH, "accumulate": 2, "checkpointing": True},
    {"batch": 4}, {"batch": 4, "chunk": 8, "checkpointing": True}], ids=str)
def test_against_a_measured_run(flags: dict, data: Path, tmp_path: Path) -> None:
    """On a CPU, within 10 % of what was really allocated in a run of two steps."""
    script, name = (train_cl, "pairs") if "batch" in flags else (train_cpt, "records")
    flags = script.Flags(
        model=str(BASE), data=str(data / f"{name}.jsonl"), output=str(tmp_path / "run"), steps=2,
        max_tokens=LENGTH, max_pixels=PICTURE**2, device="cpu", no_report=True, **flags)
    measured = measured_peak(lambda: script.train(flags))
    computed = estimate(flags, 80, 1).peak.total()
    assert computed == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("size, ranks, traced, flags", [
    ("3B", 8, 4.97, {"batch_tokens": 50_000, "accumulate": 2, "checkpointing": True}),
    ("7B", 4, 14.50, {"batch_tokens": 12_500, "checkpointing": True}),
    ("3B", 8, 5.46, {"batch": 32, "chunk": 8, "checkpointing": True}),
    ("3B", 1, 17.83, {"batch_tokens": 12_500, "accumulate": 2})], ids=str)
def test_against_a_trace(size: str, ranks: int, traced: float, flags: dict, tmp_path: Path) -> None:
    """True widths, two layers a tower: within 10 % of what the two scripts held in their second
    step on make-believe CUDA, with FSDP2 and fused AdamW (GB of storages alive at the peak)."""
    script = train_cl if "batch" in flags else train_cpt
    folder = config_of(size, 2, tmp_path / "model")
    peak = estimate(script.Flags(model=folder, max_pixels=802_816, **flags), 80, ranks).peak
    assert (peak.total() - peak["reserve"]) / GB == pytest.approx(traced, rel=0.1)


def test_what_stays_is_divided(tmp_path: Path) -> None:
    """16 bytes a parameter, over all ranks; a micro-batch is a rank's share of the step."""
    flags = train_cpt.Flags(model=str(BASE), batch_tokens=64 * LENGTH, accumulate=4,
                            max_tokens=LENGTH, max_pixels=PICTURE**2)
    for ranks in (1, 4):
        found = estimate(flags, 80, ranks)
        number = sum(parameter.numel() for parameter in found.model.parameters())
        state = found.peak["weights"] + found.peak["gradients"] + found.peak["moments"]
        assert state == pytest.approx(16 * number / ranks)
        assert len(found.batch.lengths) == 16 // ranks and found.passes == 4


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl-untied"])
@pytest.mark.parametrize("script", [train_cpt, train_cl], ids=["cpt", "cl"])
def test_the_output(name: str, script: object, golden: Path, tmp_path: Path,
                    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """config.json is enough; fifteen lines whose numbers add up; nothing else happens."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_bytes((golden / name / "config.json").read_bytes())
    words = ["--model", "model", "--plan", "80x2", "--max-pixels", "12544", "--output", "run"]
    before = torch.Tensor.is_cuda
    script.train(parse_flags(script.Flags, words, ""))
    assert torch.Tensor.is_cuda is before and "triton" in estimate_module.kernels.BACKENDS

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 15 and "computed, not measured" in lines[0] and lines[-2].endswith("fits")
    amounts = [float(line.split()[0]) for line in lines if line.split()[1] in KINDS]
    assert len(amounts) == len(KINDS)
    assert sum(amounts) == pytest.approx(float(lines[-2].split()[0]), abs=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("value", ["0", "80x", "x8", "80x0", "eighty", "-80", "8.0x8.0"])
def test_what_is_no_card(value: str, capsys: pytest.CaptureFixture) -> None:
    """One line and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        print_estimate(CommonFlags(plan=value))
    assert stopped.value.code == 2
    assert re.fullmatch(r"error: --plan .+ is not the GB of a card.+\n", capsys.readouterr().err)


def test_too_small_a_card(capsys: pytest.CaptureFixture) -> None:
    """It says so, and what helps."""
    flags = train_cpt.Flags(plan="1", max_pixels=PICTURE**2)  # the reserve alone is more
    print_estimate(flags)
    assert "DOES NOT FIT. What helps: --checkpointing" in capsys.readouterr().out


def test_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The ranks are torchrun's, and the main one prints."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = train_cpt.Flags(plan="80", max_pixels=PICTURE**2)
    for rank, said in (("1", ""), ("0", "4 x 80 GB")):
        monkeypatch.setenv("RANK", rank)
        print_estimate(flags)
        assert said in capsys.readouterr().out


def test_the_ledger() -> None:
    """A view costs nothing, a result as long as it lives; a product of [4, 8] and [8, 16] is
    4 x 8 x 16 multiplications, and as many additions."""
    left, right = torch.empty(4, 8, device="meta"), torch.empty(8, 16, device="meta")
    ledger = Ledger({"weights": 100})
    with pretending("cpu", ledger):
        product = left @ right
        view = product.T
        assert ledger.held["kept"] == 4 * 4 * 16
        ledger.kind = "working"
        doubled = 2 * view
        assert ledger.peak == {"weights": 100, "kept": 256, "working": 256}
        del product, view
        assert ledger.held["kept"] == 0 and ledger.held["working"] == doubled.nbytes
    assert ledger.flops == 2 * 4 * 8 * 16 and ledger.made == 2 * 256
