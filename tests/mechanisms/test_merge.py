"""Merging in passes does what a decoder does that walks along the row."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.mechanisms import fusion

BATCH, WIDTH, DIM = 2, 24, 3


def walk(h, pairs, weight, paid, size):
    """One row, token by token: absorb what is free, then stand for it."""
    states, masses, sizes = [*h], [*weight], [*size]
    taken, takes = set(), np.zeros_like(pairs)
    for u in range(len(h)):
        total, mass = masses[u] * states[u], masses[u]
        for d in range(1, pairs.shape[1] + 1):
            t = u - d
            if t >= 0 and pairs[u, d - 1] and t not in taken:
                share = masses[t] if paid is None else paid[u, d - 1]
                total, mass = total + share * states[t], mass + share
                sizes[u] += sizes[t]
                taken.add(t)
                takes[u, d - 1] = True
        if takes[u].any():
            states[u], masses[u] = total / mass, mass
    return np.stack(states), masses, sizes, takes


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_passes_do_what_a_walk_does(window, pays, share):
    rng = np.random.default_rng(int(100 * share) + window)

    def positive(*shape):
        return rng.uniform(0.2, 2, shape).astype(np.float32)

    h = rng.standard_normal((BATCH, WIDTH, DIM)).astype(np.float32)
    before = np.arange(WIDTH)[:, None] > np.arange(window)  # no token is before the first
    pairs = (rng.random((BATCH, WIDTH, window)) < share) & before
    weight, size = positive(BATCH, WIDTH), positive(BATCH, WIDTH)
    paid = positive(BATCH, WIDTH, window) if pays else None
    given = (h, pairs, weight, paid, size)
    arrays = [None if x is None else jnp.asarray(x) for x in given]
    merged, takes = fusion.merge(*arrays, jnp.float32)
    for row in range(BATCH):
        wanted = walk(*[None if x is None else x[row] for x in given])
        np.testing.assert_array_equal(takes[row], wanted[3])
        for found, value in zip(merged, wanted[:3], strict=True):
            np.testing.assert_allclose(found[row], value, rtol=2e-5, atol=2e-6)
        alone = ~wanted[3].any(1)
        np.testing.assert_array_equal(np.asarray(merged.h_BTD)[row][alone], h[row][alone])


def test_a_chain_takes_as_many_passes_as_it_has_links():
    takes = np.zeros((1, 8, 2), bool)
    takes[0, 2, 0] = takes[0, 3, 0] = takes[0, 5, 1] = takes[0, 7, 0] = True
    np.testing.assert_array_equal(fusion.levels(jnp.asarray(takes))[0], [0, 0, 1, 2, 0, 3, 0, 1])
