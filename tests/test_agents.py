"""Fine-tuned agents: exploration and its pairs (ETO), KnowAgent's prompts, WKM's knowledge."""

import os
import re

import pytest
from conftest import CORRIDOR, save_model, stage, write_jsonl

import common
from common import InputError, Prompts, read_rows

seed = stage("01_seed_plans")
score = stage("03_sample_score")
dpo = stage("04_dpo")


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


def go(*words):
    return [[f"Action: {word}", f"{word} done"] for word in words]


def test_an_episode_can_beat_the_expert():
    """Then it is the better one of a pair, as in ETO."""
    own = expert("a/0", [["open", "open done"]], 0.8)
    better, worse = tried("a/0", 1.0, go("win")), tried("a/0", 0.2, go("look"))
    couples = score.better_and_worse(own, [better, worse])
    rewards = [(chosen["reward"], rejected["reward"]) for chosen, rejected in couples]
    assert rewards == [(1.0, 0.8), (0.8, 0.2), (1.0, 0.2)]


WON = ["open", "win"]


@pytest.mark.parametrize(
    "solved, episodes, pairs",
    [
        (True, [(0.0, go("look", "fail"))], [(WON, ["look", "fail"])]),
        (True, [(1.0, go("open", "win")), (1.0, go("win"))], []),
        (
            True,
            [(0.2, go("a")), (0.6, go("b")), (0.0, [])],
            [(WON, ["a"]), (WON, ["b"]), ("b", "a")],
        ),
        (False, [(0.1, go("a")), (0.7, go("b"))], [("b", "a")]),
    ],
)
def test_trajectory_pairs(solved, episodes, pairs):
    """Expert against failure, better against worse, never across tasks. Failed and empty episodes
    do not count."""
    won = [["open", "open done"], ["win", ""]]
    experts = [expert("a/0", won), expert("a/2", won)]
    experts.insert(1, expert("a/1", won) if solved else expert("a/1", [], 0.0, solved=False))
    rows = [tried("a/1", reward, steps) for reward, steps in episodes]
    rows.append(tried("a/1", 0.0, go("c"), end="crash"))
    explored = {"a/0": [tried("a/0", 1.0, go("other"))], "a/1": rows}
    made = score.trajectory_pairs(experts, explored, Prompts(CORRIDOR), 0)
    assert [(said(p["chosen"]), said(p["rejected"])) for p in made] == [
        (list(chosen), list(rejected)) for chosen, rejected in pairs
    ]
    for p in made:
        [prompt] = p["prompt"]
        assert p["task"] == "a/1" and "Do a/1." in prompt["content"]
        assert p["q_chosen"] > p["q_rejected"]
        for side in (p["chosen"], p["rejected"]):
            roles = [m["role"] for m in side]
            assert roles == (["assistant", "user"] * 9)[: len(side)] and len(side) % 2
        first, *rest = p["chosen"]
        if rest:
            assert rest[0] == {"role": "user", "content": "Observation: open done"}


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


def talk(*words):
    return common.turns([[f"Action: {word}", f"{word}!"] for word in words], 0)


def test_only_the_agents_turns_are_targets(tmp_path, tokenizer, capsys):
    """Of both sides of a pair of trajectories; the turns that they share are packed once. Pairs
    longer than the limit are counted and left out."""
    prompt = [{"role": "user", "content": "Do it."}]
    row = {"task": "a/1", "prompt": prompt}
    row |= {"chosen": talk("open", "take cup", "win"), "rejected": talk("open", "wait")}
    long = {"task": "a/2", "prompt": prompt}
    long |= {"chosen": talk("win"), "rejected": talk(*["look around"] * 40)}
    data = write_jsonl(tmp_path / "pairs.jsonl", [row, long])
    [(pair, *_)] = dpo.load_pairs(dpo.Args(data=str(data), max_length=200), tokenizer)
    for (ids, targets), side in zip(pair, ("chosen", "rejected"), strict=True):
        text = tokenizer.decode([i for i, target in zip(ids, targets, strict=True) if target])
        assert text == "".join(f"Action: {word}<|im_end|>" for word in said(row[side]))
    shared = tokenizer.decode(os.path.commonprefix([ids for ids, _ in pair]))
    assert "Observation: open!" in shared and "take" not in shared
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
    experts = {row["instruction"]: row for row in read_rows(seeded / "trajectories.jsonl")}
    first, *others = experts.values()
    wins = {first["task"]}

    def reply(messages, body):
        e = experts[max(experts, key=messages[0]["content"].rfind)]
        if e["task"] not in wins:
            return "Action: touch the trap"
        action, _ = e["steps"][len(messages) // 2]
        return f"Action: {action}"

    server = chat_server(reply)
    out = tmp_path / "eto1"
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
    assert {b["temperature"] for b in server.requests} == {0.0}
    assert not any("meta plan" in b["messages"][0]["content"] for b in server.requests)
    pairs = read_rows(out / "pairs.jsonl", ("task", "prompt", "chosen", "rejected"))
    assert [p["task"] for p in pairs] == [e["task"] for e in others]
    [won] = read_rows(out / "won.jsonl", ("task", "messages"))
    asked_first = Prompts(CORRIDOR).agent(first["instruction"], None, first["task"])
    assert won["messages"][:1] == asked_first
    assert said(won["messages"]) == [action for action, _ in first["steps"]]
    asked = len(server.requests)
    score.explore(a)
    assert len(server.requests) == asked, "nothing is played twice"

    agent = str(save_model(tmp_path / "agent", tokenizer))
    trained = tmp_path / "trained"
    dpo.main(dpo.Args(model=agent, data=str(out / "pairs.jsonl"), out=str(trained), epochs=1))
    assert (trained / "model.safetensors").exists()
    wins.update(e["task"] for e in others)
    with pytest.raises(InputError, match="no failure to learn from"):
        score.explore(score.ExploreArgs(**{**vars(a), "out": str(tmp_path / "eto2")}))
    with pytest.raises(InputError, match="--n 2: at temperature 0 .* --agent_temperature 0.7"):
        score.explore(score.ExploreArgs(**{**vars(a), "n": 2}))


@pytest.mark.parametrize("env", sorted(p.parent.name for p in common.DATA.glob("*/knowagent")))
def test_knowagents_prompt(env):
    """The agent's own prompt and example, and for every action what it needs and leads to."""
    usual = Prompts(env)
    knowing = Prompts(env, "knowagent")
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
    trajectories = read_rows(seeded / "trajectories.jsonl")
    instructions = {row["task"]: row["instruction"] for row in trajectories}
    first, *others = instructions
    failures = [
        tried(first, 0.0, [["Action: older", "No."]]) | {"fingerprint": "before retraining"}
    ]
    for i in (2, 1):
        failures += [tried(task, 0.1 * i, [[f"Action: wrong {i}", "No."]], i) for task in others]
    success = tried(first, 1.0, [["Action: right", "Yes."]])
    failed = write_jsonl(tmp_path / "explore.jsonl", [*failures, success])
    prompts = tmp_path / "wkm"
    prompts.mkdir()
    (prompts / "planner.txt").write_text("Write task knowledge.\n{task}")
    (prompts / "teacher.txt").write_text("{task}\n{conversation}\nFailed:\n{explored}")
    out = tmp_path / "wkm-seed"
    a = {"env": CORRIDOR, "workers": 1, "out": str(out), "limit": 3, "plan_share": 1.0}
    a["explored"] = str(failed)
    seed.main(seed.Args(**a, prompts=str(prompts), teacher=f"t@{server.url}"))
    assert len(server.requests) == 2
    for body in server.requests:
        [message] = body["messages"]
        assert "Action: wrong 1\nObservation: No." in message["content"]
        assert "wrong 2" not in message["content"]
        assert len([task for task in others if instructions[task] in message["content"]]) == 1
    rows = read_rows(out / "seed_plans.jsonl")
    assert [(r["task"], r["plan"]) for r in rows] == [(t, knowledge) for t in others]
    assert rows[0]["messages"][0]["content"].startswith("Write task knowledge.")
    for row in read_rows(out / "agent_sft.jsonl"):
        assert (knowledge in row["messages"][0]["content"]) == (row["task"] in others)
    with pytest.raises(InputError, match="--explored needs a model"):
        seed.main(seed.Args(**a, teacher="rules"))
