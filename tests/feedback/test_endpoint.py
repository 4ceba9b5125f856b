"""The client of OpenAI-compatible endpoints: what it sends, when it asks again, what it says where it cannot go on, and that the key stays a secret."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.feedback.endpoint import Endpoint, Refused, Reply, key_of
from stub_judge import serving

ASK = [{"role": "user", "content": "A or B?"}]
KEY = "sk-verysecret"


def test_a_chat_is_asked_as_servers_expect_it_and_its_reply_read() -> None:
    with serving(lambda _: "A") as stub:
        assert Endpoint(stub.url + "/chat/completions/", "m", key=KEY).chat(ASK, max_tokens=7) == Reply("A")
        path, headers, payload = stub.asked[0]
        assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
        assert payload == {"model": "m", "messages": ASK, "max_tokens": 7, "temperature": 0.0}
        Endpoint(stub.url, "m").chat(ASK, max_tokens=7)
        assert "Authorization" not in stub.asked[1][1]


def test_a_reply_that_was_cut_off_and_one_without_content_are_read() -> None:
    replies = iter([{"message": {"content": None}, "finish_reason": "length"}, {"message": {}, "finish_reason": "stop"}])
    with serving(lambda _: (200, {"choices": [next(replies)]})) as stub:
        endpoint = Endpoint(stub.url, "m")
        assert [endpoint.chat(ASK, max_tokens=7) for _ in range(2)] == [Reply("", cut=True), Reply("")]


def test_models_are_listed() -> None:
    with serving(lambda _: "", models=("a", "b")) as stub:
        assert Endpoint(stub.url).models() == ["a", "b"] and stub.asked[0][0] == "/v1/models"
    with serving(lambda _: "", models=()) as stub, pytest.raises(LuthierError, match="does not list its models; name one: --judge-model NAME"):
        Endpoint(stub.url).models()


def test_a_busy_server_is_asked_again_with_growing_pauses() -> None:
    said: list[Any] = [(429, {"error": {"message": "slow down"}}), (503, b"<html>busy</html>"), (500, b""), "A"]
    with serving(lambda _: said.pop(0)) as stub:
        began = time.monotonic()
        assert Endpoint(stub.url, "m", pause=0.01).chat(ASK, max_tokens=7).text == "A"
        assert len(stub.asked) == 4 and 0.04 < time.monotonic() - began < 5
    waits = [Endpoint("http://127.0.0.1:1/v1")._wait(n, None) for n in range(9)]
    assert all(0.75 * 2**n <= w <= 1.25 * 2**n for n, w in enumerate(waits[:6])) and waits[-1] == 120
    assert Endpoint("http://127.0.0.1:1/v1")._wait(0, "7") == 7 and Endpoint("http://127.0.0.1:1/v1")._wait(0, "9999") == 120


def test_a_server_that_stays_busy_ends_the_matter_with_its_last_word() -> None:
    with serving(lambda _: (429, {"error": {"message": "quota of today is used"}}, {"Retry-After": "0"})) as stub:
        with pytest.raises(LuthierError, match=r"answers 429 \(quota of today is used\), 3 times in a row; say the command again to go on"):
            Endpoint(stub.url, "m", tries=3).chat(ASK, max_tokens=7)
        assert len(stub.asked) == 3


def test_a_request_that_is_not_taken_is_one_request_once_others_were() -> None:
    said: list[Any] = ["A", (400, {"error": {"message": "context length exceeded"}})]
    with serving(lambda _: said.pop(0)) as stub:
        endpoint = Endpoint(stub.url, "m")
        endpoint.chat(ASK, max_tokens=7)
        with pytest.raises(Refused, match="400: context length exceeded"):
            endpoint.chat(ASK, max_tokens=7)
    with (
        serving(lambda _: (400, {"error": {"message": "no such parameter"}})) as stub,
        pytest.raises(LuthierError, match="refuses the first.*no such parameter"),
    ):
        Endpoint(stub.url, "m").chat(ASK, max_tokens=7)


def test_servers_that_name_the_limit_otherwise_and_take_no_temperature_are_served() -> None:
    def strict(payload: dict[str, Any]) -> Any:
        if "max_tokens" in payload:
            return 400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}
        return (400, {"error": {"message": "'temperature' does not support 0"}}) if "temperature" in payload else "B"

    with serving(strict) as stub:
        endpoint = Endpoint(stub.url, "m")
        assert [endpoint.chat(ASK, max_tokens=7).text for _ in range(2)] == ["B", "B"]
        assert len(stub.asked) == 4 and stub.asked[-1][2]["max_completion_tokens"] == 7  # found out once


@pytest.mark.parametrize(
    ("said", "key", "reason"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), KEY, r"does not take the key \(401: Incorrect API key provided: \*\*\*\)"),
        ((401, {"error": "no key"}), None, "wants a key; name the environment variable that holds it: --key-env NAME"),
        (
            (404, {"error": {"message": "The model `m` does not exist"}}),
            None,
            "has no /chat/completions, or no model 'm'.*does not exist.*usually ends with /v1",
        ),
        ((302, b"", {"Location": "http://elsewhere.example/v1"}), KEY, "sends on to http://elsewhere.example/v1; give that address itself"),
        ((200, b"<html>hello</html>"), None, "something else than JSON.*is it an OpenAI-compatible endpoint"),
        ((200, {"answer": "A"}), None, "without choices"),
    ],
)
def test_what_no_second_try_can_mend_is_said_at_once(said: Any, key: str | None, reason: str) -> None:
    with serving(lambda _: said) as stub:
        with pytest.raises(LuthierError, match=reason) as caught:
            Endpoint(stub.url, "m", key=key).chat(ASK, max_tokens=7)
        assert len(stub.asked) == 1 and KEY not in str(caught.value)


def test_a_server_that_is_not_there_is_said_at_once_and_one_that_goes_away_is_waited_for() -> None:
    with serving(lambda _: "A") as stub:
        endpoint = Endpoint(stub.url, "m", pause=0.01, tries=2)
        endpoint.chat(ASK, max_tokens=7)
    with pytest.raises(LuthierError, match="cannot be reached: connection refused; is the server running"):
        Endpoint(stub.url, "m").chat(ASK, max_tokens=7)
    with pytest.raises(LuthierError, match=r"cannot be reached \(connection refused\), 2 times in a row"):
        endpoint.chat(ASK, max_tokens=7)


def test_a_slow_server_is_given_so_much_time() -> None:
    def slow(_: Any) -> str:
        time.sleep(0.5)
        return "A"

    with serving(slow) as stub, pytest.raises(LuthierError, match="no answer within the time, 2 times in a row"):
        Endpoint(stub.url, "m", timeout=0.1, tries=2, pause=0.01).chat(ASK, max_tokens=7)


def test_closing_ends_all_waiting() -> None:
    with serving(lambda _: (503, b"")) as stub:
        endpoint = Endpoint(stub.url, "m", pause=30)
        threading.Timer(0.1, endpoint.close).start()
        began = time.monotonic()
        with pytest.raises(LuthierError, match="interrupted"):
            endpoint.chat(ASK, max_tokens=7)
        assert time.monotonic() - began < 5


def test_this_machine_is_never_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(lambda _: "A") as stub:
        assert Endpoint(stub.url, "m").chat(ASK, max_tokens=7).text == "A"
    assert Endpoint("http://localhost:1/v1").is_local and Endpoint("http://[::1]:1/v1").is_local and not Endpoint("http://10.0.0.1/v1").is_local


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://host/v1", "http://", "judge"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(LuthierError, match=r"an address is http://HOST:PORT/v1 or https://HOST/v1"):
        Endpoint(url)


@pytest.mark.parametrize("url", [f"https://user:{KEY}@host/v1", f"https://host/v1?key={KEY}"])
def test_a_key_in_the_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(LuthierError, match="--key-env") as caught:
        Endpoint(url)
    assert KEY not in str(caught.value)


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    assert key_of("JUDGE_KEY") == KEY
    for given in (KEY, "AIzaVerySecret", ""):
        with pytest.raises(LuthierError, match="--key-env") as caught:
            key_of(given)
        assert not given or given not in str(caught.value)
