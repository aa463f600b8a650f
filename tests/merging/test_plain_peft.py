"""A directory that PEFT wrote, with no record of ours: imported, merged, and proven on a made probe."""

import pytest
import torch

from qlx.errors import Mismatch, Unsupported, UsageError
from qlx.merging import merge
from qlx.verification import verify
from qlx.weights import read_tensors
from tests.adapter_support import Case, draw, make_adapter, make_base


@pytest.fixture(scope="module", params=["vit", "llama"])
def plain(request, tmp_path_factory):
    """A base and an adapter saved by PEFT alone, with an absolute path in its configuration."""
    import peft
    import transformers

    root = tmp_path_factory.mktemp(request.param)
    base = make_base(root / "base", request.param)
    vision = request.param == "vit"
    auto = (
        transformers.AutoModelForImageClassification
        if vision
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    draw(adapted, 1.0, 3)
    adapted.save_pretrained(root / "peft")
    return request.param, base, root / "peft"


def test_it_merges_onto_the_original_base_and_says_so(plain, tmp_path):
    _, base, directory = plain
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    merged = merge(base, [directory], tmp_path / "merged")
    options = merged.manifest.lineage[-1].options
    assert (options["onto"], options["exact"]) == ("original", True)
    report = verify(merged.path)
    assert report.passed
    assert report.comparisons["reference"].relative < 1e-5
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_it_equals_pefts_own_merge(plain, tmp_path):
    import peft
    import transformers

    kind, base, directory = plain
    auto = (
        transformers.AutoModelForImageClassification
        if kind == "vit"
        else transformers.AutoModelForCausalLM
    )
    merged = merge(base, [directory], tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(
        auto.from_pretrained(base), directory
    ).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    left, right = read_tensors(merged.path), read_tensors(tmp_path / "theirs")
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-6)


def test_as_trained_is_refused_without_a_record(plain, tmp_path):
    _, base, directory = plain
    with pytest.raises(Unsupported, match="no record"):
        merge(base, [directory], tmp_path / "merged", onto="as-trained")
    assert not (tmp_path / "merged").exists()


def test_its_base_must_be_given(plain, tmp_path):
    with pytest.raises(UsageError, match="--base"):
        merge(None, [plain[2]], tmp_path / "merged")


def test_a_base_of_another_shape_is_refused(plain, tmp_path):
    kind, _, directory = plain
    other = make_base(tmp_path / "other", "llama" if kind == "vit" else "vit")
    with pytest.raises(Mismatch):
        merge(other, [directory], tmp_path / "merged")


def test_a_plain_adapter_on_a_trained_base_has_no_record_of_its_own(tmp_path, digits_base):
    """The base's lineage holds a training step; that one says nothing about the adapter."""
    adapter = make_adapter(digits_base, tmp_path / "made", Case("vit", image_size=16))
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (plain / name).write_bytes((adapter.path / name).read_bytes())
    with pytest.raises(Unsupported, match="no record"):
        merge(digits_base, [plain], tmp_path / "merged", onto="as-trained")
