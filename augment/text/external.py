"""nlpaug's augmenters inside a policy: `nlpaug.RandomWordAug: {action: swap}`, `nlpaug.ContextualWordEmbsAug: {model_path: FOLDER}`.

What it would break is kept in here: it draws from three global generators, and gets its own, seeded for each sample; it takes `Don't`
apart, and is given words as they stand between spaces; it would change words that must stay; it takes two models of one folder name for
one; it asks for methods that tokenizers do not have any more; and what must stay it gives language models as unknown words, which then
stand in the text. Its import brings PyTorch and transformers and takes seconds: it
happens when a policy names one of its augmenters.
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
class TextGuest(TextOp):
    """An augmenter of nlpaug, seeded for each sample. augmenter: its class, as `RandomWordAug`; parameters: its own, JSON values.

    How much it changes is for its own parameters (`aug_p`) to say; `share` has no effect. A result that has lost a word that must stay
    (`keep`), or has got a language model's own sign (`[UNK]` for what it does not know), is not taken: the text stays as it was.
    """

    augmenter: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            text = json.dumps(dict(self.parameters), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"parameters: {self.parameters!r} are not plain numbers, texts and lists ({error})"
            ) from error
        self._set("parameters", json.loads(text))
        _augmenter(self.augmenter, text)

    @property
    def name(self) -> str:
        return PREFIX + self.augmenter

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return [Step("TextGuest", self.draw(rng, size))] if rng.random() < self.p else []

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        own = {"augmenter": self.augmenter, "parameters": dict(self.parameters), "keep": list(self.keep)}
        return {**own, "seed": below(rng, 1 << 32)}

    @classmethod
    def on_text(cls, args: Args, text: str) -> str:
        if not text.strip() or _HALVES.search(text):  # no tokenizer takes halves of surrogate pairs
            return text
        made = _augmenter(args["augmenter"], json.dumps(args["parameters"], sort_keys=True))
        stays = words.protected_words(tuple(args["keep"]))

        def run() -> Any:
            _protect(made, [*(args["parameters"].get("stopwords") or ()), *_staying(text, stays)])
            return made.augment(text)

        try:
            found = _seeded(args["seed"], run)
        except Exception as error:  # whatever another library raises for a text that it cannot work with
            raise ValueError(f"{PREFIX}{args['augmenter']} failed: {type(error).__name__}: {error}") from error
        changed = found[0] if isinstance(found, list) and found else found
        if not isinstance(changed, str) or not changed.strip():
            return text
        changed = _respaced(changed, text)
        signs = getattr(_tokenizer(made), "all_special_tokens", ())
        odd = any(changed.count(sign) > text.count(sign) for sign in signs)
        return text if odd or stays.lost(text, changed) else changed


def external_text_transform(name: str, parameters: Mapping[str, Any]) -> TextGuest:
    """The op that `nlpaug.NAME: parameters` in a policy is short for; `p` and `keep` are the op's own."""
    own = dict(parameters)
    ours = {key: own.pop(key) for key in ("p", "keep") if key in own}
    return TextGuest(augmenter=name.removeprefix(PREFIX), parameters=own, **ours)


_HALVES = re.compile("[\ud800-\udfff]")


def _tokenizer(made: Any) -> Any:
    """A language model's; None of other augmenters."""
    model: Any = getattr(made, "model", None)
    return model.get_tokenizer() if hasattr(model, "get_tokenizer") else None


def _protect(made: Any, tokens: list[str]) -> None:
    tokenizer = _tokenizer(made)
    if tokenizer is None:
        made.stopwords = tokens
        return
    # It would put the unknown sign in their place and lose them; as pieces of words they are only passed over.
    made.stopword_reg = re.compile("(?!)")
    pieces = (piece for token in tokens for form in (token, f" {token}") for piece in tokenizer.tokenize(form))
    made.stopwords = sorted({piece.lower() for piece in pieces})


def _staying(text: str, stays: words.ProtectedWords) -> list[str]:
    """What stands between spaces and holds a word that must stay."""
    pieces = words.split(text)
    places = stays.indices(pieces)
    marks = "".join(("x" if place in places else " ") * len(piece) for place, piece in enumerate(pieces))
    return [token.group() for token in re.finditer(r"\S+", text) if "x" in marks[token.start() : token.end()]]


def _respaced(changed: str, text: str) -> str:
    """`changed` with the words of `text` that a tokenizer took apart (`Don ' t`) put together."""
    for word in dict.fromkeys(text.split()):
        apart = " ".join(piece for piece in words.split(word) for piece in _marks(piece))
        loose = " ".join("".join(c if c.isalnum() else f" {c} " for c in word).split())
        for form in (apart, loose):
            pattern = rf"(?<!\S){re.escape(form)}(?!\S)"
            changed = (
                re.sub(pattern, word.replace("\\", r"\\"), changed, flags=re.IGNORECASE) if form != word else changed
            )
    return changed


def _marks(piece: str) -> list[str]:
    return [piece] if piece[:1].isalnum() else list(piece)


_turn = threading.Lock()


@cache
def _generators() -> tuple[random.Random, np.random.RandomState, "torch.Generator"]:
    """The generators that nlpaug draws from in place of the global ones, where another thread's draws would change a text."""
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
    """`run` with nlpaug's generators at `seed`, while no other thread draws from them."""
    with _turn, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers, arrays, tensors = _generators()
        numbers.seed(seed)
        arrays.seed(seed)
        tensors.manual_seed(seed)
        return run()


@cache
def _augmenter(name: str, parameters: str) -> Any:
    """ValueError for an augmenter that there is not, refuses its parameters, or cannot change a first text."""
    kind = _kinds().get(name)
    if kind is None:
        raise ValueError(f"nlpaug has no augmenter {name!r} of texts{nearest(name, _kinds())}")
    own = json.loads(parameters)
    known = inspect.signature(kind).parameters
    for key in own:
        if key not in known:
            raise ValueError(f"{PREFIX}{name} has no parameter {key!r}{nearest(key, known)}. Known: {', '.join(known)}")
    if name == "RandomWordAug" and own.get("action") == "insert":
        raise ValueError(
            "nlpaug.RandomWordAug: nlpaug has no action insert; take WordInsert or nlpaug.ContextualWordEmbsAug"
        )
    if name == "BackTranslationAug":
        raise ValueError(
            "translating takes too long for training: `refract paraphrase` does it before, and BackTranslation draws from it"
        )
    if "tokenizer" in known:
        own |= {"tokenizer": str.split, "reverse_tokenizer": " ".join}
    if "force_reload" in known:
        own["force_reload"] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kind(**own)
            _seeded(0, lambda: made.augment("the first text of some words"))
    except Exception as error:
        raise ValueError(
            f"{PREFIX}{name} refused its parameters: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    return made


def _restore() -> None:
    """Let nlpaug's language models ask their tokenizers by methods that transformers 5 has."""
    from nlpaug.model import lang_models

    for kind in (lang_models.Bert, lang_models.DistilBert, lang_models.Roberta):
        kind.token2id = lambda self, token: self.tokenizer.convert_tokens_to_ids(token)
        kind.id2token = lambda self, number: self.tokenizer.convert_ids_to_tokens(number)


@cache
def _kinds() -> Mapping[str, type]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from nlpaug.augmenter import char, word
    except ImportError as error:
        raise ValueError(f"nlpaug is not installed ({error}): pip install 'refract[text]'") from error
    _restore()
    found = {**vars(char), **vars(word)}
    return MappingProxyType(
        {key: value for key, value in found.items() if inspect.isclass(value) and key.endswith("Aug")}
    )


EXTERNAL_TEXT: Mapping[str, type[TextOp]] = MappingProxyType({"TextGuest": TextGuest})
