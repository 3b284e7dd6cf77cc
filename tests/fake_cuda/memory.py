"""How much memory is alive on the make-believe device, and who made it."""

import weakref
from collections import Counter

import torch


class Memory:
    """Every storage, from its birth to its death. Tensors share storages, as views do."""

    def __init__(self) -> None:
        self.alive: dict[int, tuple[int, str]] = {}  # of each storage: bytes, line
        self.references: dict[int, weakref.ref] = {}
        self.now = 0  # bytes
        self.peak = 0
        self.at_peak: Counter[str] = Counter()  # bytes by line

        # FSDP gives memory back by shrinking a storage to nothing, which no operator sees.
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            if id(storage) in self.alive:
                self.set(id(storage), size, self.alive[id(storage)][1])
            return result

        torch.UntypedStorage.resize_ = noted

    def see(self, storage: torch.UntypedStorage, line: str) -> None:
        """Note a storage, unless it is known."""
        key = id(storage)
        if key in self.alive:
            return
        self.references[key] = weakref.ref(storage, lambda _: self.gone(key))
        self.set(key, storage.nbytes(), line)

    def gone(self, key: int) -> None:
        """A storage was freed."""
        size, _ = self.alive.pop(key)
        del self.references[key]
        self.now -= size

    def set(self, key: int, size: int, line: str) -> None:
        """A storage has this size from now on."""
        before, _ = self.alive.get(key, (0, ""))
        self.alive[key] = (size, line)
        self.now += size - before

        self.set_peak()

    def set_peak(self) -> None:
        """Note a new peak, and who holds it."""
        # Adding it all up costs more than noting it: a new peak counts from 0.2 % up.
        if self.now > 1.002 * self.peak:
            self.peak = self.now
            self.at_peak = self.by_line()

    def by_line(self) -> Counter[str]:
        """Bytes alive, by the line that made them."""
        lines: Counter[str] = Counter()
        for size, line in self.alive.values():
            lines[line] += size
        return lines
