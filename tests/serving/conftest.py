"""One server per task, shared by this directory's tests."""

import pytest

from qlx.serving import load_engine
from tests.onnx_support import export_for_tests
from tests.serving.support import served


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    return export_for_tests("image-classification", tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return export_for_tests("causal-lm", tmp_path_factory)


@pytest.fixture(scope="session")
def text_engine(llama):
    return load_engine(llama[0].path, name="writer", threads=1)


@pytest.fixture(scope="session")
def image_engine(vit):
    return load_engine(vit[0].path, name="looker", threads=1)


@pytest.fixture(scope="session")
def client(text_engine, image_engine):
    """A client of a server with both models; the text model is the default."""
    with served([text_engine, image_engine]) as client:
        yield client
