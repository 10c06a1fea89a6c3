"""Gradient transformations of Adam's family: moments, momentum, decay, step size.

Each is an `optax.GradientTransformation` and chains with Optax's own. All of them
compute in float32 (float64 for float64 leaves) whatever the dtype of parameters,
gradients and stored moments, let None leaves through, and refuse a tree that does
not match with an error that names the leaf.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._tree import (
    ScalarOrSchedule,
    check_choice,
    check_scalar,
    check_storage_dtype,
    compute_dtype,
    increment,
    is_static,
    map_leaves,
    need_params,
    scalar_dtype,
    zeros_like_params,
)
from ..apply import Scaled, multiplied
from ..fused.kernel import is_available
from ..masks import Mask, leaf_flags, resolve_mask
from .rounding import stochastic_round

BiasCorrection = Literal["exact", "torch", "none"]
AmsgradConvention = Literal["torch", "paper", "optax"]


class LogProduct(NamedTuple):
    """The logarithm of the product of all betas so far, as a compensated sum.

    The weights of a moving average with betas b_1 .. b_t sum to 1 - prod(b_i). Kept as
    that sum in float32, z = b z + (1 - b) stops growing at 1 - 3e-8 / (1 - b), .3 %
    short for b = .99999; with the lost low bits carried along (Kahan), the logarithm
    is right to 1e-7 at every step.
    """

    total: jax.Array  # []
    lost: jax.Array  # []


class Beta(NamedTuple):
    """What one step needs of b1 or b2: the decay and the sum of the weights so far."""

    decay: Any  # b_t
    rest: Any  # 1 - b_t, in float64 before it is rounded where b_t is a number
    correction: Any  # 1 - prod(b_i, i <= t); 1 without bias correction
    next_correction: Any  # the same one step ahead, for Nesterov's form
    log_product: LogProduct | None


def _one_minus_exp(x: jax.Array) -> jax.Array:
    """1 - exp(x) for x <= 0, to 2e-7 in float32, where XLA's expm1 is 4e-7 off."""
    if x.dtype == jnp.float64:
        return -jnp.expm1(x)
    series = jnp.ones_like(x)  # of (exp(x) - 1) / x
    for k in range(10, 1, -1):
        series = 1 + x / k * series
    return jnp.where(x > -0.5, -x * series, 1 - jnp.exp(x))


def _init_log_product(beta: ScalarOrSchedule, params: Any) -> LogProduct | None:
    if is_static(beta):  # the closed form needs no memory
        return None
    dtype = scalar_dtype(params)
    return LogProduct(jnp.zeros([], dtype), jnp.zeros([], dtype))


def _beta_at(
    name: str,
    beta: ScalarOrSchedule,
    mode: BiasCorrection,
    step: jax.Array,
    state: LogProduct | None,
    dtype: Any,
) -> Beta:
    """The beta of a step (counted from 0) and its bias correction."""
    if is_static(beta) != (state is None):
        raise ValueError(
            f"{name} must be a number both at init and at update, or a schedule or "
            f"traced value at both: got {beta!r} at update"
        )
    if state is not None:
        dtype = state.total.dtype  # as it was made, so that the state keeps its types
    t = (step + 1).astype(dtype)
    if is_static(beta):
        # The logarithm in float64: 1 - float32(b)**t is off by 1e-5 to 1e-3.
        log = math.log(beta) if beta > 0 else -1000.0  # exp(-1000) is 0 as well
        decay, rest, total = float(beta), 1.0 - float(beta), t * log
    else:
        decay = jnp.asarray(beta(step) if callable(beta) else beta).astype(dtype)
        rest = 1 - decay
        # Not quite the logarithm of 0, and with a gradient there.
        log = jnp.log1p(-jnp.minimum(rest, 1 - float(jnp.finfo(dtype).epsneg)))
        total = t * log
        if mode == "exact" and state is not None:
            corrected = log - state.lost
            total = state.total + corrected
            state = LogProduct(total, (total - state.total) - corrected)
    if mode == "none":
        return Beta(decay, rest, 1.0, 1.0, state)
    correction, following = _one_minus_exp(total), _one_minus_exp(total + log)
    return Beta(decay, rest, correction, following, state)


def _init_key(mu_dtype: Any, nu_dtype: Any, stochastic_rounding: bool, seed: int):
    """A key in the state, if there is anything to round."""
    dtypes = [jnp.dtype(dtype) for dtype in (mu_dtype, nu_dtype) if dtype is not None]
    narrow = any(dtype != compute_dtype(dtype) for dtype in dtypes)
    return jax.random.PRNGKey(seed) if stochastic_rounding and narrow else None


def _store(moments: tuple, dtypes: tuple, key: Any, index: int) -> tuple:
    """Casts freshly computed moments of one leaf to the dtypes they are stored in."""
    stored = []
    for i, (x, dtype) in enumerate(zip(moments, dtypes, strict=True)):
        if key is None or dtype == compute_dtype(dtype):
            stored.append(x.astype(dtype))
        else:
            leaf_key = jax.random.fold_in(jax.random.fold_in(key, index), i)
            bits = jax.random.bits(leaf_key, x.shape, "uint16")
            stored.append(stochastic_round(x, dtype, bits))
    return tuple(stored)


class ScaleByAdamState(NamedTuple):
    """Constant betas and full-precision moments leave the last three None."""

    count: jax.Array  # int32 []: updates done
    mu: optax.Updates  # like params; mu_dtype
    nu: optax.Updates  # like params; nu_dtype
    log_b1: LogProduct | None = None
    log_b2: LogProduct | None = None
    key: jax.Array | None = None  # uint32 [2]


def _check_adam_arguments(b1, b2, eps, eps_root, mu_dtype, nu_dtype, bias_correction):
    check_scalar("b1", b1, below=1, schedule=True)
    check_scalar("b2", b2, below=1, schedule=True)
    check_scalar("eps", eps)
    check_scalar("eps_root", eps_root)
    check_storage_dtype("mu_dtype", mu_dtype)
    check_storage_dtype("nu_dtype", nu_dtype)
    check_choice("bias_correction", bias_correction, ("exact", "torch", "none"))


def scale_by_adam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    bias_correction: BiasCorrection = "exact",
    epsilon_hat: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Rescales updates by Adam's rule.

    $$ m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 $$
    $$ u_t = \frac{m_t / c_1}{\sqrt{v_t / c_2 + \epsilon_{root}} + \epsilon}, \qquad
       c_i = 1 - \prod_{s \le t} \beta_{i,s} $$

    Conventions that bite:

    * `bias_correction="exact"` divides by the true sum of the weights, also when a
      beta is scheduled, so that a constant gradient gives a constant update under any
      schedule. For a constant beta that is `-expm1(t log(beta))`, right to 2e-7 in
      float32 at every t, where `1 - beta**t` is off by 1e-5 (.999) to 1e-3 (.99999).
      `"torch"` takes the current beta to the power t, as PyTorch and fastai do: the
      same for a constant beta, 37 % away at worst in a 1cycle of 20 steps, 1.5 % in
      one of 1000. `"none"`: c = 1.
    * `epsilon_hat=True` adds eps to the uncorrected root,
      $u = \sqrt{c_2}/c_1 \; m / (\sqrt{v + \epsilon_{root}} + \epsilon)$: Keras,
      TensorFlow, and PyTorch before 1.3, hence the fast.ai article.
    * With `nesterov`, Dozat's form as in Optax, which is not PyTorch's NAdam.

    Args:
        b1: decay of the first moment, in [0, 1): a number, a traced scalar, or a
            schedule, called with the number of updates done (int32).
        b2: the same for the second moment.
        eps: added to the root; dimensionless against the gradients' scale.
        eps_root: added under the root; needed to differentiate through the update.
        mu_dtype: storage of the first moment. None: the parameters' dtype, but at
            least float32. Arithmetic is in float32 whatever the storage.
        nesterov: look one step ahead along the first moment.
        nu_dtype: storage of the second moment; None as above. A second moment in
            bfloat16 never decays when rounded to nearest.
        bias_correction: `"exact"`, `"torch"` or `"none"`.
        epsilon_hat: where eps is added.
        stochastic_rounding: of moments stored in less than float32, with a key in the
            state; their mean is then right. Without it a constant gradient of 1 ends
            at a bfloat16 mu of .984 (b1 = .9) or .805 (b1 = .99).
        seed: of the rounding. `jax.vmap` of `init` gives every member the same key.

    Returns:
        A transformation whose updates are float32 (float64 for float64 gradients),
        also for bfloat16 gradients, so that links behind it lose nothing. What selects
        between updates and gradients, as `optax.apply_if_finite` does, needs both in
        one dtype: cast bfloat16 gradients to float32 in front of it.

    Raises:
        TypeError, ValueError: an argument out of range (when called), a parameter
            that is not floating point (`init`), or gradients that do not match the
            state (`update`); the message names the argument or the leaf's path.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_adam(b1=0.9, b2=0.99999)
        >>> params = {"w": jnp.array([1.0, -2.0])}
        >>> updates, state = tx.update({"w": jnp.array([3.0, -0.1])}, tx.init(params))
        >>> [f"{u:.6f}" for u in updates["w"]]  # the first step is sign(g)
        ['1.000000', '-1.000000']

    References:
        Kingma and Ba, `Adam: A Method for Stochastic Optimization
        <https://arxiv.org/abs/1412.6980>`_, 2015; its section 2 has epsilon hat.
        Dozat, `Incorporating Nesterov Momentum into Adam
        <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """
    _check_adam_arguments(b1, b2, eps, eps_root, mu_dtype, nu_dtype, bias_correction)

    def init(params: Any) -> Any:
        return ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros_like_params(params, mu_dtype),
            nu=zeros_like_params(params, nu_dtype),
            log_b1=_init_log_product(b1, params),
            log_b2=_init_log_product(b2, params),
            key=_init_key(mu_dtype, nu_dtype, stochastic_rounding, seed),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        dtype = scalar_dtype((updates, state.mu))
        beta1 = _beta_at("b1", b1, bias_correction, state.count, state.log_b1, dtype)
        beta2 = _beta_at("b2", b2, bias_correction, state.count, state.log_b2, dtype)
        key = None if state.key is None else jax.random.fold_in(state.key, state.count)

        def leaf(i, g, mu, nu):
            g = g.astype(compute_dtype(g.dtype))
            # In the leaf's dtype: float64 scalars must not promote float32 leaves.
            (d1, r1, c1, n1), (d2, r2, c2, _) = (
                [jnp.asarray(x, g.dtype) for x in beta[:4]] for beta in (beta1, beta2)
            )
            m = d1 * mu.astype(g.dtype) + r1 * g
            v = d2 * nu.astype(g.dtype) + r2 * g * g
            m_hat = d1 * (m / n1) + r1 * (g / c1) if nesterov else m / c1
            if epsilon_hat:
                u = m_hat * jnp.sqrt(c2) / (jnp.sqrt(v + eps_root) + eps)
            else:
                u = m_hat / (jnp.sqrt(v / c2 + eps_root) + eps)
            return (u, *_store((m, v), (mu.dtype, nu.dtype), key, i))

        updates, mu, nu = map_leaves(
            leaf, updates, {"state.mu": state.mu, "state.nu": state.nu}, carried=2
        )
        return updates, ScaleByAdamState(
            increment(state.count),
            mu,
            nu,
            beta1.log_product,
            beta2.log_product,
            state.key,
        )

    return optax.GradientTransformation(init, update)


class ScaleByAmsgradState(NamedTuple):
    """As for Adam, with the maximum of the second moment that the convention keeps."""

    count: jax.Array  # int32 []
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates
    log_b1: LogProduct | None = None
    log_b2: LogProduct | None = None
    key: jax.Array | None = None


def scale_by_amsgrad(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    convention: AmsgradConvention = "torch",
    nu_dtype: Any = None,
    bias_correction: BiasCorrection = "exact",
    epsilon_hat: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Rescales updates by AMSGrad's rule: Adam with a second moment that never falls.

    With m, v, $c_1$ and $c_2$ as in :func:`scale_by_adam`, the three conventions are

    * torch: $\hat v_t = \max(\hat v_{t-1}, v_t)$,
      $u_t = (m_t/c_1) / (\sqrt{\hat v_t / c_2} + \epsilon)$;
    * paper: the same maximum, $u_t = m_t / (\sqrt{\hat v_t} + \epsilon)$;
    * optax: $\hat v_t = \max(\hat v_{t-1}, v_t / c_2)$,
      $u_t = (m_t/c_1) / (\sqrt{\hat v_t} + \epsilon)$.

    They differ much. Optax's remembers the first estimates, $v_1/c_2 = g_1^2$, for
    ever: after one gradient ten times too large its steps stay 6 times shorter than
    PyTorch's 200 steps on. The paper's first step is 3 times as long as PyTorch's.

    Args:
        b1: see :func:`scale_by_adam`, also for the other arguments not listed.
        b2: see there.
        eps: see there.
        eps_root: see there.
        mu_dtype: see there.
        bias_correction_mu: False leaves $c_1 = 1$, as in Optax.
        bias_correction_nu: False leaves $c_2 = 1$, as in Optax.
        convention: `"torch"`, `"paper"` or `"optax"`. To have what
            `optax.scale_by_amsgrad` computes, say `"optax"`.
        nu_dtype: of `nu`; `nu_max` is kept in it too, rounded to nearest, since a
            maximum of random roundings would grow.
        bias_correction: `"exact"`, `"torch"` or `"none"`.
        epsilon_hat: eps and eps_root are added to the uncorrected second moment; not
            possible under `"optax"`, which has none.
        stochastic_rounding: of `mu` and `nu`.
        seed: of the rounding.

    Returns:
        A transformation whose updates are float32 (float64 for float64 gradients).

    Raises:
        TypeError, ValueError: as :func:`scale_by_adam`.

    Example:
        >>> import jax.numpy as jnp
        >>> def third_update(convention):
        ...     tx = scale_by_amsgrad(convention=convention)
        ...     state = tx.init(jnp.zeros(1))
        ...     for g in (10.0, 1.0, 1.0):
        ...         update, state = tx.update(jnp.array([g]), state)
        ...     return float(update[0])
        >>> for name in ("torch", "paper", "optax"):
        ...     print(f"{name} {third_update(name):.3f}")
        torch 0.633
        paper 3.134
        optax 0.369

    References:
        Reddi et al., `On the Convergence of Adam and Beyond
        <https://arxiv.org/abs/1904.09237>`_, 2018.
    """
    _check_adam_arguments(b1, b2, eps, eps_root, mu_dtype, nu_dtype, bias_correction)
    check_choice("convention", convention, ("torch", "paper", "optax"))
    if convention == "optax" and epsilon_hat:
        raise ValueError("epsilon_hat=True is not defined for convention='optax'")
    corrected = bias_correction != "none" and convention != "paper"
    mode_mu = bias_correction if corrected and bias_correction_mu else "none"
    mode_nu = bias_correction if corrected and bias_correction_nu else "none"

    def init(params: Any) -> Any:
        return ScaleByAmsgradState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros_like_params(params, mu_dtype),
            nu=zeros_like_params(params, nu_dtype),
            nu_max=zeros_like_params(params, nu_dtype),
            log_b1=_init_log_product(b1, params),
            log_b2=_init_log_product(b2, params),
            key=_init_key(mu_dtype, nu_dtype, stochastic_rounding, seed),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        dtype = scalar_dtype((updates, state.mu))
        beta1 = _beta_at("b1", b1, mode_mu, state.count, state.log_b1, dtype)
        beta2 = _beta_at("b2", b2, mode_nu, state.count, state.log_b2, dtype)
        key = None if state.key is None else jax.random.fold_in(state.key, state.count)

        def leaf(i, g, mu, nu, nu_max):
            g = g.astype(compute_dtype(g.dtype))
            (d1, r1, c1), (d2, r2, c2) = (
                [jnp.asarray(x, g.dtype) for x in beta[:3]] for beta in (beta1, beta2)
            )
            m = d1 * mu.astype(g.dtype) + r1 * g
            v = d2 * nu.astype(g.dtype) + r2 * g * g
            candidate = v / c2 if convention == "optax" else v
            highest = jnp.maximum(nu_max.astype(g.dtype), candidate)
            v_hat = highest if convention == "optax" else highest / c2
            if epsilon_hat:
                u = m / c1 * jnp.sqrt(c2) / (jnp.sqrt(highest + eps_root) + eps)
            else:
                u = m / c1 / (jnp.sqrt(v_hat + eps_root) + eps)
            stored = _store((m, v), (mu.dtype, nu.dtype), key, i)
            return (u, *stored, highest.astype(nu_max.dtype))

        states = {
            "state.mu": state.mu,
            "state.nu": state.nu,
            "state.nu_max": state.nu_max,
        }
        updates, mu, nu, nu_max = map_leaves(leaf, updates, states, carried=3)
        return updates, ScaleByAmsgradState(
            increment(state.count),
            mu,
            nu,
            nu_max,
            beta1.log_product,
            beta2.log_product,
            state.key,
        )

    return optax.GradientTransformation(init, update)


class TraceState(NamedTuple):
    """The momentum buffer; with a scheduled decay, the step that the schedule is at."""

    trace: optax.Updates  # like params; accumulator_dtype
    step: jax.Array | None = None  # int32 []


def trace(
    decay: ScalarOrSchedule,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    dampened: bool = False,
) -> optax.GradientTransformation:
    r"""Momentum, $b_t = \mu b_{t-1} + g_t$; dampened, $\mu b_{t-1} + (1-\mu) g_t$.

    The update is $b_t$, with `nesterov` $g_t + \mu b_t$ (dampened:
    $(1-\mu) g_t + \mu b_t$). The dampened form is the moving average in which the
    article writes SGD: its step does not grow as $1/(1-\mu)$ with the momentum, so a
    learning rate for one form is not one for the other. The buffer starts at zero in
    both; PyTorch's `dampening` leaves the first gradient undampened.

    Args:
        decay: $\mu$ in [0, 1): a number, a traced scalar or a schedule of the step.
        nesterov: look one step ahead.
        accumulator_dtype: storage of the buffer; None: the parameters', at least
            float32.
        dampened: take the moving average.

    Returns:
        A transformation whose updates are float32 (float64 for float64 gradients).

    Raises:
        TypeError, ValueError: as :func:`scale_by_adam`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = trace(0.5)
        >>> state = tx.init(jnp.zeros(1))
        >>> for _ in range(3):
        ...     u, state = tx.update(jnp.ones(1), state)
        >>> float(u[0])
        1.75

    References:
        Sutskever et al., `On the importance of initialization and momentum in deep
        learning <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    check_scalar("decay", decay, below=1, schedule=True)
    check_storage_dtype("accumulator_dtype", accumulator_dtype)

    def init(params: Any) -> Any:
        step = jnp.zeros([], jnp.int32) if callable(decay) else None
        return TraceState(zeros_like_params(params, accumulator_dtype), step)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = decay(state.step) if callable(decay) else decay

        def leaf(_, g, buffer):
            g = g.astype(compute_dtype(g.dtype))
            factor = jnp.asarray(mu, g.dtype)
            g = (1 - factor) * g if dampened else g
            new = factor * buffer.astype(g.dtype) + g
            return g + factor * new if nesterov else new, new.astype(buffer.dtype)

        updates, new = map_leaves(
            leaf, updates, {"state.trace": state.trace}, carried=1
        )
        step = None if state.step is None else increment(state.step)
        return updates, TraceState(new, step)

    return optax.GradientTransformation(init, update)


class ScheduleState(NamedTuple):
    """The step of a transformation whose value is a schedule."""

    step: jax.Array  # int32 []


def _scheduled(
    value: ScalarOrSchedule, rule: Any, mask: Mask = None, *, needs_params: bool = True
) -> optax.GradientTransformation:
    """`rule(value, update, parameter)` on every leaf that the mask selects."""

    def init(params: Any) -> Any:
        resolve_mask(mask, params)  # a mask that does not fit is refused here already
        if callable(value):
            return ScheduleState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if needs_params:
            need_params(params)
        current = value(state.step) if callable(value) else value
        selected = None if mask is None else leaf_flags(mask, params, updates)

        def leaf(i, u, p=None):
            u = u.astype(compute_dtype(u.dtype))
            if selected is not None and not selected[i]:
                return (u,)
            p = p if p is None else p.astype(u.dtype)
            return (rule(jnp.asarray(current, u.dtype), u, p),)

        trees = {"params": params} if needs_params else {}
        (updates,) = map_leaves(leaf, updates, trees, carried=0)
        if callable(value):
            state = ScheduleState(increment(state.step))
        return updates, state

    return optax.GradientTransformation(init, update)


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: Mask = None
) -> optax.GradientTransformation:
    r"""Decoupled weight decay: $u \leftarrow u + \lambda p$, behind the moments.

    Put behind `scale_by_adam` and before the learning rate, it makes
    $p \leftarrow p - \eta_t (u_t + \lambda p)$: **the decay is multiplied by the
    learning rate**, as in fast.ai, PyTorch and Optax, unlike Loshchilov and Hutter,
    whose decay is scaled by the schedule multiplier only (`decay_scale="schedule"` of
    :func:`adamw_jax.adamw`). It is one rounded addition: PyTorch's
    $p (1 - \eta\lambda)$ rounds p once more per step, with a bias.

    Args:
        weight_decay: $\lambda \ge 0$: a number, a traced scalar or a schedule of the
            step.
        mask: which leaves decay: a tree of bools (or a prefix of one), or a callable
            from params to such a tree, as :func:`adamw_jax.mask_by_path` and
            :func:`adamw_jax.no_decay_on_bias_and_norm`. None: all.

    Returns:
        A transformation; `update` needs `params`.

    Raises:
        TypeError, ValueError: a negative or NaN decay, a mask of another structure
            than the parameters (with the path where they differ), `update` without
            `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = add_decayed_weights(0.1, mask={"kernel": True, "bias": False})
        >>> params = {"kernel": jnp.array(2.0), "bias": jnp.array(2.0)}
        >>> zeros = {"kernel": jnp.array(0.0), "bias": jnp.array(0.0)}
        >>> updates, _ = tx.update(zeros, tx.init(params), params)
        >>> print(f"{updates['kernel']:.1f} {updates['bias']:.1f}")
        0.2 0.0

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization
        <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    check_scalar("weight_decay", weight_decay, schedule=True)
    return _scheduled(weight_decay, lambda wd, u, p: u + wd * p, mask)


def add_l2_gradient(
    l2: ScalarOrSchedule = 0.0, mask: Mask = None
) -> optax.GradientTransformation:
    r"""L2 regularisation: $g \leftarrow g + \lambda p$, in front of the moments.

    The gradient of $\frac\lambda2 \lVert p \rVert^2$ (no factor 2), what PyTorch's
    `Adam(weight_decay=)` and fastai's `wd_loss=True` do. Adam then divides it by the
    root of the second moment as well, so weights with large gradients decay less:
    this is what decoupling removes. For SGD the two are equal up to the schedule.

    Args:
        l2: $\lambda \ge 0$: a number, a traced scalar or a schedule of the step.
        mask: as in :func:`add_decayed_weights`.

    Returns:
        A transformation; `update` needs `params`.

    Raises:
        TypeError, ValueError: as :func:`add_decayed_weights`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import scale_by_adam
        >>> tx = optax.chain(add_l2_gradient(0.1), scale_by_adam())
        >>> params = jnp.array([2.0, -3.0])
        >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
        >>> [f"{u:.4f}" for u in updates]  # Adam's first step is a sign
        ['1.0000', '-1.0000']
    """
    check_scalar("l2", l2, schedule=True)
    return _scheduled(l2, lambda wd, u, p: u + wd * p, mask)


def scale_by_learning_rate(
    learning_rate: ScalarOrSchedule, *, flip_sign: bool = True
) -> optax.GradientTransformation:
    r"""$u \leftarrow -\eta_t u$: the last link of a chain that descends.

    As Optax's; its scalar takes the dtype of each leaf, so that a float64 schedule
    does not promote float32 updates.

    Args:
        learning_rate: $\eta \ge 0$: a number, a traced scalar or a schedule of the
            step.
        flip_sign: False keeps the sign. To maximise with a decay that still shrinks,
            use `maximize=True` of the optimizers instead.

    Returns:
        A transformation.

    Raises:
        TypeError, ValueError: a negative, NaN or infinite rate.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_learning_rate(0.5)
        >>> print(tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)))[0])
        -1.0
    """
    check_scalar("learning_rate", learning_rate, schedule=True)
    sign = -1 if flip_sign else 1
    return _scheduled(learning_rate, lambda lr, u, p: sign * lr * u, needs_params=False)


def clip_by_global_norm(
    max_norm: float | jax.Array, *, eps: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the gradients, all by one factor, to a global norm of at most max_norm.

    $$ g \leftarrow g \min\Big(1, \frac{n_{max}}{\lVert g \rVert + \epsilon}\Big) $$

    One read of the gradients for their norm and nothing more: the factor goes into the
    pass that updates the moments. Behind Optax's, which divides every gradient by the
    norm, XLA first writes a clipped copy: 60 bytes a parameter for a step of AdamW on a
    CPU and memory for another gradient, where this needs 44 and none. With
    :func:`adamw_jax.update_and_apply` in front of :func:`adamw_jax.adamw`: 32.

    Conventions that bite:

    * NaN in one leaf makes all NaN, and an infinite gradient all others 0, as in Optax
      and PyTorch; `optax.apply_if_finite` leaves such a step out.
    * Leaves that are not trained count if they have gradients; put it inside
      :func:`adamw_jax.freeze`.

    Args:
        max_norm: $n_{max} > 0$: a number or a traced scalar. By
            :func:`adamw_jax.with_hyperparams` also a schedule.
        eps: $\epsilon$; 0 in Optax, 1e-6 in PyTorch's `clip_grad_norm_`.

    Returns:
        A transformation whose updates are float32 (float64 for float64 gradients).

    Raises:
        TypeError, ValueError: a max_norm that is not positive, or an eps below 0.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = clip_by_global_norm(1.0)
        >>> grads = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
        >>> clipped, _ = tx.update(grads, tx.init(grads))
        >>> print(f"{clipped['a']:.1f} {clipped['b']:.1f}")
        0.6 0.8

    References:
        Pascanu et al., `On the difficulty of training recurrent neural networks
        <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    check_scalar("max_norm", max_norm)
    if is_static(max_norm) and max_norm == 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    check_scalar("eps", eps)

    def update(
        updates: Any, state: Any, params: Any = None, *, _apply=False, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        dtype = scalar_dtype(updates)

        def square(u):
            u = jnp.asarray(u)
            return jnp.square(u.astype(compute_dtype(u.dtype))).sum().astype(dtype)

        squares = map(square, jax.tree.leaves(updates))
        norm = jnp.sqrt(sum(squares, jnp.zeros([], dtype))) + eps
        limit = jnp.asarray(max_norm, dtype)
        # NaN is not below anything: it goes on, into every leaf.
        factor = jnp.where(norm < limit, 1, limit / norm)

        (updates,) = map_leaves(lambda _, u: (u,), updates, {}, carried=0)  # checks
        scaled = Scaled(updates, factor)
        kernel = _apply is True and is_available()
        return scaled if kernel else multiplied(scaled), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def normalized_weight_decay(
    norm: float, batch_size: float, num_examples: float, epochs: float
) -> float:
    r"""Loshchilov and Hutter's normalised decay, $\lambda_{norm} \sqrt{b / (B T)}$.

    The decay per step that stays optimal when the length of training changes. It is
    the decay of `decay_scale="schedule"`, which no learning rate multiplies; divide
    by the peak learning rate for PyTorch's convention.

    Args:
        norm: $\lambda_{norm}$; the paper's best on CIFAR-10 is .025 to .05.
        batch_size: b, in examples.
        num_examples: B, in the training set.
        epochs: T, of the run, or of the current restart.

    Returns:
        The weight decay, a float.

    Raises:
        ValueError: a negative norm, or another argument that is not positive.

    Example:
        >>> print(f"{normalized_weight_decay(0.025, 128, 50_000, epochs=100):.3e}")
        1.265e-04

    References:
        Loshchilov and Hutter, 2019, section 4 and appendix B.1.
    """
    check_scalar("norm", norm)
    sizes = {"batch_size": batch_size, "num_examples": num_examples, "epochs": epochs}
    for name, value in sizes.items():
        check_scalar(name, value)
        if value == 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")
    return norm * math.sqrt(batch_size / (num_examples * epochs))
