"""All that runs on a GPU, once each on make-believe CUDA: forward and, in training, backward.

    python tests/cuda_paths.py                      all, one line of JSON each
    python tests/cuda_paths.py caption "stage 1"    these

test_cuda_path.py runs this in a process of its own and judges what it prints. The models have the
widths, heads and vocabulary of Qwen2.5-VL-3B, which cost nothing here, and few layers: two blocks
in the vision tower, one with windows and one without, and a layer in the decoder.
"""

import contextlib
import copy
import functools
import inspect
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from PIL import Image
from torch import Tensor, nn

import trace_cuda
from fake_cuda import demands, device, start
from nano_moca import MARK, Moca, Record, attention, kernels
from nano_moca.config import BASE, Config
from nano_moca.families import load_config
from nano_moca.losses import info_nce
from nano_moca.masking import MaskedBatch, mask_batch, next_token_batch
from nano_moca.model import ReconstructionModel
from nano_moca.processor import Processor
from nano_moca.report.stage1 import restore
from nano_moca.weights import empty_model
from real_shapes import config_3b

CUDA = "cuda:0"
WORDS = "red anchor, blue star, nothing, yellow snowman"
BOTH = [Record(MARK + WORDS, [Image.effect_noise((112, 84), 50)]), Record(WORDS * 3),
        Record(f"{MARK} and {MARK}", [Image.effect_noise((56, 56), 50)] * 2), Record(WORDS)]
TEXTS = [Record(WORDS), Record("nothing " * 9)]
RATES = (0.4, 0.5)  # of masked tokens, of masked groups


# --- models and batches ---------------------------------------------------------------


def config_file(family: str) -> dict:
    """config.json of a model with 3B's shapes; of Qwen3-VL, with those of the smallest one."""
    raw = copy.deepcopy(config_3b()) | {"num_hidden_layers": 1}
    vision = raw["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}
    if family == "untied":
        raw["tie_word_embeddings"] = False
    if family == "qwen2":
        raw["model_type"] = "qwen2_vl"
        vision = {"depth": 2, "embed_dim": 1280, "hidden_size": 2048, "num_heads": 16,
                  "mlp_ratio": 4, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
                  "temporal_patch_size": 2}
    if family == "qwen3":
        ids = {key: value for key, value in raw.items() if key.endswith("token_id")}
        text = {"model_type": "qwen3_vl_text", "vocab_size": 151936, "hidden_size": 2048,
                "intermediate_size": 6144, "num_hidden_layers": 1, "num_attention_heads": 16,
                "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": {
                    "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20]}}
        vision = {"depth": 2, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
                  "out_hidden_size": 2048, "num_position_embeddings": 2304,
                  "deepstack_visual_indexes": [0]}
        return ids | {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision,
                      "tie_word_embeddings": True}
    return raw | {"vision_config": vision}


@functools.cache
def parts(family: str) -> tuple[Config, Processor]:
    """A config, and the nano tokenizer with small limits on images."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_file(family)))
        config = load_config(Path(folder))
        tools = BASE
        if family == "qwen3":
            tools = Path(folder)
            image = json.loads((BASE / "preprocessor_config.json").read_text())
            image |= {"patch_size": 16}
            (tools / "preprocessor_config.json").write_text(json.dumps(image))
            (tools / "tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
        return config, Processor.load(tools, config, 56 * 56, 112 * 112)


@functools.cache
def model_of(family: str, dtype: torch.dtype) -> ReconstructionModel:
    """The model on the device, as the scripts make it but for FSDP."""
    model = ReconstructionModel(empty_model(parts(family)[0], dtype)).to(dtype)
    model.vlm.run_vision_always = True
    return model.to_empty(device=CUDA)


def masked_batch(records: list[Record], family: str, rates: tuple[float, float]) -> MaskedBatch:
    """Records packed and masked, on the host."""
    processor = parts(family)[1]
    batch = processor.batch(records)
    return mask_batch(batch, processor, *rates, [(0, number) for number in range(len(records))])


def check_gradients(model: nn.Module) -> None:
    """Every parameter has a gradient like itself. Then they go."""
    for name, parameter in model.named_parameters():
        found = parameter.grad
        assert found is not None, f"{name} has no gradient"
        assert found.shape == parameter.shape and found.dtype == parameter.dtype, name
        assert found.device == parameter.device == torch.device(CUDA), name
    model.zero_grad()


# --- the paths ------------------------------------------------------------------------


def reconstruct(dtype: torch.dtype = torch.bfloat16, causal: bool = False, family: str = "2.5",
                records: list[Record] = BOTH, rates: tuple[float, float] = RATES,
                checkpointing: bool = False, next_token: bool = False, triton: bool = True) -> None:
    """Stage 1: both losses and their gradients."""
    model = model_of(family, dtype)
    model.vlm.set_checkpointing(checkpointing)
    masked = masked_batch(records, family, rates)
    if next_token:
        processor = parts(family)[1]
        masked = next_token_batch(processor.batch(records), processor)

    available = kernels.TRITON_AVAILABLE
    kernels.TRITON_AVAILABLE = available and triton
    mlm, mae = model(masked.to(CUDA), causal, 9, 9)
    kernels.TRITON_AVAILABLE = available
    for loss in (mlm, mae):
        assert loss.dtype == torch.float32 and loss.shape == () and loss.device.type == "cuda"
    (mlm + 0.5 * mae).backward()
    check_gradients(model)
    model.vlm.set_checkpointing(False)


def contrast(dtype: torch.dtype = torch.bfloat16, pooling: str = "mean", family: str = "2.5",
             cached: bool = False) -> None:
    """Stage 2: two queries, two positives and two hard negatives, with a gradient cache or not."""
    model = model_of(family, dtype).vlm
    processor = parts(family)[1]
    causal = pooling == "last"
    chunks = [processor.batch(BOTH[:3]), processor.batch([BOTH[3], *TEXTS])]

    # The cache: embed without a graph, and again with one.
    vectors = []
    for chunk in chunks:
        with torch.set_grad_enabled(not cached):
            vectors.append(model.embed(chunk.to(CUDA), causal, pooling))
    table = torch.cat(vectors)
    assert table.shape == (6, 2048) and table.dtype == torch.float32
    if cached:
        table.requires_grad_()

    local_index = torch.arange(2).to(CUDA, non_blocking=True)
    excluded = torch.zeros(2, 4, dtype=torch.bool).to(CUDA, non_blocking=True)
    loss, right = info_nce(*table.split([2, 2, 2]), local_index, excluded, 0.03)
    assert loss.dtype == torch.float32 and right.dtype == torch.int64
    loss.backward()
    if cached:
        for chunk, gradient in zip(chunks, table.grad.split([3, 3]), strict=True):
            model.embed(chunk.to(CUDA), causal, pooling).backward(gradient)

    # A tied head is the embedding. An untied one, and the MAE decoder, are not in this loss.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or name == "lm_head.weight", name
    model.zero_grad()


def answers() -> None:
    """The report's question: what was masked, on the host."""
    masked = masked_batch(BOTH, "2.5", RATES)
    tokens, pixels = restore(model_of("2.5", torch.bfloat16), masked, torch.device(CUDA), False)
    assert tokens.shape == masked.labels.shape and pixels.shape == masked.target.shape
    assert tokens.device.type == pixels.device.type == "cpu"


def embed_items(pooling: str) -> None:
    """A model in use: vectors on the host. (Inference mode is no place for FakeTensors; what is
    under that decorator runs without gradients here.)"""
    moca = Moca(model_of("2.5", torch.bfloat16).vlm, parts("2.5")[1], pooling=pooling)
    embed = inspect.unwrap(Moca.embed)
    with torch.no_grad():
        assert embed(moca, BOTH).shape == (4, 2048)


def caption() -> None:
    """Greedy decoding."""
    moca = Moca(model_of("2.5", torch.bfloat16).vlm, parts("2.5")[1], "causal", "last")
    assert len(moca.caption(BOTH[:2], steps=2)) == 2


def train(script: str, cuda: device.FakeCuda, launches: list) -> None:
    """One step of a script's own `train` on the nano base, as rank 0 of 2 under FSDP2. (At true
    shapes, and in words: trace_cuda.py.)"""
    own = {"cpt": ["--batch-tokens", "600", "--accumulate", "2"],
           "cl": ["--batch", "4", "--chunk", "200", "--hard-negatives", "1"]}[script]
    options, words = trace_cuda.parse([script, "nano", "--world", "2", "--traced", "1", *own])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trace_cuda.follow(cuda, launches, options, words, Path(folder))


HALF, FULL = torch.bfloat16, torch.float32
PATHS: dict[str, Callable[[], None]] = {
    "stage 1": reconstruct,
    "stage 1, causal": lambda: reconstruct(causal=True),
    "stage 1, float32 and causal": lambda: reconstruct(FULL, causal=True),
    "stage 1, checkpointing": lambda: reconstruct(checkpointing=True),
    "stage 1, loss without Triton": lambda: reconstruct(triton=False),
    "stage 1, float32 without Triton": lambda: reconstruct(FULL, triton=False),
    "stage 1, no image": lambda: reconstruct(records=TEXTS),
    "stage 1, nothing masked": lambda: reconstruct(rates=(0.0, 0.0)),
    "stage 1, no word masked": lambda: reconstruct(rates=(0.0, 0.5)),
    "stage 1, next token": lambda: reconstruct(causal=True, next_token=True),
    "stage 1, untied head": lambda: reconstruct(family="untied"),
    "stage 1, Qwen2-VL": lambda: reconstruct(family="qwen2"),
    "stage 1, Qwen3-VL": lambda: reconstruct(family="qwen3"),
    "stage 2": contrast,
    "stage 2, float32": lambda: contrast(FULL),
    "stage 2, last token": lambda: contrast(pooling="last"),
    "stage 2, gradient cache": lambda: contrast(cached=True),
    "stage 2, Qwen3-VL": lambda: contrast(family="qwen3"),
    "report": answers,
    "embed": lambda: embed_items("mean"),
    "embed, last token": lambda: embed_items("last"),
    "caption": caption,
}
SCRIPTS = {"cpt": "train_cpt.py", "cl": "train_cl.py"}


# --- faults that the guard has to see -------------------------------------------------


@contextlib.contextmanager
def attention_of(change: Callable[..., Tensor]) -> Iterator[None]:
    """varlen_attn with other arguments."""
    original = attention.varlen_attn
    attention.varlen_attn = functools.partial(change, original)
    try:
        yield
    finally:
        attention.varlen_attn = original


def int64_offsets(original: Callable, query: Tensor, key: Tensor, value: Tensor, starts: Tensor,
                  *rest: object, **more: object) -> Tensor:
    """What `torch.cumsum` makes, if nobody says int32."""
    starts = starts.long()
    return original(query, key, value, starts, starts, *rest[1:], **more)


def heads_not_repeated(original: Callable, query: Tensor, key: Tensor, value: Tensor,
                       *rest: object, **more: object) -> Tensor:
    """Grouped heads handed on as they are; the operator of torch 2.11 lets them pass."""
    starts, _, longest, _ = rest
    grouped = key[:, :1].contiguous(), value[:, :1].contiguous()
    out, *_ = torch.ops.torch_attn._varlen_attn(query, *grouped, starts, starts, longest, longest)
    return out


def heads_with_gaps(original: Callable, query: Tensor, key: Tensor, value: Tensor,
                    *rest: object, **more: object) -> Tensor:
    """A value of the right shape, laid out the other way round."""
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    return original(query, key, turned, *rest, **more)


def with_attention(change: Callable[..., Tensor]) -> None:
    """Stage 1 with a fault in attention."""
    with attention_of(change):
        reconstruct()


def int32_labels() -> None:
    """Labels in the dtype of offsets."""
    masked = masked_batch(BOTH, "2.5", RATES).to(CUDA)
    model_of("2.5", HALF)(replace(masked, labels=masked.labels.int()), False, 9, 9)


def half_losses() -> None:
    """The loss's kernel on float16."""
    logits = torch.empty(3, 9, dtype=torch.float16, device=CUDA)
    labels = torch.zeros(3, dtype=torch.int64, device=CUDA)
    kernels.cross_entropy_kernel[(3,)](logits, labels, logits[:, 0].float(), 1.0, V=9,
                                       GRADIENT=True, BLOCK=4096, num_warps=8)


def rounded_sum() -> None:
    """The head's gradient added up in bfloat16 by the call that adds up in float32."""
    total = torch.empty(9, 4, dtype=torch.bfloat16, device=CUDA)
    left = torch.empty(9, 3, dtype=torch.bfloat16, device=CUDA)
    right = torch.empty(3, 4, dtype=torch.bfloat16, device=CUDA)
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def mixed_factors() -> None:
    """A matrix product of two dtypes."""
    left = torch.empty(9, 3, dtype=torch.bfloat16, device=CUDA)
    torch.mm(left, torch.empty(3, 4, device=CUDA))


FAULTS: dict[str, tuple[Callable[[], None], str]] = {  # name: (what is done, what must be said)
    "int64 offsets": (lambda: with_attention(int64_offsets), "offsets of int32"),
    "heads not repeated": (lambda: with_attention(heads_not_repeated), "repeat them"),
    "heads with gaps": (lambda: with_attention(heads_with_gaps), "heads without gaps"),
    "labels of int32": (int32_labels, "labels must be int64"),
    "loss of float16": (half_losses, "logits is torch.float16"),
    "sum of bfloat16": (rounded_sum, "would refuse"),
    "factors of two dtypes": (mixed_factors, "factors of one dtype"),
}


def each_left_behind(notes: device.Notes) -> None:
    """Each tensor of a batch, left on the CPU in its turn, is refused; or it is an index, and is
    counted as a copy."""
    usual = stops_of(notes, None)
    places = list(places_of(masked_batch(BOTH, "2.5", RATES).to(CUDA)))
    assert usual is not None and len(places) >= 6, f"few tensors in a batch: {places}"
    for place in places:
        stops = stops_of(notes, place)
        assert stops is None or stops > usual, f"nobody noticed {'.'.join(place)} on the CPU"


def places_of(item: object, owners: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where in a dataclass, and in those inside it, the tensors on CUDA are."""
    for entry in fields(item):
        value = getattr(item, entry.name)
        if isinstance(value, Tensor) and device.is_cuda(value):
            yield *owners, entry.name
        elif is_dataclass(value):
            yield from places_of(value, (*owners, entry.name))


def stops_of(notes: device.Notes, left: tuple[str, ...] | None) -> int | None:
    """How often the host stops in both stages' forward, with the tensor of that place left on the
    CPU; None: it is refused."""
    masked = masked_batch(BOTH, "2.5", RATES).to(CUDA)
    if left:
        *owners, name = left
        owner = functools.reduce(getattr, owners, masked)
        setattr(owner, name, getattr(owner, name).cpu())
    notes.clear()
    model = model_of("2.5", HALF)
    try:
        with torch.no_grad():
            model(masked, False, 9, 9)
            model.vlm.embed(masked.batch, False, "mean")
    except (RuntimeError, AssertionError):
        return None
    return notes.waits.total() + notes.of_kind("blocking")


def index_on_the_host(notes: device.Notes) -> None:
    """An index on the CPU into a tensor on CUDA is a copy that waits, and so is a list."""
    hidden = torch.empty(9, 4, device=CUDA)
    assert hidden[torch.tensor([1, 2])].shape == (2, 4)
    assert notes.of_kind("blocking") == 1
    torch.tensor([1, 2], device=CUDA)
    assert notes.of_kind("blocking") == 2 and not notes.waits


def mask_on_the_device(notes: device.Notes) -> None:
    """A mask in place of an index: how many it selects, only the device knows."""
    hidden = torch.empty(9, 4, device=CUDA)
    try:
        hidden[hidden[:, 0] > 0]
    except RuntimeError as error:
        assert "depends on numbers" in str(error)
    else:
        raise AssertionError("the mask was not seen")


def pinned_or_not(notes: device.Notes) -> None:
    """Copies are told apart by how they are asked for and by the memory that they come from."""
    numbers = torch.ones(6)
    numbers.to(CUDA)
    numbers.to(CUDA, non_blocking=True)
    numbers.pin_memory().to(CUDA, non_blocking=True)
    numbers.pin_memory()[2:].to(CUDA, non_blocking=True)
    assert [notes.of_kind(kind) for kind in ("blocking", "unpinned", "pinned")] == [1, 1, 2]
    assert notes.sent["pinned"] == 4 * (6 + 4)


def numbers_come_back(notes: device.Notes) -> None:
    """What the host reads is a wait each time: what it sent, or what is invented."""
    sent = torch.tensor([3, 5]).to(CUDA, non_blocking=True)
    assert sent.tolist() == [3, 5] and sent[0].item() == 3 and float(sent.float().sum()) == 1.0
    assert notes.waits.total() == 3


CHECKS: dict[str, Callable[[device.Notes], None]] = {  # that faults and stops are seen at all
    "each tensor left on the CPU": each_left_behind,
    "index on the CPU": index_on_the_host,
    "mask on the device": mask_on_the_device,
    "copies, pinned or not": pinned_or_not,
    "numbers that come back": numbers_come_back,
}


# --- the run --------------------------------------------------------------------------


def main(names: list[str]) -> None:
    """The paths, faults, checks and scripts of these names, or all; a line of JSON for each."""
    launches = demands.stand_in_for_kernels(kernels)
    cuda = device.FakeCuda()
    device.pretend(cuda)
    todo = PATHS | {name: fault for name, (fault, _) in FAULTS.items()}
    todo |= {name: functools.partial(check, cuda.notes) for name, check in CHECKS.items()}
    for name, path in todo.items():
        if name in names or not names:
            with cuda:
                error = error_of(path)
            report(name, error, cuda.notes)

    # The scripts come last, for they make a group of ranks.
    scripts = [script for script in SCRIPTS if SCRIPTS[script] in names or not names]
    if scripts:
        trace_cuda.join(2)
        cuda.watch_threads()
    for script in scripts:
        error = error_of(functools.partial(train, script, cuda, launches))
        report(SCRIPTS[script], error, cuda.notes)


def error_of(path: Callable[[], None]) -> str:
    """What a path raises, and where; empty if nothing."""
    try:
        path()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
    return ""


def report(name: str, error: str, notes: device.Notes) -> None:
    """One line of JSON. Then what was noted goes."""
    where = [f"{count} x {what}, {line}" for (what, line), count in notes.waits.items()]
    where += [f"{count} x blocking copy, {line}" for (kind, line), count in notes.copies.items()
              if kind == "blocking"]
    print(json.dumps({"name": name, "error": error, "waits": notes.waits.total(),
                      "blocking": notes.of_kind("blocking"), "where": where}), flush=True)
    notes.clear()


if __name__ == "__main__":
    if why := start.missing():
        sys.exit(f"no make-believe CUDA here: {why}")
    if start.started():
        main(sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(start.run_again(Path(__file__), sys.argv[1:], Path(folder)))
