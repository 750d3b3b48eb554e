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
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    server = chat_server(lambda messages, body: reply)
    with pytest.raises(InputError, match=says) as error:
        ask(server.url)
    assert server.url in str(error.value)


def test_servers_that_are_not_there_or_silent(chat_server, monkeypatch):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="cannot be reached"):
        ask("http://127.0.0.1:9/v1")
    silent = chat_server(lambda messages, body: time.sleep(5))
    with pytest.raises(InputError, match="did not answer within|cannot be reached"):
        ask(silent.url, timeout=0.3)


def test_retry_after_is_honoured(chat_server, monkeypatch):
    """It does not count as a retry, and its time not as the request's: here there are no retries,
    and the time limit is three times 0.45 s."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    answers = [(429, "wait", {"retry-after": "1"}), (429, "wait", {"retry-after": "0.5"}), "Hi"]
    server = chat_server(lambda messages, body: answers.pop(0))
    start = time.time()
    assert ask(server.url, timeout=0.45).text == "Hi"
    assert time.time() - start > 1.5


def test_an_api_needs_a_key_and_gets_fewer_requests_at_once(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        common.Model("gpt-4o")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert common.Model("gpt-4o").concurrency == 32
    assert common.Model("gpt-4o", concurrency=7).concurrency == 7
    url = "http://127.0.0.1:9/v1"
    assert common.Model("m", url).concurrency == 256
    assert common.Model("m", ",".join([url] * 8)).concurrency == 512


@pytest.mark.parametrize("answer", [(503, "down"), (200, "<html>")])
def test_rollouts_survive_an_outage(chat_server, monkeypatch, answer):
    """For a second, the server answers 503, or nonsense."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "8")
    down = []  # when it began

    def reply(messages, body):
        time.sleep(0.02)
        if len(server.requests) > 6 and not down:
            down.append(time.time())
        if down and time.time() < down[0] + 1:
            return answer
        return gold(messages)

    server = chat_server(reply)
    rows, _ = play(server.url, jobs_of(tasks_of()[:4], 3), 4)
    assert down
    assert len(rows) == 12
    assert all(r["end"] == "success" for r in rows)


def test_several_servers_share_the_load(chat_server):
    """Requests are spread over the servers; an episode stays with one of them."""

    def reply(messages, body):
        time.sleep(0.03)
        return gold(messages)

    servers = [chat_server(reply) for _ in range(3)]
    rows, _ = play(",".join(s.url for s in servers), jobs_of(tasks_of()[:4], 3), 12)
    total = sum(len(r["steps"]) for r in rows)
    assert sum(len(s.requests) for s in servers) == total
    starts = 0
    for server in servers:
        assert len(server.requests) > 0.15 * total
        first_requests = [body for body in server.requests if len(body["messages"]) == 1]
        assert len(first_requests) <= 5
        starts += len(first_requests)
    assert starts == 12


def test_the_work_of_a_server_that_dies_goes_to_the_others(chat_server, monkeypatch, capfd):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    stops = []  # the thread that stops the dying server

    def stop():
        dying.shutdown()
        dying.server_close()

    def dies(messages, body):
        if len(dying.requests) <= 4:
            return gold(messages)
        if not stops:
            stops.append(threading.Thread(target=stop))
            stops[0].start()
        raise ConnectionError

    dying = chat_server(dies)
    servers = [dying, chat_server(lambda m, body: gold(m)), chat_server(lambda m, body: gold(m))]
    rows, retries = play(",".join(s.url for s in servers), jobs_of(tasks_of()[:4], 4), 12)
    assert stops
    assert len(rows) == 16
    assert all(r["end"] == "success" for r in rows)
    assert not retries
    assert capfd.readouterr().err.count("2 other servers do its work") == 1
