"""Adapters of one graph as models of one server: `model` chooses, and a wrong name is an error."""

import pytest

from qlx.errors import UsageError
from qlx.runtime import SamplingOptions, TextGenerator
from qlx.serving import create_app, load_engines
from tests.serving.support import events, served

PROMPT = "def add(first, second):"


@pytest.fixture(scope="module")
def engines(swappable_python):
    return load_engines(swappable_python, name="base", threads=1)


@pytest.fixture(scope="module")
def client(engines):
    with served(engines) as client:
        yield client


def test_each_adapter_is_a_model_beside_its_base(client):
    listed = client.get("/v1/models").json()["data"]
    assert [(each["id"], each.get("parent")) for each in listed] == [
        ("base", None),
        ("first", "base"),
        ("second", "base"),
    ]
    assert all(each["verified"]["passed"] for each in listed)
    assert len({each["tag"] for each in listed}) == 3


def test_the_model_field_chooses_the_adapter(client, engines, swappable_python):
    texts = set()
    for name in ("base", "first", "second"):
        adapter = None if name == "base" else name
        generator = TextGenerator(swappable_python, threads=1, adapter=adapter)
        expected = generator.generate(PROMPT, SamplingOptions(max_tokens=12)).text
        body = {"model": name, "prompt": PROMPT, "max_tokens": 12}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["model"] == name
        assert answer["choices"][0]["text"] == expected
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            pieces = [each["choices"][0]["text"] for each in events(stream)[:-1]]
        assert "".join(pieces) == expected
        texts.add(expected)
    assert len(texts) > 1
    assert len({id(engine.text.model.session) for engine in engines}) == 1


def test_a_wrong_adapter_is_not_found_and_never_the_base(client):
    for name in ("third", "First", ""):
        answer = client.post("/v1/completions", json={"model": name, "prompt": PROMPT})
        assert answer.status_code == 404
        assert "there is no model" in answer.json()["error"]["message"]


def test_two_models_of_one_name_are_refused(engines, swappable_python):
    with pytest.raises(UsageError, match="two models of the same name, 'first'"):
        create_app([*engines, *load_engines(swappable_python, name="again")[1:]])
