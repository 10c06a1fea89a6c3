"""Adam's family for JAX: exact where Optax and PyTorch are not, driven by phases.

Everything that transforms gradients is an Optax transformation and works in
`optax.chain`, under `jit`, `vmap` and on sharded arrays:

    >>> import jax.numpy as jnp
    >>> import adamw_jax as aj
    >>> tx = aj.adamw(aj.one_cycle(3e-3, steps=1000), weight_decay=0.1)
    >>> params, grads = {"kernel": jnp.ones(3)}, {"kernel": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> params, state = aj.update_and_apply(tx, grads, state, params)

Optimizers
    adam, adamw, amsgrad, sgd: drop-ins for Optax's, with the hyperparameters in the
    state. current_hyperparams reads them, override_hyperparams changes them, both also
    by one of hyperparam_groups; with_hyperparams does the same for a chain of your own.

Links of a chain
    scale_by_adam, scale_by_amsgrad, trace: moments. add_decayed_weights,
    add_l2_gradient, normalized_weight_decay: decay. clip_by_global_norm,
    scale_by_learning_rate, round_updates_stochastically, stochastic_round. chain: as
    optax.chain, and keeps the one-pass step of update_and_apply.

Schedules
    one_cycle, one_cycle_plateau, one_cycle_torch, cosine_restarts, range_test: Phases
    that drive learning rate, betas and decay together. Phase, Phases: your own.
    lr_finder.find: the range test for any loss function.

Some leaves only
    mask_by, mask_by_path, no_decay_on_bias_and_norm, describe_mask: masks.
    labels_by_path with scale_by_group: a learning rate for each group.
    freeze_leaves: train only the others.

From updates to parameters
    update_and_apply: in one pass over memory where that is possible; describe_step
    says whether it is. apply_updates: adds updates, and accepts None.

Memory
    accumulate_gradients, has_updated: large batches from small ones. pack, unpack,
    pack_like: thousands of small leaves in a few buffers. quantize_moments,
    quantize_blockwise, dequantize_blockwise: moments in eight bits.

Optax's states
    from_optax_state, to_optax_state: a run of Optax goes on here, and back.

Flax
    nnx.Optimizer, linen.TrainState: Flax's, on top of update_and_apply. Both modules
    import Flax; the rest of the library does not.

PyTorch checkpoints
    optimizer_from_torch_state_dict, phases_from_torch_scheduler: continue a run of
    PyTorch. from_torch_state_dict, to_torch_state_dict: optimizer states.
    params_from_torch_state_dict, params_to_torch_state_dict: parameters;
    partial_params_from_torch_state_dict: those that fit. load_torch_checkpoint: the
    file. Layout, flax_layout: the axes of kernels. encode_bitsandbytes: for its 8-bit
    optimizers.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import lr_finder as lr_finder
from ._transformation import Transformation as Transformation
from .apply import apply_updates as apply_updates
from .apply import describe_step as describe_step
from .apply import update_and_apply as update_and_apply
from .fused.adamw import adamw as adamw
from .hyperparams import HyperparamsState as HyperparamsState
from .hyperparams import ScaleByGroupState as ScaleByGroupState
from .hyperparams import with_hyperparams as with_hyperparams
from .masks import describe_mask as describe_mask
from .masks import labels_by_path as labels_by_path
from .masks import mask_by as mask_by
from .masks import mask_by_path as mask_by_path
from .masks import no_decay_on_bias_and_norm as no_decay_on_bias_and_norm
from .optax_state import from_optax_state as from_optax_state
from .optax_state import to_optax_state as to_optax_state
from .optimizers import adam as adam
from .optimizers import amsgrad as amsgrad
from .optimizers import sgd as sgd
from .overrides import current_hyperparams as current_hyperparams
from .overrides import hyperparam_groups as hyperparam_groups
from .overrides import override_hyperparams as override_hyperparams
from .pytorch.arrays import Layout as Layout
from .pytorch.arrays import flax_layout as flax_layout
from .pytorch.checkpoint import load_torch_checkpoint as load_torch_checkpoint
from .pytorch.eight_bit import encode_bitsandbytes as encode_bitsandbytes
from .pytorch.optimizer import (
    optimizer_from_torch_state_dict as optimizer_from_torch_state_dict,
)
from .pytorch.params import PartialParams as PartialParams
from .pytorch.params import params_from_torch_state_dict as params_from_torch_state_dict
from .pytorch.params import params_to_torch_state_dict as params_to_torch_state_dict
from .pytorch.params import (
    partial_params_from_torch_state_dict as partial_params_from_torch_state_dict,
)
from .pytorch.schedulers import (
    phases_from_torch_scheduler as phases_from_torch_scheduler,
)
from .pytorch.state import from_torch_state_dict as from_torch_state_dict
from .pytorch.state import to_torch_state_dict as to_torch_state_dict
from .schedules.cycles import cosine_restarts as cosine_restarts
from .schedules.cycles import one_cycle as one_cycle
from .schedules.cycles import one_cycle_plateau as one_cycle_plateau
from .schedules.cycles import one_cycle_torch as one_cycle_torch
from .schedules.cycles import range_test as range_test
from .schedules.phases import Phase as Phase
from .schedules.phases import Phases as Phases
from .transforms.chain import chain as chain
from .transforms.clipping import clip_by_global_norm as clip_by_global_norm
from .transforms.decay import add_decayed_weights as add_decayed_weights
from .transforms.decay import add_l2_gradient as add_l2_gradient
from .transforms.decay import normalized_weight_decay as normalized_weight_decay
from .transforms.groups import FreezeState as FreezeState
from .transforms.groups import freeze_leaves as freeze_leaves
from .transforms.groups import scale_by_group as scale_by_group
from .transforms.moments import ScaleByAdamState as ScaleByAdamState
from .transforms.moments import ScaleByAmsgradState as ScaleByAmsgradState
from .transforms.moments import scale_by_adam as scale_by_adam
from .transforms.moments import scale_by_amsgrad as scale_by_amsgrad
from .transforms.momentum import TraceState as TraceState
from .transforms.momentum import trace as trace
from .transforms.rounding import (
    round_updates_stochastically as round_updates_stochastically,
)
from .transforms.rounding import stochastic_round as stochastic_round
from .transforms.scaling import scale_by_learning_rate as scale_by_learning_rate
from .wrappers.accumulation import AccumulateState as AccumulateState
from .wrappers.accumulation import accumulate_gradients as accumulate_gradients
from .wrappers.accumulation import has_updated as has_updated
from .wrappers.eight_bit import Blocks as Blocks
from .wrappers.eight_bit import QuantizedMomentsState as QuantizedMomentsState
from .wrappers.eight_bit import dequantize_blockwise as dequantize_blockwise
from .wrappers.eight_bit import quantize_blockwise as quantize_blockwise
from .wrappers.eight_bit import quantize_moments as quantize_moments
from .wrappers.packing import Packed as Packed
from .wrappers.packing import pack as pack
from .wrappers.packing import pack_like as pack_like
from .wrappers.packing import unpack as unpack

try:
    __version__ = version("adamw_jax")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):  # the modules that import Flax, at their first use
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
