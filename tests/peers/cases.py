"""The optimizers of the conformance tests, and what they do under a gradient of 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

# With a constant gradient Adam's step is exactly the learning rate, from the first on.
OPTIMIZERS = {
    "adam": lambda lib: lib.adam(0.1, eps=0.0),
    "adamw": lambda lib: lib.adamw(0.1, eps=0.0, weight_decay=0.1),
    "amsgrad": lambda lib: lib.amsgrad(0.1, eps=0.0),
    "sgd": lambda lib: lib.sgd(0.1),
    "momentum": lambda lib: lib.sgd(0.1, momentum=0.9),
    "nesterov": lambda lib: lib.sgd(0.1, momentum=0.9, nesterov=True),
}
LINKS = {
    "scale_by_adam": lambda lib: lib.scale_by_adam(),
    "scale_by_amsgrad": lambda lib: lib.scale_by_amsgrad(),
    "trace": lambda lib: lib.trace(0.9),
    "add_decayed_weights": lambda lib: lib.add_decayed_weights(0.1),
    "scale_by_learning_rate": lambda lib: lib.scale_by_learning_rate(0.1),
    "clip_by_global_norm": lambda lib: lib.clip_by_global_norm(1.0),
    "chain": lambda lib: lib.chain(lib.clip_by_global_norm(1.0), lib.adamw(0.1)),
}
MAKERS = OPTIMIZERS | LINKS


def parameters(name, steps, p=1.0):
    """The parameter after each step of an optimizer, in float64: p, gradient 1."""
    path, buffer = [], 0.0
    for _ in range(steps):
        buffer = 0.9 * buffer + 1
        p -= (
            0.1
            * {
                "adam": 1.0,
                "adamw": 1 + 0.1 * p,
                "amsgrad": 1.0,
                "sgd": 1.0,
                "momentum": buffer,
                "nesterov": 1 + 0.9 * buffer,
            }[name]
        )
        path.append(p)
    return np.array(path)


def run(tx, params, grads, steps=1, **extra_args):
    """The parameters after some eager steps with the same gradients, and the state."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def first_update(tx, params, grads):
    return tx.update(grads, tx.init(params), params)[0]


def dtypes(tree):
    """The names of the dtypes of a tree's leaves."""
    return jax.tree.map(lambda x: jnp.asarray(x).dtype.name, tree)


def types(tree):
    """Shape, dtype, weak type and sharding of the leaves, as text."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


def outcome(function, *args, **kwargs):
    """What a call returns, or the name of the exception that it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
