"""`AugmentedDataset`: augment the images of a map-style dataset by (epoch, index). `refract.augment.samplers` supplies the epoch."""

import warnings
from collections.abc import Mapping
from operator import index as index_of
from typing import Any, Protocol

import numpy as np

from refract.augment.augmenter import Augmenter
from refract.augment.decoding.decode import ImageError
from refract.augment.inputs import input_size, read_image
from refract.augment.samplers import SampleKey


class MapDataset(Protocol):
    """PyTorch's map-style dataset, such as a list or torchvision's `ImageFolder`."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __len__(self) -> int: ...


class AugmentedDataset:
    """Augment the images of a map-style dataset, for `DataLoader(AugmentedDataset(dataset, augmenter), sampler=EpochSampler(…))`.

    An item is an image, or a tuple, list or mapping that contains an image. It is returned in the same form, with the image augmented.
    The dataset stores no epoch: a `SampleKey` names the epoch, a plain index means epoch 0. A second pass over plain indices, counted over
    all worker processes, repeats the first epoch's images; it emits one UserWarning.
    """

    def __init__(
        self,
        dataset: MapDataset,
        augmenter: Augmenter,
        *,
        image: int | str = 0,
        mask: int | str | None = None,
        mask_fill: int = 0,
        with_key: bool = False,
    ) -> None:
        """Wrap the dataset.

        image, mask: the position in a tuple or the key in a mapping; mask=None if the items have no mask.
        mask_fill: the `fill` of `Augmenter.apply_mask`.
        with_key: add the `SampleKey` to each item, as the last element or under the key `key`, for `Augmenter.mix`.
        TypeError if the dataset has no `__getitem__` or no `__len__`.
        """
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"dataset: {type(dataset).__name__} is not map-style; AugmentedDataset needs dataset[index] and len(dataset)"
            )
        if augmenter.mixes and not with_key:
            warnings.warn(
                "the policy has MixUp or CutMix, which a dataset of single samples cannot apply; pass with_key=True and call "
                "augmenter.mix on each batch",
                stacklevel=2,
            )
        self.dataset, self.augmenter, self.image, self.mask = dataset, augmenter, image, mask
        self.mask_fill, self.with_key = mask_fill, with_key
        self._plain_reads = _SharedCount()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | tuple[int, ...] | int) -> Any:
        """Return the augmented item of a `SampleKey`, an (epoch, index), or a plain index in epoch 0.

        ImageError names the index of a damaged image.
        """
        sample_key = SampleKey(*key) if isinstance(key, tuple) else self._plain_key(key)
        item = self.dataset[sample_key.index]
        try:
            return self._augment(item, sample_key)
        except ValueError as error:
            kind = ImageError if isinstance(error, ImageError) else ValueError
            raise kind(f"sample {sample_key.index}: {error}") from error

    def _augment(self, item: Any, key: SampleKey) -> Any:
        epoch, index, repeat = key
        is_image = not isinstance(item, (tuple, list, Mapping))
        image = item if is_image else self._part(item, self.image, "image")
        changes: dict[int | str, Any] = {}
        if self.mask is None:
            result = self.augmenter(image, epoch=epoch, index=index, repeat=repeat)
        else:
            data = read_image(image, color_profile=self.augmenter.color_profile)
            plan = self.augmenter.draw(input_size(data), epoch=epoch, index=index, repeat=repeat)
            result = self.augmenter.apply(plan, data)
            mask = np.asarray(self._part(item, self.mask, "mask"))
            changes[self.mask] = self.augmenter.apply_mask(plan, mask, fill=self.mask_fill)
        if is_image:
            return (result, key) if self.with_key else result
        changes[self.image] = result
        if isinstance(item, Mapping):
            return {**item, **changes, **({"key": key} if self.with_key else {})}
        parts = [changes.get(position, part) for position, part in enumerate(item)] + ([key] if self.with_key else [])
        return parts if isinstance(item, list) else tuple(parts)

    def _part(self, item: Any, key: int | str, name: str) -> Any:
        try:
            return item[key]
        except (LookupError, TypeError) as error:
            contents = (
                f"keys {list(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__} of {len(item)} parts"
            )
            raise ValueError(
                f"{name}: the dataset's items have no {key!r}: {contents}; name the {name} by AugmentedDataset(…, {name}=…)"
            ) from error

    def _plain_key(self, key: int) -> SampleKey:
        index = index_of(key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is not in a dataset of {len(self)} samples")
        if self._plain_reads.next() == _silent_reads(len(self)) and self._varies():
            warnings.warn(
                "AugmentedDataset: a second epoch uses plain indices, so it repeats the images of the first; pass "
                "sampler=EpochSampler(…) to the DataLoader",
                stacklevel=3,
            )
        return SampleKey(0, index % len(self))

    def _varies(self) -> bool:
        """Whether the policy's draws differ between epochs."""
        first, *others = (
            self.augmenter.draw((256, 256), epoch=epoch, index=0).steps for epoch in range(_COMPARED_EPOCHS)
        )
        return any(steps != first for steps in others)


_COMPARED_EPOCHS = 32


def _silent_reads(count: int) -> int:
    """Return how many reads by plain index emit no warning: one and a half epochs, so that a user may inspect samples first."""
    return count + count // 2 + 8


class _SharedCount:
    """A counter in memory shared by a loader's worker processes. Races between them may lose a few counts."""

    def __init__(self) -> None:
        from multiprocessing import RawValue

        self._value = RawValue("q", 0)

    def next(self) -> int:
        self._value.value += 1
        return self._value.value

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.context import get_spawning_popen

        # Only a process that is being spawned inherits shared memory; any other copy starts a new count.
        if get_spawning_popen() is None:
            return _SharedCount, ()
        return _restore_count, (self._value,)


def _restore_count(value: Any) -> _SharedCount:
    count = _SharedCount.__new__(_SharedCount)
    count._value = value
    return count
