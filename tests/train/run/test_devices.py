"""train.devices: what the scripts run on."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from train.run import devices


@pytest.mark.parametrize(
    ("cores", "batch_size", "expected"),
    [(2, None, 2), (2, 128, 2), (12, 128, 8), (6, 128, 4), (7, None, 7), (3, 5, 1)],
)
def test_as_many_cores_as_divide_a_batch(monkeypatch, cores, batch_size, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    devices.use_all_cores(batch_size)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == f"--xla_force_host_platform_device_count={expected}"
    assert flags[-1] == "--mine"  # the last one wins


@pytest.mark.slow
def test_devices_and_cache_of_a_fresh_process(tmp_path):
    code = (
        "from train.run import devices\n"
        "devices.use_all_cores(); devices.use_compilation_cache()\n"
        "import jax\n"
        "print(devices.data_mesh().size, jax.config.jax_compilation_cache_dir)"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        env.pop(name, None)
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    size, cache = out.stdout.split()
    assert int(size) == len(os.sched_getaffinity(0))
    assert cache.startswith(str(tmp_path / "adamw_jax" / "jaxlib-"))
    env["JAX_COMPILATION_CACHE_DIR"] = "/mine"
    out = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.split()[1] == "/mine"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ({"platform": "cpu"}, "float32"),
        ({"platform": "tpu"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "7.5"}, "float32"),  # T4
    ],
)
def test_bfloat16_where_the_device_computes_with_it(monkeypatch, device, expected):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**device)])
    assert devices.compute_dtype("auto") == expected
    assert devices.compute_dtype("float32") == "float32"
