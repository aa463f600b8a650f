"""Session fixtures: tiny models trained through the real code, made once and shared between workers.

Each fixture is the path of a finished run; tests read it and must not change it. The bases are
pretrained; `digits_run` and `python_run` are QLoRA adapters on them (NF4, double quantization), the
`_fp4` ones the same with FP4 and plain scales. Scaling is never 1, and deltas are trained.

With QLX_TEST_CACHE=<directory> the runs are kept there between sessions, by recipe: handy while
working on another part, wrong after training itself has changed.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["QLX_CACHE"] = (
    "off"  # tests read what they test, and leave nothing in the home directory
)

DIGITS_BASE: dict[str, Any] = {
    "name": "digits-base",
    "task": "image-classification",
    "base": {
        "from_scratch": {
            "model_type": "vit",
            "hidden_size": 64,
            "layers": 2,
            "heads": 2,
            "intermediate_size": 128,
            "image_size": 16,
            "patch_size": 4,
        }
    },
    "data": {"source": "digits", "eval_fraction": 0.1},
    "training": {"max_steps": 150, "batch_size": 32, "learning_rate": 2e-3, "warmup_ratio": 0.1},
    "probe": {"count": 8},
}

DIGITS_RUN: dict[str, Any] = {
    "name": "digits-qlora",
    "task": "image-classification",
    "base": {"path": "BASE"},
    "data": {"source": "digits", "variant": "shifted", "eval_fraction": 0.1},
    "adapter": {"rank": 4, "alpha": 6},
    "quantization": {"quant_type": "nf4", "double_quant": True},
    "training": {"max_steps": 60, "batch_size": 32, "learning_rate": 5e-3, "warmup_ratio": 0.1},
    "probe": {"count": 8},
}

PYTHON_BASE: dict[str, Any] = {
    "name": "python-base",
    "task": "causal-lm",
    "base": {
        "from_scratch": {
            "model_type": "llama",
            "hidden_size": 64,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 512,
            "max_length": 128,
        }
    },
    "data": {"source": "python-text", "train_limit": 1280, "eval_limit": 16, "max_length": 64},
    "training": {"max_steps": 80, "batch_size": 16, "learning_rate": 4e-3, "warmup_ratio": 0.1},
    "probe": {"count": 6, "max_length": 24},
}

PYTHON_RUN: dict[str, Any] = {
    "name": "python-qlora",
    "task": "causal-lm",
    "base": {"path": "BASE"},
    "data": {"source": "python-docstrings", "train_limit": 960, "eval_limit": 48, "max_length": 64},
    "adapter": {"rank": 4, "alpha": 6},
    "quantization": {"quant_type": "nf4", "double_quant": True},
    "training": {"max_steps": 60, "batch_size": 16, "learning_rate": 4e-3, "warmup_ratio": 0.1},
    "probe": {"count": 6, "max_length": 24},
}

TENNIS_BASE: dict[str, Any] = {
    "name": "tennis-base",
    "task": "heatmap",
    "base": {
        "from_scratch": {
            "model_type": "vitpose",
            "hidden_size": 64,
            "layers": 2,
            "heads": 2,
            "intermediate_size": 128,
            "image_size": [48, 80],
            "patch_size": 8,
        }
    },
    "data": {"source": "tracknet", "path": "CLIPS", "sigma": 1.5},
    "training": {"max_steps": 120, "batch_size": 16, "learning_rate": 6e-3, "warmup_ratio": 0.1},
    "probe": {"count": 6},
}

TENNIS_RUN: dict[str, Any] = {
    "name": "tennis-qlora",
    "task": "heatmap",
    "base": {"path": "BASE"},
    "data": {"source": "tracknet", "path": "CLIPS", "sigma": 1.5},
    "adapter": {"rank": 8, "alpha": 12},
    "quantization": {"quant_type": "nf4", "double_quant": True},
    "training": {"max_steps": 80, "batch_size": 16, "learning_rate": 8e-3, "warmup_ratio": 0.1},
    "probe": {"count": 6},
}

FP4 = {"quant_type": "fp4", "double_quant": False}


def recipe_of(content: dict[str, Any], base: Path | None = None, **sections: Any) -> Any:
    """A validated recipe from one of the dictionaries above, with sections replaced."""
    from qlx.recipe import Recipe

    merged = {**content, **sections}
    if base is not None:
        merged["base"] = {**merged["base"], "path": str(base)}
    return Recipe.model_validate(merged)


SLOWEST_FIRST = (
    "training", "verification", "exporting", "cli", "serving", "packing", "merging", "runtime", "models",
)  # fmt: skip
"""Packages whose tests take longest: begun first, they leave no worker alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hand the slow files out first; the order inside a file stays."""
    rank = {name: at for at, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of what is made once and shared between workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory = Path(os.environ.get("QLX_TEST_CACHE") or root / "trained")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def trained(shared: Path) -> Callable[[str, Any], Path]:
    """`trained(name, recipe)`: the run of a recipe, trained by the first worker that asks."""

    def train_once(name: str, recipe: Any) -> Path:
        from qlx.training import train

        directory = shared / recipe.digest.removeprefix("sha256:")[:12]
        directory.mkdir(exist_ok=True)
        with _locked(directory / "lock"):
            if not (directory / name).exists():
                train(recipe, directory / name, force=True)
        return directory / name

    return train_once


@pytest.fixture(scope="session")
def digits_base(trained: Callable[[str, Any], Path]) -> Path:
    return trained("digits-base", recipe_of(DIGITS_BASE))


@pytest.fixture(scope="session")
def digits_run(trained: Callable[[str, Any], Path], digits_base: Path) -> Path:
    return trained("digits-qlora", recipe_of(DIGITS_RUN, digits_base))


@pytest.fixture(scope="session")
def digits_run_fp4(trained: Callable[[str, Any], Path], digits_base: Path) -> Path:
    return trained("digits-fp4", recipe_of(DIGITS_RUN, digits_base, quantization=FP4))


@pytest.fixture(scope="session")
def tennis_clips(shared: Path) -> Path:
    """Clips of a bright ball in `bright`, and of one that is hard to see in `dim`."""
    from tests.clips_support import BRIGHT, DIM, draw_clips

    root = shared / "clips"
    with _locked(shared / "clips.lock"):
        for name, colour in (("bright", BRIGHT), ("dim", DIM)):
            if not (root / name).exists():
                draw_clips(root / "partial" / name, colour=colour)
                (root / "partial" / name).rename(root / name)
    return root


@pytest.fixture(scope="session")
def tennis_base(trained: Callable[[str, Any], Path], tennis_clips: Path) -> Path:
    data = {**TENNIS_BASE["data"], "path": str(tennis_clips / "bright")}
    return trained("tennis-base", recipe_of(TENNIS_BASE, data=data))


@pytest.fixture(scope="session")
def classic_base(tennis_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain directory with a classic head whose statistics are those of some batch."""
    import torch
    from transformers import VitPoseConfig, VitPoseForPoseEstimation

    config = VitPoseConfig.from_pretrained(tennis_base)
    config.use_simple_decoder = False
    torch.manual_seed(5)
    model = VitPoseForPoseEstimation(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("classic")
    model.save_pretrained(path)
    name = "preprocessor_config.json"
    (path / name).write_bytes((tennis_base / name).read_bytes())
    return path


@pytest.fixture(scope="session")
def tennis_run(trained: Callable[[str, Any], Path], tennis_base: Path, tennis_clips: Path) -> Path:
    data = {**TENNIS_RUN["data"], "path": str(tennis_clips / "dim")}
    return trained("tennis-qlora", recipe_of(TENNIS_RUN, tennis_base, data=data))


@pytest.fixture(scope="session")
def tennis_models(
    tennis_run: Path, tennis_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Everything that is made of the heatmap adapter, by kind (`original`: merged onto the original base)."""
    from qlx.exporting import export_onnx
    from qlx.merging import merge
    from qlx.packing import pack
    from qlx.training import save_adapter

    root = tmp_path_factory.mktemp("tennis")
    at = {name: root / name for name in ("adapter", "merged", "original", "packed", "fp4")}
    save_adapter(tennis_run, at["adapter"], base=str(tennis_base))
    merge(tennis_base, [at["adapter"]], at["merged"])
    merge(tennis_base, [at["adapter"]], at["original"], onto="original")
    pack(at["merged"], at["packed"], to="nf4", base=tennis_base)
    pack(at["merged"], at["fp4"], to="fp4", base=tennis_base, min_retention=0.5)
    graphs = {
        "onnx": ("merged", None),
        "onnx-fp16": ("merged", "fp16"),
        "onnx-nf4": ("packed", None),
        "onnx-fp4": ("fp4", None),
        "onnx-separate": ("adapter", None),
    }
    for name, (source, precision) in graphs.items():
        base = tennis_base if source == "adapter" else None
        export_onnx(at[source], root / name, base=base, precision=precision)
    return {"base": tennis_base, "run": tennis_run} | at | {name: root / name for name in graphs}


@pytest.fixture(scope="session")
def python_base(trained: Callable[[str, Any], Path]) -> Path:
    return trained("python-base", recipe_of(PYTHON_BASE))


@pytest.fixture(scope="session")
def python_run(trained: Callable[[str, Any], Path], python_base: Path) -> Path:
    return trained("python-qlora", recipe_of(PYTHON_RUN, python_base))


@pytest.fixture(scope="session")
def python_run_fp4(trained: Callable[[str, Any], Path], python_base: Path) -> Path:
    return trained("python-fp4", recipe_of(PYTHON_RUN, python_base, quantization=FP4))


@pytest.fixture(scope="session")
def digits_second(trained: Callable[[str, Any], Path], digits_base: Path) -> Path:
    """Another adapter on the base of `digits_run`, quantized alike: other rank, scaling and targets."""
    recipe = recipe_of(DIGITS_RUN, digits_base, **_second(DIGITS_RUN), name="digits-second")
    return trained("digits-second", recipe)


@pytest.fixture(scope="session")
def python_second(trained: Callable[[str, Any], Path], python_base: Path) -> Path:
    """Another adapter on the base of `python_run`, as `digits_second`."""
    recipe = recipe_of(PYTHON_RUN, python_base, **_second(PYTHON_RUN), name="python-second")
    return trained("python-second", recipe)


def _second(content: dict[str, Any]) -> dict[str, Any]:
    adapter = {"rank": 6, "alpha": 9, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    return {"adapter": adapter, "training": {**content["training"], "max_steps": 30, "seed": 7}}


@pytest.fixture(scope="session")
def swappable_digits(
    digits_base: Path,
    digits_run: Path,
    digits_second: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The ONNX base of both digits adapters with them as `first` and `second`."""
    from qlx.exporting import export_adapters

    adapters = [("first", digits_run), ("second", digits_second)]
    return export_adapters(digits_base, adapters, tmp_path_factory.mktemp("swap") / "digits").path


@pytest.fixture(scope="session")
def swappable_python(
    python_base: Path,
    python_run: Path,
    python_second: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The ONNX base of both language adapters with them as `first` and `second`."""
    from qlx.exporting import export_adapters

    adapters = [("first", python_run), ("second", python_second)]
    return export_adapters(python_base, adapters, tmp_path_factory.mktemp("swap") / "python").path
