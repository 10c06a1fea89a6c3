"""Linen's `TrainState` that updates parameters in one pass. Needs Flax."""

from typing import Any, Self

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from .apply import update_and_apply


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` on top of `update_and_apply`.

    The fields are the same, so that the checkpoint of one can be restored into the
    other, but :meth:`apply_gradients` takes the one-pass `step` of `tx` where it has
    one; :func:`adamw_jax.describe_step` says whether it does. Subclass it as usual, for
    instance to add the statistics of batch normalization.

    Compile the training step with the state donated, or parameters and moments are
    copied at every call.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from flax import linen
        >>> import adamw_jax as aj
        >>> model, x = linen.Dense(2), jnp.ones((4, 3))
        >>> state = aj.linen.TrainState.create(
        ...     apply_fn=model.apply,
        ...     params=model.init(jax.random.key(0), x)["params"],
        ...     tx=aj.adamw(aj.one_cycle(1e-2, steps=100), weight_decay=0.1))
        >>> @functools.partial(jax.jit, donate_argnums=0)
        ... def train_step(state, x):
        ...     def loss(params):
        ...         return (state.apply_fn({"params": params}, x) ** 2).mean()
        ...     return state.apply_gradients(grads=jax.grad(loss)(state.params))
        >>> for _ in range(5):
        ...     state = train_step(state, x)
        >>> int(state.step), float(aj.current_hyperparams(state.opt_state)["b1"]) > 0.9
        (5, True)
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """Returns the state after one update.

        Args:
            grads: the gradients, a tree like `params`.
            **kwargs: fields to replace in the new state, such as `batch_stats`.

        Returns:
            The new state, with `step` one higher.

        Raises:
            TypeError, ValueError: those of `tx`.
        """
        # The scales of fp8 layers are replaced by their gradients, not trained.
        fp8 = OVERWRITE_WITH_GRADIENT in grads
        params, opt_state = update_and_apply(
            self.tx,
            grads["params"] if fp8 else grads,
            self.opt_state,
            self.params["params"] if fp8 else self.params,
        )
        if fp8:
            scales = grads[OVERWRITE_WITH_GRADIENT]
            params = {"params": params, OVERWRITE_WITH_GRADIENT: scales}
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )
