"""Model servers: which model they have, which key they get, and proxies in the environment."""

import asyncio
import json
import socket
from types import SimpleNamespace

import pytest
from conftest import ChatServer, stage

import common
from common import InputError, model_fingerprint, name_and_url

ev = stage("05_eval")
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "request_method")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No keys, addresses and proxies of the caller's; no retries."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("API_KEY", "BASE_URL", "ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)
    monkeypatch.delenv("MPO_SERVER_KEY", raising=False)
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")


@pytest.fixture
def server(chat_server) -> ChatServer:
    return chat_server(lambda messages, body: f"I am {body['model']}")


def ask(name: str, url: str | None = None) -> str:
    """The reply of a model, as the stages ask it."""
    a = SimpleNamespace(concurrency=1)
    with common.open_model(name, url, a) as model:
        reply = asyncio.run(model.ask([{"role": "user", "content": "Who are you?"}]))
    return reply.text


def lists(*models) -> tuple[int, str]:
    """The list of models with these names, or of these entries."""
    entries = [{"id": m} if isinstance(m, str) else m for m in models]
    return 200, json.dumps({"object": "list", "data": entries})


# -- which model

OLLAMA = lists("nomic-embed-text:latest", "llama3.1:latest", "llama3.1:70b")
OPENROUTER = lists("meta-llama/llama-3.1-8b-instruct", "openai/gpt-4o")
LORA = lists(
    {"id": "llama", "root": "meta-llama/Llama-3.1-8B", "parent": None},
    {"id": "sql", "root": "/adapters/sql", "parent": "llama"},
)
TWO_NAMES = lists({"id": "llama", "root": "/m"}, {"id": "default", "root": "/m"})
ALIASES = lists({"id": "a.gguf", "aliases": ["qwen"]}, {"id": "b.gguf", "aliases": None})


@pytest.mark.parametrize(
    "models, name, found",
    [
        (OLLAMA, "llama3.1", "llama3.1:latest"),
        (OLLAMA, "llama3.1:latest", "llama3.1:latest"),
        (OLLAMA, "Llama3.1", "llama3.1:latest"),
        (OLLAMA, "llama3.1:70b", "llama3.1:70b"),
        (lists("a", "llama3.1"), "llama3.1:latest", "llama3.1"),
        (lists("models/gemini-2.5-pro", "models/gemma"), "gemini-2.5-pro", "models/gemini-2.5-pro"),
        (OPENROUTER, "openai/gpt-4o", "openai/gpt-4o"),
        (OPENROUTER, "openai/gpt-4o:online", "openai/gpt-4o:online"),
        (OPENROUTER, "api:openai/gpt-9", "openai/gpt-9"),
        (LORA, "meta-llama/Llama-3.1-8B", "llama"),
        (LORA, "sql", "sql"),
        (TWO_NAMES, "", "llama"),
        (TWO_NAMES, "default", "default"),
        (ALIASES, "qwen", "a.gguf"),
        (lists("openai/*"), "openai/gpt-9", "openai/gpt-9"),  # LiteLLM
        (lists("only"), "", "only"),
        (lists("only"), "another", "only"),
        # no list of models
        ((404, '{"detail": "Not Found"}'), "mine", "mine"),
        ((405, ""), "mine", "mine"),
        ((501, "not implemented"), "mine", "mine"),
        ((403, "forbidden"), "mine", "mine"),
        ((200, "<html>Welcome</html>"), "mine", "mine"),
        ((200, '{"object": "list", "data": null}'), "mine", "mine"),
        ((200, '{"object": "list", "data": []}'), "mine", "mine"),
        ((200, '{"models": [{"name": "x"}]}'), "mine", "mine"),
        ((200, '[{"id": "x"}, {"id": "mine"}]'), "mine", "mine"),  # Together
        ((200, '"hello"'), "mine", "mine"),
        ((200, '{"data": [null, {"id": 7}, {"id": "x"}, {"id": "y"}]}'), "x", "x"),
    ],
)
def test_the_model_of_a_name(server, models, name, found):
    """It is the same for the rows' fingerprint, for requests, and for a name that was found."""
    server.models = models
    assert model_fingerprint(name, server.url) == found
    assert ask(name, server.url) == ask(f"{name}@{server.url}") == f"I am {found}"
    known, url = name_and_url(f"{name}@{server.url}" if name else server.url)
    assert url == server.url and model_fingerprint(known, url) == found
    assert known in (found, name)


@pytest.mark.parametrize(
    "models, name, says",
    [
        (
            OLLAMA,
            "llama3",
            "does not have llama3. It has nomic-embed-text:latest, llama3.1:latest, ",
        ),
        (OLLAMA, "mistral:latest", "does not have mistral:latest. It has nomic-embed-text:latest"),
        (
            OPENROUTER,
            "gpt-4o",
            "Name one of these; api:gpt-4o if it has that one and does not list",
        ),
        (
            OLLAMA,
            "",
            "has several models, nomic-embed-text:latest, .*: name one of them, NAME@http",
        ),
        (LORA, "", "has several models, llama, sql: name one"),
        (lists({"id": "a", "root": ["x"]}, "b"), "c", "does not have c. It has a, b"),
        ((404, ""), "", "does not list its models: add /v1 .*, or name the one .* NAME@http://"),
        (lists(*[f"vendor/m-{i}" for i in range(300)]), "m-77", "m-77.* and 290 others"),
        ((503, '{"error": {"message": "Loading model"}}'), "mine", "answers 503 .*Loading model"),
        ((401, '{"error": "no key"}'), "mine", "wants a key: set MPO_SERVER_KEY"),
    ],
)
def test_a_model_that_a_server_does_not_have(server, models, name, says):
    server.models = models
    with pytest.raises(InputError, match=says):
        ask(name, server.url)
    assert not server.requests


def test_a_server_with_one_other_model_says_so(server, capfd):
    server.models = lists("phi4")
    for _ in range(2):
        assert model_fingerprint("my/model", server.url) == "phi4"
    assert capfd.readouterr().err.count("has phi4, not my/model: phi4 is asked") == 1


def test_the_servers_of_one_model(chat_server):
    first, second = [chat_server(lambda messages, body: "Hi") for _ in range(2)]
    dead = "http://127.0.0.1:9/v1"
    urls = f"{dead}, {first.url}/,{second.url}/chat/completions"
    assert model_fingerprint("", urls) == "scripted"
    assert common.server_addresses(urls) == [dead, first.url, second.url]
    second.models = lists("phi4")
    with pytest.raises(InputError, match=f"{first.url} has scripted; {second.url} has phi4"):
        model_fingerprint("", urls)
    second.models = lists("phi4", "llama")
    with pytest.raises(InputError, match="does not have scripted. It has phi4, llama"):
        model_fingerprint("scripted", urls)
    with pytest.raises(InputError, match="cannot be reached .*refused"):
        model_fingerprint("", dead)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "http:/host/v1", "http://h:80a/v1", "http://[::1/v1"]
)
def test_what_is_no_url(url):
    with pytest.raises(InputError, match="is not the URL of a server"):
        common.check_model("m", url)


def test_a_list_of_agents():
    words = ["gpt-4o,a/b", "llama@http://h/v1,http://i/v1", "http://j/v1,http://k/v1", "x,http://l"]
    assert ev.split_commas(words) == [
        "gpt-4o",
        "a/b",
        "llama@http://h/v1,http://i/v1",
        "http://j/v1,http://k/v1",
        "x",
        "http://l",
    ]
    assert common.split_url("claude@20241022@https://me:pw@h/v1") == (
        "claude@20241022",
        "https://me:pw@h/v1",
    )
    assert common.split_url("claude-3-5-sonnet@20241022") == ("claude-3-5-sonnet@20241022", None)
    assert common.split_url("llama3.1:8b") == ("llama3.1:8b", None)
    for address in ("localhost:8000", "127.0.0.1:8000/v1", "gpu-7.cluster:8000/v1"):
        with pytest.raises(InputError, match=f"begins with http://.* so: http://{address}"):
            common.split_url(address)


# -- keys


def test_the_apis_key_goes_to_the_api(server, chat_server, monkeypatch):
    """Also where its address is written as a URL, and if its file ended with a line end."""
    other = chat_server(lambda messages, body: "Hi")
    monkeypatch.setenv("OPENAI_API_KEY", " sk-1\r\n")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/\n")
    assert ask("gpt-9") == "I am gpt-9"
    assert ask("", server.url) == "I am scripted"
    assert server.keys == {"Bearer sk-1"}
    ask("", other.url)
    assert other.keys == {"Bearer none"}
    monkeypatch.setenv("MPO_SERVER_KEY", "own\n")
    ask("", server.url)
    assert server.keys == {"Bearer sk-1"}
    other.keys.clear()
    ask("", other.url)
    assert other.keys == {"Bearer own"}
    monkeypatch.delenv("OPENAI_API_KEY")
    ask("", server.url)
    assert server.keys == {"Bearer sk-1", "Bearer own"}


def sent(server) -> list[tuple[str, str]]:
    """The headers that a server has been sent, in lower case."""
    return [(name.lower(), value) for headers in server.headers for name, value in headers.items()]


def test_other_headers_for_the_api_go_nowhere_else(server, chat_server, monkeypatch):
    other = chat_server(lambda messages, body: "Hi")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: secret\nauthorization: Bearer 2")
    ask("gpt-9")
    assert ("openai-organization", "org") in sent(server)
    assert ("x-gateway", "secret") in sent(server)
    ask("", other.url)
    assert other.keys == {"Bearer none"}
    assert "secret" not in str(sent(other)) and "org" not in {value for _, value in sent(other)}


@pytest.mark.parametrize("asked", ["chats", "models"])
def test_no_key_follows_a_redirect_to_another_host(server, chat_server, monkeypatch, asked):
    monkeypatch.setenv("MPO_SERVER_KEY", "own")
    if asked == "models":
        redirecting = chat_server(lambda messages, body: "Hi")
        redirecting.models = (307, "", {"Location": f"{server.url}/models"})
    else:
        answer = (307, "", {"Location": f"{server.url}/chat/completions"})
        redirecting = chat_server(lambda messages, body: answer)
    ask("", redirecting.url)
    assert redirecting.keys == {"Bearer own"}
    assert server.keys == {None}


@pytest.mark.parametrize("status", [301, 302])
def test_a_redirect_that_makes_a_get_of_a_chat(server, chat_server, status):
    answer = (status, "", {"Location": f"{server.url}/chat/completions"})
    redirecting = chat_server(lambda messages, body: answer)
    with pytest.raises(InputError, match=f"{status}.* redirects to {server.url}/chat/completions"):
        ask("m", redirecting.url)


SECRET = "sk-proj-0123456789"


@pytest.mark.parametrize(
    "text, kept",
    [
        (f"Incorrect API key: {SECRET}.", "Incorrect API key: ***."),
        ("https://me:pass-word@host:8000/v1 is down", "https://***@host:8000/v1 is down"),
        ("http://only-a-name@host/v1", "http://***@host/v1"),
        ("me:pass-word@host.org:8000/v1", "***@host.org:8000/v1"),
        ("header Authorization: Bearer abc-12345678", "header Authorization: Bearer ***"),
        ("Authorization: Basic bWU6cHc0Njc4OQ==", "Authorization: Basic ***"),
        ("http://h/v1/models?api_key=a1b2&limit=3", "http://h/v1/models?api_key=***&limit=3"),
        ("http://h/v1?x=1&access_token=a1b2", "http://h/v1?x=1&access_token=***"),
        # no secrets
        ("llama3.1:70b@http://h:8000/v1", "llama3.1:70b@http://h:8000/v1"),
        ("llama@http://h/v1,http://i/v1", "llama@http://h/v1,http://i/v1"),
        ("claude-3-5-sonnet@20241022", "claude-3-5-sonnet@20241022"),
        ("Bearer authentication is required", "Bearer authentication is required"),
        ("short", "short"),
    ],
)
def test_what_is_masked(monkeypatch, text, kept):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    monkeypatch.setenv("MPO_SERVER_KEY", "short")  # such as EMPTY
    assert str(InputError(text)) == kept


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_a_server_that_repeats_the_key(chat_server, monkeypatch, capfd, status):
    """Neither errors nor rows have it, nor the password of the server's URL: also at the end of
    what is quoted of a long answer."""
    monkeypatch.setenv("MPO_SERVER_KEY", SECRET)
    for text in (f"wrong key {SECRET}", "x" * 290 + SECRET):
        server = chat_server(lambda messages, body, text=text: (status, text))
        url = server.url.replace("http://", "http://me:pass-word@")
        with pytest.raises(InputError) as error:
            ask("m", url)
        reason = common.refusal_reason(error.value)
        assert "sk-p" not in reason and "pass-word" not in reason and "***" in reason
    server.models = (500, "x" * 290 + SECRET)
    with pytest.raises(InputError) as error:
        ask("", url)
    assert "sk-p" not in str(error.value) and "pass-word" not in str(error.value)
    server.models = None
    server.down = True
    with pytest.raises(InputError) as error:
        ask("m", f"{url},{url}")
    assert "pass-word" not in str(error.value) + capfd.readouterr().err


def test_an_unsupported_parameter_and_the_key(chat_server, monkeypatch, capfd):
    monkeypatch.setenv("MPO_SERVER_KEY", SECRET)

    def reply(messages, body):
        if "max_tokens" in body:
            return (400, f"{SECRET}: Unsupported parameter: 'max_tokens' is not supported")
        return "Hi"

    assert ask("m", chat_server(reply).url) == "Hi"
    said = capfd.readouterr().err
    assert "does not support max_tokens" in said and "sk-p" not in said


@pytest.mark.parametrize("key", ["sk-“1”", "sk-1\nsk-2", "sk-1\x7f"])
def test_a_key_that_is_none(server, monkeypatch, key):
    monkeypatch.setenv("MPO_SERVER_KEY", key)
    with pytest.raises(InputError, match="MPO_SERVER_KEY has characters") as error:
        ask("", server.url)
    assert key not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        common.check_model("gpt-4o")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused(chat_server, monkeypatch, status):
    """The error names the variable that holds the key."""
    server = chat_server(lambda messages, body: (status, "wrong key"))
    with pytest.raises(InputError, match="set MPO_SERVER_KEY .*OPENAI_API_KEY is sent to .*only"):
        ask("", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    with pytest.raises(InputError, match="check OPENAI_API_KEY"):
        ask("gpt-4o")


def test_a_server_of_ones_own_that_wants_a_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "for OpenAI")
    server.models = (401, '{"error": "Unauthorized"}')
    with pytest.raises(InputError, match=f"{server.url} wants a key: set MPO_SERVER_KEY"):
        ask("m", server.url)
    assert server.keys == {"Bearer none"}
    # one that lists its models to nobody, but answers
    monkeypatch.setenv("MPO_SERVER_KEY", "own")
    assert ask("m", server.url) == "I am m"


# -- proxies


@pytest.mark.parametrize(
    "url, expected",
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.9.1/v1", True),
        ("https://localhost:8000/v1", True),
        ("http://LOCALHOST./v1", True),
        ("http://127.1:8000/v1", True),
        ("http://0:8000/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://[::ffff:127.0.0.1]:8000/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("http://10.0.0.1:8000/v1", False),
        ("http://gpu-7:8000/v1", False),
        ("https://localhost.example.com/v1", False),
    ],
)
def test_what_is_loopback(url, expected):
    assert common.is_loopback(url) == expected


class IPv6Server(ChatServer):
    address_family = socket.AF_INET6

    def server_bind(self):
        self.server_address = ("::1", 0)
        super().server_bind()


@pytest.mark.parametrize(
    "variables",
    [
        {"http_proxy": "PROXY"},
        {"HTTP_PROXY": "PROXY", "HTTPS_PROXY": "PROXY"},
        {"all_proxy": "PROXY"},
        {"ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": "socks://127.0.0.1:9"},
        {"http_proxy": "PROXY", "no_proxy": "[::1],fe80::/10"},
    ],
    ids=lambda variables: "+".join(variables),
)
def test_loopback_is_asked_without_a_proxy(server, chat_server, monkeypatch, variables):
    """Its models, chats and health."""
    proxy = chat_server(lambda messages, body: "I am a proxy")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("PROXY", proxy.url.removesuffix("/v1")))
    for host in ("127.0.0.1", "localhost"):
        url = server.url.replace("127.0.0.1", host)
        assert ask("", url) == "I am scripted"
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert ask("gpt-9") == "I am gpt-9"
    local = common.LocalServer("m", server.url.removesuffix("/v1"), None, None)
    assert common._is_healthy(local)
    assert not proxy.headers


def test_loopback_of_ipv6(chat_server, monkeypatch):
    proxy = chat_server(lambda messages, body: "I am a proxy")
    monkeypatch.setenv("http_proxy", proxy.url)
    try:
        server = IPv6Server(lambda messages, body: "Hi")
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert ask("", f"http://[::1]:{server.server_port}/v1") == "Hi"
    server.shutdown()
    server.server_close()
    assert not proxy.headers


def test_others_are_asked_through_the_proxy(chat_server, monkeypatch):
    proxy = chat_server(lambda messages, body: "I am a proxy")
    monkeypatch.setenv("http_proxy", proxy.url)
    assert ask("", "http://model.invalid/v1") == "I am a proxy"
    monkeypatch.setenv("http_proxy", "socks://127.0.0.1:9")
    with pytest.raises(InputError, match="a proxy in the environment cannot be used .*no_proxy"):
        ask("m", "http://model.invalid/v1")
