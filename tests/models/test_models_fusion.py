"""Fusion of images and texts: joined features, and missing, dropped or mixed inputs."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from refract.models.classifier import Classifier, probabilities
from refract.models.multimodal.fusion import FUSIONS, FiLM, Gated, Reader
from refract.models.multimodal.text_networks import BagOfNgrams
from refract.models.multimodal.tokens import HashedNgrams
from refract.models.pretrained.weights import load_weights
from refract.models.registry import build
from refract.models.training.lightning_module import ClassifierModule
from refract.pipeline.training.callbacks.averaging import KEY as AVERAGE
from refract.pipeline.training.callbacks.averaging import WeightAverage

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_fusions_by_their_formulas() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(3, 5), torch.randn(3, 4)
    film = FiLM(5, 4, 6)
    gamma, beta, text_term = film.of_text(text).split(6, dim=1)
    assert torch.allclose(film(image, text), ((1 + gamma) * film.of_image(image) + beta).relu() + text_term.relu())
    gated = Gated(5, 4, 6)
    z = torch.sigmoid(gated.gate(torch.cat([image, text], 1)))
    wanted = z * gated.of_image(image).tanh() + (1 - z) * gated.of_text(text).tanh()
    assert torch.allclose(gated(image, text), wanted, atol=1e-6)
    assert all(make(5, 4, 6)(image, text).shape == (3, 6) for make in FUSIONS.values())


class Flat(nn.Module):
    """Map images to their channel means, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([images.mean((2, 3))] * 2, dim=1))


def reader(**more) -> Reader:
    torch.manual_seed(0)
    return Reader(Flat(), BagOfNgrams(20, width=8, dropout=0.0), 3, **{"drop_image": 0.0, "drop_text": 0.0, **more})


def test_missing_inputs_are_ignored_and_present_inputs_count() -> None:
    network = reader().eval()
    nn.init.normal_(network.no_text), nn.init.normal_(network.no_image)
    images, texts = torch.rand(4, 3, 8, 8), torch.randint(1, 21, (4, 5))
    here, nowhere = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    whole = network(images, texts, here)
    assert not torch.allclose(whole, network(images, texts.flip(0), here))
    assert not torch.allclose(whole, network(images.flip(0), texts, here))
    assert torch.equal(network(images, texts, nowhere), network(torch.rand(4, 3, 8, 8), texts, nowhere))
    none = torch.zeros(4, 5, dtype=torch.int64)
    assert not torch.allclose(network(images, none, here), whole)
    assert torch.allclose(
        network(images[:1].expand(4, -1, -1, -1), none, here)[0], network(images, none, here)[0], atol=1e-6
    )


def test_modality_dropout_drops_the_fractions_and_never_both() -> None:
    network = reader(drop_image=0.3, drop_text=0.2)
    seen = {}
    network.fusion.register_forward_pre_hook(lambda _, given: seen.update(image=given[0], text=given[1]))
    nn.init.constant_(network.no_text, 7.0), nn.init.constant_(network.no_image, 9.0)
    images, texts, here = torch.rand(4000, 3, 2, 2), torch.randint(1, 21, (4000, 3)), torch.ones(4000, dtype=torch.bool)
    network.train()(images, texts, here)
    no_image, no_text = (seen["image"] == 9).all(1), (seen["text"] == 7).all(1)
    assert 0.26 < no_image.float().mean() < 0.34 and 0.16 < no_text.float().mean() < 0.24
    assert not (no_image & no_text).any()
    here[:2000], texts[2000:] = False, 0
    network(images, texts, here)
    no_image, no_text = (seen["image"] == 9).all(1), (seen["text"] == 7).all(1)
    assert torch.equal(no_image, ~here) and torch.equal(no_text, here), "of one alone nothing is dropped"
    network.eval()(images, texts, here)
    assert torch.equal((seen["image"] == 9).all(1), ~here)


def test_texts_are_mixed_with_the_weights_of_the_images() -> None:
    from refract.augment import Augmenter

    network = reader()
    classifier = Classifier(network, mean=MEAN, std=STD, tokens=HashedNgrams(buckets=20))
    augmenter = Augmenter([{"CutMix": {"p": 0.7}}, {"MixUp": {"p": 0.5, "alpha": 1.0}}], seed=2, size=8)
    module = ClassifierModule(classifier, task="multiclass", num_classes=3, mix=augmenter.mix)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    targets = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 2])]
    batch = {
        "indices": torch.arange(6),
        "texts": torch.randint(1, 21, (6, 4)),
        "has_image": torch.ones(6, dtype=torch.bool),
    }
    mixed_images, soft, shares = module._mixed(images, targets, batch)
    plain_images, plain_soft = augmenter.mix(images, targets, epoch=0, indices=torch.arange(6))
    assert torch.equal(mixed_images, plain_images) and torch.equal(soft, plain_soft)
    assert torch.allclose(shares @ targets, soft, atol=1e-6) and torch.allclose(shares.sum(1), torch.ones(6))
    assert (shares.diagonal() < 1).sum() > 0
    seen = {}
    network.fusion.register_forward_pre_hook(lambda _, given: seen.update(text=given[1]))
    classifier.eval()(mixed_images, batch["texts"], batch["has_image"], shares)
    assert torch.allclose(seen["text"], shares @ network.texts(batch["texts"]), atol=1e-5)
    nn.init.normal_(network.no_text)
    batch["texts"][:3] = 0
    classifier(mixed_images, batch["texts"], batch["has_image"], shares)
    text_vectors = torch.cat([network.no_text.expand(3, -1), network.texts(batch["texts"][3:])])
    assert torch.allclose(seen["text"], shares @ text_vectors, atol=1e-5), (
        "what is missing is filled in before it is mixed"
    )


class Normed(Flat):
    """Flat with a batch norm, as in networks of images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(images))


@pytest.mark.parametrize("count", [3, 1, 0])
def test_missing_images_do_not_change_batch_norm_statistics(count: int) -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(4, 3, 8, 8) * 3 + 5, torch.randint(1, 21, (4, 5))
    has_image = torch.arange(4) < count

    def learned(number: int) -> tuple[torch.Tensor, ...]:
        """From the first of them: the images' answers, their norm's gradient and its statistics."""
        torch.manual_seed(0)
        network = Reader(Normed(), BagOfNgrams(20, width=8, dropout=0.0), 3, drop_image=0.0, drop_text=0.0).train()
        answers = network(images[:number], texts[:number], has_image[:number])
        answers[:count].square().sum().backward()
        norm = network.images.norm
        return answers[:count], norm.weight.grad, norm.running_mean, norm.running_var, norm.num_batches_tracked

    *_, mean, variance, batches = values = learned(4)
    if count > 1:
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(values, learned(count), strict=True))
    else:
        assert not mean.any() and torch.equal(variance, torch.ones(3)) and batches == 0
        assert bool(values[1].any()) == (count == 1), "one alone is learned from"


def test_images_are_mixed_among_themselves() -> None:
    from refract.augment import Augmenter

    augmenter = Augmenter([{"MixUp": {"p": 1.0, "alpha": 1.0}}], seed=2, size=8)
    classifier = Classifier(reader(), mean=MEAN, std=STD)
    module = ClassifierModule(classifier, task="multiclass", num_classes=3, mix=augmenter.mix)
    images, targets = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.eye(3)[torch.arange(6) % 3]
    for there in ([1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0], [0] * 6):
        has_image = torch.tensor(there, dtype=torch.bool)
        batch = {"indices": torch.arange(6), "texts": torch.ones(6, 2, dtype=torch.int32), "has_image": has_image}
        shown, soft, shares = module._mixed(images, targets, batch | {"repeats": torch.arange(6)})
        assert torch.equal(shown[~has_image], images[~has_image].to(shown.dtype))
        assert torch.equal(shares[~has_image], torch.eye(6)[~has_image]) and torch.equal(
            soft[~has_image], targets[~has_image]
        )
        assert not shares[has_image][:, ~has_image].any()
        rows = has_image.nonzero().squeeze(1)
        wanted = augmenter.mix(images[rows], targets[rows], epoch=0, indices=rows, repeats=rows)
        assert torch.equal(shown[rows], wanted[0].to(shown.dtype)) and torch.equal(soft[rows], wanted[1])
        assert (
            len(rows) < 2 or (shares[rows].diagonal(dim1=0) < 1).any() or (shares[rows][:, rows].diagonal() < 1).any()
        )


def test_a_teacher_gets_only_the_inputs_that_it_reads() -> None:
    from refract.models.training.objective import classification_loss, distillation_loss
    from refract.models.training.specs import LossSpec

    images, texts = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.randint(1, 21, (4, 5))
    texts[3] = 0
    has_image = torch.tensor([True, False, True, True])
    student = Classifier(reader(), mean=MEAN, std=STD)
    torch.manual_seed(5)
    only_texts = Reader(None, BagOfNgrams(20, width=8), 3)
    nets = {"images": Flat(), "texts": only_texts, "both": Reader(Flat(), BagOfNgrams(20, width=8), 3)}
    for reads, network in nets.items():
        teacher = Classifier(network, mean=MEAN, std=STD)
        spec = LossSpec(distill=0.4, temperature=2.0)
        module = ClassifierModule(student, task="multiclass", num_classes=3, teacher=teacher, loss=spec)
        logits = student(images, texts, has_image)
        loss = classification_loss(logits, torch.tensor([0, 1, 2, 0]), task="multiclass")
        distilled_loss = module._distilled(loss, logits, teacher, (images, texts, has_image))
        known = {"images": has_image, "texts": texts[:, 0] > 0, "both": torch.ones(4, dtype=torch.bool)}[reads]
        asked = {"images": (images,), "texts": (None, texts), "both": (images, texts, has_image)}[reads]
        soft = distillation_loss(logits[known], teacher(*asked)[known], task="multiclass", temperature=2.0)
        assert torch.allclose(distilled_loss, torch.lerp(loss, soft, 0.4 * known.float().mean()), atol=1e-6), reads


def test_blocks_are_frozen_and_decayed_as_of_images() -> None:
    from refract.models.training.freezing import blocks_of

    network = reader()
    classifier = Classifier(network, mean=MEAN, std=STD)
    classifier.train_blocks(1)
    assert {name.partition(".")[0] for name, p in network.named_parameters() if p.requires_grad} == {"head", "fusion"}
    deep = Reader(build("resnet20", 3, image_size=(32, 32)), BagOfNgrams(20, width=8), 3)
    blocks, names = blocks_of(deep), {id(parameter): name for name, parameter in deep.named_parameters()}
    assert sorted(names[id(p)] for block in blocks for p in block) == sorted(names.values()), "each in one block"
    last = {names[id(p)].partition(".")[0] for p in blocks[-2]}
    assert last == {"images", "texts"}, "both networks end as far from the head"
    assert len(blocks) == len(blocks_of(build("resnet20", 3, image_size=(32, 32)))), "the deeper one counts"
    with torch.no_grad():
        logits = classifier.eval()(torch.zeros(1, 3, 4, 4), torch.ones(1, 2, dtype=torch.long))
    assert probabilities(logits, task="multiclass").sum() == pytest.approx(1)


def in_former_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict as earlier versions stored it."""
    return {key.replace(".images.", ".pictures.").replace("no_image", "no_picture"): weights[key] for key in weights}


@pytest.fixture
def classifiers() -> tuple[Classifier, Classifier]:
    """Two with different weights. The first has a normed network of images."""
    torch.manual_seed(0)
    pair = [
        Classifier(
            Reader(Normed(), BagOfNgrams(20, width=8), 3),
            mean=MEAN,
            std=STD,
            tokens=HashedNgrams(buckets=20, max_length=4),
        )
        for _ in range(2)
    ]
    for parameter in pair[0].parameters():
        nn.init.normal_(parameter)
    return pair[0], pair[1]


def test_weights_of_an_earlier_version_load(classifiers: tuple[Classifier, Classifier], tmp_path: Path) -> None:
    source, other = classifiers
    weights = source.state_dict()
    stored = in_former_names(weights)
    assert {"network.pictures.norm.weight", "network.no_picture"} <= set(stored)
    other.load_state_dict(stored, strict=True)
    assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())

    start = other.network
    nn.init.zeros_(start.no_image)
    safetensors.torch.save_file(stored, tmp_path / "weights.safetensors")
    report = load_weights(start, start.head, tmp_path / "weights.safetensors")
    assert set(report.loaded) == set(start.state_dict()) and torch.equal(start.no_image, source.network.no_image)


def test_an_average_of_an_earlier_version_resumes(classifiers: tuple[Classifier, Classifier]) -> None:
    module = ClassifierModule(classifiers[0], task="multiclass", num_classes=3)
    weights = {key: value.clone() for key, value in module.state_dict().items() if key.startswith("classifier.")}
    average = WeightAverage(decay=0.5)
    stored = {"weights": in_former_names(weights), "count": 1, "last_step": 1}
    average.on_load_checkpoint(None, module, {AVERAGE: stored})
    checkpoint: dict = {}
    average.on_save_checkpoint(None, module, checkpoint)
    assert set(checkpoint[AVERAGE]["weights"]) == set(weights)
