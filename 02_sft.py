"""Stage 2 (paper 3.1, equation 4): supervised fine-tuning on conversations.

    python 02_sft.py --model meta-llama/Llama-3.1-8B-Instruct --data runs/sciworld/seed_plans.jsonl --out runs/sciworld/sft
    accelerate launch --num_processes 8 02_sft.py ...          # all GPUs of a machine, FSDP2

--data is JSONL with {"messages": [{"role", "content"}, ...]} on each line; the loss is on what the
assistant says. The same loop trains the meta planner on seed plans and an agent on expert trajectories.
"""

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Optional

from tqdm import tqdm

import common
from common import InputError, arg


@dataclass
class Args:
    model: str = arg("meta-llama/Llama-3.1-8B-Instruct", "base model (paper 4.1)")
    data: str = arg("runs/sciworld/seed_plans.jsonl", "training rows, JSONL with `messages`")
    out: str = arg("runs/sciworld/sft", "where the trained model goes, in Hugging Face format")
    batch_size: int = arg(32, "rows of an optimizer step, over all processes (paper: 32)")
    lr: float = arg(1e-5, "peak learning rate (paper: 1e-5)")
    epochs: int = arg(3, "passes over the rows (paper: 3)")
    warmup_ratio: float = arg(0.0, "share of the steps with linear warm-up, before the cosine (paper: none named)")
    lr_scheduler: str = arg("cosine", "shape of the learning rate after the warm-up: cosine (paper), linear or constant")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm")
    max_length: int = arg(4096, "longer rows are left out, and counted")
    micro_tokens: int = arg(8192, "padded tokens of a micro-batch on one process; lower it when memory is short")
    gradient_checkpointing: bool = arg(False, "compute activations again in the backward pass: less memory, a third slower")
    save_steps: int = arg(50, "optimizer steps between checkpoints, 0: none")
    limit: Optional[int] = arg(None, "only the first N rows")
    seed: int = arg(0, "order of the rows")


def sft_loss(log_probs, target_tokens: int):
    """Equation 4: -log p of the targets, averaged over all `target_tokens` of the whole batch, so that
    micro-batches and processes only add up. log_probs (T,) -> scalar."""
    return -log_probs.sum() / target_tokens


def load_rows(a: Args, tokenizer) -> list[tuple[list[int], list[bool]]]:
    rows, too_long = [], 0
    for i, row in enumerate(common.read_rows(a.data, ("messages",))[: a.limit], 1):
        where = f"{a.data}:{i}"
        ids, targets = common.tokenize(row["messages"], tokenizer, where)
        if not any(targets):
            raise InputError(f"{where}: no assistant message, nothing to learn from")
        if len(ids) > a.max_length:
            too_long += 1
        else:
            rows.append((ids, targets))
    if too_long:
        print(f"{too_long} rows are longer than --max_length {a.max_length} and left out")
    if not rows:
        raise InputError(f"{a.data} has no row to train on" + (f": all are longer than --max_length {a.max_length}" if too_long else ""))
    return rows


def main(a: Args) -> None:
    import torch

    model, tokenizer = common.load_model(a.model)
    dtype = common.saved_dtype(a.model)
    rows = load_rows(a, tokenizer)
    accelerator = common.make_accelerator(model, a.gradient_checkpointing)
    world, rank = accelerator.num_processes, accelerator.process_index

    plan = [step for epoch in range(a.epochs)
            for step in common.plan_epoch([len(ids) for ids, _ in rows], a.batch_size, a.micro_tokens, world, a.seed, epoch)]
    wrapped = common.target_log_probs(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)
    wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
    made_from = {**asdict(a), "out": "", "model": common.model_id(a.model), "rows": common.digest(rows)}
    run = common.Training(a.out, accelerator, made_from, len(plan), a.save_steps)

    bar = tqdm(range(run.start, len(plan)), initial=run.start, total=len(plan), desc="sft", disable=not accelerator.is_main_process)
    for step in bar:
        began, lr = time.time(), common.learning_rate(step, len(plan), a.lr, a.warmup_ratio, a.lr_scheduler)
        batch = [i for micro in plan[step] for i in micro]
        target_tokens, tokens = sum(sum(rows[i][1]) for i in batch), sum(len(rows[i][0]) for i in batch)
        total, mine = torch.zeros((), device=accelerator.device), plan[step][rank::world]
        for k, micro in enumerate(mine):
            last = k + 1 == len(mine)
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                loss = sft_loss(wrapped(*common.pad([rows[i] for i in micro], accelerator.device)), target_tokens)
                accelerator.backward(loss * world)  # the processes' gradients are averaged: world makes it a sum
                total += loss.detach()
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), a.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": accelerator.reduce(total, "sum").item(), "lr": lr, "grad_norm": float(norm),
                   "tokens_per_second": tokens / (time.time() - began)}
        run.step(step + 1, metrics)
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}, lr {lr:.1e}, {metrics['tokens_per_second']:.0f} tok/s")

    run.finish(wrapped, model, tokenizer, dtype,
               f"# {a.out}\n\n{a.model} after supervised fine-tuning on {len(rows)} rows of {a.data} "
               f"(MPO, equation 4).\n\nSettings: `{json.dumps(asdict(a))}`\n\n"
               f"Last loss: {run.log[-1]['loss'] if run.log else 'none'}; all steps in metrics.jsonl.\n")


if __name__ == "__main__":
    common.run_stage(main, Args)
