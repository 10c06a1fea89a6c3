"""Optimizers: short chains of transformations with hyperparameters in the state."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from . import _foreign
from ._checks import check_choice, check_scalar, is_static, show
from ._foreign import explain_names
from ._transformation import Transformation
from ._tree import ScalarOrSchedule
from .hyperparams import hyperparam_name, with_hyperparams
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


@explain_names(_foreign.ADAM)
def adam(
    learning_rate: LearningRate,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    l2: ScalarOrSchedule | None = None,
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

    A drop-in for `optax.adam`; with `l2`, `torch.optim.Adam(weight_decay=l2)`. The rule
    for the moments and its conventions are described at
    :func:`adamw_jax.scale_by_adam`.

    Args:
        learning_rate: $\eta$: a number, a traced scalar, a schedule of the step, or
            :class:`adamw_jax.Phases`, which drive every hyperparameter that they set.
        b1: decay of the first moment, in [0, 1): a number, a traced scalar or a
            schedule.
        b2: decay of the second moment, likewise.
        eps: added to the root of the second moment.
        eps_root: added under the root.
        mu_dtype: storage dtype of the first moment; None: at least float32.
        nesterov: look one step ahead along the first moment.
        l2: $\lambda_2 \ge 0$, the L2 coefficient: a number, a traced scalar or a
            schedule; None: no L2. Phases that set `weight_decay` drive it.
        mask: which leaves are regularised; None: all.
        maximize: ascend instead of descend. The decay still shrinks the parameters.
        nu_dtype: storage dtype of the second moment; None: at least float32.
        bias_correction: `"exact"`, `"torch"` or `"none"`.
        epsilon_hat: add eps to the uncorrected root.
        stochastic_rounding: round moments stored below float32 stochastically.
        seed: seed of the stochastic rounding.

    Returns:
        A transformation whose state holds `learning_rate`, `b1`, `b2` and, with l2
        (also 0), `weight_decay`. Without l2, `update` does not need `params`.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it. Or a
            hyperparameter that the phases drive was also set to a value other than its
            default.

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
    decay = _decay_hyperparam(learning_rate, l2=l2)

    def make_chain(learning_rate, b1, b2, weight_decay=None):
        return chain(
            *_links_before_moments(maximize, weight_decay, mask),
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

    return _build(
        adam,
        make_chain,
        mask,
        decay_name="l2",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        **decay,
    )


@explain_names(_foreign.ADAMW)
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

    * With `decay_scale="learning_rate"` the learning rate multiplies the decay, as in
      fast.ai, PyTorch and Optax. With `"schedule"`, Loshchilov and Hutter's form, only
      the schedule's multiplier $\eta_t / \eta_{base}$ does, so learning rate and decay
      can be tuned independently. Their $\lambda$ is PyTorch's times the base rate; see
      :func:`adamw_jax.normalized_weight_decay`.
    * The default decay is Optax's 1e-4. PyTorch's is 1e-2, and the article trains
      CIFAR-10 with 0.1. The default b2 is the usual .999; the article's is .99.
    * `mask=None` decays every leaf, as PyTorch, Optax and the article do. The usual
      mask is :func:`adamw_jax.no_decay_on_bias_and_norm`.

    The rule for the moments and its conventions are described at
    :func:`adamw_jax.scale_by_adam`.

    Args:
        learning_rate: $\eta$: a number, a traced scalar, a schedule of the step, or
            :class:`adamw_jax.Phases`, which drive every hyperparameter that they set.
        b1: decay of the first moment, in [0, 1): a number, a traced scalar or a
            schedule.
        b2: decay of the second moment, likewise.
        eps: added to the root of the second moment.
        eps_root: added under the root.
        mu_dtype: storage dtype of the first moment; None: at least float32.
        weight_decay: $\lambda \ge 0$: a number, a traced scalar or a schedule.
        mask: which leaves decay, as for :func:`adamw_jax.add_decayed_weights`; None:
            all.
        nesterov: look one step ahead along the first moment.
        decay_scale: what multiplies the decay: `"learning_rate"` or `"schedule"`.
        base_learning_rate: $\eta_{base}$ for `"schedule"`. None: a constant learning
            rate itself, or the highest one of phases. Required with a schedule.
        maximize: ascend instead of descend. The decay still shrinks the parameters.
        nu_dtype: storage dtype of the second moment; None: at least float32.
        bias_correction: `"exact"`, `"torch"` or `"none"`.
        epsilon_hat: add eps to the uncorrected root.
        stochastic_rounding: round moments stored below float32 stochastically.
        seed: seed of the stochastic rounding.

    Returns:
        A transformation whose state holds `learning_rate`, `b1`, `b2` and
        `weight_decay`.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it. Or a
            hyperparameter that the phases drive was also set to a value other than its
            default.

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

    def make_chain(learning_rate, b1, b2, weight_decay):
        return chain(
            *_links_before_moments(maximize),
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
            *_links_after_moments(weight_decay, base, mask),
            scale_by_learning_rate(learning_rate),
        )

    return _build(
        adamw,
        make_chain,
        mask,
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
    )


@explain_names(_foreign.AMSGRAD)
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
    l2: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule | None = None,
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

    This is PyTorch's `Adam(amsgrad=True)` and `AdamW(amsgrad=True)`, **not**
    `optax.amsgrad`, which takes the maximum of the corrected $v_s / c_{2,s}$;
    `convention="optax"` gives Optax's numbers. The conventions are described at
    :func:`adamw_jax.scale_by_amsgrad`.

    Args:
        learning_rate: $\eta$: a number, a traced scalar, a schedule of the step, or
            :class:`adamw_jax.Phases`, which drive every hyperparameter that they set.
        b1: decay of the first moment, in [0, 1): a number, a traced scalar or a
            schedule.
        b2: decay of the second moment, likewise.
        eps: added to the root of the second moment.
        eps_root: added under the root.
        mu_dtype: storage dtype of the first moment; None: at least float32.
        bias_correction_mu: correct the bias of the first moment.
        bias_correction_nu: correct the bias of the second moment.
        convention: `"torch"`, `"paper"` or `"optax"`.
        l2: $\lambda_2 \ge 0$, added to the gradient as $\lambda_2 p$: a number, a
            traced scalar or a schedule; None: no L2. Set `l2` or `weight_decay`, not
            both.
        weight_decay: $\lambda \ge 0$, the decoupled decay, likewise. Phases that set
            `weight_decay` drive it, or `l2` if the same phases are passed as `l2`.
        mask: which leaves `l2` or `weight_decay` acts on; None: all.
        decay_scale: as for :func:`adamw`.
        base_learning_rate: as for :func:`adamw`.
        maximize: ascend instead of descend. The decay still shrinks the parameters.
        nu_dtype: storage dtype of the second moment; None: at least float32.
        bias_correction: `"exact"`, `"torch"` or `"none"`.
        epsilon_hat: add eps to the uncorrected root.
        stochastic_rounding: round moments stored below float32 stochastically.
        seed: seed of the stochastic rounding.

    Returns:
        A transformation whose state holds `learning_rate`, `b1`, `b2` and, with `l2` or
        `weight_decay`, `weight_decay`.

    Raises:
        TypeError, ValueError: as for :func:`adamw`; or both `l2` and `weight_decay` are
            set.

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
    decay = _decay_hyperparam(learning_rate, weight_decay=weight_decay, l2=l2)
    base = _base_learning_rate(decay_scale, learning_rate, base_learning_rate)
    uses_l2 = l2 is not None

    def make_chain(learning_rate, b1, b2, weight_decay=None):
        return chain(
            *_links_before_moments(maximize, weight_decay if uses_l2 else None, mask),
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
            *_links_after_moments(None if uses_l2 else weight_decay, base, mask),
            scale_by_learning_rate(learning_rate),
        )

    return _build(
        amsgrad,
        make_chain,
        mask,
        decay_name="l2" if uses_l2 else "weight_decay",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        **decay,
    )


@explain_names(_foreign.SGD)
def sgd(
    learning_rate: LearningRate,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    l2: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Mask = None,
    decay_scale: DecayScale = "learning_rate",
    base_learning_rate: float | None = None,
    maximize: bool = False,
    dampened: bool = False,
) -> Transformation:
    r"""SGD with momentum, with L2 in the gradient or decoupled weight decay.

    $$ b_t = \mu b_{t-1} + g_t + \lambda_2 p_t, \qquad
       p_{t+1} = p_t - \eta_t (b_t + \lambda p_t) $$

    With `l2` this is PyTorch's `SGD(momentum=, weight_decay=l2)`. With `dampened` the
    buffer is the article's moving average, $b_t = \mu b_{t-1} + (1-\mu) g_t$, whose
    learning rates are $1/(1-\mu)$ times those of the other form.

    Args:
        learning_rate: $\eta$: a number, a traced scalar, a schedule of the step, or
            :class:`adamw_jax.Phases`, whose `b1` drives the momentum.
        momentum: $\mu$ in [0, 1): a number, a traced scalar or a schedule. None: no
            momentum buffer, unless phases drive it.
        nesterov: look one step ahead.
        accumulator_dtype: storage dtype of the buffer; None: at least float32.
        l2: $\lambda_2 \ge 0$, added to the gradient as $\lambda_2 p$: a number, a
            traced scalar or a schedule; None: no L2. Set `l2` or `weight_decay`, not
            both.
        weight_decay: $\lambda \ge 0$, the decoupled decay, likewise. Phases that set
            `weight_decay` drive it, or `l2` if the same phases are passed as `l2`.
        mask: which leaves `l2` or `weight_decay` acts on; None: all.
        decay_scale: as for :func:`adamw`.
        base_learning_rate: as for :func:`adamw`.
        maximize: ascend instead of descend. The decay still shrinks the parameters.
        dampened: scale the gradient in the buffer by $1 - \mu$.

    Returns:
        A transformation whose state holds `learning_rate`, `momentum` if there is one,
        and `weight_decay` with `l2` or `weight_decay`.

    Raises:
        TypeError, ValueError: an argument is out of range; both `l2` and `weight_decay`
            are set; nesterov or dampened without momentum.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = sgd(0.1, momentum=0.9)
        >>> state = tx.init(jnp.zeros(1))
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
        >>> print(updates)
        [-0.19]
    """
    decay = _decay_hyperparam(learning_rate, weight_decay=weight_decay, l2=l2)
    base = _base_learning_rate(decay_scale, learning_rate, base_learning_rate)
    uses_l2 = l2 is not None
    if momentum is not None and not isinstance(momentum, Phases):
        check_scalar("momentum", momentum, below=1, schedule=True)
    hyperparams = {"learning_rate": learning_rate, **decay}
    if momentum is not None or _phases_set(learning_rate, "b1"):
        hyperparams["momentum"] = momentum
    elif nesterov or dampened:
        raise ValueError("nesterov and dampened need a momentum, got momentum=None")

    def make_chain(learning_rate, weight_decay=None, momentum=None):
        buffer = []
        if momentum is not None:
            buffer = [trace(momentum, nesterov, accumulator_dtype, dampened=dampened)]
        return chain(
            *_links_before_moments(maximize, weight_decay if uses_l2 else None, mask),
            *buffer,
            *_links_after_moments(None if uses_l2 else weight_decay, base, mask),
            scale_by_learning_rate(learning_rate),
        )

    decay_name = "l2" if uses_l2 else "weight_decay"
    return _build(sgd, make_chain, mask, decay_name=decay_name, **hyperparams)


def _links_before_moments(maximize: bool, l2: Any = None, mask: Mask = None) -> list:
    # The sign comes first, so that maximize does not flip the decay.
    links = [scale_by_learning_rate(1.0)] if maximize else []
    return links if l2 is None else [*links, add_l2_gradient(l2, mask)]


def _links_after_moments(weight_decay: Any, base: Any, mask: Mask) -> list:
    if weight_decay is None:
        return []
    return [add_decayed_weights(weight_decay / base, mask)]


def _phases_set(learning_rate: Any, name: str) -> bool:
    return isinstance(learning_rate, Phases) and name in learning_rate.names


def _check_decay(name: str, decay: Any) -> None:
    if not isinstance(decay, Phases):  # phases check their own values
        check_scalar(name, decay, schedule=True)


def _decay_hyperparam(learning_rate: Any, **decays: Any) -> dict[str, Any]:
    """The hyperparameter `weight_decay`, if any decay is set or driven by phases.

    Without it the chain has no link for decay, and `update` does not need params. A
    decay of 0 is set: a traced one cannot be compared with 0.
    """
    is_set = {name: decay for name, decay in decays.items() if decay is not None}
    for name, decay in is_set.items():
        _check_decay(name, decay)
    if len(is_set) > 1:
        values = ", ".join(f"{name}={decay!r}" for name, decay in is_set.items())
        raise ValueError(
            f"set l2 or weight_decay, not both, and leave the other None: got {values}"
        )
    if not is_set and not _phases_set(learning_rate, "weight_decay"):
        return {}
    return {"weight_decay": next(iter(is_set.values()), None)}


def _base_learning_rate(
    decay_scale: str, learning_rate: LearningRate, base: Any
) -> Any:
    """The divisor of the decay, which the learning rate multiplies afterwards."""
    check_choice("decay_scale", decay_scale, ("learning_rate", "schedule"))
    if decay_scale == "learning_rate":
        if base is not None:
            raise ValueError(
                f"base_learning_rate={base!r} goes with decay_scale='schedule' only"
            )
        return 1.0
    if base is None:
        if isinstance(learning_rate, Phases):
            if not _phases_set(learning_rate, "learning_rate"):
                return 1.0  # with_hyperparams refuses these phases
            steps = np.arange(learning_rate.total_steps)
            base = float(learning_rate.schedule("learning_rate")(steps).max())
        elif callable(learning_rate):
            raise ValueError(
                "decay_scale='schedule' needs base_learning_rate if learning_rate is a "
                "schedule"
            )
        else:
            base = learning_rate
    check_scalar("base_learning_rate", base)
    if is_static(base) and base == 0:
        raise ValueError(f"base_learning_rate must be > 0, got {base!r}")
    return base


def _check_range(name: str, value: Any) -> None:
    """Checks a hyperparameter, of which the links accept more; see `check_factor`."""
    if name == "learning_rate" and is_static(value) and value < 0:
        raise ValueError(
            f"learning_rate must be finite and >= 0, got {show(value)}: set "
            "maximize=True to ascend"
        )
    check_scalar(name, value, below=1 if name == "momentum" else math.inf)


def _build(
    optimizer: Callable,
    factory: Callable,
    mask: Mask = None,
    *,
    decay_name: str = "weight_decay",
    **hyperparams: Any,
) -> Transformation:
    """Calls `with_hyperparams`; refuses arguments that would silently be replaced."""
    parameters = inspect.signature(optimizer).parameters
    phases = next((v for v in hyperparams.values() if isinstance(v, Phases)), None)
    for name in phases.names if phases else ():
        target = hyperparam_name(name, hyperparams)
        value = hyperparams.get(target)
        default = parameters[target].default if target in parameters else None
        unset = value is None or (is_static(value) and value == default)
        if value is not phases and not unset:
            is_decay = target == "weight_decay" and "l2" in parameters
            argument = "l2 or weight_decay" if is_decay else target
            passed = next(k for k, v in hyperparams.items() if v is phases)
            schedule = "b1" if passed == "momentum" else passed
            raise ValueError(
                f"{argument}={value!r} was set, but the phases drive {name} as well: "
                f"leave it out, or pass {passed}=phases.schedule({schedule!r}) alone"
            )
    # optax.inject_hyperparams makes arrays of all numbers and calls all functions.
    injected = all(isinstance(value, jax.Array) for value in hyperparams.values())
    if injected and (isinstance(mask, bool) or getattr(mask, "ndim", None) == 0):
        raise ValueError(
            f"mask must be a tree or a function, got {mask!r}: pass static_args='mask' "
            "to optax.inject_hyperparams, which calls a mask as a schedule otherwise"
        )

    def checked_factory(**values):
        for name, value in values.items():
            _check_range(decay_name if name == "weight_decay" else name, value)
        return factory(**values)

    if not injected:
        return with_hyperparams(checked_factory, **hyperparams)
    for name, value in hyperparams.items():
        check_scalar(name, value)  # not the range: they come from a state, at an update
    return with_hyperparams(factory, **hyperparams)
