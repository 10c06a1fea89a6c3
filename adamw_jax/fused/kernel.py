"""AdamW's update of one leaf, in one pass of a compiled kernel on CPUs.

XLA on a CPU computes the three results in three loops, which move 40 bytes per float32
parameter; the kernel in kernel.cc moves 28. For other dtypes, on other devices, under
`vmap` and `grad`, and where there is no kernel, XLA computes `reference`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning

from .._dtypes import abs_sq, compute_dtype, with_complex
from .build import target

# The order of the vector of scalars, also in kernel.cc.
SCALARS = (
    *("decay1", "rest1", "correction1", "decay2", "rest2", "correction2"),
    *("eps", "eps_root", "learning_rate", "weight_decay", "gradient_factor"),
)
# Of p and g; m and v must be float32.
SUPPORTED_DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))


def one_pass(p, m, v, g, scalars: jax.Array, decays: bool) -> tuple[Any, Any, Any]:
    """Computes the new p, m and v of one leaf, in the dtypes of the old ones.

    Call it only if `why_no_kernel()` is None.

    Args:
        p: the parameter.
        m: its first moment.
        v: its second moment.
        g: its gradient; all four have the same shape.
        scalars: the vector of SCALARS, in the dtype of the arithmetic.
        decays: whether the leaf decays. If not, the weight decay in scalars must be 0.

    Returns:
        The new p, m and v.
    """
    supported = is_supported(p.dtype, m.dtype, v.dtype) and g.dtype in SUPPORTED_DTYPES
    if supported and scalars.dtype == jnp.float32:
        return _in_kernel(decays, p, m, v, g, scalars)
    return reference(decays, p, m, v, g, scalars)


def is_supported(dtype: Any, mu_dtype: Any, nu_dtype: Any) -> bool:
    """Whether the kernel supports a parameter and moments of these dtypes."""
    return dtype in SUPPORTED_DTYPES and jnp.float32 == mu_dtype == nu_dtype


def reference(decays: bool, p, m, v, g, scalars) -> tuple[Any, Any, Any]:
    """Computes what the links of the chain and `apply_updates` compute, in XLA."""
    dtype = with_complex(scalars.dtype, jnp.iscomplexobj(m))
    _, _, _, d2, r2, c2, eps, eps_root, *_ = scalars
    d1, r1, c1, *_, learning_rate, weight_decay, f = scalars.astype(dtype)
    g = f * g.astype(dtype)
    new_m = d1 * m.astype(dtype) + r1 * g
    new_v = d2 * v.astype(scalars.dtype) + r2 * abs_sq(g)
    u = (new_m / c1) / (jnp.sqrt(new_v / c2 + eps_root) + eps).astype(dtype)
    if decays:
        u = u + weight_decay * p.astype(dtype)
    u = -learning_rate * u
    u = u if jnp.iscomplexobj(p) else u.real  # of complex moments of a real parameter
    wide = compute_dtype(p.dtype)
    new_p = (p.astype(wide) + u.astype(wide)).astype(p.dtype)
    return new_p, new_m.astype(m.dtype), new_v.astype(v.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(decays, p, m, v, g, scalars):
    @jax.custom_batching.custom_vmap
    def compute(*leaves):
        # The program may be lowered for another platform than the default backend.
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


# A nested jit, so that leaves of the same shape are traced once.
_in_kernel = jax.jit(_differentiable, static_argnums=0)


@custom_partitioning
def _partitioned(p, m, v, g, scalars):
    """Calls the kernel on the part of the leaf that a device holds."""
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
    """The sharding of p, m, v or g that splits the leaf most.

    Slicing a replicated parameter is free, gathering sharded moments is not.
    """
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
