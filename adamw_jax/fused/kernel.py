"""AdamW on one leaf, update and application: on a CPU a compiled kernel, one pass.

XLA on a CPU computes the three results in three loops, which move 40 bytes a float32
parameter; the kernel in kernel.cc moves 28. Where there is no kernel, for other dtypes,
on other devices, under `vmap` and `grad`, XLA computes `reference`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning

from .._tree import compute_dtype
from .build import target

# The order of the vector of scalars, here and in the kernel.
SCALARS = (
    *("decay1", "rest1", "correction1", "decay2", "rest2", "correction2"),
    *("eps", "eps_root", "learning_rate", "weight_decay", "gradient_factor"),
)
NARROW = (jnp.dtype("float32"), jnp.dtype("bfloat16"))  # what p and g may be


def one_pass(p, m, v, g, scalars: jax.Array, decays: bool) -> tuple[Any, Any, Any]:
    """The new p, m and v of one leaf, in the dtypes of the old.

    Call it only where `why_no_kernel` is None.

    Args:
        p: the parameter.
        m: first moment.
        v: second moment.
        g: gradient; p, m and v have its shape.
        scalars: a vector of SCALARS, in the dtype of the computation.
        decays: whether this leaf decays; if not, its weight decay must be 0.
    """
    known = is_known(p.dtype, m.dtype, v.dtype) and g.dtype in NARROW
    if known and scalars.dtype == jnp.float32:
        return _in_kernel(decays, p, m, v, g, scalars)
    return reference(decays, p, m, v, g, scalars)


def is_known(dtype: Any, mu_dtype: Any, nu_dtype: Any) -> bool:
    """Whether the kernel takes a parameter of this dtype with moments of these."""
    return dtype in NARROW and jnp.float32 == mu_dtype == nu_dtype


def reference(decays: bool, p, m, v, g, scalars) -> tuple[Any, Any, Any]:
    """What the links of the chain and `apply_updates` compute, for XLA."""
    d1, r1, c1, d2, r2, c2, eps, eps_root, learning_rate, weight_decay, f = scalars
    g = f * g.astype(scalars.dtype)
    new_m = d1 * m.astype(g.dtype) + r1 * g
    new_v = d2 * v.astype(g.dtype) + r2 * g * g
    u = (new_m / c1) / (jnp.sqrt(new_v / c2 + eps_root) + eps)
    if decays:
        u = u + weight_decay * p.astype(g.dtype)
    u = -learning_rate * u
    wide = compute_dtype(p.dtype)
    new_p = (p.astype(wide) + u.astype(wide)).astype(p.dtype)
    return new_p, new_m.astype(m.dtype), new_v.astype(v.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(decays, p, m, v, g, scalars):
    @jax.custom_batching.custom_vmap
    def compute(*leaves):
        # Asked again where it is lowered, which may be for another platform.
        return jax.lax.platform_dependent(
            *leaves, cpu=_partitioned, default=functools.partial(reference, decays)
        )

    @compute.def_vmap
    def _(axis_size, in_batched, *leaves):
        del axis_size
        in_axes = [0 if batched else None for batched in in_batched]
        out = jax.vmap(functools.partial(reference, decays), in_axes)(*leaves)
        return out, (True,) * 3

    return compute(p, m, v, g, scalars)


@_differentiable.defjvp
def _(decays, primals, tangents):
    return jax.jvp(functools.partial(reference, decays), primals, tangents)


# A program within the program, so that leaves of one shape are traced once.
_in_kernel = jax.jit(_differentiable, static_argnums=0)


@custom_partitioning
def _partitioned(p, m, v, g, scalars):
    """Every device computes what it holds of the leaf."""
    results = [jax.typeof(x) for x in (p, m, v)]
    call = jax.ffi.ffi_call(target(), results, input_output_aliases={0: 0, 1: 1, 2: 2})
    return tuple(call(p, m, v, g, scalars))


def _partition(mesh, arguments, results):
    del results
    leaf, scalars = _most_sharded(arguments), arguments[4].sharding
    return mesh, _partitioned.fun, (leaf,) * 3, (leaf,) * 4 + (scalars,)


def _propagate(mesh, arguments, results):
    del mesh, results
    return (_most_sharded(arguments),) * 3


def _most_sharded(arguments):
    """Of p, m, v and g: whole parameters are cut for nothing, moments are not sent."""
    shape = arguments[0].shape
    return min(
        (x.sharding for x in arguments[:4]),
        key=lambda sharding: math.prod(sharding.shard_shape(shape)),
    )


_partitioned.def_partition(
    partition=_partition,
    infer_sharding_from_operands=_propagate,  # without Shardy
    sharding_rule="..., ..., ..., ..., k -> ..., ..., ...",
    need_replication_factors=("k",),
)
