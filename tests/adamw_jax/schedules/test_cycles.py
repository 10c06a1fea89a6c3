"""1cycle and its relatives against the article's tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import matrix

import adamw_jax as aj


def digits(value, like):
    """The value with as many significant digits as the text."""
    mantissa = like.lower().split("e")[0].replace(".", "").lstrip("0")
    return f"{value:.{max(len(mantissa), 1) - 1}e}"


def assert_digits(value, like):
    assert digits(value, like) == digits(float(like), like)


# The specification's tables, as text: every digit counts.
CIFAR = """
0 3e-4 .95
1 3.00497684e-4 .9499816
100 3.49768439e-4 .9481567
5425 2.99993779e-3 .8500023
5426 3e-3 .85
10850 3.00559895e-4 .9499793
10851 3e-4 .95
11729 3.59079284e-6 .95
"""


WIKITEXT = """
0 5e-4 .8
1 5.0202020e-4 .7999551
2227 4.9989899e-3 .7000224
2228 5e-3 .7
13366 4.99959596e-3 .700009
24503 5e-4 .8
26729 5.594e-10 .8
"""


@pytest.mark.parametrize(
    ("phases", "table"),
    [
        (aj.one_cycle(3e-3, epochs=30, steps_per_epoch=391), CIFAR),
        (aj.one_cycle_plateau(5e-3, epochs=90, steps_per_epoch=297), WIKITEXT),
    ],
    ids=["cifar10", "wikitext2"],
)
def test_tables_of_the_article(x64, phases, table):
    learning_rate = jax.jit(phases.schedule("learning_rate"))
    b1 = jax.jit(phases.schedule("b1"))
    for row in table.split("\n")[1:-1]:
        step, lr_text, b1_text = row.split()
        assert_digits(phases.at(int(step))["learning_rate"], lr_text)
        assert_digits(phases.at(int(step))["b1"], b1_text)
        assert_digits(float(learning_rate(jnp.int32(step))), lr_text)
        assert_digits(float(b1(jnp.int32(step))), b1_text)


@pytest.mark.parametrize(
    ("phases", "lengths"),
    [
        (aj.one_cycle(3e-3, epochs=30, steps_per_epoch=391), (5426, 5425, 879)),
        (aj.one_cycle(3e-3, epochs=18, steps_per_epoch=391), (3256, 3255, 527)),
        (
            aj.one_cycle_plateau(5e-3, epochs=90, steps_per_epoch=297),
            (2228, 11137, 11138, 2227),
        ),
        (aj.one_cycle(1e-2, epochs=20, steps_per_epoch=64, pct=0.1), (576, 576, 128)),
        (aj.one_cycle(1e-2, epochs=40, steps_per_epoch=64, pct=0.1), (1152, 1152, 256)),
    ],
)
def test_lengths_of_the_article(phases, lengths):
    assert tuple(np.diff(phases.boundaries)) == lengths
    assert phases.total_steps == sum(lengths)


@pytest.mark.parametrize(
    ("epochs", "total"),
    matrix([(30, "18.0389"), (18, "10.8246")], quick=[(18, "10.8246")]),
)
def test_sum_of_learning_rates(epochs, total):
    phases = aj.one_cycle(3e-3, epochs=epochs, steps_per_epoch=391)
    rates = [phases.at(step)["learning_rate"] for step in range(phases.total_steps)]
    assert_digits(math.fsum(rates), total)


def test_cosine_end():
    phases = aj.one_cycle(1e-2, steps=1000, end="cosine")
    assert phases.at(925)["learning_rate"] == pytest.approx(1e-3)
    middle = phases.at(962)["learning_rate"]
    assert middle == pytest.approx(5e-4 * (1 + math.cos(math.pi * 37 / 75)))
    assert phases.at(10_000)["learning_rate"] == pytest.approx(0, abs=1e-18)


def test_range_test():
    phases = aj.range_test(1e-5, 10, steps=100)
    for k in (0, 1, 50, 99):
        expected = 1e-5 * (10 / 1e-5) ** (k / 100)
        assert phases.at(k)["learning_rate"] == pytest.approx(expected, rel=1e-12)


def test_restarts_of_the_paper():
    """AdamWR with T0 = 100 and T_mult = 2 restarts at 100, 300, 700 and 1500."""
    phases = aj.cosine_restarts(1e-3, cycles=5, steps=100, mult=2)
    rates = np.array([phases.at(k)["learning_rate"] for k in range(3100)])
    assert list(np.flatnonzero(np.diff(rates) > 0) + 1) == [100, 300, 700, 1500]
    assert (rates[[0, 100, 300, 700, 1500]] == 1e-3).all()
