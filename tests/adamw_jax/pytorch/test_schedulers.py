"""Phases read from a scheduler of PyTorch against that scheduler run on."""

import copy
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
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


def assert_continues(make_scheduler, saved_at, after=AFTER, steps=None, **options):
    """The phases have PyTorch's values at every step after the checkpoint."""
    optimizer, scheduler = make(make_scheduler, **options)
    step(scheduler, saved_at)
    state, groups = save(optimizer, scheduler)
    read = [
        aj.phases_from_torch_scheduler(state, groups, group=i, steps=steps)
        for i in range(len(groups))
    ]
    for phases in read:
        assert aj.Phases.from_json(phases.to_json()) == phases
    theirs = []
    for _ in range(after):
        theirs.append(values(optimizer))
        step(scheduler, 1)
    for i, phases in enumerate(read):
        numbers = np.arange(saved_at, saved_at + after)
        rate, momentum = np.array(theirs)[:, i].T
        scale = max(rate.max(), float(groups[i]["initial_lr"]))
        ours = phases.schedule("learning_rate")(numbers)
        np.testing.assert_allclose(ours, rate, rtol=1e-12, atol=1e-12 * scale)
        assert ours[0] == phases.at(saved_at)["learning_rate"]
        if "b1" in phases.names:
            ours = phases.schedule("b1")(numbers)
            np.testing.assert_allclose(ours, momentum, rtol=1e-12)
        else:
            assert (momentum == momentum[0]).all()
    return read


lengths = st.integers(1, 40)
factors = st.floats(0.05, 1.0)
LEAVES = {
    "StepLR": st.tuples(lengths, st.floats(0.2, 1.1)),
    "MultiStepLR": st.tuples(st.lists(st.integers(0, 90), max_size=5), factors),
    "ConstantLR": st.tuples(factors, lengths),
    "LinearLR": st.tuples(factors, st.floats(0, 1), lengths),
    "ExponentialLR": st.tuples(st.floats(0.5, 1.05)),
    "PolynomialLR": st.tuples(lengths, st.floats(0.3, 4)),
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


def sequence(first, rest):
    milestones = st.lists(st.integers(0, 60), min_size=len(rest), max_size=len(rest))
    return milestones.map(lambda m: ("SequentialLR", ([first, *rest], sorted(m))))


@given(leaves, st.integers(0, 100))
@examples(300)
def test_schedulers(spec, saved_at):
    assert_continues(build(spec), saved_at, steps=saved_at + AFTER)


@given(
    st.tuples(leaves, st.lists(leaves, min_size=1, max_size=3)).flatmap(
        lambda x: sequence(*x)
    ),
    st.integers(0, 100),
)
@examples(300)
def test_sequences(spec, saved_at):
    assert_continues(build(spec), saved_at, steps=saved_at + AFTER)
