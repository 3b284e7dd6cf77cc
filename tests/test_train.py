"""Stage 1 from the outside: what a run of train_cpt.py writes, repeats, survives and refuses.

One run on one rank and one on two go through the real command line; for the others see
launching.py.
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nano_moca
import train_cpt
from launching import (
    FAULTS, SMALL, assert_equal_run, assert_same_run, listed, read_log, read_weights, torchrun,
    wait_for, words, write_data,
)
from nano_moca import MARK, MocaError, model
from nano_moca.report import stage1

SCRIPT = train_cpt
STEPS = 6
DEFAULTS = f"--mae-weight 0.5 --steps {STEPS} --batch-tokens 300 --device cpu"
FIGURES = {"step", "loss", "mlm_loss", "mae_loss", "lr", "grad_norm", "tokens"}  # but for speed


@pytest.fixture(scope="module")
def data(mixed: Path) -> Path:
    """What the runs here learn from."""
    return mixed


def in_process(golden: Path, output: Path, *flags: str | Path) -> None:
    """The same run in this process: errors can be caught, and functions replaced."""
    line = words(golden, output, DEFAULTS, *flags)
    train_cpt.train(train_cpt.parse_flags(train_cpt.Flags, line, ""))


# --- what a run writes --------------------------------------------------------------------------

def test_what_a_run_writes(plain: Path, golden: Path) -> None:
    """Log, model, checkpoint, pictures and scores, and nothing half-written beside them."""
    names = "checkpoint log.jsonl loss.png model reconstruction.png scores.json".split()
    assert listed(plain) == names
    log = read_log(plain)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    for line in log:
        assert set(line) == {*FIGURES, "tokens_per_second"}
        assert line["loss"] == pytest.approx(line["mlm_loss"] + 0.5 * line["mae_loss"])
        assert 0 < line["tokens"] <= 300 and line["tokens_per_second"] > 0 < line["grad_norm"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["lr"] < log[0]["lr"] == train_cpt.Flags().learning_rate
    for name in ("loss.png", "reconstruction.png"):
        with Image.open(plain / name) as picture:
            assert min(picture.size) > 200
    scores = json.loads((plain / "scores.json").read_text())
    # eight pictures over and over: too often the wrong picture is the right one
    assert scores.pop("words restored, wrong picture") is None
    assert len(scores) == 10 and all(isinstance(score, float) for score in scores.values())
    assert all(0 <= scores[f"words restored, {kind} picture"] <= 1 for kind in ("right", "no"))
    saved = torch.load(plain / "checkpoint" / "rank-00000.pt", weights_only=True)
    assert saved["state"]["step"] == STEPS


def test_a_first_look_long_before_the_end(golden: Path, data: Path, tmp_path: Path, capsys,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and scores after so many steps, once, and again at the end; the run learns the same
    and saves the same, and --no-report has neither."""
    monkeypatch.setattr(stage1, "REPORT_TOKENS", SMALL[stage1]["REPORT_TOKENS"])
    monkeypatch.setattr(train_cpt, "FIRST_LOOK", 2)
    in_process(golden, tmp_path / "looked", "--data", data, "--save-every", "2")
    said = capsys.readouterr().out
    assert said.count("are of step 2\n") == said.count(f"are of step {STEPS}\n") == 1
    in_process(golden, tmp_path / "not", "--data", data, "--save-every", "2", "--no-report")
    assert "are of step" not in capsys.readouterr().out
    looked, plain = (read_log(tmp_path / name) for name in ("looked", "not"))
    assert [line["loss"] for line in looked] == [line["loss"] for line in plain]
    looked, plain = (read_weights(tmp_path / name) for name in ("looked", "not"))
    assert all(torch.equal(looked[name], plain[name]) for name in plain)


def test_model_loads(plain: Path, golden: Path) -> None:
    """`nano_moca.load` reads the model; it embeds, and its weights are not those it began with."""
    names = ("1_Pooling config.json model.safetensors modules.json preprocessor_config.json "
             "sentence_bert_config.json tokenizer.json tokenizer_config.json")
    assert listed(plain / "model") == names.split()
    moca = nano_moca.load(plain / "model", "cpu")
    picture = golden / "images" / "0-rgb-84x84.png"
    vectors = moca.embed(["words", {"text": f"{MARK} words", "images": [picture]}])
    assert vectors.isfinite().all() and vectors.norm(dim=1).allclose(torch.ones(2))
    begun, ended = load_file(golden / "qwen2.5-vl" / "model.safetensors"), read_weights(plain)
    assert begun.keys() == ended.keys()
    still = [key for key in begun if begun[key].equal(ended[key])]
    assert not still, "every tensor is trained"


def test_model_loads_in_transformers(plain: Path) -> None:
    """transformers finds every tensor of the model, and none that it does not know."""
    transformers = pytest.importorskip("transformers")
    _, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        plain / "model", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_same_command_same_bits(plain: Path, run: Callable, tmp_path: Path) -> None:
    """The same flags give the same weights; another seed gives others."""
    assert_equal_run(run(tmp_path / "again"), plain)
    other = run(tmp_path / "other", "--seed", "1", "--steps", "1")
    assert read_log(other)[0]["loss"] != read_log(plain)[0]["loss"]


# --- ranks and micro-batches --------------------------------------------------------------------

def test_two_ranks_change_nothing(plain: Path, golden: Path, mixed: Path, tmp_path: Path) -> None:
    """torchrun with two processes logs the losses of one and ends with its weights."""
    done = torchrun(train_cpt, words(golden, tmp_path / "two", DEFAULTS, "--data", mixed))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", plain)
    assert listed(tmp_path / "two" / "checkpoint") == ["rank-00000.pt", "rank-00001.pt"]
    ours, theirs = (json.loads((output / "scores.json").read_text())
                    for output in (tmp_path / "two", plain))
    assert ours.keys() == theirs.keys()
    for name, score in theirs.items():
        assert ours[name] == (score if score is None else pytest.approx(score, rel=1e-3)), name


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


def test_micro_batches_change_nothing(plain: Path, run: Callable, tmp_path: Path) -> None:
    """--accumulate 2 is the same run."""
    assert_same_run(run(tmp_path / "two", "--accumulate", "2"), plain)


def test_activation_checkpointing_changes_nothing(plain: Path, run: Callable, tmp_path: Path
                                                  ) -> None:
    """--checkpointing computes the same twice."""
    assert_same_run(run(tmp_path / "again", "--checkpointing"), plain)


def test_text_alone_on_two_ranks(run: Callable, tmp_path: Path) -> None:
    """Without a single image two ranks do not wait for each other, and change nothing."""
    texts = [{"text": f"number {n}: " + "some words " * (2 + n % 5)} for n in range(12)]
    data = write_data(tmp_path / "data.jsonl", texts)
    flags = "--data", data, "--steps", "3", "--batch-tokens", "150"
    one, two = run(tmp_path / "one", *flags), run(tmp_path / "two", *flags, ranks=2)
    assert_same_run(two, one)
    assert {line["mae_loss"] for line in read_log(one)} == {0.0}


def test_an_image_on_one_rank_only(run: Callable, mixed: Path, tmp_path: Path) -> None:
    """Steps in which one rank sees an image and the other none neither hang nor differ."""
    shutil.copy(mixed.parent / "0.png", tmp_path)
    texts = [{"text": f"number {n}: some words and some more"} for n in range(5)]
    image = {"text": f"{MARK} a picture", "images": ["0.png"]}
    data = write_data(tmp_path / "data.jsonl", [*texts, image])
    flags = "--data", data, "--steps", "4", "--batch-tokens", "60"
    one, two = run(tmp_path / "one", *flags), run(tmp_path / "two", *flags, ranks=2)
    assert_same_run(two, one)
    maes = [line["mae_loss"] for line in read_log(one)]
    assert 0.0 in maes and any(maes), "the data no longer make both kinds of steps"


# --- killed and resumed -------------------------------------------------------------------------

@pytest.mark.parametrize(("save_every", "moments"), [(1, (1, 2, 4)), (2, (0, 3, 5))])
def test_killed_and_resumed(plain: Path, launch: Callable, run: Callable, mixed: Path,
                            tmp_path: Path, save_every: int, moments: tuple[int, ...]) -> None:
    """Killed three times at any moment, resumed each time: the bits and the log of a run without
    a break."""
    output, flags = tmp_path / "run", ("--save-every", str(save_every))
    for number, lines in enumerate(moments):
        job = launch(output, "--data", mixed, *flags, *["--resume"] * (number > 0))
        log = output / "log.jsonl"
        wait_for(job, lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)
        time.sleep(random.uniform(0, 0.15))  # in the step after, or while it is saved
        job.kill()
        assert job.ranks[0].exitcode == -signal.SIGKILL, "it ended before it was killed"
        for name in ("checkpoint", "checkpoint.old"):  # the first of them is whole
            if (output / name).exists():
                torch.load(output / name / "rank-00000.pt", weights_only=True)
                break
    run(output, *flags, "--resume")
    assert_equal_run(output, plain)


def test_resumed_on_other_ranks(plain: Path, launch: Callable, run: Callable, mixed: Path,
                                tmp_path: Path) -> None:
    """One rank's checkpoint resumed by two, theirs by three, theirs by two again, and at last by
    one: the run of one rank without a break, but for rounding."""
    output, flags = tmp_path / "run", ("--save-every", "1")
    for lines, ranks in ((1, 1), (2, 2), (3, 3), (4, 2)):
        job = launch(output, "--data", mixed, *flags, *["--resume"] * (lines > 1), ranks=ranks)
        wait_for(job, lambda: saved_step(output) >= lines)
        job.kill()
        assert len(listed(output / "checkpoint")) == ranks, "it ended before it was killed"
    run(output, *flags, "--resume")
    assert_same_run(output, plain)


def saved_step(output: Path) -> int:
    """The step of a run's checkpoint, 0 if there is none at the moment."""
    # Opened once: by its name torch would open it twice, and another may have its name by then.
    try:
        with open(output / "checkpoint" / "rank-00000.pt", "rb") as file:
            return torch.load(file, weights_only=True)["state"]["step"]
    except OSError:
        return 0


def test_resumed_when_it_was_done(plain: Path, run: Callable, tmp_path: Path) -> None:
    """Resuming a finished run trains nothing and reports the same; with no checkpoint --resume
    begins."""
    output = run(tmp_path / "run", "--resume", "--steps", "2")
    log, weights = (output / "log.jsonl").read_bytes(), read_weights(output)
    scores = (output / "scores.json").read_text()
    run(output, "--resume", "--steps", "2")
    assert (output / "log.jsonl").read_bytes() == log
    assert all(map(torch.equal, weights.values(), read_weights(output).values()))
    assert (output / "scores.json").read_text() == scores, "the report is on other records"


@pytest.mark.parametrize("changed", ["--seed 1", "--batch-tokens 200", "--text-mask 0.3"])
def test_resumed_with_other_flags(plain: Path, golden: Path, mixed: Path, tmp_path: Path,
                                  changed: str) -> None:
    """Going on with flags that change the run is refused, the flag named, and nothing is lost."""
    output = Path(shutil.copytree(plain, tmp_path / "run"))
    with pytest.raises(MocaError, match=changed.split()[0]):
        in_process(golden, output, "--data", mixed, "--resume", *changed.split())
    assert_equal_run(output, plain)


def test_resumed_with_other_data(plain: Path, golden: Path, data: Path, tmp_path: Path) -> None:
    """A file that lost a line would give other records: it is refused; so are fewer steps."""
    output = Path(shutil.copytree(plain, tmp_path / "run"))
    folder = Path(shutil.copytree(data.parent, tmp_path / "data"))
    (folder / data.name).write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    saved = torch.load(output / "checkpoint" / "rank-00000.pt", weights_only=True)
    saved["state"]["flags"]["data"] = str(folder / data.name)
    torch.save(saved, output / "checkpoint" / "rank-00000.pt")
    with pytest.raises(MocaError, match="records of --data .*: 12 before, and now 11"):
        in_process(golden, output, "--data", folder / data.name, "--resume")
    with pytest.raises(MocaError, match="6 steps are done, more than"):
        in_process(golden, plain, "--data", data, "--resume", "--steps", "4")


# --- ablations ----------------------------------------------------------------------------------

@pytest.fixture
def ablated(golden: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
            ) -> Callable[..., list[dict]]:
    """The log of two steps with other flags, run in this process."""
    monkeypatch.setattr(stage1, "REPORT_TOKENS", SMALL[stage1]["REPORT_TOKENS"])

    def ablated(*flags: str) -> list[dict]:
        in_process(golden, tmp_path / "run", "--data", mixed, "--steps", "2", *flags)
        return read_log(tmp_path / "run")

    return ablated


def test_no_text_is_masked(ablated: Callable, tmp_path: Path) -> None:
    """--text-mask 0: no MLM loss, MAE goes on, and the report says that nothing was masked."""
    for line in ablated("--text-mask", "0"):
        assert line["mlm_loss"] == 0 < line["mae_loss"]
        assert line["loss"] == pytest.approx(0.5 * line["mae_loss"])
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["words restored, right picture"] is None
    assert scores["patch error, words visible"] > 0


def test_no_patch_is_masked(ablated: Callable) -> None:
    """--image-mask 0 and --mae-weight 0 do the same: no MAE loss, whole images, MLM goes on."""
    logs = ablated("--image-mask", "0"), ablated("--mae-weight", "0")
    for one, other in zip(*logs, strict=True):
        assert one["mae_loss"] == other["mae_loss"] == 0
        assert one["loss"] == other["loss"] == one["mlm_loss"] > 0


@pytest.mark.parametrize("flags", ["--text-mask 0 --image-mask 0", "--text-mask 0 --mae-weight 0"])
def test_nothing_to_learn(ablated: Callable, flags: str) -> None:
    """Both objectives off is no run."""
    with pytest.raises(MocaError, match="nothing is masked"):
        ablated(*flags.split())


def test_no_report_of_what_was_not_learned(ablated: Callable, tmp_path: Path) -> None:
    """With --mae-weight 0 no patch is masked in the report either."""
    ablated("--mae-weight", "0")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["patch error, words visible"] is None


def test_pixel_limits(ablated: Callable, plain: Path) -> None:
    """--max-pixels makes pictures smaller, as a checkpoint's own limit does."""
    small = ablated("--max-pixels", "3136", "--min-pixels", "784")
    assert small[0]["mae_loss"] != read_log(plain)[0]["mae_loss"]


def test_causal_attention(ablated: Callable, plain: Path) -> None:
    """--attention causal reads the same exercise with other eyes."""
    causal, both = ablated("--attention", "causal")[0], read_log(plain)[0]
    assert causal["tokens"] == both["tokens"]
    assert causal["mlm_loss"] != pytest.approx(both["mlm_loss"], rel=1e-3)


def test_next_token(ablated: Callable, tmp_path: Path) -> None:
    """--objective next-token: no patches, whatever the other flags, and no report of restoring."""
    assert all(line["mae_loss"] == 0 < line["mlm_loss"] for line in
               ablated("--objective", "next-token"))
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores and not any("restored" in name or "error" in name for name in scores)
    assert not (tmp_path / "run" / "reconstruction.png").exists()


def test_a_model_says_how_it_was_trained(ablated: Callable, plain: Path, tmp_path: Path) -> None:
    """Bidirectionally, or causally for the control; what the model begun with said is gone."""
    ablated("--objective", "next-token", "--steps", "1")
    for folder, attention in ((plain, "bidirectional"), (tmp_path / "run", "causal")):
        config = json.loads((folder / "model" / "config.json").read_text())
        assert config["nano_moca"] == {"attention": attention, "max_tokens": 1280}


@pytest.mark.parametrize("record", [
    {"text": MARK, "images": ["0.png"]},
    {"text": f"{MARK} and {MARK}", "images": ["0.png", "1.png"]},
    {"text": "one"},
], ids=["image alone", "two images", "one word"])
def test_records_of_one_shape(ablated: Callable, mixed: Path, tmp_path: Path, record: dict) -> None:
    """Data without a word, with several images a record, with one word: a run ends well."""
    for name in ("0.png", "1.png"):
        shutil.copy(mixed.parent / name, tmp_path)
    assert len(ablated("--data", write_data(tmp_path / "data.jsonl", [record] * 3))) == 2


# --- bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    "--surely-unknown 1", "--text-mask 1.5", "--mae-weight -1", "--steps 0", "--steps x",
    "--learning-rate nan", "--objective both", "--batch-tokens 0", "--device tpu",
])
def test_bad_flags(words: str, capsys: pytest.CaptureFixture) -> None:
    """One line that names the flag, and exit code 2."""
    with pytest.raises(SystemExit) as caught:
        train_cpt.parse_flags(train_cpt.Flags, words.split(), "")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and words.split()[0] in error


BAD_LINES = {
    "malformed JSON": '{"text": "cut',
    "no object": "[]",
    "no text": {"images": []},
    "empty text": {"text": "  "},
    "missing image": {"text": MARK, "images": ["absent.png"]},
    "truncated image": {"text": MARK, "images": ["cut.png"]},
    "no image": {"text": MARK, "images": ["data.jsonl"]},
    "folder for an image": {"text": MARK, "images": ["."]},
    "impossible name": {"text": MARK, "images": ["a\0b.png"]},
    "very long name": {"text": MARK, "images": ["a" * 5000]},
    "mark without image": {"text": f"{MARK}{MARK}", "images": ["0.png"]},
    "image without mark": {"text": "words", "images": ["0.png"]},
    "path leaving the folder": {"text": MARK, "images": ["../outside.png"]},
    "absolute path": {"text": MARK, "images": ["/etc/hostname"]},
    "video": {"text": "a <|video_pad|> word"},
    "mask token": {"text": "a <|mask|> word"},
    "stray pad": {"text": f"{MARK} <|image_pad|>", "images": ["0.png"]},
    "half a surrogate pair": r'{"text": "\ud800"}',
    "thin image": {"text": MARK, "images": ["thin.png"]},
    "deep nesting": "[" * 100_000,
    "surrogate in a path": r'{"text": "<|vision_start|><|image_pad|><|vision_end|>", '
                           r'"images": ["\ud800.png"]}',
    "sixteen bits": {"text": MARK, "images": ["deep.png"]},
    "too long for its images": {"text": MARK * 40, "images": ["0.png"] * 40},
}


def bad_data(folder: Path, mixed: Path, *kinds: str) -> Path:
    """Good records, and bad ones from the third line on."""
    good = mixed.read_text().splitlines()
    for picture in mixed.parent.glob("*.png"):
        shutil.copy(picture, folder)
    (folder / "cut.png").write_bytes((folder / "4.png").read_bytes()[:3000])
    Image.new("RGB", (1000, 2)).save(folder / "thin.png")
    Image.fromarray(np.full((56, 56), 40_000, np.uint16)).save(folder / "deep.png")
    shutil.copy(folder / "0.png", folder.parent / "outside.png")
    return write_data(folder / "data.jsonl", [*good[:2], *(BAD_LINES[k] for k in kinds), *good[2:]])


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_records(golden: Path, mixed: Path, tmp_path: Path, kind: str) -> None:
    """One line that names file and line; no model is written."""
    (tmp_path / "data").mkdir()
    data = bad_data(tmp_path / "data", mixed, kind)
    limit = ("--max-tokens", "100") if kind == "too long for its images" else ()
    with pytest.raises(MocaError, match=r"data\.jsonl:3: ") as caught:
        in_process(golden, tmp_path / "run", "--data", data, *limit)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("flags", [
    ("--steps", "0"), ("--model", "no/such/folder"), ("--data", "absent.jsonl"),
    ("--data", "malformed JSON"), ("--data", "truncated image"),
], ids=" ".join)
def test_bad_input_on_the_command_line(launch: Callable, mixed: Path, tmp_path: Path,
                                       flags: tuple[str, str]) -> None:
    """Exit code 2 for a flag, 1 for anything else, and one line that says it."""
    (tmp_path / "data").mkdir()
    flag, value = flags
    named = f"data.jsonl:{3}" if value in BAD_LINES else value if flag != "--steps" else flag
    value = bad_data(tmp_path / "data", mixed, value) if value in BAD_LINES else value
    job = launch(tmp_path / "run", "--data", mixed, flag, value)
    assert job.wait() == (2 if flag == "--steps" else 1)
    errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and named in errors[0]
    assert "Traceback" not in job.output and not (tmp_path / "run" / "model").exists()


def test_bad_records_are_skipped(launch: Callable, run: Callable, mixed: Path, tmp_path: Path
                                 ) -> None:
    """--on-error skip: each is listed once an epoch with its reason, and the run ends as it would
    on other ranks."""
    (tmp_path / "data").mkdir()
    kinds = "malformed JSON", "missing image", "truncated image", "empty text", "video"
    data = bad_data(tmp_path / "data", mixed, *kinds)
    flags = "--data", data, "--on-error", "skip", "--steps", "4"
    one, two = run(tmp_path / "one", *flags), run(tmp_path / "two", *flags, ranks=2)
    assert_same_run(two, one)
    for output in (one, two):
        listed = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
        assert [line["count"] for line in listed] == list(range(1, len(listed) + 1))
        first = [line["reason"] for line in listed[: len(kinds)]]
        seen = torch.load(output / "checkpoint" / "rank-00000.pt", weights_only=True)["state"]
        assert len(listed) == seen["data"]["skipped"], "the report's records are listed too"
        for number in range(3, 3 + len(kinds)):
            assert sum(f"data.jsonl:{number}: " in reason for reason in first) == 1


def test_skipped_and_resumed(run: Callable, mixed: Path, tmp_path: Path) -> None:
    """A resumed run and a new run in the same folder list each skipped record once an epoch too."""
    (tmp_path / "data").mkdir()
    data = bad_data(tmp_path / "data", mixed, "malformed JSON", "missing image")
    flags = "--data", data, "--on-error", "skip"
    run(tmp_path / "run", *flags, "--steps", "2")
    run(tmp_path / "run", *flags, "--steps", "3", "--resume")
    for again in (False, True):
        if again:
            run(tmp_path / "run", *flags, "--steps", "3")
        lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
        counts = [json.loads(line)["count"] for line in lines]
        assert counts == list(range(1, len(counts) + 1))


# --- not finite, and a full disk ----------------------------------------------------------------

def test_loss_not_finite(plain: Path, golden: Path, mixed: Path, run: Callable, tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The step and its records are named, and the checkpoint is the step's before: resumed without
    the fault, the run ends as if nothing had been."""
    right, calls = model.masked_reconstruction_loss, []

    def wrong(*tensors: torch.Tensor, **counts: float) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        mlm, mae = right(*tensors, **counts)
        return (mlm * float("nan"), mae) if len(calls) == 4 else (mlm, mae)

    monkeypatch.setattr(model, "masked_reconstruction_loss", wrong)
    with pytest.raises(MocaError, match=r"step 4: .*data\.jsonl:\d+, ") as caught:
        in_process(golden, tmp_path / "run", "--data", mixed, "--save-every", "1")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "model").exists()
    saved = torch.load(tmp_path / "run" / "checkpoint" / "rank-00000.pt", weights_only=True)
    assert saved["state"]["step"] == 3
    assert_equal_run(run(tmp_path / "run", "--resume"), plain)


def test_weights_not_finite(checkpoint: Path, mixed: Path, launch: Callable, tmp_path: Path
                            ) -> None:
    """A checkpoint with one weight that is no number is refused when it is loaded, in one line
    that names the weight and its file."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    job = launch(tmp_path / "run", "--data", mixed, "--model", checkpoint)
    assert job.wait() == 1 and "Traceback" not in job.output
    assert f"{checkpoint / 'model.safetensors'}: model.layers.1.mlp.up_proj.weight" in job.output
    assert listed(tmp_path / "run") == []


def test_full_disk(mixed: Path, launch: Callable, run: Callable, plain: Path, tmp_path: Path
                   ) -> None:
    """No room for the checkpoint: one line, exit code 1, nothing half-written under its name; with
    room again --resume goes on from the last whole one."""
    pytest.importorskip("resource")
    output = tmp_path / "run"
    for done in (0, 2):
        if done:
            run(output, "--steps", str(done))
            before = (output / "checkpoint" / "rank-00000.pt").read_bytes()
            shutil.rmtree(output / "model")
        job = launch(output, "--data", mixed, "--save-every", "1", "--resume", file_size=1_000_000)
        assert job.wait() == 1 and "Traceback" not in job.output, job.output
        errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and not (output / "model").exists()
        assert (output / "checkpoint").exists() == (done > 0)
    assert (output / "checkpoint" / "rank-00000.pt").read_bytes() == before


def test_dollars_in_a_text(golden: Path, tmp_path: Path, mixed: Path) -> None:
    """A $ is a dollar, not the picture's mathematics; one picture for all is no wrong picture."""
    shutil.copy(mixed.parent / "0.png", tmp_path)
    record = {"text": MARK + r" price $\foo$ and $ _ _ $ more", "images": ["0.png"]}
    data = write_data(tmp_path / "data.jsonl", [record] * 3)
    in_process(golden, tmp_path / "run", "--data", data, "--steps", "1")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["words restored, wrong picture"] is None
    assert scores["words restored, right picture"] is not None
    assert (tmp_path / "run" / "reconstruction.png").exists()


def test_a_bad_record_after_the_last_step(golden: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture) -> None:
    """What the report would have looked at cannot spoil a finished run: model and losses stay."""
    lines = [{"text": f"number {n} of some good words"} for n in range(30)]
    data = write_data(tmp_path / "data.jsonl", [*lines, {"text": " "}])
    seed = next(seed for seed in range(100) if np.random.default_rng(
        (seed, 0)).permutation(31).tolist().index(30) > 12)
    in_process(golden, tmp_path / "run", "--data", data, "--steps", "1", "--batch-tokens", "20",
               "--seed", str(seed))
    assert "no report on unseen records" in capsys.readouterr().out
    assert (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "scores.json").exists()
