"""The update rules as float64 NumPy loops, written from the papers.

Also the JAX loop that is compared with them and with PyTorch, and its compiled step.
"""

import jax
import numpy as np

import adamw_jax as aj


def trajectory(tx, p, grads):
    """The parameters after every step of a transformation with the given gradients."""

    def step(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        p = aj.apply_updates(p, updates)
        return (p, state), p

    return jax.lax.scan(step, (p, tx.init(p)), grads)[1]


def compiled_update(tx, params):
    """A compiled, donated update and its application, for XLA's analyses of it."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, tx.init(params), params).compile()


def constant(value):
    return lambda t: value


def adam_loop(
    p0,
    grads,
    learning_rate,
    b1=lambda t: 0.9,
    b2=lambda t: 0.999,
    eps=1e-8,
    eps_root=0.0,
    *,
    l2=0.0,
    weight_decay=0.0,
    correction="exact",
    epsilon_hat=False,
    maximum=None,
):
    """Parameters after every step; schedules are functions of the step, from 0.

    maximum: None for Adam; "raw" (PyTorch's AMSGrad, and with correction="none" the
    paper's) or "corrected" (Optax's).
    """
    p = np.array(p0, np.float64)
    m, v, v_max = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    product1 = product2 = 1.0
    path = []
    for t, g in enumerate(np.asarray(grads, np.float64)):
        beta1, beta2, lr = b1(t), b2(t), learning_rate(t)
        g = g + l2 * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        product1, product2 = product1 * beta1, product2 * beta2
        c1, c2 = {
            "exact": (1 - product1, 1 - product2),
            "torch": (1 - beta1 ** (t + 1), 1 - beta2 ** (t + 1)),
            "none": (1.0, 1.0),
        }[correction]
        v_hat, scale = v, c2
        if maximum == "raw":
            v_hat = v_max = np.maximum(v_max, v)
        elif maximum == "corrected":
            v_hat = v_max = np.maximum(v_max, v / c2)
            scale = 1.0
        if epsilon_hat:
            u = m / c1 * np.sqrt(scale) / (np.sqrt(v_hat + eps_root) + eps)
        else:
            u = m / c1 / (np.sqrt(v_hat / scale + eps_root) + eps)
        p = p - lr * (u + weight_decay * p)
        path.append(p)
    return np.array(path)


def sgd_loop(
    p0,
    grads,
    learning_rate,
    momentum=lambda t: 0.0,
    *,
    nesterov=False,
    dampened=False,
    l2=0.0,
    weight_decay=0.0,
):
    """Parameters after every step; schedules are functions of the step, from 0."""
    p = np.array(p0, np.float64)
    buffer = np.zeros_like(p)
    path = []
    for t, g in enumerate(np.asarray(grads, np.float64)):
        mu = momentum(t)
        g = g + l2 * p
        g = (1 - mu) * g if dampened else g
        buffer = mu * buffer + g
        u = g + mu * buffer if nesterov else buffer
        p = p - learning_rate(t) * (u + weight_decay * p)
        path.append(p)
    return np.array(path)
