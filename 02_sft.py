"""Stage 2 (paper 3.1, equation 4): supervised fine-tuning on conversations.

    python 02_sft.py --model meta-llama/Llama-3.1-8B-Instruct --data runs/sciworld/seed_plans.jsonl --out runs/sciworld/sft
    accelerate launch --num_processes 8 02_sft.py ...          # all GPUs of a machine, FSDP2

--data is JSONL with {"messages": [{"role", "content"}, ...]} on each line; the loss is on what the
assistant says. The same loop trains the meta planner on seed plans and an agent on expert trajectories.
"""

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
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm, 0: not at all")
    max_length: int = arg(4096, "longer rows are left out, and counted")
    micro_tokens: int = arg(8192, "tokens of a micro-batch on one process; lower it when memory is short")
    share_prefix: bool = arg(True, "compute what rows of a micro-batch begin with alike once; exact")
    precision: str = arg("bf16", "bf16: float32 weights and optimizer state, computed with in bf16; fp32: all float32")
    gradient_checkpointing: bool = arg(False, "compute activations again in the backward pass: less memory, a third slower")
    compile: bool = arg(False, "torch.compile the decoder layers and the output layer: faster steps after slow first ones")
    flex: bool = arg(False, "attention of a whole micro-batch in one kernel, flex attention's, on a GPU; else sequence by sequence")
    liger: bool = arg(False, "liger-kernel's norms, rotary embedding and activation, on a GPU (pip install liger-kernel)")
    lora_rank: int = arg(0, "train adapters of this rank instead of all weights (pip install peft), 0: all weights (paper)")
    lora_merge: bool = arg(True, "merge the adapters into the model at the end, as every next stage expects; else write them alone")
    eval_share: float = arg(0.0, "share of the tasks held out for a loss after each epoch, 0: none (paper)")
    log_with: Optional[str] = arg(None, "also log to a tracker of Accelerate: tensorboard, wandb, trackio, ...")
    save_steps: int = arg(50, "optimizer steps between checkpoints, 0: none")
    limit: Optional[int] = arg(None, "only the first N rows")
    seed: int = arg(0, "order of the rows")


def sft_loss(log_probs, target_tokens: int):
    """Equation 4: -log p of the targets, averaged over all `target_tokens` of the whole batch, so that
    micro-batches and processes only add up. log_probs (T,) -> scalar."""
    return -log_probs.sum() / target_tokens


def load_rows(a: Args, tokenizer, say=print) -> tuple[list[tuple], list]:
    """([(token ids, target mask)], [(task, line)]) of the rows that are not longer than --max_length."""
    rows, origins, too_long = [], [], 0
    for i, row in enumerate(common.read_rows(a.data, ("messages",))[: a.limit], 1):
        where = f"{a.data}:{i}"
        ids, targets = common.tokenize(row["messages"], tokenizer, where)
        if not any(targets):
            raise InputError(f"{where}: no assistant message, nothing to learn from")
        if len(ids) > a.max_length:
            too_long += 1
        else:
            rows.append((ids, targets))
            origins.append((row.get("task", i), i))
    if too_long:
        say(f"{too_long} rows are longer than --max_length {a.max_length} and left out")
    if not rows:
        raise InputError(f"{a.data} has no row to train on" + (f": all are longer than --max_length {a.max_length}" if too_long else ""))
    return rows, origins


def held_out_loss(wrapped, rows: list[tuple], a: Args, accelerator) -> float:
    """-log p of a target token, averaged over the rows kept for it; every process computes its share."""
    import torch

    total = torch.zeros((), device=accelerator.device)
    paths = common.trie_paths([[row] for row in rows], a.share_prefix)
    [micros] = common.plan_epoch(paths, len(rows), a.micro_tokens, accelerator.num_processes, a.seed, 0)
    with torch.no_grad():
        for micro in micros[accelerator.process_index :: accelerator.num_processes]:
            batch = common.pack([rows[i] for i in micro], accelerator.device, a.share_prefix)
            total += sft_loss(wrapped(**batch), sum(sum(targets) for _, targets in rows))
    return accelerator.reduce(total, "sum").item()


def main(a: Args) -> None:
    import torch

    accelerator = common.make_accelerator(a.precision, a.log_with, a.out)
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    model, tokenizer = common.load_model(a.model)
    every, origins = load_rows(a, tokenizer, accelerator.print)
    held = common.held_out([task for task, _ in origins], a.eval_share)
    rows, kept = ([row for row, out in zip(every, held, strict=True) if out == side] for side in (False, True))
    lines = [line for (_, line), out in zip(origins, held, strict=True) if not out]
    if not rows:
        raise InputError(f"--eval_share {a.eval_share} leaves no row to train on")

    wrapped = common.target_log_probs(common.prepare_model(model, a), flex=a.flex)
    if not wrapped.packed:
        a.share_prefix, a.micro_tokens = False, 0  # a micro-batch is one row
    paths = common.trie_paths([[row] for row in rows], a.share_prefix)
    plan = [step for epoch in range(a.epochs)
            for step in common.plan_epoch(paths, a.batch_size, a.micro_tokens, world, a.seed, epoch)]
    wrapped, optimizer = common.distribute(wrapped, accelerator, a)
    made_from = {**asdict(a), "model": common.model_id(a.model), "template": tokenizer.chat_template,
                 "rows": common.digest(common.read_rows(a.data)[: a.limit])}
    run = common.Training(a.out, accelerator, wrapped, optimizer, made_from, len(plan), a.save_steps)

    bar = tqdm(range(run.start, len(plan)), initial=run.start, total=len(plan), desc="sft", disable=not accelerator.is_main_process)
    for step in bar:
        began, lr = time.time(), common.learning_rate(step, len(plan), a.lr, a.warmup_ratio, a.lr_scheduler)
        batch = [i for micro in plan[step] for i in micro]
        target_tokens, tokens = sum(sum(rows[i][1]) for i in batch), sum(len(rows[i][0]) for i in batch)
        total = torch.zeros((), device=device)
        for micro in common.micro_batches(wrapped, plan[step][rank::world], accelerator):
            loss = sft_loss(wrapped(**common.pack([rows[i] for i in micro], device, a.share_prefix)), target_tokens)
            accelerator.backward(loss * world)  # the processes' gradients are averaged: world makes it a sum
            total += loss.detach()
        norm = common.clip_gradients(wrapped, accelerator, a.max_grad_norm)
        total = accelerator.reduce(total, "sum").item()
        run.check(step + 1, total, norm, [lines[i] for i in batch])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": total, "lr": lr, "grad_norm": norm, "tokens_per_second": tokens / (time.time() - began)}
        if kept and (step + 1) % (len(plan) // a.epochs) == 0:
            metrics["eval_loss"] = held_out_loss(wrapped, kept, a, accelerator)
        bar.set_postfix_str(run.step(step + 1, metrics))

    run.finish(a.model, tokenizer, a.lora_merge,
               f"# {a.out}\n\n{a.model} after supervised fine-tuning on {len(rows)} rows of {a.data} (MPO, equation 4).\n\n"
               f"Settings: `{json.dumps(asdict(a))}`\n\nLast step: `{json.dumps(run.log[-1] if run.log else {})}`; "
               f"all steps in metrics.jsonl and curves.png.\n")


if __name__ == "__main__":
    common.run_stage(main, Args, training=True)
