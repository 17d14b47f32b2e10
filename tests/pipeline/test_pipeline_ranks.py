"""Trainings with several ranks under torchrun, with gloo: the samples of each rank, metrics, failures, restarts, other numbers of ranks."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from small_data import paint
from warm_process import WarmProcess

from refract.models.training.objective import classification_loss
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.training.attempt import agree, current_attempt, restarted
from refract.pipeline.training.callbacks.averaging import best_weights
from refract.pipeline.training.fit import assemble
from refract.pipeline.training.rank_failure import store_error
from refract.pipeline.training.ranks import batches_of_step
from refract.pipeline.training.recipe import check_ranks
from refract.pipeline.training.run_directory import stored_config

ROOT = Path(__file__).parents[2]

# Uneven numbers: 39 training and 9 validation images. What a rank could do differently: dropout, mixing, repeats, averages, balance.
CONFIG = """
plugins: [rank_recorder.py]
data: {source: images, image_size: 24, batch_size: 2, workers: 0, memory: never, val_fraction: 0.15, sampler: balanced, repeats: 2}
augment: {policy: [HorizontalFlip, {MixUp: {p: 0.5}}]}
model: {name: cnn, args: {widths: [8, 16], dropout: 0.3}}
optim: {name: sgd, lr: 0.02}
trainer: {max_epochs: 3, precision: fp32, device: cpu, ema: 0.9, checkpoint_seconds: 0, patience: 3}
evaluation: {robustness: none}
"""


class Work:
    """A folder with images and a config, and a finished training in it, `runs/calm`, of two ranks that were not forked."""

    def __init__(self, folder: Path, warm: WarmProcess) -> None:
        self.folder, self._warm = folder, warm

    def run(
        self,
        *words: object,
        record: str,
        ranks: int = 2,
        restarts: int = 0,
        code: int = 0,
        forked: bool = True,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run `refract torchrun …`, or `refract …` with one rank. forked: fork the launcher and its ranks, see `warm_process`."""
        launcher = ["torchrun", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)] if ranks > 1 else []
        environment = {**os.environ, "RECORD": record} | environment
        command = [*launcher, *map(str, words)]
        if forked:
            done = self._warm.run(command, cwd=self.folder, env=environment, seconds=240)
        else:
            done = subprocess.run(
                [sys.executable, "-m", "refract", *command],
                cwd=self.folder, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
            )  # fmt: skip
        assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def rows(self, record: str, kind: str, epoch: int) -> list[list[dict]]:
        """Return the recorded batches of each rank."""
        files = sorted(self.folder.glob(f"{record}.*"))
        rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [[row for row in rank if (row["kind"], row["epoch"]) == (kind, epoch)] for rank in rows]

    def counts(self, record: str, kind: str, epoch: int) -> Counter:
        """Return how often each (index, repeat) occurred over all ranks."""
        batches = [row for rank in self.rows(record, kind, epoch) for row in rank]
        repeats = [row["repeats"] or [0] * len(row["indices"]) for row in batches]
        return Counter(
            key for row, more in zip(batches, repeats, strict=True) for key in zip(row["indices"], more, strict=True)
        )

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "runs" / run / "bundle" / "weights.safetensors")

    def tracked(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Return metric → (step, value) of the only MLflow run of this name, without times."""
        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        (entry,) = client.search_runs(["1"], f"attributes.run_name = '{run}'")
        assert entry.info.status == "FINISHED"
        names = [name for name in entry.data.metrics if name != "epoch_seconds" and not name.startswith("cost_")]
        return {
            name: [(point.step, point.value) for point in client.get_metric_history(entry.info.run_id, name)]
            for name in names
        }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, new_tracking: Path, warm: WarmProcess) -> Work:
    folder = tmp_path_factory.mktemp("ranks")
    paint(folder / "images", range(20))
    (folder / "c.yaml").write_text(CONFIG)
    shutil.copy(Path(__file__).with_name("rank_recorder.py"), folder)
    shutil.copy(new_tracking, folder / "mlflow.db")
    work = Work(folder, warm)
    temporary = folder / "temporary"
    temporary.mkdir()
    done = work.run("train", "c.yaml", "--trainer.run_name", "calm", record="calm", forked=False, TMPDIR=str(temporary))
    assert not any(temporary.glob("refract-*")), "a job without a failure leaves no logs"
    assert done.stderr.count("checking 60 samples") == done.stdout.count("bundle:") == 1, "only rank 0 reports"
    return work


@pytest.mark.slow
def test_the_ranks_share_each_epoch_and_validate_together_with_the_average_that_rank_0_saves(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work.folder)
    monkeypatch.setenv("RECORD", "alone")
    run = Path("runs/calm")
    assembly = assemble(stored_config(run))
    train, val = (len(assembly.manifest.of(split)) for split in ("train", "val"))
    assert train % 2 == val % 2 == 1, "the ranks have unequal parts"
    for epoch in range(3):
        first, second = (
            [key for row in rank for key in zip(row["indices"], row["repeats"], strict=True)]
            for rank in work.rows("calm", "training_step", epoch)
        )
        assembly.data.order.set_epoch(epoch)
        keys = [(key[1], key[2]) for key in assembly.data.order]
        assert [key for pair in zip(first, second, strict=True) for key in pair] == [*keys, keys[0]]
        assert work.counts("calm", "validation_step", epoch) == Counter((index, 0) for index in range(val))
        lengths = [len(rank) for rank in work.rows("calm", "validation_step", epoch)]
        assert lengths == [3, 2], "ranks with different numbers of batches do not wait for each other"
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assembly.module.load_state_dict(best_weights(best))
    assembly.module.eval()
    with torch.no_grad():
        batches = [
            (assembly.module.classifier(batch["images"]), batch["targets"]) for batch in assembly.data.val_dataloader()
        ]
    logits, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    row = json.loads((run / "history.json").read_text())[best["epoch"]]
    assert row["val_loss"] == pytest.approx(float(classification_loss(logits, targets, task="multiclass")), rel=1e-5)
    assert row["val_accuracy"] == pytest.approx(float((logits.argmax(1) == targets).float().mean()))
    assert work.tracked("calm")["val_loss"][best["epoch"]] == (best["epoch"] + 1, row["val_loss"])


@pytest.mark.slow
def test_a_killed_rank_restarts_the_job_which_resumes_to_the_same_weights_in_the_same_run(work: Work) -> None:
    words = ("train", "c.yaml", "--trainer.run_name", "restarted")
    done = work.run(*words, record="restarted", restarts=1, MISBEHAVE="1:14:kill")
    assert done.stderr.count("resuming from runs/restarted/checkpoints/resume-") == 1
    calm, restarted = work.weights("calm"), work.weights("restarted")
    assert all((restarted[key] == weight).all() for key, weight in calm.items())
    assert work.tracked("restarted") == work.tracked("calm")


@pytest.mark.slow
def test_a_lost_rank_or_an_error_in_one_rank_ends_the_job_with_one_sentence_and_so_does_a_wrong_config(
    work: Work,
) -> None:
    untracked = ("--tracking.enabled", "false")
    done = work.run("train", "c.yaml", *untracked, record="lost", code=1, MISBEHAVE="1:4:kill")
    last = done.stderr.splitlines()[-1]
    match = re.fullmatch(
        r"refract torchrun: rank 1 on \S+ \(log: (\S+)\) was ended by SIGKILL, which the kernel sends if memory is short; "
        r"`refract torchrun --nproc-per-node 2 .* train c.yaml --tracking.enabled false --resume auto` resumes from the last checkpoint"
        ", if one was written",
        last,
    )
    assert match is not None, done.stderr
    assert Path(match.group(1)).is_file()
    assert "rank 0" not in done.stderr and "gloo" not in done.stderr, "the other rank adds nothing"

    with (work.folder / "runs" / "calm" / "splits.csv").open() as file:
        path = next(row["path"] for row in csv.DictReader(file) if row["split"] == "train")
    path = str(Path(path).relative_to(work.folder))
    content = (work.folder / path).read_bytes()
    words = ("train", "c.yaml", *untracked, "--resume", "auto")
    broken = work.run(*words, record="broken", restarts=2, code=2, MISBEHAVE=f"1:2:break:{path}")
    (work.folder / path).write_bytes(content)
    last = broken.stderr.splitlines()[-1]
    assert re.match(r"refract torchrun: rank [01] on \S+ (\(log: \S+\) )?failed: ", last) and path in last
    assert "resumes" not in last and broken.stderr.count(path) == 1
    assert broken.stderr.count("resuming from") == 1, "no restart"
    wrong = work.run("train", "c.yaml", "--optim.lr", "-1", record="wrong", code=2)
    assert wrong.stderr.count("optim.lr") == 1 and wrong.stderr.splitlines()[-1].startswith("refract torchrun: rank ")


@pytest.mark.slow
def test_a_stopped_job_resumes_on_other_numbers_of_ranks(work: Work) -> None:
    """In the middle of the last epoch. Steps keep their size, so that the schedule of the learning rate stays the same."""
    words = ("train", "c.yaml", "--trainer.run_name", "stopped", "--tracking.enabled", "false")
    words = (*words, "--trainer.checkpoint_seconds", "600")
    done = work.run(*words, record="stopped", code=75, MISBEHAVE="0:24:stop:SIGTERM")
    assert "refract train: stopped by SIGTERM; " in done.stderr.splitlines()[-1]
    runs = work.folder / "runs"
    for ranks in (1, 4):
        shutil.copytree(runs / "stopped", runs / f"on{ranks}")
        work.run("train", "--resume", f"runs/on{ranks}", record=f"on{ranks}", ranks=ranks)
        before, after = (work.counts(record, "training_step", 2) for record in ("stopped", f"on{ranks}"))
        missing = set(work.counts("calm", "training_step", 2)) - set(before + after)
        assert len(missing) <= (ranks == 1), "each sample, but for a last batch of one image"
        assert max((before + after).values()) <= 2, "the order wraps around for the last step"
        steps = {row["step"] for rank in work.rows(f"on{ranks}", "training_step", 2) for row in rank}
        assert min(steps) == 24 and max(steps) == 29
    printed = work.run("train", "--resume", "runs/stopped", record="three", ranks=3, code=2).stderr
    assert (
        "4 samples per step, which 3 ranks cannot divide equally; resume on one of these numbers of ranks: 1, 2, 4"
        in printed
    )


def test_steps_keep_their_size_on_another_number_of_ranks() -> None:
    assert batches_of_step(64, 1, before=8, count=8) == (64, 1)
    assert batches_of_step(64, 1, before=8, count=2) == (64, 4)
    assert batches_of_step(64, 1, before=8, count=16) == (32, 1)
    assert batches_of_step(64, 2, before=3, count=2) == (64, 3)
    assert batches_of_step(10, 1, before=3, count=2) == (5, 3)
    with pytest.raises(ConfigError, match="512 samples per step, which 7 ranks cannot divide"):
        batches_of_step(64, 1, before=8, count=7)


@pytest.mark.parametrize("stale", [False, True])
def test_the_processes_of_an_attempt_agree_on_its_name_also_if_some_of_them_start_late(stale: bool) -> None:
    from torch.distributed import HashStore

    store, names = HashStore(), {}

    def join(rank: int, restarts: int) -> None:
        names[rank] = agree(store, rank, 3, restarts)

    def start(ranks: Iterable[int], restarts: int) -> list[Thread]:
        threads = [Thread(target=join, args=(rank, restarts), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        return threads

    for thread in start(range(3), 0):
        thread.join(20)
    first = set(names.values())
    assert len(first) == 1 and {restarted for _, restarted in first} == {False}
    names.clear()
    early = start([0, 1] if stale else [1, 2], 0)  # the store has a process of the remaining rank, which has ended
    late = start([2] if stale else [0], 1)
    for thread in (*early, *late):
        thread.join(20)
    second = set(names.values())
    assert len(names) == 3 and len(second) == 1 and first != second and {restarted for _, restarted in second} == {True}


@pytest.mark.slow
def test_shards_train_like_replicas_also_after_a_restart_and_write_the_same_bundle(work: Work) -> None:
    """FSDP with an average of the weights, and ranks with different numbers of validation batches."""
    words = (
        "train",
        "c.yaml",
        "--trainer.run_name",
        "shards",
        "--trainer.strategy",
        "fsdp",
        "--tracking.enabled",
        "false",
    )
    done = work.run(*words, record="shards", restarts=1, MISBEHAVE="1:14:kill")
    assert "resuming from runs/shards/checkpoints/resume-" in done.stderr
    for epoch in range(3):
        assert work.counts("shards", "validation_step", epoch) == work.counts("calm", "validation_step", epoch)
    calm, shards = work.weights("calm"), work.weights("shards")
    assert calm.keys() == shards.keys()
    for key, weight in calm.items():
        if "running" not in key:  # DDP copies the statistics of rank 0 to the others, FSDP does not
            torch.testing.assert_close(shards[key], weight, rtol=1e-3, atol=1e-4)
    names = [{path.name for path in (work.folder / "runs" / run / "bundle").iterdir()} for run in ("calm", "shards")]
    assert names[0] == names[1]
    whole, best = (
        torch.load(work.folder / "runs" / run / "checkpoints" / "best.ckpt", weights_only=True)
        for run in ("calm", "shards")
    )
    shapes = [{name: value.shape for name, value in state["state_dict"].items()} for state in (whole, best)]
    assert shapes[0] == shapes[1]


def test_a_rank_ends_with_its_launcher() -> None:
    rank = (
        "import signal; from refract.pipeline.training.rank_failure import stop_without_launcher; stop_without_launcher(); "
        "print('ready', flush=True); signal.pause()"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    started = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, env=environment)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    started.kill()
    assert started.communicate(timeout=60)[0] == "", "the rank has closed the pipe"


def test_the_stored_error_of_a_rank_has_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    store_error("http://user:s3cret@mlflow:5000 does not answer")
    stored = (tmp_path / "error.json").read_text()
    assert "s3cret" not in stored and "@mlflow:5000 does not answer" in stored


@pytest.mark.parametrize(("count", "expected"), [("0", False), ("2", True)])
def test_a_single_rank_knows_that_torchrun_restarted_it(
    monkeypatch: pytest.MonkeyPatch, count: str, expected: bool
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": count}.items():
        monkeypatch.setenv(name, value)
    current_attempt.cache_clear()
    assert restarted() == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"model.mode": "gradual"},
            "model.mode: gradual needs the whole weights on each rank; set model.mode: fine-tune, or",
        ),
        ({"loss.penalty": 0.1}, r"loss.penalty: 0.1 needs the whole weights"),
        (
            {"optim.name": "muon"},
            "optim.name: muon needs whole matrices; set optim.name: adamw, or trainer.strategy: ddp",
        ),
    ],
)
def test_what_shards_cannot_do_is_refused(option: dict[str, object], message: str) -> None:
    config = Config().changed({"trainer.strategy": "fsdp", **option})
    check_ranks(config, 100, 1)
    with pytest.raises(ConfigError, match=message):
        check_ranks(config, 100, 2)


def test_several_ranks_need_a_validation_sample_each_and_a_mode_with_steps() -> None:
    check_ranks(Config(), 8, 8)
    with pytest.raises(ConfigError, match="8 ranks need a validation sample each, got 5; raise data.val_fraction"):
        check_ranks(Config(), 5, 8)
    with pytest.raises(ConfigError, match="model.mode: probe fits the head in one process, got 2 ranks"):
        check_ranks(Config().changed({"model.mode": "probe"}), 100, 2)


def namespaces() -> str | None:
    """Return why this machine cannot create two network namespaces with a link between them, None if it can."""
    if shutil.which("ip") is None:
        return "the program ip is not installed"
    name = f"refract-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"ip netns add: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with the addresses 10.213.0.1 and 10.213.0.2."""
    if (reason := namespaces()) is not None:
        pytest.skip(f"needs root and network namespaces ({reason})")
    names = (f"rfa{os.getpid()}", f"rfb{os.getpid()}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.213.0.{number}/24", "dev", name)
            for link in (name, "lo"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_two_hosts_train_together_and_notice_a_lost_rank(
    work: Work, hosts: tuple[str, str], warm: WarmProcess, lost: bool
) -> None:
    """Each network namespace is a host with an address and a launcher. They share the folder, as by NFS."""
    run = f"hosts{lost}"
    words = ["train", "c.yaml", "--tracking.enabled", "false", "--trainer.run_name", run]
    started = []
    for name in hosts:
        meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.213.0.1:29400", "--rdzv-id", run]
        environment = {**os.environ, "RECORD": run}
        environment |= {"GLOO_SOCKET_IFNAME": name, "REFRACT_CACHE_DIR": str(work.folder / name)}
        environment |= {"MISBEHAVE": "1:4:kill"} if lost else {}
        address = f"10.213.0.{len(started) + 1}"
        command = ["torchrun", *meet, "--local-addr", address, *words]
        started.append(warm.popen(command, cwd=work.folder, env=environment, network=name))
    try:
        outputs = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.terminate()
    assert [process.returncode for process in started] == ([1, 1] if lost else [0, 0]), "\n".join(outputs)
    assert not any("Traceback" in output for output in outputs), "\n".join(outputs)
    if lost:
        ends = [output.splitlines()[-1] for output in outputs]
        assert sum("rank 1 on " in end and "was ended by SIGKILL" in end for end in ends) == 1, ends
        assert sum("rank 0 lost the connection to another rank at 10.213.0." in end for end in ends) == 1, ends
        assert all("--resume auto` resumes from the last checkpoint" in end for end in ends)
    else:
        calm, both = work.weights("calm"), work.weights(run)
        assert all((both[key] == weight).all() for key, weight in calm.items()), "as two ranks on one host"
