"""How fast and small the two training loops are beside TRL: python tests/bench_train.py [--rounds 3]

Same model, same rows (planner prompts of 400-700 tokens, plans of 60-150, that begin unlike; with --run a random --batch of the
seed plans and pairs of a run), float32 weights and AdamW state, bf16 computation,
batches of --batch, each run in a process of its own, runs alternate. TRL runs without gradient checkpointing, with the --micros as
micro-batches in rows (DPO: pairs), in turn, and compiled with the one that was faster; the fastest counts, for memory as well. Ours
runs with checkpointing, not compiled; for SFT's share of the matrix rate also the other way round ("speed"), and twice the steps, as
the first ones still compile.
TRL's reference log-probabilities are computed before, as ours are. A rate is the median over all steps but a run's first;
memory is the peak of the process (CPU) or of the allocator (GPU).
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SMALL = ROOT / "models" / "SmolLM2-135M-Instruct"
GOALS = {"dpo_pairs_per_s": 1.6, "dpo_memory": 0.7, "sft_rows_per_s_padded": 1.3, "sft_rows_per_s_packed": 1.0, "sft_memory": 0.8}


def make_rows(tokenizer, count: int) -> list[dict]:
    """Pairs in the planner's format, of words of the repository's own prompts."""
    words = " ".join(p.read_text() for p in sorted((ROOT / "data").glob("*/*.txt"))).split()
    draw = random.Random(0)

    def text(tokens: int) -> str:
        ids = tokenizer(" ".join(draw.choice(words) for _ in range(tokens)))["input_ids"]
        return tokenizer.decode(ids[:tokens])

    return [{"prompt": [{"role": "user", "content": text(draw.randint(400, 700))}],
             **{side: [{"role": "assistant", "content": text(draw.randint(60, 150))}] for side in ("chosen", "rejected")}}
            for _ in range(count)]


def matmul_rates() -> dict[int, float]:
    """{n: FLOP/s} of square bf16 matrices, medians. The first is the yardstick, measured in the same run."""
    import torch

    gpu, rates = torch.cuda.is_available(), {}
    for n in (8192,) if gpu else (1024, 2048):
        a, b = (torch.randn(n, n, device="cuda" if gpu else "cpu").bfloat16() for _ in range(2))
        seconds = []
        for _ in range(12):
            began = time.time()
            for _ in range(5):
                a @ b
            if gpu:
                torch.cuda.synchronize()
            seconds.append((time.time() - began) / 5)
        rates[n] = 2 * n**3 / statistics.median(seconds[2:])
    return rates


def peak_gb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run_ours(a, folder: Path) -> dict:
    import common

    module = importlib.import_module("02_sft" if a.child == "sft" else "04_dpo")
    module.main(module.Args(model=a.model, data=str(folder / f"{a.child}.jsonl"), out=str(folder / "out"), batch_size=a.batch,
                            epochs=a.steps, micro_tokens=a.micro_tokens, save_steps=0, compile=a.compile,
                            gradient_checkpointing=not a.no_checkpointing))
    log = common.read_rows(folder / "out" / "metrics.jsonl")
    tokens = sum(sum(len(ids) for ids, _ in (row if a.child == "dpo" else [row])) for row in (
        module.load_pairs if a.child == "dpo" else module.load_rows)(module.Args(data=str(folder / f"{a.child}.jsonl")),
                                                                     common.load_model(a.model)[1])[0])
    return {"seconds": [tokens / row["tokens_per_second"] for row in log[1:]], "memory": max(row["memory_gb"] for row in log),
            "tokens": tokens}


def run_trl(a, folder: Path) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    began, seconds, memory = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began.append(time.time())

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.time() - began[-1])
            memory.append(peak_gb())

    rows = [json.loads(line) for line in (folder / f"{a.child}.jsonl").open()]
    if a.child == "sft":
        rows = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
    else:
        rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows]
    settings = {"output_dir": str(folder / "trl"), "per_device_train_batch_size": a.micro,
                "gradient_accumulation_steps": a.batch // a.micro, "num_train_epochs": a.steps, "learning_rate": 1e-5,
                "lr_scheduler_type": "cosine", "max_length": None,
                "bf16": True, "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False, "report_to": "none",
                "save_strategy": "no", "logging_steps": 1, "optim": "adamw_torch_fused", "torch_compile": a.compile}
    if a.packing:  # as many tokens a step: rows of one step are packed into sequences of --packed_tokens
        settings |= {"packing": True, "max_length": a.packed_tokens, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
                     "num_train_epochs": 1 + a.steps // 2}
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    classes = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[a.child]
    if a.child == "dpo":
        settings["precompute_ref_log_probs"] = True
    trainer = classes[0](model, args=classes[1](**settings), train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
                         processing_class=AutoTokenizer.from_pretrained(a.model))
    packs = len(trainer.train_dataset) if a.packing else 1
    trainer.train()
    if a.packing:  # a pass over the rows is `packs` steps
        seconds = [packs * statistics.mean(seconds[1:])]
    return {"seconds": seconds if a.packing else seconds[1:], "memory": max(memory)}


def child(a, *args) -> dict:
    with tempfile.NamedTemporaryFile() as out:
        command = [sys.executable, __file__, "--batch", a.batch, "--steps", a.steps, "--model", a.model, "--folder", a.folder,
                   "--micro_tokens", a.micro_tokens, "--packed_tokens", a.packed_tokens, "--result", out.name, *args]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, args))} failed:\n{done.stdout[-3000:]}")
        return json.loads(Path(out.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMALL))
    parser.add_argument("--run", help="a run folder to take the rows from")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a run; the first does not count")
    parser.add_argument("--micro_tokens", type=int, default=4096, help="our micro-batches")
    parser.add_argument("--packed_tokens", type=int, default=2048, help="TRL's packed sequences")
    parser.add_argument("--micros", type=int, nargs="+", default=[1, 2], help="TRL's micro-batches")
    parser.add_argument("--speed_tokens", type=int, default=6000, help="our micro-batches without checkpointing")
    parser.add_argument("--child", choices=["sft", "dpo"], help=argparse.SUPPRESS)
    for name in ("trl", "packing", "compile", "no_checkpointing"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    for name in ("folder", "result"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--micro", type=int, default=1, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        with tempfile.TemporaryDirectory() as scratch:
            for file in Path(a.folder).glob("*.jsonl"):
                os.link(file, Path(scratch) / file.name)
            Path(a.result).write_text(json.dumps((run_trl if a.trl else run_ours)(a, Path(scratch))))
        return

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import common

    with tempfile.TemporaryDirectory() as folder:
        a.folder = folder
        if a.run:
            sft, dpo = common.read_rows(Path(a.run) / "seed_plans.jsonl"), common.read_merged(Path(a.run) / "pairs.jsonl")
            a.batch = min(a.batch, len(sft), len(dpo)) // max(a.micros) * max(a.micros)
            sft, dpo = (random.Random(0).sample(rows, a.batch) for rows in (sft, dpo))
        else:
            dpo = make_rows(AutoTokenizer.from_pretrained(a.model), a.batch)
            sft = [{"messages": r["prompt"] + r["chosen"]} for r in dpo]
        for name, rows in (("sft", sft), ("dpo", dpo)):
            (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        speed = ["--compile", "--no_checkpointing", "--micro_tokens", a.speed_tokens, "--steps", 2 * a.steps]
        kinds = {f"{side} {stage} {more}".strip(): ["--child", stage, *args] for stage in ("sft", "dpo") for side, more, args in [
            ("ours", "", []), *([("ours", "speed", speed), ("trl", "packed", ["--trl", "--packing"])] if stage == "sft" else []),
            *[("trl", f"micro {m}", ["--trl", "--micro", m]) for m in a.micros], ("trl", "micro compiled", ["--trl", "--compile"])]}
        results: dict[str, list[dict]] = {}
        rates = []
        for n in range(a.rounds):
            rates.append(matmul_rates())
            for name, args in kinds.items():
                if n and " micro " in name and name != best(results, name):
                    continue  # after the first round only the fastest of these goes on
                if name.endswith("compiled") and not n:
                    args += ["--micro", best(results, name).split()[-1]]
                results.setdefault(name, []).append(child(a, *args))
                print(f"round {n + 1}: {name}: {a.batch / statistics.median(results[name][-1]['seconds']):.3f} /s, "
                      f"{results[name][-1]['memory']:.2f} GB", flush=True)
        report(a, results, sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(a.model).parameters()),
               {n: statistics.median(r[n] for r in rates) for n in rates[0]},
               torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores")


def rate(results, name: str) -> float:
    return 1 / statistics.median(s for r in results[name] for s in r["seconds"])


def best(results, name: str) -> str:
    """The fastest of TRL's runs of the stage of `name`, without packing."""
    stage = name.split()[1]
    return max((k for k in results if k.startswith(f"trl {stage} micro")), key=lambda k: rate(results, k))


def report(a, results, parameters: int, rates: dict[int, float], machine: str) -> None:
    flops = next(iter(rates.values()))
    tokens = {stage: results[f"ours {stage}"][0]["tokens"] for stage in ("sft", "dpo")}
    memory = {name: statistics.median(r["memory"] for r in rs) for name, rs in results.items()}
    squares = ", ".join(f"{n:,} at {r / 1e12:.2f} TFLOP/s" for n, r in rates.items())
    print(f"\n{machine}, bf16 matrices of {squares}; {parameters / 1e6:.0f} M parameters, steps of {a.batch} rows or pairs"
          "\n\n| | rows or pairs/s | tokens/s | GFLOP/s | share of the matrix rate | peak memory, GB |\n"
          "| --- | --- | --- | --- | --- | --- |")
    used = {}
    for name in results:
        per_second = rate(results, name) * tokens[name.split()[1]]
        used[name] = 6 * parameters * per_second
        print(f"| {name} | {a.batch * rate(results, name):.3f} | {per_second:,.0f} | {used[name] / 1e9:,.0f} | {used[name] / flops:.0%} | "
              f"{memory[name]:.2f} |")
    print("\ntokens/s count a pair as two sequences; GFLOP/s are 6 operations per parameter and token\n")
    sft, dpo = best(results, "trl sft"), best(results, "trl dpo")
    measured = {"dpo_pairs_per_s": rate(results, "ours dpo") / rate(results, dpo), "dpo_memory": memory["ours dpo"] / memory[dpo],
                "sft_rows_per_s_padded": rate(results, "ours sft") / rate(results, sft),
                "sft_rows_per_s_packed": rate(results, "ours sft") / rate(results, "trl sft packed"),
                "sft_memory": memory["ours sft"] / memory[sft],
                "sft_matrix_rate": max(used["ours sft"], used["ours sft speed"]) / flops}
    for name, value in measured.items():
        goal = GOALS.get(name, 0.4 if "CPU" not in machine else 0.5)
        ok = value <= goal if "memory" in name else value >= goal
        print(f"target {name} measured {value:.2f} goal {goal} {'ok' if ok else 'short'}")


if __name__ == "__main__":
    main()
