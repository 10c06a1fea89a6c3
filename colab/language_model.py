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
# of 2018, evaluated without and with the neural cache, and text that it generates. On
# Colab, choose the device under *Runtime > Change runtime type*.

# %% [markdown]
# **Install.** On Colab this clones the repository and installs what is missing, but
# keeps Colab's own jax, which fits the device; it must be 0.10 or later. Elsewhere, the
# notebook uses the checkout that contains it. `OWNER`, here and in the badge, stands
# for an account on GitHub: the repository has no public address yet.

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
    root, jax = Path("adamw_jax").resolve(), f"jax=={version('jax')}"
    # !test -d {root} || git clone --quiet --depth 1 {REPOSITORY} {root}
    # %pip install --quiet -c {root}/constraints.txt -e "{root}[train]" {jax}
sys.path.insert(0, str(root))

# %%
import jax

from train import generate, language_model, tune_cache
from train.run import devices

devices.use_compilation_cache()
print({name: version(name) for name in ("adamw_jax", "jax", "flax")}, jax.devices())

# %% [markdown]
# **Settings.** Without a folder, the text is the documentation that comes with Python
# and the network is small: two minutes on a CPU. A folder with
# `wiki.{train,valid,test}.tokens` trains the article's network for 90 epochs of
# WikiText-2; one with `{train,valid,test}.txt` trains it on your own text.

# %%
model, recipe, data_dir = "lstm", "adam-l2", None  # or Path("wikitext-2")
out = root / "runs"

# %% [markdown]
# For the tests only: a tiny network and one epoch, without keeping anything.

# %%
config = language_model.defaults(model, recipe, small=data_dir is None)
if "ADAMW_JAX_TINY" in os.environ:
    folder = TemporaryDirectory()
    out, tiny = Path(folder.name), {"embedding": 8, "width": 8, "lengths": 1}
    config = dataclasses.replace(config, **tiny, epochs=1, batch_size=200, bptt=5)

# %% [markdown]
# **Train.** If you interrupt it, run the cell again: it resumes from its last
# checkpoint.

# %%
config = dataclasses.replace(config, data_dir=data_dir, out=out)
results = language_model.main(config)
run = out / language_model.run_name(config)
Image(str(run / "curves.png"))

# %% [markdown]
# **The neural cache**, tuned on the validation text: recent words are likely to
# appear again.

# %%
tuned = tune_cache.main(tune_cache.Config(run))

# %% [markdown]
# **Generate** text.

# %%
texts = generate.main(generate.Config(run, prompt="the value of the", tokens=150))
