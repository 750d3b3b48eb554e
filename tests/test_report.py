"""The report: its page in headless Chromium, tables of several run folders, notes, curves."""

import base64
import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import CORRIDOR, stage, write_jsonl
from test_eval import (  # noqa: F401
    SEEN,
    TASKS,
    by_setting,
    condition,
    episode,
    evaluate,
    known,
    numbers,
    rows_of,
    write_report,
    write_run,
)

import common
from common import InputError, read_rows
from data.report import curves, figures, report, tables
from data.report.page import page as page_of

ev = stage("05_eval")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium")
EVIL = (
    "</script><script>document.title='gotcha'</script>"
    "<img src=x onerror=\"document.title='gotcha'\">"
)
OPEN_FIRST = "document.querySelector('#tasks tbody tr').click(); await wait(300);"


def browse(
    page: Path,
    then: str = "",
    size: str = "1300,900",
    screenshot: Path | None = None,
    dark: bool = False,
) -> str:
    """The page's HTML after JavaScript `then` has run. Console errors fail the test."""
    copy = page.with_name("copy.html")
    script = (
        "<script>addEventListener('error', e => { document.body.append('ERR' + 'OR ') });"
        "addEventListener('unhandledrejection', e => { document.body.append('ERR' + 'OR ') });"
        "const wait = ms => new Promise(r => setTimeout(r, ms));"
        "(async () => { while (!document.documentElement.dataset.ready) await wait(10);"
        + then
        + "; document.documentElement.dataset.done = 'yes' })()</script>"
    )
    copy.write_text(page.read_text() + script)
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--window-size={size}",
            "--hide-scrollbars",
            "--virtual-time-budget=20000",
            "--enable-logging=stderr",
            "--log-level=0",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            f"--user-data-dir={page.parent / 'profile'}",
            f"--screenshot={screenshot}" if screenshot else "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    if screenshot:
        assert screenshot.stat().st_size > 5000
        return ""
    assert 'data-done="yes"' in done.stdout and "ERROR " not in done.stdout, done.stdout[-2000:]
    return done.stdout


def test_the_judge_may_have_any_name(tmp_path):
    """A server chooses it."""
    verdicts = {"overall": {"win": 1, "tie": 0, "loss": 0, "invalid": 0}}
    name = EVIL + "\n\\input{/etc/passwd} $x_1$ $^2$"
    table = tables.judged_table(["sft", "mpo"], name, verdicts)
    figure = tmp_path / "fig6.png"
    figure.write_bytes(b"a picture")
    html = page_of([], [table], {table.title: figure})
    assert "gotcha" in html and "<img src=x" not in html and "<script>document" not in html
    assert "\n" not in table.markdown().split("\n\n")[0] and "<img" not in table.markdown()
    table.rows.append([name] * 5)
    comment, *lines = table.latex().split("\n")
    assert len(lines) == 9 and comment.startswith("% ") and "input" in comment
    assert all(line.count(r"\input") == 0 for line in lines)


@pytest.mark.slow
def test_a_name_is_no_formula(tmp_path):
    figures.judged_bars({r"$\no_formula{$": Counter(win=1)}, tmp_path / "fig6.png")
    assert (tmp_path / "fig6.png").stat().st_size > 1000


@pytest.fixture
def page(known) -> Path:  # noqa: F811
    rows = read_rows(known / "eval" / "rollouts.jsonl")
    for row in rows:
        action = f"Action: {'fast' if row['plan'] else 'slow'} {EVIL}"
        row["steps"][1] = [action, f"{EVIL} " + "a long room. " * 60]
    write_jsonl(known / "eval" / "rollouts.jsonl", rows)
    write_report(known)
    return known / "report.html"


@pytest.mark.slow
@needs_browser
def test_tasks_and_conversations(page):
    names = "[...document.querySelectorAll('#tasks tbody tr td:first-child')]"
    shown = f"document.body.append(' SHOWN[' + {names}.map(c => c.textContent) + ']')"
    choose = "const set = (id, v) => { $(id).value = v; $(id).oninput() };"
    for filters, tasks in (
        ("", "boil/1,boil/2,melt/1,melt/2"),
        ("set('split', 'unseen'); set('env', 'lab');", "melt/1,melt/2"),
        ("set('type', 'melt');", "melt/1,melt/2"),
        ("set('name', 'BOIL/2');", "boil/2"),
        ("set('won', '1'); set('lost', '0');", "boil/1,boil/2"),
    ):
        assert f"SHOWN[{tasks}]" in browse(page, f"{choose} {filters} {shown}"), filters
    dom = browse(page, OPEN_FIRST)
    assert "gotcha" not in re.search("<title>(.*?)</title>", dom)[1] and "<img src=x" not in dom
    assert "&lt;/script&gt;&lt;script&gt;" in dom
    section = dom[dom.index('id="task"') :]
    assert "step 2" in section and section.count('class="step apart"') == 2
    assert section.count("<details") == 2 and "Step 1: do boil/1" in section
    assert "no plan" in section and "Your task is boil/1." in section


@pytest.mark.slow
@needs_browser
def test_narrow_and_dark(page, tmp_path):
    width = "document.body.append(` FITS[${document.documentElement.scrollWidth <= innerWidth}]`)"
    assert "FITS[true]" in browse(page, OPEN_FIRST + width, size="500,800"), "scrolls sideways"
    for name, dark in (("light", False), ("dark", True)):
        browse(page, OPEN_FIRST, screenshot=tmp_path / f"{name}.png", dark=dark)
    assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()


@pytest.mark.slow
@needs_browser
def test_ten_thousand_episodes(tmp_path, page):
    """The page opens in at most three seconds more than one of eight episodes does, on a machine
    where that takes 1.1 s; slower machines get more time."""
    tasks = [f"boil/{i}" for i in range(2500)]
    settings = ("none", "sft", "rft", "mpo")
    plans = {}
    rows = []
    for s in settings:
        for t in tasks:
            if s != "none":
                plans[s, t] = f"Step 1: {s} {t}"
            row = episode(t, plans.get((s, t)), float(common.seed_of(s, t) % 2), 0)
            for i in range(12):
                action = f"Action: {common.fingerprint(s, t, i)}"
                row["steps"].append([action, f"{common.fingerprint(i, s, t)} " * 30])
            rows.append(row)
    conditions = [condition(s, "seen", tasks) for s in settings]
    out = write_run(tmp_path / "big", conditions, plans, rows)
    write_report(out)
    seconds = []
    for path in (page, out / "report.html"):
        attempts = []
        for _ in range(3):
            began = time.time()
            dom = browse(
                path,
                "document.body.append(` READY[${index.tasks.length}]`);"
                "document.querySelectorAll('script[id^=block]').forEach(b => b.remove())",
            )
            attempts.append(time.time() - began)
        seconds.append(min(attempts))
    assert "READY[2500]" in dom and "2500 of 2500 tasks, the first 200 shown" in dom
    assert seconds[1] - seconds[0] < 3 * max(1, seconds[0] / 1.1), seconds


# ---- what was learnt -----------------------------------------------------------------------------


def index_of(page: Path) -> dict:
    packed = re.search('id="index">([^<]+)<', page.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.mark.parametrize(
    ("sft", "mpo", "number"),
    [
        ([0.5, 0.0, 0.25, 0.0], [0.5, 0.5, 1.0, 0.5], 2),
        ([0.5, 1.0, 0.0, 0.0], [0.5, 0.25, 0.5, 0.75], 1),  # worse, and before an equal gain
        ([0.5, 1.0, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0], None),
    ],
)
def test_the_task_where_sft_and_mpo_differ_most(tmp_path, capsys, sft, mpo, number):
    out = played(tmp_path / "run", {("none", "seen"): [0.0] * 4, ("sft", "seen"): sft})
    more = played(tmp_path / "more", {("mpo", "seen"): mpo})
    for name in ("conditions", "plans", "rollouts"):
        path = out / "eval" / f"{name}.jsonl"
        write_jsonl(path, read_rows(path) + read_rows(more / "eval" / f"{name}.jsonl"))
    text = write_report(out)
    printed = capsys.readouterr().out
    assert index_of(out / "report.html")["first"] == number
    assert printed.startswith(f"\n{text}") and printed.endswith(
        f"\ntables:  {out}/results.md, results.json\npicture: {out}/results.png\n"
        f"report:  {out}/report.html\n"
    )
    if number is None:
        assert "differ most" not in printed
        return
    learnt = printed.removeprefix(f"\n{text}").split("\n\n## How the planner is trained")[0]
    assert learnt.splitlines() == [
        "",
        "The task where SFT's and MPO's plan differ most in reward (agent: a):",
        f"seen/{number} (seen)",
        f"Your task is seen/{number}.",
        "",
        f"SFT, reward x 100: {100 * sft[number]:.1f}".ljust(38)
        + f" | MPO, reward x 100: {100 * mpo[number]:.1f}",
        ("-" * len(f"SFT, reward x 100: {100 * sft[number]:.1f}")).ljust(38)
        + " | "
        + "-" * len(f"MPO, reward x 100: {100 * mpo[number]:.1f}"),
        f"Step 1: sft seen/{number}".ljust(38) + f" | Step 1: mpo seen/{number}",
    ]


def test_plans_side_by_side_fit_a_terminal():
    """Long steps are wrapped, plans have different lengths, one is missing; of the instruction only
    the last paragraph is printed."""
    long = "Step 1: " + "look at the counter and " * 5 + "go\nStep 2: take it"
    tasks = ["boil/1", "boil/2"]
    conditions = []
    for plans, reward in (("sft", 0.0), ("mpo", 1.0)):
        texts = {"boil/1": None, "boil/2": long if plans == "mpo" else "Step 1: wait"}
        episodes = {}
        for task in tasks:
            row = episode(task, texts[task], reward if task == "boil/2" else 0.5, 2)
            row["instruction"] = "A room. " * 40 + "\n\nYour task is to look. " + "And look. " * 20
            episodes[task] = row
        conditions.append(condition(plans, "seen", tasks, texts=texts, episodes=episodes))
    lines = report.what_was_learnt(conditions).splitlines()
    assert max(map(len, lines)) <= 80 and not any("A room." in line for line in lines)
    assert lines[-1] == " " * 39 + "| Step 2: take it"
    assert lines[lines.index("") + 3].startswith("Step 1: wait".ljust(38) + " | Step 1: look at")
    conditions[0]["texts"]["boil/2"] = None
    assert "\nno plan".ljust(39) + " | Step 1: look at" in report.what_was_learnt(conditions)
    conditions[0]["episodes"]["boil/2"] = None
    assert report.what_was_learnt(conditions) == "", "not played"


@pytest.mark.slow
@needs_browser
def test_the_page_opens_at_that_task(tmp_path, page):
    """Also if its row is not among the first 200."""
    rewards = {("sft", "seen"): [0.5] * 250, ("mpo", "seen"): [0.5] * 230 + [1.0] + [0.5] * 19}
    out = played(tmp_path / "far", rewards)
    write_report(out)
    dom = browse(out / "report.html", "document.body.append(` AT[${scrollY > 0}]`)")
    assert "seen/230 (seen)</h2>" in dom and "differ most in reward here" in dom
    assert re.search('aria-current="true"><td>seen/230</td>', dom) and "AT[true]" in dom
    assert 'id="task" hidden' in browse(page), "without SFT's plans it opens at the top"


def test_a_report_is_self_contained(page):
    text = page.read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)\w+[:/]", text)
    assert "@import" not in text and "fetch(" not in text
    assert EVIL not in text and "a long room" not in text, "conversations are in compressed blocks"
    started = time.time()
    write_report(page.parent)
    assert page.stat().st_mtime >= started - 1 and not list(page.parent.glob("*.tmp*"))


# ---- several run folders, and what the notes say -------------------------------------------------


def played(out: Path, rewards: dict, env: str = "lab", agent: str = "a") -> Path:
    """A run folder from {(plans, split): the rewards of its tasks}."""
    conditions = []
    plans = {}
    rows = []
    for (setting, split), values in rewards.items():
        tasks = [f"{split}/{i}" for i in range(len(values))]
        conditions.append(condition(setting, split, tasks, agent, env=env))
        for task, reward in zip(tasks, values, strict=True):
            if setting != "none":
                plans[setting, task] = f"Step 1: {setting} {task}"
            rows.append(episode(task, plans.get((setting, task)), reward, 2, agent))
    return write_run(out, conditions, plans, rows)


def test_the_average_over_environments(tmp_path):
    """By hand: the columns' means are 1 and 1/2, so the average is 3/4 (of all tasks, it is 2/3).
    Only the second column varies: a sixteenth of its resamples is all 0, and all 1. Of the 64 ways
    to flip signs, 4 leave the gain as it is and 4 turn it around."""
    lab, shop = tmp_path / "lab", tmp_path / "shop"
    played(
        lab,
        {("none", "seen"): [0.0, 0.0], ("mpo", "seen"): [1.0, 1.0], ("sft", "seen"): [0.0, 0.0]},
        agent=f"{lab}/agent",
    )
    played(
        shop,
        {("none", "seen"): [0.0] * 4, ("mpo", "seen"): [0.0, 1.0, 0.0, 1.0]},
        "my/shop",
        agent=f"{shop}/agent",
    )
    write_report(lab)
    before = (lab / "results.json").read_text()
    text = write_report(lab, shop, f"{shop}/")
    assert (lab / "results.json").read_text() == before and (lab / "pooled/report.html").exists()
    assert text.startswith(f"# lab, shop\n\nRun folders: {lab}, {shop}\n")
    found, differences = by_setting(lab / "pooled"), numbers(lab / "pooled")["differences"]
    assert found["mpo", "average"]["reward"] == {"mean": 0.75, "interval": [0.5, 1.0]}
    assert found["mpo", "average"]["agent"] == "agent" and found["mpo", "average"]["tasks"] == 6
    assert ("sft", "lab seen") in found and ("sft", "average") not in found
    [gain] = [d["reward"] for d in differences if d["split"] == "average"]
    assert gain == {"mean": 0.75, "interval": [0.5, 1.0], "p": 2 / 16}
    assert rows_of(lab / "pooled" / "table2.md") == [
        [
            "agent",
            "plans",
            "lab seen (x100)",
            "shop seen (x100)",
            "average (x100)",
            "gain over no plan, average",
        ],
        ["agent", "no plan", "0.0", "0.0", "0.0", ""],
        ["agent", "MPO", "100.0", "50.0", "75.0", "+75.0"],
    ]
    assert "Average: the mean over the columns" in (lab / "pooled" / "table2.md").read_text()
    assert rows_of(lab / "pooled" / "table3.md")[2][2:5] == ["0.0", "-", "-"], "sft"
    with pytest.raises(InputError, match="none has no evaluation"):
        write_report(lab, tmp_path / "none")


def test_seeds_share_a_column(tmp_path):
    """The values of the tasks are 1/2 and 1: a quarter of the resamples are of one task alone."""
    a = played(tmp_path / "a", {("none", "seen"): [0.0, 1.0], ("mpo", "seen"): [1.0, 1.0]})
    b = played(tmp_path / "b", {("none", "seen"): [1.0, 1.0], ("mpo", "seen"): [1.0, 1.0]})
    write_report(a, b)
    found = by_setting(a / "pooled")
    assert set(found) == {("none", "seen"), ("mpo", "seen")}
    none = found["none", "seen"]
    assert none["reward"] == {"mean": 0.75, "interval": [0.5, 1.0]}
    assert (none["tasks"], none["episodes"], none["runs"]) == (2, 4, 2)
    assert numbers(a / "pooled")["differences"][0]["reward"]["mean"] == 0.25
    table = (a / "pooled" / "table2.md").read_text()
    assert "A task's value is its mean over run folders: seen 2." in table
    index = index_of(a / "pooled" / "report.html")
    assert [t[1:] for t in index["tasks"]][::2] == [
        ["seen/0", f"seen, {a}", {"0": [0.0, 0], "1": [1.0, 1]}],
        ["seen/0", f"seen, {b}", {"0": [1.0, 1], "1": [1.0, 1]}],
    ]
    write_jsonl(b / "eval" / "rollouts.jsonl", read_rows(b / "eval" / "rollouts.jsonl")[1:])
    assert "| 1 of 4 missing" in write_report(a, b)


def test_names_of_agents_in_several_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ["runs/a", f"{tmp_path}/runs/b"]

    def names(*agents) -> list[str]:
        return list(tables.agent_names(agents, folders[1], folders).values())

    agents = ("gpt-4o", "owner/model", f"{tmp_path}/runs/b/agent", "runs/other/agent")
    assert names(*agents) == ["gpt-4o", "owner/model", "agent", "runs/other/agent"]
    assert names("runs/a/agent") == ["agent"], "shared"
    both = ("runs/a/agent", "runs/b/agent", "./runs/b/agent")
    assert names(*both) == ["runs/a/agent", "agent", "agent"]


def test_notes(tmp_path):
    """Of all tables: full contexts, conditions' notes, plans without tags; of table 4: how the plan
    became a thought."""
    plans = {(s, t): f"Step 1: {s} {t}" for s in ("gpt", "mpo") for t in SEEN}
    conditions = [
        condition("none", "seen", SEEN, note="Nouns: by suffix."),
        condition("gpt", "seen", SEEN),
    ]
    for position in common.PLAN_POSITIONS:
        mpo = condition("mpo", "seen", SEEN, plan_position=position, note="Nouns: by suffix.")
        conditions.append(mpo)
    rows = []
    for c in conditions:
        end = "context" if c["plans"] == "gpt" else None
        for t in SEEN:
            plan = plans.get((c["plans"], t))
            rows.append(episode(t, plan, 0.5, 2, plan_position=c["plan_position"], end=end))
    out = write_run(tmp_path / "run", conditions, plans, rows)
    quiet = write_report(out)
    assert "started assistant message" not in quiet and "without tags" not in quiet
    for name, full in (("table2", False), ("table3", True), ("table4", False)):
        table = (out / f"{name}.md").read_text()
        assert ("2 of 6 episodes ended because the agent's context was full" in table) == full
        assert table.count("Nouns: by suffix.") == 1
    assert quiet.count("2 of 10 episodes ended because") == 2, "the overview and the differences"

    written = read_rows(out / "eval" / "plans.jsonl")
    for row in written:
        row["untagged"] = row["setting"] == "gpt"
    write_jsonl(out / "eval" / "plans.jsonl", written)
    for i, row in enumerate(r for r in rows if r["plan_position"] == "thought"):
        row["continued"] = i == 0
    write_jsonl(out / "eval" / "rollouts.jsonl", rows)
    write_report(out)
    table = (out / "table3.md").read_text()
    assert "2 plans of 'teacher, asked directly' are text without tags." in table
    table = (out / "table4.md").read_text()
    assert (
        "Plan position thought: the server continued a started assistant message in 1 "
        "episodes, the plan was a turn of its own in 1 episodes."
    ) in table
    assert "without tags" not in table


def test_replies_without_tags_are_plans_and_files_are_splits(
    tmp_path, evaluate, chat_server, monkeypatch
):
    """--tasks SPLIT=FILE: a column each; `train` is not evaluated."""
    server = chat_server(lambda m, body: "Action: walk on" if "stop" in body else " Take it. ")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    files = {}
    for name, task in zip(("train", "seen", "unseen"), TASKS, strict=True):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps([task.split("/")]))
    evaluate(
        agents=["a"],
        plans=["gpt"],
        max_steps=1,
        tasks=[f"{name}={file}" for name, file in files.items()],
    )
    rows = read_rows(tmp_path / "run" / "eval" / "plans.jsonl")
    assert {(r["task"], r["plan"], r["untagged"]) for r in rows} == {
        (t, "Take it.", True) for t in TASKS[1:]
    }
    assert {s for _, s in by_setting(tmp_path / "run")} == {"seen", "unseen", "all"}
    agents = [b for b in server.requests if "stop" in b]
    assert {b["max_tokens"] for b in agents} == {512} and len(agents) == 2


def test_replies_that_end_while_the_model_thinks(tmp_path, evaluate, chat_server, capsys):
    """A plan and an action that were thought and not written are none, and the report says so."""
    server = chat_server(lambda m, body: "<think>\n<meta_plan>\nStep 1: go\nAction: walk on")
    evaluate(agents=[server.url], plans=["none", "gpt"], teacher=server.url, max_steps=2)
    printed = capsys.readouterr().out
    out = tmp_path / "run"
    for row in read_rows(out / "eval" / "plans.jsonl"):
        assert row["plan"] is None and row["thinking_cut_off"] and not row["untagged"]
    for row in read_rows(out / "eval" / "rollouts.jsonl"):
        assert row["thinking_cut_off"] == row["format_errors"] == 2
    assert "3 replies of the planner of gpt ended while it was still thinking" in printed
    assert "--plan_tokens 512 is too small, set --teacher_thinking on:4096" in printed
    assert "6 replies of scripted ended while it was still thinking" in printed
    assert "12 replies of agents ended while they were thinking: --agent_tokens was" in printed
    assert "3 plans are missing because planners were still thinking: --plan_tokens" in printed
    with pytest.raises(InputError, match="still thinking: raise --plan_tokens 512"):
        ev.write_plan(ev.PlanArgs(planner=server.url, env=CORRIDOR, text="Wait."))


# ---- curves --------------------------------------------------------------------------------------


def test_curves_of_a_training(tmp_path, monkeypatch, capsys):
    """The figure of each folder, with and without held-out steps; no log is one line."""
    sft = tmp_path / "sft"
    mpo = tmp_path / "mpo"
    steps = [{"step": i, "loss": 1 / i, "lr": 1e-4, "grad_norm": 1.0} for i in (1, 2, 3)]
    common.write_rows(sft / "metrics.jsonl", steps)
    steps[2] |= {"eval_loss": 0.5}
    common.write_rows(mpo / "metrics.jsonl", steps)
    monkeypatch.setattr(sys, "argv", ["curves", str(sft), str(mpo)])
    curves.main()
    pictures = [(folder / "curves.png").read_bytes() for folder in (sft, mpo)]
    assert min(map(len, pictures)) > 5000 and pictures[0] != pictures[1]

    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        curves.main()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/metrics.jsonl does not exist")
    assert error.count("\n") == 1
