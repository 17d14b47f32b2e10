"""The classifier: its normalisation, the freezing of the backbone, probabilities."""

import pytest
import torch
from torch import Tensor, nn

from refract.models.classifier import Classifier, probabilities
from refract.models.registry import build
from refract.models.tasks import TASKS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_pixels_are_scaled_and_normalised_per_channel(images: Tensor) -> None:
    before = images.clone()
    result = Classifier(nn.Flatten(), mean=MEAN, std=STD)(images).view(4, 3, 32, 32)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(result[:, channel].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.float16])
def test_any_dtype_gives_the_same_result(images: Tensor, dtype: torch.dtype) -> None:
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=MEAN, std=STD)
    assert torch.equal(classifier(images.to(dtype)), classifier(images))


def test_under_autocast_the_normalisation_stays_float32(images: Tensor) -> None:
    """bfloat16 is coarser than the pixels; the layers of the network still use autocast."""
    classifier = Classifier(nn.Identity(), mean=MEAN, std=STD)
    exact = classifier(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = classifier(images)
    assert result.dtype == torch.float32 and torch.equal(result, exact)


def test_channels_last_stays() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).to(memory_format=torch.channels_last)
    result = Classifier(nn.Identity(), mean=MEAN, std=STD)(images)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_normalisation_travels_with_the_weights(images: Tensor) -> None:
    first = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=MEAN, std=STD)
    second = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=(0, 0, 0), std=(1, 1, 1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images), second(images))


def test_bad_numbers_and_shapes_are_refused() -> None:
    for mean, std in [((0.5,), STD), (MEAN, (0.1, 0.2, 0.0)), ((0.1, 0.2, float("nan")), STD)]:
        with pytest.raises(ValueError, match="three"):
            Classifier(nn.Identity(), mean=mean, std=std)
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\): expected \(N, 3, H, W\)"):
        Classifier(nn.Identity(), mean=MEAN, std=STD)(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "resnet18", "timm/mobilenetv3_small_050", "squeezenet1_1"])
def test_a_frozen_backbone_trains_only_the_head(name: str) -> None:
    torch.manual_seed(0)
    classifier = Classifier(build(name, 3, image_size=(48, 48)), mean=MEAN, std=STD).train_blocks(1)
    before = {key: tensor.clone() for key, tensor in classifier.state_dict().items()}
    classifier.eval().train()
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.1)
    images = torch.randint(0, 256, (4, 3, 48, 48))
    nn.functional.cross_entropy(classifier(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    moved = {key for key, tensor in classifier.state_dict().items() if not torch.equal(tensor, before[key])}
    # Batch norm's running statistics are in the state dict: they would be among the moved.
    assert len(moved) == 2
    assert {before[key].shape[0] for key in moved} == {3}


def test_a_frozen_backbones_dropout_is_off_and_the_head_trains() -> None:
    classifier = Classifier(build("alexnet", 3, image_size=(64, 64)), mean=MEAN, std=STD).train_blocks(1).train()
    images = torch.randint(0, 256, (2, 3, 64, 64))
    assert torch.equal(classifier(images), classifier(images))
    assert classifier.training and classifier.network.classifier[-1].training
    assert not classifier.eval().network.classifier[-1].training


def test_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    for task in ("binary", "multiclass"):
        torch.testing.assert_close(probabilities(logits, task=task), torch.tensor([[0.268941, 0.731059]]))
    torch.testing.assert_close(probabilities(logits, task="multilabel"), torch.tensor([[0.5, 0.731059]]))
    hot = probabilities(logits, task="multiclass", temperature=2.0)
    torch.testing.assert_close(hot, torch.tensor([[0.377541, 0.622459]]))


def test_probabilities_refuse_an_unknown_task_and_temperature() -> None:
    with pytest.raises(ValueError, match=rf"task='multi-label': expected one of {', '.join(TASKS)}.*'multilabel'"):
        probabilities(torch.zeros(1, 2), task="multi-label")
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature="):
            probabilities(torch.zeros(1, 2), task="binary", temperature=temperature)


@pytest.mark.parametrize("autocast", [False, True])
def test_mean_image_and_whitening(images: Tensor, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(3, 32, 32, generator=generator)
    matrix = torch.randn(3072, 3072, generator=generator) / 50
    exact = images.double() / 255 - image.double()
    for normalize, expected in (
        ("mean_image", exact / torch.tensor(STD).view(3, 1, 1)),
        ("zca", (exact.flatten(1) @ matrix.double().T).view(exact.shape)),
    ):
        arrays = {"mean_image": image, "whitening": matrix if normalize == "zca" else None}
        first = Classifier(nn.Identity(), mean=MEAN, std=STD, normalize=normalize, image_size=(32, 32), **arrays)
        second = Classifier(nn.Identity(), mean=MEAN, std=STD, normalize=normalize, image_size=(32, 32))
        second.load_state_dict(first.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = second(images)
        torch.testing.assert_close(
            result.double(), expected, atol=2e-2 if autocast else 1e-4, rtol=1e-2 if autocast else 1e-4
        )


def test_normalisation_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="normalize='whiten': expected one of channel, mean_image, pca, zca"):
        Classifier(nn.Identity(), mean=MEAN, std=STD, normalize="whiten")
    with pytest.raises(ValueError, match="needs image_size"):
        Classifier(nn.Identity(), mean=MEAN, std=STD, normalize="zca")
    with pytest.raises(ValueError, match=r"mean_image of shape \(3, 5, 4\): expected \(3, 4, 4\)"):
        Classifier(
            nn.Identity(),
            mean=MEAN,
            std=STD,
            normalize="mean_image",
            image_size=(4, 4),
            mean_image=torch.zeros(3, 5, 4),
        )
