"""Agents with training: exploration and its pairs (ETO), KnowAgent's prompts, WKM's knowledge."""

import os
import re

import pytest
from conftest import CORRIDOR, save_model, stage, write_jsonl

import common
from common import InputError, Prompts, read_rows

seed, score, dpo = stage("01_seed_plans"), stage("03_sample_score"), stage("04_dpo")


def expert(task, steps, reward=1.0, solved=True) -> dict:
    return {
        "task": task,
        "solved": solved,
        "instruction": f"Do {task}." if solved else "",
        "steps": steps,
        "reward": reward,
    }


def tried(task, reward, steps, rollout=0, end="steps") -> dict:
    return {
        "task": task,
        "rollout": rollout,
        "reward": reward,
        "success": reward == 1.0,
        "end": end,
        "steps": steps,
        "fingerprint": "now",
        "instruction": f"Do {task}.",
    }


def said(messages) -> list[str]:
    return [m["content"].removeprefix("Action: ") for m in messages if m["role"] == "assistant"]


def test_trajectory_pairs():
    """Expert against failure, better against worse; never across tasks."""

    def go(*words):
        return [[f"Action: {w}", f"{w} done"] for w in words]

    experts = [expert(t, [["open", "open done"], ["win", ""]]) for t in ("a/1", "a/2", "a/3")]
    experts.append(expert("a/4", [], 0.0, solved=False))
    explored = {
        "a/1": [tried("a/1", 0.0, go("look", "fail"))],
        "a/2": [tried("a/2", 1.0, go("open", "win")), tried("a/2", 1.0, go("win"), 1)],
        "a/3": [
            tried("a/3", 0.2, go("a")),
            tried("a/3", 0.6, go("b"), 1),
            tried("a/3", 0.0, [], 2),
            tried("a/3", 0.0, go("c"), 3, "crash"),
        ],
        "a/4": [tried("a/4", 0.1, go("a")), tried("a/4", 0.7, go("b"), 1)],
    }
    pairs = score.trajectory_pairs(experts, explored, Prompts(CORRIDOR), 0)
    won = ["open", "win"]
    assert [(p["task"], said(p["chosen"]), said(p["rejected"])) for p in pairs] == [
        ("a/1", won, ["look", "fail"]),
        ("a/3", won, ["a"]),
        ("a/3", won, ["b"]),
        ("a/3", ["b"], ["a"]),
        ("a/4", ["b"], ["a"]),
    ]
    for p in pairs:
        [prompt] = p["prompt"]
        assert p["q_chosen"] > p["q_rejected"] and f"Do {p['task']}." in prompt["content"]
        for side in (p["chosen"], p["rejected"]):
            roles = [m["role"] for m in side]
            assert roles == (["assistant", "user"] * 9)[: len(side)] and len(side) % 2
    assert pairs[0]["chosen"][1] == {"role": "user", "content": "Observation: open done"}


def test_worse_trajectories_are_cut_and_experts_think():
    """Five turns after the length of the better one."""
    long = tried("a/1", 0.0, [[f"Action: {i}", "no"] for i in range(20)])
    e = expert("a/1", [["open", "o"], ["win", ""]]) | {"thoughts": ["It is shut.", "Now."]}
    [pair] = score.trajectory_pairs([e], {"a/1": [long]}, Prompts(CORRIDOR), 0)
    assert said(pair["rejected"]) == [str(i) for i in range(7)]
    assert said(pair["chosen"]) == [
        "Thought: It is shut.\nAction: open",
        "Thought: Now.\nAction: win",
    ]


def test_only_the_agents_turns_are_targets(tmp_path, tokenizer, capsys):
    """Of both sides of a pair of trajectories; the turns that they share are packed once. Pairs
    longer than the limit are counted and left out."""

    def talk(*words):
        return score.turns([[f"Action: {w}", f"{w}!"] for w in words], 0)

    prompt = [{"role": "user", "content": "Do it."}]
    rows = [
        {
            "task": "a/1",
            "prompt": prompt,
            "chosen": talk("open", "take cup", "win"),
            "rejected": talk("open", "wait"),
        },
        {
            "task": "a/2",
            "prompt": prompt,
            "chosen": talk("win"),
            "rejected": talk(*["look around"] * 40),
        },
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    [(pair, *_)] = dpo.load_pairs(dpo.Args(data=str(data), max_length=200), tokenizer)
    for (ids, targets), side in zip(pair, ("chosen", "rejected"), strict=True):
        text = tokenizer.decode([i for i, t in zip(ids, targets, strict=True) if t])
        assert text == "".join(f"Action: {w}<|im_end|>" for w in said(rows[0][side]))
    shared = os.path.commonprefix([ids for ids, _ in pair])
    assert "Observation: open!" in tokenizer.decode(shared)
    assert "take" not in tokenizer.decode(shared)
    assert "skipped 1 pairs longer than --max_length 200" in capsys.readouterr().out


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "seeded"
    seed.main(seed.Args(env=CORRIDOR, out=str(out), teacher="rules", limit=3, workers=1))
    return out


def test_the_experts_conversation_succeeds_again(seeded):
    """The actions that the agent is trained on, replayed, solve the task with the same
    observations."""
    world = common.environment(CORRIDOR)()
    for row in read_rows(seeded / "agent_sft.jsonl"):
        world.reset(row["task"])
        for action, told in zip(said(row["messages"]), [*row["messages"][2::2], None], strict=True):
            observation, _, done, success = world.step(action)
            assert done == (told is None)
            assert done or told["content"] == f"Observation: {observation}"
        assert success


def test_explore(seeded, tmp_path, tokenizer, chat_server, capsys):
    """The agent solves one task of three; the others pair with the expert; 04_dpo.py trains."""
    gold = {r["instruction"]: r for r in read_rows(seeded / "trajectories.jsonl")}
    tasks = [r["task"] for r in gold.values()]
    wins = {tasks[0]}

    def reply(messages, body):
        e = gold[max(gold, key=messages[0]["content"].rfind)]
        known = e["task"] in wins
        return f"Action: {e['steps'][len(messages) // 2][0] if known else 'touch the trap'}"

    server, out = chat_server(reply), tmp_path / "eto1"
    a = score.ExploreArgs(
        env=CORRIDOR,
        workers=1,
        agent="scripted",
        agent_url=server.url,
        out=str(out),
        experts=str(seeded / "trajectories.jsonl"),
    )
    score.explore(a)
    printed = capsys.readouterr().out
    assert "exploration: 3 episodes, " in printed and "1 successful; 2 pairs" in printed
    assert {b["temperature"] for b in server.requests} == {0.7}
    assert not any("meta plan" in b["messages"][0]["content"] for b in server.requests)
    pairs = read_rows(out / "pairs.jsonl", ("task", "prompt", "chosen", "rejected"))
    assert [p["task"] for p in pairs] == tasks[1:]
    [won] = read_rows(out / "won.jsonl", ("task", "messages"))
    e = gold[next(iter(gold))]
    assert won["messages"][:1] == Prompts(CORRIDOR).agent(e["instruction"], None, tasks[0])
    assert said(won["messages"]) == [action for action, _ in e["steps"]]
    asked = len(server.requests)
    score.explore(a)
    assert len(server.requests) == asked, "nothing is played twice"

    agent = str(save_model(tmp_path / "agent", tokenizer))
    dpo.main(
        dpo.Args(
            model=agent, data=str(out / "pairs.jsonl"), out=str(tmp_path / "trained"), epochs=1
        )
    )
    assert (tmp_path / "trained" / "model.safetensors").exists()
    wins.update(tasks)
    with pytest.raises(InputError, match="no failure to learn from"):
        score.explore(score.ExploreArgs(**{**vars(a), "out": str(tmp_path / "eto2")}))


def test_filter_of_seed_plans(seeded, tmp_path, chat_server, capsys, monkeypatch):
    """Dropped: the plan of task 0, which harms agent a, and that of task 1, which harms agent b.
    Kept: a plan that makes no difference. Nothing is played twice, and an agent's episodes without
    a plan serve other plans."""
    gold = {r["instruction"]: r for r in read_rows(seeded / "trajectories.jsonl")}
    tasks = [r["task"] for r in gold.values()]

    def reply(messages, body):
        e = gold[max(gold, key=messages[0]["content"].rfind)]
        harmed = e["task"] == tasks["ab".index(body["model"])]
        if harmed and "meta plan" in messages[0]["content"]:
            return "Action: touch the trap"
        return f"Action: {e['steps'][len(messages) // 2][0]}"

    server = chat_server(reply)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    a = {
        "env": CORRIDOR,
        "workers": 1,
        "agents": ["a", "b"],
        "out": str(tmp_path),
        "seed_plans": str(seeded / "seed_plans.jsonl"),
    }
    score.filter_seed_plans(score.FilterArgs(**a))
    printed = capsys.readouterr().out
    assert (
        all(
            re.search(rf"^{agent}: plans add -0\.\d+ .*; 1 of 3 do worse", printed, re.M)
            for agent in "ab"
        )
        and "1 of 3 kept" in printed
    )
    rows = read_rows(seeded / "seed_plans.jsonl")
    [kept] = read_rows(tmp_path / "filtered_plans.jsonl")
    assert kept in rows and kept["task"] == tasks[2]
    assert {b["temperature"] for b in server.requests} == {0.0}

    server.requests.clear()
    other = [r | {"plan": "Step 1: walk on"} for r in rows]
    a["seed_plans"] = str(write_jsonl(tmp_path / "other.jsonl", other))
    score.filter_seed_plans(score.FilterArgs(**a))
    assert all("meta plan" in b["messages"][0]["content"] for b in server.requests)
    server.requests.clear()
    score.filter_seed_plans(score.FilterArgs(**a))
    assert not server.requests
    with pytest.raises(InputError, match="no plan is left"):
        score.filter_seed_plans(score.FilterArgs(**a, limit=1))


@pytest.mark.parametrize("env", sorted(p.parent.name for p in common.DATA.glob("*/knowagent")))
def test_knowagents_prompt(env):
    """The agent's own prompt and example, and for every action what it needs and leads to."""
    usual, knowing = Prompts(env), Prompts(env, "knowagent")
    assert knowing.examples == usual.examples and usual.examples
    actions = re.findall(
        r"^(?:\d\. )?([a-z][a-z0-9 ]+(?:OBJ|RECEP|LOC|\[|:).*?)(?::|$)", usual.agent_text, re.M
    )
    assert len(actions) >= 2
    for action in actions:
        verb = re.escape(re.split(r"[\[:]| [A-Z]", action)[0])
        assert re.search(rf"^(?:\d\. )?{verb}\b.*: \w.*; \w", knowing.agent_text, re.M), action
    assert "{task}{plan_line}" in knowing.agent_text and "what each needs" in knowing.agent_text


def test_knowledge_from_expert_against_failure(seeded, tmp_path, chat_server):
    """WKM: the teacher sees both trajectories of each task that the agent failed at, and of no
    other; the agent is trained with the knowledge in its prompt. Rules may begin with "When"."""
    knowledge = "Step 1: When a room is empty, walk on\nStep 2: take what the task names"
    server = chat_server(lambda messages, body: common.plan_reply(knowledge))
    gold = {r["task"]: r for r in read_rows(seeded / "trajectories.jsonl")}
    first, *others = gold
    failures = [
        tried(t, 0.1 * i, [[f"Action: wrong {i}", "No."]], i) for i in (2, 1) for t in others
    ]
    old = tried(first, 0.0, [["Action: older", "No."]]) | {"fingerprint": "before retraining"}
    failed = write_jsonl(
        tmp_path / "explore.jsonl", [old, *failures, tried(first, 1.0, [["Action: right", "Yes."]])]
    )
    prompts = tmp_path / "wkm"
    prompts.mkdir()
    (prompts / "planner.txt").write_text("Write task knowledge.\n{task}")
    (prompts / "teacher.txt").write_text("{task}\n{conversation}\nFailed:\n{explored}")
    out = tmp_path / "wkm-seed"
    a = {
        "env": CORRIDOR,
        "workers": 1,
        "out": str(out),
        "limit": 3,
        "plan_share": 1.0,
        "explored": str(failed),
    }
    seed.main(seed.Args(**a, prompts=str(prompts), teacher="t", teacher_url=server.url))
    assert len(server.requests) == 2
    for body in server.requests:
        [message] = body["messages"]
        assert "Action: wrong 1\nObservation: No." in message["content"]
        assert "wrong 2" not in message["content"]
        assert sum(gold[t]["instruction"] in message["content"] for t in others) == 1
    rows = read_rows(out / "seed_plans.jsonl")
    assert [(r["task"], r["plan"]) for r in rows] == [(t, knowledge) for t in others]
    assert rows[0]["messages"][0]["content"].startswith("Write task knowledge.")
    told = {
        r["task"]: knowledge in r["messages"][0]["content"]
        for r in read_rows(out / "agent_sft.jsonl")
    }
    assert told == {t: t in others for t in gold}
    with pytest.raises(InputError, match="--explored needs a model"):
        seed.main(seed.Args(**a, teacher="rules"))
