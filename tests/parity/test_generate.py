"""Generation against ``transformers``: greedy, penalties, beams, and the law of sampling."""

import functools

import jax
import numpy as np
import pytest

from steppe.models import decoding, pretrained
from steppe.models.decoding import Settings, processors, sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

V, EOS, PAD, NEW = 61, 7, 2, 12
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}
MODELS = {
    "llama": (transformers.LlamaConfig, LLAMA, transformers.LlamaForCausalLM),
    "gpt2": (transformers.GPT2Config, GPT2, transformers.GPT2LMHeadModel),
    "bart": (transformers.BartConfig, BART, transformers.BartForConditionalGeneration),
}
DECODERS = ("llama", "gpt2")


@functools.cache
def pair(name: str, directory: str):
    config, settings, model = MODELS[name]
    ends = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1}
    torch.manual_seed(0)
    reference = model(config(**settings, **ends)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    reference.save_pretrained(directory)
    return reference, pretrained.load(directory, drop=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    return lambda name: pair(name, str(folder / name))


def batch(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    rows = [rng.integers(8, V, n).tolist() for n in (9, 3, 6, 1)]
    made = decoding.pad_prompts(rows, PAD, sizes=None)
    if name in DECODERS:
        return made
    return {k: v[:, ::-1].copy() for k, v in made.items()}  # sources are padded on the right


def theirs(reference, inputs, **options):
    """(new tokens [B, N], scores or None)."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    with torch.no_grad():
        out = reference.generate(
            **{k: torch.tensor(v) for k, v in inputs.items()},
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    skip = 1 if reference.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    scores = getattr(out, "sequences_scores", None)
    return out.sequences[:, skip:].numpy(), None if scores is None else scores.numpy()


def same(ours, reference):
    """Equal but for columns of padding at the end."""
    width = max(ours.shape[1], reference.shape[1])
    ours, reference = (
        np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=PAD) for x in (ours, reference)
    )
    np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_token_for_token(models, name):
    reference, loaded = models(name)
    inputs = batch(name)
    run = decoding.make(loaded.model)
    for ours, options in (
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"min_new_tokens": 9}, {"min_new_tokens": 9}),
    ):
        if name == "bart" and "repetition_penalty" in ours:
            continue  # there the start token counts as said
        out = run(
            loaded.params,
            inputs,
            Settings(max_new_tokens=NEW, **ours),
            eos_id=EOS,
            pad_id=PAD,
        )
        same(out.tokens, theirs(reference, inputs, **options)[0])


def test_processors_token_for_token(models):
    reference, loaded = models("llama")
    inputs = {k: v[:1] for k, v in batch("llama").items()}  # their n-grams see the padding
    for ours, options in (
        ([processors.no_repeat_ngram(2)], {"no_repeat_ngram_size": 2}),
        (
            [processors.bad_words([[9], [10, 11], [20, 30]])],
            {"bad_words_ids": [[9], [10, 11], [20, 30]]},
        ),
        ([processors.sequence_bias({(12,): 3.0})], {"sequence_bias": {(12,): 3.0}}),
        ([processors.forbidden_tokens([40, 41], V)], {"suppress_tokens": [40, 41]}),
    ):
        out = decoding.generate(
            loaded.model,
            loaded.params,
            inputs,
            Settings(max_new_tokens=NEW),
            eos_id=EOS,
            processors=ours,
        )
        same(out.tokens, theirs(reference, inputs, **options)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
        {"num_beams": 3, "repetition_penalty": 1.2, "min_new_tokens": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", DECODERS)
def test_beam_search(models, name, options):
    check_beams(models, name, options)


@pytest.mark.parametrize("early", [False, True, "never"])
def test_beam_search_of_an_encoder_decoder(models, early):
    check_beams(models, "bart", {"num_beams": 4, "early_stopping": early})


def check_beams(models, name, options):
    reference, loaded = models(name)
    inputs = batch(name)
    width = options["num_beams"]
    tokens, scores = theirs(reference, inputs, num_return_sequences=width, **options)
    ours = {k: v for k, v in options.items() if k != "num_beams"}
    found = decoding.beam_search(
        loaded.model,
        loaded.params,
        inputs,
        beams=width,
        best=width,
        max_new_tokens=NEW,
        eos_id=EOS,
        pad_id=PAD,
        **ours,
    )
    np.testing.assert_allclose(found.scores.reshape(-1), scores, atol=1e-4)
    same(found.tokens.reshape(len(tokens), -1), tokens)


@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, V])
def test_warpers(top_k, top_p):
    """Temperature, top-k, top-p and min-p in their order, also where logits are equal."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(24, V))).astype(np.float32)
    logits[12:] = np.round(logits[12:])
    for temperature in (0.1, 1.0, 2.0):
        for min_p in (0.0, 0.2):
            chain = [transformers.TemperatureLogitsWarper(temperature)]
            chain += [transformers.TopKLogitsWarper(top_k)] if top_k else []
            chain += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
            chain += [transformers.MinPLogitsWarper(min_p)] if min_p else []
            want = torch.tensor(logits)
            for warper in chain:
                want = warper(None, want)
            rows = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            got = np.asarray(warp(logits, rows.rows(24)))
            want = want.numpy()
            settled = slice(None) if top_p == 1 else slice(0, 12)
            np.testing.assert_array_equal(np.isneginf(got)[settled], np.isneginf(want)[settled])
            probabilities = [np.sort(jax.nn.softmax(x, axis=1), axis=1) for x in (got, want)]
            np.testing.assert_allclose(*probabilities, atol=1e-6)
            np.testing.assert_allclose(got[settled], want[settled], rtol=1e-6)


warp = jax.jit(sampling.warp)


def test_repetition_penalty_on_logits():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, V)).astype(np.float32)
    context = rng.integers(0, V, (5, 9))
    for penalty in (0.8, 1.2):
        want = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor(context), torch.tensor(logits)
        )
        rows = Settings(repetition_penalty=penalty).rows(5)
        got = jax.jit(sampling.penalise)(
            logits, context[:, :4], context[:, 4:], rows, np.ones(5, bool)
        )
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
