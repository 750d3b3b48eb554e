"""Serving: a local model on loopback, asked through the OpenAI protocol, and gone afterwards."""

import asyncio
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import CORRIDOR, ROOT, script_env

import common
from common import EnvPool, InputError, Prompts, RolloutConfig, rollouts, serve

# a server that is healthy after a moment and has a child of its own
FAKE = """
import http.server, subprocess, sys, time
subprocess.Popen(["sleep", "100"])
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

# a replica of four: slow to start; GPU 1 or 2 dies if DIES says so, loading or at its 20th request
REPLICA = """
import http.server, itertools, json, os, sys, time
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
dies = os.environ["DIES"]
count = itertools.count(1)
message = {"role": "assistant", "content": "Action: walk on"}
choice = {"index": 0, "finish_reason": "stop", "message": message}
completion = {"id": "0", "object": "chat.completion", "created": 0, "model": "m",
              "choices": [choice]}
print("loading on GPU", gpu, flush=True)
time.sleep(0.1 * int(gpu))
if dies == "loading" and gpu == "1":
    raise SystemExit("CUDA out of memory")
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({"data": [{"id": "tiny", "owned_by": "vllm"}]})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if next(count) == 20 and dies == "serving" and gpu == "2":
            os._exit(1)
        time.sleep(0.01)
        self.answer(completion)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def transformers_server(monkeypatch):
    for key, value in script_env(MPO_SERVER="transformers").items():
        monkeypatch.setenv(key, value)


def use(monkeypatch, code: str) -> list:
    """Let `serve` start this Python code instead of a server; the list of what it starts."""
    servers = []
    original = common._start_server

    def command(model, port, *_):
        return [sys.executable, "-c", code, str(port)]

    def start(*args):
        servers.append(original(*args))
        return servers[-1]

    monkeypatch.setattr(common, "server_command", command)
    monkeypatch.setattr(common, "_start_server", start)
    return servers


def popen_instead(monkeypatch, seen) -> None:
    """Let `serve` start a process that waits for its end instead of a server; `seen(command, env)`
    is called with what would have been started."""
    original = subprocess.Popen

    def popen(command, env, **options):
        seen(command, env)
        waiting = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        return original(waiting, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)


def start_fails(says: str, *args, **options) -> None:
    """`serve(*args, **options)` must raise an `InputError` that says this."""
    with pytest.raises(InputError, match=says), serve(*args, **options):
        raise AssertionError("it serves")


def group(pgid: int) -> list:
    """The processes of a process group that are alive."""
    found = []
    for p in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(p.pid) == pgid and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
    return found


def wait_until_gone(pgid: int, seconds: float = 2) -> None:
    """A process that was killed is seen for a moment longer."""
    end = time.time() + seconds
    while group(pgid):
        assert time.time() < end, f"still alive: {group(pgid)}"
        time.sleep(0.1)


def test_servers_end_with_the_block(tiny_model, tmp_path, monkeypatch):
    """Also on Ctrl-C, with their children."""
    servers = use(monkeypatch, FAKE)
    with pytest.raises(KeyboardInterrupt), serve(tiny_model, tmp_path / "logs") as url:
        assert url.startswith("http://127.0.0.1:")
        assert url.endswith("/v1")
        assert len(group(servers[0].process.pid)) == 4, "supervisor, guard, server, its child"
        raise KeyboardInterrupt
    wait_until_gone(servers[0].process.pid)


def test_a_server_that_is_never_healthy(tiny_model, tmp_path, monkeypatch):
    servers = use(monkeypatch, "import time; time.sleep(100)")
    start_fails(
        r"not healthy after 1 s; the end of .*server-tiny-\d+", tiny_model, tmp_path, wait=1.0
    )
    wait_until_gone(servers[0].process.pid)


def test_a_server_that_ends_early_shows_its_log(tiny_model, tmp_path, monkeypatch):
    use(monkeypatch, "print('line', 1); print('out of memory'); raise SystemExit(3)")
    start_fails(r"(?s)ended; the end of .*\.log:\nline 1\nout of memory", tiny_model, tmp_path)


# what vLLM printed at these failures (0.6 to 0.32), cut to what matters
KV_CACHE = """\
(APIServer pid=9) INFO 11-29 08:00:00 [utils.py:9] non-default args: {'max_model_len': 32768}
(EngineCore pid=10) WARNING 11-29 08:00:01 [vllm.py:9] Error: no cutlass, ImportError: not found
(EngineCore pid=10) ERROR 11-29 08:00:09 [core.py:1344] EngineCore failed to start.
(EngineCore pid=10) ERROR 11-29 08:00:09 [core.py:1344] Traceback (most recent call last):
(EngineCore pid=10) ERROR 11-29 08:00:09 [core.py:1344]   File "/x/core.py", line 9, in run
(EngineCore pid=10) ERROR 11-29 08:00:09 [core.py:1344]     raise ValueError("... is larger than \
the available KV cache memory"
(EngineCore pid=10) ERROR 11-29 08:00:09 [core.py:1344] ValueError: To serve at least one request \
with the model's max seq len (32768), (4.0 GiB KV cache is needed, which is larger than the \
available KV cache memory (1.5 GiB). Based on the available memory, the estimated maximum model \
length is 12288.
(EngineCore pid=10) Process EngineCore:
(EngineCore pid=10) Traceback (most recent call last):
(APIServer pid=9) Traceback (most recent call last):
(APIServer pid=9)   File "/x/utils.py", line 9, in wait_for_engine_startup
(APIServer pid=9) RuntimeError: Engine core initialization failed. See root cause above. Failed \
core proc(s): {'EngineCore': 1}
the server ended with exit status 1
"""
OLD_KV_CACHE = """\
ERROR 04-17 15:10:09 [engine.py:448] ValueError: The model's max seq len (8192) is larger than the \
maximum number of tokens that can be stored in KV cache (2400). Try increasing
Process SpawnProcess-1:
"""
OUT_OF_MEMORY = """\
(Worker_TP1 pid=3) \x1b[31mERROR\x1b[0m 11-29 08:00:09 [multiproc_executor.py:9] Traceback (most \
recent call last):
(Worker_TP1 pid=3) \x1b[31mERROR\x1b[0m 11-29 08:00:09 [multiproc_executor.py:9] \
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has 79.25 GiB
(EngineCore pid=2) ERROR 11-29 08:00:10 [core.py:9] Exception: WorkerProc initialization failed \
due to an exception in a background process. See stack trace for root cause.
"""
ARCHITECTURE = """\
(APIServer pid=9) Traceback (most recent call last):
(APIServer pid=9) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=9)   Value error, Model architectures ['FooForCausalLM'] are not supported for now. \
Supported architectures: dict_keys(['LlamaForCausalLM'])
(APIServer pid=9)     For further information visit https://errors.pydantic.dev/2.11/v/value_error
"""
VALIDATION = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, the moon is full [type=value_error]
    For further information visit https://errors.pydantic.dev/2.11/v/value_error
"""
POINTER = """\
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
CHAIN = """\
INFO 11-29 08:00:00 [__init__.py:9] RuntimeError: is no error in a line of information
Traceback (most recent call last):
  File "/x/a.py", line 9, in f
    raise KeyError("not this: ValueError: x")
zmq.error.ZMQError: the first reason

During handling of the above exception, another exception occurred:

RuntimeError: the second
"""


@pytest.mark.parametrize(
    "log, reason, advice",
    [
        (KV_CACHE, "ValueError: To serve at least one .* length is 12288", "lower --max_model_len"),
        (OLD_KV_CACHE, "ValueError: The model's max seq len", "VLLM_CPU_KVCACHE_SPACE"),
        (OUT_OF_MEMORY, "torch.OutOfMemoryError: CUDA out of .* 79.25 GiB", "--tensor_parallel"),
        (ARCHITECTURE, r"Value error, Model architectures \['FooForCausalLM'\]", "MPO_SERVER="),
        (VALIDATION, "1 validation error for ModelConfig Value error, the moon is full", ""),
        (CHAIN, "^zmq.error.ZMQError: the first reason$", ""),
        (POINTER, r"^RuntimeError: Engine core .* \{\}$", ""),
        (POINTER + "ValueError: the reason", "^ValueError: the reason$", ""),
        (POINTER.replace("{}", "{'EngineCore': -9}"), "Engine core", "host has too little memory"),
        ("[rank0]: ValueError: the reason", "^ValueError: the reason$", ""),
        ("ValueError: first\nOSError: [Errno 98] Address already in use", "first$", ""),
        ("ValueError: first\nthe server ended with exit status -9", "first$", ""),
        (
            "/bin/sh: 1: nvcc: not found\nValueError: Free memory on device",
            "Free mem",
            "nvidia-smi",
        ),
        ("usage: x\nvllm: error: unrecognized arguments: --block", "unrecognized", ""),
        ("usage: x\nvllm serve: error: argument --port: invalid int", "--port: invalid", ""),
        ("loading\nthe server ended with exit status 1\n", "", ""),
        ("", "", ""),
    ],
)
def test_the_reason_of_a_server_that_does_not_start(log, reason, advice):
    """The first error of its log, and what to change if that is known."""
    found, change = common.start_reason(log)
    assert bool(found) == bool(reason) and bool(change) == bool(advice)
    assert "\x1b" not in found and "\n" not in found
    assert re.search(reason, found)
    assert advice in change


@pytest.mark.parametrize(
    "log, advice",
    [
        ("ValueError: No available memory for the cache blocks. Try", "lower --max_model_len"),
        ("ValueError: Free memory on device cuda:0 (9.1/79.0 GiB)", "CUDA_VISIBLE_DEVICES"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory", "host has too little memory"),
        ("loading\nthe server ended with exit status -9", "host has too little memory"),
        ("OSError: [Errno 98] Address already in use", "another program has taken the port"),
        ("ERROR:    [Errno 98] ('127.0.0.1', 9): address already in use", "run the same command"),
        ("RuntimeError: The server socket has failed. name: EADDRINUSE", "has taken the port"),
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "set HF_TOKEN"),
        (
            "ValueError: Transformers does not recognize this architecture.",
            "a newer vLLM, or serve",
        ),
        (
            "ValueError: heads (14) must be divisible by tensor parallel size (4).",
            "another --tensor",
        ),
        ("RuntimeError: Failed to find C compiler. Please specify via CC", "install gcc"),
        ("OSError: [Errno 28] No space left on device", "/dev/shm"),
    ],
)
def test_what_to_change_for_a_server_that_does_not_start(log, advice):
    found, change = common.start_reason(log)
    assert found == log.splitlines()[-1] and advice in change


def test_a_model_whose_files_are_not_whole(tiny_model, tmp_path):
    """An architecture that only the server may know is left to the server."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "unheard-of"}')
    assert common.context_of(str(model)) == float("inf")
    (model / "config.json").write_text("{")
    start_fails("model cannot be served: .*valid JSON", str(model), tmp_path)


def test_a_local_server_asks_for_no_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert "VLLM_API_KEY" not in common._server_environment([])


def test_gpus_are_divided_among_replicas(tiny_model, tmp_path, monkeypatch):
    """Each replica has its own GPUs and address; all are started before the first is awaited, and
    after the model was downloaded, once."""
    started = []  # the GPUs of each server
    waited = []  # how many had been started, at each wait
    fetched = []  # (model, how many had been started)
    monkeypatch.setattr(common, "download", lambda name: fetched.append((name, len(started))))
    monkeypatch.setattr(common, "context_of", lambda name: 4096)
    monkeypatch.setattr(common, "visible_gpus", lambda: ["4", "5", "6", "7", "9"])
    monkeypatch.setattr(common, "_wait_healthy", lambda *_: waited.append(len(started)))
    popen_instead(monkeypatch, lambda command, env: started.append(env["CUDA_VISIBLE_DEVICES"]))
    with serve("owner/model", tmp_path, tensor_parallel=2) as url:
        assert len(set(url.split(","))) == 2
    assert fetched == [("owner/model", 0)]
    assert started == ["4,5", "6,7"]
    assert waited == [2, 2]
    says = "--tensor_parallel 6: must be between 1 and .* GPUs, 5"
    start_fails(says, tiny_model, tmp_path, tensor_parallel=6)


@pytest.mark.parametrize(
    "variable, count, names",
    [
        (None, 2, ["0", "1"]),
        ("2,5", 2, ["2", "5"]),
        ("2, 5", 2, ["2", "5"]),
        ("5", 1, ["5"]),
        ("2,5,-1,3", 2, ["2", "5"]),
        ("GPU-5c,GPU-77", 2, ["GPU-5c", "GPU-77"]),
        ("MIG-1,MIG-2", 1, ["MIG-1"]),
        ("", 0, []),
        ("NoDevFiles", 0, []),
    ],
)
def test_gpus_of_servers(monkeypatch, variable, count, names):
    """`count`: those that torch finds."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert common.visible_gpus() == names


def install_vllm(monkeypatch, package: str) -> None:
    """As if this package, with the module vllm, were installed and no other of that module."""

    def version(name):
        if name == package:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("MPO_SERVER", "vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("gpus, parallel", [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 8)])
def test_the_whole_command_on_gpus(tiny_model, tmp_path, monkeypatch, gpus, parallel):
    install_vllm(monkeypatch, "vllm")
    monkeypatch.setattr(common, "visible_gpus", lambda: [str(i) for i in range(gpus)])
    monkeypatch.setattr(common, "_wait_healthy", lambda *_: None)
    commands = []
    popen_instead(monkeypatch, lambda command, env: commands.append(command[3:]))
    with serve(tiny_model, tmp_path, tensor_parallel=parallel, max_model_len=32768) as urls:
        ports = [url.removesuffix("/v1").rsplit(":", 1)[1] for url in urls.split(",")]
    assert len(ports) == gpus // parallel
    for port, command in zip(ports, commands, strict=True):
        expected = (
            f"{sysconfig.get_path('scripts')}/vllm serve {tiny_model} "
            f"--served-model-name {tiny_model} --host 127.0.0.1 --port {port} --dtype bfloat16 "
            "--max-model-len 4096 --generation-config vllm --enable-prefix-caching "
            f"--tensor-parallel-size {parallel} --gpu-memory-utilization 0.9"
        )
        assert command == expected.split()


@pytest.mark.parametrize("fast, dtype", [(True, "bfloat16"), (False, "float32")])
def test_the_command_of_the_build_for_cpus(monkeypatch, fast, dtype):
    """Its own command `vllm` ends with an error, so its module is run. It computes in what this
    CPU computes faster."""
    install_vllm(monkeypatch, "vllm-cpu")
    monkeypatch.setattr(common, "cpu_multiplies_bf16", lambda: fast)
    command = common.server_command("m", 80, [], 32768)
    module = "vllm.entrypoints.launchers.api_server.entry"
    assert command[:5] == [sys.executable, "-m", module, "--model", "m"]
    assert "--enforce-eager" in command and command[-1] == "32768"
    assert command[command.index("--dtype") + 1] == dtype


# runs each command to where it would start a server, and prints what vLLM has read of it
READ_BY_VLLM = """
import json, runpy, sys
import vllm.platforms
if vllm.platforms.current_platform.is_unspecified():  # a build for GPUs, on a machine without
    from vllm.platforms.cpu import CpuPlatform
    vllm.platforms.current_platform = CpuPlatform()
from vllm.entrypoints.launchers.api_server import entry

async def show(args, **_):
    print("READ", json.dumps(vars(args), default=str))

entry.run_server = show
for command in json.loads(sys.argv[1]):
    if command[1] == "-m":
        sys.argv = command[2:]
        entry.main()
    else:
        sys.argv = command
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
"""


@pytest.mark.slow
@pytest.mark.promise("the flags of its servers are known to vLLM")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_knows_the_flags_of_its_servers(monkeypatch):
    """Of the version that is installed: its parser takes the commands for GPUs and for the CPU."""
    monkeypatch.setenv("MPO_SERVER", "vllm")
    commands = [common.server_command("owner/m", 8000, gpus, 16384) for gpus in ([], ["0", "1"])]
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_VLLM, json.dumps(commands)],
        cwd=ROOT,
        env=script_env(MPO_SERVER="vllm"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    read = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("READ ")]
    assert len(read) == 2
    both = {
        "model": "owner/m",
        "served_model_name": ["owner/m"],
        "host": "127.0.0.1",
        "port": 8000,
        "max_model_len": 16384,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
    }
    on_cpu = {
        "dtype": "bfloat16" if common.cpu_multiplies_bf16() else "float32",
        "enforce_eager": True,
        "block_size": 32,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 16384,
    }
    on_gpus = {"dtype": "bfloat16", "tensor_parallel_size": 2, "gpu_memory_utilization": 0.9}
    for args, expected in zip(read, (both | on_cpu, both | on_gpus), strict=True):
        assert {name: args[name] for name in expected} == expected


def test_four_replicas_of_which_one_dies(tiny_model, tmp_path, monkeypatch, capfd):
    """While loading: an error with the reason, and the others end. While serving: its episodes go
    on with the others, and all end as they would have."""
    servers = use(monkeypatch, REPLICA)
    monkeypatch.setattr(common, "visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setenv("DIES", "loading")
    says = "ended: CUDA out of memory. What to do: end other .* Its log: .*server-tiny-"
    start_fails(says, tiny_model, tmp_path)
    assert len(servers) == 4
    for server in servers:
        wait_until_gone(server.process.pid)

    monkeypatch.setenv("DIES", "serving")
    a = SimpleNamespace(out=tmp_path, tensor_parallel=1, max_model_len=4096, concurrency=64)
    jobs = []
    for i in range(8):
        jobs += [{"task": f"find-key/{i}", "plan": None, "rollout": n} for n in range(10)]
    rows = []

    async def play():
        c = RolloutConfig(Prompts(CORRIDOR), 0.0, 16, 0, 0, max_steps=6)
        async with EnvPool(CORRIDOR, 2) as pool:
            with common.open_model(tiny_model, None, a) as model:
                await rollouts(jobs, model, pool, CORRIDOR, c, 64, rows.append)
                return len(model.alive)

    assert asyncio.run(play()) == 3
    said = capfd.readouterr().err
    assert said.count("cannot be reached or does not answer: 3 other servers do its work") == 1
    assert len(rows) == len(jobs) and {r["end"] for r in rows} <= {"steps", "errors", "success"}
    alike = {(r["task"], r["end"], str(r["steps"])) for r in rows}
    assert len(alike) == 8, "the rollouts of a task, whichever servers they had, are the same"


def test_models_that_cannot_be_downloaded(tiny_model):
    common.download(tiny_model)
    assert common.context_of(tiny_model) == 4096
    with pytest.raises(InputError, match="cannot download no/such-model .*huggingface.co/no/such-"):
        common.download("no/such-model")


def test_a_killed_parent_leaves_no_server(tmp_path):
    code = f"""
import common, pathlib, time
common.server_command = lambda *_: ["sleep", "100"]
server = common._start_server("m", [], 9, pathlib.Path({str(tmp_path)!r}))
print(server.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with parent.stdout:
        server = int(parent.stdout.readline())
        end = time.time() + 10
        while len(group(server)) < 2:  # its supervisor and itself: it runs while the parent lives
            assert time.time() < end
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until_gone(server, 15)


def test_a_killed_supervisor_leaves_no_server(tmp_path, monkeypatch):
    """Nor what the server has started."""
    command = ["sh", "-c", "sleep 100 & sleep 100"]
    monkeypatch.setattr(common, "server_command", lambda *_: command)
    server = common._start_server("m", [], 9, tmp_path)
    end = time.time() + 10
    while len(group(server.process.pid)) < 5:  # itself, the shell, two sleeps, and who looks
        assert time.time() < end
        time.sleep(0.02)
    server.process.kill()
    server.process.wait()
    wait_until_gone(server.process.pid)
    server.process.stdin.close()


@pytest.mark.slow
def test_a_real_server(tiny_model, tmp_path):
    async def ask(url):
        model = common.Model(tiny_model, url)
        messages = [{"role": "user", "content": "Boil water."}]
        return await asyncio.gather(*[model.ask(messages, t, 8, seed=1) for t in (0.0, 0.0, 0.7)])

    with serve(tiny_model, tmp_path / "logs", wait=200) as url:
        port = int(url.split(":")[2].split("/")[0])
        listening = set()
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                listening.add(connection.laddr.ip)
        assert listening == {"127.0.0.1"}, "loopback only"
        replies = asyncio.run(ask(url))
    assert replies[0].text == replies[1].text
    assert replies[0].prompt_tokens > 0 and 0 < replies[0].completion_tokens <= 8
