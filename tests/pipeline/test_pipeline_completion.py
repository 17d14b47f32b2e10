"""Shells complete what the user types: bash runs the script, as in a terminal."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from refract.cli import COMMANDS, main
from refract.completion import options


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from refract.completion import bash_script

    path = tmp_path_factory.mktemp("completion") / "refract.bash"
    path.write_text(bash_script(), "utf-8")
    return path


def completed(script: Path, *words: str, cwd: Path | None = None) -> list[str]:
    """The completions of the last word of a command line."""
    code = (
        f"source {shlex.quote(str(script))}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _refract; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=cwd, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


def test_bash_completes_commands_options_config_keys_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "photos.yaml").touch()
    (tmp_path / "my photos.yaml").touch()
    (tmp_path / "train").mkdir()
    assert set(completed(script, "refract", "")) == set(COMMANDS)
    assert completed(script, "refract", "retr") == ["retrain"]
    assert completed(script, "refract", "train", "--optim.lr") == ["--optim.lr", "--optim.lr_end"]
    assert completed(script, "refract", "serve", "--metrics") == ["--metrics-port"]
    assert completed(script, "refract", "train", "pho", cwd=tmp_path) == ["photos.yaml"]
    assert completed(script, "refract", "train", "my", cwd=tmp_path) == ["my photos.yaml"]
    assert completed(script, "refract", "tra", cwd=tmp_path) == ["train"], "the command, not the folder"


def test_every_command_has_its_options() -> None:
    flags = options()
    assert set(flags) == set(COMMANDS)
    assert {"--report", "--robustness"} <= set(flags["evaluate"])
    assert "--max-batch" in flags["serve"] and not any("--option" in names for names in flags.values())
    for command in ("train", "tune", "find", "retrain"):
        assert "--data.val_fraction" in flags[command] and "--section.key" not in flags[command]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_load_their_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "retrain" in text and "optim.lr_end" in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text, "utf-8")
        before = "autoload -U compinit; compinit -u; " if shell == "zsh" else ""
        done = subprocess.run([shell, "-c", f"{before}source {tmp_path}/script"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
