"""nano_moca: how a generative vision-language model becomes a multimodal encoder.

A vision-language model (VLM) reads from left to right and writes text. MoCa (arXiv
2506.23115) makes of it a model that reads in both directions and maps texts, images
and pages to vectors, such that what belongs together lies close together. Stage 1,
continual pre-training, lets it reconstruct masked text and masked image patches; stage
2, contrastive fine-tuning, pulls queries towards what they should find.

    import nano_moca
    moca = nano_moca.load("path or hub id")
    photo = {"text": nano_moca.MARK + "a photo", "images": [image]}
    vectors = moca.embed(["a cat", photo])

Reading order. First the two stages and what is special to MoCa:

    train_cpt.py     stage 1 in one loop
    masking.py       what is masked, and what has to be predicted
    model.py         vision tower, decoder, both as one VLM, the patch decoder
    losses.py        MLM and MAE loss, InfoNCE
    train_cl.py      stage 2 in one loop, with its gradient cache

then what they stand on:

    attention.py     softmax(q k / sqrt(d)) v over packed records, causal or not
    kernels.py       a chunk's cross entropies and their gradient, in PyTorch and Triton
    processor.py     text and images to tokens and patches
    batch.py         the shapes of data: Record, Pair, Batch
    batches.py       which records a step takes, and on which rank
    skipping.py      records that cannot be used, on all ranks alike
    data.py          files to records and pairs
    weights.py       a checkpoint's weights into a model
    families.py      which model a checkpoint is
    config.py        a model's sizes
    distributed.py   ranks, and parameters divided among them
    flags.py, checkpoint.py, trainer.py     the surroundings of a loop
    files.py         errors, JSON, files and folders that survive a crash

and beside the road: evaluate/ (a trained model in use, and its scores), convert/ (files
as others write and read them), plan/ (before the first step: what a run may touch, what it
will need, where it goes on), qwen3/ (what Qwen3-VL does otherwise: read it after
model.py), lora.py (for those who have one GPU: small matrices beside frozen weights),
report/ (the pictures and scores at the end of a run), builtin/ (the data and the base model
that come with the code), ablate.py, benchmark.py and benchmark_gpu.py.

Glossary. A shape in a comment, such as [T, D], uses these letters. (Sizes of patches and
groups are those of Qwen2-VL and 2.5; Qwen3-VL has p = 16, so 1536 and 6144 values.)

    N    records in a batch
    T    tokens of a batch, all records end to end
    L    tokens of one record
    I    images in a batch
    P    patches of all images; 14 x 14 pixels in two frames, so 1176 values each
    p    side of a patch in pixels, 14
    J    image tokens: 2 x 2 patches are merged into one token, so J = P / 4
    k    features of an image token beside its embedding (Qwen3-VL's DeepStack)
    R    text tokens to predict: the masked ones (in the next-token control, all)
    r    masked text tokens in one chunk of the fused loss
    G    masked groups: image tokens whose 4 patches were masked, 4704 values each
    V    vocabulary: rows of the embedding and of the output head
    D    width of the decoder, and of the embeddings
    E    width of the vision tower
    H    query heads of an attention layer
    K    key and value heads; H / K query heads share one of them
    d    width of one head
    a    width of an adapter (LoRA's rank r), --lora
    W    ranks
    s    sequences of one length, which attention computes together
    B    pairs of a step over all ranks
    n    pairs of a step on this rank
    M    hard negatives of a step on this rank
    Q    queries of a ranking
    C    candidates of a ranking

What the paper gives a symbol or a name:

    section 3.1, modality-aware continual pre-training (stage 1)
    MLM    masked language modelling: cross entropy at the R masked tokens
    MAE    masked autoencoding: squared error at the G masked groups
    w      weight of the MAE loss, --mae-weight: loss = MLM + w * MAE
    section 3.2, heterogeneous contrastive fine-tuning (stage 2)
    q      query
    d+     its positive: what it should find
    d-     a negative: another query's positive, or one of its own hard negatives
    tau    what cosines are divided by in the loss (InfoNCE), --temperature

Docstrings point to the released code, github.com/haon-chen/MoCa, by file and line of its
commit 46ecad8 (of 65af536 for src/dataset.py, of 8285921 for src/trainer.py).

Words, one meaning each:

    record         one item: a text with a mark for each of its images, and the images
    pair           a query, its positive and its hard negatives: three kinds of records
    group          2 x 2 neighbouring patches of an image
    image token    the token that stands for one group
    masked         to be predicted, and replaced in the input: a group by noise, a
                   text token by the mask token (some by a random word, some not at
                   all: --unhidden)
    hidden state   what the decoder makes of a token, [D]
    rank           one of the W processes of a run
    step           one update of the weights
    frozen         not trained: with --lora, all of the checkpoint's weights
    adapter        two small matrices whose product is added to a frozen one: see lora.py
    micro-batch    what a rank runs forward and backward at once; --accumulate of them
                   make its share of a stage 1 step
    chunk          a part that is computed at once to bound memory: tokens of the fused
                   loss, or records of the gradient cache
    index          an int64 tensor that selects entries of another, as in x[index]
    source         where a record came from, such as a file and a line; named in errors
"""

import os

# Before torch is loaded: threads that spin while they wait slow a busy machine down
# tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from nano_moca.batch import MARK, Record
from nano_moca.files import MocaError

__all__ = ["MARK", "Moca", "MocaError", "Record", "as_records", "load"]


def __getattr__(name: str) -> object:
    """`load`, `Moca` and `as_records`, imported when they are asked for: training needs
    none of them."""
    if name not in __all__:
        raise AttributeError(f"nano_moca has no {name}")
    from nano_moca.evaluate import embedder

    return getattr(embedder, name)
