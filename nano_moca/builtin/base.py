"""How the nano base is made: a tokenizer learned, weights drawn, a captioner trained.

The base plays the part of Qwen-VL: a causal captioner and language model in
Qwen2.5-VL's own files, small enough to be carried in the repository. It is trained by
stage 1's own script under the next-token loss, on scenes of the symbols that it knows:

    python -m nano_moca.builtin [flags of train_cpt.py]

learns the tokenizer and trains from scratch, in about four minutes on one core.
"""

import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from torch import nn

from nano_moca.builtin import COLOURS, NAMES, split_documents
from nano_moca.config import BASE
from nano_moca.convert.export import save_weights
from nano_moca.families import build_model, load_config
from nano_moca.files import MocaError, beside, fresh_folder, replace_folder, writing
from nano_moca.flags import Parser
from nano_moca.model import VLM
from nano_moca.plan.claims import check_ours

SCRIPTS = Path(__file__).resolve().parents[2]  # the folder of the training scripts
# All that captions, descriptions and queries consist of, beside symbols and colours.
WORDS = ("a an nothing left middle right Find caption picture page with and in other "
         "words What does do How work")
# Those of the committed base, beside the defaults.
BASE_FLAGS = ("--data builtin:base --objective next-token --steps 500 --batch-tokens 2000 "
              "--learning-rate 2e-3").split()


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE like Qwen's, learned from captions and documents; each word of
    a caption is one token.

    Pre-tokenization and special tokens are those of the base's tokenizer.json: Qwen's
    own pattern (contractions, words, single digits, punctuation, line ends, spaces),
    and Qwen's first fourteen tokens after the 1,300 that are learned.
    """
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1300, show_progress=False, initial_alphabet=alphabet)

    # Each word at the start of a text and after a comma, often enough to become a token.
    texts: list[str] = []
    for word in (*NAMES, *COLOURS, *WORDS.split()):
        texts += [f"{word}, {word}"] * 5000
    texts += map(" ".join, split_documents("train"))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def initialise(model: VLM, seed: int) -> None:
    """Random weights to train from scratch."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Norms scale by 1 at first, biases add nothing.
        if parameter.dim() == 1:
            nn.init.constant_(parameter, float("norm" in name or "ln_q" in name))
            continue

        # What writes into the residual stream starts smaller the deeper the tower is.
        spread = 0.02 if "embed_tokens" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
            spread /= (2 * model.config.layers) ** 0.5
        nn.init.normal_(parameter, std=spread, generator=generator)


def run_python(words: Sequence[str]) -> None:
    """`python WORDS` in a process of its own.

    If it fails it has said why in one line, and we end with its exit code; MocaError if
    it was killed before it could.
    """
    done = subprocess.run([sys.executable, *words])
    if done.returncode < 0:
        name = Path(words[0]).name
        raise MocaError(f"{name} was killed by signal {-done.returncode}: run it again")
    if done.returncode:
        sys.exit(done.returncode)


def run_script(name: str, words: Sequence[str]) -> None:
    """A training script. They stand above the package, so nothing in it imports them."""
    run_python([str(SCRIPTS / name), *words])


def base_flags(words: Sequence[str]) -> Namespace:
    """The two flags of train_cpt.py that matter here too; the script judges the others.

    Ends here for --help.
    """
    about = "Make the nano base and put it into nano_moca/base. Other flags: train_cpt.py's."
    parser = Parser(prog="nano_moca.builtin", description=about, allow_abbrev=False)
    parser.add_argument("--output", default="runs/base", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_known_args(words)[0]


def train_base(start: Path, words: Sequence[str]) -> Path:
    """Train a causal captioner from scratch; the folder of the model.

    start: a folder like nano_moca/base, whose config.json says the model's shape; gets
    random weights. words: flags of train_cpt.py that differ from what the committed
    base was made with.
    """
    # Random weights, in a checkpoint's own files.
    flags = base_flags(words)
    model = build_model(load_config(start))
    initialise(model, flags.seed)
    save_weights(start, model.state_dict(), model.config)

    # Of a flag that is given twice the last value counts.
    defaults = ["--output", flags.output, *BASE_FLAGS, "--model", str(start)]
    run_script("train_cpt.py", [*defaults, *words])
    return Path(flags.output) / "model"


def make_base(words: Sequence[str]) -> None:
    """Learn the tokenizer, train the base, and put both into nano_moca/base.

    The shape of the model is what the base's config.json says: change it there.
    """
    # A mistake ends us before anything is made, as --help does, or a folder that may not be
    # written, or one of the user's where the new base is to stand for a moment.
    base_flags(words)
    for ending in (".new", ".old"):
        check_ours(beside(BASE, ending), beside(BASE, ending).is_dir())
    with writing(BASE):
        TemporaryFile(dir=BASE.parent).close()
    start = Path(shutil.copytree(BASE, "runs/base/start", dirs_exist_ok=True))
    make_tokenizer().save(str(start / "tokenizer.json"))
    model = train_base(start, words)
    shutil.copy(model / "model.safetensors", start)

    # The old base stays until the new one is complete beside it.
    with writing(BASE):
        shutil.copytree(start, fresh_folder(BASE), dirs_exist_ok=True)
        replace_folder(BASE)
