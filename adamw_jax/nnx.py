"""`nnx.Optimizer` that updates parameters in one pass. Needs Flax; see also `linen`."""

from typing import Any

from flax import nnx

from .apply import update_and_apply


class Optimizer(nnx.Optimizer):
    """`flax.nnx.Optimizer` on top of :func:`adamw_jax.update_and_apply`.

    `nnx.Optimizer` computes `tx.update` and adds the updates to the parameters. This
    class has the same arguments and the same state, so that the checkpoint of one can
    be restored into the other, but takes the one-pass `step` of `tx` where it has one;
    :func:`adamw_jax.describe_step` says whether it does. The numbers are the same up to
    the rounding of single operations. Without a `step`, updates are added by
    :func:`adamw_jax.apply_updates`; so it is under `nnx.jit` of Flax before 0.12.5,
    which rebuilds `tx` from its `init` and `update`.

    Compile the training step with `nnx.jit(..., donate_argnums=...)` of the model and
    the optimizer, or parameters and moments are copied at every call.

    Attributes:
        step: the number of updates, uint32.
        tx: the transformation.
        opt_state: its state. :func:`adamw_jax.current_hyperparams` reads the values in
            force from it.

    Example:
        >>> import jax.numpy as jnp
        >>> import adamw_jax as aj
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> tx = aj.adamw(aj.one_cycle(1e-2, steps=100), weight_decay=0.1)
        >>> optimizer = aj.nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> @nnx.jit(donate_argnums=(0, 1))
        ... def train_step(model, optimizer, x):
        ...     loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        ...     optimizer.update(model, grads)
        ...     return loss
        >>> losses = [train_step(model, optimizer, jnp.ones((4, 3))) for _ in range(5)]
        >>> bool(losses[0] > losses[-1]), int(optimizer.step[...])
        (True, 5)
    """

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> Any:
        """Updates the parameters of the model, the optimizer state and `step` in place.

        Args:
            model: the model that the optimizer was built for.
            grads: the gradients that `nnx.grad` returns, with the same `wrt`.
            **kwargs: passed on to `tx`, such as `weight` and `last` of
                :func:`adamw_jax.accumulate_gradients`.

        Returns:
            None, where `nnx.Optimizer` returns the updates: a `step` computes none.

        Raises:
            TypeError, ValueError: those of `tx`.
        """
        # Flax before 0.12.7 has no `graph`, and calls `as_pure` `pure`.
        options = {"graph": self.graph} if hasattr(self, "graph") else {}
        as_pure = getattr(nnx, "as_pure", None) or nnx.pure
        params, opt_state = update_and_apply(
            self.tx,
            as_pure(nnx.state(grads, self.wrt, **options)),
            as_pure(self.opt_state),
            as_pure(nnx.state(model, self.wrt, **options)),
            **as_pure(kwargs),
        )
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(opt_state, **options))
        self.step[...] += 1
