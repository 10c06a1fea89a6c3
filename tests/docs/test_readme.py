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
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_blocks(page, lenient, monkeypatch, tmp_path):
    """In order, with a model's parameters and gradients, and a checkpoint."""
    tree = {"body": {"kernel": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
    named = [("body.weight", torch.ones(2)), ("head.bias", torch.ones(2))]
    checkpoint = {
        "model": dict(named),
        "optimizer": torch.optim.AdamW(named).state_dict(),
    }
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: checkpoint)
    names = {"params": tree, "grads": tree, "aj": aj, "optax": optax, "jax": jax}
    names |= {"cycle": aj.one_cycle(3e-3, steps=100), "path": tmp_path / "checkpoint"}
    names["loss"] = lambda params: sum(x.sum() for x in jax.tree.leaves(params))
    for block in blocks(page):
        exec(block, names)
        names["tx"].update(tree, names["tx"].init(tree), tree)


def test_pages_with_code_are_found():
    assert sum(bool(blocks(page)) for page in PAGES) >= 6
