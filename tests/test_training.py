"""Training, without the scripts: packing, losses and gradients beside float64 references, schedule
and micro-batches."""

import copy
import itertools
import math
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, stage, write_jsonl

import common
from common import (
    Example,
    InputError,
    Sequence,
    epoch_schedule,
    learning_rate,
    pack,
    target_log_probs,
    tokenize,
)

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


def example(*sequences) -> Example:
    """Of (ids, mask) each."""
    return Example([Sequence(*sequence) for sequence in sequences], task="t", line=1)


def as_rows(talks, tokenizer) -> list[Example]:
    return [example(tokenize(talk, tokenizer, "test")) for talk in talks]


def as_pairs(pairs, tokenizer) -> list[Example]:
    examples = []
    for pair in pairs:
        chosen = tokenize(pair["prompt"] + pair["chosen"], tokenizer, "test")
        rejected = tokenize(pair["prompt"] + pair["rejected"], tokenizer, "test")
        examples.append(example(chosen, rejected))
    return examples


def sides_alone(model, pairs, tokenizer):
    """(P, 2): log pi of chosen and rejected, each side alone, as in `log_prob_alone`."""
    values = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            values.append(log_prob_alone(model, pair["prompt"] + pair[side], tokenizer)[0])
    return torch.stack(values).view(-1, 2)


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


def choose(model, rows: list[Example], **settings) -> str:
    """The way of computing rows that is measured to be right for these."""
    a = sft.Args(model="base", data="rows", **{"precision": "fp32", **settings})
    common.choose_packing(model, rows, a)
    return model.packing


# ---- chat templates ------------------------------------------------------------------------------


def template(user: str, assistant: str, ask: str, end: str = "") -> str:
    """A chat template, from Jinja's text of a user's message, of an assistant's, of the generation
    prompt, and of the end of a conversation that is not to be continued."""
    return (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{user}{{% else %}}{assistant}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{ask}{{% else %}}{end}"
        "{% endif %}"
    )


USER = "<|im_start|>user{{ '\n' + m.content }}<|im_end|>{{ '\n' }}"
ASK = "<|im_start|>assistant{{ '\n' }}"
PHI = "<|user|>{{ '\n' + m.content }}<|end|>{{ '\n' }}"
ASK_PHI = "<|assistant|>{{ '\n' }}"
# of a reply <think>THOUGHT</think>ANSWER, or ANSWER alone
THOUGHT = "{{ m.content.split('</think>')[0].split('<think>')[1] if '<think>' in m.content }}"
ANSWER = "{{ m.content.split('</think>')[-1] }}"
NO_SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}"
NO_THOUGHT = "<think>{{ '\n\n' }}</think>{{ '\n\n' }}"

CHATML_LIKE = template(USER, f"{ASK}{{{{ m.content }}}}<|im_end|>{{{{ '\n' }}}}", ASK)
QWEN3 = template(
    USER,
    f"{ASK}{{% if loop.last %}}<think>{{{{ '\n' }}}}{THOUGHT}{{{{ '\n' }}}}</think>{{{{ '\n\n' }}}}"
    f"{{% endif %}}{ANSWER}<|im_end|>{{{{ '\n' }}}}",
    f"{ASK}{NO_SWITCH}{NO_THOUGHT}{{% endif %}}",
)
R1 = template(
    "<|user|>{{ m.content }}",
    f"<|assistant|>{ANSWER}{{{{ eos_token }}}}",
    "<|assistant|><think>{{ '\n' }}",
)
FORGETS_THOUGHTS = template(
    USER,
    f"{ASK}{{% if loop.last %}}{{{{ m.content }}}}{{% else %}}{ANSWER}{{% endif %}}<|im_end|>",
    ASK,
)
ALTERNATES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}"
    "{% elif (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + CHATML_LIKE
)
PARTS = "{% for part in m.content %}{{ part.text }}{% endfor %}"  # content is a list of parts

# name: (chat template, what the model writes before its answer, the end of the last reply, whether
# an episode becomes a sequence per reply)
TEMPLATES = {
    "ChatML": (CHATML_LIKE, "", "<|im_end|>", False),
    "Llama 3": (
        "<s>" + CHATML_LIKE.replace("m.content", "m.content | trim"),
        "",
        "<|im_end|>",
        False,
    ),
    "Mistral": (
        template("[INST] {{ m.content }}[/INST]", " {{ m.content }}</s>", ""),
        " ",
        "</s>",
        False,
    ),
    "date and tools": (
        "{{ strftime_now('%Y') }}{% if tools is not none %}{{ tools | length }}{% endif %}"
        + CHATML_LIKE,
        "",
        "<|im_end|>",
        False,
    ),
    "Phi 3": (
        template(
            PHI, f"{ASK_PHI}{{{{ m.content }}}}<|end|>{{{{ '\n' }}}}", ASK_PHI, "{{ eos_token }}"
        ),
        "",
        "<|end|>\n<|endoftext|>",
        False,
    ),
    "end token at the end only": (
        template(PHI, f"{ASK_PHI}{{{{ m.content + '\n' }}}}", ASK_PHI, "{{ eos_token }}"),
        "",
        "\n<|endoftext|>",
        True,
    ),
    "no end token": (
        template("User: {{ m.content }}{{ '\n' }}", "Bot: {{ m.content }}{{ '\n' }}", "Bot:"),
        " ",
        "<|endoftext|>",
        True,
    ),
    "gpt-oss": (
        template(
            "<|start|>user<|message|>{{ m.content }}<|end|>",
            "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
            "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}",
            "<|start|>assistant",
        ),
        "<|channel|>final<|message|>",
        "<|return|>",
        True,
    ),
    "R1": (R1, "</think>\n\n", "<|endoftext|>", True),
    "Qwen 3": (QWEN3, "", "<|im_end|>", True),
    "Qwen 3 without a switch": (
        QWEN3.replace(NO_SWITCH, "{% if false %}"),
        "<think>\n\n</think>\n\n",
        "<|im_end|>",
        True,
    ),
    "Nemotron 3": (
        template(
            USER,
            f"{ASK}<think></think>{{{{ m.content }}}}<|im_end|>{{{{ '\n' }}}}",
            f"{ASK}{NO_SWITCH}<think></think>{{% else %}}<think>{{{{ '\n' }}}}{{% endif %}}",
        ),
        "",
        "<|im_end|>",
        False,
    ),
    "DeepSeek V3.1": (
        template(
            "<|user|>{{ m.content }}",
            "<|assistant|></think>{{ m.content }}<|im_end|>",
            "<|assistant|>{% if thinking %}<think>{% else %}</think>{% endif %}",
        ),
        "",
        "<|im_end|>",
        False,
    ),
    "thought": (R1.replace("<think>", "<thought>"), "</thought>\n\n", "<|endoftext|>", True),
    "forgets thoughts": (FORGETS_THOUGHTS, "", "<|im_end|>", False),
}


def with_template(tokenizer, text: str):
    """The tokenizer with another chat template, and an EOS that ends no message of ChatML."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    other.eos_token = "<|endoftext|>"
    return other


def asked(messages, tokenizer) -> str:
    """What the model reads when a server asks it for the next reply, thinking off."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False, thinking=False
    )


def seen_and_written(sequences, tokenizer) -> list[tuple[str, str]]:
    """(text before it, text) of each run of targets."""
    found = []
    for ids, mask in sequences:
        place = 0
        for target, run in itertools.groupby(mask):
            end = place + len(list(run))
            if target:
                found.append((tokenizer.decode(ids[:place]), tokenizer.decode(ids[place:end])))
            place = end
    return sorted(found, key=lambda pair: len(pair[0]))


@pytest.mark.parametrize("text, lead, end, apart", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_trained_is_what_the_model_sees(tokenizer, text, lead, end, apart):
    """The text before each reply is what the model is asked with, of a plan and of an episode."""
    tokenizer = with_template(tokenizer, text)
    plan = TALKS[1]
    answer = plan[1]["content"]
    sequence = tokenize(plan, tokenizer, "")
    expected = [(asked(plan[:1], tokenizer), lead + answer + end)]
    assert seen_and_written([sequence], tokenizer) == expected

    episode = [*TALKS[0], *TALKS[1]]
    sequences = common.tokenize_replies(episode, tokenizer, "")
    assert len(sequences) == (3 if apart else 1)
    found = seen_and_written(sequences, tokenizer)
    assert len(found) == 3
    for i, (before, written) in enumerate(found):
        assert before == asked(episode[: 2 * i + 1], tokenizer)
        assert written.startswith(lead + episode[2 * i + 1]["content"])
        if apart or i == 2:
            assert written.endswith(end)
        else:
            assert end.startswith(written.removeprefix(lead + episode[2 * i + 1]["content"]))
            assert written.endswith(">")


@pytest.mark.parametrize(
    "name, says",
    [
        ("R1", r"at reply 1 the model has '<think>\\n</think>.*later reads 'Action: activate"),
        ("Qwen 3", r"at reply 1 the model has '<think>\\n\\n</think>.*later reads 'Action: act"),
        ("gpt-oss", r"at reply 1 the model has 'return\|>', and later reads 'end\|>"),
        ("no end token", r"at reply 1 the model has '<\|endoftext\|>', and later reads '\\nUser"),
    ],
)
def test_why_a_conversation_is_not_one_sequence(tokenizer, name, says):
    with pytest.raises(InputError, match=f"rows.jsonl:3: the chat template rewrites .*{says}"):
        tokenize(TALKS[0], with_template(tokenizer, TEMPLATES[name][0]), "rows.jsonl:3")


def test_thinking_in_earlier_replies(tokenizer):
    """It is trained where it was written, and later replies do not see it."""
    tokenizer = with_template(tokenizer, FORGETS_THOUGHTS)
    thought = "<think>Hm.</think>Action: look"
    episode = [user("Boil."), assistant(thought), user("A pot."), assistant("Action: wait")]
    found = seen_and_written(common.tokenize_replies(episode, tokenizer, ""), tokenizer)
    assert [written for _, written in found] == [f"{thought}<|im_end|>", "Action: wait<|im_end|>"]
    assert found[1][0] == asked(episode[:3], tokenizer) and "Hm." not in found[1][0]


SYSTEM = {"role": "system", "content": "Be brief."}
THINKS = assistant("<think>Hm.</think>\n\nAction: look")


@pytest.mark.parametrize(
    "text, messages, says",
    [
        (ALTERNATES, [SYSTEM, *TALKS[1]], "refuses a conversation of system, user, assistant: No "),
        (ALTERNATES, [user("a"), *TALKS[0]], r"of user, user, assistant, user, \.\.\.: Roles must"),
        (ALTERNATES, TALKS[0][1:], "Roles must alternate"),
        (CHATML_LIKE, TALKS[0][1:], "must not begin with the assistant"),
        ("{{ tools | length }}" + CHATML_LIKE, TALKS[1], "refuses .*: object of type 'NoneType'"),
        ("{{ messages[0].name.first }}", TALKS[1], "refuses .*has no attribute 'name'"),
        (CHATML_LIKE.replace("{{ m.content }}", PARTS), TALKS[1], "leaves out .*'Action: teleport"),
        (QWEN3, [user("a"), THINKS], "leaves out or changes .*remove <think>"),
        (R1, [user("a"), THINKS], "leaves out or changes .*remove <think>"),
    ],
)
def test_conversations_that_a_chat_template_refuses(tmp_path, tokenizer, text, messages, says):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(InputError, match=f"{data}:1: .*{says}"):
        sft.load_rows(sft.Args(data=str(data)), with_template(tokenizer, text))


@pytest.mark.parametrize("name", ["Qwen 3", "no end token"])
def test_a_sequence_per_reply_equals_replies_alone(tokenizer, name):
    """Log-probabilities of all replies of an episode, whose shared tokens are computed once, and
    the loss's number of targets."""
    tokenizer = with_template(tokenizer, TEMPLATES[name][0])
    sequences = common.tokenize_replies([*TALKS[0], *TALKS[3]], tokenizer, "")
    assert len(sequences) == 4
    model = float64_model(tokenizer)
    expected = []
    for ids, mask in sequences:
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        own = [log_probs[i - 1, ids[i]] for i in range(1, len(ids)) if mask[i]]
        expected.append(sum(own))
    rows = [example(*sequences), example(*sequences[:2])]
    assert choose(model, rows) == "rows"
    log_probs, owners = target_log_probs(model, rows, share_prefix=True)
    sums = torch.zeros(6, dtype=torch.float64).index_add(0, owners, log_probs)
    expected = torch.stack([*expected, *expected[:2]])
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-10)
    assert sft.count_targets(rows) == len(log_probs)
    together = sum(len(sequence.ids) for sequence in sequences)
    assert common.lengths(rows[:1]) == [together]
    assert common.lengths(rows[:1], True)[0] < 0.8 * together


# ---- rows that a model cannot read ---------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, config, tokens, highest, says",
    [
        ("gpt2", {}, 16, 59, None),
        (
            "gpt2",
            {},
            17,
            0,
            "rows.jsonl:7: 17 tokens, and the model has 16 positions: --max_length 16",
        ),
        ("opt", {"word_embed_proj_dim": 32}, 16, 59, None),
        ("opt", {"word_embed_proj_dim": 32}, 17, 0, "rows.jsonl:7: 17 tokens.* 16 positions"),
        ("gptj", {"rotary_dim": 4}, 16, 59, None),
        ("gptj", {"rotary_dim": 4}, 17, 0, "rows.jsonl:7: 17 tokens.* 16 positions"),
        ("llama", {}, 17, 59, None),  # positions are computed
        ("mpt", {}, 17, 59, None),
        ("llama", {}, 16, 60, "rows.jsonl:7: the tokenizer gives token 60, .* of 0 to 59: take"),
        ("gpt2", {}, 16, 60, "rows.jsonl:7: the tokenizer gives token 60"),
    ],
)
def test_rows_beyond_the_tables_of_a_model(tokenizer, kind, config, tokens, highest, says):
    """It is refused where the model would fail, and nowhere else."""
    config = {"max_position_embeddings": 16, "vocab_size": 60, "pad_token_id": 0, **config}
    model = make_model(tokenizer, kind=kind, **config, eos_token_id=1)
    ids = [highest] * tokens
    row = Example([Sequence([1, 2], [False, True]), Sequence(ids, [True] * tokens)], "task", 7)
    position_ids = torch.arange(tokens)[None]
    if kind == "mpt":  # has none
        inputs = {"input_ids": torch.tensor([ids])}
    else:
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": position_ids}
    if says is None:
        common.check_rows(model, [row], "rows.jsonl")
        model(**inputs)
        return
    with pytest.raises(InputError, match=says):
        common.check_rows(model, [row], "rows.jsonl")
    with pytest.raises((IndexError, RuntimeError)):
        model(**inputs)


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
    """Log-probabilities and gradients in float64, with and without gradient checkpointing. The rows
    are longer than the window; a soft cap of 0.5 matters."""
    model = float64_model(tokenizer, kind=kind, **config)
    if kind == "gemma2":
        model.set_attn_implementation("eager")  # SDPA ignores its soft cap
    eager = model.config._attn_implementation == "eager"  # which has a softmax in float32
    expected = torch.stack([log_prob_alone(model, talk, tokenizer)[0] for talk in TALKS])
    weights = torch.sin(1 + torch.arange(len(TALKS), dtype=torch.float64))
    expected_grads = gradients(model, expected @ weights)

    rows = as_rows(TALKS, tokenizer)
    assert choose(model, rows) == packing
    common.wrap_layers(model, sft.Args(gradient_checkpointing=checkpointing))
    log_probs, owners = target_log_probs(model, rows)
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
    rows = as_rows(talks, tokenizer)
    assert choose(exact, rows) == choose(model, rows, precision="bf16")
    with torch.no_grad():
        expected, _ = target_log_probs(exact, rows)
        alone = torch.cat([target_log_probs(model, [row])[0] for row in rows])
        packed, _ = target_log_probs(model, rows)
    assert packed.dtype == torch.float32
    assert (packed - expected).abs().mean() < 1.2 * (alone - expected).abs().mean() < 0.1


@pytest.mark.parametrize(
    "kind, packing, config",
    [
        ("gpt_oss", "masks", {**WINDOW, "head_dim": 8, "num_local_experts": 4}),
        ("mamba", "single", {"state_size": 4}),
    ],
)
def test_rows_of_other_layers(tokenizer, capsys, kind, packing, config):
    """Those that look at no position ids, and those that mix all tokens: in float32."""
    model = make_model(tokenizer, kind=kind, **config)
    expected = torch.stack([log_prob_alone(model, talk, tokenizer)[0] for talk in TALKS])
    expected_grads = gradients(model, expected.sum())
    rows = as_rows(TALKS, tokenizer)
    assert choose(model, rows) == packing
    said = capsys.readouterr().out
    assert ("forward passes an epoch in place of 1" in said) == (packing == "single")
    log_probs, owners = target_log_probs(model, rows)
    together = torch.zeros_like(expected).index_add(0, owners, log_probs)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)
    assert_same(gradients(model, together.sum()), expected_grads, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_shared_prompt_changes_nothing(tokenizer, kind):
    """Log-probabilities and gradients of pairs whose prompt is computed once, in float64: plans,
    long prompts, trajectories with targets inside the shared prefix, equal sides, a side that
    begins like the other, and sides without a common token."""
    long_prompt = {
        "prompt": [user("u" * 80)],
        "chosen": [assistant("a")],
        "rejected": [assistant("b " * 60)],
    }
    pairs = as_pairs([*PAIRS, TRAJECTORIES, long_prompt], tokenizer)
    first, mask = pairs[0].sequences[0]
    pairs += [
        example((first, mask), (first, mask)),
        example((first, mask), (first[:-3], mask[:-3])),
        example((first, mask), ([i + 1 for i in first], mask)),
    ]
    model = float64_model(tokenizer, seed=3, kind=kind)
    results = []
    assert choose(model, pairs) == "rows"
    for packing, share in (("mask", False), ("rows", False), ("rows", True)):
        common.set_packing(model, packing)
        values = dpo.pair_log_probs(model, pairs, share)
        grads = gradients(model, (values @ torch.tensor([0.7, -1.3], dtype=torch.float64)).sum())
        results.append((values.detach(), grads))
    for values, grads in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=1e-10)
        # with a mask, SDPA on a CPU keeps float32 for its backward pass
        assert_same(grads, results[0][1], atol=1e-5)

    tokens = [sum(len(side.ids) for side in pair.sequences) for pair in pairs]
    assert common.lengths(pairs) == tokens
    both = zip(tokens, common.lengths(pairs, True), strict=True)
    shared = [before - after for before, after in both]
    assert min(shared[:6]) > 4
    assert shared[4] > len(tokenize(TURNS[:2], tokenizer, "")[0]), "a target is in the shared part"
    assert shared[6:] == [len(first) - 1, len(first) - 4, 0], "each side adds a token at least"


def test_pack():
    """By hand: prompt 10 11, replies 1 2 and 1 3 whose first token is a target of both sides."""
    mask = [False, False, True, True]
    pair = example(([10, 11, 1, 2], mask), ([10, 11, 1, 3], mask))
    ids, positions, targets, segments = pack([example(([7, 8], [False, True])), pair], True)
    assert ids == [7, 8, 10, 11, 1, 2, 3] and positions == [0, 1, 0, 1, 2, 3, 3]
    assert targets == [(0, 8, 0), (3, 1, 1), (4, 2, 1), (3, 1, 2), (4, 3, 2)]
    assert segments == [(0, 2), (0, 4), (3, 1)]
    ids, positions, targets, segments = pack([pair])
    assert ids == [10, 11, 1, 2, 10, 11, 1, 3] and positions == [0, 1, 2, 3] * 2
    assert targets == [(1, 1, 0), (2, 2, 0), (5, 1, 1), (6, 3, 1)]
    assert segments == [(0, 4), (0, 4)]


def test_a_process_without_rows_takes_part(tokenizer):
    """Zero loss and a zero gradient for every parameter, as collectives over processes need."""
    model = float64_model(tokenizer)
    choose(model, as_pairs(PAIRS, tokenizer))
    log_probs, _ = target_log_probs(model, [])
    policy = dpo.pair_log_probs(model, [], True)
    losses, _ = dpo.losses_and_metrics(policy, torch.zeros(0, 2), [], dpo.Args(nll=1.0))
    for loss in (sft.sft_loss(log_probs, 5), losses.sum()):
        assert loss.item() == 0
        assert not any(g.any() for g in gradients(model, loss).values())


# ---- losses --------------------------------------------------------------------------------------


def in_micro_batches(lengths, count):
    """The first schedule of one epoch with that many micro-batches."""
    for micro_tokens in range(1, 10_000):
        [micros] = epoch_schedule(lengths, len(lengths), micro_tokens, 1, 0, 0)
        if len(micros) == count:
            return micros
    raise AssertionError(f"no schedule has {count} micro-batches")


@pytest.mark.parametrize("micros", [1, 4])
def test_sft_loss_equals_reference(tokenizer, micros):
    model = float64_model(tokenizer, tie_word_embeddings=False)
    alone = [log_prob_alone(model, talk, tokenizer) for talk in TALKS]
    expected = -sum(log_prob for log_prob, _ in alone) / sum(tokens for _, tokens in alone)
    expected_grads = gradients(model, expected)

    rows = as_rows(TALKS, tokenizer)
    choose(model, rows)
    total = 0
    for micro in in_micro_batches(common.lengths(rows), micros):
        log_probs, _ = target_log_probs(model, [rows[i] for i in micro])
        total += sft.sft_loss(log_probs, sft.count_targets(rows))
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_same(gradients(model, total), expected_grads, atol=1e-9)


@pytest.mark.parametrize("nll", [0.0, 0.3])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micros", [1, 4])
def test_dpo_loss_equals_reference(tokenizer, micros, share, nll):
    model = float64_model(tokenizer, seed=0, tie_word_embeddings=False)
    frozen = float64_model(tokenizer, seed=1, tie_word_embeddings=False)
    policy = sides_alone(model, PAIRS, tokenizer)
    reference = sides_alone(frozen, PAIRS, tokenizer).detach()
    rewards = BETA * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = 0
    for i, pair in enumerate(PAIRS):
        _, tokens = log_prob_alone(model, pair["prompt"] + pair["chosen"], tokenizer)
        loss = -torch.log(1 / (1 + torch.exp(-margins[i]))) - nll * policy[i, 0] / tokens
        expected += loss / len(PAIRS)
    expected_grads = gradients(model, expected)

    pairs = as_pairs(PAIRS, tokenizer)
    choose(model, pairs)
    choose(frozen, pairs)
    a = dpo.Args(beta=BETA, nll=nll)
    total = 0
    for micro in in_micro_batches(common.lengths(pairs, share), micros):
        own = [pairs[i] for i in micro]
        policy = dpo.pair_log_probs(model, own, share)
        reference = dpo.pair_log_probs(frozen, own, share).detach()
        losses, _ = dpo.losses_and_metrics(policy, reference, own, a)
        total += losses.sum() / len(pairs)
        _, chosen, rejected = dpo.dpo_loss(*policy.unbind(1), *reference.unbind(1), BETA)
        assert (chosen - rejected).tolist() == pytest.approx(margins[micro].tolist(), rel=1e-9)
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    # with a mask, the CPU's attention keeps a float32 for its backward pass
    assert_same(gradients(model, total), expected_grads, atol=1e-6 if share else 1e-9)


def test_replies_in_the_prompt_are_no_targets(tokenizer):
    """log pi(p|u) is of the plan alone."""
    prompt = [*TURNS[:2], user("And now?")]
    row = {"prompt": prompt, "chosen": [assistant("wait")], "rejected": prompt[:1]}
    ids, mask = dpo.tokenize_side(row, "chosen", tokenizer, "")
    written = tokenizer.decode([i for i, target in zip(ids, mask, strict=True) if target])
    assert written == "wait<|im_end|>"
    with pytest.raises(InputError, match="`rejected` has no assistant message"):
        dpo.tokenize_side(row, "rejected", tokenizer, "")


@pytest.mark.parametrize(
    "more", [{"softcap": 50.0}, {"s_aux": torch.zeros(1)}, {"sliding_window": 3}]
)
def test_attention_that_rows_do_not_have(more):
    layout = SimpleNamespace(segments=[(0, 4)])
    states = torch.zeros(1, 1, 4, 2)
    with pytest.raises(TypeError):
        common.row_attention(None, states, states, states, None, layout=layout, **more)


def test_dpo_loss_by_hand():
    four = [torch.tensor([v], dtype=torch.float64) for v in (-10.0, -12.0, -11.0, -9.0)]
    loss, chosen, rejected = dpo.dpo_loss(*four, beta=0.5)
    assert chosen.item() == 0.5 and rejected.item() == -1.5  # 0.5 (-10 + 11), 0.5 (-12 + 9)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-2.0))), rel=1e-12)
    same = torch.tensor([-3.0])
    assert dpo.dpo_loss(same, same, same, same, 0.1)[0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "micro_tokens, share", [(64, True), (100_000, True), (64, False), (0, False)]
)
def test_reference_log_probs_are_those_of_the_model(tokenizer, micro_tokens, share):
    model = float64_model(tokenizer)
    expected = sides_alone(model, PAIRS, tokenizer).detach()
    pairs = as_pairs(PAIRS, tokenizer)
    choose(model, pairs)
    a = dpo.Args(micro_tokens=micro_tokens)
    run = SimpleNamespace(model=model, a=a, accelerator=Accelerator(cpu=True))
    found = dpo.log_probs_without_gradient(run, pairs, share)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("limit, expected", [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_to_a_norm_or_left_alone(limit, expected):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert common.clip_gradients(layer, limit) == pytest.approx(5.0)
    assert layer.weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


# ---- schedule and micro-batches ------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, warmup_ratio", [(100, 0.03), (17, 0.1), (10, 0.0), (1, 0.03), (3, 1.0)]
)
def test_learning_rate(total, warmup_ratio):
    peak = 1e-5
    warmup = math.ceil(total * warmup_ratio)
    for step in range(total):
        cosine = learning_rate(step, total, peak, warmup_ratio, "cosine")
        linear = learning_rate(step, total, peak, warmup_ratio, "linear")
        constant = learning_rate(step, total, peak, warmup_ratio, "constant")
        if step < warmup:
            assert cosine == linear == constant == peak * (step + 1) / warmup
        else:
            done = (step - warmup) / (total - warmup)
            assert cosine == pytest.approx(peak * math.cos(math.pi * done / 2) ** 2, rel=1e-9)
            assert linear == pytest.approx(peak * (1 - done))
            assert constant == peak
        assert cosine > 0
    with pytest.raises(InputError, match="triangle.*cosine"):
        learning_rate(0, 10, 1.0, 0.0, "triangle")


LENGTHS = [(37 * i) % 90 + 10 for i in range(50)]


def indices(step: list[list[int]]) -> list[int]:
    """The examples of an optimizer step, sorted."""
    return sorted(itertools.chain(*step))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_epoch_schedule(processes):
    budget = 200
    steps = epoch_schedule(LENGTHS, 16, budget, processes, 7, 1)
    assert [len(indices(step)) for step in steps] == [16, 16, 16, 2]
    assert sorted(itertools.chain(*map(indices, steps))) == list(range(50))
    for step in steps:
        assert len(step) % processes == 0, "as many micro-batches for every process"
        tokens = [sum(LENGTHS[i] for i in micro) for micro in step]
        assert max(tokens) <= budget
        per_process = [sum(tokens[rank::processes]) for rank in range(processes)]
        assert len(step) == processes or max(per_process) < 1.3 * min(per_process)
    assert steps == epoch_schedule(LENGTHS, 16, budget, processes, 7, 1)
    orders = []
    for seed, epoch in [(7, 1), (7, 2), (8, 1), (8, 2)]:
        order = epoch_schedule(LENGTHS, 16, budget, processes, seed, epoch)
        assert order not in orders, "another order for another seed or epoch"
        orders.append(order)


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("budget", [10, 200, 10_000])
def test_batches_do_not_depend_on_the_machine(budget, processes):
    schedule = epoch_schedule(LENGTHS, 8, budget, processes, 0, 0)
    expected = epoch_schedule(LENGTHS, 8, 100, 1, 0, 0)
    assert [indices(step) for step in schedule] == [indices(step) for step in expected]


def test_many_rows_are_spread_quickly():
    lengths = [100] * 30_000
    began = time.perf_counter()
    a = SimpleNamespace(micro_tokens=8192)
    mine = common.my_micro_batches(lengths, a, SimpleNamespace(num_processes=1, process_index=0))
    assert sorted(itertools.chain(*mine)) == list(range(30_000)) and len(mine) < 400
    assert time.perf_counter() - began < 5


def test_a_row_above_the_budget_is_alone():
    assert epoch_schedule([500, 3, 3], 3, 10, 1, 0, 0) in ([[[0], [1, 2]]], [[[0], [2, 1]]])
    assert epoch_schedule([5, 4, 3], 3, 0, 1, 0, 0) == [[[0], [1], [2]]], (
        "no budget: every row alone"
    )


def random_row(draw: random.Random) -> Example:
    length = draw.randint(20, 60)
    ids = [draw.randrange(500) for _ in range(length)]
    return example((ids, [False] * 10 + [True] * (length - 10)))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_are_the_same_and_compiled_twice(tokenizer):
    """Once for the first length and once for others; other numbers of rows do not compile again."""
    from torch._dynamo.utils import counters

    eager = make_model(tokenizer)
    compiled = make_model(tokenizer)
    draw = random.Random(0)
    rows = [random_row(draw) for _ in range(4)]
    choose(eager, rows)
    args = sft.Args(compile=True, precision="fp32")
    compiled, _ = common.prepare_model(compiled, Accelerator(cpu=True), args, rows)
    frames = []
    for count in (3, 2, 4, 1, 5, 2, 6, 7, 8, 9, 10):
        batch = [random_row(draw) for _ in range(count)]
        expected, _ = target_log_probs(eager, batch)
        found, _ = target_log_probs(compiled, batch)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        frames.append(counters["frames"]["ok"])
    assert frames[-1] == frames[2] > 0
