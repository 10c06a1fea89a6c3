"""Checkpoints by Orbax, written in the background, each complete or absent."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp


def open_folder(folder: Path) -> ocp.training.Checkpointer:
    """Opens a folder that keeps the last two checkpoints.

    Removes what a killed process has left unfinished.
    """
    # Every call of `save` writes, also while the one before is still writing. (`Any`,
    # because Orbax's policies do not have the types that it declares.)
    every: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    last_two: Any = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(
        str(folder.absolute()),
        save_decision_policy=every,
        preservation_policy=last_two,
        cleanup_tmp_directories=True,
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, state: Any) -> None:
    """Starts writing. The state is copied, so that it can be donated meanwhile."""
    checkpoints.save_async(step, jax.tree.map(jnp.copy, state))


def restore(checkpoints: ocp.training.Checkpointer, like: Any) -> Any:
    """The latest state, with the types and shardings of `like`; None if there is none.

    Raises:
        ValueError: the checkpoint is of another network or another optimizer.
    """
    if checkpoints.latest is None:
        return None
    # Compared first, because a restoration that fails leaves threads behind.
    saved = _shapes(checkpoints.metadata(checkpoints.latest).metadata)
    expected = _shapes(like)
    if saved != expected:
        raise ValueError(
            f"{checkpoints.directory}: the checkpoint of step "
            f"{checkpoints.latest.step} does not fit this run: it has arrays of "
            f"{', '.join(saved - expected) or 'no other sizes'}, where this run has "
            f"{', '.join(expected - saved) or 'none'}"
        )
    return checkpoints.load(None, jax.tree.map(_abstract, like))


def latest(folder: Path) -> Any:
    """The last complete checkpoint in a folder, with its step and path, or None."""
    found = ocp.path.step.standard_name_format().find_all(folder.absolute())
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def read(folder: Path, like: Any) -> Any:
    """Reads parts of the last checkpoint to one device, and changes nothing.

    Args:
        folder: of checkpoints; a run in progress may be writing to it.
        like: a dictionary with the fields of the state to read.

    Raises:
        ValueError: the checkpoint is of another network.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like
    )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    while True:
        last = latest(folder)
        try:
            missing = _shapes(like) - _shapes(ocp.metadata(last.path).metadata)
            if missing:  # compared first, as in `restore`
                raise ValueError(
                    f"{last.path} does not fit the settings of its run, which have "
                    f"arrays of {', '.join(missing)}: were they changed?"
                )
            with context:
                return ocp.load(last.path, like)
        except Exception:  # Orbax raises nothing more specific
            # A run in progress keeps two checkpoints, and may have removed this one.
            if latest(folder).step == last.step:
                raise


def _shapes(tree) -> Counter[str]:
    return Counter(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(tree))


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
