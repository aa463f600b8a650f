"""What the service answers, asked over HTTP."""

import base64
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from qlx.runtime import Classifier, SamplingOptions, TextGenerator
from tests.serving.support import events, served

PROMPT = "def add(first, second):"


def png(size=(20, 24), seed=1, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def look(client, data, kind="application/octet-stream"):
    """Ask the image model about a raw file."""
    return client.post("/v1/classify?model=looker", content=data, headers={"content-type": kind})


def test_it_is_alive_and_names_its_models(client, llama):
    assert client.get("/healthz").json()["status"] == "ok"
    first, second = client.get("/v1/models").json()["data"]
    assert (first["id"], first["kind"], first["task"]) == ("writer", "onnx", "causal-lm")
    assert first["tag"] == llama[0].manifest.tag
    assert first["verified"]["passed"] is True
    assert first["verified"]["relative"] < 1e-5
    assert second["id"] == "looker"


def test_an_image_as_base64_and_as_raw_bytes(client, vit):
    data = png()
    (expected,) = Classifier(vit[0].path, threads=1).classify([Image.open(io.BytesIO(data))])
    body = {"model": "looker", "image": base64.b64encode(data).decode()}
    for answer in (
        client.post("/v1/classify", json=body),
        client.post(
            "/v1/classify", json=body | {"image": "data:image/png;base64," + body["image"]}
        ),
        client.post(
            "/v1/classify?model=looker", content=data, headers={"content-type": "image/png"}
        ),
    ):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["label"] == expected.label
        assert found["probabilities"] == pytest.approx(expected.probabilities)
    other = look(client, png(seed=2)).json()
    assert other["probabilities"] != pytest.approx(expected.probabilities)


def test_a_completion_is_what_the_runtime_generates(client, llama):
    expected = TextGenerator(llama[0].path, threads=1).generate(
        PROMPT, SamplingOptions(max_tokens=12)
    )
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12})
    found = answer.json()
    assert answer.status_code == 200
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == expected.text
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": expected.prompt_tokens + 12,
    }


def test_token_ids_are_a_prompt_too(client, text_engine):
    ids = text_engine.text.encode(PROMPT)
    body = {"max_tokens": 6}
    by_text = client.post("/v1/completions", json=body | {"prompt": PROMPT}).json()
    by_ids = client.post("/v1/completions", json=body | {"prompt": ids}).json()
    assert by_text["choices"] == by_ids["choices"]


def test_a_stream_is_the_same_text_in_pieces(client):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
    assert found[-1] == "[DONE]"
    assert "".join(each["choices"][0]["text"] for each in found[:-1]) == whole
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert len({each["id"] for each in found[:-1]}) == 1


def test_a_chat_answers_what_the_template_asks(client, text_engine):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    text = text_engine.text
    expected = text.generate(text.encode_chat(turns), SamplingOptions(max_tokens=8))
    body = {"messages": turns, "max_completion_tokens": 8}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        found = events(response)
    deltas = [each["choices"][0]["delta"] for each in found[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] for delta in deltas) == expected.text


def test_options_reach_the_sampler(client):
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.2, "top_p": 0.9, "top_k": 30}

    def text(**more):
        return client.post("/v1/completions", json=body | more).json()["choices"][0]["text"]

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    whole = text(seed=1)
    assert text(seed=1, stop=whole[4:6]) == whole[: whole.index(whole[4:6])]


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b'{"prompt": "a", "prompt": "b"}', 400, "twice"),
        ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
        ("/v1/completions", b"[" * 100, 400, "deeper"),
        ("/v1/completions", b'{"prompt": ' + b"9" * 5000 + b"}", 400, "5000 digits"),
        ("/v1/completions", b'{"prompt": "a", "temperature": 1e400}', 400, "too large"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "half a character"),
        ("/v1/completions", b'{"prompt": [' + b"9" * 80 + b"]}", 400, "between 0 and"),
        ("/v1/completions", b'{"prompt": "a", "seed": ' + b"9" * 80 + b"}", 400, "seed"),
        ("/v1/completions", b"[]", 400, "body"),
        (
            "/v1/completions",
            b'{"prompt": 3}',
            400,
            "field prompt: Input should be a valid string, or: ",
        ),
        ("/v1/completions", b'{"prompt": {}}', 400, "field prompt: "),
        (
            "/v1/completions",
            b'{"prompt": [1, "a"]}',
            400,
            "field prompt.1: Input should be a valid integer",
        ),
        ("/v1/completions", b'{"prompt": "a", "stop": [1]}', 400, "field stop.0: "),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "user"}]}',
            400,
            "field messages.0.content: Field required",
        ),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": "", "name": 1}]}',
            400,
            "field messages.0.name: ",
        ),
        ("/v1/completions", b"{}", 400, "prompt"),
        ("/v1/completions", b"[]", 400, "must be a JSON object"),
        ("/v1/completions", b'{"prompt": ""}', 400, "empty"),
        ("/v1/completions", b'{"prompt": 3}', 400, "prompt"),
        ("/v1/completions", b'{"prompt": "a", "best_of": 3}', 400, "best_of"),
        ("/v1/completions", b'{"prompt": "a", "n": 2}', 400, "n"),
        ("/v1/completions", b'{"prompt": "a", "presence_penalty": 1}', 400, "presence_penalty"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": "9"}', 400, "max_tokens"),
        ("/v1/completions", b'{"prompt": "a", "top_p": 2}', 400, "top_p"),
        ("/v1/completions", b'{"prompt": "a", "model": "nobody"}', 404, "nobody"),
        ("/v1/completions", b'{"prompt": "a", "model": "looker"}', 400, "does not generate"),
        ("/v1/completions", b'{"prompt": [99999]}', 400, "between 0 and"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "messages"),
        ("/v1/chat/completions", b'{"messages": [{"role": "root", "content": ""}]}', 400, "role"),
        ("/v1/classify", b'{"image": "AAAA"}', 400, "does not classify"),
        ("/v1/classify", b'{"image": "AAAA", "model": "looker"}', 400, "not an image"),
        ("/v1/classify", b'{"image": "***", "model": "looker"}', 400, "base64"),
        ("/v2/anything", b"{}", 404, "Not Found"),
    ],
)
def test_bad_requests_get_one_sentence(client, path, body, status, word):
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert word in error["message"]
    assert "\n" not in error["message"]
    assert error["code"] == status


def test_a_prompt_longer_than_the_context_is_a_bad_request(client):
    answer = client.post("/v1/completions", json={"prompt": [9] * 500, "stream": True})
    assert answer.status_code == 400
    assert "context" in answer.json()["error"]["message"]


def test_a_text_that_no_context_holds_is_refused_before_it_is_tokenized(client, text_engine):
    """Tokenizing megabytes of one word takes many seconds."""
    counted = text_engine.text
    most = 4 * counted.context_length * max(map(len, counted.tokenizer.get_vocab()))
    for path, body in (
        ("completions", {"prompt": "a" * (most + 1)}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * (most + 1)}]}),
    ):
        answer = client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 400
        assert "characters, for which the context" in answer.json()["error"]["message"]
    answer = client.post("/v1/completions", json={"prompt": "a" * most})
    assert "tokens; the context" in answer.json()["error"]["message"]  # counted, then refused


def test_methods_and_media_types_are_checked(client):
    assert client.get("/v1/completions").status_code == 405
    answer = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    # what a foreign web page may send without asking first
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""):
        assert look(client, png(), kind).status_code == 415


def test_a_failure_of_ours_says_so_without_details(text_engine, monkeypatch):
    monkeypatch.setattr(type(text_engine.text), "stream", lambda *_: 1 / 0)
    with served(text_engine) as client:
        answer = client.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500
    assert "division" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_usual_image_formats_are_read(client, kind):
    assert look(client, png(kind=kind)).status_code == 200


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "EPS"])
def test_other_formats_are_not(client, kind):
    answer = look(client, png(kind=kind))
    assert answer.status_code == 400
    assert "PNG" in answer.json()["error"]["message"]


def test_an_image_bomb_is_refused(client):
    stream = io.BytesIO()
    Image.new("L", (9000, 9000)).save(stream, "PNG", compress_level=9)
    data = stream.getvalue()
    answer = look(client, data[:40000])
    assert answer.status_code == 400
    assert "pixels" in answer.json()["error"]["message"]


def test_an_image_too_large_for_pillow_is_called_that(client):
    """Its header alone says 400 million pixels."""
    small = png()
    header = b"IHDR" + (20_000).to_bytes(4) * 2 + small[24:29]
    bomb = small[:12] + header + zlib.crc32(header).to_bytes(4) + small[33:]
    answer = look(client, bomb)
    assert answer.status_code == 400
    assert (
        answer.json()["error"]["message"]
        == "image: too many pixels, more than 67,108,864; scale it down"
    )


def test_the_page_has_a_form_and_loads_nothing(client):
    answer = client.get("/")
    assert "<form" in answer.text
    assert "writer" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("http-equiv", "")
