"""Checkpoints through Orbax: written in the background, complete or not there."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp


def open_folder(folder: Path) -> ocp.training.Checkpointer:
    """The checkpoints in this folder, of which the last two are kept.

    What a killed process had not finished writing is removed.
    """
    # Every call of `save` is one, also while the last is still being written. (As Any:
    # Orbax's own policies are not of the types that it asks for.)
    every: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    last_two: Any = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(
        str(folder.absolute()),
        save_decision_policy=every,
        preservation_policy=last_two,
        cleanup_tmp_directories=True,
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, state: Any) -> None:
    """Begins to write. The state is copied, so that it can be donated meanwhile."""
    checkpoints.save_async(step, jax.tree.map(jnp.copy, state))


def restore(checkpoints: ocp.training.Checkpointer, like: Any) -> Any:
    """The latest state, with types, dtypes and places of `like`; None if there is none.

    Raises:
        ValueError: the checkpoint is of another network or another optimizer.
    """
    if checkpoints.latest is None:
        return None
    # Asked beforehand: a restoration that fails leaves threads behind.
    there = _sizes(checkpoints.metadata(checkpoints.latest).metadata)
    wanted = _sizes(like)
    if there != wanted:
        raise ValueError(
            f"{checkpoints.directory}: the checkpoint of step "
            f"{checkpoints.latest.step} does not fit this run: it has arrays of "
            f"{', '.join(there - wanted) or 'no other sizes'}, where this run has "
            f"{', '.join(wanted - there) or 'none'}"
        )
    return checkpoints.load(None, jax.tree.map(_abstract, like))


def latest(folder: Path) -> Any:
    """The last complete checkpoint in a folder, with its step and path, or None."""
    found = ocp.path.step.standard_name_format().find_all(folder.absolute())
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def read(folder: Path, like: Any) -> Any:
    """Parts of the last checkpoint, on one device. Nothing is written or removed.

    Args:
        folder: in which a run in progress may be writing.
        like: a dictionary of the fields of the state that are wanted.

    Raises:
        ValueError: the checkpoint is of another network.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like
    )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    while True:
        now = latest(folder)
        try:
            missing = _sizes(like) - _sizes(ocp.metadata(now.path).metadata)
            if missing:  # a restoration that fails leaves threads behind
                raise ValueError(
                    f"{now.path} does not fit the settings of its run, which have "
                    f"arrays of {', '.join(missing)}: were they changed?"
                )
            with context:
                return ocp.load(now.path, like)
        except Exception:  # Orbax raises just that
            # A run in progress keeps its last two, and may have removed this one.
            if latest(folder).step == now.step:
                raise


def _sizes(tree) -> Counter[str]:
    return Counter(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(tree))


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
