"""RESULTS.md from the JSON files of `benchmarks/results/`: every figure there has its source beside it.

    python -m benchmarks.results

One section per file: the command that made it, the machine, the rows, and the pictures of the same name.
"""

import argparse
import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"

# Of long tables: the columns that name a line, the one whose values become columns, and what stands in the cells.
PIVOTS = {
    "engine": (("d", "T", "tied", "adapter"), "method", ("time_ratio", "memory_ratio")),
    "engine_quick": (("d", "T", "tied", "adapter"), "method", ("time_ratio", "memory_ratio")),
    **{path.stem: (("epsilon", "method"), "metric", ("value",)) for path in RESULTS.glob("quality_*.json")},
}


# Of tables with hundreds of rows: only rows with one of these keys, which judge the others.
VERDICTS = {"features": ("ordered", "rank_correlation")}


def cell(value: Any) -> str:
    """A value as it stands in a table: four digits, nothing that Markdown would take for its own."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a column for every key that occurs."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[cell(key) for key in keys], ["---"] * len(keys)]
    lines += [[cell(row[key]) if row.get(key) is not None else "" for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pivoted(rows: Sequence[Mapping[str, Any]], names: tuple[str, ...], across: str, figure: str) -> str:
    """One line per combination of `names`, one column per value of `across`."""
    lines: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        line = lines.setdefault(key, dict(zip(names, key, strict=True)))
        line[str(row[across])] = row.get(figure, "cannot run")
    return table(list(lines.values()))


def pictures(path: Path) -> list[Path]:
    """Those beside a JSON file whose names go on from its own, and not from a longer one's."""
    stems = [report.stem for report in path.parent.glob("*.json")]
    found = sorted(path.parent.glob(f"{path.stem}*.png"))
    return [picture for picture in found if max(filter(picture.stem.startswith, stems), key=len) == path.stem]


def section(path: Path) -> str:
    """The section of one JSON file."""
    report = json.loads(path.read_text(encoding="utf-8"))
    environment, command, rows = report["environment"], report["command"], report["rows"]
    module = HERE / f"{command.split('benchmarks.')[1].split()[0]}.py"
    purpose = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    machine = environment["accelerator"] or f"{environment['processor']}, {environment['cores']} cores"
    lines = [
        f"## {path.stem}",
        " ".join(purpose.split()),
        f"`{command}` on {machine}, {environment['torch_threads']} threads; {packages}."
        f" Source: [`results/{path.name}`](results/{path.name}).",
    ]
    if path.stem in PIVOTS:
        names, across, figures = PIVOTS[path.stem]
        for figure in figures:
            lines += [f"`{figure}`:", pivoted(rows, names, across, figure)]
    elif path.stem in VERDICTS:
        shown = [row for row in rows if any(key in row for key in VERDICTS[path.stem])]
        lines += [f"The {len(shown)} of {len(rows)} rows that judge; the others are in the source.", table(shown)]
    else:
        lines.append(table(rows))
    lines += [f"![{picture.stem}](results/{picture.name})" for picture in pictures(path)]
    return "\n\n".join(lines)


def render() -> str:
    """The whole of RESULTS.md."""
    head = "# Results\n\nWritten by `python -m benchmarks.results` from the files in `results/`; not edited by hand."
    return "\n\n".join([head, *(section(path) for path in sorted(RESULTS.glob("*.json")))]) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (HERE / "RESULTS.md").write_text(render(), encoding="utf-8")
    print(HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
