"""Stage 4 (paper 3.3, equation 8): DPO on contrastive plan pairs.

    python 04_dpo.py --model runs/sciworld/sft --data runs/sciworld/pairs.jsonl --out runs/sciworld/mpo
    accelerate launch --num_processes 8 04_dpo.py ...          # all GPUs of a machine, FSDP2

--data is JSONL with {"prompt": [...], "chosen": [...], "rejected": [...]}, lists of messages. The
reference model is --model itself before the first step: its log-probabilities are computed once,
stored, and no second model is held.
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
    model: str = arg("runs/sciworld/sft", "the SFT meta planner: where training starts, and the reference")
    data: str = arg("runs/sciworld/pairs.jsonl", "preference rows, JSONL with `prompt`, `chosen`, `rejected`; "
                    "or its shards (pairs.0of4.jsonl, ...)")
    out: str = arg("runs/sciworld/mpo", "where the trained model goes, in Hugging Face format")
    beta: float = arg(0.1, "beta of the DPO loss (paper: 0.1)")
    batch_size: int = arg(32, "pairs of an optimizer step, over all processes (paper: 32)")
    lr: float = arg(1e-5, "peak learning rate (paper: 1e-5)")
    epochs: int = arg(3, "passes over the pairs (paper: 3)")
    warmup_ratio: float = arg(0.03, "share of the steps with linear warm-up, before the cosine (paper: 3%)")
    lr_scheduler: str = arg("cosine", "shape of the learning rate after the warm-up: cosine (paper), linear or constant")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm")
    max_length: int = arg(4096, "pairs with a longer side are left out, and counted")
    micro_tokens: int = arg(8192, "padded tokens of a micro-batch on one process; lower it when memory is short")
    share_prefix: bool = arg(True, "run a pair as one sequence with its prompt once; exact, and off by itself for models with "
                             "sliding windows")
    gradient_checkpointing: bool = arg(False, "compute activations again in the backward pass: less memory, a third slower")
    save_steps: int = arg(50, "optimizer steps between checkpoints, 0: none")
    limit: Optional[int] = arg(None, "only the first N pairs")
    seed: int = arg(0, "order of the pairs")


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float):
    """Equation 8 (Rafailov et al. 2023, equation 7), one value a pair.

    Four tensors (P,) of summed log-probabilities, log pi(p|u) -> (losses, chosen rewards, rejected
    rewards), each (P,); a reward is beta log pi_theta(p|u) / pi_ref(p|u)."""
    import torch.nn.functional as F

    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards.detach(), rejected_rewards.detach()


def load_pairs(a: Args, tokenizer) -> list[tuple]:
    """[(chosen, rejected)], each (token ids, target mask) of prompt and reply."""
    pairs, too_long = [], 0
    for i, row in enumerate(common.read_merged(a.data, ("prompt", "chosen", "rejected"))[: a.limit], 1):
        sides = []
        for side in ("chosen", "rejected"):
            if not isinstance(row["prompt"], list) or not isinstance(row[side], list):
                raise InputError(f"{a.data}:{i}: `prompt` and `{side}` must be lists of messages")
            ids, targets = common.tokenize(row["prompt"] + row[side], tokenizer, f"{a.data}:{i}")
            if not any(targets):
                raise InputError(f"{a.data}:{i}: `{side}` has no assistant message")
            sides.append((ids, targets))
        if max(len(ids) for ids, _ in sides) > a.max_length:
            too_long += 1
        else:
            pairs.append(tuple(sides))
    if too_long:
        print(f"{too_long} pairs are longer than --max_length {a.max_length} and left out")
    if not pairs:
        raise InputError(f"{a.data} has no pair to train on")
    return pairs


def pair_log_probs(wrapped, pairs: list, share_prefix: bool, device):
    """log pi(p|u) of chosen and rejected: (P, 2), each summed over its target tokens in float32. With
    `share_prefix` a pair runs as one sequence, the prompt once (common.pad_pairs): the same numbers for
    less work, as prompts are longer than plans."""
    import torch

    if share_prefix:
        batch = common.pad_pairs(pairs, device)
        log_probs, rows, sides = wrapped(**batch), batch["targets"].nonzero()[:, 0], batch["sides"][batch["targets"]]
    else:
        ids, targets = common.pad([side for pair in pairs for side in pair], device)
        log_probs, rows = wrapped(ids, targets), targets[:, 1:].nonzero()[:, 0]
        rows, sides = rows // 2, rows % 2 + 1
    out = torch.zeros(max(1, len(pairs)), 2, dtype=log_probs.dtype, device=device)
    if not pairs:
        return out + log_probs.sum()
    for column, side in ((0, 1), (1, 2)):
        own = (sides == side) | (sides == 0)  # targets in what both sides begin with count for both
        out[:, column] = out[:, column].index_add(0, rows[own], log_probs[own])
    return out


def pair_length(pair: tuple, share_prefix: bool) -> int:
    """Tokens that a pair takes in a micro-batch."""
    (chosen, _), (rejected, _) = pair
    if share_prefix:
        return len(chosen) + len(rejected) - common.shared_prefix(*pair)
    return 2 * max(len(chosen), len(rejected))


def reference_log_probs(wrapped, pairs: list, share_prefix: bool, a: Args, accelerator):
    """(len(pairs), 2): log pi_ref of chosen and rejected, computed once before training; every process
    computes its share."""
    import torch

    out = torch.zeros(len(pairs), 2, dtype=torch.float64 if next(wrapped.parameters()).dtype == torch.float64 else torch.float32,
                      device=accelerator.device)
    [micros] = common.plan_epoch([pair_length(p, share_prefix) for p in pairs], len(pairs), a.micro_tokens,
                                 accelerator.num_processes, a.seed, 0)
    mine = micros[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad():
        for micro in tqdm(mine, desc="reference log-probabilities", disable=not accelerator.is_main_process):
            log_probs = pair_log_probs(wrapped, [pairs[i] for i in micro], share_prefix, accelerator.device)
            if micro:
                out[micro] = log_probs
    return accelerator.reduce(out, "sum")


def main(a: Args) -> None:
    import torch

    model, tokenizer = common.load_model(a.model)
    dtype = common.saved_dtype(a.model)
    pairs = load_pairs(a, tokenizer)
    accelerator = common.make_accelerator(model, a.gradient_checkpointing)
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device

    share_prefix = a.share_prefix and common.can_share_prefix(model)
    lengths = [pair_length(pair, share_prefix) for pair in pairs]
    plan = [step for epoch in range(a.epochs)
            for step in common.plan_epoch(lengths, a.batch_size, a.micro_tokens, world, a.seed, epoch)]
    wrapped = common.target_log_probs(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)
    wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
    made_from = {**asdict(a), "out": "", "model": common.model_id(a.model), "pairs": common.digest(pairs)}
    run = common.Training(a.out, accelerator, made_from, len(plan), a.save_steps)

    reference_file = run.partial / "reference.pt"
    if reference_file.exists():
        reference = torch.load(reference_file, weights_only=True).to(device)
    else:
        reference = reference_log_probs(wrapped, pairs, share_prefix, a, accelerator)
        if accelerator.is_main_process:
            torch.save(reference.cpu(), reference_file.with_suffix(".tmp"))
            reference_file.with_suffix(".tmp").replace(reference_file)

    bar = tqdm(range(run.start, len(plan)), initial=run.start, total=len(plan), desc="dpo", disable=not accelerator.is_main_process)
    for step in bar:
        began, lr = time.time(), common.learning_rate(step, len(plan), a.lr, a.warmup_ratio, a.lr_scheduler)
        count, mine = sum(len(micro) for micro in plan[step]), plan[step][rank::world]
        tokens = sum(len(ids) for micro in plan[step] for i in micro for ids, _ in pairs[i])
        sums = torch.zeros(6, device=device)  # loss, accuracy, chosen and rejected reward, chosen and rejected log-prob
        for k, micro in enumerate(mine):
            last = k + 1 == len(mine)
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                policy = pair_log_probs(wrapped, [pairs[i] for i in micro], share_prefix, device)
                if micro:
                    chosen, rejected = policy.unbind(1)
                    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *reference[micro].unbind(1), a.beta)
                    loss = losses.sum() / count
                    sums += torch.stack([v.detach().float().sum() for v in (
                        losses, chosen_rewards > rejected_rewards, chosen_rewards, rejected_rewards, chosen, rejected)])
                else:
                    loss = policy.sum() * 0
                accelerator.backward(loss * world)  # the processes' gradients are averaged: world makes it a sum
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), a.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        names = ("loss", "reward_accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
        metrics = dict(zip(names, (accelerator.reduce(sums, "sum") / count).tolist(), strict=True))
        metrics |= {"reward_margin": metrics["reward_chosen"] - metrics["reward_rejected"], "lr": lr, "grad_norm": float(norm),
                    "tokens_per_second": tokens / (time.time() - began)}
        run.step(step + 1, metrics)
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}, accuracy {metrics['reward_accuracy']:.2f}, margin "
                            f"{metrics['reward_margin']:.3f}, lr {lr:.1e}, {metrics['tokens_per_second']:.0f} tok/s")

    final = run.log[-1] if run.log else {}
    run.finish(wrapped, model, tokenizer, dtype,
               f"# {a.out}\n\n{a.model} after DPO on {len(pairs)} pairs of {a.data} (MPO, equation 8).\n\n"
               f"Settings: `{json.dumps(asdict(a))}`\n\nLast step: `{json.dumps(final)}`; all steps in metrics.jsonl.\n")


if __name__ == "__main__":
    common.run_stage(main, Args)
