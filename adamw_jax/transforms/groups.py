"""Groups of leaves with their own learning rates, and frozen leaves."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_params, check_scalar
from .._dtypes import as_array, is_inexact, scalar_dtype
from .._transformation import Transformation, keep_state_dtypes, step_with_factor
from .._tree import broadcast, is_none, leaves_like, map_leaves, on_leaves, path_string
from ..apply import describe_step
from ..hyperparams import ScaleByGroupState, values_in_force
from ..masks import Mask, is_part, resolve_mask


def scale_by_group(multipliers: Mapping[str, Any], labels: Any) -> Transformation:
    r"""Discriminative learning rates: one multiplier per labelled group.

    $u \leftarrow k_{label} u$. Put it **after** the optimizer: there it multiplies the
    learning rate of the group, and with it the decoupled decay, like PyTorch's
    parameter groups and fastai's layer groups. Before Adam it has no effect, because
    Adam is invariant to the scale of the gradients.

    Args:
        multipliers: from label to a number >= 0 or a traced scalar.
        labels: a tree of labels, a prefix of one, or a function from params to either,
            such as :func:`labels_by_path`.

    Returns:
        A transformation.

    Raises:
        ValueError: a multiplier is negative; or, at `init`, a label has no multiplier
            or a multiplier no leaf in a whole tree (see :func:`mask_by_path`).

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
    names = sorted(multipliers)
    follows = tuple(isinstance(multipliers[name], jax.Array) for name in names)

    def resolve(params):
        tree = on_leaves("labels", lambda p: broadcast("labels", labels, p))(params)
        for path, label in jax.tree_util.tree_leaves_with_path(tree):
            if label not in multipliers:
                raise ValueError(
                    f"leaf {path_string(path)} has the label {label!r}, but only "
                    f"{', '.join(map(str, multipliers))} have multipliers"
                )
        return tree

    values = tuple(multipliers[name] for name in names)

    def init(params):
        used = set(jax.tree.leaves(resolve(params)))
        unused = set(multipliers) - used
        if used and unused and not is_part(params):
            raise ValueError(
                f"no leaf has the label {', '.join(map(str, unused))} of multipliers"
            )
        dtype = scalar_dtype(params)
        # Two copies, so that the state can be donated.
        last = tuple(jnp.array(x, dtype) for x in values)
        current = dict(zip(names, map(jnp.copy, last), strict=True))
        return ScaleByGroupState(current, last)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        tree = resolve(updates if params is None else params)
        flat_labels = leaves_like(updates, "params", tree)
        current, stored, last = values_in_force(
            values,
            tuple(jnp.asarray(state.multipliers[name]) for name in names),
            state.last_values,
            ("multiplier",) * len(names),
            follows,
        )
        by_label = dict(zip(names, current, strict=True))

        def leaf(i, u):
            return (by_label[flat_labels[i]].astype(u.dtype) * u,)

        (updates,) = map_leaves(leaf, updates, {}, carried=0, params=params)
        return updates, ScaleByGroupState(dict(zip(names, stored, strict=True)), last)

    return Transformation(init, update)


class FreezeState(NamedTuple):
    """The state of the inner transformation, for the trained leaves only."""

    inner_state: optax.OptState


def freeze_leaves(inner: optax.GradientTransformation, mask: Mask) -> Transformation:
    """Freezes the leaves that the mask selects.

    The inner transformation never sees the frozen leaves: they have no moments and do
    not count in a global norm, and their parameters keep every bit. To unfreeze, build
    a new optimizer, as fast.ai does between its two stages.

    `optax.freeze(mask)` only zeroes updates. Unlike it and
    `optax.selective_transform`, this has a `step` if `inner` has one, so
    :func:`adamw_jax.update_and_apply` keeps its one pass.

    Args:
        inner: the optimizer of the other leaves.
        mask: True for frozen leaves; see :func:`adamw_jax.mask_by_path`.

    Returns:
        A transformation whose updates of frozen leaves are zero.

    Raises:
        ValueError: the mask does not have the structure of the parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adamw_jax import adamw, mask_by_path
        >>> tx = freeze_leaves(adamw(1e-3), mask_by_path("^body/"))
        >>> params = {"body": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> print(updates["body"]["w"] + 0, updates["head"]["w"])
        [0. 0.] [-0.0010001 -0.0010001]
    """
    inner = keep_state_dtypes(inner)

    def hide(tree, frozen):
        # Empty nodes, as in optax.masked, are invisible to transformations.
        return jax.tree.map(
            lambda f, x: optax.MaskedNode() if f else x, frozen, tree, is_leaf=is_none
        )

    def init(params):
        return FreezeState(inner.init(hide(params, resolve_mask(mask, params))))

    def update(updates, state, params=None, **extra_args) -> tuple[Any, FreezeState]:
        frozen = resolve_mask(mask, updates if params is None else params)
        new, inner_state = inner.update(
            hide(updates, frozen),
            state.inner_state,
            None if params is None else hide(params, frozen),
            **extra_args,
        )

        def zero(u, new_u):
            if u is None or not isinstance(new_u, optax.MaskedNode):
                return None if u is None else new_u
            u = as_array(u)
            # -0.0 is the neutral element: adding 0.0 would flip the sign of -0.0.
            return jnp.full_like(u, -0.0) if is_inexact(u) else jnp.zeros(u.shape, bool)

        # Mapped over the leaves of the updates, where new may have a MaskedNode.
        new = jax.tree.map(zero, updates, new, is_leaf=is_none)
        return new, FreezeState(inner_state)

    def step(grads, state, params, *, factor=None, **extra_args):
        check_params(params)
        frozen = resolve_mask(mask, params)
        new, inner_state = step_with_factor(
            inner,
            hide(grads, frozen),
            state.inner_state,
            hide(params, frozen),
            factor,
            **extra_args,
        )
        new = jax.tree.map(lambda f, p, q: p if f else q, frozen, params, new)
        return new, FreezeState(inner_state)

    def describe(params):
        if params is not None:
            params = hide(params, resolve_mask(mask, params))
        return describe_step(inner, params)

    methods = {"step": step} if hasattr(inner, "step") else {}
    wide_updates = getattr(inner, "wide_updates", False)
    return Transformation(
        init, update, describe_step=describe, wide_updates=wide_updates, **methods
    )
