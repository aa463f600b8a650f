"""Running code in a fresh process that cannot import given packages, as another tool's user would."""

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["DISTANCE", "run_without"]

DISTANCE = """
import json, pathlib, numpy, torch
from safetensors.numpy import load_file

def plain_model(path):
    import transformers
    name = json.loads(pathlib.Path(path, "config.json").read_text())["architectures"][0]
    auto = transformers.AutoModelForCausalLM
    if "ForImageClassification" in name:
        auto = transformers.AutoModelForImageClassification
    if name == "VitPoseForPoseEstimation":
        auto = transformers.VitPoseForPoseEstimation
    return auto.from_pretrained(path)

def distance(model, path, output="reference"):
    probe = load_file(path + "/probe.safetensors")
    inputs = {name[6:]: torch.from_numpy(v) for name, v in probe.items() if name.startswith("input.")}
    with torch.inference_mode():
        made = model.eval()(**inputs)
        given = (made.heatmaps if "heatmaps" in made else made.logits).float().numpy()
    wanted = probe["output." + output]
    if "attention_mask" in inputs:
        rows = inputs["attention_mask"].numpy().astype(bool)
        given, wanted = given[rows], wanted[rows]
    return float(numpy.linalg.norm(given - wanted) / numpy.linalg.norm(wanted))
"""
"""Source of `plain_model(path)` and `distance(model, path, output)`: relative error on the probe."""


def run_without(blocked: tuple[str, ...], code: str, *arguments: object) -> Any:
    """Run `code` (which sets `result` to a JSON value) with `blocked` packages made unimportable.

    `arguments` arrive as strings in `argv`. The process has the installed libraries only: no
    current directory and no PYTHONPATH.
    """
    prelude = (
        "import sys, json\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "argv = sys.argv[1:]\n"
    )
    closing = (
        f"\nassert not any(sys.modules.get(name) for name in {blocked!r})\n"
        "print('RESULT', json.dumps(result))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", prelude + code + closing, *map(str, arguments)],
        env=environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))
