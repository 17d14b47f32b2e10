"""Adapter for nlpaug's augmenters in a policy: `nlpaug.RandomWordAug: {action: swap}`, `nlpaug.KeyboardAug: {}`.

The adapter works around these properties of nlpaug:

- It draws from three global generators: the adapter replaces them by separate ones, seeded for each sample.
- Its tokenizer splits `Don't`: the adapter passes a tokenizer that splits at spaces.
- It can change protected words: the adapter passes them as stop words and rejects a result that lost one.
- It caches language models by folder name, so that two folders of one name share a model: the adapter disables the cache.
- It calls tokenizer methods that transformers 5 removed: the adapter adds them.
- It replaces stop words by the unknown token of a language model, which then remains in the text: the adapter disables that.

Importing nlpaug imports PyTorch and transformers, which takes seconds. The import happens when a policy names an augmenter.
"""

import inspect
import json
import random
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from refract.augment.ops.base import Args, Size, below, nearest
from refract.augment.plan import Step
from refract.augment.text import words
from refract.augment.text.ops import TextOp

if TYPE_CHECKING:
    import torch

PREFIX = "nlpaug."


@dataclass(frozen=True, kw_only=True)
class ThirdPartyTextTransform(TextOp):
    """Apply an augmenter of nlpaug, seeded for each sample.

    augmenter: class name, such as `RandomWordAug`. parameters: the augmenter's parameters, JSON values. Its own parameters (`aug_p`)
    set the strength; `fraction` has no effect.
    The text is unchanged if the result lost a protected word (`keep`) or gained a special token of a language model (such as `[UNK]`).
    """

    augmenter: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            text = json.dumps(dict(self.parameters), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters: {self.parameters!r} are not JSON values ({error})") from error
        self._set("parameters", json.loads(text))
        _augmenter(self.augmenter, text)

    @property
    def name(self) -> str:
        return PREFIX + self.augmenter

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return [Step("ThirdPartyTextTransform", self.draw(rng, size))] if rng.random() < self.p else []

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        fixed = {"augmenter": self.augmenter, "parameters": dict(self.parameters), "keep": list(self.keep)}
        return {**fixed, "seed": below(rng, 1 << 32)}

    @classmethod
    def on_text(cls, args: Args, text: str) -> str:
        if not text.strip() or _SURROGATES.search(text):  # tokenizers reject lone surrogates
            return text
        augmenter = _augmenter(args["augmenter"], json.dumps(args["parameters"], sort_keys=True))
        protected = words.protected_words(tuple(args["keep"]))

        def run() -> Any:
            _protect(augmenter, [*(args["parameters"].get("stopwords") or ()), *_protected_tokens(text, protected)])
            return augmenter.augment(text)

        try:
            result = _seeded(args["seed"], run)
        except Exception as error:  # third-party code: the exception types are unknown
            raise ValueError(f"{PREFIX}{args['augmenter']} failed: {type(error).__name__}: {error}") from error
        changed = result[0] if isinstance(result, list) and result else result
        if not isinstance(changed, str) or not changed.strip():
            return text
        changed = _respaced(changed, text)
        special_tokens = getattr(_tokenizer(augmenter), "all_special_tokens", ())
        gained = any(changed.count(token) > text.count(token) for token in special_tokens)
        return text if gained or protected.lost(text, changed) else changed


def external_text_transform(name: str, parameters: Mapping[str, Any]) -> ThirdPartyTextTransform:
    """Build the op for the short form `nlpaug.NAME: parameters` of a policy. `p` and `keep` belong to the op, the rest to the augmenter."""
    options = dict(parameters)
    op_options = {key: options.pop(key) for key in ("p", "keep") if key in options}
    return ThirdPartyTextTransform(augmenter=name.removeprefix(PREFIX), parameters=options, **op_options)


_SURROGATES = re.compile("[\ud800-\udfff]")


def _tokenizer(augmenter: Any) -> Any:
    """Return the tokenizer of a language model; None for other augmenters."""
    model: Any = getattr(augmenter, "model", None)
    return model.get_tokenizer() if hasattr(model, "get_tokenizer") else None


def _protect(augmenter: Any, tokens: list[str]) -> None:
    """Set the augmenter's stop words."""
    tokenizer = _tokenizer(augmenter)
    if tokenizer is None:
        augmenter.stopwords = tokens
        return
    # nlpaug would replace whole stop words by the unknown token. Stop words given as subword pieces are only skipped.
    augmenter.stopword_reg = re.compile("(?!)")
    pieces = (piece for token in tokens for form in (token, f" {token}") for piece in tokenizer.tokenize(form))
    augmenter.stopwords = sorted({piece.lower() for piece in pieces})


def _protected_tokens(text: str, protected: words.ProtectedWords) -> list[str]:
    """Return the space-separated tokens that contain a protected word."""
    pieces = words.split(text)
    indices = protected.indices(pieces)
    marks = "".join(("x" if i in indices else " ") * len(piece) for i, piece in enumerate(pieces))
    return [token.group() for token in re.finditer(r"\S+", text) if "x" in marks[token.start() : token.end()]]


def _respaced(changed: str, text: str) -> str:
    """Return `changed` with the words of `text` restored that a tokenizer split (`Don ' t`)."""
    for word in dict.fromkeys(text.split()):
        by_piece = " ".join(piece for piece in words.split(word) for piece in _marks(piece))
        by_character = " ".join("".join(c if c.isalnum() else f" {c} " for c in word).split())
        for form in (by_piece, by_character):
            pattern = rf"(?<!\S){re.escape(form)}(?!\S)"
            changed = (
                re.sub(pattern, word.replace("\\", r"\\"), changed, flags=re.IGNORECASE) if form != word else changed
            )
    return changed


def _marks(piece: str) -> list[str]:
    """Split a separator into characters; keep a word whole."""
    return [piece] if piece[:1].isalnum() else list(piece)


_generator_lock = threading.Lock()


@cache
def _generators() -> tuple[random.Random, np.random.RandomState, "torch.Generator"]:
    """Replace the global generators in nlpaug's modules by separate ones, so that draws of other threads do not change a text."""
    import torch
    from nlpaug import base_augmenter
    from nlpaug.model import base_model
    from nlpaug.model.lang_models import language_models
    from nlpaug.model.word_stats import word_statistics

    generators = random.Random(), np.random.RandomState(), torch.Generator()
    base_augmenter.random = generators[0]
    for module in (base_augmenter, base_model, word_statistics):
        module.np = SimpleNamespace(**{**vars(np), "random": generators[1]})
    multinomial = partial(torch.multinomial, generator=generators[2])
    language_models.torch = SimpleNamespace(**{**vars(torch), "multinomial": multinomial})
    return generators


def _seeded(seed: int, run: Callable[[], Any]) -> Any:
    """Call `run` with nlpaug's generators seeded. A lock excludes other threads from the generators."""
    with _generator_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers, arrays, tensors = _generators()
        numbers.seed(seed)
        arrays.seed(seed)
        tensors.manual_seed(seed)
        return run()


@cache
def _augmenter(name: str, parameters: str) -> Any:
    """Build an nlpaug augmenter and run it on a trial text.

    Raises ValueError for an unknown augmenter, for rejected parameters and if the trial fails.
    """
    augmenter_class = _augmenter_classes().get(name)
    if augmenter_class is None:
        raise ValueError(f"nlpaug has no text augmenter {name!r}{nearest(name, _augmenter_classes())}")
    options = json.loads(parameters)
    known = inspect.signature(augmenter_class).parameters
    for key in options:
        if key not in known:
            raise ValueError(f"{PREFIX}{name} has no parameter {key!r}{nearest(key, known)}. Known: {', '.join(known)}")
    if name == "RandomWordAug" and options.get("action") == "insert":
        raise ValueError(
            "nlpaug.RandomWordAug does not support the action insert; use WordInsert or nlpaug.ContextualWordEmbsAug"
        )
    if name == "BackTranslationAug":
        raise ValueError(
            "nlpaug.BackTranslationAug is too slow during training; run `refract paraphrase` and use the op BackTranslation"
        )
    if "tokenizer" in known:
        options |= {"tokenizer": str.split, "reverse_tokenizer": " ".join}
    if "force_reload" in known:
        options["force_reload"] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            augmenter = augmenter_class(**options)
            _seeded(0, lambda: augmenter.augment("the first text of some words"))
    except Exception as error:
        raise ValueError(
            f"{PREFIX}{name} rejected its parameters: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    return augmenter


def _patch_token_lookup() -> None:
    """Make nlpaug's language models call tokenizer methods that exist in transformers 5."""
    from nlpaug.model import lang_models

    for kind in (lang_models.Bert, lang_models.DistilBert, lang_models.Roberta):
        kind.token2id = lambda self, token: self.tokenizer.convert_tokens_to_ids(token)
        kind.id2token = lambda self, number: self.tokenizer.convert_ids_to_tokens(number)


@cache
def _augmenter_classes() -> Mapping[str, type]:
    """Return the augmenter classes of nlpaug by name. ValueError if nlpaug is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from nlpaug.augmenter import char, word
    except ImportError as error:
        raise ValueError(f"nlpaug is not installed ({error}); run: pip install 'refract[text]'") from error
    _patch_token_lookup()
    members = {**vars(char), **vars(word)}
    return MappingProxyType(
        {key: value for key, value in members.items() if inspect.isclass(value) and key.endswith("Aug")}
    )


EXTERNAL_TEXT: Mapping[str, type[TextOp]] = MappingProxyType({"ThirdPartyTextTransform": ThirdPartyTextTransform})
