"""GGUF: the file read by transformers without qlx, every architecture and type, and what is refused."""

import json

import pytest
import torch

from qlx.cli import main
from qlx.errors import CheckFailed, CorruptCheckpoint, InputRefused, Unsupported, UsageError
from qlx.exporting import export_onnx
from qlx.merging import merge
from qlx.models import GgufLayout, load_base, load_model
from qlx.packing import GGUF_TYPES, pack
from qlx.packing.gguf_metadata import add_model_metadata, rope_factors
from qlx.verification import verify
from tests import adapter_support
from tests.adapter_support import NF4, NONE, Case, flip_rows, make_adapter, make_base
from tests.isolation import run_without
from tests.packing.conftest import TERNARY, wide_llama

gguf = pytest.importorskip("gguf")

TIED = ("qwen3", "gemma", "gemma2", "gemma3_text")
KINDS = ("llama", "mistral", "qwen2", *TIED)
BITS = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6}
TERNARY_BITS = {"TQ1_0": 1.6875, "TQ2_0": 2.0625}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GGUF of every architecture in F16, and of Llama in every type that takes 64 inputs."""
    root = tmp_path_factory.mktemp("gguf")
    found = {}
    for kind in KINDS:
        base = make_base(root / f"{kind}-base", kind, tied=kind in TIED)
        adapter = make_adapter(base, root / f"{kind}-adapter", Case(kind, NONE))
        for to in BITS if kind == "llama" else ("F16",):
            target = root / f"{kind}-{to}"
            found[kind, to] = pack(
                adapter.path, target, to="gguf", gguf_type=to, base=base, min_retention=0.8
            )
    return found


PLAIN = """
import pathlib, json, numpy, torch, transformers
from safetensors.numpy import load_file
result = {}
for path in argv:
    config = transformers.AutoConfig.from_pretrained(path)
    if config.model_type == "mistral":  # the same to llama.cpp, and so to the reader
        config = None
    options = {} if config is None else {"config": config}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, gguf_file="model.gguf", **options)
    probe = load_file(path + "/probe.safetensors")
    ids, mask = (torch.from_numpy(probe["input." + n]) for n in ("input_ids", "attention_mask"))
    with torch.inference_mode():
        given = model.eval()(input_ids=ids, attention_mask=mask).logits.numpy()
    rows = mask.numpy().astype(bool)
    given, wanted = given[rows], probe["output.own"][rows]
    result[path] = float(numpy.linalg.norm(given - wanted) / numpy.linalg.norm(wanted))
"""


def test_transformers_reads_the_file_without_qlx_and_gives_our_outputs(made):
    """Its reader of GGUF is not ours; it has none for the first Gemma."""
    paths = [made[key].path for key in made if key[0] != "gemma"]
    found = run_without(("qlx", "peft", "bitsandbytes"), PLAIN, *paths)
    assert len(found) == len(KINDS) - 1 + len(BITS) - 1
    assert max(found.values()) < 1e-5, found


def test_heads_in_the_wrong_order_would_be_seen(tmp_path, made, monkeypatch):
    from qlx.models import llama_cpp

    monkeypatch.setattr(llama_cpp, "_reordered", lambda rows, cut: rows)
    adapter = made["llama", "F16"].path.parent / "llama-adapter"
    base = made["llama", "F16"].path.parent / "llama-base"
    wrong = pack(adapter, tmp_path / "w", to="gguf", gguf_type="F16", base=base)
    assert run_without(("qlx",), PLAIN, wrong.path)[str(wrong.path)] > 0.1


def test_every_result_verifies_and_loses_what_its_type_loses(made):
    for (_, to), checkpoint in made.items():
        report = verify(checkpoint.path)
        assert report.passed
        spec = checkpoint.manifest.quantization
        assert (spec.backend, spec.scheme, spec.extras["gguf_type"]) == ("gguf", None, to)
        assert report.comparisons["own"].relative <= 1e-4
        kept = report.comparisons["reference"].retention
        assert kept > {4: 0.9, 5: 0.98, 8: 0.999, 16: 0.9999}[spec.weight_bits]


def test_sizes_are_those_of_the_types(made):
    for (kind, to), checkpoint in made.items():
        tensors = gguf.GGUFReader(checkpoint.path / "model.gguf").tensors
        packed = [t for t in tensors if t.tensor_type.name == to and t.name.startswith("blk.")]
        count = sum(t.n_elements for t in packed)
        assert 8 * sum(t.n_bytes for t in packed) / count == BITS[to]
        assert len(packed) == 14, kind
        norms = [t for t in tensors if "norm" in t.name]
        assert norms
        assert {t.tensor_type.name for t in norms} == {"F32"}
        heads = {t.name: t.tensor_type.name for t in tensors if not t.name.startswith("blk.")}
        assert ("output.weight" in heads) == (kind not in TIED)
        assert heads["token_embd.weight"] == ("BF16" if to == "BF16" else "F16")


@pytest.mark.parametrize("to", TERNARY_BITS)
def test_ternary_codes_survive_whole(tmp_path, monkeypatch, to):
    """A ternary model whose scales a file can hold is the same in the file to the last bit."""
    monkeypatch.setattr(adapter_support, "draw", flip_rows)
    base = wide_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", Case("llama", TERNARY))
    made = pack(adapter.path, tmp_path / "p", to="gguf", gguf_type=to, base=base)
    trained = load_base(base, "causal-lm", quant=adapter.manifest.quantization)
    read = load_model(made)
    for name in adapter.manifest.quantization.modules:
        wanted = trained.get_submodule(name).dequantize()
        wanted[:3] *= -1
        assert torch.equal(read.get_submodule(name).weight, wanted), name
    tensors = gguf.GGUFReader(made.path / "model.gguf").tensors
    sizes = {8 * t.n_bytes / t.n_elements for t in tensors if t.tensor_type.name == to}
    assert sizes == {TERNARY_BITS[to]}


@pytest.mark.exhaustive
def test_transformers_reads_ternary_types_without_qlx(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_support, "draw", flip_rows)
    base = wide_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", Case("llama", TERNARY))
    made = [
        pack(adapter.path, tmp_path / to, to="gguf", gguf_type=to, base=base).path
        for to in TERNARY_BITS
    ]
    found = run_without(("qlx", "peft", "bitsandbytes"), PLAIN, *made)
    assert len(found) == 2
    assert max(found.values()) < 1e-5, found


def test_a_delta_below_a_step_fails_the_gate(tmp_path, made):
    base = made["llama", "F16"].path.parent / "llama-base"
    adapter = make_adapter(base, tmp_path / "a", Case("llama", NF4, size=0.02))
    with pytest.raises(CheckFailed, match=r"retention .* \(limit ≥ 0.9\)"):
        pack(adapter.path, tmp_path / "p", to="gguf", gguf_type="Q4_0", base=base)
    assert not (tmp_path / "p").exists()


def test_two_writes_are_the_same_bytes(tmp_path, made):
    first = made["llama", "Q4_0"]
    base, adapter = (first.path.parent / f"llama-{part}" for part in ("base", "adapter"))
    again = pack(adapter, tmp_path / "p", to="gguf", gguf_type="Q4_0", base=base, min_retention=0.8)
    assert again.digest == first.digest


def test_metadata_that_llama_cpp_needs(made):
    fields = gguf.GGUFReader(made["qwen3", "F16"].path / "model.gguf").fields
    wanted = {
        "general.architecture": "qwen3",
        "general.file_type": 1,
        "qwen3.block_count": 2,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {name: fields[name].contents() for name in wanted} == wanted


@pytest.mark.parametrize(("window", "wanted"), [(None, 32), (8, 8), (64, 32)])
def test_a_window_that_llama_cpp_does_not_know_bounds_the_context(tmp_path, window, wanted):
    from transformers import MistralConfig

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    config = MistralConfig(max_position_embeddings=32, sliding_window=window)
    add_model_metadata(writer, GgufLayout("llama", config))
    assert writer.kv_data[0]["llama.context_length"].value == wanted


def test_llama_3_frequencies_are_those_of_transformers(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    plain = 5e5 ** (-torch.arange(0, 128, 2) / 128)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=None)
    factors = rope_factors(GgufLayout("llama", config))
    torch.testing.assert_close(plain / factors, wanted)
    assert factors.min() == 1
    assert factors.max() == 8


def _changed(tmp_path, made, **fields):
    """The F16 Llama's adapter and base with other fields in both configurations."""
    import shutil

    root = made["llama", "F16"].path.parent
    base = shutil.copytree(root / "llama-base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | fields))
    return base, make_adapter(base, tmp_path / "adapter", Case("llama", NONE))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_act": "gelu"}, "has the activation silu, this model gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of type 'dynamic'",
        ),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path, made, fields, says):
    base, adapter = _changed(tmp_path, made, **fields)
    with pytest.raises(Unsupported, match=says):
        pack(adapter.path, tmp_path / "p", to="gguf", base=base)
    assert not (tmp_path / "p").exists()


def test_blocks_wider_than_every_layer_are_refused_with_another_choice(tmp_path, merged):
    with pytest.raises(Unsupported, match=r"groups of 256.*choose another --gguf-type"):
        pack(merged["llama"].path, tmp_path / "p", to="gguf", gguf_type="TQ2_0")


def test_options_and_models_that_gguf_does_not_take(tmp_path, bases, merged):
    for options in ({"group_size": 64}, {"double_quant": True}, {"gguf_type": "Q6_K"}):
        with pytest.raises(UsageError, match="gguf-type"):
            pack(merged["llama"].path, tmp_path / "p", to="gguf", **options)
    with pytest.raises(UsageError, match="belongs to --to gguf"):
        pack(merged["llama"].path, tmp_path / "p", to="int4", gguf_type="F16")
    with pytest.raises(Unsupported, match="takes language models"):
        pack(merged["vit"].path, tmp_path / "p", to="gguf")
    assert set(GGUF_TYPES) == {*BITS, *TERNARY_BITS}


def test_values_too_large_for_16_bits_are_refused_by_name(tmp_path, made, monkeypatch):
    def huge(adapted, size, seed):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.fill_(1e3 if "q_proj" in name else 0.01)

    monkeypatch.setattr(adapter_support, "draw", huge)
    base = made["llama", "F16"].path.parent / "llama-base"
    adapter = make_adapter(base, tmp_path / "a", Case("llama", NONE))
    with pytest.raises(InputRefused, match=r"q_proj.weight.*too large for F16"):
        pack(adapter.path, tmp_path / "p", to="gguf", gguf_type="F16", base=base)


def test_what_can_be_done_with_it_and_what_not(tmp_path, made, capsys):
    path = made["llama", "Q8_0"].path
    onnx = export_onnx(path, tmp_path / "onnx")
    assert verify(onnx.path).passed
    assert main(["inspect", str(path)]) == 0
    assert "GGUF Q8_0, 14 tensors" in capsys.readouterr().out
    with pytest.raises(InputRefused, match="GGUF file cannot be a base"):
        merge(path, [path.parent / "llama-adapter"], tmp_path / "m")


def test_a_file_that_is_not_the_models_is_refused(tmp_path, made):
    import shutil

    from qlx.models.llama_cpp import load_gguf
    from qlx.models.loading import model_config

    path = shutil.copytree(made["llama", "Q8_0"].path, tmp_path / "p")
    data = (path / "model.gguf").read_bytes()
    config = model_config(path, "causal-lm")
    for broken in (b"nothing", data[:100], data[: len(data) // 2]):
        (path / "model.gguf").write_bytes(broken)
        with pytest.raises(CorruptCheckpoint, match=r"model.gguf"):
            load_gguf(path, config)
    shutil.copy(made["qwen2", "F16"].path / "model.gguf", path)
    with pytest.raises(CorruptCheckpoint, match="missing, or one too many"):
        load_gguf(path, config)
