"""The Makefile's commands and the scripts' command lines."""

import re
import subprocess
import time

import pytest
from conftest import ROOT, run_script, script_env, stage

SCRIPTS = sorted(p.name for p in ROOT.glob("0*.py"))
ENVIRONMENTS = sorted(p.parent.name for p in ROOT.glob("data/*/demo.mk"))


def make(*args) -> str:
    """The output of make, without the variables of a surrounding make."""
    env = {
        k: v
        for k, v in script_env().items()
        if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ENV", "RUN")
    }
    result = subprocess.run(
        ["make", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.replace("\\\n", " ")


def settings(commands: str, script: str) -> dict[str, str]:
    """The flags of the only command that runs `script`."""
    [line] = [line for line in commands.splitlines() if f" {script} " in line]
    found = dict(re.findall(r"--(\w+) ((?:(?!--)\S+ ?)+)", line))
    known = set(stage(script.removesuffix(".py")).Args.__dataclass_fields__)
    assert set(found) <= known | {"num_processes"}
    return {k: v.strip() for k, v in found.items()}


def defaults(script: str) -> dict:
    return {k: str(v) for k, v in vars(stage(script.removesuffix(".py")).Args()).items()}


def test_make_all_uses_the_papers_settings():
    commands = make("-n", "all", "ENV=elsewhere", "RUN=not-there")
    llama, env = "meta-llama/Llama-3.1-8B-Instruct", {"env": "elsewhere"}
    training = {"batch_size": "32", "lr": "1e-5", "lr_scheduler": "cosine", "epochs": "3"}
    wanted = {
        "01_seed_plans.py": {"teacher": "gpt-4o", **env},
        "02_sft.py": {
            "model": llama,
            "data": "runs/not-there/seed_plans.jsonl",
            "out": "runs/not-there/sft",
            **training,
        },
        "03_sample_score.py": {
            "planner": "runs/not-there/sft",
            "agent": llama,
            "m": "5",
            "n": "5",
            "plan_temperature": "0.7",
            "agent_temperature": "0.7",
            **env,
        },
        "04_dpo.py": {
            "model": "runs/not-there/sft",
            "data": "runs/not-there/pairs.jsonl",
            "out": "runs/not-there/mpo",
            "beta": "0.1",
            "warmup_ratio": "0.03",
            **training,
        },
        "05_eval.py": {"agents": llama, **env},
    }
    for script, values in wanted.items():
        assert values.items() <= settings(commands, script).items(), script
    order = [commands.index(f" {script} ") for script in wanted]
    assert order == sorted(order)


@pytest.mark.parametrize(
    "script, values",
    [
        ("02_sft.py", {"batch_size": "32", "lr": "1e-05", "epochs": "3", "lr_scheduler": "cosine"}),
        (
            "03_sample_score.py",
            {"m": "5", "n": "5", "plan_temperature": "0.7", "agent_temperature": "0.7"},
        ),
        (
            "04_dpo.py",
            {
                "beta": "0.1",
                "batch_size": "32",
                "lr": "1e-05",
                "epochs": "3",
                "warmup_ratio": "0.03",
                "lr_scheduler": "cosine",
            },
        ),
        ("05_eval.py", {"agent_temperature": "0.0", "plans": "['none', 'sft', 'mpo']"}),
    ],
)
def test_the_scripts_own_defaults_are_the_papers(script, values):
    assert values.items() <= defaults(script).items()


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_make_demo_trains_the_agent_first(env):
    commands = make("-n", "-B", "demo", f"ENV={env}")
    assert settings(commands, "05_eval.py")["env"] == env
    assert commands.index("/agent ") < commands.index(" 03_sample_score.py ")
    assert settings(commands, "01_seed_plans.py")["teacher"] == "rules"
    scoring = settings(commands, "03_sample_score.py")
    assert scoring["agent"].endswith("/agent") and scoring["m"] == "4" and scoring["n"] == "1"


@pytest.mark.parametrize(
    "target, said",
    [
        ("table2", "--plans none mpo"),
        ("table3", "--plans none sft gpt rft mpo"),
        ("table4", "--plan_positions instruction thought observation"),
        ("table6", "--plans none mpo"),
        ("fig3", "--plans none sft mpo"),
        ("fig4", "--agents a b --teacher"),
        ("fig6", "judge --out runs/q --judge gpt-4o"),
        ("report", "report --out runs/q"),
        ("all ROUNDS=3", "--plans none sft mpo mpo2 mpo3"),
        ("all ROUNDS=2", "--model runs/q/mpo --data runs/q/round2/pairs.jsonl --out runs/q/mpo2"),
        ("all FILTER=a", "filter --env sciworld --out runs/q  --agents a --seed 0"),
        ("all FILTER=a", "--data runs/q/filtered_plans.jsonl --out runs/q/sft"),
        ("agent-eto ETO_ROUNDS=2", "--model runs/q/agent-eto1 --data runs/q/eto2/pairs.jsonl"),
        ("agent-knowagent", "--prompts knowagent"),
        ("agent-wkm", "--explored runs/q/eto1/explore.jsonl"),
    ],
)
def test_make_tables_and_agents(target, said):
    agents = ["AGENTS=a b"] if target == "fig4" else []
    assert said in make("-n", *target.split(), "RUN=q", *agents)


def test_make_table2_plays_agents_with_their_own_prompts(tmp_path):
    """One command a line, which is how make check reads them."""
    for name in ("knowagent", "wkm"):
        (tmp_path / f"agent-{name}").mkdir()
        (tmp_path / f"agent-{name}" / "config.json").touch()
    lines = make("-n", "table2", f"R={tmp_path}").splitlines()
    assert [
        re.findall(r"05_eval.py .*--prompts (\w+) --agents (\S+) +--plans (\S+)$", line.strip())
        for line in lines
        if "--prompts" in line
    ] == [
        [(name, f"{tmp_path}/agent-{name}", plans)]
        for name, plans in (("knowagent", "none"), ("wkm", "wkm"))
    ]


def test_make_fig5_trains_a_planner_for_every_smaller_m_and_n():
    commands = make("-n", "fig5", "RUN=q", "M=3", "N=2")
    points = re.findall(r"--data runs/q/fig5/(m\dn\d)\.pairs\.jsonl", commands)
    assert points == ["m2n2", "m3n2", "m3n1"], "m3n2 becomes a link to mpo when it is made"


def test_make_evidence_holds_no_stage_back():
    """One agent; all seeds' stages use it, all seed plans and 3 epochs; validation tasks are train
    tasks that neither agent nor planner has seen."""
    commands = make("-n", "evidence", "ENV=sciworld", "SEEDS=4 5")
    assert commands.count("make agent-sft DEMO=evidence RUN=evidence-sciworld/base") == 1
    assert "for seed in 4 5;" in commands and "--to data/sciworld/evidence.json" in commands
    stages = ["stages", "-n", "-B", "ENV=sciworld", "DEMO=evidence", "AGENT_SFT_ARGS=", "SEED=4"]
    for dev in ("", "1"):
        commands = make(*stages, f"DEV={dev}", "AGENT=base/agent")
        sft, scoring = (settings(commands, f) for f in ("02_sft.py", "03_sample_score.py"))
        evaluation = settings(commands, "05_eval.py")
        assert sft["epochs"] == "3" and "limit" not in sft and sft["seed"] == "4"
        assert scoring["agent"] == evaluation["agents"] == "base/agent" and scoring["seed"] == "4"
        assert evaluation["plans"] == "none wrong sft mpo oracle"
        assert evaluation.get("splits") == ("train" if dev else None)
    agent = make("-n", "-B", "agent-sft", "ENV=sciworld", "DEMO=evidence", "RUN=x/base")
    seen = settings(agent, "01_seed_plans.py")["limit"]
    assert int(seen) == int(evaluation["skip"]) >= int(scoring["limit"])


def test_make_all_trains_one_planner_for_two_environments():
    commands = make("-n", "all", "ENV=sciworld alfworld", "RUN=q")
    of = "runs/q/sciworld/{0} runs/q/alfworld/{0}".format
    wanted = [
        "RUN=q/$env seed",
        f"cat {of('seed_plans.jsonl')} > runs/q/seed_plans.jsonl",
        "RUN=q AGENT_SFT_ARGS= sft",
        "ln -sfn ../sft runs/q/$env/sft",
        "RUN=q/$env score",
        f"cat {of('pairs.jsonl')} > runs/q/pairs.jsonl",
        "RUN=q AGENT_SFT_ARGS= dpo",
        "ln -sfn ../mpo runs/q/$env/mpo",
        "RUN=q/$env eval",
        "05_eval.py report --out",
    ]
    places = [commands.index(command) for command in wanted]
    assert places == sorted(places)


def test_make_help():
    assert make() == make("help")
    assert all(word in make() for word in ("make demo", "make test", "make all", "PLANNER"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_fast(script):
    start = time.time()
    result = run_script(script, "--help")
    seconds = time.time() - start
    assert result.returncode == 0 and not result.stderr and seconds < 8  # alone: 2
    module = stage(script.removesuffix(".py"))
    for name in module.Args.__dataclass_fields__:
        assert f"--{name}" in result.stdout
    assert module.__doc__.strip() in result.stdout
