"""Whether a run can be done here, before it costs anything: `make check ENV=NAME`.

    make -n all ENV=NAME | python data/check.py

Reads the commands that are left to do, as `make -n` prints them. Prints a line for each check:
settings, packages, one step of the environment, every model (there or to be downloaded, with a chat
template; an API's answers), memory and disk. Exit status 2 if one fails. Sizes of models follow
from their configurations, without their weights; what they need is estimated (data/estimate.py).
"""

import argparse
import asyncio
import contextlib
import functools
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import common
from common import InputError
from data.tools import estimate


def read_command(launcher: str, script: str, rest: str) -> SimpleNamespace:
    """A stage's command: its script, number of processes and settings, an object of its Args."""
    from transformers import HfArgumentParser

    def refuse(message):
        raise InputError(f"{script}: {message}; see --help")

    module = importlib.import_module(Path(script).stem)
    words = shlex.split(rest.split("$(")[0])
    command = words.pop(0).title() if words and not words[0].startswith("-") else ""
    parser = HfArgumentParser(getattr(module, f"{command}Args"), allow_abbrev=False)
    parser.error = refuse
    a, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        refuse(f"unknown argument {unknown[0]}")
    if hasattr(a, "env"):
        common.Prompts(a.env, getattr(a, "prompts", None))
    processes = re.search(r"--num_processes[= ](\d+)", launcher)
    return SimpleNamespace(
        script=script,
        module=module,
        a=a,
        trains=hasattr(a, "save_steps"),
        processes=int(processes[1]) if processes else 1,
        machines="--num_machines" in launcher,
    )


def read_commands(text: str, commands: list) -> str:
    """Add the stages' commands in make's output to `commands`."""
    lines = dict.fromkeys(text.replace("\\\n", " ").splitlines())
    for found in filter(None, map(re.compile(r"(.*?)\b(\d\d_\w+\.py)\b(.*)").match, lines)):
        commands.append(read_command(*found.groups()))
    scripts = ", ".join(dict.fromkeys(c.script for c in commands))
    return f"of {len(commands)} commands: {scripts}" if commands else "nothing is left to do"


def models_asked(c) -> list[tuple[str, str | None]]:
    """(name, address of a running server) of each model that a command asks."""
    a = c.a
    if hasattr(a, "plans_only"):
        planners = [c.module.planner_of(a, setting) for setting in c.module.split_commas(a.plans)]
        agents = [] if a.plans_only else c.module.split_commas(a.agents)
        found = [(name, None) for name in planners + agents if name]
    elif hasattr(a, "agents"):
        found = [(name, None) for name in a.agents]
    else:
        found = [
            (getattr(a, role), getattr(a, f"{role}_url", None))
            for role in ("teacher", "planner", "agent", "judge")
            if hasattr(a, role)
        ]
    return [
        (name, name if name.startswith("http") else url) for name, url in found if name != "rules"
    ]


def uses_vllm() -> bool:
    return "vllm" in " ".join(common.server_command("model", 0, [], 1))


def check_packages() -> str:
    server = "vllm.entrypoints.openai.api_server" if uses_vllm() else "transformers.cli.serve"
    names = ["torch", "transformers", "accelerate", "openai", *["vllm"] * uses_vllm()]
    code = f"import {', '.join(names)}, {server}\n" + "".join(
        f"print('{name}', {name}.__version__)\n" for name in names
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        said = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()][-1]
        raise InputError(f"{', '.join(names)}: an import fails ({said}): run make setup")
    return ", ".join(done.stdout.splitlines()[-len(names) :])


def check_environment(a, tasks: Counter) -> str:
    """Play one step; count the tasks of each split into `tasks`."""

    async def play():
        async with common.EnvPool(a.env, 1) as pool:
            for split in (*common.environment(a.env).tests(), "train"):
                found = await common.list_tasks(pool, a.env, split, a.tasks, a.types, None)
                tasks[split] = len(found)
            async with pool.session() as env:
                await env("reset", found[0], deadline=600)
                return found[0], await env("step", "look")

    task, (observation, *_) = asyncio.run(play())
    return f"{a.env}, {tasks['train']:,} train tasks; {task} says {observation[:30]!r} ..."


def check_api(name: str, url: str | None) -> str:
    """Ask for one token."""
    if url:
        name = common.model_fingerprint("" if name == url else name, url)
    model = common.Model(name.removeprefix("api:"), url, timeout=60)
    asyncio.run(model.ask([{"role": "user", "content": "Hello"}], max_tokens=1))
    return f"{name} answers at {model.where}"


def whole(folder: Path, name: str) -> Path:
    """`folder`, a model directory. Raises `InputError` if it lacks weights."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        files = json.loads(index.read_text())["weight_map"].values()
    if absent := [f for f in sorted(files) if not (folder / f).exists()]:
        raise InputError(f"{name} has no {absent[0]}: copy or download the model again")
    return folder


def find_model(name: str) -> tuple[Path, float]:
    """(folder of a local model's small files, bytes to download). The small files of a model of the
    Hub are downloaded, which shows whether the others may be."""
    from huggingface_hub import HfApi, errors, hf_hub_download

    common.check_model(name)
    if Path(name).is_dir():
        return whole(Path(name), name), 0
    with contextlib.suppress(OSError, InputError):  # was downloaded before: needs no network
        config = Path(hf_hub_download(name, "config.json", local_files_only=True))
        return whole(config.parent, name), 0
    try:
        info = HfApi().model_info(name, files_metadata=True)
        files = {f.rfilename: f.size for f in info.siblings}
        small = re.compile(r"config\.json|tokenizer_config\.json|chat_template.*|generation.*")
        for file in {"config.json", *filter(small.fullmatch, files)}:
            folder = Path(hf_hub_download(name, file)).parent
        return folder, sum(files[f] for f in files if re.fullmatch("model[^/]*safetensors", f))
    except errors.GatedRepoError:
        said = (
            f"is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN "
            "to a token of that account"
        )
    except errors.RepositoryNotFoundError:
        said = "is not on the Hub, or private: check the name, or set HF_TOKEN"
    except Exception as e:  # the connection, the server or the token
        reason = [type(e).__name__, *str(e).strip().splitlines()][:2][-1]
        said = f"is not here and cannot be downloaded: {reason} (network, HF_ENDPOINT, HF_TOKEN?)"
    raise InputError(f"{name} {said}")


def check_model(name: str, known: dict) -> str:
    """Keep the sizes of a local model in `known`."""
    folder, download = find_model(name)
    try:
        common.check_model(str(folder))
        m = estimate.model_sizes(folder)
    except (InputError, OSError, ValueError, KeyError) as e:
        raise InputError(str(e).strip().splitlines()[0].replace(str(folder), name)) from None
    m.name, m.download, known[name] = name, download, m
    where = f"{gb(download)} to download" if download else "here"
    return f"{name}, {where}, {m.parameters / 1e9:.2f} billion parameters, has a chat template"


# ---- memory and disk -----------------------------------------------------------------------------


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def room(what: str, need: float, free: float, advice: str) -> str:
    if need > free:
        raise InputError(f"{what} needs about {gb(need)}, {gb(free)} are free: {advice}")
    return f"{what} needs about {gb(need)} of {gb(free)}"


@functools.cache
def memory() -> tuple[list[tuple[int, int]], int]:
    """([(free, all) bytes of each GPU], free bytes of the host, within its cgroup's limit)."""
    import psutil
    import torch

    limit = Path("/sys/fs/cgroup/memory.max")
    limit = limit.read_text().strip() if limit.exists() else ""
    host = psutil.virtual_memory().available
    return (
        [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())],
        min(host, int(limit)) if limit.isdigit() else host,
    )


def check_training(c, m) -> str:
    common.choose_packing(m.model)
    (gpus, host), (shared, each) = memory(), estimate.training_memory(m, c.a)
    what, less = (
        f"{c.script} of {m.name}",
        (
            "take a smaller model, lower --micro_tokens, set "
            "--gradient_checkpointing true or --lora_rank 16"
        ),
    )
    if not gpus:
        return room(what, shared + each * c.processes, host, less)
    if c.processes > len(gpus) and not c.machines:
        raise InputError(f"{what} has {c.processes} processes for {len(gpus)} GPUs: set GPUS")
    # while it is loaded: the weights as they were saved, once, and the processes' shares in float32
    room(f"{what}, on the host,", 6 * m.parameters + 1e9 * c.processes, host, "use more memory")
    return room(
        f"{what}, on each of {c.processes} GPUs,",
        shared / c.processes + each,
        min(free for free, _ in gpus),
        f"take more GPUs, {less}",
    )


def check_serving(c, m) -> str:
    (gpus, host), length = memory(), min(c.a.max_model_len, m.context)
    parallel, what = getattr(c.a, "tensor_parallel", 1), f"serving {m.name}"
    if gpus and (parallel > len(gpus) or m.heads % parallel):
        raise InputError(
            f"{what}: --tensor_parallel {parallel} does not divide {m.heads} heads "
            f"among {len(gpus)} GPUs"
        )
    if gpus:
        return room(
            f"{what}, on each GPU,",
            estimate.serving_memory(m, length, parallel),
            min(min(free, 0.9 * every) for free, every in gpus),
            "raise --tensor_parallel or lower --max_model_len",
        )
    if uses_vllm():
        room(
            f"{what} with {length} tokens of context",
            length * m.cached,
            1e9 * float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 2)),
            "set VLLM_CPU_KVCACHE_SPACE (GB) or lower --max_model_len",
        )
    return room(what, estimate.serving_memory(m, length, 0), host, "take a smaller model")


def check_disk(commands: list, known: dict, tasks: Counter) -> str:
    """Rows, models and checkpoints in the run folder, at most; downloads in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    stages, needs = [], {}
    for c in commands:
        a, m = c.a, known.get(c.base)
        if m:
            kept, meanwhile = estimate.training_disk(m.parameters, a.lora_rank * m.linear)
            before = sum(f.stat().st_size for f in Path(f"{a.out}.partial").rglob("*"))
            stages.append((kept, (meanwhile - before) * bool(a.save_steps)))
        elif tasks and hasattr(a, "env"):
            times = [getattr(a, k, 1) for k in ("m", "n", "agents", "plans", "plan_position")]
            episodes = tasks.total() * math.prod(x if isinstance(x, int) else len(x) for x in times)
            steps = common.mean(common.environment(a.env).MAX_STEPS.values())
            stages.append((episodes * estimate.episode_bytes(steps), 0.0))
    for folder, need in (
        (commands[0].a.out, estimate.most_disk(stages)),
        (HF_HUB_CACHE, sum(m.download for m in known.values())),
    ):
        folder = next(f for f in (Path(folder).absolute() / "x").parents if f.exists())
        first, more = needs.get(folder.stat().st_dev, (folder, 0))
        needs[folder.stat().st_dev] = first, more + need
    return "; ".join(
        room(
            f"the disk of {folder}",
            need,
            shutil.disk_usage(folder).free,
            "free some, or move runs/ or HF_HOME to another disk",
        )
        for folder, need in needs.values()
        if need
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    os.environ |= {
        "MPO_MAX_RETRIES": "2",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        **os.environ,
    }
    commands, known, tasks, lines = [], {}, Counter(), []

    def check(kind, do, *args):
        """Print what `do(*args)` says, once."""
        try:
            line = f"ok     {kind:12} {do(*args)}"
        except (InputError, RuntimeError, OSError) as e:
            line = f"WRONG  {kind:12} {' '.join(str(e).split())}"
        if line not in lines:
            lines.append(line)
            print(line, flush=True)

    check("settings", read_commands, sys.stdin.read(), commands)
    made = {c.a.out: c.a.model for c in commands if c.trains}

    def base(name):
        """A model that an earlier command makes is as large as the one it was made from."""
        return base(made[name]) if name in made else name

    for c in commands:
        c.base = base(c.a.model) if c.trains else None
        c.asks = [(base(name), url) for name, url in models_asked(c)]
    if commands:
        check("packages", check_packages)
    for a in {c.a.env: c.a for c in commands if hasattr(c.a, "tasks")}.values():
        check("environment", check_environment, a, tasks)
    for name, url in dict.fromkeys(
        key for c in commands for key in [(c.base, None)] * c.trains + c.asks
    ):
        local = not url and common.is_local(name)
        check("model", *(check_model, name, known) if local else (check_api, name, url))
    for c in commands:
        if c.base in known:
            check("memory", check_training, c, known[c.base])
        for m in [known[name] for name, url in c.asks if name in known and not url]:
            check("memory", check_serving, c, m)
    if commands:
        check("disk", check_disk, commands, known, tasks)
    if wrong := sum(line.startswith("WRONG") for line in lines):
        print(f"error: {wrong} of {len(lines)} checks failed", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
