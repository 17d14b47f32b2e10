"""Back-translation in batches, by nlpaug's `BackTranslationAug`, and the filter that its results pass.

What it would break is kept in here: two pairs of models of one name would be one model; the tokenizers of models for many languages want
to be told which; greedy search gives one and the same paraphrase as often as it is asked; what is too long it cuts without a word.
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

T5_NAMES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}
"""The languages that T5 was trained to translate, by the names that its prompts use (Raffel et al. 2020, arXiv:1910.10683, appendix D)."""


class TranslationError(ValueError):
    """A model cannot be had, or does not translate. The message names it."""


@dataclass(frozen=True)
class Sampling:
    """How variants come to differ. top_k: the likeliest words of which each is drawn, 1 takes the likeliest; temperature: > 0, higher is
    bolder."""

    top_k: int = 10
    temperature: float = 1.0


class BackTranslator:
    """There and back by one pair of models. forth, back: local folders or hub names of Marian, FSMT, T5, M2M100 or NLLB; the codes tell
    models of many languages which: `en` and `de`, for NLLB `eng_Latn` and `deu_Latn`."""

    def __init__(
        self, forth: str, back: str, *, source: str, via: str, device: str = "cpu", batch: int = 32, max_length: int = 256,
        sampling: Sampling = Sampling(),
    ) -> None:  # fmt: skip
        """TranslationError where a model cannot be loaded or does not know a language."""
        self.name = f"{forth} {back} {source} {via} {max_length} {sampling}"
        self._sampling = sampling
        try:
            from nlpaug.augmenter.word import BackTranslationAug
            from transformers.utils import logging
        except ImportError as error:
            raise TranslationError(
                f"translation needs the extra text: pip install 'refract[text]' ({error})"
            ) from error
        _keep_to_this_process()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # Two of one name would share one model, and the second would change the settings of the first.
        BackTranslationAug.clear_cache()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = BackTranslationAug(forth, back, device=device, batch_size=batch, max_length=max_length)
        except Exception as error:  # of many kinds, from files, the hub, and models of other kinds
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise TranslationError(f"{forth} and {back} cannot be loaded as models that translate: {line}") from error
        finally:
            BackTranslationAug.clear_cache()
        self._model: Any = made.model
        self._ways = (
            _Way(made.model.src_model, made.model.src_tokenizer, source, via, max_length),
            _Way(made.model.tgt_model, made.model.tgt_tokenizer, via, source, max_length),
        )

    def __call__(self, texts: Sequence[str], seed: int) -> list[str | None]:
        """A paraphrase of each text, drawn anew for each seed; None of one that is too long for a model, or becomes so. TranslationError
        where a model fails."""
        import torch

        found: list[str | None] = list(texts)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            try:
                for way in self._ways:
                    whole = {place: text for place, text in enumerate(found) if text is not None}
                    for place, text in zip(whole, way(self._model, list(whole.values()), self._sampling), strict=True):
                        found[place] = text
            except Exception as error:  # of many kinds, from the tokenizer, the model and the device
                line = (str(error).splitlines() or [""])[0]
                more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
                raise TranslationError(
                    f"{texts[0][:60]!r}{more}: cannot be translated ({type(error).__name__}: {line})"
                ) from error
        return found


def _keep_to_this_process() -> None:
    """nlpaug would start a process for each batch: that takes a tenth of a second, and where this process is killed the other one goes on
    for a while, with this one's open files, and so with the lock of the cache that is filled."""
    from nlpaug.model.lang_models import machine_translation_transformers as translation
    from torch.utils import data

    def loader(dataset: Any, *, num_workers: int, **options: Any) -> Any:
        return data.DataLoader(dataset, **options)

    translation.t_data = SimpleNamespace(TensorDataset=data.TensorDataset, DataLoader=loader)


class _Way:
    """One direction of a pair."""

    def __init__(self, model: Any, tokenizer: Any, source: str, target: str, max_length: int) -> None:
        self._model, self._tokenizer, self._prefix = model, tokenizer, ""
        positions = getattr(model.config, "max_position_embeddings", max_length)
        self._limit = min(max_length, tokenizer.model_max_length, positions)
        self._own: dict[str, Any] = {}
        kind = model.config.model_type
        if kind == "t5":
            unknown = [code for code in (source, target) if code not in T5_NAMES]
            if unknown:
                raise TranslationError(f"T5 does not translate {unknown[0]!r}; it knows {', '.join(T5_NAMES)}")
            self._prefix = f"translate {T5_NAMES[source]} to {T5_NAMES[target]}: "
        elif kind == "fsmt":
            if [tokenizer.src_lang, tokenizer.tgt_lang] != [source, target]:
                own = f"{tokenizer.src_lang!r} to {tokenizer.tgt_lang!r}"
                raise TranslationError(f"the model {model.name_or_path} translates {own}, not {source!r} to {target!r}")
        elif hasattr(tokenizer, "src_lang"):  # of many languages
            for code in (target, source):
                if _language(tokenizer, code) in (None, tokenizer.unk_token_id):
                    raise TranslationError(f"the model {model.name_or_path} does not know the language {code!r}")
            tokenizer.src_lang = source
            self._own = {"forced_bos_token_id": _language(tokenizer, target)}

    def __call__(self, model: Any, texts: list[str], sampling: Sampling) -> list[str | None]:
        own = self._model.generation_config
        own.update(do_sample=sampling.top_k > 1, num_beams=1, **self._own)
        own.update(**({"top_k": sampling.top_k, "temperature": sampling.temperature} if sampling.top_k > 1 else {}))
        given = [self._prefix + text for text in texts]
        fits = [len(tokens) <= self._limit for tokens in self._tokenizer(given).input_ids] if given else []
        model.max_length, ends = self._limit, _Ends(self._model)
        chosen = [text for text, fit in zip(given, fits, strict=True) if fit]
        found = model.translate_one_step_batched(chosen, self._tokenizer, ends) if chosen else []
        left = iter(zip(found, ends.reached, strict=True))
        results = [next(left) if fit else ("", False) for fit in fits]
        return [text.strip() if whole else None for text, whole in results]


def _language(tokenizer: Any, code: str) -> int | None:
    """The token of a language; None, or that of unknown words, where the model does not know it."""
    if not hasattr(tokenizer, "get_lang_id"):  # NLLB's
        return tokenizer.convert_tokens_to_ids(code)
    try:
        return tokenizer.get_lang_id(code)
    except KeyError:
        return None


class _Ends:
    """A model, and which of its translations came to an end by themselves."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.reached: list[bool] = []

    def generate(self, *, max_length: int, **more: Any) -> Any:
        import torch

        found = self._model.generate(max_length=max_length, **more)
        end = torch.as_tensor(self._model.generation_config.eos_token_id, device=found.device)
        # The first token may be the same sign; as the last of all it is often forced.
        self.reached += torch.isin(found[:, 1 : max_length - 1], end).any(dim=1).tolist()
        return found


@dataclass(frozen=True)
class Filter:
    """Which paraphrases are used. keep: words that must stay, see `refract.augment.text.words.protected_words`; length: a
    paraphrase has at least so many times the words of the text, and at most that the other way."""

    keep: tuple[str, ...] = (words.NUMBERS, words.NEGATIONS)
    length: float = 0.5
    _kept: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kept", words.protected_words(self.keep))

    def reason(self, text: str, paraphrase: str, others: Sequence[str]) -> str | None:
        """Why it is not used: equal, empty, short, long, script or lost; None where it is. others: used ones of the same text."""
        if not paraphrase.strip():
            return "empty"
        plain = _plain(paraphrase)
        if plain == _plain(text) or plain in map(_plain, others):
            return "equal"
        before, after = (max(1, len(words.split(one)) // 2) for one in (text, paraphrase))
        if after < math.floor(self.length * before):
            return "short"
        if after > math.ceil(before / self.length):
            return "long"
        if _script(paraphrase) != _script(text):
            return "script"
        return "lost" if self._kept.lost(text, paraphrase) else None


def _plain(text: str) -> str:
    return " ".join(words.split(text.casefold())[1::2])


_SCRIPT = re.compile(r"^(HALF|FULL)WIDTH |[ -].*")


def _script(text: str) -> str:
    """Of most of its letters: LATIN, CYRILLIC, CJK, …; "" without letters."""
    names = (_SCRIPT.sub("", unicodedata.name(letter, "")) for letter in text if letter.isalpha())
    counts = Counter("CJK" if name in ("HIRAGANA", "KATAKANA") else name for name in names)
    return counts.most_common(1)[0][0] if counts else ""
