"""Which leaf gets what: masks for decay and freezing, labels for learning rates.

A mask is a tree of bools, a prefix of one, or a function from params to either. The
functions here look at the leaf's path, `block1/conv/kernel`: a rule on the number of
dimensions is wrong for layers stacked by `scan`, whose biases are matrices.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ._tree import broadcast, is_none, leaves_like, on_leaves, path_string

Mask = Any | Callable[[Any], Any] | None

# The names of Flax (Linen, NNX), Haiku, Equinox and PyTorch for what is not a matrix.
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
    """A mask from a predicate on path and leaf.

    Args:
        predicate: called with the path, as `"block1/conv/kernel"`, and the leaf.

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
    r"""A mask that selects the leaves whose path matches one of the patterns.

    Args:
        patterns: regular expressions, searched for anywhere in `block1/conv/kernel`.

    Returns:
        A function from params to a tree of bools.

    Raises:
        ValueError: a pattern that does not compile; and, when the mask is applied,
            patterns that match no leaf at all, since that is a misspelling.

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
        paths = [
            path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        if paths and not any(matches(path) for path in paths):
            raise ValueError(
                f"{' and '.join(map(repr, patterns))} match no leaf; the leaves are "
                + ", ".join(paths)
            )
        return mask_by(lambda path, _: matches(path))(params)

    return on_leaves("mask", mask)


def no_decay_on_bias_and_norm(params: Any) -> Any:
    """The usual mask for weight decay: all but biases and the affine of norm layers.

    A leaf is left out if its name is b, offset, scale, gamma or beta, or has the word
    bias in it, or if the module that holds it is named as a norm (`LayerNorm_0`,
    `bn1`, `ln_f`, `final_norm`), unless it is a `kernel` or an `embedding`. Only names
    count, so that the `(layers, features)` biases of scanned layers are left out as
    well. PyTorch names norm scales `weight`: there the module's name decides. Look at
    the result with :func:`describe_mask`.

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

    def decays(path, _):
        *modules, leaf = re.split(r"[/.]", path)
        # The nearest module that is not a number in a list.
        module = next((m for m in reversed(modules) if not m.isdigit()), "")
        return bool(_MATRIX_LEAF.search(leaf)) or not (
            _BIAS_OR_NORM_LEAF.search(leaf) or _NORM_MODULE.search(module)
        )

    return mask_by(decays)(params)


def describe_mask(params: Any, mask: Mask = no_decay_on_bias_and_norm) -> None:
    """Prints which leaf decays and which does not.

    Args:
        params: any tree of arrays or `ShapeDtypeStruct`.
        mask: as for :func:`adamw_jax.add_decayed_weights`.

    Raises:
        ValueError: the mask does not fit the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> describe_mask({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
        decay  shape   path
        no     (3,)    bias
        yes    (2, 3)  kernel
        1 of 2 leaves decay, 6 of 9 parameters
    """
    flags = leaf_flags(mask, params, params)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_none)
    rows = [
        (flag, tuple(np.shape(leaf)), path_string(path))
        for flag, (path, leaf) in zip(flags, leaves, strict=True)
        if leaf is not None
    ]
    width = max((len(str(shape)) for _, shape, _ in rows), default=5)
    print(f"decay  {'shape':{width}}  path")
    for flag, shape, path in rows:
        print(f"{'yes' if flag else 'no':5}  {shape!s:{width}}  {path}")
    size = [(flag, int(np.prod(shape))) for flag, shape, _ in rows]
    print(
        f"{sum(bool(flag) for flag, _ in size)} of {len(rows)} leaves decay, "
        f"{sum(n for flag, n in size if flag):,} of {sum(n for _, n in size):,} "
        "parameters"
    )


def labels_by_path(
    patterns: Mapping[str, str], default: str | None = None
) -> Callable[[Any], Any]:
    """Labels for groups of leaves: the first pattern that matches the path decides.

    Args:
        patterns: from label to the regular expression that is searched for.
        default: the label of leaves that match none. None makes those an error.

    Returns:
        A function from params to a tree of labels, for :func:`scale_by_group` and
        `optax.partition`.

    Raises:
        ValueError: a pattern that does not compile; when applied, a leaf without a
            label, named by its path.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"layer1": {"w": jnp.zeros(2)}, "head": {"w": jnp.zeros(2)}}
        >>> labels_by_path({"body": "^layer", "head": "^head"})(params)
        {'head': {'w': 'head'}, 'layer1': {'w': 'body'}}
    """
    compiled = {label: _compile(pattern) for label, pattern in patterns.items()}

    def label(path, _):
        name = path_string(path)
        for label, pattern in compiled.items():
            if pattern.search(name):
                return label
        if default is None:
            raise ValueError(f"leaf {name} matches none of {dict(patterns)}")
        return default

    return on_leaves(
        "labels", lambda params: jax.tree_util.tree_map_with_path(label, params)
    )


def resolve_mask(mask: Mask, params: Any) -> Any:
    """The tree of bools, one for every leaf of params."""
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    tree = on_leaves("mask", lambda p: broadcast("mask", mask, p))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"mask must be True or False at leaf {path_string(path)}, got {leaf!r}"
            )
    return tree


def leaf_flags(mask: Mask, params: Any, updates: Any) -> list[bool]:
    """The mask as a list in the order of the updates' leaves, None leaves included."""
    return leaves_like(updates, "params", resolve_mask(mask, params))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
