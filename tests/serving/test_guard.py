"""Keys and host names."""

import pytest

from qlx.errors import UsageError
from qlx.serving.server import serve
from tests.serving.support import raw, served

KEY = "correct horse battery"


@pytest.fixture(scope="module")
def locked(text_engine):
    with served(text_engine, api_key=KEY) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/healthz/", "//healthz", "/nothing", "/v1/../healthz"]
)
def test_without_the_key_nothing_answers(locked, path):
    answer = raw(locked, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] == b"401"
    assert b"www-authenticate: Bearer" in answer.lower().replace(b"bearer", b"Bearer")


def test_health_needs_no_key(locked):
    assert locked.get("/healthz").status_code == 200
    assert locked.post("/healthz").status_code == 401


@pytest.mark.parametrize(
    "header",
    ["Bearer wrong", "Bearer", KEY, f"Basic {KEY}", f"Bearer {KEY} ", f"bearer {KEY}", "Bearer ü"],
)
def test_a_wrong_key_is_refused(locked, header):
    head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {header}x\r\nConnection: close\r\n\r\n"
    assert raw(locked, head.encode("latin-1")).split(b" ")[1] == b"401"


def test_two_keys_are_refused_and_the_right_one_opens(locked):
    good = f"Authorization: Bearer {KEY}\r\n"
    head = "GET /v1/models HTTP/1.1\r\nHost: x\r\n{}Connection: close\r\n\r\n"
    assert raw(locked, head.format(good).encode()).split(b" ")[1] == b"200"
    assert raw(locked, head.format(good * 2).encode()).split(b" ")[1] == b"401"


def test_other_host_names_are_refused_on_loopback(text_engine):
    with served(text_engine, hosts=["localhost", "127.0.0.1", "[::1]"]) as client:
        assert client.get("/healthz").status_code == 200
        for host, status in [
            ("localhost:99", 200),
            ("[::1]:5", 200),
            ("LocalHost", 200),
            ("LocalHost:8", 200),
            ("evil.example", 421),
            ("", 421),
        ]:
            assert client.get("/healthz", headers={"host": host}).status_code == status


def test_answers_are_not_stored_and_say_no_software(client):
    headers = client.get("/healthz").headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


@pytest.mark.parametrize("value", ["", "short", "ü" * 20])
def test_a_weak_key_is_refused_at_start(llama, monkeypatch, value):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(UsageError, match="SOME_KEY"):
        serve(llama[0].path, port=0, api_key_variable="SOME_KEY")
