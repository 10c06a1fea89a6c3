# ---
# jupyter:
#   accelerator: GPU
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CIFAR-10 by the article's recipe
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/adamw_jax/blob/main/colab/cifar10.ipynb)
#
# `train/cifar10.py` on a GPU or a TPU: the wide residual network of fast.ai's article
# [AdamW and Super-convergence](https://www.fast.ai/posts/2018-07-02-adam-weight-decay.html)
# of 2018, trained with AdamW and 1cycle for 18 epochs and evaluated with test-time
# augmentation. Batches are split over all devices, including the cores of a TPU. On
# Colab, choose the device under *Runtime > Change runtime type*.

# %% [markdown]
# **Install.** On Colab this clones the repository and installs what is missing, but
# keeps Colab's own jax, which fits the device; it must be 0.10 or later. Anywhere else
# the notebook uses its own checkout. `OWNER`, here and in the badge, stands for an
# account on GitHub: the repository has no public address yet.

# %%
import dataclasses
import os
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlretrieve

from IPython.display import Image

REPOSITORY = "https://github.com/OWNER/adamw_jax"
root = Path("." if Path("train").is_dir() else "..").resolve()
if "google.colab" in sys.modules:
    root, jax = Path("adamw_jax").resolve(), f"jax=={version('jax')}"
    # !test -d {root} || git clone --quiet --depth 1 {REPOSITORY} {root}
    # %pip install --quiet -c {root}/constraints.txt -e "{root}[train]" {jax}
sys.path.insert(0, str(root))

# %% [markdown]
# **Devices.** On a CPU every core is a device, if their number divides a batch.
# Compiled programs are kept in `~/.cache`.

# %%
import jax
import numpy as np

from train import cifar10, lr_find
from train.data import cifar10 as data
from train.run import devices

devices.use_all_cores(batch_size=128)
devices.use_compilation_cache()
print({name: version(name) for name in ("adamw_jax", "jax", "flax")}, jax.devices())

# %% [markdown]
# **Settings.**

# %%
size = {}  # {"blocks": 1, "width": 16} is a smaller network
data_dir = Path.home() / ".cache" / "adamw_jax"  # of the publisher's archive
out, name = root / "runs", "colab"  # other settings need another name

# %% [markdown]
# For the tests only: a tiny network and random images; nothing is downloaded or kept.

# %%
if "ADAMW_JAX_TINY" in os.environ:
    folder, data_dir, batch = TemporaryDirectory(), None, 4 * jax.device_count()
    out, size = Path(folder.name), {"blocks": 1, "width": 4, "batch_size": batch}
    x = np.random.default_rng(0).integers(0, 256, (20 * batch, 32, 32, 3), np.uint8)
    data.read_cifar10 = lambda _: 2 * [data.Images(x, np.arange(len(x)) % 10)]

# %% [markdown]
# **Data.** Downloads the publisher's archive, 170 MB, unless it exists.
# `train/data/cifar10.py` checks the MD5 of every file in it.

# %%
if data_dir and not (archive := data_dir / "cifar-10-python.tar.gz").exists():
    data_dir.mkdir(parents=True, exist_ok=True)
    urlretrieve(data.CIFAR10_URL + archive.name, archive.with_suffix(".part"))
    archive.with_suffix(".part").rename(archive)

# %% [markdown]
# **Run.** If it is interrupted, the same cell resumes from the last epoch saved in
# `runs/colab`. (Colab's disk is lost with its machine.) The other recipes are in
# `cifar10.RECIPES`; 5 seeds are five networks, as in the averages of the article.

# %%
changes = {"data_dir": data_dir, "out": out, "name": name, "seeds": 1, **size}
results = cifar10.main(dataclasses.replace(cifar10.RECIPES["adamw-18-tta"], **changes))

# %% [markdown]
# **Result.** The cell above ends with the accuracy on the test images, beside the
# article's. Loss, accuracy and learning rate, epoch by epoch:

# %%
Image(filename=str(out / name / "curves.png"))

# %% [markdown]
# **A learning rate to start from**, if you change the network: an epoch in which the
# rate grows until the loss diverges.

# %%
found = lr_find.main(lr_find.Cifar10(data_dir, out=out, **size))
Image(filename=str(found / "lr_find.png"))
