"""From texts to a cache of their paraphrases: translated in batches, filtered, kept a batch at a time."""

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

log = logging.getLogger(__name__)

Similar = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
Row = tuple[str, list[tuple[str, str | None]]]
"""A text, its paraphrases, and why each is not used."""

FAILURES = 20
"""So many texts one after the other that cannot be translated are the model's fault, or the machine's."""


@dataclass(frozen=True)
class Plan:
    """model: name or folder, in which {from} and {to} are languages; n: paraphrases by each of `via`; similar: least cosine, where there is
    an encoder."""

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
    """Fill the cache; what it holds is not translated again. Returns reason → how many paraphrases are not used for it, "" those that are.

    CacheError, TranslationError; DataError where another process fills the file.
    """
    import torch
    from tqdm import tqdm

    device = plan.device if plan.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    similar = None
    busy = DataError(f"{file} is being filled by another process")
    with locked(file.with_name(file.name + ".lock"), busy), Cache(file) as cache:
        counts: dict[str, int] = {}
        for via in plan.via:
            settings = _settings(plan, via)
            cache.start_run(settings, f"{plan.source} {via}")
            missing = sorted(cache.missing(texts, settings), key=len)  # texts of one length fill a batch best
            log.info("%s: %d texts to translate, %d are in %s", via, len(missing), len(set(texts)) - len(missing), file)
            if missing:
                translator = _translator(plan, via, device)
                similar = similar or _similar(plan, device)
                with tqdm(total=len(missing), desc=f"{plan.source}–{via}–{plan.source}", unit=" texts") as bar:
                    for found in _found(missing, plan, translator, similar):
                        cache.add(found, settings)
                        bar.update(len(found))
            for reason, count in cache.dropped(texts, settings).items():
                counts[reason] = counts.get(reason, 0) + count
    return counts


def _settings(plan: Plan, via: str) -> str:
    """All that the paraphrases and their use depend on, but the seed and the batch: what was drawn once stays."""
    own = (
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
    return repr((*own, plan.encoder, plan.similar if plan.encoder else None))


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


def _found(
    texts: Sequence[str], plan: Plan, translator: BackTranslator, similar: Similar | None
) -> Iterator[list[Row]]:
    """The rows of the texts, a batch at a time. Those that fail come with the next that does not: TranslationError where there is none, or
    after FAILURES of them, so that what a broken model cannot do is tried again."""
    rest, failed, some_worked = iter(texts), dict[str, TranslationError](), False
    while some := list(islice(rest, max(1, plan.batch // plan.n))):
        rows = _tried(some, plan, translator, similar, failed)
        some_worked = some_worked or bool(rows)
        if rows:
            yield [*rows, *_failures(failed)]
            failed.clear()
        elif len(failed) >= FAILURES:
            raise next(iter(failed.values()))
    if failed and not some_worked:
        raise next(iter(failed.values()))
    yield _failures(failed)


def _tried(
    texts: list[str],
    plan: Plan,
    translator: BackTranslator,
    similar: Similar | None,
    failed: dict[str, TranslationError],
) -> list[Row]:
    """The rows of the texts, together or else one by one; `failed` gets those that have none."""
    try:
        return _paraphrased(texts, plan, translator, similar)
    except TranslationError as error:
        if len(texts) == 1:
            failed[texts[0]] = error
            return []
    return [row for text in texts for row in _tried([text], plan, translator, similar, failed)]


def _failures(failed: Mapping[str, TranslationError]) -> list[Row]:
    for error in failed.values():
        log.warning("%s", error)
    return [(text, [("", "failed")]) for text in failed]


def _paraphrased(texts: list[str], plan: Plan, translator: BackTranslator, similar: Similar | None) -> list[Row]:
    several = [text for text in texts for _ in range(plan.n)]
    translated = translator(several, plan.seed + int.from_bytes(digest(texts[0])[:4], "little"))
    drawn = [text or "" for text in translated]
    near = similar(several, drawn) if similar else [1.0] * len(drawn)
    found = []
    for place, text in enumerate(texts):
        used: list[str] = []
        rows: list[tuple[str, str | None]] = []
        for k in range(place * plan.n, (place + 1) * plan.n):
            reason = "cut" if translated[k] is None else plan.filter.reason(text, drawn[k], used)
            if reason is None and similar and near[k] < plan.similar:
                reason = "unlike"
            if reason is None:
                used.append(drawn[k])
            rows.append((drawn[k], reason))
        found.append((text, rows))
    return found
