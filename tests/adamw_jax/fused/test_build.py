"""The kernel's library: compiled once, kept, repaired, done without."""

import os
import shutil
import subprocess
import sys

import pytest
from ways import needs_kernel

from adamw_jax.fused import build

CODE = """
import warnings, jax.numpy as jnp, adamw_jax as aj
from adamw_jax.fused import build, kernel
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tx, p = aj.adamw(0.1), jnp.ones(3)
    for _ in range(2):
        p, state = aj.update_and_apply(tx, p, tx.init(p), p)
print([str(w.message)[:40] for w in caught], p[0], build.why_no_kernel(), sep="|")
"""


def in_process(tmp_path, **env):
    names = {
        k: v for k, v in os.environ.items() if k not in ("CXX", "ADAMW_JAX_KERNEL")
    }
    env = names | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | env
    out = subprocess.run(
        [sys.executable, "-c", CODE],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    warned, p, why = out.stdout.strip().split("|", 2)
    assert float(p) == pytest.approx(0.8, abs=1e-3)
    return warned, why


@pytest.mark.slow
def test_switched_off(tmp_path):
    warned, why = in_process(tmp_path, ADAMW_JAX_KERNEL="0")
    assert (warned, why) == ("[]", "ADAMW_JAX_KERNEL is 0")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [shutil.which("false"), "/no/such/compiler"])
def test_a_compiler_that_fails(tmp_path, compiler):
    """One warning, whatever is computed after it; nothing is left behind."""
    warned, why = in_process(tmp_path, CXX=compiler)
    assert warned == "['adamw_jax runs without its CPU kernel: i']"
    assert why.startswith("it cannot be compiled and loaded")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
@needs_kernel
def test_a_compiler_that_does_not_know_the_processor(tmp_path):
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *native*) exit 1;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    script.chmod(0o755)
    assert in_process(tmp_path, CXX=str(script)) == ("[]", "None")


@pytest.mark.slow
def test_a_command_that_cannot_be_read(tmp_path):
    warned, why = in_process(tmp_path, CXX='c++ "')
    assert warned == "['adamw_jax runs without its CPU kernel: i']"
    assert "No closing quotation" in why


@pytest.mark.slow
@needs_kernel
def test_a_relative_cache_is_none(tmp_path, monkeypatch):
    """As its specification says; nothing is written where the program happens to be."""
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / "home")
    assert in_process(tmp_path, XDG_CACHE_HOME="cache", HOME=home) == ("[]", "None")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.slow
def test_no_compiler(tmp_path):
    warned, why = in_process(tmp_path, PATH=str(tmp_path))
    assert (warned, why[:24]) == ("[]", "there is no C++ compiler")


@pytest.mark.slow
@needs_kernel
def test_it_is_compiled_once(tmp_path):
    assert in_process(tmp_path) == ("[]", "None")
    (path,) = (tmp_path / "adamw_jax").iterdir()
    made = path.stat().st_mtime_ns
    assert in_process(tmp_path, PATH=os.environ["PATH"]) == ("[]", "None")
    assert [x.stat().st_mtime_ns for x in path.parent.iterdir()] == [made]


@pytest.mark.slow
@needs_kernel
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "adamw_jax").write_text("a file where a folder should be")
    assert in_process(tmp_path) == ("[]", "None")


@pytest.mark.slow
@needs_kernel
def test_a_damaged_kernel_is_made_anew(tmp_path):
    in_process(tmp_path)
    (path,) = (tmp_path / "adamw_jax").iterdir()
    path.write_bytes(b"no library")
    assert in_process(tmp_path) == ("[]", "None")


# ---- in this process, where the kernel is loaded already ----------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "adamw_jax"


@pytest.mark.parametrize("command", [shutil.which("false"), 'c++ "'])
def test_a_failure_is_one_warning(cache, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.warns(RuntimeWarning, match="adamw_jax runs without its CPU kernel"):
        why = build._load.__wrapped__()
    assert why.startswith("it cannot be compiled and loaded")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_no_compiler_is_no_warning(cache, monkeypatch):
    monkeypatch.setenv("PATH", str(cache))
    assert build._load.__wrapped__().startswith("there is no C++ compiler")
