"""Table and figure of policies trained on the forty tasks of the four suites, for publish.py."""

from matplotlib.figure import Figure

from trm_helpers import schema
from trm_helpers.sim.env import load_task
from trm_helpers.stats import interval_text, rate_text
from trm_helpers.visuals.colours import GREEN, ORANGE
from trm_helpers.visuals.figure import describe, new_figure, styled

TITLES = {"libero_spatial": "LIBERO-Spatial", "libero_object": "LIBERO-Object",
          "libero_goal": "LIBERO-Goal", "libero_10": "LIBERO-10"}


def success_lines(rows: list[dict], label) -> list[list[str]]:
    """A line per policy: success in each suite, and the mean over the tasks."""
    lines = [["policy", *(TITLES[suite] for suite in schema.JOINED),
              "mean of the tasks (95 %, tasks resampled)"]]
    for row in rows:
        results = row["results"]
        lines.append([label(row, rows),
                      *(rate_text(results["suites"][suite]["successes"],
                                  results["suites"][suite]["episodes"])
                        for suite in schema.JOINED),
                      f"{100 * results['task_mean']:.0f} % "
                      f"({interval_text(results['task_low'], results['task_high'])} %)"])
    return lines


@styled
def plot_forty_tasks(row: dict) -> Figure:
    """A line for each task with its instruction and, for each episode, a tile."""
    suites = [(suite, [task for task in row["results"]["tasks"]
                       if schema.own_suite(schema.JOINT_SUITE, task["task_id"])[0] == suite])
              for suite in schema.JOINED]
    states = sorted({episode["init_state"] for episode in row["episodes"]})
    fig = new_figure(9.5, 0.23 * len(row["results"]["tasks"]) + 2)
    panels = fig.subplots(len(suites), sharex=True)
    for axes, (suite, tasks) in zip(panels, suites, strict=True):
        places = {task["task_id"]: place for place, task in enumerate(tasks)}
        for each in row["episodes"]:
            if each["task_id"] in places:
                x, y = states.index(each["init_state"]), places[each["task_id"]]
                sign, colour = (("\N{CHECK MARK}", GREEN) if each["success"]
                                else ("\N{BALLOT X}", ORANGE))
                axes.bar(x, 0.9, 0.94, y - 0.45, color=colour, alpha=0.4)
                axes.text(x, y, sign, ha="center", va="center")
        for task in tasks:
            axes.text(len(states) - 0.3, places[task["task_id"]],
                      f"{task['successes']}/{task['episodes']}", va="center")
        counts = row["results"]["suites"][suite]
        axes.set_title(f"{TITLES[suite]}: {counts['successes']} of {counts['episodes']} episodes",
                       loc="left")
        axes.set(yticks=range(len(tasks)), xticks=range(len(states)), xticklabels=states,
                 yticklabels=[load_task(schema.JOINT_SUITE, task["task_id"]).language
                              for task in tasks],
                 xlim=(-0.6, len(states) + 0.4), ylim=(len(tasks) - 0.4, -0.6))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[-1].set_xlabel("init state")
    fig.suptitle("One policy, told in words: success (\N{CHECK MARK}) or failure "
                 "(\N{BALLOT X}) of each episode")
    worst = sorted(row["results"]["tasks"], key=lambda task: task["success_rate"])[:3]
    return describe(fig, "; ".join(
        f"{TITLES[suite]}: {row['results']['suites'][suite]['successes']} of "
        f"{row['results']['suites'][suite]['episodes']}" for suite in schema.JOINED)
        + ". Least often solved: " + "; ".join(
            f"{load_task(schema.JOINT_SUITE, task['task_id']).language}, {task['successes']} of "
            f"{task['episodes']}" for task in worst) + ".")
