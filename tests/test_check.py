"""`--check true` and `make check`: one line for each thing that would stop a run."""

import json
import re
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CORRIDOR, run_make, stage

import common
from common import InputError

ev = stage("05_eval")
score = stage("03_sample_score")
seed = stage("01_seed_plans")
sft = stage("02_sft")
dpo = stage("04_dpo")


def make_check(out, model, *settings, **env):
    """`make check` of a run in the corridor, with two processes that train."""
    settings = [f"ENV={CORRIDOR}", f"R={out}", f"PLANNER={model}", f"AGENT={model}", *settings]
    # transformers' server is imported faster than vLLM
    env = {"MPO_SERVER": "transformers", **env}
    return run_make("check", "PROCESSES=2", *settings, timeout=300, **env)


@pytest.mark.slow
def test_a_run_that_can_be_done(tmp_path, tiny_model, chat_server):
    server = chat_server(lambda messages, body: "Hello")
    done = make_check(tmp_path, tiny_model, OPENAI_API_KEY="k", OPENAI_BASE_URL=server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"ok"}
    about = Counter(line[1] for line in lines)
    assert about.pop("data") == 2, "seed plans and pairs are still to be made"
    assert about == {
        "settings": 1,
        "packages": 1,
        "GPUs": 1,
        "environment": 1,
        "model": 2,
        "memory": 2,
        "disk": 1,
        "tests": 1,
    }
    assert "make test-gpu" in done.stdout and "sft_equals_float64" in done.stdout
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


@pytest.mark.slow
def test_each_thing_that_is_wrong_is_one_line(tmp_path):
    """Also a typing error in the settings of a later stage, before stage 3 has cost anything."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    done = make_check(
        tmp_path / "run",
        "owner/gated",
        "DPO_ARGS=--betta 0.1",
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path),
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
    )
    hub.shutdown()
    hub.server_close()
    wrong = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"error: 3 of \d+ checks failed", done.stderr)
    assert len(wrong) == 3
    assert "gpt-4o needs an API key: set OPENAI_API_KEY" in wrong[0]
    assert (
        "owner/gated is gated: accept its licence at https://huggingface.co/owner/gated and "
        "set HF_TOKEN" in wrong[1]
    )
    assert wrong[2].startswith("WRONG  settings     04_dpo.py: unknown argument --betta")


@pytest.fixture
def no_packages(monkeypatch):
    """The packages are not imported, which takes long; there is no key."""
    monkeypatch.setattr(common, "check_packages", lambda: "not imported")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    "main, args_class, command, status, says",
    [
        (seed.main, seed.Args, "--env nowhere", 2, "error: --env nowhere.*does not exist"),
        (sft.main, sft.Args, "--epochs three", 2, "argument --epochs: invalid int value"),
        (score.main, score.Args, "--mm 3", 2, "unknown argument --mm"),
        (
            score.explore,
            score.ExploreArgs,
            f"--env {CORRIDOR} --agent OUT/agent",
            0,
            "ok     model        OUT/agent is still to be made",
        ),
        (dpo.main, dpo.Args, "--lr_scheduler steep", 2, "error: .*--lr_scheduler"),
        (
            ev.main,
            ev.Args,
            f"--env {CORRIDOR} --tasks seen=no.json --plans none --agents OUT/agent",
            2,
            "WRONG  environment  .*no.json: must be a JSON",
        ),
        (ev.judge, ev.JudgeArgs, "--judge gpt-9", 2, "WRONG  model .*gpt-9 needs an API key"),
    ],
    ids=["seed", "sft", "score", "explore", "dpo", "eval", "judge"],
)
def test_every_stage_checks_its_settings(
    main, args_class, command, status, says, tmp_path, monkeypatch, capsys, no_packages
):
    words = f"stage {command} --out OUT/run --check true".replace("OUT", str(tmp_path)).split()
    monkeypatch.setattr("sys.argv", words)
    ended = 0
    try:
        common.run_stage(main, args_class)
    except SystemExit as end:
        ended = end.code
    said = capsys.readouterr()
    assert ended == status
    assert re.search(says.replace("OUT", str(tmp_path)), said.out + said.err)
    assert not list(tmp_path.iterdir()), "a check leaves nothing"


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
        common.check_api("gpt-9", None)


def test_a_model_directory_without_weights(tmp_path, tiny_model):
    for file in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).write_text((Path(tiny_model) / file).read_text())
    with pytest.raises(InputError, match="has no model.safetensors"):
        common.model_sizes(str(tmp_path))


def sizes_of(folder: Path, tiny_model: str, kind: str, **config) -> common.ModelSizes:
    """The sizes of a model with this configuration, whose file has 1,000 bytes."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **config).save_pretrained(folder)
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_text((Path(tiny_model) / file).read_text())
    (folder / "model.safetensors").write_bytes(bytes(1000))
    sizes, download = common.model_sizes(str(folder))
    assert download == 0
    return sizes


@pytest.fixture
def eight_billion(tmp_path, tiny_model) -> common.ModelSizes:
    """The sizes of an 8B model, from its configuration."""
    sizes = sizes_of(
        tmp_path,
        tiny_model,
        "llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        vocab_size=128256,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
    )
    sizes.name = "eight"
    return sizes


MPT_7B = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}
BLOOM_7B1 = {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}
DBRX = {
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 4,
    "vocab_size": 100352,
    "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}
FOUR = {"num_hidden_layers": 4}
SIX = {"num_hidden_layers": 6}
OPT = {"num_hidden_layers": 2, "layerdrop": 0.9}  # which is off
MAMBA = {"num_hidden_layers": 2, "hidden_size": 64, "num_heads": 8, "head_dim": 16}


@pytest.mark.parametrize(
    "kind, config, billions, layers, heads, token, window",
    [
        # the released models; keys and values of 2 bytes
        ("gpt2", {}, 0.124, 12, 12, 12 * 4 * 768, 0),
        ("gptj", {}, 6.051, 28, 16, 28 * 4 * 4096, 0),
        ("falcon", {}, 6.922, 32, 71, 32 * 4 * 64, 0),  # one head of keys
        ("bloom", BLOOM_7B1, 7.069, 30, 32, 30 * 4 * 4096, 0),
        ("mpt", MPT_7B, 6.649, 32, 32, 32 * 4 * 4096, 0),
        # 35 layers, of which 20 have keys of their own, and 4 of these attend to all tokens
        ("gemma3n_text", {}, 6.835, 35, 8, 4 * 4 * 512, 512 * 16 * 4 * 512),
        # the first layers
        ("dbrx", DBRX, 14.269, 4, 48, 4 * 4 * 1024, 0),
        ("opt", OPT, 0.054, 2, 12, 2 * 4 * 768, 0),
        ("llama4_text", FOUR, 10.877, 4, 40, 4 * 1024, 8192 * 3 * 4 * 1024),
        # latent attention keeps 512 and 64 numbers of a token
        ("deepseek_v3", {**FOUR, "first_k_dense_replace": 1}, 36.959, 4, 128, 4 * 2 * 576, 0),
        # wrappers with a vision tower: the sixth layer attends to all tokens
        ("gemma3", {"text_config": SIX}, 1.166, 6, 8, 4 * 1024, 4096 * 5 * 4 * 1024),
        ("gemma4", {"text_config": SIX}, 1.499, 6, 8, 4 * 2048, 512 * 5 * 4 * 1024),
        # linear attention or a state space instead of keys and values
        ("qwen3_5_text", FOUR, 2.899, 4, 16, 4 * 1024, 0),
        ("mamba2", MAMBA, 0.0045, 2, 0, 0, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_of_models_of_all_kinds(
    tmp_path, tiny_model, kind, config, billions, layers, heads, token, window
):
    sizes = sizes_of(tmp_path, tiny_model, kind, **config)
    assert sizes.parameters / 1e9 == pytest.approx(billions, abs=6e-4)
    assert (sizes.layers, sizes.heads) == (layers, heads)
    assert (sizes.cache_bytes, sizes.window_bytes) == (token, window)
    assert 0 < sizes.gathered_parameters < sizes.parameters
    assert sizes.adapter_parameters and sizes.activation_bytes
    assert sizes.serving_bytes == 2 * sizes.parameters
    assert sizes.why_not_trained == ""


SMALL = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "of next year"}, "of next year"),
        ("hf_quant_config.json", "modelopt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantized_weights_are_served_and_not_trained(
    tmp_path, tiny_model, monkeypatch, settings, says
):
    """Servers compute with them in bf16, as vLLM refuses float32 for them."""
    config = dict(SMALL)
    if isinstance(settings, dict):
        config["quantization_config"] = settings
    else:
        (tmp_path / settings).write_text("{}")
    sizes = sizes_of(tmp_path, tiny_model, "llama", **config)
    assert sizes.serving_bytes == 1000, "those of the file"
    assert "serving" in common.check_serving_memory(sizes, 32768, 1)
    monkeypatch.setattr(common, "cpu_multiplies_bf16", lambda: False)
    assert common.cache_memory(sizes, 8, 0) == common.cache_memory(sizes, 8, 1), "not in float32"
    command = common.server_command(str(tmp_path), 80, [], 32768)
    assert command[command.index("--dtype") + 1] == "bfloat16"
    refused = rf"weights of {tmp_path} are quantized \({says}\).* such as the model's BF16 version"
    with pytest.raises(InputError, match=refused):
        common.check_training_memory(sizes, 1, 8192, True, 0, "auto")
    with pytest.raises(InputError, match=refused):  # before the file, which is none, is read
        common.load_model(str(tmp_path))


@pytest.mark.parametrize(
    "kind, config, token",
    [("qwen3_5_text", FOUR, 4 * 4 * 4 * 256), ("gpt2", {}, 12 * 4 * 768)],
)
def test_sizes_of_a_model_that_runs_on_a_gpu_alone(
    tmp_path, tiny_model, monkeypatch, kind, config, token
):
    """Every layer counts then, as attention to all tokens."""

    def needs_a_gpu():
        raise RuntimeError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    monkeypatch.setattr(common, "made_up_values", needs_a_gpu)
    sizes = sizes_of(tmp_path, tiny_model, kind, **config)
    assert (sizes.cache_bytes, sizes.window_bytes) == (token, 0)


def test_quantized_weights_inside_a_wrapper(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma3", text_config={"quantization_config": {"bits": 4}})
    assert "are quantized (bitsandbytes)" in common.why_not_trained(str(tmp_path), config)


def test_a_package_that_a_model_needs(tmp_path, tiny_model, monkeypatch):
    """What transformers says begins with an empty line."""
    from transformers import AutoModelForCausalLM

    def missing(*_, **__):
        raise ImportError("\nThe vision tower requires the timm library\nInstall it")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", missing)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(InputError, match="^The vision tower requires the timm library$"):
        sizes_of(tmp_path, tiny_model, "llama", **SMALL)
    with pytest.raises(InputError, match=f"cannot load {tiny_model}.*the timm library$"):
        common.load_model(tiny_model)


def test_memory(eight_billion, monkeypatch):
    assert eight_billion.parameters == 8_030_261_248
    # keys and values, bf16, 8 heads of 128
    assert eight_billion.cache_bytes == 2 * 2 * 32 * 8 * 128

    def on(gpus: int, gb: int, host: int = 256):
        memory = [(gb * 10**9,) * 2] * gpus, host * 10**9
        monkeypatch.setattr(common, "free_memory", lambda: memory)

    def train() -> str:
        return common.check_training_memory(eight_billion, 8, 8192, True, 0, "auto")

    def serve(parallel: int = 1) -> str:
        return common.check_serving_memory(eight_billion, 32768, parallel)

    on(8, 80)
    assert "on each of 8 GPUs" in train()
    on(8, 24)
    with pytest.raises(InputError, match=r"on each of 8 GPUs, needs about .* 24.0 GB are free"):
        train()
    on(8, 80, host=32)
    with pytest.raises(InputError, match="on the host, needs about .* 32.0 GB are free"):
        train()
    on(4, 80)
    with pytest.raises(InputError, match="8 processes for 4 GPUs: set GPUS"):
        train()
    on(0, 0, host=64)
    with pytest.raises(InputError, match="lora_rank"):
        train()
    on(8, 40)
    assert "serving eight, on each GPU," in serve()
    on(8, 24)
    with pytest.raises(InputError, match="raise --tensor_parallel or lower --max_model_len"):
        serve()
    with pytest.raises(InputError, match="--tensor_parallel 3 does not divide its 32 heads"):
        serve(parallel=3)


def test_memory_on_a_cpu_that_is_slower_in_bf16(eight_billion, monkeypatch):
    """It computes in float32: activations, and the weights and the cache of a server, are twice as
    large; weights, gradients and averages of a training are float32 in both cases."""
    monkeypatch.setattr(common, "free_memory", lambda: ([], 10**12))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100")
    needs = {}
    for fast in (True, False):
        monkeypatch.setattr(common, "cpu_multiplies_bf16", lambda fast=fast: fast)
        serving = common.check_serving_memory(eight_billion, 8192, 1)
        training = common.check_training_memory(eight_billion, 1, 8192, False, 0, "auto")
        sizes = [float(re.search(r"about ([\d.]+) GB", said)[1]) for said in (serving, training)]
        needs[fast] = sizes
    weights = 2 * eight_billion.parameters / 1e9
    cache = 8192 * eight_billion.cache_bytes / 1e9
    assert needs[False][0] - needs[True][0] == pytest.approx(weights + cache, abs=0.2)
    activations = 8192 * eight_billion.activation_bytes * eight_billion.layers / 1e9
    assert needs[False][1] - needs[True][1] == pytest.approx(activations, abs=0.2)


def test_disk(tmp_path, eight_billion, monkeypatch):
    """Full fine-tuning keeps one checkpoint of 12 bytes a parameter while it writes the next."""
    kept, meanwhile = common.training_disk(eight_billion.parameters)
    training = {"folder": str(tmp_path / "run" / "sft"), "kept": kept, "meanwhile": meanwhile}

    def on(gb):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=gb * 1e9))

    on(200)
    assert "needs about 192.7 GB of 200.0 GB" in common.check_disk([training])
    on(100)
    with pytest.raises(InputError, match="192.7 GB, 100.0 GB are free: free some, or move runs/"):
        common.check_disk([training])
    without = training | {"meanwhile": 0}
    assert "16.1 GB of 100.0 GB" in common.check_disk([without])
    download = {"folder": str(tmp_path), "kept": 120e9, "meanwhile": 0}
    with pytest.raises(InputError, match="100.0 GB are free"):
        common.check_disk([without, download])


def test_disk_of_a_training_stage(tmp_path, tiny_model, no_packages):
    """Without checkpoints, only the model is written."""
    needs = {}
    out = str(tmp_path / "sft")
    for save_steps in (0, 50):
        checks = common.Checks(out)
        checks.trains(sft.Args(model=tiny_model, data="x", out=out, save_steps=save_steps))
        needs[save_steps] = [row["meanwhile"] for row in checks.rows if row.get("made")]
    assert needs[0] == [0] and needs[50][0] > 0


def test_the_check_of_a_launched_stage_is_one_process(monkeypatch):
    """Under `accelerate launch`, the first process checks for all."""

    def main(a):
        raise AssertionError("it checks")

    monkeypatch.setattr("sys.argv", ["02_sft.py", "--check", "true"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    common.run_stage(main, sft.Args)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(AssertionError, match="it checks"):
        common.run_stage(main, sft.Args)


@pytest.mark.parametrize(
    "cuda, usable, says",
    [
        (None, 0, r"\.venv was set up without GPUs, and this machine has 2: delete .venv and run"),
        ("12.8", 0, "torch, with CUDA 12.8, can use 0 of 2 GPUs: update the NVIDIA driver"),
        ("12.8", 2, None),
    ],
)
def test_a_check_of_the_gpus(monkeypatch, tmp_path, cuda, usable, says):
    import torch

    fake_nvidia_smi = tmp_path / "nvidia-smi"
    fake_nvidia_smi.write_text("#!/bin/sh\necho GPU 0: A; echo GPU 1: B\n")
    fake_nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert common.check_gpus() == "none"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if says:
        with pytest.raises(InputError, match=says):
            common.check_gpus()
    else:
        assert common.check_gpus() == "2"
