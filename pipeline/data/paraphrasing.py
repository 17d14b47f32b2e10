"""Fill a cache with paraphrases of texts: translate in batches, filter, and store each batch."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from refract.augment.text.paraphrases import Cache, digest
from refract.augment.text.translation import BackTranslator, Filter, Sampling, TranslationError
from refract.augment.text.words import protected_words
from refract.pipeline.data.manifest import DataError
from refract.pipeline.files import locked
from refract.progress import Progress

log = logging.getLogger(__name__)

Similar = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
Row = tuple[str, list[tuple[str, str | None]]]
"""A text and its paraphrases, each with the reason why it is not used, or None."""

FAILURES = 20
"""Consecutive texts whose translation fails before the run stops: the cause is then the model or the machine."""


@dataclass(frozen=True)
class Plan:
    """Settings of a paraphrasing run.

    model: name or folder of the translation model, with {from} and {to} in place of the languages; source: language of the texts; via:
    intermediate languages; n: paraphrases per intermediate language; similar: minimum cosine similarity, used with an encoder.
    """

    model: str
    source: str
    via: tuple[str, ...]
    n: int
    filter: Filter
    batch: int = 32
    max_length: int = 256
    top_k: int = 10
    temperature: float = 1.0
    device: str = "auto"
    seed: int = 0
    encoder: str | None = None
    similar: float = 0.7


def paraphrase(texts: Sequence[str], plan: Plan, file: Path) -> dict[str, int]:
    """Fill the cache with the paraphrases that it lacks.

    Returns reason → number of paraphrases that are not used for this reason; the key "" counts the used ones. Raises CacheError,
    TranslationError, and DataError if another process fills the file.
    """
    import torch

    device = plan.device if plan.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    similar = None
    busy = DataError(f"{file}: another process fills this cache; wait for it, or set --cache")
    with locked(file.with_name(file.name + ".lock"), busy), Cache(file) as cache:
        counts: dict[str, int] = {}
        for via in plan.via:
            settings = _settings(plan, via)
            cache.start_run(settings, f"{plan.source} {via}")
            missing = sorted(cache.missing(texts, settings), key=len)  # texts of similar length need the least padding
            log.info(
                "%s: %d texts to translate, %d are cached in %s",
                via,
                len(missing),
                len(set(texts)) - len(missing),
                file,
            )
            if missing:
                translator = _translator(plan, via, device)
                similar = similar or _similar(plan, device)
                with Progress(f"{plan.source}–{via}–{plan.source}", len(missing), unit="texts") as progress:
                    for rows in _translated_rows(missing, plan, translator, similar):
                        cache.add(rows, settings)
                        progress.update(len(rows))
            for reason, count in cache.dropped(texts, settings).items():
                counts[reason] = counts.get(reason, 0) + count
    return counts


def _settings(plan: Plan, via: str) -> str:
    """Return the cache key: all settings that affect the paraphrases, except seed and batch, so that cached draws remain valid."""
    settings = (
        plan.model,
        plan.source,
        via,
        plan.n,
        plan.max_length,
        plan.top_k,
        plan.temperature,
        sorted(protected_words(plan.filter.keep).entries),
        plan.filter.length,
    )
    return repr((*settings, plan.encoder, plan.similar if plan.encoder else None))


def _translator(plan: Plan, via: str, device: str) -> BackTranslator:
    forth = plan.model.replace("{from}", plan.source).replace("{to}", via)
    back = plan.model.replace("{from}", via).replace("{to}", plan.source)
    sampling = Sampling(plan.top_k, plan.temperature)
    return BackTranslator(
        forth, back, source=plan.source, via=via, device=device, batch=plan.batch, max_length=plan.max_length, sampling=sampling
    )  # fmt: skip


def _similar(plan: Plan, device: str) -> Similar | None:
    if plan.encoder is None:
        return None
    from refract.models.multimodal.sentence_encoder import SentenceEncoder

    try:
        return SentenceEncoder(plan.encoder, device).cosine
    except ValueError as error:
        raise DataError(f"--encoder: {error}") from error


def _translated_rows(
    texts: Sequence[str], plan: Plan, translator: BackTranslator, similar: Similar | None
) -> Iterator[list[Row]]:
    """Yield the rows of the texts, a batch at a time.

    Failed texts are yielded with the next successful batch. TranslationError if no text succeeds, or after FAILURES failures in a row: the
    texts that a broken model failed on are then not cached, and are translated again.
    """
    remaining, failed, any_success = iter(texts), dict[str, TranslationError](), False
    while batch := list(islice(remaining, max(1, plan.batch // plan.n))):
        rows = _try_batch(batch, plan, translator, similar, failed)
        any_success = any_success or bool(rows)
        if rows:
            yield [*rows, *_failures(failed)]
            failed.clear()
        elif len(failed) >= FAILURES:
            raise next(iter(failed.values()))
    if failed and not any_success:
        raise next(iter(failed.values()))
    yield _failures(failed)


def _try_batch(
    texts: list[str],
    plan: Plan,
    translator: BackTranslator,
    similar: Similar | None,
    failed: dict[str, TranslationError],
) -> list[Row]:
    """Return the rows of the texts: as one batch, else one by one. Adds the texts that fail to `failed`."""
    try:
        return _paraphrased(texts, plan, translator, similar)
    except TranslationError as error:
        if len(texts) == 1:
            failed[texts[0]] = error
            return []
    return [row for text in texts for row in _try_batch([text], plan, translator, similar, failed)]


def _failures(failed: Mapping[str, TranslationError]) -> list[Row]:
    for error in failed.values():
        log.warning("%s", error)
    return [(text, [("", "failed")]) for text in failed]


def _paraphrased(texts: list[str], plan: Plan, translator: BackTranslator, similar: Similar | None) -> list[Row]:
    repeated = [text for text in texts for _ in range(plan.n)]
    translated = translator(repeated, plan.seed + int.from_bytes(digest(texts[0])[:4], "little"))
    drawn = [text or "" for text in translated]
    similarities = similar(repeated, drawn) if similar else [1.0] * len(drawn)
    result = []
    for index, text in enumerate(texts):
        used: list[str] = []
        rows: list[tuple[str, str | None]] = []
        for k in range(index * plan.n, (index + 1) * plan.n):
            reason = "cut" if translated[k] is None else plan.filter.reason(text, drawn[k], used)
            if reason is None and similar and similarities[k] < plan.similar:
                reason = "unlike"
            if reason is None:
                used.append(drawn[k])
            rows.append((drawn[k], reason))
        result.append((text, rows))
    return result
