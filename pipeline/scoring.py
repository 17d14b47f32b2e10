"""Probabilities for encoded pictures: decoding and preprocessing in threads, one batch ahead of the network."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from augment import ImageError, Preprocess
from models.classifier import Classifier, probabilities

Reader = Callable[[], bytes]


def score(
    classifier: Classifier,
    preprocess: Preprocess,
    readers: Iterable[Reader],
    *,
    task: str,
    temperature: float = 1.0,
    batch_size: int = 64,
    tta: str = "none",
) -> Iterator[np.ndarray | ImageError | OSError]:
    """For each picture, in order, its probabilities as float32 (C,), or why it has none.

    classifier: in eval mode; its device is used, in fp32. readers: each gives one picture's encoded bytes. tta: see `views`.
    """
    device = next(classifier.parameters()).device
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        source = iter(readers)
        ahead = _submit(pool, preprocess, source, batch_size)
        while ahead:
            current, ahead = ahead, _submit(pool, preprocess, source, batch_size)
            inputs = [future.result() for future in current]
            pictures = [item for item in inputs if isinstance(item, np.ndarray)]
            answers: Iterator[np.ndarray] = iter(())
            if pictures:
                batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device)
                with torch.inference_mode():
                    logits = sum(share * classifier(view) for share, view in views(batch, tta))
                    answers = iter(probabilities(logits, task=task, temperature=temperature).cpu().numpy())
            for item in inputs:
                yield next(answers) if isinstance(item, np.ndarray) else item


def views(batch: torch.Tensor, tta: str) -> Iterator[tuple[float, torch.Tensor]]:
    """(share, pictures) to average a picture's logits over: none, flip (it and its mirror image), or flip-shift (both also moved by a pixel
    along the diagonal, each way, which count half as much). batch: (N, 3, H, W)."""
    if tta == "none":
        yield 1.0, batch
        return
    moved = [(1.0, batch)]
    if tta == "flip-shift":
        padded = torch.nn.functional.pad(batch.float(), (1, 1, 1, 1), mode="reflect")
        moved = [(0.5, batch), (0.25, padded[..., :-2, :-2]), (0.25, padded[..., 2:, 2:])]
    for share, pictures in moved:
        yield share / 2, pictures
        yield share / 2, pictures.flip(-1)


def _submit(
    pool: ThreadPoolExecutor, preprocess: Preprocess, source: Iterator[Reader], count: int
) -> list[Future[np.ndarray | ImageError | OSError]]:
    return [pool.submit(_prepare, preprocess, reader) for reader in islice(source, count)]


def _prepare(preprocess: Preprocess, reader: Reader) -> np.ndarray | ImageError | OSError:
    try:
        return preprocess(reader())
    except (ImageError, OSError) as error:
        return error
