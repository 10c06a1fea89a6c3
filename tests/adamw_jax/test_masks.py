"""Masks and labels: which leaf gets what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


SMALL = {"a": jnp.ones(2), "b": {"w": jnp.ones(3)}}
FLAGS = {
    "bools": {"a": False, "b": {"w": True}},
    "0 and 1": {"a": 0, "b": {"w": 1}},
    "numpy": {"a": np.False_, "b": {"w": np.array(True)}},
    "jax": {"a": jnp.array(False), "b": {"w": jnp.array(True)}},
    "one element": {"a": jnp.array([0]), "b": {"w": np.array([1], np.uint8)}},
    "prefix of 1": {"a": 0, "b": 1},
    "function": lambda params: {"a": np.False_, "b": 1},
    "all": 1,
    "none": jnp.array(False),
}


def apply_mask(lib, mask, params, jit=True):
    """By how much each leaf decays under a mask of weight decay, and of freezing."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    transformations = [lib.add_decayed_weights(0.5, mask)]
    if lib is aj:
        inner = aj.sgd(1.0, weight_decay=0.5)
        transformations.append(aj.freeze_leaves(inner, mask))
    else:
        inner = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
        transformations.append(optax.chain(inner, optax.freeze(mask)))
    result = []
    for tx in transformations:
        update = jax.jit(tx.update) if jit else tx.update
        updates, _ = update(zeros, tx.init(params), params)
        result += [float(leaf.sum()) for leaf in jax.tree.leaves(updates)]
    return result


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_optax_accepts(name, lenient):
    ours = apply_mask(aj, FLAGS[name], SMALL)
    assert ours == apply_mask(optax, FLAGS[name], SMALL)
    if name not in ("all", "none"):
        assert ours == [0.0, 1.5, -1.0, 0.0]
        assert aj.sgd(0.1, l2=0.1, mask=FLAGS[name]).init(SMALL)


def test_flags_in_the_containers_of_flax(lenient):
    """FrozenDict, nnx.State and an NNX module, which can be called."""
    nnx = pytest.importorskip("flax.nnx")
    freeze = pytest.importorskip("flax.core").freeze
    model = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
    for params, kind in (
        (freeze({"bias": jnp.zeros(2), "kernel": jnp.ones((1, 2))}), int),
        (nnx.state(model), np.bool_),
        (nnx.split(model)[1], jnp.asarray),
        (model, jnp.asarray),
        (model, int),
    ):
        mask = jax.tree.map(lambda p, kind=kind: kind(p.ndim > 1), params)
        ours = apply_mask(aj, mask, params, jit=params is not model)
        assert ours == apply_mask(optax, mask, params, jit=False)
        assert ours[0] == 0 and ours[1] != 0


@pytest.mark.parametrize("swapped", [False, True])
def test_a_mask_in_other_containers(swapped):
    """Refused by Optax as well, in a message about tree_map."""
    freeze = pytest.importorskip("flax.core").freeze
    params, mask = SMALL, freeze(FLAGS["bools"])
    if swapped:
        params, mask = freeze(SMALL), FLAGS["bools"]
    types = ("dict", "FrozenDict") if swapped else ("FrozenDict", "dict")
    with pytest.raises(ValueError, match="mask has a {} where a {} is".format(*types)):
        aj.add_decayed_weights(0.1, mask).init(params)
    # The last two are those of jax 0.7.
    theirs = "different types|type mismatch|Expected dict"
    with pytest.raises(ValueError, match=theirs):
        optax.add_decayed_weights(0.1, mask).init(params)


def test_a_mask_must_not_depend_on_traced_values():
    tx = aj.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: (x > 0).all(), p))
    state = tx.init(SMALL)  # known here
    with pytest.raises(TypeError, match="mask must not depend on traced values, got"):
        jax.jit(tx.update)(SMALL, state, SMALL)

    def init(flag):
        return aj.add_decayed_weights(0.1, {"a": True, "b": {"w": flag}}).init(SMALL)

    with pytest.raises(TypeError, match="at leaf b/w: compute it outside of jit"):
        jax.jit(init)(True)


# ---- in parts of a tree --------------------------------------------------------------

NET = {
    "body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}
BY_MODULE = aj.labels_by_path({"body": "^body", "head": "^head"})


def decays(tx, params=NET):
    """How much each leaf loses in the second update, without a gradient."""
    zeros, update = jax.tree.map(jnp.zeros_like, params), jax.jit(tx.update)
    _, state = update(zeros, tx.init(params), params)
    updates, _ = update(zeros, state, params)
    return {path: round(-float(u.mean()), 3) for path, u in flat(updates).items()}


def decaying(mask=None):
    return aj.sgd(1.0, weight_decay=0.5, mask=mask)


@pytest.mark.parametrize(
    "labels",
    [BY_MODULE, BY_MODULE(NET), {"body": "body", "head": "head"}],
    ids=["function", "tree", "prefix"],
)
def test_masks_and_labels_by_path_in_a_partition(labels):
    """A pattern for another part selects nothing, and is no misspelling."""
    in_head = aj.mask_by_path("^head/kernel")
    tx = optax.partition({"body": decaying(in_head), "head": decaying(in_head)}, labels)
    expected = {"body/bias": 0, "body/kernel": 0, "head/bias": 0, "head/kernel": 0.5}
    assert decays(tx) == expected
    groups = aj.scale_by_group({"body": 0.1, "head": 0.01}, BY_MODULE)
    tx = optax.partition(
        {"body": optax.chain(decaying(), groups), "head": aj.sgd(0.1)}, labels
    )
    assert decays(tx) == expected | {
        **{"body/bias": 0.05, "body/kernel": 0.05, "head/kernel": 0}
    }


def test_masks_by_path_in_masked_and_freeze():
    body, head = aj.mask_by_path("^body"), aj.mask_by_path("^head")
    expected = {"body/bias": 0.5, "body/kernel": 0.5, "head/bias": 0, "head/kernel": 0}
    nested = [
        optax.masked(optax.chain(decaying(body), optax.freeze(head)), body),
        optax.masked(optax.chain(decaying(), optax.freeze(head)), body),
        optax.chain(decaying(), optax.freeze(head)),
        aj.freeze_leaves(decaying(body), head),
        aj.freeze_leaves(aj.freeze_leaves(decaying(), head), head),
        optax.partition(
            {"body": aj.freeze_leaves(decaying(), head), "head": aj.sgd(0.1)}, BY_MODULE
        ),
    ]
    for tx in nested:
        assert decays(tx) == expected
    # The two leaves are in one subtree, which a prefix hides with their names.
    tx = optax.masked(decaying(aj.mask_by_path("^body/kernel")), {"body": 0, "head": 1})
    assert not any(decays(tx).values())


def test_a_misspelling_in_the_whole_tree_is_still_one():
    misspelt = aj.mask_by_path("kernl")
    for tx in (
        decaying(misspelt),
        optax.masked(decaying(), misspelt),
        optax.chain(decaying(), optax.freeze(misspelt)),
        aj.freeze_leaves(decaying(), misspelt),
    ):
        with pytest.raises(ValueError, match="no leaf matches 'kernl'"):
            tx.init(NET)
    labels = aj.labels_by_path({"body": "^bodi"})
    with pytest.raises(ValueError, match="leaf body/bias matches none of"):
        optax.partition({"body": decaying()}, labels).init(NET)
    with pytest.raises(ValueError, match="no leaf has the label tail"):
        groups = {"body": 1.0, "head": 1.0, "tail": 1.0}
        aj.scale_by_group(groups, BY_MODULE).init(NET)


def test_a_pattern_for_leaves_without_a_gradient():
    """Without params the mask is read from the gradients."""
    tx = aj.freeze_leaves(aj.sgd(1.0), aj.mask_by_path("^head"))
    grads = {"body": NET["body"], "head": {"kernel": None, "bias": None}}
    updates, _ = tx.update(grads, tx.init(NET))
    assert updates["head"] == {"kernel": None, "bias": None}
    np.testing.assert_array_equal(updates["body"]["bias"], -1)


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
