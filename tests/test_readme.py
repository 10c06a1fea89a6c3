"""The README's Python runs as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
import optax

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks(lenient):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    tree = {"body": {"kernel": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
    names = {"params": tree, "grads": tree, "optax": optax}
    for block in blocks:
        exec(block, names)
        names["tx"].update(tree, names["tx"].init(tree), tree)
