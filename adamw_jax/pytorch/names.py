"""From PyTorch's names, and numbers of parameters, to the paths of leaves."""

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from .._tree import path_string
from .arrays import address
from .checkpoint import as_optimizer_state_dict
from .groups import Parameter, check_group
from .problems import Problems

Rename = Callable[[str], str] | Mapping[str, str] | None
Patterns = str | Sequence[str] | None

# From the last part of a name in PyTorch to its names in Flax.
_LEAF_NAMES = {
    "weight": ("kernel", "scale", "embedding"),
    "running_mean": ("mean",),
    "running_var": ("var",),
}
# DistributedDataParallel and AveragedModel, torch.compile, Lightning's two customs.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
# torch.compile, FSDP and activation checkpointing of modules inside a network.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Counts of batch norm and of AveragedModel, which have no place in Flax.
_COUNTERS = ("num_batches_tracked", "n_averaged")
_BUFFERS = (*_COUNTERS, "running_mean", "running_var")


# ---------------------------------------------------------------------------
# parameters of an optimizer
# ---------------------------------------------------------------------------


def torch_parameters(
    state_dict: Mapping[str, Any],
    params: Any,
    names: Iterable[str] | None,
    rename: Rename,
    problems: Problems,
    skip: Patterns = None,
) -> dict[str, Parameter]:
    """A dict from the path of a leaf to its parameter, in PyTorch's order.

    What is skipped is left out, or has no state if there is a leaf for it.
    """
    state_dict = as_optimizer_state_dict(state_dict)
    groups, states = state_dict["param_groups"], state_dict["state"]
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(
                "param_groups must be a list of dicts with params, those of "
                "optimizer.state_dict(), got "
                + (", ".join(map(str, group)) if group else f"{group!r}")
            )
        check_group(group)
    numbers = [(n, group) for group in groups for n in group["params"]]
    names = _names_in_order(names, groups, [number for number, _ in numbers])
    paths = leaf_paths(params)
    skipped = find_skipped(skip, [*names, *sorted(paths)])
    found = find_leaves(names, rename, paths, Problems("") if skipped else problems)
    if skipped:
        find_leaves([n for n in names if n not in skipped], rename, paths, problems)
    for path in sorted((skipped & paths) - set(found.values())):
        problems.add(
            f"leaf {path}",
            "is skipped, but has no parameter, whose group it would be in: use rename",
        )
    for number in sorted(set(states) - {number for number, _ in numbers}, key=str):
        problems.add(f"parameter {number}", "has a state, but is in no group")
    table = {}
    for name, (number, group) in zip(names, numbers, strict=True):
        if name in found:
            path = found[name]
            state = states.get(number, {}) if not {name, path} & skipped else {}
            table[path] = Parameter(number, name, group, state)
    return table


def _names_in_order(
    names: Iterable[str] | None,
    groups: Sequence[Mapping[str, Any]],
    numbers: Sequence[Any],
) -> list[str]:
    """A name for each parameter in the groups: given, in the dict, or the number."""
    if names is None:
        if all("param_names" in group for group in groups):
            return [name for group in groups for name in group["param_names"]]
        if all(isinstance(number, str) for number in numbers):
            return list(numbers)  # of FSDP and torch.distributed.checkpoint
        raise ValueError(
            "names must be given, because this state dict has none: pass [name for "
            "name, _ in net.named_parameters()] in the order of the groups, or "
            "net.state_dict() if there is one group"
        )
    expected = f"names must be {len(numbers)} names, one for each parameter in the "
    expected += "groups, got"
    if isinstance(names, str):
        raise ValueError(f"{expected} {names}")
    if isinstance(names, Mapping):
        names = _parameter_names(names)
    names = list(names)
    if any(not isinstance(name, str) for name in names):
        kind = type(next(name for name in names if not isinstance(name, str)))
        raise ValueError(
            f"{expected} a {kind.__name__}: pass [name for name, _ in "
            "net.named_parameters()]"
        )
    if len(names) != len(numbers):
        names = list(filter(_is_no_buffer, names))
    if len(names) != len(numbers):
        raise ValueError(
            f"{expected} {len(names)}: pass [name for name, _ in "
            "net.named_parameters()], without those that the optimizer was not given; "
            "net.state_dict() may have other buffers than batch norm's"
        )
    return names


def _parameter_names(state_dict: Mapping[str, Any]) -> list[str]:
    """Names of parameters, without batch norm's buffers and copies of tied weights."""
    tied = find_tied(state_dict, {})
    return [name for name in state_dict if name not in tied and _is_no_buffer(name)]


def _is_no_buffer(name: str) -> bool:
    """Batch norm's are known by name."""
    return name.rpartition(".")[2] not in _BUFFERS


# ---------------------------------------------------------------------------
# names and leaves
# ---------------------------------------------------------------------------


def leaf_paths(params: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_string(path) for path, _ in leaves}


def is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def find_skipped(patterns: Patterns, names: Sequence[str]) -> set[str]:
    """The names and paths of which a pattern matches one part or several."""
    skipped = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            matches = {name for name in names if _matches_parts(pattern, name)}
        except re.error as error:
            raise ValueError(
                f"skip has {pattern!r}, which is no regular expression: {error}"
            ) from error
        if not matches:
            raise ValueError(
                f"skip has {pattern!r}, which matches no part of a name or a leaf; "
                f"they are {', '.join([*names[:20], *['...'] * (len(names) > 20)])}"
            )
        skipped |= matches
    return skipped


def _matches_parts(pattern: str, name: str) -> bool:
    """Whether it matches between dots, slashes and ends: `a.b` not in `xa.b`."""
    edges = {0, len(name)}
    for separator in re.finditer("[./]", name):
        edges |= {separator.start(), separator.end()}
    spans = [match.span() for match in re.finditer(pattern, name)]
    return any(start < end and {start, end} <= edges for start, end in spans)


def find_tied(state_dict: Mapping[str, Any], found: Mapping[str, str]) -> dict:
    """From each name whose tensor is another name's to that one, if it comes first.

    Names that have a leaf, in `found`, come before those that have none.
    """
    first: dict[Any, str] = {}
    tied = {}
    for name in sorted(state_dict, key=lambda name: name not in found):
        place = address(state_dict[name])
        if place is None:
            continue
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def find_leaves(
    names: Iterable[str], rename: Rename, leaves: set[str], problems: Problems
) -> dict[str, str]:
    """A dict from PyTorch's names to the paths of leaves, one to one.

    Prefixes that wrappers add to all names are removed if more names have a leaf then.
    """
    names = list(names)
    best: tuple[dict[str, str], Problems] | None = None
    for stripped in strip_prefixes(names):
        new = Problems("")
        paths = [
            _renamed(rename, name, short)
            for name, short in zip(names, stripped, strict=True)
        ]
        found = _match(names, paths, leaves, new)
        if best is None or len(found) > len(best[0]):
            best = found, new
        if not new.found:
            break
    if best is None:
        return {}
    found, new = best
    for location, problem in new.found:
        problems.add(location, problem)
    missing = [name for name in dict.fromkeys(names) if name not in found]
    for hint in _hints(missing, rename, leaves - set(found.values())):
        problems.hint(hint)
    return found


def strip_prefixes(names: Sequence[str]) -> Iterator[list[str]]:
    """Yields the names as they are, then with one wrapper less each time."""
    if not names:
        return
    yield list(names)
    plain = [_WRAPPERS.sub("", name) for name in names]
    if plain != list(names):
        yield plain
    while shared := [p for p in _PREFIXES if all(n.startswith(p) for n in plain)]:
        plain = [name.removeprefix(shared[0]) for name in plain]
        yield plain


def _renamed(rename: Rename, name: str, stripped: str) -> str:
    """The path of a name, which a dict may also have with its prefixes."""
    if rename is None:
        return stripped
    if isinstance(rename, Mapping):
        return rename.get(name, rename.get(stripped, stripped))
    return rename(stripped)


def _match(
    names: Sequence[str], paths: Sequence[str], leaves: set[str], problems: Problems
) -> dict[str, str]:
    find = _finder(leaves)
    found: dict[str, str] = {}
    used: set[str] = set()
    for name, path in zip(names, paths, strict=True):
        candidates, matches = find(path)
        if not matches:
            problems.add(
                f"parameter {name}", f"there is no leaf {' or '.join(candidates)}"
            )
        elif len(matches) > 1:
            problems.add(
                f"parameter {name}", f"could be leaf {' or '.join(matches)}: use rename"
            )
        elif name in found or matches[0] in used:
            problems.add(f"parameter {name}", f"leaf {matches[0]} is already taken")
        else:
            found[name] = matches[0]
            used.add(matches[0])
    return found


def _finder(leaves: set[str]) -> Callable[[str], tuple[list[str], list[str]]]:
    """From a path to the leaves that it could be, and to those that there are."""
    plain_leaves = collections.defaultdict(list)
    for leaf in sorted(leaves):
        plain_leaves[_as_in_torch(leaf)].append(leaf)

    def find(path):
        path = path if path in leaves else path.replace(".", "/")
        module, slash, last = path.rpartition("/")
        candidates = [path]
        candidates += [module + slash + other for other in _LEAF_NAMES.get(last, ())]
        matches = [path for path in candidates if path in leaves]
        if not matches:
            plain = map(_as_in_torch, candidates)
            matches = [leaf for path in plain for leaf in plain_leaves.get(path, ())]
        return candidates, matches

    return find


def _as_in_torch(path: str) -> str:
    """Without what only Flax has: its names in Sequential, and Linen's collections.

    PyTorch's `0.weight` is `layers/0/kernel` in NNX, `params/layers_0/kernel` in Linen.
    """
    path = re.sub(r"^(params|batch_stats)/", "", path)
    return re.sub(r"(?<![^/])layers[/_](?=\d+/)", "", path)


def _hints(missing: list[str], rename: Rename, leaves: set[str]) -> Iterator[str]:
    """Prefixes of names, or of paths, without which most of the others fit."""
    find = _finder(leaves)
    dropped, added = collections.Counter(), collections.Counter()
    ends = collections.defaultdict(list)
    for leaf in leaves:
        parts = leaf.split("/")
        for i in range(1, len(parts)):
            end = _as_in_torch("/".join(parts[i:]))
            ends[end].append("/".join(parts[:i]) + "/")
    for name in missing:
        parts = name.split(".")
        for i in range(1, len(parts)):
            _, matches = find(_renamed(rename, name, ".".join(parts[i:])))
            dropped[".".join(parts[:i]) + "."] += len(matches) == 1
        candidates, _ = find(_renamed(rename, name, name))
        plain = map(_as_in_torch, candidates)
        added.update({prefix for path in plain for prefix in ends.get(path, ())})
    most = max(dropped.values(), default=0)
    if most and 2 * most >= len(leaves):
        prefixes = [prefix for prefix, count in dropped.items() if count == most][:3]
        if all(name.startswith(prefixes[0]) for name in missing):
            way = f"rename=lambda name: name.removeprefix({prefixes[0]!r})"
        else:
            way = (
                "{name.removeprefix(p): x for name, x in state_dict.items() if "
                f"name.startswith(p)}} with p = {prefixes[0]!r}"
            )
        yield (
            f"The names fit without {', or without '.join(map(repr, prefixes))} ({most}"
            f" of {len(leaves)} leaves): pass {way}"
        )
    for prefix, count in added.most_common(1):
        if 2 * count >= len(missing):
            yield (
                f"The names fit with {prefix!r} before them ({count} of "
                f"{len(missing)}): pass rename=lambda name: {prefix!r} + name"
            )
