"""Phases read from a scheduler of PyTorch against that scheduler run on."""

import copy
import types
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given
from tiers import examples, matrix
from torch.optim import lr_scheduler

import adamw_jax as aj

RATES = (0.1, 0.03)
AFTER = 60  # steps after the checkpoint


def make(make_scheduler, rates=RATES, cls=torch.optim.SGD, **options):
    options = {"momentum": 0.9} if cls is torch.optim.SGD else options
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates
    ]
    optimizer = cls(groups, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a SequentialLR in another
        return optimizer, make_scheduler(optimizer)


def step(scheduler, times):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "scheduler before optimizer"
        for _ in range(times):
            scheduler.step()


def save(optimizer, scheduler):
    return copy.deepcopy(
        (scheduler.state_dict(), optimizer.state_dict()["param_groups"])
    )


def values(optimizer):
    """The learning rate and the momentum or beta1 of each group."""
    return [
        (float(g["lr"]), float(g["momentum"] if "momentum" in g else g["betas"][0]))
        for g in optimizer.param_groups
    ]


def assert_continues(
    make_scheduler, saved_at, after=AFTER, steps=None, rounding=1e-12, **options
):
    """The phases have PyTorch's values at the steps from the checkpoint on."""
    optimizer, scheduler = make(make_scheduler, **options)
    step(scheduler, saved_at)
    state, groups = save(optimizer, scheduler)
    read = [
        aj.phases_from_torch_scheduler(state, groups, group=i, steps=steps)
        for i in range(len(groups))
    ]
    theirs = [values(optimizer)]
    for _ in range(1, after):
        step(scheduler, 1)
        theirs.append(values(optimizer))
    for i, phases in enumerate(read):
        assert aj.Phases.from_json(phases.to_json()) == phases
        numbers = np.arange(saved_at, saved_at + after)
        rate, momentum = np.array(theirs)[:, i].T
        scale = max(rate.max(), float(groups[i]["initial_lr"]))
        ours = phases.schedule("learning_rate")(numbers)
        np.testing.assert_allclose(ours, rate, rtol=rounding, atol=rounding * scale)
        if "b1" in phases.names:
            ours = phases.schedule("b1")(numbers)
            np.testing.assert_allclose(ours, momentum, rtol=1e-12, atol=1e-14)
        else:
            assert (momentum == momentum[0]).all()


# ---------------------------------------------------------------------------
# All that are read, saved anywhere
# ---------------------------------------------------------------------------

lengths = st.integers(1, 40)
factors = st.floats(0.05, 1.0)
edges = st.sampled_from([0.0, 1.0])
LEAVES = {
    "StepLR": st.tuples(lengths, st.floats(0.2, 1.1) | edges),
    "MultiStepLR": st.tuples(st.lists(st.integers(0, 90), max_size=5), factors | edges),
    "ConstantLR": st.tuples(factors, lengths),
    "LinearLR": st.tuples(factors, st.floats(0, 1), lengths),
    "ExponentialLR": st.tuples(st.floats(0.5, 1.05) | edges),
    "PolynomialLR": st.tuples(lengths, st.floats(0.3, 4) | st.just(0.0)),
    "CosineAnnealingLR": st.tuples(lengths, st.sampled_from([0.0, 1e-3, 0.05])),
    "CosineAnnealingWarmRestarts": st.tuples(
        lengths, st.integers(1, 3), st.sampled_from([0.0, 1e-3])
    ),
}
leaves = st.one_of(*(st.tuples(st.just(name), args) for name, args in LEAVES.items()))


def build(spec):
    """A function from an optimizer to the scheduler of a name and its arguments."""
    name, args = spec
    if name != "SequentialLR":
        return lambda opt: getattr(lr_scheduler, name)(opt, *args)
    children, milestones = args
    return lambda opt: lr_scheduler.SequentialLR(
        opt, [build(child)(opt) for child in children], milestones
    )


def sequence(first, rest, least=0):
    milestones = st.integers(least, 60)
    milestones = st.lists(milestones, min_size=len(rest), max_size=len(rest))
    return milestones.map(lambda m: ("SequentialLR", ([first, *rest], sorted(m))))


# Within two SequentialLR the very first scheduler starts without its initial step:
# PyTorch 2.13 then multiplies the rate once more in the schedulers that are not here.
FIRST = (
    "StepLR",
    "MultiStepLR",
    "ConstantLR",
    "LinearLR",
    "CosineAnnealingWarmRestarts",
)
sequences = st.tuples(leaves, st.lists(leaves, min_size=1, max_size=3))
sequences = sequences.flatmap(lambda x: sequence(*x))
inner = st.tuples(
    leaves.filter(lambda spec: spec[0] in FIRST),
    st.lists(leaves, min_size=1, max_size=2),
).flatmap(lambda x: sequence(*x, least=1))
nested = st.tuples(inner, st.lists(leaves, min_size=1, max_size=2))
nested = nested.flatmap(lambda x: sequence(*x))
SPECS = {"one": leaves, "sequence": sequences, "nested": nested}


@pytest.mark.parametrize("depth", SPECS)
def test_schedulers(depth):
    @given(SPECS[depth], st.integers(0, 100), st.sampled_from([0.03, 0.0]))
    @examples(300)
    def check(spec, saved_at, rate):
        steps = saved_at + AFTER
        assert_continues(build(spec), saved_at, steps=steps, rates=(0.1, rate))

    check()


LONG = {
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 70_000, 1e-4),
    "linear": lambda opt: lr_scheduler.LinearLR(opt, 0.01, total_iters=100_000),
    "polynomial": lambda opt: lr_scheduler.PolynomialLR(opt, 100_000, 0.9),
    "exponential": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9999),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_roundings_of_a_long_run(name):
    """PyTorch rounds at each of 100,000 steps, the phases once.

    It multiplies the cosine's distance to eta_min, which loses digits at T_max.
    """
    rounding = 1e-10 if name == "cosine" else 1e-12
    assert_continues(LONG[name], 0, 100_000, 100_000, rounding, rates=(0.1,))


shares = st.floats(0, 1).map(lambda x: round(x, 4))


@st.composite
def one_cycles(draw):
    total = draw(st.integers(1, 60))
    options = {
        "max_lr": draw(st.sampled_from([0.3, [0.3, 0.02], [0.0, 0.1]])),
        "total_steps": total,
        "pct_start": draw(st.sampled_from([0.0, 1.0, 0.3, 0.5]) | shares),
        "anneal_strategy": draw(st.sampled_from(["cos", "linear"])),
        "cycle_momentum": draw(st.booleans()),
        "base_momentum": draw(st.sampled_from([0.85, [0.8, 0.0]])),
        "max_momentum": draw(st.sampled_from([0.95, [0.9, 0.99]])),
        "div_factor": draw(st.sampled_from([25.0, 1.0, 0.5])),
        "final_div_factor": draw(st.sampled_from([1e4, 2.0, float("inf")])),
        "three_phase": draw(st.booleans()),
    }
    return options, draw(st.integers(0, total - 1))


@given(one_cycles(), st.sampled_from([torch.optim.SGD, torch.optim.Adam]))
@example(({"max_lr": 0.3, "total_steps": 30, "pct_start": 1.0}, 3), torch.optim.SGD)
@example(
    (
        {"max_lr": 0.3, "total_steps": 30, "pct_start": 0.8, "three_phase": True},
        25,
    ),
    torch.optim.SGD,
)
@examples(300)
def test_one_cycle(case, cls):
    options, saved_at = case
    after = options["total_steps"] - saved_at
    try:
        assert_continues(
            lambda opt: lr_scheduler.OneCycleLR(opt, **options),
            saved_at,
            after,
            cls=cls,
        )
    except ZeroDivisionError:  # PyTorch's, in a first phase without a length
        assert options["pct_start"] * options["total_steps"] == 1


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("total", matrix([7, 30, 97], quick=[7, 30]))
def test_phases_from_a_scheduler(total, anneal, three_phase):
    opt = torch.optim.AdamW([torch.zeros(1)], 0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        opt,
        0.3,
        total,
        anneal_strategy=anneal,
        three_phase=three_phase,
        pct_start=1 / 3,
    )
    phases = aj.phases_from_torch_scheduler(
        scheduler.state_dict(), opt.state_dict()["param_groups"]
    )
    for step in range(total):
        ours, (group,) = phases.at(step), opt.param_groups
        assert ours["learning_rate"] == pytest.approx(group["lr"], rel=1e-11, abs=1e-15)
        assert ours["b1"] == pytest.approx(group["betas"][0], rel=1e-12)
        opt.step()
        if step < total - 1:
            scheduler.step()


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("version", ["1.8", "2.2"])
def test_states_with_the_function_that_anneals(version, anneal):
    """Those of PyTorch 1.8 to 2.2; in 1.8 a bound method."""
    make_scheduler = lambda opt: lr_scheduler.OneCycleLR(  # noqa: E731
        opt, [0.3, 0.1], 50, anneal_strategy=anneal
    )
    optimizer, scheduler = make(make_scheduler)
    step(scheduler, 20)
    state, groups = save(optimizer, scheduler)
    new = aj.phases_from_torch_scheduler(state, groups)
    del state["_anneal_func_type"], state["_is_initial"]
    state |= {"verbose": False}
    with pytest.raises(ValueError, match="does not say how it anneals"):
        aj.phases_from_torch_scheduler(state, groups)
    function = getattr(lr_scheduler.OneCycleLR, f"_annealing_{anneal}")
    if version == "1.8":
        function = types.MethodType(function, scheduler)
    assert (
        aj.phases_from_torch_scheduler(state | {"anneal_func": function}, groups) == new
    )


def test_state_from_a_file(tmp_path):
    optimizer, scheduler = make(lambda opt: lr_scheduler.MultiStepLR(opt, [3, 9, 9]))
    step(scheduler, 5)
    saved = {"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    read = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    groups = read["optimizer"]["param_groups"]
    phases = aj.phases_from_torch_scheduler(read["scheduler"], groups)
    assert aj.phases_from_torch_scheduler(scheduler, groups) == phases
    rates = [phases.at(k)["learning_rate"] for k in (2, 3, 8, 9, 500)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 1e-4, 1e-4], rel=1e-14)


def test_rates_that_are_tensors():
    """Float32, to which PyTorch rounds at every step."""
    rates = [torch.tensor(rate) for rate in RATES]
    optimizer, scheduler = make(
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 100, 1e-3), rates
    )
    step(scheduler, 99)
    phases = aj.phases_from_torch_scheduler(
        *save(optimizer, scheduler), group=0, steps=100
    )
    assert phases.at(98)["learning_rate"] == pytest.approx(
        1e-3 + 0.099 * (1 + np.cos(0.98 * np.pi)) / 2, rel=1e-6
    )


COMPILED = {
    "steps": lambda opt: lr_scheduler.StepLR(opt, 9, 0.5),
    "exponential": lambda opt: lr_scheduler.ExponentialLR(opt, 0.97),
    "warm-up, then cosine": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1), lr_scheduler.CosineAnnealingLR(opt, 80)],
        [3],
    ),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(
        opt, [0.3, 0.1], 80, pct_start=0.0, final_div_factor=float("inf")
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_float32(name):
    optimizer, scheduler = make(COMPILED[name])
    phases = aj.phases_from_torch_scheduler(*save(optimizer, scheduler), steps=80)
    ours = jax.jit(phases.schedule("learning_rate"))(jnp.arange(80))
    assert ours.dtype == jnp.float32
    theirs = []
    for _ in range(80):
        theirs.append(optimizer.param_groups[0]["lr"])
        step(scheduler, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * max(theirs))


@pytest.mark.parametrize("name", COMPILED)
def test_stepped_once_per_epoch(name):
    """Of 7 updates; the checkpoint is from the middle of the run."""
    optimizer, scheduler = make(COMPILED[name])
    step(scheduler, 11)
    phases = aj.phases_from_torch_scheduler(
        *save(optimizer, scheduler), steps=7 * 80 - 3, updates_per_step=7
    )
    assert phases.total_steps == 7 * 80
    for epoch in range(11, 80):
        rate, momentum = values(optimizer)[0]
        for update in (7 * epoch, 7 * epoch + 6):
            ours = phases.at(update)
            assert ours["learning_rate"] == pytest.approx(rate, rel=1e-11, abs=1e-16)
            assert ours.get("b1", momentum) == pytest.approx(momentum, rel=1e-12)
        step(scheduler, 1)
    assert aj.Phases.from_json(phases.to_json()) == phases


def test_a_rate_that_is_rounded_below_zero():
    """PyTorch's -8e-18 where a cosine has fallen to the base rate of 0."""
    optimizer, scheduler = make(
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 20, 0.05), (0.1, 0.0)
    )
    step(scheduler, 40)
    optimizer.param_groups[1]["lr"] = -8e-18
    phases = aj.phases_from_torch_scheduler(
        *save(optimizer, scheduler), group=1, steps=50
    )
    assert phases.at(40)["learning_rate"] == 0


def test_the_first_group_that_learns():
    """Neither a frozen one nor one without parameters."""
    optimizer, scheduler = make(
        lambda opt: lr_scheduler.OneCycleLR(opt, [0.0, 0.5], 10), (0.0, 0.1)
    )
    state, groups = save(optimizer, scheduler)
    first, second = (
        aj.phases_from_torch_scheduler(state, groups, group=i) for i in range(2)
    )
    assert first.at(3)["learning_rate"] == 0
    assert aj.phases_from_torch_scheduler(state, groups) == second
    groups[1]["params"], groups[0]["lr"] = [], 1.0
    with pytest.raises(ValueError, match="the learning_rate of the group is 1, but"):
        aj.phases_from_torch_scheduler(state, groups)


def test_phases_are_ramps_where_they_can_be():
    """What a milestone or the end cuts off stays one phase."""
    optimizer, scheduler = make(
        lambda opt: lr_scheduler.SequentialLR(
            opt,
            [
                lr_scheduler.LinearLR(opt, 0.5, total_iters=10),
                lr_scheduler.ExponentialLR(opt, 0.25),
                lr_scheduler.StepLR(opt, 1, 0.5),
            ],
            [4, 6],
        )
    )
    phases = aj.phases_from_torch_scheduler(*save(optimizer, scheduler), steps=8)
    assert str(phases).splitlines()[1:] == [
        "0-3    0.05 -> 0.07 linear",
        "4-5    0.1 -> 0.00625 exponential",
        "6-7    0.1 -> 0.025 exponential",
    ]


def test_lengths_of_restarts():
    optimizer, scheduler = make(
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 4)
    )
    step(scheduler, 20)
    phases = aj.phases_from_torch_scheduler(*save(optimizer, scheduler), steps=40)
    assert phases.durations == (3, 12, 48)


def test_the_last_values_persist():
    optimizer, scheduler = make(
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 50, 0.01)
    )
    saved = save(optimizer, scheduler)
    phases = aj.phases_from_torch_scheduler(*saved, group=0, steps=50)
    assert phases.total_steps == 50
    assert [phases.at(k)["learning_rate"] for k in (50, 75, 100)] == [0.01] * 3
    phases = aj.phases_from_torch_scheduler(*saved, group=0, steps=51)
    assert phases.at(100)["learning_rate"] == 0.1  # as PyTorch's, which rises again


def test_a_length_that_is_not_whole():
    """As the number of steps divided by the batches that are accumulated."""
    cosine = lambda opt: lr_scheduler.CosineAnnealingLR(opt, 72.5)  # noqa: E731
    assert_continues(cosine, 10, steps=72)
    optimizer, scheduler = make(cosine)
    with pytest.raises(ValueError, match="must be whole, unless .* got 72.5"):
        aj.phases_from_torch_scheduler(*save(optimizer, scheduler), steps=74)


# ---------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------


def read(make_scheduler, saved_at=0, change=None, **options):
    optimizer, scheduler = make(make_scheduler)
    step(scheduler, saved_at)
    state, groups = save(optimizer, scheduler)
    if change is not None:
        change(state, groups)
    return aj.phases_from_torch_scheduler(state, groups, **options)


def step_lr(opt):
    return lr_scheduler.StepLR(opt, 3)


def one_cycle(opt):
    return lr_scheduler.OneCycleLR(opt, 0.1, 10)


def in_sequence(*schedulers, milestones=(5,)):
    return lambda opt: lr_scheduler.SequentialLR(
        opt, [make(opt) for make in schedulers], list(milestones)
    )


def chained(opt):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)]
    )


def restart_by_fractions():
    optimizer, scheduler = make(
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 10)
    )
    scheduler.step(2.5)
    return aj.phases_from_torch_scheduler(*save(optimizer, scheduler), steps=30)


def two_on_one_optimizer():
    optimizer, scheduler = make(step_lr)
    warm_up = lr_scheduler.LinearLR(optimizer)
    step(scheduler, 2)
    step(warm_up, 2)
    return aj.phases_from_torch_scheduler(*save(optimizer, scheduler), steps=30)


REFUSED = {
    # by name
    "LambdaLR or MultiplicativeLR, .* pass a schedule": lambda: read(
        lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1.0)
    ),
    "LambdaLR or MultiplicativeLR, which": lambda: read(
        lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9)
    ),
    "ReduceLROnPlateau, .* override_hyperparams": lambda: read(
        lr_scheduler.ReduceLROnPlateau
    ),
    "CyclicLR, .* build its cycles as Phases": lambda: read(
        lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0)
    ),
    "ChainedScheduler, .* the product": lambda: read(chained),
    "SWALR: build": lambda: read(lambda opt: torch.optim.swa_utils.SWALR(opt, 0.5)),
    "OneCycleLR in PyTorch before 1.8: use one_cycle_torch": lambda: read(
        one_cycle, change=lambda s, g: s.update(step_size_up=3.0, step_size_down=6.0)
    ),
    "OneCycleLR in a SequentialLR": lambda: read(
        in_sequence(one_cycle, lambda opt: lr_scheduler.MultiStepLR(opt, [3]))
    ),
    "must be that of a scheduler of PyTorch, got step_size, .* warmup": lambda: read(
        step_lr, change=lambda s, g: s.update(warmup=3)
    ),
    "must be that of a scheduler of PyTorch, got T_max": lambda: (
        aj.phases_from_torch_scheduler({"T_max": 3}, [{"lr": 0.1}])
    ),
    "must be that of a scheduler of PyTorch, got an empty one": lambda: (
        aj.phases_from_torch_scheduler({}, [{"lr": 0.1}])
    ),
    r"must be scheduler.state_dict\(\), got a list": lambda: (
        aj.phases_from_torch_scheduler([1], [{"lr": 0.1}])
    ),
    r"the list optimizer.state_dict\(\)\['param_groups'\], got dict": lambda: (
        aj.phases_from_torch_scheduler({}, {"param_groups": []})
    ),
    "param_groups must be .*, got an empty list": lambda: (
        aj.phases_from_torch_scheduler({}, [])
    ),
    # not the schedule that the groups follow
    "learning_rate of the group is 0.5, but that of StepLR at step 4 is 0.01": lambda: (
        read(step_lr, 4, lambda s, g: g[0].update(lr=0.5), steps=30)
    ),
    "by another scheduler": two_on_one_optimizer,
    "the b1 of the group is 0.5, but": lambda: read(
        one_cycle, 4, lambda s, g: g[0].update(momentum=0.5)
    ),
    "param_groups must be the 2 that the scheduler drives, got 1": lambda: read(
        step_lr, change=lambda s, g: g.pop(), steps=30
    ),
    "param_groups must be those that the OneCycleLR drives": lambda: read(
        one_cycle, change=lambda s, g: g[0].pop("max_lr")
    ),
    "scheduler 1 of the SequentialLR, a StepLR, must be at step 2 .*, got 3": lambda: (
        read(
            in_sequence(lr_scheduler.LinearLR, step_lr),
            7,
            lambda s, g: s["_schedulers"][1].update(last_epoch=3),
            steps=30,
        )
    ),
    "have no constant ratio under this CosineAnnealingLR: .*the list to": lambda: read(
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 9, 1e-3), steps=9
    ),
    "b1 differs between the groups under this OneCycleLR": lambda: read(
        lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, 9, base_momentum=[0.8, 0.7])
    ),
    # arguments
    "StepLR never ends": lambda: read(step_lr),
    "because ExponentialLR never ends": lambda: read(
        in_sequence(step_lr, lambda opt: lr_scheduler.ExponentialLR(opt, 0.9))
    ),
    "steps must be more than the 4 done, got 4": lambda: read(step_lr, 4, steps=4),
    "steps must be more than the 28 done, got 28": lambda: read(
        step_lr, 4, steps=28, updates_per_step=7
    ),
    "steps must be an integer >= 1, got 2.5": lambda: read(step_lr, steps=2.5),
    "updates_per_step must be an integer >= 1, got 0": lambda: read(
        step_lr, steps=30, updates_per_step=0
    ),
    r"group must be in \[0, 2\), .* got 2": lambda: read(step_lr, steps=30, group=2),
    "more than 10000 phases": lambda: read(step_lr, steps=10**6, change=lambda s, g: (
        s.update(gamma=0.9999)
    )),
    # what PyTorch cannot do either, or not in this form
    "pct_start must leave at least 1e-6 steps .* got one of 1e-08": lambda: read(
        lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, 10, pct_start=1 - 1e-9)
    ),
    "has done its 10 steps": lambda: read(one_cycle, 10),
    "stepped by fractions .*T_cur=2.5.*use cosine_restarts": restart_by_fractions,
    "must be its first scheduler": lambda: read(
        in_sequence(step_lr, in_sequence(step_lr, step_lr)), steps=30
    ),
    "factor must be > 0": lambda: read(lambda opt: lr_scheduler.ConstantLR(opt, 0.0)),
    "total_iters of the scheduler must be > 0, got 0": lambda: read(
        lambda opt: lr_scheduler.LinearLR(opt, total_iters=0)
    ),
    "total_iters of the scheduler must be whole, got 2.5": lambda: read(
        lambda opt: lr_scheduler.PolynomialLR(opt, 2.5)
    ),
    r"learning_rate \(end\) must be finite and >= 0, got -1": lambda: read(
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 9, -1.0), steps=30
    ),
    r"the milestones must be in order, got \[9, 5\]": lambda: read(
        in_sequence(step_lr, step_lr, step_lr, milestones=(9, 5)), steps=30
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message) as error:
        REFUSED[message]()
    assert "\n" not in str(error.value)
