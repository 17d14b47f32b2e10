"""`refract torchrun [OPTION OF torchrun …] train CONFIG …`"""

import sys

USAGE = """\
usage: refract torchrun [OPTION OF torchrun …] train CONFIG.yaml [--section.key value …] [--resume auto]

Train with several ranks by torchrun, which takes the same options, such as:
  --nproc-per-node N         ranks on this machine; gpu: one for each GPU
  --nnodes N                 machines; start the same command on each
  --rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-id NAME
                             where the machines meet; the same values on each
  --max-restarts N           restart all ranks up to N times after a failure; they resume from the last checkpoint
  --log-dir FOLDER           folder for the logs of the ranks that do not print to the terminal
`torchrun --help` lists all options.

If a rank fails, the others end within seconds, and one line names the rank, its machine, its log and the command that
resumes. Exit codes are those of `refract train`."""

OPTIONS = (
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--max-restarts",
    "--log-dir",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
)
"""Options of torchrun that users write after `train` by mistake."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    from refract.pipeline import console

    words = [word.partition("=")[0].replace("_", "-") for word in argv]
    misplaced = [word for word in words[words.index("train") :] if word in OPTIONS] if "train" in words else []
    if misplaced:
        print(
            f"refract torchrun: {misplaced[0]} is an option of torchrun; write it before `train`: "
            f"refract torchrun {misplaced[0]} … train CONFIG.yaml",
            file=sys.stderr,
        )
        return 2
    try:
        return console.run("torchrun", lambda: _launch(argv))
    except SystemExit as error:  # torchrun's parser has printed what it accepts
        return int(error.code or 0)


def _launch(argv: list[str]) -> int:
    from refract.pipeline.training.launcher import launch

    return launch(argv)
