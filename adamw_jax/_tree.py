"""Trees and their leaves: paths, dtypes, error messages, maps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._dtypes import (
    as_array,
    cast,
    compute_dtype,
    is_inexact,
    storage_dtype,
    update_dtype,
    with_complex,
)

Schedule = Callable[[Any], Any]  # step (int32 scalar) -> value
ScalarOrSchedule = float | jax.Array | Schedule


def is_none(x: Any) -> bool:
    return x is None


def is_variable(x: Any) -> bool:
    """Whether x is a Variable of Flax NNX, which is not imported here."""
    return hasattr(type(x), "raw_value")


def path_string(path: tuple) -> str:
    """The path of a leaf, such as `layers/0/kernel`, without the `.value` of NNX."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name in (
        "value",
        "raw_value",
    ):
        parts.pop()
    return "/".join(part.lstrip(".") for part in parts)


@functools.partial(jax.jit, inline=True)
def increment(count: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(count))


def schedule_step(count: jax.Array) -> jax.Array:
    """The count as schedules expect it: an average of states has made it a float."""
    count = jnp.asarray(count)
    is_integer = jnp.issubdtype(count.dtype, jnp.integer)
    return count if is_integer else jnp.rint(count).astype(jnp.int32)


def are_all_none(updates: Any) -> bool:
    """Whether no leaf has a gradient, so that there is no update to count."""
    leaves = jax.tree.leaves(updates, is_leaf=is_none)
    return bool(leaves) and all(leaf is None for leaf in leaves)


def zeros_like_params(params: Any, dtype: Any = None, *, real: bool = False) -> Any:
    """Initial moments: zeros in `dtype`, or by default in the compute dtype.

    "params" is the dtype of each parameter. The moment of a complex parameter is
    complex64 at least, unless it is a `real` one. Integer and bool parameters are not
    trained: their zeros have their own dtype. The zeros follow the sharding of the
    parameters.

    Raises TypeError for a leaf that is not a number, such as a typed PRNG key.
    """

    def zeros(path, p):
        p = as_array(p)
        if not hasattr(p, "dtype"):
            raise TypeError(
                f"parameter {path_string(path)} must be an array, got {p!r} (replace "
                "it by None, or freeze it)"
            )
        if is_inexact(p):
            return jnp.zeros_like(p, dtype=storage_dtype(p, dtype, real=real))
        if jnp.issubdtype(p.dtype, jnp.integer) or p.dtype == bool:
            return jnp.zeros_like(p)
        raise TypeError(
            f"parameter {path_string(path)} has dtype {p.dtype}, which cannot be "
            "trained (replace it by None, or freeze it)"
        )

    return jax.tree_util.tree_map_with_path(zeros, params)


def describe_mismatch(name: str, tree: Any, reference: Any) -> str:
    """Describes, by path, how the structures of two trees differ."""
    paths, expected = (
        {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, reference)
    )
    extra, missing = sorted(paths - expected), sorted(expected - paths)
    details = []
    types = _container_mismatch(jax.tree.structure(tree), jax.tree.structure(reference))
    if types is not None:
        details.append(f"{name} has a {types[0]} where a {types[1]} is expected")
    if missing:
        details.append(f"{name} has no leaf {', '.join(missing[:5])}")
    if extra:
        details.append(f"{name} has an unexpected leaf {', '.join(extra[:5])}")
    return "; ".join(details) or (
        f"{jax.tree.structure(tree)} against {jax.tree.structure(reference)}"
    )


def _container_mismatch(tree: Any, reference: Any) -> tuple[str, str] | None:
    """The first pair of containers of different types, such as FrozenDict and dict."""
    node, expected = tree.node_data(), reference.node_data()
    if node is None or expected is None:  # a leaf
        return None
    if node[0] is not expected[0]:
        return node[0].__name__, expected[0].__name__
    pairs = zip(tree.children(), reference.children(), strict=False)
    return next(filter(None, (_container_mismatch(*pair) for pair in pairs)), None)


def on_leaves(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a function of trees, such as a mask, see the leaves of a packed tree.

    A container that stores several leaves in one array (:class:`adamw_jax.Packed`) has
    a method `evaluate_on_leaves`, which returns one value per array, and a property
    `tree`, the original tree.
    """

    def evaluate(params):
        method = getattr(type(params), "evaluate_on_leaves", None)
        return function(params) if method is None else method(params, name, function)

    return evaluate


def find_states(state: Any, kind: type | Callable[[Any], bool]) -> list[Any]:
    """All states of a type, or with a property, in an optimizer state, outermost only.

    Unlike `optax.tree.get`, it finds states of two optimizers, and by type.
    """

    def matches(x):
        return isinstance(x, kind) if isinstance(kind, type) else kind(x)

    return list(filter(matches, jax.tree.leaves(state, is_leaf=matches)))


def broadcast(name: str, mask: Any, params: Any) -> Any:
    """Expands a mask, which may be a prefix or a callable, to every leaf of params."""
    # An Equinox module of bools is callable, but it is a tree.
    leaves = jax.tree.leaves(mask)
    is_tree = leaves and all(isinstance(x, bool | np.bool_) for x in leaves)
    tree = mask(params) if callable(mask) and not is_tree else mask
    if not jax.tree.leaves(params):  # as optax.tree.map_params calls it
        return params
    try:
        return jax.tree.map(lambda x, sub: jax.tree.map(lambda _: x, sub), tree, params)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name} does not have the structure of the parameters: "
            f"{describe_mismatch(name, tree, params)}"
        ) from None


def broadcast_factor(name: str, factor: jax.Array, leaf: jax.Array) -> jax.Array:
    """Gives an array that multiplies a leaf its shape; a scalar stays one."""
    if factor.ndim == 0:
        return factor
    try:
        return jnp.broadcast_to(factor, leaf.shape)
    except ValueError:
        raise ValueError(
            f"{name} of shape {factor.shape} does not broadcast to a leaf of shape "
            f"{leaf.shape}"
        ) from None


def leaves_like(updates: Any, name: str, tree: Any) -> list[Any]:
    """The leaves of a tree in the order of the updates' leaves, including None."""
    try:
        return jax.tree.structure(updates, is_leaf=is_none).flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(
            f"the updates do not have the structure of {name}: "
            f"{describe_mismatch('updates', updates, tree)}"
        ) from None


def arrays_only(params: Any) -> Any:
    """The parameters without leaves such as functions, which are not differentiated.

    Equinox's modules have such leaves, and no program can be passed them.
    """

    def leaf(p):
        known = isinstance(p, bool | int | float | complex) or hasattr(p, "dtype")
        return p if known else None

    return jax.tree.map(leaf, params)


def optional_leaves(treedef: Any, params: Any) -> list[Any]:
    """The parameters in the order of the updates; None where they are not known.

    They are not needed, so a tree of another structure is ignored, as in Optax.
    """
    unknown = [None] * treedef.num_leaves
    try:
        return unknown if params is None else treedef.flatten_up_to(params)
    except (ValueError, TypeError):
        return unknown


def widen(grads: Any) -> Any:
    """Casts gradients to their compute dtypes."""

    def wide(g):
        if getattr(g, "dtype", None) == jnp.float32:
            return g
        g = as_array(g)
        return cast(g, compute_dtype(g.dtype)) if is_inexact(g) else g

    return jax.tree.map(wide, grads)


def narrow(updates: Any, grads: Any, params: Any = None) -> Any:
    """Casts updates to the dtypes of :func:`update_dtype`: the inverse of `widen`."""
    flat_grads, treedef = jax.tree.flatten(grads, is_leaf=is_none)

    def leaf(u, g, p):
        dtype = getattr(u, "dtype", None)
        if dtype is None or g is None:
            return u
        g = as_array(g)
        if dtype == g.dtype and dtype == getattr(p, "dtype", dtype):
            return u  # as nearly always: what follows takes microseconds
        if not is_inexact(u):
            return u
        same_kind = jnp.iscomplexobj(g) == jnp.iscomplexobj(u)
        return cast(u, update_dtype(g, p)) if is_inexact(g) and same_kind else u

    flat_updates = treedef.flatten_up_to(updates)
    flat = map(leaf, flat_updates, flat_grads, optional_leaves(treedef, params))
    return treedef.unflatten(flat)


def map_leaves(
    f: Callable[..., tuple],
    updates: Any,
    trees: dict[str, Any],
    *,
    carried: int,
    params: Any = None,
    casts: bool = True,
) -> tuple[Any, ...]:
    """Maps `f(index, update, *leaves) -> (new_update, *new_leaves)` over all leaves.

    Returns the new updates and the new versions of the first `carried` trees. `f` gets
    the update in its compute dtype; what it returns is cast to :func:`update_dtype`. If
    `casts` is False, neither is cast.

    A None update stays None, and the carried leaves at its place stay unchanged. They
    do so, with an update of zero, where the leaf of the first tree or else of `params`
    is an integer or a bool, and for the float0 gradients of `jax.grad(allow_int=True)`.

    Raises ValueError or TypeError with the path of the leaf where a tree does not match
    the updates.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_none)
    columns = [leaves_like(updates, name, tree) for name, tree in trees.items()]
    optional = optional_leaves(treedef, params)
    out: list[tuple] = []
    for i, (path, update) in enumerate(flat):
        leaves = [column[i] for column in columns]
        if update is None:
            out.append((None, *leaves[:carried]))
            continue
        update, param, *leaves = map(as_array, (update, optional[i], *leaves))
        for name, leaf in zip(trees, leaves, strict=True):
            _check_shape(path, update, name, leaf)
        known = [x for x in (*leaves, param) if hasattr(x, "dtype")]
        dtype = _dtype_to_train_in(path, update, known[0] if known else None)
        if dtype is None:
            integer = known[0].dtype if known and not is_inexact(known[0]) else bool
            out.append((jnp.zeros(update.shape, integer), *leaves[:carried]))
            continue
        new, *rest = f(i, cast(update, dtype) if casts else update, *leaves)
        if casts:
            if jnp.iscomplexobj(new) and hasattr(param, "dtype"):
                # A complex moment of a real parameter has no imaginary part.
                new = new if jnp.iscomplexobj(param) else new.real
            same_kind = jnp.iscomplexobj(update) == jnp.iscomplexobj(new)
            grad = update if same_kind and is_inexact(update) else new
            new = cast(new, update_dtype(grad, param))
        out.append((new, *rest))
    if not out:
        return (updates, *list(trees.values())[:carried])
    return tuple(treedef.unflatten(column) for column in zip(*out, strict=True))


def _check_shape(path: Any, update: Any, name: str, leaf: Any) -> None:
    shape = getattr(leaf, "shape", None)
    if shape != update.shape:
        found = f"shape {update.shape} against {shape}"
        if shape is None:
            found = f"an update of shape {update.shape} against {leaf!r}"
        raise ValueError(
            f"updates and {name} do not match at leaf {path_string(path)}: {found}"
        )


def _dtype_to_train_in(path: Any, update: Any, like: Any) -> Any:
    """The dtype in which `map_leaves` updates a leaf; None for one that is passed by.

    `like` is a moment or the parameter, if it is known.
    """
    if update.dtype == jax.dtypes.float0 or not (like is None or is_inexact(like)):
        return None
    dtype = compute_dtype(update.dtype)
    if like is None:
        return dtype
    if not is_inexact(update) or (jnp.iscomplexobj(update) > jnp.iscomplexobj(like)):
        raise TypeError(
            f"update {path_string(path)} has dtype {update.dtype}, its parameter or "
            f"moment {like.dtype}"
        )
    return with_complex(dtype, jnp.iscomplexobj(like))
