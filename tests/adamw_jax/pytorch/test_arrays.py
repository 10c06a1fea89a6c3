"""Tensors that NumPy does not know, or that have not all their values."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import adamw_jax as aj


def read(tensor, dtype=jnp.float32):
    leaf = jnp.zeros(tensor.shape, dtype)
    return aj.params_from_torch_state_dict({"w": tensor}, {"w": leaf})["w"]


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32", "int64", "bool"],
)
def test_dtypes_that_fit_into_float32(dtype):
    tensor = torch.tensor([0.0, 1.0, -0.5, 3.0]).to(getattr(torch, dtype))
    np.testing.assert_array_equal(read(tensor), tensor.to(torch.float32).numpy())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.requires_grad_(),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.nn.Parameter(x),
        lambda x: torch.view_as_real(torch.view_as_complex(x).conj().resolve_conj()),
        lambda x: torch.imag(torch.view_as_complex(x).conj())[:, None],
    ],
)
def test_views_and_gradients(make):
    tensor = make(torch.arange(6.0).reshape(3, 2))
    expected = tensor.detach().resolve_neg().numpy()
    np.testing.assert_array_equal(read(tensor), expected)


def test_a_tensor_without_values():
    with pytest.raises(ValueError, match="leaf w: w is on PyTorch's meta device"):
        read(torch.zeros(2, device="meta"))


# ---------------------------------------------------------------------------
# DTensor
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file that the first of two processes wrote; read without any."""
    import torch.distributed as dist
    from torch.distributed import tensor as dt
    from torch.testing._internal.distributed.fake_pg import FakeStore

    x = torch.arange(8.0).reshape(4, 2)
    path = tmp_path_factory.mktemp("dtensor") / "checkpoint.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            mesh = dt.init_device_mesh("cpu", (2,))
            parts = {
                "replicated": dt.DTensor.from_local(x, mesh, [dt.Replicate()]),
                "sharded": dt.DTensor.from_local(x[:2], mesh, [dt.Shard(0)]),
                "summed": dt.DTensor.from_local(x, mesh, [dt.Partial()]),
            }
            torch.save(parts, path)
        finally:
            dist.destroy_process_group()
        return aj.load_torch_checkpoint(path)


def of_adamw(moment):
    opt = torch.optim.AdamW([torch.zeros(4, 2)]).state_dict()
    entry = {"step": torch.tensor(2.0), "exp_avg": moment, "exp_avg_sq": moment}
    return opt | {"state": {0: entry}}


@pytest.mark.slow
def test_a_dtensor_that_is_whole(lenient, saved):
    x = np.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(read(saved["replicated"]), x)
    params = {"w": jnp.zeros((4, 2))}
    _, state = aj.optimizer_from_torch_state_dict(
        of_adamw(saved["replicated"]), params, names=["w"]
    )
    np.testing.assert_array_equal(state.inner_state[0].nu["w"], x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [("sharded", r"\(2, 2\) of \(4, 2\)"), ("summed", "a partial sum")],
)
def test_a_dtensor_of_which_a_part_is_here(lenient, saved, name, part):
    problem = f"is a DTensor, of which this process has {part}: save its full_tensor"
    with pytest.raises(ValueError, match=f"leaf w: w {problem}"):
        read(saved[name])
    params = {"w": jnp.zeros((4, 2))}
    with pytest.raises(ValueError, match=f"leaf w: exp_avg_sq {problem}"):
        aj.optimizer_from_torch_state_dict(of_adamw(saved[name]), params, names=["w"])


@pytest.mark.slow
def test_fully_sharded_with_one_process(lenient, tmp_path):
    """All that FSDP2 has in memory and writes, in a process group and without it."""
    import torch.distributed as dist
    from torch.distributed import tensor as dt
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard

    params = {"layers": {"0": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            net = torch.nn.Sequential(torch.nn.Linear(2, 3))
            fully_shard(net, mesh=dt.init_device_mesh("cpu", (1,)))
            opt = torch.optim.AdamW(net.parameters())
            net(torch.tensor([[1.0, 2.0]])).square().sum().backward()
            opt.step()
            whole = {"model": net.state_dict(), "optimizer": opt.state_dict()}
            torch.save(whole, tmp_path / "checkpoint.pt")
            options = dcp.StateDictOptions(full_state_dict=True)
            full = dcp.get_optimizer_state_dict(net, opt, options=options)
            _, expected = aj.optimizer_from_torch_state_dict(full, params)
        finally:
            dist.destroy_process_group()
        saved = aj.load_torch_checkpoint(tmp_path / "checkpoint.pt")
    assert type(saved["model"]["0.weight"]) is dt.DTensor
    weights = aj.params_from_torch_state_dict(saved["model"], params)
    np.testing.assert_array_equal(
        weights["layers"]["0"]["kernel"], saved["model"]["0.weight"].to_local().T
    )
    _, state = aj.optimizer_from_torch_state_dict(
        saved["optimizer"], params, names=saved["model"]
    )
    mu = state.inner_state[0].mu["layers"]["0"]
    assert float(mu["kernel"].max()) != 0
    for key, x in expected.inner_state[0].mu["layers"]["0"].items():
        np.testing.assert_array_equal(mu[key], x)
