"""Print the tests of what changed: `python tests/changed.py [COMMIT]`, default HEAD.

A file of adamw_jax/ or train/ is tested by the test file that mirrors it, or by the
mirrored folder's tests if there is none of its name; a test file by itself. (Not
pytest-testmon: it traces every line of Python, needs a full run before it knows
anything, and sees neither the commands that tests start nor the documents.)
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def changed_files(base: str) -> set[str]:
    """Paths that differ from a commit, and untracked ones that Git does not ignore."""
    commands = (
        ["git", "diff", "--name-only", "--diff-filter=d", base],
        ["git", "ls-files", "--others", "--exclude-standard"],
    )
    return {
        line
        for command in commands
        for line in subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.splitlines()
    }


def mirrors(path: Path) -> list[Path]:
    """The paths that pytest is given for one changed file."""
    if path.parts[0] == "tests":
        if path.name.startswith("test_"):
            return [path]
        # A conftest.py or a helper: the tests beside it, but not the whole suite.
        return [] if path.parent == Path("tests") else [path.parent]
    if path.parts[0] in ("adamw_jax", "train"):
        mirrored = Path("tests", path.parent)
        test = mirrored / f"test_{path.stem.lstrip('_')}.py"
        tests = [Path("tests/test_layout.py")]
        if (ROOT / test).exists():
            tests.append(test)
        elif len(path.parts) > 2 and (ROOT / mirrored).exists():
            tests.append(mirrored)
        # Doctests are in the library only.
        return tests + [path] * (path.parts[0] == "adamw_jax" and path.suffix == ".py")
    if path.suffix == ".md" or path.parts[0] == "colab":
        return [Path("tests/docs")]
    return []


def select(changed: Iterable[str]) -> list[str]:
    """The paths for all changed files, without those inside of others."""
    paths = {test for path in changed for test in mirrors(Path(path))}
    return sorted(str(path) for path in paths if not paths & set(path.parents))


if __name__ == "__main__":
    print(*select(changed_files(*sys.argv[1:] or ["HEAD"])))
