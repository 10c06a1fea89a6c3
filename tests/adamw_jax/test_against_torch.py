"""Every cell of optimizer x decay x schedule x eps x sign against torch.optim."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    "total", matrix([2, 3, 4, 5, 7, 10, 20, 97, 100, 101, 1000], quick=[5, 20])
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


# ---------------------------------------------------------------------------
# Parameters without a gradient in some steps
# ---------------------------------------------------------------------------

WITHOUT = (0, 3, 4, 8)  # the steps, of 12, in which one of two parameters has none
SOMETIMES = {
    "adamw": (torch.optim.AdamW, {}, aj.adamw, {"weight_decay": 0.1}),
    "adam-l2": (torch.optim.Adam, {"weight_decay": 0.1}, aj.adam, {"l2": 0.1}),
    "amsgrad": (
        *(torch.optim.AdamW, {"amsgrad": True}),
        *(aj.amsgrad, {"weight_decay": 0.1}),
    ),
    "sgd": (
        *(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        *(aj.sgd, {"momentum": 0.9, "l2": 0.1}),
    ),
}


def sometimes_in_torch(name, cycled):
    """The two parameters after 12 steps of a learning rate around .1."""
    cls, options = SOMETIMES[name][:2]
    params = {k: torch.nn.Parameter(torch.tensor(P0[:3])) for k in ("on", "off")}
    options = {"weight_decay": 0.1} | options
    opt = cls(list(params.values()), 0.1, **options, foreach=False)
    scheduler = None
    if cycled:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, 20, **ONE_CYCLE)
    for t in range(12):
        for key, p in params.items():
            skipped = key == "off" and t in WITHOUT
            p.grad = None if skipped else torch.tensor(GRADS[t, :3])
        opt.step()
        if cycled:
            scheduler.step()
    return {key: p.detach().numpy() for key, p in params.items()}


def sometimes_here(name, cycled, apart):
    make, options = SOMETIMES[name][2:]
    if name != "sgd":
        options = options | {"bias_correction": "torch"}
    elif cycled:
        options = {"l2": 0.1}  # the phases drive the momentum
    learning_rate = aj.one_cycle_torch(0.1, 20, **ONE_CYCLE) if cycled else 0.1
    params = {key: jnp.asarray(P0[:3]) for key in ("on", "off")}
    tx = make(learning_rate, **options)
    if apart:
        labels = {key: key for key in params}
        tx = optax.partition(
            {key: make(learning_rate, **options) for key in params}, labels
        )
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(12):
        g = jnp.asarray(GRADS[t, :3])
        grads = {"on": g, "off": None if t in WITHOUT else g}
        updates, state = update(grads, state, params)
        params = aj.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("cycled", [False, True])
@pytest.mark.parametrize("name", SOMETIMES)
def test_none_gradients_in_an_optimizer_of_their_own(x64, name, cycled):
    """The count stands still, as in PyTorch for that parameter; schedules go on."""
    theirs = sometimes_in_torch(name, cycled)
    ours = sometimes_here(name, cycled, apart=True)
    for key, expected in theirs.items():
        np.testing.assert_allclose(ours[key], expected, rtol=1e-12)


@pytest.mark.parametrize("name", SOMETIMES)
def test_none_gradients_share_the_count_of_one_optimizer(x64, name):
    """The difference from PyTorch that `scale_by_adam` names; SGD has no count."""
    theirs = sometimes_in_torch(name, False)
    ours = sometimes_here(name, False, apart=False)
    np.testing.assert_allclose(ours["on"], theirs["on"], rtol=1e-12)
    if name == "sgd":
        np.testing.assert_allclose(ours["off"], theirs["off"], rtol=1e-12)
        return
    p, m, v, top = P0[:3].copy(), 0.0, 0.0, 0.0
    for t in range(12):  # t goes on, nothing else does
        if t in WITHOUT:
            continue
        g = GRADS[t, :3] + (0.1 * p if name == "adam-l2" else 0.0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        top = np.maximum(top, v)
        root = np.sqrt((top if name == "amsgrad" else v) / (1 - 0.999 ** (t + 1)))
        decay = 0.0 if name == "adam-l2" else 0.1 * p
        p = p - 0.1 * (m / (1 - 0.9 ** (t + 1)) / (root + 1e-8) + decay)
    np.testing.assert_allclose(ours["off"], p, rtol=1e-12)
    assert (np.abs(ours["off"] - theirs["off"]) > 1e-3).any()


@pytest.mark.parametrize("name", ["adamw", "amsgrad"])
def test_a_step_without_any_gradient(name):
    """As in PyTorch it changes neither parameters nor moments, and counts nothing."""
    tx = SOMETIMES[name][2](0.1, weight_decay=0.1)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params)
    nothing = {"a": None, "b": None}
    _, by_update = jax.jit(tx.update)(nothing, state, params)
    new, by_step = aj.update_and_apply(tx, nothing, state, params)
    for after in (by_update, by_step):
        jax.tree.map(
            np.testing.assert_array_equal, after.inner_state, state.inner_state
        )
        assert int(after.step) == 2  # schedules go on, as PyTorch's scheduler
    jax.tree.map(np.testing.assert_array_equal, new, params)
