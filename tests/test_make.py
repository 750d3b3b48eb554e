"""The Makefile's commands and the scripts' command lines."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_make, script_env, stage

SCRIPTS = sorted(p.name for p in ROOT.glob("0*.py"))
ENVIRONMENTS = sorted(p.parent.name for p in ROOT.glob("data/*/env.py"))
WITH_DEMO = [name for name in ENVIRONMENTS if (ROOT / "data" / name / "demo.mk").exists()]


def make(*args) -> str:
    """The output of make."""
    result = run_make(*args)
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


def papers_settings() -> dict[str, dict[str, str]]:
    """{script: {flag: value}} of the table in data/README.md."""
    found = {}
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(0\d_\w+\.py)` \| `--(\w+) (\S+)` \| [^|]+ \|$", text, re.MULTILINE)
    for script, flag, value in rows:
        found.setdefault(script, {})[flag] = value
    return found


def equal(one: str, other: str) -> bool:
    """Whether two values of a flag are equal, as numbers if they are numbers."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def test_make_all_uses_the_papers_settings():
    commands = make("-n", "all", "ENV=elsewhere", "RUN=not-there")
    given = {script: settings(commands, script) for script in SCRIPTS}
    for script, values in papers_settings().items():
        for flag, value in values.items():
            # what make does not give has the script's default
            used = given[script].get(flag, defaults(script)[flag])
            assert equal(used, value), (script, flag)
    assert given["01_seed_plans.py"]["teacher"] == "gpt-4o"
    assert given["03_sample_score.py"]["agent"] == given["02_sft.py"]["model"]
    assert given["05_eval.py"]["agents"] == given["02_sft.py"]["model"]


def test_each_stage_has_settings_of_the_paper():
    """The table of data/README.md was read."""
    counts = {script: len(values) for script, values in papers_settings().items()}
    assert counts == {
        "02_sft.py": 5,
        "03_sample_score.py": 4,
        "04_dpo.py": 6,
        "05_eval.py": 1,
    }


def test_make_all_runs_the_stages_in_order():
    commands = make("-n", "all", "ENV=elsewhere", "RUN=q")
    order = [commands.index(f" {script} ") for script in SCRIPTS]
    assert order == sorted(order)
    files = [
        ("02_sft.py", {"data": "runs/q/seed_plans.jsonl", "out": "runs/q/sft"}),
        ("03_sample_score.py", {"planner": "runs/q/sft", "out": "runs/q"}),
        ("04_dpo.py", {"model": "runs/q/sft", "data": "runs/q/pairs.jsonl", "out": "runs/q/mpo"}),
    ]
    for script, values in files:
        assert values.items() <= settings(commands, script).items()
    for script in ("01_seed_plans.py", "03_sample_score.py", "05_eval.py"):
        assert settings(commands, script)["env"] == "elsewhere"


@pytest.mark.parametrize("script", ["02_sft.py", "03_sample_score.py", "04_dpo.py", "05_eval.py"])
def test_the_scripts_own_defaults_are_the_papers(script):
    for flag, value in papers_settings()[script].items():
        if flag != "model":  # the demo's small one
            assert equal(defaults(script)[flag], value), flag


@pytest.mark.parametrize("env", WITH_DEMO)
def test_make_demo_trains_the_agent_first(env):
    commands = make("-n", "-B", "demo", f"ENV={env}")
    assert settings(commands, "05_eval.py")["env"] == env
    assert commands.index("/agent\n") < commands.index(" 03_sample_score.py ")
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
        ("fig4", "--agents a b --plans none mpo"),
        ("fig6", "judge --out runs/q --judge gpt-4o"),
        ("report", "report --out runs/q"),
        ("all ROUNDS=3", "--plans none sft mpo mpo2 mpo3"),
        ("all ROUNDS=2", "--model runs/q/mpo --data runs/q/round2/pairs.jsonl --out runs/q/mpo2"),
        ("agent-sft", "--out runs/q --thoughts true"),
        ("agent-eto ETO_ROUNDS=2", "--model runs/q/agent-eto1 --data runs/q/eto2/pairs.jsonl"),
        ("agent-knowagent", "--prompts knowagent"),
        ("agent-wkm", "--explored runs/q/eto1/explore.jsonl --plan_share 1 --thoughts true"),
    ],
)
def test_make_tables_and_agents(target, said):
    agents = ["AGENTS=a b"] if target == "fig4" else []
    assert said in make("-n", *target.split(), "RUN=q", *agents)


def test_make_table2_plays_agents_with_their_own_prompts(tmp_path):
    for name in ("agent", "agent-eto1", "agent-eto2", "agent-mine", "agent-knowagent", "agent-wkm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    commands = make("-n", "table2", f"R={tmp_path}", "AGENT=base")
    played = re.search(r"05_eval.py .*--agents (.*?) +--plans none mpo$", commands, re.M)[1].split()
    names = ["base", *(f"{tmp_path}/{name}" for name in ("agent", "agent-mine", "agent-eto2"))]
    assert played == names, "of ETO's rounds only the last one"
    assert re.findall(r"05_eval.py .*--prompts (\w+) --agents (\S+) --plans (\w+);", commands) == [
        ("knowagent", f"{tmp_path}/agent-knowagent", "none"),
        ("wkm", f"{tmp_path}/agent-wkm", "wkm"),
    ]


def test_make_fig5_trains_a_planner_for_every_smaller_m_and_n():
    commands = make("-n", "fig5", "RUN=q", "M=3", "N=2")
    points = re.findall(r"--data runs/q/fig5/(m\dn\d)\.pairs\.jsonl", commands)
    assert points == ["m2n2", "m3n2", "m3n1"]
    assert "--pairs runs/q/fig5/m2n2.pairs.jsonl --m 2 --n 2" in commands


FAKE_STAGE = """#!/usr/bin/env python
import pathlib, sys
words = sys.argv[1:]
value = lambda flag: pathlib.Path(words[words.index(flag) + 1])
if "--pairs" in words:
    value("--pairs").parent.mkdir(exist_ok=True)
    value("--pairs").write_text(" ".join(words[-4:]).replace("--m 2 --n 2", "the run's own"))
elif "--data" in words:
    value("--out").mkdir(parents=True)
    (value("--out") / "config.json").write_text(value("--data").read_text())
"""


@pytest.fixture
def fake_run(tmp_path):
    """make(*args) with a finished run folder of M = 2, N = 2, where a stage writes what it read."""
    run = tmp_path / "run"
    for file in ("sft/config.json", "mpo/config.json", "eval/done", "seed_plans.jsonl"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("the run's own")
    (run / "pairs.jsonl").write_text("the run's own")
    stage_file = tmp_path / "stage.py"
    stage_file.write_text(FAKE_STAGE)
    later = time.time() + 60
    order = ["seed_plans.jsonl", "sft/config.json", "pairs.jsonl", "mpo/config.json", "eval/done"]
    for number, file in enumerate(order):
        os.utime(run / file, (later + number, later + number))

    def make_it(*args) -> str:
        fake = [f"{name}={sys.executable} {stage_file}" for name in ("STAGE", "TRAIN")]
        return make(*args, f"R={run}", *fake, "TOOL=:", "TEACHER=rules")

    make_it.folder = run
    return make_it


def test_fig5_copies_the_planner_of_the_same_pairs_only(fake_run):
    """`make fig5` with another M than the run had does not take the run's planner for it."""
    folder = fake_run.folder / "fig5"
    fake_run("fig5", "M=3", "N=2")
    planners = {p.parent.name: p.read_text() for p in folder.glob("*/config.json")}
    assert planners == {
        "m2n2": "the run's own",
        "m3n2": "--m 3 --n 2",
        "m3n1": "--m 3 --n 1",
    }
    assert not (folder / "m2n2").is_symlink()


MAKES_ROWS_AND_FAILS = """#!/usr/bin/env python
import os, pathlib, signal, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
if "--thoughts" in words:
    with (out / "thoughts.jsonl").open("a") as file:
        file.write("a row\\n")
elif "--data" in words:
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text("the model")
how = os.environ.get("FAILS", "")
if how == "status":
    sys.exit(2)
if how:
    os.kill(os.getppid() if how == "make" else os.getpid(), signal.SIGTERM)
    signal.pause()
"""


@pytest.mark.parametrize("fails", ["status", "signal", "make"])
def test_thoughts_that_were_begun(fake_run, tmp_path, fails):
    """Rows that were paid for stay, and no agent is trained on some of them: "make" is told to end,
    or the stage fails or is killed."""
    run = fake_run.folder
    (tmp_path / "stage.py").write_text(MAKES_ROWS_AND_FAILS)
    command = [f"R={run}", f"STAGE={sys.executable} {tmp_path}/stage.py", "TOOL=:"]
    command += [f"TRAIN={sys.executable} {tmp_path}/stage.py", "TEACHER=gpt-4o", "agent-sft"]
    for times in (1, 2):
        assert run_make(*command, FAILS=fails).returncode != 0
        assert (run / "thoughts.jsonl").read_text() == "a row\n" * times
        assert not (run / "agent").exists()
    before = (run / "seed_plans.jsonl").stat().st_mtime
    assert run_make(*command).returncode == 0
    assert (run / "thoughts.jsonl").read_text() == "a row\n" * 3
    assert (run / "agent" / "config.json").exists()
    assert (run / "seed_plans.jsonl").stat().st_mtime == before


def test_no_signal_deletes_a_model_or_rows(fake_run, tmp_path):
    """Make deletes a target that changed if a signal comes before the recipe's end. Every file that
    a rule makes is an exception."""
    run = fake_run.folder
    (tmp_path / "stage.py").write_text(MAKES_ROWS_AND_FAILS)
    command = [f"R={run}", f"TRAIN={sys.executable} {tmp_path}/stage.py", "TOOL=:"]
    (run / "sft" / "config.json").unlink()
    assert run_make(*command, "sft", FAILS="make").returncode != 0
    assert (run / "sft" / "config.json").read_text() == "the model"
    database = run_make("-pn", "ROUNDS=3", "RUN=q", "help").stdout
    kept = set(re.search(r"^\.PRECIOUS: (.*)$", database, re.M)[1].split())
    made = set(re.findall(r"^(runs/q/[^\s:]+): .+$", database, re.M))
    assert len(made) > 15 and made - kept <= {"runs/q/thoughts.jsonl"}


def test_prompts_are_prerequisites_of_the_stages_that_read_them(tmp_path):
    """An edited prompt runs the stages again that read it, and those after them."""
    env = tmp_path / "env"
    env.mkdir()
    for name in ("planner.txt", "agent.txt", "teacher.txt"):
        (env / name).write_text("prompt")
    run = tmp_path / "run"
    files = ["seed_plans.jsonl", "sft/config.json", "pairs.jsonl", "mpo/config.json", "eval/done"]
    now = time.time() + 60
    for number, file in enumerate(files):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).touch()
        os.utime(run / file, (now + number, now + number))

    def scripts(edited: str | None) -> set[str]:
        for name in ("planner.txt", "agent.txt", "teacher.txt"):
            when = now + 60 if name == edited else now - 120
            os.utime(env / name, (when, when))
        return set(re.findall(r"\b(\d\d)_\w+\.py", make("-n", "eval", f"ENV={env}", f"R={run}")))

    assert scripts(None) == set()
    assert scripts("teacher.txt") == {"01", "02", "03", "04", "05"}
    os.utime(run / "seed_plans.jsonl", (now + 90, now + 90))
    os.utime(run / "sft" / "config.json", (now + 91, now + 91))
    assert scripts("agent.txt") == {"03", "04", "05"}


@pytest.mark.parametrize(
    "settings, teacher, others",
    [
        ("ENV=sciworld", "data/sciworld", "data/sciworld"),
        ("ENV=alfworld PROMPTS=hints", "data/alfworld/hints", "data/alfworld/hints"),
        ("ENV=alfworld PROMPTS=brief", "data/alfworld", "data/alfworld/brief"),
        ("ENV=sciworld DEMO=1", None, "data/sciworld/brief"),
    ],
)
def test_prompt_files_are_those_that_the_stages_read(tmp_path, settings, teacher, others):
    """A file that a prompt folder has in its place is no prerequisite, and the rules teacher reads
    no prompt."""
    makefile = tmp_path / "Makefile"
    shown = "$(TEACHER_PROMPT): $(PLANNER_PROMPT) $(AGENT_PROMPT)"
    makefile.write_text(f"include {ROOT}/Makefile\nprompt-files:\n\t@echo {shown}\n")
    said = make("-f", str(makefile), "prompt-files", *settings.split()).strip()
    env = others.removesuffix("/hints").removesuffix("/brief")
    first = f"{teacher}/teacher.txt" if teacher else ""
    assert said == f"{first}: {others}/planner.txt {others}/agent.txt {env}/examples.json"


MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736)
  MIG 3g.20gb     Device  1: (UUID: MIG-a28ad590)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-77a1)
"""
EIGHT = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}a)\n" for i in range(8))
BROKEN = (
    "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54\n"
)
COMMUNICATION = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make\n"
)


@pytest.fixture
def nvidia_smi(tmp_path):
    """nvidia_smi(text, variable) puts an nvidia-smi that prints the text on the PATH (None: none),
    and sets CUDA_VISIBLE_DEVICES (None: not set); the variables of a process."""

    def install(text: str | None, variable: str | None) -> dict:
        file = tmp_path / "nvidia-smi"
        (tmp_path / "text").write_text(text or "")
        file.write_text(
            f"#!/bin/sh\ncat {tmp_path}/text\nexit {int('GPU 0' not in (text or ''))}\n"
        )
        file.chmod(0o755 if text is not None else 0o644)
        path = f"{ROOT}/tests/bin:{tmp_path}:{os.environ['PATH']}"
        env = {"PATH": path}
        if variable is not None:
            env["CUDA_VISIBLE_DEVICES"] = variable
        return env

    return install


@pytest.mark.parametrize(
    "text, variable, count",
    [
        (None, None, 0),
        (None, "0,1", 0),
        ("No devices were found\n", None, 0),
        (BROKEN, None, 0),
        (COMMUNICATION, "0", 0),
        ("Unable to determine the device handle for GPU 0000:3F:00.0\n" + EIGHT, None, 8),
        (EIGHT, None, 8),
        (EIGHT, "", 0),
        (EIGHT, "2,5", 2),
        (EIGHT, "2, 5,", 2),
        (EIGHT, "GPU-3a,GPU-5a", 2),
        (EIGHT, "GPU-9a", 0),
        (EIGHT, "0,-1,2", 1),
        (EIGHT, "NoDevFiles", 0),
        (MIG, None, 2),
        (MIG, "MIG-c7384736", 1),
        (MIG, "MIG-c7384736,MIG-a28ad590", 1),
        (MIG, "MIG-GPU-5c89852c/1/0", 1),
    ],
)
def test_how_many_gpus(nvidia_smi, text, variable, count):
    env = nvidia_smi(text, variable)
    counted = subprocess.run(
        ["bash", "data/tools/gpus.sh"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert counted.stdout == f"{count}\n"


@pytest.mark.parametrize(
    "text, variable, settings, processes",
    [
        (EIGHT, "0,1,2,3,4,5,6,7", [], 8),
        (EIGHT, "2,5", [], 2),
        (EIGHT, "2,5", ["GPUS=8"], 8),
        (EIGHT, "2", [], 1),
        ("No devices were found\n", "0", [], 1),
        ("No devices were found\n", "0", ["GPUS=4"], 4),
    ],
)
def test_make_trains_on_the_gpus_there_are(nvidia_smi, text, variable, settings, processes):
    env = nvidia_smi(text, variable)
    done = run_make("-n", "-B", "sft", "RUN=q", *settings, **env)
    launched = re.findall(r"data.tools.launch --num_processes (\d) 02_sft.py", done.stdout)
    assert launched == ([str(processes)] if processes > 1 else []), done.stdout + done.stderr


@pytest.mark.parametrize("settings, gpus", [([], 2), (["GPUS=8"], 8), (["GPUS= 0"], 0)])
def test_make_setup_installs_for_the_gpus_it_is_told(nvidia_smi, settings, gpus):
    """GPUS=8 is for a login node, which has none itself."""
    env = {**os.environ, **nvidia_smi(EIGHT, "2,5")}
    make = [shutil.which("make"), "-n", "-B", "setup", *settings]
    done = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True)
    assert f'bash data/tools/setup.sh "{gpus}"' in done.stdout, done.stderr


@pytest.mark.skipif(not (ROOT / ".venv" / "lib").exists(), reason="needs make setup")
def test_make_setup_says_that_the_packages_are_for_cpus():
    import torch

    done = run_make("setup", "GPUS=8")
    says = ".venv is there, and was set up without GPUs: delete it"
    assert (says in done.stderr) == (torch.version.cuda is None)
    assert run_make("setup", "GPUS=0").returncode == 0


@pytest.mark.parametrize("settings, installs", [([], False), (["LATEST=1"], True)])
def test_make_setup_latest_installs_again(settings, installs):
    """Also where all is installed, and no file has changed since: -o."""
    make = [shutil.which("make"), "-n", "setup", "GPUS=0", *settings]
    for pattern in ("data/tools/setup.sh", "data/tools/*.txt", "*.txt", "data/*/*.txt"):
        for file in ROOT.glob(pattern):
            make += ["-o", str(file.relative_to(ROOT))]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    ready = (ROOT / ".venv/ready").exists()
    assert ('setup.sh "0"' in done.stdout) == (installs or not ready), done.stdout + done.stderr


def test_make_test_gpu_without_a_gpu():
    done = run_make("test-gpu")
    assert done.returncode == 2 and "error: there is no GPU here" in done.stderr
    commands = make("-n", "test-gpu", "MODEL=m", "MPO_TEST_DEVICE=cpu")
    assert 'MPO_TEST_MODEL="m"' in commands and "--status tests/test_gpu.py" in commands


@pytest.mark.parametrize(
    "args, says",
    [
        (["RUN=a b"], 'RUN="a b" must be one word'),
        (["ROUNDS=4"], "ROUNDS=4 must be 1, 2 or 3"),
        (["agent-eto", "ETO_ROUNDS=0"], "ETO_ROUNDS=0 must be 1, 2 or 3"),
        (["fig4", "RUN=q"], "fig4 compares agents: make fig4 AGENTS="),
        (["demo", "ENV=nowhere"], "there is no demo of nowhere"),
        (["demo", "ENV=make"], "there is no demo of make"),
        (["all", "TASKS=no/such"], "TASKS=no/such must be a folder of lists of tasks"),
        (["all", "TASKS=Makefile"], "TASKS=Makefile must be a folder of lists of tasks"),
    ],
)
def test_make_refuses_in_one_line(args, says):
    done = run_make("-n", *args)
    assert done.returncode == 2 and says in done.stderr


def test_a_run_with_accents():
    commands = make("-n", "all", "RUN=évaluation-ß")
    assert settings(commands, "04_dpo.py")["out"] == "runs/évaluation-ß/mpo"


@pytest.mark.parametrize(
    "args, folder",
    [
        (["ENV=alfworld"], "alfworld"),
        (["ENV=alfworld", "SEED=0"], "alfworld"),
        (["ENV=alfworld", "SEED=3"], "alfworld-seed3"),
        (["ENV=alfworld", "SEED=3", "DEMO=1"], "demo-alfworld-seed3"),
        (["ENV=alfworld", "SEED=3", "RUN=mine"], "mine"),
    ],
)
def test_each_seed_has_its_run_folder(args, folder):
    commands = make("-n", "all", *args)
    assert settings(commands, "04_dpo.py")["out"] == f"runs/{folder}/mpo"


def test_all_ends_its_check_before_a_stage_begins():
    """Also with several jobs."""
    commands = make("-n", "-j4", "all", "RUN=q").splitlines()
    assert [c for c in commands if c.startswith("make ")] == ["make check", "make eval"]
    assert commands.index("make eval") < min(i for i, c in enumerate(commands) if "01_seed" in c)


def test_make_evidence_holds_no_stage_back(tmp_path):
    """One agent; all seeds' stages use it, all seed plans and 3 epochs; validation tasks are train
    tasks that neither agent nor planner has seen."""
    commands = make("-n", "evidence", "ENV=sciworld", "SEEDS=4 5", f"EVIDENCE={tmp_path}")
    assert not list(tmp_path.iterdir()), "with -n nothing is done"
    assert commands.count("make agent-sft DEMO=evidence RUN=evidence-sciworld/base") == 1
    assert commands.count("for seed in 4 5;") == 2 and f"--to {tmp_path}/evidence.csv" in commands
    stages = ["all", "-n", "-B", "ENV=sciworld", "DEMO=evidence", "AGENT_SFT_ARGS=", "SEED=4"]
    for dev in ("", "1"):
        commands = make(*stages, f"DEV={dev}", "AGENT=base/agent")
        sft, scoring = (settings(commands, f) for f in ("02_sft.py", "03_sample_score.py"))
        evaluation = settings(commands, "05_eval.py")
        assert sft["epochs"] == "3" and "limit" not in sft and sft["seed"] == "4"
        assert scoring["agent"] == evaluation["agents"] == "base/agent" and scoring["seed"] == "4"
        assert evaluation["plans"] == "none mismatched sft per_type per_type_adapted mpo oracle"
        assert evaluation.get("splits") == ("train" if dev else None)
    agent = make("-n", "-B", "agent-sft", "ENV=sciworld", "DEMO=evidence", "RUN=x/base")
    seen = settings(agent, "01_seed_plans.py")["limit"]
    assert int(seen) == int(evaluation["skip"]) >= int(scoring["limit"])


@pytest.mark.parametrize("env", ["sciworld", "alfworld"])
def test_make_evidence_without_a_task_type(env):
    """Plans are sampled for tasks of the other types only, and played on the tasks of this one."""
    args = ("-n", "-B", "evidence-without", f"ENV={env}")
    assert "evidence-without needs WITHOUT=TYPE" in run_make(*args).stderr
    types = settings(make("-n", "-B", "seed", f"ENV={env}", "DEMO=evidence"), "01_seed_plans.py")
    left_out, *others = types["types"].split()
    commands = make(*args, f"WITHOUT={left_out}")
    scoring, evaluation = (settings(commands, f) for f in ("03_sample_score.py", "05_eval.py"))
    assert scoring["types"] == " ".join(others) and evaluation["types"] == left_out
    assert scoring["planner"] == f"runs/evidence-{env}/without-{left_out}/sft"
    assert "ln -sfn ../seed0/sft $run/sft" in commands


def test_make_evidence_table2():
    """The agents are trained in the evidence's base/, and play with the plans of seed 0."""
    refused = run_make("-n", "evidence-table2", "ENV=alfworld").stderr
    assert "has no settings of these agents (ETO_FIRST ...); with them: sciworld" in refused
    commands = make("-n", "-B", "evidence-table2", "ENV=sciworld")
    folder = "runs/evidence-sciworld/"
    assert f"--model {folder}base/agent-eto2 --data {folder}base/eto3/pairs.jsonl" in commands
    assert f"--prompts knowagent-brief --agent {folder}base/agent " in commands
    table = make(
        "-n",
        "table2",
        "ENV=sciworld",
        "DEMO=evidence",
        "RUN=evidence-sciworld/seed0",
        "AGENT_SFT_ARGS=",
        f"AGENTS_RUN={folder}base",
        "KNOWAGENT_PLANS=none mpo",
    )
    assert (
        f"--prompts knowagent-brief --agents {folder}base/agent-knowagent --plans none mpo" in table
    )


def test_make_all_trains_one_planner_for_two_environments():
    commands = make("-n", "all", "ENV=sciworld alfworld", "RUN=q")
    of = "runs/q/sciworld/{0} runs/q/alfworld/{0}".format
    wanted = [
        "RUN=q/$env check",
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


def test_make_alone_is_make_help():
    said = make()
    assert all(word in said for word in ("make demo", "make test", "make all", "PLANNER"))


HELP_OF_ALL = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(f"---- {script} {end.code}")
"""


def test_help_is_fast():
    """Of all scripts in one process, so that what they import is imported once."""
    start = time.time()
    result = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *SCRIPTS],
        cwd=ROOT,
        env=script_env(),
        capture_output=True,
        text=True,
    )
    assert time.time() - start < 8  # alone: 2
    assert not result.stderr
    _, *parts = re.split(r"^usage: ", result.stdout, flags=re.M)
    for script, text in zip(SCRIPTS, parts, strict=True):
        module = stage(script.removesuffix(".py"))
        assert text.endswith(f"---- {script} 0\n")
        assert module.__doc__.strip() in text
        for name in module.Args.__dataclass_fields__:
            assert f"--{name}" in text
