"""Eight-by-eight digits in four views: plain, rolled by a pixel, inverted, transposed.

A small network with two stacked layers learns the mixture of the views, then each view alone
with the head frozen: a pretrained trunk, four fine-tuned ones, one head. ``python digits_toy.py``
prints the table of all methods over seeds.
"""

import functools
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.train.merge import adaptive, concrete
from steppe.train.merge.ties import ties_components

VIEWS = ("plain", "rolled", "inverted", "transposed")
WIDTH = 64


class Setting(NamedTuple):
    """How trunk and fine-tunes are trained."""

    pretrain: int = 600
    pretrain_lr: float = 1.5e-3
    tune: int = 400
    tune_lr: float = 1e-3
    rows: int = 64


DECENT = Setting()
WEAK = Setting(pretrain=100, pretrain_lr=1e-3)


class Toy(NamedTuple):
    """One seed's models and data."""

    theta0: dict
    thetas: dict  # leaves [4, ...]
    taus: dict  # leaves [4, ...]
    head: dict
    adapt: jax.Array  # [4, n, 64]: pictures that adaptation sees, without labels
    test: jax.Array  # [4, m, 64]: pictures that nothing has seen
    labels: jax.Array  # [m]
    adapt_labels: jax.Array  # [n]: for the transductive accuracy only


def views(pixels):
    """[n, 8, 8] in [0, 1] -> [4, n, 64]."""
    made = (pixels, np.roll(pixels, 1, 2), 1 - pixels, pixels.transpose(0, 2, 1))
    return np.stack([x.reshape(len(x), 64) for x in made]).astype(np.float32)


def load(folder):
    """(pixels [n, 8, 8] in [0, 1], labels [n]) of the asset ``digits``."""
    from steppe.data.assets.readers import images

    records = images.PARTS["digits"].read(folder)
    pixels = np.stack([r["image"] for r in records]).astype(np.float32) / 255
    return pixels, np.array([int(r["label"]) for r in records])


def init(key):
    """(trunk, head)."""
    a, b, c = jax.random.split(key, 3)
    trunk = {
        "embed": {"kernel": jax.random.normal(a, (64, WIDTH)) / 8, "bias": jnp.zeros(WIDTH)},
        "layers": {
            "kernel": jax.random.normal(b, (2, WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5,
            "bias": jnp.zeros((2, WIDTH)),
        },
    }
    return trunk, {"kernel": jax.random.normal(c, (WIDTH, 10)) * WIDTH**-0.5, "bias": jnp.zeros(10)}


def logits(trunk, head, x):
    """[B, 64] -> [B, 10]."""
    h = jax.nn.relu(x @ trunk["embed"]["kernel"] + trunk["embed"]["bias"])
    for layer in range(2):
        h = jax.nn.relu(h @ trunk["layers"]["kernel"][layer] + trunk["layers"]["bias"][layer])
    return h @ head["kernel"] + head["bias"]


def train(params, head, x, y, key, steps, lr, rows, *, tune_head):
    """Adam on cross entropy; returns (trunk, head)."""
    tx = optax.adam(lr)
    live = (params, head) if tune_head else params

    def loss(live, xs, ys):
        trunk, h = live if tune_head else (live, head)
        return optax.softmax_cross_entropy_with_integer_labels(logits(trunk, h, xs), ys).mean()

    def step(carry, key):
        live, opt = carry
        index = jax.random.randint(key, (rows,), 0, x.shape[0])
        updates, opt = tx.update(jax.grad(loss)(live, x[index], y[index]), opt)
        return (optax.apply_updates(live, updates), opt), None

    (live, _), _ = jax.lax.scan(step, (live, tx.init(live)), jax.random.split(key, steps))
    return live if tune_head else (live, head)


@functools.partial(jax.jit, static_argnames="setting")
def _build(key, x, y, setting):
    start, base, tune = jax.random.split(key, 3)
    trunk, head = init(start)
    s = setting
    theta0, head = train(
        trunk, head, x.reshape(-1, 64), jnp.tile(y, 4), base, s.pretrain, s.pretrain_lr, s.rows,
        tune_head=True,
    )  # fmt: skip
    one = functools.partial(
        train, theta0, head, steps=s.tune, lr=s.tune_lr, rows=s.rows, tune_head=False
    )
    thetas, _ = jax.vmap(lambda x, k: one(x=x, y=y, key=k))(x, jax.random.split(tune, 4))
    return theta0, thetas, jax.tree.map(lambda a, b: a - b, thetas, theta0), head


def build(data, seed, setting=DECENT):
    """Half of the digits train, a quarter (unlabelled) adapts, a quarter tests."""
    pixels, labels = data
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = [len(labels) // 2, 3 * len(labels) // 4]
    fit, adapt, test = np.split(order, cut)
    x = views(pixels)
    made = _build(jax.random.key(seed), x[:, fit], labels[fit], setting)
    rest = (x[:, adapt], x[:, test], labels[test], labels[adapt])
    return Toy(*made, *map(jnp.asarray, rest))


def entropy_fn(trunk, batches):
    """Batches carry their frozen head, so that one compiled step serves all seeds."""
    return adaptive.summed(
        [adaptive.task_entropy(logits(trunk, b["head"], b["x"])) for b in batches]
    )


def stream(toy, rows=16, seed=0):
    """Number of a draw -> unlabelled batches of the four views."""
    pool = np.asarray(toy.adapt)

    def draw(number):
        rng = np.random.default_rng((seed, number))
        picks = rng.integers(0, pool.shape[1], (4, rows))
        return tuple({"x": pool[v, picks[v]], "head": toy.head} for v in range(4))

    return draw


@jax.jit
def _scores(trunk, head, x, y):
    out = jax.vmap(lambda v: logits(trunk, head, v))(x)
    return (out.argmax(-1) == y).mean(-1), adaptive.entropy(out).mean(-1).sum()


def accuracy(toy, trunk):
    """(mean accuracy over the views, summed entropy in nats), both on the test pictures."""
    right, nats = _scores(trunk, toy.head, toy.test, toy.labels)
    return float(right.mean()), float(nats)


def transductive(toy, trunk):
    """Mean accuracy on the pictures that adaptation has seen."""
    return float(_scores(trunk, toy.head, toy.adapt, toy.adapt_labels)[0].mean())


def baselines(toy):
    """Name -> merged trunk."""
    mean = jax.tree.map(lambda t: t.mean(0), toy.thetas)
    lam = jnp.full(4, 0.3)
    trimmed = ties_components(toy.taus)
    return {
        "pretrained": toy.theta0,
        "averaging": mean,
        "task arithmetic": adaptive.merged(toy.theta0, toy.taus, lam),
        "ties": adaptive.merged(toy.theta0, trimmed, lam),
    }


def individual(toy):
    """Mean accuracy of each view's own model."""
    tuned = [jax.tree.map(lambda t, v=v: t[v], toy.thetas) for v in range(4)]
    scores = [_scores(t, toy.head, toy.test, toy.labels)[0][v] for v, t in enumerate(tuned)]
    return float(np.mean(scores))


def adamerging(toy, steps=400, lr=1e-3, level="layer", seed=0, **options):
    cfg = adaptive.AdaMergingConfig(steps=steps, lr=lr, **options)
    return adaptive.adamerging(toy.theta0, toy.taus, entropy_fn, stream(toy, seed=seed), level, cfg)


def concrete_ta(toy, steps=400, mask_lr=3e-2, seed=0, **options):
    cfg = concrete.ConcreteConfig(steps=steps, mask_lr=mask_lr, **options)
    return concrete.concrete_task_arithmetic(
        toy.theta0, toy.taus, entropy_fn, stream(toy, seed=seed), cfg, jax.random.key(seed)
    )


def concrete_am(toy, steps=400, mask_lr=3e-2, tta_steps=400, level="layer", seed=0, **options):
    cfg = concrete.ConcreteConfig(steps=steps, mask_lr=mask_lr, tta_steps=tta_steps, **options)
    return concrete.concrete_adamerging(
        toy.theta0, toy.taus, entropy_fn, stream(toy, seed=seed), cfg, jax.random.key(seed),
        level=level,
    )  # fmt: skip


METHODS = {
    "AdaMerging, task, 400 steps": lambda toy, s: adamerging(toy, level="task", seed=s),
    "AdaMerging, layer, 400 steps": lambda toy, s: adamerging(toy, seed=s),
    "AdaMerging, layer, 1200 steps": lambda toy, s: adamerging(toy, 1200, seed=s),
    "AdaMerging, layer, rate 1e-2": lambda toy, s: adamerging(toy, lr=1e-2, seed=s),
    "AdaMerging, layer, rate 1e-2, no clip": lambda toy, s: adamerging(
        toy, lr=1e-2, clip=False, seed=s
    ),
    "AdaMerging++, layer": lambda toy, s: adamerging(toy, ties=0.2, seed=s),
    "Concrete TA, 100 steps": lambda toy, s: concrete_ta(toy, 100, seed=s),
    "Concrete TA, 400 steps": lambda toy, s: concrete_ta(toy, seed=s),
    "Concrete TA, 400 steps, hard mask": lambda toy, s: concrete_ta(toy, final="hard", seed=s),
    "Concrete TA, 400 steps, mean mask": lambda toy, s: concrete_ta(toy, final="mean", seed=s),
    "Concrete TA, 400 steps, rate 1e-3": lambda toy, s: concrete_ta(toy, mask_lr=1e-3, seed=s),
    "Concrete TA, 1200 steps": lambda toy, s: concrete_ta(toy, 1200, seed=s),
    "Concrete AM, task": lambda toy, s: concrete_am(toy, level="task", seed=s),
    "Concrete AM, layer": lambda toy, s: concrete_am(toy, seed=s),
    "Concrete AM, layer, before TTA": lambda toy, s: concrete_am(toy, tta_steps=0, seed=s),
    "Concrete AM, layer, base rate 0.1": lambda toy, s: concrete_am(toy, base_lr=0.1, seed=s),
    "Concrete AM, layer, base rate 0.01": lambda toy, s: concrete_am(toy, base_lr=0.01, seed=s),
    "Concrete AM, layer, base rate 0.1, before TTA": lambda toy, s: concrete_am(
        toy, base_lr=0.1, tta_steps=0, seed=s
    ),
    "Concrete AM, layer, base rate 0, before TTA": lambda toy, s: concrete_am(
        toy, base_lr=0.0, tta_steps=0, seed=s
    ),
    "Concrete AM, layer, base rate 0": lambda toy, s: concrete_am(toy, base_lr=0.0, seed=s),
    "Concrete AM, layer, moments reset": lambda toy, s: concrete_am(
        toy, keep_moments=False, seed=s
    ),
    "Concrete AM, layer, stale inner": lambda toy, s: concrete_am(toy, stale_inner=True, seed=s),
    "Concrete AM, layer, redraw": lambda toy, s: concrete_am(toy, redraw=True, seed=s),
    "Concrete AM, layer, 133 + 0 steps": lambda toy, s: concrete_am(toy, 133, tta_steps=0, seed=s),
}


def study(data, seeds=range(5), setting=DECENT, methods=METHODS):
    """Name -> rows (accuracy, summed entropy in nats, accuracy on the adaptation's pictures)."""
    table = {}

    def note(name, toy, trunk):
        row = (*accuracy(toy, trunk), transductive(toy, trunk))
        table.setdefault(name, []).append(row)

    for seed in seeds:
        toy = build(data, seed, setting)
        table.setdefault("individual", []).append((individual(toy), np.nan, np.nan))
        for name, trunk in baselines(toy).items():
            note(name, toy, trunk)
        for name, method in methods.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                note(name, toy, method(toy, seed).params)
    return table


def main():
    from steppe.data import assets

    data = load(assets.path("digits"))
    setting = WEAK if "weak" in sys.argv else DECENT
    table = study(data, setting=setting)
    rival = np.asarray(table["AdaMerging, layer, 400 steps"])[:, 0]
    for name, rows in table.items():
        gain = np.asarray(rows)[:, 0] - rival
        mean, spread = np.mean(rows, 0), np.std(rows, 0, ddof=1)
        print(
            f"{name:45} {mean[0]:.3f} +- {spread[0]:.3f}   {mean[1]:.3f} nats +- {spread[1]:.3f}"
            f"   seen {mean[2]:.3f}   over AdaMerging {gain.mean():+.3f} +- {gain.std(ddof=1):.3f}"
        )


if __name__ == "__main__":
    main()
