"""Models behind servers: errors, retries, several servers, rate limits."""

import asyncio
import threading
import time

import pytest
from test_scoring import few_retries, gold, jobs_of, play, tasks_of  # noqa: F401

import common
from common import InputError


def ask(url, name="scripted", **options):
    return asyncio.run(common.Model(name, url, **options).ask([{"role": "user", "content": "Hi"}]))


@pytest.mark.parametrize(
    "reply, says",
    [
        ((401, "bad key"), "OPENAI_API_KEY"),
        ((404, "no such model"), "a model 'scripted'"),
        ((429, "slow down"), "429"),
        ((500, "out of order"), "500"),
        ((400, "temperature is out of range"), "temperature"),
        ((400, "This model's maximum context length is 64 tokens."), "context"),
        ((200, '{"id": "0", "object": "chat.completion", "choi'), "without a completion"),
        ((200, '{"id": "0", "created": 0, "model": "m", "choices": []}'), "without a completion"),
        ((200, ""), "without a completion"),
        ((200, '"hello"'), "without a completion"),
    ],
    ids=lambda v: None if isinstance(v, str) else f"{v[0]} {v[1][:14]}",
)
def test_a_server_that_fails(chat_server, monkeypatch, reply, says):
    monkeypatch.setenv("MPO_MAX_RETRIES", "1")
    server = chat_server(lambda messages, body: reply)
    with pytest.raises(InputError, match=says) as error:
        ask(server.url)
    assert server.url in str(error.value)


def test_servers_that_are_not_there_or_silent(chat_server, monkeypatch):
    with pytest.raises(InputError, match="cannot be reached"):
        ask("http://127.0.0.1:9/v1")
    silent = chat_server(lambda messages, body: time.sleep(5))
    with pytest.raises(InputError, match="did not answer within|cannot be reached"):
        ask(silent.url, timeout=0.3)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        common.Model("gpt-4o")


def test_a_limit_of_the_rate_is_waited_for(chat_server, monkeypatch):
    """A 429 that says how long to wait is no try, and its time does not count."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    answers = [(429, "wait", {"retry-after": "1"}), (429, "wait", {"retry-after": "0.5"}), "Hi"]
    server, start = chat_server(lambda messages, body: answers.pop(0)), time.time()
    assert ask(server.url, timeout=0.45).text == "Hi" and time.time() - start > 1.5
    assert common.Model("m", server.url).concurrency == 256
    assert common.Model("m", ",".join([server.url] * 8)).concurrency == 512
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert common.Model("gpt-4o").concurrency == 32
    assert common.Model("gpt-4o", concurrency=7).concurrency == 7


@pytest.mark.parametrize("answer", [(503, "down"), (200, "<html>")])
def test_rollouts_survive_an_outage(chat_server, monkeypatch, answer):
    """For a second, the server answers 503, or nonsense."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "8")
    down = []

    def reply(messages, body):
        time.sleep(0.02)
        if len(server.requests) > 6 and not down:
            down.append(time.time())
        if down and time.time() < down[0] + 1:
            return answer
        return gold(messages)

    server = chat_server(reply)
    rows, _ = play(server.url, jobs_of(tasks_of()[:4], 3), 4)
    assert down and len(rows) == 12 and all(r["end"] == "success" for r in rows)


def test_several_servers_share_the_load(chat_server):
    """Requests are spread over the servers; an episode stays with one of them."""

    def reply(messages, body):
        time.sleep(0.03)
        return gold(messages)

    servers = [chat_server(reply) for _ in range(3)]
    rows, _ = play(",".join(s.url for s in servers), jobs_of(tasks_of()[:4], 3), 12)
    counts = [len(s.requests) for s in servers]
    assert sum(counts) == sum(len(r["steps"]) for r in rows) and min(counts) > 0.15 * sum(counts)
    starts = [sum(len(b["messages"]) == 1 for b in s.requests) for s in servers]
    assert sum(starts) == 12 and max(starts) <= 5


def test_the_work_of_a_server_that_dies_goes_to_the_others(chat_server, monkeypatch, capfd):
    monkeypatch.setenv("MPO_MAX_RETRIES", "1")
    gone = []

    def dies(messages, body):
        if len(dying.requests) > 4:
            if not gone:
                gone.append(len(messages))
                threading.Thread(target=lambda: (dying.shutdown(), dying.server_close())).start()
            raise ConnectionError
        return gold(messages)

    dying, others = chat_server(dies), [chat_server(lambda m, body: gold(m)) for _ in range(2)]
    rows, retries = play(",".join(s.url for s in (dying, *others)), jobs_of(tasks_of()[:4], 4), 12)
    assert gone and len(rows) == 16 and all(r["end"] == "success" for r in rows) and not retries
    assert capfd.readouterr().err.count("2 other servers do its work") == 1
