"""Too much, too slow, gone in the middle: what a client may cost."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from qlx.errors import UsageError
from qlx.serving import ServingLimits, create_app
from tests.serving.support import events, raw, served, slowed

BODY = {"prompt": "def", "max_tokens": 60}


def test_a_declared_large_body_is_refused_before_it_is_read(client):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
    start = time.monotonic()
    answer = raw(client, head)
    assert b" 413 " in answer.splitlines()[0]
    assert (
        b"connection: close" in answer
    )  # the body is never read: the connection ends with the answer
    assert time.monotonic() - start < 3  # not when the keep-alive runs out, at 5 s


def test_a_large_body_without_a_length_is_cut_off(client):
    def pieces():
        for _ in range(40):
            yield b" " * 4096

    answer = client.post(
        "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"+5", b"0x10"])
def test_odd_lengths_are_refused(client, length):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n"
    assert raw(client, head).split(b" ")[1] in (b"400", b"413")


def test_half_a_header_is_hung_up_on(client):
    start = time.monotonic()
    answer = raw(client, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    assert answer == b""
    assert time.monotonic() - start < 3


def test_a_header_dripped_byte_by_byte_is_hung_up_on_too(client):
    import socket

    start = time.monotonic()
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=5) as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ")
        while time.monotonic() - start < 5:
            connection.sendall(b"a")
            time.sleep(0.1)
    assert time.monotonic() - start < 4


def test_large_headers_are_refused(client):
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"
    assert raw(client, head).split(b" ")[1] in (b"400", b"431")


def test_a_body_that_does_not_come_is_timed_out(client):
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\nConnection: close\r\n\r\n{"
    )
    start = time.monotonic()
    assert b" 408 " in raw(client, head).splitlines()[0]
    assert time.monotonic() - start < 4


def test_one_too_many_is_told_to_come_back(text_engine):
    slow, _ = slowed(text_engine, 0.02)
    with served(slow) as client, ThreadPoolExecutor(8) as pool:
        ask = [pool.submit(client.post, "/v1/completions", json=BODY) for _ in range(8)]
        answers = [each.result() for each in ask]
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200] * 3 + [429] * 5  # one runs, two wait
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert "busy" in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.get("/healthz").json()["requests"] == 0


def settled(client, seconds=3.0):
    """Wait until nothing runs; how long that took."""
    start = time.monotonic()
    while client.get("/healthz").json()["requests"]:
        assert time.monotonic() - start < seconds
        time.sleep(0.01)
    return time.monotonic() - start


def test_a_client_that_leaves_a_stream_frees_its_slot_within_a_token(text_engine):
    slow, steps = slowed(text_engine, 0.15)
    with served(slow) as client:
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            assert client.get("/healthz").json()["requests"] == 1
        left = len(steps)
        assert settled(client) < 1.0
        assert len(steps) - left <= 2
        assert len(steps) < 10


def test_a_client_that_leaves_without_an_answer_frees_its_slot_too(text_engine):
    slow, steps = slowed(text_engine, 0.1)
    with served(slow) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=BODY, timeout=0.5)
        assert settled(client) < 1.0
        assert len(steps) < 12


def test_a_client_that_leaves_the_queue_gives_its_place_back(text_engine):
    slow, _ = slowed(text_engine, 0.05)
    with served(slow) as client:
        running = threading.Thread(target=lambda: client.post("/v1/completions", json=BODY))
        running.start()
        time.sleep(0.3)
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=BODY, timeout=0.2)
        running.join()
        settled(client)


def test_an_answer_that_takes_too_long_is_ended(text_engine):
    slow, steps = slowed(text_engine, 0.2)
    limits = ServingLimits(request_seconds=0.7)
    with served(slow, limits=limits) as client:
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 504
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            found = events(response)
        assert found[-1]["error"]["code"] == 504
        settled(client)
        assert len(steps) < 14


def test_waiting_for_the_slot_counts_as_time_of_a_stream(text_engine):
    slow, _ = slowed(text_engine, 0.2)
    with served(slow, limits=ServingLimits(request_seconds=3.0)) as client:
        short = {"json": BODY | {"max_tokens": 8}}  # it has the slot for 1.6 s
        first = threading.Thread(target=client.post, args=("/v1/completions",), kwargs=short)
        first.start()
        time.sleep(0.1)
        start = time.monotonic()
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            found = events(response)
        assert 2.5 < time.monotonic() - start < 4.0
        assert found[-1]["error"]["code"] == 504
        first.join()
        settled(client)


def test_stopping_ends_running_answers(text_engine):
    slow, steps = slowed(text_engine, 0.1)
    limits = ServingLimits(request_seconds=30, shutdown_seconds=1)
    with served(slow, limits=limits) as client:
        stream = client.stream("POST", "/v1/completions", json=BODY | {"stream": True})
        response = stream.__enter__()
        next(response.iter_lines())
    assert len(steps) < 40
    with contextlib.suppress(httpx.HTTPError):
        stream.__exit__(None, None, None)


def test_many_at_once_all_get_their_own_answer(text_engine):
    limits = ServingLimits(waiting=40)
    with served(text_engine, limits=limits) as client, ThreadPoolExecutor(12) as pool:

        def ask(token):
            body = {"prompt": [token], "max_tokens": 5}
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

        tokens = [20 + index for index in range(24)]
        together = list(pool.map(ask, tokens))
        assert together == [ask(token) for token in tokens]
        assert len(set(together)) > 10


def test_names_must_differ(text_engine):
    with pytest.raises(UsageError, match="same name, 'writer'"):
        create_app([text_engine, text_engine])
    with pytest.raises(UsageError):
        create_app([])
