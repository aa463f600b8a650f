"""`qlx plan`: sizes, recipes, tables, and an exit code that says whether it fits."""

import json

import pytest

from qlx.cli import main
from qlx.planning import Setup, plan_size


def planned(capsys, *arguments):
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_size_gives_the_plan_of_the_planning_package(capsys):
    code, data = planned(capsys, "--params", "7B", "--rank", "64", "--tokens", "4096")
    assert code == 0
    assert data == plan_size(7 * 10**9, Setup(rank=64, tokens=4096)).to_json()


@pytest.mark.parametrize(("vram", "code"), [("16GB", 0), ("6GB", 1)])
def test_the_exit_code_says_whether_it_fits(capsys, vram, code):
    got, data = planned(capsys, "--params", "7B", "--vram", vram)
    assert got == code
    assert data["fits"] is (code == 0)


def test_a_suggestion_that_fits_ends_well(capsys):
    wish = ("--params", "8B", "--format", "bfloat16", "--batch", "4", "--vram", "16GB")
    assert planned(capsys, *wish)[0] == 1
    code, data = planned(capsys, *wish, "--suggest")
    assert code == 0
    assert data["suggestion"]["total"] <= 16e9 < data["total"]


def test_no_suggestion_is_said(capsys):
    assert main(["plan", "--params", "70B", "--vram", "16GB", "--suggest"]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_several_sizes_make_a_table(capsys):
    code, data = planned(
        capsys, "--params", "1B", "--params", "70B", "--rank", "8", "--vram", "16GB"
    )
    assert code == 0
    assert data["ranks"] == [8]
    assert [row["fits"] for row in data["rows"]] == [[True], [False]]
    assert main(["plan", "--vram", "16GB"]) == 0
    assert "✗ does not fit into 16.0 GB" in capsys.readouterr().out


def test_a_recipe_is_planned_and_options_change_it(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\ntask: causal-lm\nbase: {path: Qwen/Qwen3-0.6B}\n"
        "data: {source: python-docstrings, max_length: 256}\nadapter: {rank: 8}\n"
    )
    _, data = planned(capsys, str(recipe))
    assert (data["setup"]["rank"], data["setup"]["tokens"]) == (8, 256)
    assert main(["plan", str(recipe), "--set", "adapter.rank=5000"]) == 2
    assert "rank 5000 is more than any matrix" in capsys.readouterr().err
    _, changed = planned(capsys, str(recipe), "--set", "adapter.rank=4", "--tokens", "512")
    assert (changed["setup"]["rank"], changed["setup"]["tokens"]) == (4, 512)
    assert main(["plan", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "Qwen/Qwen3-0.6B: 596M parameters" in out
    assert "total" in out


def test_weights_that_wait_in_memory_are_off_a_gpu_only(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\ntask: causal-lm\nbase: {path: Qwen/Qwen3-0.6B, offload: cpu}\nadapter: {rank: 8}\n"
        "data: {source: python-docstrings}\ntraining: {gradient_checkpointing: true}\n"
    )
    cuda, cpu = (planned(capsys, str(recipe), "--device", name)[1] for name in ("cuda", "cpu"))
    assert planned(capsys, str(recipe))[1] == cuda
    assert (cuda["setup"]["offloaded"], cpu["setup"]["offloaded"]) == (True, False)
    assert cpu["parts"]["weights"] == 4 * cpu["shape"]["parameters"]
    assert cuda["parts"]["weights"] < cpu["parts"]["weights"] / 2


def test_a_format_that_is_there_already_stays_as_it_is(tmp_path, capsys):
    plain = planned(capsys, "--params", "7B")[1]
    assert plain["setup"]["double_quant"] is True
    assert planned(capsys, "--params", "7B", "--format", "nf4")[1] == plain
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\ntask: causal-lm\nbase: {path: Qwen/Qwen3-0.6B}\nadapter: {rank: 8}\n"
        "data: {source: python-docstrings}\n"
        "quantization: {quant_type: nf4, block_size: 256, double_quant: false}\n"
    )
    asked = planned(capsys, str(recipe), "--format", "nf4")[1]
    assert (asked["setup"]["group_size"], asked["setup"]["double_quant"]) == (256, False)
    assert asked == planned(capsys, str(recipe))[1]
    other = planned(capsys, str(recipe), "--format", "int8")[1]["setup"]
    assert (other["weights"], other["group_size"], other["double_quant"]) == ("int8", 64, False)


def test_double_quantization_is_named_where_it_is_what_is_suggested(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\ntask: causal-lm\nbase: {path: meta-llama/Llama-2-7b, dtype: bfloat16}\nadapter: {rank: 8}\n"
        "data: {source: python-docstrings, max_length: 512}\ntraining: {gradient_checkpointing: true}\n"
        "quantization: {quant_type: nf4, double_quant: false, compute_dtype: bfloat16}\n"
    )
    wish = (str(recipe), "--set", "training.batch_size=1", "--suggest", "--vram")
    total = planned(capsys, *wish, "80GB")[1]["total"]
    code, data = planned(capsys, *wish, f"{total - 10**8}B")
    assert (code, data["fits"]) == (0, False)
    old, new = data["setup"], data["suggestion"]["setup"]
    assert {name for name in old if old[name] != new[name]} == {"double_quant"}
    assert main(["plan", *wish, f"{total - 10**8}B"]) == 0
    out = capsys.readouterr().out
    assert "base stored as nf4, rank 8" in out
    assert "suggestion: base stored as nf4 with double quantization → " in out


def test_what_a_plan_leaves_out_is_said(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\ntask: causal-lm\nbase: {path: Qwen/Qwen3-0.6B}\ndata: {source: python-docstrings}\n"
        "adapter: {rank: 8, rank_pattern: {conv: 4}}\n"
    )
    assert planned(capsys, "--params", "7B")[1]["notes"] == []
    (note,) = planned(capsys, str(recipe))[1]["notes"]
    assert main(["plan", str(recipe)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"note: {note}" in out
    assert "'conv' is not counted" in out


def test_full_training_shows_its_weights(capsys):
    _, data = planned(capsys, "--params", "7B", "--rank", "0")
    parts, count = data["parts"], data["trained_parameters"]
    assert (parts["weights"], parts["adapter"]) == (4 * count, 0)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * count
    assert main(["plan", "--params", "7B", "--rank", "0"]) == 0
    assert "all weights trained, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--params", "7B", "--suggest"], "--suggest needs --vram"),
        (["--suggest", "--vram", "16GB"], "--suggest is for one plan"),
        (["--params", "7B", "--set", "adapter.rank=4"], "--set changes a field of RECIPE"),
        (["--set", "adapter.rank=4"], "--set changes a field of RECIPE"),
        (["--params", "lots"], "'lots'"),
        (["--params", "7B", "--vram", "16"], "'16'"),
        (["--params", "7B", "--rank", "8", "--rank", "16"], "several --rank"),
        (["--params", "7B", "--rank", "-1"], "-1"),
        (["--params", "7B", "--rank", "100000"], "rank 100000 is more than any matrix"),
        (["--params", "7B", "--params", "1B", "--rank", "100000"], "rank 100000 is more"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments, says, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qlx: ")
    assert says in error
