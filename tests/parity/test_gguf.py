"""SmolLM2 out of its GGUF file: tensors, tokens, perplexity and text against transformers."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from steppe.data import chat
from steppe.data.text import Tokenizer
from steppe.models import gguf_weights, pretrained, tree

pytestmark = [pytest.mark.parity, pytest.mark.assets]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAGRAPH = (
    "The history of the lighthouse goes back to the ancient world. The most famous of them stood "
    "on the island of Pharos, near Alexandria, and was counted among the seven wonders of the "
    "world. It was built in the third century before Christ, and for many centuries it was one of "
    "the tallest buildings made by man. Earthquakes damaged it badly, and by 1480 the last of its "
    "stones had been used to build a fortress on the same spot."
)
PROMPTS = ("Once upon a time, a little fox", "The capital of France is")
TEXTS = [
    "",
    "Hello world",
    " leading, trailing ",
    "  two  spaces   three    four" + " " * 50 + "x",
    "tabs\tand\n\nnew\r\nlines\n \n  x" + "\n" * 50,
    "2+2=4 and 12345.678, x1y22z $100 €50 3:45",
    "naïve café résumé e\u0301 ﬁ \u00a0 \u200d\ufeff\u2028",
    "東京は日本の首都です。한국어 Привет, мир! مرحبا בוקר",
    "🙂👍🏽👨\u200d👩\u200d👧\u200d👦 🇧🇷",
    "def f(x):\n    return x**2  # comment\n\tif x: pass\n",
    "don't I'll we've DON'T I'LL",
    "<|im_start|>user\nhi<|im_end|>a<|endoftext|>b",
    "\x00\x01\x7f\x80" + "a" * 300,
]
# Texts in which a character of number follows white space, or is not a digit. The file asks
# for the rule "smollm" (every \\p{N} alone, then the rule of GPT-2), which is how the model's
# own tokenizer.json and llama.cpp cut them; transformers' reader of GGUF files knows no such
# rule and uses that of GPT-2 alone. Ours are right.
NUMBERS = ["assistant\n\n4", "a  1", "½ ¾ Ⅷ ² ٣٤ १२"]


@pytest.fixture
def file(asset):
    return asset("smollm2") / FILE


@pytest.fixture(scope="module")
def reference():
    """``reference(file)`` is the model of transformers in float32, read once."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    held = {}

    def read(file):
        if not held:
            held["model"] = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            ).eval()
        return held["model"]

    yield read
    held.clear()


@pytest.fixture(scope="module")
def loaded():
    held = {}

    def read(file):
        if not held:
            held["model"] = pretrained.load(file)
        return held["model"]

    yield read
    held.clear()


def test_tokens_are_those_of_transformers(file):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = Tokenizer.open(file)
    for text in TEXTS:
        ids = ours.encode_batch([text])[0]["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids, skip_special=False) == text
        stream = ours.stream(skip_special=False)
        assert "".join(stream.push([number]) for number in ids) + stream.end() == text
    for text in NUMBERS:
        ids = ours.encode_batch([text])[0]["input_ids"]
        assert ids != theirs(text)["input_ids"]
        assert ours.decode(ids) == text
    ids = ours.encode_batch(["assistant\n\n4"])[0]["input_ids"]
    assert [ours.decode([number]) for number in ids[-2:]] == ["\n\n", "4"]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 2, 2, 49152)
    assert ours.max_positions == 8192


def test_chats_are_those_of_transformers(file):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = Tokenizer.open(file)
    messages = [
        {"role": "user", "content": "What is gravity?"},
        {"role": "assistant", "content": "A force."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Everywhere."},
    ]
    assert ours.chat_template == theirs.chat_template
    for given in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        for count in range(1, len(given) + 1):
            for prompt in (False, True):
                expected = theirs.apply_chat_template(
                    given[:count], tokenize=False, add_generation_prompt=prompt
                )
                got = chat.render(ours.chat_template, given[:count], add_generation_prompt=prompt)
                assert got == expected
        encoded = chat.encode_chat(ours, given)
        assert encoded.ids == theirs.apply_chat_template(given)["input_ids"]
        answer = [n for n, mask in zip(encoded.ids, encoded.answer_mask) if mask]
        assert ours.decode(answer, skip_special=False) == "A force.<|im_end|>Everywhere.<|im_end|>"
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert chat.encode_prompt(ours, messages[:1]) == prompt


@pytest.mark.slow
def test_config_and_tensors_are_those_of_transformers(file, reference):
    held, config = gguf_weights.read(file)
    model = reference(file)
    theirs = model.config.to_dict()
    assert config.pop("rms_norm_eps") == pytest.approx(theirs["rms_norm_eps"], rel=1e-6)
    assert config.pop("rope_theta") == theirs["rope_parameters"]["rope_theta"]
    assert config.pop("architectures") == [type(model).__name__]
    for key in set(config) - {"rope_scaling", "dtype"}:
        assert config[key] == theirs[key], key
    tensors = model.state_dict()
    assert set(tensors) - set(held.shapes()) == {"lm_head.weight"}  # tied
    assert set(held.shapes()) <= set(tensors)
    layer = "model.layers.17"
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"{layer}.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    ):
        np.testing.assert_allclose(held.read(name), tensors[name].numpy(), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_perplexity_of_a_paragraph(file, reference, loaded):
    import torch

    ids = np.array([e["input_ids"] for e in Tokenizer.open(file).encode_batch([PARAGRAPH])])
    held = loaded(file)
    assert tree.count(held.params) == 134_515_008
    assert (held.fresh, held.unused) == ((), ())
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = np.asarray(jax.jit(held.model.apply)(held.params, batch).logits)
    with torch.no_grad():
        theirs = reference(file)(input_ids=torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=2e-3, rtol=1e-4)

    def perplexity(logits):
        logits = logits[0, :-1].astype(np.float64)
        each = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        return math.exp((each - np.take_along_axis(logits, ids[0, 1:, None], -1)[:, 0]).mean())

    assert perplexity(logits) == pytest.approx(perplexity(theirs), rel=1e-5)
    assert 5 < perplexity(logits) < 15


@pytest.mark.long
def test_greedy_text_is_the_same_token_for_token(file, reference, loaded):
    import torch

    from steppe.models import decoding

    tokenizer, held = Tokenizer.open(file), loaded(file)
    prompts = [e["input_ids"] for e in tokenizer.encode_batch(PROMPTS)]
    prompts.append(chat.encode_prompt(tokenizer, [{"role": "user", "content": "What is gravity?"}]))
    got = decoding.generate(
        held.model,
        held.params,
        decoding.pad_prompts(prompts, tokenizer.pad_id),
        decoding.Settings(max_new_tokens=64),
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            theirs = reference(file).generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.pad_id,
            )[0, len(prompt) :]
        assert got.tokens[row, : got.lengths[row]].tolist() == theirs.tolist()
    text = tokenizer.decode(got.tokens[0].tolist())
    assert text.startswith(" named Max had a special gift. He could talk to animals")


@pytest.mark.slow
def test_loading_takes_little_more_than_the_parameters(file):
    """Peak memory that a process gains by loading, against the float32 size."""
    code = (
        "import json, resource, sys, jax, jax.numpy as jnp\n"
        "from steppe.models import gguf_weights, pretrained\n"
        "import gguf\n"
        "jnp.zeros(3).block_until_ready()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "held = pretrained.load(sys.argv[1])\n"
        "jax.block_until_ready(held.params)\n"
        "size = 4 * sum(leaf.size for leaf in jax.tree.leaves(held.params))\n"
        "print(json.dumps((peak() - before) / size))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert json.loads(out.stdout.splitlines()[-1]) < 1.3
