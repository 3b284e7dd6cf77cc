"""Stage 2 from the outside: what a run of train_cl.py writes, repeats, survives and refuses.

One run on one rank and one on two go through the real command line; for the others see
launching.py.
"""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nano_moca
import train_cl
from launching import (
    FAULTS, SMALL, assert_equal_run, assert_same_run, listed, read_log, read_weights, torchrun,
    wait_for, words, write_data,
)
from nano_moca import MARK, MocaError, losses
from nano_moca.evaluate.command import main as evaluate
from nano_moca.report import stage2

SCRIPT = train_cl
STEPS = 6
# rates of the embedded default would throw this random model about
DEFAULTS = (f"--steps {STEPS} --batch 4 --learning-rate 1e-4 --temperature 0.1 --device cpu "
            "--warmup 0.3 --clip 1")
FIGURES = {"step", "loss", "task", "accuracy", "lr", "grad_norm", "tokens"}  # but for speed


def pair_lines(folder: Path) -> list[dict]:
    """Two tasks with pictures and one of texts alone, nine pairs each, with hard negatives."""
    numbers, lines = np.random.default_rng(0), []
    for i in range(9):
        for name in (f"{i}.png", f"{i}-near.png"):
            sides = ((56, 56), (84, 56), (56, 112))[i % 3]
            Image.fromarray(numbers.integers(0, 255, (*sides, 3), np.uint8)).save(folder / name)
        picture, near = ({"text": f"{MARK} page {i}", "images": [name]}
                         for name in (f"{i}.png", f"{i}-near.png"))
        caption, other = {"text": f"noise number {i}"}, {"text": f"noise number {i + 20} or more"}
        lines += [
            {"task": "caption", "kind": "image-text", "query": picture, "positive": caption,
             "negatives": [other, {"text": "no noise"}]},
            {"task": "page", "kind": "long-document", "query": other, "positive": picture,
             "negatives": [near]},
            {"task": "words", "kind": "text-only", "query": caption,
             "positive": {"text": f"a text about {i} in other words " + "and more " * (i % 4)}},
        ]
    return lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs here learn from."""
    folder = tmp_path_factory.mktemp("pairs")
    return write_data(folder / "data.jsonl", pair_lines(folder))


def in_process(golden: Path, output: Path, *flags: str | Path) -> list[dict]:
    """The same run in this process: errors can be caught, and functions replaced. Its log."""
    line = words(golden, output, DEFAULTS, *flags)
    train_cl.train(train_cl.parse_flags(train_cl.Flags, line, ""))
    return read_log(output)


@pytest.fixture
def ablated(golden: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
            ) -> Callable[..., list[dict]]:
    """The log of a run with other flags, in this process."""
    monkeypatch.setattr(stage2, "REPORT_PAIRS", SMALL[stage2]["REPORT_PAIRS"])
    return lambda *flags: in_process(golden, tmp_path / "run", "--data", data, *flags)


# --- what a run writes --------------------------------------------------------------------------

def test_what_a_run_writes(plain: Path) -> None:
    """Log, model, checkpoint, pictures and scores, and nothing half-written beside them."""
    names = "checkpoint log.jsonl loss.png model retrieval.png scores.json similarity.png".split()
    assert listed(plain) == names
    log = read_log(plain)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert Counter(line["task"] for line in log) == {"caption": 2, "page": 2, "words": 2}
    for line in log:
        assert set(line) == {*FIGURES, "tokens_per_second"}
        assert line["accuracy"] in (0, 0.25, 0.5, 0.75, 1) and line["loss"] > 0 < line["grad_norm"]
    for name in ("loss.png", "retrieval.png", "similarity.png"):
        with Image.open(plain / name) as picture:
            assert min(picture.size) > 200
    scores = json.loads((plain / "scores.json").read_text())
    assert {*scores["tasks"]} == {"caption", "page", "words"}
    assert scores["tasks"]["caption"]["candidates"] == 9 + 9 + 1  # one negative is in all pairs
    saved = torch.load(plain / "checkpoint" / "rank-00000.pt", weights_only=True)
    assert saved["state"]["step"] == STEPS


def test_model_loads(plain: Path, golden: Path) -> None:
    """`nano_moca.load` and transformers read the model; all of it was trained."""
    moca = nano_moca.load(plain / "model", "cpu")
    vectors = moca.embed(["words", {"text": MARK, "images": [golden / "images/0-rgb-84x84.png"]}])
    assert vectors.isfinite().all() and vectors.norm(dim=1).allclose(torch.ones(2))
    begun, ended = (load_file(folder / "model.safetensors")
                    for folder in (golden / "qwen2.5-vl", plain / "model"))
    assert begun.keys() == ended.keys()
    assert not [key for key in begun if begun[key].equal(ended[key])]
    transformers = pytest.importorskip("transformers")
    _, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        plain / "model", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_it_learns_what_it_sees(ablated: Callable) -> None:
    """Few pairs, many steps: nearly all told apart from the others of their batch."""
    log = ablated("--steps", "40", "--learning-rate", "1e-3", "--without", "text-only")
    first, last = ([line["loss"] for line in part] for part in (log[:8], log[-8:]))
    assert sum(last) < 0.5 * sum(first)


def test_untied_models_train(golden: Path, data: Path, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of its own takes no part in stage 2: it stays as it was, and resuming works."""
    monkeypatch.setattr(stage2, "REPORT_PAIRS", 4)
    flags = "--model", golden / "qwen2.5-vl-untied", "--data", data, "--save-every", "1"
    in_process(golden, tmp_path / "run", *flags, "--steps", "2")
    in_process(golden, tmp_path / "run", *flags, "--steps", "2", "--resume")
    begun, ended = (load_file(folder / "model.safetensors")["lm_head.weight"]
                    for folder in (golden / "qwen2.5-vl-untied", tmp_path / "run" / "model"))
    changed = (begun != ended).any(1).nonzero().flatten().tolist()
    assert changed == [nano_moca.load(tmp_path / "run" / "model", "cpu").processor.mask_token]


# --- ranks and chunks ---------------------------------------------------------------------------

def test_two_ranks_change_nothing(plain: Path, golden: Path, data: Path, tmp_path: Path) -> None:
    """torchrun with two processes logs the losses of one and ends with its weights and scores."""
    done = torchrun(train_cl, words(golden, tmp_path / "two", DEFAULTS, "--data", data))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", plain)
    ours, theirs = (json.loads((output / "scores.json").read_text())["tasks"]
                    for output in (tmp_path / "two", plain))
    assert ours == theirs


@pytest.mark.parametrize(("chunk", "ranks"), [(60, 1), (1, 1), (60, 2), (1, 2), (0, 3)])
def test_chunks_change_nothing(plain: Path, run: Callable, tmp_path: Path, chunk: int, ranks: int
                               ) -> None:
    """--chunk, and ranks, among them three, which do not divide a tensor's rows, are the same
    run."""
    assert_same_run(run(tmp_path / "run", "--chunk", str(chunk), ranks=ranks), plain)


def test_activation_checkpointing_changes_nothing(plain: Path, run: Callable, tmp_path: Path
                                                  ) -> None:
    """--checkpointing computes the same twice."""
    assert_same_run(run(tmp_path / "run", "--checkpointing", "--chunk", "60"), plain)


def test_a_report_on_no_usable_pair(ablated: Callable, tmp_path: Path) -> None:
    """Held-out lines that all name no task cost the report its pictures, and not the run."""
    held_out = write_data(tmp_path / "held-out.jsonl", [{"query": {"text": "no task"}}] * 2)
    ablated("--steps", "1", "--held-out", held_out, "--on-error", "skip")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores == {"pairs": str(held_out), "tasks": {}}
    assert not (tmp_path / "run" / "retrieval.png").exists()


def test_a_gather_without_gradient_is_another_run(
        plain: Path, ablated: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above see what the positives' gradient is worth."""
    gather = losses.gather
    monkeypatch.setattr(losses, "gather",
                        lambda local, index, total: gather(local.detach(), index, total))
    cut, full = ablated("--steps", "1"), read_log(plain)
    assert cut[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-5)
    assert cut[0]["grad_norm"] != pytest.approx(full[0]["grad_norm"], rel=1e-1)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(plain: Path, run: Callable, tmp_path: Path, fault: str) -> None:
    """The comparison with one rank is not so wide that a real fault of two would pass."""
    faulty = run(tmp_path / "run", ranks=2, fault=fault)
    with pytest.raises(AssertionError):
        assert_same_run(faulty, plain)


def test_no_report(run: Callable, plain: Path, tmp_path: Path) -> None:
    """--no-report: the same model, without scores and pictures."""
    output = run(tmp_path / "run", "--no-report")
    names = "checkpoint log.jsonl model".split()
    assert listed(output) == names
    assert all(map(torch.equal, read_weights(output).values(), read_weights(plain).values()))


# --- killed and resumed -------------------------------------------------------------------------

def test_same_command_same_bits(plain: Path, run: Callable, tmp_path: Path) -> None:
    """The same flags give the same weights; another seed gives another order."""
    assert_equal_run(run(tmp_path / "again"), plain)
    other = run(tmp_path / "other", "--seed", "1", "--steps", "1")
    assert read_log(other)[0]["loss"] != read_log(plain)[0]["loss"]


@pytest.mark.parametrize(("save_every", "moments"), [(1, (1, 2, 4)), (2, (0, 3, 5))])
def test_killed_and_resumed(plain: Path, launch: Callable, run: Callable, data: Path,
                            tmp_path: Path, save_every: int, moments: tuple[int, ...]) -> None:
    """Killed three times at any moment, resumed each time: the bits and the log of a run without
    a break."""
    output, flags = tmp_path / "run", ("--save-every", str(save_every))
    log = output / "log.jsonl"
    for number, lines in enumerate(moments):
        job = launch(output, "--data", data, *flags, *["--resume"] * (number > 0))
        wait_for(job, lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)
        time.sleep(random.uniform(0, 0.1))  # in the step after, or while it is saved
        job.kill()
        assert job.ranks[0].exitcode == -signal.SIGKILL, "it ended before it was killed"
    run(output, *flags, "--resume")
    assert_equal_run(output, plain)


@pytest.mark.parametrize("changed", ["--seed 1", "--batch 3", "--temperature 0.2", "--chunk 4"])
def test_resumed_with_other_flags(plain: Path, golden: Path, data: Path, tmp_path: Path,
                                  changed: str) -> None:
    """Going on with flags that change the run is refused, the flag named, and nothing is lost."""
    output = Path(shutil.copytree(plain, tmp_path / "run"))
    with pytest.raises(MocaError, match=changed.split()[0]):
        in_process(golden, output, "--data", data, "--resume", *changed.split())
    assert_equal_run(output, plain)


# --- flags that name an ablation ----------------------------------------------------------------

def test_mixed_batches(ablated: Callable, plain: Path) -> None:
    """--task-batches off: one pool, in which a batch has pairs of several tasks."""
    seen = []
    real = train_cl.PairBatches.members

    def members(self: train_cl.PairBatches, name: str, number: int) -> list[int]:
        seen.append(real(self, name, number))
        return seen[-1]

    train_cl.PairBatches.members = members
    try:
        log = ablated("--task-batches", "off")
    finally:
        train_cl.PairBatches.members = real
    assert {line["task"] for line in log} == {"mixed"}
    assert any(len({index // 9 for index in batch}) > 1 for batch in seen)
    assert {index for batch in seen for index in batch} <= {*range(27)}


def test_a_kind_left_out(ablated: Callable) -> None:
    """--without: its tasks do not come."""
    for kind, rest in (("long-document", {"caption", "words"}), ("text-only", {"caption", "page"})):
        assert {line["task"] for line in ablated("--without", kind)} == rest


def test_hard_negatives_count(ablated: Callable, plain: Path) -> None:
    """--hard-negatives 0 leaves them out: fewer tokens, a smaller loss."""
    without, plain_log = ablated("--hard-negatives", "0"), read_log(plain)
    some = next(i for i, line in enumerate(plain_log) if line["task"] != "words")
    assert without[some]["tokens"] < plain_log[some]["tokens"]
    assert ablated("--steps", str(some + 1))[some]["tokens"] == plain_log[some]["tokens"]


def test_causal_attention_pools_the_last_token(ablated: Callable, plain: Path) -> None:
    """--attention causal takes the last token unless told otherwise, and each of the four choices
    computes something else."""
    first = [ablated("--steps", "1", *flags)[0]["loss"] for flags in (
        ("--attention", "causal"), ("--attention", "causal", "--pooling", "last"),
        ("--attention", "causal", "--pooling", "mean"), ("--pooling", "last"))]
    assert first[0] == first[1]
    assert len({*first, read_log(plain)[0]["loss"]}) == 4


def test_a_model_says_how_it_was_trained(ablated: Callable, plain: Path, golden: Path,
                                         tmp_path: Path) -> None:
    """`load` and `evaluate` take attention and pooling from the model, unless told otherwise."""
    ablated("--steps", "1", "--attention", "causal")
    causal, both = tmp_path / "run" / "model", plain / "model"
    for folder, asked, expected in (
            (causal, (), ("causal", "last")), (both, (), ("bidirectional", "mean")),
            (causal, ("bidirectional", "mean"), ("bidirectional", "mean")),
            (both, ("causal", "last"), ("causal", "last")),
            (golden / "qwen2.5-vl", (), ("bidirectional", "mean")),  # says nothing
            (golden / "qwen2.5-vl", ("causal",), ("causal", "last"))):
        moca = nano_moca.load(folder, "cpu", None, *asked)
        assert (moca.attention, moca.pooling) == expected
    items, output = tmp_path / "items.jsonl", tmp_path / "vectors.npy"
    items.write_text(json.dumps({"text": "noise number 1"}))
    evaluate(["embed", "--model", str(causal), "--input", str(items), "--device", "cpu",
                   "--output", str(output)])
    as_trained = nano_moca.load(causal, "cpu", None, "causal", "last").embed(["noise number 1"])
    assert np.abs(np.load(output) - as_trained.numpy()).max() < 1e-6


# --- bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("line", [
    "--surely-unknown 1", "--temperature 0", "--batch 1", "--hard-negatives -1", "--chunk -1",
    "--task-batches maybe", "--alpha 400", "--temperature inf", "--without images", "--pooling max",
])
def test_bad_flags(line: str, capsys: pytest.CaptureFixture) -> None:
    """One line that names the flag, and exit code 2."""
    with pytest.raises(SystemExit) as caught:
        train_cl.parse_flags(train_cl.Flags, line.split(), "")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and line.split()[0] in error


TEXT = {"text": "good"}
BAD_LINES = {
    "malformed JSON": '{"task": "cut',
    "no kind": {"task": "caption", "query": TEXT, "positive": TEXT},
    "no positive": {"task": "caption", "kind": "image-text", "query": TEXT},
    "empty query": {"task": "caption", "kind": "image-text", "query": {"text": " "},
                    "positive": TEXT},
    "missing image": {"task": "caption", "kind": "image-text", "query": TEXT,
                      "positive": {"text": MARK, "images": ["absent.png"]}},
    "truncated image": {"task": "caption", "kind": "image-text", "query": TEXT, "positive": TEXT,
                        "negatives": [{"text": MARK, "images": ["cut.png"]}]},
    "path leaving the folder": {"task": "caption", "kind": "image-text", "query": TEXT,
                                "positive": {"text": MARK, "images": ["../0.png"]}},
}


def bad_data(folder: Path, *kinds: str) -> Path:
    """The good pairs, and bad ones from the third line on."""
    folder.mkdir()
    good = pair_lines(folder)
    (folder / "cut.png").write_bytes((folder / "4.png").read_bytes()[:3000])
    return write_data(folder / "data.jsonl", [*good[:2], *(BAD_LINES[k] for k in kinds), *good[2:]])


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_pairs(golden: Path, tmp_path: Path, kind: str) -> None:
    """One line that names file and line; no model is written."""
    with pytest.raises(MocaError, match=r"data\.jsonl:3\b") as caught:
        in_process(golden, tmp_path / "run", "--data", bad_data(tmp_path / "data", kind),
                   "--steps", "12")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("flags", [
    ("--model", "no/such/folder"), ("--data", "absent.jsonl"), ("--batch", "30"),
    ("--data", "missing image"),
], ids=" ".join)
def test_bad_input_on_the_command_line(launch: Callable, data: Path, tmp_path: Path,
                                       flags: tuple[str, str]) -> None:
    """Exit code 1, and one line that says it."""
    flag, value = flags
    if value in BAD_LINES:
        value = bad_data(tmp_path / "data", value)
    job = launch(tmp_path / "run", "--data", data, "--steps", "12", flag, value)
    assert job.wait() == 1
    errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in job.output
    assert not (tmp_path / "run" / "model").exists()


def test_bad_pairs_are_skipped(run: Callable, tmp_path: Path) -> None:
    """--on-error skip: each is listed once a pass with its reason; ranks and a resume change
    nothing."""
    bad = bad_data(tmp_path / "data", *BAD_LINES)
    flags = "--data", bad, "--on-error", "skip", "--steps", "6", "--save-every", "2"
    one, two = run(tmp_path / "one", *flags), run(tmp_path / "two", *flags, ranks=2)
    assert_same_run(two, one)
    run(tmp_path / "one", *flags, "--resume")
    for output in (one, two):
        listed = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
        assert [line["count"] for line in listed] == list(range(1, len(listed) + 1))
        assert [f"data.jsonl:{n}" in listed[n - 3]["reason"] for n in (3, 4)] == [True, True]
        assert len({line["reason"] for line in listed}) == len(listed) >= 5


# --- not finite ---------------------------------------------------------------------------------

@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite(plain: Path, golden: Path, data: Path, run: Callable, tmp_path: Path,
                    monkeypatch: pytest.MonkeyPatch, value: str, where: str) -> None:
    """The step and its records are named, and the checkpoint is the step's before: resumed without
    the fault, the run ends as if nothing had been."""
    right, calls = train_cl.info_nce, []

    def wrong(*inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        loss, correct = right(*inputs)
        if len(calls) == 4 and where == "loss":
            loss = loss * float(value)
        elif len(calls) == 4:
            loss.register_hook(lambda gradient: gradient * float(value))
        return loss, correct

    monkeypatch.setattr(train_cl, "info_nce", wrong)
    with pytest.raises(MocaError, match=rf"step 4: the {where}.*data\.jsonl:\d+ query, ") as caught:
        in_process(golden, tmp_path / "run", "--data", data, "--save-every", "1")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "model").exists()
    saved = torch.load(tmp_path / "run" / "checkpoint" / "rank-00000.pt", weights_only=True)
    assert saved["state"]["step"] == 3
    assert_equal_run(run(tmp_path / "run", "--resume"), plain)


def test_weights_not_finite(checkpoint: Path, data: Path, launch: Callable, tmp_path: Path) -> None:
    """A checkpoint with one weight that is no number is refused when it is loaded, in one line
    that names the weight and its file."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    job = launch(tmp_path / "run", "--data", data, "--model", checkpoint)
    assert job.wait() == 1 and "Traceback" not in job.output
    assert f"{checkpoint / 'model.safetensors'}: model.layers.1.mlp.up_proj.weight" in job.output


def test_what_the_report_is_on(ablated: Callable, data: Path, capsys: pytest.CaptureFixture,
                               tmp_path: Path) -> None:
    """Pairs that were learned from are called so; others are not; with --on-error skip, lines that
    cannot be used do not stop it."""
    ablated("--steps", "1")
    assert f"{data}, learned from" in capsys.readouterr().out
    other = bad_data(tmp_path / "other", "malformed JSON")
    ablated("--steps", "1", "--held-out", other, "--on-error", "skip")
    said = capsys.readouterr().out
    assert "learned from" not in said and "no report" not in said
    assert {*json.loads((tmp_path / "run" / "scores.json").read_text())["tasks"]} == {
        "caption", "page", "words"}


def test_a_report_on_data_that_cannot_be_read(ablated: Callable, tmp_path: Path,
                                              capsys: pytest.CaptureFixture) -> None:
    """What the report would have looked at cannot spoil a finished run; that it is there, is
    looked at before the first step."""
    other = bad_data(tmp_path / "other", "malformed JSON")
    ablated("--held-out", str(other), "--steps", "1")
    assert f"no report on {other}" in capsys.readouterr().out
    assert (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "scores.json").exists()
    with pytest.raises(MocaError, match="absent.jsonl"):
        ablated("--held-out", "absent.jsonl", "--steps", "1")
