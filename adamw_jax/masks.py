"""Which leaf gets what: masks for decay and freezing, labels for learning rates.

A mask is a tree of bools, a prefix of one, or a function from params to either. The
functions here look at the leaf's path, `block1/conv/kernel`: a rule on the number of
dimensions is wrong for layers stacked by `scan`, whose biases are matrices.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._tree import (
    broadcast,
    check_scalar,
    is_none,
    leaves_like,
    map_leaves,
    path_string,
)
from .apply import NewParams, multiplied
from .wrappers.packing import Flat, collapse, struct_tree

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

    return _per_array("mask", mask)


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

    return _per_array("mask", mask)


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

    return _per_array(
        "labels", lambda params: jax.tree_util.tree_map_with_path(label, params)
    )


def scale_by_group(
    multipliers: Mapping[str, Any], labels: Any
) -> optax.GradientTransformation:
    r"""Discriminative learning rates: one multiplier for each labelled group.

    $u \leftarrow k_{label} u$. Put it **behind** the optimizer: there it multiplies
    the learning rate of the group, and with it the decoupled decay, as PyTorch's
    parameter groups and fastai's layer groups do. In front of Adam it would do
    nothing, since Adam divides a constant factor out again.

    Args:
        multipliers: from label to a number >= 0 or a traced scalar.
        labels: a tree of labels (or a prefix), or a function from params to one, as
            :func:`labels_by_path`.

    Returns:
        A transformation.

    Raises:
        ValueError: a negative multiplier; at `init` a leaf whose label has no
            multiplier, or a multiplier that no leaf uses.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import adamw, labels_by_path
        >>> tx = optax.chain(
        ...     adamw(3e-3),
        ...     scale_by_group({"body": 1 / 9, "head": 1.0},
        ...                    labels_by_path({"body": "^layer", "head": "^head"})))
        >>> params = {"layer1": jnp.zeros(1), "head": jnp.zeros(1)}
        >>> grads = {"layer1": jnp.ones(1), "head": jnp.ones(1)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> print(f"{updates['layer1'][0]:.6f} {updates['head'][0]:.6f}")
        -0.000333 -0.003000

    References:
        Howard and Ruder, `Universal Language Model Fine-tuning
        <https://arxiv.org/abs/1801.06146>`_, 2018.
    """
    for name, value in multipliers.items():
        check_scalar(f"multipliers[{name!r}]", value)

    def resolve(params):
        tree = _per_array("labels", lambda p: broadcast("labels", labels, p))(params)
        for path, label in jax.tree_util.tree_leaves_with_path(tree):
            if label not in multipliers:
                raise ValueError(
                    f"leaf {path_string(path)} has the label {label!r}, but there are "
                    f"multipliers for {', '.join(multipliers)} only"
                )
        return tree

    def init(params):
        used = set(jax.tree.leaves(resolve(params)))
        if used and (unused := set(multipliers) - used):
            raise ValueError(f"no leaf has the label {', '.join(sorted(unused))}")
        return optax.EmptyState()

    def update(updates, state, params=None):
        tree = resolve(updates if params is None else params)
        flat_labels = leaves_like(updates, "params", tree)

        def leaf(i, u):
            return (jnp.asarray(multipliers[flat_labels[i]], u.dtype) * u,)

        return map_leaves(leaf, updates, {}, carried=0)[0], state

    return optax.GradientTransformation(init, update)


class FreezeState(NamedTuple):
    """The state of the inner transformation, which knows the trained leaves only."""

    inner_state: optax.OptState


def freeze(
    inner: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """Trains only the leaves that the mask does not select.

    The inner transformation never sees the frozen leaves: they have no moments, take
    no part in a global norm, and their parameters do not change by one bit. To
    unfreeze, build the optimizer anew, as fast.ai does between its two stages.

    Args:
        inner: the optimizer of the other leaves.
        mask: True where frozen, as :func:`mask_by_path`.

    Returns:
        A transformation whose updates are zero at the frozen leaves.

    Raises:
        ValueError: a mask of another structure than the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adamw_jax import adamw
        >>> tx = freeze(adamw(1e-3), mask_by_path("^body/"))
        >>> params = {"body": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> print(updates["body"]["w"] + 0, updates["head"]["w"])
        [0. 0.] [-0.0010001 -0.0010001]
    """
    inner = optax.with_extra_args_support(inner)

    def hide(tree, frozen):
        # An empty node, as in optax.masked: no transformation sees a leaf there.
        return jax.tree.map(
            lambda f, x: optax.MaskedNode() if f else x, frozen, tree, is_leaf=is_none
        )

    def init(params):
        return FreezeState(inner.init(hide(params, resolve_mask(mask, params))))

    def update(updates, state, params=None, **extra_args) -> tuple[Any, FreezeState]:
        updates = multiplied(updates)
        frozen = resolve_mask(mask, updates if params is None else params)
        new, inner_state = inner.update(
            hide(updates, frozen),
            state.inner_state,
            None if params is None else hide(params, frozen),
            **extra_args,
        )
        if isinstance(new, NewParams):
            shown = jax.tree.map(
                lambda f, p, new_p: p if f else new_p, frozen, params, new.params
            )
            return NewParams(shown, params), FreezeState(inner_state)

        def zero(u, new_u):
            if u is None or not isinstance(new_u, optax.MaskedNode):
                return None if u is None else new_u
            # -0.0, the neutral element: -0.0 + 0.0 would flip the sign of a zero.
            return jnp.full_like(u, -0.0)

        # Up to the leaves of the updates, so that a MaskedNode counts as one.
        new = jax.tree.map(zero, updates, new, is_leaf=is_none)
        return new, FreezeState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def resolve_mask(mask: Mask, params: Any) -> Any:
    """The tree of bools, one for every leaf of params."""
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    tree = _per_array("mask", lambda p: broadcast("mask", mask, p))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"mask must be True or False at leaf {path_string(path)}, got {leaf!r}"
            )
    return tree


def leaf_flags(mask: Mask, params: Any, updates: Any) -> list[bool]:
    """The mask as a list in the order of the updates' leaves, None leaves included."""
    return leaves_like(updates, "params", resolve_mask(mask, params))


def _per_array(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function of a tree, which gives a :class:`Flat` a value for each array."""

    def on_any(params):
        if not isinstance(params, Flat):
            return function(params)
        return collapse(name, function(struct_tree(params)), params)

    return on_any


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
