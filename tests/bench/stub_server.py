"""What the simulated model servers have in common: HTTP and OpenAI's protocol, at little cost."""

import asyncio
import json


async def serve_connection(reader, writer, answer) -> None:
    """Answer the requests of a connection until the client closes it. `await answer(path, body)`
    is the JSON to send; `body` is None for a request without one."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            length = content_length(head)
            body = json.loads(await reader.readexactly(length)) if length else None
            content = json.dumps(await answer(path, body)).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(content) + content
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def completion(text: str, prompt_tokens: int, completion_tokens: int) -> dict:
    """The body of a chat completion, as OpenAI's API has it."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "0",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
