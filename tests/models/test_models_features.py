"""One forward pass gives the logits and the embedding of any network."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from refract.models.classifier import Classifier
from refract.models.features import FeatureClassifier
from refract.models.head import head_inputs
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import BagOfNgrams
from refract.models.registry import build


def classifier_of(name: str, size: int = 32, **args: str) -> Classifier:
    network = build(name, 5, image_size=(size, size), weights="none", **args)
    return Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3).eval()


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("resnet20", 32, {}),
        ("resnet20", 32, {"head": "mlp"}),
        ("resnet20", 32, {"head": "cosine"}),
        ("resnet20", 32, {"head": "knn"}),
        ("squeezenet1_1", 64, {}),
        ("timm/deit_tiny_distilled_patch16_224", 224, {}),
    ],
)
def test_the_embedding_is_the_pooled_input_of_the_head(name: str, size: int, args: dict[str, str]) -> None:
    classifier = classifier_of(name, size, **args)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    with torch.inference_mode(), head_inputs(classifier.network) as features:
        expected = classifier(images)
    network = FeatureClassifier(classifier)
    for one in (network, copy.deepcopy(network)):
        with torch.inference_mode():
            classifier(images[:1])  # a call of the classifier alone does not disturb the next
            logits, embedding = one(images)
        assert torch.equal(logits, expected)
        torch.testing.assert_close(embedding, features[0])


def test_a_neighbour_head_is_exported_with_the_settings_of_its_state_dict() -> None:
    fitted = classifier_of("resnet20", head="knn")
    fitted.network.head.remember(torch.rand(30, 64), torch.eye(5)[torch.arange(30) % 5], 7, multilabel=True)
    loaded = classifier_of("resnet20", head="knn")
    loaded.load_state_dict(fitted.state_dict())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    exported = torch.export.export(FeatureClassifier(loaded), (images,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(exported(images)[0], fitted(images))


def test_the_embedding_of_a_multimodal_network_is_the_fused_one() -> None:
    reader = Reader(build("lenet5", 5, image_size=(32, 32)), BagOfNgrams(100, width=16), 5, width=24)
    classifier = Classifier(reader, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    inputs = torch.zeros(2, 3, 32, 32), torch.ones(2, 7, dtype=torch.int32), torch.tensor([True, False])
    with torch.inference_mode():
        logits, embedding = FeatureClassifier(classifier)(*inputs)
        torch.testing.assert_close(reader.head(embedding), logits)
    assert embedding.shape == (2, 24)


def test_concurrent_threads_get_their_own_embeddings() -> None:
    network = FeatureClassifier(classifier_of("lenet5"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    def embeddings(index: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [network(images[index : index + 1])[1] for _ in range(100)]

    expected = [embeddings(index)[0] for index in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for index, rows in enumerate(pool.map(embeddings, (0, 1))):
            torch.testing.assert_close(torch.cat(rows), expected[index].expand(100, -1), atol=1e-5, rtol=1e-5)
