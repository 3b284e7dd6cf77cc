"""What the tests share: the package on the path, and small checkpoints with known
answers.

`golden/` holds what transformers computes on tiny random models. One command makes it
again, and needs transformers; the top of that file says what each tensor is:

    python tests/make_golden.py

The newer key layout is made from the older one here, so that the repository carries
each weight once.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nano_moca
from nano_moca import MARK, Moca, Record

# sentence-transformers, and AutoProcessor of transformers 5, need torchvision, which has no
# build for the CPU's torch: another one's serves, once two operators are declared that it
# does not find. The library keeps them alive.
if importlib.util.find_spec("torchvision"):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")

pytest_plugins = ["launching"]  # its fixtures start runs of the training scripts
GOLDEN = Path(__file__).resolve().parent / "golden"
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the golden cases."""
    return GOLDEN


@pytest.fixture(scope="session")
def records() -> list[Record]:
    """The eight golden records: text alone, one image, several, special tokens, odd
    image modes."""
    lines = (GOLDEN / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines):
        fields = json.loads(line)
        images = [GOLDEN / image for image in fields["images"]]
        records.append(Record(fields["text"], images, f"record {number}"))
    return records


@pytest.fixture(scope="session")
def moca() -> Moca:
    """The tied Qwen2.5-VL case. Tests must not change it."""
    return nano_moca.load(GOLDEN / "qwen2.5-vl", "cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tied Qwen2.5-VL checkpoint that a test may break."""
    return Path(shutil.copytree(GOLDEN / "qwen2.5-vl", tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def newer_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint under the names of transformers 4.52 and later, in two
    shards."""
    older = GOLDEN / "qwen2.5-vl"
    newer = tmp_path_factory.mktemp("newer-layout")
    for file in older.glob("*.json"):
        shutil.copy(file, newer)

    tensors = {}
    for key, tensor in load_file(older / "model.safetensors").items():
        tensors[newer_name(key)] = tensor

    # every second tensor, so that each layer is in both shards
    names = sorted(tensors)
    weight_map = {}
    for number, keys in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        content = {key: tensors[key] for key in keys}
        save_file(content, newer / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, shard)
    index = json.dumps({"weight_map": weight_map})
    (newer / "model.safetensors.index.json").write_text(index)
    return newer


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1's data in small: twelve records, four of them text alone, the rest with a
    picture."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(0)
    records = []
    for number in range(12):
        if number % 3 == 2:
            text = f"Words alone, number {number}: a quick brown fox jumps over the lazy dog."
            records.append({"text": text})
            continue

        # pictures of four sizes, and so records of several lengths
        sides = ((56, 56), (84, 56), (112, 84), (56, 112))[number % 4]
        pixels = random.integers(0, 255, (*sides, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        text = f"{MARK} picture {number} of noise, in all colours"
        records.append({"text": text, "images": [f"{number}.png"]})

    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    return folder / "data.jsonl"


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager]:
    """`with full_disk(size):` no file of this process can grow beyond `size` bytes:
    writing more fails as it does on a full disk, with another number."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def newer_name(key: str) -> str:
    """A stored key in the layout of transformers 4.52 and later."""
    if key.startswith("model."):
        return "model.language_model." + key.removeprefix("model.")
    return "model." + key if key.startswith("visual.") else key
