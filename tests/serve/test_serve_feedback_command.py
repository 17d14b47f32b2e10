"""`refract feedback FILE` against a real server."""

import json
from pathlib import Path

import pytest

from refract import cli
from refract.serve.client import Client
from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys


@pytest.fixture(scope="module")
def client(bundle, serving):
    with serving(create_app(bundle)) as http, Client(str(http.base_url)) as client:
        yield client


@pytest.fixture(scope="module")
def url(client) -> str:
    return client._options["base_url"]


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def test_delayed_labels_of_csv_and_json_lines_are_counted_in_order(client, url, make_image, tmp_path, capsys) -> None:
    (one,), two = client.predict([make_image(1)]), client.predict([make_image(2), make_image(3)])
    lines = [
        "id,labels,index",
        f"{one['id']},class 0,",
        f"{two[0]['id']}, {two[0]['label']} ,0",
        f"{two[0]['id']},{two[1]['label']},1",
        "never,class 0,",
        f"{one['id']},class 77,",
        f"{one['id']},{one['label']},",
    ]
    assert cli.main(["feedback", write(tmp_path / "a.csv", "\r\n".join(lines)), "--url", url]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "accepted 3, replaced 1, unknown 1, refused 1"
    assert "line 5: no prediction has the id 'never'" in err and "line 6: unknown label 'class 77'" in err
    assert client.feedback(one["id"], [one["label"]])["correct"]
    rows = [{"id": two[0]["id"], "labels": [row["label"]], "index": index} for index, row in enumerate(two)]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert cli.main(["feedback", "--json", write(tmp_path / "a.jsonl", text), "--url", url]) == 0
    assert json.loads(capsys.readouterr().out) == {"accepted": 0, "replaced": 2, "unknown": 0, "refused": 0}


def test_the_replica_that_knows_the_id_receives_the_labels(client, url, bundle, serving, make_image, tmp_path, capsys):
    (row,) = client.predict([make_image(4)])
    file = write(tmp_path / "a.csv", f"id,labels\n{row['id']},{row['label']}\n")
    with serving(create_app(bundle)) as replica:
        other = str(replica.base_url)
        assert cli.main(["feedback", file, "--url", other]) == 1
        assert cli.main(["feedback", file, "--url", other, "--url", url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "accepted 1, replaced 0, unknown 0, refused 0"


def test_the_command_stops_without_a_server_or_a_key(bundle, serving, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("REFRACT_KEY", raising=False)
    (tmp_path / "keys").write_text("open-sesame")
    file = write(tmp_path / "a.csv", "id,labels\na,class 0\nb,class 0\n")
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys"))) as http:
        url = str(http.base_url)
        assert cli.main(["feedback", file, "--url", url]) == 1
        err = capsys.readouterr().err
        assert "pass the API key as --key KEY" in err and "2 lines were not sent" in err and err.count("line ") == 1
        assert cli.main(["feedback", file, "--url", url, "--key", "open-sesame"]) == 1
        assert "unknown 2" in capsys.readouterr().out
    assert cli.main(["feedback", file, "--url", url]) == 1
    assert "does not respond" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "accepted are .csv, .jsonl and .ndjson"),
        ("a.csv", "id,label\n", "line 1: the columns are id, label; expected id, labels"),
        ("a.csv", "id,labels\nx\n", "line 2: expected 2 fields"),
        ("a.csv", "id,labels,labels\nx,cat,dog\n", "line 1: the columns are id, labels, labels; expected"),
        ("a.csv", '"id"x,labels\n', "line 1: "),
        ("a.csv", 'id,labels\nx,cat\n"y"z,cat\n', "line 3: "),
        pytest.param("a.jsonl", "[" * 100_000, "line 1: not JSON", id="nested lists"),
        ("a.jsonl", '{"id": "x", "labels": ["\\ud800"]}\n', "line 1: contains a surrogate"),
        ("a.csv", "id,labels,index\nx,cat,first\n", "line 2: index 'first' is not a whole number from 0"),
        ("a.csv", "id,labels\n,cat\n", "line 2: id: expected"),
        ("a.jsonl", '{"id": "x", "labels": "cat"}\n', "line 1: expected an object such as"),
        ("a.jsonl", '\n{"id": "x", "labels": ["cat"], "index": -1}\n', "line 2: index -1"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_before_anything_is_sent(name, text, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["feedback", write(tmp_path / name, text), "--url", "http://127.0.0.1:9"])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_file_and_a_wrong_url_are_usage_errors(tmp_path, capsys) -> None:
    file = write(tmp_path / "a.csv", "id,labels\n")
    for arguments, message in (([str(tmp_path / "no.csv")], "No such file"), ([file], "must start with http://")):
        with pytest.raises(SystemExit) as end:
            cli.main(["feedback", *arguments, "--url", "localhost:8000"])
        assert end.value.code == 2 and message in capsys.readouterr().err
