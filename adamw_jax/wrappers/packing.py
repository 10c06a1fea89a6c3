"""Many small leaves in a few buffers, made once, for an update that costs one leaf."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._tree import broadcast, describe_mismatch, path_string

# Buffers are multiples of it, so that they can be sharded over 2, 4, 8, ... devices.
_MULTIPLE = 1024


class _Layout:
    """Which leaf lies where; the static part of a :class:`Flat`."""

    def __init__(self, treedef: Any, paths: tuple, structs: tuple, names: tuple):
        self.treedef = treedef
        self.paths = paths
        self.structs = structs
        self.names = names  # of the buffer of each leaf; None: it is alone
        self.alone = [i for i, name in enumerate(names) if name is None]
        self.packed: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            if name is not None:
                self.packed.setdefault(name, []).append(i)
        self._identity = (treedef, self.paths, self.structs, self.names)
        self._hash = hash(self._identity)

    # Asked at every call of a compiled function: the same object, as a rule.
    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (
            isinstance(other, _Layout)
            and self._hash == other._hash
            and self._identity == other._identity
        )


# The same object for the same layout, also where gradients were flattened apart.
_layout = functools.lru_cache(_Layout)


class Flat:
    """A tree of arrays whose small leaves lie in a few buffers; see :func:`flatten`.

    Itself a pytree, of the buffers and the leaves that were left alone, so that it goes
    wherever parameters go: into `jax.grad`, `init`, `update`, `jit`, `jax.device_put`.

    Attributes:
        buffers: by name, which is their dtype and what the masks say; arrays
            `[multiple of 1,024]`.
        leaves: the others, in their order.
    """

    def __init__(self, buffers: dict[str, Any], leaves: list[Any], layout: _Layout):
        self.buffers = buffers
        self.leaves = leaves
        self._layout = layout

    @property
    def tree(self) -> Any:
        """The tree that was flattened, as views: slices that fuse into what uses them.

        The gradient of what is computed from it is a :class:`Flat` again. Out of `jit`
        it copies.
        """

        def split(array, structs):
            if isinstance(array, jax.ShapeDtypeStruct):
                return [jax.ShapeDtypeStruct(x.shape, array.dtype) for x in structs]
            sizes = [math.prod(struct.shape) for struct in structs]
            # Its transpose is one concatenation; that of slices, as many paddings.
            parts = jax.lax.split(array, [*sizes, array.shape[0] - sum(sizes)])
            return [x.reshape(y.shape) for x, y in zip(parts, structs, strict=False)]

        return _spread(self, split, self.leaves)

    def __repr__(self):
        layout = self._layout
        lines = [f"{len(layout.paths)} leaves, {len(self.leaves)} of them alone"]
        for name, buffer in self.buffers.items():
            what = getattr(buffer, "shape", buffer)
            lines.append(f"{name}: {len(layout.packed[name])} leaves in {what}")
        return "\n".join(lines)


def _with_keys(flat: Flat) -> tuple[Any, _Layout]:
    key, paths = jax.tree_util.DictKey, flat._layout.paths
    alone = zip(flat._layout.alone, flat.leaves, strict=True)
    children = [(key(name), buffer) for name, buffer in flat.buffers.items()]
    return children + [(key(paths[i]), leaf) for i, leaf in alone], flat._layout


def _from_children(layout: _Layout, children: Any) -> Flat:
    buffers = dict(zip(layout.packed, children, strict=False))
    return Flat(buffers, list(children[len(buffers) :]), layout)


jax.tree_util.register_pytree_with_keys(Flat, _with_keys, _from_children)


def _spread(flat: Flat, split: Any, alone: list[Any]) -> Any:
    """The original tree, of what `split(buffer, structs)` says and the leaves alone."""
    layout = flat._layout
    leaves: list[Any] = [None] * len(layout.paths)
    for i, leaf in zip(layout.alone, alone, strict=True):
        leaves[i] = leaf
    for name, indices in layout.packed.items():
        structs, buffer = [layout.structs[i] for i in indices], flat.buffers[name]
        if hasattr(buffer, "dtype"):
            parts = split(buffer, structs)
        elif _is_hidden(buffer) or jax.tree_util.all_leaves([buffer]):
            parts = [buffer] * len(indices)  # as a mask's bool
        else:
            raise ValueError(
                f"in place of buffer {name} there is a {type(buffer).__name__}, which "
                "cannot be cut into leaves"
            )
        for i, part in zip(indices, parts, strict=True):
            leaves[i] = part
    return layout.treedef.unflatten(leaves)


def flatten(params: Any, *masks: Any, max_size: int = 2**16) -> Flat:
    """Packs the small leaves of a tree into one buffer for each dtype.

    An update of thousands of small leaves is thousands of small programs, whose number
    is what takes time, to compile and to run. Flatten the parameters **once**, before
    `init`, and keep them so: gradients, moments and updates then are a few large
    arrays, and the network sees its usual tree by slices.

    What depends on a leaf as a whole sees the buffer: LARS, LAMB and Muon need the
    leaves themselves, as does code that looks for parameters by path in the state. A
    mask or a function of labels sees the leaves if it is given to this package, or made
    by :func:`adamw_jax.mask_by`, :func:`adamw_jax.mask_by_path` or
    :func:`adamw_jax.labels_by_path`; any other one, given to Optax, sees the buffers.
    It must say the same for all leaves of a buffer, as it does if it was given here.

    Conventions that bite:

    * Save and restore `unflatten(params)` and `unflatten(state)`, plain trees, exactly
      those of a training that was never flat; :func:`flatten_like` packs them again.
    * Buffers are filled with zeros up to a multiple of 1,024. Their gradients are 0,
      and so are their moments and updates, unless a rule has 0 / 0 (an eps of 0).
    * A leaf that is sharded keeps its sharding and its place. A buffer may be sharded
      over devices afterwards, as the moments of a state; reading its `tree` gathers it.

    Args:
        params: a tree of arrays, None allowed.
        *masks: masks (or labels) that transformations will be given, as the `mask` of
            :func:`adamw_jax.adamw`: trees, prefixes, or functions from params to
            either. Leaves about which they differ lie in different buffers.
        max_size: leaves with more numbers than that stay as they are.

    Returns:
        A :class:`Flat`, whose `tree` is the original.

    Raises:
        ValueError: a mask of another structure than the parameters; a max_size below 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adamw_jax import adamw, apply_updates, no_decay_on_bias_and_norm
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> params = flatten(params, no_decay_on_bias_and_norm)
        >>> params
        2 leaves, 0 of them alone
        float32/False: 1 leaves in (1024,)
        float32/True: 1 leaves in (1024,)
        >>> tx = adamw(0.1, mask=no_decay_on_bias_and_norm)
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state, x):
        ...     def loss(params):
        ...         p = params.tree
        ...         return ((x @ p["kernel"] + p["bias"]) ** 2).mean()
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return apply_updates(params, updates), state
        >>> params, state = step(params, state, jnp.ones((4, 2)))
        >>> print(params.tree["bias"])
        [-0.1 -0.1 -0.1]
    """
    if max_size < 0:
        raise ValueError(f"max_size must be at least 0, got {max_size!r}")
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for _, leaf in flat]
    columns = [
        treedef.flatten_up_to(broadcast(f"masks[{i}]", mask, params))
        for i, mask in enumerate(masks)
    ]
    names = []
    for i, leaf in enumerate(leaves):
        packed = leaf.size <= max_size and not _is_sharded(leaf)
        packed = packed and jnp.issubdtype(leaf.dtype, jnp.floating)
        name = "/".join([str(leaf.dtype), *(repr(column[i]) for column in columns)])
        names.append(name if packed else None)
    paths = tuple(path_string(path) for path, _ in flat)
    structs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return _pack(leaves, _layout(treedef, paths, structs, tuple(names)))


def unflatten(tree: Any) -> Any:
    """Replaces each :class:`Flat` in a tree, as an optimizer's state, by its `tree`.

    Args:
        tree: parameters, a state, or anything that holds them.

    Returns:
        What it would be had :func:`flatten` never been called. The arrays are copies
        (out of `jit`); shapes give shapes.

    Raises:
        ValueError: there is something else in place of a buffer: the moments of
            :func:`adamw_jax.quantize_moments`, whose blocks cross the leaves.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adamw_jax import adam
        >>> params = {"a": jnp.ones(2), "b": jnp.ones((3, 1))}
        >>> state = unflatten(adam(0.1).init(flatten(params)))
        >>> jax.tree.structure(state) == jax.tree.structure(adam(0.1).init(params))
        True
    """
    return jax.tree.map(
        lambda x: x.tree if isinstance(x, Flat) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Flat),
    )


def flatten_like(tree: Any, like: Any) -> Any:
    """Packs a tree as another one is packed: the inverse of :func:`unflatten`.

    Args:
        tree: what `unflatten(like)` looks like: a restored state, or gradients that
            were taken with respect to `params.tree`.
        like: parameters or a state with a :class:`Flat` in it; shapes are enough.

    Returns:
        The tree, with the structure of `like`. Dtypes are those of `tree`.

    Raises:
        ValueError: a structure or a shape that does not fit, with the leaf's path; two
            dtypes in one buffer.

    Example:
        >>> import jax.numpy as jnp
        >>> params = flatten({"a": jnp.zeros(2), "b": jnp.zeros(3)})
        >>> grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> print(flatten_like(grads, params).buffers["float32"][:6])
        [1. 1. 1. 1. 1. 0.]
    """

    def pack(like, sub):
        if not isinstance(like, Flat):
            return sub
        layout = like._layout
        try:
            leaves = layout.treedef.flatten_up_to(sub)
        except (ValueError, TypeError):
            structs = layout.treedef.unflatten(layout.structs)
            raise ValueError(
                "the tree does not have the structure of what was flattened: "
                f"{describe_mismatch('tree', sub, structs)}"
            ) from None
        leaves = [
            x if hasattr(x, "dtype") or _is_hidden(x) else jnp.asarray(x)
            for x in leaves
        ]
        for path, x, struct in zip(layout.paths, leaves, layout.structs, strict=True):
            if not _is_hidden(x) and x.shape != struct.shape:
                raise ValueError(
                    f"leaf {path} has the shape {x.shape}, but {struct.shape} was "
                    "flattened"
                )
        return _pack(leaves, layout)

    return jax.tree.map(pack, like, tree, is_leaf=lambda x: isinstance(x, Flat))


def struct_tree(flat: Flat) -> Any:
    """The tree that was flattened, of shapes."""
    return _spread(
        flat,
        lambda _, structs: structs,
        [
            flat._layout.structs[i] if hasattr(leaf, "dtype") else leaf
            for i, leaf in zip(flat._layout.alone, flat.leaves, strict=True)
        ],
    )


def collapse(name: str, tree: Any, flat: Flat) -> Flat:
    """One value for each array, from a tree with one for each of the original leaves.

    Raises:
        ValueError: two leaves of one buffer differ.
    """
    layout, buffers = flat._layout, {}
    values = layout.treedef.flatten_up_to(tree)
    for buffer, indices in layout.packed.items():
        first = indices[0]
        for i in indices:
            if values[i] != values[first]:
                raise ValueError(
                    f"{name} says {values[first]!r} for {layout.paths[first]} and "
                    f"{values[i]!r} for {layout.paths[i]}, which lie in one buffer; "
                    "give it to flatten as well: flatten(params, mask)"
                )
        buffers[buffer] = values[first]
    return Flat(buffers, [values[i] for i in layout.alone], layout)


def _pack(leaves: list[Any], layout: _Layout) -> Flat:
    buffers = {}
    for name, indices in layout.packed.items():
        if all(_is_hidden(leaves[i]) for i in indices):
            buffers[name] = leaves[indices[0]]
            continue
        parts = [jnp.ravel(leaves[i]) for i in indices]
        dtypes = sorted({part.dtype.name for part in parts})
        if len(dtypes) > 1:
            raise ValueError(f"leaves of {' and '.join(dtypes)} in buffer {name}")
        size = sum(part.size for part in parts)
        parts.append(jnp.zeros(-size % _MULTIPLE, dtypes[0]))
        buffers[name] = jnp.concatenate(parts)
    return Flat(buffers, [leaves[i] for i in layout.alone], layout)


def _is_hidden(x: Any) -> bool:
    """A leaf that a transformation does not see, as one that is frozen."""
    return isinstance(x, optax.MaskedNode)


def _is_sharded(x: Any) -> bool:
    """Known for arrays out of jit only; traced ones are packed."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return False
    return not x.sharding.is_fully_replicated
