"""The paraphrase cache and the filter of paraphrases."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from refract.augment import Augmenter, PolicyError, load_policy
from refract.augment.text.paraphrases import Cache, CacheError, _opened, _reader, check_cache, paraphrases
from refract.augment.text.translation import Filter


def draws(file: str, count: int) -> list[str]:
    augmenter = Augmenter([{"BackTranslation": {"p": 0.5, "cache": file}}], seed=1)
    return [augmenter.text("a dog", epoch=0, index=i) for i in range(count)]


def test_training_draws_the_stored_paraphrases_equally_in_any_process(tmp_path: Path) -> None:
    file = tmp_path / "p.db"
    with Cache(file) as cache:
        cache.start_run("via de", "de"), cache.start_run("via fr", "fr")
        cache.add([("a dog", [("a hound", None), ("a cat", "unlike"), ("one dog", None)])], "via de")
        cache.add([("a dog", [("the hound", None), ("a hound", None)]), ("none", [])], "via fr")
        assert cache.missing(["a dog", "a cow", "a dog", "none"], "via de") == ["a cow", "none"]
        assert cache.dropped(["a dog"], "via de") == {"": 2, "unlike": 1}
        with pytest.raises(CacheError, match="UNIQUE"):
            cache.add([("a cow", [("x", None)]), ("a dog", [("again", None)])], "via de")
        assert cache.missing(["a cow"], "via de") == ["a cow"], "all or none"
        assert sorted(paraphrases(str(file), "a dog")) == ["a hound", "one dog", "the hound"], (
            "a reader sees the file while a writer has it open"
        )
    assert paraphrases(str(file), "a cow") == []
    drawn = draws(str(file), 200)
    assert set(drawn) == {"a dog", "a hound", "one dog", "the hound"} and 70 < drawn.count("a dog") < 130
    for context in ("fork", "spawn"):
        with multiprocessing.get_context(context).Pool(2) as pool:
            assert pool.starmap(draws, [(str(file), 200)] * 2) == [drawn] * 2


def test_newest_run_of_each_direction_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "p.db"

    def run(settings: str, direction: str, text: str = "a dog", *rows: tuple[str, str | None]) -> list[str]:
        with Cache(file) as cache:
            cache.start_run(settings, direction)
            if rows:
                cache.add([(text, rows)], settings)
        return paraphrases(str(file), "a dog")

    assert run("loose", "de", "a dog", ("a cat", None), ("a hound", None)) == ["a cat", "a hound"]
    assert run("strict", "de", "a cow", ("a calf", None)) == ["a cat", "a hound"], (
        "the new settings have no entry for the text"
    )
    assert run("strict", "de", "a dog", ("a cat", "unlike"), ("one hound", None)) == ["one hound"]
    assert run("by fr", "fr", "a dog", ("un dog", None)) == ["one hound", "un dog"]
    assert run("stricter", "de", "a dog", ("a cat", "unlike")) == ["un dog"], (
        "a run with rejected paraphrases only still hides older runs"
    )
    assert run("loose", "de") == ["un dog", "a cat", "a hound"], (
        "a repeated run is the newest, even without new entries"
    )


def test_paraphrases_without_a_protected_word_are_not_drawn(tmp_path: Path) -> None:
    file = tmp_path / "p.db"
    with Cache(file) as cache:
        cache.start_run("s", "de")
        cache.add([("a red dog", [("a dog", None), ("the red hound", None)]), ("red", [("rouge", None)])], "s")
    augmenter = Augmenter([{"BackTranslation": {"p": 1.0, "cache": str(file), "keep": ["red"]}}])
    assert {augmenter.text("a red dog", epoch=0, index=i) for i in range(20)} == {"the red hound"}
    assert augmenter.text("red", epoch=0, index=0) == "red"


def test_back_translation_must_precede_other_text_ops(tmp_path: Path) -> None:
    Cache(tmp_path / "p.db").__exit__()
    back = {"BackTranslation": {"cache": str(tmp_path / "p.db")}}
    rejected = (
        ["WordSwap", back],
        [back, back],
        ["HorizontalFlip", "WordSwap", {"OneOf": {"ops": ["CharSwap", back]}}],
        [{"Compose": {"ops": ["WordSwap", back]}}],
        [{"During": {"ops": ["WordSwap"]}}, back],
        [{"Sometimes": {"ops": ["CharSwap"], "otherwise": ["WordSwap"]}}, back],
        [{"Sometimes": {"ops": ["CharSwap"], "otherwise": ["WordSwap", back]}}],
        [{"SomeOf": {"ops": [back, "WordSwap"], "count": 2, "in_order": False}}],
        [{"nlpaug.KeyboardAug": {}}, back],
    )
    for policy in rejected:
        with pytest.raises(PolicyError, match="BackTranslation follows .*, but a changed text has no"):
            load_policy(policy)
    accepted = (
        [back, "WordSwap"],
        ["HorizontalFlip", back, "WordSwap"],
        [{"OneOf": {"ops": ["WordSwap", back]}}],
        [{"Sometimes": {"ops": ["WordSwap"], "otherwise": [back]}}, "CharSwap"],
        [{"SomeOf": {"ops": [back, "WordSwap"]}}],
        [{"SomeOf": {"ops": [back], "count": 1, "in_order": False}}],
    )
    for policy in accepted:
        assert load_policy(policy).texts


def test_forked_process_opens_a_new_connection(tmp_path: Path) -> None:
    file = str(tmp_path / "p.db")
    Cache(Path(file)).__exit__()
    connection = _reader(file)
    assert _reader(file) is connection
    child = os.fork()
    if child == 0:
        os._exit(0 if _reader(file) is not connection else 1)
    assert os.waitpid(child, 0)[1] == 0


def run_until_killed(code: str, file: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, str(file)])
    assert done.returncode == -signal.SIGKILL


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from refract.augment.text.paraphrases import Cache
cache = Cache(Path(sys.argv[1]))
cache.start_run("via de", "de")
cache.add([("a dog", [("a hound", None)])], "via de")
cache._connection.execute("PRAGMA cache_size = 1")
rows = ((str(n).encode(), b"s", 0, "word " * 20, None) for n in range(5000))
cache._connection.executemany("INSERT INTO paraphrase VALUES (?, ?, ?, ?, ?)", rows)
os.kill(os.getpid(), signal.SIGKILL)
"""

KILLED_WHILE_CREATING = """
import os, signal, sqlite3, sys
from pathlib import Path
from refract.augment.text.paraphrases import Cache
connect = sqlite3.connect
def watched(*args, **more):
    connection = connect(*args, **more)
    def trace(statement):
        if "user_version =" in statement:
            os.kill(os.getpid(), signal.SIGKILL)
    connection.set_trace_callback(trace)
    return connection
sqlite3.connect = watched
Cache(Path(sys.argv[1]))
"""


def test_cache_of_a_writer_killed_in_a_transaction_is_readable(tmp_path: Path) -> None:
    file = tmp_path / "p.db"
    run_until_killed(KILLED_WHILE_WRITING, file)
    assert (tmp_path / "p.db-journal").stat().st_size > 0, "the disk holds an incomplete transaction"
    assert b"word word" in file.read_bytes()
    check_cache(str(file))
    assert paraphrases(str(file), "a dog") == ["a hound"]


def test_cache_of_a_process_killed_at_creation_is_created_again(tmp_path: Path) -> None:
    run_until_killed(KILLED_WHILE_CREATING, tmp_path / "p.db")
    with Cache(tmp_path / "p.db") as cache:
        cache.start_run("via de", "de")
        cache.add([("a dog", [("a hound", None)])], "via de")
    assert paraphrases(str(tmp_path / "p.db"), "a dog") == ["a hound"]


def test_reader_works_without_write_permission_and_cannot_write(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "p.db"
    file.parent.mkdir()
    with Cache(file) as cache:
        cache.start_run("via de", "de")
        cache.add([("a dog", [("a hound", None)])], "via de")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        _opened(str(file)).execute("DELETE FROM paraphrase")
    file.chmod(0o444), file.parent.chmod(0o555)
    try:
        check_cache(str(file))
        assert paraphrases(str(file), "a dog") == ["a hound"]
    finally:
        file.parent.chmod(0o755)


def test_other_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text " * 900)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE x (y)")
    for name in ("text", "other.db"):
        for use in (lambda file: check_cache(str(file)), Cache):
            with pytest.raises(CacheError, match=name):
                use(tmp_path / name)
    with pytest.raises(CacheError, match="unable to open"):
        Cache(tmp_path / "no" / "folder.db")


@pytest.mark.parametrize(
    "text, paraphrase, reason",
    [
        ("The red car.", "a scarlet automobile", None),
        ("The red car.", "the RED car!", "equal"),
        ("The red car.", " ", "empty"),
        ("The red car stands there today", "Car", "short"),
        ("The red car", "the red car that stood there for so many years", "long"),
        ("The red car", "красная машина тут", "script"),
        ("I do not like it", "I do like it here", "lost"),
        ("costs 3.5 euros", "costs 35 euros", "lost"),
        ("a Canon camera", "a Nikon camera", "lost"),
        ("日本語の本です", "日本の言葉の本です", None),
        ("日本", "にほん", None),
        ("トマト", "とまと", None),
        ("コーーー", "こー", None),
        ("ｶﾅ", "かな", None),
        ("ａ ｂｉｇ ｄｏｇ", "a large hound", None),
        ("日本", "일본", "script"),
        ("ein Hund", "one that others said", None),
        ("", "words", None),
    ],
)
def test_filter_rejects_with_a_reason(text: str, paraphrase: str, reason: str | None) -> None:
    assert Filter(("<numbers>", "<negations>", "Canon")).reason(text, paraphrase, []) == (reason if text else "script")


def test_duplicate_paraphrase_is_rejected() -> None:
    assert Filter().reason("a dog", "the hound", ["The hound."]) == "equal"
