"""Runs of `train.compare` and `train.low_memory` as a plain PyTorch loop.

The same network, initial weights, batches, learning rates and momenta, step by step, in
one thread: what the runs would cost in PyTorch. PyTorch is imported inside functions,
so that `train.compare` works without it.
"""

import importlib.util
import time
from typing import Any

import numpy as np
from flax import nnx

from adamw_jax import Phases

TIME_LIMIT = 2.0  # seconds after which a run is stopped and its time extrapolated


def is_available() -> bool:
    return importlib.util.find_spec("torch") is not None


def time_run(
    name: str,
    run: dict[str, Any],
    cycle: Phases,
    train_x: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
) -> dict[str, Any]:
    """Trains with the foreach and the fused implementation of torch.optim.

    Args:
        name: of the optimizer, as in `train.compare`.
        run: from `train.recipes.compare.select_runs`: lr, decay, params, order, ...
        cycle: schedules of b1, and of the learning rate with a peak of 1.
        train_x: training images, normalised, and padded if the run has crops.
        test_x: test images, normalised.
        test_y: their labels.

    Returns:
        {seconds, accuracy in %} of the faster one. The seconds are those of the whole
        run without evaluation; the accuracy is None if the run was stopped.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = (train_x, test_x, test_y)
        _train(name, False, run, cycle, *data, time_limit=0.1)  # warm up
        foreach, fused = (
            _train(name, fused, run, cycle, *data, time_limit=TIME_LIMIT)
            for fused in (False, True)
        )
        return foreach if foreach["seconds"] < fused["seconds"] else fused
    finally:
        torch.set_num_threads(threads)


def _train(
    name, fused, run, cycle, train_x, test_x, test_y, *, time_limit: float
) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F

    from train.references.wide_resnet import crop_and_flip

    net = make_network(run["params"])
    optimizer = _make_optimizer(name, net.parameters(), float(run["decay"]), fused)
    (group,) = optimizer.param_groups
    x, y = torch.from_numpy(train_x), torch.from_numpy(run["labels"]).long()
    order = torch.from_numpy(run["order"]).long()
    crops = torch.from_numpy(run["crops"]).long() if "crops" in run else None
    values = [cycle.at(step) for step in range(len(order))]

    seconds, start = 0.0, time.perf_counter()
    for step, index in enumerate(order):
        group["lr"] = float(run["lr"]) * values[step]["learning_rate"]
        if name == "sgd":
            group["momentum"] = values[step]["b1"]
        else:
            group["betas"] = (values[step]["b1"], 0.99)
        batch = x[index] if crops is None else crop_and_flip(x, index, crops[step])
        optimizer.zero_grad()
        F.cross_entropy(net(batch), y[index]).backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        if seconds > time_limit:
            return {"seconds": seconds * len(order) / (step + 1), "accuracy": None}

    net.eval()
    with torch.no_grad():
        guess = net(torch.from_numpy(test_x)).argmax(-1).numpy()
    return {"seconds": seconds, "accuracy": 100 * float((guess == test_y).mean())}


def _make_optimizer(name, params, decay, fused):
    import torch

    options: dict[str, Any] = {"weight_decay": decay, "lr": 1.0}
    options |= {"fused": True} if fused else {"foreach": True}
    if name == "sgd":  # learning rate and momentum are set at every step
        return torch.optim.SGD(params, momentum=0.9, **options)
    optimizer = torch.optim.AdamW if name.endswith("w") else torch.optim.Adam
    return optimizer(params, amsgrad=name.startswith("amsgrad"), **options)


def make_network(params: nnx.State) -> Any:
    """The PyTorch twin of a network in `train.models.small`, with these parameters."""
    from torch import from_numpy, nn
    from torch.nn import functional as F

    arrays = {}
    for path, param in nnx.to_flat_state(params):
        array = np.array(param[...])  # a copy, since PyTorch trains in place
        if array.ndim > 1:  # flax has (..., in, out), torch (out, in, ...)
            array = np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))
        arrays[".".join(map(str, path))] = array

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(*arrays["hidden.kernel"].shape[::-1])
            self.head = nn.Linear(*arrays["head.kernel"].shape[::-1])

        def forward(self, x):
            return self.head(F.relu(self.hidden(x)))

    class CNN(nn.Module):
        def __init__(self):
            super().__init__()
            kernels = [a for name, a in arrays.items() if name.startswith("convs")]
            self.convs = nn.ModuleList(
                nn.Conv2d(k.shape[1], k.shape[0], 3, 1 if i else 2, bias=False)
                for i, k in enumerate(kernels)
            )
            self.norms = nn.ModuleList(nn.BatchNorm2d(k.shape[0]) for k in kernels)
            self.head = nn.Linear(*arrays["head.kernel"].shape[::-1])

        def forward(self, x):
            x = x.permute(0, 3, 1, 2)  # a view: the memory stays channels last
            for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
                x = conv(F.pad(x, (1, 1, 1, 1) if i else (0, 1, 0, 1)))
                x = F.max_pool2d(x, 2) if i else x
                x = F.relu(norm(x))
            return self.head(x.mean((2, 3)))

    net = MLP() if "hidden.kernel" in arrays else CNN()
    for name, array in arrays.items():
        name = name.replace("kernel", "weight").replace("scale", "weight")
        net.get_parameter(name).data = from_numpy(array)
    return net
