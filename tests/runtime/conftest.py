"""One exported model per task, shared by this directory's tests."""

import pytest

from tests.onnx_support import export_for_tests


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """An ONNX ViT classifier and the torch model it was made of."""
    return export_for_tests("image-classification", tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """An ONNX Llama and the torch model it was made of."""
    return export_for_tests("causal-lm", tmp_path_factory)
