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
# # A language model by the article's recipe
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/adamw_jax/blob/main/colab/language_model.ipynb)
#
# `train/language_model.py` on a GPU or a TPU: the AWD-LSTM or AWD-QRNN of fast.ai's
# article
# [AdamW and Super-convergence](https://www.fast.ai/posts/2018-07-02-adam-weight-decay.html)
# of 2018, judged without and with the neural cache, and text by what was trained. On
# Colab, the device is under *Runtime > Change runtime type*.

# %% [markdown]
# **Install.** On Colab this clones the repository and installs what is missing, but
# leaves Colab's own jax as it is, since that one fits the device; it must be 0.10 or
# later. Anywhere else the notebook uses the checkout that it is in. `OWNER`, here and
# in the badge, is to be an account on GitHub: the repository has no public address yet.

# %%
import dataclasses
import os
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from IPython.display import Image

REPOSITORY = "https://github.com/OWNER/adamw_jax"
root = Path("." if Path("train").is_dir() else "..").resolve()
if "google.colab" in sys.modules:
    root = Path("adamw_jax").resolve()
    # !test -d {root} || git clone --quiet --depth 1 {REPOSITORY} {root}
    # %pip install --quiet --editable "{root}[train]" "jax=={version('jax')}"
sys.path.insert(0, str(root))

# %%
import jax

from train import generate, language_model, tune_cache
from train.run import devices

devices.use_compilation_cache()
print({name: version(name) for name in ("adamw_jax", "jax", "flax")}, jax.devices())

# %% [markdown]
# **Settings.** Without a folder, the text is the documentation that comes with Python
# and the network is small: two minutes on a CPU. With one that has
# `wiki.{train,valid,test}.tokens` it is the article's, in 90 epochs of WikiText-2; with
# one that has `{train,valid,test}.txt` it is trained on a text of your own.

# %%
model, recipe, data_dir = "lstm", "adam-l2", None  # or Path("wikitext-2")
out = root / "runs"

# %% [markdown]
# For the tests only: a tiny network, one epoch; nothing is kept.

# %%
config = language_model.defaults(model, recipe, small=data_dir is None)
if "ADAMW_JAX_TINY" in os.environ:
    folder = TemporaryDirectory()
    out, tiny = Path(folder.name), {"embedding": 8, "width": 8, "lengths": 1}
    config = dataclasses.replace(config, **tiny, epochs=1, batch_size=200, bptt=5)

# %% [markdown]
# **Train.** Interrupt it and run the cell again: it goes on from its last checkpoint.

# %%
config = dataclasses.replace(config, data_dir=data_dir, out=out)
results = language_model.main(config)
run = out / language_model.name_of(config)
Image(str(run / "curves.png"))

# %% [markdown]
# **The neural cache**, tuned on the validation text: a word that was seen a while ago
# is likely to come again.

# %%
tuned = tune_cache.main(tune_cache.Config(run))

# %% [markdown]
# **Read** what was trained.

# %%
texts = generate.main(generate.Config(run, prompt="the value of the", tokens=150))
