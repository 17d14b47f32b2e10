"""Samples in columns, as loader workers receive them: a million Python objects would take each worker 300 MB and seconds to unpickle."""

from collections.abc import Iterable, Sequence

import numpy as np

from refract.pipeline.data.manifest import Sample


class PackedTexts:
    """Texts in one block of UTF-8, which also has the lone surrogates of paths in another encoding and of texts from JSON."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.blob = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.blob[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogatepass")


class PackedSamples:
    """What a worker reads of samples, by index: path, text and bytes. Their labels, split and metadata are absent.

    A column that all samples lack is None.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.paths = PackedTexts(sample.path for sample in samples)
        self.texts = PackedTexts(sample.text for sample in samples) if any(sample.text for sample in samples) else None
        embedded = any(sample.data is not None for sample in samples)
        self.data = [sample.data for sample in samples] if embedded else None
        self.has_image = np.array([sample.has_image for sample in samples])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        text = "" if self.texts is None else self.texts[index]
        data = None if self.data is None else self.data[index]
        return Sample(self.paths[index], (), text=text, data=data, has_image=bool(self.has_image[index]))
