"""The moments of Adam and AMSGrad."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import (
    check_array,
    check_choice,
    check_scalar,
    check_storage_dtype,
    is_static,
)
from .._dtypes import abs_sq, is_narrow, real_dtype, scalar_dtype
from .._transformation import Transformation
from .._tree import (
    ScalarOrSchedule,
    are_all_none,
    arrays_only,
    increment,
    map_leaves,
    schedule_step,
    zeros_like_params,
)
from .bias_correction import BiasCorrection, LogProduct, beta_at, init_log_product
from .rounding import init_key, step_key, stochastic_round

AmsgradConvention = Literal["torch", "paper", "optax"]


def _may_be_narrow(dtype: Any) -> bool:
    """Whether moments may be stored below float32."""
    return dtype == "params" or (dtype is not None and is_narrow(dtype))


def _step_key(key: Any, count: jax.Array) -> Any:
    """The random key of a step; None if nothing is rounded stochastically."""
    return None if key is None else step_key(key, count)


def _cast_moments(moments: tuple, dtypes: tuple, key: Any, index: int) -> tuple:
    """Casts the new moments of one leaf to their storage dtypes."""
    stored = []
    for i, (x, dtype) in enumerate(zip(moments, dtypes, strict=True)):
        if key is None or not is_narrow(dtype):
            stored.append(x.astype(dtype))
        else:
            leaf_key = jax.random.fold_in(jax.random.fold_in(key, index), i)
            bits = jax.random.bits(leaf_key, x.shape, "uint16")
            stored.append(stochastic_round(x, dtype, bits))
    return tuple(stored)


class _AdamFields(NamedTuple):
    count: jax.Array  # int32 []: updates done
    mu: optax.Updates  # like params; mu_dtype
    nu: optax.Updates  # like params; nu_dtype
    log_b1: LogProduct | None = None
    log_b2: LogProduct | None = None
    key: jax.Array | None = None  # uint32 [2]


class ScaleByAdamState(_AdamFields, optax.ScaleByAdamState):
    """Optax's state, for code that looks for it, and three fields more.

    These are None for constant betas and full-precision moments.
    """

    __slots__ = ()


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
) -> Transformation:
    r"""Rescales updates by Adam's rule.

    $$ m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 $$
    $$ u_t = \frac{m_t / c_1}{\sqrt{v_t / c_2 + \epsilon_{root}} + \epsilon}, \qquad
       c_i = 1 - \prod_{s \le t} \beta_{i,s} $$

    Conventions that bite:

    * `bias_correction="exact"` divides by the true sum of the weights, also for a
      scheduled beta, so a constant gradient gives a constant update under any schedule.
      For a constant beta that is `-expm1(t log(beta))`, accurate to 2e-7 in float32 at
      every t, where `1 - beta**t` is off by 1e-5 (.999) to 1e-3 (.99999). `"torch"`
      takes the current beta to the power t, as PyTorch and fastai do: equal for a
      constant beta, up to 37 % off in a 1cycle of 20 steps, 1.5 % in one of 1000.
      `"none"`: c = 1.
    * `epsilon_hat=True` adds eps to the uncorrected root,
      $u = \sqrt{c_2}/c_1 \; m / (\sqrt{v + \epsilon_{root}} + \epsilon)$, as Keras,
      TensorFlow and PyTorch before 1.3 do, and hence the fast.ai article.
    * `nesterov` is Dozat's form, as in Optax. It is not PyTorch's NAdam.
    * An integer or bool parameter is not trained: its update is 0, whatever its
      gradient, which `jax.grad(..., allow_int=True)` gives as float0.
    * A leaf whose gradient is None keeps its moments, but the one count t goes on for
      it. PyTorch counts per parameter: there, t stands still. Here it stands still only
      if all gradients are None. For PyTorch's numbers give the leaves that are without
      a gradient at the same steps an optimizer of their own, with `optax.partition`.

    Args:
        b1: decay of the first moment, in [0, 1): a number, a traced scalar, or a
            schedule, called with the number of updates done (int32). An array at
            `update`, after a number at `init`, counts as the b1 of every step so far.
        b2: decay of the second moment, likewise.
        eps: added to the root of the second moment, in the unit of the gradients.
        eps_root: added under the root; needed to differentiate through the update.
        mu_dtype: storage dtype of the first moment. None: float32, or float64 for
            float64 parameters; "params": the dtype of each parameter, as in Optax. The
            arithmetic is in float32 at least. Of a complex parameter this moment is
            complex64 at least, and the second one, of $|g|^2$, is real.
        nesterov: look one step ahead along the first moment.
        nu_dtype: storage dtype of the second moment, likewise. A second moment in
            bfloat16 never decays if it is rounded to nearest.
        bias_correction: `"exact"`, `"torch"` or `"none"`.
        epsilon_hat: add eps to the uncorrected root.
        stochastic_rounding: round moments stored below float32 stochastically, with a
            key in the state, so that they have no bias. Without it, a constant gradient
            of 1 ends at a bfloat16 mu of .984 (b1 = .9) or .805 (b1 = .99).
        seed: seed of the rounding. `jax.vmap` of `init` gives all members the same key.

    Returns:
        A transformation whose updates have the dtype of the gradients, or of wider
        parameters if they are passed.
        In a chain of bfloat16 gradients, use :func:`adamw_jax.chain`, which does not
        round between its links.

    Raises:
        TypeError, ValueError: an argument is out of range; at `init`, an array eps or
            eps_root is, or a parameter is not floating point; at `update`, the
            gradients do not match the state. The message names the argument or the path
            of the leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_adam(b1=0.9, b2=0.99999)
        >>> params = {"w": jnp.array([1.0, -2.0])}
        >>> updates, state = tx.update({"w": jnp.array([3.0, -0.1])}, tx.init(params))
        >>> [f"{u:.6f}" for u in updates["w"]]  # the first step is sign(g)
        ['1.000000', '-1.000000']

    References:
        Kingma and Ba, `Adam: A Method for Stochastic Optimization
        <https://arxiv.org/abs/1412.6980>`_, 2015; epsilon hat is in its section 2.
        Dozat, `Incorporating Nesterov Momentum into Adam
        <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """
    _check_adam_arguments(b1, b2, eps, eps_root, mu_dtype, nu_dtype, bias_correction)
    options = (bias_correction, nesterov, epsilon_hat)
    rounds = stochastic_rounding and any(map(_may_be_narrow, (mu_dtype, nu_dtype)))

    def init(params: Any) -> Any:
        check_array("eps", eps)
        check_array("eps_root", eps_root)
        return ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros_like_params(params, mu_dtype),
            nu=zeros_like_params(params, nu_dtype, real=True),
            log_b1=init_log_product(b1, params),
            log_b2=init_log_product(b2, params),
            key=init_key(seed) if rounds else None,
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        if are_all_none(updates):
            return updates, state
        betas = _current_betas(state, (b1, b2), (bias_correction, bias_correction))
        params = arrays_only(params)
        return _adam(updates, state, params, *betas, eps, eps_root, *options)

    return Transformation(
        init,
        update,
        arguments={
            **{"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
            **{"mu_dtype": mu_dtype, "nu_dtype": nu_dtype, "nesterov": nesterov},
            **{"bias_correction": bias_correction, "epsilon_hat": epsilon_hat},
            "rounds_stochastically": rounds,
        },
    )


def _current_betas(
    state: Any, betas: tuple[Any, Any], modes: tuple[Any, Any]
) -> tuple[Any, Any]:
    """Numbers, which a compiled update contains, and arrays, which it is passed."""
    products, step = (state.log_b1, state.log_b2), schedule_step(state.count)
    for name, beta, mode, product in zip(
        ("b1", "b2"), betas, modes, products, strict=True
    ):
        if callable(beta) and mode == "exact" and product is None:
            raise ValueError(
                f"{name} must be a schedule at init as well, so that the state keeps "
                f"the product of its values; got {beta!r} at update only"
            )
    numbers = tuple(float(beta) if is_static(beta) else None for beta in betas)
    arrays = tuple(beta(step) if callable(beta) else beta for beta in betas)
    return numbers, tuple(
        None if is_static(beta) else x for beta, x in zip(betas, arrays, strict=True)
    )


# One program outside of jit, too, where each operation would be a dispatch.
@functools.partial(jax.jit, static_argnums=(3, 7, 8, 9), inline=True)
def _adam(
    updates, state, params, numbers, arrays, eps, eps_root, mode, nesterov, epsilon_hat
):
    b1, b2 = (y if x is None else x for x, y in zip(numbers, arrays, strict=True))
    dtype = scalar_dtype((updates, state.mu))
    beta1 = beta_at(b1, mode, state.count, state.log_b1, dtype)
    beta2 = beta_at(b2, mode, state.count, state.log_b2, dtype)
    key = _step_key(state.key, state.count)

    def leaf(i, g, mu, nu):
        # In the dtype of the leaf, which float64 scalars must not promote.
        real = real_dtype(g.dtype)
        d1, r1, c1, n1 = [jnp.asarray(x, g.dtype) for x in beta1[:4]]
        d2, r2, c2 = [jnp.asarray(x, real) for x in beta2[:3]]
        m = d1 * mu.astype(g.dtype) + r1 * g
        v = d2 * nu.astype(real) + r2 * abs_sq(g)
        m_hat = d1 * (m / n1) + r1 * (g / c1) if nesterov else m / c1
        if epsilon_hat:
            m_hat = m_hat * jnp.sqrt(c2).astype(g.dtype)
        v_hat = v if epsilon_hat else v / c2
        u = m_hat / (jnp.sqrt(v_hat + eps_root) + eps).astype(g.dtype)
        return (u, *_cast_moments((m, v), (mu.dtype, nu.dtype), key, i))

    trees = {"state.mu": state.mu, "state.nu": state.nu}
    updates, mu, nu = map_leaves(leaf, updates, trees, carried=2, params=params)
    return updates, ScaleByAdamState(
        increment(state.count),
        mu,
        nu,
        beta1.log_product,
        beta2.log_product,
        state.key,
    )


class ScaleByAmsgradState(NamedTuple):
    """The state of Adam with the maximum of the second moment."""

    count: jax.Array  # int32 []
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates
    log_b1: LogProduct | None = None
    log_b2: LogProduct | None = None
    key: jax.Array | None = None


class OptaxAmsgradState(ScaleByAmsgradState, optax.ScaleByAmsgradState):
    """That of `convention="optax"`: nu_max is of the corrected second moment."""

    __slots__ = ()


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
) -> Transformation:
    r"""Rescales updates by AMSGrad's rule: Adam with a second moment that never falls.

    With m, v, $c_1$ and $c_2$ as in :func:`scale_by_adam`, there are three conventions:

    * torch: $\hat v_t = \max(\hat v_{t-1}, v_t)$,
      $u_t = (m_t/c_1) / (\sqrt{\hat v_t / c_2} + \epsilon)$;
    * paper: the same maximum, $u_t = m_t / (\sqrt{\hat v_t} + \epsilon)$;
    * optax: $\hat v_t = \max(\hat v_{t-1}, v_t / c_2)$,
      $u_t = (m_t/c_1) / (\sqrt{\hat v_t} + \epsilon)$.

    They differ considerably. Optax's never forgets the first estimates,
    $v_1/c_2 = g_1^2$: after one gradient that is ten times too large, its steps are
    still 6 times shorter than PyTorch's 200 steps later. The paper's first step is 3
    times as long as PyTorch's.

    The count is shared by all leaves; a None gradient is treated as in
    :func:`scale_by_adam`.

    Args:
        b1: decay of the first moment, in [0, 1): a number, a traced scalar or a
            schedule.
        b2: decay of the second moment, likewise.
        eps: added to the root of the second moment.
        eps_root: added under the root.
        mu_dtype: storage dtype of the first moment; None: at least float32.
        bias_correction_mu: False sets $c_1 = 1$, as in Optax.
        bias_correction_nu: False sets $c_2 = 1$, as in Optax.
        convention: `"torch"`, `"paper"` or `"optax"`, the numbers of
            `optax.scale_by_amsgrad`.
        nu_dtype: storage dtype of `nu` and `nu_max`; None: at least float32. `nu_max`
            is rounded to nearest, because a maximum of random roundings would grow.
        bias_correction: `"exact"`, `"torch"` or `"none"`; see :func:`scale_by_adam`.
        epsilon_hat: add eps and eps_root to the uncorrected second moment. Not defined
            for `"optax"`, which keeps a corrected one.
        stochastic_rounding: round `mu` and `nu` stochastically if they are stored below
            float32.
        seed: seed of the stochastic rounding.

    Returns:
        A transformation whose updates have the dtype of the gradients, or of wider
        parameters if they are passed.

    Raises:
        TypeError, ValueError: as for :func:`scale_by_adam`.

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
        raise ValueError("epsilon_hat must be False for convention='optax', got True")
    corrected = bias_correction != "none" and convention != "paper"
    mode_mu = bias_correction if corrected and bias_correction_mu else "none"
    mode_nu = bias_correction if corrected and bias_correction_nu else "none"
    options = (mode_mu, mode_nu, convention, epsilon_hat)
    rounds = stochastic_rounding and any(map(_may_be_narrow, (mu_dtype, nu_dtype)))
    state_type = OptaxAmsgradState if convention == "optax" else ScaleByAmsgradState

    def init(params: Any) -> Any:
        check_array("eps", eps)
        check_array("eps_root", eps_root)
        return state_type(
            count=jnp.zeros([], jnp.int32),
            mu=zeros_like_params(params, mu_dtype),
            nu=zeros_like_params(params, nu_dtype, real=True),
            nu_max=zeros_like_params(params, nu_dtype, real=True),
            log_b1=init_log_product(b1, params),
            log_b2=init_log_product(b2, params),
            key=init_key(seed) if rounds else None,
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        if are_all_none(updates):
            return updates, state
        betas = _current_betas(state, (b1, b2), (mode_mu, mode_nu))
        params = arrays_only(params)
        return _amsgrad(updates, state, params, *betas, eps, eps_root, *options)

    return Transformation(init, update)


@functools.partial(jax.jit, static_argnums=(3, 7, 8, 9, 10), inline=True)
def _amsgrad(
    updates,
    state,
    params,
    numbers,
    arrays,
    eps,
    eps_root,
    mode_mu,
    mode_nu,
    convention,
    epsilon_hat,
):
    b1, b2 = (y if x is None else x for x, y in zip(numbers, arrays, strict=True))
    dtype = scalar_dtype((updates, state.mu))
    beta1 = beta_at(b1, mode_mu, state.count, state.log_b1, dtype)
    beta2 = beta_at(b2, mode_nu, state.count, state.log_b2, dtype)
    key = _step_key(state.key, state.count)

    def leaf(i, g, mu, nu, nu_max):
        real = real_dtype(g.dtype)
        d1, r1, c1 = [jnp.asarray(x, g.dtype) for x in beta1[:3]]
        d2, r2, c2 = [jnp.asarray(x, real) for x in beta2[:3]]
        m = d1 * mu.astype(g.dtype) + r1 * g
        v = d2 * nu.astype(real) + r2 * abs_sq(g)
        candidate = v / c2 if convention == "optax" else v
        maximum = jnp.maximum(nu_max.astype(real), candidate)
        m_hat = m / c1
        if epsilon_hat:
            m_hat = m_hat * jnp.sqrt(c2).astype(g.dtype)
        keeps = epsilon_hat or convention == "optax"
        v_hat = maximum if keeps else maximum / c2
        u = m_hat / (jnp.sqrt(v_hat + eps_root) + eps).astype(g.dtype)
        stored = _cast_moments((m, v), (mu.dtype, nu.dtype), key, i)
        return (u, *stored, maximum.astype(nu_max.dtype))

    states = {
        "state.mu": state.mu,
        "state.nu": state.nu,
        "state.nu_max": state.nu_max,
    }
    updates, mu, nu, nu_max = map_leaves(
        leaf, updates, states, carried=3, params=params
    )
    return updates, type(state)(
        increment(state.count),
        mu,
        nu,
        nu_max,
        beta1.log_product,
        beta2.log_product,
        state.key,
    )
