"""The measured part of docs/training.md, from the records that there are.

``python -m benchmarks.methods`` writes docs/training-….json, with ``--suite prune``
docs/pruning-….json, and ``python -m benchmarks.updates`` docs/updates-….json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from results import head, line

Record = Mapping[str, Any]

TITLES = {
    "digits": "Digits: 64 → 512 → 512 → 10, a tenth of the weights, 15 epochs, two seeds",
    "mnist": "MNIST: 784 → 1024 → 1024 → 10, a twentieth of the weights, 10 epochs, two seeds",
}
# What rows are that the changes of one recipe do not tell.
SAID = {
    "dense": "",
    "Lottery, CSR": "trains twice: `python -m benchmarks.methods --only Lottery`",
}


def section(records: Mapping[str, tuple[str, Record] | None]) -> str:
    """The measured part of the page.

    Parameters
    ----------
    records : mapping of str to (str, mapping) or None
        Of every benchmark of `PARTS` the file in docs/ and the record, where there is one.
    """
    return "\n\n".join(
        f"{make(found[1])}\n\nGenerated from [{found[0]}]({found[0]}). {_where(found[1])}"
        if (found := records.get(name))
        else f"There is no record yet: docs/{name}-….json."
        for name, make in PARTS.items()
    )


def _all_methods(record: Record) -> str:
    return "\n\n".join(_methods(record, suite) for suite in TITLES if suite in record)


def _where(record: Record) -> str:
    machine = record["machine"]
    return f"On **{machine['cpu']}**, {machine['cores']} cores, {machine['isa']}."


def _methods(record: Record, suite: str) -> str:
    columns = ["method", "test accuracy", "density", "ms/step", "peak memory", "changes"]
    rows = [f"### {TITLES[suite]}\n", *head(columns)]
    for name, found in record[suite].items():
        first = found["seeds"][0]
        rows.append(
            line(
                [
                    name,
                    _accuracy(found),
                    f"{first['density']:.3f}",
                    f"{1e3 * first['seconds_per_step']:.1f}{_elsewhere(record, found)}",
                    f"{first['peak_memory'] >> 20} MiB",
                    SAID.get(name, " ".join(f"`{c}`" for c in found["changes"])),
                ]
            )
        )
    return "\n".join(rows)


def _elsewhere(record: Record, found: Mapping[str, Any]) -> str:
    cpu = found.get("cpu", record["machine"]["cpu"])
    return "" if cpu == record["machine"]["cpu"] else f" (on {cpu})"


def _accuracy(found: Mapping[str, Any]) -> str:
    spread = f" ± {100 * found['test_accuracy_spread']:.2f}" if len(found["seeds"]) > 1 else ""
    return f"{100 * found['test_accuracy']:.2f}{spread} %"


def _pruned(record: Record) -> str:
    """What is given and what is got: accuracy and latency of the pruned ResNet-20."""
    columns = ["ResNet-20", "test accuracy", "weights kept", "batch 1", "batch 64"]
    rows = ["### A trained ResNet-20 pruned, three epochs on CIFAR-10\n", *head(columns)]
    times = record["latencies"]
    for name, found in record["prune"].items():
        cells = [name, _accuracy(found), f"{found['seeds'][0]['density']:.3f}"]
        for batch in ("1", "64"):
            own, dense = times[batch][name], times[batch]["dense"]
            cells.append(f"{own:.2f} ms ({dense / own:.1f}x)")
        rows.append(line(cells))
    return "\n".join(rows)


def _updates(record: Record) -> str:
    columns = ["network", "method", "block", "density", "step", "update", "share at ΔT = 100"]
    rows = [
        "### What updates cost\n",
        "One thread, batch 128; the share is that of updates, and of observing their steps, in the "
        "time of training.\n",
        *head(columns),
    ]  # fmt: skip
    for row in record["results"]:
        block = "x".join(map(str, row.get("block_shape", ())))
        cells = [row["network"], row["method"], block, f"{row['density']:g}"]
        times = [f"{row['step_ms']:.1f} ms", f"{row['update_ms']:.1f} ms"]
        rows.append(line([*cells, *times, f"{100 * row['share']:.1f} %"]))
    return "\n".join(rows)


PARTS: dict[str, Callable[[Record], str]] = {
    "training": _all_methods,
    "pruning": _pruned,
    "updates": _updates,
}
"""What stands on the page, and the benchmark whose record it comes from."""
