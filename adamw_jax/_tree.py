"""Functions over the leaves of trees: names, checks that use them, maps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = Callable[[Any], Any]  # step (int32 scalar) -> value
ScalarOrSchedule = float | jax.Array | Schedule


def is_none(x: Any) -> bool:
    return x is None


def path_string(path: tuple) -> str:
    """The path of a leaf, `layers/0/kernel`, without the `.value` that NNX appends."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name in (
        "value",
        "raw_value",
    ):
        parts.pop()
    return "/".join(part.lstrip(".") for part in parts)


def compute_dtype(dtype: Any) -> Any:
    """Arithmetic is done in float32, in float64 for float64 leaves."""
    x64 = dtype == jnp.float64 and jax.config.read("jax_enable_x64")
    return jnp.float64 if x64 else jnp.float32


def scalar_dtype(tree: Any) -> Any:
    """The dtype of scalars that meet every leaf of the tree: float32 or float64."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    wide = any(compute_dtype(leaf.dtype) == jnp.float64 for leaf in leaves)
    return jnp.float64 if wide else jnp.float32


def increment(count: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(count))


def zeros_like_params(params: Any, dtype: Any = None) -> Any:
    """A moment for every parameter: zeros of `dtype`, or of the compute dtype.

    The zeros follow the parameter's sharding. A leaf that is no float is refused.
    """

    def zeros(path, p):
        p = p if hasattr(p, "dtype") else jnp.asarray(p)
        if not jnp.issubdtype(p.dtype, jnp.floating):
            raise TypeError(
                f"parameter {path_string(path)} has dtype {p.dtype}; only floating "
                "point parameters can be trained (pass None in its place, or freeze it)"
            )
        return jnp.zeros_like(p, dtype=dtype or compute_dtype(p.dtype))

    return jax.tree_util.tree_map_with_path(zeros, params)


def describe_mismatch(name: str, tree: Any, reference: Any) -> str:
    """Says by path where the structure of two trees differs."""
    paths = [
        {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, reference)
    ]
    extra, missing = sorted(paths[0] - paths[1]), sorted(paths[1] - paths[0])
    details = []
    if missing:
        details.append(f"{name} has no leaf {', '.join(missing[:5])}")
    if extra:
        details.append(f"{name} has an unexpected leaf {', '.join(extra[:5])}")
    return "; ".join(details) or (
        f"{jax.tree.structure(tree)} against {jax.tree.structure(reference)}"
    )


def on_leaves(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of trees, such as a mask, that sees the leaves of a packed tree.

    A container that keeps several leaves in one array (:class:`adamw_jax.Packed`) has
    the method `evaluate_on_leaves`, which gives one value for each array.
    """

    def evaluate(params):
        method = getattr(type(params), "evaluate_on_leaves", None)
        return function(params) if method is None else method(params, name, function)

    return evaluate


def find_states(state: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """The states of a kind inside an optimizer's state, outermost only."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def broadcast(name: str, mask: Any, params: Any) -> Any:
    """The value for every leaf of params of a mask, which may be a prefix of them."""
    # A callable module (Equinox) of bools is a tree, although it can be called.
    leaves = jax.tree.leaves(mask)
    is_tree = leaves and all(isinstance(x, bool | np.bool_) for x in leaves)
    tree = mask(params) if callable(mask) and not is_tree else mask
    if not jax.tree.leaves(params):  # nothing to mask; optax.tree.map_params asks so
        return params
    try:
        return jax.tree.map(lambda x, sub: jax.tree.map(lambda _: x, sub), tree, params)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name} does not have the structure of the parameters: "
            f"{describe_mismatch(name, tree, params)}"
        ) from None


def leaves_like(updates: Any, name: str, tree: Any) -> list[Any]:
    """The leaves of a tree in the order of the updates' leaves, None included."""
    try:
        return jax.tree.structure(updates, is_leaf=is_none).flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(
            f"the updates do not have the structure of {name}: "
            f"{describe_mismatch('updates', updates, tree)}"
        ) from None


def map_leaves(
    f: Callable[..., tuple],
    updates: Any,
    trees: dict[str, Any],
    *,
    carried: int,
) -> tuple[Any, ...]:
    """Maps `f(index, update, *leaves) -> (update, *carried leaves)` over the leaves.

    The first `carried` of the trees come back changed, behind the updates. Where the
    update is None, it stays None and the carried leaves stay as they are.

    Raises ValueError, with the leaf's path, where a tree does not match the updates.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_none)
    columns = [leaves_like(updates, name, tree) for name, tree in trees.items()]
    out = []
    for i, (path, update) in enumerate(flat):
        leaves = [column[i] for column in columns]
        if update is None:
            out.append((None, *leaves[:carried]))
            continue
        update = update if hasattr(update, "dtype") else jnp.asarray(update)
        if not jnp.issubdtype(update.dtype, jnp.floating):
            raise TypeError(f"update {path_string(path)} has dtype {update.dtype}")
        leaves = [jnp.asarray(x) if isinstance(x, int | float) else x for x in leaves]
        for name, leaf in zip(trees, leaves, strict=True):
            if leaf is None or not hasattr(leaf, "shape"):
                raise ValueError(
                    f"updates and {name} do not match at leaf {path_string(path)}: "
                    f"an update of shape {update.shape} against {leaf!r}"
                )
            if leaf.shape != update.shape:
                raise ValueError(
                    f"updates and {name} do not match at leaf {path_string(path)}: "
                    f"shape {update.shape} against {leaf.shape}"
                )
        out.append(f(i, update, *leaves))
    if not out:
        return (updates, *list(trees.values())[:carried])
    return tuple(treedef.unflatten(column) for column in zip(*out, strict=True))
