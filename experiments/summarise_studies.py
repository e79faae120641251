"""One file of the results of several studies and runs, by model, study, domain and length: of studies the base model,
of a run what it was given.

python -m experiments.summarise_studies docs/results/summary.json docs/results/tiny-x8 ... docs/results/smollm2-32k ...
"""

import argparse
import json
from pathlib import Path
from typing import Any

from skipwise.utils.files import write_json


def figures_of(summary: dict[str, Any]) -> dict[str, Any]:
    """By domain and length: of every method its results, and what they are beside others."""
    result: dict[str, Any] = {}
    for row in summary["figures"]:
        place = result.setdefault(row["domain"], {}).setdefault(str(row["context_length"]), {})
        own = {key: row[key] for key in ("value", "interval", "seeds")}
        place.setdefault(row["evaluation"], {})[row["arm"]] = own
        for key in ("over_full", "original_window_ratio", "over_reference"):
            if row.get(key) is not None:
                beside = dict(row[key])
                if key == "over_reference":
                    beside |= {"p_value": row["p_value"], "p_value_holm": row.get("p_value_holm")}
                place.setdefault(f"{row['evaluation']}_{key}", {})[row["arm"]] = beside
                if key == "over_full" and row["arm"] == summary["reference"]:
                    place["pose_over_full"] = beside["value"]
    return result


def figures_of_run(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of the rows of one run: a stage is what an arm is in a study."""
    result: dict[str, Any] = {}
    for row in rows:
        if row["depth"] is not None or row["metric"] not in ("perplexity", "accuracy") or row["value"] is None:
            continue
        place = result.setdefault(row["data"], {}).setdefault(str(row["context_length"]), {})
        interval = None if row["interval_low"] is None else [row["interval_low"], row["interval_high"]]
        own = {"value": row["value"], "interval": interval, "num_samples": row["num_samples"]}
        place.setdefault(row["evaluation"], {})[row["stage"]] = own
    for lengths in result.values():
        shortest = lengths[min(lengths, key=int)]
        measured = shortest.get("perplexity", {})
        if "original" in measured and "extended" in measured:
            shortest["original_window_ratio"] = measured["extended"]["value"] / measured["original"]["value"]
    return result


def main() -> None:
    """Read every summary.json, or the rows of a run, and write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("studies", type=Path, nargs="+", help="directories of studies and runs")
    arguments = parser.parse_args()
    merged: dict[str, Any] = {}
    for directory in arguments.studies:
        if not (directory / "summary.json").is_file():
            lines = (directory / "results.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            merged.setdefault(rows[0]["model"], {})[directory.name] = {"domains": figures_of_run(rows)}
            continue
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        about = {
            key: summary[key] for key in ("original_length", "train_length", "target_length", "reference", "seeds")
        }
        merged.setdefault(summary["model"], {})[directory.name] = {**about, "domains": figures_of(summary)}
    write_json(arguments.output, merged)


if __name__ == "__main__":
    main()
