"""The language models against their PyTorch twins, and what their parts promise."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.extend.core import jaxprs_in_params
from tiers import matrix

import adamw_jax
from train.models.awd import (
    AWD,
    Masks,
    Rates,
    activation_penalties,
    cross_entropy,
    draw_masks,
)
from train.references import awd as torch_awd

# Flax and Optax promote dtypes.
pytestmark = pytest.mark.usefixtures("lenient", "x64", "fast_compile")

WORDS, EMBEDDING, WIDTH, LAYERS, TIME, BATCH = 13, 6, 8, 3, 7, 4
KINDS = ("lstm", "qrnn")
RATES = Rates()
ALPHA, BETA = 3.0, 1.5

rng = np.random.default_rng(0)
TEXT = rng.integers(0, WORDS, (20 * TIME + 1, BATCH)).astype(np.int32)


def close(ours, expected, tolerance=1e-9):
    for one, other in zip(
        jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True
    ):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@functools.cache
def build(kind, **options):
    """Graph and parameters, float64."""
    net = AWD(WORDS, EMBEDDING, WIDTH, LAYERS, kind=kind, rngs=nnx.Rngs(0), **options)
    net.bias[...] = jax.random.normal(jax.random.key(1), (WORDS,))  # not all 0
    graph, params = nnx.split(net)
    return graph, jax.tree.map(lambda p: p.astype(jnp.float64), params)


@functools.partial(jax.jit, static_argnames="graph")
def forward(graph, params, x, state, masks=None, length=None):
    return nnx.merge(graph, params, copy=True)(x, state, masks, length)


def initial_state(graph, params, batch_size=BATCH):
    return nnx.merge(graph, params, copy=True).initial_state(batch_size)


def random_state(graph, params):
    """As if something had been read before."""
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(-1, 1, s.shape), s.dtype),
        initial_state(graph, params),
    )


@functools.partial(jax.jit, static_argnames=("graph", "rates", "batch_size"))
def draw(key, graph, params, rates=RATES, batch_size=BATCH):
    return draw_masks(key, nnx.merge(graph, params, copy=True), rates, batch_size)


def masks_for(graph, params, seed=0, *options):
    return draw(jax.random.key(seed), graph, params, *options)


def loss_of(params, graph, chunk, state, masks, length, dropped_ar=False):
    """Of inputs and targets, as a training step has it; outputs as well."""
    net, (x, y) = nnx.merge(graph, params, copy=True), chunk
    out = net(x, state, masks, length)
    valid = jnp.where(jnp.arange(len(x))[:, None] < length, 1 / (length * BATCH), 0)
    weights = jnp.broadcast_to(valid, x.shape).astype(out.raw.dtype)
    embedding, bias = net.embedding[...], net.bias[...]
    loss = cross_entropy(out.dropped, embedding, bias, y, weights, 2)
    ar = jnp.where(dropped_ar, out.dropped, out.raw)
    return loss + activation_penalties(out.raw, length, ALPHA, BETA, ar), out


with_grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnames="graph")


def chunk_at(start, time=TIME):
    return TEXT[start : start + time], TEXT[start + 1 : start + 1 + time]


def twin_of(kind, params):
    twin = torch_awd.AWD(WORDS, EMBEDDING, WIDTH, LAYERS, kind).double()
    torch_awd.load(twin, params)
    return twin


def tensors(tree):
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a)), tree)


def same_parameters(ours, theirs, tolerance=1e-9):
    ours = {path: leaf[...] for path, leaf in nnx.to_flat_state(ours)}
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_allclose(
            leaf, theirs[path], rtol=tolerance, atol=tolerance, err_msg=str(path)
        )


# ---------------------------------------------------------------------------
# against PyTorch
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "width", "layers", "count"),
    [("lstm", 1150, 3, 33_556_479), ("qrnn", 1550, 4, 33_355_029)],
)
def test_parameters_of_the_article(kind, width, layers, count):
    """Widths as in the article; its vocabulary of WikiText-2."""
    sizes = 33_279, 400, width, layers
    net = nnx.eval_shape(lambda: AWD(*sizes, kind=kind, rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.state(net, nnx.Param))
    assert sum(p.size for p in params) == count
    with torch.device("meta"):
        twin = torch_awd.AWD(*sizes, kind)
    assert sum(p.numel() for p in twin.parameters()) == count


@pytest.mark.parametrize("kind", matrix(list(KINDS), quick=["lstm"]))
def test_initial_values(kind):
    """Uniform; within 0.1 for the embedding, PyTorch's bounds for the layers."""
    net = AWD(50, 40, 60, 3, kind=kind, rngs=nnx.Rngs(0))
    assert (net.bias[...] == 0).all()
    bounds = [(net.embedding[...], 0.1)]
    for i, layer in enumerate(net.layers):
        fan_in = layer.width if kind == "lstm" else layer.kernel.shape[0]
        leaves = jax.tree.leaves(nnx.state(layer))
        assert len(leaves) == (4 if kind == "lstm" else 2)
        bounds += [(leaf, fan_in**-0.5) for leaf in leaves]
        if kind == "qrnn":
            assert layer.kernel.shape[0] == (80, 60, 60)[i]
    for values, bound in bounds:
        assert 0.95 * bound < jnp.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "masked"),
    [
        ("lstm", True),
        pytest.param("qrnn", True, marks=pytest.mark.slow),
        pytest.param("lstm", False, marks=pytest.mark.slow),
        pytest.param("qrnn", False, marks=pytest.mark.slow),
    ],
)
def test_outputs_are_those_of_pytorch(kind, masked):
    graph, params = build(kind)
    net = nnx.merge(graph, params, copy=True)
    state, (x, _) = random_state(graph, params), chunk_at(0)
    masks = masks_for(graph, params, 0) if masked else None
    ours = forward(graph, params, x, state, masks)

    twin = twin_of(kind, params)
    given = torch_awd.as_masks(masks) if masked else None
    with torch.no_grad():
        raw, dropped, after = twin(torch.tensor(x), tensors(state), given)
        logits = twin.logits(dropped)
    close(ours.raw, raw)
    close(ours.dropped, dropped)
    close(ours.state, after)
    close(net.logits(ours.dropped), logits)
    assert masked == bool(np.any(np.asarray(ours.raw) != np.asarray(ours.dropped)))


@pytest.mark.parametrize(
    ("kind", "dropped_ar"),
    matrix(
        list(itertools.product(KINDS, (False, True))),
        quick=[("lstm", True), ("qrnn", False)],
    ),
)
def test_loss_and_gradients_are_those_of_pytorch(kind, dropped_ar):
    graph, params = build(kind)
    state = random_state(graph, params)
    masks, (x, y) = masks_for(graph, params, 0), chunk_at(0)
    (loss, _), grads = with_grads(params, graph, (x, y), state, masks, TIME, dropped_ar)
    twin = twin_of(kind, params)
    args = torch.tensor(x), torch.tensor(y).long(), tensors(state)
    args = *args, torch_awd.as_masks(masks)
    if dropped_ar:
        their_loss, _ = torch_awd.loss_fn(twin, *args, alpha=0.0, beta=BETA)
        _, dropped, _ = twin(args[0], *args[2:])
        their_loss = their_loss + ALPHA * dropped.square().mean()
    else:
        their_loss, _ = torch_awd.loss_fn(twin, *args, alpha=ALPHA, beta=BETA)
    their_loss.backward()
    close(loss, their_loss.detach())
    same_parameters(grads, torch_awd.read(twin, "grad"))


@pytest.mark.parametrize("kind", matrix(list(KINDS), quick=["lstm"]))
def test_training_is_that_of_pytorch(kind):
    """Twenty steps with Adam and L2, clipped, the state carried, new masks in each."""
    graph, params = build(kind)
    twin, rate, decay, clip = twin_of(kind, params), 5e-3, 1.2e-6, 0.12
    state = initial_state(graph, params)
    their_state = twin.initial_state(BATCH)
    tx = adamw_jax.adam(rate, b1=0.7, b2=0.99, l2=decay)
    optimizer = torch.optim.Adam(
        twin.parameters(), rate, betas=(0.7, 0.99), weight_decay=decay, fused=True
    )
    before = params

    @jax.jit
    def step(params, opt, state, chunk, masks):
        (loss, out), grads = with_grads(params, graph, chunk, state, masks, TIME)
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip / (norm + 1e-6)), grads)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, out.state, loss, norm

    opt, norms = tx.init(params), []
    for i in range(20):
        masks, (x, y) = masks_for(graph, params, i), chunk_at(i * TIME)
        params, opt, state, loss, norm = step(params, opt, state, (x, y), masks)
        their_loss, their_state = torch_awd.train_step(
            twin, optimizer, torch.tensor(x), torch.tensor(y).long(), their_state,
            rates=RATES, alpha=ALPHA, beta=BETA, clip=clip,
            masks=torch_awd.as_masks(masks),
        )  # fmt: skip
        close(loss, their_loss)
        norms.append(norm)
    same_parameters(params, torch_awd.read(twin, "data"))
    close(state, their_state)
    assert max(norms) > clip  # there was something to clip
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, before)
    assert min(jax.tree.leaves(moved)) > rate


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_learns_with_masks_of_its_own(kind):
    torch.manual_seed(0)
    twin = torch_awd.AWD(WORDS, 16, 16, LAYERS, kind)
    optimizer = torch.optim.AdamW(twin.parameters(), 2e-2, fused=True)
    rates, losses = Rates(0.05, 0.1, 0.1, 0.1, 0.1), []
    cycle = torch.arange(TIME + 1)[:, None] + torch.arange(BATCH)  # 0 1 2 3 ...
    state = twin.initial_state(BATCH)
    for i in range(60):
        tokens = (cycle + i * TIME) % WORDS
        loss, state = torch_awd.train_step(
            twin, optimizer, tokens[:-1], tokens[1:], state,
            rates=rates, alpha=0.0, beta=0.0, clip=0.25,
        )  # fmt: skip
        losses.append(float(loss))
        assert not any(s.requires_grad for layer in state for s in layer)
    assert losses[0] > 2.4 and losses[-1] < 1.2


def test_the_masks_of_the_twin_are_ours_in_shape_and_scale():
    graph, params = build("qrnn")
    torch.manual_seed(0)
    twin, ours = twin_of("qrnn", params), masks_for(graph, params, 0)
    theirs = torch_awd.draw_masks(twin, RATES, BATCH)
    ours = torch_awd.as_masks(ours)
    shapes, expected = (
        [tuple(leaf.shape) for leaf in jax.tree.leaves(m)] for m in (theirs, ours)
    )
    assert shapes == expected
    for rate, parts in zip(RATES, theirs, strict=True):
        for part in jax.tree.leaves(parts):
            assert set(part.unique().tolist()) <= {0, 1 / (1 - rate)}
    kept = torch.cat([w.ravel() for w in theirs.weights]) > 0
    assert kept.float().mean() == pytest.approx(1 - RATES.weights, abs=0.06)


def test_the_twin_refuses_what_does_not_fit():
    _, params = build("lstm")
    with pytest.raises(ValueError, match="params must have .*input_bias"):
        torch_awd.load(torch_awd.AWD(WORDS, EMBEDDING, WIDTH, 2), params)
    with pytest.raises(ValueError, match=r"the shape \(14, 6\) .*, got \(13, 6\)"):
        torch_awd.load(torch_awd.AWD(WORDS + 1, EMBEDDING, WIDTH, LAYERS), params)


# ---------------------------------------------------------------------------
# time
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("lstm", 1),
        pytest.param("qrnn", 4, marks=pytest.mark.slow),
        pytest.param("lstm", 4, marks=pytest.mark.slow),
        pytest.param("qrnn", 1, marks=pytest.mark.slow),
    ],
)
def test_padding_changes_nothing(kind, length):
    """Neither outputs up to there nor states, loss and gradients; length 1: no TAR."""
    graph, params = build(kind)
    state = random_state(graph, params)
    masks, (x, y) = masks_for(graph, params, 0), chunk_at(0)
    for dropped_ar in (False, True):
        (loss, out), grads = with_grads(
            params, graph, (x, y), state, masks, length, dropped_ar
        )
        (expected, short), expected_grads = with_grads(
            params, graph, (x[:length], y[:length]), state, masks, length, dropped_ar
        )
        close(out.raw[:length], short.raw, 1e-12)
        close(out.dropped[:length], short.dropped, 1e-12)
        close(out.state, short.state, 1e-12)
        close(loss, expected, 1e-12)
        close(grads, expected_grads, 1e-12)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("lstm", 1),
        ("qrnn", 3),
        pytest.param("lstm", 3, marks=pytest.mark.slow),
        pytest.param("qrnn", 1, marks=pytest.mark.slow),
    ],
)
def test_two_chunks_are_one(kind, cut):
    graph, params = build(kind)
    x, state = TEXT[:TIME], initial_state(graph, params)
    whole = forward(graph, params, x, state)
    first = forward(graph, params, x[:cut], state)
    then = forward(graph, params, x[cut:], first.state)
    close(whole.raw, jnp.concatenate([first.raw, then.raw]), 1e-14)
    close(whole.state, then.state, 1e-14)
    fresh = forward(graph, params, x[cut:], state)
    assert jnp.abs(fresh.raw - then.raw).max() > 1e-3  # the state matters


def test_the_first_qrnn_layer_alone_sees_the_word_before():
    """Not through a state: with f at 1 what was pooled before is forgotten."""
    graph, params = build("qrnn")
    empty = initial_state(graph, params, 1)

    @jax.jit
    @jax.grad
    def gradient(params):
        net = nnx.merge(graph, params, copy=True)
        for layer in net.layers:
            layer.bias[...] = layer.bias.at[layer.width : 2 * layer.width].set(1e3)
        return net(jnp.arange(5)[:, None], empty).raw[-1].sum()

    of_word = jnp.abs(gradient(params)["embedding"][...]).max(-1)
    assert (of_word[:3] == 0).all()
    assert (of_word[3:5] > 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_products_in_bfloat16(kind):
    """Sums, states and gradients stay in the dtype of the parameters."""
    graph, params = build(kind)
    args = chunk_at(0), random_state(graph, params), masks_for(graph, params)
    (expected, _), _ = with_grads(params, graph, *args, TIME)

    graph, _ = build(kind, dtype=jnp.bfloat16)
    params, args = jax.tree.map(
        lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, (params, args)
    )
    results = with_grads(params, graph, *args, TIME)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(results)}
    assert dtypes == {jnp.dtype("float32")}
    (loss, _), _ = results
    assert 1e-6 < abs(loss / expected - 1) < 0.01


# ---------------------------------------------------------------------------
# masks
# ---------------------------------------------------------------------------


def test_masks_have_their_rates_and_a_mean_of_one():
    graph, params = build("lstm")
    rates, draws = Rates(0.1, 0.6, 0.2, 0.4, 0.5), 400
    keys = jax.random.split(jax.random.key(0), draws)
    many = jax.vmap(lambda key: draw(key, graph, params, rates))(keys)
    for rate, parts in zip(rates, many, strict=True):
        for part in map(np.asarray, jax.tree.leaves(parts)):
            assert part.dtype == np.float64
            values = np.unique(part)
            np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-15)
            error = (rate / (1 - rate) / part.size) ** 0.5  # standard, of the mean
            assert part.mean() == pytest.approx(1, abs=4 * error)
            # of every place, not only of them all
            places = part.mean(0)
            spread = (rate / (1 - rate) / draws) ** 0.5
            assert np.abs(places - 1).max() < 6 * spread
            assert places.std() == pytest.approx(spread, rel=0.6)


def test_masks_without_dropout_are_ones_and_do_nothing():
    graph, params = build("lstm")
    masks = masks_for(graph, params, 0, Rates(0, 0, 0, 0, 0))
    assert all((part == 1).all() for part in jax.tree.leaves(masks))
    args = graph, params, TEXT[:TIME], random_state(graph, params)
    close(forward(*args, masks), forward(*args), 1e-15)


def test_every_mask_is_another_and_comes_from_the_key():
    sizes = WORDS, 20, 20, 3  # all widths the same: so are the shapes
    net = AWD(*sizes, rngs=nnx.Rngs(0))
    draw = jax.jit(lambda key: draw_masks(key, net, Rates(*[0.5] * 5), BATCH))
    one, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (one, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
    places = [one.input, *one.hidden, one.output]
    for alike in (places, one.weights):
        for a, b in itertools.combinations(alike, 2):
            assert (a != b).any()


def ones(graph, params) -> Masks:
    return masks_for(graph, params, 0, Rates(0, 0, 0, 0, 0))


@pytest.mark.parametrize("kind", matrix(list(KINDS), quick=["lstm"]))
def test_dropped_words_vanish_from_the_input_alone(kind):
    graph, params = build(kind)
    state, masks = random_state(graph, params), ones(graph, params)
    masks = masks._replace(words=masks.words.at[jnp.array([2, 5])].set(0))
    x, y = np.where(TEXT[:TIME] == 5, 2, TEXT[:TIME]), TEXT[1 : TIME + 1]
    other = np.where(x == 2, 5, x)
    assert (x != other).any()
    out = forward(graph, params, x, state, masks)
    same = forward(graph, params, other, state, masks)
    close(same, out, 0)  # which of the two it was, nobody knows
    changed = forward(graph, params, other, state).raw
    assert jnp.abs(changed - forward(graph, params, x, state).raw).max() > 1e-4

    # the embedding's gradient is that of the decoder, where the word is dropped
    y = np.where(y == 2, 3, y)

    @jax.jit
    @jax.grad
    def decoder_alone(embedding):
        weights, bias = jnp.full(x.shape, 1 / x.size), params["bias"][...]
        return cross_entropy(out.dropped, embedding, bias, y, weights, TIME)

    _, grads = with_grads(params, graph, (x, y), state, masks, TIME)
    expected = decoder_alone(params["embedding"][...])
    ours = grads["embedding"][...]
    close(ours[2], expected[2], 1e-12)
    assert jnp.abs(ours[2]).max() > 1e-5
    read = next(word for word in x.ravel() if word != 2)
    assert jnp.abs(ours[read] - expected[read]).max() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_the_same_at_every_time(kind):
    graph, params = build(kind)
    state, masks = random_state(graph, params), masks_for(graph, params, 3)
    out = forward(graph, params, TEXT[:TIME], state, masks)
    close(out.dropped, out.raw * masks.output[None], 1e-15)
    dropped = np.asarray(masks.output == 0)
    assert dropped.any() and (out.dropped[:, dropped] == 0).all()
    assert (out.raw != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_has_no_gradient(kind):
    """At any time and in any layer: else the masks would be others there."""
    graph, params = build(kind)
    rates = Rates(words=0, input=0.5, hidden=0.5, output=0, weights=0.5)
    # the same for all texts of the batch, so that a column is dropped or not
    masks = masks_for(graph, params, 0, rates, 1)
    masks = masks._replace(
        input=jnp.repeat(masks.input, BATCH, 0),
        hidden=tuple(jnp.repeat(mask, BATCH, 0) for mask in masks.hidden),
        output=jnp.repeat(masks.output, BATCH, 0),
    )
    empty = initial_state(graph, params)
    _, grads = with_grads(params, graph, chunk_at(0), empty, masks, TIME)
    below = [masks.input, *masks.hidden]
    for i, weights in enumerate(map(np.asarray, masks.weights)):
        layer = jax.tree.map(np.asarray, nnx.to_pure_dict(grads)["layers"][i])
        kernel, inputs = layer["kernel"], layer.get("input_kernel", layer["kernel"])
        assert (kernel[weights == 0] == 0).all()
        assert (kernel[weights > 0] != 0).any()
        dropped = np.tile(below[i][0] == 0, 2 if (kind, i) == ("qrnn", 0) else 1)
        assert 0 < dropped.sum() < dropped.size
        assert (inputs[dropped] == 0).all()
        assert (inputs[~dropped] != 0).any(-1).all()


# ---------------------------------------------------------------------------
# loss
# ---------------------------------------------------------------------------

ROWS = 12


def cross_entropy_arguments():
    rng = np.random.default_rng(1)
    x, embedding = rng.normal(size=(ROWS, 5)), rng.normal(size=(WORDS, 5))
    weights = rng.uniform(0, 2, ROWS)
    weights[[3, 7]] = 0
    args = x, embedding, rng.normal(size=WORDS)
    return args, rng.integers(0, WORDS, ROWS).astype(np.int32), weights


def dense(x, embedding, bias, targets, weights):
    logits = x @ embedding.T + bias
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (weights * losses).sum()


@pytest.mark.parametrize(
    ("shape", "chunk"),
    matrix(
        [((12,), chunk) for chunk in (1, 3, 5, 12, 1000)]
        + [((4, 3), 2), ((4, 3), 3), ((2, 2, 3), 1)],
        quick=[((12,), 5), ((4, 3), 2)],
    ),
)
def test_cross_entropy_is_the_dense_one(shape, chunk):
    """Chunks that divide the rows, that do not, and that are more than there are."""
    (x, *args), targets, weights = cross_entropy_arguments()
    args = x.reshape(*shape, -1), *args
    targets, weights = targets.reshape(shape), weights.reshape(shape)

    def ours(*args):  # its gradient is scaled by what comes from above
        return -3.7 * cross_entropy(*args, targets, weights, chunk)

    def theirs(*args):
        return -3.7 * dense(*args, targets, weights)

    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*args) for f in (ours, theirs)
    )
    close(found, expected, 1e-12)
    if shape == (4, 3):
        close(jax.jit(ours)(*args), expected[0], 1e-12)  # without a gradient


@pytest.mark.slow
def test_cross_entropy_of_large_logits():
    (x, embedding, bias), targets, weights = cross_entropy_arguments()
    args = 1e3 * x, embedding, bias
    value, grads = jax.value_and_grad(cross_entropy, (0, 1, 2))(
        *args, targets, weights, 5
    )
    expected = jax.value_and_grad(dense, (0, 1, 2))(*args, targets, weights)
    close((value, grads), expected, 1e-9)
    assert jnp.isfinite(value) and value > 1e3


def test_a_row_of_weight_zero_has_no_say():
    (x, embedding, bias), targets, weights = cross_entropy_arguments()
    grads = jax.grad(cross_entropy, (0, 1, 2))
    one = grads(x, embedding, bias, targets, weights, 5)
    x, targets = x.copy(), targets.copy()
    x[3], targets[7] = 9, (targets[7] + 1) % WORDS
    close(one, grads(x, embedding, bias, targets, weights, 5), 1e-15)
    assert (one[0][jnp.array([3, 7])] == 0).all()


def test_never_all_logits_at_once():
    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (out.aval.size for out in eqn.outvars)
            for inner in jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    rows, words, width, chunk = 64, 50, 3, 4
    shapes = (rows, width), (words, width), (words,)
    args = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes]
    targets, weights = jnp.zeros(rows, jnp.int32), jnp.ones(rows)
    step = jax.value_and_grad(
        lambda *args: cross_entropy(*args, targets, weights, chunk), (0, 1, 2)
    )
    largest = max(sizes(jax.make_jaxpr(step)(*args).jaxpr))
    assert largest <= max(chunk * words, rows * width)


@pytest.mark.parametrize("dropped_ar", [False, True])
@pytest.mark.parametrize("length", [2, 5, TIME])
def test_penalties(length, dropped_ar):
    x, dropped = np.random.default_rng(2).normal(size=(2, TIME, BATCH, EMBEDDING))
    ar = dropped if dropped_ar else x
    expected = ALPHA * np.mean(ar[:length] ** 2)
    expected += BETA * np.mean(np.diff(x[:length], axis=0) ** 2)
    given = {"ar": jnp.asarray(dropped)} if dropped_ar else {}
    got = activation_penalties(jnp.asarray(x), length, ALPHA, BETA, **given)
    close(got, expected, 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, TIME])
def test_penalties_of_a_single_token(time):
    x = jax.random.normal(jax.random.key(0), (time, BATCH, EMBEDDING))

    def penalties(x):
        return activation_penalties(x, 1, ALPHA, BETA)

    value, gradient = jax.value_and_grad(penalties)(x)
    close(value, ALPHA * jnp.mean(x[0] ** 2), 1e-14)
    expected = jnp.zeros_like(x).at[0].set(2 * ALPHA * x[0] / x[0].size)
    close(gradient, expected, 1e-14)
