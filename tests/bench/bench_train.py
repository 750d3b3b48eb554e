"""Speed and memory of the two training loops beside TRL: python tests/bench/bench_train.py

Same model, same rows (planner prompts of 400-700 tokens, plans of 60-150, which begin differently),
float32 weights and AdamW state, bf16 computation, --batch rows or pairs per optimizer step. Each
run is a process of its own and runs alternate. Ours have gradient checkpointing, as in `make all`;
TRL runs without, with each of --micros as its micro-batch in rows (DPO: pairs), and compiled with
the faster of these; its fastest run counts, for memory too. For SFT it also runs with packing.
TRL's reference log-probabilities are computed before training, as ours are. A rate is the median
over all steps but the first of each run; memory is the peak of the process (CPU) or of the
allocator (GPU).

On a GPU the models are random ones of Llama's 1B and 3B shapes, with larger batches, and our SFT's
model FLOP utilisation is printed: 6 FLOPs a token and parameter of the layers, 6 a target token and
parameter of the output layer, and the attention's. What gradient checkpointing computes again does
not count.
"""

import argparse
import importlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from targets import Target, print_targets  # noqa: E402

import common  # noqa: E402

GOALS = {
    "dpo_pairs_per_s": {"at_least": 1.6},
    "dpo_memory": {"at_most": 0.7},
    "sft_rows_per_s_padded": {"at_least": 1.3},
    "sft_rows_per_s_packed": {"at_least": 1.0},
    "sft_memory": {"at_most": 0.8},
}
GPU_GOALS = {
    "dpo_pairs_per_s": {"at_least": 1.5},
    "dpo_memory": {"at_most": 0.7},
    "sft_mfu": {"at_least": 0.45},
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s


def make_rows(tokenizer, count: int) -> list[dict]:
    """Pairs in the planner's format, made of words of the repository's own prompts."""
    words = " ".join(p.read_text() for p in sorted((ROOT / "data").glob("*/*.txt"))).split()
    draw = random.Random(0)

    def message(role: str, least: int, most: int) -> list[dict]:
        tokens = draw.randint(least, most)
        ids = tokenizer(" ".join(draw.choices(words, k=tokens)))["input_ids"]
        return [{"role": role, "content": tokenizer.decode(ids[:tokens])}]

    rows = []
    for _ in range(count):
        row = {
            "prompt": message("user", 400, 700),
            "chosen": message("assistant", 60, 150),
            "rejected": message("assistant", 60, 150),
        }
        rows.append(row)
    return rows


def peak_gb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run_ours(a, folder: Path) -> dict:
    module = importlib.import_module("02_sft" if a.child == "sft" else "04_dpo")
    args = module.Args(
        model=a.model,
        data=str(folder / f"{a.child}.jsonl"),
        out=str(folder / "out"),
        batch_size=a.batch,
        epochs=a.steps,
        micro_tokens=a.micro_tokens,
        save_steps=0,
        precision="bf16",
        gradient_checkpointing=a.checkpointing,
    )
    module.main(args)
    load = module.load_rows if a.child == "sft" else module.load_pairs
    _, tokenizer = common.load_model(a.model)
    examples = load(args, tokenizer)
    tokens = sum(common.lengths(examples))
    log = common.read_rows(folder / "out" / "metrics.jsonl")
    return {
        "seconds": [tokens / row["tokens_per_second"] for row in log[1:]],
        "tokens": tokens,
        "flops": flops(a.model, examples),
        "memory": max(row["memory_gb"] for row in log),
    }


def flops(model: str, examples: list) -> float:
    """Of a forward and backward pass over the sequences of `examples`."""
    from transformers import AutoConfig

    m, _ = common.model_sizes(model)
    head = m.vocabulary * m.hidden
    tied = AutoConfig.from_pretrained(model).tie_word_embeddings
    in_layers = m.parameters - head * (1 if tied else 2)
    total = 0
    for example in examples:
        for ids, mask in example.sequences:
            attention = m.layers * m.hidden * len(ids) ** 2
            total += 6 * (in_layers * len(ids) + head * sum(mask) + attention)
    return total


def run_trl(a, folder: Path) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    rows = common.read_rows(folder / f"{a.child}.jsonl")
    settings = trl_settings(a, folder)
    if a.child == "sft":
        rows = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
        trainer_class = SFTTrainer
        config = SFTConfig(**settings)
    else:
        trainer_class = DPOTrainer
        config = DPOConfig(**settings, precompute_ref_log_probs=True)
    clock = trl_clock()
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(a.model),
        callbacks=[clock],
    )
    packs = len(trainer.train_dataset)
    trainer.train()
    steady = clock.seconds[1:]
    if a.packing:  # a pass over the rows is `packs` steps
        steady = [packs * statistics.mean(steady)]
    return {"seconds": steady, "memory": max(clock.memory)}


def trl_settings(a, folder: Path) -> dict:
    """What TRL's SFT and DPO have in common."""
    import torch

    settings = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": a.micro,
        "gradient_accumulation_steps": a.batch // a.micro,
        "num_train_epochs": a.steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "max_length": None,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "optim": "adamw_torch_fused",
        "torch_compile": a.compile,
    }
    if a.packing:  # one packed sequence per step, as many tokens per pass over the rows
        settings |= {
            "packing": True,
            "max_length": a.packed_tokens,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1 + a.steps // 2,
        }
    return settings


def trl_clock():
    """A callback for TRL's trainers with `seconds` and `memory` in GB, of each optimizer step."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.began = 0.0
            self.seconds = []
            self.memory = []

        def on_step_begin(self, *_, **__):
            self.began = time.time()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.time() - self.began)
            self.memory.append(peak_gb())

    return Clock()


def child(a, folder: str, *args) -> dict:
    """Run this file in a process of its own; its result."""
    result = Path(folder) / "result.json"
    command = [sys.executable, __file__, "--folder", folder, *args]
    for name in ("batch", "steps", "model", "micro_tokens", "packed_tokens"):
        command += [f"--{name}", getattr(a, name)]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, args))} failed:\n{done.stdout[-3000:]}")
    return json.loads(result.read_text())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: SmolLM2-135M, on a GPU those of --shapes")
    parser.add_argument(
        "--shapes", nargs="*", default=["1B", "3B"], help="of random models, on a GPU: 1B, 3B, 8B"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, help="default: 8, on a GPU 32")
    parser.add_argument("--steps", type=int, default=3, help="per run; the first does not count")
    parser.add_argument("--micro_tokens", type=int, help="our micro-batches (4096, GPU: 16384)")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="for our runs, as in `make all`",
    )
    parser.add_argument("--packed_tokens", type=int, default=2048, help="TRL's packed sequences")
    parser.add_argument("--micros", type=int, nargs="+", help="TRL's micro-batches (1 2, GPU: 2 8)")
    parser.add_argument("--only", default="", help="run only what begins with this, e.g. ours")
    parser.add_argument("--child", choices=["sft", "dpo"], help=argparse.SUPPRESS)
    for name in ("trl", "packing", "compile"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--micro", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    if a.child:
        run_child(a)
        return

    import torch
    from conftest import save_large_model

    gpu = torch.cuda.is_available()
    a.batch = a.batch or (32 if gpu else 8)
    a.micro_tokens = a.micro_tokens or (16384 if gpu else 4096)
    a.micros = a.micros or ([2, 8] if gpu else [1, 2])
    if a.model or not gpu:
        a.model = a.model or str(ROOT / "models" / "SmolLM2-135M-Instruct")
        bench(a, GOALS)
        return
    for shape in a.shapes:
        with tempfile.TemporaryDirectory() as folder:
            a.model = save_large_model(Path(folder) / shape, shape, "cuda")
            torch.cuda.empty_cache()
            bench(a, GPU_GOALS)


def run_child(a) -> None:
    """One run in this process, in a scratch folder; writes result.json to --folder."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in Path(a.folder).glob("*.jsonl"):
            os.link(file, Path(scratch) / file.name)
        run = run_trl if a.trl else run_ours
        result = run(a, Path(scratch))
    (Path(a.folder) / "result.json").write_text(json.dumps(result))


def bench(a, goals: dict[str, dict]) -> None:
    import torch

    machine = f"{torch.get_num_threads()} CPU cores"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    runs = {name: args for name, args in all_runs(a).items() if name.startswith(a.only)}
    results: dict[str, list[dict]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        write_data(a, Path(folder))
        for n in range(a.rounds):
            for name, args in runs.items():
                if n > 0 and " micro " in name and name != best(results, name):
                    continue  # after the first round only the fastest of these runs again
                if n == 0 and name.endswith("compiled"):
                    args += ["--micro", best(results, name).split()[-1]]
                results[name].append(child(a, folder, *args))
                print(
                    f"round {n + 1}: {name}: {a.batch * rate(results, name):.3f} /s, "
                    f"{memory(results, name):.2f} GB",
                    flush=True,
                )
    if not a.only:
        report(a, goals, results, machine)


def all_runs(a) -> dict[str, list]:
    """{name of a run: its arguments}, in their order."""
    runs = {}
    for stage in ("sft", "dpo"):
        ours = ["--child", stage]
        if not a.checkpointing:
            ours.append("--no-checkpointing")
        runs[f"ours {stage}"] = ours
        if stage == "sft":
            runs["trl sft packed"] = ["--child", "sft", "--trl", "--packing"]
        for micro in a.micros:
            runs[f"trl {stage} micro {micro}"] = ["--child", stage, "--trl", "--micro", micro]
        runs[f"trl {stage} micro compiled"] = ["--child", stage, "--trl", "--compile"]
    return runs


def write_data(a, folder: Path) -> None:
    """Write one batch: sft.jsonl and dpo.jsonl."""
    from transformers import AutoTokenizer

    pairs = make_rows(AutoTokenizer.from_pretrained(a.model), a.batch)
    rows = [{"messages": pair["prompt"] + pair["chosen"]} for pair in pairs]
    common.write_rows(folder / "sft.jsonl", rows)
    common.write_rows(folder / "dpo.jsonl", pairs)


def rate(results, name: str) -> float:
    """Optimizer steps per second."""
    seconds = []
    for result in results[name]:
        seconds += result["seconds"]
    return 1 / statistics.median(seconds)


def memory(results, name: str) -> float:
    return statistics.median(r["memory"] for r in results[name])


def best(results, name: str) -> str:
    """The fastest of TRL's runs of the stage of `name`, without packing."""
    stage = name.split()[1]
    finished = [k for k in results if k.startswith(f"trl {stage} micro") and results[k]]
    return max(finished, key=lambda k: rate(results, k))


def report(a, goals: dict[str, dict], results, machine: str) -> None:
    print_table(a, results, machine)
    measured = ratios(results, machine)
    targets = []
    for name, limit in goals.items():
        if name in measured:
            targets.append(Target(name, measured[name], **limit))
        else:
            print(f"target {name} not measured: the peak of {machine} is not known")
    print_targets(targets)


def print_table(a, results, machine: str) -> None:
    """Rates and memory of all runs, in Markdown."""
    print(
        f"\n{machine}, {Path(a.model).name}, steps of {a.batch} rows or pairs, our micro-batches "
        f"{a.micro_tokens} tokens, gradient checkpointing {'on' if a.checkpointing else 'off'}"
        "\n\n| | rows or pairs/s | tokens/s | peak memory, GB |\n| --- | --- | --- | --- |"
    )
    for name in results:
        tokens = results[f"ours {name.split()[1]}"][0]["tokens"]
        print(
            f"| {name} | {a.batch * rate(results, name):.3f} | "
            f"{tokens * rate(results, name):,.0f} | {memory(results, name):.2f} |"
        )
    print("\ntokens/s count a pair as two sequences\n")


def ratios(results, machine: str) -> dict[str, float]:
    """{name of a goal: what was measured}: ours over the fastest of TRL's runs."""
    sft = best(results, "trl sft")
    dpo = best(results, "trl dpo")
    our_sft = rate(results, "ours sft")
    our_dpo = rate(results, "ours dpo")
    measured = {
        "dpo_pairs_per_s": our_dpo / rate(results, dpo),
        "dpo_memory": memory(results, "ours dpo") / memory(results, dpo),
        "sft_rows_per_s_padded": our_sft / rate(results, sft),
        "sft_rows_per_s_packed": our_sft / rate(results, "trl sft packed"),
        "sft_memory": memory(results, "ours sft") / memory(results, sft),
    }
    for card, peak in PEAK.items():
        if card in machine:
            measured["sft_mfu"] = results["ours sft"][0]["flops"] * our_sft / peak
    return measured


if __name__ == "__main__":
    main()
