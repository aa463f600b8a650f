"""Several adapters at once: combined as PEFT combines them, merged, proven and recorded."""

import os
import shutil

import pytest
import torch

from qlx.checkpoint import read_probe, seal
from qlx.errors import CheckFailed, Mismatch, Unsupported, UsageError
from qlx.merging import Combination, merge
from qlx.models import load_base
from qlx.verification import compare, verify
from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import NF4, Case, inputs_for, make_adapter, make_base

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base and two adapters on it that share some of their targets."""
    root = tmp_path_factory.mktemp("combine")
    base = make_base(root / "base", "llama")
    first = make_adapter(
        base, root / "first", Case(options={"target_modules": ("q_proj", "v_proj")})
    )
    second = make_adapter(
        base, root / "second", Case(seed=2, options={"target_modules": ("q_proj", "o_proj")})
    )
    return base, first, second


def logits_of_peft(base, adapters, weights, **options):
    """PEFT's forward with the adapters combined by PEFT, from the same directories."""
    model = peft.PeftModel.from_pretrained(
        load_base(base, "causal-lm"), str(adapters[0].path), "a0"
    )
    for at, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(str(adapter.path), f"a{at}")
    names = [f"a{at}" for at in range(len(adapters))]
    model.add_weighted_adapter(names, list(weights), "both", **options)
    model.set_adapter("both")
    inputs = {name: torch.from_numpy(value) for name, value in inputs_for("llama").items()}
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits.numpy()


CASES = {
    "cat": {},
    "linear": {},
    "svd": {},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.3},
}


@pytest.mark.parametrize("method", CASES)
def test_the_merged_model_is_the_one_peft_combines(tmp_path, parts, method):
    base, *adapters = parts
    combination = Combination(method, (0.8, -0.5), CASES[method].get("density"))
    merged = merge(base, [a.path for a in adapters], tmp_path / "merged", combination=combination)
    report = verify(merged.path)
    assert report.passed
    probe = read_probe(merged.path / "probe.safetensors")
    theirs = logits_of_peft(base, adapters, (0.8, -0.5), combination_type=method, **CASES[method])
    assert compare(theirs, probe.reference, probe.mask).relative < 1e-5
    assert compare(probe.base, probe.reference, probe.mask).relative > 1e-2
    step = next(step for step in merged.manifest.lineage if step.command == "combine")
    assert step.options["method"] == method
    assert step.options["weights"] == [0.8, -0.5]
    assert step.options.get("density") == CASES[method].get("density")
    assert step.parents == tuple(adapter.digest for adapter in adapters)


def test_several_adapters_add_up_exactly_by_default(tmp_path, parts):
    base, first, second = parts
    merged = merge(base, [first.path, second.path], tmp_path / "both")
    one = read_tensors(merge(base, [first.path], tmp_path / "one").path)
    two = read_tensors(merge(base, [second.path], tmp_path / "two").path)
    stored, result = read_tensors(base), read_tensors(merged.path)
    for name, value in stored.items():
        wanted = one[name].double() + two[name].double() - value.double()
        assert (result[name].double() - wanted).abs().max() < 1e-6
    touched = {n for n in stored if not torch.equal(stored[n], result[n])}
    assert touched == {
        *first.manifest.adapter.tensors.values(),
        *second.manifest.adapter.tensors.values(),
    }


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_the_seed_of_dare_decides_and_is_recorded(tmp_path, parts, method):
    base, first, second = parts

    def merged(name, seed):
        combination = Combination(method, density=0.6, seed=seed)
        return merge(base, [first.path, second.path], tmp_path / name, combination=combination)

    one, again, other = merged("one", 7), merged("again", 7), merged("other", 8)
    assert one.digest == again.digest
    left, right = read_tensors(one.path), read_tensors(other.path)
    assert any(not torch.equal(left[name], right[name]) for name in left)
    (step,) = [step for step in one.manifest.lineage if step.command == "combine"]
    assert (step.seed, step.options["density"]) == (7, 0.6)


def test_one_adapter_can_be_weighted(tmp_path, parts):
    base, first, _ = parts
    half = merge(base, [first.path], tmp_path / "half", combination=Combination(weights=(0.5,)))
    whole = merge(base, [first.path], tmp_path / "whole")
    stored, a, b = (read_tensors(path) for path in (base, half.path, whole.path))
    for name, value in stored.items():
        assert ((a[name] - value) - 0.5 * (b[name] - value)).abs().max() < 1e-6


def test_adapters_on_a_quantized_base_are_merged_as_trained(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    adapters = [make_adapter(base, tmp_path / f"{s}", Case(quant=NF4, seed=s)) for s in (1, 2)]
    merged = merge(base, [a.path for a in adapters], tmp_path / "merged")
    assert merged.manifest.lineage[-1].options["onto"] == "as-trained"
    assert verify(merged.path).comparisons["reference"].relative < 1e-5


def test_adapters_of_different_ranks_only_stack(tmp_path, parts):
    base, first, _ = parts
    wide = make_adapter(base, tmp_path / "wide", Case(options={"rank": 6}))
    dirs = [first.path, wide.path]
    merged = merge(base, dirs, tmp_path / "merged")
    assert merged.manifest.adapter.rank_pattern
    with pytest.raises(Mismatch, match="ranks"):
        merge(base, dirs, tmp_path / "other", combination=Combination("linear"))


UNFIT = {
    "DoRA": ({"use_dora": True}, "DoRA magnitude"),
    "head": ({"modules_to_save": ("lm_head",)}, "saved whole"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_product_is_refused(tmp_path, parts, name):
    base, first, _ = parts
    options, words = UNFIT[name]
    other = make_adapter(base, tmp_path / "adapter", Case(options=options))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(Unsupported, match=words):
        merge(base, [first.path, other.path], tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == before


def test_adapters_that_do_not_belong_together_are_refused(tmp_path, parts):
    base, first, _ = parts
    quantized = make_adapter(base, tmp_path / "quantized", Case(quant=NF4))
    with pytest.raises(Mismatch, match="quantization of the base"):
        merge(base, [first.path, quantized.path], tmp_path / "merged")
    elsewhere = make_base(tmp_path / "elsewhere", "llama", seed=4)
    other = make_adapter(elsewhere, tmp_path / "other", Case())
    with pytest.raises(Mismatch, match="same base"):
        merge(base, [first.path, other.path], tmp_path / "merged")


USAGE = {
    "--weight": Combination(weights=(1.0,)),
    "needs --density": Combination("ties"),
    "no meaning": Combination("cat", density=0.5),
    "not above 0": Combination("dare_ties", density=0.0),
    "not one of": Combination("mean"),
    "--weight nan": Combination(weights=(float("nan"), 1.0)),
    "too large for float32": Combination(weights=(1e39, 1.0)),
}


@pytest.mark.parametrize("words", USAGE)
def test_wrong_use_is_said(tmp_path, parts, words):
    base, first, second = parts
    with pytest.raises(UsageError, match=words):
        merge(base, [first.path, second.path], tmp_path / "merged", combination=USAGE[words])


def test_a_weight_of_zero_is_an_adapter_without_effect(tmp_path, parts):
    base, first, _ = parts
    with pytest.raises(CheckFailed, match="changes no tensor"):
        merge(base, [first.path], tmp_path / "merged", combination=Combination(weights=(0.0,)))


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties"])
@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, -0.3), (0.0, 0.0)])
def test_adapters_that_cancel_out_are_refused_as_one_without_weight(
    tmp_path, parts, method, weights
):
    base, first, _ = parts
    chosen = Combination(method, weights, 0.5 if method == "ties" else None)
    with pytest.raises(CheckFailed, match="changes no tensor") as caught:
        merge(base, [first.path, first.path], tmp_path / "merged", combination=chosen)
    assert f"--weight {weights[0]:g} --weight {weights[1]:g}" in str(caught.value)


def test_a_module_in_which_adapters_cancel_out_is_left_alone(tmp_path, parts):
    """Only q_proj is in both; the other adapter's part of it is the negative of the first's."""
    base, first, second = parts
    a, b = (read_tensors(each.path / "adapter_model.safetensors") for each in (first, second))
    shared = {key: value for key, value in a.items() if "q_proj" in key}
    write_tensors(tmp_path / "changed.safetensors", b | shared)
    opposite = tmp_path / "opposite"
    shutil.copytree(second.path, opposite)
    shutil.move(tmp_path / "changed.safetensors", opposite / "adapter_model.safetensors")
    seal(opposite, second.manifest)
    merged = merge(
        base, [first.path, opposite], tmp_path / "m", combination=Combination(weights=(1.0, -1.0))
    )
    untouched = merged.manifest.lineage[-1].options["untouched_tensors"]
    assert len(untouched) == 2
    assert all("q_proj" in name for name in untouched)
    stored, result = read_tensors(base), read_tensors(merged.path)
    assert all(torch.equal(stored[name], result[name]) for name in untouched)


def plain(adapter, directory):
    """The adapter's two files alone, as PEFT writes them."""
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter.path / name, directory / name)
    return directory


def test_errors_about_plain_adapters_name_their_directories(tmp_path, parts):
    base, first, _ = parts
    dora = make_adapter(base, tmp_path / "q", Case(options={"use_dora": True}))
    dirs = [plain(first, tmp_path / "plain"), plain(dora, tmp_path / "plain-dora")]
    with pytest.raises(Unsupported) as caught:
        merge(base, dirs, tmp_path / "merged")
    assert str(caught.value).startswith(f"{dirs[1]}: ")
    assert "qlx-import" not in str(caught.value)


def test_the_use_is_checked_before_anything_is_read(tmp_path, parts):
    _, first, _ = parts
    with pytest.raises(UsageError, match="2 --weight for 1 --adapter"):
        merge(
            tmp_path / "nowhere",
            [first.path],
            tmp_path / "merged",
            combination=Combination(weights=(1.0, 2.0)),
        )


def test_a_spoiled_adapter_is_still_found(tmp_path, parts):
    """Negative control: the combined adapter's probe is its own, so a wrong merge must differ."""
    base, first, second = parts
    merged = merge(base, [first.path, second.path], tmp_path / "merged")
    other = merge(base, [first.path], tmp_path / "other")
    (merged.path / "model.safetensors").write_bytes((other.path / "model.safetensors").read_bytes())
    seal(merged.path, merged.manifest)
    assert not verify(merged.path).passed
