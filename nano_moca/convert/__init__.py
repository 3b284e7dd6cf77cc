"""Files of other tools: what reads what they write, and writes what they read.

    configs.py     a checkpoint's config.json, in every form that it has had
    settings.py    the file of its image processor
    shards.py      its tensors: in which files they lie, and what they are called
    images.py      an image, as a viewer shows it
    rows.py        the rows of a file: JSON lines, or one of those in tables.py
    tables.py      rows of parquet and Arrow files, of which little is ever in memory
    sources.py     the files of data in a folder; samples; an order for grouped rows
    export.py      a saved model, and what it says of itself to transformers and others
    __main__.py    `python -m nano_moca.convert`: published pairs to our JSON lines

Data of stage 2 is published with other columns than ours (MoCa-CL-Pairs, mmE5-synthetic,
mmE5-MMEB-hardneg, MMEB-train), a folder a subset, and its images in archives:

    python -m nano_moca.convert --data MMEB-train --images MMEB-train/images_zip --output pairs
    torchrun train_cl.py --data pairs --cap 50000

Left out: downloading, and archives cut into parts (`cat` joins them).
"""
