"""Each notebook equals the script next to it. `make notebooks` runs them."""

import re
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "colab").glob("*.ipynb"))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    cells, expected = (
        [(cell.cell_type, cell.source) for cell in pair.cells]
        for pair in (notebook, script)
    )
    assert cells == expected, f"jupytext --update --to ipynb colab/{path.stem}.py"
    assert notebook.metadata["kernelspec"]["name"] == "python3"  # any Python's

    assert not any(cell.outputs or cell.execution_count for cell in code(notebook))
    lines = "\n".join(cell.source for cell in code(notebook)).splitlines()
    assert len([line for line in lines if re.match(r"\s*[^\s#]", line)]) <= 40

    # The badge opens this notebook in the repository that it clones.
    (repository,) = re.findall(
        r'REPOSITORY = "https://github.com/(.*)"', "\n".join(lines)
    )
    badge = f"https://colab.research.google.com/github/{repository}/blob/main/colab/"
    assert f"({badge}{path.name})" in notebook.cells[0].source


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["cars", "cifar10", "language_model"]
