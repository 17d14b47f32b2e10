"""Back-translation by models of each architecture with random weights: the tests check the inputs of the models."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="the extra text is not installed")

from refract.augment.text.translation import BackTranslator, TranslationError  # noqa: E402 — after the check for the extra

TEXTS = ["the small dog", "a cat runs"]
LINES = [
    *TEXTS,
    "a big cat sees der kleine Hund",
    "translate English to German: French",
    "numbers 1 2 3 and words",
] * 20
SIZES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pieces(folder: Path) -> dict[str, float]:
    """Train a SentencePiece model in the folder; return piece → score."""
    prefix = str(folder / "sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=prefix, vocab_size=40, character_coverage=1.0, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    return {model.id_to_piece(i): model.get_score(i) for i in range(3, model.get_piece_size())}


def numbered(pieces: dict[str, float]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}


def saved(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def m2m100(folder: Path, pieces: dict[str, float]) -> str:
    (folder / "vocab.json").write_text(json.dumps(numbered(pieces)))
    tokenizer = transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "sp.model"))
    model = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(vocab_size=300, **SIZES))
    return saved(folder / "m2m100", model, tokenizer)


def nllb(folder: Path, pieces: dict[str, float]) -> str:
    tokenizer = transformers.NllbTokenizer(vocab=numbered(pieces), merges=[])
    model = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(vocab_size=300, **SIZES))
    return saved(folder / "nllb", model, tokenizer)


def t5(folder: Path, pieces: dict[str, float]) -> str:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items()]
    config = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return saved(
        folder / "t5",
        transformers.T5ForConditionalGeneration(config),
        transformers.T5Tokenizer(vocabulary, extra_ids=0),
    )


def fsmt(folder: Path, langs: tuple[str, str]) -> str:
    letters = sorted({letter for line in LINES for letter in line.replace(" ", "")})
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {
        piece: number for number, piece in enumerate([*marks, *letters, *[f"{letter}</w>" for letter in letters]])
    }
    for side in ("src", "tgt"):
        (folder / f"vocab-{side}.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("")
    tokenizer = transformers.FSMTTokenizer(
        langs=[*langs], src_vocab_file=str(folder / "vocab-src.json"), tgt_vocab_file=str(folder / "vocab-tgt.json"),
        merges_file=str(folder / "merges.txt"),
    )  # fmt: skip
    sizes = {"src_vocab_size": len(vocabulary), "tgt_vocab_size": len(vocabulary), **SIZES}
    model = transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(langs=[*langs], **sizes))
    return saved(folder / "-".join(("fsmt", *langs)), model, tokenizer)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Record (input tokens, output tokens) of the first text of each model call."""
    recorded: list[tuple[list[int], list[int]]] = []
    generate = transformers.GenerationMixin.generate

    def spied(self: Any, *args: Any, **more: Any) -> Any:
        tokens = generate(self, *args, **more)
        recorded.append((more["input_ids"][0].tolist(), tokens[0].tolist()))
        return tokens

    monkeypatch.setattr(transformers.GenerationMixin, "generate", spied)
    yield recorded


@pytest.mark.parametrize(("make", "source", "via"), [(m2m100, "en", "de"), (nllb, "eng_Latn", "deu_Latn")])
def test_multilingual_models_receive_both_languages(
    make: Callable[..., str], source: str, via: str, folder: Path, pieces: dict[str, float], calls: list[Any]
) -> None:
    model = make(folder, pieces)
    translator = BackTranslator(model, model, source=source, via=via, max_length=60)
    assert len(translator(TEXTS, seed=1)) == len(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    number = tokenizer.get_lang_id if make is m2m100 else tokenizer.convert_tokens_to_ids
    inputs, outputs = calls[0]
    assert number(source) in inputs, "the source language is in the input"
    assert outputs[1] == number(via), "the first output token is the target language"
    for codes in ({"source": source, "via": "tlh"}, {"source": "tlh", "via": via}):
        with pytest.raises(TranslationError, match="does not support the language 'tlh'"):
            BackTranslator(model, model, **codes)


def test_t5_receives_the_languages_as_a_prompt(folder: Path, pieces: dict[str, float], calls: list[Any]) -> None:
    model = t5(folder, pieces)
    translator = BackTranslator(model, model, source="en", via="de", max_length=120)
    assert len(translator(TEXTS, seed=1)) == len(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(calls[0][0]).startswith("translate English to German: the small dog")
    with pytest.raises(TranslationError, match="T5 does not translate 'es'"):
        BackTranslator(model, model, source="en", via="es")


def test_fsmt_translates_there_and_back(folder: Path, calls: list[Any]) -> None:
    forth, back = fsmt(folder, ("en", "de")), fsmt(folder, ("de", "en"))
    translator = BackTranslator(forth, back, source="en", via="de", max_length=50)
    assert len(translator(TEXTS, seed=1)) == len(TEXTS)
    assert transformers.AutoTokenizer.from_pretrained(forth).decode(calls[0][0], skip_special_tokens=True) == TEXTS[0]
    with pytest.raises(TranslationError, match="translates 'de' to 'en', not 'en' to 'de'"):
        BackTranslator(back, forth, source="en", via="de")
