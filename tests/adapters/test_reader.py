"""The strict reader: every tensor and every field is understood or refused by name."""

import json

import pytest
import torch

from qlx.adapters import (
    delta_shape,
    delta_weight,
    read_adapter,
    read_config,
    split_experts,
    with_rows,
)
from qlx.adapters.config import pattern_matches
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, UnsafeInput, Unsupported
from qlx.weights import read_tensors, write_tensors

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "embed"],
    "bias": "none",
    "base_model_name_or_path": "some/base",
    "megatron_core": "megatron.core",
    "loftq_config": {},
}
P = "base_model.model."


def tensors(rank=4):
    torch.manual_seed(0)
    return {
        P + "h.0.q_proj.lora_A.weight": torch.randn(rank, 16),
        P + "h.0.q_proj.lora_B.weight": torch.randn(24, rank),
        P + "embed.lora_embedding_A": torch.randn(rank, 30),
        P + "embed.lora_embedding_B": torch.randn(8, rank),
    }


def write(directory, config=None, weights=None, **fields):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps((config or CONFIG) | fields))
    write_tensors(
        directory / "adapter_model.safetensors", tensors() if weights is None else weights
    )
    return directory


def test_reads_what_is_there(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", alpha_pattern={"q_proj": 20}))
    assert set(adapter.deltas) == {"h.0.q_proj", "embed"}
    assert adapter.deltas["h.0.q_proj"].scaling == 5
    assert adapter.deltas["embed"].scaling == 3
    assert adapter.deltas["embed"].kind == "embedding"
    assert adapter.config.base_model == "some/base"
    assert adapter.parameters == 4 * (16 + 24 + 30 + 8)
    assert adapter.without_effect() == []


def test_untrained_updates_are_named(tmp_path):
    weights = tensors()
    weights[P + "h.0.q_proj.lora_B.weight"].zero_()
    assert read_adapter(write(tmp_path / "a", weights=weights)).without_effect() == ["h.0.q_proj"]


@pytest.mark.parametrize(
    ("key", "module", "matches"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("proj", "model.q_proj", False),
        ("layers.1", "model.layers.1", True),
        ("layers.1", "model.layers.11", False),
        ("^model.q_proj", "model.q_proj", True),
        ("^q_proj", "model.q_proj", False),
        (r"layers\.[01]\.q_proj", "model.layers.1.q_proj", True),
    ],
)
def test_patterns_match_as_in_peft(key, module, matches):
    other = pytest.importorskip("peft.utils.other")
    assert pattern_matches(key, module) is matches
    assert (other.get_pattern_key([key], module) == key) is matches


REFUSED_FIELDS = {
    "use_qalora": True,
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "ensure_weight_tying": True,
    "loftq_config": {"loftq_bits": 4},
    "arrow_config": {"top_k": 1},
    "init_lora_weights": "pissa",
    "something_new": 1,
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_feature_that_changes_the_function_is_refused_by_name(field, tmp_path):
    directory = write(tmp_path / "a", **{field: REFUSED_FIELDS[field]})
    with pytest.raises(Unsupported, match=field):
        read_adapter(directory)
    assert read_adapter(write(directory, **{field: None}))  # null means it is not used


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "IA3", "PREFIX_TUNING"])
def test_other_methods_are_refused(kind, tmp_path):
    with pytest.raises(Unsupported, match=kind):
        read_adapter(write(tmp_path / "a", peft_type=kind))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"r": 0}, CorruptCheckpoint),
        ({"r": "8"}, CorruptCheckpoint),
        ({"r": True}, CorruptCheckpoint),
        ({"lora_alpha": -1}, CorruptCheckpoint),
        ({"rank_pattern": {"q_proj": 2.5}}, CorruptCheckpoint),
        ({"rank_pattern": {"q_(": 4}}, UnsafeInput),
        ({"target_modules": [1]}, CorruptCheckpoint),
        ({"bias": "some"}, Unsupported),
        ({"alpha_pattern": {"(a+)+b": 4}}, UnsafeInput),
        ({"alpha_pattern": {"(.*)(.*)(.*)(.*)x": 4}}, UnsafeInput),
        ({"alpha_pattern": {"a" * 400: 4}}, UnsafeInput),
        ({"alpha_pattern": {"q_proj": 4, ".*": 5}}, InputRefused),
        ({"r": 8}, Mismatch),
        ({"use_dora": True}, Mismatch),
        ({"lora_bias": True}, Mismatch),
        ({"modules_to_save": ["classifier"]}, Mismatch),
    ],
)
def test_a_wrong_configuration_is_refused(fields, error, tmp_path):
    with pytest.raises(error):
        read_adapter(write(tmp_path / "a", **fields))


def change(**changes):
    def apply(weights):
        for key, value in changes.items():
            name = P + key.replace("__", ".")
            if value is None:
                del weights[name]
            else:
                weights[name] = value
        return weights

    return apply


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (change(h__0__q_proj__lora_B__weight=None), CorruptCheckpoint, "h.0.q_proj"),
        (change(embed__lora_embedding_A=None), CorruptCheckpoint, "embed"),
        (change(h__0__q_proj__lora_A__weight=torch.randn(3, 16)), CorruptCheckpoint, "do not fit"),
        (
            change(h__0__q_proj__lora_A__weight=torch.full((4, 16), float("nan"))),
            InputRefused,
            "NaN",
        ),
        (
            change(h__0__q_proj__lora_A__weight=torch.zeros(4, 16, dtype=torch.int16)),
            Unsupported,
            "int16",
        ),
        (change(h__0__q_proj__lora_magnitude_vector=torch.ones(24)), Mismatch, "use_dora"),
        (change(h__0__q_proj__lora_B__bias=torch.ones(24)), Mismatch, "bias of B"),
        (change(classifier__weight=torch.ones(2, 2)), Unsupported, "classifier.weight"),
        (change(h__0__q_proj__bias=torch.ones(24)), Unsupported, "q_proj.bias"),
        (change(h__0__q_proj__lora_C__weight=torch.ones(2)), Unsupported, "lora_C"),
        (lambda w: w | {"q_proj.lora_A.weight": torch.ones(2, 2)}, Unsupported, "named as PEFT"),
        (lambda w: {}, CorruptCheckpoint, "no tensor"),
    ],
)
def test_every_tensor_is_consumed_or_refused(spoil, error, words, tmp_path):
    with pytest.raises(error, match=words):
        read_adapter(write(tmp_path / "a", weights=spoil(tensors())))


def test_whole_parameters_are_kept_when_they_are_announced(tmp_path):
    weights = tensors() | {
        P + "classifier.weight": torch.ones(2, 2),
        P + "pre_classifier.weight": torch.ones(3, 3),
        P + "h.0.q_proj.base_layer.bias": torch.ones(24),
    }
    directory = write(
        tmp_path / "a", weights=weights, modules_to_save=["classifier"], bias="lora_only"
    )
    assert set(read_adapter(directory).saved) == {
        "classifier.weight",
        "pre_classifier.weight",  # PEFT matches modules_to_save by the end of the name
        "h.0.q_proj.bias",
    }


def test_a_pickle_is_refused(tmp_path):
    directory = write(tmp_path / "a")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UnsafeInput, match="pickle"):
        read_adapter(directory)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"adapter_config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CorruptCheckpoint, match=r"adapter_model\.safetensors is missing"):
        read_adapter(tmp_path)


def test_a_duplicate_key_in_the_configuration_is_refused(tmp_path):
    directory = write(tmp_path / "a")
    text = json.dumps(CONFIG)
    (directory / "adapter_config.json").write_text('{"r": 64, ' + text[1:])
    with pytest.raises(CorruptCheckpoint, match="twice"):
        read_adapter(directory)


def test_reading_does_not_change_the_tensors(tmp_path):
    directory = write(tmp_path / "a")
    adapter = read_adapter(directory)
    stored = read_tensors(directory / "adapter_model.safetensors")
    assert torch.equal(adapter.deltas["h.0.q_proj"].a, stored[P + "h.0.q_proj.lora_A.weight"])


# Embedding rows, bare parameters and fused experts

E = P + "h.0.mlp.experts."


def experts(count=3, rank=4, gate_up=24, inner=12, width=16):
    torch.manual_seed(1)
    return {
        E + "base_layer.lora_A.weight": torch.randn(count * rank, width),
        E + "base_layer.lora_B.weight": torch.randn(gate_up, count * rank),
        E + "lora_A.weight": torch.randn(count * rank, inner),
        E + "lora_B.weight": torch.randn(width, count * rank),
    }


BOTH = {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}


def test_nested_parameters_are_told_apart(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", weights=experts(), **BOTH))
    assert {name: delta.kind for name, delta in adapter.deltas.items()} == {
        "h.0.mlp.experts.gate_up_proj": "experts",
        "h.0.mlp.experts.down_proj": "experts",
    }
    delta = adapter.deltas["h.0.mlp.experts.gate_up_proj"]
    assert (delta.experts, delta.rank, delta.scaling) == (3, 4, 3)
    assert delta_shape(delta) == (3, 24, 16)


def test_fused_experts_come_apart_as_peft_multiplies_them(tmp_path):
    """PEFT: einsum of B as [out, r, experts] and A as [experts, r, in]."""
    adapter = read_adapter(write(tmp_path / "a", weights=experts(), **BOTH))
    delta = adapter.deltas["h.0.mlp.experts.gate_up_proj"]
    a, b = delta.a.reshape(3, 4, 16), delta.b.reshape(24, 4, 3)
    wanted = torch.einsum("o r e, e r i -> e o i", b, a) * 3
    assert torch.allclose(delta_weight(delta), wanted, atol=1e-5)
    shapes = {}
    for expert in range(3):
        for part, shape in (
            ("gate_proj", (12, 16)),
            ("up_proj", (12, 16)),
            ("down_proj", (16, 12)),
        ):
            shapes[f"h.0.mlp.experts.{expert}.{part}.weight"] = shape
    parts = split_experts(delta, shapes)
    assert len(parts) == 6
    for expert in range(3):
        for part, rows in (("gate_proj", slice(0, 12)), ("up_proj", slice(12, 24))):
            found = delta_weight(parts[f"h.0.mlp.experts.{expert}.{part}.weight"])
            assert torch.allclose(found, wanted[expert, rows], atol=1e-5)
    for spoil, words in (
        ({"h.0.mlp.experts.3.gate_proj.weight": (12, 16)}, "more experts"),
        ({"h.0.mlp.experts.2.up_proj.weight": (11, 16)}, "24 rows, the base 23"),
    ):
        with pytest.raises(Mismatch, match=words):
            split_experts(delta, shapes | spoil)
    with pytest.raises(Mismatch, match="lacks"):
        split_experts(delta, {k: v for k, v in shapes.items() if ".2.up_proj" not in k})
    with pytest.raises(Unsupported, match="single experts"):
        split_experts(delta, {"h.0.mlp.experts.gate_up_proj": (3, 24, 16)})


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        (["experts.gate_up_proj"], Unsupported, "which of the target_parameters"),
        (["experts.one", "experts.two"], Unsupported, "which of the target_parameters"),
        (["q_proj.weight"], Unsupported, "which of the target_parameters"),
        (["weight"], Unsupported, "without the module"),
    ],
)
def test_parameters_that_cannot_be_told_apart_are_refused(tmp_path, parameters, error, words):
    with pytest.raises(error, match=words):
        read_adapter(write(tmp_path / "a", weights=experts(), target_parameters=parameters))


def test_experts_of_another_rank_are_refused(tmp_path):
    with pytest.raises(Mismatch, match="rank 5"):
        read_adapter(write(tmp_path / "a", weights=experts(), r=5, **BOTH))


def test_named_parameters_and_tokens_must_be_there(tmp_path):
    with pytest.raises(Mismatch, match=r"target_parameters is 'c\.x', but none"):
        read_adapter(write(tmp_path / "a", target_parameters=["c.x"]))
    with pytest.raises(Mismatch, match="trainable_token_indices"):
        read_adapter(write(tmp_path / "b", trainable_token_indices=[1, 2]))


ROWS = P + "embed.token_adapter.trainable_tokens_delta"


def with_tokens(rows=2):
    kept = {key: value for key, value in tensors().items() if "embed" not in key}
    return kept | {ROWS: torch.ones(rows, 8)}


def test_trained_tokens_replace_their_rows(tmp_path):
    adapter = read_adapter(
        write(tmp_path / "a", weights=with_tokens(), trainable_token_indices=[7, 2])
    )
    rows = adapter.rows["embed"]
    assert rows.indices == (7, 2)
    base = torch.zeros(9, 8)
    changed = with_rows(base, rows)
    assert changed.sum(1).tolist() == [0, 0, 8, 0, 0, 0, 0, 8, 0]
    assert not base.any()
    for other in (torch.zeros(7, 8), torch.zeros(9, 6)):
        with pytest.raises(Mismatch, match="replaces row 7 of width 8"):
            with_rows(other, rows)
    named = write(tmp_path / "b", weights=with_tokens(), trainable_token_indices={"embed": [0, 1]})
    assert read_adapter(named).rows["embed"].indices == (0, 1)


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        ([1], Mismatch),
        ([1, 2, 3], Mismatch),
        ([1, 1], CorruptCheckpoint),
        ([1, -2], CorruptCheckpoint),
        ({"other": [1, 2]}, Mismatch),
        ({"embed": []}, CorruptCheckpoint),
        ("all", CorruptCheckpoint),
        (None, Mismatch),
    ],
)
def test_tokens_that_do_not_agree_with_their_rows_are_refused(tmp_path, indices, error):
    with pytest.raises(error):
        read_adapter(write(tmp_path / "a", weights=with_tokens(), trainable_token_indices=indices))
