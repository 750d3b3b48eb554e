"""Stage 4 (paper 3.3, equation 8): DPO on contrastive plan pairs.

    python 04_dpo.py --model runs/sciworld/sft --data runs/sciworld/pairs.jsonl --out runs/sciworld/mpo
    accelerate launch --num_processes 8 04_dpo.py ...          # all GPUs of a machine, FSDP2

--data is JSONL with {"prompt": [...], "chosen": [...], "rejected": [...]}, lists of messages. The
reference model is --model itself before the first step: its log-probabilities are computed once,
stored, and no second model is held.
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
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm, 0: not at all")
    max_length: int = arg(4096, "pairs with a longer side are left out, and counted")
    micro_tokens: int = arg(8192, "tokens of a micro-batch on one process; lower it when memory is short")
    precision: str = arg("bf16", "bf16: float32 weights and optimizer state, computed with in bf16; fp32: all float32")
    share_prefix: bool = arg(True, "compute what sequences of a micro-batch begin with alike, a pair's prompt first of all, once; "
                             "exact, and off by itself where the model does not allow it")
    gradient_checkpointing: bool = arg(False, "compute activations again in the backward pass: less memory, a third slower")
    compile: bool = arg(False, "torch.compile the decoder layers and the output layer: faster steps after slow first ones")
    flex: bool = arg(False, "attention of a whole micro-batch in one kernel, flex attention's, on a GPU; else sequence by sequence")
    liger: bool = arg(False, "liger-kernel's norms, rotary embedding and activation, on a GPU (pip install liger-kernel)")
    lora_rank: int = arg(0, "train adapters of this rank instead of all weights (pip install peft), 0: all weights (paper)")
    lora_merge: bool = arg(True, "merge the adapters into the model at the end, as every next stage expects; else write them alone")
    eval_share: float = arg(0.0, "share of the tasks held out for loss, accuracy and margin after each epoch, 0: none (paper)")
    log_with: Optional[str] = arg(None, "also log to a tracker of Accelerate: tensorboard, wandb, trackio, ...")
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


def load_pairs(a: Args, tokenizer, say=print) -> tuple[list[tuple], list]:
    """([(chosen, rejected)], [(task, line)]); each side is (token ids, target mask) of prompt and reply."""
    pairs, origins, too_long = [], [], 0
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
            origins.append((row.get("task", i), i))
    if too_long:
        say(f"{too_long} pairs are longer than --max_length {a.max_length} and left out")
    if not pairs:
        raise InputError(f"{a.data} has no pair to train on")
    return pairs, origins


def pair_log_probs(wrapped, pairs: list, share_prefix: bool, device):
    """log pi(p|u) of chosen and rejected: (P, 2), each summed over its target tokens in float32. With
    `share_prefix` a prompt is there once: the same numbers for less work, as prompts are longer than plans."""
    import torch

    sides = [side for pair in pairs for side in pair]
    # where sequences cannot be packed they run one by one: a micro-batch is one pair then, or none
    packs = [common.pack(part, device, share_prefix) for part in ([sides] if wrapped.packed else [sides[:1], sides[1:]])]
    log_probs = torch.cat([wrapped(**p) for p in packs])
    owners = torch.cat([p["owners"] + i for i, p in enumerate(packs)])
    if not pairs:
        return log_probs.sum() * log_probs.new_zeros(1, 2)
    return log_probs.new_zeros(2 * len(pairs)).index_add(0, owners, log_probs).view(-1, 2)


def log_probs_without_gradient(wrapped, pairs: list, a: Args, accelerator):
    """(len(pairs), 2): log pi of chosen and rejected; every process computes its share. Before training it is
    the reference's, afterwards the held-out pairs'."""
    import torch

    out = torch.zeros(len(pairs), 2, dtype=torch.float64, device=accelerator.device)
    [micros] = common.plan_epoch(common.trie_paths(pairs, a.share_prefix), len(pairs), a.micro_tokens, accelerator.num_processes,
                                 a.seed, 0)
    mine = micros[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad():
        for micro in tqdm(mine, desc="log-probabilities", disable=not accelerator.is_main_process, leave=False):
            log_probs = pair_log_probs(wrapped, [pairs[i] for i in micro], a.share_prefix, accelerator.device)
            if micro:
                out[micro] = log_probs.to(out.dtype)
    return accelerator.reduce(out, "sum")


def stored_reference(run, wrapped, pairs: list, a: Args, accelerator):
    """(len(pairs), 2): log pi_ref of all pairs, computed once before training and kept with the checkpoints."""
    import torch

    file = run.partial / "reference.pt"
    if run.start:
        return torch.load(file, weights_only=True).to(accelerator.device)
    out = log_probs_without_gradient(wrapped, pairs, a, accelerator)
    if accelerator.is_main_process:
        torch.save(out.cpu(), file)
    return out


def main(a: Args) -> None:
    import torch

    accelerator = common.make_accelerator(a.precision, a.log_with, a.out)
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    model, tokenizer = common.load_model(a.model)
    every, origins = load_pairs(a, tokenizer, accelerator.print)
    held = common.held_out([task for task, _ in origins], a.eval_share)
    train, kept = ([i for i, out in enumerate(held) if out == side] for side in (False, True))
    if not train:
        raise InputError(f"--eval_share {a.eval_share} leaves no pair to train on")

    wrapped = common.target_log_probs(common.prepare_model(model, a), flex=a.flex)
    if not wrapped.packed:
        a.share_prefix, a.micro_tokens = False, 0  # a micro-batch is one pair, its sides one after the other
    paths = common.trie_paths([every[i] for i in train], a.share_prefix)
    plan = [[[train[i] for i in micro] for micro in step] for epoch in range(a.epochs)
            for step in common.plan_epoch(paths, a.batch_size, a.micro_tokens, world, a.seed, epoch)]
    wrapped, optimizer = common.distribute(wrapped, accelerator, a)
    made_from = {**asdict(a), "model": common.model_id(a.model), "template": tokenizer.chat_template,
                 "pairs": common.digest(common.read_merged(a.data)[: a.limit])}
    run = common.Training(a.out, accelerator, wrapped, optimizer, made_from, len(plan), a.save_steps)
    reference = stored_reference(run, wrapped, every, a, accelerator)

    def measured(policy, rows: list[int]):
        """(losses, the six sums that are logged) of these pairs."""
        losses, chosen, rejected = dpo_loss(*policy.unbind(1), *reference[rows].to(policy.dtype).unbind(1), a.beta)
        return losses, torch.stack([v.detach().float().sum() for v in (losses, chosen > rejected, chosen, rejected, *policy.unbind(1))])

    names = ("loss", "reward_accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    bar = tqdm(range(run.start, len(plan)), initial=run.start, total=len(plan), desc="dpo", disable=not accelerator.is_main_process)
    for step in bar:
        began, lr = time.time(), common.learning_rate(step, len(plan), a.lr, a.warmup_ratio, a.lr_scheduler)
        batch = [i for micro in plan[step] for i in micro]
        tokens, sums = sum(len(ids) for i in batch for ids, _ in every[i]), torch.zeros(6, device=device)
        for micro in common.micro_batches(wrapped, plan[step][rank::world], accelerator):
            policy = pair_log_probs(wrapped, [every[i] for i in micro], a.share_prefix, device)
            loss = policy.sum() * 0
            if micro:
                losses, more = measured(policy, micro)
                loss, sums = losses.sum() / len(batch), sums + more
            accelerator.backward(loss * world)  # the processes' gradients are averaged: world makes it a sum
        norm = common.clip_gradients(wrapped, accelerator, a.max_grad_norm)
        metrics = dict(zip(names, (accelerator.reduce(sums, "sum") / len(batch)).tolist(), strict=True))
        run.check(step + 1, metrics["loss"], norm, [origins[i][1] for i in batch])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"reward_margin": metrics["reward_chosen"] - metrics["reward_rejected"], "lr": lr, "grad_norm": norm,
                    "tokens_per_second": tokens / (time.time() - began)}
        if kept and (step + 1) % (len(plan) // a.epochs) == 0:
            policy = log_probs_without_gradient(wrapped, [every[i] for i in kept], a, accelerator)
            loss, accuracy, chosen, rejected = (measured(policy, kept)[1][:4] / len(kept)).tolist()
            metrics |= {"eval_loss": loss, "eval_reward_accuracy": accuracy, "eval_reward_margin": chosen - rejected}
        line = run.step(step + 1, metrics)
        bar.set_postfix_str(f"accuracy {metrics['reward_accuracy']:.2f}, margin {metrics['reward_margin']:.3f}, {line}")

    run.finish(a.model, tokenizer, a.lora_merge,
               f"# {a.out}\n\n{a.model} after DPO on {len(train)} pairs of {a.data} (MPO, equation 8).\n\n"
               f"Settings: `{json.dumps(asdict(a))}`\n\nLast step: `{json.dumps(run.log[-1] if run.log else {})}`; "
               f"all steps in metrics.jsonl and curves.png.\n")


if __name__ == "__main__":
    common.run_stage(main, Args, training=True)
