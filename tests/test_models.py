"""Models behind servers: errors, retries, several servers, rate limits."""

import asyncio
import contextlib
import email.utils
import json
import socket
import threading
import time

import pytest
from bench.stub_server import completion
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
        ((200, '"hello"'), "without a completion: hello"),
        ((200, "null"), "without a completion"),
        ((200, "[]"), "without a completion"),
    ],
    ids=lambda v: None if isinstance(v, str) else f"{v[0]} {v[1][:14]}",
)
def test_a_server_that_fails(chat_server, monkeypatch, reply, says):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    server = chat_server(lambda messages, body: reply)
    with pytest.raises(InputError, match=says) as error:
        ask(server.url)
    assert server.url in str(error.value)


# ---- replies -------------------------------------------------------------------------------------


def whole(usage=None, **message):
    """A whole answer for the scripted server to send."""
    body = completion("", 7, 3)
    body["choices"][0]["message"] = {"role": "assistant", **message}
    body["usage"] = usage
    return 200, json.dumps(body)


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Well."}]}  # of Mistral


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": None}, ""),
        ({"content": ""}, ""),
        ({"content": []}, ""),
        ({}, ""),
        ({"content": [{"type": "text", "text": "Hi"}]}, "Hi"),
        ({"content": [{"type": "text", "text": "H"}, {"type": "output_text", "text": "i"}]}, "Hi"),
        ({"content": [THINKING, {"type": "text", "text": "Hi"}]}, "Hi"),
        ({"content": [{"type": "text", "text": None}, "Hi"]}, "Hi"),
        ({"content": {"type": "text", "text": "Hi"}}, "Hi"),
        ({"content": [{"type": "text", "text": {"value": "Hi"}}]}, "Hi"),
        ({"content": [{"type": "text", "content": "Hi"}]}, "Hi"),
        ({"content": 5}, "5"),
        ({"content": 0.5}, "0.5"),
        ({"content": [{"type": "text", "text": 5}]}, "5"),
        ({"content": "a \ud83d b"}, "a \ufffd b"),
        ({"content": "\udc00"}, "\ufffd"),
        ({"content": "\U0001f600 é"}, "\U0001f600 é"),
        ({"content": [{"type": "text", "text": "\ud83d"}]}, "\ufffd"),
    ],
    ids=ascii,
)
def test_the_text_of_a_reply(chat_server, message, text):
    server = chat_server(lambda messages, body: whole(**message))
    assert ask(server.url).text == text


@pytest.mark.parametrize(
    "usage, prompt_tokens, completion_tokens",
    [
        ({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}, 7, 3),
        ({"prompt_tokens": 7, "total_tokens": 10}, 7, None),
        ({"prompt_tokens": None, "completion_tokens": None}, None, None),
        ({}, None, None),
        ({"prompt_tokens": "7", "completion_tokens": 3.5}, None, None),
        ([], None, None),
        (None, None, None),
        ("none", None, None),
    ],
)
def test_tokens_that_are_not_counted(chat_server, usage, prompt_tokens, completion_tokens):
    server = chat_server(lambda messages, body: whole(usage, content="Hi"))
    reply = ask(server.url)
    assert (reply.prompt_tokens, reply.completion_tokens) == (prompt_tokens, completion_tokens)


def test_what_is_sent_back(chat_server):
    """This server refuses empty messages, and two of one role in a row. What follows an empty reply
    is added to the message before. A lone surrogate is replaced."""

    def reply(messages, body):
        roles = [m["role"] for m in messages]
        if not all(m["content"].strip() for m in messages):
            return (400, "messages: text content blocks must be non-empty")
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            return (400, "Conversation roles must alternate user/assistant/user/assistant/...")
        if len(server.requests) == 1:
            return whole(content=None)
        return " \n" if len(server.requests) == 3 else gold(messages).replace("know", "\ud83d")

    server = chat_server(reply)
    [[row], _] = play(server.url, jobs_of(tasks_of()[:1]))
    assert row["success"] and row["format_errors"] == 2
    assert [said == "" for said, _ in row["steps"][:4]] == [True, False, True, False]
    assert row["completion_tokens"] is None, "one part is unknown"
    assert common.json_line(row).encode()
    conversation = server.requests[-1]["messages"]
    assert conversation[1]["content"].startswith("Thought: I \ufffd.\nAction: ")
    for message in (conversation[0], conversation[2]):
        assert message["content"].endswith(f"\n\nObservation: {common.NO_ACTION}")
    assert common.turns(row["steps"], 0)[:2] == conversation[1:3], "training has the same turns"
    assert common.turns([["", "No."], ["", "No."]], 0) == []


# ---- errors --------------------------------------------------------------------------------------


def openai_error(message: str, param: str | None = None, code: str | None = None) -> str:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return json.dumps({"error": error})


def pydantic_error(kind: str, name: str, message: str) -> str:
    """As FastAPI's servers and Mistral send it; `input` is what it repeats of the request."""
    detail = {"type": kind, "loc": ["body", name], "msg": message, "input": "unsupported stop"}
    return json.dumps({"detail": [detail]})


USE_OTHER = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead."
)
ONLY_ONE = (
    "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) "
    "value is supported."
)
EXTRA = "Extra inputs are not permitted"
SERDE = "unknown field `seed`, expected one of `messages`, `max_tokens`, `temperature`, `stop`"
JACKSON = 'Unrecognized field "seed" (2 known properties: "max_tokens", "stop")'
GEMINI = 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'


@pytest.mark.parametrize(
    "name, other_name, status, said",
    [
        ("max_tokens", "max_completion_tokens", 400, openai_error(USE_OTHER, "max_tokens")),
        ("max_tokens", "max_completion_tokens", 400, USE_OTHER),
        ("max_tokens", "max_completion_tokens", 422, "Unknown field max_tokens"),
        ("max_tokens", "max_completion_tokens", 400, "max_tokens is no longer supported"),
        ("temperature", None, 400, openai_error(ONLY_ONE, "temperature", "unsupported_value")),
        ("temperature", None, 400, "invalid temperature: only 1 is allowed for this model"),
        ("temperature", None, 400, "invalid temperature: only 0.6 is allowed for this model"),
        (
            "temperature",
            None,
            400,
            "gpt-5 models don't support temperature=0.0. Only temperature=1",
        ),
        ("temperature", None, 400, "`temperature` is deprecated for this model."),
        ("stop", None, 400, "Argument not supported on this model: stop"),
        ("stop", None, 400, "Unsupported parameter: 'stop' is not supported with this model."),
        ("stop", None, 400, "property 'stop' is unsupported, use stop_sequences"),
        ("seed", None, 400, "Unrecognized request argument supplied: seed"),
        ("seed", None, 400, "does not support parameters: ['seed'], for model=o1. To drop these"),
        ("seed", None, 400, "Unsupported param: seed"),
        ("seed", None, 400, json.dumps([{"error": {"code": 400, "message": GEMINI}}])),
        ("seed", None, 400, "Malformed input request: extraneous key [seed] is not permitted"),
        ("seed", None, 400, "Additional properties are not allowed ('seed' was unexpected)"),
        ("seed", None, 400, 'Bad request: json: unknown field "seed"'),
        ("seed", None, 400, f"Failed to deserialize the JSON body: {SERDE}"),
        ("seed", None, 400, JACKSON),
        ("seed", None, 400, "Invalid parameter: seed"),
        ("seed", None, 400, "Field 'seed' is forbidden"),
        ("seed", None, 422, f"At path body.seed: {EXTRA}"),
        ("seed", None, 422, pydantic_error("extra_forbidden", "seed", EXTRA)),
        ("seed", None, 422, f"body -> seed\n  {EXTRA} (type=extra_forbidden)"),
        ("seed", None, 200, json.dumps({"error": {"code": 400, "message": "Unknown name seed"}})),
    ],
)
def test_an_unsupported_parameter(chat_server, capfd, name, other_name, status, said):
    """It is renamed or left out from then on. That is said once, also if it is refused to several
    requests at once."""
    server = chat_server(lambda messages, body: (status, said) if name in body else "Hi")
    messages = [{"role": "user", "content": "Hi"}]
    values = {"temperature": 0.0, "max_tokens": 256, "seed": 5, "stop": ["\n"]}

    async def main():
        model = common.Model("o1", server.url)
        await asyncio.gather(*[model.ask(messages, seed=5, stop=["\n"]) for _ in range(3)])
        await model.ask(messages, seed=5, stop=["\n"])

    asyncio.run(main())
    assert len(server.requests) == 7
    body = server.requests[-1]
    value = values.pop(name)
    if other_name:
        values[other_name] = value
    assert body == {"model": "o1", "messages": messages, **values}
    [line] = capfd.readouterr().err.splitlines()
    assert server.url in line and f"does not support {name} for o1" in line
    assert (other_name or "left out") in line


def test_several_unsupported_parameters(chat_server, capfd):
    """One after the other, and a new name, too."""

    def reply(messages, body):
        for name in ("max_tokens", "temperature", "stop", "seed", "max_completion_tokens"):
            if name in body:
                said = f"Unsupported parameter: '{name}' is not supported with this model."
                return (400, openai_error(said, name, "unsupported_parameter"))
        return "Hi"

    server = chat_server(reply)
    model = common.Model("o1", server.url)
    messages = [{"role": "user", "content": "Hi"}]
    assert asyncio.run(model.ask(messages, seed=5, stop=["\n"])).text == "Hi"
    assert len(server.requests) == 6
    assert server.requests[-1].keys() == {"model", "messages"}
    assert len(capfd.readouterr().err.splitlines()) == 5


@pytest.mark.parametrize(
    "said",
    [
        "Unsupported value: 'reasoning_effort' does not support 'none' with this model. Supported "
        "values are: 'low', 'medium', and 'high'.",
        "Unrecognized request argument supplied: reasoning_effort",
        "Model grok-4 does not support parameter reasoningEffort.",
        "`reasoning_effort` must be one of `low`, `medium`, or `high`",
        "Budget 0 is invalid. This model only works in thinking mode.",
        "Reasoning is mandatory for this endpoint and cannot be disabled.",
        pydantic_error("literal_error", "reasoning_effort", "Input should be 'low' or 'high'"),
    ],
)
def test_a_model_that_cannot_be_told_not_to_think(chat_server, capfd, said):
    """It is not told so: how much it thinks is its own, as before there was the setting."""
    server = chat_server(lambda messages, body: (400, said) if "reasoning_effort" in body else "Hi")
    model = common.Model("m", server.url)
    model.thinking = common.parse_thinking("off")
    assert asyncio.run(model.ask([{"role": "user", "content": "Hi"}])).text == "Hi"
    assert "chat_template_kwargs" in server.requests[-1]
    assert "does not support reasoning_effort for m" in capfd.readouterr().err


@pytest.mark.parametrize(
    "said",
    [
        "chat_template is not supported for Mistral tokenizers.",
        "body.chat_template_kwargs: property 'body.chat_template_kwargs' is unsupported",
    ],
)
def test_a_server_without_variables_of_the_chat_template(chat_server, said):
    name = "chat_template_kwargs"
    server = chat_server(lambda messages, body: (400, said) if name in body else "Hi")
    model = common.Model("m", server.url)
    model.thinking = common.parse_thinking("off")
    assert asyncio.run(model.ask([{"role": "user", "content": "Hi"}])).text == "Hi"


def test_an_effort_that_a_model_does_not_have_is_an_error(chat_server):
    said = "`reasoning_effort` must be one of `none` or `default`"
    server = chat_server(lambda messages, body: (400, said))
    model = common.Model("m", server.url)
    model.thinking = common.parse_thinking("high")
    with pytest.raises(InputError, match="must be one of"):
        asyncio.run(model.ask([{"role": "user", "content": "Hi"}]))


def test_no_seed_is_sent_without_one(chat_server):
    server = chat_server(lambda messages, body: "Hi")
    ask(server.url)
    assert server.requests[0].keys() == {"model", "messages", "temperature", "max_tokens"}


@pytest.mark.parametrize(
    "status, said",
    [
        (400, "Invalid 'temperature': decimal above maximum value. Expected a value <= 2."),
        (
            400,
            "max_tokens is too large: 50000. This model supports at most 16384 completion tokens.",
        ),
        (400, "Invalid request: max_tokens 40000 is over the limit of 8192"),
        (400, "max tokens of 40000 exceeds the limit of 8192"),
        (400, "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"),
        (400, "max_tokens: 100000 > 8192, which is the maximum allowed number of output tokens"),
        (400, "max_tokens=256 cannot be greater than max_model_len=128."),
        (400, "temperature must be non-negative, got -1.0."),
        (400, "Invalid 'stop': array too long. Expected an array with maximum length 4."),
        (400, "Unsupported value: 'temperature' does not support 3. Supported values are 0 to 2."),
        (400, "The value 3 of 'temperature' is not allowed, valid values are 0 to 2."),
        (400, "Invalid parameter: temperature, the maximum is 2"),
        (422, "Input validation error: `temperature` must be strictly positive"),
        (422, "Input validation error: `max_new_tokens` must be <= 192. Given: 256"),
        (422, "temperature: Input should be less than or equal to 2"),
        (
            422,
            pydantic_error("less_than_equal", "temperature", "should be less than or equal to 2"),
        ),
        (400, "The response was filtered due to the prompt triggering the content policy."),
        (400, "Model scripted does not support chat completions"),
        (402, "This request requires more credits, or fewer max_tokens."),
    ],
)
def test_a_request_that_is_wrong_in_itself(chat_server, capfd, status, said):
    """A value that is out of range, for example: an error at once, with what the server says."""
    server = chat_server(lambda messages, body: (status, said))
    with pytest.raises(InputError, match=f"answers {status}: ") as error:
        ask(server.url)
    assert not isinstance(error.value, common.ContextOverflow)
    last_word = "equal to 2" if "detail" in said else said.split()[-1]
    assert last_word in str(error.value)
    assert "input" not in str(error.value) and "tries" not in str(error.value)
    assert len(server.requests) == 1 and not capfd.readouterr().err


NO_TOKENS = completion("", 9000, 0)  # of LMDeploy
NO_TOKENS["choices"][0]["finish_reason"] = "length"
TGI = "`inputs` tokens + `max_new_tokens` must be <= 1512. Given: 1000 `inputs` tokens"
SHIFT = "the request exceeds the available context size. try increasing the context size"
LM_STUDIO = (
    "Trying to keep the first 10136 tokens when context the overflows. However, the model is loaded"
    " with context length of only 7866 tokens, which is not enough."
)


@pytest.mark.parametrize(
    "status, said",
    [
        (400, "request (33056 tokens) exceeds the available context size (32768 tokens)"),
        (500, SHIFT),
        (500, "Context size has been exceeded."),
        (500, "Requested tokens (5000) exceed context window of 4096"),
        (400, json.dumps({"error": LM_STUDIO})),
        (400, "The number of tokens to keep from the prompt is greater than the context length"),
        (400, "Input length (11680) exceeds model's maximum context length (4096)."),
        (
            400,
            "The decoder prompt (length 16476) is longer than the maximum model length of 16384.",
        ),
        (400, "max_tokens must be at least 1, got -2815."),
        (400, "The input (61709 tokens) is longer than the model's context length (40960 tokens)."),
        (400, "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens)."),
        (422, f"Input validation error: {TGI}"),
        (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 1872"),
        (424, json.dumps({"message": f"Received client error (422) with message {TGI}"})),
        (400, openai_error("Please reduce it.", "messages", "context_length_exceeded")),
        (400, "Input tokens exceed the configured limit of 272000 tokens."),
        (400, "prompt is too long: 200251 tokens > 199999 maximum"),
        (400, "input length and `max_tokens` exceed context limit: 199759 + 8192 > 200000"),
        (413, "Request Entity Too Large"),
        (413, "Request body too large for gpt-4o model. Max size: 8000 tokens."),
        (
            429,
            "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000.",
        ),
        (
            400,
            json.dumps([{"error": {"message": "The input token count (9) exceeds the maximum"}}]),
        ),
        (
            400,
            "Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
        ),
        (400, "too many tokens: total number of tokens in the prompt cannot exceed 4081"),
        (
            400,
            "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
        ),
        (400, "Your request exceeded model token limit: 8192 (requested: 9000)"),
        (400, "Range of input length should be [1, 30720]"),
        (400, "Cannot truncate prompt with n_keep (14169) >= n_ctx (4096)"),
        (400, "Total tokens of image and text exceed max message tokens"),
        (400, "max tokens of 4096 exceeded"),
        (400, "max_completion_tokens must be at least 1, got -904"),
        (400, "Prompt length 5000 > 4096"),
        (400, "The prompt contains 9000 tokens which is over the limit of 8192"),
        (400, "prompt is too long: 9000 tokens > 8192 maximum; thinking budget 1024"),
        (200, json.dumps(NO_TOKENS)),
        (200, json.dumps({"error": {"code": 400, "message": SHIFT}})),
        (200, json.dumps({"error": {"message": "Provider error", "metadata": {"raw": SHIFT}}})),
    ],
)
def test_a_prompt_that_is_too_long(chat_server, monkeypatch, status, said):
    """In the words of many servers; it is not retried."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "16")
    server = chat_server(lambda messages, body: (status, said))
    with pytest.raises(common.ContextOverflow):
        ask(server.url)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "status, said",
    [
        (429, "This request would exceed your organization's rate limit of 40,000 input tokens"),
        (500, "CUDA out of memory. Tried to allocate more than 2 GiB"),
        (503, "Too many inputs in flight: more than 128 requests"),
        (504, "The request exceeded the time limit"),
    ],
)
def test_other_things_that_are_too_much(chat_server, monkeypatch, status, said):
    """They are retried."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "1")
    server = chat_server(lambda messages, body: (status, said))
    with pytest.raises(InputError, match="retried in vain; finished rows are kept") as error:
        ask(server.url)
    assert not isinstance(error.value, common.ContextOverflow)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "said",
    [
        "Request queue limit exceeded",
        "HTTPConnectionPool(host='10.0.0.3', port=80): Max retries exceeded with url: /v1",
        "Request rejected: too many tokens in flight",
        "CUDA out of memory: request exceeds available memory",
        "The prompt was rejected: it would exceed the maximum concurrency",
    ],
)
def test_a_busy_server_is_no_long_prompt(said):
    """Nor if the status of the error is not known."""
    assert not common.is_too_long(503, said) and not common.is_too_long(None, said)


IN_A_CHOICE = {"choices": [{"error": {"code": 502, "message": "Provider broke"}, "message": {}}]}


@pytest.mark.parametrize(
    "status, body, says",
    [
        (
            200,
            {"error": {"message": "Provider returned error"}},
            "completion: Provider returned error",
        ),
        (200, {"error": "no slot left"}, "without a completion: no slot left"),
        (200, "<html>Please log in</html>", "without a completion: Please log in"),
        (200, {"object": "error", "message": "No GPU", "code": 40303}, "completion: No GPU"),
        (200, {"error": {"message": "Moderated", "code": 403}}, "answers 403: Moderated"),
        (200, {"choices": None, "base_resp": {"status_msg": "no balance"}}, "no balance"),
        (200, IN_A_CHOICE, "answers 502: Provider broke"),
        (400, {"error": {"message": "E", "metadata": {"raw": "not on Sundays"}}}, "not on Sundays"),
        (400, {"error": "a text"}, "answers 400: a text"),
        (400, {"error": "no \ud83d"}, "answers 400: no \ufffd"),
        (
            422,
            {"detail": [{"msg": "Field required", "loc": ["body", "n"]}]},
            "n, Field required|Field",
        ),
        (502, "<html><title>502 Bad\nGateway</title></html>", "answers 502: 502 Bad Gateway"),
    ],
)
def test_reasons_are_kept(chat_server, monkeypatch, status, body, says):
    """In one line."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    text = body if isinstance(body, str) else json.dumps(body)
    server = chat_server(lambda messages, _: (status, text))
    with pytest.raises(InputError, match=says) as error:
        ask(server.url)
    assert "\n" not in str(error.value)


def test_an_error_that_passes(chat_server):
    errors = [(200, json.dumps({"error": {"message": "Provider returned error", "code": 502}}))]
    server = chat_server(lambda messages, body: errors.pop() if errors else "Hi")
    assert ask(server.url).text == "Hi"


def test_a_host_that_does_not_resolve(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InputError, match=r"cannot be reached .*\(.*Name or service not known\)"):
        ask("http://no-such-host/v1")


def test_servers_that_are_not_there_or_silent(chat_server, monkeypatch):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"cannot be reached .*\(Connection refused\)"):
        ask("http://127.0.0.1:9/v1")
    silent = chat_server(lambda messages, body: time.sleep(5))
    with pytest.raises(InputError, match="does not answer .Request timed out"):
        ask(silent.url, timeout=0.3)


def test_a_server_that_trickles(monkeypatch):
    """Some servers send blanks as long as the model thinks: only the limit of the whole request
    ends that, and the error names it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def trickle():
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.02)

    threading.Thread(target=trickle, daemon=True).start()
    with listening, pytest.raises(InputError, match="no whole answer within 0.9 s") as error:
        ask(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.3)
    assert "in vain" not in str(error.value)


def test_an_answer_that_is_nested_too_deeply(chat_server, monkeypatch):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    server = chat_server(lambda messages, body: (200, "[" * 100_000))
    with pytest.raises(InputError, match="without a completion"):
        ask(server.url)
    server.models = (200, "[" * 100_000)
    assert common.list_models(server.url) == []


# ---- rate limits ---------------------------------------------------------------------------------


def test_retry_after_is_honoured(chat_server, monkeypatch):
    """It does not count as a retry, and its time not as the request's: here there are no retries,
    and the time limit is three times 0.45 s."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    answers = [(429, "wait", {"retry-after": "1"}), (429, "wait", {"retry-after": "0.5"}), "Hi"]
    server = chat_server(lambda messages, body: answers.pop(0))
    start = time.time()
    assert ask(server.url, timeout=0.45).text == "Hi"
    assert time.time() - start > 1.5


def date_in(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    "status, headers, tries, says",
    [
        (429, {"retry-after": "86400"}, 1, "asks to wait 86400 s, and 600 s is the limit"),
        (429, {"retry-after-ms": "86400000"}, 1, "asks to wait 86400 s"),
        (429, {"retry-after": date_in(86400)}, 1, "asks to wait 8[56][0-9]{3} s"),
        (503, {"retry-after": "86400"}, 1, "503.*asks to wait 86400 s"),
        (429, {"retry-after": "0"}, 2, "429.*retried in vain"),
        (429, {"retry-after": "-1"}, 2, "429.*retried in vain"),
        (429, {"retry-after": date_in(-60)}, 2, "429.*retried in vain"),
        (429, {"retry-after": "soon"}, 2, "429.*retried in vain"),
    ],
)
def test_pauses_that_are_given_up_on(chat_server, monkeypatch, status, headers, tries, says):
    """A pause that is too long is an error at once; one of no length counts as a retry."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "1")
    server = chat_server(lambda messages, body: (status, "wait", headers))
    with pytest.raises(InputError, match=says + ".*finished rows are kept"):
        ask(server.url)
    assert len(server.requests) == tries


def test_short_pauses_grow(chat_server, monkeypatch):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    answers = ["Hi", (429, "wait", {"retry-after": "0.01"}), (429, "wait", {"retry-after-ms": "1"})]
    server = chat_server(lambda messages, body: answers.pop())
    start = time.time()
    assert ask(server.url).text == "Hi"
    assert time.time() - start > 0.75


def test_pauses_end(chat_server, monkeypatch, capfd):
    """A server that always asks for another pause is given up on, and long waits are said."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    monkeypatch.setattr(common, "MOST_PAUSES", 0.5)
    server = chat_server(lambda messages, body: (429, "wait", {"retry-after": "0.3"}))
    with pytest.raises(InputError, match="429"):
        ask(server.url)
    assert len(server.requests) == 3
    assert not capfd.readouterr().err


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


def test_servers_that_come_back(chat_server, monkeypatch, capfd):
    """Four servers are restarted one after the other: each is left out and used again."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    monkeypatch.setattr(common, "LOOK_PAUSE", 0.05)
    servers = [chat_server(lambda messages, body: "Hi") for _ in range(4)]
    messages = [{"role": "user", "content": "Hi"}]

    async def main():
        model = common.Model("m", ",".join(server.url for server in servers))

        async def ask_often():
            replies = await asyncio.gather(*[model.ask(messages) for _ in range(8)])
            assert [reply.text for reply in replies] == ["Hi"] * 8

        for server in servers:
            server.down = True
            await ask_often()
            server.down = False
            before = len(server.requests)
            await asyncio.sleep(0.15)
            await ask_often()  # one of them looks for the server first
            await ask_often()
            assert len(server.requests) > before
        assert len(model.alive) == 4 and not model.lost

    asyncio.run(main())
    said = capfd.readouterr().err
    for server in servers:
        assert said.count(f"{server.url}/ cannot be reached or does not answer: 3 other") == 1
        assert said.count(f"{server.url}/ answers again") == 1


@pytest.mark.parametrize("pause", [0.0, 60.0])
def test_the_last_server_is_lost(chat_server, monkeypatch, pause):
    """The others are asked for their health at once, and only if they have none the stage ends."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    monkeypatch.setattr(common, "LOOK_PAUSE", pause)
    first, second = [chat_server(lambda messages, body: "Hi") for _ in range(2)]
    message = [{"role": "user", "content": "Hi"}]

    async def main():
        model = common.Model("m", f"{first.url},{second.url}")
        for server in (first, second, first):
            server.down = True
            for _ in range(3):
                assert (await model.ask(message)).text == "Hi"
            server.down = False
        first.down = second.down = True
        with pytest.raises(InputError, match="cannot be reached"):
            await model.ask(message)

    asyncio.run(main())


@pytest.mark.parametrize(
    "models, healthy",
    [
        ((200, "<html>Welcome</html>"), True),
        ((200, ""), True),
        ((200, '[{"id": "m"}]'), True),
        ((404, "no such path"), True),
        ((500, "out of order"), True),
        ((503, "starting"), False),
        ((521, "web server is down"), False),
    ],
)
def test_what_is_health(chat_server, models, healthy):
    """Any answer is, whatever the server says of its models, but not one of the proxy before it."""
    server = chat_server(lambda messages, body: "Hi")
    server.models = models
    [endpoint] = common.Model("m", server.url).alive
    assert asyncio.run(endpoint.is_healthy()) == healthy


@pytest.mark.parametrize("status", [503, 521])
def test_a_server_that_only_looks_healthy(chat_server, monkeypatch, status):
    """It lists its models, but answers no request: the request is not moved forever."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    monkeypatch.setattr(common, "LOOK_PAUSE", 0.0)
    servers = [chat_server(lambda messages, body: (status, "starting")) for _ in range(2)]
    with pytest.raises(InputError, match=f"{status}: starting"):
        ask(",".join(server.url for server in servers))
    assert sum(len(server.requests) for server in servers) == 5
