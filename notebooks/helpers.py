"""What the notebooks share: one look of the pictures, readable names for tokens; and a command.

    pip install nbconvert ipykernel
    python notebooks/helpers.py notebooks/*.ipynb

runs notebooks again in place and keeps them small: no times, pictures in 256 colours.
"""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image, ImageChops, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nano_moca.processor import Processor

BLUE, RED, GREY = "#2f6db5", "#c8452c", "#8a8a8a"
SHORT = {"<|vision_start|>": "[img", "<|vision_end|>": "img]", "<|im_end|>": "end"}


def style() -> None:
    """Letters that can be read from the back of a room."""
    plt.rcParams.update({
        "figure.dpi": 90, "savefig.dpi": 90, "figure.constrained_layout.use": True,
        "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11,
        "axes.spines.top": False, "axes.spines.right": False})


def show(axis: Axes, image: Image.Image, title: str = "") -> None:
    """An image without ticks or frame."""
    axis.imshow(image)
    axis.set(xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)


def token_names(processor: Processor, tokens: list[int]) -> list[str]:
    """Each token as a word short enough to stand at an axis; image tokens are numbered."""
    names, images = [], 0
    for token in tokens:
        if token == processor.image_token:
            names.append(f"i{images}")
            images += 1
            continue
        text = processor.tokenizer.decode([token], skip_special_tokens=False)
        names.append(SHORT.get(text, text.strip() or repr(text)))
    return names


def with_palette(picture: Image.Image) -> Image.Image:
    """An RGB picture in 256 colours, by the method that changes it least."""
    def error(palette: Image.Image) -> float:
        return sum(ImageStat.Stat(ImageChops.difference(palette.convert("RGB"), picture)).sum2)

    methods = Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE, Image.Quantize.FASTOCTREE
    return min((picture.quantize(256, method) for method in methods), key=error)


def run_again(path: Path) -> None:
    """Execute a notebook in place; its pictures get a palette, a third of the bytes."""
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute",
               "--inplace", "--ExecutePreprocessor.record_timing=False", str(path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
                small = io.BytesIO()
                with_palette(picture.convert("RGB")).save(small, "png", optimize=True)
                output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run_again(Path(name))
