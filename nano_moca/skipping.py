"""Records that cannot be used are left out and listed (`--on-error skip`).

A rank decodes only its own share of a step, so it alone sees that a picture of its share
is cut short. But all ranks have to draw the same records, now and after a break. So they
tell each other what they could not decode, and all leave it out, count it and list it.

They do so in the thread that draws ahead, while the model computes and sends messages of
its own. Hence a second group of the same ranks, on the CPU (gloo): in one group, two
threads would mix their messages.
"""

import json
from collections import ChainMap
from pathlib import Path

import torch.distributed as dist

from nano_moca.distributed import PATIENCE
from nano_moca.files import MocaError, writing


class Skipping:
    """What was skipped, one line each: {"count": from 1, "reason"}."""

    def __init__(self, path: Path, ranks: int) -> None:
        """path: of the list; each rank has one. ranks: W. All of them come here."""
        self.path = path
        self.ranks = ranks
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks > 1 else None

    def of_all_ranks(self, failed: dict[int, MocaError], count: int) -> dict[int, MocaError]:
        """What the ranks could not decode, merged: {item's number in the step:
        error}, alike on every rank. failed: this rank's. count: how many records it
        has skipped so far; if the ranks disagree, equal numbers mean different
        records, and that is a MocaError."""
        parts = [(count, failed)]
        if self.group:
            parts = [(0, {})] * self.ranks
            dist.all_gather_object(parts, (count, failed), self.group)

        # A disk may fail one rank and not another.
        if len({skip_count for skip_count, _ in parts}) > 1:
            raise MocaError(f"{self.path.name}: one rank could read what another could not: see "
                            "to the disk, and go on with --resume")
        return dict(ChainMap(*(found for _, found in parts)))

    def add(self, count: int, error: MocaError) -> None:
        """List one more. count: with it."""
        line = {"count": count, "reason": str(error)}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
