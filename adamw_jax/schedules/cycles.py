"""Ready-made phases: 1cycle and its relatives, warm restarts, the range test."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from .. import _foreign
from .._checks import check_choice, check_scalar
from .._foreign import explain_names
from .phases import Phase, Phases, to_python


def _make_duration_fn(
    steps: float | None, epochs: float | None, steps_per_epoch: float | None
) -> Callable[[float], dict[str, float]]:
    """Makes the function from a share of the run to the duration of a `Phase`."""
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"set either steps or epochs, got steps={steps!r}, epochs={epochs!r}"
        )
    unit, length = ("epochs", epochs) if steps is None else ("steps", steps)
    assert length is not None
    if (unit == "epochs") == (steps_per_epoch is None):
        raise ValueError(
            "steps_per_epoch is needed with epochs, and only then: got "
            f"{unit}={length!r}, steps_per_epoch={steps_per_epoch!r}"
        )
    check_scalar(unit, length)
    return lambda share: {unit: length * share}


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        check_scalar(name, to_python(name, value))
        if value == 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")


@explain_names(_foreign.ONE_CYCLE)
def one_cycle(
    learning_rate: float,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
    div: float = 10.0,
    pct: float = 0.075,
    b1: tuple[float, float] = (0.95, 0.85),
    end: Literal["linear", "cosine"] = "linear",
    b2: float | None = None,
    weight_decay: float | None = None,
) -> Phases:
    """The article's 1cycle: up, down, then a short annealing.

    The rate rises linearly from learning_rate/div over (1 - pct)/2 of the run, while b1
    falls, and falls back over the same time, while b1 rises. Over the last pct it is
    annealed from learning_rate/div, linearly to learning_rate/(100 div) or along a
    cosine to 0, at the high b1.

    Args:
        learning_rate: the peak.
        steps: length of the run in steps. Set either steps or epochs.
        epochs: length of the run in epochs.
        steps_per_epoch: needed with epochs.
        div: ratio of the peak to the first rate.
        pct: share of the annealing, in (0, 1).
        b1: the high and the low value.
        end: shape of the annealing, `"linear"` or `"cosine"`.
        b2: a constant value, .99 in the article. None: the phases do not drive b2.
        weight_decay: a constant value. None: not driven.

    Returns:
        Three phases.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Example:
        >>> phases = one_cycle(3e-3, epochs=30, steps_per_epoch=391)
        >>> print(phases)
        steps        learning_rate           b1
        0-5425       0.0003 -> 0.003 linear  0.95 -> 0.85 linear
        5426-10850   0.003 -> 0.0003 linear  0.85 -> 0.95 linear
        10851-11729  0.0003 -> 3e-06 linear  0.95

    Source: Gugger and Howard, 2018. Smith, `Super-Convergence
    <https://arxiv.org/abs/1708.07120>`_, 2018.
    """
    duration = _make_duration_fn(steps, epochs, steps_per_epoch)
    _check_positive(learning_rate=learning_rate, div=div)
    check_choice("end", end, ("linear", "cosine"))
    if not 0 < pct < 1:
        raise ValueError(f"pct must be in (0, 1), got {pct!r}")
    low = learning_rate / div
    high_b1, low_b1 = b1
    last = (low, low / 100) if end == "linear" else (low, 0.0, "cosine")
    constant = {"b2": b2, "weight_decay": weight_decay}
    rise = {"learning_rate": (low, learning_rate), "b1": (high_b1, low_b1)}
    fall = {"learning_rate": (learning_rate, low), "b1": (low_b1, high_b1)}
    anneal = {"learning_rate": last, "b1": high_b1}
    half = duration((1 - pct) / 2)
    return Phases(
        (
            Phase(**half, **rise, **constant),
            Phase(**half, **fall, **constant),
            Phase(**duration(pct), **anneal, **constant),
        ),
        steps_per_epoch,
    )


@explain_names(_foreign.ONE_CYCLE_PLATEAU)
def one_cycle_plateau(
    learning_rate: float,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
    div: float = 10.0,
    pct: float = 1 / 12,
    b1: tuple[float, float] = (0.8, 0.7),
    b2: float | None = None,
    weight_decay: float | None = None,
) -> Phases:
    """The article's 1cycle for language models: up, a plateau, down, an annealing.

    The rate rises linearly from learning_rate/div to the peak over pct of the run,
    while b1 falls. It stays there for (1 - 2 pct)/2 and falls back over the same time,
    while b1 rises. Over the last pct it is annealed along a cosine to 0. With the
    defaults these are 7.5, 37.5, 37.5 and 7.5 of 90 epochs.

    Args:
        learning_rate: the peak.
        steps: length of the run in steps. Set either steps or epochs.
        epochs: length of the run in epochs.
        steps_per_epoch: needed with epochs.
        div: ratio of the peak to the first rate.
        pct: share of the first phase, and of the last, in (0, 1/2).
        b1: the high and the low value.
        b2: a constant value. None: the phases do not drive b2.
        weight_decay: a constant value. None: not driven.

    Returns:
        Four phases.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Example:
        >>> print(one_cycle_plateau(5e-3, epochs=90, steps_per_epoch=297))
        steps        learning_rate           b1
        0-2227       0.0005 -> 0.005 linear  0.8 -> 0.7 linear
        2228-13364   0.005                   0.7
        13365-24502  0.005 -> 0.0005 linear  0.7 -> 0.8 linear
        24503-26729  0.0005 -> 0 cosine      0.8

    Source: Gugger and Howard, 2018 (the code of its language models).
    """
    duration = _make_duration_fn(steps, epochs, steps_per_epoch)
    _check_positive(learning_rate=learning_rate, div=div)
    if not 0 < pct < 0.5:
        raise ValueError(f"pct must be in (0, 0.5), got {pct!r}")
    low = learning_rate / div
    high_b1, low_b1 = b1
    edge, middle = duration(pct), duration((1 - 2 * pct) / 2)
    constant = {"b2": b2, "weight_decay": weight_decay}
    rise = {"learning_rate": (low, learning_rate), "b1": (high_b1, low_b1)}
    fall = {"learning_rate": (learning_rate, low), "b1": (low_b1, high_b1)}
    anneal = {"learning_rate": (low, 0.0, "cosine"), "b1": high_b1}
    return Phases(
        (
            Phase(**edge, **rise, **constant),
            Phase(**middle, learning_rate=learning_rate, b1=low_b1, **constant),
            Phase(**middle, **fall, **constant),
            Phase(**edge, **anneal, **constant),
        ),
        steps_per_epoch,
    )


@explain_names(_foreign.ONE_CYCLE_TORCH)
def one_cycle_torch(
    learning_rate: float,
    total_steps: int,
    *,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Phases:
    """The 1cycle of `torch.optim.lr_scheduler.OneCycleLR`, equal at every step.

    The phases end at the fractional steps pct_start * total_steps - 1 and
    total_steps - 1, so the last of the total_steps updates has the final rate.

    Args:
        learning_rate: `max_lr`, the peak.
        total_steps: number of updates in the run, >= 2.
        pct_start: share of the rise, in (0, 1).
        anneal_strategy: `"cos"` or `"linear"`.
        cycle_momentum: drive b1 in the opposite direction. False: not driven.
        base_momentum: b1 at the peak.
        max_momentum: b1 at both ends.
        div_factor: ratio of the peak to the first rate.
        final_div_factor: ratio of the first rate to the last.
        three_phase: mirror the rise, then anneal.

    Returns:
        Two or three phases with `rule="torch"`.

    Raises:
        TypeError, ValueError: an argument is out of range; pct_start * total_steps = 1,
            for which PyTorch divides by zero; three phases with pct_start > .5.

    Example:
        >>> phases = one_cycle_torch(1e-2, 97)
        >>> [f"{phases.at(k)['learning_rate']:.6f}" for k in (0, 28, 96)]
        ['0.000400', '0.010000', '0.000000']

    Source: PyTorch 2.13, `torch/optim/lr_scheduler.py`.
    """
    check_scalar("total_steps", total_steps)
    if total_steps < 2 or int(total_steps) != total_steps:
        raise ValueError(f"total_steps must be an integer >= 2, got {total_steps!r}")
    check_choice("anneal_strategy", anneal_strategy, ("cos", "linear"))
    _check_positive(
        learning_rate=learning_rate,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )
    limit = 0.5 if three_phase else 1.0
    if not 0 < pct_start < 1 or pct_start > limit:
        raise ValueError(f"pct_start must be in (0, {limit:g}), got {pct_start!r}")
    kind = "cosine" if anneal_strategy == "cos" else "linear"
    first = learning_rate / div_factor
    last = first / final_div_factor
    rise = (first, learning_rate, max_momentum, base_momentum)
    if three_phase:
        ends = (
            float(pct_start * total_steps) - 1,
            float(2 * pct_start * total_steps) - 2,
            total_steps - 1.0,
        )
        fall = (learning_rate, first, base_momentum, max_momentum)
        ramps = (rise, fall, (first, last, max_momentum, max_momentum))
    else:
        ends = (float(pct_start * total_steps) - 1, total_steps - 1.0)
        ramps = (rise, (learning_rate, last, base_momentum, max_momentum))
    if 0.0 in ends:
        raise ValueError(
            "pct_start * total_steps must not be 1, which leaves the first phase "
            f"without a length: got {pct_start!r} * {total_steps!r}"
        )
    driven = []
    for lr0, lr1, b0, b1 in ramps:
        driven.append({"learning_rate": (lr0, lr1, kind)})
        if cycle_momentum:
            driven[-1]["b1"] = (b0, b1, kind)
    return phases_until(ends, driven)


def phases_until(ends: Sequence[float], ramps: Sequence[dict[str, Any]]) -> Phases:
    """The phases of PyTorch's `OneCycleLR`, from where each ends and what it does.

    In a very short run a phase can end before step 0; then only its end matters, where
    the next phase begins.
    """
    phases, previous, begin = [], 0.0, 0.0
    for end, ramp in zip(ends, ramps, strict=True):
        if end < 0:
            previous = begin = end
            continue
        if 0 < end - previous < 1e-6:  # phases round where they begin to 1e-6 steps
            raise ValueError(
                "pct_start must leave at least 1e-6 steps to each phase, got one of "
                f"{end - previous:.1g}"
            )
        phases.append(Phase(steps=end - previous, **ramp))
        previous = end
    return Phases(tuple(phases), rule="torch", begin=begin)


@explain_names(_foreign.RESTARTS)
def cosine_restarts(
    learning_rate: float,
    *,
    cycles: int,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
    mult: float = 1.0,
    final_learning_rate: float = 0.0,
    weight_decay: float | Sequence[float] | None = None,
) -> Phases:
    """Cosine annealing with warm restarts: SGDR, or AdamWR with Adam.

    Args:
        learning_rate: at every restart.
        cycles: the number of cycles, >= 1.
        steps: length of the first cycle in steps. Set either steps or epochs.
        epochs: length of the first cycle in epochs.
        steps_per_epoch: needed with epochs.
        mult: ratio of the length of a cycle to that of the one before.
        final_learning_rate: at the end of every cycle.
        weight_decay: a constant, or one value per cycle. AdamWR normalises it by the
            length of the cycle, as in the example. None: not driven.

    Returns:
        One phase per cycle.

    Raises:
        TypeError, ValueError: an argument is out of range, or the number of decays is
            not that of the cycles.

    Example:
        >>> from adamw_jax import normalized_weight_decay
        >>> decays = [normalized_weight_decay(0.025, 128, 50_000, t) for t in (10, 20)]
        >>> print(cosine_restarts(1e-3, cycles=2, epochs=10, steps_per_epoch=391,
        ...                       mult=2, weight_decay=decays))
        steps       learning_rate      weight_decay
        0-3909      0.001 -> 0 cosine  0.0004
        3910-11729  0.001 -> 0 cosine  0.000282843

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017, and
        `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_,
        2019 (AdamWR).
    """
    duration = _make_duration_fn(steps, epochs, steps_per_epoch)
    _check_positive(learning_rate=learning_rate, cycles=cycles, mult=mult)
    if int(cycles) != cycles:
        raise ValueError(f"cycles must be an integer, got {cycles!r}")
    decays = weight_decay if isinstance(weight_decay, Sequence) else None
    if decays is not None and len(decays) != cycles:
        raise ValueError(
            f"weight_decay must have one value for each of the {cycles} cycles, got "
            f"{len(decays)}"
        )
    return Phases(
        tuple(
            Phase(
                **duration(mult**i),
                learning_rate=(learning_rate, final_learning_rate, "cosine"),
                weight_decay=weight_decay if decays is None else decays[i],
            )
            for i in range(int(cycles))
        ),
        steps_per_epoch,
    )


@explain_names(_foreign.RANGE_TEST)
def range_test(
    start: float = 1e-5,
    end: float = 10.0,
    *,
    steps: int = 100,
    kind: Literal["exponential", "linear"] = "exponential",
) -> Phases:
    """The learning-rate range test: a rate that grows until the loss diverges.

    Args:
        start: the first rate.
        end: reached one step after the last, as in fastai.
        steps: length of the test.
        kind: growth of the rate, `"exponential"` or `"linear"`.

    Returns:
        One phase.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Example:
        >>> [f"{range_test().at(k)['learning_rate']:.2e}" for k in (0, 50, 99)]
        ['1.00e-05', '1.00e-02', '8.71e+00']

    Source: Smith, `Cyclical Learning Rates <https://arxiv.org/abs/1506.01186>`_, 2017.
    """
    _check_positive(start=start, end=end, steps=steps)
    check_choice("kind", kind, ("exponential", "linear"))
    return Phases((Phase(steps=steps, learning_rate=(start, end, kind)),))
