"""What a trained model is for: vectors of a list of items, and the benchmarks' scores.

    python -m nano_moca.evaluate COMMAND --model DIR|HUB_ID ...

    embed    --input items.jsonl --output vectors.npy [--prompt TEXT]
    builtin  --output scores.json
    mmeb     --data DIR --output scores.json
    vidore   --data DIR --output scores.json

`embed`: items.jsonl holds one object {"text": ..., "images": [...]} per line, the
images beside it. vectors.npy is float32 [lines, D] of unit length, in the file's order:
the best match of a query is the item with the largest dot product. --prompt stands, on
a line of its own, beside each item that is an image without words, such as a page.

`builtin`: the built-in tasks, each query among all answers of its task and their near
twins. `mmeb` and `vidore` read the benchmarks' own files, parquet or JSON lines: see
mmeb.py and vidore.py.

Ties count as wrong: a model that maps everything to one point scores 0. (The released
code counts them as right, and NaN too; here a vector that is not finite is an error
that names its item.) Every score comes with its chance level.

What is done is kept in <output>.vectors, and an interrupted evaluation goes on where it
stopped: see vectors.py.
"""
