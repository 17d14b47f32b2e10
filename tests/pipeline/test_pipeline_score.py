"""`refract score` writes every row once, also after interruptions."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_data import COLORS, Run, descendants, make_image, until_gone, write_image
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
            torch.nn.init.normal_(network.no_picture)
        record["text"] = text_record(part, joined)
    classifier = Classifier(network, mean=PREPROCESS.mean, std=PREPROCESS.std, tokens=tokens).eval()
    own = {"task": "multiclass", "labels": LABELS, "temperature": 0.02, **record}
    info = BundleInfo(
        name="colours", created="2026-01-01T00:00:00+00:00", preprocess=PREPROCESS.to_dict(),
        network={"name": "lenet5" if shown is not None else "none", "image_size": [32, 32], "args": {}}, **own,
    )  # fmt: skip
    return save_bundle(
        folder, info, classifier, [GoldenSample("00.png", b"x", (0.2, 0.3, 0.5), "a", shown is not None)]
    )


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("score") / "bundle", abstain_below=0.6)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images in nested folders, of which three cannot be read."""
    root = tmp_path_factory.mktemp("many") / "images"
    for label in COLORS:
        for number in range(100):
            write_image(root / label / f"deep{number % 3}" / f"{number:03}.png", make_image(label, number))
    (root / "red" / "deep0" / "000.png").write_bytes(b"no image")
    (root / "red" / "deep1" / "001.png").write_bytes(b"")
    (root / "blue" / "gone.png").symlink_to("nowhere")
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image either")
    return root


def expected(bundle: Path, rows: Sequence[tuple[Path | None, str]]) -> list[np.ndarray | Exception]:
    """Return the probabilities of `refract predict`, in one process without parts."""
    opened = load_bundle(bundle)
    asked = [SampleInput(path.read_bytes if path else bytes, text, path is not None) for path, text in rows]
    answers = score(
        opened.classifier(), preprocess_of(opened.info), asked, task=opened.info.task, temperature=opened.info.temperature
    )  # fmt: skip
    return list(answers)


def check_whole(table: pd.DataFrame, bundle: Path, images: Path) -> None:
    """Check that each image occurs once, in the listing's order, with the probabilities of `predict` or an error."""
    files = sorted(str(path) for path in images.rglob("*.png") if path.name != ".hidden.png")
    assert table["path"].tolist() == files and table["row"].tolist() == list(range(len(files)))
    answers = expected(bundle, [(Path(file), "") for file in files])
    for answer, found, error in zip(answers, table["probabilities"], table["error"], strict=True):
        assert isinstance(answer, np.ndarray) == pd.isna(error)
        if isinstance(answer, np.ndarray):
            np.testing.assert_allclose(found, answer, atol=1e-5)
    assert table["error"].notna().sum() == 3


def test_a_named_pipe_with_an_image_suffix_does_not_block(refract: Run, tmp_path: Path, bundle: Path) -> None:
    write_image(tmp_path / "some" / "a.png", make_image("red", 1, side=16))
    os.mkfifo(tmp_path / "some" / "pipe.png")
    refract("score", bundle, "some", "-o", "a.parquet")
    assert pd.read_parquet(tmp_path / "a.parquet")["error"].fillna("").tolist() == ["", "not a regular file"]


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
    """Return the worker processes: the spawned children with a pipe to the command."""
    return [child for child in descendants(process.pid) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def test_a_folder_becomes_one_row_per_image_with_the_predictions_of_predict(
    refract: Run, tmp_path: Path, bundle: Path, images: Path
) -> None:
    done = refract("score", bundle, images, "-o", "out/a.parquet", "--jobs", 2, "--shard-size", 40, "--batch-size", 16)
    table = pd.read_parquet(tmp_path / "out" / "a.parquet")
    check_whole(table, bundle, images)
    assert "301 rows" in done.stdout and "3 without a prediction" in done.stderr
    broken = table[table["error"].notna()]
    broken.index = pd.Index([path.removeprefix(f"{images}/") for path in broken["path"]])
    assert "No such file" in broken["error"]["blue/gone.png"] and "empty" in broken["error"]["red/deep1/001.png"]
    assert broken[["label", "confidence", "probabilities", "abstain"]].isna().all(axis=None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.parquet"]
    about = json.loads(pq.read_schema(tmp_path / "out" / "a.parquet").metadata[ABOUT])
    assert about["bundle"] == load_bundle(bundle).digest and about["labels"] == list(LABELS)


def test_predict_gives_the_same_probabilities(refract: Run, tmp_path: Path, bundle: Path, images: Path) -> None:
    folder = images / "green" / "deep0"
    refract("score", bundle, folder, "-o", "a.parquet", "--jobs", 1)
    lines = refract("predict", bundle, folder, "--json").stdout.splitlines()
    for row, line in zip(pd.read_parquet(tmp_path / "a.parquet").itertuples(), map(json.loads, lines), strict=True):
        assert (row.path, row.label, row.abstain) == (line["path"], line["label"], line["abstain"])
        assert row.confidence == pytest.approx(line["confidence"], abs=1e-5)


def test_every_row_occurs_once_after_three_kills(tmp_path: Path, bundle: Path, images: Path) -> None:
    folder, out = tmp_path / ".out.parquet.parts", tmp_path / "out.parquet"
    command = (bundle, images, "-o", out, "--jobs", 2, "--shard-size", 8, "--batch-size", 8)
    kept: dict[str, int] = {}
    for kill in range(1, 4):
        process = started(tmp_path, *command)
        until(partial(holds, folder, len(kept) + 2), process)
        workers = scorers(process)
        process.kill()
        process.communicate()
        until_gone(workers)
        found = {file.name: file.stat().st_ino for file in folder.glob("0*.parquet")}
        assert kept.items() <= found.items(), "a part that was there has been made again"
        assert not out.exists() and kill < len(found) < 38
        kept = found
    process = started(tmp_path, *command)
    assert process.wait(timeout=120) == 0, process.communicate()
    assert "resuming: " in process.communicate()[1]
    check_whole(pd.read_parquet(out), bundle, images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet"]


def holds(folder: Path, count: int) -> bool:
    return len(list(folder.glob("0*.parquet"))) >= count


def test_a_killed_worker_is_replaced_and_logged(tmp_path: Path, bundle: Path, images: Path) -> None:
    out, folder = tmp_path / "out.parquet", tmp_path / ".out.parquet.parts"
    process = started(tmp_path, bundle, images, "-o", out, "--jobs", 2, "--shard-size", 8)
    until(lambda: list(folder.glob("0*.parquet")), process)
    os.kill(scorers(process)[0], signal.SIGKILL)
    printed = process.communicate(timeout=120)[1]
    assert (
        process.returncode == 0
        and "SIGKILL, as the system does when memory runs out" in printed
        and "Trace" not in printed
    )
    check_whole(pd.read_parquet(out), bundle, images)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_finished_parts_are_kept(
    tmp_path: Path, bundle: Path, images: Path, number: int, code: int
) -> None:
    out, folder = tmp_path / "out.parquet", tmp_path / ".out.parquet.parts"
    process = started(tmp_path, bundle, images, "-o", out, "--shard-size", "1", new_session=True)
    until(lambda: list(folder.glob("0*.parquet")), process)
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C: to the scorers too
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == code and "the same command resumes" in printed and "Traceback" not in printed
    assert list(folder.glob("0*.parquet")) and not out.exists()


def test_parts_of_another_scoring_are_refused_until_restart(
    refract: Run, tmp_path: Path, bundle: Path, images: Path
) -> None:
    folder = tmp_path / ".a.parquet.parts"
    part_files.begin(mkdir(folder), {"bundle": "b", "listing": "l", "shard_size": 512, "tta": "none"}, restart=False)
    old = folder / f"0000000-{'0' * 16}.parquet"
    old.write_bytes(b"old")
    printed = refract("score", bundle, images, "-o", "a.parquet", code=2).stderr
    assert (
        "another bundle and other rows" in printed
        and "--restart" in printed
        and "--tta" not in printed
        and old.exists()
    )
    refract("score", bundle, images, "-o", "a.parquet", "--restart", "--jobs", 1)
    check_whole(pd.read_parquet(tmp_path / "a.parquet"), bundle, images)


def test_overwrite_replaces_an_existing_file(refract: Run, tmp_path: Path, bundle: Path, images: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"somebody's")
    assert "exists already; --overwrite" in refract("score", bundle, images, "-o", "a.parquet", code=2).stderr
    assert (tmp_path / "a.parquet").read_bytes() == b"somebody's"
    assert not (tmp_path / ".a.parquet.parts").exists()
    refract("score", bundle, images / "red", "-o", "a.parquet", "--overwrite", "--jobs", 1)
    assert len(pd.read_parquet(tmp_path / "a.parquet")) == 100


def mkdir(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_one_process_at_a_time_writes_a_file(refract: Run, tmp_path: Path, bundle: Path, images: Path) -> None:
    process = started(tmp_path, bundle, images, "-o", tmp_path / "a.parquet", "--shard-size", 4, "--jobs", 1)
    until(lambda: list((tmp_path / ".a.parquet.parts").glob("0*.parquet")), process)
    process.send_signal(signal.SIGSTOP)
    try:
        assert "another process" in refract("score", bundle, images, "-o", "a.parquet", code=2).stderr
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=120) == 0


def test_a_kill_during_the_clean_up_leaves_a_valid_file(
    refract: Run, tmp_path: Path, bundle: Path, images: Path
) -> None:
    refract("score", bundle, images, "-o", "a.parquet", "--jobs", 1)
    before = (tmp_path / "a.parquet").read_bytes()
    opened, listing = load_bundle(bundle), listing_of(images)
    record = {"bundle": opened.digest, "listing": listing.digest(), "shard_size": 512, "tta": "none"}
    part_files.begin(mkdir(tmp_path / ".a.parquet.parts"), record, restart=False)
    assert "301 rows (0 scored" in refract("score", bundle, images, "-o", "a.parquet").stdout
    assert (tmp_path / "a.parquet").read_bytes() == before and not (tmp_path / ".a.parquet.parts").exists()


def test_a_manifest_with_texts_labels_and_incomplete_rows(refract: Run, tmp_path: Path, images: Path) -> None:
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
    done = refract("score", fused, "m.csv", "-o", "fused.parquet", "--jobs", 1)
    table = pd.read_parquet(tmp_path / "fused.parquet")
    answers = expected(fused, [(file, "a red car"), (None, "a blue dog"), (file, "")])
    np.testing.assert_allclose(np.stack(table["probabilities"][:3]), np.stack(answers), atol=1e-5)
    assert table["error"][3] == "the row has neither an image nor a text" and "No such file" in table["error"][4]
    assert table["truth"].tolist() == ["red", "blue", "green", "", "mauve"] and pd.isna(table["path"][1])
    assert (
        table["text"].tolist() == [row[1].lstrip() for row in rows]  # blanks after a separator are skipped
        and f"of 3 ({(table['label'] == table['truth']).mean() * 5 / 3:.1%})" in done.stdout
    )
    refract("score", words, "m.csv", "-o", "words.parquet", "--jobs", 1)
    table = pd.read_parquet(tmp_path / "words.parquet")
    assert table["error"].tolist()[2:4] == [
        "the row has no text, and the bundle reads only texts",
        "the row has neither an image nor a text",
    ]
    np.testing.assert_allclose(table["probabilities"][4], expected(words, [(None, "a")])[0], atol=1e-5)


def test_the_exit_code_is_1_if_every_row_has_an_error(refract: Run, tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "m.csv").write_text("path\nnone.png\n")
    assert "1 × No such file" in refract("score", bundle, "m.csv", "-o", "a.parquet", code=1).stderr
    assert pd.read_parquet(tmp_path / "a.parquet")["path"].tolist() == ["none.png"]


def test_errors_name_the_next_step(refract: Run, tmp_path: Path, bundle: Path, images: Path) -> None:
    (tmp_path / "m.csv").write_text("file\na.png\n")
    for source, message in (
        (tmp_path / "m.csv", "needed: path and/or text"), (mkdir(tmp_path / "empty"), "no images in this folder"),
        (tmp_path / "nowhere", "no such folder"), (images / "green" / "deep0" / "000.png", "`refract predict` takes single"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            listing_of(source)
    assert "does not end in .parquet" in refract("score", bundle, images, "-o", "a.csv", code=2).stderr
    assert "--jobs: 0" in refract("score", bundle, images, "-o", "a.parquet", "--jobs", 0, code=2).stderr
    assert "m.csv" in refract("score", tmp_path / "m.csv", images, "-o", "a.parquet", code=2).stderr
    assert not (tmp_path / "a.parquet").exists() and not (tmp_path / ".a.parquet.parts").exists()


def test_a_file_name_that_is_not_utf_8_keeps_its_row(refract: Run, tmp_path: Path, bundle: Path) -> None:
    write_image(tmp_path / "p" / "a.png", make_image("red", 1))
    os.rename(tmp_path / "p" / "a.png", os.fsencode(tmp_path / "p") + b"/\xff.png")  # noqa: PTH104
    refract("score", bundle, "p", "-o", "a.parquet", "--jobs", 1)
    table = pd.read_parquet(tmp_path / "a.parquet")
    assert table["path"].tolist() == ["p/\\xff.png"] and table["error"].isna().all()


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
    command = [sys.executable, "-c", code, "score", bundle, images, "-o", "a.parquet", "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "refract[ray]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")
def test_ray_completes_the_rows_of_a_killed_command(refract: Run, tmp_path: Path, bundle: Path, images: Path) -> None:
    out, folder = tmp_path / "out.parquet", tmp_path / ".out.parquet.parts"
    process = started(tmp_path, bundle, images, "-o", out, "--jobs", 1, "--shard-size", 8)
    until(lambda: list(folder.glob("0*.parquet")), process)
    process.kill()
    process.communicate()
    done = refract("score", bundle, images, "-o", out, "--engine", "ray", "--jobs", 1)
    assert "resuming: " in done.stderr
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
