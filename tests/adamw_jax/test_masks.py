"""Masks and labels: which leaf gets what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from inputs import FLAX, flat

import adamw_jax as aj


def test_no_decay_on_bias_and_norm_in_flax():
    decays = flat(aj.no_decay_on_bias_and_norm(FLAX))
    assert [path for path, decay in decays.items() if decay] == [
        "Conv_0/kernel",
        "Embed_0/embedding",
        "layers/Dense_0/kernel",
    ]


@pytest.mark.parametrize(
    ("path", "decays"),
    [
        ("layer1.0.conv1/weight", True),
        ("bn1/weight", False),
        ("ln_f/weight", False),
        ("ln_1/scale", False),
        ("model/final_norm/weight", False),
        ("model/norm/w", False),
        ("input_layernorm/weight", False),
        ("GroupNorm_3/gamma", False),
        ("rms_norm/w", False),
        ("norm2/weight", False),
        ("attn/q_proj/bias", False),
        ("lstm/bias_hh_l0", False),
        ("linear/b", False),
        ("linear/w", True),
        ("dense/kernel", True),
        ("head/kernel", True),
        ("normal_mode/kernel", True),
        ("rescale_net/kernel", True),
        ("lnet/kernel", True),
        ("bnet/kernel", True),
        ("betamax/kernel", True),
        ("dense/lora_b", True),
        ("mlp/w_b", True),
        ("vq/embedding_b", True),
        ("PreNorm_0/Attention_0/to_qkv/kernel", True),
        ("ln_proj/kernel", True),
        ("LayerNormMLP_0/kernel", True),
        ("adaptive_layer_norm/Dense_0/kernel", True),
        ("attn_ln/weight", False),
        ("final_ln/weight", False),
        ("ln1_post/weight", False),
        ("post_attention_ln/w", False),
        ("norms/0/weight", False),
        ("bns/0/weight", False),
        ("layer1.0.bn2.weight", False),
    ],
)
def test_names_of_other_libraries(path, decays):
    tree = jnp.ones((3, 2))  # so that the shape excludes nothing
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert jax.tree.leaves(aj.no_decay_on_bias_and_norm(tree)) == [decays]


def test_nnx_paths_end_at_the_name():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 3, rngs=rngs)
            self.norm = nnx.LayerNorm(3, rngs=rngs)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    seen = {}
    aj.mask_by(lambda path, leaf: seen.setdefault(path, True))(params)
    assert set(seen) == {"dense/kernel", "dense/bias", "norm/scale", "norm/bias"}
    tx = aj.adamw(1.0, weight_decay=0.5, mask=aj.no_decay_on_bias_and_norm)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_allclose(
        updates["dense"]["kernel"][...], -0.5 * params["dense"]["kernel"][...]
    )
    assert not updates["norm"]["scale"][...].any()


class TorchNet(torch.nn.Module):
    """Norms and other layers whose parameters are all called `weight`."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False), nn.RMSNorm(6)
        )
        self.downsample = nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        )
        self.branches = nn.ModuleList(
            [nn.Sequential(nn.InstanceNorm1d(4, affine=True))]
        )
        self.attention = nn.MultiheadAttention(4, 2)
        self.memory = nn.LSTM(4, 3)
        self.tokens = nn.Embedding(7, 4)
        self.image = nn.Sequential(nn.LayerNorm((4, 5, 5)), nn.ConvTranspose1d(4, 4, 3))
        self.head = nn.Linear(6, 4, bias=False)
        self.act = nn.PReLU(4)


TORCH_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.RMSNorm,
    torch.nn.GroupNorm,
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.PReLU,
)


def by_type(net):
    """The usual mask, found by the type of the module instead of by name or shape."""
    return {
        f"{name}.{leaf}".replace(".", "/"): not (
            isinstance(module, TORCH_NORMS) or "bias" in leaf
        )
        for name, module in net.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("stacked", [(), (3,), (4,), (3, 2), (4, 4)])
@pytest.mark.parametrize("nested", [False, True])
def test_against_the_types_of_pytorchs_modules(nested, stacked):
    """Also for layers stacked once or twice, whatever the sizes."""
    net = TorchNet()
    expected, params = by_type(net), {}
    assert not expected["layers/1/weight"] and not expected["downsample/1/weight"]
    for name, p in net.named_parameters():
        *modules, leaf = name.split(".") if nested else [name]
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.ShapeDtypeStruct((*stacked, *p.shape), jnp.float32)
    if nested:
        mask = flat(aj.no_decay_on_bias_and_norm(params))
    else:
        mask = aj.no_decay_on_bias_and_norm(params)
        mask = {name.replace(".", "/"): decays for name, decays in mask.items()}
    assert mask == expected


@pytest.mark.parametrize(
    ("shapes", "decays"),
    [
        # Nothing is stacked: a matrix without bias, as wide as it is high or not.
        ({"0/weight": (4, 4), "1/weight": (4,)}, {"0/weight"}),
        ({"0/w": (4, 4), "0/b": (4,), "1/w": (4, 4)}, {"0/w", "1/w"}),
        ({"temperature": (), "w": (3,), "p": (1, 3)}, {"p"}),
        # Blocks of 12 layers, and a head or an embedding outside of them.
        (
            {"blocks/0/w": (12, 4, 4), "blocks/0/b": (12, 4), "blocks/1/w": (12, 4)},
            {"blocks/0/w"},
        ),
        (
            {"blocks/0/w": (12, 4, 8), "blocks/0/b": (12, 8), "head/w": (8, 12)},
            {"blocks/0/w", "head/w"},
        ),
        (
            {"blocks/0/w": (12, 4, 8), "blocks/1/scale": (12, 4), "e/w": (9, 4)},
            {"blocks/0/w", "e/w"},
        ),
        # The biases of attention have two dimensions, and its kernels do not share one.
        ({"q/w": (8, 2, 4), "q/b": (2, 4), "o/w": (2, 8)}, {"q/w", "o/w"}),
        # Stacked without any bias: nothing says so.
        (
            {"blocks/0/w": (12, 4, 4), "blocks/1/w": (12, 4)},
            {"blocks/0/w", "blocks/1/w"},
        ),
    ],
)
def test_the_shape_decides_where_the_name_says_nothing(shapes, decays):
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    mask = aj.no_decay_on_bias_and_norm(params)
    assert {name for name, decay in mask.items() if decay} == decays
    abstract = jax.eval_shape(lambda: params)
    assert aj.no_decay_on_bias_and_norm(abstract) == mask
    packed = aj.pack(params, aj.no_decay_on_bias_and_norm)
    assert aj.no_decay_on_bias_and_norm(packed).tree == mask


def test_a_numbered_norm_does_not_decay_in_an_update():
    params = {
        "layers": [{"weight": jnp.ones((2, 3))}, {"weight": jnp.ones(3), "extra": None}]
    }
    tx = aj.adamw(1.0, weight_decay=0.5, mask=aj.no_decay_on_bias_and_norm)
    for p in (params, aj.pack(params, aj.no_decay_on_bias_and_norm)):
        zeros = jax.tree.map(jnp.zeros_like, p)
        updates, _ = jax.jit(tx.update)(zeros, tx.init(p), p)
        linear, norm = aj.unpack(updates)["layers"]
        np.testing.assert_array_equal(linear["weight"], -0.5)
        np.testing.assert_array_equal(norm["weight"], 0)


def test_mask_forms_agree():
    masks = {
        "path": aj.mask_by_path(r"kernel$"),
        "predicate": aj.mask_by(lambda path, leaf: path.endswith("kernel")),
        "callable": lambda p: aj.mask_by_path(r"kernel$")(p),
        "tree": aj.mask_by_path(r"kernel$")(FLAX),
        "prefix": {
            "Conv_0": True,
            "BatchNorm_0": False,
            "Embed_0": False,
            "layers": {
                "Dense_0": {"kernel": True, "bias": False},
                "LayerNorm_0": False,
            },
        },
    }
    zeros = jax.tree.map(jnp.zeros_like, FLAX)
    results = {}
    for name, mask in masks.items():
        for make in (aj.add_decayed_weights, aj.add_l2_gradient):
            tx = make(0.1, mask)
            updates, _ = tx.update(zeros, tx.init(FLAX), FLAX)
            results[name, make.__name__] = updates
    first = next(iter(results.values()))
    for updates in results.values():
        jax.tree.map(np.testing.assert_array_equal, updates, first)
    assert {k for k, v in flat(first).items() if v.any()} == {
        "Conv_0/kernel",
        "layers/Dense_0/kernel",
    }


def test_a_callable_module_as_mask():
    """A tree of bools that can be called (Equinox) is a tree."""

    @jax.tree_util.register_pytree_with_keys_class
    class Module:
        def __init__(self, w):
            self.w = w

        def __call__(self, x):
            raise AssertionError("the mask was called")

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("w"), self.w)], None

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls(*children)

    params = Module(jnp.ones(2))
    tx = aj.add_decayed_weights(0.5, Module(True))
    updates, _ = tx.update(Module(jnp.zeros(2)), tx.init(params), params)
    np.testing.assert_array_equal(updates.w, 0.5)


def test_describe_mask(capsys):
    aj.describe_mask(FLAX)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["decay", "rule", "shape", "path"]
    assert "no     name of leaf  (3, 4)        layers/Dense_0/bias" in lines
    assert "yes    name of leaf  (3, 4, 4)     layers/Dense_0/kernel" in lines
    assert lines[-1] == "3 of 7 leaves decay, 104 of 136 parameters"
    aj.describe_mask(jax.eval_shape(lambda: FLAX), aj.mask_by_path("Conv"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["decay", "shape", "path"]
    assert "1 of 7 leaves" in lines[-1]
    aj.describe_mask({"a": None}, None)
    assert "0 of 0 leaves" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["arrays", "shapes", "packed", "packed shapes"])
def test_describe_mask_says_by_which_rule(capsys, form):
    params = {
        "embed": {"w": jnp.zeros((7, 4))},
        "layers": {
            "0": {"weight": jnp.zeros((3, 4, 4)), "bias": jnp.zeros((3, 4))},
            "1": {"weight": jnp.zeros((3, 4))},
            "ln": {"weight": jnp.zeros((3, 4))},
        },
        "none": None,
        "temperature": jnp.zeros(()),
    }
    if "packed" in form:
        params = aj.pack(params, aj.no_decay_on_bias_and_norm)
    if "shapes" in form:
        params = jax.eval_shape(lambda: params)
    aj.describe_mask(params)
    assert capsys.readouterr().out.splitlines() == [
        "decay  rule            shape      path",
        "yes    shape           (7, 4)     embed/w",
        "no     name of leaf    (3, 4)     layers/0/bias",
        "yes    shape[1:]       (3, 4, 4)  layers/0/weight",
        "no     shape[1:]       (3, 4)     layers/1/weight",
        "no     name of module  (3, 4)     layers/ln/weight",
        "no     shape           ()         temperature",
        "2 of 6 leaves decay, 76 of 113 parameters",
    ]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            {"a": True, "x": True},
            ValueError,
            "no leaf b/w; mask has an unexpected .* x",
        ),
        ({"a": True}, ValueError, "no leaf b/w"),
        ({"a": True, "b": {"w": 1.0}}, TypeError, "leaf b/w, got 1.0"),
        (
            aj.mask_by_path("nothing"),
            ValueError,
            "matches 'nothing'; .* a, b/w",
        ),
    ],
)
def test_masks_that_do_not_fit(mask, error, message):
    p = {"a": jnp.ones(2), "b": {"w": jnp.ones(3)}}
    for make in (aj.add_decayed_weights, aj.add_l2_gradient):
        with pytest.raises(error, match=message):
            make(0.1, mask).init(p)
    with pytest.raises(error, match=message):
        aj.freeze_leaves(aj.sgd(0.1), mask).init(p)


def test_a_pattern_that_is_none():
    with pytest.raises(ValueError, match="not a regular expression"):
        aj.mask_by_path("(")
    with pytest.raises(ValueError, match="not a regular expression"):
        aj.labels_by_path({"a": "["})


def test_default_label():
    labels = flat(aj.labels_by_path({"head": "^Embed"}, default="body")(FLAX))
    assert labels["Embed_0/embedding"] == "head"
    assert labels["Conv_0/kernel"] == "body"
