"""Results as JSON: everything that is needed to read a time later."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spfmt._files import replace_file
from spfmt.bench import baselines, machine
from spfmt.bench.session import Session
from spfmt.ceilings import Ceilings
from spfmt.errors import FormatError, format_error

__all__ = [
    "SCHEMA",
    "check_target",
    "layer_name",
    "make_record",
    "read_record",
    "select",
    "write_record",
]

SCHEMA = 1
_KEYS = ("schema", "date", "machine", "versions", "absent", "ceilings", "results", "skipped")


def make_record(session: Session, **more: Any) -> dict[str, Any]:
    """Return everything that a session measured, and where.

    Parameters
    ----------
    session : Session
    **more
        Further entries, which JSON can hold.

    Returns
    -------
    dict
        ``schema``, ``date`` (UTC), ``machine``, ``versions``, ``absent`` (packages that took no
        part, and why), ``ceilings``, ``skipped``, `more`, and ``results``: the fields of `Row`,
        times in microseconds.
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": session.machine,
        "versions": machine.versions(),
        "absent": baselines.absent(),
        "ceilings": [_ceilings(c) for c in session.ceilings],
        "seconds_per_case": session.seconds,
        "skipped": session.skipped,
        **more,
        "results": [row.as_json() for row in session.rows],
    }


def _ceilings(ceilings: Ceilings) -> dict[str, Any]:
    record = asdict(ceilings)
    for level in record["levels"]:
        level["capacity"] = None if math.isinf(level["capacity"]) else level["capacity"]
    return record


def check_target(path: Path) -> None:
    """Refuse before a measurement a file that could not be written after it.

    Raises
    ------
    FormatError
        Where `path` is a directory, or its own directory is missing or read-only.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise format_error(
            f"--json {path}", "a file in an existing directory that you may write to", "make it"
        )


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record, one result per line, so that versions of it can be compared."""
    parts = []
    for key, value in record.items():
        if isinstance(value, list) and value:
            lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value)
            parts.append(f"{json.dumps(key)}: [\n  {lines}\n ]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    text = "{\n " + ",\n ".join(parts) + "\n}\n"
    replace_file(str(path), text.encode())


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises
    ------
    FormatError
        For a file that is no such record, or one of another schema.
    OSError
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _foreign(path, str(error)) from None
    missing = [key for key in _KEYS if not isinstance(record, dict) or key not in record]
    if missing:
        raise _foreign(path, f"no {', '.join(missing)}")
    if record["schema"] != SCHEMA:
        raise _foreign(path, f"schema {record['schema']!r}")
    return dict(record)


def _foreign(path: Path, reason: str) -> FormatError:
    return format_error(
        f"{str(path)!r} ({reason})",
        f"results of spfmt bench, schema {SCHEMA}",
        "measure again with spfmt bench --json or python -m benchmarks.linear --json",
    )


def select(rows: Sequence[Mapping[str, Any]], **fields: Any) -> list[Mapping[str, Any]]:
    """Return the results whose fields equal what is given."""
    return [row for row in rows if all(row.get(k) == v for k, v in fields.items())]


def layer_name(row: Mapping[str, Any]) -> str:
    """Say which layer a result is of: ``768 → 3072``, ``64 → 128, 3x3, 32x32, stride 2``."""
    rows, cols, *kernel = row["shape"]
    geometry = row.get("geometry")
    if geometry is None:
        return f"{cols} → {rows}"
    size, stride, groups = (geometry[key] for key in ("size", "stride", "groups"))
    text = f"{cols * groups} → {rows}, {kernel[0]}x{kernel[1]}, {size[0]}x{size[1]}"
    text += f", stride {stride}" if stride > 1 else ""
    return text + (f", {groups} groups" if groups > 1 else "")
