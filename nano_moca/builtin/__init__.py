"""The built-in data and tasks, made of parts that are already here; and the nano base.

Nothing is downloaded: pictures are drawn from symbols of the DejaVu font that
matplotlib carries, texts are Python's own documentation. The miniature keeps the
paper's premises, or it would show nothing:

- What is tested is new: there are about 2 x 10^10 scenes, and near twins as hard
  negatives defeat a model that only knows which words occur.
- The base model knows half of the symbols. Stage 1 brings the others, unlabelled and
  in far greater number; stage 2 has few labelled pairs.

scenes.py draws, tasks.py makes records and pairs, and base.py makes the nano base:
`python -m nano_moca.builtin`. This file imports only the first two, so that data.py
can read the built-in data without a model.
"""

# ruff: noqa: F401
from nano_moca.builtin.scenes import (
    ALL, CELL, COLOURS, FACTORS, GROUND, KNOWN, KNOWN_COLOURS, LABELLED, NAMES, NEW, NEW_COLOURS,
    Palette, Scene)
from nano_moca.builtin.tasks import (
    END, SPLITS, BuiltinPairs, BuiltinRecords, builtin_tasks, documents, factor_tasks,
    split_documents)
