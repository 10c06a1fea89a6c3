"""Masks and labels: which leaf gets what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    tree = jnp.ones(3)
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
    assert lines[0].split() == ["decay", "shape", "path"]
    assert "no     (3, 4)        layers/Dense_0/bias" in lines
    assert "yes    (3, 4, 4)     layers/Dense_0/kernel" in lines
    assert lines[-1] == "3 of 7 leaves decay, 104 of 136 parameters"
    aj.describe_mask(jax.eval_shape(lambda: FLAX), aj.mask_by_path("Conv"))
    assert "1 of 7 leaves" in capsys.readouterr().out


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
