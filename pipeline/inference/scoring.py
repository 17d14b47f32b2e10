"""Compute probabilities for encoded images and texts. Threads decode and preprocess one batch ahead of the network."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from refract.augment import ImageError, Preprocess
from refract.cores import cores
from refract.models.bundle.info import BundleError, BundleInfo
from refract.models.classifier import Classifier, probabilities
from refract.models.familiarity import Familiarity
from refract.models.head import head_inputs
from refract.models.multimodal.tokens import pad_rows, trimmed

TASK_IMAGES = 4
"""Largest number of images in one task of a thread. For small images the overhead per task matters."""


class Scored(NamedTuple):
    """The outputs for one sample, float32. probabilities: (C,); embedding: (D,), None if it is not asked for; familiarity: None without
    training features, see `refract.models.familiarity`."""

    probabilities: np.ndarray
    embedding: np.ndarray | None = None
    familiarity: float | None = None


class SampleInput(NamedTuple):
    """A sample to score.

    read: returns the image's encoded bytes; has_image: False for a sample with only a text; prepare: in place of the preprocessing, for an
    augmented view, encoded bytes → uint8 H×W×3 of the preprocessing's size.
    """

    read: Callable[[], bytes]
    text: str = ""
    has_image: bool = True
    prepare: Callable[[bytes], np.ndarray] | None = None


def score(
    classifier: Classifier,
    preprocess: Preprocess,
    samples: Iterable[SampleInput],
    *,
    task: str,
    temperature: float = 1.0,
    batch_size: int = 64,
    tta: str = "none",
    threads: int | None = None,
) -> Iterator[np.ndarray | ImageError | OSError]:
    """Yield each sample's probabilities, float32 (C,), in order, or the error that prevents them.

    classifier: in eval mode, computes on its device in fp32; modalities that it does not read are ignored. tta: test-time augmentation of
    images, see `views`. threads: for decoding, None for one per core.
    """
    outcomes = score_outputs(
        classifier, preprocess, samples, embed=False, task=task, temperature=temperature, batch_size=batch_size, tta=tta, threads=threads
    )  # fmt: skip
    for outcome in outcomes:
        yield outcome.probabilities if isinstance(outcome, Scored) else outcome


def score_outputs(
    classifier: Classifier,
    preprocess: Preprocess,
    samples: Iterable[SampleInput],
    *,
    embed: bool,
    familiarity: Familiarity | None = None,
    task: str,
    temperature: float = 1.0,
    batch_size: int = 64,
    tta: str = "none",
    threads: int | None = None,
) -> Iterator[Scored | ImageError | OSError]:
    """Yield each sample's outputs, in order, or the error that prevents them.

    embed: compute the embeddings too, in the same forward pass; the views of test-time augmentation are averaged. familiarity: compares the
    embeddings with training images, on the CPU. The other arguments are those of `score`.
    """
    device = next(classifier.parameters()).device
    threads = threads or cores()
    with ThreadPoolExecutor(threads) as pool:
        source, prepare = iter(samples), partial(_prepare, classifier, preprocess)
        task_size = min(TASK_IMAGES, -(-batch_size // threads))
        ahead = _submit(pool, prepare, list(islice(source, batch_size)), task_size)
        while ahead:
            current, ahead = ahead, _submit(pool, prepare, list(islice(source, batch_size)), task_size)
            items = [item for future in current for item in future.result()]
            prepared = [item for item in items if isinstance(item, _Prepared)]
            rows: Iterator[Scored] = iter(())
            if prepared:
                with torch.inference_mode():
                    logits, embedding = _outputs(
                        classifier, prepared, tta, device, embed=embed or familiarity is not None
                    )
                    computed = probabilities(logits, task=task, temperature=temperature).cpu().numpy()
                    rows = _scored(computed, embedding, familiarity)
            for item in items:
                yield next(rows) if isinstance(item, _Prepared) else item


def _scored(computed: np.ndarray, embedding: torch.Tensor | None, familiarity: Familiarity | None) -> Iterator[Scored]:
    if embedding is None:
        return map(Scored, computed)
    if familiarity is None:
        return map(Scored, computed, embedding.numpy())
    return map(Scored, computed, embedding.numpy(), familiarity(embedding).tolist())


def problem_of(outcome: Scored | Exception, reads: Collection[str], has_image: bool, text: str) -> str | None:
    """Return the reason why a sample has no prediction, None if it has one.

    outcome: of `score_outputs`; reads: the inputs of the network, images, texts or both; has_image, text: the values of the sample.
    """
    has_text = bool(trimmed(text))
    if not has_image and not has_text:
        return "the row has neither an image nor a text"
    if not has_image and "texts" not in reads:
        return "the row has no image, and the bundle reads only images"
    if not has_text and "images" not in reads:
        return "the row has no text, and the bundle reads only texts"
    if isinstance(outcome, Scored):
        return None if np.isfinite(outcome.probabilities).all() else "the network's output is not finite"
    return outcome.strerror if isinstance(outcome, OSError) and outcome.strerror else str(outcome)


class _Prepared(NamedTuple):
    image: np.ndarray | None
    text: np.ndarray | None
    has_image: bool


def _outputs(
    classifier: Classifier, inputs: Sequence[_Prepared], tta: str, device: torch.device, *, embed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute (logits, embeddings on the CPU or None), averaged over the views of test-time augmentation."""
    texts: list[torch.Tensor] = []
    if classifier.tokens is not None:
        numbers = pad_rows([item.text for item in inputs if item.text is not None])
        texts = [torch.from_numpy(numbers).to(device), torch.tensor([item.has_image for item in inputs], device=device)]
    images = [item.image for item in inputs if item.image is not None]
    weighted: list[tuple[float, torch.Tensor | None]] = [(1.0, None)]
    if images:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        weighted = list(views(batch, tta))
    recording: AbstractContextManager[list[torch.Tensor]] = (
        head_inputs(classifier.network) if embed else nullcontext([])
    )
    with recording as features:
        logits = [weight * classifier(view, *texts) for weight, view in weighted]
    embeddings = [weight * rows for (weight, _), rows in zip(weighted, features, strict=False)]
    return torch.stack(logits).sum(dim=0), torch.stack(embeddings).sum(dim=0) if embed else None


def views(batch: torch.Tensor, tta: str) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield the (weight, images) of test-time augmentation, over which the logits are averaged. batch: (N, 3, H, W).

    none: the images; flip: also their horizontal flips; flip-shift: also both shifted by one pixel along the diagonal in either direction,
    at half the weight each.
    """
    if tta == "none":
        yield 1.0, batch
        return
    shifted = [(1.0, batch)]
    if tta == "flip-shift":
        padded = torch.nn.functional.pad(batch.float(), (1, 1, 1, 1), mode="reflect")
        shifted = [(0.5, batch), (0.25, padded[..., :-2, :-2]), (0.25, padded[..., 2:, 2:])]
    for weight, images in shifted:
        yield weight / 2, images
        yield weight / 2, images.flip(-1)


def _submit(
    pool: ThreadPoolExecutor,
    prepare: Callable[[SampleInput], _Prepared | ImageError | OSError],
    batch: list[SampleInput],
    task_size: int,
) -> list[Future[list[_Prepared | ImageError | OSError]]]:
    return [
        pool.submit(list, map(prepare, batch[start : start + task_size])) for start in range(0, len(batch), task_size)
    ]


def _image(preprocess: Preprocess, sample: SampleInput) -> np.ndarray:
    """Return the preprocessed image, or a grey placeholder, which the network ignores, for a sample without an image."""
    if not sample.has_image:
        return np.full((preprocess.height, preprocess.width, 3), 128, np.uint8)
    return (sample.prepare or preprocess)(sample.read())


def _prepare(classifier: Classifier, preprocess: Preprocess, sample: SampleInput) -> _Prepared | ImageError | OSError:
    try:
        image = _image(preprocess, sample) if "images" in classifier.reads else None
        text = classifier.tokens(sample.text)[0] if classifier.tokens is not None else None
        return _Prepared(image, text, sample.has_image)
    except (ImageError, OSError) as error:
        return error


def preprocess_of(info: BundleInfo) -> Preprocess:
    """Build the preprocessing of a bundle. Raises BundleError if its values are invalid."""
    try:
        return Preprocess.from_dict(info.preprocess)
    except ValueError as error:
        raise BundleError(f"bundle {info.name}: {error}") from error
