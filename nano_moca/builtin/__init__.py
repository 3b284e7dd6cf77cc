"""The built-in data and tasks, made of parts that are already here; and the nano base.

Nothing is downloaded: pictures are drawn from symbols of the DejaVu font that
matplotlib carries, texts are Python's own documentation. The miniature keeps the
paper's premises, or it would show nothing:

- What is tested is new: no scene of a test is in other data, in any arrangement or
  colouring, and near twins defeat a model that only knows which words occur.
- The base model knows two thirds of the symbols and half of the colours. Stage 1 brings
  all, unlabelled and in far greater number; stage 2 has few labelled pairs, of what the
  base knows. So what an embedder makes of the others, stage 1 taught it.

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
