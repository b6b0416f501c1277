"""Late prompts: their generators, what stops at the insertion, and what never sees an answer."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.heads import HeadConfig
from steppe.models.overlays import added_prompt, compose, late, lora, lpt, prompt
from steppe.models.sites import SiteContext

from .conftest import TINY
from .test_decoder_decode import CONFIGS, made
from .test_overlays import BERT, KEY, MODEL, SAME, first_input, moved, one_layer
from .test_seq2seq import tiny as encoder_decoder


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("npg", 1024 * 128 + 128 + 5 * 1024 * 128 + 5 * 1024),
        ("appg", 1024 * 128 + 128 + 128 * 1024 + 1024),
        ("free", 5 * 1024),
    ],
)
def test_counts_on_roberta_large(kind, wanted):
    shapes = dataclasses.replace(BERT, width=1024, heads=16, layers=24).build().abstract()
    delta = jax.eval_shape(lambda: lpt.overlay(kind=kind).init(KEY, shapes))
    assert tree.count(delta) == wanted


def pools(x, count, slots, how):
    """The slots of one text, by their definition."""
    pick = {"avg": np.mean, "max": np.max}[how]
    bounds = [(j * count // slots, -(-(j + 1) * count // slots)) for j in range(slots)]
    return np.stack([pick(x[a:b], axis=0) for a, b in bounds])


@pytest.mark.parametrize("how", ["avg", "max"])
def test_pools_for_every_length(how):
    x = np.random.default_rng(0).normal(size=(30, 32, 3)).astype(np.float32)
    # Text i has i + 1 tokens, which begin at column 2: padding on both sides.
    column = np.arange(32)
    mask = (column >= 2) & (column < 3 + np.arange(30)[:, None])
    for slots in (1, 3, 4, 10):
        got = np.asarray(jax.jit(lpt.adaptive_pool, static_argnums=(2, 3))(x, mask, slots, how))
        for i in range(30):
            wanted = pools(x[i, 2 : 3 + i], i + 1, slots, how)
            np.testing.assert_allclose(got[i], wanted, atol=1e-6)
    nothing = lpt.adaptive_pool(x[:1], np.zeros((1, 32), bool), 2, how)
    np.testing.assert_array_equal(nothing, np.zeros((1, 2, 3)))


def generated(kind, delta, states, batch):
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), delta)
    if kind == "free":
        return np.broadcast_to(own["prompt"], (4, 3, 16))
    z = states @ own["down"]["kernel"] + own["down"]["bias"]
    if kind == "npg":
        inner = np.maximum(z[:, 0], 0)
        return (inner @ own["up"]["kernel"] + own["up"]["bias"]).reshape(4, 3, 16)
    how = "avg" if kind == "appg" else "max"
    counts = batch["attention_mask"].sum(1)
    pooled = np.stack([pools(z[i], n, 3, how) for i, n in enumerate(counts)])
    return np.maximum(pooled, 0) @ own["up"]["kernel"] + own["up"]["bias"]


@pytest.mark.parametrize("kind", lpt.KINDS)
def test_against_float64(kind, tiny, batch):
    """Layers 1 and 2, the prompt, layers 3 and 4; and the head reads the text's first token."""
    _, params = tiny
    overlay = lpt.overlay(layer=2, length=3, kind=kind, bottleneck=5)
    delta = moved(overlay, params, by=0.3)
    mask = batch["attention_mask"] != 0
    states = one_layer(params, first_input(params, batch), mask, SAME, range(2))
    rows = generated(kind, delta, states, batch)
    longer = np.concatenate([rows, states], axis=1)
    seen = np.pad(mask, ((0, 0), (3, 0)), constant_values=True)
    wanted = one_layer(params, longer, seen, SAME, range(2, 4))
    bound = overlay.bind(MODEL)

    @jax.jit
    def run(delta):
        out = bound.apply({"base": params, "overlay": delta}, batch)
        return out.logits, out.hidden

    logits, hidden = run(delta)
    np.testing.assert_allclose(np.asarray(hidden)[seen], wanted[seen], atol=2e-5)
    head = MODEL.parts.head(params, jnp.asarray(wanted[:, 3:], jnp.float32), _inputs())
    np.testing.assert_allclose(logits, head, atol=2e-5)


def _inputs():
    from steppe.models.model import Inputs

    return Inputs(None, None, None, None)


def test_no_position_is_taken_and_all_states_line_up(tiny, batch):
    """A text of all 20 positions has room for a late prompt; states of the text keep a column."""
    _, params = tiny
    full = {"input_ids": np.full((2, 20), 7, np.int32)}
    overlay = lpt.overlay(layer=2, length=3, kind="free")
    out = overlay.bind(MODEL)
    delta = moved(overlay, params)
    call = jax.jit(
        lambda d: out.apply({"base": params, "overlay": d}, full, all_hidden=True).hidden
    )
    states = call(delta)
    assert states.shape == (5, 2, 23, 16)
    assert not np.asarray(states[:2, :, :3]).any()
    np.testing.assert_array_equal(states[2, 0, :3], delta["prompt"])
    plain = jax.jit(lambda: MODEL.apply(params, full, all_hidden=True).hidden)()
    np.testing.assert_allclose(states[:3, :, 3:], plain[:3], atol=1e-5)
    assert np.abs(states[3, :, 3:] - plain[3]).max() > 1e-4


def compiled(function, *args):
    """FLOPs of the compiled program, and its matrix products."""
    program = jax.jit(function).lower(*args).compile()
    products = len(re.findall(r" dot\(|custom-call", program.as_text()))
    return program.cost_analysis()["flops"], products


def test_the_compiled_backward_pass_skips_the_layers_below(tiny, batch):
    """Counted in the compiled program: a layer below costs its forward pass and no more."""
    _, params = tiny
    model = TINY.build()  # written out: a loop's body is counted once

    def program(layer, **options):
        overlay = lpt.overlay(layer=layer, length=2, **options)
        bound, delta = overlay.bind(model), moved(overlay, params)

        def loss(d, p):
            return bound.apply({"base": p, "overlay": d}, batch).logits.sum()

        return loss, (delta, params)

    loss, args = program(2, kind="free")
    forward, _ = compiled(loss, *args)
    cost, products = {}, {}
    for layer in (0, 2, 3):
        loss, args = program(layer, kind="free")
        total, products[layer] = compiled(jax.grad(loss), *args)
        cost[layer] = total - forward
    # Above k = 0 stand three whole layers and the last one, which is run for one token; above
    # k = 2 one and that, of which the prompt's rows alone need a gradient; above 3 the last one.
    assert cost[0] > 0.5 * forward
    assert cost[2] < 0.45 * cost[0]
    assert cost[3] < 0.2 * cost[0]
    # Every layer below takes the same number of products away.
    assert products[0] - products[2] == 2 * (products[2] - products[3]) > 0
    # Looped over: what runs backwards are the layers above, and none of those below.
    for overlay, wanted in ((lpt.overlay(layer=1, length=2), [2]), (prompt.overlay(length=2), [3])):
        bound, delta = overlay.bind(MODEL), moved(overlay, params)

        def loss(d, bound=bound):
            return bound.apply({"base": params, "overlay": d}, batch).logits.sum()

        assert reversed_lengths(jax.make_jaxpr(jax.grad(loss))(delta).jaxpr) == wanted


def reversed_lengths(jaxpr):
    """Lengths of the loops that run backwards, wherever they stand."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            if equation.params["reverse"]:
                found.append(equation.params["length"])
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                found += reversed_lengths(inner)
    return found


LEAF = "layers/ffn/in/kernel"


def test_gradients_end_at_the_insertion_and_are_the_same_without_the_stop(tiny, batch):
    """Beside a LoRA that does nothing yet, which is what ``stop=False`` is for."""
    _, params = tiny
    alone = lpt.overlay(layer=2, length=2, kind="appg", bottleneck=4)
    both = compose(lora.overlay(rank=2), lpt.overlay(**{**dict(alone.settings), "stop": False}))
    delta = both.init(KEY, params)
    delta["lpt"] = moved(alone, params)

    def grads(overlay, delta):
        bound = overlay.bind(MODEL)

        def loss(delta, leaf):
            base = tree.replace(params, {LEAF: leaf})
            return jnp.square(bound.apply({"base": base, "overlay": delta}, batch).logits).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(delta, tree.get(params, LEAF))

    ours, base = grads(alone, delta["lpt"])
    assert not np.asarray(base[:2]).any()
    theirs, whole = grads(both, delta)
    assert all(np.abs(whole[layer]).max() > 0 for layer in range(4))
    np.testing.assert_allclose(base[2:], whole[2:], atol=1e-5)
    for path, leaf in tree.flatten(ours).items():
        np.testing.assert_allclose(leaf, tree.get(theirs["lpt"], path), atol=1e-5, err_msg=path)
        assert np.abs(leaf).max() > 0, path
    assert np.abs(theirs["lora"]["layers"]["attn.q"]["b"][0]).max() > 0
    refused = compose(lora.overlay(rank=2), alone).bind(MODEL)
    with pytest.raises(ValueError, match=r"other sites are attached \(attn.q, attn.v\)"):
        refused.apply({"base": params, "overlay": delta}, batch)


def test_after_the_last_layer_a_prompt_moves_nothing_that_is_read(tiny, batch):
    _, params = tiny
    end = lpt.overlay(layer=4, length=2, kind="free")
    bound, delta = end.bind(MODEL), moved(end, params)
    call = jax.jit(
        jax.grad(lambda d: bound.apply({"base": params, "overlay": d}, batch).logits.sum())
    )
    assert not np.asarray(call(delta)["prompt"]).any()


def test_at_the_bottom_of_a_decoder_it_is_a_prompt_in_front():
    """A model that turns queries and keys puts no positions into the embeddings."""
    model, params = made(CONFIGS["llama"])
    rows = {"prompt": jax.random.normal(KEY, (3, 16))}
    ids = {"input_ids": np.arange(1, 11, dtype=np.int32).reshape(2, 5)}
    found = []
    for overlay in (lpt.overlay(layer=0, length=3, kind="free"), prompt.overlay(length=3)):
        bound = overlay.bind(model)
        call = jax.jit(lambda d, b=bound: b.apply({"base": params, "overlay": d}, ids).logits)
        found.append(call(rows))
    got, wanted = found
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_prompt_of_a_language_model_never_sees_the_answer():
    model, params = made(CONFIGS["llama"])
    overlay = lpt.overlay(layer=1, length=2, bottleneck=4)
    bound = overlay.bind(model)
    delta = moved(overlay, params)
    rng = np.random.default_rng(0)
    mask = np.ones((2, 9), np.int32)
    mask[1, :3] = 0  # prompts of language models are padded on the left
    ids = rng.integers(1, 40, (2, 9)).astype(np.int32)
    labels = np.where(np.arange(9) >= 6, ids, -100)  # the answer: the last three tokens
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    call = jax.jit(lambda b: bound.apply({"base": params, "overlay": delta}, b).logits)
    first = call(batch)
    assert first.shape == (2, 9, 40)
    other = {**batch, "input_ids": np.where(np.arange(9) >= 6, ids % 39 + 1, ids)}
    question = (mask != 0) & (np.arange(9) < 6)
    np.testing.assert_allclose(call(other)[question], first[question], atol=1e-6)
    # The question is seen: its last token changes what comes before it, through the prompt.
    other = {**batch, "input_ids": np.where(np.arange(9) == 5, ids % 39 + 1, ids)}
    assert np.abs(call(other)[0, 0] - first[0, 0]).max() > 1e-5
    with pytest.raises(ValueError, match="the batch must hold labels"):
        bound.apply({"base": params, "overlay": delta}, {"input_ids": ids, "attention_mask": mask})


def test_which_tokens_may_be_read():
    model = CONFIGS["llama"].build()
    states = _inputs()._replace(
        hidden=jnp.zeros((3, 7, 2)), mask=np.array([[1] * 7, [1, 1, 0, 0, 1, 1, 1], [1] * 7])
    )
    batch = {  # two rows of a prompt stand in front of five tokens
        "labels": np.array([[-1, -1, 8, -1, 9], [-1, -1, -1, 4, 4], [3, 4, 5, 6, 7]]),
        "label_mask": np.array([[1] * 5, [1] * 5, [1] * 5]),
    }
    told = late._told(model, batch, states)
    wanted = [[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(told, np.array(wanted, bool))
    assert late._told(model, {}, states) is None
    pooled = dataclasses.replace(CONFIGS["llama"], head=HeadConfig("classification", 2)).build()
    np.testing.assert_array_equal(late._told(pooled, {}, states), states.mask != 0)


def test_dropout_of_the_prompt(tiny):
    _, params = tiny
    overlay = lpt.overlay(layer=1, length=4, kind="appg", bottleneck=4, drop=0.5)
    delta = moved(overlay, params)
    site = overlay.sites(delta)["late"]
    mask = np.ones((2, 6), bool)
    x = _inputs()._replace(hidden=jax.random.normal(KEY, (2, 6, 16)))

    def rows(**options):
        context = SiteContext(mask=mask, reads=jnp.zeros(2, int), **options)
        return site.fn(site.delta, x, lambda y: y, context).hidden[:, :4]

    still, drawn = map(np.asarray, jax.jit(lambda: (rows(), rows(train=True, rng=KEY)))())
    assert 0.3 < (drawn == 0).mean() < 0.7
    np.testing.assert_allclose(drawn[drawn != 0], 2 * still[drawn != 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lpt.overlay(length=0), "length and bottleneck must be >= 1, got 0"),
        (lambda: lpt.overlay(kind="pg"), "kind must be one of npg, appg, mppg, free"),
        (lambda: lpt.overlay(layer=-2), "layer must be >= 0, or -1"),
        (lambda: lpt.overlay(drop=1.0), r"drop must be in \[0, 1\)"),
        (lambda: lpt.overlay(layer=5).init(KEY, shapes()), "in 0..4 for 4 layers, got 5"),
        (lambda: lpt.overlay(layer=5).bind(MODEL), "in 0..4 for a model of 4 layers, got 5"),
        (lambda: lpt.overlay().init(KEY, encoder_decoder("t5").params), "of one stack of layers"),
        (
            lambda: lpt.overlay().bind(encoder_decoder("t5").model),
            "needs an encoder or a decoder",
        ),
        (lambda: compose(lpt.overlay(), lpt.overlay()).bind(MODEL), "does not come in parts"),
        (lambda: beside(added_prompt.overlay(length=1, ids=(5,))), "a site 'resid' adds to"),
        (
            lambda: lpt.overlay(length=25, kind="free").init(KEY, shapes()),
            "none of the model's 20 positions",
        ),
        (lambda: decoder(length=20), "28 rows, those in front included, are more than"),
        (lambda: decoder(length=2, segment_ids=np.ones((2, 8), np.int32)), "packed texts"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def beside(other):
    bound = compose(other, lpt.overlay(stop=False)).bind(MODEL)
    ids = {"input_ids": np.ones((2, 4), np.int32)}
    return jax.eval_shape(lambda p: bound.apply(p, ids), bound.abstract())


def decoder(length, **more):
    overlay = lpt.overlay(length=length, kind="free", start="normal")
    model = CONFIGS["llama"].build()
    bound = overlay.bind(model)
    ids = {"input_ids": np.ones((2, 8), np.int32), **more}
    return jax.eval_shape(lambda p: bound.apply(p, ids), bound.abstract())


def shapes():
    return TINY.build().abstract()
