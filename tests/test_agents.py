"""Agents with training: expert trajectories as conversations, exploration, pairs of whole trajectories (ETO)."""

import json
import os
import re

import pytest
from conftest import check_run, run_script, save_model, stage, write_jsonl

import common

seed, score, dpo = stage("01_seed_plans"), stage("03_sample_score"), stage("04_dpo")
TASKS = ["find-plant/0", "find-animal/1", "power-component/0"]


def expert(task, steps, solved=True) -> dict:
    return {"task": task, "solved": solved, "instruction": f"Do {task}." if solved else "", "steps": steps, "reward": float(solved)}


def tried(task, reward, steps, rollout=0, end="steps") -> dict:
    return {"task": task, "rollout": rollout, "reward": reward, "success": reward == 1.0, "end": end, "steps": steps,
            "setting": "now", "instruction": f"Do {task}."}


def test_trajectory_pairs():
    """Expert against failure, better against worse, never across tasks and never a trajectory with itself."""
    go = lambda *words: [[f"Action: {w}", f"{w} done"] for w in words]  # noqa: E731
    experts = [expert(t, [[w, f"{w} done"] for w in ("open", "win")]) for t in ("a/1", "a/2", "a/3")] + [expert("a/4", [], solved=False)]
    explored = {
        "a/1": [tried("a/1", 0.0, go("look", "fail"))],
        "a/2": [tried("a/2", 1.0, go("open", "win")), tried("a/2", 1.0, go("win"), 1)],
        "a/3": [tried("a/3", 0.2, go("a")), tried("a/3", 0.6, go("b"), 1), tried("a/3", 0.0, [], 2),
                tried("a/3", 0.0, go("c"), 3, "crash")],
        "a/4": [tried("a/4", 0.1, go("a")), tried("a/4", 0.7, go("b"), 1)]}
    pairs = score.trajectory_pairs(experts, explored, common.Prompts("sciworld"), 0)
    said = [(p["task"], *([m["content"] for m in p[side] if m["role"] == "assistant"] for side in ("chosen", "rejected"))) for p in pairs]
    won = ["Action: open", "Action: win"]
    assert said == [("a/1", won, ["Action: look", "Action: fail"]), ("a/3", won, ["Action: a"]), ("a/3", won, ["Action: b"]),
                    ("a/3", ["Action: b"], ["Action: a"]), ("a/4", ["Action: b"], ["Action: a"])]
    for p in pairs:
        assert p["q_chosen"] > p["q_rejected"] and p["chosen"] != p["rejected"]
        [prompt] = p["prompt"]
        assert f"Do {p['task']}." in prompt["content"] and prompt["role"] == "user"
        for side in ("chosen", "rejected"):
            assert [m["role"] for m in p[side]] == (["assistant", "user"] * 9)[: len(p[side])] and p[side][-1]["role"] == "assistant"
    assert pairs[0]["chosen"][1] == {"role": "user", "content": "Observation: open done"}


def test_only_what_the_agent_says_is_trained_on(tmp_path, tokenizer, capsys):
    """Both sides of a pair of whole trajectories: the agent's turns with their end tokens are targets, observations and prompt are
    not; what both begin with is there once. A trajectory longer than the context is counted and left out."""
    def talk(*words):
        return score.turns([[f"Action: {w}", f"{w}!"] for w in words], 0)

    prompt = [{"role": "user", "content": "Do it."}]
    rows = [{"task": "a/1", "prompt": prompt, "chosen": talk("open", "take cup", "win"), "rejected": talk("open", "wait")},
            {"task": "a/2", "prompt": prompt, "chosen": talk("win"), "rejected": talk(*["look around"] * 40)}]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    [pair], _ = dpo.load_pairs(dpo.Args(data=str(data), max_length=200), tokenizer)
    for (ids, targets), side in zip(pair, ("chosen", "rejected"), strict=True):
        text = tokenizer.decode([i for i, t in zip(ids, targets, strict=True) if t])
        assert text == "".join(f"{m['content']}<|im_end|>" for m in rows[0][side] if m["role"] == "assistant")
    alike = os.path.commonprefix([ids for ids, _ in pair])
    assert "Observation: open!" in tokenizer.decode(alike) and "take" not in tokenizer.decode(alike)
    packed = common.pack(pair, "cpu")["ids"].numel()
    assert sum(len(ids) for ids, _ in pair) - packed == len(alike) // 16 * 16, "what both begin with, in steps of 16 tokens"
    assert "1 pairs are longer than --max_length 200 and left out" in capsys.readouterr().out


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "seeded"
    (out.parent / "tasks.json").write_text(json.dumps([t.split("/") for t in TASKS]))
    check_run("01_seed_plans.py", "--env", "sciworld", "--workers", 1, "--out", out, "--teacher", "rules",
              "--tasks", out.parent / "tasks.json")
    return out


def test_the_experts_conversation_wins_again(seeded):
    """Trajectory -> conversation -> replay: what the agent is trained to say, said to the environment, solves the task."""
    world = common.ScienceWorld(1)
    for row in common.read_rows(seeded / "agent_sft.jsonl"):
        world.reset(row["task"])
        for i, m in enumerate(row["messages"][1::2]):
            observation, _, done, success = world.step(common.parse_action(m["content"]))
            if not done:
                assert row["messages"][2 * i + 2]["content"] == f"Observation: {observation}"
        assert success, row["task"]


def test_explore(seeded, tmp_path, tiny_model, tokenizer, chat_server):
    """The agent wins one task of three; the other two pair with the expert, and 04_dpo.py trains on them."""
    gold = {r["instruction"]: r for r in common.read_rows(seeded / "trajectories.jsonl")}

    def reply(messages, body):
        u = max(gold, key=messages[0]["content"].rfind)
        return f"Action: {gold[u]['steps'][len(messages) // 2][0] if gold[u]['task'] == TASKS[0] else 'focus on agent'}"

    server, out = chat_server(reply), tmp_path / "eto1"
    args = ["explore", "--env", "sciworld", "--workers", 1, "--agent", "scripted", "--agent_url", server.url,
            "--experts", seeded / "trajectories.jsonl", "--out", out]
    printed = check_run("03_sample_score.py", *args)
    assert "exploration: 3 episodes, " in printed and "1 won; 2 pairs" in printed
    assert {b["temperature"] for b in server.requests} == {0.7}
    assert not any("meta plan" in b["messages"][0]["content"] for b in server.requests)
    pairs = common.read_rows(out / "pairs.jsonl", ("task", "prompt", "chosen", "rejected"))
    assert [p["task"] for p in pairs] == TASKS[1:]
    [won] = common.read_rows(out / "won.jsonl", ("task", "messages"))
    assert won["task"] == TASKS[0] and won["messages"][:1] == common.Prompts("sciworld").agent(
        next(u for u, e in gold.items() if e["task"] == TASKS[0]), None, TASKS[0])
    assert [m["content"] for m in won["messages"][1::2]] == [f"Action: {a}" for a, _ in next(
        e for e in gold.values() if e["task"] == TASKS[0])["steps"]]
    before = len(server.requests)
    check_run("03_sample_score.py", *args)
    assert len(server.requests) == before, "nothing is played twice"
    agent = save_model(tmp_path / "agent", tokenizer, dtype="bfloat16")
    check_run("04_dpo.py", "--model", agent, "--data", out / "pairs.jsonl", "--out", tmp_path / "agent-eto1", "--epochs", 2, "--lr", 1e-3,
              "--max_length", 20_000, "--micro_tokens", 4096)
    assert (tmp_path / "agent-eto1" / "model.safetensors").exists()


def test_an_agent_that_never_fails_has_nothing_to_learn(seeded, tmp_path, chat_server):
    gold = {r["instruction"]: r for r in common.read_rows(seeded / "trajectories.jsonl")}

    def reply(messages, body):
        return f"Action: {gold[max(gold, key=messages[0]['content'].rfind)]['steps'][len(messages) // 2][0]}"

    server = chat_server(reply)
    result = run_script("03_sample_score.py", "explore", "--workers", 1, "--agent", "scripted", "--agent_url", server.url,
                        "--experts", seeded / "trajectories.jsonl", "--out", tmp_path)
    assert result.returncode == 2 and "no failure to learn from" in result.stderr
    result = run_script("03_sample_score.py", "explore", "--experts", tmp_path / "none.jsonl", "--agent_url", server.url, "--out", tmp_path)
    assert result.returncode == 2 and "none.jsonl does not exist" in result.stderr


@pytest.mark.parametrize("env", common.ENVIRONMENTS)
def test_knowagents_prompt(env):
    """The agent's own prompt with its one-shot example, and for every action what it needs."""
    usual, knowing = common.Prompts(env), common.Prompts(f"{env}-knowagent")
    assert knowing.examples == usual.examples and usual.examples
    listed = [line for line in usual.agent_text.splitlines() if re.match(r"(\d\. )?[a-z][a-z0-9 ]+(OBJ|RECEP|LOC|:)", line)]
    if env == "webshop":  # what a click needs depends on what is clicked
        listed = [f"{i}. {a}" for i, a in ((1, "search[KEYWORDS]"), (3, "click[PRODUCT]"), (4, "click[OPTION]"), (8, "click[buy now]"))]
    assert len(listed) >= (4 if env == "webshop" else 9)
    for line in listed:
        action = line.split(":")[0]
        assert re.search(rf"^{re.escape(action)}: \w.*; \w", knowing.agent_text, re.M), action
    assert "{task}{plan_line}" in knowing.agent_text and "what each needs" in knowing.agent_text


def test_task_knowledge_from_expert_against_failure(seeded, tmp_path, chat_server):
    """WKM: the teacher sees both trajectories of each task that the agent failed at, and of no other; the agent learns with the
    knowledge in its prompt. Rules may begin with "When", which plans may not."""
    knowledge = "Step 1: When a room is empty, teleport to another room\nStep 2: focus on what the task names"

    def reply(messages, body):
        return common.plan_reply(knowledge)

    server = chat_server(reply)
    failures = [tried(t, 0.1 * i, [[f"Action: wrong {i}", "No."]], i) for i in (2, 1) for t in TASKS[1:]]
    failures.insert(0, {**tried(TASKS[0], 0.0, [["Action: older", "No."]]), "setting": "of the agent before it was trained again"})
    failed = write_jsonl(tmp_path / "explore.jsonl", [*failures, tried(TASKS[0], 1.0, [["Action: right", "Yes."]])])
    out = tmp_path / "wkm-seed"
    args = ["--env", "sciworld", "--workers", 1, "--out", out, "--tasks", seeded.parent / "tasks.json", "--plan_share", 1,
            "--explored", failed]
    check_run("01_seed_plans.py", *args, "--prompts", "sciworld-wkm", "--teacher", "t", "--teacher_url", server.url)
    gold = {r["task"]: r for r in common.read_rows(seeded / "trajectories.jsonl")}
    assert len(server.requests) == 2
    for body in server.requests:
        [message] = body["messages"]
        assert "Action: wrong 1\nObservation: No." in message["content"] and "wrong 2" not in message["content"]
        assert sum(gold[t]["instruction"] in message["content"] for t in TASKS[1:]) == 1
    rows = common.read_rows(out / "seed_plans.jsonl")
    assert [(r["task"], r["plan"]) for r in rows] == [(t, knowledge) for t in TASKS[1:]]
    assert "task knowledge" in rows[0]["messages"][0]["content"] and "wrong" not in rows[0]["messages"][0]["content"]
    assert {r["task"]: knowledge in r["messages"][0]["content"] for r in common.read_rows(out / "agent_sft.jsonl")} == {
        t: t in TASKS[1:] for t in TASKS}
    result = run_script("01_seed_plans.py", *args, "--teacher", "rules")
    assert result.returncode == 2 and "--explored needs a teacher" in result.stderr
