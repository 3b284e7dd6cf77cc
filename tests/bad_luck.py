"""Kills and full disks, many of them, at moments that nobody chose: no test, started by hand.

    python tests/bad_luck.py [--kills 20] [--disks 10] [--seed 0]

A run of stage 1 is killed (SIGKILL) at a random moment, while a checkpoint is written, while a
model is written, or at its first checkpoint over an earlier run's; then it is resumed. Or its
output's disk is full at some moment (a tmpfs of few megabytes, which needs root; else a limit on
the size of a file); then there is room again, and it is resumed. At the end it has to be a run
without a break: weights, moments, log and list of skipped records, to the bit. What an earlier
run left has to be whole as long as the new one has no checkpoint. Prints a table.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "qwen2.5-vl"
STEPS = 12
FLAGS = ["--steps", STEPS, "--save-every", 3, "--batch-tokens", 100, "--device", "cpu",
         "--on-error", "skip"]


def command(home: Path, output: Path, *more: object) -> list[str]:
    """The command line of the run."""
    words = [sys.executable, ROOT / "train_cpt.py", "--model", GOLDEN, "--data", home / "d.jsonl",
             "--output", output, *FLAGS, *more]
    return list(map(str, words))


def run(words: list[str], limit: int | None = None) -> subprocess.CompletedProcess:
    """The command to its end; no file may grow beyond `limit` bytes."""
    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run(words, capture_output=True, text=True, preexec_fn=set_limit,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def content(output: Path) -> dict:
    """All that has to be the same, and nothing that time decides."""
    saved = torch.load(output / "checkpoint" / "rank-00000.pt", weights_only=True)
    tensors = list(saved["parameters"])
    for moments in saved["moments"]:
        tensors += moments.values()
    found = {"tensors": b"".join(tensor.numpy().tobytes() for tensor in tensors)}
    for name in ("skipped.jsonl", "model/model.safetensors", "model/config.json"):
        found[name] = (output / name).read_bytes()
    logs = [map(json.loads, (output / "log.jsonl").read_text().splitlines()), saved["state"]["log"]]
    for name, log in zip(("log.jsonl", "log in the checkpoint"), logs):
        lines = [{**line, "tokens_per_second": 0} for line in log]
        found[name] = json.dumps(lines).encode()
    found["names"] = " ".join(sorted(path.name for path in output.iterdir()
                                     if path.suffix != ".png" and path.name != "scores.json"))
    return found


def differs(output: Path, expected: dict) -> str:
    """What is not the same."""
    try:
        found = content(output)
    except Exception as error:
        return f"cannot be read: {error}"
    return ", ".join(name for name in expected if found[name] != expected[name])


def until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Wait for it, or for the process's end."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def resumed(home: Path, output: Path, seed: int) -> str:
    """Go on to the end, as a user would: what went wrong."""
    done = run(command(home, output, "--seed", seed, "--resume"))
    if done.returncode and f"--seed was {1 - seed}" in done.stderr:
        done = run(command(home, output, "--seed", seed))  # the old run still stands there
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def kill_once(home: Path, kind: str, expected: dict, old: dict, luck: random.Random
              ) -> tuple[str, str]:
    """One run, killed once: at which moment, and what is wrong."""
    output = Path(tempfile.mkdtemp(dir=home)) / "run"
    over = kind.startswith("over")
    if over:
        shutil.copytree(home / "old", output)
    process = subprocess.Popen(command(home, output, "--seed", 0), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = output / ("log.jsonl.part" if over else "log.jsonl")
    until(process, log.exists)
    if kind == "random":
        time.sleep(luck.uniform(0, 1.5))
    elif kind == "model":
        until(process, (output / "model.new").exists)
        time.sleep(luck.uniform(0, 0.05))
    else:
        for _ in range(1 if over else luck.randint(1, 3)):
            until(process, (output / "checkpoint.new").exists)
            time.sleep(luck.uniform(0, 0.08))
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = process.returncode == 0

    # what is there now
    names = sorted(path.name for path in output.iterdir() if path.suffix != ".png")
    moment = ("after its end" if ended else "checkpoint.new" if "checkpoint.new" in names else
              "checkpoint.old" if "checkpoint.old" in names else
              "model.new" if "model.new" in names else "between")
    if over and (output / "checkpoint").exists() and not ended:
        saved = torch.load(output / "checkpoint" / "rank-00000.pt", weights_only=True)
        if saved["state"]["flags"]["seed"] == 1:
            moment += ", old run in place"
            wrong = ", ".join(name for name in old if name != "names"
                              and content(output)[name] != old[name])
            if wrong:
                return moment, f"the old run's {wrong}"
    wrong = resumed(home, output, 0) or differs(output, expected)
    shutil.rmtree(output.parent)
    return moment, wrong


def fill_once(home: Path, number: int, expected: dict, old: dict, luck: random.Random
              ) -> tuple[str, str]:
    """One run on a disk too small for it: what was said, and what is wrong."""
    place = Path(tempfile.mkdtemp(dir=home))
    output, over = place / "run", number % 4 == 2

    # room for some lines; for a part of two checkpoints, which are 8.6 MB each; for an old run and
    # no new checkpoint; for one checkpoint, and perhaps the model, but hardly for the pictures
    low, high = ((8e3, 4e4), (1e6, 17e6), (12.5e6, 19e6), (8.7e6, 11.6e6))[number % 4]
    size = luck.uniform(low, high)
    more = ("--save-every", STEPS) if number % 4 == 3 else ()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size)}", "none", place],
                             capture_output=True).returncode == 0
    if over:
        shutil.copytree(home / "old", output)
    limit = None if mounted else int(luck.uniform(100, 8e6))
    done = run(command(home, output, "--seed", 0, *more), limit)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    moment = f"{'tmpfs' if mounted else 'limit'} {(size if mounted else limit) / 1e6:5.1f} MB: "
    wrong = ""
    if done.returncode == 0:
        moment += "room enough"
    else:
        named = said[0].split(" cannot be")[0].split(": ", 1)[1] if said else "nothing"
        moment += named.replace(str(output), "OUTPUT").split(":")[0]
        if len(said) != 1 or "Traceback" in done.stderr or str(output) not in said[0]:
            wrong = f"it says {done.stderr[-300:]!r}"
        if over and (output / "log.jsonl.part").exists():
            moment += ", old run in place"
            lost = [name for name in old if name != "names"
                    and content(output)[name] != old[name]]
            wrong = wrong or (f"the old run's {', '.join(lost)}" if lost else "")
    if mounted:
        subprocess.run(["mount", "-o", "remount,size=100m", place], check=True)
    wrong = wrong or resumed(home, output, 0) or differs(output, expected)
    if mounted:
        subprocess.run(["umount", place], check=True)
    return moment, wrong


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser()
    for name, default in (("kills", 20), ("disks", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    luck = random.Random(args.seed)
    home = Path(tempfile.mkdtemp())
    lines = [json.dumps({"text": f"blue star and a yellow snowman number {n}"}) for n in range(40)]
    for place in (7, 20, 33):
        lines.insert(place, "{no JSON")
    (home / "d.jsonl").write_text("".join(line + "\n" for line in lines))

    # the run without a break, and one with another seed
    for name, seed in (("whole", 0), ("old", 1)):
        done = run(command(home, home / name, "--seed", seed))
        assert done.returncode == 0, done.stderr
    expected, old = content(home / "whole"), content(home / "old")
    assert expected["skipped.jsonl"] and expected["log.jsonl"] != old["log.jsonl"]

    kinds = ["random", "checkpoint", "over", "random", "model", "over", "checkpoint"]
    counts: collections.Counter = collections.Counter()
    for number in range(args.kills):
        kind = kinds[number % len(kinds)]
        moment, wrong = kill_once(home, kind, expected, old, luck)
        counts[f"kill, {'wrong' if wrong else 'to the bit'}"] += 1
        wrong = wrong or "to the bit"
        print(f"kill {number + 1:2d}  {kind:10s}  {moment:36s}  {wrong}", flush=True)
    for number in range(args.disks):
        moment, wrong = fill_once(home, number, expected, old, luck)
        counts[f"full disk, {'wrong' if wrong else 'to the bit'}"] += 1
        print(f"disk {number + 1:2d}  {moment:60s}  {wrong or 'to the bit'}", flush=True)
    print(dict(counts))
    shutil.rmtree(home)
    sys.exit(any("wrong" in name for name in counts))


if __name__ == "__main__":
    main()
