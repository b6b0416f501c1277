"""Eight-by-eight digits: a float MLP quantised without data by a game against a generator.

The network is 64-128-128-10; the generator makes images from noise, 32-128-64 with a sigmoid, far
from digits. ``python digits_toy.py`` prints the table over seeds: what each player's part is
worth, beside rounding to nearest, which none of them beats here.
"""

import functools
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.models import fake_quant as fq
from steppe.optim import minimax

SIZES = (64, 128, 128, 10)
ROWS, NOISE = 64, 32
PLAYERS = {
    "SAM-SGA": {"rho": 0.05},
    "SGD-SGA": {"rho": 0.0},
    "SAM, frozen generator": {"rho": 0.05, "k_max": 0},
    "SGD, frozen generator": {"rho": 0.0, "k_max": 0},
}


def load(folder):
    """(pixels [n, 64] in [0, 1], labels [n]) for training, and the same for testing."""
    other = runpy.run_path(str(Path(__file__).parents[1] / "merge" / "digits_toy.py"))
    pixels, labels = other["load"](folder)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = pixels.reshape(len(labels), 64)[order], labels[order]
    return (x[400:], y[400:]), (x[:400], y[:400])


def dense(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:])
    ]


def logits(params, x, w_bits=32, a_bits=32):
    """[B, 64] -> [B, 10]; every kernel by channel, every input by row."""
    for number, layer in enumerate(params):
        x = fq.fake_quant(x, a_bits, 0, symmetric=False)
        x = x @ fq.fake_quant(layer["w"], w_bits, 1) + layer["b"]
        x = jax.nn.relu(x) if number < len(params) - 1 else x
    return x


def generate(y, key):
    x = jax.random.normal(key, (ROWS, NOISE))
    return jax.nn.sigmoid(jax.nn.relu(x @ y[0]["w"] + y[0]["b"]) @ y[1]["w"] + y[1]["b"])


@jax.jit
def pretrained(key, x, y):
    """The teacher: 600 steps of Adam."""
    tx = optax.adam(1e-3)
    a, b = jax.random.split(key)
    params = dense(a, SIZES)

    def loss(params, xs, ys):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, xs), ys).mean()

    def step(carry, key):
        params, opt = carry
        rows = jax.random.randint(key, (ROWS,), 0, len(x))
        updates, opt = tx.update(jax.grad(loss)(params, x[rows], y[rows]), opt)
        return (optax.apply_updates(params, updates), opt), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(b, 600))
    return params


@functools.partial(jax.jit, static_argnames=("name", "bits", "steps", "k_min", "lr"))
def played(teacher, key, name, bits, steps=400, k_min=5, lr=0.02):
    """The student after a game; seeds may be stacked on axis 0 of teacher and key."""
    algorithm = minimax.sam_sga(
        optax.sgd(lr, momentum=0.9), optax.adam(1e-3), k_min=k_min, **PLAYERS[name]
    )

    def one(teacher, key):
        a, b = jax.random.split(key)

        def prepare(y, key):
            x = generate(y, key)
            return x, logits(teacher, x)

        def value(student, made):
            return jnp.abs(logits(student, made[0], bits, 8) - made[1]).mean()

        game = minimax.Game(prepare, value)
        start = dense(a, (NOISE, 128, 64))
        return minimax.run(algorithm, game, teacher, start, b, steps)[0]

    return jax.vmap(one)(teacher, key)


def accuracies(params, x, y, bits=32):
    """[seeds]"""
    made = jax.vmap(lambda p: logits(p, x, bits, 8 if bits < 32 else 32))(params)
    return np.asarray((made.argmax(-1) == y).mean(-1))


def table(folder, bits, seeds=3, names=tuple(PLAYERS)):
    """name -> accuracy of every seed."""
    (x, y), test = load(folder)
    keys = jax.random.split(jax.random.key(0), seeds)
    teacher = jax.vmap(lambda k: pretrained(k, x, y))(keys)
    rows = {"float": accuracies(teacher, *test), "rounded": accuracies(teacher, *test, bits)}
    for name in names:
        rows[name] = accuracies(played(teacher, keys, name, bits), *test, bits)
    return rows


if __name__ == "__main__":
    from steppe.data import assets

    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for bits in (4, 3):
        print(f"W{bits}A8")
        for name, row in table(assets.path("digits"), bits, seeds).items():
            print(f"  {name:22}", " ".join(f"{v:.3f}" for v in row), f"  mean {row.mean():.3f}")
