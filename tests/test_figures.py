"""The prompts and requests have the structure of the paper's figures 7 to 13 (appendix E) and of
its section 5.2, as tests/figures.json describes them."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from conftest import CORRIDOR, stage, write_jsonl

from common import DATA, PLAN_POSITIONS, Episode, Prompts, Reply, RolloutConfig, environment

ev = stage("05_eval")
FIGURES = json.loads(Path(__file__).with_name("figures.json").read_text())
ENVIRONMENTS = sorted(FIGURES["agent"])
TASK = "Boil some tin"
PLAN = "Step 1: go to where tin may be\nStep 2: Action: heat it"
EXAMPLE = "An example of a solved task"
WROTE = " On we go.\nAction: walk on"  # what the agent writes
SAW = "You see nothing."
HINT = re.compile(r"for example|such as|usually|\binstead\b", re.IGNORECASE)


class Recorder:
    """A model that keeps what it is asked and always answers `text`."""

    def __init__(self, text: str, continues: bool = False):
        self.text = text
        self.continues = continues
        self.requests: list[list[dict]] = []

    async def ask(self, messages, *_):
        self.requests.append(list(messages))
        return Reply(self.text, 1, 1)


def prompts_of(env: str, name: str | None = None) -> Prompts:
    """The environment's prompts with a one-shot example of one line."""
    prompts = Prompts(env, name)
    prompts.examples = {"*": EXAMPLE}
    return prompts


def requests_of(env, plan, position="instruction", continues=False) -> list[list[dict]]:
    """The first two requests of an episode, from the class that plays all episodes."""
    actions = []

    async def session(method, argument):
        if method == "reset":
            return TASK
        actions.append(argument)
        return SAW, 0.0, False, False

    model = Recorder(WROTE, continues)
    config = RolloutConfig(prompts_of(env), 0.0, 64, 0, 0, max_steps=2, plan_position=position)
    job = {"task": "boil/0", "plan": plan, "rollout": 0}
    row = asyncio.run(Episode(session, model, environment(CORRIDOR), job, config).play())
    assert actions == ["walk on"] * 2 and row["format_errors"] == 0, "the agent's own actions only"
    return model.requests


def sentences(lines: list[str]) -> int:
    """How many sentences and clauses the lines have; what stands in quotation marks has none."""
    text = "\n".join(re.sub(r"^\d+\. ", "", line) for line in lines)
    return len(re.findall(r"[.:;?!](?=\s|$)", re.sub(r'"[^"]*"', "Q", text)))


def check_structure(messages: list[dict], figure: dict, without: tuple = ()) -> None:
    """The messages have the roles and the parts of the figure, in its order, and nothing else."""
    assert [message["role"] for message in messages] == figure["roles"]
    lines = [line for line in messages[0]["content"].splitlines() if line.strip()]
    for name, _, begins, line_count, sentence_count in figure["parts"]:
        if name in without:
            continue
        own = lines[:line_count]
        lines = lines[line_count:]
        assert own and own[0].startswith(begins), name
        if sentence_count is not None:
            assert sentences(own) == sentence_count, name
    assert lines == [], "what no part of the figure has"


@pytest.mark.parametrize("position", [None, *PLAN_POSITIONS])
@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_first_request_of_an_episode(env, position):
    """Figures 10 to 12; the plan stands in it, at its end, at the position "instruction" only."""
    plan = PLAN if position else None
    messages = requests_of(env, plan, position or "instruction")[0][:1]
    without = () if position == "instruction" else ("plan",)
    check_structure(messages, FIGURES["agent"][env], without)
    assert TASK in messages[0]["content"] and EXAMPLE in messages[0]["content"]
    assert messages[0]["content"].endswith(PLAN) == (position == "instruction")


@pytest.mark.parametrize(
    "how, plan, position, continues",
    [
        ("no plan", None, "thought", True),
        ("instruction", PLAN, "instruction", True),
        ("thought, if the server continues a message", PLAN, "thought", True),
        ("thought, as a turn of its own", PLAN, "thought", False),
        ("observation", PLAN, "observation", True),
    ],
)
@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_where_the_plan_stands_in_the_requests(env, how, plan, position, continues):
    """Section 5.2. A plan in the thought is in no earlier turn, and its "Action:" is not played."""
    names = {TASK: "task", PLAN: "plan", "Thought:": "Thought:", "OK.": "OK", SAW: "observation"}
    names[WROTE.strip()] = "reply"
    requests = []
    for messages in requests_of(env, plan, position, continues):
        shown = []
        for number, message in enumerate(messages):
            found = {}
            for text, name in names.items():
                # the task's prompt and its example speak of thoughts, too
                if text in message["content"] and (number > 0 or text in (TASK, PLAN)):
                    found[message["content"].index(text)] = name
            parts = [found[position] for position in sorted(found)]
            shown.append(f"{message['role']}: {', '.join(parts)}")
        requests.append(shown)
    assert requests == FIGURES["requests"][how]


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_requests_of_teacher_and_planner(env):
    """Figures 7 to 9; the planner's is the teacher's without the trajectory and what follows from
    it."""
    prompts = prompts_of(env)
    teacher = prompts.teacher(TASK, "look, and see the stove")
    planner = prompts.planner(TASK)
    check_structure(teacher, FIGURES["teacher"][env])
    check_structure(planner, FIGURES["teacher"][env], without=("procedure", "generality"))
    only_the_teachers = (
        r"This is how the task is solved.*</conversation>\n\n(The meta plan consists.*?\n\n)?"
    )
    trajectory = re.compile(only_the_teachers, re.DOTALL)
    assert trajectory.sub("", teacher[0]["content"]) == planner[0]["content"]
    assert f"\n{TASK}\n</task>\n" in planner[0]["content"]


def test_request_of_the_judge(tmp_path):
    """Figure 13, for each order of the two plans."""
    (tmp_path / "eval").mkdir()
    write_jsonl(tmp_path / "eval" / "plans.jsonl", [{"task": "boil/0", "instruction": TASK}])
    plans = {"sft": {"boil/0": PLAN}, "mpo": {"boil/0": "Step 1: look\nStep 2: heat it"}}
    a = ev.JudgeArgs(out=str(tmp_path), plans=["sft", "mpo"])
    prompt = (DATA / "report" / "judge.txt").read_text().strip()
    model = Recorder("{}")
    for question in ev.open_questions(a, plans, prompt, "judge"):
        asyncio.run(ev.judgement_of(model, question, 10))
        messages = model.requests[-1]
        check_structure(messages, FIGURES["judge"])
        content = messages[0]["content"]
        second = plans["mpo" if question.first == "sft" else "sft"]["boil/0"]
        assert content.index(TASK) < content.index(plans[question.first]["boil/0"])
        assert content.index(plans[question.first]["boil/0"]) < content.index(second)
    assert len(model.requests) == 2 * len(ev.JUDGE_TEMPERATURES)


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_hinted_prompts_have_more(env):
    """`hints/` is a whole set of prompts, which has what no figure has."""
    hinted = prompts_of(env, "hints")
    plain = prompts_of(env)
    shown = hinted.agent_text + hinted.planner_text + hinted.teacher_text
    assert HINT.search(shown)
    assert not HINT.search(plain.agent_text + plain.planner_text + plain.teacher_text)
    with pytest.raises(AssertionError):
        without = ("procedure", "generality")
        check_structure(hinted.planner(TASK), FIGURES["teacher"][env], without=without)
    for slot in ("{example}", "{task}", "{plan_line}"):
        assert slot in hinted.agent_text
    assert "{task}" in hinted.planner_text and "{conversation}" in hinted.teacher_text
