"""Plans and size tables, as JSON data and as tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlx.planning import Plan, SizeTable, format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console

_CHANGES = {
    "tokens": "sequence length",
    "batch": "batch",
    "rank": "rank",
    "weights": "base stored as",
    "checkpointing": "checkpointing",
}
_SWITCH = {True: "on", False: "off"}


def plan_data(
    plan: Plan, available: float | None, nearest: Plan | None, *, asked: bool = False
) -> dict[str, Any]:
    """A plan, whether it fits, and, where one was asked for, the suggestion (None: nothing fits)."""
    data: dict[str, Any] = plan.to_json()
    if available is not None:
        data |= {"available": round(available), "fits": plan.fits(available)}
    if asked:
        data["suggestion"] = nearest and nearest.to_json()
    return data


def print_plan(console: "Console", data: Mapping[str, Any]) -> None:
    """The parts as a table, the total, the verdict and the suggestion."""
    from rich.table import Table

    shape, setup = data["shape"], data["setup"]
    console.print(
        f"{shape['name']}: {format_count(shape['parameters'])} parameters, {shape['layers']} layers "
        f"of width {shape['hidden']}; {format_count(data['trained_parameters'])} trained"
    )
    length = shape["tokens"] or setup["tokens"]
    kind = f"base stored as {_shown(setup)['weights']}, rank {setup['rank']}"
    console.print(
        f"{kind if setup['rank'] else 'all weights trained'}, batch {setup['batch']} of "
        f"{length} positions, checkpointing {_SWITCH[setup['checkpointing']]}"
    )
    table = Table("part", "memory", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in data["parts"].items():
        table.add_row(name.replace("_", " "), format_bytes(size))
    table.add_row("total", format_bytes(data["total"]), style="bold")
    console.print(table)
    other = "without" if setup["checkpointing"] else "with"
    console.print(
        f"activations {other} checkpointing: "
        f"{format_bytes(data[f'activations_{other}_checkpointing'])}"
    )
    for note in data["notes"]:
        console.print(f"note: {note}")
    if "fits" in data:
        verdict = "fits into" if data["fits"] else "does NOT fit into"
        console.print(f"{verdict} {format_bytes(data['available'])}")
    _print_suggestion(console, data)


def _print_suggestion(console: "Console", data: Mapping[str, Any]) -> None:
    if "suggestion" not in data:
        return
    if data["suggestion"] is None:
        console.print("suggestion: none; nothing fits, down to rank 4 and 128 positions")
        return
    old, new = _shown(data["setup"]), _shown(data["suggestion"]["setup"])
    changes = [f"{text} {new[name]}" for name, text in _CHANGES.items() if new[name] != old[name]]
    total = format_bytes(data["suggestion"]["total"])
    console.print(f"suggestion: {', '.join(changes) or 'as it is'} → {total}")


def _shown(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a setup that a suggestion may change, as they are printed."""
    double = " with double quantization" if setup["double_quant"] else ""
    return {
        **{name: setup[name] for name in _CHANGES},
        "weights": f"{setup['weights']}{double}",
        "checkpointing": _SWITCH[setup["checkpointing"]],
    }


def table_data(table: SizeTable, available: float | None) -> dict[str, Any]:
    """Rows of totals in bytes, by size and rank, and whether each fits."""
    return {
        "ranks": list(table.ranks),
        "available": None if available is None else round(available),
        "rows": [
            {
                "parameters": row[0].shape.parameters,
                "shape": row[0].shape.name,
                "totals": [round(plan.total) for plan in row],
                "fits": None if available is None else [plan.fits(available) for plan in row],
            }
            for row in table.rows
        ],
    }


def print_table(console: "Console", data: Mapping[str, Any]) -> None:
    """Totals over sizes and ranks; what does not fit is marked."""
    from rich.table import Table

    table = Table("parameters", "shape", *(f"rank {r}" for r in data["ranks"]), box=None)
    for row in data["rows"]:
        fits = row["fits"] or [True] * len(row["totals"])
        cells = [
            f"{format_bytes(total)}{'' if fit else ' ✗'}"
            for total, fit in zip(row["totals"], fits, strict=True)
        ]
        table.add_row(format_count(row["parameters"]), row["shape"], *cells)
    console.print(table)
    if data["available"] is not None:
        console.print(f"✗ does not fit into {format_bytes(data['available'])}")
