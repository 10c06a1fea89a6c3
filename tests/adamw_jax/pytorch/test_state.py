"""Runs that switch libraries halfway against runs that stay, and the bits.

The network is a tiny MLP with a norm and has real gradients, so an error in a moment,
a count or a group would grow.
"""

import copy
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis.extra import numpy as hnp
from tiers import examples, matrix
from torch.nn import functional as F

import adamw_jax as aj

BEFORE, AFTER = 7, 9  # steps in the one library, then in the other
LR, DECAY = 1e-2, 0.3
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(16, 4)), rng.normal(size=(16, 3))

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adam-l2": (torch.optim.Adam, {"weight_decay": DECAY}),
    "adamw": (torch.optim.AdamW, {"weight_decay": DECAY, "betas": (0.8, 0.99)}),
    "amsgrad-l2": (torch.optim.Adam, {"weight_decay": DECAY, "amsgrad": True}),
    "amsgradw": (torch.optim.AdamW, {"weight_decay": DECAY, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": DECAY}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd-maximize": (torch.optim.SGD, {"maximize": True, "weight_decay": DECAY}),
    "adamw-maximize": (torch.optim.AdamW, {"maximize": True, "eps": 1e-3}),
}
SCHEDULES = ("constant", "onecycle")
CELLS = [(name, schedule) for name in OPTIMIZERS for schedule in SCHEDULES]
QUICK_FROM_PYTORCH = [
    ("amsgradw", "onecycle"),
    ("sgd-nesterov", "constant"),
]
QUICK_FROM_JAX = [
    ("adamw-maximize", "constant"),
    ("amsgrad-l2", "onecycle"),
    ("sgd-momentum", "onecycle"),
]


# ---------------------------------------------------------------------------
# The same run in two libraries
# ---------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = torch.nn.Linear(4, 5, dtype=dtype)
        self.norm = torch.nn.LayerNorm(5, dtype=dtype)
        self.fc2 = torch.nn.Linear(5, 3, dtype=dtype)

    def forward(self, x):
        return self.fc2(self.norm(torch.tanh(self.fc1(x))))


def loss_fn(params, x, y):
    """`Net` and the mean squared error."""
    fc1, norm, fc2 = params["fc1"], params["norm"], params["fc2"]
    h = jnp.tanh(x @ fc1["kernel"] + fc1["bias"][None])
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * norm["scale"][None] + norm["bias"][None]
    return ((h @ fc2["kernel"] + fc2["bias"][None] - y) ** 2).mean()


def empty(dtype=jnp.float32):
    return {
        "fc1": {"kernel": jnp.zeros((4, 5), dtype), "bias": jnp.zeros(5, dtype)},
        "norm": {"scale": jnp.zeros(5, dtype), "bias": jnp.zeros(5, dtype)},
        "fc2": {"kernel": jnp.zeros((5, 3), dtype), "bias": jnp.zeros(3, dtype)},
    }


def torch_setup(name, schedule="constant", groups=True, dtype=torch.float64):
    """A network, its optimizer and its scheduler."""
    net = Net(dtype)
    cls, options = OPTIMIZERS[name]
    named = list(net.named_parameters())
    if groups:  # matrices; all else without decay and at half the rate
        named = [
            {"params": [(n, p) for n, p in named if p.ndim > 1]},
            {
                "params": [(n, p) for n, p in named if p.ndim == 1],
                "lr": LR / 2,
                "weight_decay": 0.0,
            },
        ]
    opt, scheduler = cls(named, lr=LR, **options), None
    if schedule == "onecycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            opt,
            [group["lr"] for group in opt.param_groups],
            total_steps=BEFORE + AFTER + 2,
            cycle_momentum=name != "sgd",
        )
    return net, opt, scheduler


def torch_train(net, opt, scheduler, steps, skip=()):
    """Parameters named in skip get no gradient."""
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        opt.zero_grad()
        F.mse_loss(
            net(torch.tensor(X, dtype=dtype)), torch.tensor(Y, dtype=dtype)
        ).backward()
        for name, p in net.named_parameters():
            if name in skip:
                p.grad = None
        opt.step()
        if scheduler is not None:
            scheduler.step()


def jax_train(tx, params, state, steps):
    def step(carry, _):
        params, state = carry
        x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return (aj.apply_updates(params, updates), state), None

    dtype = params["fc1"]["bias"].dtype
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])
    return run((params, state))


def read_back(params):
    """A network in PyTorch with our weights."""
    net = Net(torch.float64)
    net.load_state_dict(aj.params_to_torch_state_dict(params, list(net.state_dict())))
    return net


def scheduled(opt, scheduler):
    """The learning rate with which the run continues in JAX."""
    if scheduler is None:
        return {"learning_rate": None}
    groups = opt.state_dict()["param_groups"]
    return {
        "learning_rate": aj.phases_from_torch_scheduler(scheduler.state_dict(), groups)
    }


def assert_same_run(net, stayed):
    start = Net()
    for p, q, p0 in zip(
        net.parameters(), stayed.parameters(), start.parameters(), strict=True
    ):
        travelled = (q - p0).abs().max()
        assert travelled > 1e-4
        assert (p - q).abs().max() <= 1e-12 * travelled


@pytest.mark.parametrize(("name", "schedule"), matrix(CELLS, QUICK_FROM_PYTORCH))
def test_started_in_pytorch(x64, name, schedule):
    net, opt, scheduler = torch_setup(name, schedule)
    torch_train(net, opt, scheduler, BEFORE)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    params = aj.params_from_torch_state_dict(saved[0], empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(
        saved[1], params, step=BEFORE, **scheduled(opt, scheduler)
    )
    params, _ = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, scheduler, AFTER)
    assert_same_run(read_back(params), net)


@pytest.mark.parametrize(("name", "schedule"), matrix(CELLS, QUICK_FROM_JAX))
def test_started_in_jax(x64, name, schedule):
    net, opt, scheduler = torch_setup(name, schedule)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(
        opt.state_dict(), params, step=0, **scheduled(opt, scheduler)
    )
    params, state = jax_train(tx, params, state, BEFORE)

    stayed, stayed_opt, stayed_scheduler = torch_setup(name, schedule)
    torch_train(stayed, stayed_opt, stayed_scheduler, BEFORE + AFTER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "scheduler before optimizer"
        for _ in range(BEFORE if scheduler is not None else 0):
            scheduler.step()
    groups = opt.state_dict()["param_groups"]
    opt.load_state_dict(aj.to_torch_state_dict(state, params, groups, tx=tx))
    net.load_state_dict(aj.params_to_torch_state_dict(params, list(net.state_dict())))
    torch_train(net, opt, scheduler, AFTER)
    assert_same_run(net, stayed)


@pytest.mark.slow
def test_exact_correction_survives_a_visit(x64):
    """A visit to PyTorch's dict changes nothing under a cycled b1."""
    _, opt, scheduler = torch_setup("adamw", "onecycle")
    options = scheduled(opt, scheduler) | {"bias_correction": "exact"}
    params = aj.params_from_torch_state_dict(Net().state_dict(), empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(opt.state_dict(), params, **options)
    halfway, state = jax_train(tx, params, state, BEFORE)
    groups = opt.state_dict()["param_groups"]
    dumped = aj.to_torch_state_dict(state, params, groups, tx=tx)
    tx, back = aj.optimizer_from_torch_state_dict(dumped, params, **options)
    stayed, _ = jax_train(tx, halfway, state, AFTER)
    visited, _ = jax_train(tx, halfway, back, AFTER)
    for p, q, p0 in zip(*map(jax.tree.leaves, (visited, stayed, params)), strict=True):
        assert jnp.abs(p - q).max() <= 1e-12 * jnp.abs(q - p0).max()


@pytest.mark.slow
@pytest.mark.parametrize("decoupled", [False, True])
def test_phases_that_drive_the_decay(x64, decoupled):
    """They drive the group that decays."""
    name = "adamw" if decoupled else "adam-l2"
    _, opt, _ = torch_setup(name)
    phases = aj.Phases((aj.Phase(steps=20, learning_rate=LR, weight_decay=(0.5, 0.1)),))
    params = aj.params_from_torch_state_dict(Net().state_dict(), empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(
        opt.state_dict(), params, learning_rate=phases
    )
    ours, state = jax_train(tx, params, state, BEFORE)
    net, opt, _ = torch_setup(name)
    for step in range(BEFORE):
        opt.param_groups[0]["weight_decay"] = phases.at(step)["weight_decay"]
        torch_train(net, opt, None, 1)
    assert_same_run(read_back(ours), net)
    (first, second) = aj.to_torch_state_dict(
        state, params, opt.state_dict()["param_groups"], tx=tx
    )["param_groups"]
    assert first["weight_decay"] == pytest.approx(phases.at(BEFORE)["weight_decay"])
    assert second["weight_decay"] == 0


def test_rates_that_have_reached_zero(x64):
    """The ratio of the groups is then that of their initial rates."""
    net, opt, _ = torch_setup("adamw")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, BEFORE)
    torch_train(net, opt, scheduler, BEFORE)
    assert [group["lr"] for group in opt.param_groups] == [0, 0]
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(
        opt.state_dict(), params, learning_rate=LR
    )
    params, _ = jax_train(tx, params, state, AFTER)
    for group, rate in zip(opt.param_groups, (LR, LR / 2), strict=True):
        group["lr"] = rate
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)


def test_state_dicts_without_decoupled_weight_decay(x64):
    net, opt, _ = torch_setup("adamw")
    torch_train(net, opt, None, 1)
    old = copy.deepcopy(opt.state_dict())
    for group in old["param_groups"]:
        del group["decoupled_weight_decay"]
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    with pytest.raises(ValueError, match="decoupled must be given"):
        aj.optimizer_from_torch_state_dict(old, params)
    tx, state = aj.optimizer_from_torch_state_dict(old, params, decoupled=True)
    params, _ = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)


@pytest.mark.slow
def test_a_custom_optimizer(x64):
    """Groups as an explicit mask and multipliers, after clipping."""
    net, opt, _ = torch_setup("adamw")
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    tx = optax.chain(
        optax.clip_by_global_norm(1e6),
        aj.adamw(
            LR,
            b1=0.8,
            b2=0.99,
            weight_decay=DECAY,
            mask=aj.mask_by_path("kernel$"),
            bias_correction="exact",  # the same for constant betas
        ),
        aj.scale_by_group(
            {"matrix": 1.0, "other": 0.5},
            aj.labels_by_path({"matrix": "kernel$"}, default="other"),
        ),
    )
    state = aj.from_torch_state_dict(opt.state_dict(), tx.init(params), params)
    params, _ = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)


def test_an_overridden_multiplier_is_named():
    """PyTorch's groups would go on with the old ratio of their rates."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.chain(
        aj.adamw(LR), aj.scale_by_group({"x": 0.5, "y": 1.0}, {"a": "x", "b": "y"})
    )
    opt = torch.optim.AdamW(
        [{"params": [torch.ones(2)], "lr": LR / 2}, {"params": [torch.ones(2)]}], LR
    )
    groups, state = opt.state_dict()["param_groups"], tx.init(params)
    state = aj.override_hyperparams(state, group="x", multiplier=0.1)
    with pytest.raises(ValueError, match="multiplier x: is overridden"):
        aj.to_torch_state_dict(state, params, groups, names=["a", "b"])
    state = aj.override_hyperparams(state, group="x", multiplier=None)
    aj.to_torch_state_dict(state, params, groups, names=["a", "b"])


@pytest.mark.parametrize(
    "optimizer", matrix([optax.adamw, optax.sgd], quick=[optax.adamw])
)
def test_optax(x64, lenient, optimizer):
    name = "adamw" if optimizer is optax.adamw else "sgd-momentum"
    net, opt, _ = torch_setup(name, groups=False)
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    rate = optax.piecewise_constant_schedule(2 * LR, {BEFORE: 0.5})  # counts from 0
    if optimizer is optax.adamw:
        tx = optimizer(rate, b1=0.8, b2=0.99, weight_decay=DECAY)
    else:
        tx = optax.chain(optax.add_decayed_weights(DECAY), optimizer(rate, 0.9))
    state = aj.from_torch_state_dict(
        opt.state_dict(), tx.init(params), params, step=BEFORE
    )
    params, state = jax_train(tx, params, state, AFTER)
    halfway = aj.to_torch_state_dict(state, params, opt.state_dict()["param_groups"])
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)
    key = "exp_avg" if optimizer is optax.adamw else "momentum_buffer"
    for number, there in opt.state_dict()["state"].items():
        torch.testing.assert_close(halfway["state"][number][key], there[key])


# ---------------------------------------------------------------------------
# groups
# ---------------------------------------------------------------------------


def test_groups_that_one_optimizer_cannot_serve(x64):
    """Other betas, two decays and amsgrad: `optax.partition`, each at its own rate."""

    def setup():
        net = Net()
        named = dict(net.named_parameters())
        groups = [
            {"params": [("fc1.weight", named.pop("fc1.weight"))], "weight_decay": 0.2},
            {"params": [("fc2.weight", named.pop("fc2.weight"))], "lr": 3e-3},
            {
                "params": [("norm.weight", named.pop("norm.weight"))],
                "betas": (0.5, 0.9),
            },
            {"params": list(named.items()), "amsgrad": True, "lr": 5e-3},
        ]
        return net, torch.optim.AdamW(groups, LR, weight_decay=0.1)

    net, opt = setup()
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    schedule = aj.one_cycle(LR, steps=100).schedule("learning_rate")  # goes on from 7
    tx, state = aj.optimizer_from_torch_state_dict(
        opt.state_dict(), params, learning_rate=schedule
    )
    params, state = jax_train(tx, params, state, AFTER)
    for t in range(BEFORE, BEFORE + AFTER):
        rates = (LR, 3e-3, LR, 5e-3)
        for group, rate in zip(opt.param_groups, rates, strict=True):
            group["lr"] = rate / LR * schedule(t)
        torch_train(net, opt, None, 1)
    assert_same_run(read_back(params), net)
    # And back, with the rates of the next step in the groups.
    groups = opt.state_dict()["param_groups"]
    dumped = aj.to_torch_state_dict(state, params, groups, tx=tx)
    for group, rate in zip(dumped["param_groups"], (LR, 3e-3, LR, 5e-3), strict=True):
        expected = rate / LR * schedule(BEFORE + AFTER)
        assert group["lr"] == pytest.approx(expected, rel=1e-12)
    assert [g["weight_decay"] for g in dumped["param_groups"]] == [0.2, 0.1, 0.1, 0.1]
    assert dumped["param_groups"][2]["betas"] == (0.5, 0.9)


def test_counts_that_differ(x64):
    """A parameter without gradient lags behind in PyTorch, and here too."""
    net, opt, _ = torch_setup("adamw")
    torch_train(net, opt, None, 3, skip=("norm.weight", "norm.bias"))
    torch_train(net, opt, None, 4, skip=("norm.bias",))
    assert len(opt.state_dict()["state"]) == 5  # norm.bias never had a gradient
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))

    with pytest.raises(ValueError) as error:
        aj.from_torch_state_dict(opt.state_dict(), aj.adamw(LR).init(params), params)
    assert "leaf norm/scale: has done 4 steps, most others 7" in str(error.value)
    assert "leaf norm/bias: has done 0 steps, most others 7" in str(error.value)

    tx, state = aj.optimizer_from_torch_state_dict(opt.state_dict(), params)
    params, state = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)
    dumped = aj.to_torch_state_dict(state, params, opt.state_dict()["param_groups"])
    steps = {number: float(s["step"]) for number, s in dumped["state"].items()}
    assert steps == {n: float(s["step"]) for n, s in opt.state_dict()["state"].items()}
    assert sorted(steps.values()) == [9, 13, 16, 16, 16, 16]


def test_counts_stand_still_without_a_gradient(x64):
    """For leaves that had none before, and so have an optimizer of their own."""
    net, opt, _ = torch_setup("adamw")
    torch_train(net, opt, None, 2, skip=("norm.bias",))
    torch_train(net, opt, None, 2)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(opt.state_dict(), params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params, jnp.asarray(X), jnp.asarray(Y))
        grads["norm"]["bias"] = None
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    params, state = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, 3, skip=("norm.bias",))
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)
    dumped = aj.to_torch_state_dict(state, params, opt.state_dict()["param_groups"])
    steps = sorted(int(entry["step"]) for entry in dumped["state"].values())
    assert steps == [2 + AFTER, *(5 * [7 + AFTER])]


def test_a_parameter_without_gradient_in_sgd_has_a_buffer_of_zeros(x64):
    net, opt, _ = torch_setup("sgd-momentum")
    torch_train(net, opt, None, BEFORE, skip=("norm.bias",))
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(
        opt.state_dict(), params, step=BEFORE
    )
    params, _ = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)


def test_parameters_in_no_group_are_frozen(x64):
    net = Net()
    named = [(n, p) for n, p in net.named_parameters() if n.startswith("fc2")]
    opt = torch.optim.AdamW(named, LR)
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    tx, state = aj.optimizer_from_torch_state_dict(opt.state_dict(), params)
    assert len(jax.tree.leaves(state.inner_state.inner_state[0].mu)) == 2
    after, state = jax_train(tx, params, state, AFTER)
    np.testing.assert_array_equal(after["fc1"]["kernel"], params["fc1"]["kernel"])
    torch_train(net, opt, None, AFTER)
    assert_same_run_of(read_back(after).fc2, net.fc2)
    dumped = aj.to_torch_state_dict(state, params, opt.state_dict()["param_groups"])
    assert list(dumped["state"]) == [0, 1]


PLAIN_SGD = [
    {"params": ["fc1.weight"], "weight_decay": 0.3},
    {"params": ["fc2.weight", "norm.weight"], "weight_decay": 0.1, "lr": LR / 3},
    {"params": ["fc1.bias", "fc2.bias", "norm.bias"]},
]


def torch_groups(options, **defaults):
    """A network and SGD with these groups, in which parameters are named."""
    net = Net()
    named = dict(net.named_parameters())
    groups = [
        group | {"params": [(name, named[name]) for name in group["params"]]}
        for group in options
    ]
    return net, torch.optim.SGD(groups, LR, **defaults)


def read_into(net, opt, params, dumped):
    net.load_state_dict(aj.params_to_torch_state_dict(params, list(net.state_dict())))
    opt.load_state_dict(dumped)


@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_without_momentum_and_several_decays(x64, maximize):
    """It has no moments that say which leaves a state trains; there and back."""
    net, opt = torch_groups(PLAIN_SGD, maximize=maximize)
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    there = opt.state_dict()
    tx, state = aj.optimizer_from_torch_state_dict(there, params, step=BEFORE)
    params, state = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)

    dumped = aj.to_torch_state_dict(state, params, there["param_groups"])
    assert dumped["param_groups"] == there["param_groups"]
    state = aj.override_hyperparams(state, learning_rate=2 * LR, weight_decay=0.6)
    dumped = aj.to_torch_state_dict(state, params, there["param_groups"])
    decays = [group["weight_decay"] for group in dumped["param_groups"]]
    assert decays == pytest.approx([0.6, 0.2, 0], rel=1e-14)
    rates = [group["lr"] for group in dumped["param_groups"]]
    assert rates == pytest.approx([2 * LR, 2 * LR / 3, 2 * LR], rel=1e-14)
    net, opt = torch_groups(PLAIN_SGD, maximize=maximize)
    read_into(net, opt, params, dumped)
    torch_train(net, opt, None, AFTER)
    params, _ = jax_train(tx, params, state, AFTER)
    assert_same_run(read_back(params), net)


@pytest.mark.parametrize("form", ["tree", "function"])
def test_labels_say_what_sgd_without_momentum_trains(x64, form):
    """An optimizer that a user has built with `optax.partition`."""
    net, opt = torch_groups(PLAIN_SGD)
    there = opt.state_dict()
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    labels = aj.labels_by_path(
        {"a": "fc1/kernel", "b": "fc2/kernel|norm/scale", "c": "bias"}
    )
    labels = labels(params) if form == "tree" else labels
    parts = {"c": aj.sgd(0.5), "b": aj.sgd(0.25, l2=0.2), "a": aj.sgd(0.125, l2=0.4)}
    tx = optax.partition(parts, labels)
    state = aj.from_torch_state_dict(
        there, tx.init(params), params, step=3, labels=labels
    )
    for label, rate in {"a": LR, "b": LR / 3, "c": LR}.items():
        part = state.inner_states[label]
        assert float(aj.current_hyperparams(part)["learning_rate"]) == rate
    _, state = tx.update(params, state, params)
    dumped = aj.to_torch_state_dict(state, params, there["param_groups"], labels=labels)
    groups = dumped["param_groups"]
    assert [group["lr"] for group in groups] == [0.125, 0.25, 0.5]
    assert [group["weight_decay"] for group in groups] == [0.4, 0.2, 0]
    with pytest.raises(ValueError, match="pass the labels of optax.partition"):
        aj.to_torch_state_dict(state, params, there["param_groups"])


def test_momentum_in_some_groups_only(x64):
    """The state without moments trains what no other state does."""
    groups = [PLAIN_SGD[0] | {"momentum": 0.9}, PLAIN_SGD[1], PLAIN_SGD[2]]
    net, opt = torch_groups(groups)
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    there = opt.state_dict()
    tx, state = aj.optimizer_from_torch_state_dict(there, params, step=BEFORE)
    params, state = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)
    dumped = aj.to_torch_state_dict(state, params, there["param_groups"])
    assert dumped["param_groups"] == there["param_groups"]
    net, opt = torch_groups(groups)
    read_into(net, opt, params, dumped)
    torch_train(net, opt, None, AFTER)
    params, _ = jax_train(tx, params, state, AFTER)
    assert_same_run(read_back(params), net)


# ---------------------------------------------------------------------------
# What is not PyTorch's, or not in one ratio
# ---------------------------------------------------------------------------

# Groups of optimizers that have Adam's or SGD's options and more, mostly timm's.
TORCH_ADAM = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
TORCH_ADAM |= {"amsgrad": False}
TORCH_SGD = {"lr": LR, "momentum": 0.9, "dampening": 0, "weight_decay": 0.0}
TORCH_SGD |= {"nesterov": False}
FOREIGN = {
    "LARS": TORCH_SGD | {"trust_coeff": 0.001, "eps": 1e-8, "trust_clip": False},
    "SGDW": TORCH_SGD | {"caution": False, "maximize": False},
    "SGD with betas": TORCH_SGD | {"capturable": False},
    "AdamW of timm": TORCH_ADAM | {"corrected_weight_decay": False, "caution": True},
    "AdaBelief": TORCH_ADAM | {"weight_decouple": True, "rectify": True},
    "NAdam of timm": TORCH_ADAM | {"schedule_decay": 0.004},
    "apex": TORCH_ADAM | {"bias_correction": True, "step": 7},
}
OPTION = ("trust_coeff, eps, trust_clip", "caution", "capturable")
OPTION += ("corrected_weight_decay, caution", "weight_decouple, rectify")
OPTION += ("schedule_decay", "bias_correction, step")


@pytest.mark.parametrize(("name", "options"), list(zip(FOREIGN, OPTION, strict=True)))
def test_options_that_pytorch_does_not_have(lenient, name, options):
    """They change the update, also before the first one, when there are no moments."""
    params = {"w": jnp.zeros(2)}
    there = {"state": {}, "param_groups": [FOREIGN[name] | {"params": [0]}]}
    tx = aj.sgd(LR, 0.9) if "momentum" in FOREIGN[name] else aj.adam(LR)
    for convert in (
        lambda: aj.from_torch_state_dict(
            there, tx.init(params), params, names=["w"], step=0
        ),
        lambda: aj.optimizer_from_torch_state_dict(
            there, params, names=["w"], step=0, decoupled=False
        ),
        lambda: aj.to_torch_state_dict(
            tx.init(params), params, there["param_groups"], names=["w"]
        ),
    ):
        with pytest.raises(ValueError, match=f"a group with {options}, which") as error:
            convert()
        assert "\n" not in str(error.value)


SCHEDULERS = {
    "none": lambda opt: None,
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(
        opt, [1.0, 0.3], total_steps=30
    ),
    "cyclic": lambda opt: torch.optim.lr_scheduler.CyclicLR(
        opt, [0.1, 0.03], [1.0, 0.3]
    ),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 30),
    "exponential": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
    "warm-up": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=9),
    "steps": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [3, 9]),
    "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "averaging": lambda opt: torch.optim.swa_utils.SWALR(opt, [0.5, 0.15]),
}
NOT_IN_RATIO = {
    "eta_min": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(
        opt, 30, eta_min=1e-3
    ),
    "restarts": lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        opt, 20, eta_min=1e-6
    ),
    "two functions": lambda opt: torch.optim.lr_scheduler.LambdaLR(
        opt, [lambda t: 1.0, lambda t: 0.99**t]
    ),
    "peaks": lambda opt: torch.optim.lr_scheduler.CyclicLR(
        opt, [0.1, 0.03], [1.0, 0.1], cycle_momentum=False
    ),
    "averaging": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.5),
}


def two_rates(cls, make_scheduler, steps, tensor_lr=False):
    """A state dict with groups at .1 and .03, after some steps with a scheduler."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in "ab"]
    rates = [torch.tensor(rate) if tensor_lr else rate for rate in (0.1, 0.03)]
    groups = [
        {"params": [(name, p)], "lr": rate}
        for name, p, rate in zip("ab", parameters, rates, strict=True)
    ]
    opt = cls(groups, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    scheduler = make_scheduler(opt)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.ones(2)
        opt.step()
        if scheduler is not None:
            scheduler.step()
    return opt.state_dict()


def continue_at(there, **kwargs):
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    tx, state = aj.optimizer_from_torch_state_dict(there, params, step=9, **kwargs)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    return updates


DRIVEN = [(name, cls, False) for name in SCHEDULERS for cls in ("Adam", "AdamW", "SGD")]
DRIVEN += [(name, "AdamW", True) for name in SCHEDULERS if name != "averaging"]
QUICK_DRIVEN = [
    *(
        ("none", "AdamW", False),
        ("one cycle", "AdamW", False),
        ("cosine", "SGD", False),
    ),
    *(
        ("cyclic", "Adam", False),
        ("averaging", "SGD", False),
        ("cosine", "AdamW", True),
    ),
]


@pytest.mark.parametrize(
    ("name", "cls", "tensor_lr"), matrix(DRIVEN, quick=QUICK_DRIVEN)
)
def test_all_groups_that_pytorch_makes_are_accepted(x64, lenient, name, cls, tensor_lr):
    there = two_rates(getattr(torch.optim, cls), SCHEDULERS[name], 9, tensor_lr)
    updates = continue_at(there, learning_rate=0.5)
    # Constant gradients: both parameters move in the ratio of their rates.
    ratio = float((updates["b"] / updates["a"])[0])
    assert ratio == pytest.approx(0.3, rel=1e-5 if tensor_lr else 1e-9)


@pytest.mark.parametrize("name", NOT_IN_RATIO)
def test_rates_that_are_not_in_a_constant_ratio(lenient, name):
    there = two_rates(torch.optim.AdamW, NOT_IN_RATIO[name], 9)
    with pytest.raises(ValueError, match="have no constant ratio: they were 0.1 and"):
        continue_at(there, learning_rate=0.5)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    tx = aj.adamw(0.5)
    with pytest.raises(ValueError, match="have no constant ratio"):
        aj.to_torch_state_dict(tx.init(params), params, there["param_groups"], tx=tx)


def test_a_group_that_no_scheduler_drives(lenient):
    there = two_rates(torch.optim.AdamW, SCHEDULERS["exponential"], 9)
    del there["param_groups"][1]["initial_lr"]
    with pytest.raises(ValueError, match="drives only some of the groups"):
        continue_at(there, learning_rate=0.5)


def test_timms_scale_of_the_rate(x64, lenient):
    """timm's schedulers multiply their rate by lr_scale, which initial_lr is not."""
    there = two_rates(torch.optim.AdamW, SCHEDULERS["none"], 9)
    for group, scale in zip(there["param_groups"], (0.5, 0.05), strict=True):
        group |= {"initial_lr": 0.2, "lr_scale": scale, "lr": 0.13 * scale}
    updates = continue_at(there, learning_rate=0.5)
    assert float((updates["b"] / updates["a"])[0]) == pytest.approx(0.1, rel=1e-9)


def test_a_schedule_for_each_group(x64):
    """The way out that the error names continues as PyTorch does."""

    def setup():
        net = Net()
        named = list(net.named_parameters())
        groups = [
            {"params": [(n, p) for n, p in named if p.ndim > 1]},
            {"params": [(n, p) for n, p in named if p.ndim == 1], "lr": LR / 10},
        ]
        opt = torch.optim.AdamW(groups, LR, weight_decay=DECAY)
        return net, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 30, LR / 50)

    net, opt, scheduler = setup()
    torch_train(net, opt, scheduler, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    there = opt.state_dict()
    with pytest.raises(ValueError, match=r"optax\.partition.* from_torch_state_dict"):
        aj.optimizer_from_torch_state_dict(there, params, learning_rate=LR)

    def cosine(peak):
        low = LR / 50
        scale = (peak - low) / 2
        return lambda t: low + scale * (1 + jnp.cos(t.astype(float) * jnp.pi / 30))

    tx = optax.partition(
        {
            label: aj.adamw(cosine(peak), weight_decay=DECAY, bias_correction="torch")
            for label, peak in {"matrix": LR, "vector": LR / 10}.items()
        },
        jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params),
    )
    state = aj.from_torch_state_dict(there, tx.init(params), params)
    params, state = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, scheduler, AFTER)
    assert_same_run(read_back(params), net)
    dumped = aj.to_torch_state_dict(state, params, there["param_groups"], tx=tx)
    for group, expected in zip(dumped["param_groups"], opt.param_groups, strict=True):
        assert group["lr"] == pytest.approx(expected["lr"], rel=1e-12)


def test_moments_without_a_step(x64):
    """fairseq and apex count elsewhere; as the first step it would be far off."""
    net, opt, _ = torch_setup("adamw")
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    there = copy.deepcopy(opt.state_dict())
    for entry in there["state"].values():
        del entry["step"]
    message = r"fc1/kernel: its state has no step, .*\['state'\]\[0\]\['step'\]"
    with pytest.raises(ValueError, match=message):
        aj.optimizer_from_torch_state_dict(there, params)
    with pytest.raises(ValueError, match=message):
        aj.from_torch_state_dict(there, aj.adamw(LR).init(params), params, step=7)
    for entry in there["state"].values():  # as the message says
        entry["step"] = BEFORE
    tx, state = aj.optimizer_from_torch_state_dict(there, params)
    params, _ = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)


def test_parameters_without_a_gradient_have_no_step(lenient):
    there = torch.optim.AdamW([torch.zeros(2)]).state_dict()
    for entry in ({}, {"exp_avg": None, "exp_avg_sq": None}):
        state = from_torch({**there, "state": {0: entry}}, aj.adamw(1.0))
        assert int(state.inner_state[0].count) == 0


def assert_same_run_of(module, stayed):
    for p, q in zip(module.parameters(), stayed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_dampening_that_is_the_momentum(x64):
    net = Net()
    opt = torch.optim.SGD(
        net.named_parameters(), 0.1, momentum=0.9, dampening=0.9, weight_decay=0.1
    )
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(jnp.float64))
    with pytest.raises(ValueError, match="has no momentum_buffer yet"):
        aj.optimizer_from_torch_state_dict(opt.state_dict(), params, step=0)
    torch_train(net, opt, None, BEFORE)
    params = aj.params_from_torch_state_dict(net.state_dict(), params)
    tx, state = aj.optimizer_from_torch_state_dict(
        opt.state_dict(), params, step=BEFORE
    )
    params, _ = jax_train(tx, params, state, AFTER)
    torch_train(net, opt, None, AFTER)
    assert_same_run(read_back(params), net)
    opt.param_groups[0]["dampening"] = 0.5
    with pytest.raises(ValueError, match="dampening=0.5 with momentum=0.9"):
        aj.optimizer_from_torch_state_dict(opt.state_dict(), params, step=1)


def test_capturable_tensors_and_dicts_of_numpy(x64):
    """A rate and betas in tensors, or no tensor at all, mean the same."""
    net, opt, _ = torch_setup("adamw", groups=False)
    torch_train(net, opt, None, 2)
    params = empty(jnp.float64)
    plain = opt.state_dict()
    other = copy.deepcopy(plain)
    other["param_groups"][0]["lr"] = torch.tensor(LR, dtype=torch.float64)
    other["param_groups"][0]["betas"] = tuple(
        torch.tensor(b, dtype=torch.float64) for b in (0.8, 0.99)
    )
    for number, entry in other["state"].items():
        other["state"][number] = {k: v.numpy() for k, v in entry.items()}
    first, second = (
        aj.optimizer_from_torch_state_dict(d, params)[1] for d in (plain, other)
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    dumped = aj.to_torch_state_dict(second, params, plain["param_groups"])
    assert_equal_dicts(dumped, plain)


# ---------------------------------------------------------------------------
# bias correction
# ---------------------------------------------------------------------------


def exact_after(tx, state, params, steps):
    """Updates under a constant gradient: 1 in all steps if the correction is exact."""
    grads = jax.tree.map(jnp.ones_like, params)
    out = []
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(grads, state, params)
        rate = 1.0  # the transformation has none
        out.append(float(jax.tree.leaves(updates)[0].ravel()[0]) * rate)
    return np.array(out)


@pytest.mark.parametrize("form", ["phases", "schedule", "array"])
def test_exact_correction_from_the_history(x64, form):
    """With the history of betas, a state from PyTorch is corrected exactly."""
    total, done = 20, 8
    phases = aj.one_cycle_torch(LR, total)
    b1 = phases.schedule("b1")
    betas = np.array([b1(t) for t in range(done)])
    m = np.zeros(3)
    for beta in betas:  # PyTorch's moment of a constant gradient of 1
        m = beta * m + (1 - beta)
    group = torch.optim.AdamW([torch.zeros(3)]).state_dict()["param_groups"][0]
    group["betas"] = (float(b1(done)), 0.999)
    moments = {"step": done, "exp_avg": m, "exp_avg_sq": np.full(3, 1 - 0.999**done)}
    checkpoint = {"state": {0: moments}, "param_groups": [group]}
    params = {"w": jnp.zeros(3)}

    def tx(mode):
        return aj.with_hyperparams(
            lambda b1, b2: aj.scale_by_adam(b1, b2, 1e-30, bias_correction=mode),
            b1=b1,
            b2=0.999,
        )

    history = {"phases": phases, "schedule": b1, "array": betas}[form]
    state = tx("exact").init(params)
    exact = aj.from_torch_state_dict(checkpoint, state, params, names=["w"], b1=history)
    np.testing.assert_allclose(
        exact_after(tx("exact"), exact, params, total - done), 1, rtol=1e-12
    )
    # Without: the current b1 to the power of the steps, as PyTorch's own correction.
    guessed = aj.from_torch_state_dict(checkpoint, state, params, names=["w"])
    implied = 1 - float(b1(done)) ** (done + 1)
    first = exact_after(tx("exact"), guessed, params, 1)[0]
    m = b1(done) * m[0] + (1 - b1(done))
    assert first == pytest.approx(m / implied, rel=1e-12)
    assert abs(first - 1) > 0.05


def test_the_state_is_that_of_a_run_here(x64):
    """The compensated products too: as after the same number of steps in JAX."""
    params = empty(jnp.float64)
    tx = aj.adamw(LR, b2=0.99999)
    _, state = jax_train(tx, params, tx.init(params), 1000)
    group = torch.optim.AdamW([torch.zeros(1)], LR, (0.9, 0.99999)).state_dict()
    (group,) = group["param_groups"]
    names = ["fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "fc2.weight"]
    names.append("fc2.bias")
    group["params"], group["weight_decay"] = list(range(6)), 1e-4
    dumped = aj.to_torch_state_dict(state, params, [group], names=names)
    back = aj.from_torch_state_dict(dumped, tx.init(params), params, names=names)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(back), strict=True
    ):
        if "lost" in jax.tree_util.keystr(path):
            np.testing.assert_allclose(a, b, atol=1e-12)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-12, err_msg=str(path))


@pytest.mark.parametrize("beta", [0.9, 0.99999, 0.0])
def test_products_of_betas_are_compensated(beta):
    """In float32 the rounding error of the sum of logarithms is carried along."""
    there, steps = one(["w"], step=1000.0), 1000
    there["param_groups"][0]["betas"] = (beta, beta)
    state = from_torch(there, aj.adamw(1.0)).inner_state[0]
    for product in (state.log_b1, state.log_b2):
        ours = float(product.total) - float(product.lost)
        assert product.total.dtype == jnp.float32
        if beta:
            assert ours == pytest.approx(steps * np.log(beta), rel=1e-13)
        else:  # not quite the logarithm of zero
            assert np.exp(ours) == 0


# ---------------------------------------------------------------------------
# bits
# ---------------------------------------------------------------------------


def assert_equal_dicts(ours, theirs):
    """Every bit of every tensor, every key and value of every group."""
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for number, entry in theirs["state"].items():
        assert list(ours["state"][number]) == list(entry)
        for key, tensor in entry.items():
            our = ours["state"][number][key]
            assert our.dtype == tensor.dtype and our.shape == tensor.shape
            width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[our.itemsize]
            assert torch.equal(our.view(width), tensor.contiguous().view(width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_round_trip(lenient, name, dtype):
    with jax.enable_x64(dtype == torch.float64):
        net, opt, _ = torch_setup(name, dtype=dtype)
        torch_train(net, opt, None, 3)
        theirs = opt.state_dict()
        params = empty(jnp.dtype(str(dtype).removeprefix("torch.")))
        _, state = aj.optimizer_from_torch_state_dict(theirs, params, step=3)
        ours = aj.to_torch_state_dict(state, params, theirs["param_groups"])
        assert_equal_dicts(ours, theirs)
        weights = aj.params_from_torch_state_dict(net.state_dict(), params)
        back = aj.params_to_torch_state_dict(weights, list(net.state_dict()))
        assert all(torch.equal(back[n], p) for n, p in net.state_dict().items())


def test_round_trip_in_bfloat16(lenient):
    """bfloat16 moments are stored in float32 here, and cast back without loss."""
    net, opt, _ = torch_setup("amsgradw", dtype=torch.bfloat16)
    torch_train(net, opt, None, 3)
    theirs = copy.deepcopy(opt.state_dict())
    params = empty(jnp.bfloat16)
    weights = aj.params_from_torch_state_dict(net.state_dict(), params)
    back = aj.params_to_torch_state_dict(weights, list(net.state_dict()))
    assert all(torch.equal(back[n], p) for n, p in net.state_dict().items())
    _, state = aj.optimizer_from_torch_state_dict(theirs, params)
    assert (
        {leaf.dtype for leaf in jax.tree.leaves(state.inner_state[0].mu)}
        == {jnp.float32}
        if isinstance(state, aj.HyperparamsState)
        else True
    )
    opt.load_state_dict(aj.to_torch_state_dict(state, params, theirs["param_groups"]))
    assert_equal_dicts(opt.state_dict(), theirs)


def test_moments_stored_in_bfloat16(lenient):
    """Values that fit are stored; values that would be rounded are refused."""
    params = {"w": jnp.zeros(3)}
    group = torch.optim.AdamW([torch.zeros(3)]).state_dict()["param_groups"]
    tx = aj.adamw(LR, mu_dtype=jnp.bfloat16)
    for value, fits in ((1.5, True), (1.001, False)):
        m = np.full(3, value, np.float32)
        d = {
            "state": {0: {"step": 1, "exp_avg": m, "exp_avg_sq": m}},
            "param_groups": group,
        }
        if not fits:
            with pytest.raises(ValueError, match="leaf w: exp_avg has dtype float32"):
                aj.from_torch_state_dict(d, tx.init(params), params, names=["w"])
            continue
        state = aj.from_torch_state_dict(d, tx.init(params), params, names=["w"])
        dumped = aj.to_torch_state_dict(state, params, group, names=["w"])
        assert dumped["state"][0]["exp_avg"].dtype == torch.bfloat16
        assert dumped["state"][0]["exp_avg"].tolist() == [1.5] * 3


@st.composite
def layouts(draw):
    """A permutation of the axes, a reversal of some, another shape."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, max_side=3))
    axes = draw(st.permutations(range(len(shape))))
    flips = (
        draw(st.lists(st.sampled_from(range(len(shape))), unique=True)) if shape else []
    )
    flat = draw(st.booleans())

    def from_torch(path, array):
        array = np.flip(array, flips).transpose(axes)
        return array.reshape(-1) if flat else array

    def to_torch(path, array):
        there = array.reshape([shape[axis] for axis in axes])
        return np.flip(there.transpose(np.argsort(axes)), flips)

    return shape, aj.Layout(from_torch, to_torch)


@examples(40)
@given(layouts(), st.data())
def test_any_layout(shape_and_layout, data):
    """Any bits, NaN and -0.0 too, survive the round trip in any layout."""
    shape, layout = shape_and_layout
    bits = hnp.arrays(np.float32, shape, elements=st.floats(width=32))
    moments = {"step": np.float32(3), "exp_avg": data.draw(bits)}
    moments["exp_avg_sq"] = data.draw(bits)
    group = torch.optim.AdamW([torch.zeros(shape)]).state_dict()["param_groups"]
    there = {"state": {0: moments}, "param_groups": group}
    params = {"w": jnp.zeros(layout.from_torch("w", np.zeros(shape)).shape)}
    state = aj.adamw(1e-3, weight_decay=1e-2).init(params)
    state = aj.from_torch_state_dict(there, state, params, names=["w"], layout=layout)
    back = aj.to_torch_state_dict(state, params, group, names=["w"], layout=layout)
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in moments.items()}
    assert_equal_dicts(back, {"state": {0: tensors}, "param_groups": group})


@pytest.mark.parametrize("axes", [2, 3, 4, 5])
def test_layout_of_flax(axes):
    """The convolutions of both libraries, with their own kernels, agree."""
    rng = np.random.default_rng(axes)
    space = (3,) * (axes - 2)
    weight = rng.normal(size=(5, 4, *space)).astype(np.float32)
    x = rng.normal(size=(2, 4, *space)).astype(np.float32)
    kernel = aj.flax_layout.from_torch("conv/kernel", weight)
    assert kernel.shape == (*space, 4, 5)
    np.testing.assert_array_equal(
        aj.flax_layout.to_torch("conv/kernel", kernel), weight
    )
    assert aj.flax_layout.from_torch("conv/bias", weight) is weight
    conv = {2: F.linear, 3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[axes]
    theirs = conv(torch.tensor(x), torch.tensor(weight)).numpy()
    ours = np.tensordot(
        np.moveaxis(x, 1, -1), kernel, axes=[range(1, axes), range(axes - 1)]
    )
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-5)


def test_no_memory_is_shared(lenient):
    """PyTorch updates in place: neither library may see the other's steps."""
    net, opt, _ = torch_setup("adamw", dtype=torch.float32, groups=False)
    torch_train(net, opt, None, 1)
    params = aj.params_from_torch_state_dict(net.state_dict(), empty())
    _, state = aj.optimizer_from_torch_state_dict(opt.state_dict(), params)
    before = jax.tree.map(np.array, (params, state))
    dumped = aj.to_torch_state_dict(state, params, opt.state_dict()["param_groups"])
    opt.load_state_dict(dumped)
    with torch.no_grad():
        for name, tensor in aj.params_to_torch_state_dict(
            params, list(net.state_dict())
        ).items():
            tensor.zero_()
            net.get_parameter(name).zero_()
        for entry in (*dumped["state"].values(), *opt.state.values()):
            for tensor in entry.values():
                tensor.fill_(9)
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves((params, state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_arrays_keep_the_sharding_of_the_state(lenient):
    """A state on two devices stays on them."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    params = {"w": jax.device_put(jnp.zeros(4), sharding)}
    opt = torch.optim.AdamW([torch.zeros(4)])
    moments = {"step": 1, "exp_avg": np.arange(4.0), "exp_avg_sq": np.ones(4)}
    there = opt.state_dict() | {"state": {0: moments}}
    state = aj.adamw(LR).init(params)
    assert state.inner_state[0].mu["w"].sharding == sharding
    state = aj.from_torch_state_dict(there, state, params, names=["w"])
    assert state.inner_state[0].mu["w"].sharding == sharding
    assert not state.inner_state[0].count.committed


# ---------------------------------------------------------------------------
# Names, current values, Flax
# ---------------------------------------------------------------------------


def one(path_names, leaf_shape=(2,), **moments):
    """A checkpoint of AdamW with the same moments for each name."""
    opt = torch.optim.AdamW([torch.zeros(leaf_shape) for _ in path_names])
    entry = {
        "step": 5.0,
        "exp_avg": np.ones(leaf_shape),
        "exp_avg_sq": np.ones(leaf_shape),
    }
    return opt.state_dict() | {
        "state": {i: entry | moments for i in range(len(path_names))}
    }


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("features.0", "Conv_0"),
        {"features.0.weight": "Conv_0/kernel", "features.0.bias": "Conv_0.bias"},
    ],
)
def test_rename(rename):
    params = {"Conv_0": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}}
    names = ["features.0.weight", "features.0.bias"]
    state = aj.from_torch_state_dict(
        one(names), aj.adamw(1e-3).init(params), params, names=names, rename=rename
    )
    assert int(state.inner_state[0].count) == 5
    assert aj.to_torch_state_dict(
        state, params, one(names)["param_groups"], names=names, rename=rename
    )["state"].keys() == {0, 1}


def test_our_own_paths_in_pytorchs_order():
    params = {"b": jnp.zeros(2), "a": jnp.zeros(3)}
    there = one(["x", "y"])
    there["state"][1] = {"step": 5, "exp_avg": np.ones(3), "exp_avg_sq": np.ones(3)}
    state = aj.from_torch_state_dict(
        there, aj.adamw(1e-3).init(params), params, names=["b", "a"]
    )
    assert state.inner_state[0].mu["a"].shape == (3,)


def test_nnx(lenient):
    """A network of Flax NNX by its own names, and the state of nnx.Optimizer."""

    class Flax(nnx.Module):
        def __init__(self, rngs):
            self.fc1 = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.LayerNorm(5, rngs=rngs)
            self.fc2 = nnx.Linear(5, 3, rngs=rngs)

    net, opt, _ = torch_setup("adamw", dtype=torch.float32)
    torch_train(net, opt, None, 2)
    flax = Flax(nnx.Rngs(0))
    params = nnx.state(flax, nnx.Param)
    nnx.update(flax, aj.params_from_torch_state_dict(net.state_dict(), params))
    np.testing.assert_array_equal(
        flax.fc1.kernel[...], net.fc1.weight.detach().numpy().T
    )
    holder = nnx.Optimizer(flax, aj.adamw(LR), wrt=nnx.Param)
    there = opt.state_dict()
    holder.opt_state = nnx.data(
        aj.from_torch_state_dict(there, holder.opt_state, params)
    )
    back = aj.to_torch_state_dict(holder.opt_state, params, there["param_groups"])
    assert list(back["state"]) == list(range(6))
    number = back["param_groups"][0]["params"][0]
    assert torch.equal(
        back["state"][number]["exp_avg"], there["state"][number]["exp_avg"]
    )
    holder.update(flax, jax.tree.map(jnp.ones_like, params))


def test_current_values():
    """The checkpoint's before the first update, the schedule's after it."""
    params = {"w": jnp.zeros(2)}
    there = one(["w"])
    there["param_groups"][0] |= {"lr": 0.5, "betas": (0.7, 0.8), "weight_decay": 0.25}
    tx = aj.adamw(aj.one_cycle(1e-2, steps=10))
    state = aj.from_torch_state_dict(there, tx.init(params), params, names=["w"])
    read = {k: float(v) for k, v in aj.current_hyperparams(state).items()}
    expected = {"b1": 0.7, "b2": 0.8, "learning_rate": 0.5, "weight_decay": 0.25}
    assert read == pytest.approx(expected, rel=1e-6)
    _, state = tx.update(params, state, params)
    assert np.isfinite(state.last_values).all()
    now = aj.one_cycle(1e-2, steps=10).at(5)  # of the update that was done
    assert float(aj.current_hyperparams(state)["learning_rate"]) == pytest.approx(
        now["learning_rate"], rel=1e-6
    )


@pytest.mark.parametrize("scheduled", [False, True])
def test_values_of_the_next_step(scheduled):
    """With tx those of its schedules and overrides; without it those of the state."""
    params = {"w": jnp.zeros(2)}
    cycle = aj.one_cycle(1e-2, steps=10)
    tx = aj.adamw(cycle if scheduled else 1e-2)
    groups = one(["w"])["param_groups"]
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)

    def export(state, **options):
        (group,) = aj.to_torch_state_dict(
            state, params, groups, names=["w"], **options
        )["param_groups"]
        return {"learning_rate": group["lr"], "b1": group["betas"][0]}

    def values(step):
        return cycle.at(step) if scheduled else {"learning_rate": 1e-2, "b1": 0.9}

    assert export(state) == pytest.approx(values(3), rel=1e-6)
    assert export(state, tx=tx) == pytest.approx(values(4), rel=1e-6)
    state = aj.override_hyperparams(state, learning_rate=0.5)
    for options in ({}, {"tx": tx}):
        assert export(state, **options)["learning_rate"] == 0.5


def test_an_override_survives():
    params = {"w": jnp.zeros(2)}
    state = aj.override_hyperparams(aj.adamw(1e-3).init(params), learning_rate=0.125)
    state = aj.from_torch_state_dict(one(["w"]), state, params, names=["w"])
    assert float(aj.current_hyperparams(state)["learning_rate"]) == 0.125
    dumped = aj.to_torch_state_dict(
        state, params, one(["w"])["param_groups"], names=["w"]
    )
    assert dumped["param_groups"][0]["lr"] == 0.125


# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_in_one_error():
    params = {"a": jnp.zeros(2), "b": jnp.zeros((2, 2)), "new": jnp.zeros(1)}
    there = one(["a", "b", "old"], max_exp_avg_sq=np.ones(2))
    del there["state"][0]["exp_avg_sq"]
    with pytest.raises(ValueError) as error:
        aj.from_torch_state_dict(
            there, aj.adamw(1e-3).init(params), params, names=["a", "b", "old"]
        )
    for line in (
        "parameter old: there is no leaf old",
        "leaf new: no parameter has this name",
        "leaf a: there is no exp_avg_sq",
        "leaf b: exp_avg has shape (2,), expected (2, 2)",
        "leaf a: PyTorch has max_exp_avg_sq of a, for which the state has no place",
    ):
        assert f"\n  {line}" in str(error.value)


def from_torch(there, tx, params=None, **kwargs):
    params = {"w": jnp.zeros(2)} if params is None else params
    kwargs = {"names": ["w"]} | kwargs
    return aj.from_torch_state_dict(there, tx.init(params), params, **kwargs)


def sgd_dict(**options):
    return torch.optim.SGD([torch.zeros(2)], **options).state_dict()


def of_group(**options):
    there = one(["w"])
    there["param_groups"][0] |= options
    return there


def two_groups(key, first, second):
    groups = [{"params": [torch.zeros(2)], key: value} for value in (first, second)]
    return torch.optim.AdamW(groups).state_dict()


REFUSED = {
    "leaf w: has a step, which PyTorch's SGD does not": lambda: from_torch(
        sgd_dict(momentum=0.9)
        | {"state": {0: {"step": 3, "momentum_buffer": np.ones(2)}}},
        aj.sgd(1.0, 0.9),
        step=3,
    ),
    "names must be given": lambda: from_torch(one(["w"]), aj.adamw(1.0), names=None),
    "names must be 1 names": lambda: from_torch(
        one(["w"]), aj.adamw(1.0), names=["w", "v"]
    ),
    "one for each parameter in the groups, got w": lambda: from_torch(
        one(["w"]), aj.adamw(1.0), names="w"
    ),
    "leaf w is already taken": lambda: from_torch(
        one(["w", "w"]), aj.adamw(1.0), names=["w", "w"]
    ),
    "could be leaf kernel or scale: use rename": lambda: from_torch(
        one(["w"]), aj.adamw(1.0), {"kernel": jnp.zeros(2), "scale": jnp.zeros(2)},
        names=["weight"],
    ),
    "parameter 7: has a state, but is in no group": lambda: from_torch(
        one(["w"]) | {"state": {7: {}}}, aj.adamw(1.0)
    ),
    "step must be given": lambda: from_torch(sgd_dict(), aj.sgd(1.0)),
    "step must be an integer >= 0, got -1": lambda: from_torch(
        one(["w"]), aj.adamw(1.0), step=-1
    ),
    "leaf w: step must be an integer >= 0, got 1.5": lambda: from_torch(
        {**one(["w"]), "state": one(["w"], step=1.5)["state"]}, aj.adamw(1.0)
    ),
    "must be those of PyTorch's Adam, AdamW or SGD": lambda: from_torch(
        torch.optim.NAdam([torch.zeros(2)]).state_dict(), aj.adamw(1.0)
    ),
    "the state is of Adam, PyTorch's group of SGD": lambda: from_torch(
        sgd_dict(), aj.adamw(1.0), step=0
    ),
    "the state is of SGD, PyTorch's group of Adam": lambda: from_torch(
        one(["w"]), aj.sgd(1.0, 0.9)
    ),
    "the state has nu_max, but PyTorch's amsgrad is False": lambda: from_torch(
        one(["w"]), aj.amsgrad(1.0)
    ),
    "the state has no nu_max, but PyTorch's amsgrad is True": lambda: from_torch(
        of_group(amsgrad=True), aj.adamw(1.0)
    ),
    "state mini_step: is of a transformation that PyTorch": lambda: from_torch(
        one(["w"]), optax.MultiSteps(aj.adamw(1.0), 2)
    ),
    "leaf w: PyTorch has exp_avg of w, for which": lambda: from_torch(
        one(["w", "v"]),
        aj.freeze_leaves(aj.adamw(1.0), {"w": True, "v": False}),
        {"w": jnp.zeros(2), "v": jnp.zeros(2)},
        names=["w", "v"],
    ),
    r"b1 must be a number or one for each of the 5 steps": lambda: from_torch(
        one(["w"]), aj.adamw(1.0), b1=[0.9, 0.8]
    ),
    r"b2 must be in \[0, 1\) in the steps done": lambda: from_torch(
        one(["w"]), aj.adamw(1.0), b2=1.0
    ),
    "layout does not undo itself": lambda: from_torch(
        one(["w"]), aj.adamw(1.0),
        layout=aj.Layout(lambda path, a: a[::-1], lambda path, a: a),
    ),
    "layout fails for PyTorch's shape": lambda: from_torch(
        one(["w"]), aj.adamw(1.0),
        layout=aj.Layout(lambda path, a: a.reshape(3), lambda path, a: a),
    ),
    "without weight_decay, which differs": lambda: aj.optimizer_from_torch_state_dict(
        two_groups("weight_decay", 0.1, 0.2),
        {"v": jnp.zeros(2), "w": jnp.zeros(2)},
        names=["v", "w"],
        learning_rate=aj.Phases((aj.Phase(steps=3, learning_rate=1, weight_decay=1),)),
    ),
    "without b1, which differs": lambda: aj.optimizer_from_torch_state_dict(
        two_groups("betas", (0.9, 0.9), (0.8, 0.9)),
        {"v": jnp.zeros(2), "w": jnp.zeros(2)},
        names=["v", "w"],
        learning_rate=aj.one_cycle(1.0, steps=10),
    ),
    "learning_rate must be given": lambda: aj.optimizer_from_torch_state_dict(
        of_group(initial_lr=1.0), {"w": jnp.zeros(2)}, names=["w"]
    ),
    "phases that do not set it": lambda: aj.optimizer_from_torch_state_dict(
        one(["w"]),
        {"w": jnp.zeros(2)},
        names=["w"],
        learning_rate=aj.Phases((aj.Phase(steps=3, b1=0.5),)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(lenient, message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def to_torch(tx, groups, params=None, **kwargs):
    params = {"w": jnp.zeros(2)} if params is None else params
    _, state = tx.update(params, tx.init(params), params)
    return aj.to_torch_state_dict(state, params, groups, **{"names": ["w"]} | kwargs)


ADAMW = one(["w"])["param_groups"]
REFUSED_BACK = {
    "leaf v: has moments, but no parameter": lambda: to_torch(
        aj.adamw(1.0), ADAMW, {"w": jnp.zeros(2), "v": jnp.zeros(2)}
    ),
    "leaf w: the state has mu twice": lambda: to_torch(
        optax.chain(aj.scale_by_adam(), aj.scale_by_adam()), ADAMW
    ),
    "the state has nu_max, but": lambda: to_torch(aj.amsgrad(1.0), ADAMW),
    "the state is of SGD": lambda: to_torch(aj.sgd(1.0, 0.9), ADAMW),
    "weight_decay 0.5, which is 0 in all": lambda: to_torch(
        aj.adamw(1.0, weight_decay=0.5), of_group(weight_decay=0.0)["param_groups"]
    ),
    "state mini_step: is of a transformation": lambda: to_torch(
        optax.MultiSteps(aj.adamw(1.0), 2), ADAMW
    ),
    "tx must be given, because a scheduler": lambda: to_torch(
        aj.adamw(1.0), of_group(initial_lr=1.0)["param_groups"]
    ),
    "layout does not undo itself for shape": lambda: to_torch(
        aj.adamw(1.0), ADAMW, layout=aj.Layout(lambda p, a: a[::-1], lambda p, a: a)
    ),
}


@pytest.mark.parametrize("message", REFUSED_BACK)
def test_refused_back(lenient, message):
    with pytest.raises(ValueError, match=message):
        REFUSED_BACK[message]()


def test_without_pytorch(lenient, monkeypatch):
    """Reading a checkpoint needs no PyTorch."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    params = {"w": jnp.zeros(2)}
    tx = aj.adamw(1e-3)
    state = aj.from_torch_state_dict(CHECKPOINT, tx.init(params), params, names=["w"])
    assert int(state.step) == 5
    with pytest.raises(ImportError):
        aj.to_torch_state_dict(state, params, ADAMW, names=["w"])


CHECKPOINT = one(["w"])
