"""`refract labels`: log, diff, set and undo; import and export of the files that Label Studio, CVAT and spreadsheets write."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from small_data import paint

from refract.cli import main
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.labels.decisions import Decision, LabelError
from refract.pipeline.labels.formats import FORMATS
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.labels.importing import Imported, import_labels
from refract.pipeline.labels.lookup import ImageLookup

LABEL_STUDIO = [
    {
        "id": 11,
        "annotations": [
            {
                "id": 21,
                "completed_by": {"id": 1, "email": "ann@example.com", "first_name": "", "last_name": ""},
                "result": [
                    {
                        "value": {"choices": ["blue"]},
                        "id": "Dx_aB91ISN",
                        "from_name": "colour",
                        "to_name": "image",
                        "type": "choices",
                        "origin": "manual",
                    }
                ],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": "2026-03-09T22:16:08.728353Z",
                "updated_at": "2026-03-09T22:17:08.728353Z",
                "lead_time": 4.288,
                "task": 11,
                "project": 83,
            }
        ],
        "file_upload": "0a1b2c3d-001.png",
        "drafts": [],
        "predictions": [],
        "data": {"image": "/data/local-files/?d=photos/red/001.png"},
        "meta": {},
        "created_at": "2026-03-09T21:52:49.513742Z",
        "updated_at": "2026-03-09T22:16:08.746926Z",
        "project": 83,
    },
    {
        "id": 12,
        "annotations": [
            {
                "id": 22,
                "completed_by": {"id": 7},
                "result": [],
                "was_cancelled": True,
                "created_at": "2026-03-09T22:18:00Z",
            }
        ],
        "data": {"image": "s3://bucket/images/red/002.png"},
    },
    {"id": 13, "annotations": [], "data": {"image": "/data/local-files/?d=photos/red/003.png"}},
]
"""An export as Label Studio 1.x writes it: an annotated task, a skipped one and one without annotations."""

CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>4</id>
      <name>colours</name>
      <size>3</size>
      <mode>annotation</mode>
      <overlap>0</overlap>
      <created>2026-03-09 11:34:24.617558+00:00</created>
      <labels>
        <label><name>blue</name><color>#c06060</color><type>tag</type><attributes></attributes></label>
      </labels>
      <segments><segment><id>4</id><start>0</start><stop>2</stop><url>http://localhost:8080/api/jobs/4</url></segment></segments>
    </task>
    <dumped>2026-03-09 11:38:16.331823+00:00</dumped>
  </meta>
  <image id="0" name="red/001.png" width="16" height="16">
    <tag label="blue" source="manual">
    </tag>
    <box label="car" source="manual" occluded="0" xtl="1.0" ytl="1.0" xbr="5.0" ybr="5.0" z_order="0"></box>
  </image>
  <image id="1" name="red/002.png" width="16" height="16">
  </image>
  <image id="2" name="photos/elsewhere.png" width="16" height="16">
    <tag label="blue" source="manual"></tag>
  </image>
</annotations>
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    paint(tmp_path / "images", range(5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def history(root: Path) -> LabelHistory:
    return LabelHistory("labels.db", create=True)


def imported(history: LabelHistory, file: str, **options: Any) -> Imported:
    return import_labels(history, Path(file), load_manifest("images"), **{"reviewer": "importer", **options})


def said(history: LabelHistory) -> list[tuple[str, str, str, str]]:
    return [(Path(r.path).name, r.action, ";".join(r.labels), r.reviewer) for r in history.decisions()]


def labels(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["labels", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def populate(history: LabelHistory) -> None:
    """A correction with a reason, an exclusion, an addition, and a correction of an added image."""

    def decide(name: str, action: Any, *names: str, reason: str = "") -> None:
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        path = history.relative(name)
        history.append(Decision(content=digest, path=path, action=action, labels=names, reviewer="ann", reason=reason))

    Path("new.png").write_bytes(Path("images/green/001.png").read_bytes() + b"\0")
    Path("other.png").write_bytes(Path("images/green/002.png").read_bytes() + b"\0")
    decide("images/red/001.png", "relabel", "blue", reason='it is "blue", isn\'t it;\nyes')
    decide("images/red/002.png", "exclude")
    decide("new.png", "add", "green")
    decide("other.png", "add", "green")
    decide("other.png", "relabel", "red")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json"])
def test_a_round_trip_keeps_every_decision_that_applies(root: Path, history: LabelHistory, suffix: str) -> None:
    populate(history)
    assert main(["labels", "export", "labels.db", f"labels{suffix}"]) == 0
    other = LabelHistory("other.db", create=True)
    assert len(imported(other, f"labels{suffix}").recorded) == 4
    fields = ("content", "path", "labels", "reviewer", "time", "reason", "origin")
    states = [one.state().images for one in (history, other)]
    assert states[0].keys() == states[1].keys()
    for content, one in states[0].items():
        again = states[1][content]
        assert [getattr(one.applied, name) for name in fields] == [getattr(again.applied, name) for name in fields]
        assert one.applied.effect == again.applied.effect and (one.added is None) == (again.added is None)
    assert (
        imported(other, f"labels{suffix}") == Imported((), 4, (), ()) or imported(other, f"labels{suffix}").known == 4
    )
    assert len(imported(history, f"labels{suffix}").recorded) <= 1  # the relabelled addition is now an addition


def test_a_round_trip_through_cvat_keeps_the_labels(root: Path, history: LabelHistory) -> None:
    populate(history)
    assert main(["labels", "export", "labels.db", "labels.xml"]) == 0
    text = Path("labels.xml").read_text()
    assert '<image id="0" name="images/red/001.png" width="17" height="16">' in text and "002.png" not in text
    other = LabelHistory("other.db", create=True)
    done = imported(other, "labels.xml")
    assert (
        said(other) == [("001.png", "relabel", "blue", "importer")] and len(done.unknown) == 2
    )  # added ones are unknown
    assert imported(other, "labels.xml").recorded == [] and imported(history, "labels.xml").unknown == []


def test_label_studio_exports_are_imported_once(root: Path, history: LabelHistory) -> None:
    Path("project.json").write_text(json.dumps(LABEL_STUDIO))
    done = imported(history, "project.json")
    assert said(history) == [("001.png", "relabel", "blue", "ann@example.com"), ("002.png", "skip", "", "annotator 7")]
    assert history.decisions()[0].time.isoformat() == "2026-03-09T22:17:08.728353+00:00"
    assert done.unlabelled == ["project.json, task 13: /data/local-files/?d=photos/red/003.png"] and not done.unknown
    again = imported(history, "project.json")
    assert (again.recorded, again.known) == ([], 2)


def test_an_export_that_was_annotated_in_label_studio_names_images_by_content(
    root: Path, history: LabelHistory
) -> None:
    populate(history)
    assert main(["labels", "export", "labels.db", "out.json", "--prefix", "/data/local-files/?d="]) == 0
    tasks = json.loads(Path("out.json").read_text())
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=images/red/001.png"
    assert [task["id"] for task in tasks] == list(range(1, len(tasks) + 1))
    result = [{"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": ["green"]}}]
    tasks[0]["annotations"] = [{"result": result, "completed_by": 3, "updated_at": "2026-04-01T00:00:00Z"}]
    tasks[0]["data"]["image"] = "/data/upload/1/deadbeef-whatever.png"  # only the content identifies it now
    Path("back.json").write_text(json.dumps(tasks))
    done = imported(history, "back.json")
    assert said(history)[5] == ("deadbeef-whatever.png", "relabel", "green", "annotator 3") and not done.unknown
    content = tasks[0]["data"]["refract_content"]
    assert history.state().images[content].applied.labels == ("green",)


def test_cvat_tags_are_imported_once_and_shapes_are_ignored(root: Path, history: LabelHistory) -> None:
    Path("annotations.xml").write_text(CVAT)
    done = imported(history, "annotations.xml")
    assert said(history) == [("001.png", "relabel", "blue", "importer")]
    assert done.unlabelled == ["annotations.xml, image 1: red/002.png"]
    assert done.unknown == ["annotations.xml, image 2: photos/elsewhere.png: no image of the data fits, or several do"]
    assert imported(history, "annotations.xml").known == 1


def test_a_manifest_is_a_file_of_labels(root: Path, history: LabelHistory) -> None:
    Path("m.csv").write_text("path,label\nred/001.png,blue\nnowhere.png,blue\ngreen/002.png,\n001.png,red\n")
    done = imported(history, "m.csv")
    assert said(history) == [("001.png", "relabel", "blue", "importer")]
    assert done.unlabelled == ["m.csv, line 4: green/002.png"]
    assert [line.partition(": ")[0] for line in done.unknown] == ["m.csv, line 3", "m.csv, line 5"]


def test_an_image_with_other_bytes_is_listed(root: Path, history: LabelHistory) -> None:
    Path("a.csv").write_text("path,label,content\nred/001.png,blue,xyz\n")
    assert imported(history, "a.csv").unknown == ["a.csv, line 2: red/001.png: its bytes have changed"]


def test_new_classes_need_the_option_and_an_error_records_nothing(root: Path, history: LabelHistory) -> None:
    Path("m.csv").write_text("path,label\nred/001.png,blue\nred/002.png,bleu\n")
    with pytest.raises(LabelError, match=r"m.csv, line 3: 'bleu' is not a label of the data; did you mean 'blue'"):
        imported(history, "m.csv")
    assert history.decisions() == []
    assert len(imported(history, "m.csv", new_classes=True).recorded) == 2


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", "path,label,action\nred/001.png,blue,rename\n", r"a.csv, line 2: action: 'rename' is not one of confirm, relabel"),
    ("a.csv", "path,label,action\nred/001.png,blue,undo\n", r"action: 'undo' is not one of"),
    ("a.csv", "path,label,time\nred/001.png,blue,1.3.26 10:00\n", r"a.csv, line 2: time: '1.3.26 10:00' is not a time such as"),
    ("a.csv", "path,label,time\nred/001.png,blue,2026-03-01 10:00\n", r"has no time zone"),
    ("a.csv", "path,colour\nred/001.png,blue\n", r"a.csv: no column 'label'; columns: path, colour; needed: path,label"),
    ("a.json", "{}", r"a.json: expected a list of tasks, got dict"),
    ("a.json", "[", r"a.json: is not JSON"),
    ("a.json", '[{"id": 5, "image": "x.png", "choice": "blue"}]', r"a.json, task 5: no mapping 'data'; .* not as JSON-MIN"),
    ("a.json", '[{"id": 5, "data": {"image": "x.png"}}]', r"task 5: no list 'annotations'"),
    ("a.json", '[{"data": {"image": "x"}, "annotations": [{"result": [{"type": "choices", "value": {}}]}]}]',
     r"task 1, annotation 1: value.choices: expected a list of texts, got None"),
    ("a.json", '[{"data": {"image": "x"}, "annotations": [{"result": [{"type": "choices", "from_name": "a", "value": {"choices": []}}, '
     '{"type": "choices", "from_name": "b", "value": {"choices": []}}]}]}]', r"choices of 2 controls \(a, b\)"),
    ("a.xml", "<annotations><image", r"a.xml, line 1, column \d+: is not XML"),
    ("a.xml", "<voc/>", r"the root is <voc>; expected <annotations>"),
    ("a.xml", "<annotations><version>2.0</version></annotations>", r"version '2.0' of the format; expected 1.1"),
    ("a.xml", "<annotations><track id='0'/></annotations>", r"CVAT for video"),
    ("a.xml", "<annotations><image id='3'/></annotations>", r"a.xml, image 3: no attribute 'name'"),
    ("a.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotations/>", r"declares a document type"),
    ("a.xml", "<?xml version='1.0' encoding='nosuch'?><annotations/>", r"a.xml: is not XML in UTF-8"),
    pytest.param("a.json", "[" * 100_000, r"a.json: is not JSON", id="nested lists"),
    ("a.csv", "path,label,time\nred/001.png,blue,0001-01-01T00:00+14:00\n", r"a.csv, line 2: time: .* is before the year 1"),
    ("a.txt", "x", r"a.txt: .txt is not a format of labels; expected .csv \(CSV\)"),
])  # fmt: skip
def test_errors_name_the_place(root: Path, history: LabelHistory, name: str, text: str, message: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=message):
        imported(history, name)
    assert history.decisions() == []


def test_a_document_type_is_refused_in_any_encoding(root: Path, history: LabelHistory) -> None:
    entities = (
        '<!DOCTYPE a [<!ENTITY b "cccc"><!ENTITY d "&b;&b;&b;&b;">]><annotations><version>&d;</version></annotations>'
    )
    Path("a.xml").write_bytes(f'<?xml version="1.0" encoding="utf-16"?>{entities}'.encode("utf-16"))
    with pytest.raises(LabelError, match="a.xml: declares a document type"):
        imported(history, "a.xml")


def test_column_names_may_be_capitalised(root: Path, history: LabelHistory) -> None:
    Path("m.csv").write_text("Path,Label,Action,Reviewer\nred/001.png,,exclude,ann\n")
    imported(history, "m.csv")
    assert said(history) == [("001.png", "exclude", "", "ann")]


def test_of_several_rows_on_one_image_the_last_applies_and_the_others_are_listed(
    root: Path, history: LabelHistory
) -> None:
    Path("images/green/copy.png").write_bytes(Path("images/red/001.png").read_bytes())
    rows = ["red/001.png,blue,", "green/copy.png,green,", "red/001.png,,skip", "red/002.png,blue,", "red/002.png,blue,"]
    Path("m.csv").write_text("\n".join(["path,label,action", *rows]))
    done = imported(history, "m.csv")
    assert [(name, labels) for name, _, labels, _ in said(history)] == [("copy.png", "green"), ("002.png", "blue")]
    line = "m.csv, line 2: images/red/001.png: another decision on the same image follows: m.csv, line 3"
    assert done.replaced == [line]
    assert imported(history, "m.csv").known == 2 and len(history.decisions()) == 2


def test_an_older_decision_that_replaces_a_later_one_is_listed(
    root: Path, history: LabelHistory, capsys: pytest.CaptureFixture[str]
) -> None:
    populate(history)  # ann relabels red/001.png as blue
    rows = ["red/001.png,green,2020-01-01T00:00Z", "red/003.png,green,2020-01-01T00:00Z"]
    Path("m.csv").write_text("\n".join(["path,label,time", *rows]))
    _, out, _ = labels("import", "labels.db", "m.csv", "--data", "images", "--reviewer", "ann", capsys=capsys)
    assert "recorded 2 decisions" in out and "1 image whose decision in the file is older" in out
    assert out.endswith("  decision 6: images/red/001.png: applies in place of the later decision 1\n")
    assert main(["labels", "undo", "labels.db", "6"]) == 0 and imported(history, "m.csv", reviewer="ann").known == 2


def test_names_with_control_characters_are_not_found_and_printed_harmlessly(
    root: Path, history: LabelHistory, capsys: pytest.CaptureFixture[str]
) -> None:
    added = {"image": "a\0\x1b[2J.png", "refract_decision": {"action": "add", "labels": ["blue"]}}
    chosen = [{"type": "choices", "value": {"choices": ["blue"]}}]
    tasks = [{"data": added, "annotations": []}, {"data": {"image": "\ud800.png"}, "annotations": [{"result": chosen}]}]
    Path("p.json").write_text(json.dumps(tasks))
    code, out, err = labels("import", "labels.db", "p.json", "--data", "images", capsys=capsys)
    assert (code, err) == (0, "") and "2 images not found in the data" in out and history.decisions() == []
    assert "a\\x00\\x1b[2J.png: cannot be read" in out and "\\ud800.png" in out and "\x1b" not in out


@pytest.mark.parametrize(("arguments", "message"), [
    (("log", "--since", "2"), "labels.db: there is no decision 2; a date has the form 2026-01-31"),
    (("log", "--since", "20260131"), "there is no decision 20260131; a date has the form"),
    (("diff", "--from", "9" * 30), "is neither the ID of a decision nor a time"),
    (("diff", "--to", "²"), "'²' is neither the ID of a decision nor a time"),
    (("log", "--action", "rename"), "--action: 'rename' is not one of confirm, relabel"),
    (("undo", "1", "9" * 30), "there is no decision 999"),
])  # fmt: skip
def test_options_that_name_nothing_are_refused(
    root: Path, history: LabelHistory, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    history.append(Decision(content="0" * 64, path="x.png", action="relabel", labels=("blue",), reviewer="ann"))
    code, _, err = labels(arguments[0], "labels.db", *arguments[1:], capsys=capsys)
    assert code == 2 and message in err and len(history.decisions()) == 1


def test_images_are_found_by_the_names_of_other_tools(root: Path) -> None:
    lookup = ImageLookup(load_manifest("images"))
    for name in (
        "images/red/001.png", "red/001.png", "/mnt/share/images/red/001.png", "/data/local-files/?d=images/red/001.png",
        "s3://bucket/images/red/001.png", r"C:\images\red\001.png", "https://host/images/red/001.png",
    ):  # fmt: skip
        sample = lookup.find(name)
        assert sample is not None and sample.path == "images/red/001.png", name
    for name in (
        "001.png",
        "dog/001.png",
        "images/red/9.png",
        "",
        "/data/upload/1/0a1b2c3d-001.png",
        "http://[x/only.png",
    ):
        assert lookup.find(name) is None, name  # several images are called so, or none
    Path("images/top.png").write_bytes(b"")  # outside the class folders, as a row of a table may name it
    (Path("images") / "m.csv").write_text("path,label\ntop.png,red\nred/001.png,red\ngreen/001.png,green\n")
    table = ImageLookup(load_manifest("images/m.csv"))
    for name, path in (
        ("/mnt/top.png", "images/top.png"),
        ("top.png", "images/top.png"),
        ("x/red/001.png", "images/red/001.png"),
    ):
        sample = table.find(name)
        assert sample is not None and sample.path == path, name
    Path("images/red/only.png").write_bytes(b"")
    upload = ImageLookup(load_manifest("images")).find("/data/upload/1/0a1b2c3d-only.png")
    assert upload is not None and upload.path == "images/red/only.png"


def test_set_log_diff_and_undo(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ("set", "labels.db", "red/001.png", "--data", "images", "--reviewer", "ann")
    code, _, err = labels(*first, "--label", "bleu", capsys=capsys)
    assert code == 2 and "--label: 'bleu' is not a label of the data; did you mean 'blue'?" in err
    assert labels(*first, "--label", "blue", "--reason", "a\x1b[1mb", capsys=capsys)[:2] == (
        0, "decision 1: relabel blue images/red/001.png\n"
    )  # fmt: skip
    assert labels("set", "labels.db", "images/red/002.png", "--exclude", "--reviewer", "bob", capsys=capsys)[0] == 0
    Path("new.png").write_bytes(Path("images/red/001.png").read_bytes() + b"\0")
    assert labels("set", "labels.db", "new.png", "--label", "blue", "--new", capsys=capsys)[0] == 0
    _, out, _ = labels("log", "labels.db", "--reviewer", "ann", capsys=capsys)
    assert "ann  relabel blue  images/red/001.png  (a\\x1b[1mb)" in out and "\x1b" not in out
    _, out, _ = labels("diff", "labels.db", "--data", "images", capsys=capsys)
    assert out.splitlines() == [
        "images/red/001.png: red → blue",
        "images/red/002.png: red → (excluded)",
        "new.png: (not in the data) → blue",
        "3 images differ: (not in the data) → blue 1, red → (excluded) 1, red → blue 1",
    ]
    assert labels("undo", "labels.db", "1", "--reviewer", "bob", capsys=capsys)[:2] == (0, "decision 4: undo 1\n")
    _, out, _ = labels("log", "labels.db", "--json", "--since", "3", capsys=capsys)
    (record,) = json.loads(out)
    assert (record["action"], record["undoes"], record["reviewer"], record["undone_by"]) == ("undo", 1, "bob", None)
    _, out, _ = labels("diff", "labels.db", "--from", "1", "--to", "2", "--json", capsys=capsys)
    assert json.loads(out)["pairs"] == [{"before": "(label of the data)", "after": "(excluded)", "images": 1}]
    _, out, _ = labels("diff", "labels.db", "--to", "2020-01-01", capsys=capsys)
    assert out == "0 images differ\n"


def test_conflicts_are_shown(root: Path, history: LabelHistory, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256(Path("images/red/001.png").read_bytes()).hexdigest()
    for reviewer, label in (("ann", "blue"), ("bob", "green")):
        history.append(
            Decision(content=digest, path="images/red/001.png", action="relabel", labels=(label,), reviewer=reviewer)
        )
    _, out, _ = labels("log", "labels.db", capsys=capsys)
    assert out.endswith("conflicting decisions: 1 image; `refract labels log labels.db --conflicts` lists them\n")
    _, out, _ = labels("log", "labels.db", "--conflicts", "--json", capsys=capsys)
    assert [record["conflict"] for record in json.loads(out)] == [True, True]
    labels("set", "labels.db", "images/red/001.png", "--label", "green", "--reviewer", "ann", capsys=capsys)
    assert "conflict" not in labels("log", "labels.db", capsys=capsys)[1]  # ann has seen bob's decision


def test_the_formats_are_those_of_the_help() -> None:
    from refract.pipeline.cli import labels as command

    assert all(suffix in command.FORMATS for suffix in FORMATS)
