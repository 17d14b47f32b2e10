"""Back-translation in batches with nlpaug's `BackTranslationAug`, and the filter of its results.

The module works around these properties of nlpaug:

- Pairs of models with the same name share one cached model.
- It does not set the languages of multilingual tokenizers.
- Greedy search returns the same paraphrase on every call; this module samples.
- It truncates long texts silently; this module rejects them.
"""

import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from refract.augment.text import words
from refract.errors import InputError

T5_NAMES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}
"""Languages of T5's translation training, with the names in its prompts (Raffel et al. 2020, arXiv:1910.10683, appendix D)."""


class TranslationError(InputError):
    """A translation model cannot be loaded or fails on a text. The message names the model or the text."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of translations.

    top_k: number of most likely tokens to sample from; 1 is greedy search. temperature: above 0; higher values give more diverse texts.
    The settings of a paraphrase cache contain this class's `repr`: a rename of the class or a field invalidates existing entries.
    """

    top_k: int = 10
    temperature: float = 1.0


class BackTranslator:
    """Translate texts to another language and back with one pair of models.

    forth, back: local folders or hub names of Marian, FSMT, T5, M2M100 or NLLB models. source, via: language codes, such as `en` and
    `de`, or `eng_Latn` and `deu_Latn` for NLLB. max_length: in tokens.
    """

    def __init__(
        self, forth: str, back: str, *, source: str, via: str, device: str = "cpu", batch: int = 32, max_length: int = 256,
        sampling: Sampling = Sampling(),
    ) -> None:  # fmt: skip
        """Load the models. Raises TranslationError if a model cannot be loaded or does not support a language."""
        self.name = f"{forth} {back} {source} {via} {max_length} {sampling}"
        self._sampling = sampling
        try:
            from nlpaug.augmenter.word import BackTranslationAug
            from transformers.utils import logging
        except ImportError as error:
            raise TranslationError(
                f"translation needs the extra `text` ({error}); run: pip install 'refract[text]'"
            ) from error
        _load_in_this_process()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # Models of the same name would share one object, and the second pair would change the settings of the first.
        BackTranslationAug.clear_cache()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                augmenter = BackTranslationAug(forth, back, device=device, batch_size=batch, max_length=max_length)
        except Exception as error:  # third-party code: the exception types are unknown
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise TranslationError(
                f"{forth} and {back} cannot be loaded as translation models ({line}); set another --model"
            ) from error
        finally:
            BackTranslationAug.clear_cache()
        self._model: Any = augmenter.model
        self._directions = (
            _Direction(self._model.src_model, self._model.src_tokenizer, source, via, max_length),
            _Direction(self._model.tgt_model, self._model.tgt_tokenizer, via, source, max_length),
        )

    def __call__(self, texts: Sequence[str], seed: int) -> list[str | None]:
        """Return a paraphrase of each text, sampled with `seed`; None if the text or a translation is too long for a model.

        Raises TranslationError if a model fails.
        """
        import torch

        translated: list[str | None] = list(texts)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            try:
                for direction in self._directions:
                    complete = {i: text for i, text in enumerate(translated) if text is not None}
                    results = direction(self._model, list(complete.values()), self._sampling)
                    for i, text in zip(complete, results, strict=True):
                        translated[i] = text
            except Exception as error:  # third-party code: the exception types are unknown
                line = (str(error).splitlines() or [""])[0]
                more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
                raise TranslationError(
                    f"{texts[0][:60]!r}{more}: translation failed ({type(error).__name__}: {line})"
                ) from error
        return translated


def _load_in_this_process() -> None:
    """Make nlpaug load batches without a worker process.

    nlpaug starts a worker for each batch, which takes 0.1 s. If this process is killed, the worker continues for a while with the
    inherited files open, and so holds the lock of the cache.
    """
    from nlpaug.model.lang_models import machine_translation_transformers as translation
    from torch.utils import data

    def loader(dataset: Any, *, num_workers: int, **options: Any) -> Any:
        return data.DataLoader(dataset, **options)

    translation.t_data = SimpleNamespace(TensorDataset=data.TensorDataset, DataLoader=loader)


class _Direction:
    """One translation direction: a model, its tokenizer and the languages."""

    def __init__(self, model: Any, tokenizer: Any, source: str, target: str, max_length: int) -> None:
        self._model, self._tokenizer, self._prefix = model, tokenizer, ""
        positions = getattr(model.config, "max_position_embeddings", max_length)
        self._limit = min(max_length, tokenizer.model_max_length, positions)
        self._generation_options: dict[str, Any] = {}
        kind = model.config.model_type
        if kind == "t5":
            unknown = [code for code in (source, target) if code not in T5_NAMES]
            if unknown:
                raise TranslationError(f"T5 does not translate {unknown[0]!r}; accepted: {', '.join(T5_NAMES)}")
            self._prefix = f"translate {T5_NAMES[source]} to {T5_NAMES[target]}: "
        elif kind == "fsmt":
            if [tokenizer.src_lang, tokenizer.tgt_lang] != [source, target]:
                languages = f"{tokenizer.src_lang!r} to {tokenizer.tgt_lang!r}"
                raise TranslationError(
                    f"the model {model.name_or_path} translates {languages}, not {source!r} to {target!r}"
                )
        elif hasattr(tokenizer, "src_lang"):  # a multilingual model
            for code in (target, source):
                if _language(tokenizer, code) in (None, tokenizer.unk_token_id):
                    raise TranslationError(f"the model {model.name_or_path} does not support the language {code!r}")
            tokenizer.src_lang = source
            self._generation_options = {"forced_bos_token_id": _language(tokenizer, target)}

    def __call__(self, model: Any, texts: list[str], sampling: Sampling) -> list[str | None]:
        generation = self._model.generation_config
        generation.update(do_sample=sampling.top_k > 1, num_beams=1, **self._generation_options)
        generation.update(
            **({"top_k": sampling.top_k, "temperature": sampling.temperature} if sampling.top_k > 1 else {})
        )
        prompts = [self._prefix + text for text in texts]
        fits = [len(tokens) <= self._limit for tokens in self._tokenizer(prompts).input_ids] if prompts else []
        model.max_length, recorder = self._limit, _EndRecorder(self._model)
        short_prompts = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        translated = model.translate_one_step_batched(short_prompts, self._tokenizer, recorder) if short_prompts else []
        remaining = iter(zip(translated, recorder.complete, strict=True))
        results = [next(remaining) if fit else ("", False) for fit in fits]
        return [text.strip() if complete else None for text, complete in results]


def _language(tokenizer: Any, code: str) -> int | None:
    """Return the token id of a language. For an unsupported language, returns None or the id of the unknown token."""
    if not hasattr(tokenizer, "get_lang_id"):  # NLLB
        return tokenizer.convert_tokens_to_ids(code)
    try:
        return tokenizer.get_lang_id(code)
    except KeyError:
        return None


class _EndRecorder:
    """Wrap a model and record which translations ended with the end-of-sequence token, before the length limit."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.complete: list[bool] = []

    def generate(self, *, max_length: int, **more: Any) -> Any:
        import torch

        tokens = self._model.generate(max_length=max_length, **more)
        end = torch.as_tensor(self._model.generation_config.eos_token_id, device=tokens.device)
        # The first token may equal the end token, and the end token is often forced at the length limit: neither counts.
        self.complete += torch.isin(tokens[:, 1 : max_length - 1], end).any(dim=1).tolist()
        return tokens


@dataclass(frozen=True)
class Filter:
    """Accept or reject paraphrases.

    keep: protected words, see `refract.augment.text.words.protected_words`. length: in (0, 1]; a paraphrase has at least `length` times
    and at most 1 / `length` times the words of the text.
    """

    keep: tuple[str, ...] = (words.NUMBERS, words.NEGATIONS)
    length: float = 0.5
    _protected: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_protected", words.protected_words(self.keep))

    def reason(self, text: str, paraphrase: str, others: Sequence[str]) -> str | None:
        """Return the reason for a rejection: equal, empty, short, long, script or lost; None if the paraphrase is accepted.

        others: the accepted paraphrases of the same text.
        """
        if not paraphrase.strip():
            return "empty"
        plain = _plain(paraphrase)
        if plain == _plain(text) or plain in map(_plain, others):
            return "equal"
        before, after = (max(1, len(words.split(version)) // 2) for version in (text, paraphrase))
        if after < math.floor(self.length * before):
            return "short"
        if after > math.ceil(before / self.length):
            return "long"
        if _script(paraphrase) != _script(text):
            return "script"
        return "lost" if self._protected.lost(text, paraphrase) else None


def _plain(text: str) -> str:
    """Return the case-folded words of a text, without punctuation."""
    return " ".join(words.split(text.casefold())[1::2])


_SCRIPT = re.compile(r"^(HALF|FULL)WIDTH |[ -].*")


def _script(text: str) -> str:
    """Return the script of most letters: LATIN, CYRILLIC, CJK, …; an empty string for a text without letters."""
    names = (_SCRIPT.sub("", unicodedata.name(letter, "")) for letter in text if letter.isalpha())
    counts = Counter("CJK" if name in ("HIRAGANA", "KATAKANA") else name for name in names)
    return counts.most_common(1)[0][0] if counts else ""
