"""Models, local or not: all are asked through the OpenAI chat protocol; local ones are served."""

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

from common import ContextOverflow, InputError, model_id


class Reply(NamedTuple):
    text: str
    prompt_tokens: int
    completion_tokens: int


class Model:
    """A chat model behind one or more OpenAI-compatible servers (`url`: addresses separated by
    commas; None: OpenAI or `OPENAI_BASE_URL`, with the key in `OPENAI_API_KEY`). The client retries
    429, 5xx, lost connections, timeouts and answers without a completion with growing pauses; then
    `InputError` is raised. A 429 that says how long to wait is waited for and is no try. A server
    that cannot be reached is left out from then on, as long as there are others. `concurrency`:
    requests in flight; None: 32 for an API, which has rate limits, else 64 a server and at least
    256."""

    TOO_LONG = re.compile(r"context.{0,20}length|maximum.{0,40}tokens|too (long|many tokens)", re.I)

    def __init__(
        self,
        name: str,
        url: str | None = None,
        concurrency: int | None = None,
        timeout: float = 300.0,
    ):
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        if url is None and not key:
            raise InputError(
                f"asking {name} needs an API key: set OPENAI_API_KEY (and "
                "OPENAI_BASE_URL for a server other than OpenAI's)"
            )
        self.name = name
        self.where = f"the model server {url or os.environ.get('OPENAI_BASE_URL', 'OpenAI')}"
        servers = url.split(",") if url else [None]
        self.concurrency = concurrency or (max(256, 64 * len(servers)) if url else 32)
        self.slots = asyncio.Semaphore(self.concurrency)
        self.retries = int(os.environ.get("MPO_MAX_RETRIES", 16))  # 16: pauses of 80-100 s in all
        self.deadline = 3 * timeout  # seconds for one completion with its retries
        self.clients = [
            openai.AsyncOpenAI(
                base_url=u,
                api_key=key if url is None else "none",
                max_retries=self.retries,
                timeout=openai.Timeout(timeout, connect=10.0),
                http_client=patient_client(self.concurrency),
            )
            for u in servers
        ]
        self.in_flight, self.assigned = [0] * len(self.clients), [0] * len(self.clients)
        self.alive = set(range(len(self.clients)))
        self.completion_tokens = 0  # generated so far
        self.continues = False  # messages that were started; set by `open_model`

    def _choose(self, home: dict | None) -> int:
        """The server with the fewest requests in flight, or of those the fewest conversations. A
        conversation (`home` is its memory) stays with the server that has its prefix in the cache,
        unless that one is much busier."""
        home = {} if home is None else home
        least = min(self.alive, key=lambda i: (self.in_flight[i], self.assigned[i]))
        now = home.get("server")
        if now not in self.alive or self.in_flight[now] > 2 * self.in_flight[least] + 4:
            home["server"] = least
            self.assigned[least] += 1
        return home["server"]

    async def ask(
        self,
        messages: list[dict],
        temperature: float = 0.0,
        max_tokens: int = 256,
        seed: int | None = None,
        home: dict | None = None,
        stop: list[str] | None = None,
    ) -> Reply:
        """One completion, up to a `stop` string; it continues the last message if that is the
        assistant's. Raises `ContextOverflow` if the prompt does not fit, `InputError` if the
        server refuses the key or the model, cannot be reached, or sends no completion."""
        while True:
            with contextlib.suppress(ServerLost):
                return await self._ask(messages, temperature, max_tokens, seed, home, stop)

    async def _ask(self, messages, temperature, max_tokens, seed, home, stop) -> Reply:
        import openai

        more = {"stop": stop} if stop else {}
        # the messages as they are: looking at each field of each one is half of the client's work
        body = {"messages": messages}
        if messages[-1]["role"] == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        malformed = (
            IndexError,
            TypeError,
            ValueError,
            AttributeError,
            openai.APIResponseValidationError,
        )
        async with self.slots:
            server = self._choose(home)
            self.in_flight[server] += 1
            try:
                async with asyncio.timeout(self.deadline) as limit:
                    LIMIT.set(limit)
                    for left in reversed(range(self.retries + 1)):
                        try:
                            answer = await self.clients[server].chat.completions.create(
                                model=self.name,
                                messages=[],
                                temperature=temperature,
                                max_tokens=max_tokens,
                                seed=seed,
                                extra_body=body,
                                **more,
                            )
                            text, usage = answer.choices[0].message.content or "", answer.usage
                            break
                        except malformed:  # which the client does not retry
                            if not left:
                                raise
                            await asyncio.sleep(min(8, 0.5 * 2 ** (self.retries - left)))
            except (TimeoutError, openai.OpenAIError, *malformed) as e:
                others = self.alive - {server}
                if others and isinstance(e, TimeoutError | openai.APIConnectionError):
                    if server in self.alive:
                        print(
                            f"{self.clients[server].base_url} cannot be reached or does not "
                            f"answer: {len(others)} other servers do its work",
                            file=sys.stderr,
                        )
                    self.alive = others
                    raise ServerLost from None
                status, said = getattr(e, "status_code", None), str(e)[:300]
                if status == 400 and self.TOO_LONG.search(said):
                    raise ContextOverflow(
                        f"a prompt exceeds the context of {self.where} (--max_model_len): {said}"
                    ) from None
                what = (
                    f"answers {status}: {said}"
                    if status and status >= 300
                    else "sends answers without a completion"
                    if isinstance(e, malformed)
                    else "cannot be reached or does not answer"
                )
                hint = {
                    401: "check OPENAI_API_KEY",
                    403: "check OPENAI_API_KEY",
                    400: "",
                    404: f"does it have a model {self.name!r}?",
                }.get(
                    status,
                    (
                        f"after {self.retries + 1} tries; finished rows are kept, run the same "
                        "command to resume"
                    ),
                )
                raise InputError(f"{self.where} {what}; {hint}") from None
            finally:
                self.in_flight[server] -= 1
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        self.completion_tokens += counts[1]
        return Reply(text, *counts)


class ServerLost(Exception):
    """One of several servers cannot be reached."""


LIMIT: ContextVar = ContextVar("the time limit of this task's request")


def patient_client(connections: int):
    """openai's HTTP client, which does what a 429 with `retry-after` (seconds) asks for: it waits,
    which extends the request's time limit, and sends the request again."""
    import openai

    class PatientClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request, **options):
            while True:
                response = await super().send(request, **options)
                pause = response.headers.get("retry-after", "")
                if response.status_code != 429 or not re.fullmatch(r"\d+(\.\d+)?", pause):
                    return response
                await response.aclose()
                limit = LIMIT.get()
                limit.reschedule(limit.when() + float(pause))
                await asyncio.sleep(float(pause))

    limits = type(openai.DEFAULT_CONNECTION_LIMITS)
    return PatientClient(limits=limits(max_connections=None, max_keepalive_connections=connections))


def served(url: str) -> list[dict]:
    """The models that the (first) server at `url` lists, as it describes them."""
    server = url.split(",")[0].rstrip("/")
    try:
        with urllib.request.urlopen(f"{server}/models", timeout=30) as answer:
            return [m for m in json.load(answer)["data"] if isinstance(m["id"], str)]
    except (LookupError, TypeError):
        return []  # this server does not list its models
    except (OSError, ValueError) as e:
        raise InputError(
            f"the model server {server} cannot be reached ({e}): start it, or fix the URL"
        ) from None


def identify(name: str, url: str | None = None) -> str:
    """Identifies a model in rows: `common.model_id`, or the model that the server at `url` serves
    (`name` if it has that, else its first)."""
    if not url:
        return model_id(name)
    names = [m["id"] for m in served(url)]
    return name if name in names or not names else names[0]


def name_and_url(agent: str) -> tuple[str, str | None]:
    """(name, url) of an entry of --agents: a server is asked which model it serves."""
    is_url = agent.startswith(("http://", "https://"))
    return (identify("", agent), agent) if is_url else (agent, None)


def is_local(name: str) -> bool:
    """Whether a model is a directory or a Hugging Face name `owner/model`; `api:` marks the name of
    an API's model that has a slash."""
    return Path(name).is_dir() or (os.sep in name and not name.startswith("api:"))


def check_model(name: str, url: str | None = None) -> None:
    """Raise `InputError` before any work if there is no key for an API's model, or if a local model
    directory is missing or incomplete."""
    path = Path(name)
    if url:
        return
    if not is_local(name):
        Model(name)
    elif path.is_dir():
        for file in ("config.json", "tokenizer_config.json"):
            if not (path / file).exists():
                raise InputError(f"{name} has no {file}: it must be a Hugging Face model directory")
        if not (
            list(path.glob("*chat_template*"))
            or '"chat_template"' in (path / "tokenizer_config.json").read_text()
        ):
            raise InputError(f"{name} has no chat template: use an instruction-tuned model")
    elif name.startswith((".", os.sep, "~")) or path.parts[0] in ("runs", "models"):
        raise InputError(f"model directory {name} does not exist: run the stage that makes it")


@contextlib.contextmanager
def open_model(name: str, url: str | None, a):
    """A `Model` to ask, with the settings of a stage's Args: behind `url` if given; served for the
    duration of the `with` if local; else of OpenAI or OPENAI_BASE_URL."""
    with contextlib.ExitStack() as stack:
        if url:
            name = identify(name, url)
        elif is_local(name):
            check_model(name)
            url = stack.enter_context(
                serve(name, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len)
            )
        model = Model(name.removeprefix("api:"), url, a.concurrency)
        with contextlib.suppress(InputError):  # a server that lists no models is not vLLM
            model.continues = bool(url) and any(m.get("owned_by") == "vllm" for m in served(url))
        yield model


# ---- serving local models ----------------------------------------------------------------------


@contextlib.contextmanager
def serve(
    model: str,
    log_dir="logs",
    tensor_parallel: int = 1,
    max_model_len: int = 8192,
    wait: float = 900.0,
):
    """Serve a local model on loopback, downloaded first if need be; yields the addresses, for
    `Model`. On GPUs there is one server for every `tensor_parallel` GPUs. Servers end with the
    `with`, or with this process. Raises `InputError` with the end of the log if a server ends early
    or is not healthy within `wait` seconds."""
    gpus = visible_gpus()
    if tensor_parallel < 1 or (gpus and tensor_parallel > len(gpus)):
        raise InputError(
            f"--tensor_parallel {tensor_parallel}: must be between 1 and the number "
            f"of GPUs, {len(gpus)}"
        )
    download(model)
    max_model_len, servers = min(max_model_len, context_of(model)), []
    try:
        for i in range(max(1, len(gpus) // tensor_parallel)):
            own = gpus[i * tensor_parallel : (i + 1) * tensor_parallel]
            servers.append(_start_server(model, own, max_model_len, Path(log_dir)))
        for server in servers:
            _wait_healthy(server, wait)
        yield ",".join(f"{server.url}/v1" for server in servers)
    finally:
        for server in servers:
            server.process.stdin.close()
        for server in servers:
            server.process.wait()


def download(model: str) -> None:
    """Fetch a model of the Hub before servers start, so that they neither fetch it one each nor
    time out."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if Path(model).is_dir():
        return
    try:
        snapshot_download(
            model,
            allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"],
            ignore_patterns="original/*",
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise InputError(
            f"cannot download {model} ({str(e).splitlines()[0]}): if it is gated, "
            f"accept its licence at https://huggingface.co/{model} and set HF_TOKEN"
        ) from None


def context_of(model: str) -> float:
    """The longest context of a model, tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return getattr(config, "max_position_embeddings", math.inf)


def visible_gpus() -> list[str]:
    """The GPUs' names in CUDA_VISIBLE_DEVICES."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def server_command(model: str, port: int, gpus: list[str], max_model_len: int) -> list[str]:
    """The command line of a server: vLLM, or `transformers serve` if vLLM is not installed or
    MPO_SERVER=transformers."""
    address = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    if os.environ.get("MPO_SERVER", "vllm") != "vllm" or not importlib.util.find_spec("vllm"):
        return [str(Path(sys.executable).with_name("transformers")), "serve", model, *address]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        model,
        *address,
        "--max-model-len",
        str(max_model_len),
        "--generation-config",
        "vllm",
        "--enable-prefix-caching",
    ]
    if gpus:
        return [
            *command,
            "--tensor-parallel-size",
            str(len(gpus)),
            "--gpu-memory-utilization",
            "0.9",
        ]
    # no chunked prefill: vLLM's CPU engine crashes on a seeded request whose prompt is split
    # ("CPU Generator does not use offset", 0.32.0)
    # blocks of 32 tokens, not 128: an episode's next prompt finds more of it in the cache
    return [
        *command,
        "--enforce-eager",
        "--block-size",
        "32",
        "--no-enable-chunked-prefill",
        "--max-num-batched-tokens",
        str(max(8192, max_model_len)),
    ]


# runs a server and ends its whole process group when the input closes, that is when the parent ends
SUPERVISOR = """
import os, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def end():
    sys.stdin.read()
    server.terminate()
    try:
        server.wait(10)
    finally:
        os.killpg(0, 9)
threading.Thread(target=end, daemon=True).start()
server.wait()
os.killpg(0, 9)
"""


def _start_server(model: str, gpus: list[str], max_model_len: int, log_dir: Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # vLLM keeps a core free for its engine, which would be half of a machine with two
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if os.cpu_count() < 4 else {}
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        **binding,
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
    }
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"server-{Path(model).name}-{port}.log"
    command = [sys.executable, "-c", SUPERVISOR, *server_command(model, port, gpus, max_model_len)]
    with log.open("w") as f:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=f, stderr=f, start_new_session=True
        )
    return SimpleNamespace(model=model, process=process, log=log, url=f"http://127.0.0.1:{port}")


def _wait_healthy(server, wait: float) -> None:
    start = time.time()
    with tqdm(
        desc=f"starting a server for {server.model}", bar_format="{desc}: {elapsed}", leave=False
    ) as bar:
        while True:
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            ended = server.process.poll() is not None
            if ended or time.time() - start > wait:
                tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-15:])
                what = "ended" if ended else f"was not healthy after {wait:.0f} s"
                raise InputError(
                    f"the server of {server.model} {what}; the end of {server.log}:\n{tail}"
                )
            with contextlib.suppress(RuntimeError):  # without an event loop Ctrl-C raises by itself
                if asyncio.current_task().cancelling():
                    raise KeyboardInterrupt
            time.sleep(0.3)
            bar.update()
