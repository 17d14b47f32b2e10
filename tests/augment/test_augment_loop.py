"""`AugmentedDataset` and `EpochSampler` in a plain PyTorch loop: draws differ between epochs and do not depend on the workers."""

import copy
import hashlib
import io
import pickle
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from warm_process import shared

from refract.augment import AugmentedDataset, Augmenter, EpochSampler, ImageError, SampleKey, ShuffleSampler
from refract.augment.samplers import epoch_order

COUNT = 12
IMAGES = list(np.random.default_rng(0).integers(0, 256, (COUNT, 24, 32, 3), dtype=np.uint8))
PAIRS = [(image, label) for label, image in enumerate(IMAGES)]
AUGMENTER = Augmenter("cifar", seed=7, size=16, output="float32")

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def loader(sampler, **options) -> DataLoader:
    return DataLoader(AugmentedDataset(PAIRS, AUGMENTER), sampler=sampler, batch_size=4, **options)


def seen(batches) -> list[tuple[int, str]]:
    """Return (label, digest of the image) of each sample, in order."""
    return [
        (int(label), hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12])
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]


@cache
def expected(epoch: int) -> list[tuple[int, str]]:
    order = epoch_order(COUNT, seed=1, epoch=epoch).tolist()
    images = torch.from_numpy(np.stack([AUGMENTER(IMAGES[i], epoch=epoch, index=i) for i in order]))
    return seen([(images, torch.tensor(order))])


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, True), (4, False), (4, True)])
def test_every_epoch_has_different_draws_with_any_workers(workers: int, persistent: bool) -> None:
    """With persistent workers, an epoch stored on the dataset would give the same images in every epoch."""
    batches = loader(EpochSampler(ShuffleSampler(COUNT, seed=1)), num_workers=workers, persistent_workers=persistent)
    epochs = [seen(batches) for _ in range(3)]
    assert epochs == [expected(0), expected(1), expected(2)]
    assert len({digest for epoch in epochs for _, digest in epoch}) == 3 * COUNT


def test_a_run_resumes_within_an_epoch() -> None:
    sampler = EpochSampler(ShuffleSampler(COUNT, seed=1))
    sampler.resume(epoch=2, seen=8)
    batches = loader(sampler)
    assert seen(batches) == expected(2)[8:]
    assert seen(batches) == expected(3), "the next epoch is whole"
    sampler.set_epoch(1)
    assert seen(batches) == expected(1)


def test_an_interrupted_epoch_is_followed_by_the_next() -> None:
    batches = loader(EpochSampler(ShuffleSampler(COUNT, seed=1)), num_workers=1, persistent_workers=True)
    next(iter(batches))
    assert seen(batches) == expected(1)


def test_a_loader_without_batches_skips_no_epoch() -> None:
    """A loader with workers creates an iterator of the sampler that it never uses."""
    dataset = AugmentedDataset(PAIRS, AUGMENTER, with_key=True)
    batches = DataLoader(
        dataset, sampler=EpochSampler(range(COUNT)), batch_size=None, num_workers=1, persistent_workers=True
    )
    assert [[key.epoch for _, _, key in batches] for _ in range(3)] == [[0] * COUNT, [1] * COUNT, [2] * COUNT]


def test_ranks_split_an_epoch_and_a_wrapped_distributed_sampler_receives_the_epoch() -> None:
    for make in (
        lambda rank: ShuffleSampler(10, seed=3, rank=rank, world_size=4),
        lambda rank: DistributedSampler(range(10), num_replicas=4, rank=rank, seed=3),
    ):
        ranks = [EpochSampler(make(rank)) for rank in range(4)]
        first, second = ([list(rank) for rank in ranks] for _ in range(2))
        for epoch, splits in enumerate((first, second)):
            assert {key.epoch for split in splits for key in split} == {epoch}
            assert [len(split) for split in splits] == [3, 3, 3, 3] == [len(rank) for rank in ranks]
            assert {key.index for split in splits for key in split} == set(range(10))
        assert [[key.index for key in split] for split in first] != [[key.index for key in split] for split in second]


def test_a_sample_drawn_twice_in_an_epoch_is_augmented_twice() -> None:
    sampler = EpochSampler(WeightedRandomSampler([1.0, 0.0, 2.0], 20, replacement=True))
    keys = list(sampler)
    assert [key.repeat for key in keys if key.index == 2] == list(range(sum(key.index == 2 for key in keys)))
    dataset = AugmentedDataset(PAIRS, AUGMENTER)
    assert len({dataset[key][0].tobytes() for key in keys}) == 20


def test_a_batch_sampler_wraps_an_epoch_sampler() -> None:
    sampler = BatchSampler(EpochSampler(ShuffleSampler(COUNT, seed=1)), 5, drop_last=False)
    batches = DataLoader(AugmentedDataset(PAIRS, AUGMENTER), batch_sampler=sampler)
    assert [seen(batches), seen(batches)] == [expected(0), expected(1)]
    with pytest.raises(
        TypeError, match=r"the sampler yielded \[0, 1\] \(list\) instead of an index; .* batch sampler around"
    ):
        list(EpochSampler(BatchSampler(range(4), 2, drop_last=False)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EpochSampler(7), TypeError, "EpochSampler: int is not an iterable of indices with a length"),
        (lambda: EpochSampler(iter(range(3))), TypeError, "range_iterator is not an iterable of indices with a length"),
        (lambda: EpochSampler(range(3)).set_epoch(-1), ValueError, "epoch: -1 is negative"),
        (lambda: EpochSampler(range(3)).resume(0, 1.5), ValueError, "seen: 1.5 is not a whole number"),
        (lambda: ShuffleSampler(3, rank=2, world_size=2), ValueError, "rank: 2 is not below world_size 2"),
        (lambda: AugmentedDataset(iter(PAIRS), AUGMENTER), TypeError, "list_iterator is not map-style"),
    ],
)
def test_errors_name_the_argument(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# The items of a dataset


def test_items_keep_their_form() -> None:
    image = IMAGES[3]
    key = SampleKey(2, 3)
    expected_image = AUGMENTER(image, epoch=2, index=3)

    def item(value, **options):
        return AugmentedDataset([value] * 4, AUGMENTER, **options)[key]

    np.testing.assert_array_equal(item(image), expected_image)
    assert item([image, "label"])[1] == "label" and isinstance(item([image, "label"]), list)
    assert isinstance(item((image, 1, 2)), tuple) and item((image, 1, 2))[1:] == (1, 2)
    mapped = item({"pixels": image, "label": 5}, image="pixels", with_key=True)
    np.testing.assert_array_equal(mapped["pixels"], expected_image)
    assert mapped["label"] == 5 and mapped["key"] == key
    np.testing.assert_array_equal(item(("id", image), image=1)[1], expected_image)
    np.testing.assert_array_equal(item((Image.fromarray(image), 1))[0], expected_image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    np.testing.assert_array_equal(item((buffer.getvalue(), 1))[0], expected_image)
    np.testing.assert_array_equal(item((image, 1), with_key=True)[2], key)


def test_a_mask_moves_with_its_image() -> None:
    mask = (IMAGES[0][..., 0] > 127).astype(np.uint8)
    augmenter = Augmenter([{"Rotate": {"degrees": 30}}], seed=1)
    image, moved = AugmentedDataset([(IMAGES[0], Image.fromarray(mask))], augmenter, mask=1, mask_fill=255)[
        SampleKey(4, 0)
    ]
    plan = augmenter.draw(mask.shape, epoch=4, index=0)
    np.testing.assert_array_equal(image, augmenter.apply(plan, IMAGES[0]))
    np.testing.assert_array_equal(moved, augmenter.apply_mask(plan, mask, fill=255))
    with pytest.raises(ValueError, match="sample 0: mask: the plan was drawn for 24×32 pixels, the mask has 32×24"):
        AugmentedDataset([(IMAGES[0], mask.T)], augmenter, mask=1)[0]


def test_a_collated_key_mixes_the_batch() -> None:
    augmenter = Augmenter(["HorizontalFlip", {"MixUp": {"alpha": 1.0}}], seed=1, output="float32")
    with pytest.warns(UserWarning, match="MixUp or CutMix.*pass with_key=True"):
        AugmentedDataset(PAIRS, augmenter)
    batches = DataLoader(
        AugmentedDataset(PAIRS, augmenter, with_key=True), sampler=EpochSampler(range(COUNT)), batch_size=COUNT
    )
    for epoch in range(2):
        ((images, labels, key),) = batches
        assert isinstance(key, SampleKey) and torch.as_tensor(key.epoch).tolist() == [epoch] * COUNT
        targets = torch.nn.functional.one_hot(labels, COUNT).float()
        mixed, soft = augmenter.mix(images, targets, epoch=epoch, indices=key.index, repeats=key.repeat)
        assert not torch.equal(mixed, images) and torch.allclose(soft.sum(1), torch.ones(COUNT))


def test_errors_name_the_sample() -> None:
    with pytest.raises(ImageError, match="sample 1: .*it looks like text"):
        AugmentedDataset([(b"", 0), (b"text", 1)], AUGMENTER)[SampleKey(0, 1)]
    with pytest.raises(ValueError, match=r"image: the dataset's items have no 0: keys \['pixels'\]; name the image by"):
        AugmentedDataset([{"pixels": IMAGES[0]}], AUGMENTER)[0]
    with pytest.raises(IndexError, match="index 12 is not in a dataset of 12 samples"):
        AugmentedDataset(PAIRS, AUGMENTER)[12]


def test_plain_indices_draw_epoch_zero() -> None:
    dataset = AugmentedDataset(PAIRS, AUGMENTER)
    np.testing.assert_array_equal(dataset[5][0], AUGMENTER(IMAGES[5], epoch=0, index=5))
    np.testing.assert_array_equal(dataset[-1][0], dataset[COUNT - 1][0])
    np.testing.assert_array_equal(dataset[np.int64(5)][0], dataset[torch.tensor(5)][0])
    labels = [label for _, label in cast("Iterable[tuple[object, int]]", dataset)]  # Python iterates by `__getitem__`
    assert labels == list(range(COUNT)) and len(dataset) == COUNT
    subset = Subset(dataset, [4, 2])
    np.testing.assert_array_equal(subset[1][0], AUGMENTER(IMAGES[2], epoch=0, index=2))


# The warning


def big(policy="cifar") -> AugmentedDataset:
    return AugmentedDataset(IMAGES * 5, Augmenter(policy, seed=7, size=16))


def warned(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(item.message) for item in caught if "EpochSampler" in str(item.message)]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, True), (2, False)])
def test_a_second_epoch_of_plain_indices_warns_once(workers: int, persistent: bool) -> None:
    """Also if each epoch has new workers, none of which reads an index twice."""
    code = (
        "import numpy as np\nfrom torch.utils.data import DataLoader\nfrom refract.augment import AugmentedDataset, Augmenter\n"
        "images = [np.zeros((8, 8, 3), np.uint8)] * 60\n"
        "dataset = AugmentedDataset(images, Augmenter('cifar', size=8))\n"
        f"loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers={workers}, persistent_workers={persistent})\n"
        "for _ in range(3): list(loader)\n"
    )
    process = shared().popen([], cwd=Path(__file__).parents[2], code=code)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err.count("a second epoch uses plain indices") == 1, err


def test_correct_use_emits_no_warning() -> None:
    assert not warned(
        lambda: [list(DataLoader(big(), sampler=EpochSampler(RandomSampler(range(60))))) for _ in range(3)]
    )

    def inspect_samples_first() -> None:
        dataset = big()
        for _ in range(20):
            dataset[0]
        list(DataLoader(dataset, shuffle=True))

    assert not warned(inspect_samples_first)
    validation = DataLoader(big([{"CenterCrop": {"size": 16}}]), batch_size=4)
    assert not warned(lambda: [list(validation) for _ in range(4)]), "the policy's draws do not differ between epochs"


def test_a_dataset_can_be_copied_and_pickled() -> None:
    for duplicate in (copy.deepcopy(big()), pickle.loads(pickle.dumps(big()))):
        np.testing.assert_array_equal(duplicate[SampleKey(3, 4)][0], big()[SampleKey(3, 4)][0])


def test_datasets_of_torch_are_accepted() -> None:
    tensors = TensorDataset(torch.zeros(3, 4))
    assert (
        len(AugmentedDataset(Subset(PAIRS, [2, 5]), AUGMENTER)) == 2 and len(AugmentedDataset(tensors, AUGMENTER)) == 3
    )
    assert AugmentedDataset(Subset(PAIRS, [2, 5]), AUGMENTER)[SampleKey(0, 1)][1] == 5
