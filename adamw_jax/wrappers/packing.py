"""Packs many small leaves into a few buffers, so that updating them costs one leaf."""

import functools
import math
import sys
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._tree import broadcast, describe_mismatch, path_string

# Buffer sizes are multiples of it, so that 2, 4, 8, ... devices can share a buffer.
_MULTIPLE = 1024


class _Layout:
    """The static part of a :class:`Packed`: which leaf is in which buffer."""

    def __init__(self, treedef: Any, paths: tuple, structs: tuple, names: tuple):
        self.treedef = treedef
        self.paths = paths
        self.structs = structs
        self.names = names  # the buffer of each leaf; None: it is not packed
        self.unpacked = [i for i, name in enumerate(names) if name is None]
        self.packed: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            if name is not None:
                self.packed.setdefault(name, []).append(i)
        self._identity = (treedef, self.paths, self.structs, self.names)
        self._hash = hash(self._identity)

    # Compared at every call of a compiled function, mostly with itself.
    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (
            isinstance(other, _Layout)
            and self._hash == other._hash
            and self._identity == other._identity
        )


# Equal layouts are one object, even if gradients are packed on their own.
_layout = functools.lru_cache(_Layout)


class Packed:
    """A tree of arrays whose small leaves are in a few buffers; see :func:`pack`.

    A pytree of the buffers and the leaves that are not packed, so it goes wherever
    parameters go: into `jax.grad`, `init`, `update`, `jit`, `jax.device_put`.

    Attributes:
        buffers: arrays `[multiple of 1,024]` by name, which is their dtype and the
            values of the masks.
        leaves: the leaves that are not packed, in order.
    """

    def __init__(self, buffers: dict[str, Any], leaves: list[Any], layout: _Layout):
        _register_with_flax()
        self.buffers = buffers
        self.leaves = leaves
        self._layout = layout

    @property
    def tree(self) -> Any:
        """The original tree, as slices of the buffers that fuse into their users.

        The gradient with respect to a :class:`Packed` is a :class:`Packed`. Outside of
        `jit` this copies.
        """

        def split(array, structs):
            if isinstance(array, jax.ShapeDtypeStruct):
                return [jax.ShapeDtypeStruct(x.shape, array.dtype) for x in structs]
            sizes = [math.prod(struct.shape) for struct in structs]
            # The transpose of a split is one concatenation; that of n slices, n pads.
            parts = jax.lax.split(array, [*sizes, array.shape[0] - sum(sizes)])
            return [x.reshape(y.shape) for x, y in zip(parts, structs, strict=False)]

        return _spread(self, split, self.leaves)

    def evaluate_on_leaves(self, name: str, function: Any) -> "Packed":
        """Evaluates a function of trees, such as a mask, on the original leaves.

        Args:
            name: of the function, for the error.
            function: from a tree of shapes to a tree with a value for each leaf.

        Returns:
            A :class:`Packed` with one value in place of each array.

        Raises:
            ValueError: two leaves of one buffer have different values.
        """
        layout = self._layout
        others = [
            layout.structs[i] if hasattr(leaf, "dtype") else leaf
            for i, leaf in zip(layout.unpacked, self.leaves, strict=True)
        ]
        tree = function(_spread(self, lambda _, structs: structs, others))
        values, buffers = layout.treedef.flatten_up_to(tree), {}
        for buffer, (first, *rest) in layout.packed.items():
            for i in rest:
                if values[i] != values[first]:
                    raise ValueError(
                        f"{name} is {values[first]!r} for {layout.paths[first]} and "
                        f"{values[i]!r} for {layout.paths[i]}, which share a buffer; "
                        "pass it to pack as well: pack(params, mask)"
                    )
            buffers[buffer] = values[first]
        return Packed(buffers, [values[i] for i in layout.unpacked], layout)

    def __contains__(self, key: Any) -> bool:
        """Whether the original tree has this key; Flax's TrainState asks for one."""
        return key in self._layout.treedef.unflatten(self._layout.structs)

    def __repr__(self):
        layout = self._layout
        lines = [f"{len(layout.paths)} leaves, {len(self.leaves)} of them not packed"]
        for name, buffer in self.buffers.items():
            what = getattr(buffer, "shape", buffer)
            lines.append(f"{name}: {len(layout.packed[name])} leaves in {what}")
        return "\n".join(lines)


def _with_keys(packed: Packed) -> tuple[Any, _Layout]:
    key, paths = jax.tree_util.DictKey, packed._layout.paths
    others = zip(packed._layout.unpacked, packed.leaves, strict=True)
    children = [(key(name), buffer) for name, buffer in packed.buffers.items()]
    return children + [(key(paths[i]), leaf) for i, leaf in others], packed._layout


def _from_children(layout: _Layout, children: Any) -> Packed:
    buffers = dict(zip(layout.packed, children, strict=False))
    return Packed(buffers, list(children[len(buffers) :]), layout)


jax.tree_util.register_pytree_with_keys(Packed, _with_keys, _from_children)


# ---------------------------------------------------------------------------
# flax.serialization
# ---------------------------------------------------------------------------

_is_registered = False


def _register_with_flax() -> None:
    """Makes flax.serialization save :class:`Packed`, as soon as Flax is imported."""
    global _is_registered
    flax = sys.modules.get("flax.serialization")
    if not _is_registered and hasattr(flax, "register_serialization_state"):
        flax.register_serialization_state(Packed, _to_state_dict, _from_state_dict)
        _is_registered = True


def _to_state_dict(packed: Packed) -> dict[str, Any]:
    serialization = sys.modules["flax.serialization"]  # it called this function
    parts = {"buffers": packed.buffers, "leaves": packed.leaves}
    return serialization.to_state_dict(parts) | {"layout": _describe(packed._layout)}


def _from_state_dict(target: Packed, state_dict: dict[str, Any]) -> Packed:
    serialization = sys.modules["flax.serialization"]
    if "layout" not in state_dict:
        raise ValueError(
            "the state dict must be that of a packed tree: restore it into "
            "unpack(target), and pack the result with pack_like"
        )
    expected, saved = _describe(target._layout), state_dict["layout"]
    if expected != saved:
        rows = zip_longest(expected.split("\n"), saved.split("\n"), fillvalue="nothing")
        row = next(pair for pair in rows if pair[0] != pair[1])
        raise ValueError(
            f"the state dict was packed in another way: expected {row[0]}, got {row[1]}"
        )
    parts = {"buffers": target.buffers, "leaves": target.leaves}
    parts = serialization.from_state_dict(
        parts, {name: state_dict[name] for name in parts}
    )
    return Packed(parts["buffers"], parts["leaves"], target._layout)


def _describe(layout: _Layout) -> str:
    """One line a leaf, so that buffers of equal sizes are not taken for each other."""
    rows = zip(layout.paths, layout.structs, layout.names, strict=True)
    return "\n".join(
        f"{path} {struct.shape} in {name or 'a leaf of its own'}"
        for path, struct, name in rows
    )


# ---------------------------------------------------------------------------
# packing and unpacking
# ---------------------------------------------------------------------------


def _spread(packed: Packed, split: Any, others: list[Any]) -> Any:
    """The original tree, from `split(buffer, structs)` and the leaves not packed."""
    layout = packed._layout
    leaves: list[Any] = [None] * len(layout.paths)
    for i, leaf in zip(layout.unpacked, others, strict=True):
        leaves[i] = leaf
    for name, indices in layout.packed.items():
        structs, buffer = [layout.structs[i] for i in indices], packed.buffers[name]
        if hasattr(buffer, "dtype"):
            parts = split(buffer, structs)
        elif _is_hidden(buffer) or jax.tree_util.all_leaves([buffer]):
            parts = [buffer] * len(indices)  # such as a mask's bool
        else:
            raise ValueError(
                f"buffer {name} was replaced by a {type(buffer).__name__}, which "
                "cannot be split into leaves"
            )
        for i, part in zip(indices, parts, strict=True):
            leaves[i] = part
    return layout.treedef.unflatten(leaves)


def pack(params: Any, *masks: Any, max_size: int = 2**16) -> Packed:
    """Packs the small leaves of a tree into one buffer per dtype.

    Updating thousands of small leaves takes thousands of small programs; their number
    dominates both compilation and run time. Pack the parameters **once**, before
    `init`, and keep them packed: gradients, moments and updates are then a few large
    arrays, and the network reads its usual tree through slices.

    `optax.flatten(inner)` concatenates all leaves at every update instead, and copies
    parameters and gradients each time.

    A rule that depends on a leaf as a whole sees the buffer: LARS, LAMB and Muon need
    the leaves themselves, and so does code that looks for parameters by path in the
    state. Masks and labels see the leaves if they are passed to this package or made by
    :func:`adamw_jax.mask_by`, :func:`adamw_jax.mask_by_path` or
    :func:`adamw_jax.labels_by_path`; other functions, passed to Optax, see the buffers.
    A mask must agree on all leaves of a buffer, which it does if it was passed here.

    Conventions that bite:

    * Save and restore `unpack(params)` and `unpack(state)`. They are plain trees, those
      of training without packing; :func:`pack_like` packs them again.
    * `flax.serialization` saves packed trees too, and restores them into trees with the
      same leaves in the same buffers. Import it before the tree that it saves is made.
    * Buffers are padded with zeros to a multiple of 1,024. The padding has zero
      gradients, moments and updates, unless a rule computes 0 / 0 (an eps of 0).
    * Floating-point leaves are packed; complex, integer and bool leaves stay apart.
    * A sharded leaf is not packed. A buffer may be sharded over devices afterwards,
      like the moments of a state; reading its `tree` gathers it.

    Args:
        params: a tree of arrays, or of numbers; None leaves are allowed.
        *masks: the masks (or labels) that transformations will use, such as the `mask`
            of :func:`adamw_jax.adamw`: trees, prefixes, or functions from params to
            either. Leaves on which they differ go into different buffers.
        max_size: leaves with more elements are not packed.

    Returns:
        A :class:`Packed`, whose `tree` is the original.

    Raises:
        TypeError: a leaf is neither an array nor a number.
        ValueError: a mask does not have the structure of the parameters, or max_size is
            negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adamw_jax import adamw, apply_updates, no_decay_on_bias_and_norm
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> params = pack(params, no_decay_on_bias_and_norm)
        >>> params
        2 leaves, 0 of them not packed
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
    leaves = [_as_array(path_string(path), leaf) for path, leaf in flat]
    columns = [
        treedef.flatten_up_to(broadcast(f"masks[{i}]", mask, params))
        for i, mask in enumerate(masks)
    ]
    names = []
    for i, leaf in enumerate(leaves):
        small = leaf.size <= max_size and not _is_sharded(leaf)
        small = small and jnp.issubdtype(leaf.dtype, jnp.floating)
        name = "/".join([str(leaf.dtype), *(repr(column[i]) for column in columns)])
        names.append(name if small else None)
    paths = tuple(path_string(path) for path, _ in flat)
    structs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return _pack(leaves, _layout(treedef, paths, structs, tuple(names)))


def unpack(tree: Any) -> Any:
    """Replaces each :class:`Packed` inside a tree, such as a state, by its `tree`.

    Args:
        tree: parameters, a state, or anything that contains them.

    Returns:
        What the tree would be without :func:`pack`. The arrays are copies (outside of
        `jit`); shapes give shapes.

    Raises:
        ValueError: a buffer was replaced by something that cannot be split: the moments
            of :func:`adamw_jax.quantize_moments`, whose blocks cross the leaves.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adamw_jax import adam
        >>> params = {"a": jnp.ones(2), "b": jnp.ones((3, 1))}
        >>> state = unpack(adam(0.1).init(pack(params)))
        >>> jax.tree.structure(state) == jax.tree.structure(adam(0.1).init(params))
        True
    """
    return jax.tree.map(
        lambda x: x.tree if isinstance(x, Packed) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Packed),
    )


def pack_like(tree: Any, like: Any) -> Any:
    """Packs a tree the way another one is packed: the inverse of :func:`unpack`.

    Args:
        tree: a tree with the structure of `unpack(like)`: a restored state, or
            gradients with respect to `params.tree`.
        like: parameters or a state that contain a :class:`Packed`; shapes suffice.

    Returns:
        The tree, with the structure of `like` and its own dtypes.

    Raises:
        ValueError: the structure or a shape differs (the message names the leaf), or a
            buffer would hold two dtypes.

    Example:
        >>> import jax.numpy as jnp
        >>> params = pack({"a": jnp.zeros(2), "b": jnp.zeros(3)})
        >>> grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> print(pack_like(grads, params).buffers["float32"][:6])
        [1. 1. 1. 1. 1. 0.]
    """

    def pack(like, sub):
        if not isinstance(like, Packed):
            return sub
        layout = like._layout
        try:
            leaves = layout.treedef.flatten_up_to(sub)
        except (ValueError, TypeError):
            structs = layout.treedef.unflatten(layout.structs)
            raise ValueError(
                "the tree does not have the structure of the packed one: "
                f"{describe_mismatch('tree', sub, structs)}"
            ) from None
        leaves = [
            x if hasattr(x, "dtype") or _is_hidden(x) else _as_array(path, x)
            for path, x in zip(layout.paths, leaves, strict=True)
        ]
        for path, x, struct in zip(layout.paths, leaves, layout.structs, strict=True):
            if not _is_hidden(x) and x.shape != struct.shape:
                raise ValueError(
                    f"leaf {path} must have the packed shape {struct.shape}, got "
                    f"{x.shape}"
                )
        return _pack(leaves, layout)

    return jax.tree.map(pack, like, tree, is_leaf=lambda x: isinstance(x, Packed))


def _pack(leaves: list[Any], layout: _Layout) -> Packed:
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
    return Packed(buffers, [leaves[i] for i in layout.unpacked], layout)


def _as_array(path: str, x: Any) -> Any:
    """An array in a dtype that JAX has: without x64, float64 in NumPy is float32."""
    if isinstance(x, jax.Array):
        return x
    try:
        return jnp.asarray(x)
    except TypeError:
        raise TypeError(
            f"leaf {path} must be an array or a number, got {x!r}"
        ) from None


def _is_hidden(x: Any) -> bool:
    """A leaf that a transformation does not see, as one that is frozen."""
    return isinstance(x, optax.MaskedNode)


def _is_sharded(x: Any) -> bool:
    """Known for arrays out of jit only; traced ones are packed."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return False
    return not x.sharding.is_fully_replicated
