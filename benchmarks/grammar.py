"""A small language of synonyms, and two tiny models that translate it back and forth, for tests and benchmarks without downloads.

Each meaning has one word in the pivot language and several in English, so that a back-translation says the same in other words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NOUNS = {
    "auto": "car automobile vehicle", "haus": "house home building", "hund": "dog hound puppy", "kind": "child kid youngster",
    "arzt": "doctor physician medic", "weg": "road street path", "laden": "shop store market", "boot": "boat ship vessel",
    "feuer": "fire blaze flame", "wald": "forest wood grove", "stein": "stone rock boulder", "reise": "trip journey voyage",
}  # fmt: skip
ADJECTIVES = {
    "gross": "big large huge", "klein": "small little tiny", "schnell": "fast quick rapid", "froh": "happy glad cheerful",
    "traurig": "sad unhappy gloomy", "alt": "old ancient aged", "schoen": "pretty lovely beautiful", "klug": "smart clever bright",
}  # fmt: skip
VERBS = {
    "sieht": "sees spots notices", "sucht": "seeks pursues hunts", "mag": "likes enjoys loves", "nimmt": "takes grabs seizes",
    "baut": "builds makes constructs", "haelt": "keeps holds retains",
}  # fmt: skip
SAME = {"der": "the", "und": "and", "ein": "a"}
MEANINGS = {**NOUNS, **ADJECTIVES, **VERBS, **SAME}
MEANING_OF = {word: meaning for meaning, words in MEANINGS.items() for word in words.split()}

Meaning = tuple[str, ...]


def meaning(rng: np.random.Generator) -> Meaning:
    """Draw a meaning of the form `the ADJECTIVE NOUN VERB a ADJECTIVE NOUN`, at times without an adjective or with a further noun."""
    nouns, adjectives, verbs = list(NOUNS), list(ADJECTIVES), list(VERBS)

    def part(article: str) -> Meaning:
        adjective = (_one_of(adjectives, rng),) if rng.random() < 0.8 else ()
        return (article, *adjective, _one_of(nouns, rng))

    more = ("und", *part("ein")) if rng.random() < 0.3 else ()
    return (*part("der"), _one_of(verbs, rng), *part("ein"), *more)


def _one_of(words: Sequence[str], rng: np.random.Generator) -> str:
    """Draw a word as `rng.choice` does, without turning the words into an array each time."""
    return words[int(rng.integers(len(words)))]


def english(words: Meaning, rng: np.random.Generator) -> str:
    """Return one English sentence with this meaning."""
    return " ".join(_one_of(MEANINGS[word].split(), rng) for word in words)


def means(text: str) -> Meaning:
    """Return the meaning of a sentence, with "?" for an unknown word."""
    return tuple(MEANING_OF.get(word, "?") for word in text.split())


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return pairs (English, pivot language), each sentence once."""
    rng = np.random.default_rng(seed)
    translations: dict[str, str] = {}
    while len(translations) < count:
        words = meaning(rng)
        translations[english(words, rng)] = " ".join(words)
    return list(translations.items())


def train_models(folder: Path, *, count: int = 4000, steps: int = 600, seed: int = 0) -> tuple[Path, Path]:
    """Two Marian models of words, `folder`/en-de and de-en, and the tokenizers, as transformers saves them."""
    known = pairs(count, seed)
    return (
        _train(folder / "en-de", known, steps, seed),
        _train(folder / "de-en", [(b, a) for a, b in known], steps, seed + 1),
    )


def _train(folder: Path, known: Sequence[tuple[str, str]], steps: int, seed: int) -> Path:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

    words = [*dict.fromkeys(word for text in (*MEANINGS, *MEANING_OF) for word in text.split())]
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(seed)
    size = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    size |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    size |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    shape: dict[str, Any] = {
        **size,
        **tokens,
        "d_model": 64,
        "max_position_embeddings": 64,
        "vocab_size": len(vocabulary),
    }
    config = MarianConfig(dropout=0.0, scale_embedding=True, init_std=0.12, **shape)
    model = MarianMTModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.2)
    given, wanted = (
        tokenizer([pair[side] for pair in known], padding=True, return_tensors="pt").input_ids for side in (0, 1)
    )
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = torch.from_numpy(rng.integers(0, len(known), 32))
        inputs, labels = (_without_padding(tokens[chosen]) for tokens in (given, wanted))
        loss = model(inputs, attention_mask=inputs != 0, labels=labels.masked_fill(labels == 0, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.generation_config.update(max_length=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _without_padding(tokens: "torch.Tensor") -> "torch.Tensor":
    """Cut the columns behind the longest sentence of a batch (N, L)."""
    return tokens[:, : int((tokens != 0).sum(1).max())]
