"""`train.models.resnet` in PyTorch, the reference for the tests in float64.

torchvision's ResNet with `avgpool = ConcatPool()` and another `fc`. A model written by
`train.cars` loads into either.
"""

import torch
from torch import nn

LAYERS = {  # whether blocks are bottlenecks, number of blocks at each resolution
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
}


def conv(n_in, n_out, size, stride=1):
    return nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)


def downsample(n_in, n_out, stride):
    if n_in == n_out and stride == 1:
        return None
    return nn.Sequential(conv(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))


class BasicBlock(nn.Module):
    def __init__(self, n_in, n_mid, stride):
        super().__init__()
        self.conv1 = conv(n_in, n_mid, 3, stride)
        self.bn1 = nn.BatchNorm2d(n_mid)
        self.conv2 = conv(n_mid, n_mid, 3)
        self.bn2 = nn.BatchNorm2d(n_mid)
        self.downsample = downsample(n_in, n_mid, stride)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + shortcut).relu()


class Bottleneck(nn.Module):
    """The 3 x 3 convolution has the stride."""

    def __init__(self, n_in, n_mid, stride):
        super().__init__()
        self.conv1 = conv(n_in, n_mid, 1)
        self.bn1 = nn.BatchNorm2d(n_mid)
        self.conv2 = conv(n_mid, n_mid, 3, stride)
        self.bn2 = nn.BatchNorm2d(n_mid)
        self.conv3 = conv(n_mid, 4 * n_mid, 1)
        self.bn3 = nn.BatchNorm2d(4 * n_mid)
        self.downsample = downsample(n_in, 4 * n_mid, stride)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + shortcut).relu()


class ConcatPool(nn.Module):
    """Maximum and mean over the feature map, in this order."""

    def forward(self, x):
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


def head(features, classes):
    """fast.ai's, on the output of `ConcatPool`."""
    return nn.Sequential(
        nn.BatchNorm1d(2 * features),
        nn.Dropout(0.25),
        nn.Linear(2 * features, 512),
        nn.ReLU(),
        nn.BatchNorm1d(512),
        nn.Dropout(0.5),
        nn.Linear(512, classes),
    )


class ResNet(nn.Module):
    """Body and head: NCHW images to logits."""

    def __init__(self, architecture="resnet50", width=64, classes=196):
        super().__init__()
        bottleneck, counts = LAYERS[architecture]
        block, expansion = (Bottleneck, 4) if bottleneck else (BasicBlock, 1)
        self.conv1 = conv(3, width, 7, 2)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        n_in, layers = width, []
        for i, count in enumerate(counts):
            blocks: list[nn.Module] = []
            for j in range(count):
                blocks.append(block(n_in, width * 2**i, 2 if i and not j else 1))
                n_in = width * 2**i * expansion
            layers.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool = ConcatPool()
        self.fc = head(n_in, classes)

    def maps(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        return self.fc(self.avgpool(self.maps(x)))
