"""What a quantization found, as a table: a row a scheme and method, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steppe.launch import outputs
from steppe.launch.compare.table import spread
from steppe.launch.merge.material import LESS
from steppe.launch.quantize.settings import QuantizeConfig

# Share of what real inputs tell a classifier, below which made ones teach next to nothing.
FEW = 0.1
HEADS = ("", "metric", "less the float's", "agreement", "kernels", "SQNR, dB", "forward pass")


def summary(
    config: QuantizeConfig, known: Mapping[str, Any], done: Mapping[Any, Any]
) -> dict[str, Any]:
    """Everything that the report shows; rows that are missing yet are left out."""
    rows = [done[key] for key in config.rows() if key in done]
    plain = known.get("float", {}).get("metrics", {})
    metric = next((m for m in (*outputs.HEADLINE.values(), "loss") if m in plain), None)
    return {
        **known,
        "metric": metric,
        "rows": rows,
        "of": len(config.rows()),
        "table": [_line(group, metric, plain) for group in _groups(rows)],
    }


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows of one scheme and method together."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["bits"], row["method"]), []).append(row)
    return list(found.values())


def _line(
    group: Sequence[Mapping[str, Any]], metric: str | None, plain: Mapping[str, float]
) -> dict[str, Any]:
    first = group[0]
    line: dict[str, Any] = {"name": f"{first['bits']} {first['method']}", "seeds": len(group)}
    if metric is not None and all("metrics" in row for row in group):
        values = [float(row["metrics"][metric]) for row in group]
        line["metric"] = spread(values)
        line["difference"] = spread([value - float(plain[metric]) for value in values])
    agreed = [row["agreement"] for row in group if row.get("agreement") is not None]
    if agreed:
        line["agreement"] = spread(agreed)
    size = first["size"]
    line["share"] = size["packed"] / size["float32"] if size["float32"] else math.nan
    ratios = [error["sqnr"] for row in group for error in row["errors"].values()]
    line["sqnr"] = spread(ratios)
    line["ratio"] = first.get("speed", {}).get("ratio", {})
    return line


def lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table below ``HEADS``."""
    metric = found["metric"]
    scale = 1.0 if metric in (*LESS, None) else 100.0
    body = []
    plain = found.get("float", {}).get("metrics", {})
    if metric is not None:
        body.append(["float", f"{scale * plain[metric]:.2f}", "", "", "1.000", "", "1.00"])
    for line in found["table"]:
        ratio = line["ratio"]
        timed = [
            f"{name} {ratio[name]['median']:.2f}"
            for name in ("rounded", "integer")
            if name in ratio
        ]
        body.append(
            [
                line["name"],
                _cell(line.get("metric"), scale),
                _cell(line.get("difference"), scale, sign=True),
                _cell(line.get("agreement"), 100.0, 1),
                f"{line['share']:.3f}",
                _cell({**line["sqnr"], "std": None}, 1.0, 1),
                ", ".join(timed),
            ]
        )
    return body


def _cell(
    found: Mapping[str, Any] | None, scale: float, digits: int = 2, *, sign: bool = False
) -> str:
    if not found or found["mean"] is None:
        return ""
    text = f"{scale * found['mean']:{'+' if sign else ''}.{digits}f}"
    return text if found["std"] is None else f"{text} ± {scale * found['std']:.{digits}f}"


def heads(found: Mapping[str, Any]) -> list[str]:
    """``HEADS`` with the name of the metric."""
    metric = found["metric"] or ""
    unit = f"{metric}, %" if metric and metric not in LESS else metric
    return [unit if head == "metric" else head for head in HEADS]


def warnings(found: Mapping[str, Any]) -> list[str]:
    """A sentence for every game whose inputs told the float model next to nothing."""
    real = found.get("float", {}).get("information")
    said = []
    for row in found["rows"] if real else ():
        told = row.get("information")
        if told is not None and told < FEW * real:
            said.append(
                f"{row['folder']}: the float model answers the made inputs almost alike "
                f"({told:.3f} nats tell them apart, {real:.3f} the test examples): what was learnt "
                "from them says little of the data (for texts, --info-bonus and --candidates of "
                "zsaq are there to find others)"
            )
    return said


def terminal(found: Mapping[str, Any]) -> Any:
    """For the terminal."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for number, head in enumerate(heads(found)):
        table.add_column(head, justify="left" if number == 0 else "right")
    for cells in lines(found):
        table.add_row(*cells)
    return table
