"""States of Optax's optimizers in ours, and back: a run goes on with the other one."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_scalar
from ._tree import describe_mismatch, path_string
from .hyperparams import HyperparamsState, ScaleByGroupState, is_overridden
from .overrides import override_hyperparams
from .transforms.bias_correction import LogProduct
from .transforms.moments import ScaleByAmsgradState
from .transforms.rounding import StochasticRoundingState
from .wrappers.accumulation import AccumulateState


def from_optax_state(
    optax_state: optax.OptState, state: optax.OptState, *, step: int | None = None
) -> optax.OptState:
    r"""Fills an optimizer state from that of an optimizer of Optax.

    The moments are those of Optax, bit for bit, and not copied. Both states may be
    those of chains, `optax.partition` or `optax.masked`; `optax.adam`, `adamw`,
    `nadam`, `sgd` and `optax.inject_hyperparams` of them continue with the optimizer of
    the same name here. Conventions that bite:

    * **AMSGrad.** The maximum that `optax.amsgrad` stores is of the corrected second
      moment. Only `amsgrad(convention="optax")` continues it.
    * **Bias correction.** Optax's float32 `1 - b**t` is off by 1e-5 (b = .999); ours is
      exact, so the next updates differ by as much. The betas are assumed to have had
      the values that they have in `state` or in the `hyperparams` of
      `inject_hyperparams`.
    * **Hyperparameters** are those of the optimizer that made `state`. Those of
      `inject_hyperparams` are in Optax's state, and a constant there that differs from
      ours is an edit: it becomes an override, as if by :func:`override_hyperparams`.
      Where Optax has a schedule, ours decides from the next update on. `eps` and what
      else is no hyperparameter here is an argument of the optimizer.
    * **Schedules** continue from Optax's count. Until the next update
      :func:`current_hyperparams` has the values of `state`.
    * `optax.MultiSteps` becomes :func:`accumulate_gradients` between two windows.

    Call it outside of `jit`.

    Args:
        optax_state: the state of the optimizer of Optax; or what Flax's
            `msgpack_restore` or Orbax make of it without a target, dicts and lists.
        state: the state of the optimizer that continues, such as `tx.init(params)`.
        step: number of updates done, from which schedules continue. None: the counts in
            `optax_state`. SGD without a schedule has none and needs it.

    Returns:
        The new state.

    Raises:
        TypeError, ValueError: the states are of different transformations, or their
            leaves have different paths, shapes, or dtypes that would lose bits; counts
            differ or are missing; `optax.MultiSteps` is within a window; or they are no
            states. The message names it.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import adamw
        >>> params, grads = jnp.zeros(2), jnp.ones(2)
        >>> old = optax.adamw(optax.linear_schedule(0.1, 0.0, 10))
        >>> _, old_state = old.update(grads, old.init(params), params)
        >>> tx = adamw(optax.linear_schedule(0.1, 0.0, 10))
        >>> state = from_optax_state(old_state, tx.init(params))
        >>> updates, state = tx.update(grads, state, params)
        >>> print([f"{u:.4f}" for u in updates], state.step)
        ['-0.0900', '-0.0900'] 2
    """
    return _convert("optax_state", _as_states(optax_state), "state", state, step)


def to_optax_state(
    state: optax.OptState, optax_state: optax.OptState
) -> optax.OptState:
    """Fills the state of an optimizer of Optax from ours.

    The reverse of :func:`from_optax_state`, where the conventions are described. Our
    state has more than Optax's, which has to be of no consequence: hyperparameters are
    not overridden, unless Optax's optimizer is in `optax.inject_hyperparams`, and betas
    were constant, or their product has vanished.

    Args:
        state: the state of an optimizer of this package.
        optax_state: that of the optimizer of Optax that continues, such as
            `tx.init(params)`. It must hold our moments without rounding. Optax stores
            them in the dtype of the parameters; `mu_dtype="params"` and
            `nu_dtype="params"` do so here.

    Returns:
        The new state of Optax.

    Raises:
        TypeError, ValueError: as for :func:`from_optax_state`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import adamw
        >>> params, grads = jnp.zeros(2), jnp.ones(2)
        >>> tx = adamw(0.1)
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> optax_state = to_optax_state(state, optax.adamw(0.1).init(params))
        >>> print(optax_state[0].count, optax_state[0].mu is state.inner_state[0].mu)
        1 True
    """
    return _convert("state", state, "optax_state", optax_state, None)


# ---------------------------------------------------------------------------
# finding what two states have in common
# ---------------------------------------------------------------------------

_WINDOWS = (AccumulateState, optax.MultiStepsState)
_MOMENTS = {
    "ScaleByAdamState": optax.ScaleByAdamState,
    "ScaleByAmsgradState of Optax's convention": optax.ScaleByAmsgradState,
    "ScaleByAmsgradState": ScaleByAmsgradState,
    "TraceState": optax.TraceState,
}
_INNER = ("inner_state", "inner_opt_state", "inner_states")
_CHECKPOINTED = (
    *(optax.InjectStatefulHyperparamsState, optax.MultiStepsState),
    *(optax.MaskedState, optax.PartitionState),
    *(optax.ScaleByAdamState, optax.ScaleByAmsgradState, optax.TraceState),
    optax.ScaleByScheduleState,
)

Scope = tuple[str, ...]  # the labels of the partitions around a state


class _Found(NamedTuple):
    """A state, and the hyperparameters of ours that it is inside of."""

    node: Any
    hyperparams: Any = None


Parts = dict[Scope, dict[str, list[_Found]]]


def _kind(node: Any) -> str | None:
    """What a state is, by a name that both libraries share; None for containers."""
    if not hasattr(node, "_fields"):
        is_container = node is None or isinstance(node, tuple | list | Mapping)
        return None if is_container else "array"
    if isinstance(node, HyperparamsState):
        return "hyperparams"
    if isinstance(node, optax.InjectStatefulHyperparamsState):
        return "inject"  # that of Optax before 0.1.9 does not say what is scheduled
    if isinstance(node, _WINDOWS):
        return "window"
    if node._fields == ("count",) or isinstance(node, StochasticRoundingState):
        return "counter"  # of a schedule of Optax or ours
    for name, kind in _MOMENTS.items():
        if isinstance(node, kind):
            return name
    if isinstance(node, ScaleByGroupState):
        return None  # the multipliers are those of the optimizer that continues
    if not set(node._fields) - set(_INNER):
        return None
    return type(node).__name__


def _inner_fields(node: Any) -> list[str]:
    """The fields of a state that hold the states of inner transformations."""
    if _kind(node) in (*_MOMENTS, "counter") or isinstance(node, ScaleByGroupState):
        return []
    known = [name for name in node._fields if name in _INNER]
    if known or _kind(node) in ("hyperparams", "inject", "window"):
        return known
    return [
        name
        for name in node._fields
        if any(
            _kind(x) in (*_MOMENTS, "hyperparams", "inject", "counter")
            for x in jax.tree.leaves(
                getattr(node, name), is_leaf=lambda x: _kind(x) is not None
            )
        )
    ]


def _map_children(node: Any, scope: Scope, f: Callable[[Any, Scope], Any]) -> Any:
    """Maps over the states inside of a node; a key of a dict is part of the scope."""
    if hasattr(node, "_fields"):
        return node._replace(
            **{name: f(getattr(node, name), scope) for name in _inner_fields(node)}
        )
    if isinstance(node, tuple | list):
        return type(node)(f(x, scope) for x in node)
    if isinstance(node, Mapping):
        pairs = [(key, f(x, (*scope, str(key)))) for key, x in node.items()]
        return cast(Any, type(node))(pairs)
    return node


def _collect(state: Any) -> Parts:
    """The states by scope and kind, each in the order in which they act."""
    parts: Parts = {}

    def visit(node, scope, hyperparams=None):
        kind = _kind(node)
        if kind is not None:
            found = _Found(node, hyperparams)
            parts.setdefault(scope, {}).setdefault(kind, []).append(found)
        if kind == "hyperparams":
            hyperparams = node
        return _map_children(node, scope, lambda x, s: visit(x, s, hyperparams))

    visit(state, ())
    return parts


def _as_states(node: Any) -> Any:
    """Gives the dicts and lists of a checkpoint the types of Optax's states again."""
    if hasattr(node, "_fields"):
        return node
    if node is None:
        return optax.EmptyState()
    if isinstance(node, tuple | list):
        return tuple(map(_as_states, node))
    if not isinstance(node, Mapping):
        return node
    for kind in _CHECKPOINTED:
        if node.keys() == set(kind._fields):
            return kind(
                **{k: _as_states(v) if k in _INNER else v for k, v in node.items()}
            )
    if all(str(key).isdigit() for key in node):
        keys = sorted(node, key=int)
        return tuple(_as_states(node[k]) for k in keys) or optax.EmptyState()
    return {key: _as_states(value) for key, value in node.items()}


# ---------------------------------------------------------------------------
# the conversion
# ---------------------------------------------------------------------------


class _Conversion(NamedTuple):
    """What is the same for all states of a conversion."""

    source_name: str
    target_name: str
    source: Parts
    target: Parts
    scopes: dict[Scope, Scope]  # from those of the target
    step: int | None

    def sources(self, scope: Scope, kind: str) -> list[_Found]:
        return self.source.get(self.scopes.get(scope, scope), {}).get(kind, [])

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.source_name} does not fit: {message}")


def _convert(
    source_name: str, source: Any, target_name: str, target: Any, step: int | None
) -> Any:
    if step is not None and step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")
    for name, state in ((source_name, source), (target_name, target)):
        if not isinstance(state, tuple | list | Mapping):
            raise TypeError(
                f"{name} must be the state of an optimizer, got "
                f"{type(state).__name__}; pass its opt_state"
            )
    parts = _collect(source), _collect(target)
    conversion = _Conversion(source_name, target_name, *parts, {}, step)
    conversion = conversion._replace(scopes=_match(conversion))
    queues = {
        (scope, kind): iter(conversion.sources(scope, kind))
        for scope, kinds in conversion.target.items()
        for kind in kinds
    }

    def fill(node, scope, hyperparams=None):
        kind = _kind(node)
        if kind in ("hyperparams", "inject"):
            node = _fill_values(conversion, node, scope, queues)
            hyperparams = node if kind == "hyperparams" else hyperparams
        elif kind == "counter":
            node = node._replace(count=_number(node.count, _steps(conversion, scope)))
        elif kind is not None:
            found = next(queues[scope, kind])
            if kind == "window":
                node = _fill_window(conversion, node, found.node)
            elif kind in _MOMENTS:
                node = _fill_moments(conversion, node, found, scope, hyperparams)
            elif kind == "array":
                return _copy(conversion, "the state", node, found.node)
            else:
                node = _copy_fields(conversion, node, found.node)
        return _map_children(node, scope, lambda x, s: fill(x, s, hyperparams))

    return fill(target, ())


def _match(conversion: _Conversion) -> dict[Scope, Scope]:
    """Which labels belong together; raises if the transformations are not the same."""
    ignored = ("hyperparams", "inject", "counter")

    def counts(parts):
        found = {
            scope: {kind: len(x) for kind, x in kinds.items() if kind not in ignored}
            for scope, kinds in parts.items()
        }
        return {scope: kinds for scope, kinds in found.items() if kinds}

    source, target = counts(conversion.source), counts(conversion.target)
    if source.keys() != target.keys() and len(source) == len(target) == 1:
        scopes = {next(iter(target)): next(iter(source))}  # labelled in one only
    else:
        scopes = {scope: scope for scope in source | target}
    for theirs, ours in ((scopes.get(s, s), s) for s in scopes):
        has, expected = source.get(theirs, {}), target.get(ours, {})
        if has != expected:
            message = (
                f"{_label(theirs)}it has {_list(has)}, but {conversion.target_name} "
                f"has {_list(expected)}"
            )
            if all(any("Amsgrad" in k for k in kinds) for kinds in (has, expected)):
                message += "; only convention='optax' has the maximum that Optax has"
            raise conversion.fail(message)
    for scope, kinds in conversion.source.items():
        ours = next((t for t, s in scopes.items() if s == scope), scope)
        if {"hyperparams", "inject"} & conversion.target.get(ours, {}).keys():
            continue
        if "inject" in kinds:
            raise conversion.fail(
                f"{_label(scope)}it has hyperparameters of inject_hyperparams, for "
                f"which {conversion.target_name} has no place there"
            )
        for node in _nodes(kinds, "hyperparams"):
            names = sorted(node.hyperparams)
            for name, last in zip(names, node.last_values, strict=True):
                if is_overridden(_value(last)):
                    raise conversion.fail(_overridden(name, scheduled=False))
    return scopes


def _label(scope: Scope) -> str:
    return f"with the label {'/'.join(scope)} " if scope else ""


def _list(counts: Mapping[str, int]) -> str:
    listed = [f"{n} {kind}" for kind, n in sorted(counts.items())]
    return ", ".join(listed) or "no moments"


def _steps(conversion: _Conversion, scope: Scope) -> int:
    """The number of updates done, from the counts of schedules or else of moments."""
    if conversion.step is not None:
        return conversion.step
    around = conversion.scopes.get(scope, scope)
    scopes = [around[:i] for i in range(len(around), -1, -1)]
    for read in (_schedule_counts, _moment_counts, _window_counts):
        for outer in scopes:
            counts = {_value(count) for count in read(conversion.source.get(outer, {}))}
            if len(counts) > 1:
                raise conversion.fail(
                    f"{_label(outer)}its schedules are at different steps, "
                    f"{', '.join(map(str, sorted(counts)))}; pass step"
                )
            if counts:
                return counts.pop()
    raise ValueError(
        f"step must be given, because {conversion.source_name} does not have the "
        "number of updates done, from which schedules continue"
    )


def _nodes(kinds: Mapping[str, list[_Found]], *names: str) -> list[Any]:
    return [found.node for name in names for found in kinds.get(name, ())]


def _schedule_counts(kinds: Mapping[str, list[_Found]]) -> Iterable[Any]:
    for node in _nodes(kinds, "hyperparams"):
        yield node.step
    for node in _nodes(kinds, "counter", "inject"):
        yield node.count
        for schedule in getattr(node, "hyperparams_states", {}).values():
            yield from jax.tree.leaves(schedule)[:1]


def _moment_counts(kinds: Mapping[str, list[_Found]]) -> Iterable[Any]:
    for node in _nodes(kinds, *_MOMENTS):
        if "count" in node._fields:  # every tuple has a method count
            yield node.count


def _window_counts(kinds: Mapping[str, list[_Found]]) -> Iterable[Any]:
    for node in _nodes(kinds, "window"):
        yield node.step if isinstance(node, AccumulateState) else node.gradient_step


def _fill_moments(
    conversion: _Conversion, node: Any, found: _Found, scope: Scope, hyperparams: Any
) -> Any:
    """Fills mu, nu, nu_max or trace, the count, and the products of the betas."""
    source, new = found.node, {}
    for name in ("mu", "nu", "nu_max", "trace"):
        if name in node._fields:
            new[name] = _copy(
                conversion, name, getattr(node, name), getattr(source, name)
            )
    if "count" in node._fields:
        count = _value(source.count)
        new["count"] = _number(node.count, count)
        for name in ("b1", "b2"):
            ours, theirs = (getattr(x, f"log_{name}", None) for x in (node, source))
            if ours is not None and theirs is not None:
                new[f"log_{name}"] = _copy(conversion, name, ours, theirs)
            elif ours is not None:
                if name not in getattr(hyperparams, "hyperparams", {}):
                    raise conversion.fail(
                        f"the product of all {name} so far, which is scheduled here, "
                        "is not in it; schedule it with adam or with_hyperparams"
                    )
                beta = _value(hyperparams.hyperparams[name])
                new[f"log_{name}"] = _log_product(ours, count, beta)
            elif theirs is not None:
                _check_product(conversion, name, theirs, count, found.hyperparams)
    elif getattr(node, "step", None) is not None:
        new["step"] = _number(node.step, _steps(conversion, scope))
    return node._replace(**new)


def _log(beta: float) -> float:
    return math.log(max(beta, 2.0**-24))  # as in an update, where it is finite


def _log_product(old: LogProduct, count: int, beta: float) -> LogProduct:
    exact = count * _log(beta)
    total = float(np.asarray(exact, jax.tree.leaves(old.total)[0].dtype))
    return LogProduct(_number(old.total, total), _number(old.lost, total - exact))


def _check_product(
    conversion: _Conversion, name: str, log: LogProduct, count: int, hyperparams: Any
) -> None:
    """Raises if Optax's correction, 1 - b**count, is not that of our state."""
    product, constant = math.exp(_value(log.total)), float(count == 0)
    if name in getattr(hyperparams, "hyperparams", {}):
        constant = math.exp(count * _log(_value(hyperparams.hyperparams[name])))
    if abs(product - constant) > 1e-4 * (1 - product):
        raise conversion.fail(
            f"{name} was not constant, and the product of its values, {product:.3g}, "
            f"by which moments are corrected here, is not {name}**count, {constant:.3g}"
        )


def _fill_window(conversion: _Conversion, node: Any, source: Any) -> Any:
    """Fills the counts of accumulate_gradients or MultiSteps, between two windows."""
    if type(node) is type(source):
        return _copy_fields(conversion, node, source)
    ours = isinstance(source, AccumulateState)
    begun = _value(source.micro_step if ours else source.mini_step)
    if begun:
        raise conversion.fail(
            f"it is within a window, after {begun} micro-batches of it, whose sum the "
            "two libraries store differently; convert it at the end of a window"
        )
    done = _value(source.step if ours else source.gradient_step)
    if ours:
        return node._replace(gradient_step=_number(node.gradient_step, done))
    updated = _number(node.updated, done > 0)
    return node._replace(step=_number(node.step, done), updated=updated)


def _copy_fields(conversion: _Conversion, node: Any, source: Any) -> Any:
    """Copies a state of one type, but for the states inside of it."""
    inner = _inner_fields(node)
    return node._replace(
        **{
            name: _copy(conversion, name, getattr(node, name), getattr(source, name))
            for name in node._fields
            if name not in inner
        }
    )


# ---------------------------------------------------------------------------
# hyperparameters
# ---------------------------------------------------------------------------


def _fill_values(
    conversion: _Conversion, node: Any, scope: Scope, queues: dict[Any, Any]
) -> Any:
    """Fills the step and the values of with_hyperparams or inject_hyperparams."""
    injected = conversion.sources(scope, "inject")
    ours = conversion.sources(scope, "hyperparams")
    target = conversion.target[scope]
    step = _steps(conversion, scope)
    is_inject = isinstance(node, optax.InjectStatefulHyperparamsState)
    if not is_inject:
        node = node._replace(step=_number(node.step, step))
        if "inject" in target:
            return node  # it has the values of the inject_hyperparams around it
    if not (injected or ours):
        return node
    source_kind = "inject" if injected else "hyperparams"
    kind = "inject" if is_inject else "hyperparams"
    source = _pair(conversion, scope, source_kind, kind, queues)
    if is_inject:
        return _fill_inject(conversion, node, source, step)
    if not injected:
        return _copy_fields(conversion, node, source)._replace(step=node.step)
    return _fill_hyperparams(conversion, node, source)


def _pair(
    conversion: _Conversion,
    scope: Scope,
    source_kind: str,
    kind: str,
    queues: dict[Any, Any],
) -> Any:
    """The next state with values, if there are as many as in the target."""
    found = conversion.sources(scope, source_kind)
    targets = conversion.target[scope][kind]
    if len(found) != len(targets):
        raise conversion.fail(
            f"{_label(scope)}the hyperparameters in it are of {len(found)} optimizers, "
            f"but those in {conversion.target_name} of {len(targets)}"
        )
    queue = queues.setdefault((scope, "values", kind), iter(found))
    return next(queue).node


def _fill_hyperparams(conversion: _Conversion, node: Any, source: Any) -> Any:
    """Values of inject_hyperparams to ours; an edited constant is an override."""
    scheduled = source.hyperparams_states
    new, last, edits = dict(node.hyperparams), list(node.last_values), {}
    for i, name in enumerate(sorted(new)):
        if name not in source.hyperparams:
            continue
        value = _scalar(source.hyperparams[name])
        below = 1 if name in ("b1", "b2", "momentum") else math.inf
        try:
            check_scalar(name, float(value), below=below)
        except ValueError as error:
            raise conversion.fail(str(error)) from None
        if name in scheduled:
            new[name] = _number(new[name], value)
            last[i] = _number(last[i], value)
        elif np.asarray(_value(new[name])).astype(value.dtype) != value:
            edits[name] = float(value)
    node = node._replace(hyperparams=new, last_values=tuple(last))
    return override_hyperparams(node, **edits)


def _fill_inject(conversion: _Conversion, node: Any, source: Any, step: int) -> Any:
    """The values to inject_hyperparams, and the step to its schedules."""
    names = sorted(source.hyperparams)
    scheduled = dict(getattr(node, "hyperparams_states", {}))
    new = dict(node.hyperparams)
    last_values = getattr(source, "last_values", (0,) * len(names))
    for name, last in zip(names, last_values, strict=True):
        if is_overridden(_value(last)) and (name not in new or name in scheduled):
            raise conversion.fail(_overridden(name, name in scheduled))
        if name in new:
            value, old = _value(source.hyperparams[name]), _scalar(new[name])
            cast = np.asarray(value, old.dtype)
            if float(cast) not in (value, float(old)):
                raise conversion.fail(
                    f"{name} is {value!r}, which {cast.dtype} rounds to "
                    f"{float(cast)!r}; pass hyperparam_dtype=jnp.float32 to "
                    "inject_hyperparams"
                )
            new[name] = _number(new[name], cast)
    return node._replace(
        count=_number(node.count, step),
        hyperparams=new,
        hyperparams_states=jax.tree.map(lambda x: _number(x, step), scheduled),
    )


def _overridden(name: str, scheduled: bool) -> str:
    place = (
        "which a schedule of inject_hyperparams ignores"
        if scheduled
        else "for which Optax has a place in inject_hyperparams only"
    )
    return f"{name} is overridden, {place}; release it with override_hyperparams"


# ---------------------------------------------------------------------------
# leaves
# ---------------------------------------------------------------------------


def _scalar(x: Any) -> np.ndarray:
    """The value of a scalar, or of those of a population if they are equal."""
    leaf = jax.tree.leaves(x)[0]
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError("convert states outside of jit, where counts have values")
    values = np.asarray(leaf).reshape(-1)
    if not np.all((values == values[0]) | (values.size == 1)):
        raise ValueError(f"the members of a population must agree, got {values}")
    return values[0]


def _value(x: Any) -> Any:
    return _scalar(x).item()


def _number(old: Any, value: Any) -> Any:
    """Fills a scalar, or those of a population, also in a Variable of nnx.Optimizer."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.asarray(value, x.dtype)), old)


def _copy(conversion: _Conversion, name: str, old: Any, new: Any) -> Any:
    """The leaves of `new` in the structure of `old`, matched by path."""
    leaves = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(new)}
    paths, treedef = jax.tree_util.tree_flatten_with_path(old)
    if leaves.keys() != {path_string(path) for path, _ in paths}:
        raise conversion.fail(describe_mismatch(name, new, old))
    return treedef.unflatten(
        _copy_leaf(conversion, name, path_string(path), x, leaves[path_string(path)])
        for path, x in paths
    )


def _copy_leaf(
    conversion: _Conversion, name: str, path: str, old: Any, new: Any
) -> Any:
    leaf = f"{name} of leaf {path}" if path else name
    if np.shape(new) != np.shape(old):
        raise conversion.fail(
            f"{leaf} has shape {np.shape(new)}, but {np.shape(old)} in "
            f"{conversion.target_name}"
        )
    if not isinstance(new, jax.Array):  # of a checkpoint
        new = jax.device_put(np.asarray(new), getattr(old, "sharding", None))
    dtype = jnp.asarray(old).dtype
    if new.dtype == dtype:
        return new
    cast = new.astype(dtype)
    if not np.array_equal(cast.astype(new.dtype), new, equal_nan=True):
        raise conversion.fail(
            f"{leaf} has dtype {new.dtype}, and {dtype} of {conversion.target_name} "
            "would lose bits of it"
        )
    return cast
