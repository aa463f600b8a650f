"""What a plan refuses, each before a byte is written and by name."""

import pytest
import torch

from qlx.adapters import read_adapter
from qlx.checkpoint import open_checkpoint
from qlx.errors import Mismatch, Unsupported
from qlx.merging import choose_onto, plan_merge
from qlx.weights import open_weights, read_tensors, write_tensors
from tests.adapter_support import NF4, NONE, Case, make_adapter, make_base


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    base = make_base(root / "base", "llama")
    adapter = make_adapter(base, root / "adapter", Case(quant=NF4))
    return base, adapter


def plan(base, manifest, weights, **options):
    settings = {"onto": "as-trained", "dtype": None, "config": {}} | options
    return plan_merge(open_weights(base), manifest, weights, **settings)


def test_every_adapter_tensor_is_in_exactly_one_change(parts):
    base, adapter = parts
    weights = read_adapter(adapter.path)
    made = plan(base, adapter.manifest, weights)
    deltas = [change.delta for change in made.changes.values() if change.delta is not None]
    assert sorted(id(d) for d in deltas) == sorted(id(d) for d in weights.deltas.values())
    assert made.in_place
    assert made.exact
    assert all(change.as_trained for change in made.changes.values())


def test_original_touches_adapted_tensors_only(parts):
    base, adapter = parts
    made = plan(base, adapter.manifest, read_adapter(adapter.path), onto="original")
    assert set(made.changes) == set(adapter.manifest.adapter.tensors.values())
    assert not made.exact


@pytest.mark.parametrize(
    ("dtype", "exact"), [("float32", True), ("bfloat16", False), ("float16", False)]
)
def test_a_dtype_casts_every_float(parts, dtype, exact):
    base, adapter = parts
    made = plan(base, adapter.manifest, read_adapter(adapter.path), dtype=dtype)
    assert made.exact is exact
    assert made.in_place is (dtype == "float32")
    assert len({made.dtype_of(name) for name in made.weights}) == 1


def spec_with(manifest, **changes):
    return manifest.model_copy(update={"adapter": manifest.adapter.model_copy(update=changes)})


def test_a_recorded_module_without_tensors_is_refused(parts, tmp_path):
    base, adapter = parts
    weights = read_adapter(adapter.path)
    module = next(iter(weights.deltas))
    deltas = {name: delta for name, delta in weights.deltas.items() if name != module}
    with pytest.raises(Mismatch, match=f"no tensors for module '{module}'"):
        plan(base, adapter.manifest, type(weights)(weights.config, deltas, {}))


def test_a_module_that_nothing_records_is_refused(parts):
    base, adapter = parts
    weights = read_adapter(adapter.path)
    names = dict(adapter.manifest.adapter.tensors)
    module, _ = names.popitem()
    with pytest.raises(Mismatch, match=f"the adapted module '{module}'"):
        plan(base, spec_with(adapter.manifest, tensors=names), weights)


def test_a_tensor_of_another_shape_is_refused(parts):
    base, adapter = parts
    names = dict(adapter.manifest.adapter.tensors)
    module = next(name for name in names if name.endswith("k_proj"))
    names[module] = names[module].replace("k_proj", "q_proj").replace("layers.0", "layers.1")
    with pytest.raises(Mismatch, match=r"delta for it is|two modules"):
        plan(base, spec_with(adapter.manifest, tensors=names), read_adapter(adapter.path))


def test_a_tensor_that_two_modules_name_is_refused(parts):
    base, adapter = parts
    names = dict(adapter.manifest.adapter.tensors)
    first, second = [name for name in names if name.endswith("q_proj")]
    names[first] = names[second]
    with pytest.raises(Mismatch, match="two modules"):
        plan(base, spec_with(adapter.manifest, tensors=names), read_adapter(adapter.path))


def test_a_quantized_tensor_that_is_missing_is_refused(parts, tmp_path):
    base, adapter = parts
    tensors = read_tensors(base)
    lost = adapter.manifest.quantization.tensors[0]
    del tensors[lost]
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(Mismatch, match=lost.replace(".", r"\.")):
        plan(tmp_path, adapter.manifest, read_adapter(adapter.path))


def test_quantized_without_a_list_of_tensors_is_refused(parts):
    base, adapter = parts
    bare = adapter.manifest.quantization.model_copy(update={"tensors": ()})
    manifest = adapter.manifest.model_copy(update={"quantization": bare})
    with pytest.raises(Mismatch, match="lists no tensors"):
        plan(base, manifest, read_adapter(adapter.path))


def test_integers_are_no_target(parts, tmp_path):
    base, adapter = parts
    tensors = read_tensors(base)
    name = next(iter(adapter.manifest.adapter.tensors.values()))
    tensors[name] = tensors[name].to(torch.int8)
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(Mismatch, match="is I8"):
        plan(tmp_path, adapter.manifest, read_adapter(adapter.path), onto="original")


def test_an_unknown_dtype_is_refused(parts):
    base, adapter = parts
    with pytest.raises(Unsupported, match="float8"):
        plan(base, adapter.manifest, read_adapter(adapter.path), dtype="float8")


def test_what_is_merged_onto_by_default():
    assert choose_onto(NF4, None, True) == "as-trained"
    assert choose_onto(NONE, None, True) == "as-trained"
    assert choose_onto(NONE, None, False) == "original"
    assert choose_onto(NF4, "original", True) == "original"
    with pytest.raises(Unsupported, match="no record"):
        choose_onto(NONE, "as-trained", False)


def test_a_full_run_holds_no_adapter_to_plan(parts):
    base, adapter = parts
    manifest = adapter.manifest.model_copy(update={"adapter": None})
    with pytest.raises(Mismatch, match="no adapter"):
        plan(base, manifest, read_adapter(open_checkpoint(adapter.path).path))
