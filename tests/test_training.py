"""Training: the losses against a float64 reference, the schedule, the batches, and both scripts for real."""

import errno
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import (
    ROOT,
    check_run,
    make_model,
    save_model,
    script_env,
    stage,
    start_script,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import (
    InputError,
    can_pack,
    learning_rate,
    pack,
    plan_epoch,
    read_rows,
    target_log_probs,
    tokenize,
    trie_paths,
)

sft, dpo = stage("02_sft"), stage("04_dpo")
CPU, BETA = torch.device("cpu"), 0.1


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALKS = [
    [user("Boil water."), assistant("Action: activate stove"), user("Observation: It is on."), assistant("Action: wait1")],
    [user("Find a plant."), assistant("Action: teleport to greenhouse")],
    [user("Find an animal. It may be outside, or in the kitchen, or anywhere else."), assistant("Action: look around")],
    [user("Mix."), assistant("Thought: salt, water.\nAction: mix cup"), user("Observation: brine"), assistant("Action: focus on it")],
    [user("Wait."), assistant("Action: wait")],
]
PAIRS = [{"prompt": [user(f"Plan {good[-9:]}.")], "chosen": [assistant(good)], "rejected": [assistant(bad)]} for good, bad in [
    ("Step 1: go to kitchen\nStep 2: look around", "Step 1: wait"),
    ("Step 1: focus on the animal", "Step 1: open the door and read the note on the table\nStep 2: wait"),
    ("Step 1: pour water into cup", "Step 1: pour cup into water"),
    ("Step 1: mix the paint\nStep 2: focus on it", "Step 1: eat the paint"),
]]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state a process, and the tests train in different precisions."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def double(tokenizer):
    return make_model(tokenizer, "float64", tie_word_embeddings=False)


def reference_log_prob(model, messages, tokenizer):
    """log pi of all that the assistant says, the plain way: full logits of one row, one target after the other."""
    ids, targets = tokenize(messages, tokenizer, "test")
    model.set_attn_implementation("sdpa")
    logits = model(torch.tensor([ids])).logits[0]
    assert logits.dtype == torch.float64
    total = torch.zeros((), dtype=torch.float64)
    for i in range(1, len(ids)):
        if targets[i]:
            total = total + torch.log_softmax(logits[i - 1], -1)[ids[i]]
    return total, sum(targets)


def gradients(model, loss=None) -> dict:
    if loss is not None:
        model.zero_grad()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(loss, grads, expected_loss, expected_grads, atol=1e-9):
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-6, atol=atol, msg=name)


def of_lengths(*lengths) -> list:
    """Rows of so many tokens that begin unlike, for plan_epoch."""
    return [[(range(10_000 * i, 10_000 * i + -(-n // common.SHARED)), n)] for i, n in enumerate(lengths)]


def micro_batches(rows, micros):
    """The first plan_epoch of these rows that has that many micro-batches."""
    for micro_tokens in range(1, 10_000):
        [plan] = plan_epoch(rows, len(rows), micro_tokens, 1, 0, 0)
        if len(plan) == micros:
            return plan
    raise AssertionError(f"no plan of {micros} micro-batches")


@pytest.mark.parametrize("micros", [1, 4])
def test_sft_loss_equals_reference(double, tokenizer, micros):
    results = [reference_log_prob(double, talk, tokenizer) for talk in TALKS]
    expected = -sum(lp for lp, _ in results) / sum(n for _, n in results)
    expected_grads = gradients(double, expected)

    rows = [tokenize(talk, tokenizer, "test") for talk in TALKS]
    plan, wrapped, total = micro_batches(trie_paths([[row] for row in rows]), micros), target_log_probs(double), 0.0
    double.zero_grad()
    target_tokens = sum(sum(targets) for _, targets in rows)
    for micro in plan:
        loss = sft.sft_loss(wrapped(**pack([rows[i] for i in micro], CPU)), target_tokens)
        loss.backward()
        total += loss.item()
    assert_same(total, gradients(double), expected.item(), expected_grads)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micros", [1, 4])
def test_dpo_loss_equals_reference(double, tokenizer, micros, share):
    frozen = make_model(tokenizer, "float64", seed=1, tie_word_embeddings=False)
    expected, margins = torch.zeros((), dtype=torch.float64), []
    for pair in PAIRS:
        margin = torch.zeros((), dtype=torch.float64)
        for side, sign in (("chosen", 1), ("rejected", -1)):
            messages = pair["prompt"] + pair[side]
            with torch.no_grad():
                ref, _ = reference_log_prob(frozen, messages, tokenizer)
            margin = margin + sign * BETA * (reference_log_prob(double, messages, tokenizer)[0] - ref)
        margins.append(margin.item())
        expected = expected - torch.log(1 / (1 + torch.exp(-margin))) / len(PAIRS)
    expected_grads = gradients(double, expected)

    pairs = [tuple(tokenize(p["prompt"] + p[side], tokenizer, "test") for side in ("chosen", "rejected")) for p in PAIRS]
    plan = micro_batches(trie_paths(pairs, share), micros)
    wrapped, reference, total, seen = target_log_probs(double), target_log_probs(frozen), 0.0, {}
    double.zero_grad()
    for micro in plan:
        with torch.no_grad():
            ref = dpo.pair_log_probs(reference, [pairs[i] for i in micro], share, CPU)
        policy = dpo.pair_log_probs(wrapped, [pairs[i] for i in micro], share, CPU)
        losses, chosen, rejected = dpo.dpo_loss(*policy.unbind(1), *ref.unbind(1), BETA)
        (losses.sum() / len(pairs)).backward()
        total += losses.sum().item() / len(pairs)
        seen |= dict(zip(micro, (chosen - rejected).tolist(), strict=True))
    # with a mask the CPU's attention keeps a float32 for the backward pass, whatever the weights are
    assert_same(total, gradients(double), expected.item(), expected_grads, atol=1e-6 if share else 1e-9)
    assert [seen[i] for i in range(len(pairs))] == pytest.approx(margins, rel=1e-6)


def test_reference_log_probs_are_those_of_the_model(double, tokenizer):
    pairs = [tuple(tokenize(p["prompt"] + p[side], tokenizer, "test") for side in ("chosen", "rejected")) for p in PAIRS]
    for micro_tokens, share in ((64, True), (100_000, True), (64, False), (100_000, False)):
        args = dpo.Args(micro_tokens=micro_tokens, share_prefix=share)
        out = dpo.log_probs_without_gradient(target_log_probs(double), pairs, args, Accelerator(cpu=True))
        for row, pair in zip(out.tolist(), PAIRS, strict=True):
            expected = [reference_log_prob(double, pair["prompt"] + pair[side], tokenizer)[0].item() for side in ("chosen", "rejected")]
            assert row == pytest.approx(expected, rel=1e-6)


def flex_attention_on_a_cpu(monkeypatch) -> None:
    """Its kernels for training are a GPU's, and it refuses to train here; not compiled, it can."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.mark.parametrize("flex", [False, True], ids=["", "flex"])
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}])
def test_a_shared_prefix_changes_nothing(tokenizer, config, flex, monkeypatch):
    """In float32: log-probabilities of a pair as one sequence with its prompt once are those of two sequences to 1e-5, and so
    are the gradients; for plans, for sides that begin alike, and for conversations of several turns."""
    model = make_model(tokenizer, "float32", seed=3, **config)
    assert can_pack(model)
    flex_attention_on_a_cpu(monkeypatch)

    def talk(*turns):
        return tokenize([{"role": ["user", "assistant"][i % 2], "content": t} for i, t in enumerate(turns)], tokenizer, "test")

    pairs = [(talk("Find a plant.", "Step 1: go to the greenhouse"), talk("Find a plant.", "Step 1: go outside, and wait for the rain")),
             (talk("u" * 80, "a"), talk("u" * 80, "b " * 60)),
             (talk("Task", "look", "A pot.", "take it", "Done."), talk("Task", "look", "A pot.", "go away", "Well.", "wait")),
             (talk("Task", "same"), talk("Task", "same")), (talk("one", "x"), talk("other", "y"))]
    saved = [sum(len(ids) for ids, _ in pair) - pack(pair, CPU)["ids"].numel() for pair in pairs]
    assert all(saved[:4]) and saved[2] > len(talk("Task", "look")[0]), "sides that differ late share their first turns"
    assert saved[3] == len(pairs[3][0][0]), "and sides that are the same all of it"
    weights, results = torch.tensor([0.7, -1.3]), []
    for share in (True, False):
        model.zero_grad()
        with torch.compiler.set_stance("force_eager"):
            values = dpo.pair_log_probs(target_log_probs(model, flex=flex and share), pairs, share, CPU)
            (values @ weights).sum().backward()
        results.append((values.detach(), [p.grad.clone() for p in model.parameters()]))
    (shared, shared_grads), (separate, separate_grads) = results
    torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)
    for one, two in zip(shared_grads, separate_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flex", [False, True], ids=["", "flex"])
def test_rows_share_what_they_begin_with(tokenizer, flex, monkeypatch):
    """Rows that begin alike, at several depths, the same row twice and one that another begins with: losses and gradients are
    those of rows alone, to 1e-5 in float32, also where the model's window is shorter than what is shared."""
    flex_attention_on_a_cpu(monkeypatch)
    draw = random.Random(0)
    [a, b, c, d] = ([draw.randrange(4, 500) for _ in range(n)] for n in (70, 40, 33, 90))
    rows = [a + b + c, a + b + d, a + d, b + c, a + b + c, a + b, a[:20] + d, d, a + b + d[:50] + c]
    rows = [(ids, [False] * 5 + [True] * (len(ids) - 5)) for ids in rows]
    for window in ({}, {"kind": "mistral", "sliding_window": 32}):
        model, results = make_model(tokenizer, "float32", seed=3, **window), []
        for share in (True, False):
            model.zero_grad()
            batch = pack(rows, CPU, share)
            with torch.compiler.set_stance("force_eager"):
                values = target_log_probs(model, flex=flex and share)(**batch)
                (values * torch.sin(batch["owners"] + 1.0)).sum().backward()
            results.append((batch["ids"].numel(), values.detach(), [p.grad.clone() for p in model.parameters()]))
        (tokens, shared, shared_grads), (every, separate, separate_grads) = results
        # a, b, c, d, d, b, c, d, d, d[:50], c and up to 15 tokens that differ from the end of a node on
        assert every == sum(len(ids) for ids, _ in rows) and tokens < 0.75 * every
        torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)
        for one, two in zip(shared_grads, separate_grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_rows_that_begin_alike_are_planned_together():
    """What a plan counts for a micro-batch is what packing makes of it, and rows of one kind meet in it."""
    draw = random.Random(1)
    kinds = [[draw.randrange(500) for _ in range(200)] for _ in range(4)]
    rows = [(kinds[i % 4] + [draw.randrange(500) for _ in range(draw.randint(10, 90))], None) for i in range(32)]
    rows = [(ids, [False] * 200 + [True] * (len(ids) - 200)) for ids, _ in rows]
    paths, shortest = trie_paths([[row] for row in rows]), sum(len(ids) for ids, _ in rows) - 7 * 4 * 192
    for processes, budget in ((4, 10_000), (1, 1000), (2, 500)):
        [plan] = plan_epoch(paths, 32, budget, processes, 0, 0)
        packed = [pack([rows[i] for i in micro], CPU)["ids"].numel() for micro in plan]
        assert max(packed) <= budget
        if budget >= 1000:
            assert sum(packed) == shortest and all(len({i % 4 for i in micro}) == 1 for micro in plan)
    draw = [[draw.randrange(4) for _ in range(draw.randint(1, 60))] for _ in range(64)]  # and where beginnings are short
    rows = [(ids, [True] * len(ids)) for ids in draw]
    [plan] = plan_epoch(trie_paths([rows[i : i + 2] for i in range(0, 64, 2)]), 32, 150, 2, 0, 0)
    assert all(pack([s for i in micro for s in rows[2 * i : 2 * i + 2]], CPU)["ids"].numel() <= 150 for micro in plan)


def test_dpo_loss_by_hand():
    four = [torch.tensor([v], dtype=torch.float64) for v in (-10.0, -12.0, -11.0, -9.0)]
    loss, chosen, rejected = dpo.dpo_loss(*four, beta=0.5)
    assert chosen.item() == 0.5 and rejected.item() == -1.5  # 0.5 (-10 + 11), 0.5 (-12 + 9)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-2.0))), rel=1e-12)
    same = torch.tensor([-3.0])
    assert dpo.dpo_loss(same, same, same, same, 0.1)[0].item() == pytest.approx(math.log(2))


def test_a_process_without_rows_takes_part(double):
    """Zero loss and a zero gradient for every parameter, as the processes' collective needs."""
    double.zero_grad()
    log_probs = target_log_probs(double)(**pack([], CPU))
    assert sft.sft_loss(log_probs, 5).item() == 0
    sft.sft_loss(log_probs, 5).backward()
    assert all(p.grad is not None and not p.grad.any() for p in double.parameters())


@pytest.mark.parametrize("packed", [True, False])
def test_packing_changes_nothing(double, tokenizer, packed):
    """Rows in one sequence, and one after the other with the model's own attention."""
    rows = [tokenize(talk, tokenizer, "test") for talk in TALKS]
    expected = torch.cat([target_log_probs(double, packed)(**pack([row], CPU)) for row in rows])
    together = target_log_probs(double)(**pack(rows, CPU))
    torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12)


def test_packing_with_a_sliding_window(tokenizer):
    """Models whose layers see the last tokens only: rows and pairs in one sequence are what they are alone."""
    model = make_model(tokenizer, "float64", kind="mistral", sliding_window=16)
    talks = [TALKS[0][:3] + [assistant(text)] for text in ("Action: wait1", "Action: look around and wait")]
    pair = tuple(tokenize(talk, tokenizer, "test") for talk in talks)
    assert len(pair[0][0]) > 3 * 16 and can_pack(model)
    packed = dpo.pair_log_probs(target_log_probs(model), [pair], True, CPU)
    expected = [reference_log_prob(model, talk, tokenizer)[0].item() for talk in talks]
    assert packed[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_pack():
    """By hand; what sequences have in common is counted in steps of 16 tokens."""
    begin = list(range(100, 118))
    sequences = [(begin + [1, 2], [False] * 18 + [True] * 2), (begin[:16] + [9], [False] * 15 + [True] * 2), ([7, 8], [False, True])]
    out = pack(sequences, CPU)
    assert out["ids"].tolist() == [begin + [1, 2] + [9] + [7, 8]]
    assert out["positions"].tolist() == [[*range(20), 16, 0, 1]]
    segments = out["segments"]
    assert segments.own == [20, 1, 2] and segments.cuts == [16, 4, 1, 2] and segments.seen == [[0, 1], [0, 2], [3]]
    targets = list(zip(*(out[k].tolist() for k in ("sources", "labels", "owners")), strict=True))
    assert targets == [(17, 1, 0), (18, 2, 0), (14, 115, 1), (15, 9, 1), (21, 8, 2)]
    apart = pack(sequences, CPU, share_prefix=False)
    assert apart["ids"].tolist() == [begin + [1, 2] + begin[:16] + [9] + [7, 8]] and apart["segments"].seen == [[0], [1], [2]]


@pytest.mark.parametrize("total, warmup_ratio", [(100, 0.03), (17, 0.1), (10, 0.0), (1, 0.03), (3, 1.0)])
def test_learning_rate(total, warmup_ratio):
    peak, warmup = 1e-5, math.ceil(total * warmup_ratio)
    for step in range(total):
        lrs = {shape: learning_rate(step, total, peak, warmup_ratio, shape) for shape in ("cosine", "linear", "constant")}
        if step < warmup:
            assert set(lrs.values()) == {peak * (step + 1) / warmup}
        else:
            done = (step - warmup) / (total - warmup)
            assert lrs["cosine"] == pytest.approx(peak * math.cos(math.pi * done / 2) ** 2, rel=1e-9)
            assert lrs["linear"] == pytest.approx(peak * (1 - done)) and lrs["constant"] == peak
        assert lrs["cosine"] > 0


def test_learning_rate_shape_is_checked():
    with pytest.raises(InputError, match="triangle.*cosine"):
        learning_rate(0, 10, 1.0, 0.0, "triangle")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_plan_epoch(processes):
    lengths, budget = [(37 * i) % 90 + 10 for i in range(50)], 200
    rows = of_lengths(*lengths)
    steps = plan_epoch(rows, 16, budget, processes, 7, 1)
    assert [sum(map(len, step)) for step in steps] == [16, 16, 16, 2]
    assert sorted(i for step in steps for micro in step for i in micro) == list(range(50)), "each row exactly once"
    for step in steps:
        assert len(step) % processes == 0, "as many micro-batches for every process"
        for micro in step:
            assert not micro or sum(lengths[i] for i in micro) <= budget
    assert steps == plan_epoch(rows, 16, budget, processes, 7, 1)
    orders = {str(plan_epoch(rows, 16, budget, processes, seed, epoch)) for seed in (7, 8) for epoch in (1, 2)}
    assert len(orders) == 4, "another order for another seed or epoch"


def test_plan_epoch_batches_do_not_depend_on_the_machine():
    rows = of_lengths(*((37 * i) % 90 + 10 for i in range(50)))
    plans = [plan_epoch(rows, 8, budget, processes, 0, 0) for budget in (10, 200, 10_000) for processes in (1, 2, 8)]
    batches = [[sorted(i for micro in step for i in micro) for step in plan] for plan in plans]
    assert all(b == batches[0] for b in batches)


def test_a_row_above_the_budget_is_alone():
    assert plan_epoch(of_lengths(500, 3, 3), 3, 10, 1, 0, 0) in ([[[0], [1, 2]]], [[[0], [2, 1]]])
    assert plan_epoch(of_lengths(5, 4, 3), 3, 0, 1, 0, 0) == [[[0], [1], [2]]], "a budget of nothing: every row alone"


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "talks.jsonl", [{"messages": talk} for talk in TALKS])


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl", ("step", "loss"))]


def assert_loads(folder, base):
    """The final directory holds all that the next stage and a server need, in the base model's dtype."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert model.dtype == before.dtype and model.config.use_cache
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)), "it has learnt"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert not (folder.parent / f"{folder.name}.partial").exists() and (folder / "README.md").exists()
    ids = tokenizer.apply_chat_template(TALKS[0][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_sft_overfits_four_rows(tmp_path, tiny_model, talks):
    out = tmp_path / "sft"
    sft.main(sft.Args(model=tiny_model, data=str(talks), out=str(out), batch_size=4, micro_tokens=64, lr=1e-2, epochs=25, limit=4,
                      gradient_checkpointing=True))
    assert len(losses(out)) == 25 and losses(out)[-1] < 0.3 * losses(out)[0]
    assert_loads(out, tiny_model)


def test_dpo_learns_which_is_better(tmp_path, tokenizer, preferences):
    base, out = save_model(tmp_path / "base", tokenizer, dtype="bfloat16", tie_word_embeddings=False), tmp_path / "mpo"
    dpo.main(dpo.Args(model=str(base), data=str(preferences), out=str(out), batch_size=2, micro_tokens=256, lr=3e-3, epochs=10,
                      warmup_ratio=0.1))
    rows = read_rows(out / "metrics.jsonl", ("loss", "reward_accuracy", "reward_margin"))
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=2e-2) and abs(rows[0]["reward_margin"]) < 0.1, "it starts as its reference"
    assert len(rows) == 20 and rows[-1]["reward_accuracy"] == rows[-2]["reward_accuracy"] == 1.0
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["reward_margin"] > 0
    assert_loads(out, base)


def test_long_rows_are_counted_and_left_out(tmp_path, tiny_model, tokenizer, capsys):
    talks = [*TALKS, [user("long " * 200), assistant("Action: wait")]]
    data, limit = write_jsonl(tmp_path / "rows.jsonl", [{"messages": t} for t in talks]), 150
    short = [tokenize(t, tokenizer, "")[0] for t in talks if len(tokenize(t, tokenizer, "")[0]) <= limit]
    assert 0 < len(short) < len(talks)
    rows, _ = sft.load_rows(sft.Args(data=str(data), max_length=limit), tokenizer)
    assert [ids for ids, _ in rows] == short
    assert f"{len(talks) - len(short)} rows" in capsys.readouterr().out
    with pytest.raises(InputError, match="max_length"):
        sft.load_rows(sft.Args(data=str(data), max_length=3), tokenizer)

    pairs = [*PAIRS, {**PAIRS[0], "rejected": [assistant("Step 1: wait\n" * 200)]}]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert len(dpo.load_pairs(dpo.Args(data=str(data), max_length=400), tokenizer)[0]) == len(PAIRS)
    assert "1 pairs" in capsys.readouterr().out
    assert len(dpo.load_pairs(dpo.Args(data=str(data), limit=2), tokenizer)[0]) == 2


def wait_for(condition, seconds=120.0):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, "nothing happened in time"
        time.sleep(0.005)
    return found


@pytest.mark.parametrize("script, processes", [("02_sft.py", 1), ("04_dpo.py", 1), ("04_dpo.py", 2)])
def test_killed_training_goes_on(tmp_path, tiny_model, talks, preferences, script, processes):
    """Killed in the middle and started again, it ends as if it had not been: bit for bit, or to 1e-6 on two processes."""
    data, rows = (talks, TALKS) if script == "02_sft.py" else (preferences, PAIRS)
    epochs = 12 if processes == 1 else 30  # long enough to be hit in the middle
    args = [script, "--model", tiny_model, "--data", data, "--batch_size", 1 if processes == 1 else 4, "--lr", 1e-3, "--epochs", epochs,
            "--save_steps", 1, "--warmup_ratio", 0.1]
    env = {} if processes == 1 else {"ACCELERATE_USE_CPU": "true"}
    if processes > 1:
        args = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *args, "--precision", "fp32"]
    check_run(*args, "--out", tmp_path / "whole", env=env)

    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    process = start_script(*map(str, args), "--out", str(out), **env)
    try:
        wait_for(lambda: (partial / "state.json").exists() or process.poll() is not None)
    finally:
        for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            p.kill()
        process.wait()
    step, total = json.loads((partial / "state.json").read_text())["step"], epochs * (len(rows) if processes == 1 else 1)
    assert 0 < step < total and not out.exists(), "killed in the middle"

    assert f"going on from step {step} of {total}" in check_run(*args, "--out", out, env=env)
    whole, resumed = load_file(tmp_path / "whole" / "model.safetensors"), load_file(out / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) if processes == 1 else (whole[k] - resumed[k]).abs().max() < 1e-6 for k in whole)
    assert losses(out) == (losses(tmp_path / "whole") if processes == 1 else pytest.approx(losses(tmp_path / "whole"), abs=1e-6))
    assert not partial.exists()


@pytest.mark.parametrize("change", ["settings", "data", "model"])
def test_training_starts_over_when_something_changed(tmp_path, tokenizer, talks, monkeypatch, change):
    """A checkpoint of other settings, other rows or another base model is not gone on from."""
    base, data, steps = save_model(tmp_path / "base", tokenizer), tmp_path / "rows.jsonl", []
    data.write_text(talks.read_text())
    args = sft.Args(model=str(base), data=str(data), out=str(tmp_path / "sft"), batch_size=2, epochs=2, save_steps=1)
    step = sft.common.Training.step

    def until_three(run, done, metrics):
        steps.append(done)
        step(run, done, metrics)
        if done == 3 and len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sft.common.Training, "step", until_three)
    with pytest.raises(KeyboardInterrupt):
        sft.main(args)
    if change == "settings":
        args.lr *= 2
    elif change == "data":
        write_jsonl(data, [{"messages": talk} for talk in TALKS[:4]])
    else:
        weights = load_file(base / "model.safetensors")
        save_file({k: v * 1.1 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    sft.main(args)
    assert steps == [1, 2, 3, *range(1, 5 if change == "data" else 7)]
    assert len(losses(tmp_path / "sft")) == len(steps) - 3


def test_training_that_goes_wrong_stops(tmp_path, tiny_model, talks):
    """Before the weights are lost, with the step and its rows, and the last good checkpoint is kept."""
    args = sft.Args(model=tiny_model, data=str(talks), out=str(tmp_path / "sft"), batch_size=1, lr=1e30, epochs=5, save_steps=1)
    with pytest.raises(InputError, match=r"gradient's norm nan at step 2: lower --lr, or look at rows \d of"):
        sft.main(args)
    saved = json.loads((tmp_path / "sft.partial" / "state.json").read_text())
    assert saved["step"] == 1 and (tmp_path / "sft.partial" / "step-1").is_dir() and not (tmp_path / "sft").exists()
    assert [row["step"] for row in read_rows(tmp_path / "sft.partial" / "metrics.jsonl")] == [1]


def test_a_loss_that_explodes_stops_training():
    run = sft.common.Training.__new__(sft.common.Training)
    run.log, run.partial = [{"loss": 0.5 + 0.01 * i} for i in range(12)], "runs/x.partial"
    run.check(13, 5.8, 1.0, [1])
    with pytest.raises(InputError, match="loss is 5.95 .* step 13.*rows 3, 7 of"):
        run.check(13, 5.95, 1.0, [7, 3])


@pytest.mark.parametrize("merge, precision", [(True, "fp32"), (False, "bf16")])
def test_lora(tmp_path, tokenizer, preferences, merge, precision):
    """Adapters alone are trained; merged, the result is a whole model; alone, it is what peft loads."""
    peft = pytest.importorskip("peft")
    base, out = save_model(tmp_path / "base", tokenizer, dtype="bfloat16"), tmp_path / "mpo"
    dpo.main(dpo.Args(model=str(base), data=str(preferences), out=str(out), batch_size=2, lr=1e-2, epochs=10, lora_rank=4, lora_merge=merge,
                      precision=precision))
    rows = read_rows(out / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3), "it starts as its reference"
    assert rows[-1]["reward_accuracy"] == 1.0 and rows[-1]["loss"] < 0.6
    if merge:
        assert_loads(out, base)
        assert not (out / "adapter_config.json").exists()
    else:
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        assert any("lora_B" in name and p.abs().max() > 0 for name, p in loaded.named_parameters())


def test_held_out_tasks_are_not_trained_on(tmp_path, tiny_model, tokenizer):
    """The loss after each epoch is that of the held-out tasks' rows by the model as it is then."""
    rows = [{"task": f"t/{i % 6}", "messages": TALKS[i % len(TALKS)]} for i in range(12)]
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "sft"
    held = sft.common.held_out([r["task"] for r in rows], 0.4)
    assert 0 < sum(held) < 12 and all(held[i] == held[i + 6] for i in range(6))
    sft.main(sft.Args(model=tiny_model, data=str(data), out=str(out), batch_size=4, lr=1e-2, epochs=3, eval_share=0.4, precision="fp32"))
    log = read_rows(out / "metrics.jsonl")
    measured = [r["eval_loss"] for r in log if "eval_loss" in r]
    assert len(measured) == 3 and "eval_loss" in log[-1]
    double = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    results = [reference_log_prob(double, r["messages"], tokenizer) for r, is_held in zip(rows, held, strict=True) if is_held]
    assert measured[-1] == pytest.approx(-sum(lp.item() for lp, _ in results) / sum(n for _, n in results), rel=1e-4)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tracker(tmp_path, tiny_model, talks):
    """--log_with tensorboard: the metrics of every step are in the tracker's own files, beside metrics.jsonl."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "sft"
    sft.main(sft.Args(model=tiny_model, data=str(talks), out=str(out), batch_size=4, epochs=2, log_with="tensorboard"))
    [folder] = {f.parent for f in Path(f"{out}.logs").rglob("events.*") if "hparams" not in f.name and f.parent.name == "sft"}
    read = events.EventAccumulator(str(folder)).Reload()
    assert [v.value for v in read.Scalars("loss")] == pytest.approx(losses(out), rel=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_are_the_same_and_compiled_twice(tokenizer):
    """For one length, and when a second comes for others: other numbers of rows and lengths as small do not make them compile again."""
    from torch._dynamo.utils import counters

    eager, compiled = (target_log_probs(make_model(tokenizer)) for _ in range(2))
    compiled, _ = common.distribute(compiled, Accelerator(cpu=True), sft.Args(compile=True, precision="fp32"))
    draw, frames = random.Random(0), []
    for rows in (3, 2, 4, 1, 5, 2, 6, 7, 8, 9, 10):
        lengths = [draw.randint(20, 60) for _ in range(rows)]
        batch = pack([([draw.randrange(500) for _ in range(n)], [False] * 10 + [True] * (n - 10)) for n in lengths], CPU)
        assert torch.allclose(eager(**batch), compiled(**batch), atol=1e-4)
        frames.append(counters["frames"]["ok"])
    assert frames[-1] == frames[2] > 0


@pytest.mark.parametrize("heads, queries, keys", [((9, 3), 600, 600), ((4, 4), 37, 37), ((6, 2), 150, 500), ((2, 1), 1, 200)])
def test_attention_in_bf16_on_a_cpu(heads, queries, keys):
    """As near to float64 as torch's own, of all queries and of the last ones, with and without heads that share keys."""
    torch.manual_seed(0)
    inputs = [(2 * torch.randn(1, h, n, 64)).bfloat16() for h, n in ((heads[0], queries), (heads[1], keys), (heads[1], keys))]
    grad = torch.randn(1, heads[0], queries, 64).bfloat16()

    def torchs(q, k, v, scale):
        k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def run(attention, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = attention(*leaves, 0.1)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = run(torchs, torch.float64)

    def errors(values):
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(values, exact, strict=True)]

    ours, torchs_own = errors(run(common.cpu_attention(), torch.bfloat16)), errors(run(torchs, torch.bfloat16))
    assert all(x < 0.008 and x < 2 * y for x, y in zip(ours, torchs_own, strict=True)), (ours, torchs_own)


def test_values_of_another_size_than_keys():
    """As with multi-head latent attention: torch's own attention takes these."""
    q, k, v = (torch.randn(1, 2, 20, n).bfloat16().requires_grad_() for n in (16, 16, 24))
    out, _ = common.packed_attention(None, q, k, v, None)
    out.float().sum().backward()
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.detach().float() for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out.detach().float(), expected.transpose(1, 2), atol=0.05, rtol=0.05)
    assert v.grad.shape == v.shape


def test_flex_needs_a_gpu(tmp_path, tiny_model, talks):
    with pytest.raises(InputError, match="--flex needs a GPU"):
        sft.main(sft.Args(model=tiny_model, data=str(talks), out=str(tmp_path / "sft"), flex=True))


def test_deepspeed_is_refused(tmp_path, tiny_model, talks, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="does not run under DeepSpeed"):
        sft.main(sft.Args(model=tiny_model, data=str(talks), out=str(tmp_path / "sft"), epochs=1))


def test_a_full_disk_at_a_checkpoint_is_said(tmp_path, tiny_model, talks, monkeypatch):
    """The checkpoint library wraps what went wrong; `run_stage` makes one line of the OSError inside."""
    import torch.distributed.checkpoint as dcp

    def full(*_, **__):
        raise dcp.api.CheckpointException("failed", {0: (OSError(errno.ENOSPC, "No space left on device"), None)})

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OSError, match="No space left"):
        sft.main(sft.Args(model=tiny_model, data=str(talks), out=str(tmp_path / "sft"), batch_size=2, save_steps=1))


def test_gradients_are_clipped_to_a_norm_or_left_alone():
    for limit, expected in ((1.0, 1.0), (10.0, 5.0), (0.0, 5.0)):
        layer = torch.nn.Linear(2, 1, bias=False)
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        assert common.clip_gradients(layer, Accelerator(cpu=True), limit) == pytest.approx(5.0)
        assert layer.weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


def test_out_is_a_model_or_nothing(tmp_path, tiny_model, talks):
    """The model takes the place of an older one, wherever the slash stands, and never of a run folder or a file."""
    args = {"model": tiny_model, "data": str(talks), "epochs": 1}
    run = tmp_path / "run"
    run.mkdir()
    (run / "rollouts.jsonl").write_text("{}\n")
    for out in (run, run / "rollouts.jsonl"):
        with pytest.raises(InputError, match="is there and is not a model"):
            sft.main(sft.Args(**args, out=str(out)))
    for _ in range(2):
        sft.main(sft.Args(**args, out=f"{run}/sft/"))
        assert (run / "sft" / "model.safetensors").exists() and sorted(p.name for p in run.iterdir()) == ["rollouts.jsonl", "sft"]


def test_settings_that_change_no_result_keep_the_checkpoints(tmp_path, tiny_model, talks, monkeypatch, capsys):
    """Memory was short: with smaller micro-batches it goes on; with another learning rate it says that it starts over."""
    def stop(self, done, *_):
        if done == 3:
            self.append.__exit__()  # as the end of a process would
            raise KeyboardInterrupt

    args = {"model": tiny_model, "data": str(talks), "out": str(tmp_path / "sft"), "epochs": 6, "batch_size": 2, "save_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Training, "check", stop)
        sft.main(sft.Args(**args))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Training, "check", stop)
        sft.main(sft.Args(**args, micro_tokens=100, gradient_checkpointing=True))
    assert "going on from step 2" in capsys.readouterr().out
    sft.main(sft.Args(**args, lr=2e-5))
    assert "starting over" in capsys.readouterr().out and [r["step"] for r in read_rows(tmp_path / "sft" / "metrics.jsonl")][:2] == [1, 2]


def test_a_second_training_on_the_same_folder_is_refused(tmp_path, tiny_model, talks):
    with common.Appender(tmp_path / "sft.partial" / "metrics.jsonl"), pytest.raises(InputError, match="written by another run"):
        sft.main(sft.Args(model=tiny_model, data=str(talks), out=str(tmp_path / "sft"), epochs=1))


def test_logits_that_are_more_than_the_output_layer_are_refused(tmp_path, tokenizer, talks):
    """Cohere's and Granite's are scaled: their log-probabilities would be wrong without a word."""
    model = str(save_model(tmp_path / "granite", tokenizer, kind="granite", logits_scaling=8.0))
    with pytest.raises(InputError, match="granite models do more to their logits"):
        sft.main(sft.Args(model=model, data=str(talks), out=str(tmp_path / "sft"), epochs=1))


@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_accelerate_launch(tmp_path, tiny_model, talks, preferences, script):
    """The command of the README, as far as a machine without a GPU takes it (Accelerate starts one process there)."""
    data = talks if script == "02_sft.py" else preferences
    result = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", script, "--model",
                             tiny_model, "--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "1"],
                            cwd=ROOT, env=script_env(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "out")


@pytest.mark.parametrize("precision", [{"precision": "fp32"}, {"precision": "bf16", "gradient_checkpointing": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_two_processes_train_as_one_does(tmp_path, tiny_model, talks, preferences, script, precision):
    """Sharded over two processes (FSDP2 on gloo). Small micro-batches, an odd number of rows: one has less to do, at times nothing.
    torchrun, because `accelerate launch --cpu --num_processes 2` starts one process only."""
    module, data = (sft, talks) if script == "02_sft.py" else (dpo, preferences)
    settings = {"model": tiny_model, "data": str(data), "batch_size": 3, "micro_tokens": 64, "lr": 1e-3, "epochs": 2, **precision}
    module.main(module.Args(**settings, out=str(tmp_path / "one")))
    args = [str(x) for k, v in {**settings, "out": tmp_path / "two"}.items() for x in (f"--{k}", v)]
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\nif 'RANK' in os.environ: atexit.register(print, 'interpreter ends')\n")
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *args],
                            cwd=ROOT, env=script_env(ACCELERATE_USE_CPU="true", PYTHONPATH=str(tmp_path)), capture_output=True, text=True,
                            timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "interpreter ends" not in result.stdout, "there a thread of gloo may abort one of the two, at times"
    exact = precision["precision"] == "fp32"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4 if exact else 0.02)
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() and all((one[k] - two[k]).abs().max() < (1e-4 if exact else 0.02) for k in one)
