"""Every cell of optimizer x decay x schedule x eps x sign against torch.optim."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import trajectory
from tiers import matrix

import adamw_jax as aj

STEPS, SIZE = 200, 50
LR, DECAY, MOMENTUM = 1e-3, 0.1, 0.9
EPSILONS = (1e-8, 1e-5, 1e-2)
NAMES = ("adam", "amsgrad", "sgd")
DECAYS = ("none", "l2", "decoupled")
SCHEDULES = ("constant", "onecycle")
ONE_CYCLE = {"pct_start": 0.3, "base_momentum": 0.85, "max_momentum": 0.95}

rng = np.random.default_rng(0)
# Of the size of real weights. At |p| > 1 an absolute bound in float32 would measure
# PyTorch's own rounding: see test_nearer_to_float64_than_pytorch.
P0 = 0.25 * rng.normal(size=SIZE)
GRADS = rng.normal(size=(STEPS, SIZE))
GRADS[:5] *= 10  # a rough start, which AMSGrad remembers
GRADS[:, SIZE // 2 :] *= 1e-3  # where eps matters


def torch_run(name, decay, schedule, eps, maximize, dtype):
    """The parameters after every step, by torch.optim, one tensor at a time."""
    p = torch.nn.Parameter(torch.tensor(P0, dtype=dtype))
    wd = {"maximize": maximize, "weight_decay": DECAY if decay == "l2" else 0.0}
    if name == "sgd":
        opt = torch.optim.SGD([p], LR, momentum=MOMENTUM, **wd, foreach=False)
    else:
        if decay == "decoupled":
            wd["weight_decay"] = DECAY
        cls = torch.optim.AdamW if decay == "decoupled" else torch.optim.Adam
        opt = cls([p], LR, eps=eps, amsgrad=name == "amsgrad", **wd, foreach=False)
    scheduler = None
    if schedule == "onecycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            opt, LR, total_steps=STEPS, **ONE_CYCLE
        )
    path = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "scheduler before optimizer", past the end
        for t in range(STEPS):
            p.grad = torch.tensor(GRADS[t], dtype=dtype)
            if name == "sgd" and decay == "decoupled":  # PyTorch has no SGDW
                with torch.no_grad():
                    p.mul_(1 - opt.param_groups[0]["lr"] * DECAY)
            opt.step()
            if scheduler is not None and t < STEPS - 1:
                scheduler.step()
            path.append(p.detach().numpy().astype(np.float64).copy())
    return np.array(path)


def jax_run(name, decay, schedule, maximize, dtype):
    """A function from eps to the parameters after every step: one compiled program."""
    learning_rate = LR
    if schedule == "onecycle":
        learning_rate = aj.one_cycle_torch(LR, STEPS, **ONE_CYCLE)

    def run(p, grads, eps):
        kwargs = {"maximize": maximize}
        if name == "sgd":
            if schedule == "constant":
                kwargs["momentum"] = MOMENTUM
            if decay != "none":
                kwargs["l2" if decay == "l2" else "weight_decay"] = DECAY
            tx = aj.sgd(learning_rate, **kwargs)
        else:
            kwargs |= {"eps": eps, "bias_correction": "torch"}
            if decay == "l2":
                kwargs["l2"] = DECAY
            if decay == "decoupled":
                kwargs["weight_decay"] = DECAY
            optimizer = {"adam": aj.adam, "amsgrad": aj.amsgrad}[name]
            if name == "adam" and decay == "decoupled":
                optimizer = aj.adamw
            tx = optimizer(learning_rate, **kwargs)

        return trajectory(tx, p, grads)

    run = jax.jit(run)
    p, grads = jnp.asarray(P0, dtype), jnp.asarray(GRADS, dtype)
    return lambda eps: np.asarray(run(p, grads, jnp.asarray(eps, dtype)), np.float64)


CELLS = list(itertools.product(NAMES, DECAYS, SCHEDULES, (False, True)))
# Each pair of values of any two axes, except the repeated corners.
QUICK = [
    ("adam", "none", "onecycle", True),
    ("adam", "l2", "constant", False),
    ("adam", "decoupled", "onecycle", False),
    ("amsgrad", "none", "constant", False),
    ("amsgrad", "l2", "onecycle", True),
    ("amsgrad", "decoupled", "constant", True),
    ("sgd", "none", "constant", True),
    ("sgd", "l2", "onecycle", False),
    ("sgd", "decoupled", "onecycle", True),
]
QUICK_FLOAT32 = [cell for cell in QUICK if cell[1] == "decoupled"]


@pytest.mark.parametrize(
    ("name", "decay", "schedule", "maximize"), matrix(CELLS, quick=QUICK)
)
def test_float64(x64, name, decay, schedule, maximize):
    run = jax_run(name, decay, schedule, maximize, jnp.float64)
    for eps in EPSILONS[: 1 if name == "sgd" else None]:
        ours = run(eps)
        theirs = torch_run(name, decay, schedule, eps, maximize, torch.float64)
        displacement = np.abs(theirs[-1] - P0).max()
        assert displacement > 1e-4
        assert np.abs(ours - theirs).max() <= 1e-12 * displacement, eps


@pytest.mark.parametrize(
    ("name", "decay", "schedule", "maximize"), matrix(CELLS, quick=QUICK_FLOAT32)
)
def test_float32(name, decay, schedule, maximize):
    run = jax_run(name, decay, schedule, maximize, jnp.float32)
    for eps in EPSILONS[: 1 if name == "sgd" else None]:
        ours = run(eps)
        theirs = torch_run(name, decay, schedule, eps, maximize, torch.float32)
        assert np.abs(ours - theirs).max() <= 5e-6, eps


@pytest.mark.parametrize("name", NAMES)
def test_nearer_to_float64_than_pytorch(monkeypatch, name):
    """PyTorch's p * (1 - lr * wd) rounds once more, always in the same direction."""
    monkeypatch.setattr(f"{__name__}.P0", 10 * P0)
    exact = torch_run(name, "decoupled", "constant", 1e-8, False, torch.float64)
    theirs = torch_run(name, "decoupled", "constant", 1e-8, False, torch.float32)
    ours = jax_run(name, "decoupled", "constant", False, jnp.float32)(1e-8)
    assert np.abs(ours - exact).max() < 0.5 * np.abs(theirs - exact).max()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_decay_shrinks_parameters_when_maximizing(decay):
    """On a flat function only the decay acts, and it must shrink the parameters."""
    tx = aj.adamw(0.1, weight_decay=decay, maximize=True)
    p = jnp.array([3.0, -3.0])
    updates, _ = tx.update(jnp.zeros(2), tx.init(p), p)
    np.testing.assert_allclose(aj.apply_updates(p, updates), p * (1 - 0.1 * decay))


@pytest.mark.parametrize(
    "total", matrix([2, 3, 4, 5, 7, 10, 20, 97, 100, 101, 1000], quick=[2, 5, 20])
)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"three_phase": True},
        {"anneal_strategy": "linear", "pct_start": 0.23},
        {"three_phase": True, "anneal_strategy": "linear", "pct_start": 0.4},
        {"cycle_momentum": False, "div_factor": 10, "final_div_factor": 3},
    ],
)
def test_one_cycle_lr(total, kwargs):
    """`one_cycle_torch` is `OneCycleLR` at every step, with fractional phases too."""
    opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        opt, 1e-2, total_steps=total, **kwargs
    )
    phases = aj.one_cycle_torch(1e-2, total, **kwargs)
    assert phases.total_steps == total
    traced = {
        name: np.asarray(jax.jit(phases.schedule(name))(jnp.arange(total)))
        for name in phases.names
    }
    for step in range(total):
        group, ours = opt.param_groups[0], phases.at(step)
        assert ours["learning_rate"] == pytest.approx(group["lr"], rel=1e-12, abs=1e-18)
        assert traced["learning_rate"][step] == pytest.approx(
            group["lr"], rel=2e-6, abs=1e-11
        )
        if "b1" in ours:
            assert ours["b1"] == pytest.approx(group["betas"][0], rel=1e-12)
            assert traced["b1"][step] == pytest.approx(group["betas"][0], rel=1e-6)
        opt.step()
        if step < total - 1:
            scheduler.step()


def test_one_cycle_lr_impossible():
    with pytest.raises(ValueError, match="without a length"):
        aj.one_cycle_torch(1e-2, 4, pct_start=0.25)  # PyTorch: ZeroDivisionError


@pytest.mark.parametrize("mult", [1, 2])
def test_cosine_restarts(mult):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        opt, T_0=7, T_mult=mult, eta_min=0.01
    )
    phases = aj.cosine_restarts(
        0.3, cycles=3, steps=7, mult=mult, final_learning_rate=0.01
    )
    assert phases.total_steps == 7 * (1 + mult + mult**2)
    for step in range(phases.total_steps):
        ours = phases.at(step)["learning_rate"]
        assert ours == pytest.approx(opt.param_groups[0]["lr"], rel=1e-12)
        opt.step()
        scheduler.step()
