"""Which model a checkpoint is: its config, and the VLM that this config describes.

Qwen2-VL and Qwen2.5-VL are read by convert/configs.py and built by model.py. Qwen3-VL has
rooms of its own, in qwen3/, where only what differs is said; nothing of it is imported
unless a checkpoint asks for it. Who adds a family adds it here.

Left out: mixtures of experts (qwen3_vl_moe), and Qwen3.5: most of its decoder's
layers carry a state from left to right, so it cannot read in both directions.
"""

from pathlib import Path

from nano_moca.config import Config
from nano_moca.files import read_json
from nano_moca.model import VLM


def load_config(folder: Path) -> Config:
    """Read `folder/config.json`; MocaError says what is missing or not supported."""
    from nano_moca.convert.configs import ACTIVATIONS, Section, parse_config

    # ACTIVATIONS has Qwen2-VL's and 2.5's names. An absent model_type is refused as
    # None: of an absent entry `choice` would take the first.
    path = Path(folder) / "config.json"
    top = Section({"model_type": None} | read_json(path), f"{path}: ")
    if top.choice("model_type", *ACTIVATIONS, "qwen3_vl") == "qwen3_vl":
        from nano_moca.qwen3.config import parse_qwen3

        return parse_qwen3(top.values, str(path))
    return parse_config(top.values, str(path))


def build_model(config: Config) -> VLM:
    """The model that a config describes, with weights yet to be read."""
    if config.family == "qwen3_vl":
        from nano_moca.qwen3.model import VLM as Qwen3VLM

        return Qwen3VLM(config)
    return VLM(config)
