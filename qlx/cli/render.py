"""Results as plain data for `--json` and, from the same data, as text for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlx.checkpoint import Checkpoint, Manifest
from qlx.planning import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qlx.cli.trial import Trial
    from qlx.merging import Outline
    from qlx.training import DryRun
    from qlx.verification import EvalResult, Report

    Rows = Sequence[Sequence[str]]

_OUTLINED = ("read", "copied", "rewritten", "held", "working", "floor", "proof_bytes")
# The distances of a replay worth a column, in this order, where they were measured.
_SHOWN = ("relative", "max_abs", "kl_mean", "top1", "retention")


def checkpoint_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a command that wrote a checkpoint reports: where, what, how large, every replay."""
    manifest = checkpoint.manifest
    data = {
        "path": str(checkpoint.path),
        "kind": manifest.kind,
        "task": manifest.task,
        "tag": manifest.tag,
        "digest": checkpoint.digest,
        "size": _size(manifest),
        "results": _results(manifest),
    }
    adapters = {name: _adapter_data(manifest, name) for name in sorted(manifest.adapters)}
    return data | ({"adapters": adapters} if adapters else {})


def _adapter_data(manifest: Manifest, name: str) -> dict[str, Any]:
    """One of several adapters: what it is, how large, every replay since it was exported with the others."""
    entry = manifest.adapters[name]
    results = [
        each for each in _results(manifest.with_adapter(name)) if each["step"] == "export-onnx"
    ]
    return {
        "tag": entry.tag,
        "file": entry.file,
        "size": manifest.files[entry.file].size,
        "what": _adapter(entry.adapter.model_dump(mode="json")),
        "results": results,
    }


def _size(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files.values())


def _results(manifest: Manifest) -> list[dict[str, Any]]:
    if manifest.probe is None:
        return []
    return [result.model_dump(mode="json") for result in manifest.probe.results]


def manifest_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """The whole manifest and what `inspect` derives from it; the digests were checked on opening."""
    return {
        **checkpoint_data(checkpoint),
        "digests_match": True,
        "manifest": checkpoint.manifest.model_dump(mode="json"),
    }


def print_made(console: "Console", data: Mapping[str, Any]) -> None:
    """One line for the checkpoint, and a table of its replays."""
    console.print(f"{data['kind']} {data['path']}  {format_bytes(data['size'])}  {data['tag']}")
    _print_adapters(console, data)
    _print_results(console, _all_results(data))


def _print_adapters(console: "Console", data: Mapping[str, Any]) -> None:
    """A table of the adapters to choose from, if there are any."""
    adapters = data.get("adapters", {}).items()
    rows = [(name, format_bytes(each["size"]), each["what"]) for name, each in adapters]
    if rows:
        console.print(_table(("adapter", "size", "what it is"), rows))


def _all_results(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The replays of the checkpoint, then of each of its adapters under the adapter's name."""
    adapters = data.get("adapters", {}).items()
    of = [
        {**result, "against": f"{result['against']} of {name}"}
        for name, each in adapters
        for result in each["results"]
    ]
    return [*data["results"], *of]


def print_trained(console: "Console", data: Mapping[str, Any]) -> None:
    """The run, and the merged model where the recipe asked for it."""
    print_made(console, data)
    if "merged" in data:
        print_made(console, data["merged"])


def merge_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a merge reports: the checkpoint, the share that rounding erased, how it was proven."""
    options = checkpoint.manifest.lineage[-1].options
    told = {name: options.get(name) for name in ("erased_share", "proof", "checked_rows")}
    untouched = options.get("untouched_tensors", [])
    return {**checkpoint_data(checkpoint), **told, "untouched_tensors": untouched}


def print_merged(console: "Console", data: Mapping[str, Any]) -> None:
    """As for any checkpoint, one line on what rounding erased, one on how it was proven."""
    print_made(console, data)
    if data["erased_share"] is not None:
        console.print(f"lost to rounding: {data['erased_share']:.3%} of the adapter's change")
    if data["checked_rows"] is not None:
        console.print(
            f"checked by {data['checked_rows']} rows computed again in fp64, because the model could "
            "not be run in the memory there was; run `qlx verify` where it can"
        )
    elif data["proof"] is not None:
        console.print(f"checked by {data['proof']}")


def outline_data(outline: "Outline", limit: int | None) -> dict[str, Any]:
    """A dry run of a merge: tensors, bytes, memory, threads, seconds, and how it would be proven."""
    figures = asdict(outline.figures)
    rest = {"onto": outline.onto, "dtype": outline.dtype, "in_place": outline.in_place}
    proof = {"proof": outline.proof, "proof_bytes": outline.proof_bytes}
    return {**rest, **figures, **proof, "max_ram": limit}


def print_outline(console: "Console", data: Mapping[str, Any]) -> None:
    """The dry run as lines."""
    size = {name: format_bytes(data[name]) for name in _OUTLINED}
    console.print(f"onto the {data['onto']} base, written as {data['dtype']}; nothing was written")
    console.print(f"  tensors  {data['touched']} of {data['tensors']} change")
    console.print(f"  bytes    {size['read']} read, {size['copied']} copied by the kernel, "
                  f"{size['rewritten']} computed and written")  # fmt: skip
    console.print(f"  memory   {size['held']} held, {size['working']} to work in on "
                  f"{data['threads']} threads; --max-ram can be as low as {size['floor']}")  # fmt: skip
    console.print(f"  time     about {data['seconds']:.1f} s of all threads, if the disk keeps up")
    console.print(f"  proof    {data['proof']}, {size['proof_bytes']} more while it lasts")
    console.print("  left to the merge: that the base is the recorded one, which takes reading it")


def _print_results(console: "Console", results: Sequence[Mapping[str, Any]]) -> None:
    if not results:
        return
    names = [name for name in _SHOWN if any(name in result["metrics"] for result in results)]
    rows = [
        (
            result["step"],
            result["against"],
            *(_number(result["metrics"].get(name)) for name in names),
            "yes" if result["passed"] else "NO",
        )
        for result in results
    ]
    console.print(_table(("replay", "against", *names, "passed"), rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: Sequence[str], rows: "Rows") -> "Table":
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(cell for cell in row))
    return table


def print_manifest(console: "Console", data: Mapping[str, Any]) -> None:
    """The manifest by sections: what it is, base, quantization, adapter, lineage, files, replays."""
    manifest = data["manifest"]
    version = f"format version {manifest['format_version']}"
    console.print(f"{data['path']}: {data['kind']} of {data['task']}, {version}")
    facts = [("tag", data["tag"]), ("digest", data["digest"])]
    facts += [("base", _base(manifest["base"]))] if manifest["base"] else []
    facts += [("quantization", _quantization(manifest["quantization"]))]
    facts += [("adapter", _adapter(manifest["adapter"]))] if manifest["adapter"] else []
    facts += _exported(manifest["lineage"])
    facts += [("lineage", " → ".join(step["command"] for step in manifest["lineage"]))]
    for name, value in facts:
        console.print(f"  {name:<13} {value}")
    files = [(n, format_bytes(f["size"]), f["sha256"][:12]) for n, f in manifest["files"].items()]
    console.print(_table(("file", "size", "sha256"), files))
    console.print(f"{len(files)} files match their digests, {format_bytes(data['size'])} in all")
    _print_adapters(console, data)
    _print_results(console, _all_results(data))


def _base(base: Mapping[str, Any]) -> str:
    revision = f"@{base['revision']}" if base["revision"] else ""
    return f"{base['name']}{revision} ({base['fingerprint'][:19]}…)"


def _exported(lineage: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What an exported language model's attention and head are; nothing of anything else."""
    options = lineage[-1]["options"] if lineage else {}
    told = [("attention", str(options["attention"]))] if "attention" in options else []
    if "head" in options:
        moved = f"weights moved by {100 * options['head_rounded']:.2f} %"
        told.append(("head", f"{options['head']}, {moved}"))
    return told


def _quantization(spec: Mapping[str, Any]) -> str:
    if spec["backend"] == "gguf":
        return (
            f"GGUF {spec['extras']['gguf_type']}, {len(spec['tensors'])} tensors ({spec['method']})"
        )
    if spec["scheme"] is None:
        return "none"
    double = ", double quantization" if spec["double_quant"] else ""
    return (
        f"{spec['scheme']}, {_grouping(spec)}{double}, compute {spec['compute_dtype']}, "
        f"{len(spec['modules']) or len(spec['tensors'])} tensors ({spec['method']})"
    )


def _grouping(spec: Mapping[str, Any]) -> str:
    if spec["group_size"] is not None:
        return f"groups of {spec['group_size']}"
    return "one scale a tensor" if spec["scheme"] == "ternary" else "one scale a row"


def _adapter(spec: Mapping[str, Any]) -> str:
    trained = format_count(spec["trained_parameters"] or 0)
    if spec["type"] == "full":
        return f"none: all {trained} parameters trained"
    share = ""
    if spec["total_parameters"]:
        share = f" ({100 * (spec['trained_parameters'] or 0) / spec['total_parameters']:.2g} %)"
    flags = "" if spec["alpha"] is None else f", alpha {spec['alpha']:g}"
    flags += "".join(f", {name}" for name in ("use_rslora", "use_dora") if spec[name])
    if "initialized" in spec:
        half = f" (rank {spec['trained_rank']} trained)" if "trained_rank" in spec else ""
        flags += f", begun as {spec['initialized']}{half}"
    if "new_tokens" in spec:
        flags += f", {len(spec['new_tokens'])} new tokens"
    return (
        f"{spec['type']} of rank {spec['rank']}{flags}, "
        f"{len(spec['tensors'])} modules, {trained} parameters trained{share}"
    )


def report_data(report: "Report") -> dict[str, Any]:
    """A verification's JSON, as the verification package renders it, and its tables as text."""
    from qlx.verification import rows, tables, to_json

    data: dict[str, Any] = json.loads(to_json(report))
    data["rows"] = [list(row) for row in rows(report)]
    data["tables"] = [[list(row) for row in table] for table in tables(report)]
    return data


def print_report(console: "Console", data: Mapping[str, Any]) -> None:
    """Every check with its limit, what was measured, the notes, and the verdict."""
    on = f", on {data['inputs']}" if data["inputs"] else ""
    what = f"{data['subject']} ({data['kind']}, {data['task']})"
    console.print(f"{what} against {data['against']}{on}")
    console.print(_table(("check", "measured", "limit", "result"), data["rows"]))
    for header, *body in data["tables"]:
        console.print()
        console.print(_table(header, body))
    console.print()
    for note in data["notes"]:
        console.print(note)
    console.print("verified" if data["passed"] else "NOT verified", style="bold")


def dry_run_data(found: "DryRun", plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dry run: what was found, and the plan of its memory if the base's shape is known."""
    return {**asdict(found), "plan": plan}


def print_dry_run(console: "Console", data: Mapping[str, Any]) -> None:
    """What would be trained on what, what could not be checked, and the plan."""
    from qlx.cli.render_plan import print_plan

    console.print(f"{data['recipe']}: {data['task']}, tag {data['tag']}")
    console.print(f"  base       {data['base'] or 'built from nothing'}")
    console.print(
        f"  examples   {data['train_examples']} to train on, {data['eval_examples']} held out"
    )
    if data["total_parameters"]:
        counts = format_count(data["trained_parameters"]), format_count(data["total_parameters"])
        console.print(f"  trained    {counts[0]} of {counts[1]} parameters")
    for name in ("adapted", "quantized"):
        if data[name]:
            console.print(f"  {name:<10} {len(data[name])} modules, such as {data[name][0]}")
    for text in data["unchecked"]:
        console.print(f"  unchecked  {text}")
    if data["plan"]:
        print_plan(console, data["plan"])


def trial_data(trial: "Trial") -> dict[str, Any]:
    """A loaded adapter: what it is, its distance from training's outputs, its answer."""
    return {
        **checkpoint_data(trial.adapter),
        "passed": trial.passed,
        "replay": {name: found.metrics() for name, found in trial.comparisons.items()},
        "failures": [check.name for check in trial.checks if not check.passed],
        "answer": trial.answer,
    }


def print_trial(console: "Console", data: Mapping[str, Any]) -> None:
    """One line for the adapter, one for each replay, and the answer."""
    verdict = "computes what training saw" if data["passed"] else "does NOT compute what it should"
    console.print(f"{data['path']}: {data['tag']}: {verdict}")
    for name, metrics in data["replay"].items():
        shown = ", ".join(f"{n} {_number(metrics[n])}" for n in _SHOWN if n in metrics)
        console.print(f"  against {name}: {shown}")
    for name in data["failures"]:
        console.print(f"  failed: {name}")
    if data["answer"] is not None:
        console.print(data["answer"])


def score_data(path: Path, result: "EvalResult") -> dict[str, Any]:
    """An evaluation: what was scored on what, metrics by name, how many images or tokens."""
    return {"path": str(path), **asdict(result)}


def print_scores(console: "Console", data: Mapping[str, Any]) -> None:
    """One line per metric."""
    units = {"image-classification": "images", "heatmap": "heatmaps"}
    unit = units.get(data["task"], "tokens")
    console.print(f"{data['path']} on {data['source']}, {data['count']} {unit}")
    for name, value in data["metrics"].items():
        console.print(f"  {name:<16} {value:.4f}")


def print_migration(console: "Console", data: Mapping[str, Any]) -> None:
    """What was done, which for the first format version is nothing."""
    console.print(
        f"{data['path']}: format version {data['format_version']} is current, nothing to do"
    )
