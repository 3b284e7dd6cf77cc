"""What --chunk is worth: peak memory of train_cl.py by --batch, with and without gradient
cache.

    python tests/gradcache_memory.py FOLDER

Not part of the test suite. Writes 512 pairs of equal length into FOLDER (a scene of four
full cells and its caption). For each row of the table it makes one step on them in a
process of its own, and prints the peak memory of that process; "above" is by how much it
exceeds a step on two pairs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_cl
from nano_moca import MARK
from nano_moca.builtin import COLOURS, NAMES, Scene
from nano_moca.flags import parse_flags

COUNT = 512


def write(folder: Path) -> Path:
    """The pairs: no cell is empty, so every caption is as long as the others."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = list(COLOURS)
    lines = []
    for i in range(COUNT):
        cells = []
        for k in range(4):
            cells.append((colours[(i + 3 * k) % 8], NAMES[(i * (k + 1) + k) % len(NAMES)]))
        scene = Scene(tuple(cells), columns=2)
        scene.image().save(folder / f"{i}.png")

        query = {"text": MARK, "images": [f"{i}.png"]}
        positive = {"text": scene.caption()}
        lines.append({"task": "scenes", "kind": "image-text", "query": query,
                      "positive": positive})

    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def one_step(words: list[str]) -> None:
    """One step of train_cl.py, without its report; prints the peak memory of this process
    in kB."""
    train_cl.train(parse_flags(train_cl.Flags, [*words, "--no-report"], ""))
    status = Path("/proc/self/status").read_text()
    print("peak", status.split("VmHWM:")[1].split()[0])


def peak_mb(data: Path, batch: int, chunk: int) -> float:
    """The peak of such a step in a process of its own."""
    words = ["--steps", "1", "--device", "cpu", "--batch", str(batch), "--chunk", str(chunk),
             "--data", str(data), "--output", str(data.parent / "run")]
    run = subprocess.run([sys.executable, __file__, "--use", *words],
                         capture_output=True, text=True, check=True)
    return int(run.stdout.split("peak ")[1]) / 1024


def main(folder: Path) -> None:
    """The table."""
    data = write(folder)
    least = peak_mb(data, 2, 0)
    print(f"two pairs: {least:.0f} MB")
    for chunk in (112, 0):  # eight records, or all
        for batch in (64, 128, 256, 512):
            peak = peak_mb(data, batch, chunk)
            above = peak - least
            print(f"--chunk {chunk} --batch {batch:3d}: {peak:6.0f} MB, {above:6.0f} above",
                  flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--use":
        one_step(sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
