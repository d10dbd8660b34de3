"""The residual networks for CIFAR of He et al. (2016), with and without their shortcuts.

Depth 6n + 2: a 3×3 convolution, three stages of n two-convolution blocks with 16, 32 and 64 channels, global
average pooling and a linear layer; 0.27 million parameters at depth 20. Shortcuts are the paper's option A
(subsample, pad the new channels with zeros: no parameters). Parameter names are those of the widely used
akamaster/pytorch_resnet_cifar10, so that its published checkpoints fit. Without shortcuts they are the
"noshort" networks of Li et al. (2018), same parameters, same names.

References:
    He et al. (2016), Deep Residual Learning for Image Recognition, §4.2.
    Li et al. (2018), Visualizing the Loss Landscape of Neural Nets, §5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn.functional import pad, relu


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, added to their input.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of the first convolution.
        shortcut: Whether the input is added at all.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.stride, self.padding, self.shortcut = stride, outputs - inputs, shortcut
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, inputs, h, w)` to `(n, outputs, h / stride, w / stride)`."""
        residual = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(residual + self._identity(x) if self.shortcut else residual)

    def _identity(self, x: Tensor) -> Tensor:
        """Option A: every `stride`-th pixel, new channels zero, half of them on either side."""
        before = self.padding // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return pad(x, (0, 0, 0, 0, before, self.padding - before)) if self.padding else x


class CifarResNet(nn.Module):
    """A residual network of depth 6n + 2 for small images.

    Args:
        depth: Number of layers with weights: 6n + 2.
        classes: Number of outputs.
        channels: Channels of the input image.
        width: Channels of the first stage (16 in the paper).
        shortcut: Whether blocks add their input; False gives the "noshort" network.

    Raises:
        ValueError: The depth is not 6n + 2.
    """

    def __init__(
        self, depth: int = 20, classes: int = 10, channels: int = 3, width: int = 16, shortcut: bool = True
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6n + 2")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1, shortcut)
        self.layer2 = _stage(width, 2 * width, blocks, 2, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, shortcut)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, channels, h, w)` images to `(n, classes)` outputs."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcut: bool) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))


RESNETS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)}
)
