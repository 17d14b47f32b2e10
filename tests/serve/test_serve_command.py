"""`refract serve` as a process: what it prints, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

ROOT = Path(__file__).parents[2]


def start(*arguments: str, code: str = "", backend: str = "eager", **options) -> subprocess.Popen[str]:
    """`refract serve`, or Python code that does as much."""
    program = ["-c", code] if code else ["-m", "refract.serve.cli.command"]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    command = [sys.executable, *program, *arguments, *device, "--backend", backend]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def served(bundle):
    """A running server and its address, read from the line that says it is ready."""
    process = start(str(bundle.path), "--port", "0", "--max-body-mb", "0.1")
    line = process.stdout.readline()
    prefix = f"Refract serves shapes ({bundle.digest[:12]}) on "
    assert line.startswith(prefix), process.stderr.read()
    yield process, httpx.URL(line.removeprefix(prefix).strip())
    process.kill()
    process.communicate()


def test_help_is_answered_without_the_heavy_imports():
    code = (
        "import sys, refract.serve.cli.command\n"
        "try: refract.serve.cli.command.main(['--help'])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'fastapi', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--max-wait-ms" in done.stdout
    assert done.stdout.endswith("0 []\n")


def test_the_access_log_is_json_and_nothing_else(bundle, make_image):
    process = start(str(bundle.path), "--port", "0", "--access-log")
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client:
        client.post("/v1/predict", content=make_image(1), headers={"X-Request-Id": "mine"})
        client.get("/nothing")
    process.terminate()
    code, out, err = finish(process)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/predict", 200), ("/nothing", 404)]
    assert (code, err, lines[0]["id"]) == (0, "", "mine")


def test_a_connection_is_kept_as_long_as_is_asked(bundle):
    process = start(str(bundle.path), "--port", "0", "--keep-alive-s", "1")
    url = httpx.URL(process.stdout.readline().rpartition(" on ")[2].strip())
    with socket.create_connection((url.host, url.port), timeout=4) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = connection.makefile(
            "rb"
        ).read()  # until it is closed: before the 5 seconds of uvicorn's own, and the 75 of ours
        assert answer.startswith(b"HTTP/1.1 200")
    process.terminate()
    assert finish(process) == (0, "", "")


def test_a_reader_of_the_access_log_that_stalls_holds_nobody_up(bundle):
    process = start(str(bundle.path), "--port", "0", "--access-log")
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False, timeout=10) as client:
        for _ in range(1200):  # a pipe takes the lines of some 400
            assert client.get("/livez").status_code == 200
    process.terminate()
    assert process.wait(timeout=20) == 0
    lines = [json.loads(line) for line in process.stdout.read().splitlines()[:-1]]  # the last may be torn
    assert 100 < len(lines) < 1200 and {line["path"] for line in lines} == {"/livez"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_gracefully_with_what_is_in_flight_answered(served, make_image, number):
    process, url = served
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/readyz").status_code == 200
        too_large = client.post("/v1/predict", content=b"\0" * 200_000)
        assert too_large.status_code == 413
    data = make_image(3)
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((url.host, url.port), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100")  # the application waits for the body: it is in flight
        process.send_signal(number)
        wait_until_refused(url)
        connection.sendall(data)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"predictions":[' in answer
    code, out, err = finish(process)
    assert (code, out, err) == (0, "", "")


def test_while_it_drains_it_answers_and_says_that_it_goes(bundle, make_image):
    process = start(str(bundle.path), "--port", "0", "--drain-s", "60")
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client:
        assert client.get("/readyz").status_code == 200
        process.terminate()
        deadline = time.monotonic() + 20
        while (answer := client.get("/readyz")).status_code == 200:
            assert time.monotonic() < deadline
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/livez").status_code == 200
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200
        process.terminate()  # the second signal does not wait
    code, out, err = finish(process)
    assert (code, out) == (0, "") and err.count("\n") == 1 and "asked to end; it answers for 60 s more" in err


def test_a_drain_that_was_cut_short_leaves_no_timer_behind(bundle):
    """Its timer would fire into a server that is gone."""
    code = (
        "import sys, threading, refract.serve.cli.command\n"
        "code = refract.serve.cli.command.main(sys.argv[1:])\n"
        "left = [t for t in threading.enumerate() if isinstance(t, threading.Timer) and t.function.__name__ == '<lambda>']\n"
        "print([t for t in left if not t.finished.is_set()])\n"
        "sys.exit(code)"
    )
    process = start(str(bundle.path), "--port", "0", "--drain-s", "300", code=code)
    assert " on http://" in process.stdout.readline()
    process.terminate()
    time.sleep(0.5)
    process.terminate()
    assert finish(process)[:2] == (0, "[]\n")


def test_what_is_killed_while_it_starts_for_the_first_time_starts_again(bundle, tmp_path):
    """At moments from the first import to the exported network; what is left over must not be taken for whole."""
    environment = {**os.environ, "HOME": str(tmp_path)}
    for seconds in (2, 5, 8):
        process = start(str(bundle.path), "--port", "0", backend="auto", env=environment)
        while not caught(process.pid) >> (signal.SIGTERM - 1) & 1:  # until then Python itself starts
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.communicate()
    process = start(str(bundle.path), "--port", "0", backend="auto", env=environment)
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client:
        told = client.get("/v1/model").json()["backend"]
    process.terminate()
    code, _, err = finish(process)
    assert code == 0 and told["dropped"] == {} and set(told["rates"]) >= {"eager/1", "openvino/1", "onnx/1"}, err


def test_what_is_stuck_does_not_keep_it_from_ending(bundle, make_image):
    """A decoder that never comes back; the limits are shortened, or the test would take half a minute."""
    code = (
        "import sys, threading, refract.serve.http.transport.server, refract.serve.requests.decoding, refract.serve.cli.command\n"
        "refract.serve.http.transport.server.GRACE_S = refract.serve.http.transport.server.STUCK_S = 1\n"
        "refract.serve.requests.decoding.image_size = lambda data: (print('stuck', flush=True), threading.Event().wait())\n"
        "sys.exit(refract.serve.cli.command.main(sys.argv[1:]))"
    )
    process = start(str(bundle.path), "--port", "0", "--deadline-s", "100", code=code)
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/v1/predict", content=make_image(1), timeout=60)
        assert process.stdout.readline() == "stuck\n"
        process.terminate()
        code, _, err = finish(process)
        assert code == 1 and "not everything in flight has ended" in err
        assert asked.exception() is not None or asked.result().status_code >= 500


def wait_until_refused(url: httpx.URL) -> None:
    """Returns once the port takes no more connections."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection((url.host, url.port), timeout=1).close()
        except OSError:
            return
    raise AssertionError("the server still accepts connections")


def refused(*arguments: str, **options) -> str:
    """The one line on stderr of a command that must end with code 2."""
    code, out, err = finish(start(*arguments, **options))
    assert (code, out) == (2, ""), err
    assert err.startswith("refract serve: ")
    assert err.count("\n") == 1
    return err


def test_a_missing_folder():
    assert "no such folder" in refused("/nowhere", "--port", "0")


def test_a_damaged_bundle(make_bundle, tmp_path):
    bundle = make_bundle(tmp_path / "b")
    (bundle.path / "weights.safetensors").write_bytes(b"damaged")
    assert "weights.safetensors" in refused(str(bundle.path), "--port", "0")


def test_a_golden_image_that_is_answered_otherwise(make_bundle, tmp_path):
    bundle = make_bundle(tmp_path / "b", wrong=0.01)
    assert "golden sample 00.jpg" in refused(str(bundle.path), "--port", "0")


def test_a_port_that_is_taken(bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(str(bundle.path), "--port", str(port))


def test_cuda_where_there_is_none(bundle):
    devices = ("cuda", "all", "cpu,cuda:1", "tpu")
    code = (
        "import sys, refract.serve.cli.command\n"
        f"for device in {devices}:\n"
        "    print(refract.serve.cli.command.main([*sys.argv[1:4], '--device', device]))"
    )
    process = start(str(bundle.path), "--port", "0", code=code, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    _, out, err = finish(process)
    assert out.split() == ["2"] * len(devices)
    for device in devices:
        assert f"--device {device}: this machine offers cpu to torch, and no other device" in err


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--max-batch", "0"],
        ["--max-wait-ms", "-1"],
        ["--max-body-mb", "nan"],
        ["--max-pixels", "1e6"],
        ["--deadline-s", "0"],
        ["--rate", "0"],
        ["--rate", "3"],
        ["--challenger", "x"],
        ["--shadow", "0.1"],
        ["--canary", "1.5"],
        ["--max-body-mb", "0"],
    ],
)
def test_an_option_out_of_range_is_named(options, bundle, capsys):
    from refract.serve.cli.command import main

    with pytest.raises(SystemExit) as end:
        main([str(bundle.path), *options])
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_signal_while_it_starts_ends_it_too():
    """The registry that it asks for the model accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as registry:
        registry.settimeout(60)
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{registry.getsockname()[1]}"}
        process = start("models:/shapes@champion", "--port", "0", env=environment)
        with registry.accept()[0] as asked:
            process.terminate()
            assert process.wait(30) == 0
            asked.settimeout(20)
            while asked.recv(65_536):
                pass
            assert finish(process) == (0, "", ""), "and the process that asked has ended too"


@pytest.mark.parametrize(
    "place", ["refract.serve.cli.command._bundle", "refract.serve.runtime.engine.Engine.self_test"]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_is_not_lost_in_what_catches_all(bundle, number, place: str):
    """As an exception is in a library's callback from C; the second place is uvicorn's start."""
    code = (
        "import sys, time, refract.serve.cli.command, refract.serve.runtime.engine\n"
        "def deaf(*_):\n"
        "    for _ in range(9):\n"
        "        try: print('starting', flush=True), time.sleep(9)\n"
        "        except BaseException: pass\n"
        f"{place} = deaf\n"
        "sys.exit(refract.serve.cli.command.main(sys.argv[1:]))"
    )
    process = start(str(bundle.path), "--port", "0", code=code)
    assert process.stdout.readline() == "starting\n"
    process.send_signal(number)
    assert process.wait(30) == 0
    assert finish(process) == (0, "", "")


def caught(pid: int) -> int:
    """The mask of the signals that a process handles itself."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(mask, 16)


def test_a_signal_at_any_moment_of_a_first_start_ends_it(bundle, tmp_path):
    """Imports, an export, a conversion, or the timing of backends."""

    def ended(seconds: float) -> tuple[int, str, float]:
        environment = {**os.environ, "HOME": str(tmp_path / str(seconds))}
        process = start(str(bundle.path), "--port", "0", backend="auto", env=environment)
        while not caught(process.pid) >> (signal.SIGTERM - 1) & 1:  # until then Python itself starts
            time.sleep(0.01)
        time.sleep(seconds)
        process.terminate()
        began = time.monotonic()
        code, out, _ = finish(process)
        return code, out, time.monotonic() - began

    moments = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    with ThreadPoolExecutor(4) as pool:
        for code, out, took in pool.map(ended, moments):
            assert code == 0 and took < 10
            assert out == "" or out.startswith("Refract serves shapes ")


def test_nothing_is_unpickled(bundle, make_image):
    """An audit hook ends the process where a pickle asks for a class; that it would is tried first."""
    code = (
        "import os, pickle, sys, refract.serve.http.app, refract.serve.cli.command, torch, pathlib\n"
        "armed = False\n"
        "def hook(event, details):\n"
        "    if armed and event == 'pickle.find_class': raise RuntimeError(f'unpickled {details}')\n"
        "sys.addaudithook(hook)\n"
        "data = pickle.dumps(pathlib.Path('x'))\n"
        "armed = True\n"
        "try: pickle.loads(data)\n"
        "except RuntimeError: print('armed', flush=True)\n"
        "sys.exit(refract.serve.cli.command.main(sys.argv[1:]))"
    )
    process = start(str(bundle.path), "--port", "0", code=code)
    assert process.stdout.readline() == "armed\n"
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client:
        for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
            assert client.post("/v1/predict?explain=true", content=make_image(1, form=form)).status_code == 200
    process.terminate()
    assert finish(process) == (0, "", "")
