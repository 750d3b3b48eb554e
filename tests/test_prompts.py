"""Prompts: what planner and agent are asked, parsing of replies, and which tokens are trained."""

import itertools
import json
import re
import time

import pytest
from conftest import CHATML, CORRIDOR, make_tokenizer, stage

from common import (
    DATA,
    InputError,
    Prompts,
    number_steps,
    parse_plan,
    parse_reply,
    plan_reply,
    plan_steps,
    split_thinking,
    tokenize,
)

check_plan = stage("01_seed_plans").check_plan
VERBS = {"look", "go", "open", "focus", "move", "use", "repeat", "wait"}


@pytest.mark.parametrize(
    "reply, action",
    [
        ("Thought: the kitchen has water.\nAction: teleport to kitchen", "teleport to kitchen"),
        ("Action: look around", "look around"),
        ("action:look around", "look around"),
        ("**Action:** look around", "look around"),
        ("**Action: look around**", "look around"),
        ("Action: `open door to kitchen`", "open door to kitchen"),
        ('Action: "wait1"  ', "wait1"),
        ("  Action: 'focus on red box'\n", "focus on red box"),
        ("Action: look around\nAction: wait", "look around"),
        ("Action: take apple\nObservation: You take the apple.\nAction: wait", "take apple"),
        ("Thought: no action: yet\nAction: use lamp on water", "use lamp on water"),
        (
            "Action: connect wire terminal 1 to bulb cathode",
            "connect wire terminal 1 to bulb cathode",
        ),
        # the first at the beginning of a line, else the first anywhere
        ("Thought: I go. Action: go to cabinet 1", "go to cabinet 1"),
        ("Thought: I go. Action: go to cabinet 1\nAction: wait", "wait"),
        ("I go.  **Action:** go  Observation: You went.", "go"),
        ("Thought: one Action: Action: wait", "wait"),
        # on the next line
        ("Thought: on.\nAction:\nlook around", "look around"),
        ("Action:  \n\n  look around  \nmore", "look around"),
        ("I choose this Action:\nlook around", "look around"),
        ("Action:\r\nlook around\r\nmore", "look around"),
        ("Action:\nThought: hm.\nAction: wait", "wait"),
        ("Action:\nObservation: You wait.", None),
        # Markdown
        ("**Action:**\nlook around", "look around"),
        ("**Action**: look around", "look around"),
        ("**Action**\n**look around**", "look around"),
        ("### Action: look around", "look around"),
        ("## Action\nlook around", "look around"),
        ("- Action: look around", "look around"),
        ("1. __Action:__ look around", "look around"),
        ("> *Action*: `look around`", "look around"),
        ("Action:\n- look around", "look around"),
        ("Action:\n1. look around", "look around"),
        ("Action:\n```\nlook around\n```", "look around"),
        ("Action: ```text\nlook around\n```", "look around"),
        ("```\nAction: look around\n```", "look around"),
        # other ways to write it
        ("Action 1: look around", "look around"),
        ("Action #1: look around", "look around"),
        ("Action (1): look around", "look around"),
        ("Action:\u00a0look around\u200b", "look around"),
        ("THOUGHT: x ACTION: look around THOUGHT: y", "look around"),
        ("Action: look around<end_of_turn>", "look around"),
        ("Action: <|begin_of_box|>look around<|end_of_box|>", "look around"),
        ("Action：look around", "look around"),
        ("ACTION: click[buy now]", "click[buy now]"),
        ('"Action: look around"', "look around"),
        ("Action: look around<|im_end|>\nuser", "look around"),
        # none
        ("I would look around.", None),
        ("Thought: my last action was bad.", None),
        ("A reaction: none.", None),
        ('I write a line that starts with "Action:" now.', None),
        ("Action:", None),
        ("Action: ``", None),
        ("**Action:**", None),
        ("Action: **", None),
        ("", None),
    ],
)
def test_parse_action(reply, action):
    assert parse_reply(reply)[1] == action


@pytest.mark.parametrize(
    "reply, kept",
    [
        (
            " Thought: a lamp.\nAction: take it \nIt shines.\nAction: wait",
            "Thought: a lamp.\nAction: take it",
        ),
        ("Action: look\n", "Action: look"),
        ("I wonder.\n", "I wonder."),
        ("Action: ``\nmore", "Action: ``\nmore"),
        ("Action:\nlook\nIt shines.\nAction: wait", "Action:\nlook"),
        ("I go. Action: look Observation: It shines.", "I go. Action: look"),
        ("<think>Hm.</think>\nThought: a.\nAction: look\nmore", "Thought: a.\nAction: look"),
        ("Action: look\n<think>\nAction: wait", "Action: look"),
        ("<think>\nAction: wait", ""),
    ],
)
def test_a_reply_is_kept_up_to_its_action(reply, kept):
    assert parse_reply(reply)[0] == kept


ANSWER = "Thought: I look.\nAction: look around\n<meta_plan>\nStep 1: go\n</meta_plan>"
THOUGHTS = """I write "Action: wait" or between <meta_plan> and </meta_plan>, such as
Action: wait
<meta_plan>
Step 1: wait
</meta_plan>
"""
HARMONY = "<|start|>assistant<|channel|>final<|message|>"
TAGS = [
    ("<think>", "</think>"),
    ("<THINK>\n", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<think:x>", "</think:x>"),
    ("<think >", "</think >"),
    ('<details type="reasoning" done="true">', "</details>"),
    ("<chain_of_thought>", "</chain_of_thought>"),
    ("<|think|>", "<|/think|>"),
    ("[REASONING]", "[/REASONING]"),
    ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", f"<|end|>{HARMONY}"),
    ("<|channel|>analysis<|message|>", f"<|end|><|channel|>commentary<|message|>Hm.{HARMONY}"),
    ("<|channel>thought\n", "<channel|>"),
    ("analysisWe look. ", "assistantfinal"),
    ("Here is my thought process:\n", "Here is my response:\n"),
    # thinking that mentions a tag
    ("<think>I close it with </think>, then I ", "</think>"),
    ("<think>I am in <think> still. ", "</think>"),
    ("<think>\n</think>\nNo, wait. ", "</think>"),
    ("Thought: <think>", "</think>"),
    # the chat template opened it
    ("", "</think>"),
    ("Okay.\n", "\n</think>\n\n"),
    ("Okay.\n", "◁/think▷"),
    ("Okay.\n", "[/THINK]"),
]


@pytest.mark.parametrize("opening, closing", TAGS)
def test_thinking_is_neither_plan_nor_action(opening, closing):
    for answer in (ANSWER, f"<answer>{ANSWER}</answer>"):
        reply = f"{opening}{THOUGHTS}{closing}\n{answer}"
        said, action = parse_reply(reply)
        assert said.endswith("I look.\nAction: look around") and "wait" not in said
        assert action == "look around"
        assert parse_plan(reply) == "Step 1: go"
        assert not split_thinking(reply)[1]


@pytest.mark.parametrize("opening", sorted({opening for opening, _ in TAGS[:22]}))
def test_a_reply_that_ends_while_the_model_thinks(opening):
    reply = f"{opening}{THOUGHTS}"
    assert parse_reply(reply) == ("", None) and parse_plan(reply) is None
    assert split_thinking(reply) == ("", True)


@pytest.mark.parametrize(
    "reply, action",
    [
        ("<think>\n\n</think>\n\nAction: look", "look"),
        ("</think>\n\nAction: look", "look"),
        ("<think>Hm.</think>Action: look\n</think>", "look"),  # closed once too often
        ("Thought: I write no <think> here.\nAction: look", "look"),  # a mention
        ("Action: look\n<details>more</details>", "look"),  # nothing was opened
        ("Action: wait\n</think>", None),
        ("<think>Action: wait</think>", None),
    ],
)
def test_what_is_left_of_a_reply_with_thinking(reply, action):
    assert parse_reply(reply)[1] == action
    assert not split_thinking(reply)[1]


@pytest.mark.parametrize(
    "part",
    [
        " ",
        "\n",
        " \n",
        "*",
        "`",
        "action ",
        "Action: ",
        "Action:\n",
        "Action: ```\n",
        "<",
        "<|",
        "<think>",
        "<think>\n",
        "<think a=",
        "</think>",
        "<think></think>x",
        "<|channel|>final",
        "<meta_plan>",
        "step 1",
    ],
)
def test_parsing_takes_linear_time(part):
    """A long reply of one repeated part, behind what may have to be looked at again for each."""
    start = time.time()
    for before in ("", "Action:", "Action: a", "<meta_plan>"):
        reply = before + part * (10_000 // len(part)) + "!"
        parse_reply(reply)
        parse_plan(reply)
    assert time.time() - start < 1


@pytest.mark.parametrize(
    "reply, plan",
    [
        ("<meta_plan>\nStep 1: go\nStep 2: wait\n</meta_plan>", "Step 1: go\nStep 2: wait"),
        ("Here it is:\n<meta_plan>\nStep 1: go\n</meta_plan>\nGood luck!", "Step 1: go"),
        ("<meta_plan>\nStep 1: go\nStep 2: wait", "Step 1: go\nStep 2: wait"),
        ("<meta_plan>\nStep 3: look\nStep 7: wait\n</meta_plan>", "Step 1: look\nStep 2: wait"),
        ("<meta_plan>\n1. look around\n2) wait\n</meta_plan>", "Step 1: look around\nStep 2: wait"),
        ("<Meta Plan>\n step 1 :  look around  \n</Meta Plan>", "Step 1: look around"),
        (
            "<meta_plan>\nStep 1: look around,\n  then wait\n"
            "Step 2: go\n\nGood luck!\n</meta_plan>",
            "Step 1: look around, then wait\nStep 2: go",
        ),
        ("<meta_plan>\n**Step 1:** go\n- Step 2: wait\n</meta_plan>", "Step 1: go\nStep 2: wait"),
        ("<meta_plan>\nStep 1: go\n</meta_plan>\nHere is my response: done", "Step 1: go"),
        ("<workflow>\nStep 1: go\nStep 2: wait\n</workflow>", "Step 1: go\nStep 2: wait"),
        ("Step 1: look around", None),
        ("I write <meta_plan></meta_plan>:\n<meta_plan>\n1. go\n</meta_plan>", "Step 1: go"),
        ("<meta_plan>\nlook around, then wait\n</meta_plan>", None),
        ("<meta_plan></meta_plan>", None),
        ("", None),
    ],
)
def test_parse_plan(reply, plan):
    assert parse_plan(reply) == plan


def test_plan_round_trip():
    steps = ["go to kitchen", "pick up water: the cold one", "wait"]
    plan = number_steps(steps)
    assert parse_plan(plan_reply(plan)) == plan and plan_steps(plan) == steps


@pytest.mark.parametrize(
    "step",
    [
        "go to where the animal may be",
        "focus on the animal",
        "wait 10 steps until the water is above 100 degrees",
        "move the substance to the red box if it is below 50.5 degrees celsius",
        "repeat steps 2 and 3 until it boils",
        "use the thermometer on the substance 3 times",
    ],
)
def test_good_plan_passes(step):
    assert check_plan(number_steps(["look around", step]), VERBS) is None


@pytest.mark.parametrize(
    "step, verb",
    [
        ("Navigate to the kitchen", "go"),
        ("identify the animal", "find"),
        ("pick up the cup", "take"),
        ("Ensure that the water boils", "check"),
    ],
)
def test_synonyms_of_verbs_pass(step, verb):
    assert check_plan(f"Step 1: {step}", {verb}) is None
    assert "verb the environment does not have" in check_plan(f"Step 1: {step}", {"dance"})


@pytest.mark.parametrize(
    "plan, reason",
    [
        ("Step 1: go to cabinet 4", "instance detail.*cabinet 4"),
        ("Step 1: look around\nStep 2: open the fridge (1)", "instance detail.*fridge"),
        ("Step 1: heat the water with the microwave", "verb.*heat"),
        ("Step 1: Click on the search button", "verb.*Click"),
        (number_steps(["look around"] * 21), "too long.*21 steps"),
        ("Step 1: look " + "around and " * 40, "too long.*words"),
        (None, "format"),
        ("", "format"),
    ],
)
def test_plan_faults(plan, reason):
    assert re.search(reason, check_plan(plan, VERBS))


def test_number_of_steps_allowed():
    assert check_plan(number_steps(["look around"] * 21), VERBS, max_steps=21) is None


PROMPT_FOLDERS = [(CORRIDOR, None), (CORRIDOR, "brief")]
for path in sorted(DATA.glob("*/env.py")):
    PROMPT_FOLDERS.append((path.parent.name, None))
    for name in ("brief", "hints"):
        if (path.parent / name).is_dir():
            PROMPT_FOLDERS.append((path.parent.name, name))


@pytest.mark.parametrize("env, folder", PROMPT_FOLDERS)
def test_the_plan_is_in_the_agents_message_only_if_given(env, folder):
    prompts = Prompts(env, folder)
    u = "Your task is to boil tin."
    plan = "Step 1: go to foundry"
    [without] = prompts.agent(u, None, "boil/0")
    [given] = prompts.agent(u, plan, "boil/0")
    assert without["role"] == given["role"] == "user"
    assert plan in given["content"] and plan not in without["content"]
    assert "meta plan" not in without["content"].lower()
    for message in (without, given):
        assert u in message["content"]
        for slot in ("{task}", "{plan_line}", "{example}"):
            assert slot not in message["content"]
    assert given["content"].replace(plan, "").startswith(without["content"])


@pytest.mark.parametrize("env, folder", PROMPT_FOLDERS)
def test_planner_sees_the_task_and_no_trajectory(env, folder):
    [message] = Prompts(env, folder).planner("Your task is to boil tin.")
    assert message["role"] == "user" and "Your task is to boil tin." in message["content"]
    for slot in ("{task}", "{conversation}", "Observation:"):
        assert slot not in message["content"]


def test_text_in_a_slot_is_not_read_as_a_slot():
    """Text from models and environments is data: braces in it stay."""
    prompts = Prompts(CORRIDOR)
    u = "Find {plan_line} and {example}."
    plan = "Step 1: find {task}"
    content = prompts.agent(u, plan, "boil/0")[0]["content"]
    assert u in content and plan in content
    content = prompts.teacher("Find {conversation}.", "Observation: {task}")[0]["content"]
    assert "Find {conversation}." in content and "Observation: {task}" in content


def test_one_example_for_all_types_or_one_each(tmp_path):
    for name in ("planner.txt", "agent.txt"):
        (tmp_path / name).write_text("{example} {task}{plan_line}")
    common_one = {"*": "any", "boil": "boiling"}
    one_each = {"boil": "boiling", "melt": "melting"}

    def shown(examples, task, how=None):
        (tmp_path / "examples.json").write_text(json.dumps(examples))
        return Prompts(CORRIDOR, str(tmp_path), how).agent("u", None, task)[0]["content"]

    assert shown(common_one, "boil/1") == shown(common_one, "melt/1") == "any u"
    assert shown(common_one, "boil/1", "type") == "boiling u"
    assert shown(common_one, "melt/1", "type") == "any u"
    assert shown(one_each, "melt/1") == "melting u"
    assert shown(one_each, "mix/1") == "boiling u"
    with pytest.raises(InputError, match="--examples all: the only value is `type`"):
        shown(common_one, "boil/1", "all")


TALK = [
    {"role": "user", "content": "Your task is to boil water.\n\nStep 1: go to kitchen"},
    {"role": "assistant", "content": "Thought: I need the  stove.\nAction: teleport to kitchen"},
    {"role": "user", "content": "Observation: You teleport to the kitchen. <|im_end|"},
    {"role": "assistant", "content": "Action: activate stove — 100°"},
    {"role": "user", "content": "Observation: The stove is now activated."},
    {"role": "assistant", "content": "Action: wait1"},
]


def trained(tokenizer, talk) -> list[int]:
    ids, targets = tokenize(talk, tokenizer, "test")
    return [token for token, target in zip(ids, targets, strict=True) if target]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_targets_are_what_the_assistant_writes(trim_offsets):
    """Whether or not the tokenizer trims spaces off its offsets."""
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    ids, targets = tokenize(TALK, tokenizer, "test")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    said = "".join(m["content"] + "<|im_end|>" for m in TALK if m["role"] == "assistant")
    assert tokenizer.decode(trained(tokenizer, TALK)) == said
    runs = [target for target, _ in itertools.groupby(targets)]
    assert runs.count(True) == 3, "one run of targets per turn"


def test_a_conversation_that_ends_with_an_observation(tokenizer):
    assert tokenizer.decode(trained(tokenizer, TALK[:3])) == TALK[1]["content"] + "<|im_end|>"
    assert not trained(tokenizer, TALK[:1])


def test_one_bos():
    tokenizer = make_tokenizer(template="{{ bos_token }}" + CHATML, bos="<s>")
    ids, targets = tokenize(TALK, tokenizer, "test")
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert not targets[0] and len(trained(tokenizer, TALK)) == len(trained(make_tokenizer(), TALK))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = CHATML.replace(
        "m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else '...') +"
    )
    with pytest.raises(InputError, match=r"rows\.jsonl:3: .*template"):
        tokenize(TALK, make_tokenizer(template=forgetful), "rows.jsonl:3")
    assert trained(make_tokenizer(template=forgetful), TALK[:2])
