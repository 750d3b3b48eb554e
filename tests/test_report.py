"""The report page: what it shows, in headless Chromium."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import stage, write_jsonl
from test_eval import cell, episode, known, write_report, write_run  # noqa: F401

import common
from common import read_rows

ev = stage("05_eval")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium")
EVIL = ("</script><script>document.title='gotcha'</script>"
        "<img src=x onerror=\"document.title='gotcha'\">")
OPEN_FIRST = "document.querySelector('#tasks tbody tr').click(); await wait(300);"


def browse(page: Path, then: str = "", size: str = "1300,900", screenshot: Path | None = None,
           dark: bool = False) -> str:
    """The page's HTML after JavaScript `then` has run. Console errors fail the test."""
    copy = page.with_name("copy.html")
    script = (
        "<script>addEventListener('error', e => { document.body.append('ERR' + 'OR ') });"
        "addEventListener('unhandledrejection', e => { document.body.append('ERR' + 'OR ') });"
        "const wait = ms => new Promise(r => setTimeout(r, ms));"
        "(async () => { while (!document.documentElement.dataset.ready) await wait(10);" + then +
        "; document.documentElement.dataset.done = 'yes' })()</script>")
    copy.write_text(page.read_text() + script)
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--window-size={size}", "--hide-scrollbars", "--virtual-time-budget=20000",
         "--enable-logging=stderr", "--log-level=0",
         *(["--blink-settings=preferredColorScheme=0"] if dark else []),
         f"--user-data-dir={page.parent / 'profile'}",
         f"--screenshot={screenshot}" if screenshot else "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    if screenshot:
        assert screenshot.stat().st_size > 5000
        return ""
    assert 'data-done="yes"' in done.stdout and "ERROR " not in done.stdout, done.stdout[-2000:]
    return done.stdout


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
    cells = "[...document.querySelectorAll('#tasks tbody tr td:first-child')]"
    shown = f"document.body.append(' SHOWN[' + {cells}.map(c => c.textContent) + ']')"
    choose = "const set = (id, v) => { $(id).value = v; $(id).oninput() };"
    for filters, tasks in (
            ("", "boil/1,boil/2,melt/1,melt/2"),
            ("set('split', 'unseen'); set('env', 'lab');", "melt/1,melt/2"),
            ("set('type', 'melt');", "melt/1,melt/2"), ("set('name', 'BOIL/2');", "boil/2"),
            ("set('won', '1'); set('lost', '0');", "boil/1,boil/2")):
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
    tasks, settings = [f"boil/{i}" for i in range(2500)], ("none", "sft", "rft", "mpo")
    plans = {(s, t): f"Step 1: {s} {t}" for s in settings[1:] for t in tasks}
    rows = [episode(t, plans.get((s, t)), float(common.seed_of(s, t) % 2), 0) | {"steps": [
        [f"Action: {common.digest(s, t, i)}", f"{common.digest(i, s, t)} " * 30]
        for i in range(12)]} for s in settings for t in tasks]
    cells = [cell(s, "seen", tasks) for s in settings]
    out = write_run(tmp_path / "big", cells, plans, rows)
    write_report(out)
    seconds = []
    for path in (page, out / "report.html"):
        attempts = []
        for _ in range(3):
            began = time.time()
            dom = browse(path, "document.body.append(` READY[${index.tasks.length}]`);"
                         "document.querySelectorAll('script[id^=block]').forEach(b => b.remove())")
            attempts.append(time.time() - began)
        seconds.append(min(attempts))
    assert "READY[2500]" in dom and "2500 of 2500 tasks, the first 200 shown" in dom
    assert seconds[1] - seconds[0] < 3 * max(1, seconds[0] / 1.1), seconds


def test_a_report_is_self_contained(page):
    text = page.read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)\w+[:/]", text)
    assert "@import" not in text and "fetch(" not in text
    assert EVIL not in text and "a long room" not in text, "conversations are in compressed blocks"
    started = time.time()
    write_report(page.parent)
    assert page.stat().st_mtime >= started - 1 and not list(page.parent.glob("*.tmp*"))
