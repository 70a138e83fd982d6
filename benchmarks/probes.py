"""What a linear probe reads from a policy's state after each recursion: docs/recursion.md.

    python benchmarks/probes.py RUN

Writes probes.json into the run's folder and prints it as a table.

Uses held-out demonstrations, up to the step in which the object begins to move (afterwards the
hand's position is the object's). Computes the policy's state after each recursion on their
observations, and fits ridge regressions from it (averaged over tokens; the answer y, and of a TRM
the latent z) to the positions of object and target, to the vectors between hand, object and target,
and to whether the gripper is closed 8 steps later. Every other demonstration is fitted, the rest
scored: the share of variance explained, as the median over bootstrap samples of the scored
demonstrations, with its 95 % interval. ``input`` is the same for the input of the recursion,
``proprioception`` for joints and hand alone. Positions are centred within a task, so that knowing
the task explains nothing.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch

from trm_helpers import load_policy, schema
from trm_helpers.demos.collect import demonstrations_of
from trm_helpers.demos.demo_files import demo_names, open_demo_file
from trm_helpers.files import write_json
from trm_helpers.sim.env import LiberoEnv, Task
from trm_helpers.software import software_versions
from trm_helpers.training.runs import description, find_run, load_config

_AHEAD = 8  # steps, when the gripper is asked for
_MOVED = 0.01  # metres from where the object began
_PENALTIES = 10.0 ** np.arange(-2, 8)  # of the ridge, chosen on the last fifth of what is fitted


def positions(env: LiberoEnv, demo: h5py.Group) -> dict[str, np.ndarray]:
    """Positions (T, n) of object, target and hand by name, from the demonstration's states."""
    parts = env.goal_parts()
    env.set_fixtures(demo.attrs["model_file"])
    found = {"object": [], "target": [], "hand": []}
    for state in demo["states"]:
        env.sim.set_state_from_flattened(state)
        env.sim.forward()
        found["object"].append(env.object_position(parts["object"]))
        found["target"].append(env.object_position(parts["target"]))
        found["hand"].append(env.end_effector())
    where = {key: np.array(value) for key, value in found.items()}
    return {"object": where["object"], "target": where["target"],
            "hand to object": np.linalg.norm(where["object"] - where["hand"], axis=1,
                                             keepdims=True),
            "object to target": np.linalg.norm(where["object"] - where["target"], axis=1,
                                               keepdims=True)}


@torch.inference_mode()
def states_of(policy, demo: h5py.Group, task: Task, deepest: int,
              steps: int) -> dict[str, np.ndarray]:
    """By name, (steps, D): inputs and the states after each recursion."""
    found: dict[str, list[np.ndarray]] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        value = value.float().reshape(1, -1, value.shape[-1]).mean(1)  # over tokens, if there are
        found.setdefault(name, []).append(value[0].numpy())

    for step in range(steps):
        observation = {key: values[step] for key, values in demo["obs"].items()}
        observation |= {"task_id": task.task_id, "language": task.language}
        given = policy.prepare(observation)
        x = policy.encode(given)
        if "proprio" in given:
            keep("proprioception", given["proprio"])
        keep("input", x)
        state = policy.block.initial_state(x)
        for depth in range(1, deepest + 1):
            state = policy.block(state, x)
            keep(f"answer, depth {depth}", policy.block.readout(state))
            if policy.config.variant == "trm":
                keep(f"latent, depth {depth}", state[:, 1])
    return {name: np.stack(values) for name, values in found.items()}


def samples(run: Path, policy, demos: int, deepest: int) -> Iterator[tuple[dict, dict]]:
    """(states, what they may know) of each demonstration, centred within its task."""
    config = load_config(run)
    trained_on = {Path(file["file"]).name: file["demos"]
                  for file in description(run)["trained_on"]["files"]}
    for task_id, path in demonstrations_of(run, config).items():
        gathered = []
        with LiberoEnv(config.data.suite, task_id) as env, open_demo_file(path) as file:
            env.reset()
            unseen = [name for name in demo_names(file)
                      if name not in trained_on.get(path.name, ())]
            for name in unseen[:demos]:
                demo = file[schema.DATA_GROUP][name]
                known = positions(env, demo)
                closed = demo["actions"][:, schema.GRIPPER_INDEX]
                known["gripper"] = np.append(closed[_AHEAD:], [closed[-1]] * _AHEAD)[:, None]
                moved = np.linalg.norm(known["object"] - known["object"][0], axis=1) > _MOVED
                steps = int(np.argmax(moved))  # it is placed in the end: it moved
                known = {key: value[:steps] for key, value in known.items()}
                gathered.append((states_of(policy, demo, env.task, deepest, steps), known))
        means = {name: np.concatenate([known[name] for _, known in gathered]).mean(0)
                 for name in gathered[0][1]}
        for states, known in gathered:
            yield states, {name: value - means[name] for name, value in known.items()}


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)


def fit(x: np.ndarray, y: np.ndarray):
    """Predictor of y (N, m) from x (N, D): standardised, with the best of the penalties."""
    mean, spread = x.mean(0), x.std(0) + 1e-6

    def features(values: np.ndarray) -> np.ndarray:
        return np.column_stack([(values - mean) / spread, np.ones(len(values))])

    kept = 4 * len(x) // 5  # in the order of demonstrations: the last ones are unseen
    errors = [np.square(features(x[kept:]) @ ridge(features(x[:kept]), y[:kept], penalty)
                        - y[kept:]).mean() for penalty in _PENALTIES]
    weights = ridge(features(x), y, _PENALTIES[int(np.argmin(errors))])
    return lambda values: features(values) @ weights


def explained(predict, scored: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Share of variance explained: median, 2.5 and 97.5 % over 500 draws of demonstrations."""
    left = np.array([np.square(predict(x) - y).sum() for x, y in scored])
    there = np.array([np.square(y).sum() for _, y in scored])
    drawn = np.random.default_rng(0).integers(len(scored), size=(500, len(scored)))
    return np.percentile(1 - left[drawn].sum(1) / there[drawn].sum(1), [50, 2.5, 97.5]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a trained run")
    parser.add_argument("--demos", type=int, default=40,
                        help="of each task, or as many as there are that it was not trained on")
    given = parser.parse_args()
    torch.set_num_threads(1)  # one observation at a time: more would wait for each other
    run = find_run(given.run)
    policy = load_policy(run)
    gathered = list(samples(run, policy, given.demos, 2 * policy.config.num_recursions))
    fitted, scored = gathered[::2], gathered[1::2]
    known = list(gathered[0][1])
    print(f"{len(fitted)} demonstrations fitted, {len(scored)} scored; share of variance explained")
    print("| state | " + " | ".join(known) + " |\n|" + "---|" * (len(known) + 1))
    rows = []
    for name in gathered[0][0]:
        found = []
        for what in known:
            predict = fit(np.concatenate([states[name] for states, _ in fitted]),
                          np.concatenate([values[what] for _, values in fitted]))
            found.append(explained(predict, [(states[name], values[what])
                                             for states, values in scored]))
        rows.append({"state": name, "explained": found})
        cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in found]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    config = load_config(run)
    write_json(run / "probes.json", {
        "run": run.name, "suite": config.data.suite, "task_ids": list(config.data.task_ids),
        "fitted": len(fitted), "scored": len(scored), "quantities": known, "rows": rows,
        "software": software_versions()})


if __name__ == "__main__":
    main()
