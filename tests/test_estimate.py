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
from nano_moca.plan import estimate as estimate_module
from nano_moca.attention import Segments
from nano_moca.batch import MARK
from nano_moca.benchmark import make_wide
from nano_moca.config import BASE
from nano_moca.plan.estimate import GB, Ledger, estimate, pretending, print_estimate
from nano_moca.families import load_config
from nano_moca.flags import CommonFlags, parse_flags
from nano_moca.model import DecoderLayer

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


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another shape than the nano base's: 2.6 times as many parameters."""
    folder = tmp_path_factory.mktemp("wide")
    make_wide(folder, 256)
    return folder


@pytest.mark.parametrize("shape, flags", [
    # the weights count most; then the activations, with and without recomputing
    ("nano", {"batch_tokens": LENGTH}),
    ("nano", {"batch_tokens": 16 * LENGTH, "accumulate": 2, "checkpointing": True}),
    ("nano", {"batch": 4, "chunk": 4 * LENGTH, "checkpointing": True}),
    ("wide", {"batch_tokens": 8 * LENGTH}), ("wide", {"batch": 2})], ids=str)
def test_against_a_measured_run(shape: str, flags: dict, data: Path, wide: Path, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, within 10 % of what was really allocated in a run of two steps. What saving takes
    there is host memory on a GPU, and left out."""
    script, name = (train_cl, "pairs") if "batch" in flags else (train_cpt, "records")
    monkeypatch.setattr(script, "save_progress", lambda *_: None)
    monkeypatch.setattr("nano_moca.convert.export.save_model", lambda *_: None)
    flags = script.Flags(
        model=str(wide if shape == "wide" else BASE), data=str(data / f"{name}.jsonl"), steps=2,
        output=str(tmp_path / "run"), max_tokens=LENGTH, max_pixels=PICTURE**2, device="cpu",
        no_report=True, **flags)
    measured = measured_peak(lambda: script.train(flags))
    computed = estimate(flags, 80, 1).peak.total()
    assert computed == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("size, ranks, traced, flags", [
    ("3B", 8, 5.09, {"batch_tokens": 50_000, "accumulate": 2}),
    ("3B", 8, 5.18, {"batch": 32, "chunk": 8192})], ids=str)
def test_against_a_trace(size: str, ranks: int, traced: float, flags: dict, tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    """True widths, two layers a tower: within 10 % of what trace_cuda.py says that the scripts held
    in their second step (GB of storages alive at the peak). Nothing is compiled there."""
    monkeypatch.setattr(estimate_module, "FUSED", {})
    script = train_cl if "batch" in flags else train_cpt
    flags = script.Flags(model=config_of(size, 2, tmp_path / "model"), max_pixels=802_816,
                         checkpointing=True, **flags)
    peak = estimate(flags, 80, ranks).peak
    assert peak.total() / GB == pytest.approx(traced, rel=0.1)


def test_what_is_fused_keeps_its_inputs(tmp_path: Path) -> None:
    """Of a token in one of 3B's decoder layers: what both norms read and give; queries, keys,
    values, and attention's result with its normaliser; gate, up and their product."""
    config = load_config(Path(config_of("3B", 2, tmp_path / "model")))
    with torch.device("meta"):
        layer = DecoderLayer(config).bfloat16()
        x = torch.empty(100, config.width, dtype=torch.bfloat16, requires_grad=True)
        angles, offsets = torch.empty(100, 64), torch.empty(2, dtype=torch.int32)
    ledger = Ledger({})
    ledger.known.update(parameter.untyped_storage() for parameter in layer.parameters())
    with pretending("cuda", ledger):
        result = layer(x, angles, Segments((100,), offsets), causal=False)
    assert result.shape == x.shape  # and is there in place of x, which was before

    D, heads, d, mlp = 2048, 16 + 2, 128, 11008
    expected = 2 * (4 * D + 2 * heads * d + 3 * mlp) + 4 * 16
    assert ledger.held["activations"] == pytest.approx(100 * expected, rel=1e-4)


def test_what_stays_is_divided(tmp_path: Path) -> None:
    """16 bytes a parameter, over all ranks; a micro-batch is a rank's share of the step."""
    flags = train_cpt.Flags(model=str(BASE), batch_tokens=64 * LENGTH, accumulate=4,
                            max_tokens=LENGTH, max_pixels=PICTURE**2)
    for ranks in (1, 4):
        found = estimate(flags, 80, ranks)
        number = sum(parameter.numel() for parameter in found.model.parameters())
        state = found.peak["weights"] + found.peak["gradients"] + found.peak["moments"]
        assert state == pytest.approx(16 * number / ranks, rel=0.01)
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
    assert torch.Tensor.is_cuda is before

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 15 and "computed, not measured" in lines[0] and lines[-2].endswith("fits")
    amounts = [float(line.split()[0]) for line in lines[4:-2]]
    assert len(amounts) >= 8 and lines[-3].split() == ["2.00", "reserve"]
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


def test_adapters_on_one_card(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Frozen weights lie there in bfloat16; what is trained costs its 16 bytes. No warning."""
    model = config_of("3B", 2, tmp_path / "model")
    flags = train_cl.Flags(model=model, batch=8, lora=16, max_pixels=PICTURE**2)
    found = estimate(flags, 24, 1)
    narrow = sum(p.numel() for p in found.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in found.model.parameters()) - narrow
    assert 0 < narrow < 0.01 * frozen
    assert found.peak["weights"] == 2 * frozen + 4 * narrow
    assert found.peak["moments"] == 8 * narrow >= 2 * found.peak["gradients"]
    assert not [warning for warning in recwarn if "hook" in str(warning.message)]


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
        assert ledger.held["activations"] == 4 * 4 * 16
        ledger.kind = "backward"
        doubled = 2 * view
        assert ledger.peak == {"weights": 100, "activations": 256, "backward": 256}
        del product, view
        assert ledger.held["activations"] == 0 and ledger.held["backward"] == doubled.nbytes
    assert ledger.work == {"products": 2 * 4 * 8 * 16, "made": 2 * 256}
