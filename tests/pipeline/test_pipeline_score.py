"""`refract score` writes every row once, also after interruptions."""

import csv
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_data import COLORS, descendants, make_image, until_gone, write_image
from warm_process import Started, shared

from refract.augment import Preprocess
from refract.models.bundle.bundle import BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier
from refract.models.factory import text_record
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import make_text_encoder
from refract.models.prediction import confidences, prediction
from refract.models.registry import build
from refract.pipeline.data.manifest import DataError
from refract.pipeline.inference.batch import part_files
from refract.pipeline.inference.batch.listing import Row, Shard, listing_of
from refract.pipeline.inference.batch.rows import ABOUT, schema_of, table_of
from refract.pipeline.inference.batch.worker import Scorer
from refract.pipeline.inference.batch_scoring import Options, job_of
from refract.pipeline.inference.scoring import SampleInput, Scored, preprocess_of, score, score_outputs

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

PREPROCESS = Preprocess(height=32, width=32)
LABELS = tuple(sorted(COLORS))


def make_bundle(folder: Path, *, seed: int = 0, reads: Sequence[str] = ("images",), **record) -> Path:
    """An untrained bundle whose predictions differ between images."""
    torch.manual_seed(seed)
    shown = build("lenet5", 3, image_size=(32, 32)) if "images" in reads else None
    network: torch.nn.Module | None = shown
    tokens, joined = None, {"fusion": "gated", "width": 32}
    if "texts" in reads:
        part, tokens, words = make_text_encoder(
            "hashing", weights="none", max_length=6, pooling="auto", args={"buckets": 500}
        )
        network = Reader(shown, words, 3, **joined)
        torch.nn.init.normal_(network.no_text), torch.nn.init.normal_(words.vectors.weight)
        if shown is not None:
            torch.nn.init.normal_(network.no_image)
        record["text"] = text_record(part, joined)
    classifier = Classifier(network, mean=PREPROCESS.mean, std=PREPROCESS.std, tokens=tokens).eval()
    fields = {"task": "multiclass", "labels": LABELS, "temperature": 0.02, **record}
    info = BundleInfo(
        name="colours", created="2026-01-01T00:00:00+00:00", preprocess=PREPROCESS.to_dict(),
        network={"name": "lenet5" if shown is not None else "none", "image_size": [32, 32], "args": {}}, **fields,
    )  # fmt: skip
    return save_bundle(
        folder, info, classifier, [GoldenSample("00.png", b"x", (0.2, 0.3, 0.5), "a", shown is not None)]
    )


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("score") / "bundle", abstain_below=0.6)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """301 images in nested folders, one with a name that is not UTF-8, and four files that cannot be read."""
    root = tmp_path_factory.mktemp("many") / "images"
    for label in COLORS:
        for number in range(100):
            write_image(root / label / f"deep{number % 3}" / f"{number:03}.png", make_image(label, number))
    (root / "red" / "deep0" / "000.png").write_bytes(b"no image")
    (root / "red" / "deep1" / "001.png").write_bytes(b"")
    (root / "blue" / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "green" / "pipe.png")
    write_image(root / "odd" / "a.png", make_image("red", 1))
    os.rename(root / "odd" / "a.png", os.fsencode(root / "odd") + b"/\xff.png")  # noqa: PTH104
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image either")
    return root


def refract(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `refract …` in a folder. It needs no database, unlike trainings."""
    done = shared().run([*map(str, arguments)], cwd=folder, env=os.environ, seconds=240)
    assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def whole(bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a finished scoring by two processes, with its output in done.stdout and done.stderr."""
    root = tmp_path_factory.mktemp("whole")
    done = refract(root, *scoring_of(bundle, images))
    (root / "done.stdout").write_text(done.stdout)
    (root / "done.stderr").write_text(done.stderr)
    return root


def scoring_of(bundle: Path, images: Path) -> tuple[object, ...]:
    return "score", bundle, images, "-o", "out/a.parquet", "--jobs", 2, "--shard-size", 40, "--batch-size", 16


def expected(bundle: Path, rows: Sequence[tuple[Path | None, str]]) -> list[np.ndarray | Exception]:
    """Return the probabilities of `refract predict`, in one process without parts."""
    opened = load_bundle(bundle)
    asked = [SampleInput(path.read_bytes if path else bytes, text, path is not None) for path, text in rows]
    answers = score(
        opened.classifier(), preprocess_of(opened.info), asked, task=opened.info.task, temperature=opened.info.temperature
    )  # fmt: skip
    return list(answers)


@cache
def expected_rows(bundle: Path, images: Path) -> dict[str, np.ndarray | None]:
    """Return path → probabilities of `refract predict`, None for an unreadable file, in the listing's order."""
    files = sorted(path for path in images.rglob("*.png") if path.name != ".hidden.png")
    regular = [file for file in files if file.exists() and stat.S_ISREG(file.stat().st_mode)]
    answers = dict(zip(regular, expected(bundle, [(file, "") for file in regular]), strict=True))
    shown = {str(file).replace("\udcff", "\\xff"): answers.get(file) for file in files}
    return {path: answer if isinstance(answer, np.ndarray) else None for path, answer in shown.items()}


def check_whole(table: pd.DataFrame, bundle: Path, images: Path) -> None:
    """Check that each image occurs once, in the listing's order, with the probabilities of `predict` or an error."""
    answers = expected_rows(bundle, images)
    assert table["path"].tolist() == list(answers) and table["row"].tolist() == list(range(303))
    for answer, probabilities, error in zip(answers.values(), table["probabilities"], table["error"], strict=True):
        assert (answer is not None) == pd.isna(error)
        if answer is not None:
            np.testing.assert_allclose(probabilities, answer, atol=1e-5)
    assert table["error"].notna().sum() == 4


def write_parts(out: Path, bundle: Path, source: Path, *, shard_size: int = 512, first: int | None = None) -> None:
    """Write the first part files of a scoring in this process, as a worker process does. The command then scores the other rows."""
    opened, listing = load_bundle(bundle), listing_of(source)
    record = begin(out, bundle, source, shard_size=shard_size)
    folder = part_files.folder_of(out).resolve()
    job = job_of(opened, listing, Options(), folder, part_files.key_of(record))
    assert list(Scorer(job)(list(listing.shards(shard_size))[:first]))


def begin(out: Path, bundle: Path, source: Path, *, shard_size: int) -> dict[str, object]:
    """Create the folder of part files, without parts. Returns its record."""
    record = {
        "bundle": load_bundle(bundle).digest,
        "listing": listing_of(source).digest(),
        "shard_size": shard_size,
        "tta": "none",
    }
    part_files.begin(mkdir(part_files.folder_of(out)), record, restart=False)
    return record


def mkdir(folder: Path) -> Path:
    folder.mkdir()
    return folder


def started(tmp_path: Path, *arguments: object, new_session: bool = False) -> Started:
    return shared().popen(["score", *map(str, arguments)], cwd=tmp_path, new_session=new_session)


def until(condition: Callable[[], object], process: Started) -> None:
    """Wait for a condition while the command runs."""
    end = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "never"
        time.sleep(0.002)


def scorers(process: Started) -> list[int]:
    """Return the worker processes: the command's server process has forked them."""
    return [pid for pid in descendants(process.pid) if parent(pid) != process.pid]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_folder_becomes_one_row_per_image_with_the_predictions_of_predict(
    whole: Path, bundle: Path, images: Path
) -> None:
    table = pd.read_parquet(whole / "out" / "a.parquet")
    check_whole(table, bundle, images)
    assert "303 rows" in (whole / "done.stdout").read_text()
    assert "4 without a prediction" in (whole / "done.stderr").read_text()
    broken = table[table["error"].notna()]
    broken.index = pd.Index([path.removeprefix(f"{images}/") for path in broken["path"]])
    assert "No such file" in broken["error"]["blue/gone.png"] and "empty" in broken["error"]["red/deep1/001.png"]
    assert broken["error"]["green/pipe.png"] == "not a regular file", "a named pipe would block"
    assert broken[["label", "confidence", "probabilities", "abstain"]].isna().all(axis=None)
    assert table["path"].iloc[202] == f"{images}/odd/\\xff.png" and table["error"].isna().iloc[202]
    assert [path.name for path in (whole / "out").iterdir()] == ["a.parquet"]
    about = json.loads(pq.read_schema(whole / "out" / "a.parquet").metadata[ABOUT])
    assert about["bundle"] == load_bundle(bundle).digest and about["labels"] == list(LABELS)


def test_predict_gives_the_same_probabilities(whole: Path, bundle: Path, images: Path) -> None:
    folder = images / "green" / "deep0"
    lines = refract(whole, "predict", bundle, folder, "--json").stdout.splitlines()
    table = pd.read_parquet(whole / "out" / "a.parquet")
    rows = table[table["path"].str.startswith(f"{folder}/")].itertuples()
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        assert (row.path, row.label, row.abstain) == (line["path"], line["label"], line["abstain"])
        assert row.confidence == pytest.approx(line["confidence"], abs=1e-5)


def test_a_kill_during_the_clean_up_leaves_a_valid_file(
    whole: Path, bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = whole / "out" / "a.parquet"
    before = out.read_bytes()
    monkeypatch.chdir(whole)
    begin(out, bundle, images, shard_size=40)
    assert "303 rows (0 scored" in refract(whole, *scoring_of(bundle, images)).stdout
    assert out.read_bytes() == before and not part_files.folder_of(out).exists()


def test_every_row_occurs_once_after_kills_of_the_command_and_of_a_worker(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    folder, out = tmp_path / ".out.parquet.parts", tmp_path / "out.parquet"
    command = (bundle, images, "-o", out, "--jobs", 2, "--shard-size", 4, "--batch-size", 4)
    earlier_parts: dict[str, int] = {}
    for kill in range(1, 3):
        process = started(tmp_path, *command)
        until(partial(holds, folder, len(earlier_parts) + 2), process)
        workers = scorers(process)
        process.kill()
        process.communicate()
        assert len(workers) == 2
        until_gone(workers)
        parts = {file.name: file.stat().st_ino for file in folder.glob("0*.parquet")}
        assert earlier_parts.items() <= parts.items(), "a part that was there has been made again"
        assert not out.exists() and kill < len(parts) < 76
        earlier_parts = parts
    process = started(tmp_path, *command)
    until(partial(holds, folder, len(earlier_parts) + 1), process)
    os.kill(scorers(process)[0], signal.SIGKILL)
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "Traceback" not in printed, printed
    assert "SIGKILL, as the system does when memory runs out" in printed and "resuming: " in printed
    check_whole(pd.read_parquet(out), bundle, images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet"]


def holds(folder: Path, count: int) -> bool:
    return len(list(folder.glob("0*.parquet"))) >= count


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_the_one_process_that_writes_a_file_and_finished_parts_are_kept(
    tmp_path: Path, bundle: Path, images: Path, number: int, code: int
) -> None:
    out, folder = tmp_path / "out.parquet", tmp_path / ".out.parquet.parts"
    process = started(tmp_path, bundle, images, "-o", out, "--shard-size", "1", new_session=True)
    until(lambda: list(folder.glob("0*.parquet")), process)
    process.send_signal(signal.SIGSTOP)
    try:
        assert "another process" in refract(tmp_path, "score", bundle, images, "-o", out, code=2).stderr
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C: to the scorers too
    finally:
        process.send_signal(signal.SIGCONT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == code and "the same command resumes" in printed and "Traceback" not in printed
    assert list(folder.glob("0*.parquet")) and not out.exists()


def test_other_parts_and_files_are_refused_until_restart_and_overwrite(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    out, folder = tmp_path / "a.parquet", tmp_path / ".a.parquet.parts"
    command = ("score", bundle, images / "red", "-o", out, "--jobs", 1)
    out.write_bytes(b"somebody's")
    assert "exists already; --overwrite" in refract(tmp_path, *command, code=2).stderr
    assert out.read_bytes() == b"somebody's" and not folder.exists()
    part_files.begin(mkdir(folder), {"bundle": "b", "listing": "l", "shard_size": 512, "tta": "none"}, restart=False)
    old = folder / f"0000000-{'0' * 16}.parquet"
    old.write_bytes(b"old")
    printed = refract(tmp_path, *command, "--overwrite", code=2).stderr
    assert "another bundle and other rows" in printed and "--restart" in printed and "--tta" not in printed
    assert old.exists() and out.read_bytes() == b"somebody's"
    refract(tmp_path, *command, "--overwrite", "--restart")
    assert pd.read_parquet(out)["row"].tolist() == list(range(100)) and not folder.exists()


def test_a_manifest_with_texts_labels_and_incomplete_rows(tmp_path: Path, images: Path) -> None:
    fused = make_bundle(tmp_path / "fused", reads=("images", "texts"))
    words = make_bundle(tmp_path / "words", reads=("texts",))
    file = images / "green" / "deep0" / "000.png"
    rows = [
        (file, "a red car", "red"),
        ("", "a blue dog", "blue"),
        (file, "", "green"),
        ("", " ", "", "left"),  # a row that is wholly blank would be skipped
        ("none.png", "a", "mauve"),
    ]
    with (tmp_path / "m.csv").open("w", newline="") as target:
        csv.writer(target).writerows([("path", "text", "label", "camera"), *rows])
    write_parts(tmp_path / "fused.parquet", fused, tmp_path / "m.csv")
    done = refract(tmp_path, "score", fused, "m.csv", "-o", "fused.parquet")
    table = pd.read_parquet(tmp_path / "fused.parquet")
    answers = expected(fused, [(file, "a red car"), (None, "a blue dog"), (file, "")])
    np.testing.assert_allclose(np.stack(table["probabilities"][:3]), np.stack(answers), atol=1e-5)
    assert table["error"][3] == "the row has neither an image nor a text" and "No such file" in table["error"][4]
    assert table["truth"].tolist() == ["red", "blue", "green", "", "mauve"] and pd.isna(table["path"][1])
    assert (
        table["text"].tolist() == [str(row[1]).lstrip() for row in rows]  # blanks after a separator are skipped
        and f"of 3 ({(table['label'] == table['truth']).mean() * 5 / 3:.1%})" in done.stdout
    )
    write_parts(tmp_path / "words.parquet", words, tmp_path / "m.csv")
    refract(tmp_path, "score", words, "m.csv", "-o", "words.parquet")
    table = pd.read_parquet(tmp_path / "words.parquet")
    assert table["error"].tolist()[2:4] == [
        "the row has no text, and the bundle reads only texts",
        "the row has neither an image nor a text",
    ]
    np.testing.assert_allclose(table["probabilities"][4], expected(words, [(None, "a")])[0], atol=1e-5)


def test_the_exit_code_is_1_if_every_row_has_an_error(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "m.csv").write_text("path\nnone.png\n")
    write_parts(tmp_path / "a.parquet", bundle, tmp_path / "m.csv")
    assert "1 × No such file" in refract(tmp_path, "score", bundle, "m.csv", "-o", "a.parquet", code=1).stderr
    assert pd.read_parquet(tmp_path / "a.parquet")["path"].tolist() == ["none.png"]


def test_errors_name_the_next_step(tmp_path: Path, bundle: Path, images: Path) -> None:
    (tmp_path / "m.csv").write_text("file\na.png\n")
    for source, message in (
        (tmp_path / "m.csv", "needed: path and/or text"), (mkdir(tmp_path / "empty"), "no images in this folder"),
        (tmp_path / "nowhere", "no such folder"), (images / "green" / "deep0" / "000.png", "`refract predict` takes single"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            listing_of(source)
    assert "does not end in .parquet" in refract(tmp_path, "score", bundle, images, "-o", "a.csv", code=2).stderr
    assert "--jobs: 0" in refract(tmp_path, "score", bundle, images, "-o", "a.parquet", "--jobs", 0, code=2).stderr
    assert "m.csv" in refract(tmp_path, "score", tmp_path / "m.csv", images, "-o", "a.parquet", code=2).stderr
    assert not (tmp_path / "a.parquet").exists() and not (tmp_path / ".a.parquet.parts").exists()


@settings(max_examples=60)
@given(
    answers=st.lists(
        st.one_of(st.text(min_size=1), st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3)), min_size=1, max_size=20
    ),
    task=st.sampled_from(["multiclass", "multilabel"]), below=st.one_of(st.none(), st.floats(0, 1)),
)  # fmt: skip
@example(answers=[[0.0, 0.0, 1.0]], task="multiclass", below=1.0)
def test_a_row_equals_the_prediction_of_predict(answers, task: str, below: float | None) -> None:
    thresholds = (0.2, 0.5, 0.7) if task == "multilabel" else ()
    info = BundleInfo(
        name="n", task=task, labels=LABELS, network={"name": "lenet5", "image_size": [32, 32], "args": {}}, thresholds=thresholds,
        preprocess=PREPROCESS.to_dict(), abstain_below=below, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    given_ = [np.array(answer, np.float32) if isinstance(answer, list) else answer for answer in answers]
    shard = Shard(2, 40, tuple(Row(f"{i}.png") for i in range(len(answers))))
    table = table_of(
        shard,
        [answer if isinstance(answer, str) else Scored(answer, None) for answer in given_],
        info,
        schema_of(info, texts=False, truths=False, key="k", about={}),
    ).to_pylist()
    assert [row["row"] for row in table] == list(range(40, 40 + len(answers)))
    for row, answer in zip(table, given_, strict=True):
        if isinstance(answer, str):
            assert row["error"] == answer and row["label"] is row["probabilities"] is row["abstain"] is None
            continue
        sure = float(confidences(answer[None], task, thresholds)[0])
        predicted = prediction(
            answer, LABELS, top=1, thresholds=thresholds or None, abstain_below=below, confidence=sure
        )
        assert (row["label"], row["confidence"], row["abstain"]) == (
            predicted["label"],
            predicted["confidence"],
            predicted.get("abstain"),
        )
        assert (
            row["probabilities"] == answer.tolist()
            and row.get("labels") == predicted.get("labels")
            and row["error"] is None
        )


def test_without_ray_the_error_names_the_extra(tmp_path: Path, bundle: Path, images: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; import refract.cli; sys.exit(refract.cli.main(sys.argv[1:]))"
    command = ["score", *map(str, (bundle, images, "-o", "a.parquet", "--engine", "ray"))]
    process = shared().popen(command, cwd=tmp_path, code=code)
    printed = process.communicate()[1]
    assert process.returncode == 2 and "refract[ray]" in printed and "Traceback" not in printed


@pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")
def test_ray_completes_the_rows_of_another_engine(tmp_path: Path, bundle: Path, images: Path) -> None:
    out = tmp_path / "out.parquet"
    write_parts(out, bundle, images, shard_size=100, first=1)
    done = refract(tmp_path, "score", bundle, images, "-o", out, "--engine", "ray", "--jobs", 1)
    assert "resuming: 100 of 303" in done.stderr
    check_whole(pd.read_parquet(out), bundle, images)


def test_the_embeddings_are_those_of_the_pass_that_computes_the_probabilities(tmp_path: Path) -> None:
    opened = load_bundle(make_bundle(tmp_path / "b"))
    classifier = opened.classifier()
    files = [
        write_image(tmp_path / f"{number}.png", make_image("red", number)) or tmp_path / f"{number}.png"
        for number in range(5)
    ]
    asked = [SampleInput(file.read_bytes) for file in files]
    asked.insert(2, SampleInput(lambda: b"no image"))
    options = {"task": "multiclass", "temperature": opened.info.temperature, "batch_size": 2}
    for tta in ("none", "flip"):
        plain = list(score(classifier, preprocess_of(opened.info), asked, tta=tta, **options))
        rows = list(score_outputs(classifier, preprocess_of(opened.info), asked, embed=True, tta=tta, **options))
        assert [isinstance(row, Scored) for row in rows] == [True, True, False, True, True, True]
        for row, probabilities in zip(rows, plain, strict=True):
            if isinstance(row, Scored):
                np.testing.assert_allclose(row.probabilities, probabilities, atol=1e-6)
                # The head is linear, so it maps the mean embedding of the views to the mean of their logits.
                with torch.inference_mode():
                    logits = classifier.network.head(torch.from_numpy(row.embedding)) / opened.info.temperature
                np.testing.assert_allclose(logits.softmax(0), probabilities, atol=1e-4)
    rows[0] = rows[0]._replace(familiarity=0.25)
    schema = schema_of(opened.info, texts=False, truths=False, embeddings=True, familiarity=True, key="k", about={})
    shard = Shard(0, 0, tuple(Row(str(number)) for number in range(6)))
    table = table_of(shard, [row if isinstance(row, Scored) else "damaged" for row in rows], opened.info, schema)
    assert table["familiarity"].to_pylist() == [0.25, *[None] * 5]
    for row, values in zip(rows, table["embedding"].to_pylist(), strict=True):
        assert values == (row.embedding.tolist() if isinstance(row, Scored) else None)
