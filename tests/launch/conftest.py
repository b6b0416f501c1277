"""Tiny language, seq2seq and vision models with their tokenizers, and data for them, on disk."""

import io
import json
import random
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.models import pretrained
from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.vision import VisionConfig

LETTERS = list("abcdefgh")
SPECIAL = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
VOCAB = [*SPECIAL, "user", "assistant", "system", *LETTERS]


def write_tokenizer(folder, *, template=True, words=VOCAB):
    """One token a word; chats are written in ChatML where there is a template."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    backend = tokenizers.Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([w for w in SPECIAL if w in words])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>" if template else "</s>", "pad_token": "<pad>"}
    settings |= {"unk_token": "<unk>", "bos_token": None}
    if template:
        from steppe.data.chat import CHATML

        settings["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save(folder, config, seed=0):
    model = config.build()
    params = jax.jit(model.init)(jax.random.key(seed))
    pretrained.save(folder, model, params)
    return folder


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def png(pixels):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders: llama, gpt (no chat template), t5, vit; files: texts, chats, pairs, images."""
    root = tmp_path_factory.mktemp("tiny")
    lm = HeadConfig("lm", 1, drop=0.0)
    size = {"vocab_size": len(VOCAB), "width": 32, "heads": 2, "ffn_width": 32}
    decoder = DecoderConfig("llama", **size, layers=2, positions=64, tied=True, head=lm)
    llama = save(root / "llama", decoder)
    write_tokenizer(llama)
    plain = save(root / "plain", decoder)
    write_tokenizer(plain, template=False)
    depth = {"encoder_layers": 2, "decoder_layers": 1, "head_dim": 16, "positions": 64}
    seq2seq = Seq2SeqConfig("t5", **size, **depth, scale=1.0, drop=0.0, head=lm)
    t5 = save(root / "t5", seq2seq)
    write_tokenizer(t5, template=False)
    vit = save(root / "vit", VisionConfig("vit", 8, 4, 16, 2, 2, 32))

    rng = random.Random(0)
    runs = []  # the alphabet from any letter on
    for _ in range(120):
        start = rng.randrange(8)
        runs.append([LETTERS[(start + k) % 8] for k in range(rng.randint(6, 12))])
    write_lines(root / "texts.jsonl", [{"text": " ".join(r)} for r in runs])
    pairs = [(" ".join(r[:4]), " ".join(r[4:6])) for r in runs]
    write_lines(root / "chats.jsonl", [{"prompt": a, "answer": b} for a, b in pairs])
    write_lines(
        root / "pairs.jsonl",
        [{"source": " ".join(r[:4]), "target": " ".join(r[:4]).replace("a", "b")} for r in runs],
    )
    noise = np.random.default_rng(0)
    rows = []
    for _ in range(90):
        dark = rng.random() < 0.5
        low = 0 if dark else 150
        pixels = noise.integers(low, low + 100, (8, 8, 3)).astype(np.uint8)
        rows.append({"image": png(pixels), "label": "dark" if dark else "light"})
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "images.parquet")
    return SimpleNamespace(
        root=root,
        llama=llama,
        plain=plain,
        t5=t5,
        vit=vit,
        texts=f"file:{root / 'texts.jsonl'}",
        chats=f"file:{root / 'chats.jsonl'}",
        pairs=f"file:{root / 'pairs.jsonl'}",
        images=f"file:{root / 'images.parquet'}",
    )


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A folder with a tiny BERT, its vocabulary, and two sentiment files, a.jsonl and b.jsonl."""
    from steppe.models.encoder import EncoderConfig

    root = tmp_path_factory.mktemp("reviews")
    words = ["good", "fine", "nice", "bad", "poor", "sad", "film", "plot", "the", "a", "was"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    model = EncoderConfig(
        "bert", len(vocab), 16, 2, 2, 32, 16, types=2, pooler=True, drop=0.1, attn_drop=0.1
    ).build()
    # Wider initial values than a pretrained model would need, so that few steps are enough.
    params = jax.tree.map(
        lambda x: 8.0 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0))
    )
    pretrained.save(root / "model", model, params)
    (root / "model" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (root / "model" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    rng = random.Random(0)
    for name in "ab":
        rows = []
        for number in range(160):
            positive = rng.random() < 0.5
            said = rng.choice(words[:3] if positive else words[3:6])
            text = f"{rng.choice(words[8:10])} {rng.choice(words[6:8])} was {said}"
            label = "pos" if positive else "neg"
            rows.append({"id": f"{name}{number}", "text": text, "label": label})
        write_lines(root / f"{name}.jsonl", rows)
    return SimpleNamespace(
        model=str(root / "model"), a=f"file:{root / 'a.jsonl'}", b=f"file:{root / 'b.jsonl'}"
    )


# Settings of runs on the short reviews.
SHORT = (
    "--data.max-length=12",
    "--data.buckets",
    "8",
    "12",
    "--batch-size=16",
    "--optim.learning-rate=5e-3",
)


def classes(world, *more, source=None):
    """``steppe distill`` on the reviews."""
    return [
        "distill",
        f"--data.source={source or world.a}",
        *SHORT,
        "--log-every=1",
        *more,
    ]


@pytest.fixture(scope="session")
def taught(reviews, tmp_path_factory):
    """A run of ``steppe finetune``: the teacher."""
    out = tmp_path_factory.mktemp("taught") / "run"
    args = classes(reviews, f"--out={out}", "--steps=40", "--drop=0", "--no-baselines")
    assert cli.main(["finetune", f"--model={reviews.model}", *args[1:]]) == 0
    return out
