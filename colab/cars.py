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
# # Your own pictures by the article's recipe
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/adamw_jax/blob/main/colab/cars.ipynb)
#
# `train/cars.py` on a GPU or a TPU: a ResNet-50 that knows ImageNet learns the classes
# of your pictures, as it learns those of Stanford Cars in fast.ai's article
# [AdamW and Super-convergence](https://www.fast.ai/posts/2018-07-02-adam-weight-decay.html)
# of 2018. First its head is trained alone, then all of it, with smaller learning rates
# in the body. On Colab, the device is under *Runtime > Change runtime type*.

# %% [markdown]
# **Install.** On Colab this clones the repository and installs what is missing, but
# leaves Colab's own jax as it is, since that one fits the device; it must be 0.10 or
# later. Anywhere else the notebook uses the checkout that it is in. `OWNER`, here and
# in the badge, is to be an account on GitHub: the repository has no public address yet.

# %%
import os
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlretrieve

from IPython.display import display

REPOSITORY = "https://github.com/OWNER/adamw_jax"
root = Path("." if Path("train").is_dir() else "..").resolve()
if "google.colab" in sys.modules:
    root, jax = Path("adamw_jax").resolve(), f"jax=={version('jax')}"
    # !test -d {root} || git clone --quiet --depth 1 {REPOSITORY} {root}
    # %pip install --quiet -c {root}/constraints.txt -e "{root}[train]" {jax}
sys.path.insert(0, str(root))

# %%
from PIL import Image

from train import cars

cars.devices.use_compilation_cache()

# %% [markdown]
# **Settings.** The epochs are the article's: 20 of the head alone and 40 of all. Its
# batches are of 128 images; they shrink by themselves where there are few. If the
# device runs out of memory, try fewer. Other pictures or settings need another `run`,
# the folder of the results.

# %%
data_dir, run = Path("pictures"), root / "runs" / "pictures"
weights = Path("resnet50-11ad3fa6.pth")  # torchvision's, of ImageNet
options = dict(weights=weights, frozen_epochs=20, epochs=40, batch_size=64)

# %% [markdown]
# For the tests only: a tiny network from scratch and coloured noise; nothing is
# downloaded or kept.

# %%
if "ADAMW_JAX_TINY" in os.environ:
    folder, weights = TemporaryDirectory(), None
    data_dir, run = (Path(folder.name, name) for name in ("pictures", "run"))
    options = dict(architecture="resnet18", width=4, size=32, epochs=1, batch_size=8)
    for path in (data_dir / c / f"{i}.png" for c in ("red", "blue") for i in range(10)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (48, 40), os.urandom(48 * 40 * 3)).save(path)

# %% [markdown]
# **Pictures**, in a folder for each class, whose name is that of the class. A fifth of
# each class is held out, unless the folders are in `train` and `valid`. On Colab, zip
# them as `pictures.zip`, drag it into the panel *Files* on the left and wait until it
# is there; or mount Google Drive there, and `data_dir` is a folder of it. Stanford Cars
# as published will do as well.

# %%
# !test -d "{data_dir}" || unzip -q pictures.zip -x "__MACOSX/*" -d "{data_dir}"
while len(inside := list(data_dir.glob("[!.]*/"))) == 1:  # the one that was zipped
    (data_dir,) = inside

# %% [markdown]
# **Weights**, 100 MB, unless they are there already. It takes PyTorch to read such a
# file; Colab has it.

# %%
if weights and not weights.exists():
    url = f"https://download.pytorch.org/models/{weights.name}"
    Path(urlretrieve(url, f"{weights}.part")[0]).rename(weights)

# %% [markdown]
# **Train.** Interrupt it and run the cell again: it goes on from its last checkpoint.
# (Colab's disk is lost with its machine.)

# %%
results = cars.main(cars.Config(data_dir, out=run.parent, name=run.name, **options))

# %% [markdown]
# **Look** at which classes are taken for which, how it was trained, and the worst
# mistakes on the pictures held out.

# %%
display(*(Image.open(path) for path in sorted(run.glob("*.png"))))

# %% [markdown]
# **Predict.** Here it is one of the pictures held out; yours is `Path("photo.jpg")`.

# %%
photo = cars.pictures.read(data_dir).valid.paths[0]
found = cars.predict(cars.Predict((photo,), run / "model-0.safetensors"))

# %% [markdown]
# **Download** the model. `python -m train.cars predict photo.jpg --model FILE` uses it;
# the names of its tensors are torchvision's.

# %%
if "google.colab" in sys.modules:
    from google.colab import files

    files.download(str(run / "model-0.safetensors"))
