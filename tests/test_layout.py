"""The rules of the layout (CONTRIBUTING.md), read from the sources without importing.

Imports are those of the whole module, also the ones inside functions.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = sorted((ROOT / "train").glob("*.py"))
ROOMS = ["recipes", "models", "data", "evals", "plots", "run", "references"]
LIBRARY = ROOT / "adamw_jax"
# The library's core, which knows none of its extras.
CORE_FILES = (
    *("optimizers", "hyperparams", "overrides", "masks", "apply"),
    *("_tree", "_checks", "_dtypes", "_foreign", "_transformation"),
)
CORE = [LIBRARY / f"{name}.py" for name in CORE_FILES]
CORE += [
    p for room in ("transforms", "schedules") for p in (LIBRARY / room).glob("*.py")
]
EXTRAS = [
    f"adamw_jax.{name}"
    for name in (
        *("wrappers", "pytorch", "fused", "lr_finder", "optax_state"),
        *("nnx", "linen"),
    )
]


def name(path: Path) -> str:
    """The path below the root, for the ids of tests and for messages."""
    return path.relative_to(ROOT).as_posix()


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(tree: ast.Module, module: str, is_package: bool = False) -> set[str]:
    """Dotted names of what a module imports: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def imports_of(path: Path) -> set[str]:
    return imports(parse(path), module_name(path), path.name == "__init__.py")


def within(imported: set[str], modules: list[str]) -> list[str]:
    """The imported names that are one of the modules, or in one."""
    return sorted(
        name
        for name in imported
        if any(name == module or name.startswith(f"{module}.") for module in modules)
    )


def is_command(tree: ast.Module) -> bool:
    """Whether the module has `if __name__ == "__main__":`."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree.body
    )


READS_AND_WRITES = {
    *("read_text", "read_bytes", "write_text", "write_bytes"),
    *("mkdir", "unlink", "rename", "touch", "rmdir"),
}


def input_and_output(tree: ast.Module) -> list[str]:
    """Calls of print and open, and of pathlib's methods that read or write."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("print", "open"):
            found.append(f"line {node.lineno}: {function.id}")
        if isinstance(function, ast.Attribute):
            dotted = ast.unparse(function)
            if function.attr in {*READS_AND_WRITES, "open"} or dotted == (
                "jax.debug.print"
            ):
                found.append(f"line {node.lineno}: {dotted}")
    return found


@pytest.mark.parametrize("path", COMMANDS, ids=name)
def test_a_file_directly_in_train_is_a_command(path):
    assert is_command(parse(path)), "what is imported belongs in a folder"


@pytest.mark.parametrize(
    "path", [*COMMANDS, *sources("train/bench", "train/measure")], ids=name
)
def test_no_command_imports_another(path):
    others = [module_name(other) for other in COMMANDS if other != path]
    assert not within(imports_of(path), others)


@pytest.mark.parametrize("path", sources(*(f"train/{r}" for r in ROOMS)), ids=name)
def test_no_room_imports_a_command(path):
    assert not within(imports_of(path), [module_name(other) for other in COMMANDS])


@pytest.mark.parametrize("path", sources("train/recipes"), ids=name)
def test_a_recipe_does_no_input_or_output(path):
    """Configuration, network, optimizer, one step; the command reads and writes."""
    tree = parse(path)
    rooms = [f"train.run.{room}" for room in ("folder", "log", "checkpoint", "report")]
    assert not within(
        imports_of(path), ["train.plots", "matplotlib", "logging", *rooms]
    )
    assert not input_and_output(tree)


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_imports_no_extra(path):
    imported = imports_of(path)
    # A name of the package, instead of a module, would bring the extras along.
    names = {
        item.split(".")[1] for item in within(imported, ["adamw_jax"]) if "." in item
    }
    assert all((LIBRARY / n).is_dir() or (LIBRARY / f"{n}.py").exists() for n in names)
    assert not within(imported, EXTRAS)


@pytest.mark.parametrize("path", sources("adamw_jax"), ids=name)
def test_only_two_modules_need_flax(path):
    """The package imports them at their first use."""
    if path.stem not in ("nnx", "linen"):
        assert not within(
            imports_of(path), ["flax", "adamw_jax.nnx", "adamw_jax.linen"]
        )


@pytest.mark.parametrize(
    "path", sources("train/models", "train/data", "train/evals"), ids=name
)
def test_a_leaf_imports_leaves_only(path):
    rooms = [f"train.{room}" for room in ("run", "plots", "recipes", "bench")]
    assert not within(imports_of(path), rooms)


@pytest.mark.parametrize("path", COMMANDS, ids=name)
def test_a_command_is_read_in_one_sitting(path):
    """At most 400 lines, of which no function has more than 60."""
    lines = path.read_text("utf-8").count("\n")
    assert lines <= 400
    functions = [
        node
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: length for name, length in lengths.items() if length > 60}


# ---- the reading itself --------------------------------------------------------------


def test_imports_are_found_wherever_they_stand():
    tree = ast.parse(
        "import a.b\n"
        "from c import d as e\n"
        "from . import f\n"
        "from ..g import h\n"
        "def function():\n    from train import cars\n"
    )
    expected = {"a.b", "c", "c.d", "p.q", "p.q.f", "p.g", "p.g.h"}
    assert imports(tree, "p.q.r") == expected | {"train", "train.cars"}
    package = imports(ast.parse("from . import x"), "p.q", is_package=True)
    assert package == {"p.q", "p.q.x"}
    assert within({"train.cars", "train.cars2", "train"}, ["train.cars"]) == [
        "train.cars"
    ]


def test_input_and_output_is_found():
    text = "print(1)\nopen('x')\npath.read_text()\nx.at[0].set(1)\njax.debug.print('')"
    assert [line.split()[1] for line in input_and_output(ast.parse(text))] == [
        *("1:", "2:", "3:", "5:")
    ]
    assert is_command(ast.parse("if __name__ == '__main__':\n    main()"))
    assert not is_command(ast.parse("def main():\n    pass"))


def test_there_is_something_to_read():
    assert len(COMMANDS) > 5 and len(CORE) > 5
    assert {"optimizers.py", "masks.py", "apply.py"} <= {path.name for path in CORE}
    for room in ROOMS:
        assert sources(f"train/{room}"), room
