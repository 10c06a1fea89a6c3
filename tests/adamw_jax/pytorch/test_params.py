"""Parameters of another network in part: skipped, tied, of another shape."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import adamw_jax as aj


class Net(torch.nn.Module):
    """A body with a buffer, and a head."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(classes)
        self.body = torch.nn.Linear(4, 5)
        self.register_buffer("mask", torch.ones(5, dtype=torch.bool))
        self.head = torch.nn.Linear(5, classes)


def empty(classes=3, head="head"):
    return {
        "body": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(5)},
        head: {"kernel": jnp.full((5, classes), 7.0), "bias": jnp.full(classes, 7.0)},
    }


def assert_body(params, net):
    np.testing.assert_array_equal(params["body"]["kernel"], net.body.weight.detach().T)
    np.testing.assert_array_equal(params["body"]["bias"], net.body.bias.detach())


def assert_old_head(params, head="head"):
    assert {float(x.min()) for x in params[head].values()} == {7.0}


# ---------------------------------------------------------------------------
# skip
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 10])
def test_another_head(classes):
    """Skipped by its name here, there, or both; of the same shape too."""
    net = Net()
    for skip in (["^mask$", r"^head\."], ["^mask$", "^head/"], "mask|head", "mask|h.*"):
        params = empty(classes)
        read = aj.params_from_torch_state_dict(net.state_dict(), params, skip=skip)
        assert_body(read, net)
        assert_old_head(read)
        assert jax.tree.structure(read) == jax.tree.structure(params)


def test_a_head_of_another_name():
    net = Net()
    read = aj.params_from_torch_state_dict(
        net.state_dict(), empty(10, "fc"), skip=["mask", r"head\.", "^fc/"]
    )
    assert_body(read, net)
    assert_old_head(read, "fc")


def test_all_else_must_fit():
    weights = Net().state_dict() | {"body.extra": torch.ones(2)}
    del weights["body.bias"]
    with pytest.raises(ValueError) as error:
        aj.params_from_torch_state_dict(weights, empty(10), skip="mask")
    lines = str(error.value).splitlines()[1:-1]
    assert lines == [
        "  parameter body.extra: there is no leaf body/extra",
        "  leaf body/bias: no parameter has this name",
        "  leaf head/bias: head.bias has shape (3,), expected (10,)",
        "  leaf head/kernel: head.weight has shape (5, 3), expected (5, 10)",
    ]


def test_patterns_that_match_nothing():
    for skip in ("ead", ["mask", "haed"], "head.weigh", "", "x*"):
        with pytest.raises(ValueError, match="skip has '.*', which matches no part"):
            aj.params_from_torch_state_dict(Net().state_dict(), empty(), skip=skip)
    with pytest.raises(ValueError, match=r"skip has '\[', which is no regular"):
        aj.params_from_torch_state_dict(Net().state_dict(), empty(), skip="[")


def test_patterns_match_whole_parts():
    """GPT-2 has a mask `attn.bias` beside the bias `c_attn.bias`."""
    leaf = {"c_attn": {"bias": jnp.zeros(2)}}
    weights = {"h.0.attn.bias": np.ones((3, 3)), "h.0.attn.c_attn.bias": np.ones(2)}
    params = {"h": {"0": {"attn": leaf}}}
    for skip in ("attn.bias", r"attn\.bias", r"h\.0\.attn\.bias", r"\d.attn.bias$"):
        read = aj.params_from_torch_state_dict(weights, params, skip=skip)
        assert float(read["h"]["0"]["attn"]["c_attn"]["bias"].min()) == 1


def test_skipped_leaves_need_values():
    """A tree of shapes has none to keep."""
    net, params = Net(), empty(10)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="leaf head/kernel: is not read, and params"):
        aj.params_from_torch_state_dict(net.state_dict(), shapes, skip="mask|head")
    shapes["head"] = params["head"]
    read = aj.params_from_torch_state_dict(net.state_dict(), shapes, skip="mask|head")
    assert_body(read, net)


def test_what_is_no_tensor():
    """Modules of some libraries store bytes or None beside their parameters."""
    net = Net()
    weights = net.state_dict() | {"body._extra_state": None}
    read = aj.params_from_torch_state_dict(weights, empty(), skip="mask|_extra_state")
    assert_body(read, net)
    with pytest.raises(ValueError, match=r"parameter body\._extra_state: there is no"):
        aj.params_from_torch_state_dict(weights, empty(), skip="mask")


def test_nnx(lenient):
    """The network of a fine-tuning, and a step of it under jit."""

    class Flax(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(4, 5, rngs=rngs)
            self.head = nnx.Linear(5, 10, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.body(x)))

    net, flax = Net(), Flax(nnx.Rngs(0))
    params = nnx.state(flax, nnx.Param)
    old = np.array(flax.head.kernel[...])
    nnx.update(
        flax,
        aj.params_from_torch_state_dict(net.state_dict(), params, skip="mask|head"),
    )
    np.testing.assert_array_equal(flax.body.kernel[...], net.body.weight.detach().T)
    np.testing.assert_array_equal(flax.head.kernel[...], old)


# ---------------------------------------------------------------------------
# whatever fits
# ---------------------------------------------------------------------------


def test_what_fits():
    net = Net()
    filled = aj.partial_params_from_torch_state_dict(net.state_dict(), empty(10))
    assert_body(filled.params, net)
    assert_old_head(filled.params)
    assert filled.kept == {
        "head/bias": "head.bias has shape (3,), expected (10,)",
        "head/kernel": "head.weight has shape (5, 3), expected (5, 10)",
    }
    assert filled.unused == {"mask": "there is no leaf mask"}


def test_the_same_names_as_pytorch():
    """`strict=False` reports them too, from the side of the network."""
    net, other = Net(), Net()
    weights = net.state_dict()
    del weights["body.bias"]
    weights["tail.bias"] = torch.ones(2)
    theirs = other.load_state_dict(weights, strict=False)
    params = empty() | {"mask": jnp.ones(5, bool)}
    filled = aj.partial_params_from_torch_state_dict(weights, params)
    names = {"body/bias": "body.bias"}
    assert [names[path] for path in filled.kept] == theirs.missing_keys
    assert list(filled.unused) == theirs.unexpected_keys
    back = aj.params_to_torch_state_dict(filled.params, other.state_dict())
    for name in ("body.weight", "head.weight", "head.bias", "mask"):
        assert torch.equal(back[name], other.state_dict()[name])


def test_a_head_that_fits_and_is_not_wanted():
    filled = aj.partial_params_from_torch_state_dict(
        Net().state_dict(), empty(), skip=r"^head\."
    )
    assert_old_head(filled.params)
    assert filled.kept == {"head/bias": "is skipped", "head/kernel": "is skipped"}
    assert filled.unused == {
        "head.bias": "is skipped",
        "head.weight": "is skipped",
        "mask": "there is no leaf mask",
    }


def test_values_must_fit():
    """Only names and shapes may differ."""
    weights = {"w": np.array([1.001], np.float32), "v": np.ones(3)}
    params = {"w": jnp.zeros(1, jnp.bfloat16), "v": jnp.zeros(2)}
    with pytest.raises(ValueError, match="leaf w: w has dtype float32") as error:
        aj.partial_params_from_torch_state_dict(weights, params)
    assert "leaf v" not in str(error.value)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="leaf v: is not read, and params"):
        aj.partial_params_from_torch_state_dict({"w": np.ones(1)}, shapes)


def test_nothing_fits():
    """As with MoCo's two encoders: an error, with the way out."""
    weights = Net().state_dict()
    both = {f"{e}.{name}": x for e in ("query", "key") for name, x in weights.items()}
    with pytest.raises(ValueError) as error:
        aj.partial_params_from_torch_state_dict(both, empty())
    lines = str(error.value).splitlines()
    assert lines[0] == "PyTorch's parameters fit no leaf:"
    assert "The names fit without 'query.', or without 'key.' (4 of 4" in lines[-1]
    with pytest.raises(ValueError, match="fit no leaf"):
        aj.partial_params_from_torch_state_dict(weights, empty(9), skip="body")


# ---------------------------------------------------------------------------
# tied weights
# ---------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.embed = torch.nn.Embedding(6, 4)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("numpy", [False, True])
def test_a_tied_head_needs_no_leaf(tmp_path, numpy):
    """In whichever order, and through a file."""
    net = Tied()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    weights = aj.load_torch_checkpoint(tmp_path / "net.pt")
    if numpy:
        weights = {name: x.numpy() for name, x in weights.items()}
    params = {"embed": {"embedding": jnp.zeros((6, 4))}}
    read = aj.params_from_torch_state_dict(weights, params)
    np.testing.assert_array_equal(
        read["embed"]["embedding"], net.embed.weight.detach().numpy()
    )
    filled = aj.partial_params_from_torch_state_dict(weights, params)
    assert filled.kept == filled.unused == {}

    back = aj.params_to_torch_state_dict(read, weights)
    other = Tied()
    torch.nn.init.zeros_(other.embed.weight)
    other.load_state_dict(back)
    assert torch.equal(other.head.weight, net.embed.weight)


def test_a_head_that_is_tied_there_only():
    """Both leaves are filled."""
    params = {
        "embed": {"embedding": jnp.zeros((6, 4))},
        "head": {"kernel": jnp.zeros((4, 6))},
    }
    read = aj.params_from_torch_state_dict(Tied().state_dict(), params)
    np.testing.assert_array_equal(read["head"]["kernel"].T, read["embed"]["embedding"])


def test_equal_values_are_not_tied():
    """They may differ from the next step on; the error says what to do."""
    weights = copy.deepcopy(Tied().state_dict())
    weights["head.weight"] = weights["head.weight"].clone()
    params = {"embed": {"embedding": jnp.zeros((6, 4))}}
    with pytest.raises(ValueError, match=r"\(equal to embed\.weight: if they are tied"):
        aj.params_from_torch_state_dict(weights, params)
    aj.params_from_torch_state_dict(weights, params, skip="^head")
    weights["head.weight"] += 1
    with pytest.raises(ValueError) as error:
        aj.params_from_torch_state_dict(weights, params)
    assert "equal" not in str(error.value)


def test_the_network_in_place_of_names():
    params = aj.params_from_torch_state_dict(Net().state_dict(), empty(), skip="mask")
    with pytest.raises(ValueError, match=r"got the network itself \(Net\): pass net"):
        aj.params_to_torch_state_dict(params, Net())


def test_skipped_on_the_way_back():
    net = Net()
    params = aj.params_from_torch_state_dict(net.state_dict(), empty(), skip="mask")
    names = list(net.state_dict())
    with pytest.raises(ValueError, match="parameter mask: there is no leaf mask"):
        aj.params_to_torch_state_dict(params, names)
    back = aj.params_to_torch_state_dict(params, names, skip="mask|head")
    assert list(back) == ["body.weight", "body.bias"]
