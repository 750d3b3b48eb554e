"""Stage 4 (paper 3.3, equation 8): DPO on contrastive plan pairs.

    python 04_dpo.py --data runs/NAME/pairs.jsonl --out runs/NAME/mpo
    python -m data.tools.launch --num_processes 8 04_dpo.py ...      # all GPUs of a machine, FSDP2

--data is JSONL with {"prompt": [...], "chosen": [...], "rejected": [...]}, lists of messages, on
each line. The reference model is --model before the first step: its log-probabilities are computed
once and stored with the checkpoints, so no second model is in memory.

Writes the folder --out: the model in Hugging Face format, a model card, and metrics.jsonl with one
row per optimizer step: loss, reward_accuracy, reward_chosen, reward_rejected, reward_margin,
logp_chosen, logp_rejected, lr, grad_norm, tokens_per_second, memory_gb and, at the end of an epoch,
eval_loss, eval_reward_accuracy, eval_reward_margin.
"""

import itertools
import time
from dataclasses import dataclass
from typing import Optional

from tqdm import tqdm

import common
from common import Example, InputError, arg


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
    eval_share: float = arg(
        0.0, "share of tasks held out for loss, accuracy and margin after each epoch (paper: none)"
    )
    log_with: Optional[str] = arg(None, "also log to a tracker: tensorboard, wandb, trackio, ...")
    save_steps: int = arg(50, "optimizer steps between checkpoints, 0: none")
    limit: Optional[int] = arg(None, "use only the first N pairs")
    seed: int = arg(0, "seed of the pair order, and of new adapters (--lora_rank)")
    check: bool = arg(False, "say whether this command can run here, a line each, and stop")


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float):
    """Equation 8 (Rafailov et al. 2023, equation 7), one value per pair.

    Four tensors (P,) of summed log-probabilities log pi(p|u) -> (losses, chosen rewards, rejected
    rewards), each (P,); a reward is beta log pi_theta(p|u) / pi_ref(p|u)."""
    import torch.nn.functional as F

    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def load_pairs(a: Args, tokenizer, say=print) -> list[Example]:
    """The pairs of --data whose sides have at most --max_length tokens: as sequences [chosen,
    rejected], each of the prompt and its reply."""
    pairs = []
    too_long = 0
    rows = common.numbered_rows(a.data, ("prompt", "chosen", "rejected"), appended=False)
    for line, row in itertools.islice(rows.items(), a.limit):
        where = f"{a.data}:{line}"
        sides = [tokenize_side(row, side, tokenizer, where) for side in ("chosen", "rejected")]
        if max(len(side.ids) for side in sides) > a.max_length:
            too_long += 1
            continue
        pairs.append(Example(sides, row.get("task", line), line))
    if too_long:
        say(f"skipped {too_long} pairs longer than --max_length {a.max_length}")
    return pairs


def tokenize_side(row: dict, side: str, tokenizer, where: str) -> common.Sequence:
    if not isinstance(row["prompt"], list) or not isinstance(row[side], list):
        raise InputError(f"{where}: `prompt` and `{side}` must be lists of messages")
    sequence = common.tokenize(row["prompt"] + row[side], tokenizer, where)
    sequence = without_first_replies(sequence, len(replies_in(row["prompt"])))
    if not any(sequence.mask):
        raise InputError(f"{where}: `{side}` has no assistant message")
    return sequence


def replies_in(messages: list[dict]) -> list[dict]:
    return [message for message in messages if message["role"] == "assistant"]


def without_first_replies(sequence: common.Sequence, count: int) -> common.Sequence:
    """The sequence with the targets of all but its first `count` replies: those are in the
    prompt."""
    mask = []
    begun = 0  # replies so far; each is a run of targets
    before = False
    for target in sequence.mask:
        if target and not before:
            begun += 1
        mask.append(target and begun > count)
        before = target
    return common.Sequence(sequence.ids, mask)


def pair_log_probs(model, pairs: list[Example], share_prefix: bool):
    """log pi(p|u) of chosen and rejected, each summed over its target tokens: (P, 2), float32."""
    log_probs, owners = common.target_log_probs(model, pairs, share_prefix)
    rows = max(1, len(pairs))  # no pairs: one row for the zero of `target_log_probs`, cut off below
    sums = log_probs.new_zeros(2 * rows).index_add(0, owners, log_probs)
    return sums.view(rows, 2)[: len(pairs)]


def log_probs_without_gradient(run, pairs: list[Example], share_prefix: bool):
    """(len(pairs), 2): log pi of chosen and rejected; every process computes its share. Before
    training these are the reference's, later the held-out pairs'."""
    import torch

    accelerator = run.accelerator
    micros = common.my_micro_batches(common.lengths(pairs, share_prefix), run.a, accelerator)
    quiet = not accelerator.is_main_process
    values = torch.zeros(len(pairs), 2, dtype=torch.float64, device=accelerator.device)
    for micro in tqdm(micros, "log-probabilities", disable=quiet, leave=False):
        with torch.no_grad():
            log_probs = pair_log_probs(run.model, [pairs[i] for i in micro], share_prefix)
        values[micro] = log_probs.to(values.dtype)
    return accelerator.reduce(values, "sum")


def start_run(a: Args, accelerator, model, optimizer, tokenizer, schedule, pairs: list[Example]):
    """(run, log pi_ref of chosen and rejected: (len(pairs), 2)). They are computed once, and saved
    with the checkpoints, from which the run may go on."""
    import torch

    reference = torch.zeros(len(pairs), 2, dtype=torch.float64).to(accelerator.device)
    saved = {"reference": reference}
    run = common.Training(a, accelerator, model, optimizer, tokenizer, len(schedule), saved)
    if run.start == 0:
        reference.copy_(log_probs_without_gradient(run, pairs, model.packing == "rows"))
    return run, reference


def losses_and_metrics(policy, reference, pairs: list[Example], a: Args):
    """(losses (P,), {metric: its sum over the pairs}) from log-probabilities (P, 2) of `pairs`.

    With --nll the chosen plan's mean token loss is added (Pang et al. 2024, equation 1)."""
    policy_chosen, policy_rejected = policy.unbind(1)
    reference_chosen, reference_rejected = reference.to(policy.dtype).unbind(1)
    losses, chosen_rewards, rejected_rewards = dpo_loss(  # equation 8
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, a.beta
    )
    if a.nll:
        counts = [common.target_count(pair.sequences[0]) for pair in pairs]
        losses = losses - a.nll * policy_chosen / policy.new_tensor(counts)
    metrics = {
        "loss": losses,
        "reward_accuracy": chosen_rewards > rejected_rewards,
        "reward_chosen": chosen_rewards,
        "reward_rejected": rejected_rewards,
        "reward_margin": chosen_rewards - rejected_rewards,
        "logp_chosen": policy_chosen,
        "logp_rejected": policy_rejected,
    }
    sums = {name: values.detach().float().sum() for name, values in metrics.items()}
    return losses, sums


def held_out_metrics(run, pairs: list[Example], share_prefix: bool, reference) -> dict:
    """Loss, accuracy and margin of the held-out pairs."""
    policy = log_probs_without_gradient(run, pairs, share_prefix)
    _, sums = losses_and_metrics(policy, reference, pairs, run.a)
    names = ("loss", "reward_accuracy", "reward_margin")
    return {f"eval_{name}": sums[name].item() / len(pairs) for name in names}


def main(a: Args) -> None:
    if a.check:
        common.check_training(a)
        return
    accelerator = common.make_accelerator(a)
    world = accelerator.num_processes
    rank = accelerator.process_index
    model, tokenizer = common.load_model(a.model)
    train, held_out = common.hold_out(load_pairs(a, tokenizer, accelerator.print), a)
    all_pairs = train + held_out
    common.check_rows(model, all_pairs, a.data)
    model, optimizer = common.prepare_model(model, accelerator, a, all_pairs)
    share_prefix = model.packing == "rows"  # compute the prompt of a pair once
    # schedule[optimizer step][micro-batch]: indices of training pairs
    schedule = common.batch_schedule(common.lengths(train, share_prefix), a, world)
    run, reference = start_run(a, accelerator, model, optimizer, tokenizer, schedule, all_pairs)

    bar = run.progress_bar("dpo")
    for step in bar:
        began = time.time()
        lr = common.set_learning_rate(optimizer, step, len(schedule), a)

        # forward and backward, one micro-batch after the other: the gradients add up
        batch = [train[i] for i in itertools.chain(*schedule[step])]
        sums = {}
        for micro in schedule[step][rank::world]:
            pairs = [train[i] for i in micro]
            policy = pair_log_probs(model, pairs, share_prefix)
            losses, micro_sums = losses_and_metrics(policy, reference[micro], pairs, a)
            (losses.sum() / len(batch) * world).backward()  # FSDP averages, we need the sum
            for name, value in micro_sums.items():
                sums[name] = sums.get(name, 0.0) + value
        sums = accelerator.reduce(sums, "sum")
        metrics = {name: value.item() / len(batch) for name, value in sums.items()}

        # update the weights
        norm = common.clip_gradients(model, a.max_grad_norm)
        run.stop_if_diverged(step + 1, metrics["loss"], norm, batch)
        optimizer.step()
        optimizer.zero_grad()

        # metrics, and a checkpoint every --save_steps
        metrics |= {"lr": lr, "grad_norm": norm}
        metrics["tokens_per_second"] = sum(common.lengths(batch)) / (time.time() - began)
        if held_out and run.ends_epoch(step + 1):
            metrics |= held_out_metrics(run, held_out, share_prefix, reference[len(train) :])
        shown = f"accuracy {metrics['reward_accuracy']:.2f}, margin {metrics['reward_margin']:.3f}"
        bar.set_postfix_str(f"{shown}, {run.end_step(step + 1, metrics)}")

    run.finish("DPO (MPO, equation 8)")


if __name__ == "__main__":
    common.run_stage(main, Args, training=True)
