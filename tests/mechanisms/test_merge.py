"""Merging in passes does what a decoder does that walks along the row."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.mechanisms import fusion

BATCH, WIDTH, DIM = 2, 24, 3


def walk(h, pairs, weight, paid, size, earlier):
    """One row, token by token: absorb what is free, then stand for it."""
    window = pairs.shape[1]
    states = [*earlier[0], *h]
    masses, sizes = [*earlier[1], *weight], [*earlier[2], *size]
    taken, takes = set(), np.zeros_like(pairs)
    for u in range(len(h)):
        here = window + u
        mine, mass = masses[here] * states[here], masses[here]
        for d in range(1, window + 1):
            there = here - d
            if pairs[u, d - 1] and there not in taken:
                share = masses[there] if paid is None else paid[u, d - 1]
                mine, mass = mine + share * states[there], mass + share
                sizes[here] += sizes[there]
                taken.add(there)
                takes[u, d - 1] = True
        if takes[u].any():
            states[here], masses[here] = mine / mass, mass
    return np.stack(states[window:]), masses[window:], sizes[window:], takes


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_passes_do_what_a_walk_does(window, pays, share):
    rng = np.random.default_rng(int(100 * share) + window)

    def positive(*shape):
        return rng.uniform(0.2, 2, shape).astype(np.float32)

    h = rng.standard_normal((BATCH, WIDTH, DIM)).astype(np.float32)
    pairs = rng.random((BATCH, WIDTH, window)) < share
    weight, size = positive(BATCH, WIDTH), positive(BATCH, WIDTH)
    paid = positive(BATCH, WIDTH, window) if pays else None
    earlier = fusion.Merged(
        rng.standard_normal((BATCH, window, DIM)).astype(np.float32),
        positive(BATCH, window),
        positive(BATCH, window),
    )
    arrays = [None if x is None else jnp.asarray(x) for x in (h, pairs, weight, paid, size)]
    before = fusion.Merged(*map(jnp.asarray, earlier))
    merged, takes = fusion.merge(*arrays, before, jnp.float32)
    for row in range(BATCH):
        of_row = [None if x is None else x[row] for x in (h, pairs, weight, paid, size)]
        wanted = walk(*of_row, [part[row] for part in earlier])
        np.testing.assert_array_equal(takes[row], wanted[3])
        for found, value in zip(merged, wanted[:3], strict=True):
            np.testing.assert_allclose(found[row], value, rtol=2e-5, atol=2e-6)
        alone = ~wanted[3].any(1)
        np.testing.assert_array_equal(np.asarray(merged.h_BXD)[row][alone], h[row][alone])


def test_a_chain_takes_as_many_passes_as_it_has_links():
    takes = np.zeros((1, 8, 2), bool)
    takes[0, 2, 0] = takes[0, 3, 0] = takes[0, 5, 1] = takes[0, 7, 0] = True
    np.testing.assert_array_equal(fusion.levels(jnp.asarray(takes))[0], [0, 0, 1, 2, 0, 3, 0, 1])
