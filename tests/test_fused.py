"""What the CUDA path asks of code that runs without CUDA too: functions that are compiled there,
a padded MLP, grouped heads, and cards that have no bfloat16."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nano_moca import MARK, Moca, MocaError, Record, attention, model
from nano_moca.attention import Segments, reference_attention
from nano_moca.config import BASE
from nano_moca.distributed import choose_dtype, init_distributed
from nano_moca.convert.export import save_weights
from nano_moca.convert.shards import read_header
from nano_moca.evaluate import embedder
from nano_moca.families import load_config
from nano_moca.weights import load_weights, read_tensor

FUSED = ("rms_norm", "silu_gate", "rotate")
OLD, NEW = (7, 5), (8, 0)  # compute capabilities of a T4 and an A100


# --- compiled functions ---------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The three functions take the GPU's path on CPU tensors. No compiler of C++ is needed: what is
    traced, and when it is traced again, is settled before one. Returns Dynamo's counts."""
    dynamo = pytest.importorskip("torch._dynamo")
    dynamo.reset()
    dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(model, "TRITON_AVAILABLE", True)
    monkeypatch.setattr(attention, "varlen_attn", None)
    for name in FUSED:
        plain = getattr(model, name).__wrapped__
        monkeypatch.setattr(model, name, model.fused_on_cuda(plain))
    yield dynamo.utils.counters["stats"]
    dynamo.reset()


def records(count: int) -> list[Record]:
    """So many records of different lengths, every second one with an image."""
    size = torch.zeros(56 * count, 112, 3, dtype=torch.uint8).numpy()
    return [Record((MARK if n % 2 else "") + "red anchor " * (3 * n + count), [size] * (n % 2))
            for n in range(count)]


def test_other_lengths_compile_nothing_new(moca: Moca, compiled: dict) -> None:
    """With and without gradient, under checkpointing, in bfloat16: after two batches of a kind all
    that follows finds its graphs, whatever its lengths."""
    vlm = model.VLM(moca.model.config).to(torch.bfloat16)
    vlm.load_state_dict(moca.model.state_dict())
    vlm.set_checkpointing(True)

    def run(count: int, gradient: bool) -> int:
        batch = moca.processor.batch(records(count))
        with torch.set_grad_enabled(gradient):
            vectors = vlm.embed(batch, causal=False, pooling="mean")
        if gradient:
            vectors[:, 0].sum().backward()
        return compiled["unique_graphs"]

    for gradient in (False, True):
        warm = [run(count, gradient) for count in (2, 3)][-1]
        assert [run(count, gradient) for count in (5, 4, 2)] == [warm] * 3
    assert len(FUSED) * 2 <= warm <= 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_functions_compute_the_same(compiled: dict, dtype: torch.dtype) -> None:
    """Values and gradients of each are those of the lines as they are written."""
    torch.manual_seed(0)
    inputs = {"rms_norm": [(5, 8), (8,)], "silu_gate": [(5, 8), (5, 8)], "rotate": [(5, 3, 8)]}
    more = {"rms_norm": [1e-6], "silu_gate": [], "rotate": [torch.randn(5, 4), torch.float32]}
    for name in FUSED:
        tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in inputs[name]]
        fused, plain = getattr(model, name), getattr(model, name).__wrapped__
        results = []
        for function in (fused, plain):
            out = function(*tensors, *more[name])
            assert out.dtype == dtype
            results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
    assert compiled["unique_graphs"] == len(FUSED)


# --- the padded MLP -------------------------------------------------------------------------


def test_padding_changes_nothing_that_is_learned() -> None:
    """AdamW with weight decay: the padded MLP learns what the narrow one learns, up to the order in
    which a product's terms are added, and its padding stays zero."""
    torch.manual_seed(0)
    narrow, padded = (model.SwiGLU(16, width, bias=True).double() for width in (19, 24))
    with torch.no_grad():
        for ours, theirs in zip(padded.parameters(), narrow.parameters(), strict=True):
            ours.zero_()[tuple(map(slice, theirs.shape))] = theirs

    optimizers = [torch.optim.AdamW(mlp.parameters(), 1e-2, weight_decay=0.1)
                  for mlp in (narrow, padded)]
    for _ in range(20):
        x = torch.randn(7, 16, dtype=torch.float64)
        for mlp, optimizer in zip((narrow, padded), optimizers, strict=True):
            mlp(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    for ours, theirs in zip(padded.parameters(), narrow.parameters(), strict=True):
        kept = tuple(map(slice, theirs.shape))
        torch.testing.assert_close(ours[kept], theirs, rtol=0, atol=1e-12)
        assert ours.count_nonzero() == theirs.count_nonzero()


def test_padded_when_loaded_and_cut_when_saved(golden: Path, moca: Moca, tmp_path: Path) -> None:
    """The golden vision tower's MLP is 76 wide: 80 in memory, 76 in every file, to the bit."""
    config = moca.model.config
    gate = moca.model.visual.blocks[0].mlp.gate_proj
    assert (config.vision.mlp_width, gate.out_features) == (76, 80)
    assert not gate.weight[76:].any() and not gate.bias[76:].any() and gate.weight[75].all()

    save_weights(tmp_path, moca.model.state_dict(), config)
    before, after = ({stored: (shape, read_tensor(file, stored))
                      for stored, file, shape, _ in read_header(folder)}
                     for folder in (golden / "qwen2.5-vl", tmp_path))
    assert before.keys() == after.keys()
    for name, (shape, tensor) in before.items():
        assert after[name][0] == shape and torch.equal(after[name][1], tensor.float()), name


def test_a_file_with_the_padding_is_refused(moca: Moca, checkpoint: Path) -> None:
    """What is stored has the width that its config.json names, or it does not fit."""
    file, name = checkpoint / "model.safetensors", "visual.blocks.0.mlp.down_proj.weight"
    save_file(load_file(file) | {name: torch.zeros(48, 80)}, file, {"format": "pt"})
    with pytest.raises(MocaError, match=r"down_proj.weight is \[48, 80\], config.json asks .* 76"):
        load_weights(moca.model, checkpoint)


def test_a_width_that_is_a_multiple_of_8_is_left_alone() -> None:
    """The nano base's parameters have the shapes that they had."""
    config = load_config(BASE)
    assert config.vision.padded_mlp_width == config.vision.mlp_width == 176


# --- grouped heads --------------------------------------------------------------------------


@pytest.mark.parametrize("takes_groups", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_kernel_gets_the_heads_that_it_takes(monkeypatch: pytest.MonkeyPatch, kv_heads: int,
                                                 takes_groups: bool) -> None:
    """A kernel for grouped heads gets no copies of keys and values; an older one gets them."""
    heads = 4
    query, key, value = (torch.randn(9, n, 8) for n in (heads, kv_heads, kv_heads))
    segments = Segments.of((4, 5), query.device)
    seen = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, longest: int, __: int, *,
               window_size: tuple[int, int], **options: bool) -> Tensor:
        seen.append((k.shape[1], options, k is key))
        assert ends.dtype == torch.int32 and longest == 5 and window_size == (-1, 0)
        return reference_attention(q, k, v, segments, causal=True)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "TAKES_GROUPS", takes_groups)
    out = attention.varlen_attention(query, key, value, segments, causal=True)
    assert torch.equal(out, reference_attention(query, key, value, segments, causal=True))
    copied = kv_heads != heads and not takes_groups
    options = {"enable_gqa": True} if takes_groups else {}
    assert seen == [(heads if copied else kv_heads, options, not copied)]


# --- cards without bfloat16 -----------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Pretend that a card of a compute capability is there."""
    def put(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)

    return put


@pytest.mark.parametrize("capability, asked, dtype", [
    (OLD, None, torch.float32), (OLD, "float32", torch.float32),
    (NEW, None, torch.bfloat16), (NEW, "float32", torch.float32)])
def test_a_run_computes_in_what_the_card_has(card, capability, asked, dtype) -> None:
    """Before Ampere float32 is the default, from Ampere on bfloat16."""
    card(capability)
    world = init_distributed(None, asked)
    assert (world.device.type, world.dtype) == ("cuda", dtype)


def test_bfloat16_on_an_old_card_is_one_line(card) -> None:
    """It says what the card lacks, and what to ask for."""
    card(OLD)
    with pytest.raises(MocaError, match="^torch.bfloat16 needs a GPU of Ampere .* use dtype float"):
        init_distributed(None, "bfloat16")


def test_load_computes_in_what_the_card_has(card, golden: Path, monkeypatch) -> None:
    """A loaded model too: the checkpoint's bfloat16 on a newer card only, and never float16 on an
    old one."""
    cuda = torch.device("cuda")
    for capability, dtype in ((OLD, torch.float32), (NEW, torch.bfloat16)):
        card(capability)
        assert choose_dtype(cuda, None, torch.bfloat16) == dtype
    card(OLD)
    with pytest.raises(MocaError, match="^torch.float16 needs a GPU of Ampere"):
        choose_dtype(cuda, torch.float16, torch.bfloat16)

    monkeypatch.setattr(embedder, "choose_dtype", lambda device, asked, usual: torch.bfloat16)
    assert embedder.load(golden / "qwen2.5-vl", "cpu").model.head.dtype == torch.bfloat16
