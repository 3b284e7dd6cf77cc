"""What much parquet costs stage 1: memory of a rank, and time to the first step.

    python tests/parquet_memory.py FOLDER [GIGABYTES ...]      (default: 1 40)

Not a test: it takes minutes. FOLDER gets parquet files that unpack to so many gigabytes:
pictures of 400 KB, a hundred in a row group, all of a group alike, so that the files
themselves are small. Then train_cpt.py runs over them, with a tiny model.
"""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MARK = "<|vision_start|><|image_pad|><|vision_end|>"
SIDE, ROWS, GROUPS = 365, 100, 25  # pixels of a picture; rows of a group; groups of a file


def make_data(folder: Path, gigabytes: float) -> int:
    """Write the files, unless they are there; returns how many rows they hold."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema({"text": pyarrow.string(), "images": pyarrow.list_(pyarrow.binary())})
    picture_bytes = SIDE * SIDE * 3
    groups = round(gigabytes * 2**30 / (ROWS * picture_bytes))
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, groups, GROUPS):
        path = folder / f"train-{first // GROUPS:05d}.parquet"
        if path.exists():
            continue
        with ParquetWriter(path, schema, compression="zstd", use_dictionary=False,
                           data_page_size=2**27) as writer:
            for group in range(first, min(first + GROUPS, groups)):
                pixels = np.random.default_rng(group).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG", compress_level=0)
                texts = [f"{MARK} noise number {row} of group {group}" for row in range(ROWS)]
                images = [[file.getvalue()]] * ROWS
                writer.write_table(pyarrow.table([texts, images], schema))
    return groups * ROWS


def measure(data: Path, output: Path, steps: int) -> dict[str, float]:
    """Train; returns seconds to the first step and of all, and the peak memory in MB."""
    words = ["--model", ROOT / "tests/golden/qwen2.5-vl", "--data", data, "--output", output,
             "--steps", steps, "--batch-tokens", 400, "--max-pixels", 3136, "--min-pixels", 784,
             "--device", "cpu", "--no-report"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, ROOT / "train_cpt.py", *map(str, words)],
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL)
    first = None
    log = output / "log.jsonl"
    while process.poll() is None:
        if first is None and log.exists() and log.read_text():
            first = time.perf_counter() - started
        time.sleep(0.05)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            pass
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {"seconds to the first step": first, "seconds": time.perf_counter() - started,
            "steps": len(lines), "peak MB": peak}


def main(folder: Path, sizes: list[float]) -> None:
    """Make and measure each size."""
    for gigabytes in sizes:
        data = folder / f"{gigabytes:g}"
        rows = make_data(data, gigabytes)
        on_disk = sum(file.stat().st_size for file in data.iterdir()) / 2**20
        for name, steps in (("one step", 1), ("more", 60)):
            output = folder / f"run-{gigabytes:g}-{steps}"
            figures = measure(data, output, steps)
            shown = ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
            print(f"{gigabytes:g} GB, {rows} rows, {on_disk:.0f} MB of files, {name}: {shown}",
                  flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [float(word) for word in sys.argv[2:]] or [1, 40])
