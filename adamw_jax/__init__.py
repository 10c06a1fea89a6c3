"""Adam's family for JAX: exact where Optax and PyTorch are not, driven by phases."""

from importlib.metadata import PackageNotFoundError, version

from ._torch import Layout as Layout
from ._torch import flax_layout as flax_layout
from .accumulate import AccumulateState as AccumulateState
from .accumulate import accumulate_gradients as accumulate_gradients
from .accumulate import has_updated as has_updated
from .apply import apply_updates as apply_updates
from .apply import update_and_apply as update_and_apply
from .flat import Flat as Flat
from .flat import flatten as flatten
from .flat import flatten_like as flatten_like
from .flat import unflatten as unflatten
from .hyperparams import HyperparamsState as HyperparamsState
from .hyperparams import current_hyperparams as current_hyperparams
from .hyperparams import override_hyperparams as override_hyperparams
from .hyperparams import with_hyperparams as with_hyperparams
from .masks import FreezeState as FreezeState
from .masks import describe_mask as describe_mask
from .masks import freeze as freeze
from .masks import labels_by_path as labels_by_path
from .masks import mask_by as mask_by
from .masks import mask_by_path as mask_by_path
from .masks import no_decay_on_bias_and_norm as no_decay_on_bias_and_norm
from .masks import scale_by_group as scale_by_group
from .optimizers import adam as adam
from .optimizers import adamw as adamw
from .optimizers import amsgrad as amsgrad
from .optimizers import sgd as sgd
from .phases import Phase as Phase
from .phases import Phases as Phases
from .phases import cosine_restarts as cosine_restarts
from .phases import one_cycle as one_cycle
from .phases import one_cycle_plateau as one_cycle_plateau
from .phases import one_cycle_torch as one_cycle_torch
from .phases import range_test as range_test
from .quantized import Blocks as Blocks
from .quantized import QuantizedMomentsState as QuantizedMomentsState
from .quantized import dequantize_blockwise as dequantize_blockwise
from .quantized import quantize_blockwise as quantize_blockwise
from .quantized import quantize_moments as quantize_moments
from .rounding import round_updates_stochastically as round_updates_stochastically
from .rounding import stochastic_round as stochastic_round
from .torch_optimizer import (
    optimizer_from_torch_state_dict as optimizer_from_torch_state_dict,
)
from .torch_optimizer import phases_from_torch_scheduler as phases_from_torch_scheduler
from .torch_state import from_torch_state_dict as from_torch_state_dict
from .torch_state import params_from_torch_state_dict as params_from_torch_state_dict
from .torch_state import params_to_torch_state_dict as params_to_torch_state_dict
from .torch_state import to_torch_state_dict as to_torch_state_dict
from .transforms import ScaleByAdamState as ScaleByAdamState
from .transforms import ScaleByAmsgradState as ScaleByAmsgradState
from .transforms import TraceState as TraceState
from .transforms import add_decayed_weights as add_decayed_weights
from .transforms import add_l2_gradient as add_l2_gradient
from .transforms import clip_by_global_norm as clip_by_global_norm
from .transforms import normalized_weight_decay as normalized_weight_decay
from .transforms import scale_by_adam as scale_by_adam
from .transforms import scale_by_amsgrad as scale_by_amsgrad
from .transforms import scale_by_learning_rate as scale_by_learning_rate
from .transforms import trace as trace

try:
    __version__ = version("adamw_jax")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
