"""Training, without the scripts: packing, losses and gradients beside float64 references, schedule
and micro-batches."""

import math
import random
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, stage

import common
from common import InputError, learning_rate, pack, plan_epoch, target_log_probs, tokenize

sft, dpo = stage("02_sft"), stage("04_dpo")
BETA = 0.1


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALKS = [
    [
        user("Boil water."),
        assistant("Action: activate stove"),
        user("Observation: It is on."),
        assistant("Action: wait1"),
    ],
    [user("Find a plant."), assistant("Action: teleport to greenhouse")],
    [
        user("Find an animal. It may be outside, or in the kitchen, or anywhere else."),
        assistant("Action: look around"),
    ],
    [
        user("Mix."),
        assistant("Thought: salt, water.\nAction: mix cup"),
        user("Observation: brine"),
        assistant("Action: focus on it"),
    ],
    [user("Wait."), assistant("Action: wait")],
]
PAIRS = [
    {
        "prompt": [user(f"Plan {good[-9:]}.")],
        "chosen": [assistant(good)],
        "rejected": [assistant(bad)],
    }
    for good, bad in [
        ("Step 1: go to kitchen\nStep 2: look around", "Step 1: wait"),
        (
            "Step 1: focus on the animal",
            "Step 1: open the door and read the note on the table\nStep 2: wait",
        ),
        ("Step 1: pour water into cup", "Step 1: pour cup into water"),
        ("Step 1: mix the paint\nStep 2: focus on it", "Step 1: eat the paint"),
    ]
]
# a pair of two trajectories that differ from their second turn on
TURNS = [user("Task"), assistant("look"), user("A pot.")]
TRAJECTORIES = {
    "prompt": TURNS[:1],
    "chosen": [*TURNS[1:], assistant("take it")],
    "rejected": [*TURNS[1:], assistant("go away"), user("Well."), assistant("wait")],
}


def log_prob_alone(model, messages, tokenizer):
    """(log pi of what the assistant says, number of targets): all logits of one row, one target
    after the other. `model` has the library's own attention."""
    ids, targets = tokenize(messages, tokenizer, "test")
    log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    total = sum(log_probs[i - 1, ids[i]] for i in range(1, len(ids)) if targets[i])
    return total, sum(targets)


def as_rows(talks, tokenizer) -> list[list]:
    return [[tokenize(talk, tokenizer, "test")] for talk in talks]


def as_pairs(pairs, tokenizer) -> list[tuple]:
    return [
        (
            [tokenize(p["prompt"] + p[side], tokenizer, "test") for side in ("chosen", "rejected")],
            f"t{i}",
            i,
        )
        for i, p in enumerate(pairs)
    ]


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(grads, expected, atol):
    assert grads.keys() == expected.keys() and any(g.abs().max() > 1e-2 for g in expected.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=atol, msg=name)


def float64_model(tokenizer, seed=0, **config):
    return make_model(tokenizer, "float64", seed=seed, **config)


# ---- packing -------------------------------------------------------------------------------------

WINDOW = {"sliding_window": 16}
KINDS = [
    ("llama", "rows", {}),
    ("qwen2", "rows", {"tie_word_embeddings": False}),
    ("granite", "rows", {"logits_scaling": 8.0}),
    ("cohere", "rows", {"logit_scale": 0.3}),
    ("mistral", "mask", WINDOW),
    ("gemma2", "mask", {**WINDOW, "head_dim": 8, "attn_logit_softcapping": 0.5}),
]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind, packing, config", KINDS, ids=[kind for kind, *_ in KINDS])
def test_packed_rows_equal_rows_alone(tokenizer, kind, packing, config, checkpointing):
    """Log-probabilities and gradients in float64, in eval mode and in train mode with gradient
    checkpointing. The rows are longer than the window; a soft cap of 0.5 matters."""
    model = float64_model(tokenizer, kind=kind, **config)
    # SDPA ignores Gemma 2's soft cap; eager attention has a softmax in float32
    eager = kind == "gemma2"
    model.set_attn_implementation("eager" if eager else "sdpa")
    expected = torch.stack([log_prob_alone(model, talk, tokenizer)[0] for talk in TALKS])
    weights = torch.sin(1 + torch.arange(len(TALKS), dtype=torch.float64))
    expected_grads = gradients(model, expected @ weights)

    common.choose_packing(model)
    assert model.packing == packing
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    log_probs, owners = target_log_probs(model, as_rows(TALKS, tokenizer))
    assert log_probs.dtype == torch.float64
    together = torch.zeros_like(expected).index_add(0, owners, log_probs)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)
    grads = gradients(model, together @ weights)
    assert_same(grads, expected_grads, atol=1e-5 if eager else 1e-7)


@pytest.mark.parametrize(
    "kind, packing, config", [KINDS[0], KINDS[4], KINDS[5]], ids=["llama", "mistral", "gemma2"]
)
def test_packed_rows_in_bf16(tokenizer, kind, packing, config):
    """As near to float64 as rows alone in bf16 are."""
    talks = TALKS * 3
    exact = make_model(tokenizer, "bfloat16", kind=kind, **config).double()
    model = make_model(tokenizer, "bfloat16", kind=kind, **config)
    common.choose_packing(exact)
    common.choose_packing(model)
    rows = as_rows(talks, tokenizer)
    with torch.no_grad():
        expected, _ = target_log_probs(exact, rows)
        alone = torch.cat([target_log_probs(model, [row])[0] for row in rows])
        packed, _ = target_log_probs(model, rows)
    assert packed.dtype == torch.float32
    assert (packed - expected).abs().mean() < 1.2 * (alone - expected).abs().mean() < 0.1


def test_models_without_attention_are_refused(tokenizer):
    """State space layers would mix the rows of a pack."""
    with pytest.raises(InputError, match="mamba models have layers that are not attention"):
        common.choose_packing(make_model(tokenizer, kind="mamba", state_size=4))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_shared_prompt_changes_nothing(tokenizer, kind):
    """Log-probabilities and gradients of pairs whose prompt is computed once, in float64: plans,
    long prompts, trajectories with targets inside the shared prefix, equal sides, a side that
    begins like the other, and sides without a common token."""
    pairs = as_pairs(
        [
            *PAIRS,
            TRAJECTORIES,
            {
                "prompt": [user("u" * 80)],
                "chosen": [assistant("a")],
                "rejected": [assistant("b " * 60)],
            },
        ],
        tokenizer,
    )
    (first, mask), _ = pairs[0][0]
    pairs += [
        ([(first, mask)] * 2, "equal", 7),
        ([(first, mask), (first[:-3], mask[:-3])], "", 8),
        ([(first, mask), ([i + 1 for i in first], mask)], "", 9),
    ]
    model = float64_model(tokenizer, seed=3, kind=kind)
    results = []
    for packing, share in (("library", False), ("rows", False), ("rows", True)):
        if packing == "rows":
            common.choose_packing(model)
        else:
            model.packing = "mask"  # SDPA with the library's mask
        values = dpo.pair_log_probs(model, pairs, share)
        grads = gradients(model, (values @ torch.tensor([0.7, -1.3], dtype=torch.float64)).sum())
        results.append((values.detach(), grads))
    for values, grads in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=1e-10)
        # with a mask, SDPA on a CPU keeps float32 for its backward pass
        assert_same(grads, results[0][1], atol=1e-5)

    tokens = [sum(len(ids) for ids, _ in sides) for sides, *_ in pairs]
    shared = [
        before - after for before, after in zip(tokens, common.lengths(pairs, True), strict=True)
    ]
    assert common.lengths(pairs) == tokens and min(shared[:6]) > 4
    assert shared[4] > len(tokenize(TURNS[:2], tokenizer, "")[0]), "a target is in the shared part"
    assert shared[6:] == [len(first) - 1, len(first) - 4, 0], "each side adds a token at least"


def test_pack():
    """By hand: prompt 10 11, replies 1 2 and 1 3 whose first token is a target of both sides."""
    mask = [False, False, True, True]
    pair = [([10, 11, 1, 2], mask), ([10, 11, 1, 3], mask)]
    ids, positions, targets, rows = pack([[([7, 8], [False, True])], pair], share_prefix=True)
    assert ids == [7, 8, 10, 11, 1, 2, 3] and positions == [0, 1, 0, 1, 2, 3, 3]
    assert targets == [(0, 8, 0), (3, 1, 1), (4, 2, 1), (3, 1, 2), (4, 3, 2)]
    assert rows == [(0, 2), (0, 4), (3, 1)]
    ids, positions, targets, rows = pack([pair])
    assert ids == [10, 11, 1, 2, 10, 11, 1, 3] and positions == [0, 1, 2, 3] * 2
    assert targets == [(1, 1, 0), (2, 2, 0), (5, 1, 1), (6, 3, 1)] and rows == [(0, 4), (0, 4)]


def test_a_process_without_rows_takes_part(tokenizer):
    """Zero loss and a zero gradient for every parameter, as collectives over processes need."""
    model = float64_model(tokenizer)
    common.choose_packing(model)
    for loss in (
        sft.sft_loss(target_log_probs(model, [])[0], 5),
        dpo.measure(dpo.pair_log_probs(model, [], True), torch.zeros(0, 2), [], dpo.Args(nll=1.0))[
            0
        ].sum(),
    ):
        assert loss.item() == 0
        assert not any(g.any() for g in gradients(model, loss).values())


# ---- losses --------------------------------------------------------------------------------------


def micro_batches(lengths, count):
    """The first plan of one epoch with that many micro-batches."""
    plans = (plan_epoch(lengths, len(lengths), n, 1, 0, 0)[0] for n in range(1, 10_000))
    return next(plan for plan in plans if len(plan) == count)


@pytest.mark.parametrize("micros", [1, 4])
def test_sft_loss_equals_reference(tokenizer, micros):
    model = float64_model(tokenizer, tie_word_embeddings=False)
    results = [log_prob_alone(model, talk, tokenizer) for talk in TALKS]
    expected = -sum(lp for lp, _ in results) / sum(n for _, n in results)
    expected_grads = gradients(model, expected)

    common.choose_packing(model)
    rows = [(group, None, None) for group in as_rows(TALKS, tokenizer)]
    total = 0
    for micro in micro_batches(common.lengths(rows), micros):
        log_probs, _ = target_log_probs(model, [rows[i][0] for i in micro])
        total += sft.sft_loss(log_probs, sft.target_count(rows))
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_same(gradients(model, total), expected_grads, atol=1e-9)


@pytest.mark.parametrize("nll", [0.0, 0.3])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micros", [1, 4])
def test_dpo_loss_equals_reference(tokenizer, micros, share, nll):
    model, frozen = (
        float64_model(tokenizer, seed=seed, tie_word_embeddings=False) for seed in (0, 1)
    )
    expected, margins = 0, []
    for pair in PAIRS:
        margin = 0
        for side, sign in (("chosen", 1), ("rejected", -1)):
            (policy, tokens), (reference, _) = (
                log_prob_alone(m, pair["prompt"] + pair[side], tokenizer) for m in (model, frozen)
            )
            margin = margin + sign * BETA * (policy - reference.detach())
            if side == "chosen":
                expected = expected - nll * policy / tokens / len(PAIRS)
        margins.append(margin.item())
        expected = expected - torch.log(1 / (1 + torch.exp(-margin))) / len(PAIRS)
    expected_grads = gradients(model, expected)

    pairs, total, seen, a = as_pairs(PAIRS, tokenizer), 0, {}, dpo.Args(beta=BETA, nll=nll)
    common.choose_packing(model)
    common.choose_packing(frozen)
    for micro in micro_batches(common.lengths(pairs, share), micros):
        own = [pairs[i] for i in micro]
        policy, reference = (dpo.pair_log_probs(m, own, share) for m in (model, frozen))
        losses, _ = dpo.measure(policy, reference.detach(), own, a)
        _, chosen, rejected = dpo.dpo_loss(*policy.unbind(1), *reference.detach().unbind(1), BETA)
        total += losses.sum() / len(pairs)
        seen |= dict(zip(micro, (chosen - rejected).tolist(), strict=True))
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert [seen[i] for i in range(len(pairs))] == pytest.approx(margins, rel=1e-9)
    # with a mask, the CPU's attention keeps a float32 for its backward pass
    assert_same(gradients(model, total), expected_grads, atol=1e-6 if share else 1e-9)


def test_dpo_loss_by_hand():
    four = [torch.tensor([v], dtype=torch.float64) for v in (-10.0, -12.0, -11.0, -9.0)]
    loss, chosen, rejected = dpo.dpo_loss(*four, beta=0.5)
    assert chosen.item() == 0.5 and rejected.item() == -1.5  # 0.5 (-10 + 11), 0.5 (-12 + 9)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-2.0))), rel=1e-12)
    same = torch.tensor([-3.0])
    assert dpo.dpo_loss(same, same, same, same, 0.1)[0].item() == pytest.approx(math.log(2))


def test_reference_log_probs_are_those_of_the_model(tokenizer):
    model, pairs = float64_model(tokenizer), as_pairs(PAIRS, tokenizer)
    expected = [
        [
            log_prob_alone(model, p["prompt"] + p[side], tokenizer)[0].item()
            for side in ("chosen", "rejected")
        ]
        for p in PAIRS
    ]
    common.choose_packing(model)
    for micro_tokens, share in ((64, True), (100_000, True), (64, False), (0, False)):
        args = dpo.Args(micro_tokens=micro_tokens, share_prefix=share)
        out = dpo.log_probs_without_gradient(model, pairs, args, Accelerator(cpu=True)).tolist()
        for row, values in zip(out, expected, strict=True):
            assert row == pytest.approx(values, rel=1e-9)


def test_gradients_are_clipped_to_a_norm_or_left_alone():
    for limit, expected in ((1.0, 1.0), (10.0, 5.0), (0.0, 5.0)):
        layer = torch.nn.Linear(2, 1, bias=False)
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        assert common.clip_gradients(layer, limit) == pytest.approx(5.0)
        assert layer.weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


# ---- schedule and micro-batches ------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, warmup_ratio", [(100, 0.03), (17, 0.1), (10, 0.0), (1, 0.03), (3, 1.0)]
)
def test_learning_rate(total, warmup_ratio):
    peak, warmup = 1e-5, math.ceil(total * warmup_ratio)
    for step in range(total):
        lrs = {
            shape: learning_rate(step, total, peak, warmup_ratio, shape)
            for shape in ("cosine", "linear", "constant")
        }
        if step < warmup:
            assert set(lrs.values()) == {peak * (step + 1) / warmup}
        else:
            done = (step - warmup) / (total - warmup)
            cosine = peak * math.cos(math.pi * done / 2) ** 2
            assert lrs["cosine"] == pytest.approx(cosine, rel=1e-9) and lrs["constant"] == peak
            assert lrs["linear"] == pytest.approx(peak * (1 - done))
        assert lrs["cosine"] > 0
    with pytest.raises(InputError, match="triangle.*cosine"):
        learning_rate(0, 10, 1.0, 0.0, "triangle")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_plan_epoch(processes):
    lengths, budget = [(37 * i) % 90 + 10 for i in range(50)], 200
    steps = plan_epoch(lengths, 16, budget, processes, 7, 1)
    assert [sum(map(len, step)) for step in steps] == [16, 16, 16, 2]
    assert sorted(i for step in steps for micro in step for i in micro) == list(range(50))
    for step in steps:
        assert len(step) % processes == 0, "as many micro-batches for every process"
        tokens = [sum(lengths[i] for i in micro) for micro in step]
        assert max(tokens) <= budget
        per_process = [sum(tokens[rank::processes]) for rank in range(processes)]
        assert len(step) == processes or max(per_process) < 1.3 * min(per_process)
    assert steps == plan_epoch(lengths, 16, budget, processes, 7, 1)
    orders = {
        str(plan_epoch(lengths, 16, budget, processes, seed, epoch))
        for seed in (7, 8)
        for epoch in (1, 2)
    }
    assert len(orders) == 4, "another order for another seed or epoch"


def test_batches_do_not_depend_on_the_machine():
    lengths = [(37 * i) % 90 + 10 for i in range(50)]
    plans = [
        plan_epoch(lengths, 8, budget, processes, 0, 0)
        for budget in (10, 200, 10_000)
        for processes in (1, 2, 8)
    ]
    batches = [[sorted(i for micro in step for i in micro) for step in plan] for plan in plans]
    assert all(b == batches[0] for b in batches)


def test_a_row_above_the_budget_is_alone():
    assert plan_epoch([500, 3, 3], 3, 10, 1, 0, 0) in ([[[0], [1, 2]]], [[[0], [2, 1]]])
    assert plan_epoch([5, 4, 3], 3, 0, 1, 0, 0) == [[[0], [1], [2]]], "no budget: every row alone"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_are_the_same_and_compiled_twice(tokenizer):
    """Once for the first length and once for others; other numbers of rows do not compile again."""
    from torch._dynamo.utils import counters

    eager, compiled = (make_model(tokenizer) for _ in range(2))
    common.choose_packing(eager)
    common.choose_packing(compiled)
    args = sft.Args(compile=True, precision="fp32")
    compiled, _ = common.prepare_model(compiled, Accelerator(cpu=True), args)
    draw, frames = random.Random(0), []
    for rows in (3, 2, 4, 1, 5, 2, 6, 7, 8, 9, 10):
        batch = [
            [([draw.randrange(500) for _ in range(n)], [False] * 10 + [True] * (n - 10))]
            for n in (draw.randint(20, 60) for _ in range(rows))
        ]
        torch.testing.assert_close(
            target_log_probs(eager, batch)[0],
            target_log_probs(compiled, batch)[0],
            atol=1e-4,
            rtol=1e-4,
        )
        frames.append(counters["frames"]["ok"])
    assert frames[-1] == frames[2] > 0
