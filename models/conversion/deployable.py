"""The network of an export: from the pixels of a decoder to probabilities, without any of Refract's code around it."""

from torch import Tensor, nn

from refract.models.classifier import Classifier, probabilities

OUTPUTS = ("probabilities", "logits")


class Deployable(nn.Module):
    """Map images to probabilities: the layout of networks, the normalisation, the network, the temperature.

    images: (N, H, W, 3) uint8, RGB in 0…255, of the classifier's image size. Returns (probabilities, logits), both (N, C) float32. Rows of
    probabilities sum to 1, for multilabel each is a sigmoid. The logits are those before the temperature.
    ValueError for a classifier that reads texts.
    """

    def __init__(self, classifier: Classifier, *, task: str, temperature: float) -> None:
        super().__init__()
        if classifier.reads != {"images"}:
            raise ValueError("the network reads texts: expected a network that reads only images")
        self.classifier, self.task, self.temperature = classifier.eval(), task, temperature
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(images.permute(0, 3, 1, 2)).float()
        return probabilities(logits, task=self.task, temperature=self.temperature), logits
