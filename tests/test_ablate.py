"""The ablations by one command: which runs it makes of an arm, and what it keeps. The training
itself is replaced by what it leaves behind, but for one test: scripts run as processes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_cl
import train_cpt
from nano_moca import MocaError, ablate
from nano_moca.ablate import (
    ARMS, EPOCH, PANELS, PER_EPOCH, STEPS_1, STEPS_2, Flags, difference, recipe)
from nano_moca.batches import PairBatches
from nano_moca.builtin import base, builtin_tasks
from nano_moca.config import BASE
from nano_moca.families import load_config
from nano_moca.flags import parse_flags
from nano_moca.processor import Processor

PLOT = ablate.plot
STAGES = {"train_cpt.py": ("stage 1", train_cpt.Flags), "train_cl.py": ("stage 2", train_cl.Flags)}
TASKS = {task for arm in ARMS.values() for task in arm.judge[0]}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """The runs that were made: (what, its flags or words), in order."""
    made: list[tuple[str, object]] = []

    def run_script(name: str, words: Sequence[str]) -> None:
        # A flag that this version lacks is refused, as by the script.
        what, kind = STAGES[name]
        flags = parse_flags(kind, [word for word in words], "")
        made.append((what, flags))
        output = Path(flags.output)
        (output / "model").mkdir(parents=True)
        (output / "scores.json").write_text("{}")
        line = {"tokens": 1000, "tokens_per_second": 100}
        (output / "log.jsonl").write_text(f"{json.dumps(line)}\n" * 60)

    def run_python(words: list[str]) -> None:
        made.append(("test", words))
        score = {"recall@1": 0.01, "chance recall@1": 0.002,
                 "recall@10": 0.01 * len(made), "chance recall@10": 0.01}
        content = {"tasks": {task: score for task in TASKS}}
        Path(words[words.index("--output") + 1]).write_text(json.dumps(content))

    monkeypatch.setattr(ablate, "run_script", run_script)
    monkeypatch.setattr(base, "run_script", run_script)  # which trains the smaller base
    monkeypatch.setattr(ablate, "run_python", run_python)
    monkeypatch.setattr(ablate, "LOCKS", {})
    monkeypatch.setattr(ablate, "plot", lambda path, results: None)  # but where it is looked at
    return made


def flags(arms: str, seeds: int, folder: Path, **more: object) -> Flags:
    """One run after the other, so that they come in order."""
    return Flags(arms, seeds, str(folder), at_once=1, **more)


def test_an_arm_is_both_stages_with_its_flags(made: list, tmp_path: Path) -> None:
    """Stage 1 by its flags, stage 2 from its model, the test as the model was trained."""
    ablate.ablate(flags("next-causal", 1, tmp_path))
    (_, first), (_, second), (_, words) = made
    assert first.objective == "next-token" and first.seed == second.seed == 0
    assert second.attention == "causal" and second.steps == STEPS_2
    assert second.data == "builtin"
    assert second.model == str(Path(first.output) / "model")
    assert words[:5] == ["-m", "nano_moca.evaluate", "builtin", "--model",
                         str(Path(second.output) / "model")]
    assert "--attention" not in words  # the model says it


def test_without_stage_1(made: list, tmp_path: Path) -> None:
    """It starts from the nano base."""
    ablate.ablate(flags("none", 1, tmp_path))
    assert [what for what, _ in made] == ["stage 2", "test"]
    assert made[0][1].model.endswith("base")


def test_arms_share_stage_1_and_nothing_is_done_twice(made: list, tmp_path: Path) -> None:
    """Three arms with the same stage 1, two seeds: two runs of it. A second call makes none, and a
    third seed makes only its own."""
    ablate.ablate(flags("full,no-documents,mixed", 2, tmp_path))
    assert [what for what, _ in made].count("stage 1") == 2
    assert [what for what, _ in made].count("stage 2") == 6
    kinds = {(run.without, run.task_batches, run.seed) for what, run in made if what == "stage 2"}
    assert len(kinds) == 6
    made.clear()
    ablate.ablate(flags("full,no-documents,mixed", 2, tmp_path))
    assert not made
    ablate.ablate(flags("full", 3, tmp_path))
    assert [what for what, _ in made] == ["stage 1", "stage 2", "test"]
    results = json.loads((tmp_path / "ablations.json").read_text())  # nothing is forgotten
    assert {arm: len(seeds) for arm, seeds in results.items()} == {
        "full": 3, "no-documents": 2, "mixed": 2}


def test_a_run_with_a_first_look_alone_goes_on(made: list, tmp_path: Path) -> None:
    """Stage 1 writes scores long before its end: what tells that it is done is its model."""
    ablate.ablate(flags("full", 1, tmp_path))
    for folder in tmp_path.iterdir():
        if (folder / "scores.json").exists():
            (folder / "model").rename(folder / "model.new")
    (tmp_path / "ablations.json").unlink()
    made.clear()
    ablate.ablate(flags("full", 1, tmp_path))
    assert [what for what, _ in made] == ["stage 1", "stage 2"]


def test_side_by_side_makes_the_same_runs(made: list, tmp_path: Path) -> None:
    """Arms that share a stage 1 wait for it; each run is made once."""
    ablate.ablate(Flags("full,mixed,none", 2, str(tmp_path), at_once=4))
    whats = [what for what, _ in made]
    assert {what: whats.count(what) for what in whats} == {"stage 1": 2, "stage 2": 6, "test": 6}


def test_a_table_without_its_runs_goes_on(made: list, tmp_path: Path) -> None:
    """What stands in it by the same recipe is done; another recipe is run anew."""
    ablate.ablate(flags("none,causal", 1, tmp_path / "one"))
    table = tmp_path / "one" / "ablations.json"
    made.clear()
    ablate.ablate(flags("none,causal", 1, tmp_path / "two", table=str(table)))
    assert not made
    content = json.loads(table.read_text())
    content["causal"]["seed 0"]["recipe"]["base"] = "another"
    table.write_text(json.dumps(content))
    ablate.ablate(flags("none,causal", 1, tmp_path / "two", table=str(table)))
    assert [what for what, _ in made] == ["stage 2", "test"] and made[0][1].attention == "causal"
    content = json.loads(table.read_text())
    assert content["causal"]["seed 0"]["recipe"] == recipe(ARMS["causal"])


def test_what_it_writes(made: list, tmp_path: Path, capsys: pytest.CaptureFixture,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores by arm and seed, a picture, what is left, and a line an arm."""
    monkeypatch.setattr(ablate, "plot", PLOT)
    ablate.ablate(flags("full,none", 2, tmp_path))
    results = json.loads((tmp_path / "ablations.json").read_text())
    assert {arm: [*seeds] for arm, seeds in results.items()} == {
        "full": ["seed 0", "seed 1"], "none": ["seed 0", "seed 1"]}
    assert results["full"]["seed 0"]["minutes"] == [10, 10]
    assert results["none"]["seed 1"]["minutes"] == [0, 10]
    assert results["none"]["seed 1"]["hardware"]
    assert set(results["none"]["seed 0"]["tasks"]) == TASKS
    with Image.open(tmp_path / "ablations.png") as picture:
        assert min(picture.size) > 200
    said = capsys.readouterr().out
    assert "4 of 4 runs to do" in said and "3 runs to go, about" in said
    assert f"{ARMS['none'].about:46s} -2.1; " in said
    assert "sign, not clear of zero" in said or "sign, clear of zero" in said


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_names_flags_that_exist(made: list, tmp_path: Path, arm: str) -> None:
    """Each parses, no two arms are the same, and each stands in a panel of the picture."""
    if "--lora" in ARMS[arm].stage_2 and not hasattr(train_cl.Flags, "lora"):
        pytest.skip("these scripts have no adapters")
    ablate.ablate(flags(arm, 1, tmp_path))
    assert made[-1][0] == "test"
    assert len({json.dumps(recipe(arm)) for arm in ARMS.values()}) == len(ARMS)
    assert arm in " ".join(arms for arms, _ in PANELS.values()).split()


def test_a_task_gets_as_many_steps_whatever_tasks_are_dropped() -> None:
    """The shorter stage 2 is the full one without the steps of the dropped kind."""
    processor = Processor.load(BASE, load_config(BASE))
    tasks = builtin_tasks()
    counts = PairBatches(tasks, processor, train_cl.Flags.batch, 100, 0, 0).counts
    by_kind: dict[str, int] = {}
    for name, task in tasks.items():
        by_kind[task.kind] = by_kind.get(task.kind, 0) + counts[name]
    assert {kind: by_kind[kind] for kind in PER_EPOCH} == PER_EPOCH
    assert sum(counts.values()) == EPOCH
    epochs = STEPS_2 / EPOCH
    for name in ("no-documents", "no-text-pairs"):
        steps = int(recipe(ARMS[name])["stage 2"].split("--steps ")[1].split()[0])
        assert steps == round(STEPS_2 - epochs * PER_EPOCH[ARMS[name].without])


def test_the_table_is_of_the_default_recipe() -> None:
    """The scripts' own steps."""
    assert (STEPS_1, STEPS_2) == (train_cpt.Flags.steps, train_cl.Flags.steps)


def test_the_interval_of_a_difference() -> None:
    """By drawing: of equal arms at least 95 % of intervals hold zero, and not nearly all."""
    assert math.isnan(difference(np.ones(1), np.ones(3))[1])
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        gap, half = difference(random.normal(size=5), random.normal(size=5))
        held += abs(gap) <= half
    assert 0.945 < held / 2000 < 0.985


def test_a_smaller_base_is_made_once(made: list, tmp_path: Path) -> None:
    """By stage 1's script, causally, of a smaller shape; its arms begin with it."""
    ablate.ablate(flags("small,small-none", 2, tmp_path))
    stages_1 = [run for what, run in made if what == "stage 1"]
    assert [run.objective for run in stages_1] == ["next-token", "restore", "restore"]
    small = load_config(stages_1[0].model)
    assert small.width == 96 < load_config(BASE).width
    assert {run.model for run in stages_1[1:]} == {str(tmp_path / "base-small" / "model")}
    assert [run.model for what, run in made if what == "stage 2"][1] == stages_1[1].model


def test_an_unknown_arm(tmp_path: Path) -> None:
    """One line that names the arms."""
    with pytest.raises(MocaError, match="the arms are full"):
        ablate.ablate(flags("bot", 1, tmp_path))


@pytest.mark.parametrize(("words", "code"), [(["--model", "absent"], 1), (["--stepz", "3"], 2)])
def test_a_script_that_fails_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture,
                                         words: list[str], code: int) -> None:
    """The script says what is wrong; what ran it stops with the same exit code and no word more."""
    with pytest.raises(SystemExit) as caught:
        base.run_script("train_cpt.py", [*words, "--output", str(tmp_path)])
    assert caught.value.code == code
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert ("absent" if code == 1 else "--stepz") in said


def test_a_script_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could say nothing: we do."""
    (tmp_path / "train_cpt.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(base, "SCRIPTS", tmp_path)
    with pytest.raises(MocaError, match="train_cpt.py was killed by signal 9"):
        base.run_script("train_cpt.py", [])


def test_help_of_the_base_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture) -> None:
    """--help ends before a tokenizer is learned or a folder is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        base.make_base(["--help"])
    assert caught.value.code == 0 and "nano_moca/base" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_nano_base_is_made_by_the_script(made: list, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Causally, on what the base may know; flags of the user come last, and so count."""
    monkeypatch.chdir(tmp_path)
    start = tmp_path / "start"
    start.mkdir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (start / name).write_bytes((BASE / name).read_bytes())
    assert base.train_base(start, ["--steps", "7", "--seed", "5"]) == Path("runs/base/model")
    first = (start / "model.safetensors").read_bytes()
    assert base.train_base(start, ["--output", "other"]) == Path("other/model")
    assert (start / "model.safetensors").read_bytes() != first  # of another seed
    (_, one), (_, two) = made
    assert (one.steps, one.seed, one.output) == (7, 5, "runs/base")
    assert (two.steps, two.seed, two.output) == (500, 0, "other")
    assert {one.model, two.model} == {str(start)}
    assert {(run.data, run.objective) for run in (one, two)} == {("builtin:base", "next-token")}


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"none": 1}', '{"none": {"seed 0": []}}',
                                     '{"of another version": {}}', '{"none": {"seed 0": {"tasks":'
                                     '{"scene-to-caption": {"recall@1": "much"}}}}}'])
def test_a_table_that_is_damaged_stays(made: list, tmp_path: Path, content: str) -> None:
    """It is named before anything is run."""
    (tmp_path / "ablations.json").write_text(content)
    with pytest.raises(MocaError, match="ablations.json"):
        ablate.ablate(flags("none", 1, tmp_path))
    assert not made and (tmp_path / "ablations.json").read_text() == content


@pytest.mark.parametrize("name", ["log.jsonl", "test.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tasks": 1}', '{"tokens": 1}'])
def test_a_run_that_is_damaged_is_named(made: list, tmp_path: Path, name: str, content: str
                                        ) -> None:
    """Its file, in one line; and the table of before stays."""
    ablate.ablate(flags("none", 1, tmp_path))
    (tmp_path / "cl-none-0" / name).write_text(content)
    (tmp_path / "ablations.json").write_text("{}")
    with pytest.raises(MocaError, match=name):
        ablate.ablate(flags("none", 1, tmp_path))
    assert (tmp_path / "ablations.json").read_text() == "{}"
