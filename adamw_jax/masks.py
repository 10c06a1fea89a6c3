"""Masks for decay and freezing, labels for groups of leaves.

A mask is a tree of flags, a prefix of one, or a function from params to either. A flag
is a bool, 0 or 1, or an array of one of them; it must not depend on traced values. The
containers are those of the parameters: a dict is no prefix of a FrozenDict or of an
`nnx.State`, as in Optax.

The functions here decide by the leaf's path, such as `block1/conv/kernel`. A rule on
the number of dimensions alone fails for layers stacked by `scan`, whose biases are
matrices.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ._tree import broadcast, is_none, leaves_like, on_leaves, path_string

Mask = Any | Callable[[Any], Any] | None

# Names in Flax (Linen, NNX), Haiku, Equinox and PyTorch.
_MATRIX_LEAF = re.compile(r"^(kernel|embedding)$", re.IGNORECASE)
_BIAS_OR_NORM_LEAF = re.compile(
    r"^((.*_)?bias(_\w+)?|b|offset|scale|gamma|beta)$", re.IGNORECASE
)
_NORM_MODULE = re.compile(
    r"(batch|layer|group|instance|rms|sync)_?norm(_?\d+)?$|(^|_)norms?\d*(_|$)"
    r"|norm(_?\d+)?$|(^|_)(bn|ln)s?\d*(_|$)",
    re.IGNORECASE,
)


def mask_by(predicate: Callable[[str, Any], bool]) -> Callable[[Any], Any]:
    """Makes a mask from a predicate on path and leaf.

    Args:
        predicate: called with the path, such as `"block1/conv/kernel"`, and the leaf.

    Returns:
        A function from params to a tree of bools.

    Example:
        >>> import jax.numpy as jnp
        >>> mask = mask_by(lambda path, leaf: leaf.ndim > 1)
        >>> mask({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
        {'bias': False, 'kernel': True}
    """

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: bool(predicate(path_string(path), leaf)), params
        )

    return on_leaves("mask", mask)


def mask_by_path(*patterns: str) -> Callable[[Any], Any]:
    r"""Makes a mask that selects the leaves whose path matches any of the patterns.

    Args:
        *patterns: regular expressions, searched for anywhere in the path, such as
            `block1/conv/kernel`.

    Returns:
        A function from params to a tree of bools.

    Raises:
        ValueError: a pattern does not compile; or, when the mask is applied to a whole
            tree, no leaf matches, which is most likely a misspelling. In a part, such
            as `optax.partition`, `optax.masked` and :func:`freeze_leaves` pass on, that
            is no error: the leaf may be in another part.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"conv": {"kernel": jnp.zeros((3, 3, 1, 2)), "bias": jnp.zeros(2)}}
        >>> mask_by_path(r"kernel$")(params)
        {'conv': {'bias': False, 'kernel': True}}
    """
    compiled = [_compile(pattern) for pattern in patterns]

    def matches(path):
        return any(pattern.search(path) for pattern in compiled)

    def mask(params):
        # None as well: a leaf without a gradient is no misspelling.
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_none)
        paths = [path_string(path) for path, _ in leaves]
        if paths and not any(map(matches, paths)) and not is_part(params):
            raise ValueError(
                f"no leaf matches {' or '.join(map(repr, patterns))}; the leaves are "
                + ", ".join(paths)
            )
        return mask_by(lambda path, _: matches(path))(params)

    return on_leaves("mask", mask)


def no_decay_on_bias_and_norm(params: Any) -> Any:
    """The usual mask for weight decay: all leaves but biases and norm parameters.

    The first rule that applies decides:

    1. **Name of the leaf.** A `kernel` or an `embedding` decays; `b`, `offset`,
       `scale`, `gamma`, `beta` and names with the word `bias` do not.
    2. **Name of the module.** A leaf of a norm (`LayerNorm_0`, `bn1`, `ln_f`,
       `final_norm`) does not decay.
    3. **Shape.** A leaf of at most one dimension does not decay, such as the `weight`
       of a norm in a numbered list (`layers/1/weight`). Leading axes of layers stacked
       by `scan` or `vmap` do not count. They are known from the leaves that rule 1
       excludes, which have one dimension unstacked: in the nearest module that has
       such leaves, and if all leaves of that module share the axes. A stacked norm
       without a telling name, in a module without biases, decays.

    :func:`describe_mask` prints the rule for each leaf. Rule 3 does not see leaves that
    `optax.partition` or :func:`freeze_leaves` hides; pass `mask(params)` there.

    Args:
        params: any tree.

    Returns:
        A tree of bools, True where the leaf decays.

    Example:
        >>> import jax.numpy as jnp
        >>> no_decay_on_bias_and_norm({
        ...     "Dense_0": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
        ...     "LayerNorm_0": {"scale": jnp.zeros(3)}})
        {'Dense_0': {'bias': False, 'kernel': True}, 'LayerNorm_0': {'scale': False}}
    """

    def mask(params):
        decays = [rule.decays for rule in _decay_rules(params)]
        return jax.tree.structure(params).unflatten(decays)

    return on_leaves("mask", mask)(params)


class _Rule(NamedTuple):
    decays: bool
    reason: str


def _decay_rules(params: Any) -> list[_Rule]:
    """The rule of :func:`no_decay_on_bias_and_norm` that decides about each leaf."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    parts = [tuple(re.split(r"[/.]", path_string(path))) for path, _ in flat]
    shapes = [np.shape(leaf) for _, leaf in flat]

    @functools.cache
    def shapes_by_module():
        """For each module, also of the leaves in modules inside it: all, and biases."""
        leaves: dict[tuple[str, ...], list[tuple]] = {}
        biases: dict[tuple[str, ...], list[tuple]] = {}
        for (*modules, name), shape in zip(parts, shapes, strict=True):
            for depth in range(len(modules) + 1):
                module = tuple(modules[:depth])
                leaves.setdefault(module, []).append(shape)
                if _BIAS_OR_NORM_LEAF.search(name):
                    biases.setdefault(module, []).append(shape)
        return leaves, biases

    @functools.cache
    def stacked_axes(module):
        """How many leading axes come from `scan` or `vmap`, judged by the biases."""
        leaves, biases = shapes_by_module()
        while module and module not in biases:
            module = module[:-1]
        axes = min((len(shape) - 1 for shape in biases.get(module, ())), default=0)
        while axes > 0 and len({shape[:axes] for shape in leaves[module]}) > 1:
            axes -= 1
        return max(axes, 0)

    def rule(modules, name, shape):
        if _MATRIX_LEAF.search(name):
            return _Rule(True, "name of leaf")
        if _BIAS_OR_NORM_LEAF.search(name):
            return _Rule(False, "name of leaf")
        # The nearest module that is not a list index.
        module = next((m for m in reversed(modules) if not m.isdigit()), "")
        if _NORM_MODULE.search(module):
            return _Rule(False, "name of module")
        axes = stacked_axes(modules) if len(shape) > 1 else 0
        return _Rule(len(shape) - axes > 1, f"shape[{axes}:]" if axes else "shape")

    return [
        rule(tuple(modules), name, shape)
        for (*modules, name), shape in zip(parts, shapes, strict=True)
    ]


def describe_mask(params: Any, mask: Mask = no_decay_on_bias_and_norm) -> None:
    """Prints which leaves decay and which do not.

    For :func:`no_decay_on_bias_and_norm` it also prints the rule that decided: the name
    of the leaf, the name of its module, or the shape, where `shape[1:]` leaves out one
    axis of stacked layers.

    Args:
        params: any tree of arrays or `ShapeDtypeStruct`, also packed.
        mask: as for :func:`adamw_jax.add_decayed_weights`.

    Raises:
        ValueError: the mask does not match the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> params = [{"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, {"w": jnp.zeros(3)}]
        >>> describe_mask(params)
        decay  rule          shape   path
        no     name of leaf  (3,)    0/b
        yes    shape         (2, 3)  0/w
        no     shape         (3,)    1/w
        1 of 3 leaves decay, 6 of 12 parameters
    """
    flags = resolve_mask(mask, params)
    if hasattr(type(params), "evaluate_on_leaves"):  # packed, as in on_leaves
        flags, params = flags.tree, params.tree
    leaves = jax.tree_util.tree_leaves_with_path(params)
    columns = {
        "decay": ["yes" if flag else "no" for flag in jax.tree.leaves(flags)],
        "shape": [str(tuple(np.shape(leaf))) for _, leaf in leaves],
        "path": [path_string(path) for path, _ in leaves],
    }
    if mask is no_decay_on_bias_and_norm:
        rules = [rule.reason for rule in _decay_rules(params)]
        columns = {"decay": columns.pop("decay"), "rule": rules, **columns}
    widths = [max(map(len, [name, *values])) for name, values in columns.items()]
    for row in [columns, *zip(*columns.values(), strict=True)]:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    sizes = [int(np.prod(np.shape(leaf))) for _, leaf in leaves]
    decayed = [n for n, flag in zip(sizes, jax.tree.leaves(flags), strict=True) if flag]
    print(
        f"{len(decayed)} of {len(leaves)} leaves decay, {sum(decayed):,} of "
        f"{sum(sizes):,} parameters"
    )


def labels_by_path(
    patterns: Mapping[str, str], default: str | None = None
) -> Callable[[Any], Any]:
    """Labels leaves by path: the first pattern that matches decides.

    Args:
        patterns: from label to a regular expression, searched for in the path.
        default: the label of leaves that match no pattern. None: such a leaf is an
            error.

    Returns:
        A function from params to a tree of labels, for :func:`scale_by_group` and
        `optax.partition`.

    Raises:
        ValueError: a pattern does not compile; or, when applied, a leaf has no label.
            The message names its path.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"layer1": {"w": jnp.zeros(2)}, "head": {"w": jnp.zeros(2)}}
        >>> labels_by_path({"body": "^layer", "head": "^head"})(params)
        {'head': {'w': 'head'}, 'layer1': {'w': 'body'}}
    """
    compiled = {label: _compile(pattern) for label, pattern in patterns.items()}

    def label_leaf(path, _):
        name = path_string(path)
        for label, pattern in compiled.items():
            if pattern.search(name):
                return label
        if default is None:
            raise ValueError(f"leaf {name} matches none of {dict(patterns)}")
        return default

    return on_leaves(
        "labels", lambda params: jax.tree_util.tree_map_with_path(label_leaf, params)
    )


def resolve_mask(mask: Mask, params: Any) -> Any:
    """Expands a mask to a tree with one bool for every leaf of params."""
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    leaves = jax.tree.leaves(mask) if callable(mask) else []
    # An Equinox or NNX module of flags is callable, but it is a tree.
    is_module = leaves and all(_is_flag(leaf) for leaf in leaves)
    function = (lambda _: mask) if is_module else mask
    tree = on_leaves("mask", lambda p: broadcast("mask", function, p))(params)
    return jax.tree_util.tree_map_with_path(_to_bool, tree)


_FLAG_TYPES = (int, np.generic, np.ndarray, jax.Array)


def _is_flag(x: Any) -> bool:
    """Whether x is True or False: a bool, 0 or 1, or an array of one of them."""
    if isinstance(x, bool):
        return True
    if isinstance(x, jax.core.Tracer) or not isinstance(x, _FLAG_TYPES):
        return False
    if np.size(x) != 1:
        return False
    value = np.asarray(x)
    return value.dtype.kind in "biu" and value.item() in (0, 1)


def _to_bool(path: tuple, x: Any) -> bool:
    if _is_flag(x):
        return bool(x)
    leaf = f"leaf {path_string(path)}" if path else "all leaves"
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"mask must not depend on traced values, got {x} at {leaf}: compute it "
            "outside of jit or with NumPy"
        )
    raise TypeError(f"mask must be True or False at {leaf}, got {x!r}")


def is_part(params: Any) -> bool:
    """Whether `optax.masked` has hidden leaves; a hidden one may be a subtree."""
    nodes = jax.tree.leaves(params, is_leaf=_is_hidden)
    return any(map(_is_hidden, nodes))


def _is_hidden(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def leaf_flags(mask: Mask, params: Any, updates: Any) -> list[bool]:
    """The mask as a list in the order of the updates' leaves, including None leaves."""
    return leaves_like(updates, "params", resolve_mask(mask, params))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
