"""Adapters beside frozen weights (--lora), in both stages: the formula, what stays frozen, ranks,
chunks, breaks, and the folder that is saved.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nano_moca
import test_train
import test_train_cl
import train_cl
import train_cpt
from launching import (
    assert_same_run, figures, read_log, read_weights, wait_for, words, write_data,
)
from nano_moca import MARK, Moca, MocaError, Record, losses
from nano_moca.convert.export import save_model, save_weights
from nano_moca.distributed import World
from nano_moca.lora import ALPHA, AdaptedLinear, add_adapters, begin, merge_adapters
from nano_moca.weights import empty_model, load_weights

SCRIPT = train_cpt
DEFAULTS = "--device cpu --lora 4 --no-report"
STAGES = {train_cpt: test_train.DEFAULTS + " --learning-rate 2e-2",
          train_cl: test_train_cl.DEFAULTS + " --learning-rate 1e-3"}
BOTH = pytest.mark.parametrize("stage", STAGES, ids=["cpt", "cl"])
WORLD = World(0, 1, torch.device("cpu"), torch.float32)
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def data(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What each stage learns from."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = write_data(folder / "data.jsonl", test_train_cl.pair_lines(folder))
    return {train_cpt: mixed, train_cl: pairs}


def line(stage: object, data: dict) -> list[str]:
    """The flags of a stage's runs."""
    return ["--data", str(data[stage]), *STAGES[stage].split()]


@pytest.fixture(scope="module")
def run(launch: Callable, data: dict) -> Callable[..., Path]:
    """A run of a stage that has to succeed."""

    def run(stage: object, output: Path, *flags: str, ranks: int = 1) -> Path:
        job = launch(output, *line(stage, data), *flags, ranks=ranks, script=stage)
        assert job.wait() == 0, job.output
        return output

    return run


@pytest.fixture(scope="module")
def plain(run: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The output of each stage on one rank: what all variations are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    return {stage: run(stage, folder / stage.__name__) for stage in STAGES}


def adapted(folder: Path, config: object) -> torch.nn.Module:
    """A checkpoint with adapters that say something: B is random too."""
    model = empty_model(config)
    add_adapters(model, 3, torch.float32)
    model.to_empty(device="cpu")
    load_weights(model, folder)
    begin(model, 0, WORLD, None)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.lora_b.data.normal_(std=0.01, generator=generator)
    return model


# --- one layer, one model -----------------------------------------------------------------------

def test_a_layer_is_the_formula() -> None:
    """y = (W + alpha / a B A) x + b, its gradients reach A and B only, and merging changes nothing.
    """
    torch.manual_seed(0)
    layer = AdaptedLinear(torch.nn.Linear(7, 5).requires_grad_(False), 2)
    layer.lora_a = torch.nn.Parameter(torch.randn(2, 7))
    layer.lora_b = torch.nn.Parameter(torch.randn(5, 2))
    x = torch.randn(3, 7)
    whole = layer.weight + ALPHA / 2 * layer.lora_b @ layer.lora_a
    expected = x.double() @ whole.double().T + layer.bias.double()
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)  # terms of up to 1e2
    y.sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.lora_a.grad.any() and layer.lora_b.grad.any()
    layer.merge()
    torch.testing.assert_close(layer.weight, whole.detach())
    assert not layer.lora_b.any()
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen2-vl", "qwen2.5-vl-untied"])
def test_it_begins_as_it_was(golden: Path, family: str) -> None:
    """B is zero, so that the first step sees the model to the bit; A is of its seed."""
    moca = nano_moca.load(golden / family, "cpu")
    items = ["words and words", {"text": MARK, "images": [golden / "images" / "0-rgb-84x84.png"]}]
    before = moca.embed(items)
    moca.model = adapted(golden / family, moca.model.config)
    frozen = begin(moca.model, 0, WORLD, None)
    assert type(frozen) is float  # it is kept in checkpoints, where a tensor would name its device
    assert moca.embed(items).equal(before)
    first = moca.model.language.layers[0].self_attn.q_proj.lora_a.clone()
    begin(moca.model, 1, WORLD, None)
    assert not first.equal(moca.model.language.layers[0].self_attn.q_proj.lora_a)
    count = sum(isinstance(module, AdaptedLinear) for module in moca.model.modules())
    assert count == len(ADAPTED) * moca.model.config.layers


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3"])
def test_the_saved_folder_gives_the_trained_vectors(golden: Path, tmp_path: Path, family: str,
                                                    request: pytest.FixtureRequest) -> None:
    """Merged into an ordinary folder: 1e-6 from what was trained, and far from what it began as."""
    folder = golden / family
    if family == "qwen3":
        folder = request.getfixturevalue("qwen3_checkpoint")
    moca = nano_moca.load(folder, "cpu")
    items = [Record("blue star"), Record(f"{MARK} one", [golden / "images" / "0-rgb-84x84.png"])]
    before = moca.embed(items)
    model = adapted(folder, moca.model.config)
    trained = Moca(model, moca.processor).embed(items)
    merge_adapters(model)
    save_model(tmp_path / "model", WORLD, model, moca.processor, {"attention": "bidirectional"})
    assert load_file(folder / "model.safetensors").keys() == load_file(
        tmp_path / "model" / "model.safetensors").keys()
    saved = nano_moca.load(tmp_path / "model", "cpu").embed(items)
    torch.testing.assert_close(saved, trained, rtol=0, atol=1e-6)
    assert (saved - before).abs().max() > 1e-2
    assert Moca(model, moca.processor).embed(items).sub(trained).abs().max() < 1e-6


@pytest.fixture
def qwen3_checkpoint(tmp_path: Path) -> Path:
    """A small Qwen3-VL."""
    import random

    import test_qwen3
    from nano_moca.families import build_model
    from nano_moca.qwen3.config import parse_qwen3

    raw = test_qwen3.random_shape(random.Random(0), tied=True)
    folder = tmp_path / "qwen3"
    folder.mkdir()
    config = parse_qwen3(raw)
    whole = test_qwen3.fill(build_model(config), seed=0)
    save_weights(folder, whole.state_dict(), config)
    return test_qwen3.complete(folder)


def test_no_gradient_for_what_is_frozen(golden: Path, moca: Moca, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    """The vision tower keeps no graph, and the fused loss makes no gradient of the head, which is
    as large; that of the hidden states is the same."""
    model = adapted(golden / "qwen2.5-vl", moca.model.config)
    picture = Record(f"{MARK} one", [golden / "images" / "0-rgb-84x84.png"])
    batch = moca.processor.pack([moca.processor.encode(picture)])
    assert not model.visual(batch.patches, batch.layout).requires_grad
    assert model(batch, causal=False).requires_grad

    labels, nothing = torch.tensor([3, 5]), torch.zeros(0, 4)
    gradients = []
    for head in (moca.model.head.detach().clone().requires_grad_(), model.head):
        torch.manual_seed(0)
        hidden = torch.randn(2, head.shape[1], requires_grad=True)
        losses.masked_reconstruction_loss(hidden, head, labels, nothing, nothing)[0].backward()
        gradients.append(hidden.grad)
        monkeypatch.setattr(losses, "add_product_", None)  # the second time it is not called
    assert gradients[0].equal(gradients[1])


# --- both stages --------------------------------------------------------------------------------

@BOTH
def test_only_the_decoder_moves(plain: dict, golden: Path, stage: object) -> None:
    """Of the saved model all linear layers of the decoder are others, and all else is what it was
    to the bit; transformers finds every tensor."""
    begun = load_file(golden / "qwen2.5-vl" / "model.safetensors")
    ended = read_weights(plain[stage])
    assert begun.keys() == ended.keys()
    moved = {key for key in begun if not begun[key].equal(ended[key])}
    embedding = "model.embed_tokens.weight"
    assert moved - {embedding} == {key for key in begun if key.startswith("model.layers.")
                                   and key.endswith(tuple(f"{name}.weight" for name in ADAPTED))}
    moca = nano_moca.load(plain[stage] / "model", "cpu")
    changed = (begun[embedding] != ended[embedding]).any(1).nonzero().flatten().tolist()
    assert changed == [moca.processor.mask_token]  # the mean of all others, which it lacked
    transformers = pytest.importorskip("transformers")
    _, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        plain[stage] / "model", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@BOTH
def test_a_checkpoint_holds_what_is_trained(plain: dict, stage: object) -> None:
    """Adapters and stage 1's patch decoder: frozen weights come from --model again."""
    saved = torch.load(plain[stage] / "checkpoint" / "rank-00000.pt", weights_only=True)
    layers = nano_moca.load(plain[stage] / "model", "cpu").model.config.layers
    patch_decoder = 14 if stage is train_cpt else 0  # a layer's 12, and a map with bias
    assert len(saved["parameters"]) == 2 * len(ADAPTED) * layers + patch_decoder
    assert all(len(entries) == 3 for entries in saved["moments"])


@BOTH
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_and_parts_change_nothing(plain: dict, run: Callable, tmp_path: Path, stage: object,
                                        ranks: int) -> None:
    """--accumulate or the gradient cache, recomputed activations, and two ranks: the same run."""
    parts = "--accumulate 2" if stage is train_cpt else "--chunk 2"
    flags = parts.split() if ranks == 1 else [*parts.split(), "--checkpointing"]
    other = run(stage, tmp_path / "run", *flags, ranks=ranks)
    assert_same_run(other, plain[stage])


@BOTH
def test_killed_and_resumed(plain: dict, launch: Callable, data: dict, run: Callable,
                            tmp_path: Path, stage: object) -> None:
    """The bits of a run without a break."""
    flags = "--save-every", "2"
    job = launch(tmp_path / "run", *line(stage, data), *flags, script=stage)
    wait_for(job, (tmp_path / "run" / "checkpoint").exists)
    time.sleep(0.05)
    job.kill()
    run(stage, tmp_path / "run", *flags, "--resume")
    ours, theirs = read_log(tmp_path / "run"), read_log(plain[stage])
    assert list(map(figures, ours)) == list(map(figures, theirs))
    assert all(map(torch.equal, read_weights(tmp_path / "run").values(),
                   read_weights(plain[stage]).values()))


def test_other_frozen_weights_are_refused(golden: Path, data: dict, tmp_path: Path) -> None:
    """--resume beside a --model of the same name and shapes whose content is another's."""
    model = Path(shutil.copytree(golden / "qwen2.5-vl", tmp_path / "model"))
    flags = words(golden, tmp_path / "run", DEFAULTS, *line(train_cl, data), "--model", model)
    train_cl.train(train_cl.parse_flags(train_cl.Flags, [*flags, "--steps", "1"], ""))
    weights = load_file(model / "model.safetensors")
    weights["visual.blocks.0.norm1.weight"][0] += 0.5
    save_file(weights, model / "model.safetensors")
    with pytest.raises(MocaError, match="--model"):
        train_cl.train(train_cl.parse_flags(train_cl.Flags, [*flags, "--resume"], ""))


@BOTH
def test_bfloat16(plain: dict, run: Callable, golden: Path, tmp_path: Path, stage: object) -> None:
    """Products and frozen weights in bfloat16, adapters in float32: it begins with the same loss
    but for rounding (2^-9, a few times; stage 2 divides cosines by 0.1), and frozen weights are
    rounded once."""
    half = run(stage, tmp_path / "run", "--dtype", "bfloat16")
    first, reference = read_log(half)[0], read_log(plain[stage])[0]
    assert first["loss"] == pytest.approx(reference["loss"], rel=5e-2)
    begun, ended = load_file(golden / "qwen2.5-vl" / "model.safetensors"), read_weights(half)
    name = "visual.merger.mlp.0.weight"
    assert ended[name].equal(begun[name].bfloat16().to(ended[name].dtype))
    saved = torch.load(half / "checkpoint" / "rank-00000.pt", weights_only=True)
    assert {parameter.dtype for parameter in saved["parameters"]} == {torch.float32}
