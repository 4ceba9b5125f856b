"""Asking a model behind an OpenAI-compatible chat endpoint: vLLM, llama.cpp, Ollama, SGLang, LM Studio, or a service with a key.

The standard library's client is enough for it. Nothing is sent anywhere but to the address that the user names: redirects are refused, since they would take
the key along, and an address on this machine is never asked through a proxy.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LuthierError

LARGEST = 16 * 2**20  # bytes of a reply that are read
LATER = (408, 409, 425, 429)  # asked too early or too often; with all from 500 up, worth another try
LONGEST_WAIT = 120.0  # seconds


class Refused(Exception):
    """The endpoint does not take this one request (it is too long, say); others may be fine."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What was said. ``cut``: it reached the limit of tokens."""

    text: str
    cut: bool = False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """One chat model behind an address. Safe to use from several threads; ``close`` ends the waiting of all of them.

    ``url``: up to and with /v1; ``key``: sent as a bearer token, and nowhere written; ``tries``: of one request, with growing pauses between them.
    Raises LuthierError for an address that cannot be one.
    """

    def __init__(self, url: str, model: str = "", *, key: str | None = None, timeout: float = 120.0, tries: int = 6, pause: float = 1.0):
        self.url, self.model, self._key, self.timeout, self.tries, self._pause = _checked(url), model, key, timeout, tries, pause
        host = urllib.parse.urlsplit(self.url).hostname or ""
        self.is_local = host == "localhost" or _is_loopback(host)
        proxies = urllib.request.ProxyHandler({}) if self.is_local else urllib.request.ProxyHandler()
        self._opener = urllib.request.build_opener(proxies, _NoRedirect)
        self._has_answered = False  # then what goes wrong later is worth another try
        self._closing = threading.Event()
        self._limit_name, self._takes_temperature = "max_tokens", True  # as most servers have it; the newest of OpenAI's differ

    def chat(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float = 0.0) -> Reply:
        """The model's reply. Raises Refused for a request that is not taken, LuthierError where no request can be."""
        while True:
            asked = {"model": self.model, "messages": list(messages), self._limit_name: max_tokens}
            name, warm = self._limit_name, self._takes_temperature
            try:
                return self._reply(self._ask("chat/completions", asked | ({"temperature": temperature} if warm else {})))
            except Refused as e:
                if name == "max_tokens" and "max_completion_tokens" in str(e):
                    self._limit_name = "max_completion_tokens"
                elif warm and "temperature" in str(e):
                    self._takes_temperature = False
                elif self._has_answered:
                    raise
                else:
                    raise LuthierError(f"{self.url}: refuses the first request: {e}") from None

    def models(self) -> list[str]:
        """The names of the models that are served. Raises LuthierError where the endpoint does not say."""
        try:
            found = self._ask("models", None)
            return [str(m["id"]) for m in found["data"]]
        except (Refused, KeyError, TypeError):
            raise LuthierError(f"{self.url}: does not list its models; name one: --judge-model NAME") from None

    def close(self) -> None:
        """Whoever still waits gets an error at once."""
        self._closing.set()

    # --- one request ---

    def _ask(self, path: str, payload: Mapping[str, Any] | None) -> Any:
        request = urllib.request.Request(f"{self.url}/{path}", method="GET" if payload is None else "POST")
        request.add_header("Accept", "application/json")
        request.add_header("User-Agent", "luthier")
        if payload is not None:
            request.data = json.dumps(payload).encode()
            request.add_header("Content-Type", "application/json")
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        for attempt in range(self.tries):
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    body = response.read(LARGEST)
                break
            except urllib.error.HTTPError as e:
                with e:
                    said, after = self._said(e.read(LARGEST)), e.headers.get("Retry-After")
                why = self._judged(path, e.code, said, e.headers)
            except (OSError, http.client.HTTPException) as e:  # URLError, timeouts, connections that were closed
                after, why = None, self._unreachable(e)
            if attempt == self.tries - 1:
                raise LuthierError(f"{self.url}: {why}, {self.tries} times in a row; say the command again to go on where it stopped")
            if self._closing.wait(self._wait(attempt, after)):
                raise LuthierError("interrupted")
        try:
            found = json.loads(body)
        except ValueError:
            raise LuthierError(
                f"{self.url}/{path}: answers with something else than JSON ({body[:60].decode('utf-8', 'replace')!r}); is it an OpenAI-compatible endpoint?"
            ) from None
        return found

    def _reply(self, found: Any) -> Reply:
        try:
            choice = found["choices"][0]
            text = choice["message"].get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            raise LuthierError(f"{self.url}: answers without choices[0].message.content; is it an OpenAI-compatible endpoint?") from None
        self._has_answered = True
        return Reply(str(text), choice.get("finish_reason") == "length")

    def _judged(self, path: str, code: int, said: str, headers: Any) -> str:
        """Why a request is tried again. Raises where that is of no use."""
        if code in LATER or code >= 500:
            return f"answers {code} ({said})" if said else f"answers {code}"
        if code in (401, 403):
            key = "does not take the key" if self._key else "wants a key; name the environment variable that holds it: --key-env NAME"
            raise LuthierError(f"{self.url}: {key} ({code}: {said})")
        if code == 404 and path != "models":
            raise LuthierError(f"{self.url}: has no /chat/completions, or no model {self.model!r} ({code}: {said}); --endpoint usually ends with /v1")
        if 300 <= code < 400:
            raise LuthierError(f"{self.url}: sends on to {headers.get('Location')}; give that address itself, so that the key goes where you say")
        raise Refused(f"{code}: {said}")

    def _unreachable(self, e: Exception) -> str:
        reason = getattr(e, "reason", e)
        text = "no answer within the time" if isinstance(reason, TimeoutError) else str(getattr(reason, "strerror", None) or reason or type(e).__name__).lower()
        if not self._has_answered and not isinstance(reason, TimeoutError):
            raise LuthierError(f"{self.url}: cannot be reached: {text}; is the server running, and is the address right?")
        return text if text.startswith("no answer") else f"cannot be reached ({text})"

    def _wait(self, attempt: int, after: str | None) -> float:
        """Seconds before the next try: what the server asks for, else 1, 2, 4, ... with some chance in it, so that not all threads come back at once."""
        if after is not None and re.fullmatch(r"\d+(\.\d+)?", after.strip()):
            return min(float(after), LONGEST_WAIT)
        return min(self._pause * 2**attempt * random.uniform(0.75, 1.25), LONGEST_WAIT)

    def _said(self, body: bytes) -> str:
        """What an error says, in one line and without the key."""
        text = body.decode("utf-8", "replace")
        try:
            found = json.loads(text)
            error = found.get("error", found) if isinstance(found, dict) else found
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except ValueError:
            text = re.sub(r"<[^>]*>", " ", text)
        text = " ".join(text.split())[:300]
        return text.replace(self._key, "***") if self._key else text


def _checked(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LuthierError(f"--endpoint {url}: an address is http://HOST:PORT/v1 or https://HOST/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise LuthierError("--endpoint: a user, a key or a query in the address would be written into files; give it without, and the key by --key-env")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/chat/completions"), "", ""))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_of(name: str) -> str:
    """The key that an environment variable holds. Raises LuthierError, which does not repeat what was given, since that may be the key itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise LuthierError("--key-env: takes the name of an environment variable that holds the key, never the key itself")
    key = os.environ.get(name, "").strip()
    if not key:
        raise LuthierError("--key-env: no environment variable of that name is set here; export it first (the name is given, never the key itself)")
    return key
