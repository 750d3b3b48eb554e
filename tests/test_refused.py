"""Requests that a model's server refuses: of one task, or all of them."""

import asyncio
import json
import re
from types import SimpleNamespace

import pytest
from conftest import CORRIDOR, stage, write_jsonl
from test_eval import TIES, condition, episode, write_run
from test_models import ask
from test_scoring import few_retries, gold, jobs_of, play, tasks_of  # noqa: F401

from common import InputError, Refusals, RequestRefused, is_refused, plan_reply, read_rows
from data.report import tables

seed = stage("01_seed_plans")
score = stage("03_sample_score")
ev = stage("05_eval")

TASKS = tasks_of()
REFUSED = "find-key/1"
FILTER = (400, "The prompt triggered the content management policy.")
STRANGE = (400, "strange_setting is not permitted.")


# ---- what is a refused request -------------------------------------------------------------------


def answer(content=None, **choice) -> tuple[int, str]:
    """A 200 with this content, and more fields of its choice."""
    message = {"role": "assistant", "content": content, "refusal": choice.pop("refusal", None)}
    return body(choices=[{"index": 0, "message": message, "finish_reason": "stop", **choice}])


def body(**fields) -> tuple[int, str]:
    return 200, json.dumps({"id": "0", "object": "chat.completion", "created": 0, **fields})


@pytest.mark.parametrize(
    "reply",
    [
        FILTER,
        (400, "Content Exists Risk"),
        (400, "Input data may contain inappropriate content: check your account"),
        (400, "Conversation roles must alternate"),
        (422, "messages.0: cannot be processed"),
        (403, "Your chosen model requires moderation and your input was flagged"),
        (403, "Content violates usage guidelines. API key ID: k, Failed check: SAFETY_CHECK_TYPE"),
        (451, "censorship_blocked"),
        (500, "input new_sensitive (1026)"),
        answer(finish_reason="content_filter"),
        answer("", finish_reason="content_filter: PROHIBITED_CONTENT"),
        answer(finish_reason="SAFETY"),
        answer(native_finish_reason="RECITATION"),
        answer(refusal="I cannot help with that."),
        answer(finish_reason="content_filter \ud83d"),
        body(choices=[{"index": 0, "finish_reason": "content_filter: PROHIBITED_CONTENT"}]),
        body(choices=[{"index": 0, "finish_reason": "content_filter", "message": None}]),
        body(choices=None, input_sensitive=True, base_resp={"status_code": 1026}),
        body(choices=[], promptFeedback={"blockReason": "PROHIBITED_CONTENT"}),
        body(error={"code": 403, "message": "input was flagged"}),
        body(choices=None, base_resp={"status_msg": "output new_sensitive"}),
    ],
    ids=lambda reply: f"{reply[0]} {reply[1][-40:]}",
)
def test_a_refused_request(chat_server, monkeypatch, reply):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    server = chat_server(lambda messages, body: reply)
    with pytest.raises(RequestRefused) as error:
        ask(server.url)
    assert server.url in str(error.value) and str(error.value).encode()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        (401, "Your key was flagged"),
        (403, "You are not allowed to use this model"),
        (404, "The model is blocked"),
        (400, "API key not valid. Please pass a valid API key."),
        (400, "Your credit balance is too low to access the API"),
        (400, "Model Not Exist"),
        (400, "other/name is not a valid model ID"),
        (429, "flagged as too fast"),
        (502, "upstream connection blocked"),
        body(error={"message": "Provider returned error"}),
        body(error={"message": "upstream connection blocked", "code": 502}),
        body(choices=None, input_sensitive=False, base_resp={"status_msg": "limit of requests"}),
        (200, '[{"error": {"message": "not now"}}]'),
    ],
    ids=lambda reply: f"{reply[0]} {reply[1][-40:]}",
)
def test_an_error_that_is_not_of_one_request(chat_server, monkeypatch, reply):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    with pytest.raises(InputError) as error:
        ask(chat_server(lambda messages, body: reply).url)
    assert not isinstance(error.value, RequestRefused)


def test_what_a_filter_leaves_is_a_reply(chat_server):
    cut = answer("Step 1: walk", finish_reason="content_filter")
    assert ask(chat_server(lambda messages, body: cut).url).text == "Step 1: walk"


# ---- one task, or all ----------------------------------------------------------------------------


def refused(task) -> dict:
    return {"task": task, "reason": "refused: no"}


def test_refused_rows_wait_for_an_answer():
    kept = []
    model = SimpleNamespace(answers=0)
    keep = Refusals(kept.append, model, "abcdefgh")
    for task in "aabh":
        keep(refused(task))
    assert kept == []
    model.answers = 1
    keep({"task": "c"})
    assert [row["task"] for row in kept] == ["a", "a", "b", "h", "c"]
    for task in "defgh":
        keep(refused(task))
    assert len(kept) == 5
    keep.finish()
    assert len(kept) == 10


@pytest.mark.parametrize(
    "tasks, refused_first, answers, said",
    [
        ("abcdefgh", "edcba", 0, "the first 5 tasks were refused: no"),
        ("abcdefgh", "hgfed", 0, None),  # the first ones may still be answered
        ("aabb", "ab", 0, "the first 2 tasks"),
        ("abcdefgh", "edcba", 1, None),
        (range(99), range(29), 1, None),
        (range(99), range(30), 1, "the last 30 tasks"),
    ],
)
def test_a_stage_stops_if_all_is_refused(tasks, refused_first, answers, said):
    kept = []
    keep = Refusals(kept.append, SimpleNamespace(answers=answers), tasks)

    def run():
        for task in refused_first:
            keep(refused(task))

    if said:
        with pytest.raises(InputError, match=said):
            run()
    else:
        run()
    assert kept == []


def test_a_few_tasks_that_are_all_refused():
    keep = Refusals([].append, SimpleNamespace(answers=0), "abc")
    keep(refused("a"))
    with pytest.raises(InputError, match="all 1 tasks were refused"):
        keep.finish()


def test_a_refused_episode(chat_server):
    """It ends with its error and without the reward so far; the others go on."""

    def reply(messages, body):
        if len(messages) == 5 and f"key of corridor {REFUSED[-1]}" in messages[0]["content"]:
            return FILTER
        return gold(messages)

    rows, retries = play(chat_server(reply).url, jobs_of(TASKS))
    assert retries == 0 and len(rows) == len(TASKS)
    for row in rows:
        if row["task"] == REFUSED:
            assert (row["end"], row["reward"], row["success"]) == ("refused", 0.0, False)
            assert "content management" in row["error"] and len(row["steps"]) == 2
            assert row["instruction"].startswith("Find the key")
        else:
            assert row["end"] == "success"


# ---- in all stages -------------------------------------------------------------------------------


class Script:
    """All models: the request of `task` is refused, if it is of the kind `refuses`; all requests of
    the kind `broken` are."""

    def __init__(self):
        self.asked = []  # the kinds of all requests
        self.refuses = None
        self.broken = None

    def __call__(self, messages, body):
        first = messages[0]["content"]
        kind = kind_of(first, body)
        self.asked.append(kind)
        if kind == self.broken:
            return STRANGE
        if kind == self.refuses and f"key of corridor {REFUSED[-1]}" in first:
            return FILTER
        if kind == "thoughts":
            return "\n".join(f"{i + 1}. On." for i in range(first.count("Observation:")))
        if kind == "judge":
            return TIES
        if kind != "agent":
            number = body.get("seed") or 0
            taken = "nothing" if number % 2 else "it"
            steps = f"Step 1: walk on\nStep 2: take {taken}"
            return plan_reply(steps if kind == "teacher" else f"{steps}\nStep 3: wait {number}")
        fails = "nothing" in first or ("plan" not in first and "corridor 2" in first)
        return "Action: dance" if fails else gold(messages)


def kind_of(first: str, body: dict) -> str:
    if "stop" in body:
        return "agent"
    for start, kind in (("Write a plan", "planner"), ("Turn this", "teacher")):
        if first.startswith(start):
            return kind
    return "thoughts" if "Action 1:" in first else "judge"


USUAL = {"env": CORRIDOR, "workers": 1, "concurrency": 1}


def seed_plans(out, url, **more):
    seed.main(seed.Args(**USUAL, out=str(out), teacher="t", teacher_url=url, **more))


def thoughts(out, url):
    seed_plans(out, url, thoughts=True)


def sample_and_score(out, url):
    models = {"planner": "p", "planner_url": url, "agent": "a", "agent_url": url}
    score.main(score.Args(**USUAL, **models, out=str(out), m=3, n=1))


def explore(out, url):
    if not (out / "trajectories.jsonl").exists():
        seed.main(seed.Args(env=CORRIDOR, workers=1, out=str(out), teacher="rules"))
    experts = str(out / "trajectories.jsonl")
    a = score.ExploreArgs(**USUAL, agent="a", agent_url=url, out=str(out), experts=experts)
    score.explore(a)


def evaluate(out, url, plans="none"):
    a = ev.Args(**USUAL, out=str(out), agents=[url], plans=[plans], teacher=url, splits=["train"])
    asyncio.run(ev.evaluate(a))


def greedy_plans(out, url):
    evaluate(out, url, "gpt")


def judge(out, url):
    if not (out / "eval").exists():
        plans = {}
        for setting in ("sft", "mpo"):
            for task in TASKS:
                plans[setting, task] = f"Step 1: {setting} plan"
        conditions = [condition(setting, "seen", TASKS) for setting in ("sft", "mpo")]
        write_run(out, conditions, plans, [])
        path = out / "eval" / "plans.jsonl"
        rows = read_rows(path)
        for row in rows:
            kind, number = row["task"].removeprefix("find-").split("/")
            row["instruction"] = f"Find the {kind} of corridor {number}."
        write_jsonl(path, rows)
    ev.judge(ev.JudgeArgs(out=str(out), judge=url, concurrency=1))


@pytest.mark.parametrize(
    "run, kind, file, count",
    [
        (seed_plans, "teacher", "teacher_plans.jsonl", 1),
        (thoughts, "thoughts", "thoughts.jsonl", 1),
        (sample_and_score, "planner", "plans.jsonl", 3),
        (sample_and_score, "agent", "rollouts.jsonl", 3),
        (explore, "agent", "explore.jsonl", 1),
        (greedy_plans, "planner", "eval/plans.jsonl", 1),
        (evaluate, "agent", "eval/rollouts.jsonl", 1),
        (judge, "judge", "eval/judgements.jsonl", 2),
    ],
)
def test_all_requests_are_refused_then_those_of_one_task(
    tmp_path, chat_server, monkeypatch, capsys, run, kind, file, count
):
    monkeypatch.setattr(ev, "write_report", lambda a: None)
    script = Script()
    url = chat_server(script).url
    out = tmp_path / "run"

    script.broken = kind
    with pytest.raises(InputError, match="the first 5 tasks were refused: .*strange_setting"):
        run(out, url)
    assert 5 <= script.asked.count(kind) < 8 * count
    assert read_rows(out / file) == []

    script.broken = None
    script.refuses = kind
    run(out, url)
    rows = [row for row in read_rows(out / file) if is_refused(row)]
    assert [row["task"] for row in rows] == [REFUSED] * count
    text = rows[0].get("error") or rows[0]["reason"]
    assert "content management policy" in text
    said = f"{count} of {8 * count} [a-z ]+ were refused, the first for {REFUSED}: .*policy"
    assert len(re.findall(said, capsys.readouterr().out)) == 1

    before = len(script.asked)
    run(out, url)
    assert len(script.asked) == before, "a refusal is an answer: nothing is asked again"


def test_refused_tasks_in_results(tmp_path):
    """An episode counts with reward 0, and the tables' notes count it."""
    tasks = ["boil/1", "boil/2"]
    rows = [episode("boil/1", None, 1.0, 2), episode("boil/2", None, 0.0, 2, end="refused")]
    conditions = [condition("none", "seen", tasks), condition("gpt", "seen", tasks)]
    out = write_run(tmp_path, conditions, {("gpt", task): None for task in tasks}, rows)
    path = out / "eval" / "plans.jsonl"
    first, second = read_rows(path)
    write_jsonl(path, [first, second | {"reason": "refused: no"}])
    results, _ = ev.summarise(ev.load_episodes(str(out), conditions), 0, False)
    for result in results:
        assert result["reward"]["mean"] == 0.5 and result["missing"] == 0
        assert result["refused"] == result["ends"]["refused"] == 1
    assert tables.notes(results) == (
        " 2 of 4 episodes were refused by the agent's server and count with reward 0. 1 plans of "
        "'teacher, asked directly' were refused by the planner's server: their tasks were played "
        "without a plan."
    )
