"""Whether one of the five changes of change_it.md is right.

    python notebooks/check_change.py 1

prints "right", or says what is not yet. It runs the package's own functions and a few
steps of the stage concerned, which takes seconds; how the change is written is free.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import train_cl
import train_cpt
from nano_moca.batch import MARK, Pair, Record
from nano_moca.batches import PairBatches, StepRecords
from nano_moca.builtin import COLOURS, LABELLED, Scene, builtin_tasks
from nano_moca.config import BASE
from nano_moca.convert.images import open_image
from nano_moca.distributed import World
from nano_moca.families import load_config
from nano_moca.files import MocaError
from nano_moca.flags import parse_flags
from nano_moca.masking import MaskedBatch, mask_batch
from nano_moca.model import VLM, PatchDecoder
from nano_moca.processor import Processor
from nano_moca.report import stage1

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
WIDTH = 128  # of the nano base
LONGEST = 90  # seconds of computing of a check: a stop for a loop that never ends


class NotYet(Exception):
    """What is not right, in words for who wrote the change."""


def demand(right: bool, otherwise: str) -> None:
    """NotYet(otherwise) unless it is right."""
    if not right:
        raise NotYet(otherwise)


# --- what several checks need ---------------------------------------------------------


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value under a name of a module or class, until the end of the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def read_flags(script: Any, words: str) -> Any:
    """The script's flags from a command line. NotYet if it does not take them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_flags(script.Flags, words.split(), "")
    except SystemExit:
        raise NotYet(f"{script.__name__}.py does not take this flag yet: "
                     f"{said.getvalue().strip()}") from None


def refused(script: Any, words: str) -> bool:
    """Whether a run with these flags ends with an error in a line, before or while it runs."""
    try:
        run(script, words)
    except (NotYet, MocaError):
        return True
    return False


def run(script: Any, words: str) -> tuple[list[dict], dict]:
    """Run a stage in this process, quietly, in a folder of its own: its log, and its scores
    if it has a report."""
    with tempfile.TemporaryDirectory() as folder:
        # Of a flag that is given twice the last value counts.
        flags = read_flags(script, f"--model {BASE} --device cpu {words} --output {folder}/run")
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            script.train(flags)
        log = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
        scores = Path(folder) / "run" / "scores.json"
        return list(map(json.loads, log)), json.loads(scores.read_text()) if scores.exists() else {}


# --- 1: a cosine schedule -------------------------------------------------------------


def cosine_schedule() -> None:
    """The rates that a run logs, against the half cosine."""
    steps, rising, peak = 24, 6, 2e-3
    small = f"--steps {steps} --warmup 0.25 --learning-rate {peak} --batch-tokens 40 --no-report"

    def rates(words: str) -> list[float]:
        log, _ = run(train_cpt, f"{small} {words}")
        return [line["lr"] / peak for line in log]

    cosine = rates("--schedule cosine")
    for step in range(rising):
        demand(math.isclose(cosine[step], (step + 1) / rising, rel_tol=1e-6),
               f"warm-up: at step {step + 1} of {steps} (warm-up {rising}) the rate is "
               f"{cosine[step]:.3f} of its peak, and was {(step + 1) / rising:.3f}")

    # Whether the first step after the warm-up still has the peak is a matter of taste.
    falling = steps - rising
    for step in range(rising, steps):
        progress = (step - rising) / falling
        low, high = (0.5 + 0.5 * math.cos(math.pi * min(max(progress + shift, 0), 1))
                     for shift in (1 / falling, -1 / falling))
        demand(low - 1e-6 <= cosine[step] <= high + 1e-6,
               f"after the warm-up: at step {step + 1} of {steps} the rate is {cosine[step]:.3f} "
               f"of its peak; a half cosine has {low:.3f} to {high:.3f}")
    demand(cosine[-1] > 0, "the last step's rate is 0: it is computed, and moves nothing")

    # What was there before is still there.
    linear = [(step + 1) / rising for step in range(rising)]
    linear += [(steps - step) / falling for step in range(rising, steps)]
    demand(np.allclose(rates(""), linear),
           "without --schedule the rate does not rise and fall linearly as before")
    demand(read_flags(train_cpt, "--schedule linear") == read_flags(train_cpt, ""),
           "--schedule linear should be the default")
    demand(refused(train_cpt, f"{small} --schedule cosinus"),
           "--schedule cosinus is taken: a name that is none should be refused (`choices`)")

    # Stage 2 has the same schedule.
    log, _ = run(train_cl, "--steps 5 --batch 4 --schedule cosine --no-report")
    shares = [line["lr"] / log[0]["lr"] for line in log]
    demand(not np.allclose(shares, np.linspace(1, shares[-1], 5), atol=0.02),
           "train_cl.py --schedule cosine: the rate falls linearly")


# --- 2: rectangles of patches ---------------------------------------------------------

SIZES = ((8, 6), (5, 9), (7, 7))  # rows and columns of groups, of pictures for this check


def picture(rows: int, columns: int, random: np.random.Generator) -> Image.Image:
    """Noise, of so many groups."""
    return Image.fromarray(random.integers(0, 255, (28 * rows, 28 * columns, 3), dtype=np.uint8))


def masks_of(masked: MaskedBatch) -> list[np.ndarray]:
    """Of each image, which groups are masked: [rows, columns] bool."""
    batch = masked.batch
    flat = torch.isin(batch.image_index, masked.group_index).numpy()
    masks = []
    for _, high, wide in batch.grids.tolist():
        size = high * wide // 4
        masks.append(flat[:size].reshape(high // 2, wide // 2))
        flat = flat[size:]
    return masks


def agreement(masks: list[np.ndarray]) -> tuple[float, float]:
    """How often a group shares the fate of the next one in its column, and in its row. At a
    rate of 0.5 independent masks have 0.5."""
    below = np.concatenate([(mask[1:] == mask[:-1]).ravel() for mask in masks])
    beside = np.concatenate([(mask[:, 1:] == mask[:, :-1]).ravel() for mask in masks])
    return float(below.mean()), float(beside.mean())


def image_blocks() -> None:
    """The masks that the loop draws and the report uses, of pictures of several sizes."""
    random = np.random.default_rng(0)
    processor = Processor.load(BASE, load_config(BASE))
    words = " a red sun, nothing, an orange anchor"
    records = []
    for number in range(48):
        sizes = [SIZES[(number + place) % 3] for place in range(1 + number % 2)]
        scale = 2 if number < 7 else 1  # the report paints the first few: large ones say more
        images = [picture(scale * rows, scale * columns, random) for rows, columns in sizes]
        records.append(Record(MARK * len(images) + words, images, f"record {number}"))
    records.append(Record(words))
    numbered = [(number, processor.encode(record)) for number, record in enumerate(records)]

    def draw(flags: str, items: list) -> MaskedBatch:
        steps = [StepRecords([items], 0, {})]
        parsed = read_flags(train_cpt, flags)
        return next(train_cpt.masked_steps(steps, processor, parsed, ALONE))[1][0]

    # They are rectangles of neighbours, in each of a record's pictures.
    blocks = draw("--image-blocks", numbered)
    masks = masks_of(blocks)
    below, beside = agreement(masks[10:])  # the smaller ones
    demand(min(below, beside) > 0.64, f"of neighbouring groups {below:.2f} (in a column) and "
           f"{beside:.2f} (in a row) share their fate; single groups have 0.50, rectangles over "
           "0.64. (Has every image, of the several in a record, its own rows and columns?)")
    for place in (0, 1):
        second = masks_of(draw("--image-blocks", numbered[9:48:2]))[place::2]
        demand(min(agreement(second)) > 0.6, "records with two pictures: the masks of picture "
               f"{place + 1} are no rectangles of it. (Has each its own rows and columns?)")
    distinct = {mask.tobytes() for mask in masks}
    demand(len(distinct) > 0.9 * len(masks), "many pictures have the same mask")

    # As many as ever, at any rate.
    for rate in (0.3, 0.5, 0.7):
        shares = [mask.mean() for mask in masks_of(draw(f"--image-blocks --image-mask {rate}",
                                                        numbered))]
        demand(abs(np.mean(shares) - rate) < 0.1, f"--image-mask {rate}: of a picture's groups "
               f"{np.mean(shares):.2f} are masked")
    none, everything = (draw(f"--image-blocks --image-mask {rate}", numbered) for rate in (0, 1))
    demand(not len(none.group_index), "--image-mask 0 masks something")
    demand(len(everything.group_index) == len(everything.batch.image_index),
           "--image-mask 1 leaves something unmasked")

    # Small pictures, as the built-in scenes are, and the smallest there can be.
    for size in ((1, 1), (1, 3), (2, 2), (2, 4), (2, 6)):
        record = processor.encode(Record(MARK + words, [picture(*size, random)]))
        many = [(number, record) for number in range(200)]  # another key, another mask
        shares = [mask.mean() for mask in masks_of(draw("--image-blocks", many))]
        demand(abs(np.mean(shares) - 0.5) < 0.15, f"--image-mask 0.5: of pictures of {size[0]} x "
               f"{size[1]} groups {np.mean(shares):.2f} are masked")
        for rate in (0, 1):
            shares = [mask.mean() for mask in masks_of(
                draw(f"--image-blocks --image-mask {rate}", many[:20]))]
            demand(set(shares) == {rate}, f"--image-mask {rate}: of pictures of {size[0]} x "
                   f"{size[1]} groups {np.mean(shares):.2f} are masked")

    # Noise where it is masked, in the order that `MaskedBatch` promises.
    batch = blocks.batch
    demand(torch.equal(batch.image_index[batch.noised], blocks.group_index)
           and batch.noise.shape == (len(batch.noised), 4, 1176),
           "`noised`, `noise` and `group_index` do not fit each other")
    demand(bool((batch.noised.diff() > 0).all()), "`noised` is not in the order of the groups")

    # A record's mask follows from its key alone; words do not notice.
    alone = masks_of(draw("--image-blocks", numbered[7:8]))
    packed = masks_of(draw("--image-blocks", numbered[5:9]))[3:5]
    demand(all(map(np.array_equal, alone, packed)),
           "a record's mask depends on what it is packed with: draw from its own generator")
    scattered = draw("", numbered)
    demand(torch.equal(scattered.text_index, blocks.text_index)
           and torch.equal(scattered.batch.tokens, blocks.batch.tokens),
           "--image-blocks changes which words are masked: leave the words' generator alone")
    keys = [(0, number) for number, _ in numbered]
    as_before = mask_batch(processor.pack([record for _, record in numbered]), processor, 0.4, 0.5,
                           keys, 0.2)
    demand(torch.equal(scattered.group_index, as_before.group_index)
           and max(agreement(masks_of(scattered))) < 0.56,
           "without --image-blocks the masks are not scattered as before")

    # The report judges and paints what training masks.
    judged: list[np.ndarray] = []
    painted: list[np.ndarray] = []

    def restore(model: Any, masked: MaskedBatch, *_: Any) -> tuple[Tensor, Tensor]:
        # It paints record by record, and judges many at once; words without masked groups.
        seen = judged if len(masked.batch.lengths) > 1 else painted
        seen.extend(masks_of(masked) if len(masked.group_index) else [])
        return torch.zeros_like(masked.labels), torch.zeros(len(masked.group_index), 4704)

    drawn: list[list[np.ndarray]] = []  # of each call that masks many records' groups

    def watched(*arguments: Any, **named: Any) -> MaskedBatch:
        masked = mask_batch(*arguments, **named)
        if len(masked.batch.lengths) > 1 and len(masked.group_index):
            drawn.append(masks_of(masked))
        return masked

    class Unseen:
        def __init__(self) -> None:
            self.state = {"epoch": 0}

        def __next__(self) -> StepRecords:
            return StepRecords([numbered[:24]], 0, {})

    with (tempfile.TemporaryDirectory() as folder, replaced(stage1, "restore", restore),
          replaced(stage1, "plot_losses", ignore), replaced(stage1, "plot_restorations", ignore),
          replaced(stage1, "mask_batch", watched), contextlib.redirect_stdout(io.StringIO())):
        flags = read_flags(train_cpt, f"--image-blocks --output {folder}")
        line = {"step": 1, "loss": 1.0, "mlm_loss": 1.0, "mae_loss": 1.0}
        stage1.write_report(flags, ALONE, None, processor, Unseen(), [line], False)
    parts = {"judges (`cross_modal_report`)": judged, "paints (`restorations`)": painted}
    for what, part in parts.items():
        demand(bool(part) and min(agreement(part)) > 0.6, f"training masks rectangles, but the "
               f"report still {what} scattered groups: see nano_moca/report/stage1.py")

    demand(all(min(agreement(masks)) > 0.6 for masks in drawn), "training masks rectangles, but "
           "one call of `mask_batch` in nano_moca/report/stage1.py still scatters, such as that "
           "for the best constant")

    run(train_cpt, "--image-blocks --steps 5 --batch-tokens 200 --no-report")


def ignore(*_: Any, **__: Any) -> None:
    """In place of drawing."""


# --- 3: Matryoshka losses -------------------------------------------------------------


def contrastive(vectors: Tensor, drawn: Any, width: int, unit: bool = True) -> Tensor:
    """The loss of the first `width` values, as its definition says."""
    short = vectors[:, :width]
    short = F.normalize(short, dim=-1) if unit else short
    n = len(drawn.local_index)
    logits = short[:n] @ short[n:].T / train_cl.Flags.temperature
    return F.cross_entropy(logits.masked_fill(drawn.excluded, float("-inf")), drawn.local_index)


def matryoshka() -> None:
    """Loss and gradient of the first step against the definition; then the gradient cache."""
    small = "--batch 8 --warmup 0 --no-report --data builtin"
    steps: list[Any] = []
    embedded: list[Tensor] = []
    arrived: list[Tensor] = []
    packed_steps, embed = train_cl.packed_steps, VLM.embed

    def watched_steps(*arguments: Any) -> Iterator[tuple]:
        for drawn, chunks in packed_steps(*arguments):
            steps.append(drawn)
            yield drawn, chunks

    def watched_embed(self: VLM, *arguments: Any, **named: Any) -> Tensor:
        vectors = embed(self, *arguments, **named)
        if vectors.requires_grad:
            vectors.register_hook(arrived.append)
        embedded.append(vectors.detach())
        return vectors

    def watched(words: str) -> tuple[dict, Any, Tensor, Tensor]:
        steps.clear(), embedded.clear(), arrived.clear()
        with (replaced(train_cl, "packed_steps", watched_steps),
              replaced(VLM, "embed", watched_embed)):
            log, _ = run(train_cl, f"{small} --steps 1 {words}")
        return log[0], steps[0], embedded[0], arrived[0]

    line, drawn, vectors, gradient = watched("--matryoshka 16,32")
    leaf = vectors.clone().requires_grad_()
    widths = (16, 32, WIDTH)
    each = [contrastive(leaf, drawn, width) for width in widths]
    mean = sum(each) / len(each)
    mean.backward()

    # The likeliest mistakes have their own losses.
    mistakes = {
        "the sum of the losses, not their mean": sum(each),
        "the loss of the whole vector alone": each[-1],
        "the mean over 16 and 32; the whole vector belongs to it": (each[0] + each[1]) / 2,
        "that of prefixes which are not of unit length": sum(
            contrastive(vectors, drawn, width, unit=False) for width in widths) / len(widths)}
    loss = line["loss"]
    if not math.isclose(loss, mean.item(), rel_tol=1e-4):
        found = [what for what, value in mistakes.items()
                 if math.isclose(loss, float(value), rel_tol=1e-4)]
        raise NotYet(f"--matryoshka 16,32: the first step's loss is {loss:.4f}; the mean of the "
                     f"losses of 16, 32 and all {WIDTH} values is {mean.item():.4f}"
                     + (f". Yours is {found[0]}" if found else ""))

    # What points along a unit vector moves nothing, for `embed` made it one.
    gradient, expected = (part - (part * vectors).sum(-1, keepdim=True) * vectors
                          for part in (gradient, leaf.grad))
    demand(torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5),
           "the loss is right, but the gradient at the vectors is not that of the mean")

    # Accuracy is that of the whole vectors, counted once.
    n = len(drawn.local_index)
    logits = (vectors[:n] @ vectors[n:].T).masked_fill(drawn.excluded, float("-inf"))
    own = logits.gather(1, drawn.local_index[:, None])
    right = (own > logits.scatter(1, drawn.local_index[:, None], float("-inf"))).all(1)
    demand(math.isclose(line["accuracy"], right.float().mean().item(), rel_tol=1e-6),
           f"accuracy is {line['accuracy']:.3f}; of the whole vectors it is "
           f"{right.float().mean().item():.3f}")

    # Without the flag as before; with the gradient cache the same.
    line, drawn, vectors, _ = watched("")
    demand(math.isclose(line["loss"], contrastive(vectors, drawn, WIDTH).item(), rel_tol=1e-4),
           "without --matryoshka the loss is not what it was")
    whole, chunks = (run(train_cl, f"{small} --steps 5 --matryoshka 16,32 {words}")[0]
                     for words in ("", "--chunk 100"))
    for one, other in zip(whole, chunks, strict=True):
        demand(math.isclose(one["loss"], other["loss"], rel_tol=1e-3), f"step {one['step']}: the "
               f"loss is {one['loss']:.4f}, and with --chunk 100 {other['loss']:.4f}")
    for wrong in ("16,999", f"16,{WIDTH}", "0,16", "few"):
        demand(refused(train_cl, f"{small} --steps 1 --matryoshka {wrong}"),
               f"--matryoshka {wrong} is taken: a width that the model does not have should be "
               "a MocaError")


# --- 4: a task of one's own -----------------------------------------------------------

NAME = "description-to-scene"
OTHER_TASKS = "3913bf93ae973fab"  # a digest of the other tasks' first texts
SPOTS = ("left", "middle", "right")


def described(text: str) -> tuple[Scene | None, list[str]]:
    """The scene that a description says, and its places in the order of the text."""
    text = text.replace("<|im_end|>", "")
    cells: list = [None, None, None]
    order = []
    for part in text[max(0, text.find(": ") + 1):].split(","):
        words = part.split()
        if len(words) != 4 or words[0] not in SPOTS or words[2] not in COLOURS:
            return None, []
        cells[SPOTS.index(words[0])] = (words[2], words[3])
        order.append(words[0])
    return Scene(tuple(cells)), order


def pixels_of(record: Record) -> bytes:
    """What its picture shows."""
    demand(len(record.images) == 1, f"{record.source}: an answer has {len(record.images)} images")
    return np.asarray(open_image(record.images[0], record.source, decode=True)).tobytes()


def own_task() -> None:
    """Each query describes its answer's picture, and neither hard negatives nor twins."""
    everywhere = {split: builtin_tasks(split) for split in ("train", "development", "test")}
    for split, tasks in everywhere.items():
        demand(NAME in tasks, f"the split {split} has no task {NAME}: it has {', '.join(tasks)}")
        demand(len(tasks) == 6, f"there should be six tasks, and there are {', '.join(tasks)}")
        demand(list(tasks)[-1] == NAME, "the new task does not stand last: the number of a task "
               "seeds the order of its pairs (`PairBatches.members`), so the others would change")
        demand(tasks[NAME].kind == "image-text", f"its kind is {tasks[NAME].kind}")
        demand(len(tasks[NAME]) >= 200, f"{split}: only {len(tasks[NAME])} pairs")

    orders = set()
    scenes: dict[str, list[Scene]] = {}
    for split, tasks in everywhere.items():
        scenes[split] = []
        for index in range(64):
            pair: Pair = tasks[NAME][index]
            scene, order = described(pair.query.text)
            demand(scene is not None, f"{split} {index}: the query is {pair.query.text!r}; after "
                   "an instruction that ends in a colon it should say `Scene.description`, such "
                   "as 'left a red sun, right a cyan anchor'")
            demand(not pair.query.images, f"{split} {index}: the query has a picture: that gives "
                   "the answer away")
            demand(pair.query.text.find(": ") > 0, "the query says not what is wanted: begin it "
                   f"with an instruction that ends in a colon, not {pair.query.text[:40]!r}")
            demand(pixels_of(pair.positive) == np.asarray(scene.image()).tobytes(),
                   f"{split} {index}: the answer's picture is not what the query says: "
                   f"{pair.query.text!r}")
            wrong = [pixels_of(negative) for negative in pair.negatives]
            demand(pixels_of(pair.positive) not in wrong,
                   f"{split} {index}: a hard negative equals the answer")
            if split == "train":
                demand(len(wrong) > 0, f"train {index}: there is no hard negative (a twin)")
            beside = set(pair.positive.text.replace(",", " ").split())
            demand(not any(beside & set(cell) for cell in scene.cells if cell),
                   f"{split} {index}: the words beside the answer's picture say what it shows: "
                   f"{pair.positive.text!r}")
            scenes[split].append(scene)
            orders.add(tuple(order))
        demand(len(set(scenes[split])) >= 56, f"{split}: of 64 pairs only "
               f"{len(set(scenes[split]))} describe different scenes")
    demand(("right", "left") in orders or ("right", "middle", "left") in orders,
           "the order of a description's items is always that of the picture: its places say "
           "what the words should say")

    # What is tested is new, of what the base knows, and in families of four twins.
    for split in ("development", "test"):
        for number, scene in enumerate(scenes[split]):
            part = LABELLED.__class__(part=split)
            demand(part.has(scene), f"{split} {number}: this scene belongs to another part")
            first = scenes[split][number // 4 * 4]
            changed = sum(one != other for one, other in zip(first.cells, scene.cells))
            demand(changed == 0 if number % 4 == 0 else 1 <= changed <= 2,
                   f"{split} {number}: when testing, four pairs each should be a scene and its "
                   "three near twins (FAMILIES)")
    known = {word for scene in scenes["train"] for cell in scene.cells if cell for word in cell}
    demand(known <= {*LABELLED.names, *LABELLED.colours}, "labelled pairs show only symbols and "
           "colours of LABELLED: the others are what stage 1 is there to teach")

    # A pair is a function of (seed, split, index).
    again = builtin_tasks("train")[NAME]
    demand(all(again[index].query.text == everywhere["train"][NAME][index].query.text
               for index in (5, 3, 0)), "a pair is another one when it is asked for again")
    other = builtin_tasks("train", seed=1)[NAME]
    demand(other[0].query.text != again[0].query.text, "another --seed gives the same pairs")

    # The other tasks are as they were; of the split with answers of all kinds it is a part.
    digest = hashlib.sha256()
    for name, task in everywhere["train"].items():
        for index in range(12 if name not in (NAME, "long-text") else 0):
            pair = task[index]
            for record in (pair.query, pair.positive, *pair.negatives):
                digest.update(record.text.encode())
    demand(digest.hexdigest()[:16] == OTHER_TASKS, "the pairs of the other tasks are not what "
           "they were: is a number drawn before their branches?")
    pair = builtin_tasks("all-kinds")[NAME][0]
    demand(any(not negative.images for negative in pair.negatives), "the split all-kinds: no "
           "hard negative is a text, although a picture was asked for (`other_kinds`)")

    # It takes part.
    processor = Processor.load(BASE, load_config(BASE))
    counts = PairBatches(builtin_tasks(), processor, 64, 1280, 2, 0).counts
    demand(counts[NAME] == 7, f"in an epoch of batches of 64 it has {counts[NAME]} steps, not 7")
    log, _ = run(train_cl, "--steps 5 --batch 8 --no-report --without text-only")
    demand(len(log) == 5, "five steps of stage 2 did not run")


# --- 5: a target that is normalised per patch -----------------------------------------


def statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each patch. [..., 1176] -> [..., 1] each."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def norm_pixels() -> None:
    """With a patch decoder that knows the answer: the loss has to be 0, the error and the
    picture of the report those of pixels."""
    with tempfile.TemporaryDirectory() as folder:
        data, model = Path(folder) / "data.jsonl", Path(folder) / "model"

        # Here all colours are normalised alike, so that a patch of one colour has no spread.
        shutil.copytree(BASE, model)
        settings = json.loads((BASE / "preprocessor_config.json").read_text())
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (model / "preprocessor_config.json").write_text(json.dumps(settings))
        random = np.random.default_rng(0)
        lines = []
        for number in range(24):
            scene = LABELLED.scene(random)
            scene.image().save(Path(folder) / f"{number}.png")
            lines.append({"text": MARK + scene.caption(), "images": [f"{number}.png"]})
        Image.new("RGB", (56, 56), (90, 90, 90)).save(Path(folder) / "flat.png")
        lines.append({"text": MARK + "nothing", "images": ["flat.png"]})
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        same = f"--data {data} --model {model}"

        # Without the flag the target are pixels, as before.
        oracle = Oracle(normalised=False)
        with replaced(PatchDecoder, "forward", oracle.forward):
            log, _ = run(train_cpt, f"{same} --steps 1 --batch-tokens 800 --no-report")
        demand(log[0]["mae_loss"] < 0.01, "without --norm-pixels a decoder that answers with the "
               f"very pixels has an mae_loss of {log[0]['mae_loss']:.3f}, not 0")

        # With it they are normalised; in the report the oracle says only half.
        oracle = Oracle(normalised=True)
        columns: list = []
        with (replaced(PatchDecoder, "forward", oracle.forward),
              replaced(stage1, "REPORT_TOKENS", 500), replaced(stage1, "plot_losses", ignore),
              replaced(stage1, "plot_restorations", lambda path, shown: columns.extend(shown))):
            try:
                log, scores = run(train_cpt, f"{same} --norm-pixels --steps 1 --batch-tokens 800")
            except MocaError as error:
                raise NotYet(f"the run stops: {error}. (A patch of one colour has no spread: do "
                             "not divide by 0)") from None
        demand(log[0]["mae_loss"] < 0.01, "with --norm-pixels a decoder that answers with each "
               "patch's 1176 values, less their mean and divided by their standard deviation, has "
               f"an mae_loss of {log[0]['mae_loss']:.3f}, not 0 (per patch, not per group of four; "
               "and 1e-6 is enough beside the variance)")

        # Half of the answer: half of the way from a patch's mean to the pixels.
        processor = Processor.load(model, load_config(model))
        judged = oracle.seen[0]
        pixels = judged.normalise(judged.pixels[judged.noised])  # [G, 4, 1176]
        expected = 0.25 * float((pixels - statistics(pixels)[0]).square().mean())
        error = scores["patch error, words visible"]
        demand(math.isclose(error, expected, rel_tol=0.02), "training is right, but the report "
               "does not judge in pixels: of a decoder whose squared error in pixels is "
               f"{expected:.3f}, it says 'patch error, words visible' {error:.3f}")
        constant = float((pixels - pixels.mean(0)).square().mean())
        error = scores["patch error, best constant"]
        demand(math.isclose(error, constant, rel_tol=0.02), "'patch error, best constant' is "
               f"{error:.3f}; in pixels it is {constant:.3f}, as without the flag")
        demand(len(columns) > 0, "the report paints nothing")
        for batch, column in zip(oracle.seen[-len(columns):], columns, strict=True):
            patches = batch.normalise(batch.pixels)  # [J, 4, 1176]
            mean = statistics(patches)[0].expand_as(patches)
            patches[batch.noised] = (0.5 * (patches + mean))[batch.noised]
            painted = processor.unpatchify(patches.reshape(-1, 1176).numpy(), batch.layout.grids[0])
            demand(bool(np.abs(column[1][0] - painted).max() < 0.03), "training is right, and so "
                   "are the scores, but reconstruction.png is not painted in pixels: "
                   "multiply by each patch's spread and add its mean")

        # And with a decoder that has to learn.
        with (replaced(stage1, "REPORT_TOKENS", 500), replaced(stage1, "plot_losses", ignore),
              replaced(stage1, "plot_restorations", ignore)):
            log, _ = run(train_cpt, f"{same} --norm-pixels --steps 5 --batch-tokens 400")
        demand(all(math.isfinite(line["mae_loss"]) for line in log), "the loss is not finite")


class Oracle:
    """In place of the patch decoder: answers with what was masked, with half of it where no
    gradient is asked for, as in the report."""

    def __init__(self, normalised: bool) -> None:
        self.normalised = normalised
        self.seen: list = []  # the report's batches that have masked groups

        def forward(decoder: PatchDecoder, hidden: Tensor, batch: Any, group_index: Tensor
                    ) -> Tensor:
            patches = batch.normalise(batch.pixels[batch.noised])  # [G, 4, 1176]
            if self.normalised:
                mean, spread = statistics(patches)
                patches = (patches - mean) / spread
            if not torch.is_grad_enabled():
                patches = 0.5 * patches
                if len(group_index):
                    self.seen.append(batch)
            return patches.flatten(1) + 0.0 * hidden.sum()
        self.forward = forward


# --- the command ----------------------------------------------------------------------

CHECKS: dict[str, Callable[[], None]] = {
    "1": cosine_schedule, "2": image_blocks, "3": matryoshka, "4": own_task, "5": norm_pixels}


def check(number: str) -> str:
    """"right", or what is not."""
    torch.set_num_threads(1)
    try:
        CHECKS[number]()
    except NotYet as error:
        return f"not yet: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        # The reader's own line is the one to be shown.
        frames = traceback.extract_tb(error.__traceback__)
        places = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(ROOT)
                  and Path(frame.filename).name != Path(__file__).name]
        where = ""
        if places:
            file = Path(places[-1].filename).resolve().relative_to(ROOT)
            where = f" ({file}, line {places[-1].lineno}: {places[-1].line})"
        return f"not yet: it stops with {type(error).__name__}: {error}{where}"
    return "right"


def too_long(*_: Any) -> None:
    """The alarm."""
    raise TimeoutError(f"it computes for more than {LONGEST} seconds: does a loop never end?")


def main() -> None:
    """Check one change; exit code 1 if it is not right."""
    if len(sys.argv) != 2 or sys.argv[1] not in CHECKS:
        sys.exit(f"usage: python notebooks/check_change.py {'|'.join(CHECKS)}")
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGVTALRM, too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
    answer = check(sys.argv[1])
    print(answer)
    sys.exit(answer != "right")


if __name__ == "__main__":
    main()
