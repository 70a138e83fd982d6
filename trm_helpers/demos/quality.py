"""The quality card of a demonstration file: one verdict for each fault that spoils training.

For human and scripted files. Checks in the simulator (orientation of the frames, replay of the
stored actions) need an environment.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from .. import schema
from ..sim.env import LiberoEnv
from .alignment import measure_alignment
from .demo_files import (
    WRONG_FINGERS,
    DemoFileError,
    check_demo_file,
    demo_names,
    finger_motion,
    frame_stride,
    instruction_of,
    open_demo_file,
    text_attribute,
    version_notes,
)
from .find_demos import other_task

GOOD, LOOK, BAD = "good", "look", "bad"
FLAT_FRAME = 2.0  # grey levels, standard deviation; every image of a scene has more
STILL = 1e-3  # of an arm command: a no-op
MANY_NO_OPS = 0.1  # share; from human demonstrations with more a policy learns to wait
CLOSE_RENDER = 12.0  # grey levels on average between a stored frame and a render of its state
REPLAY_SHARE = 0.8  # of the replays that must succeed
ORIENTATIONS = {
    "as stored by LIBERO": lambda image: image,
    "flipped upside down": lambda image: image[::-1],
    "mirrored left to right": lambda image: image[:, ::-1],
    "turned by 180 degrees": lambda image: image[::-1, ::-1],
    "transposed": lambda image: image.swapaxes(0, 1),
    "turned by 90 degrees": lambda image: np.rot90(image, 1),
    "turned by 270 degrees": lambda image: np.rot90(image, 3),
    "transposed along the other diagonal": lambda image: image[::-1, ::-1].swapaxes(0, 1),
}


def quality_card(path: str | Path, env: LiberoEnv | None = None, replays: int = 3,
                 horizon: int = 0) -> list[dict]:
    """Rows ``check``, ``found``, ``expected``, ``verdict`` (``good``, ``look`` or ``bad``).

    Args:
        env: the file's task in the simulator; without it orientation and replay are omitted.
        replays: demonstrations to replay; 0 omits the replay.
        horizon: steps allowed by the benchmark; 0 omits the comparison.

    A file that breaks LIBERO's layout has one row with its fault. Raises ``ValueError`` for
    ``replays`` below 0.
    """
    if replays < 0:
        raise ValueError(f"replays={replays} is not valid; expected >= 0")
    expected = "LIBERO's keys, shapes and types, finite"
    try:
        check_demo_file(path)
    except DemoFileError as error:
        return [_row("layout", str(error), expected, BAD)]
    rows = [_row("layout", "keys, shapes and types are LIBERO's, all numbers finite", expected,
                 GOOD)]
    with open_demo_file(path) as file:
        names = demo_names(file)
        demos = [file[schema.DATA_GROUP][name] for name in names]
        if ignored := sorted({*file[schema.DATA_GROUP]} - {*names}):
            rows.append(_row("names", f"ignored: {', '.join(ignored)}", "demo_0, demo_1 and so on",
                             LOOK))
        rows += [_copies(demos)]
        rows += [_frames(demos, camera) for camera in schema.CAMERAS]
        rows += [_gripper_sign(demos), _gripper_switches(demos), _no_ops(demos),
                 _ranges(demos), _lengths(demos, horizon)]
        rows += [_actors(demos)] if any("actor" in demo.attrs for demo in demos) else []
        rows += [_alignment(path), _instruction(path, env)]
        rows += [_row("version", note, "of this code", LOOK) for note in version_notes([path])]
        if env is not None:
            solved = [demo for demo in demos if demo.attrs.get("success", True)][:replays]
            try:
                rows += [_orientation(env, demos[0], camera) for camera in schema.CAMERAS]
                rows += [_replays(env, solved)] if solved else []
            except ValueError as error:  # no states, or those of another task
                rows.append(_row("states", str(error), f"those of {env.task.name}", BAD))
    return rows


def frame_size(path: str | Path) -> int:
    """Height of a file's first frame; ``schema.IMAGE_SIZE`` for a file without frames."""
    with open_demo_file(path) as file:
        first = f"{schema.DATA_GROUP}/{demo_names(file)[0]}/obs/{schema.STILL_CAMERA}"
        shape = getattr(file.get(first), "shape", ())
    return int(shape[1]) if len(shape) == 4 else schema.IMAGE_SIZE


def replay_demonstration(env: LiberoEnv, demo: h5py.Group) -> dict:
    """Execute a demonstration's actions from its first state: the upper bound of any clone.

    For a disturbed demonstrator these are the executed actions, not its answers.

    Returns:
        ``success``, ``steps`` (T, or fewer after an earlier success), ``divergence``: per step the
        largest difference of any coordinate (m, rad) from the stored state.

    Raises:
        ValueError: no states, or those of another task.
    """
    _place(env, demo, 0)
    actions = demo[schema.EXECUTED_ACTIONS if schema.EXECUTED_ACTIONS in demo else "actions"][()]
    positions = slice(1, 1 + env.sim.model.nq)  # of the flattened state: time, qpos, qvel
    divergence, success = [], False
    for action, stored in zip(actions, demo["states"][()], strict=True):
        divergence.append(float(np.abs(env.state() - stored)[positions].max()))
        _, success = env.step(action)
        if success:
            break
    return {"success": success, "steps": len(divergence), "divergence": divergence}


# --- rows ----------------------------------------------------------------------------------------
def _row(check: str, found: str, expected: str, verdict: str | bool, otherwise: str = BAD) -> dict:
    if isinstance(verdict, bool | np.bool_):
        verdict = GOOD if verdict else otherwise
    return {"check": check, "found": found, "expected": expected, "verdict": verdict}


def _copies(demos: list[h5py.Group]) -> dict:
    """A copy of a demonstration in the validation split would have been trained on."""
    first: dict[bytes, str] = {}
    copies = []
    for demo in demos:
        name = Path(demo.name).name
        content = b"".join(demo[key][()].tobytes() for key in ("actions", "obs/ee_pos"))
        if (original := first.setdefault(content, name)) != name:
            copies.append(f"{name} of {original}")
    return _row("copies", f"{', '.join(copies) or 'none'} among {len(demos)} demonstrations",
                "none", not copies)


def _frames(demos: list[h5py.Group], camera: str) -> dict:
    sizes = sorted({"x".join(map(str, demo["obs"][camera].shape[1:3])) for demo in demos})
    flat = still = total = moves = 0
    for demo in demos:
        stride = frame_stride(demo)
        frames = demo["obs"][camera][::stride]  # the rendered ones
        frames = frames.reshape(len(frames), -1)
        flat += int((frames.std(axis=1) < FLAT_FRAME).sum())
        still += int((frames[1:] == frames[:-1]).all(axis=1).sum())
        moved = np.abs(np.diff(demo["obs/ee_pos"][::stride], axis=0)).max(axis=1)
        moves += int((moved > STILL).sum())
        total += len(frames)
    frozen = max(0, still - (total - len(demos) - moves))  # more repeats than steps at rest
    return _row(f"frames, {schema.CAMERA_TITLES[camera]}",
                f"{flat} of {total} black or uniform; {frozen} repeated while the arm moves; "
                f"{' and '.join(sizes)} pixels", "none, one size; control renders 128x128",
                flat == 0 and frozen <= 0.01 * total and len(sizes) == 1)


def _gripper_sign(demos: list[h5py.Group]) -> dict:
    against, moving = finger_motion(demos)
    found = f"fingers move against the command in {against} of {moving} steps"
    return _row("gripper sign", found if moving else "the fingers never move",
                "closing at +1, opening at -1", moving > 0 and against <= WRONG_FINGERS * moving)


def _gripper_switches(demos: list[h5py.Group]) -> dict:
    commands = [demo["actions"][:, schema.GRIPPER_INDEX] for demo in demos]
    values = np.unique(np.concatenate(commands))
    switches = [int((np.diff(np.sign(command)) != 0).sum()) for command in commands]
    binary = set(values.tolist()) <= {schema.GRIPPER_OPEN, schema.GRIPPER_CLOSED}
    found = "only -1 and +1" if binary else f"{len(values)} values, {values[0]:g} to {values[-1]:g}"
    return _row("gripper switches",
                f"{np.mean(switches):.1f} per demonstration (most {max(switches)}); {found}",
                "about 1 to 4, only -1 and +1",
                (GOOD if np.mean(switches) <= 6 else LOOK) if binary and any(switches) else BAD)


def _no_ops(demos: list[h5py.Group]) -> dict:
    idle = total = 0
    for demo in demos:
        actions = demo["actions"][()]
        still = np.abs(actions[:, :schema.ARM_DIM]).max(axis=1) < STILL
        same = np.diff(actions[:, schema.GRIPPER_INDEX], prepend=actions[0, -1]) == 0
        idle += int((still & same).sum())
        total += len(actions)
    return _row("no-ops", f"{100 * idle / total:.1f} % of {total} steps",
                f"under {100 * MANY_NO_OPS:.0f} %", idle < MANY_NO_OPS * total, LOOK)


def _ranges(demos: list[h5py.Group]) -> dict:
    arm = np.abs(np.concatenate([demo["actions"][:, :schema.ARM_DIM] for demo in demos]))
    unused = [name for name, high in zip(schema.ACTION_NAMES, arm.max(axis=0), strict=False)
              if high == 0]
    return _row("action range",
                f"largest of an arm dimension {arm.max():.2f}; at the limit in "
                f"{100 * (arm >= 1).any(axis=1).mean():.1f} % of the steps"
                + (f"; never used: {', '.join(unused)}" if unused else ""),
                "within 1, every dimension used", not unused, LOOK)


def _lengths(demos: list[h5py.Group], horizon: int) -> dict:
    lengths = [len(demo["actions"]) for demo in demos]
    return _row("length", f"{min(lengths)} to {max(lengths)} steps, mean {np.mean(lengths):.0f}",
                f"within the {horizon} steps allowed by the benchmark" if horizon else "any",
                not horizon or max(lengths) <= horizon, LOOK)


def _actors(demos: list[h5py.Group]) -> dict:
    acted = [demo.attrs for demo in demos if "actor" in demo.attrs]
    runs = sorted({f"{attrs['actor']} (beta {attrs.get('beta', 'unknown')})" for attrs in acted})
    unsolved = sum(not attrs.get("success", True) for attrs in acted)
    return _row("actor", f"a policy acted in {len(acted)} of {len(demos)} demonstrations and the "
                         f"expert labelled: {', '.join(runs)}; {unsolved} end unsolved",
                "any, named in the file", GOOD)


def _alignment(path: str | Path) -> dict:
    name, evidence = measure_alignment(path)
    with open_demo_file(path) as file:
        stated = text_attribute(file[schema.DATA_GROUP], schema.ALIGNMENT_ATTR)
    how = ", ".join(f"{key} {value:.2f}" for key, value in evidence.items()
                    if isinstance(value, float))
    return _row("alignment", f"{name} (measured: {how})",
                f"{stated}, as the file says" if stated else "raw or shift",
                name == stated if stated else name != "unknown")


def _instruction(path: str | Path, env: LiberoEnv | None) -> dict:
    try:
        found = instruction_of(path)
        if env is not None and other_task(path, env.task):
            return _row("instruction", found, env.task.language, LOOK)
    except DemoFileError as error:
        return _row("instruction", str(error), "text", BAD)
    return _row("instruction", found or "none", "text, for policies conditioned on it", bool(found),
                LOOK)


def _orientation(env: LiberoEnv, demo: h5py.Group, camera: str) -> dict:
    """The one of eight flips and turns of a stored frame nearest to a render of its state."""
    step = len(demo["actions"]) // 2  # the arm is in view
    step -= step % frame_stride(demo)
    rendered = _place(env, demo, step)[camera].astype(np.float64)
    stored = demo["obs"][camera][step]
    check = f"orientation, {schema.CAMERA_TITLES[camera]}"
    if stored.shape != rendered.shape:
        return _row(check, f"frames have shape {stored.shape}",
                    f"{rendered.shape}, as the environment renders with this image_size", BAD)
    distances = {name: float(np.abs(turn(stored) - rendered).mean())
                 for name, turn in ORIENTATIONS.items()}
    best, first = min(distances, key=distances.get), next(iter(ORIENTATIONS))
    return _row(check,
                f"{best} ({distances[best]:.1f} grey levels from a render of its state, "
                f"{sorted(distances.values())[1]:.1f} the next best)",
                f"{first}, under {CLOSE_RENDER:.0f}",
                best == first and distances[best] < CLOSE_RENDER)


def _replays(env: LiberoEnv, demos: list[h5py.Group]) -> dict:
    results = [replay_demonstration(env, demo) for demo in demos]
    successes = sum(result["success"] for result in results)
    divergence = max(max(result["divergence"]) for result in results)
    return _row("replay", f"{successes} of {len(results)} succeed again; states differ by at most "
                          f"{divergence:.3f} (m, rad)",
                f"at least {100 * REPLAY_SHARE:.0f} % succeed",
                successes >= REPLAY_SHARE * len(results))


def _place(env: LiberoEnv, demo: h5py.Group, step: int):
    """The observation of a stored state, with the fixtures of that episode."""
    if "states" not in demo:
        raise ValueError(f"{demo.name} holds no states; expected them, to begin in one")
    env.reset()
    if "model_file" in demo.attrs:
        env.set_fixtures(demo.attrs["model_file"])
    return env.set_state(demo["states"][step])
