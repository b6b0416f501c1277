"""Eight-by-eight digits, 500 of them with 40% of the labels drawn anew: an MLP 64-128-128-10 by
momentum SGD (0.9, rate 0.1), batches of 64, 1,500 steps. ``python noisy_digits.py FOLDER`` prints
the table of all methods.
"""

import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe import optim

SGD = optax.sgd(0.1, momentum=0.9)
METHODS = {
    "SGD": SGD,
    "SAM 0.05": optim.sam(SGD, 0.05),
    "SAM 0.2": optim.sam(SGD, 0.2),
    "SAM 0.5": optim.sam(SGD, 0.5),
    "FSAM 0.5, a half": optim.fsam(SGD, 0.5, keep_ratio=0.5),
    "FSAM 0.5, a tenth": optim.fsam(SGD, 0.5, keep_ratio=0.1),
}
SIZES, TRAIN, NOISE, ROWS, STEPS = (64, 128, 128, 10), 500, 0.4, 64, 1500


def load(folder):
    """(pixels [n, 64] in [0, 1], labels [n]) of the asset ``digits``."""
    other = runpy.run_path(str(Path(__file__).parents[1] / "train" / "merge" / "digits_toy.py"))
    pixels, labels = other["load"](folder)
    return pixels.reshape(len(pixels), 64), labels


def init(key):
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {
            "kernel": jax.random.uniform(k, (a, b), minval=-(a**-0.5), maxval=a**-0.5),
            "bias": jnp.zeros(b),
        }
        for k, a, b in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def accuracy(tx, pixels, labels, seeds):
    """Accuracy on the other digits, by seed [seeds]: of draw, noise, first values and batches."""

    def one(seed):
        order, noise, first, batches = jax.random.split(jax.random.key(seed), 4)
        rows = jax.random.permutation(order, len(labels))
        a, b = jax.random.split(noise)
        drawn = jax.random.randint(a, (TRAIN,), 0, 10)
        wrong = jax.random.uniform(b, (TRAIN,)) < NOISE
        x, y = pixels[rows[:TRAIN]], jnp.where(wrong, drawn, labels[rows[:TRAIN]])

        def step(carry, key):
            params, state = carry
            at = jax.random.randint(key, (ROWS,), 0, TRAIN)

            def loss(params):
                out = logits(params, x[at])
                return optax.softmax_cross_entropy_with_integer_labels(out, y[at]).mean()

            gradient = jax.grad(loss)
            updates, state = optax.with_extra_args_support(tx).update(
                gradient(params), state, params, grad_fn=gradient
            )
            return (optax.apply_updates(params, updates), state), None

        params = init(first)
        keys = jax.random.split(batches, STEPS)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        other = rows[TRAIN:]
        return (logits(params, pixels[other]).argmax(-1) == labels[other]).mean()

    # One after the other: under vmap both branches of a cond would run.
    return np.asarray(jax.jit(lambda s: jax.lax.map(one, s))(jnp.arange(seeds)))


def table(folder, seeds, names=tuple(METHODS)):
    """name -> accuracies [seeds]."""
    pixels, labels = map(jnp.asarray, load(folder))
    return {name: accuracy(METHODS[name], pixels, labels, seeds) for name in names}


if __name__ == "__main__":
    found = table(Path(sys.argv[1]), 20)
    for name, own in found.items():
        gap = own - found["SGD"]
        error = gap.std(ddof=1) / len(gap) ** 0.5
        print(f"{name:18} {100 * own.mean():.1f} ± {100 * own.std(ddof=1):.1f}", end="")
        print(f"   to SGD {100 * gap.mean():+.1f} ± {100 * error:.1f}")
