"""The README's Python runs as it stands."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import torch

from train import tabulate
from train.run import record

README = Path(__file__).parents[2] / "README.md"


def test_tables_are_those_of_the_results():
    """No number in the README was typed by hand."""
    text = README.read_text("utf-8")
    for name in ("compare-digits", "compare-cifar10"):
        results = (README.parent / "docs" / "results" / name / "results.md").read_text(
            "utf-8"
        )
        table = re.findall(r"^\|.*\n", results, re.MULTILINE)
        assert len(table) == 7 and "".join(table) in text
        finding = re.findall(r"\*\*(.*)\*\*", results)[-1]
        assert finding in " ".join(text.split())


def test_the_tables_of_cifar10():
    text = README.read_text("utf-8")
    results = README.parent / "docs" / "results" / "cifar10"
    assert tabulate.table(results / "cpu") in text
    assert (results / "bench-cpu" / "bench.md").read_text("utf-8").strip() in text
    found = json.loads((results / "lr-find-cpu" / "lr_find.json").read_text("utf-8"))
    assert f"Suggested learning rate: {found['suggestion']:.2g}" in text


def test_the_tables_of_language_models():
    text = README.read_text("utf-8")
    results = README.parent / "docs" / "results"
    assert tabulate.table(results / "language_model" / "cpu") in text
    for name in ("article", "lstm", "qrnn"):
        folder = results / "language_model" / f"bench-{name}-cpu"
        assert (folder / "bench.md").read_text("utf-8").strip() in text
    for model in ("lstm", "qrnn"):
        path = results / "language_model" / "cpu" / f"{model}-adam-l2" / "cache-0.json"
        tuned = json.loads(path.read_text("utf-8"))
        best = " / ".join(f"{tuned[split]['tuned']:.2f}" for split in ("valid", "test"))
        assert best in text
    (epoch,) = record.lines_of(results / "wikitext2" / "cpu-first-epoch", "epoch", 0)
    assert f"validation loss {epoch['valid_loss']:.3f}" in text


def test_the_tables_of_cars():
    text = README.read_text("utf-8")
    results = README.parent / "docs" / "results" / "cars" / "cpu"
    assert tabulate.table(results) in text
    (body,) = record.lines_of(results / "cifar10-body", "end", 0)
    accuracy = f"test accuracy {body['plain_accuracy']:.2f} %"
    assert accuracy in " ".join(text.split())
    assert (results / "bench" / "bench.md").read_text("utf-8").strip() in text


def test_the_tables_of_updates():
    text = README.read_text("utf-8")
    folder = README.parent / "docs" / "results" / "update" / "cpu"
    assert tabulate.table(folder) in text
    for name in ("tiny", "flatten", "accumulate"):
        assert (folder / name / "bench.md").read_text("utf-8").strip() in text


def test_the_table_of_moments_in_eight_bits():
    text = README.read_text("utf-8")
    path = README.parent / "docs" / "results" / "low-memory" / "results.md"
    assert path.read_text("utf-8").strip() in text


def test_the_table_of_the_run_that_changes_the_library():
    text = README.read_text("utf-8")
    folder = README.parent / "docs" / "results" / "continue-from-torch"
    assert (folder / "results.md").read_text("utf-8").strip() in text


def test_code_blocks(lenient, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    tree = {"body": {"kernel": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
    named = [("body.weight", torch.ones(2)), ("head.bias", torch.ones(2))]
    checkpoint = {
        "model": dict(named),
        "optimizer": torch.optim.AdamW(named).state_dict(),
    }
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: checkpoint)
    names = {"params": tree, "grads": tree, "optax": optax, "jax": jax}
    names["loss"] = lambda params: sum(x.sum() for x in jax.tree.leaves(params))
    for block in blocks:
        exec(block, names)
        names["tx"].update(tree, names["tx"].init(tree), tree)
