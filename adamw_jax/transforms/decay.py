"""Weight decay: decoupled, as an L2 gradient, normalised by the length of the run."""

import math

import jax.numpy as jnp

from .._checks import check_factor, check_scalar
from .._transformation import Transformation
from .._tree import ScalarOrSchedule
from ..masks import Mask
from .scaling import scheduled


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: Mask = None
) -> Transformation:
    r"""Decoupled weight decay: $u \leftarrow u + \lambda p$, after the moments.

    Between `scale_by_adam` and the learning rate it gives
    $p \leftarrow p - \eta_t (u_t + \lambda p)$: **the learning rate multiplies the
    decay**, as in fast.ai, PyTorch and Optax. In Loshchilov and Hutter only the
    schedule multiplier does (`decay_scale="schedule"` of :func:`adamw_jax.adamw`). The
    decay is one rounded addition; PyTorch's $p (1 - \eta\lambda)$ rounds p once more
    per step, with a bias.

    Args:
        weight_decay: $\lambda$; a negative one makes the parameters grow. A number, a
            traced scalar, an array that broadcasts to each leaf, or a schedule of the
            step.
        mask: which leaves decay: a tree of bools (or 0 and 1), a prefix of one, or a
            function from params to either, such as
            :func:`adamw_jax.no_decay_on_bias_and_norm` or the result of
            :func:`adamw_jax.mask_by_path`. None: all.

    Returns:
        A transformation; `update` needs `params`.

    Raises:
        TypeError, ValueError: weight_decay is not a finite number; the mask does not
            match the parameters (the message names the path); or `update` was called
            without `params`.

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
    check_factor("weight_decay", weight_decay)
    return scheduled(
        "weight_decay",
        weight_decay,
        _add_decay,
        mask,
        arguments={"weight_decay": weight_decay, "mask": mask},
    )


def add_l2_gradient(l2: ScalarOrSchedule = 0.0, mask: Mask = None) -> Transformation:
    r"""L2 regularisation: $g \leftarrow g + \lambda p$, before the moments.

    This is the gradient of $\frac\lambda2 \lVert p \rVert^2$, without a factor 2, as in
    PyTorch's `Adam(weight_decay=)` and fastai's `wd_loss=True`. Adam then divides it by
    the root of the second moment, too, so weights with large gradients decay less.
    Decoupled decay avoids that. For SGD the two are equal up to the schedule.

    Args:
        l2: $\lambda$: as the weight_decay of :func:`add_decayed_weights`.
        mask: which leaves are regularised, as for :func:`add_decayed_weights`.

    Returns:
        A transformation; `update` needs `params`.

    Raises:
        TypeError, ValueError: as for :func:`add_decayed_weights`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamw_jax import scale_by_adam
        >>> tx = optax.chain(add_l2_gradient(0.1), scale_by_adam())
        >>> params = jnp.array([2.0, -3.0])
        >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
        >>> [f"{u:.4f}" for u in updates]  # Adam's first step is a sign
        ['1.0000', '-1.0000']
    """
    check_factor("l2", l2)
    return scheduled("l2", l2, _add_decay, mask)


def _add_decay(decay, u, p):
    # Without decay an infinite parameter stays what it is: 0 times infinity is NaN.
    no_decay = (decay == 0) & ~jnp.isfinite(p)
    return u + decay * jnp.where(no_decay, 0, p)


def normalized_weight_decay(
    norm: float, batch_size: float, num_examples: float, epochs: float
) -> float:
    r"""Loshchilov and Hutter's normalised decay, $\lambda_{norm} \sqrt{b / (B T)}$.

    The decay per step that stays optimal when the length of the training changes. It
    goes with `decay_scale="schedule"`, where no learning rate multiplies the decay. For
    PyTorch's convention divide it by the peak learning rate.

    Args:
        norm: $\lambda_{norm}$; the paper's best on CIFAR-10 are .025 to .05.
        batch_size: b, in examples.
        num_examples: B, the size of the training set.
        epochs: T, the length of the run or of the current restart.

    Returns:
        The weight decay, a float.

    Raises:
        TypeError, ValueError: norm is negative, or another argument is not positive.

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
