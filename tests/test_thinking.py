"""Models that think before they answer: what servers send, what they are told, what is counted."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from bench.stub_server import completion
from conftest import CORRIDOR, stage
from test_scoring import few_retries, jobs_of, play, tasks_of  # noqa: F401

import common
from common import STOP, InputError, Prompts

seed = stage("01_seed_plans")
score = stage("03_sample_score")
ev = stage("05_eval")


def answer(text: str | None, finish: str | None = "stop", **fields) -> tuple[int, str]:
    """The answer of a server whose message has more `fields`."""
    body = completion(text, prompt_tokens=7, completion_tokens=3)
    [choice] = body["choices"]
    choice["finish_reason"] = finish
    choice["message"] |= fields
    return 200, json.dumps(body)


def ask(url: str, setting: str | None = None, times: int = 1, **options) -> list[common.Reply]:
    messages = [{"role": "user", "content": "Hi"}]

    async def several():
        with common.open_model("m", url, SimpleNamespace(concurrency=1), setting) as model:
            return [await model.ask(messages, **options) for _ in range(times)]

    return asyncio.run(several())


LOOK = "Action: look"


@pytest.mark.parametrize(
    "sent, text, cut_off",
    [
        # thinking in a field of its own
        (answer(LOOK, reasoning_content="Action: wait"), LOOK, False),
        (answer(LOOK, reasoning="Action: wait"), LOOK, False),
        (answer(LOOK, "length", reasoning="Action: wait"), LOOK, False),
        (answer(None, "length", reasoning_content="Action: wait"), "", True),
        (answer("\n\n", "length", reasoning="Action: wait"), "", True),
        (answer("Action: wait", "length", reasoning="Action: wait"), "", True),
        # hidden
        (answer("", "length"), "", True),
        (answer(None, "length"), "", True),
        (answer(None, "stop"), "", False),
        (answer(None, None), "", False),
        # between tags
        (answer(f"<think>Action: wait</think>{LOOK}", None), LOOK, False),
        (answer(f"<think>Action: wait</think>{LOOK}", "length"), LOOK, False),
        (answer("<think>\nAction: wait", "length"), "", True),
        (answer("<think>\nAction: wait", None), "", True),
    ],
)
def test_replies_of_servers(chat_server, sent, text, cut_off):
    server = chat_server(lambda messages, body: sent)
    [reply] = ask(server.url)
    assert (reply.text, reply.cut_off) == (text, cut_off)


def test_a_chat_template_that_opens_the_thinking(chat_server):
    """Its replies have no opening tag. Once that is known, one without tags that ended at the token
    limit is thinking."""
    sent = [
        answer(f"Action: wait\n</think>\n{LOOK}"),
        answer("Action: wait\nI go on", "length"),
        answer(LOOK),
        answer(LOOK, "length", reasoning="Hm."),
    ]
    server = chat_server(lambda messages, body: sent[len(server.requests) - 1])
    replies = ask(server.url, times=4)
    assert [r.text for r in replies] == [LOOK, "", LOOK, LOOK]
    assert [r.cut_off for r in replies] == [False, True, False, False]


@pytest.mark.parametrize(
    "rest, requests",
    [
        (f"\nObservation: a lamp.</think>\n{LOOK}", 5),
        (None, 4),  # the model thinks no more: that is found out once
    ],
)
def test_a_stop_string_in_thinking_that_the_template_opened(chat_server, rest, requests):
    """A reply without a closing tag is asked for again without stop strings."""

    def reply(messages, body):
        if len(server.requests) == 1:
            return f"Hm.\n</think>\n{LOOK}"
        if rest is None:
            return LOOK
        thought = "I check: Action: wait?"
        return thought if "stop" in body else thought + rest

    server = chat_server(reply)
    replies = ask(server.url, times=3, stop=STOP)
    assert [reply.text for reply in replies] == [LOOK] * 3
    assert len(server.requests) == requests


@pytest.mark.parametrize("finish, text", [("stop", LOOK), ("length", "")])
def test_an_answer_in_the_field_for_thinking(chat_server, finish, text):
    """Some servers put it there if the model was told not to think."""
    server = chat_server(lambda messages, body: answer(None, finish, reasoning_content=LOOK))
    [reply] = ask(server.url, "off", stop=STOP)
    assert (reply.text, reply.cut_off) == (text, finish == "length")
    assert len(server.requests) == 1


@pytest.mark.parametrize("finish, requests", [("stop", 2), ("length", 1)])
def test_a_stop_string_in_the_thinking(chat_server, finish, requests):
    """The model is asked again without stop strings, unless it came to the token limit."""

    def reply(messages, body):
        if "stop" in body:
            return answer("<think>\nThere will be", finish)
        return f"<think>\nThere will be\nObservation: a lamp.</think>\n{LOOK}"

    server = chat_server(reply)
    [said] = ask(server.url, stop=STOP)
    assert said.text == ("" if finish == "length" else LOOK)
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    "setting, effort, tokens, stops",
    [
        (None, None, 0, True),
        ("off", "none", 0, True),
        ("on", "medium", 0, False),
        ("low", "low", 0, False),
        ("on:4096", "medium", 4096, False),
        ("high:100", "high", 100, False),
    ],
)
def test_what_a_server_is_told(chat_server, setting, effort, tokens, stops):
    server = chat_server(lambda messages, body: LOOK)
    ask(server.url, setting, max_tokens=64, stop=STOP)
    [body] = server.requests
    assert body["max_tokens"] == 64 + tokens and ("stop" in body) == stops
    assert body.get("reasoning_effort") == effort
    if effort is None:
        assert "chat_template_kwargs" not in body
        return
    variables = body["chat_template_kwargs"]
    assert variables["enable_thinking"] is variables["thinking"] is (effort != "none")
    assert variables.get("reasoning_effort") == (None if effort == "none" else effort)


def test_vllm_is_not_told_none(chat_server):
    """Old versions refuse it, and gpt-oss cannot be off."""
    server = chat_server(lambda messages, body: LOOK)
    server.owner = "vllm"
    ask(server.url, "off")
    ask(server.url, "on")
    off, on = server.requests
    assert off["chat_template_kwargs"]["enable_thinking"] is False
    assert "reasoning_effort" not in off and on["reasoning_effort"] == "medium"


@pytest.mark.parametrize("setting", ["maybe", "on:", "on:x", "on:-1", "none ", ":100", "100"])
def test_settings_that_cannot_be_used(setting):
    with pytest.raises(InputError, match="thinking .*must be off, on or an effort"):
        common.parse_thinking(setting)


@pytest.mark.parametrize(
    "main, args",
    [
        (seed.main, seed.Args(thinking="maybe")),
        (score.main, score.Args(agent_thinking="maybe")),
        (score.main, score.Args(plan_thinking="maybe", check=True)),
        (score.explore, score.ExploreArgs(agent_thinking="maybe")),
        (ev.main, ev.Args(teacher_thinking="maybe")),
        (ev.judge, ev.JudgeArgs(thinking="maybe")),
        (ev.write_plan, ev.PlanArgs(plan_thinking="maybe", text="Wait.")),
    ],
)
def test_stages_refuse_a_bad_setting_at_once(main, args):
    with pytest.raises(InputError, match="--[a-z_]*thinking maybe: must be off, on"):
        main(args)


def test_the_setting_is_in_the_fingerprints():
    def agent(setting):
        a = score.Args(env=CORRIDOR, agent_thinking=setting)
        return common.agent_fingerprint(a, "m", Prompts(CORRIDOR))

    def plans(setting, **more):
        return ev.plans_fingerprint(ev.Args(env=CORRIDOR, **more), setting)

    settings = (None, "off", "on", "on:4096")
    assert len({agent(setting) for setting in settings}) == 4
    assert len({plans("gpt", teacher_thinking=setting) for setting in settings}) == 4
    assert len({plans("mpo", plan_thinking=setting) for setting in settings[1:]}) == 3
    assert plans("mpo") == plans("mpo", plan_thinking="off", teacher_thinking="on")


def test_thinking_is_no_part_of_the_history(chat_server):
    """A reply that ends while the agent thinks is a step without an action, and is counted."""

    def reply(messages, body):
        if len(messages) == 3:
            return answer("Thought: let me see.\n<think>\nHm. Action: dance", "length")
        return "<think>\nHm. Action: dance\n</think>\nThought: on.\nAction: walk on"

    server = chat_server(reply)
    [[row], _] = play(server.url, jobs_of(tasks_of()[:1]), max_steps=3)
    said = [text for text, _ in row["steps"]]
    walk = "Thought: on.\nAction: walk on"
    assert said == [walk, "Thought: let me see.", walk]
    assert row["thinking_cut_off"] == row["format_errors"] == 1
    assert [m["content"] for m in server.requests[-1]["messages"][1::2]] == said[:2]


def test_the_teacher_is_cut_off(chat_server):
    """A plan that was thought but not written is none; the next temperature is tried."""
    plan = common.plan_reply("Step 1: walk on")

    def reply(messages, body):
        if body["temperature"] < 1:
            return answer(f"<think>\n{plan}", "length")
        return f"<think>\n{common.plan_reply('Step 1: wait')}\n</think>\n{plan}"

    server = chat_server(reply)
    messages = [{"role": "user", "content": "Hi"}]

    def asked(temperatures) -> tuple[str, str | None]:
        a = seed.Args(temperatures=temperatures)
        model = common.Model("m", server.url)
        return asyncio.run(seed.ask_teacher(model, messages, "find-lamp/0", {"walk"}, a))

    assert asked([0.0, 0.7]) == ("", seed.CUT_OFF) and "--max_tokens" in seed.CUT_OFF
    assert asked([0.0, 1.0]) == ("Step 1: walk on", None)
