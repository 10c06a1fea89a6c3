"""Names behind prefixes and in other places, and in what order."""

import copy
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen
from hypothesis import given
from tiers import examples

import adamw_jax as aj

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
WEIGHTS = {
    "conv.weight": np.arange(54.0).reshape(2, 3, 3, 3),
    "blocks.0.fc.weight": np.arange(6.0).reshape(3, 2),
    "blocks.0.fc.bias": np.arange(3.0),
}


def empty():
    fc = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    return {"conv": {"kernel": jnp.zeros((3, 3, 3, 2))}, "blocks": [{"fc": fc}]}


def assert_read(params):
    """Every value, in Flax's layout."""
    kernel = WEIGHTS["conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv"]["kernel"], kernel)
    fc = params["blocks"][0]["fc"]
    np.testing.assert_array_equal(fc["kernel"], WEIGHTS["blocks.0.fc.weight"].T)
    np.testing.assert_array_equal(fc["bias"], WEIGHTS["blocks.0.fc.bias"])


def prefixed(prefix, weights=WEIGHTS):
    return {prefix + name: x for name, x in weights.items()}


# ---------------------------------------------------------------------------
# prefixes
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_prefixes_in_any_order(count):
    for prefixes in itertools.permutations(PREFIXES, count):
        weights = prefixed("".join(prefixes))
        assert_read(aj.params_from_torch_state_dict(weights, empty()))
    repeated = prefixed("module.module.net.model.module.")
    assert_read(aj.params_from_torch_state_dict(repeated, empty()))


PARTS = st.sampled_from(["model", "net", "module", "layers", "layers_0", "0", "1", "a"])


@examples(100)
@given(
    st.sets(st.lists(PARTS, max_size=3).map(tuple), min_size=1, max_size=5),
    st.lists(st.sampled_from(PREFIXES), max_size=3).map("".join),
)
def test_any_names_behind_any_prefixes(modules, prefix):
    """Every leaf gets the value of its own name, if names look like prefixes too."""
    params, weights, expected = {}, {}, {}
    for value, module in enumerate(sorted(modules)):
        leaf = params
        for part in module:
            leaf = leaf.setdefault(part, {})
        leaf["kernel"] = jnp.zeros(1)
        weights[prefix + ".".join([*module, "weight"])] = np.full(1, value)
        expected["/".join([*module, "kernel"])] = value
    read = aj.params_from_torch_state_dict(weights, params)
    values = {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(x[0])
        for path, x in jax.tree_util.tree_leaves_with_path(read)
    }
    assert values == expected


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "net.model."])
@pytest.mark.parametrize("own", ["model", "net"])
def test_a_name_that_starts_like_a_prefix(own, prefix):
    """It stays where the leaves have it too, also behind real prefixes."""
    weights = prefixed(f"{prefix}{own}.")
    assert_read(aj.params_from_torch_state_dict(weights, {own: empty()})[own])


def test_a_prefix_that_some_names_have_is_not_removed():
    weights = prefixed("model.") | {"loss.weight": np.ones(2)}
    with pytest.raises(ValueError) as error:
        aj.params_from_torch_state_dict(weights, empty())
    assert "parameter model.conv.weight: there is no leaf" in str(error.value)
    assert "with p = 'model.'" in str(error.value)
    params = aj.params_from_torch_state_dict(weights, empty(), skip="loss")
    assert_read(params)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_wrappers_of_modules_inside(wrapper):
    """`torch.compile`, FSDP and activation checkpointing of each block."""
    weights = {
        name.replace("blocks.0.", f"blocks.0.{wrapper}."): x
        for name, x in WEIGHTS.items()
    }
    assert_read(aj.params_from_torch_state_dict(weights, empty()))
    weights = prefixed("module.", weights)
    assert_read(aj.params_from_torch_state_dict(weights, empty()))


class Compiled(torch.nn.Module):
    """The names of what `torch.compile` returns, whose import takes seconds."""

    def __init__(self, net):
        super().__init__()
        self._orig_mod = net


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, Compiled, lambda net: net])
def test_averages_of_wrapped_networks(wrap):
    """`AveragedModel` puts `module.` before all and counts in `n_averaged`."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    averaged = torch.optim.swa_utils.AveragedModel(wrap(net), use_buffers=True)
    averaged.update_parameters(wrap(net))
    state_dict = averaged.state_dict()
    assert "n_averaged" in state_dict and not any(
        n in state_dict for n in ("0.weight",)
    )
    leaf = jnp.zeros(3)
    params = [
        {"kernel": jnp.zeros((2, 3)), "bias": leaf},
        {"scale": leaf, "bias": leaf, "mean": leaf, "var": leaf + 5},
    ]
    read = aj.params_from_torch_state_dict(state_dict, params)
    np.testing.assert_array_equal(read[0]["kernel"], net[0].weight.detach().numpy().T)
    np.testing.assert_array_equal(read[1]["var"], np.ones(3))


def test_rename_sees_names_without_prefixes():
    weights = prefixed("module._orig_mod.")
    params = {"body": empty()}

    def function(name):
        return f"body.{name}"

    table = {name: f"body.{name}" for name in WEIGHTS}
    full = {f"module._orig_mod.{name}": f"body/{name}" for name in WEIGHTS}
    for rename in (function, table, full):
        read = aj.params_from_torch_state_dict(weights, params, rename=rename)
        assert_read(read["body"])


def test_prefixes_on_the_way_back():
    """The names of the wrapped network, as `load_state_dict` of it expects."""
    params = aj.params_from_torch_state_dict(WEIGHTS, empty())
    names = list(prefixed("module._orig_mod."))
    back = aj.params_to_torch_state_dict(params, names)
    assert list(back) == names
    for name, x in prefixed("module._orig_mod.").items():
        np.testing.assert_array_equal(back[name], x)


# ---------------------------------------------------------------------------
# hints
# ---------------------------------------------------------------------------


def message(weights, params, **kwargs):
    with pytest.raises(ValueError) as error:
        aj.params_from_torch_state_dict(weights, params, **kwargs)
    return str(error.value)


def test_moco():
    """Two networks of the same names: the error says how to take one."""
    weights = prefixed("module.encoder_q.") | prefixed("module.encoder_k.")
    weights |= {"module.queue": np.ones((2, 4)), "module.queue_ptr": np.zeros(1)}
    text = message(weights, empty())
    hint = text.splitlines()[-1]
    assert hint.startswith(
        "The names fit without 'module.encoder_q.', or without 'module.encoder_k.' (3 "
        "of 3 leaves): pass {"
    )
    comprehension, _, assignment = hint.partition("pass ")[2].partition(" with ")
    names = {"state_dict": weights}
    exec(assignment, names)
    assert_read(aj.params_from_torch_state_dict(eval(comprehension, names), empty()))


@pytest.mark.parametrize("prefix", ["teacher.backbone.", "backbone.", "encoder.net."])
def test_one_prefix_of_all(prefix):
    """DINO's, and any other: rename does it."""
    hint = message(prefixed(prefix), empty()).splitlines()[-1]
    rename = eval(hint.partition("pass rename=")[2])
    read = aj.params_from_torch_state_dict(prefixed(prefix), empty(), rename=rename)
    assert_read(read)


def test_a_prefix_that_the_leaves_have():
    hint = message(WEIGHTS, {"body": empty()}).splitlines()[-1]
    assert "with 'body/' before them (3 of 3)" in hint
    rename = eval(hint.partition("pass rename=")[2])
    read = aj.params_from_torch_state_dict(WEIGHTS, {"body": empty()}, rename=rename)
    assert_read(read["body"])


def test_no_hint_where_little_would_fit():
    text = message({"a.b": np.ones(2), "a.c": np.ones(2)}, empty())
    assert "The names fit" not in text


# ---------------------------------------------------------------------------
# what only Flax has
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("flax", ["layers/0", "layers_0", "0"])
@pytest.mark.parametrize("inside", ["", "features."])
def test_sequential(flax, inside):
    """PyTorch's `0.weight` in a list, in nnx.Sequential and in Linen's."""
    params = leaf = {}
    for key in f"{inside.replace('.', '/')}{flax}".split("/"):
        leaf[key] = leaf = {}
    leaf |= {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    fc = {f"{inside}0.weight": np.ones((3, 2)), f"{inside}0.bias": np.full(3, 2.0)}
    read = aj.params_from_torch_state_dict(fc, params)
    assert sorted(float(x.max()) for x in _leaves(read)) == [1.0, 2.0]


def test_variables_of_linen(lenient):
    """Parameters and statistics, in collections."""

    class Flax(linen.Module):
        def setup(self):
            self.stem = linen.Sequential([linen.Dense(3), linen.relu])
            self.norm = linen.BatchNorm(use_running_average=True)

        def __call__(self, x):
            return self.norm(self.stem(x))

    net = torch.nn.ModuleDict(
        {"stem": torch.nn.Sequential(torch.nn.Linear(2, 3)), "norm": _norm()}
    )
    variables = jax.eval_shape(Flax().init, jax.random.key(0), jnp.ones((1, 2)))
    read = aj.params_from_torch_state_dict(net.state_dict(), variables)
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    theirs = net.eval()["norm"](torch.relu(net["stem"](x))).detach()
    ours = Flax().apply(read, jnp.array(x))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    back = aj.params_to_torch_state_dict(read, net.state_dict())
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in back.items())


def _norm():
    norm = torch.nn.BatchNorm1d(3)
    for i, x in enumerate(norm.state_dict().values()):
        x.copy_(torch.arange(x.numel()).reshape(x.shape) + i + 1)
    return norm


def test_an_index_prefers_the_leaf_of_its_name():
    params = {"0": {"bias": jnp.zeros(2)}, "layers": {"0": {"bias": jnp.zeros(2)}}}
    weights = {"0.bias": np.ones(2), "layers.0.bias": np.full(2, 3.0)}
    read = aj.params_from_torch_state_dict(weights, params)
    assert float(read["0"]["bias"][0]) == 1
    assert float(read["layers"]["0"]["bias"][0]) == 3


def _leaves(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


# ---------------------------------------------------------------------------
# parameters of optimizers
# ---------------------------------------------------------------------------

NAMES = ["fc.weight", "fc.bias", "norm.weight", "norm.bias"]
SHAPES = [(3, 2), (3,), (4,), (4,)]


def leaves():
    return {
        "fc": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
        "norm": {"scale": jnp.zeros(4), "bias": jnp.zeros(4)},
    }


def trained(cls=torch.optim.AdamW, groups=False, **options):
    """Parameters with different moments after two steps, and the optimizer's dict."""
    tensors = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    params = tensors
    if groups:  # as nanoGPT: with and without decay
        options |= {"lr": 1e-3}
        params = [
            {"params": [p for p in tensors if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in tensors if p.ndim == 1], "weight_decay": 0.0},
        ]
    opt = cls(params, **options)
    for i, p in enumerate(tensors):
        p.grad = torch.arange(p.numel()).reshape(p.shape) + 10.0 * i
    opt.step()
    opt.step()
    return tensors, opt.state_dict()


def mu_of(state_dict, **kwargs):
    _, state = aj.optimizer_from_torch_state_dict(state_dict, leaves(), **kwargs)
    return state.inner_state[0].mu


def assert_moments(mu, state_dict, numbers=range(4)):
    entries = [state_dict["state"][number]["exp_avg"].numpy() for number in numbers]
    np.testing.assert_array_equal(mu["fc"]["kernel"], entries[0].T)
    np.testing.assert_array_equal(mu["fc"]["bias"], entries[1])
    np.testing.assert_array_equal(mu["norm"]["scale"], entries[2])
    np.testing.assert_array_equal(mu["norm"]["bias"], entries[3])


def test_prefixes_in_the_names_of_parameters(lenient):
    _, there = trained()
    for prefix in ("module.", "net._orig_mod."):
        assert_moments(mu_of(there, names=[prefix + name for name in NAMES]), there)
    named = copy.deepcopy(there)
    named["param_groups"][0]["param_names"] = ["module." + name for name in NAMES]
    assert_moments(mu_of(named), there)


def test_names_from_the_state_dict_of_the_network(lenient):
    """It has buffers and tied copies, which the optimizer does not have."""
    tensors, there = trained()
    weights = dict(zip(NAMES, tensors, strict=True))
    weights |= {"norm.running_mean": torch.zeros(4), "norm.running_var": torch.ones(4)}
    weights |= {"norm.num_batches_tracked": torch.tensor(2)}
    assert_moments(mu_of(there, names=list(weights)), there)
    weights["head.weight"] = weights["fc.weight"]
    assert_moments(mu_of(there, names=weights), there)
    saved = {name: x.detach() for name, x in weights.items()}
    assert_moments(mu_of(there, names=saved), there)
    with pytest.raises(ValueError, match="got 5: pass .*named_parameters"):
        mu_of(there, names=list(weights))


def test_names_in_the_dict(lenient):
    """FSDP's and torch.distributed.checkpoint's have names in place of numbers."""
    _, there = trained(groups=True)
    order = NAMES
    name = dict(enumerate(order))
    named = {
        "state": {name[number]: entry for number, entry in there["state"].items()},
        "param_groups": [
            group | {"params": [name[number] for number in group["params"]]}
            for group in there["param_groups"]
        ],
    }
    assert_moments(mu_of(named), there)
    tx, state = aj.optimizer_from_torch_state_dict(named, leaves())
    back = aj.to_torch_state_dict(state, leaves(), named["param_groups"])
    assert list(back["state"]) == order
    assert back["param_groups"] == named["param_groups"]
    for key, entry in named["state"].items():
        for moment, x in entry.items():
            assert torch.equal(back["state"][key][moment], x)

    flat = {
        f"state.{key}.{moment}": x
        for key, entry in named["state"].items()
        for moment, x in entry.items()
    }
    for group in named["param_groups"]:
        for key in group["params"]:
            options = {k: v for k, v in group.items() if k != "params"}
            flat |= {f"param_groups.{key}.{k}": v for k, v in options.items()}
    assert_moments(mu_of(flat), there)
    assert_moments(
        aj.from_torch_state_dict(flat, tx.init(leaves()), leaves()).inner_state[0].mu,
        there,
    )


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_checkpoint(lenient, flat):
    from torch.distributed.checkpoint import state_dict as dcp

    net = torch.nn.ModuleDict(
        {"fc": torch.nn.Linear(2, 3), "norm": torch.nn.LayerNorm(4)}
    )
    opt = torch.optim.AdamW(
        [
            {"params": list(net["fc"].parameters()), "weight_decay": 0.1},
            {"params": list(net["norm"].parameters()), "weight_decay": 0.0},
        ]
    )
    for i, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    opt.step()
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    theirs = dcp.get_optimizer_state_dict(net, opt, options=options)
    assert_moments(mu_of(theirs), opt.state_dict())
    tx, _ = aj.optimizer_from_torch_state_dict(theirs, leaves())
    other, _ = aj.optimizer_from_torch_state_dict(
        opt.state_dict(), leaves(), names=NAMES
    )
    for ours in (tx, other):  # the decay is that of the groups
        params = aj.params_from_torch_state_dict(net.state_dict(), leaves())
        updates, _ = ours.update(leaves(), ours.init(params), params)
        expected = -1e-3 * 0.1 * net["fc"].bias.detach().numpy()
        np.testing.assert_allclose(updates["fc"]["bias"], expected, rtol=1e-6)
        np.testing.assert_array_equal(updates["norm"]["scale"], np.zeros(4))


@pytest.mark.parametrize("function", ["optimizer", "state"])
def test_names_in_another_order(lenient, function):
    _, there = trained()

    def convert(names):
        if function == "optimizer":
            return aj.optimizer_from_torch_state_dict(there, leaves(), names=names)[1]
        state = aj.adamw(1e-3).init(leaves())
        return aj.from_torch_state_dict(there, state, leaves(), names=names)

    assert_moments(convert(NAMES).inner_state[0].mu, there)
    with pytest.raises(ValueError) as error:
        convert(NAMES[::-1])
    assert str(error.value) == (
        "names must be in the order of PyTorch's groups, the names of the first group "
        "first, which is another order: the moments at the place of norm.bias have "
        "shape (3, 2), the leaf norm/bias (4,)"
    )


def test_names_in_the_order_of_the_network(lenient):
    """The groups have the matrices first, as with and without decay."""
    _, there = trained(groups=True)
    order = ["fc.bias", "fc.weight", "norm.weight", "norm.bias"]
    with pytest.raises(ValueError, match="they fit with the vectors last"):
        mu_of(there, names=order)


def test_another_network_is_no_order(lenient):
    _, there = trained()
    params = leaves() | {"norm": {"scale": jnp.zeros(5), "bias": jnp.zeros(5)}}
    with pytest.raises(ValueError) as error:
        aj.optimizer_from_torch_state_dict(there, params, names=NAMES)
    assert "leaf norm/scale: exp_avg has shape (4,), expected (5,)" in str(error.value)
    assert "Are names in the order of PyTorch's groups?" in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        lambda net: list(net.named_parameters()),
        lambda net: net.named_parameters(),
        lambda net: list(net.parameters()),
    ],
)
def test_names_that_are_no_names(names):
    _, there = trained()
    with pytest.raises(ValueError, match=r"got a (tuple|Parameter): pass \[name for"):
        mu_of(there, names=names(torch.nn.Linear(2, 2)))


# ---------------------------------------------------------------------------
# parts of an optimizer
# ---------------------------------------------------------------------------


def adamw_by_hand(p, grads, lr=1e-3, decay=0.01):
    """PyTorch's AdamW from the start, in float64."""
    m = v = np.zeros(np.shape(p))
    for t, g in enumerate(grads, 1):
        p = p * (1 - lr * decay)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - lr * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


def test_another_head_in_an_optimizer(lenient):
    """It starts at its first gradient; the others go on."""
    _, there = trained()
    params = jax.tree.map(jnp.ones_like, leaves())
    params["norm"] = {"scale": jnp.ones(7), "bias": jnp.ones(7)}
    tx, state = aj.optimizer_from_torch_state_dict(
        there, params, names=NAMES, skip="norm"
    )
    update = jax.jit(tx.update)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
    for _ in range(2):
        updates, state = update(grads, state, params)
        params = aj.apply_updates(params, updates)
    expected = adamw_by_hand(np.ones(7), [0.5, 0.5])
    np.testing.assert_allclose(params["norm"]["scale"], expected, rtol=1e-6)
    before = np.arange(3) + 10.0  # the gradient of both steps there
    there_alone = adamw_by_hand(np.zeros(3), [before, before], decay=0)
    both = adamw_by_hand(np.zeros(3), [before, before, 0.5, 0.5], decay=0)
    expected = (1 - 1e-5) ** 2 + both - there_alone  # the decay of the 1 here
    np.testing.assert_allclose(params["fc"]["bias"], expected, rtol=1e-6)

    back = aj.to_torch_state_dict(
        state, params, there["param_groups"], names=NAMES, skip="norm"
    )
    steps = [int(entry["step"]) for entry in back["state"].values()]
    assert steps == [4, 4, 2, 2]


def test_parameters_that_are_not_here(lenient):
    """As MoCo's other encoder; in PyTorch they have no state afterwards."""
    _, there = trained()
    params = {"fc": leaves()["fc"]}
    with pytest.raises(ValueError, match=r"parameter norm\.weight: there is no leaf"):
        aj.optimizer_from_torch_state_dict(there, params, names=NAMES)
    _, state = aj.optimizer_from_torch_state_dict(
        there, params, names=NAMES, skip="norm"
    )
    mu = state.inner_state[0].mu
    np.testing.assert_array_equal(mu["fc"]["bias"], there["state"][1]["exp_avg"])
    back = aj.to_torch_state_dict(
        state, params, there["param_groups"], names=NAMES, skip="norm"
    )
    assert list(back["state"]) == [0, 1]
    assert back["param_groups"] == there["param_groups"]


def test_a_skipped_leaf_needs_a_group(lenient):
    _, there = trained()
    params = {"fc": leaves()["fc"], "head": {"bias": jnp.zeros(7)}}
    for skip in (["norm", "head"], ["norm", "^head/"]):
        with pytest.raises(ValueError, match="leaf head/bias: is skipped, but has no"):
            aj.optimizer_from_torch_state_dict(there, params, names=NAMES, skip=skip)
    _, state = aj.optimizer_from_torch_state_dict(
        there, params, names=NAMES, skip="norm", rename={"norm.bias": "head/bias"}
    )
    moments = jax.tree.leaves(state)
    assert sorted(x.shape for x in moments if x.ndim)[-1] == (7,)
