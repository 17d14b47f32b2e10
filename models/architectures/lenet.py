"""LeNet-5, the small network of many introductory courses."""

from torch import Tensor, nn


class LeNet5(nn.Module):
    """Two 5×5 convolutions with pooling, then three linear layers. Input (N, 3, H, W), H and W at least 16.

    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition", fig. 2.
    Deviations: three input channels; ReLU instead of the scaled tanh; max pooling instead of trainable subsampling; full connections in the
    second convolution; a plain linear output instead of RBF units. The inputs of the first linear layer depend on `image_size`: 400 for the
    paper's 32×32, more for larger images.
    """

    def __init__(self, num_classes: int, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = (((size - 4) // 2 - 4) // 2 for size in image_size)
        if min(height, width) < 1:
            raise ValueError(f"image_size={image_size}: lenet5 expected at least 16 pixels a side")
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.neck = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
        )
        self.head = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) of the `image_size` it was built for → logits (N, num_classes)."""
        return self.head(self.neck(self.features(images)))
