"""How OpenMP's threads wait, as GNU OpenMP itself reports it when it is loaded."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def library() -> Path:
    """Return PyTorch's GNU OpenMP, which reads the environment when it is loaded. `import torch` loads it too, and takes seconds."""
    torch = Path(*importlib.util.find_spec("torch").submodule_search_locations)
    return next(file for folder in ("torch/lib", "torch.libs") for file in torch.parent.glob(f"{folder}/libgomp*"))


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU OpenMP on Linux")
@pytest.mark.parametrize(
    ("variables", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["default", "spins", "policy"],
)
def test_a_command_lets_waiting_threads_sleep_unless_the_user_says_otherwise(
    variables: dict[str, str], spins: str
) -> None:
    plain = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = "import ctypes, sys, refract.cli; refract.cli.main(['ops']); assert 'torch' not in sys.modules; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(library())],
        cwd=Path(__file__).parents[2], env=plain | {"OMP_DISPLAY_ENV": "verbose"} | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
