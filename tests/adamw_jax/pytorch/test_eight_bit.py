"""Eight-bit moments across the border: bitsandbytes' state in and out, ours out.

The state below was written by bitsandbytes 0.50.2. Independent references: PyTorch's
AdamW on the same gradients, and the parameters after bitsandbytes' next step.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiers import matrix

import adamw_jax as aj
from adamw_jax import Blocks

# AdamW8bit(lr=1e-2, weight_decay=.1, min_8bit_size=16) after 3 steps of `gradients`.
CODES = {
    "state1": (
        "644759c86ec8a95c99245aaa3bbf9a58d7a1a0a0c7c49ec7c5774450c53e5794d63f5dc9633965a948"
        "a55d9a4b46a097a2a3a591893dc156bba5654fbf51a65d9150c15d5b4b5040a66d55663d3d5aaa649a"
        "bd483d435c3ea2b35632479b586ca1afb6665ba2395c3c4dba3baea7afb7c344a46cc5aa5fa29ac0b5"
        "55a95f39a8c64bffab524e5bceacb8abc54d6e9b3cb356466d95af6e9cca466467cd33a3c3b8205d3e"
        "38bec253aea2b6433e553a3a4f55d391a6bd47a4bd4f3ebfa4c1bebc39925eaea455a59f4ac15c474d"
        "a2a73ea1c7c19f5a4cc25d9ebcabadb6ae5347885a5c5db0dab3cd9e5b5091ab6060a3d43dc440be5e"
        "4448b4a33da5905a9f47acd3a036bd3e28395726c3c00094a75040555d550bb6436628389f27c0575a"
        "50a05b51c7a8c35c6597c230bf"
    ),
    "state2": (
        "1e29224c335a20120e981b20503f0c238140100f51451f59490c3d1f4443451f8646147f1b64222342"
        "15131d2b2c1c211515120f074b36282937152042252312112347121126214144101e293f38281f1632"
        "2a284e4633420e2e587f230c1c11603c2a462022521f412d295931202841472a293c59202012214224"
        "23201545425224ff29202b205f1f3721432c070c3f2515291c141f220c5439600e6c56114b269f2945"
        "4c3542242b27282d4d17425a26198310163f2c1d4c214437204a2d304f0f2d211e301f0a2536274322"
        "21203b1d4d472a2e274c201f402026361f2139141520102b8422592a192e142212201f804157422b2f"
        "272b26234e2032274c3f3c800e4d345771483f884544ff2d1943373f621ebe5b285c8a4a3c8c442c20"
        "7f3243274d214621262c5a8b31"
    ),
}
ABSMAX = {
    "absmax1": [3.117607593536377, 1.6207882165908813],
    "absmax2": [1.0488839149475098, 0.2710379362106323],
}
SMALL = {
    "state1": [0.1159, 0.2570, -0.3300, -0.2299],
    "state2": [0.0117, 0.0151, 0.0098, 0.0213],
}
GROUP = {
    **{"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.1},
    **{"alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": [0, 1]},
}
INDICES = [0, 1, 150, 299]  # some of the 300 elements, before and after the fourth step
BEFORE = [-0.7785738110542297, -1.2933037281, 0.0128557737916708, 1.0335475206375122]
AFTER = [-0.777625560760498, -1.2962946891784668, 0.018340732902288437, 1.0257201194763]
NAMES = ["fc.weight", "fc.bias"]


def dynamic_map(signed):
    """bitsandbytes' functional.create_dynamic_map, in float64."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values).astype(np.float32)


def drawn():
    """The parameters at the start, and the gradients of four steps."""
    rng = np.random.default_rng(5)
    params = [rng.normal(size=s).astype(np.float32) for s in ((3, 100), (4,))]

    def draw(shape):
        return (np.exp(rng.normal(size=shape)) * rng.normal(size=shape)).astype("f")

    return params, [[draw((3, 100)), draw((4,))] for _ in range(4)]


def entry():
    new = {"step": 3}
    for i, signed in (("1", True), ("2", False)):
        codes = np.frombuffer(bytes.fromhex(CODES["state" + i]), np.uint8)
        new["state" + i] = torch.from_numpy(codes.copy()).reshape(3, 100)
        new["qmap" + i] = torch.from_numpy(dynamic_map(signed))
        new["absmax" + i] = torch.tensor(ABSMAX["absmax" + i])
    return new


def checkpoint(wrapped=True, **changes):
    """As bitsandbytes writes it: newer versions wrap the tensors in a dict."""
    small = {"step": 3, **{k: torch.tensor(v) for k, v in SMALL.items()}}
    states = {0: {**entry(), **changes}, 1: small}
    if wrapped:
        for i, state in states.items():
            step = state.pop("step")
            states[i] = {"step": step, "__bnb_optimizer_quant_state__": state}
    return {"state": states, "param_groups": [copy.deepcopy(GROUP)]}


def torch_adamw(steps, dtype=torch.float32):
    params, grads = drawn()
    params = [torch.nn.Parameter(torch.from_numpy(p).to(dtype)) for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for k in range(steps):
        for p, g in zip(params, grads[k], strict=True):
            p.grad = torch.from_numpy(g).to(dtype)
        optimizer.step()
    return optimizer, [p.detach().numpy() for p in params]


def tree(params):
    return {"fc": {"kernel": jnp.asarray(params[0].T), "bias": jnp.asarray(params[1])}}


# ---------------------------------------------------------------------------
# bitsandbytes to us
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", matrix([True, False], quick=[True]))
def test_the_moments_are_those_of_pytorch_rounded(wrapped):
    """Three times rounded to the nearest code, by at most half of the widest gap."""
    params = tree(drawn()[0])
    state = aj.from_torch_state_dict(
        checkpoint(wrapped), aj.adamw(1e-2).init(params), params, names=NAMES
    )
    adam = state.inner_state[0]
    assert adam.count == 3 and state.step == 3
    exact = torch_adamw(3)[0].state_dict()["state"]
    for i, moment, name in (("1", adam.mu, "exp_avg"), ("2", adam.nu, "exp_avg_sq")):
        found = np.asarray(moment["fc"]["kernel"]).T.astype(np.float64)
        scale = np.repeat(ABSMAX["absmax" + i], 256)[:300].reshape(3, 100)
        table = dynamic_map(i == "1").astype(np.float64)
        error = np.abs(found - exact[0][name].numpy())
        assert (error <= 3 * np.diff(table).max() / 2 * scale).all()
        codes = np.frombuffer(bytes.fromhex(CODES["state" + i]), np.uint8)
        expected = table[codes].reshape(3, 100) * scale
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_array_equal(
            moment["fc"]["bias"], np.float32(SMALL["state" + i])
        )


@pytest.mark.parametrize("quantized", matrix([False, True], quick=[False]))
def test_the_next_step_is_that_of_bitsandbytes(quantized):
    """Exactly from decoded moments, and to our codes' precision from our codes."""
    params, grads = drawn()
    params[0].ravel()[INDICES] = BEFORE
    p, g = tree(params), tree(grads[3])
    tx, state = aj.optimizer_from_torch_state_dict(checkpoint(), p, names=NAMES)
    if quantized:
        tx = aj.quantize_moments(aj.adamw(1e-2, weight_decay=0.1), min_size=16)
        state = aj.from_torch_state_dict(checkpoint(), tx.init(p), p, names=NAMES)
        assert state.count == 3
        assert isinstance(state.inner_state.inner_state[0].mu["fc"]["kernel"], Blocks)
    updates, _ = jax.jit(tx.update)(g, state, p)
    new = np.asarray(aj.apply_updates(p, updates)["fc"]["kernel"]).T.ravel()[INDICES]
    # Steps are 1e-2 large. Ours decays first; bitsandbytes' decay is the same there.
    tolerance = 6e-4 if quantized else 1e-6
    np.testing.assert_allclose(new, AFTER, rtol=0, atol=tolerance)


def test_one_scale_for_all_elements():
    """block_wise=False of older versions: one scale a moment, max1 and max2."""
    state = entry()
    whole = {name: state[name] for name in ("step", "state1", "state2")}
    whole |= {name: state[name] for name in ("qmap1", "qmap2")}
    whole |= {f"max{i}": torch.tensor([2.0 * i]) for i in (1, 2)}
    whole |= {f"new_max{i}": torch.tensor([77.0]) for i in (1, 2)}
    old = checkpoint(False)
    old["state"][0] = whole
    del old["param_groups"][0]["alpha"]  # nor had it these
    params = tree(drawn()[0])
    tx, state = aj.optimizer_from_torch_state_dict(old, params, names=NAMES)
    codes = np.frombuffer(bytes.fromhex(CODES["state2"]), np.uint8).reshape(3, 100)
    np.testing.assert_array_equal(
        np.asarray(state.inner_state[0].nu["fc"]["kernel"]).T,
        np.float32(4.0) * dynamic_map(False)[codes],
    )


def test_blocks_of_2048():
    """As in version 0.41."""
    n, table = 5000, dynamic_map(True)
    codes = np.arange(n, dtype=np.uint8)
    scale = np.array([1.0, 2.0, 4.0], np.float32)
    state = {"step": 1}
    for i in "12":
        state |= {f"state{i}": codes, f"qmap{i}": table, f"absmax{i}": scale}
    old = {"state": {0: state}, "param_groups": [{**GROUP, "params": [0]}]}
    params = {"w": jnp.zeros(n)}
    _, state = aj.optimizer_from_torch_state_dict(old, params, names=["w"])
    expected = table[codes] * 2.0 ** (np.arange(n) // 2048)
    np.testing.assert_array_equal(state.inner_state[0].mu["w"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"absmax1": torch.ones(3)}, r"absmax1 must have one value .* 300 elements"),
        ({"qmap2": torch.ones(16)}, r"qmap2 must have 256 values, got \(16,\)"),
        ({"unorm_vec": torch.ones(1)}, "unorm_vec is LAMB's or LARS's"),
        ({"gnorm_vec": torch.ones(100)}, "gnorm_vec is of percentile_clipping"),
        ({"state3": torch.ones(1)}, "state3 is not in the state"),
        (
            {"state1": torch.ones(3, 100, dtype=torch.int32)},
            "state1 must be uint8 or float32, got int",
        ),
        (
            {"state1": torch.zeros(100, 3, dtype=torch.uint8).T},
            "state1 is not contiguous",
        ),
    ],
)
def test_states_that_do_not_fit(changes, message):
    params = tree(drawn()[0])
    with pytest.raises(ValueError, match=f"parameter 0: {message}"):
        aj.optimizer_from_torch_state_dict(checkpoint(**changes), params, names=NAMES)


def test_other_optimizers_of_bitsandbytes():
    params = tree(drawn()[0])
    lion = checkpoint(False)
    for state in lion["state"].values():
        for name in [name for name in state if name.endswith("2")]:
            del state[name]
    with pytest.raises(ValueError, match=r"the state has step, state1.* \(of SGD"):
        aj.optimizer_from_torch_state_dict(lion, params, names=NAMES)
    for change in ({"alpha": 5.0}, {"betas": (0.9, 0.999, 0.9999)}):
        mix = checkpoint()
        mix["param_groups"][0].update(change)
        with pytest.raises(ValueError, match=r"group of \[0, 1\]: .* AdEMAMix's"):
            aj.optimizer_from_torch_state_dict(mix, params, names=NAMES)


# ---------------------------------------------------------------------------
# us to PyTorch and to bitsandbytes
# ---------------------------------------------------------------------------


@functools.cache
def quantized_run():
    """Three steps with our eight-bit moments, and its transformation."""
    params, grads = drawn()
    tx = aj.quantize_moments(
        aj.adamw(1e-2, weight_decay=0.1), min_size=16, stochastic_rounding=False
    )
    p = tree(params)
    state, update = tx.init(p), jax.jit(tx.update)
    for k in range(3):
        updates, state = update(tree(grads[k]), state, p)
        p = aj.apply_updates(p, updates)
    return tx, state, p


def test_our_state_goes_to_pytorch_decoded():
    """And PyTorch's next step is ours."""
    tx, state, p = quantized_run()
    optimizer, params = torch_adamw(3)
    groups = optimizer.state_dict()["param_groups"]
    for options in ({}, {"tx": tx}):
        torch_dict = aj.to_torch_state_dict(state, p, groups, names=NAMES, **options)
    moments = state.inner_state.inner_state[0]
    for slot, name in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        found = torch_dict["state"][0][name]
        assert found.dtype == torch.float32
        expected = aj.dequantize_blockwise(getattr(moments, slot)["fc"]["kernel"])
        np.testing.assert_array_equal(found, expected.T)
    optimizer.load_state_dict(torch_dict)
    for parameter, value, grad in zip(
        optimizer.param_groups[0]["params"],
        (p["fc"]["kernel"].T, p["fc"]["bias"]),
        drawn()[1][3],
        strict=True,
    ):
        parameter.data = torch.from_numpy(np.array(value))
        parameter.grad = torch.from_numpy(grad)
    optimizer.step()
    updates, _ = tx.update(tree(drawn()[1][3]), state, p)
    ours = np.asarray(aj.apply_updates(p, updates)["fc"]["kernel"]).T
    theirs = optimizer.param_groups[0]["params"][0].detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_our_codes_come_back():
    """Ours to PyTorch's float32 and back is the same state, code for code."""
    tx, state, p = quantized_run()
    groups = torch_adamw(0)[0].state_dict()["param_groups"]
    torch_dict = aj.to_torch_state_dict(state, p, groups, names=NAMES)
    back = aj.from_torch_state_dict(torch_dict, tx.init(p), p, names=NAMES)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    ours, found = (x.inner_state.inner_state[0] for x in (state, back))
    for slot in ("mu", "nu"):
        old, new = (getattr(x, slot)["fc"]["kernel"] for x in (ours, found))
        np.testing.assert_array_equal(new.codes, old.codes)
        np.testing.assert_allclose(new.scale, old.scale, rtol=1e-6)


def test_encoding_is_that_of_bitsandbytes():
    """Its own codes come back, and other values go to the nearest code.

    In the second block mu is largest at a negative value, whose code is -.993 of the
    scale, so that this block has another scale afterwards.
    """
    params = tree(drawn()[0])
    tx, state = aj.optimizer_from_torch_state_dict(checkpoint(), params, names=NAMES)
    groups = torch_adamw(0)[0].state_dict()["param_groups"]
    torch_dict = aj.to_torch_state_dict(state, params, groups, names=NAMES)
    found = aj.encode_bitsandbytes(torch_dict, min_8bit_size=16)
    assert found["param_groups"] == [GROUP]
    for name, value in entry().items():
        if name in ("state1", "absmax1"):
            new, value = (np.ravel(x) for x in (found["state"][0][name], value))
            count = 256 if name == "state1" else 1
            np.testing.assert_array_equal(new[:count], value[:count])
        else:
            assert np.array_equal(found["state"][0][name], value), name
    assert found["state"][0]["state1"].dtype == torch.uint8
    assert torch.equal(found["state"][1]["state2"], torch.tensor(SMALL["state2"]))

    optimizer, _ = torch_adamw(3)
    exact = optimizer.state_dict()
    found = aj.encode_bitsandbytes(exact, min_8bit_size=16)["state"][0]
    for i, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        x, table = exact["state"][0][name].numpy().ravel(), dynamic_map(i == "1")
        scale = np.repeat([np.abs(x[:256]).max(), np.abs(x[256:]).max()], 256)[:300]
        nearest = np.abs(table[None] * scale[:, None] - x[:, None]).argmin(1)
        np.testing.assert_array_equal(found["state" + i].ravel(), nearest)


def test_positive_second_moments_stay_positive():
    exact = torch_adamw(1)[0].state_dict()
    exact["state"][0]["exp_avg_sq"][0, :2] = torch.tensor([1e-20, 0.0])
    found = aj.encode_bitsandbytes(exact, min_8bit_size=16)["state"][0]
    assert found["state2"][0, :2].tolist() == [1, 0]


@pytest.mark.parametrize(
    "change", [{"amsgrad": True}, {"maximize": True}, {"decoupled_weight_decay": False}]
)
def test_optimizers_that_bitsandbytes_does_not_have(change):
    exact = torch_adamw(1)[0].state_dict()
    exact["param_groups"][0].update(change)
    with pytest.raises(ValueError, match="state_dict must be that of AdamW"):
        aj.encode_bitsandbytes(exact)
    moments = exact["state"][0]
    del moments["exp_avg_sq"]
    sgd = {"state": {0: moments}, "param_groups": []}
    with pytest.raises(
        ValueError, match="parameter 0 must have exp_avg and exp_avg_sq"
    ):
        aj.encode_bitsandbytes(sgd)


@pytest.mark.slow
def test_in_an_optimizer_of_nnx(lenient):
    """Its state consists of Variables, those of blocks too."""
    net = nnx.Linear(100, 3, rngs=nnx.Rngs(0))
    tx = aj.quantize_moments(aj.adamw(1e-2, weight_decay=0.1), min_size=16)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    params = nnx.state(net, nnx.Param)
    sd = checkpoint()
    sd["state"][1]["__bnb_optimizer_quant_state__"] = {
        name: value[:3]
        for name, value in sd["state"][1].pop("__bnb_optimizer_quant_state__").items()
    }
    names = ["weight", "bias"]
    old = optimizer.opt_state
    filled = aj.from_torch_state_dict(sd, old, params, names=names)
    assert jax.tree.structure(filled) == jax.tree.structure(old)
    groups = torch_adamw(0)[0].state_dict()["param_groups"]
    back = aj.to_torch_state_dict(filled, params, groups, names=names)
    exact = torch_adamw(3)[0].state_dict()["state"][0]["exp_avg"].numpy()
    error = np.abs(back["state"][0]["exp_avg"].numpy() - exact).max()
    assert error < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_with_bitsandbytes_itself():
    """Where it is installed: ours continues there, and theirs here."""
    bnb = pytest.importorskip("bitsandbytes")
    params, grads = drawn()
    reference, _ = torch_adamw(3)
    parameters = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    optimizer = bnb.optim.AdamW8bit(
        parameters, lr=1e-2, weight_decay=0.1, min_8bit_size=16
    )
    encoded = aj.encode_bitsandbytes(reference.state_dict(), min_8bit_size=16)
    optimizer.load_state_dict(encoded)
    written = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().numpy().copy() for p in parameters]
    for p, g in zip(parameters, grads[3], strict=True):
        p.grad = torch.from_numpy(g)
    optimizer.step()
    p = tree(before)
    tx, state = aj.optimizer_from_torch_state_dict(written, p, names=NAMES)
    updates, _ = jax.jit(tx.update)(tree(grads[3]), state, p)
    new = np.asarray(aj.apply_updates(p, updates)["fc"]["kernel"]).T
    np.testing.assert_allclose(new, parameters[0].detach().numpy(), rtol=0, atol=1e-6)
