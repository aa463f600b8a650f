"""Make the golden checkpoints of the current format version: one of every kind, from a tiny trained ViT.

    python tests/golden/make.py

Run it once for each format version, when that version is released, and never again for an old one:
what a version wrote is kept as it was written.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlx.checkpoint import FORMAT_VERSION
from qlx.exporting import export_onnx
from qlx.merging import merge
from qlx.packing import pack
from qlx.training import save_adapter, train

FIXTURES = Path(__file__).parents[1] / "conftest.py"


def fixtures() -> Any:
    """The module that describes the tests' tiny trained models."""
    spec = importlib.util.spec_from_file_location("fixtures", FIXTURES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Train, merge, pack and export into `tests/golden/vN`; refuses to replace what is there."""
    target = Path(__file__).parent / f"v{FORMAT_VERSION}"
    if target.exists():
        print(f"{target} exists; golden checkpoints are never made twice", file=sys.stderr)
        return 1
    tiny = fixtures()
    small = {"from_scratch": {**tiny.DIGITS_BASE["base"]["from_scratch"], "layers": 1}}
    base, adapter = target / "base", target / "adapter"
    train(tiny.recipe_of({**tiny.DIGITS_BASE, "base": small}), base)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        train(tiny.recipe_of(tiny.DIGITS_RUN, base), run)
        save_adapter(run, adapter, base=str(base))
    merge(str(base), [adapter], target / "merged")
    pack(target / "merged", target / "packed", to="nf4", base=str(base))
    export_onnx(target / "packed", target / "onnx")
    return 0


if __name__ == "__main__":
    sys.exit(main())
