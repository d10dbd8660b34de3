"""Standard research networks by name: `builtin:mlp`, `cnn`, `allcnn`, `resnet20` …, `rnn`, `lstm`.

Small, without dependencies, and made of operations that can be differentiated twice and vectorised. Parameter
names are part of the interface: checkpoints on disk refer to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from dynprobe.io.recurrent import RowClassifier
from dynprobe.io.resnets import RESNETS

ACTIVATIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "relu": nn.ReLU,
        "tanh": nn.Tanh,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "sigmoid": nn.Sigmoid,
        "softplus": nn.Softplus,
        "identity": nn.Identity,
    }
)


class MLP(nn.Module):
    """Fully connected network: `depth` hidden layers of `width` units, then a linear `head`.

    Args:
        inputs: Number of input features; images are flattened.
        width: Units per hidden layer.
        depth: Number of hidden layers; 0 is a linear model.
        classes: Number of outputs.
        activation: One of `ACTIVATIONS`.
        bias: Whether the layers have biases.
    """

    def __init__(
        self,
        inputs: int = 64,
        width: int = 64,
        depth: int = 1,
        classes: int = 10,
        activation: str = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
        widths = [inputs] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias) for a, b in itertools.pairwise(widths))
        # One module per layer, so that a hook can tell the layers' activations apart.
        self.activation = nn.ModuleList(ACTIVATIONS[activation]() for _ in self.hidden)
        self.head = nn.Linear(widths[-1], classes, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, …)` inputs, flattened, to `(n, classes)` outputs."""
        x = x.flatten(1)
        for layer, activation in zip(self.hidden, self.activation, strict=True):
            x = activation(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


class CNN(nn.Module):
    """Three 3×3 convolutions (`width`, 2 `width`, 4 `width` channels), global average pooling, `fc`.

    Each convolution is followed by BatchNorm (unless `batch_norm=False`) and ReLU, the first two by 2×2 max
    pooling as well. Any image size of at least 4×4 will do; rows of pixels are folded to square images.

    Args:
        width: Channels of the first convolution.
        classes: Number of outputs.
        channels: Channels of the input image.
        batch_norm: Whether to normalise; without it the convolutions have biases.
    """

    def __init__(
        self, width: int = 16, classes: int = 10, channels: int = 1, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.channels = channels
        sizes = (channels, width, 2 * width, 4 * width)

        def convolution(i: int) -> nn.Conv2d:
            return nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=not batch_norm)

        def norm(i: int) -> nn.Module:
            return nn.BatchNorm2d(sizes[i + 1]) if batch_norm else nn.Identity()

        self.conv1, self.bn1, self.relu1, self.pool1 = convolution(0), norm(0), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.bn2, self.relu2, self.pool2 = convolution(1), norm(1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv3, self.bn3, self.relu3 = convolution(2), norm(2), nn.ReLU()
        self.fc = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, channels, height, width)` images, or `(n, pixels)` rows, to `(n, classes)` outputs."""
        x = as_images(x, self.channels)
        x = self.pool1(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu2(self.bn2(self.conv2(x))))
        x = self.relu3(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class AllCNN(nn.Module):
    """All-CNN-C: seven 3×3 and two 1×1 convolutions, stride 2 instead of pooling, no linear layer.

    Args:
        classes: Number of outputs.
        channels: Channels of the input image.
        width: Channels of the first three convolutions (96 in the paper); the rest have twice as many.
        dropout: Whether to drop 20 % of the input and 50 % after each stride-2 layer when training.

    References:
        Springenberg et al. (2015), Striving for Simplicity: The All Convolutional Net, Table 1 (model C).
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 96, dropout: bool = True) -> None:
        super().__init__()
        # (out channels, kernel, stride, padding); the seventh is unpadded: the paper pools over 6 × 6.
        layers = [(width, 3, 1, 1)] * 2 + [(width, 3, 2, 1)]
        layers += [(2 * width, 3, 1, 1)] * 2 + [(2 * width, 3, 2, 1)]
        layers += [(2 * width, 3, 1, 0), (2 * width, 1, 1, 0), (classes, 1, 1, 0)]
        self.channels = channels
        self.features = nn.Sequential()
        if dropout:
            self.features.append(nn.Dropout(0.2))
        for out, kernel, stride, padding in layers:
            self.features.append(nn.Conv2d(channels, out, kernel, stride, padding))
            self.features.append(nn.ReLU())
            if dropout and stride == 2:
                self.features.append(nn.Dropout(0.5))
            channels = out

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, channels, height, width)` images to `(n, classes)` outputs."""
        return self.features(as_images(x, self.channels)).mean((2, 3))  # type: ignore[no-any-return]


def as_images(x: Tensor, channels: int) -> Tensor:
    """`(n, pixels)` rows or `(n, height, width)` grey images as `(n, channels, height, width)`.

    Raises:
        ValueError: The number of pixels is not that of a square image with so many channels.
    """
    if x.ndim == 4:
        return x
    if x.ndim == 3 and channels == 1:
        return x.unsqueeze(1)
    pixels = x[0].numel()
    side = math.isqrt(pixels // channels)
    if channels * side * side != pixels:
        raise ValueError(f"inputs of shape {tuple(x.shape)} are no square images with channels={channels}")
    return x.reshape(-1, channels, side, side)


def rnn(inputs: int = 28, width: int = 64, depth: int = 1, classes: int = 10) -> nn.Module:
    """Elman network with tanh over the rows of an image, or the steps of a sequence; see `RowClassifier`."""
    return RowClassifier("rnn", inputs, width, depth, classes)


def lstm(inputs: int = 28, width: int = 64, depth: int = 1, classes: int = 10) -> nn.Module:
    """LSTM over the rows of an image, or the steps of a sequence; see `RowClassifier`."""
    return RowClassifier("lstm", inputs, width, depth, classes)


BUILTIN: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"mlp": MLP, "cnn": CNN, "allcnn": AllCNN, **RESNETS, "rnn": rnn, "lstm": lstm}
)
