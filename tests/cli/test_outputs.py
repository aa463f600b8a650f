"""No command writes into or over what it reads, or into any checkpoint; each says so before any work."""

import hashlib

import pytest

from qlx.cli import main

RECIPE = """
name: x
task: causal-lm
base: {{path: {base}}}
data: {{source: python-text}}
adapter: {{rank: 2, alpha: 2}}
training: {{max_steps: 1}}
"""

# What is called, and the input that the output is put on and into.
CALLS = [
    ("save-adapter {adapter}", "adapter"),
    ("save-adapter {plain_adapter} --base {plain_model}", "plain_model"),
    ("save-adapter {plain_adapter} --base {plain_model}", "plain_adapter"),
    ("merge --base {plain_model} --adapter {adapter}", "plain_model"),
    ("merge --base {plain_model} --adapter {plain_adapter} --adapter {adapter}", "adapter"),
    ("merge --base {plain_model} --adapter {plain_adapter}", "plain_adapter"),
    ("pack {adapter} --to nf4 --base {plain_model}", "adapter"),
    ("pack {adapter} --to nf4 --base {plain_model}", "plain_model"),
    ("export-onnx {adapter} --base {plain_model}", "adapter"),
    ("export-onnx {adapter} --base {plain_model}", "plain_model"),
    ("train {recipe}", "plain_model"),
    ("train {recipe} --set base.path={adapter}", "adapter"),
    ("train {recipe} --set data.source=text --set data.path={texts}", "texts"),
]


@pytest.fixture
def places(tmp_path, adapter, plain_adapter, plain_model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=plain_model))
    (tmp_path / "texts").mkdir()
    return {
        "texts": tmp_path / "texts",
        "adapter": adapter,
        "plain_adapter": plain_adapter,
        "plain_model": plain_model,
        "recipe": recipe,
    }


def content(directory):
    """Every path below, with the digest of its bytes."""
    return {
        path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("where", ["on", "on, by a link", "inside", "inside, by a link"])
@pytest.mark.parametrize(("words", "victim"), CALLS)
def test_an_output_cannot_hurt_an_input(places, tmp_path, capsys, words, victim, where):
    place = places[victim]
    if "link" in where:
        (tmp_path / "link").symlink_to(place)
        place = tmp_path / "link"
    output = place if "on" in where else place / "inner"
    before = content(tmp_path)
    arguments = words.format(**places).split()
    assert main([*arguments, "-o", str(output), "--force"]) == 2
    said = capsys.readouterr().err
    assert ("is the input" if "on" in where else "inside the input") in said
    assert len(said.strip().splitlines()) == 1
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["plain_model", "texts", "recipe"])
def test_nor_can_the_place_of_a_trainings_state(places, tmp_path, capsys, name):
    """OUTPUT.partial is removed when the training ends."""
    place = places[name].rename(tmp_path / "x.partial")
    places[name] = place
    words = "train {recipe} --set base.path={plain_model} --set data.source=text --set data.path={texts}"
    before = content(tmp_path)
    for more in ([], ["--force"], ["--resume"]):
        arguments = [*words.format(**places).split(), "-o", str(tmp_path / "x"), *more]
        assert main(arguments) == 2
        assert f"the output is the input {place}" in capsys.readouterr().err
    assert content(tmp_path) == before


@pytest.mark.parametrize("option", ["--markdown", "--junit", "--picture"])
def test_a_report_is_not_written_into_a_checkpoint_nor_where_it_cannot_be(
    adapter, tmp_path, capsys, option
):
    before = content(tmp_path)
    for file, says in (
        (adapter / "x.png", "inside the checkpoint"),
        (adapter / "qlx.json", "inside the checkpoint"),
        (tmp_path / "missing" / "x.png", "no directory"),
    ):
        assert main(["verify", str(adapter), option, str(file)]) == 2
        assert says in capsys.readouterr().err
    assert content(tmp_path) == before


@pytest.mark.parametrize("option", ["--markdown", "--junit", "--picture"])
def test_a_report_is_not_written_over_or_among_what_is_read(
    places, adapter, tmp_path, capsys, option
):
    (tmp_path / "texts" / "deep").mkdir()
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        RECIPE.format(base="x").replace("python-text", f"text, path: {tmp_path}/texts")
    )
    (tmp_path / "link.png").symlink_to(places["plain_model"] / "model.safetensors")
    (places["plain_model"] / "deep").mkdir()
    before = content(tmp_path)
    base = ("--base", str(places["plain_model"]))
    data = ("--against", str(adapter), "--data", str(recipe))
    for words, file, says in (
        (base, places["plain_model"] / "model.safetensors", "files of a model"),
        (base, tmp_path / "link.png", "files of a model"),
        (base, places["plain_model"] / "deep" / "x.png", "inside the input"),
        ((), places["plain_adapter"] / "x.png", "files of a model"),
        (data, tmp_path / "texts" / "deep" / "x.png", "inside the input"),
        (data, recipe, "another use"),
    ):
        assert main(["verify", str(adapter), *words, option, str(file)]) == 2
        assert says in capsys.readouterr().err
    assert content(tmp_path) == before


def test_two_reports_need_two_files(adapter, tmp_path, capsys):
    file = str(tmp_path / "report")
    assert main(["verify", str(adapter), "--markdown", file, "--junit", file]) == 2
    assert "another use" in capsys.readouterr().err
