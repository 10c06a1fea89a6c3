"""Groups with schedules of their own, against PyTorch's optimizer run on."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiers import matrix
from torch.optim import lr_scheduler

import adamw_jax as aj

NAMES = ("a", "b", "c")
TARGETS = {"a": [1.0, -2.0], "b": [0.5, 3.0], "c": [-1.0, 0.1]}
BEFORE, AFTER = 5, 8
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def make(make_scheduler, rates, cls=AdamW, decays=(0.3, 0.3, 0.0), **options):
    """Three parameters in a group each, that go to their targets."""
    groups = []
    for name, rate, decay in zip(NAMES, rates, decays, strict=True):
        p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        groups.append({"params": [(name, p)], "lr": rate, "weight_decay": decay})
    optimizer = cls(groups, **options)
    return optimizer, make_scheduler(optimizer)


def train(optimizer, scheduler, steps):
    for _ in range(steps):
        for group in optimizer.param_groups:
            (p,), (name,) = group["params"], group["param_names"]
            p.grad = p.detach() - torch.tensor(TARGETS[name], dtype=torch.float64)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def read(optimizer):
    return {
        group["param_names"][0]: jnp.array(group["params"][0].detach().numpy())
        for group in optimizer.param_groups
    }


def run(tx, params, state, steps):
    targets = {name: jnp.array(TARGETS[name]) for name in NAMES}

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.subtract, params, targets)
        updates, state = tx.update(grads, state, params)
        return (aj.apply_updates(params, updates), state), None

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])
    return scan((params, state))


def phases_of_all(state, groups, **options):
    return [
        aj.phases_from_torch_scheduler(state, groups, group=i, **options)
        for i in range(len(groups))
    ]


def assert_continues(optimizer, scheduler, learning_rate, **options):
    """As PyTorch's run does, and the groups of the export have its next rates."""
    train(optimizer, scheduler, BEFORE)
    there = copy.deepcopy(optimizer.state_dict())
    if scheduler is not None:
        learning_rate = learning_rate(scheduler.state_dict(), there["param_groups"])
    before = read(optimizer)
    tx, state = aj.optimizer_from_torch_state_dict(
        there, before, learning_rate=learning_rate, step=BEFORE, **options
    )
    params, state = run(tx, before, state, AFTER)
    train(optimizer, scheduler, AFTER)
    for name, theirs in read(optimizer).items():
        travelled = float(jnp.abs(theirs - before[name]).max())
        difference = float(jnp.abs(params[name] - theirs).max())
        assert difference <= 1e-12 * travelled, name
    dumped = aj.to_torch_state_dict(state, params, there["param_groups"], tx=tx)
    for ours, theirs in zip(
        dumped["param_groups"], optimizer.param_groups, strict=True
    ):
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-11)
        key = "betas" if "betas" in theirs else "momentum"
        assert ours[key] == pytest.approx(theirs[key], rel=1e-11)
    return state


def cosine(opt):
    return lr_scheduler.CosineAnnealingLR(opt, 12, eta_min=1e-3)


def warm_up_and_restarts(opt):
    return lr_scheduler.SequentialLR(
        opt,
        [
            lr_scheduler.LinearLR(opt, 0.1, total_iters=4),
            lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2, eta_min=1e-3),
        ],
        [4],
    )


def one_cycle(opt):
    return lr_scheduler.OneCycleLR(
        opt,
        [0.1, 0.05, 0.02],
        20,
        base_momentum=[0.8, 0.7, 0.85],
        pct_start=0.4,
        final_div_factor=float("inf"),
    )


SCHEDULERS = {
    f.__name__.replace("_", " "): f for f in (cosine, warm_up_and_restarts, one_cycle)
}
CELLS = [(name, cls) for name in SCHEDULERS for cls in ("AdamW", "SGD")]
QUICK = [("cosine", "AdamW"), ("one cycle", "SGD")]


@pytest.mark.parametrize(("name", "cls"), matrix(CELLS, QUICK))
def test_phases_for_each_group(x64, name, cls):
    """Their rates have no constant ratio; SGD's decay is in the momentum."""
    options = {"momentum": 0.9} if cls == "SGD" else {}
    optimizer, scheduler = make(
        SCHEDULERS[name], (0.1, 0.02, 0.02), getattr(torch.optim, cls), **options
    )
    assert_continues(
        optimizer, scheduler, lambda *saved: phases_of_all(*saved, steps=20)
    )


def test_groups_that_share_phases(x64):
    """They share an optimizer; and a number is a rate too."""
    optimizer, scheduler = make(cosine, (0.1, 0.02, 0.1))

    def rates(*saved):
        phases = phases_of_all(*saved, steps=20)
        assert phases[0] == phases[2]
        return phases

    state = assert_continues(optimizer, scheduler, rates)
    assert sorted(state.inner_states) == ["0", "1"]
    optimizer, scheduler = make(lambda opt: None, (0.1, 0.02, 0.1))
    state = assert_continues(optimizer, scheduler, [0.1, 0.02, 0.1])
    assert sorted(state.inner_states) == ["0", "1"]


def test_rates_that_replace_those_of_the_groups(x64):
    """Each in a list is the rate itself, whatever the ratio of the groups was."""
    optimizer, _ = make(lambda opt: None, (0.1, 0.02, 0.1))
    tx, state = aj.optimizer_from_torch_state_dict(
        optimizer.state_dict(), read(optimizer), learning_rate=[0.05, 0.05, 0.03]
    )
    params, _ = run(tx, read(optimizer), state, AFTER)
    optimizer, _ = make(lambda opt: None, (0.05, 0.05, 0.03))
    train(optimizer, None, AFTER)
    for name, theirs in read(optimizer).items():
        np.testing.assert_allclose(params[name], theirs, rtol=1e-12)


def test_a_function_of_the_step(x64):
    """The way out for `LambdaLR`: its function with jax.numpy, times the rate."""

    def factor(t, xp=np):
        return xp.minimum(t / 4, (1 + xp.cos(np.pi * (t - 4) / 16)) / 2)

    optimizer, scheduler = make(
        lambda opt: lr_scheduler.LambdaLR(opt, factor), (0.1, 0.02, 0.05)
    )
    assert_continues(
        optimizer,
        scheduler,
        lambda *saved: lambda step: 0.1 * factor(step.astype(float), jnp),
    )


@pytest.mark.parametrize(
    ("scheduled", "cls"),
    matrix([(False, "AdamW"), (True, "AdamW"), (True, "SGD")], quick=[(True, "AdamW")]),
)
def test_a_first_group_without_a_rate(x64, scheduled, cls):
    """The learning rate is that of the first group that learns."""

    def cycle(opt):
        return lr_scheduler.OneCycleLR(opt, [0.0, 0.1, 0.05], 20)

    options = {"momentum": 0.9} if cls == "SGD" else {}
    optimizer, scheduler = make(
        cycle if scheduled else lambda opt: None,
        (0.0, 0.1, 0.05),
        getattr(torch.optim, cls),
        **options,
    )
    start = read(optimizer)["a"]
    train(optimizer, scheduler, BEFORE)
    there = copy.deepcopy(optimizer.state_dict())
    phases = None
    if scheduled:
        phases = aj.phases_from_torch_scheduler(
            scheduler.state_dict(), there["param_groups"]
        )
    before = read(optimizer)
    tx, state = aj.optimizer_from_torch_state_dict(
        there, before, learning_rate=phases, step=BEFORE
    )
    params, state = run(tx, before, state, AFTER)
    train(optimizer, scheduler, AFTER)
    theirs = read(optimizer)
    np.testing.assert_array_equal(params["a"], start)
    for name in ("b", "c"):
        travelled = float(jnp.abs(theirs[name] - before[name]).max())
        assert float(jnp.abs(params[name] - theirs[name]).max()) <= 1e-12 * travelled
    dumped = aj.to_torch_state_dict(state, params, there["param_groups"], tx=tx)
    rates = [group["lr"] for group in dumped["param_groups"]]
    expected = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx(expected, rel=1e-11)
    key = "momentum_buffer" if cls == "SGD" else "exp_avg"
    torch.testing.assert_close(  # moments go on without a rate
        dumped["state"][0][key], optimizer.state_dict()["state"][0][key]
    )


def test_plain_sgd_with_a_last_group_without_a_rate(x64):
    """It stays one optimizer, because it has no moments that tell states apart."""
    optimizer, _ = make(lambda opt: None, (0.1, 0.05, 0.0), SGD)
    state = assert_continues(optimizer, None, None)
    assert not hasattr(state, "inner_states")


def test_rates_that_are_all_zero(x64):
    """Nothing moves, as in PyTorch."""
    optimizer, _ = make(lambda opt: None, (0.0, 0.0, 0.0))
    train(optimizer, None, BEFORE)
    before = read(optimizer)
    tx, state = aj.optimizer_from_torch_state_dict(optimizer.state_dict(), before)
    params, _ = run(tx, before, state, 2)
    assert all(not params[name].any() for name in NAMES)


def test_exact_correction_of_phases_for_each_group(x64):
    """Has one history of b1, which the groups share or not."""
    optimizer, scheduler = make(one_cycle, (0.1, 0.05, 0.02))
    train(optimizer, scheduler, BEFORE)
    there = optimizer.state_dict()
    phases = phases_of_all(scheduler.state_dict(), there["param_groups"])
    params = read(optimizer)
    with pytest.raises(ValueError, match="bias_correction must be 'torch', .* in b1"):
        aj.optimizer_from_torch_state_dict(
            there, params, learning_rate=phases, bias_correction="exact"
        )
    one = phases[0]
    for group in there["param_groups"]:  # as if all had the same base_momentum
        group["betas"], group["base_momentum"] = (one.at(BEFORE)["b1"], 0.999), 0.8
    for rates in (one, [one, one, one]):
        _, state = aj.optimizer_from_torch_state_dict(
            there, params, learning_rate=rates, bias_correction="exact"
        )
        totals = [
            float(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if "log_b1" in jax.tree_util.keystr(path) and "total" in str(path[-1])
        ]
        expected = np.log([one.at(k)["b1"] for k in range(BEFORE)]).sum()
        assert totals == pytest.approx([expected], rel=1e-12)


def test_phases_of_groups_that_cycle_b1_differently(x64):
    """At the first step they have the same b1."""
    optimizer, scheduler = make(one_cycle, (0.1, 0.05, 0.02))
    there = optimizer.state_dict()
    assert len({group["betas"] for group in there["param_groups"]}) == 1
    phases = phases_of_all(scheduler.state_dict(), there["param_groups"])[0]
    with pytest.raises(ValueError, match="without b1, which differs between"):
        aj.optimizer_from_torch_state_dict(there, read(optimizer), learning_rate=phases)


REFUSED: dict[str, Any] = {
    "one for all groups or one for each of the 3, got 2": [0.1, 0.2],
    "must not be None for some": [0.1, None, 0.1],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(x64, message):
    optimizer, _ = make(lambda opt: None, (0.1, 0.02, 0.1))
    with pytest.raises(ValueError, match=message):
        aj.optimizer_from_torch_state_dict(
            optimizer.state_dict(), read(optimizer), learning_rate=REFUSED[message]
        )


def test_phases_at_another_step_than_adam_are_refused():
    """A scheduler that steps once an epoch, and one that went on without Adam."""
    parameter = torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.AdamW([parameter], 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    for _ in range(3):  # epochs of two steps
        for _ in range(2):
            parameter.grad = torch.ones(2)
            opt.step()
        scheduler.step()
    saved, params = opt.state_dict(), {"w": jnp.ones(2)}
    groups = saved["param_groups"]

    def go_on(step=None, **options):
        phases = aj.phases_from_torch_scheduler(
            scheduler.state_dict(), groups, **options
        )
        return aj.optimizer_from_torch_state_dict(
            saved, params, learning_rate=phases, names=["w"], step=step
        )

    with pytest.raises(
        ValueError, match="at step 6, .* pass step=last_epoch .* or upd"
    ):
        go_on(steps=100)
    for options in ({"step": 3, "steps": 100}, {"updates_per_step": 2, "steps": 200}):
        tx, state = go_on(**options)
        _, state = tx.update(params, state, params)
        rate = float(aj.current_hyperparams(state)["learning_rate"])
        assert rate == pytest.approx(groups[0]["lr"], rel=1e-6)
