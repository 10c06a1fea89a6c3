"""Masks, labels, groups and freezing, by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamw_jax as aj

FLAX = {
    "Conv_0": {"kernel": jnp.ones((3, 3, 1, 4))},
    "BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "layers": {  # stacked by scan: every leaf has a dimension more
        "Dense_0": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
        "LayerNorm_0": {"scale": jnp.ones((3, 4))},
    },
    "Embed_0": {"embedding": jnp.ones((5, 4))},
}


def flat(tree):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


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
        (aj.mask_by_path("nothing"), ValueError, "'nothing' match no leaf; .* a, b/w"),
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


# ---- groups and freezing ------------------------------------------------------------

LABELS = aj.labels_by_path({"body": "^(Conv|BatchNorm|layers)", "head": "^Embed"})


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_discriminative_rates(name):
    """Each group moves as if it were trained alone at its own learning rate."""

    def make(lr):
        if name == "sgd":
            return aj.sgd(lr, 0.9, weight_decay=0.1)
        return (
            aj.adamw(lr, weight_decay=0.1) if name == "adamw" else aj.adam(lr, l2=0.1)
        )

    grouped = optax.chain(
        make(0.09), aj.scale_by_group({"body": 1 / 9, "head": 1.0}, LABELS)
    )
    ends = {}
    for key, tx in {"grouped": grouped, "body": make(0.01), "head": make(0.09)}.items():
        p, state = FLAX, tx.init(FLAX)
        for k in range(3):
            g = jax.tree.map(lambda x, k=k: jnp.sin(x + k), p)
            updates, state = tx.update(g, state, p)
            p = aj.apply_updates(p, updates)
        ends[key] = flat(p)
    for path, leaf in ends["grouped"].items():
        group = "head" if path.startswith("Embed") else "body"
        np.testing.assert_allclose(leaf, ends[group][path], rtol=1e-5)


def test_group_rates_follow_phases():
    phases = aj.one_cycle(9e-3, steps=20)
    tx = optax.chain(
        aj.sgd(phases, momentum=None),
        aj.scale_by_group({"body": 1 / 9, "head": 1.0}, LABELS),
    )
    ones = jax.tree.map(jnp.ones_like, FLAX)
    state = tx.init(FLAX)
    momentum = {}
    for k in range(20):
        updates, state = tx.update(ones, state, FLAX)
        beta, rate = phases.at(k)["b1"], phases.at(k)["learning_rate"]
        for group, path in (("body", "Conv_0/kernel"), ("head", "Embed_0/embedding")):
            momentum[group] = beta * momentum.get(group, 0.0) + 1
            factor = 1 / 9 if group == "body" else 1.0
            np.testing.assert_allclose(
                flat(updates)[path], -rate * factor * momentum[group], rtol=1e-5
            )


@pytest.mark.parametrize(
    ("multipliers", "labels", "message"),
    [
        ({"body": -1.0}, LABELS, r"multipliers\['body'\] must be"),
        ({"body": 1.0}, LABELS, "Embed_0/embedding has the label 'head'"),
        ({"body": 1.0, "head": 1.0, "tail": 1.0}, LABELS, "no leaf has the label tail"),
        ({"body": 1.0}, aj.labels_by_path({"body": "Conv"}), "leaf .* matches none of"),
        ({"body": 1.0}, {"Conv_0": "body"}, "labels has no leaf"),
    ],
)
def test_bad_groups(multipliers, labels, message):
    with pytest.raises(ValueError, match=message):
        aj.scale_by_group(multipliers, labels).init(FLAX)


def test_default_label():
    labels = flat(aj.labels_by_path({"head": "^Embed"}, default="body")(FLAX))
    assert labels["Embed_0/embedding"] == "head"
    assert labels["Conv_0/kernel"] == "body"


@pytest.mark.parametrize(
    "inner",
    [
        aj.adamw(1e-2, weight_decay=0.1, mask=aj.mask_by_path("kernel$")),
        aj.amsgrad(1e-2, l2=0.1),
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1e-3), aj.sgd(1e-2, 0.9)),
    ],
    ids=["adamw", "amsgrad", "optax", "clipped"],
)
def test_frozen_leaves_do_not_move_by_one_bit(inner, lenient):
    p0 = FLAX | {"Conv_0": {"kernel": jnp.array([-0.0, 0.0, 1e-30, 3.7])}}
    tx = aj.freeze_leaves(inner, aj.mask_by_path("^(Conv|BatchNorm)"))
    p, state = p0, tx.init(p0)
    assert not any(x.shape == (3, 3, 1, 4) for x in jax.tree.leaves(state))
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(jax.tree.map(jnp.ones_like, p), state, p)
        p = jax.jit(optax.apply_updates)(p, updates)
    for path, leaf in flat(p).items():
        same = np.asarray(leaf).tobytes() == np.asarray(flat(p0)[path]).tobytes()
        assert same == path.startswith(("Conv", "BatchNorm")), path


def test_frozen_leaves_do_not_count_in_a_norm(lenient):
    p = {"a": jnp.ones(1), "b": jnp.ones(1)}
    tx = aj.freeze_leaves(optax.clip_by_global_norm(1.0), {"a": True, "b": False})
    updates, _ = tx.update({"a": jnp.full(1, 1e6), "b": jnp.ones(1)}, tx.init(p), p)
    np.testing.assert_allclose(updates["b"], 1.0)


def test_a_frozen_leaf_without_a_gradient():
    p = {"a": jnp.ones(1), "b": {"w": jnp.ones(1)}}
    tx = aj.freeze_leaves(aj.adamw(1e-2), {"a": False, "b": True})
    g = {"a": jnp.ones(1), "b": {"w": None}}
    updates, _ = tx.update(g, tx.init(p), p)
    assert updates["b"]["w"] is None
    assert aj.apply_updates(p, updates)["b"]["w"] is p["b"]["w"]


def test_extra_arguments_pass_a_freeze():
    inner = optax.GradientTransformationExtraArgs(
        lambda p: (),
        lambda u, s, p=None, *, k, **_: (jax.tree.map(lambda x: k * x, u), s),
    )
    tx = aj.freeze_leaves(inner, {"a": True, "b": False})
    p = {"a": jnp.ones(1), "b": jnp.ones(1)}
    np.testing.assert_array_equal(tx.update(p, tx.init(p), p, k=3.0)[0]["b"], 3.0)


def test_hyperparameters_of_a_frozen_optimizer():
    tx = aj.freeze_leaves(aj.adamw(1e-2), aj.mask_by_path("^Conv"))
    state = aj.override_hyperparams(tx.init(FLAX), learning_rate=0.5)
    assert float(aj.current_hyperparams(state)["learning_rate"]) == 0.5
    updates, _ = tx.update(FLAX, state, FLAX)
    np.testing.assert_allclose(updates["Embed_0"]["embedding"], -0.50005, rtol=1e-5)
