"""The README and the pages below docs/: their code runs, their numbers are measured."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from flax import nnx

import adamw_jax as aj
from train import tabulate
from train.run.log import read_events

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"

spec = importlib.util.spec_from_file_location("include", ROOT / "docs" / "include.py")
include = importlib.util.module_from_spec(spec)
spec.loader.exec_module(include)
PAGES = include.pages()


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_included_results_are_current(page):
    text = page.read_text("utf-8")
    assert text == include.fill(text), "run `make docs`"


def test_every_result_page_is_included():
    included = {
        match["path"]
        for page in PAGES
        for match in include.INCLUDE.finditer(page.read_text("utf-8"))
    }
    pages = {path.relative_to(ROOT / "docs") for path in RESULTS.rglob("*.md")}
    # The parts of a table are not all shown in detail.
    parts = {path for path in pages if "update" in path.parts}
    assert {path.as_posix() for path in pages - parts} <= included


def test_an_include_takes_a_page_or_its_table():
    path = "results/compare-digits/results.md"
    page = f"a\n<!-- include: {path} table -->\nold\n<!-- end -->\nb\n"
    filled = include.fill(page)
    table = include.included(path, table=True)
    assert filled == page.replace("old", f"\n{table}\n")
    assert table.count("\n") == 6 and table in include.included(path, table=False)
    assert include.fill(filled) == filled
    with pytest.raises(ValueError, match="without its"):
        include.fill(f"<!-- include: {path} -->\n")


@pytest.mark.parametrize("task", ["cifar10", "language_model", "cars", "update"])
def test_tables_are_those_of_the_runs(task):
    """`table.md` is what train.tabulate prints for the folder."""
    folder = RESULTS / task / "cpu"
    assert (folder / "table.md").read_text("utf-8").strip() == tabulate.table(folder)


def page_text(page):
    return " ".join((ROOT / "docs" / page).read_text("utf-8").split())


def test_numbers_in_sentences():
    """Those that no included page has."""
    found = json.loads((RESULTS / "cifar10/lr-find-cpu/lr_find.json").read_text())
    suggestion = f"Suggested learning rate: {found['suggestion']:.2g}"
    assert suggestion in page_text("reproduce/cifar10.md")

    text = page_text("reproduce/language_models.md")
    for model in ("lstm", "qrnn"):
        path = RESULTS / "language_model" / "cpu" / f"{model}-adam-l2" / "cache-0.json"
        tuned = json.loads(path.read_text("utf-8"))
        best = " / ".join(f"{tuned[split]['tuned']:.2f}" for split in ("valid", "test"))
        assert best in text
    (epoch,) = read_events(RESULTS / "wikitext2" / "cpu-first-epoch", "epoch", 0)
    assert f"validation loss {epoch['valid_loss']:.3f}" in text

    (body,) = read_events(RESULTS / "cars" / "cpu" / "cifar10-body", "end", 0)
    accuracy = f"test accuracy {body['plain_accuracy']:.2f} %"
    assert accuracy in page_text("reproduce/cars.md")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    """Files, pictures and folders of the repository."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(page):
    """Those of GitHub: the headings in lower case, with dashes."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages assume: a model's parameters and gradients, and a checkpoint."""
    tree = {"body": {"kernel": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
    named = [("body.weight", torch.ones(2)), ("head.bias", torch.ones(2))]
    optimizer = torch.optim.AdamW(named)
    checkpoint = {
        "model": dict(named),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30).state_dict(),
    }
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "checkpoint.pt")
    names = {"params": tree, "grads": tree, "aj": aj, "optax": optax, "jax": jax}
    names |= {"cycle": aj.one_cycle(3e-3, steps=100), "path": tmp_path / "checkpoint"}
    names["loss"] = lambda params: sum(x.sum() for x in jax.tree.leaves(params))
    names["train"] = lambda *args: None
    return names | {"rngs": nnx.Rngs(0)}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_blocks(page, lenient, names):
    for block in blocks(page):
        exec(block, names)
        params, tx = names["params"], names["tx"]
        tx.update(params, tx.init(params), params)


def test_pages_with_code_are_found():
    assert sum(bool(blocks(page)) for page in PAGES) >= 6


def test_the_run_of_the_readme_goes_on(lenient, names):
    """As in PyTorch: 50 steps there and 25 here are 75 steps there."""
    x, y = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))

    def train(net, optimizer, scheduler, steps=50):
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y[:, :10]).backward()
            optimizer.step()
            scheduler.step()

    @jax.jit
    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (aj.apply_updates(params, updates), state), None

    def loss(params):
        error = nnx.merge(graph, params)(jnp.array(x)) - jnp.array(y[:, :10])
        return (error**2).mean()

    torch.manual_seed(0)
    names["train"] = train
    there, here = (x for x in blocks(ROOT / "README.md") if "checkpoint.pt" in x)
    exec(there, names)
    theirs, *others = (names[name] for name in ("net", "optimizer", "scheduler"))
    start = [p.detach().clone() for p in theirs.parameters()]
    exec(here, names)
    graph, tx = nnx.graphdef(names["net"]), names["tx"]
    carry = names["params"], names["opt_state"]
    (params, _), _ = jax.lax.scan(step, carry, None, length=25)
    train(theirs, *others, steps=25)
    ours = aj.params_to_torch_state_dict(params, theirs.state_dict())
    for p0, (name, p) in zip(start, theirs.named_parameters(), strict=True):
        assert (ours[name] - p).abs().max() < 1e-4 * (p - p0).abs().max()
