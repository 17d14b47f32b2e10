"""The runtime of `refract export --to web`: where its files come from, and the check of its script."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from small_export import encoded, make_bundle, needs_onnx

from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle
from refract.pipeline.cli.export import main
from refract.pipeline.export.browser import runtime
from refract.pipeline.export.browser.script_check import check_script
from refract.pipeline.export.target import ExportError

pytestmark = [pytest.mark.slow, needs_onnx]

SCRIPT = Path(runtime.__file__).parents[1] / "reference" / "preprocess.js"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "lenet", "lenet5")


def test_without_npm_the_error_names_the_manual_way(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(bundle.path), "--to", "web", "-o", str(tmp_path / "out")]) == 2
    assert (
        f"--to web needs onnxruntime-web {runtime.VERSION}, and npm is not installed; run `npm pack onnxruntime-web@{runtime.VERSION}` "
        f"where npm has a network, and add --runtime onnxruntime-web-{runtime.VERSION}.tgz" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def put_npm(folder: Path, script: str) -> None:
    """Put a program of this name first on the path."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_what_npm_says_and_what_it_loads_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    path = os.environ["PATH"]
    put_npm(tmp_path / "offline", "echo 'npm error code ENOTFOUND\nnpm error network no route' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'offline'}:{path}")
    with pytest.raises(ExportError, match=r"npm cannot load onnxruntime-web \S+: network no route; run `npm pack"):
        runtime.cached_archive()
    put_npm(tmp_path / "other", f"echo other > {runtime.ARCHIVE}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'other'}:{path}")
    with pytest.raises(ExportError, match="does not have the SHA-512 of the npm registry"):
        runtime.cached_archive()
    assert not (tmp_path / "cache").exists()


def test_a_damaged_file_in_the_cache_is_loaded_again(
    npm_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    put_npm(tmp_path / "npm", f"cp {npm_archive} .")
    monkeypatch.setenv("PATH", f"{tmp_path / 'npm'}:{os.environ['PATH']}")
    cached = tmp_path / "cache" / "onnxruntime-web" / runtime.ARCHIVE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half")
    assert runtime.cached_archive() == cached and cached.read_bytes() == npm_archive.read_bytes()


def test_an_unpacked_package_is_accepted_and_others_are_refused(
    npm_archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(npm_archive) as tar:
        members = [tar.getmember(f"package/{name}") for name in ("package.json", *runtime.FILES)]
        tar.extractall(tmp_path, members, filter="data")
    package = tmp_path / "package"
    assert runtime.runtime_files(package) == runtime.runtime_files(npm_archive) and not caplog.records
    description = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(json.dumps({**description, "version": "1.24.3"}))
    runtime.runtime_files(package)
    assert f"is version 1.24.3; the page was tested with {runtime.VERSION}" in caplog.text
    (package / "package.json").write_text(json.dumps({**description, "name": "onnxruntime-node"}))
    with pytest.raises(ExportError, match="is the npm package onnxruntime-node, not onnxruntime-web"):
        runtime.runtime_files(package)
    (package / "package.json").unlink()
    with pytest.raises(ExportError, match=r"lacks package\.json of onnxruntime-web"):
        runtime.runtime_files(package)
    (tmp_path / "notes.tgz").write_text("notes")
    with pytest.raises(ExportError, match=r"notes\.tgz: cannot be read as an archive of npm"):
        runtime.runtime_files(tmp_path / "notes.tgz")
    (tmp_path / runtime.ARCHIVE).write_bytes(npm_archive.read_bytes()[:-1])
    with pytest.raises(ExportError, match="does not have the SHA-512 of the npm registry"):
        runtime.runtime_files(tmp_path / runtime.ARCHIVE)
    with pytest.raises(ExportError, match="missing: does not exist"):
        runtime.runtime_files(tmp_path / "missing")


def test_other_targets_refuse_a_runtime(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(bundle.path), "--to", "torch-export", "-o", str(tmp_path / "out"), "--runtime", str(tmp_path)]
    assert main(arguments) == 2
    assert "--runtime: torch-export contains no runtime; remove it or use --to web" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js (Debian's package nodejs)")
def test_a_script_with_other_pixels_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, preprocess = [encoded("red", 0)], Preprocess(16, 16)
    assert check_script(SCRIPT, data, preprocess)
    brighter = SCRIPT.read_text().replace("below * y + 0.5", "below * y + 5.5")
    (tmp_path / "preprocess.js").write_text(brighter)
    with pytest.raises(ExportError, match=r"preprocess\.js changes a pixel of a golden sample by 5 grey levels"):
        check_script(tmp_path / "preprocess.js", data, preprocess)
    (tmp_path / "preprocess.js").write_text("a newer language")
    assert not check_script(tmp_path / "preprocess.js", data, preprocess)
    assert "the JavaScript preprocessing was not checked: Node.js fails" in caplog.text
