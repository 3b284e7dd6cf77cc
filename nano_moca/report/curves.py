"""The losses of a run as a picture."""

from typing import Any

import torch

from nano_moca.report.pictures import panels, picture


@picture
def plot_losses(figure: Any, lines: list[dict], names: list[str]) -> None:
    """One panel per figure of the log: each step's value, and a running mean over a
    twentieth of the run."""
    # Of fewer than 40 steps there is no mean, and the two lines are one.
    steps = [line["step"] for line in lines]
    window = max(1, len(lines) // 20)
    for axis, name in zip(panels(figure, 1, len(names), 4.2, 3.2)[0], names, strict=True):
        # Single steps pale, and over them the mean of the last `window` steps.
        values = torch.tensor([line[name] for line in lines])
        means = values.unfold(0, window, 1).mean(1)
        axis.plot(steps, values, color="#c9d3e6", linewidth=0.8)
        axis.plot(steps[window - 1 :], means, color="#1f4e9c")
        axis.set(xlabel="step", title=name.replace("_", " "), ylim=(0, None))
