"""How measurements are told: a table for people on stderr, one JSON line each for programs on stdout."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.bench.roofline import Ceilings


def repeated(values: Sequence[float]) -> dict[str, Any]:
    """The median of some repeats, how far apart they are, and themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def against_floor(floor_seconds: float, measured_seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """The roofline part of a measurement: fraction 1 is as fast as the machine allows."""
    return {
        "floor_ms": floor_seconds * 1e3,
        "measured_ms": measured_seconds * 1e3,
        "fraction": floor_seconds / measured_seconds,
        "bandwidth_bytes_per_s": ceilings.bandwidth,
        "peak_flops_per_s": ceilings.flops,
    }


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "num_devices": jax.device_count(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
        "commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit that this file is from, with "+" if files differ from it; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


class Report:
    """Collects one benchmark's measurements. `about` goes into every JSON line: the machine, the engine."""

    def __init__(self, benchmark: str, about: dict[str, Any]):
        self.benchmark, self.about = benchmark, about
        self._rows: list[dict[str, str]] = []

    def add(self, row: dict[str, str], measurement: dict[str, Any]) -> None:
        """Prints the measurement now; keeps the row, column name to text, for the table."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"benchmark": self.benchmark, "time": now} | measurement | self.about
        print(json.dumps(line), flush=True)
        self._rows.append(row)
        print("  ".join(f"{name} {text}" for name, text in row.items()), file=sys.stderr, flush=True)

    def print_table(self) -> None:
        if len(self._rows) > 1:
            print("\n" + table(self._rows), file=sys.stderr)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows with equal keys as aligned columns under the keys."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [names, ["-" * width for width in widths], *([row[name] for name in names] for row in rows)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
