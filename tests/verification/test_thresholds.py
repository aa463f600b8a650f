"""Limits by kind of step: what they are, that they only tighten, and that each can fail."""

import numpy as np
import pytest

from qlx.checkpoint import AdapterSpec, BaseRef, Manifest, QuantSpec, Step
from qlx.errors import UsageError
from qlx.verification import (
    DEFAULT_MIN_RETENTION,
    Thresholds,
    against_thresholds,
    check_comparison,
    compare,
    lossy_steps,
    reference_thresholds,
    shown,
    tightened,
)


def manifest(kind, *steps):
    lineage = tuple(
        Step(command=command, versions={}, options=options) for command, options in steps
    )
    quantized = kind == "packed" or any(o.get("onto") == "original" for _, o in steps)
    return Manifest(
        kind=kind,
        task="causal-lm",
        tag="t",
        lineage=lineage,
        quantization=QuantSpec(scheme="nf4") if quantized else QuantSpec(),
        base=BaseRef(name="b", fingerprint="sha256:" + "0" * 64),
        adapter=AdapterSpec(),
    )


TRAIN = ("train", {})
MERGE = ("merge", {"onto": "as-trained", "dtype": "float32", "exact": True})
MERGE_BF16 = ("merge", {"onto": "as-trained", "dtype": "bfloat16"})
MERGE_ORIGINAL = ("merge", {"onto": "original", "dtype": "float32"})
PACK = ("pack", {"to": "nf4", "min_retention": 0.75})
ONNX = ("export-onnx", {"precision": "fp32"})
ONNX_16 = ("export-onnx", {"precision": "fp16"})


@pytest.mark.parametrize(
    ("kind", "steps", "expected"),
    [
        ("run", [TRAIN], {"relative": 1e-5, "top1": 1.0}),
        ("adapter", [TRAIN], {"relative": 1e-5, "top1": 1.0}),
        ("merged", [TRAIN, MERGE], {"relative": 1e-5, "top1": 1.0}),
        ("merged", [TRAIN, MERGE_BF16], {"relative": 8 / 256, "top1_decided": 1.0, "retention": 0.9}),
        ("merged", [TRAIN, MERGE_ORIGINAL], {}),
        ("packed", [TRAIN, MERGE, PACK], {"retention": 0.75}),
        ("onnx", [TRAIN, MERGE, ONNX], {"relative": 1e-4, "top1_decided": 1.0}),
        ("onnx", [TRAIN, MERGE, PACK, ONNX], {"retention": 0.75}),
        ("onnx", [TRAIN, ONNX_16], {"relative": 8 / 2048, "top1_decided": 1.0, "retention": 0.9}),
    ],
)  # fmt: skip
def test_limits_follow_from_the_steps(kind, steps, expected):
    assert reference_thresholds(manifest(kind, *steps), None, True).limits() == expected


def test_rounding_may_cost_twice_what_training_itself_cost():
    assert reference_thresholds(
        manifest("merged", MERGE_BF16), 0.1, True
    ).relative == pytest.approx(0.2)
    assert reference_thresholds(manifest("merged", MERGE_BF16), 1e-4, True).relative == 8 / 256


def test_lossy_steps_are_found_and_exact_ones_are_not():
    assert [step.command for step in lossy_steps(manifest("onnx", TRAIN, MERGE, PACK, ONNX))] == [
        "pack"
    ]
    assert lossy_steps(manifest("merged", TRAIN, MERGE)) == ()


@pytest.mark.parametrize("made", [TRAIN, ("save-adapter", {})])
def test_what_happened_to_the_base_before_is_part_of_what_training_saw(made):
    assert lossy_steps(manifest("run", TRAIN, MERGE_BF16, PACK, made)) == ()
    assert len(lossy_steps(manifest("merged", TRAIN, PACK, made, MERGE_BF16))) == 1


def test_limits_only_tighten():
    limits = Thresholds("x", relative=1e-4, top1=0.9)
    assert tightened(limits, {"relative": 1e-6, "top1": 1.0, "kl_mean": 0.1}).limits() == {
        "relative": 1e-6, "top1": 1.0, "kl_mean": 0.1,
    }  # fmt: skip
    with pytest.raises(UsageError, match="looser"):
        tightened(limits, {"relative": 1e-3})
    with pytest.raises(UsageError, match="looser"):
        tightened(limits, {"top1": 0.5})
    with pytest.raises(UsageError, match="no limit called 'speed'"):
        tightened(limits, {"speed": 1})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("top1", 2, "between 0 and 1"),
        ("top1_decided", -0.1, "between 0 and 1"),
        ("retention", 1.5, "between 0 and 1"),
        ("kl_mean", -1, "at least 0"),
        ("relative", -1e-9, "at least 0"),
        ("layer_drift", -1, "at least 0"),
        ("score_drop", 1.5, "between -1 and 1"),
    ],
)
def test_a_limit_that_no_value_can_meet_has_no_meaning(name, value, says):
    with pytest.raises(UsageError, match=f"{name}={value:g} has no meaning: {name} is {says}"):
        tightened(Thresholds("x"), {name: value})


def test_the_ends_of_the_ranges_are_limits():
    ends = {"top1": 1.0, "retention": 0.0, "max_abs": 0.0, "score_drop": -1.0, "loss_rise": -3.0}
    assert tightened(Thresholds("x"), ends).limits() == ends


@pytest.mark.parametrize(
    ("value", "limit", "texts"),
    [
        (0.99997, 1.0, ("0.99997", "1")),
        (0.9395, 1.0, ("0.9395", "1")),
        (1.0, 1.0, ("1", "1")),
        (1.00001e-5, 1e-5, ("1.00001e-05", "1e-05")),
        (0.89999999, 0.9, ("0.89999999", "0.9")),
        (0.5, 0.50000004, ("0.5", "0.50000004")),
        (2.5e-6, 1e-5, ("2.5e-06", "1e-05")),
    ],
)
def test_a_value_never_reads_as_if_it_kept_a_limit_that_it_does_not(value, limit, texts):
    assert shown(value, limit) == texts


def test_every_limit_can_fail_and_says_so():
    reference = np.random.default_rng(0).normal(size=(6, 4))
    limits = Thresholds(
        "why",
        relative=1e-5,
        max_abs=1e-5,
        kl_mean=1e-9,
        kl_p99=1e-9,
        top1=1,
        top1_decided=1,
        retention=0.9,
    )
    good = check_comparison("x", compare(reference, reference, base=reference * 2), limits)
    assert [check.passed for check in good] == [True] * 7
    bad = check_comparison("x", compare(reference, -reference, base=reference * 2), limits)
    assert [check.passed for check in bad] == [False] * 7
    assert bad[0].detail == "why"
    assert bad[0].limit == 1e-5


def test_a_limit_that_cannot_be_measured_fails():
    same = np.eye(3)
    (check,) = check_comparison("x", compare(same, same), Thresholds("why", retention=0.5))
    assert not check.passed
    assert "unknown" in check.detail


def test_two_checkpoints_of_one_function_are_held_to_both_tolerances():
    merged, onnx = manifest("merged", TRAIN, MERGE), manifest("onnx", TRAIN, MERGE, ONNX)
    assert against_thresholds(onnx, merged, True).limits() == {
        "relative": pytest.approx(1.1e-4),
        "top1_decided": 1.0,
    }
    packed, exported = (
        manifest("packed", TRAIN, MERGE, PACK),
        manifest("onnx", TRAIN, MERGE, PACK, ONNX),
    )
    assert against_thresholds(exported, packed, True).limits() == {
        "relative": pytest.approx(2e-4),
        "top1_decided": 1.0,
    }


def test_two_checkpoints_of_different_functions_never_go_unjudged():
    packed, merged = manifest("packed", TRAIN, MERGE, PACK), manifest("merged", TRAIN, MERGE)
    original = manifest("merged", TRAIN, MERGE_ORIGINAL)
    assert against_thresholds(packed, merged, True).limits() == {"retention": 0.75}
    assert against_thresholds(original, merged, True).limits() == {
        "retention": DEFAULT_MIN_RETENTION
    }
    assert against_thresholds(original, merged, False).limits() == {"top1": DEFAULT_MIN_RETENTION}


def test_an_unquantized_base_is_the_one_training_saw():
    """Rounded onto an original base that was never quantized: judged by rounding, not let through."""
    step = Step(
        command="merge",
        versions={},
        options={"exact": False, "dtype": "bfloat16", "onto": "original"},
    )
    plain = Manifest(kind="merged", task="causal-lm", tag="t", lineage=(step,))
    assert reference_thresholds(plain, None, True).relative == pytest.approx(2.0**-5)
    spec = QuantSpec(method="qlora", scheme="nf4")
    quantized = plain.model_copy(update={"quantization": spec})
    assert reference_thresholds(quantized, None, True).limits() == {}
