"""`train.models.wide_resnet` in PyTorch: equal in float64, and timed beside it."""

import torch
from torch import nn


class Block(nn.Module):
    """Pre-activated; the shortcut starts from the activated tensor."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if n_in != n_out:
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x):
        x = self.norm1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return 0.2 * self.conv2(self.norm2(self.conv1(x)).relu()) + shortcut


class WideResNet(nn.Module):
    """Takes NCHW images, returns logits."""

    def __init__(self, blocks=3, width=96, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        layers, n_in = [], 16
        for stage in range(3):
            for i in range(blocks):
                n_out = width * 2**stage
                layers.append(Block(n_in, n_out, 2 if stage and i == 0 else 1))
                n_in = n_out
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(n_in)
        self.head = nn.Linear(n_in, classes)

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x))).relu()
        return self.head(x.mean((2, 3)))


def crop_and_flip(x: torch.Tensor, index: torch.Tensor, crops: torch.Tensor):
    """Crops some of the padded NHWC images in one gather; see `train.data.batches`."""
    row, column, flip = crops.long().T[..., None]
    pixels = torch.arange(32, device=x.device)
    columns = torch.where(flip == 1, 31 - pixels, pixels) + column
    return x[index[:, None, None], (row + pixels)[..., None], columns[:, None]]
