"""A pytest-benchmark JSON file -> what is worth keeping of it, and a Markdown table.

    pytest benchmarks/ --benchmark-json=run.json
    python benchmarks/report.py run.json benchmarks/results/cpu

Writes `linear_kl.json` and `linear_kl.md` in the folder.
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "flash-linear-attention")


def rows_of(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One a measurement: case and system, seconds, bytes, and the time over that of the matrix products alone."""
    rows = []
    for benchmark in benchmarks:
        case, _, system = benchmark["param"].rpartition("-")
        info = benchmark["extra_info"]
        rows.append(
            {
                "case": case,
                "system": system,
                "seconds": benchmark["stats"]["median"],
                "over_products": benchmark["stats"]["median"] / info["products_seconds"],
                "bytes_above_gradients": info["peak_bytes"] - info["gradient_bytes"],
                **info,
            }
        )
    return sorted(rows, key=lambda row: (row["case"], row["seconds"]))


def markdown(rows: list[dict[str, Any]], versions: dict[str, str], commit: str) -> str:
    lines = [
        f"Forward + backward, {rows[0]['device']}, commit {commit}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        "| case (rows x hidden x vocabulary) | system | seconds | over the products alone | MiB above the gradients |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} ({row['rows']} x {row['hidden']} x {row['vocab']}) | {row['system']} | {row['seconds']:.3f} |"
        f" {row['over_products']:.2f} | {row['bytes_above_gradients'] / 2**20:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(source: Path, folder: Path) -> None:
    run = json.loads(source.read_text())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    rows, commit = rows_of(run["benchmarks"]), run["commit_info"]["id"][:12]
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"command": "pytest benchmarks/", "commit": commit, "versions": versions, "rows": rows}
    (folder / "linear_kl.json").write_text(json.dumps(kept, indent=1) + "\n")
    (folder / "linear_kl.md").write_text(markdown(rows, versions, commit))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
