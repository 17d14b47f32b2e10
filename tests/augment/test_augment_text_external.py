"""nlpaug's language models in a policy, with a BERT of random weights; and what keeps its augmenters apart."""

import threading
from pathlib import Path

import pytest

from refract.augment import Augmenter, PolicyError, load_policy
from refract.augment.text import words
from refract.augment.text.external import _respaced, _seeded

TEXT = "Don't buy the red dog, it's not a blue car 5D"


def bert(folder: Path, seed: int = 0, more: str = "") -> str:
    """A BERT that knows a few words, in lower case."""
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
    model.cls.predictions.bias.data[:5] = -1e4  # a trained one does not put in its own signs either
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("action", ["insert", "substitute"])
def test_a_language_model_changes_words_and_keeps_what_must_stay(tmp_path: Path, action: str) -> None:
    own = {"model_path": bert(tmp_path / "bert"), "action": action, "aug_p": 0.3}
    augmenter = Augmenter([{"nlpaug.ContextualWordEmbsAug": own}], seed=1)
    found = [augmenter.text(TEXT, epoch=0, index=i) for i in range(30)]
    assert found == [augmenter.text(TEXT, epoch=0, index=i) for i in range(30)] and len(set(found)) > 15
    for text in found:
        assert words.protected_words((words.NUMBERS, words.NEGATIONS)).lost(TEXT, text) == []
        assert "Don't" in text and "[" not in text
    others = words.protected_words(("buy", "the", "red", "dog", "a", "blue", "car"))
    assert any(others.lost(TEXT, text) for text in found) == (action == "substitute")
    plain = Augmenter([{"nlpaug.ContextualWordEmbsAug": {**own, "keep": ["red dog"]}}], seed=1)
    assert all("red dog" in plain.text("a red dog of some words", epoch=0, index=i) for i in range(20))


def test_a_text_with_what_the_model_does_not_know_stays(tmp_path: Path) -> None:
    policy = [{"nlpaug.ContextualWordEmbsAug": {"model_path": bert(tmp_path / "bert"), "keep": []}}]
    augmenter = Augmenter(policy)
    for text in ("a dog \ud800 car", "\udfff"):
        assert augmenter.text(text, epoch=0, index=0) == text
    text = "a dog 😀 red car"
    found = [augmenter.text(text, epoch=0, index=i) for i in range(20)]
    assert text in found and all(new == text or "😀" not in new for new in found) and "[" not in "".join(found)


def test_words_that_were_taken_apart_are_put_together() -> None:
    text = "Don't (buy) C:\\new it. A banana"
    assert _respaced("don ' t a banana ( buy ) c : \\ new it .", text) == "Don't a banana (buy) C:\\new it."


def test_two_models_of_one_folder_name_stay_two(tmp_path: Path) -> None:
    """nlpaug would take the second for the first."""
    one, other = bert(tmp_path / "a" / "bert"), bert(tmp_path / "b" / "bert", more="purple orange yellow white ")
    assert load_policy([{"nlpaug.ContextualWordEmbsAug": {"model_path": one}}])
    augmenter = Augmenter([{"nlpaug.ContextualWordEmbsAug": {"model_path": other, "aug_p": 0.5}}])
    found = {word for i in range(40) for word in augmenter.text("a red dog", epoch=0, index=i).split()}
    assert found & {"purple", "orange", "yellow", "white"}


def test_one_augmenter_draws_at_a_time() -> None:
    """They share nlpaug's generators."""
    inside, other = threading.Event(), threading.Thread(target=lambda: _seeded(1, inside.set))

    def run() -> bool:
        other.start()
        return inside.wait(0.3)

    assert not _seeded(0, run)
    other.join()
    assert inside.is_set()


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="ContextualWordEmbsAug refused its parameters"):
        load_policy([{"nlpaug.ContextualWordEmbsAug": {"model_path": str(tmp_path / "bert")}}])


def test_nlpaugs_own_stopwords_stay_too() -> None:
    own = {"action": "delete", "aug_p": 0.9, "p": 1.0, "stopwords": ["brown"], "keep": ["fox"]}
    augmenter = Augmenter([{"nlpaug.RandomWordAug": own}], seed=1)
    for epoch in range(5):
        said = augmenter.text("the quick brown fox jumps over dogs", epoch=epoch, index=0).split()
        assert {"brown", "fox"} <= set(said) and len(said) < 7
