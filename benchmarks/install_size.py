"""What an installation weighs, and whether the small one really serves without torch.

    python benchmarks/install_size.py           # four fresh environments from the package index: minutes, 4 GB of disk
    python benchmarks/install_size.py --only serve

Each environment is new and gets the versions of constraints.txt: qlx alone, `qlx[serve]`, what serving the same
models with torch takes at the least (`torch transformers pillow starlette uvicorn`), and `qlx[train]`. Counted: the
bytes of all files in site-packages without pip and compiled caches (MB = 10^6 bytes), and the packages. torch is
whatever wheel the index gives: the CPU's, where it has one; with CUDA it is gigabytes. Into the environment of
`qlx[serve]` goes nothing else: there `qlx verify` replays the probe of a vision and a language model in ONNX, and `qlx
serve` answers a request to each, while `import torch` fails. Figures go to benchmarks/output/install_size.json.
"""

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETS = {
    "qlx": [str(ROOT)],
    "serve": [f"{ROOT}[serve]"],
    "torch": ["torch", "transformers", "pillow", "starlette", "uvicorn"],
    "train": [f"{ROOT}[train]"],
}
NOT_COUNTED = {"pip", "setuptools"}
COUNT = """
import importlib.metadata as metadata, json, sysconfig
print(json.dumps([sysconfig.get_path("purelib"), [each.metadata["Name"] for each in metadata.distributions()]]))
"""


def install(folder: Path, wanted: list[str]) -> Path:
    """A new environment with these requirements; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", ROOT / "constraints.txt", *wanted], check=True)
    return python


def weigh(python: Path) -> dict[str, float]:
    """MB and number of packages of an environment."""
    where, names = json.loads(subprocess.check_output([python, "-I", "-c", COUNT]))
    site = Path(where)
    files = (
        file
        for top in site.iterdir()
        if top.name.partition("-")[0] not in NOT_COUNTED and top.name != "__pycache__"
        for file in ([top] if top.is_file() else top.rglob("*"))
    )
    size = sum(f.stat().st_size for f in files if f.is_file() and "__pycache__" not in f.parts)
    return {"MB": size / 1e6, "packages": len(set(names) - NOT_COUNTED)}


def models(folder: Path) -> dict[str, Path]:
    """A vision and a language model in ONNX, made with the environment this script runs in."""
    from onnx_models import make

    return {
        "classify": make(folder / "vit", "vit-tiny", "int4"),
        "completions": make(folder / "llama", "llama-15m", "int4"),
    }


def question(task: str) -> dict[str, Any]:
    """A request's body."""
    if task == "completions":
        return {"prompt": "def", "max_tokens": 4}
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file, "PNG")
    return {"image": base64.b64encode(file.getvalue()).decode()}


def ask(python: Path, directory: Path, task: str) -> Any:
    """What `qlx serve` answers in that environment."""
    command = [python.parent / "qlx", "serve", directory, "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            address = server.stderr.readline().split(" at ")[1].split()[0]
            request = urllib.request.Request(
                f"{address}/v1/{task}",
                json.dumps(question(task)).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        finally:
            server.terminate()


def works(python: Path) -> dict[str, Any]:
    """That torch is not there and both models are verified and served."""
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert missing.returncode, "torch can be imported"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task, directory in models(Path(folder)).items():
            verified = [python.parent / "qlx", "verify", directory, "--json"]
            report = json.loads(subprocess.check_output(verified))
            assert report["passed"]
            broken = bytearray((directory / "model.onnx").read_bytes())
            answer = ask(python, directory, task)
            broken[len(broken) // 2] ^= 1  # negative control: what is damaged is not verified
            (directory / "model.onnx").write_bytes(broken)
            assert subprocess.run(verified, capture_output=True, check=False).returncode == 3
            found[task] = answer
    return found


def main() -> None:
    """Install, weigh, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=SETS, help="one environment")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in [args.only] if args.only else SETS:
        with tempfile.TemporaryDirectory() as folder:
            python = install(Path(folder) / "env", SETS[name])
            results[name] = weigh(python)
            print("{0}: {MB:.0f} MB, {packages} packages".format(name, **results[name]), flush=True)
            if name == "serve":
                results["answers"] = works(python)
                print("  verified and served without torch: " + ", ".join(results["answers"]))
    if "serve" in results and "torch" in results:
        print(f"torch / serve: x {results['torch']['MB'] / results['serve']['MB']:.1f}")
    target = Path(__file__).parent / "output" / "install_size.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
