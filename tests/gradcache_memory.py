"""What --chunk is worth: peak memory of train_cl.py by --batch, with and without gradient cache.

    python tests/gradcache_memory.py FOLDER

Not part of the test suite. Writes 512 pairs of equal length into FOLDER (a scene of four full cells
and its caption), makes one step on them for each row of the table, each in a process of its own,
and prints that process's peak memory; "above" is what exceeds a step on two pairs.
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

COUNT = 512


def write(folder: Path) -> Path:
    """The pairs: no cell is empty, so every caption is as long as the others."""
    colours, lines = list(COLOURS), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(COUNT):
        cells = tuple((colours[(i + 3 * k) % 8], NAMES[(i * (k + 1) + k) % len(NAMES)])
                      for k in range(4))
        scene = Scene(cells)
        scene.image().save(folder / f"{i}.png")
        lines.append({"task": "scenes", "kind": "image-text", "positive": {"text": scene.caption()},
                      "query": {"text": MARK, "images": [f"{i}.png"]}})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def one_step(words: list[str]) -> None:
    """One step of train_cl.py, without its report; prints the peak memory of this process in kB."""
    train_cl.finish = lambda *_: None
    train_cl.train(train_cl.parse_flags(train_cl.Flags, words, ""))
    status = Path("/proc/self/status").read_text()
    print("peak", status.split("VmHWM:")[1].split()[0])


def peak_mb(data: Path, batch: int, chunk: int) -> float:
    """The peak of such a step in a process of its own."""
    words = f"--steps 1 --device cpu --data {data} --output {data.parent}/run --batch {batch}"
    run = subprocess.run([sys.executable, __file__, "--use", *words.split(), "--chunk", str(chunk)],
                         capture_output=True, text=True, check=True)
    return int(run.stdout.split("peak ")[1]) / 1024


def main(folder: Path) -> None:
    """The table."""
    data = write(folder)
    least = peak_mb(data, 2, 0)
    print(f"two pairs: {least:.0f} MB")
    for chunk in (8, 0):
        for batch in (64, 128, 256, 512):
            peak = peak_mb(data, batch, chunk)
            print(f"--chunk {chunk} --batch {batch:3d}: {peak:6.0f} MB, {peak - least:6.0f} above",
                  flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--use":
        one_step(sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
