"""A convolutional network of interchangeable layers, so that a YAML file can try each of them."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from refract.models.architectures.mlp import check_dropout
from refract.models.layers.activations import make_activation, pieces_of
from refract.models.layers.convolutions import make_conv
from refract.models.layers.norms import make_norm, standardise_weights
from refract.models.layers.pooling import make_global_pool, make_pool


class CNN(nn.Module):
    """Stages of convolution, norm and activation, each followed by pooling; then global pooling, dropout and a linear head.

    - widths: channels of each stage
    - depth: convolutions of a stage
    - conv, norm, activation, pool, global_pool: names in `refract.models.layers`; with conv `3d` the three channels are a stack of slices
    - activation_args: arguments of the activation
    - kernel: side in pixels, odd
    - residual: add the input of every convolution after a stage's first to its output
    - drop_path: fraction of the samples, in [0, 1), that skip a residual branch in training; it rises linearly from the first branch to the
      last (stochastic depth: Huang et al. 2016, arXiv:1603.09382)
    - dropout: before the head, in [0, 1)

    ValueError for another value.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: tuple[int, int],
        widths: Sequence[int] = (32, 64, 128),
        depth: int = 1,
        conv: str = "plain",
        kernel: int = 3,
        norm: str = "batch",
        activation: str = "relu",
        activation_args: Mapping[str, float] | None = None,
        pool: str = "max",
        global_pool: str = "average",
        residual: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not widths or any(not isinstance(width, int) or width < 1 for width in widths) or depth < 1:
            raise ValueError(f"widths={list(widths)}, depth={depth!r}: expected whole numbers above 0")
        if min(image_size) < 2 ** len(widths):
            raise ValueError(
                f"image_size={image_size}: expected at least {2 ** len(widths)} pixels on each side for {len(widths)} stages"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path!r}: expected a fraction in [0, 1)")
        if not isinstance(residual, bool):
            raise ValueError(f"residual={residual!r}: expected true or false")
        if drop_path and not (residual and depth > 1):
            raise ValueError(
                f"drop_path={drop_path!r} needs residual branches: set residual: true and a depth of at least 2"
            )
        check_dropout("none", dropout)
        self.dims = 3 if conv == "3d" else 2
        args = dict(activation_args or {})
        inputs, branches, total = (1 if self.dims == 3 else 3), 0, len(widths) * (depth - 1)
        stages: list[nn.Module] = []
        for width in widths:
            for index in range(depth):
                block: nn.Module = nn.Sequential(*self._layers(inputs, width, conv, kernel, norm, activation, args))
                if residual and index:
                    branches += 1
                    block = Residual(block, drop_path * branches / total)
                stages.append(block)
                inputs = width
            stages.append(make_pool(pool))
        self.stages = nn.Sequential(*stages)
        self.pool = make_global_pool(global_pool)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(inputs, num_classes)

    def _layers(
        self, inputs: int, width: int, conv: str, kernel: int, norm: str, activation: str, args: dict[str, float]
    ) -> list[nn.Module]:
        units = width * pieces_of(activation, args)
        layer = make_conv(conv, inputs, units, kernel=kernel, bias=norm == "none")
        if norm == "weight_standardisation" and conv == "transposed":
            raise ValueError(
                "norm='weight_standardisation' does not support conv='transposed'; choose another norm or conv"
            )
        if norm == "weight_standardisation":
            for module in list(layer.modules()):
                if isinstance(module, nn.Conv2d | nn.Conv3d):
                    standardise_weights(module)
        return [layer, make_norm(norm, units, dims=self.dims), make_activation(activation, **args)]

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) → logits (N, num_classes)."""
        values = images.unsqueeze(1) if self.dims == 3 else images
        return self.head(self.dropout(self.pool(self.stages(values))))


class Residual(nn.Module):
    """x + branch(x); in training a fraction `drop` of the samples skips the branch."""

    def __init__(self, branch: nn.Module, drop: float) -> None:
        super().__init__()
        from torchvision.ops import StochasticDepth

        self.branch = branch
        self.drop = StochasticDepth(drop, "row")

    def forward(self, values: Tensor) -> Tensor:
        return values + self.drop(self.branch(values))
