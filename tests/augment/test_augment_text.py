"""Text ops change the documented words, keep protected words, and draw by the sample's key alone."""

import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refract.augment import Augmenter, PolicyError, load_policy
from refract.augment.registry import OPS
from refract.augment.text import words
from refract.augment.text.ops import TextOp

TEXT = "Don't buy the red Canon EOS 5D: it's not  working,\n3.5 stars! A long description of the product follows here."
CHARS = ["CharInsert", "CharSubstitute", "CharSwap", "CharDelete", "Keyboard", "OCR"]
PLAIN = ["WordDelete", "WordSwap", "WordCrop", "WordSplit", *CHARS, "Spelling"]


def run(op: str, text: str = TEXT, *, index: int = 0, **parameters) -> str:
    return Augmenter([{op: parameters}], seed=3).text(text, epoch=0, index=index)


def text_words(text: str) -> list[str]:
    return words.split(text)[1::2]


@pytest.fixture
def table(tmp_path: Path) -> str:
    file = tmp_path / "table.txt"
    file.write_text("# groups\nbuy, purchase, get\nred, scarlet\n\nlong, lengthy\n", "utf-8")
    return str(file)


def test_split_separates_words_of_several_scripts() -> None:
    assert text_words(TEXT)[:6] == ["Don't", "buy", "the", "red", "Canon", "EOS"]
    assert text_words("état-major 3.5€ हिन्दी 日本語 Привет") == [
        "état-major",
        "3.5",
        "हिन्दी",
        "日",
        "本",
        "語",
        "Привет",
    ]


@given(st.text(max_size=200))
def test_split_pieces_join_to_the_text(text: str) -> None:
    assert "".join(words.split(text)) == text


@pytest.mark.parametrize("op", PLAIN)
def test_op_changes_the_text_repeatably_and_keeps_protected_words(op: str) -> None:
    drawn = [run(op, index=i, fraction=0.3) for i in range(30)]
    assert drawn == [run(op, index=i, fraction=0.3) for i in range(30)]
    assert len(set(drawn)) > (3 if op == "Spelling" else 10)
    for text in drawn:
        counts = Counter(text_words(text))
        for word in ("Don't", "not", "5D", "3.5"):
            assert counts[word] == 1, (word, text)
        assert text.count("\n") == 1 and "Don ' t" not in text


@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize(
    "text", ["", " ", "\n", "!?", "a", "5", "not", "ab", "😀", "日", "a b", "\0\x07", "ÿ" * 3, "\ud800x"]
)
def test_short_and_odd_texts(op: str, text: str) -> None:
    for index in range(5):
        changed = run(op, text, index=index, fraction=1.0)
        assert isinstance(changed, str) and bool(text_words(changed)) == bool(text_words(text))


@given(text=st.text(max_size=80), op=st.sampled_from(PLAIN), fraction=st.floats(0, 1), index=st.integers(0, 50))
def test_any_text_yields_a_text_with_its_protected_words(text: str, op: str, fraction: float, index: int) -> None:
    changed = run(op, text, fraction=fraction, index=index)
    assert len(text_words(changed)) <= 2 * len(text_words(text))
    assert words.protected_words((words.NUMBERS, words.NEGATIONS)).lost(text, changed) == []


def test_each_op_has_its_documented_effect(table: str) -> None:
    text = "one two three four five six seven eight nine ten"
    for index in range(20):
        deleted = text_words(run("WordDelete", text, fraction=0.2, index=index))
        assert len(deleted) == 8 and set(deleted) < set(text_words(text))
        assert Counter(text_words(run("WordSwap", text, fraction=0.3, index=index))) == Counter(text_words(text))
        cropped = run("WordCrop", text, fraction=0.3, index=index)
        assert len(text_words(cropped)) == 7 and "  " not in cropped and cropped == cropped.strip()
        split = run("WordSplit", text, fraction=0.2, index=index)
        assert len(text_words(split)) == 12 and split.replace(" ", "") == text.replace(" ", "")
        for op, change in (
            ("CharInsert", 1),
            ("CharDelete", -1),
            ("CharSwap", 0),
            ("CharSubstitute", 0),
            ("Keyboard", 0),
            ("OCR", 0),
        ):
            assert len(run(op, text, fraction=0.3, index=index)) - len(text) == 3 * change
        assert sorted(run("CharSwap", text, fraction=1.0, index=index)) == sorted(text)
        inserted = text_words(run("WordInsert", TEXT, table=table, fraction=1.0, index=index))
        assert len(inserted) == len(text_words(TEXT)) + 3 and set(inserted) & {"purchase", "get"}
    substituted = {run("WordSubstitute", "BUY Red long-term", table=table, fraction=1.0, index=i) for i in range(40)}
    assert substituted == {"PURCHASE Scarlet long-term", "GET Scarlet long-term"}
    near = {run("Keyboard", "ggggg", index=i).replace("g", "", 4) for i in range(200)}
    assert near == set("tyfhvb"), "the adjacent keys"
    assert run("WordDelete", "all of it", fraction=1.0) in ("all", "of", "it")


def test_custom_protected_words_remain(tmp_path: Path) -> None:
    (tmp_path / "brands.txt").write_text("Canon\nEOS\n", "utf-8")
    for keep in (["Canon", "EOS"], [str(tmp_path / "brands.txt")]):
        for index in range(20):
            remaining = text_words(run("WordDelete", fraction=0.9, keep=keep, index=index))
            assert {"Canon", "EOS"} <= set(remaining)
    assert any("not" not in text_words(run("WordDelete", fraction=0.9, keep=[], index=i)) for i in range(20))


PHRASES = ["C++", "New York", "AT&T", "it’s", "no-one", "-5", "€", "Straße", "日本", ".NET"]


@pytest.mark.parametrize("op", ["WordDelete", "WordSwap", "WordCrop", "WordInsert", "WordSplit", *CHARS])
def test_protected_phrases_and_signs_are_unchanged(op: str, table: str) -> None:
    text = "We buy C++ in new  york, AT&T it's red; No-one at -5, 3 € and long STRASSE 日本 of .NET buy York long"
    more = {"table": table} if op == "WordInsert" else {}
    drawn = {run(op, text, index=i, fraction=0.9, keep=PHRASES, **more) for i in range(40)}
    assert len(drawn) > 1
    for changed in drawn:
        for phrase in ("C++", "new  york,", "AT&T", "it's", "No-one", "-5,", "€", "STRASSE", "日本", ".NET"):
            assert phrase in changed, (phrase, changed)
    assert any("buy York long" not in changed for changed in drawn), "a single word of a phrase is not protected"


@pytest.mark.parametrize(
    "keep, before, after, lost",
    [
        ("C++", "I like C++.", "I like C.", ["c++"]),
        ("C++", "I like C++.", "c++ is liked", []),
        ("New York", "from New York", "from York, the new", ["new york"]),
        ("new york", "from NEW\nYork", "New York is it", []),
        ("AT&T", "AT&T and AT&T", "AT&T alone", ["at&t"]),
        ("it’s", "it's here", "there it’s", []),
        ("it's", "it’s here", "here it is", ["it's"]),
        ("no-one", "no‑one saw", "No-one saw", []),
        ("<negations>", "no-one saw", "one saw", ["no-one"]),
        ("<negations>", "I don’t", "I do", ["don't"]),
        ("<negations>", "I don’t", "don't I", []),
        ("<numbers>", "½ a cup", "a cup", ["½"]),
        ("<numbers>", "at -5 degrees", "at 5 degrees", ["-5"]),
        ("<numbers>", "at −5 degrees", "it is -5", []),
        ("<numbers>", "at +5", "at -5", ["+5"]),
        ("<numbers>", "pages 3 - 5", "pages 3 5", []),
        ("<numbers>", "一起走", "走", []),
        ("€", "5 €", "5 dollars", ["€"]),
        ("STRASSE", "die Straße", "der Weg", ["strasse"]),
        ("日本", "日本の本", "日の本", ["日本"]),
        (" ", "a b", "b", []),
    ],
)
def test_lost_protected_words(keep: str, before: str, after: str, lost: list[str]) -> None:
    assert words.protected_words((keep,)).lost(before, after) == lost


@pytest.mark.parametrize(
    "text, index, expected",
    [
        ("the dog, and", 3, "the, and"),
        ("dog and", 1, "and"),
        ("a dog", 3, "a"),
        ("(dog) and", 1, "() and"),
        ("x 日5", 3, "x 5"),
        ("x 日-5", 3, "x -5"),
        ("x日 5", 3, "x 5"),
    ],
)
def test_remove_deletes_one_space_and_joins_no_words(text: str, index: int, expected: str) -> None:
    pieces = words.split(text)
    words.remove(pieces, index)
    assert "".join(pieces) == expected


def test_image_ops_and_text_ops_draw_independently() -> None:
    image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    both = Augmenter(
        ["HorizontalFlip", {"Rotate": {"degrees": 20}}, {"WordDelete": {"p": 0.5}}, {"CharSwap": {}}], seed=1
    )
    images = Augmenter(["HorizontalFlip", {"Rotate": {"degrees": 20}}], seed=1)
    texts = Augmenter([{"CharSwap": {}}], seed=1)
    assert both.texts and texts.texts and not images.texts
    seen = set()
    for index in range(20):
        assert np.array_equal(both(image, epoch=1, index=index), images(image, epoch=1, index=index))
        text = both.text(TEXT, epoch=1, index=index)
        seen.add(text == texts.text(TEXT, epoch=1, index=index))
        assert images.text(TEXT, epoch=1, index=index) == TEXT
    assert seen == {True, False}, (
        "the second op's draw does not depend on the first op, which applies to half of the samples"
    )
    assert both.text(TEXT, epoch=1, index=0) != both.text(TEXT, epoch=2, index=0)
    assert both.text(TEXT, epoch=1, index=0, repeat=1) != both.text(TEXT, epoch=1, index=0)


def test_each_text_op_has_a_separate_random_key() -> None:
    policy = load_policy([{"WordDelete": {"p": 0.5}}, {"CharSwap": {"p": 0.5}}, {"CharSwap": {"p": 0.5}}])
    drawn = [policy.draw_text(seed=1, epoch=0, index=i) for i in range(100)]
    assert len({tuple(step.op for step in steps) for steps in drawn}) == 6, "the ops apply independently"
    twice = [steps[-2:] for steps in drawn if [step.op for step in steps[-2:]] == ["CharSwap", "CharSwap"]]
    assert twice and all(one.args["seed"] != other.args["seed"] for one, other in twice)


def test_word_crop_deletes_consecutive_words_at_any_position() -> None:
    text = "one two three four five six"
    cropped = {run("WordCrop", text, fraction=0.5, index=i) for i in range(60)}
    assert cropped == {"four five six", "one five six", "one two six", "one two three"}
    assert {run("WordCrop", text, fraction=1.0, index=i) for i in range(60)} == {"one", "six"}


@pytest.mark.parametrize("op", ["CharInsert", "CharDelete"])
def test_character_ops_change_every_word_that_is_not_protected(op: str) -> None:
    text = "He don’t not want 5D of Canon lenses"
    for index in range(20):
        changed = run(op, text, fraction=1.0, keep=[words.NUMBERS, words.NEGATIONS, "canon"], index=index).split()
        same = {old for old, new in zip(text.split(), changed, strict=True) if old == new}
        assert same == {"don’t", "not", "5D", "Canon"}


def test_composition_ops_hold_text_ops_but_not_both_kinds() -> None:
    policy = Augmenter([{"OneOf": {"ops": ["CharSwap", "WordSwap"]}}])
    assert policy.texts and len({policy.text(TEXT, epoch=0, index=i) for i in range(9)}) > 5
    with pytest.raises(PolicyError, match="text ops and image ops need separate lists"):
        load_policy([{"OneOf": {"ops": ["CharSwap", "HorizontalFlip"]}}])


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"WordDelete": {"fraction": 2}}, r"fraction: 2 is not a number in \[0, 1\]"),
        ({"WordDelete": {"keep": [3]}}, "is not a list of words"),
        ({"WordDelete": {"keep": "/nowhere.txt"}}, "/nowhere.txt cannot be read"),
        ({"WordSubstitute": {"table": "/nowhere"}}, "/nowhere cannot be read"),
        ({"WordSubstitute": {}}, "required keyword-only argument: 'table'"),
        ({"BackTranslation": {"cache": "/nowhere.db"}}, "no such file; run `refract paraphrase"),
        ({"nlpaug.Nothing": {}}, "nlpaug has no text augmenter 'Nothing'"),
        ({"nlpaug.RandomWordAug": {"acton": "swap"}}, "no parameter 'acton'; did you mean action?"),
        ({"nlpaug.RandomWordAug": {"action": "insert"}}, "use WordInsert"),
        ({"nlpaug.BackTranslationAug": {}}, "run `refract paraphrase`"),
        ({"nlpaug.SynonymAug": {}}, "rejected its parameters"),
    ],
)
def test_invalid_parameters_are_rejected(entry, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        load_policy([entry])


def test_invalid_synonym_table_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a, b\nalone\n")
    with pytest.raises(PolicyError, match=r"entry 2: 'alone' has fewer than two words"):
        load_policy([{"WordInsert": {"table": str(tmp_path / "t")}}])


def test_text_policies_round_trip_as_plain_values(table: str) -> None:
    for name, kind in OPS.items():
        if issubclass(kind, TextOp) and name not in ("ThirdPartyTextTransform", "BackTranslation"):
            policy = load_policy([{name: {"table": table} if name in ("WordSubstitute", "WordInsert") else {}}])
            again = load_policy(policy.to_spec())
            assert again == policy and again.draw_text(seed=1, epoch=2, index=3) == policy.draw_text(
                seed=1, epoch=2, index=3
            )


EXTERNAL = [
    {"nlpaug.RandomWordAug": {"action": "swap"}},
    {"nlpaug.RandomWordAug": {"action": "delete"}},
    {"nlpaug.KeyboardAug": {}},
    {"nlpaug.RandomCharAug": {"action": "insert"}},
    {"nlpaug.SplitAug": {}},
]


@pytest.mark.parametrize("entry", EXTERNAL, ids=lambda entry: str(*entry))
def test_nlpaug_augmenters_are_seeded_keep_words_and_restore_the_generators(entry) -> None:
    import torch

    augmenter = Augmenter([entry], seed=5)
    before = random.random(), np.random.random(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drawn = [augmenter.text(TEXT, epoch=0, index=i) for i in range(12)]
    assert (random.random(), np.random.random(), torch.rand(1)) == expected and before
    assert drawn == [augmenter.text(TEXT, epoch=0, index=i) for i in range(12)] and len(set(drawn)) > 6
    for text in drawn:
        assert {"don't", "not", "5d", "3.5"} <= set(text_words(text.lower())), (
            text
        )  # nlpaug moves the capital letter of a sentence
    by_thread: list[list[str]] = [[], [], []]

    def draw(into: list[str]) -> None:
        into += [augmenter.text(TEXT, epoch=0, index=i) for i in range(12)]

    threads = [threading.Thread(target=draw, args=(into,)) for into in by_thread]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert by_thread == [drawn] * 3


def test_draws_of_other_threads_do_not_change_texts_of_nlpaug() -> None:
    """A tracking client draws its retry delays from the global generator, in a separate thread."""
    augmenter = Augmenter(EXTERNAL, seed=5)
    alone = [augmenter.text(TEXT, epoch=0, index=i) for i in range(200)]
    stopped, interval = threading.Event(), sys.getswitchinterval()

    def draw() -> None:
        while not stopped.is_set():
            random.random(), np.random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    sys.setswitchinterval(1e-5)
    try:
        assert [augmenter.text(TEXT, epoch=0, index=i) for i in range(200)] == alone
    finally:
        sys.setswitchinterval(interval)
        stopped.set()
        thread.join()


def test_text_ops_import_no_language_model_library() -> None:
    code = (
        "import sys\nfrom refract.augment import Augmenter\n"
        "a = Augmenter(['WordSwap', 'Keyboard', 'Spelling', 'HorizontalFlip'])\na.text('some words here', epoch=0, index=0)\n"
        "print([m for m in ('transformers', 'nlpaug', 'torch', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
