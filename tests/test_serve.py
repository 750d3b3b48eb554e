"""Serving: a local model on loopback, asked through the OpenAI protocol, and gone afterwards."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, script_env

import common
from common import InputError


@pytest.fixture(autouse=True)
def transformers_server(monkeypatch):
    for key, value in script_env(MPO_SERVER="transformers").items():
        monkeypatch.setenv(key, value)


def group(pgid: int) -> list:
    """The processes of a process group that are alive."""
    found = []
    for p in psutil.process_iter():
        try:
            if os.getpgid(p.pid) == pgid and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def wait_until_gone(pgid: int, seconds: float) -> None:
    end = time.time() + seconds
    while group(pgid):
        assert time.time() < end, f"still there: {group(pgid)}"
        time.sleep(0.1)


def capture_servers(monkeypatch) -> list:
    """What `serve` starts."""
    servers, start = [], common._start_server

    def record(*args):
        servers.append(start(*args))
        return servers[-1]

    monkeypatch.setattr(common, "_start_server", record)
    return servers


def test_serve_answers_and_is_gone_afterwards(tiny_model, tmp_path, monkeypatch):
    servers = capture_servers(monkeypatch)

    async def ask(url):
        model = common.Model(tiny_model, url)
        messages = [{"role": "user", "content": "Boil water."}]
        return await asyncio.gather(*[model.ask(messages, t, 8, seed=1) for t in (0.0, 0.0, 0.7)])

    with common.serve(tiny_model, tmp_path / "logs", wait=200) as url:
        replies = asyncio.run(ask(url))
        pgid = servers[0].process.pid
        assert group(pgid) and url.startswith("http://127.0.0.1:")
        listening = {c.laddr.ip for p in group(pgid) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}, "loopback only"
    assert not group(pgid) and servers[0].watchdog.poll() is not None
    assert replies[0].text == replies[1].text and all(isinstance(r.text, str) for r in replies)
    assert replies[0].prompt_tokens > 0 and 0 < replies[0].completion_tokens <= 8


def test_server_ends_on_an_error(tiny_model, tmp_path, monkeypatch):
    servers = capture_servers(monkeypatch)
    monkeypatch.setattr(common, "_wait_healthy", lambda server, wait: None)
    with pytest.raises(KeyboardInterrupt):
        with common.serve(tiny_model, tmp_path / "logs"):
            assert group(servers[0].process.pid)
            raise KeyboardInterrupt
    assert not group(servers[0].process.pid)


def test_server_that_is_never_healthy(tiny_model, tmp_path, monkeypatch):
    servers = capture_servers(monkeypatch)
    with pytest.raises(InputError, match=r"not healthy after 1 s; the end of .*server-tiny-\d+\.log"):
        with common.serve(tiny_model, tmp_path / "logs", wait=1.0):
            raise AssertionError("it cannot be healthy yet")
    assert not group(servers[0].process.pid)


def test_server_that_ends_early_shows_its_log(tiny_model, tmp_path, monkeypatch):
    """A stand-in for the server: whatever the server is, the end of what it said is shown."""
    start = common.subprocess.Popen
    fake = [sys.executable, "-c", "print('line', 1); print('no room for the model'); raise SystemExit(3)"]
    monkeypatch.setattr(common.subprocess, "Popen", lambda command, **k: start(fake if "serve" in command else command, **k))
    with pytest.raises(InputError, match=r"(?s)ended; the end of .*\.log:\nline 1\nno room for the model"):
        with common.serve(tiny_model, tmp_path / "logs"):
            raise AssertionError("it has ended")


def test_gpus_are_shared_out(tiny_model, tmp_path, monkeypatch):
    """Every replica has its own GPUs and address; all start before the first is waited for."""
    started, healthy, popen = [], [], subprocess.Popen

    def start(command, **options):
        if "vllm.entrypoints.openai.api_server" in command:
            started.append((options["env"]["CUDA_VISIBLE_DEVICES"], command[command.index("--tensor-parallel-size") + 1]))
            command = ["sleep", "60"]
        return popen(command, **options)

    monkeypatch.delenv("MPO_SERVER", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(common.subprocess, "Popen", start)
    monkeypatch.setattr(common, "visible_gpus", lambda: ["4", "5", "6", "7", "9"])
    monkeypatch.setattr(common, "_wait_healthy", lambda server, wait: healthy.append(len(started)))
    with common.serve(tiny_model, tmp_path, tensor_parallel=2) as url:
        assert len(set(url.split(","))) == 2
    assert started == [("4,5", "2"), ("6,7", "2")] and healthy == [2, 2]
    with pytest.raises(InputError, match="--tensor_parallel 6: must be from 1 to the number of GPUs, which is 5"):
        common.serve(tiny_model, tmp_path, tensor_parallel=6).__enter__()


def test_killed_parent_leaves_no_server(tiny_model, tmp_path):
    code = ("import sys, time, common\nfrom importlib.util import find_spec\n"
            "s = common._start_server(sys.argv[1], bool(find_spec('vllm')), [], 1024, common.Path(sys.argv[2]))\n"
            "print(s.process.pid, s.watchdog.pid, flush=True)\ntime.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code, tiny_model, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        server, watchdog = map(int, parent.stdout.readline().split())
        assert group(server) and psutil.pid_exists(watchdog)
        time.sleep(1)
        assert group(server), "it goes on while the parent lives"
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    wait_until_gone(server, 10)
    wait_until_gone(watchdog, 10)
