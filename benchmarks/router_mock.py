"""An OpenAI-compatible engine that costs nothing: answers at once, streams ready-made frames. `python router_mock.py PORT`.

Faults for the stream-loss table: ``--abort-after N`` cuts every stream after N tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json

import uvloop

MODEL = "mock"


def frame(delta: dict, finish: str | None = None) -> bytes:
    event = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    data = f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


FIRST, TOKEN, LAST = frame({"role": "assistant", "content": ""}), frame({"content": "tok "}), frame({}, "stop")
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def plain(value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def whole(tokens: int) -> bytes:
    message = {"role": "assistant", "content": "tok " * tokens}
    usage = {"prompt_tokens": 16, "completion_tokens": tokens, "total_tokens": 16 + tokens}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [choice],
        "usage": usage,
    }
    return plain(answer)


MODELS = plain({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 8192}]})
INFO = plain(
    {"model_path": MODEL, "served_model_name": MODEL, "tokenizer_path": MODEL, "is_generation": True, "status": "ok"}
)


class Engine(asyncio.Protocol):
    abort_after: int | None = None
    token_s = 0.0

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.buffer = b""
        self.tasks: set[asyncio.Task] = set()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            if not head.startswith((b"get ", b"post ")):
                self.transport.abort()  # a probe for another protocol
                return
            path = self.buffer.split(b" ", 2)[1]
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(path, body)

    def answer(self, path: bytes, body: bytes) -> None:
        if not path.endswith(b"completions"):
            self.transport.write(MODELS if path.endswith(b"/models") else INFO)
            return
        asked = json.loads(body)
        tokens = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        if not asked.get("stream"):
            self.transport.write(whole(tokens))
        elif self.token_s or self.abort_after is not None:
            task = asyncio.get_running_loop().create_task(self.slowly(tokens))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            self.transport.write(HEAD + FIRST + TOKEN * tokens + LAST + DONE)

    async def slowly(self, tokens: int) -> None:
        self.transport.write(HEAD + FIRST)
        for count in range(tokens):
            if count == self.abort_after:
                self.transport.abort()
                return
            self.transport.write(TOKEN)
            await asyncio.sleep(self.token_s)
        self.transport.write(LAST + DONE)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--abort-after", type=int)
    parser.add_argument("--token-ms", type=float, default=0.0)
    options = parser.parse_args()
    Engine.abort_after, Engine.token_s = options.abort_after, options.token_ms / 1000
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", options.port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
