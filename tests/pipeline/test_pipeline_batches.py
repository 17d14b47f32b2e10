"""The network's batches: order, workers, memory and preparation."""

import threading
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_data import COLORS, config_of, make_image, write_image

from refract.augment import Augmenter, Preprocess
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.pipeline.data.datamodule import ImageDataModule, fits_memory
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.data.prepare import prepare_data
from refract.pipeline.data.train_order import RankShard, TrainOrder
from refract.pipeline.inference.scoring import SampleInput, score, views


def module_of(folder: Path, workers: int) -> ImageDataModule:
    manifest, _ = prepare_data(config_of(folder))
    return ImageDataModule(
        manifest,
        augmenter=Augmenter("imagenet", seed=11, size=16),
        preprocess=Preprocess(16, 16),
        batch_size=8,
        workers=workers,
    )


def batches_of(data: ImageDataModule, epochs: range) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    batches = []
    for epoch in epochs:
        data.order.set_epoch(epoch)
        batches += [torch.cat([batch["images"].flatten(), batch["indices"]]) for batch in loader]
    return batches


@pytest.mark.slow
def test_same_pixels_with_any_number_of_workers(folder: Path) -> None:
    expected = batches_of(module_of(folder, 0), range(2))
    assert not torch.equal(expected[0][:-8], expected[len(expected) // 2][:-8]), "epochs differ"
    for workers in (1, 4):
        for mine, theirs in zip(expected, batches_of(module_of(folder, workers), range(2)), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_workers_start_while_opencv_threads_run_in_the_parent(folder: Path) -> None:
    """Workers forked after OpenCV's thread pool had run waited forever for its lock; training hung without an error."""
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((4000, 4000, 3), np.uint8), (9, 9), 3)
    assert len(batches_of(module_of(folder, 1), range(1))) == 6


def test_same_pixels_after_a_restart_in_the_middle_of_an_epoch(folder: Path) -> None:
    expected = batches_of(module_of(folder, 0), range(2))
    per_epoch = len(expected) // 2
    restarted = module_of(folder, 2)
    restarted.order.resume(1, 3 * 8)
    rest = batches_of(restarted, range(1, 2))
    assert len(rest) == per_epoch - 3
    for mine, theirs in zip(expected[per_epoch + 3 :], rest, strict=True):
        assert torch.equal(mine, theirs)


def test_a_last_batch_of_one_image_is_dropped(folder: Path) -> None:
    data = module_of(folder, 0)
    data.train_set.samples = data.train_set.samples[:17]
    data.order.count = 17
    assert [len(batch["images"]) for batch in data.train_dataloader()] == [8, 8]


def test_balanced_order_draws_every_class_equally_often_and_every_image_of_the_largest() -> None:
    classes = [0] * 60 + [1] * 30 + [2] * 10
    order = TrainOrder(len(classes), seed=3, classes=classes)
    keys = list(order)
    counts = Counter(classes[index] for _, index, _ in keys)
    assert len(keys) == 100 and max(counts.values()) - min(counts.values()) <= 1
    drawn = Counter(index for _, index, _ in keys)
    # Within a class, no image is drawn twice before all are drawn once.
    for label in range(3):
        draw_counts = [drawn[i] for i, c in enumerate(classes) if c == label]
        assert max(draw_counts) - min(draw_counts) <= 1
    assert keys == list(TrainOrder(len(classes), seed=3, classes=classes))
    order.set_epoch(1)
    assert [key[1] for key in order] != [key[1] for key in keys]


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Images of one size."""
    for label in COLORS:
        for number in range(20):
            write_image(tmp_path / "alike" / label / f"{number:02}.png", make_image(label, number)[:, :24])
    return tmp_path / "alike"


def data_of(folder: Path, policy: list, **options) -> ImageDataModule:
    manifest, _ = prepare_data(config_of(folder))
    return ImageDataModule(
        manifest, augmenter=Augmenter(policy, seed=5), preprocess=Preprocess(32, 32), batch_size=7, **options
    )


def test_images_in_memory_are_augmented_and_measured_as_those_from_files(alike: Path) -> None:
    policy = [{"PadAndCrop": {"padding": 3}}, "HorizontalFlip", {"ColorJitter": {"brightness": 0.4}}]
    read, memory_data = data_of(alike, policy, workers=0), data_of(alike, policy, memory="always")
    assert memory_data.workers == 0 and memory_data.in_memory and not read.in_memory
    for one, other in (
        (read.train_dataloader(), memory_data.train_dataloader()),
        (read.val_dataloader(), memory_data.val_dataloader()),
    ):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("images", "targets", "indices"))


def test_the_batch_executor_augments_images_in_memory_on_the_device(alike: Path) -> None:
    policy = [{"PadAndCrop": {"padding": 3}}, "HorizontalFlip", {"ColorJitter": {"brightness": 0.4, "hue": 0.1}}]
    plain, device = data_of(alike, policy, memory="always"), data_of(alike, policy, memory="always", on_device=True)
    for a, b in zip(plain.train_dataloader(), device.train_dataloader(), strict=True):
        assert "keys" in b and "images" not in b, "the images are on the device already"
        done = device.on_after_batch_transfer(b, 0)
        assert "keys" not in done and torch.equal(a["indices"], done["indices"])
        assert (a["images"].float() - done["images"].float()).abs().mean() < 1


def test_images_of_one_size_are_kept_in_memory_if_they_fit(alike: Path) -> None:
    assert fits_memory(load_manifest(alike).samples)
    write_image(alike / "red" / "wide.png", make_image("red", 4))
    assert not fits_memory(load_manifest(alike).samples)


def test_test_time_augmentation_averages_logits() -> None:
    batch = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert [share for share, _ in views(batch, "none")] == [1]
    flips = list(views(batch, "flip"))
    assert [share for share, _ in flips] == [0.5, 0.5] and torch.equal(flips[1][1], batch.flip(-1))
    shifts = list(views(batch, "flip-shift"))
    assert sum(share for share, _ in shifts) == 1 and len(shifts) == 6
    assert torch.equal(shifts[2][1][..., 1:, 1:], batch[..., :-1, :-1].float())


def test_a_batch_of_images_with_different_sizes_is_rejected(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"in one batch; give Augmenter a size"):
        list(data_of(folder, ["HorizontalFlip"], workers=0).train_dataloader())


@pytest.mark.parametrize("classes", [None, [0] * 9 + [1] * 2])
def test_ranks_share_one_order(classes: list[int] | None) -> None:
    whole = list(TrainOrder(11, seed=3, classes=classes))
    shares = [list(TrainOrder(11, seed=3, classes=classes, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    together = [key for step in zip(*shares, strict=True) for key in step]
    assert together == [*whole, whole[0]], (
        "in the order of one rank, wrapped around so that all ranks have equally many"
    )
    resumed = TrainOrder(11, seed=3, classes=classes, rank=1, world_size=3)
    resumed.resume(0, 6)
    assert list(resumed) == shares[1][2:]
    fewer = [TrainOrder(11, seed=3, classes=classes, rank=rank, world_size=2) for rank in range(2)]
    for order in fewer:
        order.resume(0, 6)
    assert [list(order) for order in fewer] == [[*whole[6::2]], [*whole[7::2], whole[0]]], "on another number of ranks"
    measured = sorted(place for rank in range(3) for place in RankShard(11, rank, 3))
    assert measured == list(range(11)), "each once"


def test_draws_of_a_rare_class_differ() -> None:
    classes = [0] * 95 + [1] * 5
    order = list(TrainOrder(100, seed=0, classes=classes))
    assert len(set(order)) == 100, "each key once"
    assert sorted(key[2] for key in order if key[1] == 97) == list(range(10))
    twice = list(TrainOrder(100, seed=0, classes=classes, repeats=2))
    assert len(set(twice)) == 100


def test_a_small_batch_is_decoded_by_as_many_threads_as_it_has_images() -> None:
    beside = threading.Barrier(4)

    def read() -> bytes:
        beside.wait(timeout=20)
        return png

    png = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    classifier = Classifier(build("linear", 2, image_size=(16, 16)), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    answers = score(
        classifier, Preprocess(height=16, width=16), [SampleInput(read)] * 8, task="binary", batch_size=4, threads=8
    )
    assert all(isinstance(answer, np.ndarray) for answer in answers)
