"""Probabilities for encoded images and texts: decoding and preprocessing in threads, one batch ahead of the network."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from refract.augment import ImageError, Preprocess
from refract.models.bundle.info import BundleError, BundleInfo
from refract.models.classifier import Classifier, probabilities
from refract.models.multimodal.tokens import pad_rows

TOGETHER = 4
"""Images that a thread is given at once, at most: for small ones each handing over counts."""


class SampleInput(NamedTuple):
    """What is asked about. read: gives an image's encoded bytes; has_image: whether there is an image at all."""

    read: Callable[[], bytes]
    text: str = ""
    has_image: bool = True


def score(
    classifier: Classifier,
    preprocess: Preprocess,
    questions: Iterable[SampleInput],
    *,
    task: str,
    temperature: float = 1.0,
    batch_size: int = 64,
    tta: str = "none",
    threads: int | None = None,
) -> Iterator[np.ndarray | ImageError | OSError]:
    """For each question, in order, its probabilities as float32 (C,), or why it has none.

    classifier: in eval mode; its device is used, in fp32; what it does not read is not looked at. tta: of images, see `views`.
    threads: that decode, None for one a core.
    """
    device = next(classifier.parameters()).device
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        source, prepare = iter(questions), partial(_prepare, classifier, preprocess)
        together = min(TOGETHER, -(-batch_size // (threads or os.cpu_count() or 1)))
        ahead = _submit(pool, prepare, list(islice(source, batch_size)), together)
        while ahead:
            current, ahead = ahead, _submit(pool, prepare, list(islice(source, batch_size)), together)
            inputs = [item for future in current for item in future.result()]
            whole = [item for item in inputs if isinstance(item, _Prepared)]
            answers: Iterator[np.ndarray] = iter(())
            if whole:
                with torch.inference_mode():
                    logits = _logits(classifier, whole, tta, device)
                    answers = iter(probabilities(logits, task=task, temperature=temperature).cpu().numpy())
            for item in inputs:
                yield next(answers) if isinstance(item, _Prepared) else item


class _Prepared(NamedTuple):
    image: np.ndarray | None
    text: np.ndarray | None
    has_image: bool


def _logits(classifier: Classifier, inputs: Sequence[_Prepared], tta: str, device: torch.device) -> torch.Tensor:
    texts: list[torch.Tensor] = []
    if classifier.tokens is not None:
        numbers = pad_rows([item.text for item in inputs if item.text is not None])
        texts = [torch.from_numpy(numbers).to(device), torch.tensor([item.has_image for item in inputs], device=device)]
    images = [item.image for item in inputs if item.image is not None]
    if not images:
        return classifier(None, *texts)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
    found = [share * classifier(view, *texts) for share, view in views(batch, tta)]
    return torch.stack(found).sum(dim=0)


def views(batch: torch.Tensor, tta: str) -> Iterator[tuple[float, torch.Tensor]]:
    """(share, images) to average an image's logits over: none, flip (it and its mirror image), or flip-shift (both also moved by a pixel
    along the diagonal, each way, which count half as much). batch: (N, 3, H, W)."""
    if tta == "none":
        yield 1.0, batch
        return
    moved = [(1.0, batch)]
    if tta == "flip-shift":
        padded = torch.nn.functional.pad(batch.float(), (1, 1, 1, 1), mode="reflect")
        moved = [(0.5, batch), (0.25, padded[..., :-2, :-2]), (0.25, padded[..., 2:, 2:])]
    for share, images in moved:
        yield share / 2, images
        yield share / 2, images.flip(-1)


def _submit(
    pool: ThreadPoolExecutor,
    prepare: Callable[[SampleInput], _Prepared | ImageError | OSError],
    batch: list[SampleInput],
    together: int,
) -> list[Future[list[_Prepared | ImageError | OSError]]]:
    return [
        pool.submit(list, map(prepare, batch[start : start + together])) for start in range(0, len(batch), together)
    ]


def _image(preprocess: Preprocess, question: SampleInput) -> np.ndarray:
    """Grey where there is none: the network does not look at it then."""
    if not question.has_image:
        return np.full((preprocess.height, preprocess.width, 3), 128, np.uint8)
    return preprocess(question.read())


def _prepare(classifier: Classifier, preprocess: Preprocess, question: SampleInput) -> _Prepared | ImageError | OSError:
    try:
        image = _image(preprocess, question) if "images" in classifier.reads else None
        text = classifier.tokens(question.text)[0] if classifier.tokens is not None else None
        return _Prepared(image, text, question.has_image)
    except (ImageError, OSError) as error:
        return error


def preprocess_of(info: BundleInfo) -> Preprocess:
    """A bundle's own. BundleError if its numbers are none."""
    try:
        return Preprocess.from_dict(info.preprocess)
    except ValueError as error:
        raise BundleError(f"bundle {info.name}: {error}") from error
