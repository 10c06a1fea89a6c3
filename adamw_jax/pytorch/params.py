"""Parameters and batch statistics from and to PyTorch's state dicts."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._tree import path_string
from .arrays import (
    Layout,
    convert_layout,
    flax_layout,
    put_array,
    to_array,
    to_tensor,
)
from .checkpoint import check_network_state_dict
from .names import (
    Patterns,
    Rename,
    find_leaves,
    find_skipped,
    find_tied,
    is_counter,
    leaf_paths,
)
from .problems import Problems


class PartialParams(NamedTuple):
    """What :func:`partial_params_from_torch_state_dict` returns.

    Attributes:
        params: the tree, filled as far as the state dict fits.
        kept: from the path of each leaf that stayed as it was to the reason.
        unused: from each name in the state dict that was not read to the reason.
    """

    params: Any
    kept: dict[str, str]
    unused: dict[str, str]


def params_from_torch_state_dict(
    state_dict: Mapping[str, Any],
    params: Any,
    *,
    rename: Rename = None,
    layout: Layout = flax_layout,
    skip: Patterns = None,
) -> Any:
    """Converts `net.state_dict()` to a tree of parameters and batch statistics.

    Leaves are found as by :func:`from_torch_state_dict`. PyTorch's `running_mean` and
    `running_var` match leaves named `mean` and `var`. Left out without a word are only
    counts (`num_batches_tracked`, and `n_averaged` of an average) and a name whose
    tensor is that of another name, as of a tied head.

    If the names do not fit as they are, prefixes that all of them share are removed:
    `module.`, `_orig_mod.`, `model.` and `net.`, nested in any order.

    Args:
        state_dict: from name to tensor or array.
        params: the tree to fill, of arrays or `ShapeDtypeStruct`.
        rename: from PyTorch's names to paths, as for :func:`from_torch_state_dict`.
        layout: converts arrays; the default knows Flax's kernels.
        skip: regular expressions of what to leave out, in PyTorch's names or in the
            paths of leaves: `skip="fc"` keeps another head as it is in params. They
            match whole parts, so that `"attn.bias"` leaves `c_attn.bias` alone, and
            each must match something.

    Returns:
        A tree like params, whose arrays share no memory with the tensors.

    Raises:
        ValueError: all mismatches in one message, with the paths of the leaves; or
            state_dict is something else, such as a whole checkpoint.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> params = {"fc": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> weights = {"fc.weight": np.arange(6.0).reshape(3, 2), "fc.bias": np.ones(3)}
        >>> print(params_from_torch_state_dict(weights, params)["fc"]["kernel"])
        [[0. 2. 4.]
         [1. 3. 5.]]
    """
    problems = Problems("PyTorch's parameters do not fit:")
    filled = _fill(state_dict, params, rename, layout, skip, problems, problems)
    if not problems.hints:
        problems.hint(
            "skip leaves out what matches a pattern, and "
            "partial_params_from_torch_state_dict what does not fit"
        )
    problems.raise_if_any()
    return filled.params


def partial_params_from_torch_state_dict(
    state_dict: Mapping[str, Any],
    params: Any,
    *,
    rename: Rename = None,
    layout: Layout = flax_layout,
    skip: Patterns = None,
) -> PartialParams:
    """Fills the leaves that have a parameter of their shape, and says which have none.

    As `net.load_state_dict(..., strict=False)`, which returns the names too, except
    that another shape does not raise. Look at what is returned. If you know what
    differs, :func:`params_from_torch_state_dict` with `skip` is the safer way.

    Args:
        state_dict: from name to tensor or array.
        params: the tree to fill, of arrays.
        rename: from PyTorch's names to paths, as for :func:`from_torch_state_dict`.
        layout: converts arrays; the default knows Flax's kernels.
        skip: as for :func:`params_from_torch_state_dict`, for what fits but is not
            wanted.

    Returns:
        :class:`PartialParams`: the tree, the leaves that were kept, and the names that
        were not used, with reasons.

    Raises:
        ValueError: no leaf can be filled; or the values of a parameter do not fit: a
            dtype that would lose bits, a layout that fails; or state_dict is something
            else.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> params = {"fc": {"kernel": jnp.zeros((2, 3))}, "scale": jnp.ones(2)}
        >>> weights = {"fc.weight": np.ones((5, 2)), "scale": np.full(2, 7.0)}
        >>> filled = partial_params_from_torch_state_dict(weights, params)
        >>> print(filled.params["scale"], filled.kept)
        [7. 7.] {'fc/kernel': 'fc.weight has shape (2, 5), expected (2, 3)'}
    """
    problems = Problems("PyTorch's parameters do not fit:")
    misfits = Problems("PyTorch's parameters fit no leaf:")
    filled = _fill(state_dict, params, rename, layout, skip, problems, misfits)
    problems.raise_if_any()
    for location, reason in misfits.found:
        kind, _, name = location.partition(" ")
        table = filled.kept if kind == "leaf" else filled.unused
        table[name] = reason
    if len(filled.kept) == len(leaf_paths(params)):
        misfits.raise_if_any()
    return filled


def _fill(
    state_dict: Mapping[str, Any],
    params: Any,
    rename: Rename,
    layout: Layout,
    skip: Patterns,
    problems: Problems,
    misfits: Problems,
) -> PartialParams:
    """Fills params. Leaves and names without a partner of their shape are misfits."""
    if not isinstance(state_dict, Mapping):
        check_network_state_dict(state_dict)
    paths = leaf_paths(params)
    skipped = find_skipped(skip, [*map(str, state_dict), *sorted(paths)])
    tensors = {
        name: x
        for name, x in state_dict.items()
        if str(name) not in skipped and not is_counter(str(name))
    }
    if tensors or not skipped:
        check_network_state_dict(tensors)
    found = _find_leaves(tensors, rename, paths, misfits)
    if skipped:  # the partners too
        both = find_leaves(map(str, state_dict), rename, paths, Problems(""))
        skipped |= {path for name, path in both.items() if name in skipped}
        skipped |= {name for name, path in both.items() if path in skipped}
    names = {path: name for name, path in found.items()}

    def fill(path, old):
        path = path_string(path)
        if path not in skipped:
            if path in names:
                return read(path, old, names[path])
            misfits.add(f"leaf {path}", "no parameter has this name")
        return keep(path, old)

    def read(path, old, name):
        try:
            array = to_array(tensors[name])
        except ValueError as error:
            problems.add(f"leaf {path}", f"{name} {error}")
            return old
        array = convert_layout(layout, path, array, "from_torch", problems)
        if array.shape != old.shape:
            misfits.add(
                f"leaf {path}", f"{name} has shape {array.shape}, expected {old.shape}"
            )
            return keep(path, old)
        return put_array(path, name, old, array, problems)

    def keep(path, old):
        # Strict, the misfit raises anyway.
        if path in skipped or misfits is not problems:
            if isinstance(old, jax.ShapeDtypeStruct):
                problems.add(
                    f"leaf {path}", "is not read, and params has its shape alone"
                )
        return old

    filled = jax.tree_util.tree_map_with_path(fill, params)
    kept, unused = (
        {name: "is skipped" for name in sorted(skipped & set(of))}
        for of in (paths, map(str, state_dict))
    )
    return PartialParams(filled, kept, unused)


def _find_leaves(
    tensors: Mapping[str, Any], rename: Rename, paths: set[str], misfits: Problems
) -> dict[str, str]:
    """As `find_leaves`, but a tied tensor needs one leaf only."""
    new = Problems("")
    found = find_leaves(tensors, rename, paths, new)
    tied = find_tied(tensors, found)
    for location, problem in new.found:
        name = location.removeprefix("parameter ")
        if tied.get(name) in found:
            continue
        if twin := _equal_tensor(name, tensors, found):
            problem += f" (equal to {twin}: if they are tied, skip it)"
        misfits.add(location, problem)
        for hint in new.hints:
            misfits.hint(hint)
    return found


def _equal_tensor(
    name: str, tensors: Mapping[str, Any], found: Iterable[str]
) -> str | None:
    """The first name with a leaf and with the same values, which vectors often have."""
    shape = getattr(tensors[name], "shape", ())
    if len(shape) < 2:
        return None
    for other in found:
        if tensors[other].shape == shape:
            try:
                if np.array_equal(to_array(tensors[name]), to_array(tensors[other])):
                    return other
            except ValueError:  # a tensor without all its values
                return None
    return None


def params_to_torch_state_dict(
    params: Any,
    names: Iterable[str],
    *,
    rename: Rename = None,
    layout: Layout = flax_layout,
    skip: Patterns = None,
) -> dict[str, Any]:
    """Makes the dict of tensors that `net.load_state_dict` accepts.

    Args:
        params: the tree of parameters, with or without batch statistics.
        names: names of PyTorch's parameters and buffers, `net.state_dict()` or its
            keys. Counts (`num_batches_tracked`) are ignored: pass `strict=False` to
            `load_state_dict`. In a state dict, a name whose tensor is that of another
            name, as of a tied head, gets that name's values.
        rename: from PyTorch's names to paths, as for :func:`from_torch_state_dict`.
        layout: converts arrays; the default knows Flax's kernels.
        skip: regular expressions, as for :func:`params_from_torch_state_dict`, of names
            and leaves to leave out, such as buffers: `skip="attn.mask"`.

    Returns:
        A dict from name to tensor (needs PyTorch).

    Raises:
        ValueError: all mismatches in one message.
    """
    if hasattr(names, "state_dict"):
        raise ValueError(
            f"names must be names, got the network itself ({type(names).__name__}): "
            "pass net.state_dict()"
        )
    problems = Problems("the parameters do not fit PyTorch's:")
    leaves = {
        path_string(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    tensors = names if isinstance(names, Mapping) else dict.fromkeys(names)
    skipped = find_skipped(skip, [*tensors, *leaves])
    tensors = {
        name: x
        for name, x in tensors.items()
        if name not in skipped and not is_counter(name)
    }
    leaves = {path: leaf for path, leaf in leaves.items() if path not in skipped}
    new = Problems("")
    found = find_leaves(tensors, rename, set(leaves), new)
    tied = {
        name: first
        for name, first in find_tied(tensors, found).items()
        if name not in found and first in found
    }
    for location, problem in new.found:
        if location.removeprefix("parameter ") not in tied:
            problems.add(location, problem)
    for path in sorted(set(leaves) - set(found.values())):
        problems.add(f"leaf {path}", "no parameter has this name")
    written = {
        name: to_tensor(
            convert_layout(layout, path, np.asarray(leaves[path]), "to_torch", problems)
        )
        for name, path in found.items()
    }
    problems.raise_if_any()
    return written | {name: written[first] for name, first in tied.items()}
