"""nlpaug's language models in a policy, with a BERT of random weights, and the isolation of its augmenters."""

import threading
from pathlib import Path

import pytest

from refract.augment import Augmenter, PolicyError, load_policy
from refract.augment.text import words
from refract.augment.text.external import _respaced, _seeded

TEXT = "Don't buy the red dog, it's not a blue car 5D"


def bert(folder: Path, seed: int = 0, more: str = "") -> str:
    """Save a BERT with a small lower-case vocabulary and return its folder."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    known = "[PAD] [UNK] [CLS] [SEP] [MASK] the first text of some words a dog red blue car not don ' t s it buy ##ing . , 5 ##d green"
    tokens = [*known.split(), *more.split()]
    folder.mkdir(parents=True)
    BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}).save_pretrained(folder)
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokens), max_position_embeddings=64, initializer_range=0.3, **size)
    model = BertForMaskedLM(config)
    model.cls.predictions.bias.data[:5] = -1e4  # a trained model does not insert special tokens either
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("action", ["insert", "substitute"])
def test_language_model_changes_words_and_keeps_protected_words(tmp_path: Path, action: str) -> None:
    options = {"model_path": bert(tmp_path / "bert"), "action": action, "aug_p": 0.3}
    augmenter = Augmenter([{"nlpaug.ContextualWordEmbsAug": options}], seed=1)
    drawn = [augmenter.text(TEXT, epoch=0, index=i) for i in range(30)]
    assert drawn == [augmenter.text(TEXT, epoch=0, index=i) for i in range(30)] and len(set(drawn)) > 15
    for text in drawn:
        assert words.protected_words((words.NUMBERS, words.NEGATIONS)).lost(TEXT, text) == []
        assert "Don't" in text and "[" not in text
    others = words.protected_words(("buy", "the", "red", "dog", "a", "blue", "car"))
    assert any(others.lost(TEXT, text) for text in drawn) == (action == "substitute")
    plain = Augmenter([{"nlpaug.ContextualWordEmbsAug": {**options, "keep": ["red dog"]}}], seed=1)
    assert all("red dog" in plain.text("a red dog of some words", epoch=0, index=i) for i in range(20))


def test_unknown_tokens_do_not_enter_a_text(tmp_path: Path) -> None:
    policy = [{"nlpaug.ContextualWordEmbsAug": {"model_path": bert(tmp_path / "bert"), "keep": []}}]
    augmenter = Augmenter(policy)
    for text in ("a dog \ud800 car", "\udfff"):
        assert augmenter.text(text, epoch=0, index=0) == text
    text = "a dog 😀 red car"
    drawn = [augmenter.text(text, epoch=0, index=i) for i in range(20)]
    assert text in drawn and all(new == text or "😀" not in new for new in drawn) and "[" not in "".join(drawn)


def test_words_split_by_a_tokenizer_are_restored() -> None:
    text = "Don't (buy) C:\\new it. A banana"
    assert _respaced("don ' t a banana ( buy ) c : \\ new it .", text) == "Don't a banana (buy) C:\\new it."


def test_two_models_with_the_same_folder_name_are_separate(tmp_path: Path) -> None:
    """nlpaug caches models by folder name and would return the first."""
    first, second = bert(tmp_path / "a" / "bert"), bert(tmp_path / "b" / "bert", more="purple orange yellow white ")
    assert load_policy([{"nlpaug.ContextualWordEmbsAug": {"model_path": first}}])
    augmenter = Augmenter([{"nlpaug.ContextualWordEmbsAug": {"model_path": second, "aug_p": 0.5}}])
    drawn = {word for i in range(40) for word in augmenter.text("a red dog", epoch=0, index=i).split()}
    assert drawn & {"purple", "orange", "yellow", "white"}


def test_one_augmenter_draws_at_a_time() -> None:
    """Augmenters share nlpaug's generators."""
    inside, other = threading.Event(), threading.Thread(target=lambda: _seeded(1, inside.set))

    def run() -> bool:
        other.start()
        return inside.wait(0.3)

    assert not _seeded(0, run)
    other.join()
    assert inside.is_set()


def test_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="ContextualWordEmbsAug rejected its parameters"):
        load_policy([{"nlpaug.ContextualWordEmbsAug": {"model_path": str(tmp_path / "bert")}}])


def test_stopwords_of_nlpaug_are_protected_too() -> None:
    options = {"action": "delete", "aug_p": 0.9, "p": 1.0, "stopwords": ["brown"], "keep": ["fox"]}
    augmenter = Augmenter([{"nlpaug.RandomWordAug": options}], seed=1)
    for epoch in range(5):
        remaining = augmenter.text("the quick brown fox jumps over dogs", epoch=epoch, index=0).split()
        assert {"brown", "fox"} <= set(remaining) and len(remaining) < 7
