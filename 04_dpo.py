"""Stage 4 (paper 3.3, equation 8): DPO on contrastive plan pairs.

    python 04_dpo.py --data runs/NAME/pairs.jsonl --out runs/NAME/mpo
    accelerate launch --num_processes 8 04_dpo.py ...          # all GPUs of a machine, FSDP2

--data is JSONL with {"prompt": [...], "chosen": [...], "rejected": [...]}, lists of messages. The
reference model is --model before the first step: its log-probabilities are computed once and stored
with the checkpoints, so no second model is in memory. Writes --out: the model in Hugging Face
format, metrics.jsonl (one row per optimizer step: loss, reward_accuracy, reward_chosen,
reward_rejected, reward_margin, logp_chosen, logp_rejected, lr, grad_norm, tokens_per_second,
memory_gb and, at the end of an epoch, eval_loss, eval_reward_accuracy, eval_reward_margin),
curves.png and a model card.
"""

import collections
import time
from dataclasses import dataclass
from typing import Optional

from tqdm import tqdm

import common
from common import InputError, arg


@dataclass
class Args:
    model: str = arg("runs/sciworld/sft", "the SFT meta planner: first policy, and the reference")
    data: str = arg(
        "runs/sciworld/pairs.jsonl", "preference rows, JSONL with `prompt`, `chosen`, `rejected`"
    )
    out: str = arg("runs/sciworld/mpo", "folder for the trained model, in Hugging Face format")
    beta: float = arg(0.1, "beta of the DPO loss (paper: 0.1)")
    nll: float = arg(
        0.0,
        "weight of -log pi(p_w|u) per token, added to the loss (paper: none; Pang et al. 2024: 1)",
    )
    batch_size: int = arg(32, "pairs per optimizer step, over all processes (paper: 32)")
    lr: float = arg(1e-5, "peak learning rate (paper: 1e-5)")
    epochs: int = arg(3, "passes over the pairs (paper: 3)")
    warmup_ratio: float = arg(0.03, "share of the steps with linear warm-up (paper: 3%)")
    lr_scheduler: str = arg("cosine", "after the warm-up: cosine (paper), linear or constant")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "clip gradients to this norm, 0: no clipping")
    max_length: int = arg(4096, "pairs with more tokens on a side are skipped, and counted")
    micro_tokens: int = arg(8192, "tokens per micro-batch and process; lower it to save memory")
    share_prefix: bool = arg(
        True,
        "compute the prompt of a pair once: the same result, less work; "
        "ignored where the model's attention does not allow it",
    )
    precision: str = arg(
        "bf16", "bf16: float32 weights and optimizer state, bf16 computation; fp32: all float32"
    )
    gradient_checkpointing: bool = arg(
        False, "recompute activations in the backward pass: less memory, a third slower"
    )
    compile: bool = arg(False, "torch.compile the decoder layers: slow first steps, then faster")
    lora_rank: int = arg(0, "train adapters of this rank, 0: all weights (paper)")
    lora_merge: bool = arg(
        True,
        "merge the adapters into the model at the end, as the next stages "
        "expect; False: write them alone",
    )
    eval_share: float = arg(
        0.0, "share of tasks held out for loss, accuracy and margin after each epoch (paper: none)"
    )
    log_with: Optional[str] = arg(None, "also log to a tracker: tensorboard, wandb, trackio, ...")
    save_steps: int = arg(50, "optimizer steps between checkpoints, 0: none")
    limit: Optional[int] = arg(None, "use only the first N pairs")
    seed: int = arg(0, "seed of the pair order")


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float):
    """Equation 8 (Rafailov et al. 2023, equation 7), one value per pair.

    Four tensors (P,) of summed log-probabilities log pi(p|u) -> (losses, chosen rewards, rejected
    rewards), each (P,); a reward is beta log pi_theta(p|u) / pi_ref(p|u)."""
    import torch.nn.functional as F

    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def load_pairs(a: Args, tokenizer, say=print) -> list[tuple]:
    """([chosen, rejected], task, line) of each pair whose sides, (token ids, target mask) of prompt
    and reply, have at most --max_length tokens."""
    pairs, too_long = [], 0
    rows = common.read_rows(a.data, ("prompt", "chosen", "rejected"))[: a.limit]
    for line, row in enumerate(rows, 1):
        sides = []
        for side in ("chosen", "rejected"):
            if not isinstance(row["prompt"], list) or not isinstance(row[side], list):
                raise InputError(
                    f"{a.data}:{line}: `prompt` and `{side}` must be lists of messages"
                )
            sides.append(common.tokenize(row["prompt"] + row[side], tokenizer, f"{a.data}:{line}"))
            if not any(sides[-1][1]):
                raise InputError(f"{a.data}:{line}: `{side}` has no assistant message")
        if max(len(ids) for ids, _ in sides) > a.max_length:
            too_long += 1
        else:
            pairs.append((sides, row.get("task", line), line))
    if too_long:
        say(f"skipped {too_long} pairs longer than --max_length {a.max_length}")
    return pairs


def pair_log_probs(model, pairs: list[tuple], share_prefix: bool):
    """log pi(p|u) of chosen and rejected, each summed over its target tokens: (P, 2), float32.
    Zeros (1, 2) without pairs: such a process must still take part in the collectives."""
    log_probs, owners = common.target_log_probs(model, [sides for sides, *_ in pairs], share_prefix)
    sums = log_probs.new_zeros(2 * max(1, len(pairs)))
    return sums.index_add(0, owners, log_probs).view(-1, 2)


def log_probs_without_gradient(model, pairs: list[tuple], a: Args, accelerator):
    """(len(pairs), 2): log pi of chosen and rejected; every process computes its share. Before
    training these are the reference's, later the held-out pairs'."""
    import torch

    out = torch.zeros(len(pairs), 2, dtype=torch.float64, device=accelerator.device)
    [micros] = common.plan_epoch(
        common.lengths(pairs, a.share_prefix),
        len(pairs),
        a.micro_tokens,
        accelerator.num_processes,
        0,
        0,
    )
    mine = micros[accelerator.process_index :: accelerator.num_processes]
    quiet = not accelerator.is_main_process
    for micro in tqdm(mine, "log-probabilities", disable=quiet, leave=False):
        with torch.no_grad():
            log_probs = pair_log_probs(model, [pairs[i] for i in micro], a.share_prefix)
        if micro:
            out[micro] = log_probs.to(out.dtype)
    return accelerator.reduce(out, "sum")


def reference_log_probs(run, pairs: list[tuple]):
    """(len(pairs), 2): log pi_ref, computed once, stored with the checkpoints."""
    import torch

    file = run.partial / "reference.pt"
    if run.start:
        return torch.load(file, weights_only=True).to(run.accelerator.device)
    out = log_probs_without_gradient(run.model, pairs, run.a, run.accelerator)
    if run.accelerator.is_main_process:
        torch.save(out.cpu(), file)
    return out


def measure(policy, reference, pairs: list[tuple], a: Args):
    """(losses (P,), {metric: its sum over the pairs}) of (P, 2) log-probabilities of `pairs`. With
    --nll the chosen plan's mean token loss is added (Pang et al. 2024, equation 1)."""
    policy_sides, reference_sides = policy.unbind(1), reference.to(policy.dtype).unbind(1)
    losses, chosen, rejected = dpo_loss(*policy_sides, *reference_sides, a.beta)
    if a.nll and pairs:
        tokens = policy.new_tensor([sum(mask[1:]) for ((_, mask), _), *_ in pairs])
        losses = losses - a.nll * policy_sides[0] / tokens
    metrics = {
        "loss": losses,
        "reward_accuracy": chosen > rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "logp_chosen": policy_sides[0],
        "logp_rejected": policy_sides[1],
    }
    return losses, {k: v.detach().float().sum() for k, v in metrics.items()}


def main(a: Args) -> None:
    accelerator = common.make_accelerator(a)
    world, rank = accelerator.num_processes, accelerator.process_index
    model, tokenizer = common.load_model(a.model)
    a.share_prefix = a.share_prefix and model.packing == "rows"
    pairs, held = common.hold_out(load_pairs(a, tokenizer, accelerator.print), a)
    plan = [
        step
        for epoch in range(a.epochs)
        for step in common.plan_epoch(
            common.lengths(pairs, a.share_prefix),
            a.batch_size,
            a.micro_tokens,
            world,
            a.seed,
            epoch,
        )
    ]
    model, optimizer = common.prepare_model(model, accelerator, a)
    run = common.Training(a, accelerator, model, optimizer, tokenizer, len(plan))
    reference = reference_log_probs(run, pairs + held)

    bar = tqdm(
        range(run.start, len(plan)),
        initial=run.start,
        total=len(plan),
        desc="dpo",
        disable=not accelerator.is_main_process,
    )
    for step in bar:
        began = time.time()
        batch, sums = [pairs[i] for micro in plan[step] for i in micro], collections.Counter()
        for micro in plan[step][rank::world]:
            own = [pairs[i] for i in micro]
            policy = pair_log_probs(model, own, a.share_prefix)
            losses, measured = measure(policy, reference[micro], own, a)
            (losses.sum() / len(batch) * world).backward()  # FSDP averages over processes: a sum
            sums.update(measured)
        norm = common.clip_gradients(model, a.max_grad_norm)
        sums = accelerator.reduce(dict(sums), "sum")
        metrics = {k: v.item() / len(batch) for k, v in sums.items()}
        run.check(step + 1, metrics["loss"], norm, [line for *_, line in batch])
        lr = common.learning_rate(step, len(plan), a.lr, a.warmup_ratio, a.lr_scheduler)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": sum(common.lengths(batch)) / (time.time() - began),
        }
        if held and (step + 1) % (len(plan) // a.epochs) == 0:
            policy = log_probs_without_gradient(model, held, a, accelerator)
            _, sums = measure(policy, reference[len(pairs) :], held, a)
            metrics |= {
                f"eval_{k}": sums[k].item() / len(held)
                for k in ("loss", "reward_accuracy", "reward_margin")
            }
        line = run.step(step + 1, metrics)
        bar.set_postfix_str(
            f"accuracy {metrics['reward_accuracy']:.2f}, "
            f"margin {metrics['reward_margin']:.3f}, {line}"
        )
    run.finish("DPO (MPO, equation 8)")


if __name__ == "__main__":
    common.run_stage(main, Args, training=True)
