"""ResNet-20, the residual network for small images."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), both convolutions 3×3. (N, in, H, W) → (N, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, in, H, W). The shortcut is the paper's option A: every second pixel, zeros for new channels."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        # A pad of width 0 would still copy the tensor.
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(shortcut + residual)


class ResNet20(nn.Module):
    """3×3 stem, three stages of three blocks with 16, 32 and 64 channels, global average pooling, one linear layer.

    Input (N, 3, H, W) of any size from 8 pixels a side. 0.27 million parameters, as in the paper's table 6.
    Source: He et al. 2016, arXiv:1512.03385, section 4.2, n = 3, shortcuts of option A (without parameters).
    Initialisation: He et al. 2015, arXiv:1502.01852, by fan-out.
    """

    def __init__(self, num_classes: int, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        if min(image_size) < 8:
            raise ValueError(f"image_size={image_size}: resnet20 expected at least 8 pixels a side")
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2)]
        blocks = [BasicBlock(i, o, stride=stride) for i, o, stride in [*widths, (64, 64, 1), (64, 64, 1)]]
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) → logits (N, num_classes)."""
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))
