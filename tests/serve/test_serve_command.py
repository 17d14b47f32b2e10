"""`refract serve` as a process: its output, signals and exit codes."""

import fcntl
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import httpx
import pytest
from warm_process import Started, shared

from refract.serve.grpc.messages import MESSAGES, SERVICE

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

ROOT = Path(__file__).parents[2]


def start(*arguments: str, code: str = "", backend: str = "eager", env: Mapping[str, str] | None = None) -> Started:
    """Start `refract serve` on the CPU, by default without conversions, or Python code that runs it."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    options = [*arguments, *device, "--backend", backend]
    return shared().popen(options if code else ["serve", *options], cwd=ROOT, env=env, code=code)


def start_cold(*arguments: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start `refract serve` in a new process, which imports its modules and chooses its backend."""
    command = [sys.executable, "-m", "refract.serve.cli.command", *arguments, "--device", "cpu"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def finish(process: subprocess.Popen[str] | Started) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def served(bundle):
    """A running server and its address, which its first line of output contains."""
    process = start(str(bundle.path), "--port", "0", "--max-body-mb", "0.1")
    line = process.stdout.readline()
    prefix = f"Refract serves shapes ({bundle.digest[:12]}) on "
    assert line.startswith(prefix), process.stderr.read()
    yield process, httpx.URL(line.removeprefix(prefix).strip())
    process.kill()
    process.communicate()


def test_help_needs_no_heavy_imports():
    code = (
        "import sys, refract.serve.cli.command\n"
        "try: refract.serve.cli.command.main(['--help'])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'fastapi', 'numpy', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--max-wait-ms" in done.stdout
    assert done.stdout.endswith("0 []\n")


def test_standard_output_holds_the_access_log_as_json_only(bundle, make_image):
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


def test_keep_alive_s_sets_the_idle_time_of_a_connection(bundle):
    process = start(str(bundle.path), "--port", "0", "--keep-alive-s", "1")
    url = httpx.URL(process.stdout.readline().rpartition(" on ")[2].strip())
    with socket.create_connection((url.host, url.port), timeout=4) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = connection.makefile(
            "rb"
        ).read()  # until the server closes it: before uvicorn's default of 5 seconds, and our 75
        assert answer.startswith(b"HTTP/1.1 200")
    process.terminate()
    assert finish(process) == (0, "", "")


def test_a_stalled_reader_of_the_access_log_delays_no_request(bundle):
    process = start(str(bundle.path), "--port", "0", "--access-log")
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # the lines of about 25 requests
    with httpx.Client(base_url=address, trust_env=False, timeout=10) as client:
        for _ in range(150):
            assert client.get("/livez").status_code == 200
    process.terminate()
    assert process.wait(timeout=20) == 0
    lines = [json.loads(line) for line in process.stdout.read().splitlines()[:-1]]  # the last may be torn
    assert 5 < len(lines) < 150 and {line["path"] for line in lines} == {"/livez"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_after_the_requests_in_flight(served, make_image, number):
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


def test_a_draining_server_answers_and_is_not_ready(bundle, make_image):
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
    assert (
        (code, out) == (0, "") and err.count("\n") == 1 and "shutting down; requests are served for another 60 s" in err
    )


def test_an_interrupted_drain_leaves_no_timer(bundle):
    """A remaining timer would fire after the server is gone."""
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


def test_a_server_killed_during_its_first_start_starts_again(bundle, tmp_path):
    """Kill before the first file of a network has its final name, and between its two files; neither must count as a network."""
    environment = {**os.environ, "HOME": str(tmp_path)}
    for complete in (0, 1):
        code = (
            "import itertools, os, signal, sys, refract.serve.cli.command\n"
            "calls, fsync = itertools.count(), os.fsync\n"
            "signal.alarm(300)  # a start that syncs nothing must not serve forever\n"
            f"os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == {complete} else fsync(file)\n"
            "sys.exit(refract.serve.cli.command.main(sys.argv[1:]))"
        )
        process = start(str(bundle.path), "--port", "0", backend="auto", env=environment, code=code)
        assert finish(process)[:2] == (-signal.SIGKILL, "")
        (folder,) = (tmp_path / ".cache/refract/backends").iterdir()
        assert len(list(folder.glob("kept.*"))) == complete and list(folder.glob("part-*/kept.*"))
    process = start(str(bundle.path), "--port", "0", backend="auto", env=environment)
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client:
        backend = client.get("/v1/model").json()["backend"]
    process.terminate()
    code, _, err = finish(process)
    assert code == 0 and backend["dropped"] == {} and set(backend["rates"]) >= {"eager/1", "openvino/1", "onnx/1"}, err


def test_a_stuck_request_does_not_prevent_the_exit(bundle, make_image):
    """The decoder never returns. The limits are shortened, as the test would take half a minute."""
    code = (
        "import sys, threading, refract.serve.http.transport.server, refract.serve.requests.decoding, refract.serve.cli.command\n"
        "refract.serve.http.transport.server.GRACE_S = refract.serve.http.transport.server.STUCK_S = 1\n"
        "refract.serve.requests.decoding.image_size = lambda data: (print('stuck', flush=True), threading.Event().wait())\n"
        "sys.exit(refract.serve.cli.command.main(sys.argv[1:]))"
    )
    process = start(str(bundle.path), "--port", "0", "--deadline-s", "100", code=code)
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(client.post, "/v1/predict", content=make_image(1), timeout=60)
        assert process.stdout.readline() == "stuck\n"
        process.terminate()
        code, _, err = finish(process)
        assert code == 1 and "some in-flight requests did not finish in time" in err
        assert pending.exception() is not None or pending.result().status_code >= 500


def test_a_signal_stops_the_server_after_the_calls_in_flight(bundle, make_image):
    process = start(str(bundle.path), "--port", "0", "--grpc-port", "0")
    url = httpx.URL(process.stdout.readline().rpartition(" on ")[2].strip())
    port = process.stdout.readline().removeprefix("gRPC on ").strip()
    image, messages = make_image(3), queue.Queue()
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [image]}}
    message = MESSAGES["ModelInferRequest"](model_name="shapes", inputs=[tensor]).SerializeToString()
    with grpc.insecure_channel(port) as channel, grpc.insecure_channel(port) as late:
        call = channel.stream_unary(f"/{SERVICE}/ModelInfer").future(iter(messages.get, None))
        with httpx.Client(base_url=url, trust_env=False) as client:
            while not client.get("/v1/status").json()["requests"]:
                assert not call.done()
        process.terminate()
        wait_until_refused(url)
        deadline, status = time.monotonic() + 15, grpc.StatusCode.OK
        while (
            status != grpc.StatusCode.UNAVAILABLE
        ):  # calls that arrive while the port closes are answered, cancelled or lost
            assert time.monotonic() < deadline
            status = late.unary_unary(f"/{SERVICE}/ServerLive").future(b"", timeout=1).code()
        messages.put(message)
        response = MESSAGES["ModelInferResponse"].FromString(call.result(20))
        messages.put(None)
    assert response.outputs[0].shape == [1, 10]
    assert finish(process) == (0, "", "")


def wait_until_refused(url: httpx.URL) -> None:
    """Return once the port refuses connections."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection((url.host, url.port), timeout=1).close()
        except OSError:
            return
    raise AssertionError("the server still accepts connections")


def test_verbose_prints_the_traceback_of_an_error_before_its_message(tmp_path):
    code, out, err = finish(start(str(tmp_path / "none"), "--port", "0", "--verbose"))
    assert (code, out) == (2, "") and "Traceback" in err
    assert err.splitlines()[-1].startswith("refract serve: ") and str(tmp_path / "none") in err.splitlines()[-1]


def refused(*arguments: str) -> str:
    """Return the one line on stderr of a command that must exit with 2."""
    code, out, err = finish(start(*arguments))
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


def test_a_failed_self_test(make_bundle, tmp_path):
    bundle = make_bundle(tmp_path / "b", wrong=0.01)
    assert "golden sample 00.jpg" in refused(str(bundle.path), "--port", "0")


def test_a_taken_port(bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(str(bundle.path), "--port", str(port))
        error = refused(str(bundle.path), "--port", "0", "--grpc-port", str(port))
        assert f"cannot listen on 127.0.0.1:{port}" in error and "choose another --host or --grpc-port" in error


def test_grpc_without_its_extra(bundle):
    code = (
        "import sys; sys.modules['grpc'] = None; import refract.serve.cli.command as c; sys.exit(c.main(sys.argv[1:]))"
    )
    code, out, err = finish(start(str(bundle.path), "--port", "0", "--grpc-port", "0", code=code))
    message = "--grpc-port needs gRPC, which is not installed; run pip install 'refract[grpc]'"
    assert (code, out, err) == (2, "", f"refract serve: {message}\n")


def test_a_missing_cuda_device_is_named(bundle):
    devices = ("cuda", "all", "cpu,cuda:1", "tpu")
    code = (
        "import sys, refract.serve.cli.command\n"
        f"for device in {devices}:\n"
        "    print(refract.serve.cli.command.main([*sys.argv[1:4], '--device', device]))"
    )
    process = start(str(bundle.path), "--port", "0", code=code, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    _, out, err = finish(process)
    assert out.split() == ["2"] * len(devices)
    for device, missing in zip(devices, ("cuda:0", "all", "cuda:1", "tpu"), strict=True):
        assert f"--device {device}: device {missing!r} is not available; available: cpu" in err


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


def test_a_signal_during_start_up_exits():
    """The model registry accepts the connection and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as registry:
        registry.settimeout(60)
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{registry.getsockname()[1]}"}
        process = start("models:/shapes@champion", "--port", "0", env=environment)
        with registry.accept()[0] as connection:
            process.terminate()
            assert process.wait(30) == 0
            connection.settimeout(20)
            while connection.recv(65_536):
                pass
            assert finish(process) == (0, "", ""), "and the process that connected has ended, too"


@pytest.mark.parametrize(
    "place", ["refract.serve.cli.command._bundle", "refract.serve.runtime.engine.Engine.self_test"]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_start_up_is_not_lost_in_code_that_catches_everything(bundle, number, place: str):
    """An exception in a library's callback from C would be lost; the second place is uvicorn's start."""
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
    """Return the bit mask of the signals for which the process has handlers."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(mask, 16)


def test_a_signal_at_any_moment_of_a_first_start_exits(bundle, tmp_path):
    """The moments of a new process fall into imports, the others into a conversion, an export, or the timing of backends."""

    def ended(kind: str, seconds: float) -> tuple[int, str, float]:
        environment = {**os.environ, "HOME": str(tmp_path / f"{kind} {seconds}")}
        starting = start_cold if kind == "new" else partial(start, backend="auto")
        process = starting(str(bundle.path), "--port", "0", env=environment)
        while not caught(process.pid) >> (signal.SIGTERM - 1) & 1:  # until then Python itself starts
            time.sleep(0.01)
        time.sleep(seconds)
        process.terminate()
        began = time.monotonic()
        code, out, _ = finish(process)
        return code, out, time.monotonic() - began

    moments = {"new": (0.0, 1.0, 2.5), "warm": (0.2, 1.0, 2.0, 4.0)}
    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(ended, kind, seconds) for kind in moments for seconds in moments[kind]]
        for code, out, took in [each.result() for each in pending]:
            assert code == 0 and took < 10
            assert out == "" or out.startswith("Refract serves shapes ")


def test_nothing_is_unpickled(bundle, make_image):
    """An audit hook exits the process when a pickle loads a class; the test first checks that the hook works."""
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
