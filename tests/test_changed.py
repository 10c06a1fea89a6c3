"""Which tests `make check` runs for a changed file."""

import pytest
from changed import select


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            ["adamw_jax/masks.py"],
            ["adamw_jax/masks.py", "tests/adamw_jax/test_masks.py"],
        ),
        (["train/cars.py"], ["tests/train/test_cars.py"]),
        (["adamw_jax/fused/kernel.cc"], ["tests/adamw_jax/fused/test_kernel.py"]),
        (["train/measure/cars.sh"], ["tests/train/measure"]),
        (["tests/adamw_jax/test_masks.py"], ["tests/adamw_jax/test_masks.py"]),
        (["README.md", "tests/docs/test_readme.py"], ["tests/docs"]),
        (["tests/reference.py", "LICENSE"], []),
    ],
)
def test_a_file_is_tested_by_its_mirror(changed, expected):
    tests = select(changed)
    if changed[0].startswith(("adamw_jax", "train")):
        assert "tests/test_layout.py" in tests
    assert [test for test in tests if test != "tests/test_layout.py"] == expected
