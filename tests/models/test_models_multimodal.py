"""Networks that read texts, or images and texts."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from refract.models.bundle.bundle import BundleError, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier
from refract.models.factory import make_classifier, text_record
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import BagOfNgrams, Transformer, make_text_encoder
from refract.models.multimodal.tokens import HashedNgrams, TokenizerTokens, cleaned, pad_rows, trimmed
from refract.models.registry import build

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def words_tokenizer(words: list[str], ends: bool = False) -> bytes:
    """ends: the last word is put before and after each text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if ends:
        mark = words[-1]
        tokenizer.post_processor = TemplateProcessing(single=f"{mark} $A {mark}", special_tokens=[(mark, len(words))])
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def transformers_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BERT and a GPT-2 of one layer, as Hugging Face saves them."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["a", "the", "red", "blue", "dog", "car", "sees", "not"]
    folders = {}
    for name, model in {
        "bert": BertModel(
            BertConfig(
                vocab_size=9,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=12,
            )
        ),
        "gpt": GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=12, n_embd=16, n_layer=1, n_head=2)),
    }.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        inner = Tokenizer.from_str(words_tokenizer(words).decode())
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
        folders[name] = folder
    return folders


def test_texts_become_numbers_in_any_language_and_are_cut() -> None:
    tokens = HashedNgrams(max_length=4)
    same, _ = tokens("Red   CAR")
    assert np.array_equal(same, tokens("red car")[0]) and same.dtype == np.int32 and same.min() >= 1
    assert set(tokens("car")[0]) < set(same)
    assert not tokens("one two three four")[1] and tokens("one two three four five")[1]
    assert np.array_equal(tokens("one two three four five")[0], tokens("one two three four")[0])
    for text in ("", " ", "\0\x07\n"):
        assert len(tokens(text)[0]) == 0
    assert all(len(tokens(text)[0]) for text in ("日本語", "😀", "हिन्दी", "?", "\ud800"))
    assert np.array_equal(tokens("cafe\u0301")[0], tokens("caf\u00e9")[0]), "composed"
    assert pad_rows([same, np.zeros(0, np.int32)]).shape == (2, len(same)) and pad_rows([]).shape == (0, 1)


@given(st.text(max_size=300), st.integers(1, 8))
def test_any_text_is_read_within_its_bounds(text: str, length: int) -> None:
    numbers, _ = HashedNgrams(length, buckets=50)(text)
    assert numbers.dtype == np.int32 and (len(numbers) == 0 or (numbers.min() >= 1 and numbers.max() <= 50))
    assert len(numbers) <= length * 2 + length * 3 * 26
    whole, _ = cleaned(text, 1000)
    whole.encode()


@pytest.mark.parametrize("tokens", [HashedNgrams(2), TokenizerTokens(words_tokenizer(["word"]), 2)])
def test_whitespace_at_the_ends_is_ignored(tokens) -> None:
    """It neither counts towards the length limit nor marks the text as truncated."""
    blanks = " \x00\x07\t\u2003\u3000" * 50
    assert np.array_equal(tokens(blanks + "word")[0], tokens("word")[0])
    assert [tokens(text)[1] for text in (blanks, blanks + "word" + blanks, "word" + blanks + "word")] == [
        False,
        False,
        True,
    ]
    assert trimmed(blanks) == "" and trimmed(f"{blanks}a b\n") == "a b"
    assert cleaned("x" * 64, 2) == ("x" * 64, False) and cleaned("x" * 65, 2) == ("x" * 64, True)


def test_a_megabyte_is_cut_at_once() -> None:
    for tokens in (HashedNgrams(), TokenizerTokens(words_tokenizer(["word"]))):
        numbers, cut = tokens("word " * 200_000)
        assert cut and len(numbers) < 2000


def test_a_tokenizers_file_is_its_tokens() -> None:
    tokens = TokenizerTokens(words_tokenizer(["red", "car"]), max_length=3)
    assert tokens("red car")[0].tolist() == [2, 3] and tokens("blue")[0].tolist() == [1]
    assert tokens("red red red")[1] is False and tokens("red red red car")[1] is True
    assert len(tokens("")[0]) == 0 and tokens.files == {"tokenizer.json": words_tokenizer(["red", "car"])}
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer file"):
        TokenizerTokens(b"{}")
    marked = words_tokenizer(["red", "car", "end"], ends=True)
    assert TokenizerTokens(marked, 3)("red car")[0].tolist() == [4, 2, 4]
    with pytest.raises(ValueError, match=r"text\.max_length: 2: expected more than 2, the tokenizer's special tokens"):
        TokenizerTokens(marked, 2)


def test_the_padding_of_a_tokenizer_is_disabled() -> None:
    from tokenizers import Tokenizer

    filling = Tokenizer.from_str(words_tokenizer(["red", "car"]).decode())
    filling.enable_padding(length=6)
    assert TokenizerTokens(filling.to_str().encode())("red car")[0].tolist() == [2, 3], "what fills up is no word"


def test_a_bag_of_ngrams_is_the_mean_of_their_vectors() -> None:
    bag = BagOfNgrams(10, width=4).eval()
    texts = torch.tensor([[1, 2, 0, 0], [3, 3, 3, 0]])
    vectors = bag.vectors.weight
    wanted = bag.hidden(torch.stack([(vectors[1] + vectors[2]) / 2, vectors[3]]))
    assert torch.allclose(bag(texts), wanted, atol=1e-6)
    assert torch.allclose(bag(texts), bag(torch.cat([texts, torch.zeros(2, 5, dtype=torch.long)], 1)), atol=1e-6)


@pytest.mark.parametrize("name, pooling", [("bert", "mean"), ("gpt", "last")])
def test_transformers_are_pooled_as_their_kind_wants_and_filling_up_changes_nothing(
    transformers_of, name, pooling
) -> None:
    part, tokens, network = make_text_encoder(
        str(transformers_of[name]), weights="default", max_length=8, pooling="auto", args={}
    )
    network.eval()
    assert part.pooling == pooling and isinstance(network, Transformer)
    given, longer = (
        pad_rows([tokens("a red dog")[0]]),
        pad_rows([tokens("a red dog")[0], tokens("the blue car sees a dog")[0]]),
    )
    alone = network(torch.from_numpy(given))
    assert torch.allclose(alone[0], network(torch.from_numpy(longer))[0], atol=1e-5)
    states = network.network(input_ids=torch.from_numpy(given).long() - 1).last_hidden_state
    assert torch.allclose(alone, states[:, -1] if pooling == "last" else states.mean(1), atol=1e-5)
    assert network(torch.zeros(2, 3, dtype=torch.long)).isfinite().all(), "of a missing text"
    fresh = part.network().eval()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(torch.from_numpy(given)), alone), "built from plain values"
    other = make_text_encoder(str(transformers_of[name]), weights="none", max_length=8, pooling="cls", args={})
    assert other[0].pooling == "cls" and not torch.equal(other[2](torch.from_numpy(given)), alone)


SMALL = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def kept(folder: Path, network, tokenizer: bytes | None = None) -> str:
    """Where it lies, as Hugging Face saves it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    network.save_pretrained(folder)
    inner = Tokenizer.from_str((tokenizer or words_tokenizer(["a", "red", "dog"])).decode())
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("weights", ["default", "none"])
def test_a_model_that_was_stored_in_16_bits_is_read_in_32(tmp_path: Path, weights: str) -> None:
    from transformers import BertConfig, BertModel

    where = kept(tmp_path / "b", BertModel(BertConfig(**SMALL)).to(torch.bfloat16))
    part, tokens, network = make_text_encoder(where, weights=weights, max_length=8, pooling="auto", args={})
    again = part.network().eval()
    assert {p.dtype for module in (network, again) for p in module.parameters()} == {torch.float32}
    assert not {"dtype", "torch_dtype"} & set(part.config)
    old = dataclasses.replace(part, config={**part.config, "dtype": "bfloat16"}).network()
    assert next(old.parameters()).dtype == torch.float32, "of a bundle that says so still"
    again.load_state_dict(network.state_dict())
    given = torch.from_numpy(pad_rows([tokens("a red dog")[0]]))
    assert torch.equal(again(given), network.eval()(given))


def test_pooling_goes_by_what_a_token_sees_not_by_the_architectures_name(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2Model

    decoder = BertConfig(**SMALL, is_decoder=True)
    for network, pooling in (
        (GPT2Model(GPT2Config(vocab_size=9, n_positions=12, n_embd=16, n_layer=1, n_head=2)), "last"),
        (BertLMHeadModel(BertConfig(**SMALL)), "mean"),
        (BertLMHeadModel(decoder), "last"),
    ):
        where = kept(tmp_path / f"{type(network).__name__}{pooling}", network)
        assert make_text_encoder(where, weights="default", max_length=4, pooling="auto", args={})[0].pooling == pooling


def test_texts_that_a_network_cannot_read_are_refused_before_training(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel, ViTConfig, ViTModel

    options = {"weights": "default", "pooling": "auto", "args": {}}
    roberta = kept(tmp_path / "r", RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=12, pad_token_id=1)))
    with pytest.raises(ValueError, match=r"text\.max_length: 11: expected at most 10"):
        make_text_encoder(roberta, max_length=11, **options)
    network = make_text_encoder(roberta, max_length=10, **options)[2]
    assert network(torch.full((2, 10), 4)).isfinite().all()
    wide = kept(tmp_path / "g", GPT2Model(GPT2Config(vocab_size=3, n_positions=12, n_embd=16, n_layer=1, n_head=2)))
    with pytest.raises(ValueError, match="its tokenizer has 4 tokens, its network only 3"):
        make_text_encoder(wide, max_length=8, **options)
    images = {**SMALL, "image_size": 8, "patch_size": 4}
    del images["vocab_size"]
    vit = kept(tmp_path / "v", ViTModel(ViTConfig(**images)))
    with pytest.raises(ValueError, match="is a ViTModel, which does not read a text alone"):
        make_text_encoder(vit, max_length=8, **options)


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("/missing", {}, "text.name: /missing cannot be loaded"),
        ("hashing", {"args": {"widht": 3}}, "text.args: {'widht': 3}"),
        ("hashing", {"pooling": "sum"}, "'sum': expected one of auto, mean, cls, last"),
        ("bert", {"max_length": 99}, "text.max_length: 99: expected at most 12"),
        ("bert", {"args": {"width": 3}}, "only hashing takes arguments"),
    ],
)
def test_unusable_text_encoders_are_refused(transformers_of, monkeypatch, name: str, more: dict, message: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"weights": "default", "max_length": 8, "pooling": "auto", "args": {}} | more
    with pytest.raises(ValueError, match=message):
        make_text_encoder(str(transformers_of.get(name, name)), **options)


def test_pickled_weights_are_not_read(transformers_of, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(transformers_of["bert"], tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "kept")
    torch.save({}, tmp_path / "b" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_text_encoder(str(tmp_path / "b"), weights="default", max_length=8, pooling="auto", args={})


def bundle_of(classifier: Classifier, part, folder: Path, network: dict, joined: dict) -> Path:
    info = BundleInfo(
        name="t", task="multiclass", labels=("a", "b", "c"), network=network,
        preprocess={"height": 32, "width": 32, "resize": "squash", "crop_ratio": 1.0, "mean": list(MEAN), "std": list(STD)},
        text=text_record(part, joined), created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    golden_samples = [
        GoldenSample("00.png", b"x", (0.2, 0.3, 0.5), "the red car", False),
        GoldenSample("01.png", b"y", (1.0, 0.0, 0.0)),
    ]
    return save_bundle(folder, info, classifier, golden_samples)


@pytest.mark.parametrize("name", ["hashing", "bert", "gpt"])
@pytest.mark.parametrize("network_of_images", ["none", "lenet5"])
def test_a_bundle_gives_equal_logits_without_the_files_it_came_from(
    transformers_of, tmp_path, name, network_of_images
) -> None:
    torch.manual_seed(1)
    where = str(transformers_of.get(name, name))
    part, tokens, network = make_text_encoder(where, weights="default", max_length=8, pooling="auto", args={})
    joined = {"fusion": "gated", "width": 12}
    shown = None if network_of_images == "none" else build("lenet5", 3, image_size=(32, 32))
    classifier = Classifier(
        Reader(shown, network, 3, head="cosine", **joined), mean=MEAN, std=STD, tokens=tokens
    ).eval()
    stored = {"name": network_of_images, "image_size": [32, 32], "args": {"head": "cosine"}}
    path = bundle_of(classifier, part, tmp_path / "b", stored, joined)
    loaded = load_bundle(path)
    again = loaded.classifier()
    assert again.reads == classifier.reads == ({"texts"} if network_of_images == "none" else {"texts", "images"})
    assert [(g.text, g.has_image) for g in loaded.golden_samples] == [("the red car", False), ("", True)]
    texts = torch.from_numpy(pad_rows([again.tokens(t)[0] for t in ("the red car", "", "a dog sees not")]))
    images = torch.randint(0, 256, (3, 3, 32, 32)) if shown else None
    with torch.no_grad():
        assert torch.equal(again(images, texts), classifier(images, texts))
    assert (path / "text" / "tokenizer.json").exists() == (name != "hashing")
    assert (
        where not in (path / "bundle.json").read_text()
        or name == "hashing"
        or json.loads((path / "bundle.json").read_text())["text"]["name"] == where
    )


def test_a_bundle_with_the_former_names_of_its_weights_is_read(tmp_path) -> None:
    part, tokens, network = make_text_encoder("hashing", weights="default", max_length=8, pooling="auto", args={})
    joined = {"fusion": "gated", "width": 12}
    images = build("lenet5", 3, image_size=(32, 32))
    classifier = Classifier(Reader(images, network, 3, **joined), mean=MEAN, std=STD, tokens=tokens).eval()
    path = bundle_of(classifier, part, tmp_path / "b", {"name": "lenet5", "image_size": [32, 32], "args": {}}, joined)
    weights = load_bundle(path).weights()
    former = {key.replace(".images.", ".pictures.").replace("no_image", "no_picture"): weights[key] for key in weights}
    assert set(former) != set(weights)
    safetensors.torch.save_file(former, path / "weights.safetensors")
    data, manifest = (path / "weights.safetensors").read_bytes(), json.loads((path / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    bundle = load_bundle(path)
    assert set(bundle.weights()) == set(weights), "refract soup averages bundles of both kinds"
    assert torch.equal(bundle.classifier().network.no_image, classifier.network.no_image)


def test_a_bundle_whose_tokenizer_was_changed_or_whose_text_part_is_odd_is_refused(transformers_of, tmp_path) -> None:
    part, tokens, network = make_text_encoder(
        str(transformers_of["bert"]), weights="default", max_length=8, pooling="auto", args={}
    )
    joined = {"fusion": "concat", "width": 12}
    classifier = Classifier(Reader(None, network, 3, **joined), mean=MEAN, std=STD, tokens=tokens)
    path = bundle_of(classifier, part, tmp_path / "b", {"name": "none", "image_size": [32, 32], "args": {}}, joined)
    (path / "text" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        load_bundle(path)
    record = text_record(part, joined)
    for change, message in (
        ({"max_length": 0}, "text.max_length"), ({"code": "x"}, "exactly the keys"),
    ):  # fmt: skip
        with pytest.raises(BundleError, match=message):
            BundleInfo(
                name="t", task="multiclass", labels=("a", "b", "c"), network={"name": "none", "image_size": [8, 8], "args": {}},
                preprocess={"mean": [0, 0, 0], "std": [1, 1, 1]}, text={**record, **change}, created="2026-01-01T00:00:00+00:00",
            )  # fmt: skip
    for config in ({"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}, {"model_type": "nothing"}, {}):
        with pytest.raises(ValueError, match="text.config"):
            make_classifier(
                {"name": "none", "image_size": [8, 8], "args": {}}, 3, mean=MEAN, std=STD,
                text={**record, "config": config}, files=tokens.files,
            )  # fmt: skip
