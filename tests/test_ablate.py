"""The ablations by one command: which runs it makes of an arm, and what it keeps. The training
itself is replaced by what it leaves behind, but for one test: scripts run as processes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

import train_cl
import train_cpt
from nano_moca import MocaError, ablate
from nano_moca.ablate import ARMS, SHOWN, Flags
from nano_moca.builtin import base
from nano_moca.config import BASE
from nano_moca.families import load_config
from nano_moca.flags import parse_flags

STAGES = {"train_cpt.py": ("stage 1", train_cpt.Flags), "train_cl.py": ("stage 2", train_cl.Flags)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """The runs that were made: (what, its flags or words), in order."""
    made: list[tuple[str, object]] = []

    def run_script(name: str, words: Sequence[str]) -> None:
        what, kind = STAGES[name]
        flags = parse_flags(kind, list(words), "")  # which refuses what the script would refuse
        made.append((what, flags))
        output = Path(flags.output)
        (output / "model").mkdir(parents=True)
        (output / "scores.json").write_text("{}")
        line = {"tokens": 1000, "tokens_per_second": 100}
        (output / "log.jsonl").write_text(f"{json.dumps(line)}\n" * 60)

    def score(words: list[str]) -> None:
        made.append(("test", words))
        tasks = {task: {"recall@1": 0.1 * len(made)} for task in SHOWN}
        Path(words[words.index("--output") + 1]).write_text(json.dumps({"tasks": tasks}))

    monkeypatch.setattr(ablate, "run_script", run_script)
    monkeypatch.setattr(base, "run_script", run_script)  # which trains the smaller base
    monkeypatch.setattr(ablate, "evaluate", score)
    return made


def test_an_arm_is_both_stages_with_its_flags(made: list, tmp_path: Path) -> None:
    """Stage 1 by its flags, stage 2 from its model, the test as the model was trained."""
    ablate.ablate(Flags("control-causal", 1, str(tmp_path)))
    (_, first), (_, second), (_, words) = made
    assert first.objective == "next-token" and first.seed == second.seed == 0
    assert second.attention == "causal" and second.steps == train_cl.Flags.steps
    assert second.model == str(Path(first.output) / "model")
    assert words[:3] == ["builtin", "--model", str(Path(second.output) / "model")]
    assert "--attention" not in words  # the model says it


def test_without_stage_1(made: list, tmp_path: Path) -> None:
    """It starts from the nano base."""
    ablate.ablate(Flags("none", 1, str(tmp_path)))
    assert [what for what, _ in made] == ["stage 2", "test"]
    assert made[0][1].model.endswith("base")


def test_arms_share_stage_1_and_nothing_is_done_twice(made: list, tmp_path: Path) -> None:
    """Three arms with the same stage 1, two seeds: two runs of it. A second call makes none, and a
    third seed makes only its own."""
    flags = Flags("both,no-documents,mixed", 2, str(tmp_path))
    ablate.ablate(flags)
    assert [what for what, _ in made].count("stage 1") == 2
    assert [what for what, _ in made].count("stage 2") == 6
    kinds = {(run.without, run.task_batches, run.seed) for what, run in made if what == "stage 2"}
    assert len(kinds) == 6
    made.clear()
    ablate.ablate(flags)
    assert not made
    ablate.ablate(Flags("both", 3, str(tmp_path)))
    assert [what for what, _ in made] == ["stage 1", "stage 2", "test"]
    results = json.loads((tmp_path / "ablations.json").read_text())  # nothing is forgotten
    assert {arm: len(seeds) for arm, seeds in results.items()} == {
        "both": 3, "no-documents": 2, "mixed": 2}


def test_what_it_writes(made: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All scores by arm and seed, a picture, and a line an arm."""
    ablate.ablate(Flags("both,none", 2, str(tmp_path)))
    results = json.loads((tmp_path / "ablations.json").read_text())
    assert {arm: [*seeds] for arm, seeds in results.items()} == {
        "both": ["seed 0", "seed 1"], "none": ["seed 0", "seed 1"]}
    assert results["both"]["seed 0"]["minutes"] == 20 and results["none"]["seed 1"]["minutes"] == 10
    assert {*SHOWN} == {*results["none"]["seed 0"]["tasks"]}
    with Image.open(tmp_path / "ablations.png") as picture:
        assert min(picture.size) > 200
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(ARMS["both"].about) and lines[-1].startswith(ARMS["none"].about)
    assert "run 3 of 4: both stages, seed 1" in lines


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_names_flags_that_exist(made: list, tmp_path: Path, arm: str) -> None:
    """Each parses, and no two arms are the same."""
    ablate.ablate(Flags(arm, 1, str(tmp_path)))
    assert made[-1][0] == "test"
    assert len({arm[1:] for arm in ARMS.values()}) == len(ARMS)


def test_a_smaller_base_is_made_once(made: list, tmp_path: Path) -> None:
    """By stage 1's script, causally, of a smaller shape; its arms begin with it."""
    ablate.ablate(Flags("small,small-none", 2, str(tmp_path)))
    stages_1 = [run for what, run in made if what == "stage 1"]
    assert [run.objective for run in stages_1] == ["next-token", "restore", "restore"]
    small = load_config(stages_1[0].model)
    assert small.width == 96 < load_config(BASE).width
    assert {run.model for run in stages_1[1:]} == {str(tmp_path / "base-small" / "model")}
    assert [run.model for what, run in made if what == "stage 2"][1] == stages_1[1].model


def test_an_unknown_arm(tmp_path: Path) -> None:
    """One line that names the arms."""
    with pytest.raises(MocaError, match="the arms are both"):
        ablate.ablate(Flags("bot", 1, str(tmp_path)))


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
    assert (two.steps, two.seed, two.output) == (1600, 0, "other")
    assert {one.model, two.model} == {str(start)}
    assert {(run.data, run.objective) for run in (one, two)} == {("builtin:base", "next-token")}


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"none": 1}', '{"none": {"seed 0": []}}',
                                     '{"of another version": {}}', '{"none": {"seed 0": {"tasks":'
                                     '{"scene-to-caption": {"recall@1": "much"}}}}}'])
def test_a_table_that_is_damaged_stays(made: list, tmp_path: Path, content: str) -> None:
    """It is named before anything is run."""
    (tmp_path / "ablations.json").write_text(content)
    with pytest.raises(MocaError, match="ablations.json"):
        ablate.ablate(Flags("none", 1, str(tmp_path)))
    assert not made and (tmp_path / "ablations.json").read_text() == content


@pytest.mark.parametrize("name", ["log.jsonl", "test.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tasks": 1}', '{"tokens": 1}'])
def test_a_run_that_is_damaged_is_named(made: list, tmp_path: Path, name: str, content: str
                                        ) -> None:
    """Its file, in one line; and the table of before stays."""
    ablate.ablate(Flags("none", 1, str(tmp_path)))
    before = (tmp_path / "ablations.json").read_text()
    (tmp_path / "cl-none-0" / name).write_text(content)
    with pytest.raises(MocaError, match=name):
        ablate.ablate(Flags("none", 1, str(tmp_path)))
    assert (tmp_path / "ablations.json").read_text() == before
