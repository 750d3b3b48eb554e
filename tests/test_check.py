"""`make check`: one line for each thing that would stop a run, before it costs anything."""

import importlib
import json
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import CORRIDOR, ROOT, script_env, stage

import common
from common import InputError

check = importlib.import_module("data.tools.check")


def run_check(commands: str, **env) -> subprocess.CompletedProcess:
    # transformers' server is imported faster than vLLM
    return subprocess.run(
        [sys.executable, "data/check.py"],
        input=commands,
        cwd=ROOT,
        text=True,
        env=script_env(MPO_SERVER="transformers", **env),
        capture_output=True,
        timeout=120,
    )


def commands(out, model, teacher="gpt-4o", env=CORRIDOR) -> str:
    """What `make -n all` prints, in short."""
    return f"""
touch something
. .venv/bin/activate && python 01_seed_plans.py --env {env} --out {out} --teacher {teacher}
. .venv/bin/activate && accelerate launch --num_processes 2 02_sft.py --model {model} \\
  --data {out}/seed_plans.jsonl --out {out}/sft
. .venv/bin/activate && python 03_sample_score.py --env {env} --out {out} \\
  --planner {out}/sft --agent {model}
. .venv/bin/activate && python 04_dpo.py --model {out}/sft --data {out}/pairs.jsonl --out {out}/mpo
. .venv/bin/activate && python 05_eval.py --env {env} --out {out} --agents {model} \\
  --plans none sft mpo
"""


def test_a_run_that_can_be_done(tmp_path, tiny_model, chat_server):
    server = chat_server(lambda messages, body: "Hello")
    done = run_check(commands(tmp_path, tiny_model), OPENAI_API_KEY="k", OPENAI_BASE_URL=server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"ok"}
    assert Counter(line[1] for line in lines) == {
        "settings": 1,
        "packages": 1,
        "environment": 1,
        "model": 2,
        "memory": 3,
        "disk": 1,
    }
    assert [r["max_tokens"] for r in server.requests] == [1]
    assert not list(tmp_path.iterdir()), "a check leaves nothing"


class GatedHub(BaseHTTPRequestHandler):
    """A hub with one model, which asks for a licence to be accepted."""

    def do_GET(self):
        files = [{"rfilename": name, "size": 9} for name in ("config.json", "model.safetensors")]
        body = json.dumps({"id": "owner/gated", "siblings": files})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_each_thing_that_is_wrong_is_one_line(tmp_path):
    hub = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    done = run_check(
        commands(tmp_path, "owner/gated"),
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path),
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
    )
    hub.shutdown()
    hub.server_close()
    wrong = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert done.returncode == 2 and done.stderr.strip().endswith("2 of 6 checks failed")
    assert len(wrong) == 2 and "Traceback" not in done.stderr
    assert "gpt-4o needs an API key: set OPENAI_API_KEY" in wrong[0]
    assert (
        "owner/gated is gated: accept its licence at https://huggingface.co/owner/gated and "
        "set HF_TOKEN" in wrong[1]
    )


@pytest.mark.parametrize(
    "status, said, advice",
    [
        (401, "no such key", "401: .*no such key.*check OPENAI_API_KEY"),
        (404, "no such model", "404: .*no such model.*does it have a model 'gpt-9'"),
    ],
)
def test_a_key_or_a_teacher_that_is_refused(status, said, advice, chat_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", chat_server(lambda *_: (status, said)).url)
    with pytest.raises(InputError, match=advice):
        check.check_api("gpt-9", None)


@pytest.mark.parametrize(
    "line, message",
    [
        ("03_sample_score.py --env nowhere", "--env nowhere.*does not exist"),
        ("03_sample_score.py --mm 3", "03_sample_score.py: unknown argument --mm"),
        ("02_sft.py --epochs three", "02_sft.py: argument --epochs: invalid int value"),
    ],
)
def test_settings(line, message):
    with pytest.raises(InputError, match=message):
        check.read_commands(f"python {line}", [])


def test_the_agents_of_a_filter_are_checked():
    c = check.read_command(
        "python ",
        "03_sample_score.py",
        f" filter --env {CORRIDOR} --agents owner/a http://gpu:8000/v1",
    )
    url = "http://gpu:8000/v1"
    assert check.models_asked(c) == [("owner/a", None), (url, url)]


def test_an_environment_that_cannot_play():
    a = stage("05_eval").Args(env=CORRIDOR, tasks=["missing.json"])
    with pytest.raises(InputError, match="missing.json"):
        check.check_environment(a, Counter())


def test_a_model_directory_without_weights(tmp_path, tiny_model):
    for file in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).write_text((common.Path(tiny_model) / file).read_text())
    with pytest.raises(InputError, match="has no model.safetensors"):
        check.check_model(str(tmp_path), {})


@pytest.fixture
def eight_billion(tmp_path, tiny_model):
    """The sizes of an 8B model, from its configuration."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        vocab_size=128256,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
    ).save_pretrained(tmp_path)
    sizes = check.estimate.model_sizes(tmp_path)
    sizes.name, sizes.download = "eight", 0
    return sizes


def training(tmp_path, processes: int, **settings):
    [c] = [
        check.read_command(
            f"launch --num_processes {processes} ",
            "02_sft.py",
            f" --out {tmp_path}/run/sft --gradient_checkpointing true",
        )
    ]
    vars(c.a).update(settings)
    c.base = "eight"
    return c


def test_memory(tmp_path, eight_billion, monkeypatch):
    assert eight_billion.parameters == 8_030_261_248
    assert eight_billion.cached == 2 * 2 * 32 * 8 * 128  # keys and values, bf16, 8 heads of 128
    c = training(tmp_path, 8)

    def on(gpus: int, gb: int, host: int = 256):
        monkeypatch.setattr(check, "memory", lambda: ([(gb * 10**9,) * 2] * gpus, host * 10**9))

    on(8, 80)
    assert "on each of 8 GPUs" in check.check_training(c, eight_billion)
    on(8, 24)
    with pytest.raises(InputError, match=r"on each of 8 GPUs, needs about .* 24.0 GB are free"):
        check.check_training(c, eight_billion)
    on(8, 80, host=32)
    with pytest.raises(InputError, match="on the host, needs about .* 32.0 GB are free"):
        check.check_training(c, eight_billion)
    on(4, 80)
    with pytest.raises(InputError, match="8 processes for 4 GPUs: set GPUS"):
        check.check_training(c, eight_billion)
    on(0, 0, host=64)
    with pytest.raises(InputError, match="lora_rank"):
        check.check_training(c, eight_billion)
    server = SimpleNamespace(a=stage("03_sample_score").Args(max_model_len=32768))
    on(8, 40)
    assert "serving eight, on each GPU," in check.check_serving(server, eight_billion)
    on(8, 24)
    with pytest.raises(InputError, match="raise --tensor_parallel or lower --max_model_len"):
        check.check_serving(server, eight_billion)
    server.a.tensor_parallel = 3
    with pytest.raises(InputError, match="--tensor_parallel 3 does not divide 32 heads"):
        check.check_serving(server, eight_billion)


def test_disk(tmp_path, eight_billion, monkeypatch):
    """Full fine-tuning keeps one checkpoint of 12 bytes a parameter while it writes the next."""
    c, known = training(tmp_path, 8), {"eight": eight_billion}

    def on(gb):
        monkeypatch.setattr(check.shutil, "disk_usage", lambda _: SimpleNamespace(free=gb * 1e9))

    on(200)
    assert "needs about 192.7 GB of 200.0 GB" in check.check_disk([c], known, Counter())
    on(100)
    with pytest.raises(InputError, match="192.7 GB, 100.0 GB are free: free some, or move runs/"):
        check.check_disk([c], known, Counter())
    c.a.save_steps = 0
    assert "16.1 GB of 100.0 GB" in check.check_disk([c], known, Counter())
    eight_billion.download = 120e9
    with pytest.raises(InputError, match="100.0 GB are free"):
        check.check_disk([c], known, Counter())
