"""An OpenAI-compatible endpoint on this machine, for tests: what it answers is a function of what it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str | tuple[int, Any] | tuple[int, Any, dict[str, str]]]


class Stub:
    """What was asked of it: (path, headers, payload)."""

    def __init__(self, url: str):
        self.url, self.asked = url, list[tuple[str, dict[str, str], dict[str, Any]]]()


def parts(payload: dict[str, Any]) -> tuple[str, str, str]:
    """The whole request, and the answers A and B in it."""
    text = payload["messages"][0]["content"]
    a, b = text.split("=== Answer A ===\n")[1].split("\n\n=== Answer B ===\n")
    return text, a, b.split("\n\n=== End ===")[0]


@contextmanager
def serving(answer: Answer, models: tuple[str, ...] = ("stub",)) -> Iterator[Stub]:
    """``answer``: a reply's text, or (status, body) with headers where it needs them, for each payload."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            stub.asked.append((self.path, dict(self.headers), {}))
            self.reply(200, {"data": [{"id": m} for m in models]}) if models else self.reply(404, {"error": "no such path"})

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.asked.append((self.path, dict(self.headers), payload))
            said = answer(payload)
            if isinstance(said, str):
                said = 200, {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]}
            self.reply(*said)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Whoever asked has gone away."""

    server = Server(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
