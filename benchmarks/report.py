"""The one report format of all benchmarks: ``{"command", "environment", "rows"}``."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "diffusers", "datasets", "opacus", "dp-accounting", "PyWavelets", "numpy")


def environment() -> dict[str, Any]:
    """Describe what the figures depend on: processor, cores, threads and package versions. No host name, no path."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }


def write_report(command: str, rows: Sequence[Mapping[str, Any]], out: str | Path | None = None) -> dict[str, Any]:
    """Print `rows` as a table and, if `out` is given, write the report there as JSON.

    Args:
        command: The command line that produced the rows, e.g. ``"python -m benchmarks.tokenize --quick"``.
        rows: One mapping per measurement. Keys may differ between rows; values are plain JSON values.
        out: File to write; its folder is created.

    Returns:
        The report, ``{"command": str, "environment": dict, "rows": list}``.

    Raises:
        ValueError: A value is NaN or infinite, which JSON cannot carry.
        TypeError: A value is not a plain JSON value (turn tensors and NumPy scalars into Python numbers).
    """
    report = {"command": command, "environment": environment(), "rows": [dict(row) for row in rows]}
    text = json.dumps(report, indent=2, allow_nan=False)
    print(_table(report["rows"]))
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return report


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[_cell(row[key]) if key in row else "-" for key in keys] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
