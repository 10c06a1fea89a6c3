"""Optimizers: short chains of transformations, hyperparameters in the state."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import optax

from ._checks import check_choice, check_scalar, is_static
from ._transformation import Transformation
from ._tree import ScalarOrSchedule
from .hyperparams import scheduled_name, with_hyperparams
from .masks import Mask
from .schedules.phases import Phases
from .transforms.bias_correction import BiasCorrection
from .transforms.chain import chain
from .transforms.decay import add_decayed_weights, add_l2_gradient
from .transforms.moments import AmsgradConvention, scale_by_adam, scale_by_amsgrad
from .transforms.momentum import trace
from .transforms.scaling import scale_by_learning_rate

DecayScale = Literal["learning_rate", "schedule"]
LearningRate = ScalarOrSchedule | Phases


def adam(
    learning_rate: LearningRate,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    l2: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    maximize: bool = False,
    nu_dtype: Any = None,
    bias_correction: BiasCorrection = "exact",
    epsilon_hat: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> Transformation:
    r"""Adam, optionally with L2 regularisation in the gradient.

    $$ g_t \leftarrow g_t + \lambda_2 p_t, \qquad
       p_{t+1} = p_t - \eta_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} $$

    A drop-in for `optax.adam`; with `l2`, `torch.optim.Adam(weight_decay=l2)`.

    Args:
        learning_rate: $\eta$: a number, a traced scalar, a schedule of the step, or
            :class:`adamw_jax.Phases`, which drive every hyperparameter that they set.
        b1: see :func:`adamw_jax.scale_by_adam` for this and the arguments of the
            moments; also a schedule.
        b2: see there.
        eps: see there.
        eps_root: see there.
        mu_dtype: see there.
        nesterov: see there.
        l2: $\lambda_2$, added to the gradient; also a schedule. Phases that set
            `weight_decay` drive it.
        mask: which leaves are regularised; all by default.
        maximize: climb instead of descend. The decay still shrinks the parameters.
        nu_dtype: see :func:`adamw_jax.scale_by_adam`.
        bias_correction: see there.
        epsilon_hat: see there.
        stochastic_rounding: see there.
        seed: see there.

    Returns:
        A transformation whose state holds `learning_rate`, `b1`, `b2` and, if l2 is
        given, `weight_decay`. Without l2, `update` does not need params.

    Raises:
        TypeError, ValueError: an argument out of range, named in the message; phases
            that drive a hyperparameter for which a value other than its default was
            given as well.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> tx = adam(0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     grads = jax.grad(lambda p: (p**2).sum())(params)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{params[0]:.4f} {params[1]:.4f}")
        0.7016 -1.7006

    References:
        Kingma and Ba, `Adam: A Method for Stochastic Optimization
        <https://arxiv.org/abs/1412.6980>`_, 2015.
    """
    decay = _decay(learning_rate, l2=l2)

    def build(learning_rate, b1, b2, weight_decay=None):
        return chain(
            *_in_front(maximize, weight_decay, mask),
            scale_by_adam(
                b1,
                b2,
                eps,
                eps_root,
                mu_dtype,
                nesterov=nesterov,
                nu_dtype=nu_dtype,
                bias_correction=bias_correction,
                epsilon_hat=epsilon_hat,
                stochastic_rounding=stochastic_rounding,
                seed=seed,
            ),
            scale_by_learning_rate(learning_rate),
        )

    return _drive(adam, build, learning_rate=learning_rate, b1=b1, b2=b2, **decay)


def adamw(
    learning_rate: LearningRate,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    decay_scale: DecayScale = "learning_rate",
    base_learning_rate: float | None = None,
    maximize: bool = False,
    nu_dtype: Any = None,
    bias_correction: BiasCorrection = "exact",
    epsilon_hat: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> Transformation:
    r"""Adam with decoupled weight decay.

    $$ p_{t+1} = p_t - \eta_t \Big( \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
       + \lambda p_t \Big) $$

    Conventions that bite:

    * With `decay_scale="learning_rate"` the decay is multiplied by the learning rate,
      as in fast.ai, PyTorch and Optax. `"schedule"` is Loshchilov and Hutter's:
      multiplied only by $\eta_t / \eta_{base}$, the schedule's multiplier, so that
      learning rate and decay can be tuned apart. Their $\lambda$ is PyTorch's times
      the base rate; see :func:`adamw_jax.normalized_weight_decay`.
    * The default decay is Optax's 1e-4; PyTorch's is 1e-2, the article trains
      CIFAR-10 with 0.1. b2 is .999 as everywhere; the article's is .99.
    * `mask=None` decays every leaf, as PyTorch, Optax and the article do;
      :func:`adamw_jax.no_decay_on_bias_and_norm` is the usual exception.

    Args:
        learning_rate: $\eta$: a number, a traced scalar, a schedule of the step, or
            :class:`adamw_jax.Phases`, which drive every hyperparameter that they set.
        b1: see :func:`adamw_jax.scale_by_adam` for this and the arguments of the
            moments; also a schedule.
        b2: see there.
        eps: see there.
        eps_root: see there.
        mu_dtype: see there.
        weight_decay: $\lambda$; a number, a traced scalar or a schedule.
        mask: which leaves decay, see :func:`adamw_jax.add_decayed_weights`.
        nesterov: see :func:`adamw_jax.scale_by_adam`.
        decay_scale: what multiplies the decay: `"learning_rate"` or `"schedule"`.
        base_learning_rate: $\eta_{base}$ under `"schedule"`. None: the learning rate
            if it is constant, the highest one of phases; a schedule needs it.
        maximize: climb instead of descend. The decay still shrinks the parameters.
        nu_dtype: see :func:`adamw_jax.scale_by_adam`.
        bias_correction: see there.
        epsilon_hat: see there.
        stochastic_rounding: see there.
        seed: see there.

    Returns:
        A transformation whose state holds `learning_rate`, `b1`, `b2` and
        `weight_decay`.

    Raises:
        TypeError, ValueError: an argument out of range, named in the message; phases
            that drive a hyperparameter for which a value other than its default was
            given as well.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from adamw_jax import one_cycle
        >>> tx = adamw(one_cycle(0.1, steps=100), b2=0.99, weight_decay=0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(lambda p: ((p - 1) ** 2).sum())(params)
        ...     updates, state = tx.update(grads, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> print(f"{params[0]:.2f} {params[1]:.2f}")
        1.00 0.87

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization
        <https://arxiv.org/abs/1711.05101>`_, 2019. Gugger and Howard, `AdamW and
        Super-convergence is now the fastest way to train neural nets
        <https://www.fast.ai/posts/2018-07-02-adam-weight-decay.html>`_, 2018.
    """
    _check_decay("weight_decay", weight_decay)
    base = _base_learning_rate(decay_scale, learning_rate, base_learning_rate)

    def build(learning_rate, b1, b2, weight_decay):
        return chain(
            *_in_front(maximize),
            scale_by_adam(
                b1,
                b2,
                eps,
                eps_root,
                mu_dtype,
                nesterov=nesterov,
                nu_dtype=nu_dtype,
                bias_correction=bias_correction,
                epsilon_hat=epsilon_hat,
                stochastic_rounding=stochastic_rounding,
                seed=seed,
            ),
            add_decayed_weights(weight_decay / base, mask),
            scale_by_learning_rate(learning_rate),
        )

    return _drive(
        adamw,
        build,
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
    )


def amsgrad(
    learning_rate: LearningRate,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    convention: AmsgradConvention = "torch",
    l2: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay_scale: DecayScale = "learning_rate",
    base_learning_rate: float | None = None,
    maximize: bool = False,
    nu_dtype: Any = None,
    bias_correction: BiasCorrection = "exact",
    epsilon_hat: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> Transformation:
    r"""AMSGrad, with L2 in the gradient or decoupled weight decay.

    $$ p_{t+1} = p_t - \eta_t \Big( \frac{\hat m_t}{\sqrt{\max_{s\le t} v_s / c_2}
       + \epsilon} + \lambda p_t \Big) $$

    That is PyTorch's `Adam(amsgrad=True)` and `AdamW(amsgrad=True)`, **not**
    `optax.amsgrad`, which takes the maximum of the corrected $v_s / c_{2,s}$; see
    :func:`adamw_jax.scale_by_amsgrad`. `convention="optax"` gives Optax's numbers.

    Args:
        learning_rate: as in :func:`adamw`, as are all arguments not listed here.
        b1: see there.
        b2: see there.
        eps: see there.
        eps_root: see there.
        mu_dtype: see there.
        bias_correction_mu: see :func:`adamw_jax.scale_by_amsgrad`.
        bias_correction_nu: see there.
        convention: `"torch"`, `"paper"` or `"optax"`.
        l2: added to the gradient.
        weight_decay: decoupled. Only one of the two may be given. Phases that set
            `weight_decay` drive this one, or `l2` if that is given as the same phases.
        mask: which leaves the one or the other acts on.
        decay_scale: see :func:`adamw`.
        base_learning_rate: see :func:`adamw`.
        maximize: see :func:`adamw`.
        nu_dtype: see :func:`adamw_jax.scale_by_amsgrad`.
        bias_correction: see there.
        epsilon_hat: see there.
        stochastic_rounding: see there.
        seed: see there.

    Returns:
        A transformation whose state holds `learning_rate`, `b1`, `b2` and, if one of
        the decays is given, `weight_decay`.

    Raises:
        TypeError, ValueError: as :func:`adamw`; both decays were given.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = amsgrad(1e-3, weight_decay=0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, _ = tx.update(jnp.array([0.3, 0.3]), tx.init(params), params)
        >>> print(updates)
        [-0.0011 -0.0008]

    References:
        Reddi et al., `On the Convergence of Adam and Beyond
        <https://arxiv.org/abs/1904.09237>`_, 2018.
    """
    decay = _decay(learning_rate, weight_decay=weight_decay, l2=l2)
    base = _base_learning_rate(decay_scale, learning_rate, base_learning_rate)
    in_gradient = _is_given(l2)

    def build(learning_rate, b1, b2, weight_decay=None):
        return chain(
            *_in_front(maximize, weight_decay if in_gradient else None, mask),
            scale_by_amsgrad(
                b1,
                b2,
                eps,
                eps_root,
                mu_dtype,
                bias_correction_mu,
                bias_correction_nu,
                convention=convention,
                nu_dtype=nu_dtype,
                bias_correction=bias_correction,
                epsilon_hat=epsilon_hat,
                stochastic_rounding=stochastic_rounding,
                seed=seed,
            ),
            *_behind(None if in_gradient else weight_decay, base, mask),
            scale_by_learning_rate(learning_rate),
        )

    return _drive(amsgrad, build, learning_rate=learning_rate, b1=b1, b2=b2, **decay)


def sgd(
    learning_rate: LearningRate,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    l2: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    decay_scale: DecayScale = "learning_rate",
    base_learning_rate: float | None = None,
    maximize: bool = False,
    dampened: bool = False,
) -> Transformation:
    r"""SGD with momentum, with L2 in the gradient or decoupled weight decay.

    $$ b_t = \mu b_{t-1} + g_t + \lambda_2 p_t, \qquad
       p_{t+1} = p_t - \eta_t (b_t + \lambda p_t) $$

    With `l2`, PyTorch's `SGD(momentum=, weight_decay=l2)`. `dampened` is the moving
    average of the article, $b_t = \mu b_{t-1} + (1-\mu) g_t$: its learning rates are
    $1/(1-\mu)$ times those of the other form.

    Args:
        learning_rate: a number, a traced scalar, a schedule of the step, or
            :class:`adamw_jax.Phases`; their `b1` drives the momentum.
        momentum: $\mu$ in [0, 1): also a schedule. None: no buffer, unless phases
            drive it.
        nesterov: look one step ahead.
        accumulator_dtype: storage of the buffer; None: at least float32.
        l2: $\lambda_2$, added to the gradient.
        weight_decay: $\lambda$, decoupled. Only one of the two may be given. Phases
            that set `weight_decay` drive this one, or `l2` if that is given as the
            same phases.
        mask: which leaves the one or the other acts on.
        decay_scale: see :func:`adamw`.
        base_learning_rate: see :func:`adamw`.
        maximize: climb instead of descend. The decay still shrinks the parameters.
        dampened: see above.

    Returns:
        A transformation whose state holds `learning_rate`, `momentum` if there is one,
        and `weight_decay` if one of the decays is given.

    Raises:
        TypeError, ValueError: an argument out of range; both decays; nesterov or
            dampened without momentum.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = sgd(0.1, momentum=0.9)
        >>> state = tx.init(jnp.zeros(1))
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
        >>> print(updates)
        [-0.19]
    """
    decay = _decay(learning_rate, weight_decay=weight_decay, l2=l2)
    base = _base_learning_rate(decay_scale, learning_rate, base_learning_rate)
    in_gradient = _is_given(l2)
    if momentum is not None and not isinstance(momentum, Phases):
        check_scalar("momentum", momentum, below=1, schedule=True)
    hyperparams = {"learning_rate": learning_rate, **decay}
    if momentum is not None or _drives(learning_rate, "b1"):
        hyperparams["momentum"] = momentum
    elif nesterov or dampened:
        raise ValueError("nesterov and dampened need a momentum, got momentum=None")

    def build(learning_rate, weight_decay=None, momentum=None):
        buffer = []
        if momentum is not None:
            buffer = [trace(momentum, nesterov, accumulator_dtype, dampened=dampened)]
        return chain(
            *_in_front(maximize, weight_decay if in_gradient else None, mask),
            *buffer,
            *_behind(None if in_gradient else weight_decay, base, mask),
            scale_by_learning_rate(learning_rate),
        )

    return _drive(sgd, build, **hyperparams)


def _in_front(maximize: bool, l2: Any = None, mask: Mask = None) -> list:
    """What comes before the moments. The sign first: the decay keeps its own."""
    links = [optax.scale(-1.0)] if maximize else []
    return links if l2 is None else [*links, add_l2_gradient(l2, mask)]


def _behind(weight_decay: Any, base: Any, mask: Mask) -> list:
    """What comes between the moments and the learning rate."""
    if weight_decay is None:
        return []
    return [add_decayed_weights(weight_decay / base, mask)]


def _drives(learning_rate: Any, name: str) -> bool:
    return isinstance(learning_rate, Phases) and name in learning_rate.names


def _is_given(decay: Any) -> bool:
    return not (is_static(decay) and decay == 0)


def _check_decay(name: str, decay: Any) -> None:
    if not isinstance(decay, Phases):  # phases have checked their values themselves
        check_scalar(name, decay, schedule=True)


def _decay(learning_rate: Any, **decays: Any) -> dict[str, Any]:
    """The hyperparameter of the one decay that was given, or that phases drive.

    Without any the chain has no link for it, and `update` does not need params.
    """
    for name, decay in decays.items():
        _check_decay(name, decay)
    given = {name: decay for name, decay in decays.items() if _is_given(decay)}
    if len(given) > 1:
        raise ValueError(f"give l2 or weight_decay, not both: got {given}")
    if not given and not _drives(learning_rate, "weight_decay"):
        return {}
    return {"weight_decay": next(iter(given.values()), 0.0)}


def _base_learning_rate(
    decay_scale: str, learning_rate: LearningRate, base: Any
) -> Any:
    """What the decay is divided by: the learning rate behind it multiplies it again."""
    check_choice("decay_scale", decay_scale, ("learning_rate", "schedule"))
    if decay_scale == "learning_rate":
        if base is not None:
            raise ValueError("base_learning_rate goes with decay_scale='schedule'")
        return 1.0
    if base is None:
        if isinstance(learning_rate, Phases):
            if not _drives(learning_rate, "learning_rate"):
                return 1.0  # refused with its own message a little later
            steps = np.arange(learning_rate.total_steps)
            base = float(learning_rate.schedule("learning_rate")(steps).max())
        elif callable(learning_rate):
            raise ValueError(
                "decay_scale='schedule' needs base_learning_rate with a schedule"
            )
        else:
            base = learning_rate
    check_scalar("base_learning_rate", base)
    if is_static(base) and base == 0:
        raise ValueError("base_learning_rate must be > 0")
    return base


def _drive(optimizer: Callable, chain: Callable, **hyperparams: Any) -> Transformation:
    """`with_hyperparams`, where phases must not silently replace what the user gave."""
    parameters = inspect.signature(optimizer).parameters
    phases = next((v for v in hyperparams.values() if isinstance(v, Phases)), None)
    for name in phases.names if phases else ():
        target = scheduled_name(name, hyperparams)
        value = hyperparams.get(target)
        default = parameters[target].default if target in parameters else 0.0
        unset = value is None or (is_static(value) and value == default)
        if value is not phases and not unset:
            both = target == "weight_decay" and "l2" in parameters
            raise ValueError(
                f"{'l2 or weight_decay' if both else target}={value!r} was given, but "
                f"the phases drive {name} as well"
            )
    return with_hyperparams(chain, **hyperparams)
