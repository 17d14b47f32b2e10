"""A map-style dataset whose images are augmented by key: see `refract.augment.samplers` for how the epoch reaches it."""

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
    """What PyTorch calls a map-style dataset: a list is one, and so is torchvision's `ImageFolder`."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __len__(self) -> int: ...


class AugmentedDataset:
    """Augment the images of a map-style dataset, for `DataLoader(AugmentedDataset(dataset, augmenter), sampler=EpochSampler(…))`.

    An item is an image alone, a tuple or list with one, or a mapping with one; it comes back in the same form, with the image augmented.
    The dataset keeps no epoch: indexed by a `SampleKey` it draws for that, indexed by a number for epoch 0. A second epoch of plain
    numbers, counted over all worker processes, gives one UserWarning, as its images are those of the first.
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
        """image, mask: where they are in an item: a place of a tuple, a key of a mapping. mask: see `Augmenter.apply_mask`, whose `fill` is
        mask_fill. with_key: add the `SampleKey` to each item, at the end of a tuple or as `key` of a mapping, for `Augmenter.mix`.
        TypeError for a dataset without indices or length."""
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
        self._plain = _SharedCount()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | tuple[int, ...] | int) -> Any:
        """The item of a `SampleKey` or (epoch, index), or of an index alone in epoch 0. ImageError names the index of a damaged image."""
        named = SampleKey(*key) if isinstance(key, tuple) else self._plain_key(key)
        item = self.dataset[named.index]
        try:
            return self._augmented(item, named)
        except ValueError as error:
            kind = ImageError if isinstance(error, ImageError) else ValueError
            raise kind(f"sample {named.index}: {error}") from error

    def _augmented(self, item: Any, key: SampleKey) -> Any:
        epoch, index, repeat = key
        alone = not isinstance(item, (tuple, list, Mapping))
        image = item if alone else self._part(item, self.image, "image")
        changes: dict[int | str, Any] = {}
        if self.mask is None:
            result = self.augmenter(image, epoch=epoch, index=index, repeat=repeat)
        else:
            data = read_image(image, color_profile=self.augmenter.color_profile)
            plan = self.augmenter.draw(input_size(data), epoch=epoch, index=index, repeat=repeat)
            result = self.augmenter.apply(plan, data)
            mask = np.asarray(self._part(item, self.mask, "mask"))
            changes[self.mask] = self.augmenter.apply_mask(plan, mask, fill=self.mask_fill)
        if alone:
            return (result, key) if self.with_key else result
        changes[self.image] = result
        if isinstance(item, Mapping):
            return {**item, **changes, **({"key": key} if self.with_key else {})}
        parts = [changes.get(place, part) for place, part in enumerate(item)] + ([key] if self.with_key else [])
        return parts if isinstance(item, list) else tuple(parts)

    def _part(self, item: Any, place: int | str, name: str) -> Any:
        try:
            return item[place]
        except (LookupError, TypeError) as error:
            shown = (
                f"keys {list(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__} of {len(item)} parts"
            )
            raise ValueError(
                f"{name}: the dataset's items have no {place!r}: {shown}; name the {name} by AugmentedDataset(…, {name}=…)"
            ) from error

    def _plain_key(self, key: int) -> SampleKey:
        index = index_of(key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is not in a dataset of {len(self)} samples")
        if self._plain.next() == _allowed(len(self)) and self._varies():
            warnings.warn(
                "AugmentedDataset: a second epoch is read by plain indices, so its images are augmented as in the first; pass "
                "sampler=EpochSampler(…) to the DataLoader",
                stacklevel=3,
            )
        return SampleKey(0, index % len(self))

    def _varies(self) -> bool:
        """Whether the policy draws anything that differs between epochs."""
        first, *others = (self.augmenter.draw((256, 256), epoch=epoch, index=0).steps for epoch in range(_EPOCHS))
        return any(steps != first for steps in others)


_EPOCHS = 32


def _allowed(count: int) -> int:
    """How many plain accesses give no warning: one epoch, and a half of another, for looking at samples before."""
    return count + count // 2 + 8


class _SharedCount:
    """A count that all worker processes of a loader advance; their races may lose a few."""

    def __init__(self) -> None:
        from multiprocessing import RawValue

        self._value = RawValue("q", 0)

    def next(self) -> int:
        self._value.value += 1
        return self._value.value

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.context import get_spawning_popen

        # Shared memory is passed on to a process that is being started; a copy of any other kind counts anew.
        if get_spawning_popen() is None:
            return _SharedCount, ()
        return _restored, (self._value,)


def _restored(value: Any) -> _SharedCount:
    count = _SharedCount.__new__(_SharedCount)
    count._value = value
    return count
