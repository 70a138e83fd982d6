"""Results of runs as committed files, and docs/results.md's tables and figures from those.

    python benchmarks/suite/publish.py add spatial-all RUN RUN ...
    python benchmarks/suite/publish.py ship spatial-trm RUN
    python benchmarks/suite/publish.py write

``add`` writes ``docs/results/<group>/<run>.json``, ``ship`` a policy for ``load_policy`` to
``pretrained/<name>``, and ``write`` whatever stands between the marks ``<!-- <group> -->`` and
``<!-- end -->`` of docs/results.md, with ``docs/images/<group>.png``.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from policies import POLICIES  # noqa: E402

from trm_helpers import plots  # noqa: E402
from trm_helpers.checkpoint import find_run  # noqa: E402
from trm_helpers.files import read_jsonl, replacing, write_json  # noqa: E402
from trm_helpers.paths import repo_root  # noqa: E402
from trm_helpers.stats import paired_mcnemar  # noqa: E402

RESULTS = repo_root() / "docs" / "results"
PAGE = repo_root() / "docs" / "results.md"
_EPISODE = ("suite", "task_id", "init_state", "seed", "success", "steps")
_MOST_TASKS = 3  # that get a column each


def add(group: str, runs: list[str]) -> None:
    for run in map(find_run, runs):
        config = json.loads((run / "config.json").read_text())
        epochs = read_jsonl(run / "metrics.jsonl")
        results = json.loads((run / "results.json").read_text())
        weights = load_file(run / f"{results['protocol']['weights']}.safetensors")
        write_json(RESULTS / group / f"{run.name}.json", {
            "policy": policy_name(config), "parameters": sum(w.numel() for w in weights.values()),
            "seed": config["train"]["seed"], "epochs": len(epochs),
            "best_epoch": min(epochs, key=lambda row: row["val_loss"])["epoch"],
            "minutes": round(sum(row["seconds"] for row in epochs) / 60, 1),
            "demonstrations": config["data"]["num_demos"], "trained_with": config["software"],
            "results": results,
            "episodes": [{key: row[key] for key in _EPISODE if key in row}
                         for row in read_jsonl(run / "episodes.jsonl")
                         if row["suite"] == results["protocol"]["suite"] and "error" not in row]})


def policy_name(config: dict) -> str:
    """Which of the policies of benchmarks/policies.py a configuration is."""
    flat = {**config["data"], **config["model"], **config["train"]}
    # the last that fits: later ones say more
    return [name for name, settings in POLICIES.items()
            if all(flat[key] == value for key, value in settings.items())][-1]


def ship(name: str, run_name: str) -> None:
    """The best weights and what ``load_policy`` needs, without this machine's paths."""
    run = find_run(run_name)
    with replacing(repo_root() / "pretrained" / name) as folder:
        folder.mkdir()
        for file in ("config.json", "best.safetensors", "metrics.jsonl"):
            shutil.copyfile(run / file, folder / file)
        described = json.loads((run / "policy.json").read_text())
        for file in described["trained_on"]["files"]:
            file["file"] = Path(file["file"]).name
        write_json(folder / "policy.json", described)


def write() -> None:
    text = PAGE.read_text()
    for group in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        rows = [json.loads(path.read_text()) for path in group.glob("*.json")]
        rows.sort(key=lambda row: (list(POLICIES).index(row["policy"]), row["seed"]))
        pattern = rf"(<!-- {re.escape(group.name)} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda match, rows=rows: match[1] + table(rows) + match[2],
                              text, flags=re.DOTALL)
        if not found:
            sys.exit(f"{PAGE} has no mark <!-- {group.name} --> for {group}")
        if len(rows[0]["results"]["tasks"]) > _MOST_TASKS:
            fig = plots.plot_success({label(row, rows): row["results"] for row in rows})
            plots.save_figure(fig, repo_root() / "docs" / "images" / f"{group.name}.png")
    with replacing(PAGE) as temporary:
        temporary.write_text(text)


def label(row: dict, rows: list[dict]) -> str:
    several = len({other["seed"] for other in rows}) > 1
    return f"{row['policy']}, seed {row['seed']}" if several else row["policy"]


def table(rows: list[dict]) -> str:
    """Markdown: a line per policy, the first of its seed being what it is compared with."""
    first = {row["seed"]: row for row in reversed(rows)}
    tasks = [task["task_id"] for task in rows[0]["results"]["tasks"]]
    columns = ([f"task {task}" for task in tasks] if len(tasks) <= _MOST_TASKS
               else ["worst task", "95 %, tasks resampled"])
    lines = [["policy", "parameters", *columns, "together", "95 % interval",
              "against the first: gap, p", "length", "best epoch", "minutes of training"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        results = row["results"]
        if len(tasks) <= _MOST_TASKS:
            values = [task["successes"] for task in results["tasks"]]
        else:
            worst = min(results["tasks"], key=lambda task: task["success_rate"])
            values = [f"{worst['successes']} of {worst['episodes']} (task {worst['task_id']})",
                      f"{100 * results['task_low']:.0f} to {100 * results['task_high']:.0f} %"]
        against = ""
        if row is not first[row["seed"]]:
            test = paired_mcnemar(first[row["seed"]]["episodes"], row["episodes"])
            against = f"{100 * test['difference']:+.0f} points, p = {test['p_value']:.2f}"
        lines.append([label(row, rows), f"{row['parameters'] / 1e6:.1f} M", *values,
                      f"{results['successes']} of {results['episodes']}",
                      f"{100 * results['wilson_low']:.0f} to {100 * results['wilson_high']:.0f} %",
                      against, f"{results['mean_length']:.0f}",
                      f"{row['best_epoch']} of {row['epochs']}", f"{row['minutes']:.0f}"])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("group")
    adding.add_argument("runs", nargs="+")
    shipping = commands.add_parser("ship")
    shipping.add_argument("name")
    shipping.add_argument("run")
    commands.add_parser("write")
    given = parser.parse_args()
    if given.command == "add":
        add(given.group, given.runs)
    elif given.command == "ship":
        ship(given.name, given.run)
    else:
        write()


if __name__ == "__main__":
    main()
