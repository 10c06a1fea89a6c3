"""Phases: boundaries, interpolation, plain data."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiers import examples

import adamw_jax as aj
from adamw_jax import Phase, Phases

FORMULAS = {
    "linear": lambda s, e, t: s + t * (e - s),
    "cosine": lambda s, e, t: e + (s - e) / 2 * (1 + math.cos(math.pi * t)),
    "exponential": lambda s, e, t: s * (e / s) ** t,
    "polynomial": lambda s, e, t: e + (s - e) * (1 - t) ** 3.0,
    "constant": lambda s, e, t: s,
}


BUILDERS = [
    aj.one_cycle(3e-3, epochs=2.5, steps_per_epoch=10.5, b2=0.99, weight_decay=0.1),
    aj.one_cycle_plateau(3e-3, steps=97),
    aj.one_cycle_torch(3e-3, 97),
    aj.one_cycle_torch(3e-3, 3, three_phase=True),
    aj.cosine_restarts(1.0, cycles=2, steps=10, weight_decay=[0.1, 0.2]),
    aj.range_test(),
    Phases([Phase(steps=5, b1=(0.1, 0.2, "polynomial", 2.0), b2=0.9)]),
]


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


def test_phases_of_the_rate_are_a_schedule_of_optax(x64, lenient):
    """In its optimizers, in a link of ours, and injected around either."""
    phases = aj.cosine_restarts(1e-2, cycles=2, steps=6)
    p, g = jnp.array([1.0, -2.0]), jnp.array([0.3, -0.1])
    rates = [phases.at(k)["learning_rate"] for k in range(12)]
    assert [phases(k) for k in range(12)] == rates
    paths = {}
    for name, tx in {
        "table": optax.sgd(lambda k: jnp.asarray(rates)[k]),
        "optax": optax.sgd(phases),
        "links": aj.chain(aj.trace(0.0), aj.scale_by_learning_rate(phases)),
        "schedule": optax.chain(optax.scale(-1.0), optax.scale_by_schedule(phases)),
        "injected": optax.inject_hyperparams(optax.sgd)(phases),
        "ours injected": optax.inject_hyperparams(aj.sgd)(phases),
    }.items():
        update, state, paths[name] = jax.jit(tx.update), tx.init(p), []
        for _ in range(12):
            updates, state = update(g, state, p)
            paths[name].append(updates)
    expected = -np.array(rates)[:, None] * np.array([0.3, -0.1])
    for path in paths.values():
        np.testing.assert_allclose(path, expected, rtol=1e-6)


def test_phases_of_more_than_the_rate_are_no_schedule(lenient):
    """Optax would drop the momentum without a word."""
    phases, p = aj.one_cycle(1e-2, steps=9), jnp.ones(2)
    message = (
        "learning_rate must be one schedule, got phases that set learning_rate and b1: "
        r"pass phases.schedule\('learning_rate'\)"
    )
    with pytest.raises(TypeError, match=message):
        phases(0)
    tx = optax.adamw(phases)
    state = tx.init(p)
    with pytest.raises(TypeError, match=message):
        jax.jit(tx.update)(p, state, p)
    for make in (optax.adamw, aj.adamw):
        with pytest.raises(TypeError, match=message):
            optax.inject_hyperparams(make)(phases).init(p)
    with pytest.raises(TypeError, match=message):
        aj.scale_by_learning_rate(phases)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: aj.scale_by_adam(b1=x), r"b1 must be .* phases.schedule\('b1'\)"),
        (lambda x: aj.scale_by_amsgrad(b2=x), "b2 must be one schedule, got phases"),
        (lambda x: aj.trace(x), "decay must be one schedule, got phases that set"),
        (lambda x: aj.add_decayed_weights(x), "weight_decay must be one schedule"),
        (lambda x: aj.add_l2_gradient(x), "l2 must be one schedule"),
        (lambda x: aj.clip_by_global_norm(x), "max_norm must be a number, not a call"),
    ],
)
def test_phases_in_a_link_of_another_hyperparameter(make, message):
    """They are never called for their learning rate there."""
    with pytest.raises(TypeError, match=message):
        make(aj.one_cycle(1e-2, steps=9))
    with pytest.raises(TypeError, match=message.split(" .*")[0]):
        make(aj.range_test())


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


def test_a_plot_has_no_panel_for_a_constant(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cycle = aj.one_cycle(3e-3, steps=100, b1=(1e-4, 0.9999), b2=0.99)
    axes = cycle.plot()
    assert [ax.get_ylabel() for ax in axes] == ["learning_rate", "b1"]
    assert axes[0].get_title() == "constant: b2 0.99"
    # no panel runs past what is possible
    assert axes[0].get_ylim()[0] == 0 and axes[0].get_ylim()[1] > 3e-3
    assert axes[1].get_ylim() == (0, 1)
    # axes that are passed: for all, or for those that change
    for names in (cycle.names, ("learning_rate", "b1")):
        own = matplotlib.figure.Figure().subplots(len(names))
        cycle.plot(own)
        assert tuple(ax.get_ylabel() for ax in own) == names
    with pytest.raises(ValueError, match="axes must be 2, .* learning_rate, b1, got 1"):
        cycle.plot(own[:1])
    constant = aj.Phases([aj.Phase(steps=5, learning_rate=0.1, b1=0.9)])
    assert [ax.get_ylabel() for ax in constant.plot()] == ["learning_rate", "b1"]


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
        (lambda: Phases([Phase(steps=2**31, b1=0.9)]), "before step 2"),
        (lambda: Phases.from_json("[1]"), "must be the JSON of phases"),
        (lambda: aj.one_cycle(1e-3), "set either steps or epochs"),
        (lambda: aj.one_cycle(1e-3, epochs=1), "epochs=1, steps_per_epoch=None"),
        (lambda: aj.one_cycle(1e-3, steps=9, steps_per_epoch=1), "got steps=9"),
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
            "one value for each of the 2 cycles, got 1",
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
