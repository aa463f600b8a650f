"""The server as a process: it says where it is, answers without torch, and ends on a signal."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from qlx.errors import UsageError
from qlx.merging import merge
from qlx.packing import pack
from qlx.serving import listen, load_engine, serve, server
from tests.adapter_support import NF4, Case, inputs_for, make_adapter, make_base
from tests.onnx_support import merged_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
for name in ("torch", "transformers", "peft", "bitsandbytes", "onnx"):
    sys.modules[name] = None
from qlx.serving import serve
serve(sys.argv[1], port=0, threads=1)
print("ended")
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_and_ends_on_a_signal(llama, stop):
    command = [sys.executable, "-c", SCRIPT, str(llama[0].path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stderr.readline()
            (address,) = re.findall(r"http://127\.0\.0\.1:\d+", line)
            body = {"prompt": "def", "max_tokens": 4}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=20)
            assert answer.json()["usage"]["completion_tokens"] == 4
        finally:
            process.send_signal(stop)
            out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out == "ended\n"
    assert err == ""


def test_a_port_in_use_is_named(llama):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=str(port)):
            serve(llama[0].path, port=port)
    with pytest.raises(UsageError, match="999"):
        listen("999.1.1.1", 80)


def test_torch_kinds_answer_like_their_export(llama, text_engine):
    """The same model served from torch and from ONNX writes the same text."""
    merged = load_engine(llama[0].path.parent / "merged-causal-lm")
    assert merged.manifest.kind == "merged"
    prompt = "def add(first, second):"
    first, second = merged.text.generate(prompt), text_engine.text.generate(prompt)
    assert first == second


def test_every_torch_kind_classifies(tmp_path):
    base = make_base(tmp_path / "base", "vit")
    prepare = merged_checkpoint(tmp_path / "other", "image-classification").path
    source = (prepare / "preprocessor_config.json").read_text().replace("16", "8")
    (base / "preprocessor_config.json").write_text(source)
    adapter = make_adapter(base, tmp_path / "adapter", Case("vit", NF4))
    merged = merge(str(base), [adapter.path], tmp_path / "merged")
    packed = pack(merged.path, tmp_path / "packed", to="nf4", min_retention=0)
    pixels = inputs_for("vit")
    for checkpoint in (merged, packed):
        engine = load_engine(checkpoint.path)
        assert engine.images.predictor.predict(pixels).shape == (12, 5)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("localhost", True),
        ("127.example.org", False), ("0.0.0.0", False), ("10.0.0.1", False), ("::", False),
    ],
)  # fmt: skip
def test_only_addresses_of_this_machine_are_loopback(host, loopback):
    assert server._is_loopback(host) == loopback


def test_another_loopback_address_answers_for_itself(llama, monkeypatch):
    given = {}
    monkeypatch.setattr(server, "create_app", lambda *_, **options: given.update(options))
    monkeypatch.setattr(server.Server, "run", lambda *_, **__: None)
    monkeypatch.setattr(server.Server, "__init__", lambda *_: None)
    serve(llama[0].path, host="127.0.0.2", port=0)
    assert "127.0.0.2" in given["hosts"]
    assert "localhost" in given["hosts"]
