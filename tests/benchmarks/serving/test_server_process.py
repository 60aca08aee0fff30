"""The server's process: what happens when it dies, hangs, or is stopped. Stand-ins here; vLLM in test_serving."""

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from benchmarks.harness.environment import REPO
from benchmarks.serving import server as server_module
from benchmarks.serving.server import ServerError, VllmServer

DIES = """
    print("loading"); print("the reason"); sys.exit(3)
"""
HANGS = """
    print("still loading", flush=True); time.sleep(600)
"""
SERVES = """
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, "cache", os.environ["VLLM_CPU_KVCACHE_SPACE"], "args", sys.argv[1:], flush=True)
    print("Loading weights took 1.25 seconds", flush=True)
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""
STUBBORN = "    signal.signal(signal.SIGTERM, signal.SIG_IGN)" + SERVES


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a script in the place of the `vllm` command."""

    def install(body: str) -> None:
        script = tmp_path / "vllm"
        imports = "#!/usr/bin/env python3\nimport http.server, os, signal, subprocess, sys, time\n"
        script.write_text(imports + textwrap.dedent(body))
        script.chmod(0o755)
        monkeypatch.setattr(server_module, "vllm_command", lambda: str(script))

    monkeypatch.setattr(server_module, "STOP_S", 2)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return install


def test_death_shows_the_end_of_the_log(stand_in, tmp_path: Path):
    stand_in(DIES)
    with pytest.raises(ServerError, match=r"exit code 3(.|\n)*the reason"), VllmServer(tmp_path):
        pass


def test_hanging_start_ends_in_time_and_leaves_no_process(stand_in, tmp_path: Path):
    stand_in(HANGS)
    server = VllmServer(tmp_path, timeout_s=5)
    with pytest.raises(ServerError, match=r"not healthy after(.|\n)*still loading"), server:
        pass
    assert not psutil.pid_exists(server._process.pid)


@pytest.mark.parametrize("body", [SERVES, STUBBORN], ids=["polite", "ignores-SIGTERM"])
def test_stop_ends_the_server_and_its_children(stand_in, tmp_path: Path, body: str):
    stand_in(body)
    with VllmServer(tmp_path, log_path=tmp_path / "log") as server:
        words = server.log.split()
        child = int(words[words.index("child") + 1])
        assert psutil.pid_exists(child)
        assert server.weight_load_s == 1.25
        assert server.startup_s > 0
    assert not psutil.pid_exists(child)
    assert not psutil.pid_exists(server._process.pid)
    assert server.peak_rss_bytes > 1e6


def test_killed_it_is_gone_with_its_children_and_can_be_started_again(stand_in, tmp_path: Path):
    stand_in(STUBBORN)
    server = VllmServer(tmp_path, log_path=tmp_path / "log")
    children = []
    for _ in range(2):
        with server:
            words = server.log.split()
            children.append(int(words[words.index("child") + 1]))
            assert psutil.pid_exists(children[-1])
            server.kill()
            assert not psutil.pid_exists(children[-1])
            assert not psutil.pid_exists(server._process.pid)
    assert len(set(children)) == 2


def test_no_flag_beyond_directory_and_port(stand_in, tmp_path: Path):
    stand_in(SERVES)
    with VllmServer(tmp_path, log_path=tmp_path / "log") as server:
        assert server.command[1:] == ["serve", str(tmp_path), "--port", str(server.port)]
        assert str(server.command[1:]) in server.log


def test_error_inside_the_block_stops_the_server(stand_in, tmp_path: Path):
    stand_in(SERVES)
    server = VllmServer(tmp_path)
    with pytest.raises(KeyboardInterrupt), server:
        raise KeyboardInterrupt
    assert not psutil.pid_exists(server._process.pid)


def test_sigterm_to_the_benchmark_stops_the_server(stand_in, tmp_path: Path):
    stand_in(SERVES)
    code = """
        import sys, time
        from benchmarks.serving import server
        server.vllm_command = lambda: sys.argv[1]
        with server.VllmServer(sys.argv[2]) as running:
            print(running._process.pid, flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "vllm"), str(tmp_path)]
    benchmark = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
    server_pid = int(benchmark.stdout.readline())
    benchmark.terminate()
    assert benchmark.wait(60) == 143
    assert not psutil.pid_exists(server_pid)
