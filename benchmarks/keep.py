"""What every benchmark that a page draws writes: rows, with the command, the date, the machine and the versions."""

import json
import os
import platform
import resource
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np


def keep(file: Path, part: str, command: str, rows: list[dict], seconds: float, tools: list[str]) -> None:
    """Put a part into a file of results; its other parts stay."""
    known = json.loads(file.read_text()) if file.exists() else {}
    known[part] = {
        "date": date.today().isoformat(),
        "command": command,
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "versions": {name: version(name).split("+")[0] for name in tools},
        "seconds": round(seconds),
        "rows": [{name: plain(value) for name, value in row.items()} for row in rows],
    }
    file.parent.mkdir(exist_ok=True)
    # A row a line, so that a change of one is seen.
    parts = []
    for name, one in known.items():
        head = json.dumps({key: value for key, value in one.items() if key != "rows"})
        body = ",\n".join(json.dumps(row) for row in one["rows"])
        parts.append(f'{json.dumps(name)}: {head[:-1]}, "rows": [\n{body}\n]}}')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def plain(value):
    """Return a value that JSON has, numbers to four digits and those that are none as None."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def peak_memory() -> float:
    """Return the peak memory of this process in GB; what a parent had before it started this one is not its own."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024**2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()
