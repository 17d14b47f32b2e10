"""Where a network looked, on networks whose reasons are known."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.classifier import Classifier
from models.networks import build
from serve.app import create_app
from serve.explain import Explainer, png


class RedOrBlue(nn.Module):
    """Logits: how much red and how much blue there is; its last map is the two colours, halved in size, after an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Conv2d(3, 2, 2, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.pick.weight.zero_()
            self.pick.weight[0, 0] = self.pick.weight[1, 2] = 1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.relu(self.pick(images)).mean(dim=(2, 3))


def picture() -> np.ndarray:
    """Red above left, blue below right, black elsewhere."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[2:10, 2:10, 0] = 255
    pixels[20:30, 20:30, 2] = 255
    return pixels


def test_the_heat_lies_where_the_label_is() -> None:
    classifier = Classifier(RedOrBlue(), mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    explainer = Explainer(classifier, picture())
    assert explainer.available
    red, blue = (explainer.heat(picture(), label) for label in (0, 1))
    assert red.shape == (32, 32) and red.max() == blue.max() == 1 and red.min() >= 0
    assert red[3:9, 3:9].min() > 0.9 and red[12:].max() == 0
    assert blue[21:29, 21:29].min() > 0.9 and blue[:18].max() == 0
    assert not explainer.heat(np.zeros((32, 32, 3), np.uint8), 0).any(), "nothing speaks for it"
    layer = np.asarray(Image.open(io.BytesIO(png(red))))
    assert layer.shape == (32, 32, 4) and layer[5, 5, 3] > 150 and layer[25, 25, 3] == 0
    assert layer[5, 5, 0] > layer[5, 5, 2], "hot is red"


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "fastnet", "torchvision/mobilenet_v3_small"])
def test_networks_can_be_explained_while_they_answer(name: str) -> None:
    torch.manual_seed(0)
    classifier = Classifier(build(name, 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    explainer, images = Explainer(classifier, picture()), torch.rand(4, 3, 32, 32) * 255
    with torch.inference_mode():
        alone = classifier(images)
    heat = explainer.heat(picture(), 1)

    def answer(_: int) -> bool:
        with torch.inference_mode():
            return torch.allclose(classifier(images), alone, atol=1e-5)

    with ThreadPoolExecutor(2) as pool:
        answers, heats = pool.map(answer, range(20)), pool.map(lambda _: explainer.heat(picture(), 1), range(20))
        assert all(answers) and all(np.allclose(again, heat, atol=1e-4) for again in heats)
    assert not any(parameter.grad is not None for parameter in classifier.parameters())


def test_the_layer_is_found_while_others_ask() -> None:
    """Another thread's forward pass ends, in the middle of ours, in the layer before ours."""

    class Asked(RedOrBlue):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found = super().forward(images)
            if not self.asked:
                self.asked = True
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(lambda: self.pick(torch.zeros(1, 3, 32, 32))).result()
            return found

    network = Asked()
    network.asked = False
    explainer = Explainer(Classifier(network, mean=(0.0,) * 3, std=(1.0,) * 3).eval(), picture())
    assert explainer._layer is network.relu


def test_a_network_without_places_has_no_explanation() -> None:
    classifier = Classifier(build("mlp", 3, image_size=(32, 32)), mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    assert not Explainer(classifier, picture()).available


def test_the_answer_carries_a_picture_of_the_networks_size(bundle, serving) -> None:
    data = io.BytesIO()
    Image.fromarray(picture()).save(data, "PNG")
    with serving(create_app(bundle)) as client:
        answer = client.post("/v1/predict?explain=true", content=data.getvalue())
        (found,) = answer.json()["predictions"]
        assert Image.open(io.BytesIO(base64.b64decode(found["explanation"]))).size == (32, 32)
        assert "explain;dur=" in answer.headers["server-timing"]
        plain = client.post("/v1/predict", content=data.getvalue()).json()["predictions"][0]
        assert "explanation" not in plain and plain["top"] == found["top"]
