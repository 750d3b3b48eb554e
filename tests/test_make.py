"""The Makefile's commands and the scripts' command lines."""

import re
import subprocess
import time

import pytest
from conftest import ROOT, run_script, script_env, stage

SCRIPTS = sorted(p.name for p in ROOT.glob("0*.py"))


def make(*args) -> str:
    """The output of make, with its own environment: no variable of a surrounding make."""
    env = {k: v for k, v in script_env().items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ENV", "RUN")}
    result = subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.replace("\\\n", " ")


def settings(commands: str, script: str, out: str = "") -> dict[str, str]:
    """The flags of the only command that runs `script` (and writes to `out`)."""
    [line] = [line for line in commands.splitlines() if f" {script} " in line and out in line]
    found = dict(re.findall(r"--(\w+) ((?:(?!--)\S+ ?)+)", line))
    assert set(found) <= set(stage(script.removesuffix(".py")).Args.__dataclass_fields__) | {"num_processes"}
    return {k: v.strip() for k, v in found.items()}


def defaults(script: str) -> dict:
    return {k: str(v) for k, v in vars(stage(script.removesuffix(".py")).Args()).items()}


@pytest.mark.parametrize("env", ["sciworld", "alfworld", "webshop"])
def test_make_all_uses_the_papers_settings(env):
    commands = make("-n", "all", f"ENV={env}", "RUN=not-there")
    llama = "meta-llama/Llama-3.1-8B-Instruct"
    training = {"batch_size": "32", "lr": "1e-5", "lr_scheduler": "cosine", "epochs": "3"}
    wanted = {
        "01_seed_plans.py": {"env": env, "teacher": "gpt-4o"},
        "02_sft.py": {"model": llama, "data": "runs/not-there/seed_plans.jsonl", "out": "runs/not-there/sft", **training},
        "03_sample_score.py": {"env": env, "planner": "runs/not-there/sft", "agent": llama, "m": "5", "n": "5", "plan_temperature": "0.7",
                               "agent_temperature": "0.7"},
        "04_dpo.py": {"model": "runs/not-there/sft", "data": "runs/not-there/pairs.jsonl", "out": "runs/not-there/mpo", "beta": "0.1",
                      "warmup_ratio": "0.03", **training},
        "05_eval.py": {"env": env, "agents": llama},
    }
    for script, values in wanted.items():
        assert values.items() <= settings(commands, script).items(), script
    order = [commands.index(f" {script} ") for script in wanted]
    assert order == sorted(order)
    assert defaults("05_eval.py")["agent_temperature"] == "0.0" and defaults("05_eval.py")["plans"] == "['none', 'sft', 'mpo']"


@pytest.mark.parametrize("script, values", [
    ("02_sft.py", {"batch_size": "32", "lr": "1e-05", "epochs": "3", "lr_scheduler": "cosine"}),
    ("03_sample_score.py", {"m": "5", "n": "5", "plan_temperature": "0.7", "agent_temperature": "0.7"}),
    ("04_dpo.py", {"beta": "0.1", "batch_size": "32", "lr": "1e-05", "epochs": "3", "warmup_ratio": "0.03", "lr_scheduler": "cosine"}),
])
def test_the_scripts_own_defaults_are_the_papers(script, values):
    assert values.items() <= defaults(script).items()


@pytest.mark.parametrize("env", ["sciworld", "alfworld", "webshop"])
def test_make_demo_trains_the_agent_first(env):
    commands = make("-n", "-B", "demo", f"ENV={env}")
    assert settings(commands, "05_eval.py")["env"] == env
    assert commands.index("/agent ") < commands.index(" 03_sample_score.py ")
    assert settings(commands, "01_seed_plans.py")["teacher"] == "rules"
    assert settings(commands, "03_sample_score.py")["agent"].endswith("/agent")


@pytest.mark.parametrize("target, said", [
    ("table2", "--plans none mpo"), ("table3", "--plans none sft gpt rft mpo"), ("table4", "--insert instruction thought observation"),
    ("table6", "--plans none mpo"), ("fig3", "--plans none sft mpo"), ("fig4", "--agents a b --teacher"),
    ("fig6", "judge --out runs/q --judge gpt-4o"),
    ("report", "report --out runs/q"), ("agent-eto ROUNDS=2", "--model runs/q/agent-eto1 --data runs/q/eto2/pairs.jsonl"),
    ("agent-knowagent", "--prompts sciworld-knowagent"), ("agent-wkm", "--explored runs/q/eto1/explore.jsonl")])
def test_make_tables_and_agents(target, said):
    assert said in make("-n", *target.split(), "RUN=q", "AGENTS=a b" if target == "fig4" else "ENV=sciworld")


def test_make_fig5_trains_a_planner_for_every_smaller_m_and_n():
    commands = make("-n", "fig5", "RUN=q", "M=3", "N=2")
    points = re.findall(r"--data runs/q/fig5/(m\dn\d)\.pairs\.jsonl", commands)
    assert points == ["m2n2", "m3n2", "m3n1"], "the last but one is linked to mpo when it is made"


def test_make_help():
    assert make() == make("help")
    assert all(word in make("help") for word in ("make demo", "make test", "make all", "PLANNER", "AGENT", "TEACHER"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(script):
    start = time.time()
    result = run_script(script, "--help")
    seconds = time.time() - start
    assert result.returncode == 0 and not result.stderr and seconds < 8  # alone: 2
    for name in stage(script.removesuffix(".py")).Args.__dataclass_fields__:
        assert f"--{name}" in result.stdout
    assert re.sub(r"\s+", " ", stage(script.removesuffix(".py")).__doc__)[:60] in re.sub(r"\s+", " ", result.stdout)
