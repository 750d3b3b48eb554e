"""Stage 2 (paper 3.1, equation 4): supervised fine-tuning on conversations.

    python 02_sft.py --data runs/NAME/seed_plans.jsonl --out runs/NAME/sft
    python -m data.tools.launch --num_processes 8 02_sft.py ...      # all GPUs of a machine, FSDP2

--data is JSONL with {"messages": [{"role", "content"}, ...]} on each line. The loss is on what the
assistant says. The same loop trains the meta planner on seed plans and an agent on expert
trajectories.

Writes the folder --out: the model in Hugging Face format, a model card, and metrics.jsonl with one
row per optimizer step: loss, lr, grad_norm, tokens_per_second, memory_gb and, at the end of an
epoch, eval_loss.
"""

import itertools
import time
from dataclasses import dataclass
from typing import Optional

import common
from common import Example, InputError, arg


@dataclass
class Args:
    model: str = arg("meta-llama/Llama-3.1-8B-Instruct", "base model (paper 4.1)")
    data: str = arg("runs/sciworld/seed_plans.jsonl", "training rows, JSONL with `messages`")
    out: str = arg("runs/sciworld/sft", "folder for the trained model, in Hugging Face format")
    batch_size: int = arg(32, "rows per optimizer step, over all processes (paper: 32)")
    lr: float = arg(1e-5, "peak learning rate (paper: 1e-5)")
    epochs: int = arg(3, "passes over the rows (paper: 3)")
    warmup_ratio: float = arg(0.0, "share of the steps with linear warm-up (paper: not given)")
    lr_scheduler: str = arg("cosine", "after the warm-up: cosine (paper), linear or constant")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "clip gradients to this norm, 0: no clipping")
    max_length: int = arg(4096, "rows with more tokens are skipped, and counted")
    micro_tokens: int = arg(8192, "tokens per micro-batch and process; lower it to save memory")
    precision: str = arg(
        "auto",
        "bf16: float32 weights and optimizer state, bf16 computation; fp32: all float32; auto: "
        "bf16, but fp32 on a CPU that computes it faster",
    )
    gradient_checkpointing: bool = arg(
        False, "recompute activations in the backward pass: less memory, a third slower"
    )
    compile: bool = arg(False, "torch.compile the decoder layers: slow first steps, then faster")
    lora_rank: int = arg(
        0, "train adapters of this rank, merged into the model at the end; 0: all weights (paper)"
    )
    eval_share: float = arg(0.0, "share of tasks held out for a loss per epoch (paper: none)")
    log_with: Optional[str] = arg(None, "also log to a tracker: tensorboard, wandb, trackio, ...")
    save_steps: int = arg(50, "optimizer steps between checkpoints, 0: none")
    limit: Optional[int] = arg(None, "use only the first N rows")
    seed: int = arg(0, "seed of the row order, and of new adapters (--lora_rank)")
    check: bool = arg(False, "say whether this command can run here, a line each, and stop")


def sft_loss(log_probs, target_tokens: int):
    """Equation 4: log_probs (T,) of target tokens -> scalar, the mean of -log p over all
    `target_tokens` of the whole batch, so the losses of micro-batches and processes sum to the
    batch's."""
    return -log_probs.sum() / target_tokens


def load_rows(a: Args, tokenizer, say=print) -> list[Example]:
    """The rows of --data that have at most --max_length tokens, as tokens."""
    examples = []
    too_long = 0
    reply_by_reply = 0
    rows = common.numbered_rows(a.data, ("messages",), appended=False)
    for line, row in itertools.islice(rows.items(), a.limit):
        sequences = common.tokenize_replies(row["messages"], tokenizer, f"{a.data}:{line}")
        if not any(sequences[0].mask):
            raise InputError(f"{a.data}:{line}: no assistant message, nothing to learn from")
        if max(len(sequence.ids) for sequence in sequences) > a.max_length:
            too_long += 1
            continue
        if len(sequences) > 1:
            reply_by_reply += 1
        examples.append(Example(sequences, row.get("task", line), line))
    if too_long:
        say(f"skipped {too_long} rows longer than --max_length {a.max_length}")
    if reply_by_reply:
        say(f"{reply_by_reply} rows are a sequence per reply: the template rewrites earlier turns")
    return examples


def count_targets(examples: list[Example]) -> int:
    sequences = itertools.chain(*[example.sequences for example in examples])
    return sum(common.target_count(sequence) for sequence in sequences)


def held_out_loss(run, examples: list[Example], share_prefix: bool) -> float:
    """Equation 4 on the held-out rows; every process computes its share."""
    import torch

    target_tokens = count_targets(examples)
    total = torch.zeros((), device=run.accelerator.device)
    tokens = common.lengths(examples, share_prefix)
    for micro in common.my_micro_batches(tokens, run.a, run.accelerator):
        rows = [examples[i] for i in micro]
        with torch.no_grad():
            log_probs, _ = common.target_log_probs(run.model, rows, share_prefix)
        total += sft_loss(log_probs, target_tokens)
    return run.accelerator.reduce(total, "sum").item()


def main(a: Args) -> None:
    if a.check:
        common.check_training(a)
        return
    accelerator = common.make_accelerator(a)
    world = accelerator.num_processes
    rank = accelerator.process_index
    model, tokenizer = common.load_model(a.model)
    train, held_out = common.hold_out(load_rows(a, tokenizer, accelerator.print), a)
    common.check_rows(model, train + held_out, a.data)
    model, optimizer = common.prepare_model(model, accelerator, a, train + held_out)
    share_prefix = model.packing == "rows"  # compute what a row's sequences share once
    # schedule[optimizer step][micro-batch]: indices of training rows
    schedule = common.batch_schedule(common.lengths(train, share_prefix), a, world)
    run = common.Training(a, accelerator, model, optimizer, tokenizer, len(schedule))  # may resume

    bar = run.progress_bar("sft")
    for step in bar:
        began = time.time()
        lr = common.set_learning_rate(optimizer, step, len(schedule), a)

        # forward and backward, one micro-batch after the other: the gradients add up
        batch = [train[i] for i in itertools.chain(*schedule[step])]
        target_tokens = count_targets(batch)
        loss = 0.0
        for micro in schedule[step][rank::world]:
            log_probs, _ = common.target_log_probs(model, [train[i] for i in micro], share_prefix)
            micro_loss = sft_loss(log_probs, target_tokens)  # equation 4
            (micro_loss * world).backward()  # FSDP averages over processes, we need the sum
            loss += micro_loss.detach()
        loss = accelerator.reduce(loss, "sum").item()

        # update the weights
        norm = common.clip_gradients(model, a.max_grad_norm)
        run.stop_if_diverged(step + 1, loss, norm, batch)
        optimizer.step()
        optimizer.zero_grad()

        # metrics, and a checkpoint every --save_steps
        metrics = {"loss": loss, "lr": lr, "grad_norm": norm}
        metrics["tokens_per_second"] = sum(common.lengths(batch)) / (time.time() - began)
        if held_out and run.ends_epoch(step + 1):
            metrics["eval_loss"] = held_out_loss(run, held_out, share_prefix)
        bar.set_postfix_str(run.end_step(step + 1, metrics))

    run.finish("supervised fine-tuning (MPO, equation 4)")


if __name__ == "__main__":
    common.run_stage(main, Args, training=True)
