"""Phases: the article's tables to the digit, the boundary rule, plain data."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiers import examples, matrix

import adamw_jax as aj
from adamw_jax import Phase, Phases


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


FORMULAS = {
    "linear": lambda s, e, t: s + t * (e - s),
    "cosine": lambda s, e, t: e + (s - e) / 2 * (1 + math.cos(math.pi * t)),
    "exponential": lambda s, e, t: s * (e / s) ** t,
    "polynomial": lambda s, e, t: e + (s - e) * (1 - t) ** 3.0,
    "constant": lambda s, e, t: s,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_interpolations(kind):
    """The start is used, the end is not; after the last phase it holds."""
    ramp = (0.2, 0.7, kind) + ((3.0,) if kind == "polynomial" else ())
    phases = Phases([Phase(steps=10, b1=0.5), Phase(steps=7.5, b1=ramp)])
    assert phases.total_steps == 18
    for step in range(10):
        assert phases.at(step) == {"b1": 0.5}
    for k in range(8):
        assert phases.at(10 + k)["b1"] == pytest.approx(
            FORMULAS[kind](0.2, 0.7, k / 7.5), rel=1e-14
        )
    for step in (18, 1000):
        assert phases.at(step)["b1"] == pytest.approx(FORMULAS[kind](0.2, 0.7, 1.0))


def test_a_jump_falls_on_the_first_whole_step():
    """2.5 epochs of 3 steps: the phase ends at the first step >= 7.5."""
    phases = Phases(
        [Phase(epochs=2.5, b1=0.1), Phase(epochs=0.5, b1=0.2)], steps_per_epoch=3
    )
    assert [phases.at(step)["b1"] for step in range(9)] == [0.1] * 8 + [0.2]
    assert phases.total_steps == 9


def test_rounding_of_a_sum_adds_no_step():
    assert aj.one_cycle(1.0, epochs=18, steps_per_epoch=391).total_steps == 7038
    for steps in range(1, 200):
        assert aj.one_cycle(1.0, steps=steps, pct=0.1).total_steps == steps


def test_a_phase_shorter_than_a_step_has_one():
    """As in fastai's loop, which checks for the end of a phase after a step."""
    ramps = [Phase(steps=s, b1=b) for s, b in ((0.3, 0.1), (0.3, 0.2), (4.0, 0.3))]
    phases = Phases(ramps)
    assert [phases.at(step)["b1"] for step in range(5)] == [0.1, 0.2, 0.3, 0.3, 0.3]
    assert phases.total_steps == 5
    assert aj.one_cycle(1.0, steps=1).total_steps == 1


def test_each_phase_has_its_own_power():
    ramps = [Phase(steps=4, b1=(0.8, 0.0, "polynomial", p)) for p in (1.0, 3.0)]
    assert Phases(ramps).at(1)["b1"] == pytest.approx(0.8 * 0.75)
    assert Phases(ramps).at(5)["b1"] == pytest.approx(0.8 * 0.75**3)


def test_numpy_numbers_become_plain_data():
    phases = Phases(
        [Phase(steps=np.int64(5), b1=(np.float32(0.5), jnp.float32(0.25)))],
        rule="torch",
        begin=np.float64(-0.5),
    )
    assert Phases.from_json(phases.to_json()) == phases
    assert eval(repr(phases)) == phases


def test_traced_values_are_refused():
    with pytest.raises(TypeError, match="phases are plain data"):
        jax.jit(lambda lr: aj.one_cycle(lr, steps=5).at(0))(0.1)


def test_torch_rule_gives_the_boundary_to_the_phase_before():
    phases = Phases([Phase(steps=2, b1=0.1), Phase(steps=1.5, b1=0.2)], rule="torch")
    assert [phases.at(step)["b1"] for step in range(4)] == [0.1, 0.1, 0.1, 0.2]
    assert phases.total_steps == 4


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


def test_normalized_weight_decay():
    decay = aj.normalized_weight_decay(0.025, 128, 50_000, 100)
    assert_digits(decay, "1.265e-4")
    for name in ("batch_size", "num_examples", "epochs"):
        arguments = {"batch_size": 1, "num_examples": 1, "epochs": 1} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} must be > 0"):
            aj.normalized_weight_decay(0.1, **arguments)


BUILDERS = [
    aj.one_cycle(3e-3, epochs=2.5, steps_per_epoch=10.5, b2=0.99, weight_decay=0.1),
    aj.one_cycle_plateau(3e-3, steps=97),
    aj.one_cycle_torch(3e-3, 97),
    aj.one_cycle_torch(3e-3, 3, three_phase=True),
    aj.cosine_restarts(1.0, cycles=2, steps=10, weight_decay=[0.1, 0.2]),
    aj.range_test(),
    Phases([Phase(steps=5, b1=(0.1, 0.2, "polynomial", 2.0), b2=0.9)]),
]


@pytest.mark.parametrize("phases", BUILDERS, ids=range(len(BUILDERS)))
def test_json(phases):
    text = phases.to_json()
    assert json.loads(text)["rule"] == phases.rule
    assert Phases.from_json(text) == phases
    assert eval(repr(phases)) == phases  # printable as the code that makes it


@pytest.mark.parametrize("phases", BUILDERS, ids=range(len(BUILDERS)))
def test_traced_values_equal_host_values(phases):
    steps = np.arange(phases.total_steps + 5)
    for name in phases.names:
        traced = jax.jit(phases.schedule(name))(jnp.asarray(steps))
        host = [phases.at(step)[name] for step in steps]
        np.testing.assert_allclose(traced, host, rtol=2e-6, atol=1e-9)


def test_far_into_a_long_run():
    """float32 still distinguishes neighbouring steps after ten million."""
    phases = aj.one_cycle(1.0, steps=20_000_000)
    lr = jax.jit(phases.schedule("learning_rate"))
    steps = jnp.array([18_500_001, 18_500_101, 19_999_998, 19_999_999])
    np.testing.assert_allclose(
        lr(steps), [phases.at(int(k))["learning_rate"] for k in steps], rtol=1e-6
    )


def test_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = aj.one_cycle(3e-3, steps=100).plot()
    assert [ax.get_ylabel() for ax in axes] == ["learning_rate", "b1"]
    (line,) = axes[0].get_lines()
    assert line.get_ydata()[46] == aj.one_cycle(3e-3, steps=100).at(46)["learning_rate"]
    axes[0].figure.savefig(tmp_path / "phases.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase(b1=0.9), "steps=None, epochs=None"),
        (lambda: Phase(steps=1, epochs=1, b1=0.9), "steps=1, epochs=1"),
        (lambda: Phase(steps=0, b1=0.9), "steps must be > 0"),
        (lambda: Phase(epochs=-1, b1=0.9), "epochs must be finite and >= 0, got -1"),
        (lambda: Phase(steps=math.nan, b1=0.9), "steps must be .* nan"),
        (lambda: Phase(steps=1, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: Phase(steps=1, b2=(0.9, 1.2)), r"b2 \(end\) must be in"),
        (lambda: Phase(steps=1, learning_rate=-1), "learning_rate must be finite"),
        (lambda: Phase(steps=1, learning_rate=(1, 2, "step")), r"\(kind\).* 'step'"),
        (lambda: Phase(steps=1, learning_rate=(1,)), r"got \(1,\)"),
        (lambda: Phase(steps=1, b1=(0.1, 0.2, "linear", 2)), "only 'polynomial'"),
        (
            lambda: Phase(steps=1, learning_rate=(0, 1, "exponential")),
            "exponential cannot start or end at 0",
        ),
        (lambda: Phases([]), "at least one Phase"),
        (lambda: Phases([Phase(steps=1)]), "at least one of"),
        (lambda: Phases([Phase(epochs=1, b1=0.9)]), "need steps_per_epoch"),
        (lambda: Phases([Phase(epochs=1, b1=0.9)], 0), "steps_per_epoch must be > 0"),
        (lambda: Phases([Phase(steps=1, b1=0.9)], rule="keras"), "rule .* 'keras'"),
        (
            lambda: Phases([Phase(steps=1, b1=0.9), Phase(steps=1, b2=0.9)]),
            r"phases\[0\] sets \('b1',\), phases\[1\] \('b2',\)",
        ),
        (lambda: Phases([Phase(steps=2**31, b1=0.9)]), "more than int32 holds"),
        (lambda: Phases.from_json("[1]"), "not the JSON of phases"),
        (lambda: aj.one_cycle(1e-3), "give steps or epochs"),
        (lambda: aj.one_cycle(1e-3, epochs=1), "epochs with steps_per_epoch=None"),
        (lambda: aj.one_cycle(1e-3, steps=9, steps_per_epoch=1), "steps with"),
        (lambda: aj.one_cycle(0.0, steps=9), "learning_rate must be > 0"),
        (lambda: aj.one_cycle(1e-3, steps=9, pct=0), "pct must be in"),
        (lambda: aj.one_cycle(1e-3, steps=9, end="exp"), "end must be one of"),
        (lambda: aj.one_cycle(1e-3, steps=9, b1=(0.9, 1.0)), r"b1 \(end\)"),
        (lambda: aj.one_cycle_plateau(1e-3, steps=9, pct=0.5), "pct must be in"),
        (lambda: aj.one_cycle_torch(1e-3, 1), "total_steps must be an integer >= 2"),
        (lambda: aj.one_cycle_torch(1e-3, 10, pct_start=1.0), "pct_start must be in"),
        (lambda: aj.one_cycle_torch(1e-3, 10, anneal_strategy="x"), "anneal_strategy"),
        (lambda: aj.cosine_restarts(1e-3, cycles=0, steps=1), "cycles must be > 0"),
        (
            lambda: aj.cosine_restarts(1e-3, cycles=2, steps=1, weight_decay=[0.1]),
            "1 weight decays for 2 cycles",
        ),
        (lambda: aj.range_test(0.0), "start must be > 0"),
        (lambda: aj.range_test().schedule("b1"), "name must be one of learning_rate"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_phase_of_another_type():
    with pytest.raises((TypeError, AttributeError)):
        Phases([{"steps": 1, "b1": 0.9}])


durations = st.floats(0.1, 50)
values = st.floats(1e-6, 0.999)


@st.composite
def random_phases(draw):
    kinds = st.sampled_from(["linear", "cosine", "exponential"])
    ramps = st.one_of(values, st.tuples(values, values, kinds))
    list_of = st.lists(
        st.builds(Phase, steps=durations, b1=ramps), min_size=1, max_size=5
    )
    return Phases(tuple(draw(list_of)), rule=draw(st.sampled_from(["fastai", "torch"])))


@examples(60, derandomize=True)
@given(random_phases())
def test_every_value_lies_between_the_ends_of_its_phase(phases):
    first = phases._first_steps
    assert first[0] == 0 and (np.diff(first) >= 0).all()
    assert first[-1] == phases.total_steps
    bounds = [
        (p.b1, p.b1) if isinstance(p.b1, float) else sorted(p.b1[:2])
        for p in phases.phases
    ]
    for i, (low, high) in enumerate(bounds):
        for step in range(first[i], first[i + 1]):
            assert low * (1 - 1e-12) <= phases.at(step)["b1"] <= high * (1 + 1e-12)
    assert Phases.from_json(phases.to_json()) == phases
