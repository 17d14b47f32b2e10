"""The trainings on several machines of `deploy/`: the Kubernetes Job and the SLURM script start what Refract accepts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPT = DEPLOY / "slurm-train.sh"
OBJECTS = {value["kind"]: value for value in yaml.safe_load_all((DEPLOY / "kubernetes-train.yaml").read_text("utf-8"))}
JOB = OBJECTS["Job"]["spec"]
POD = JOB["template"]["spec"]
CONTAINER = POD["containers"][0]


def options(words: list[str]) -> dict[str, str]:
    """Return the options before the command `train`, parsed by torchrun; and the command under `command`."""
    from torch.distributed.run import parse_args

    assert words[0] == "torchrun"
    args = parse_args(words[1:])
    return {**vars(args), "command": [args.training_script, *args.training_script_args]}


def test_the_job_starts_one_launcher_for_each_machine_and_they_meet_at_the_first_pod() -> None:
    args = options(CONTAINER["args"])
    assert JOB["completionMode"] == "Indexed"
    assert JOB["completions"] == JOB["parallelism"] == int(args["nnodes"])
    assert int(args["nproc_per_node"]) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    service, port = OBJECTS["Service"], OBJECTS["Service"]["spec"]["ports"][0]["port"]
    name = OBJECTS["Job"]["metadata"]["name"]
    assert args["rdzv_endpoint"] == f"{name}-0.{POD['subdomain']}:{port}"
    assert service["metadata"]["name"] == POD["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= JOB["template"]["metadata"]["labels"].items()
    assert args["command"][0] == "train" and "--resume=auto" in args["command"], "a replaced pod resumes"
    assert OBJECTS["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


def test_the_config_of_the_job_is_valid() -> None:
    from refract.pipeline.config.config import config_from_dict

    ((name, text),) = OBJECTS["ConfigMap"]["data"].items()
    assert f"/config/{name}" in CONTAINER["args"]
    assert config_from_dict(yaml.safe_load(text)).data.source.startswith(CONTAINER["workingDir"])


def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


@pytest.mark.parametrize(
    ("signal", "code", "requeued"),
    [
        ("", 0, False),
        ("", 2, False),
        ("", 75, False),
        ("TERM", 75, False),
        ("USR1", 75, True),
        ("USR1", 0, False),
        ("USR1", 2, False),
    ],
)
def test_the_script_starts_the_ranks_and_queues_a_job_again_only_at_the_end_of_its_time(
    tmp_path: Path, signal: str, code: int, requeued: bool
) -> None:
    """SLURM's programs are replaced by scripts: `srun` signals the script and ends after `scancel`."""
    wait = f"kill -{signal} $PPID; until [ -e scancel.txt ]; do sleep 0.01; done; " if signal else ""
    programs = {
        "srun": f'printf "%s\\n" "$@" > srun.txt; {wait}exit {code}',
        "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" > scontrol.txt; fi',
        "scancel": 'echo "$@" > scancel.txt',
    }
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "bin" / "activate").write_text("")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "REFRACT_ENVIRONMENT": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_GPUS_ON_NODE": "8",
    }
    done = subprocess.run(["bash", SCRIPT, "photos.yaml", "--optim.lr", "1e-3"], cwd=tmp_path, env=environment)
    assert done.returncode == code
    words = (tmp_path / "srun.txt").read_text().split("\n")[:-1]
    args = options(words[words.index("refract") + 1 :])
    assert (args["nnodes"], args["nproc_per_node"], args["rdzv_endpoint"]) == ("2", "8", "node-a:24711")
    assert args["command"] == ["train", "photos.yaml", "--optim.lr", "1e-3", "--resume", "auto"]
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if signal:
        assert (tmp_path / "scancel.txt").read_text() == "--signal=TERM 4711.0\n"
    assert subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, capture_output=True).returncode == 2
