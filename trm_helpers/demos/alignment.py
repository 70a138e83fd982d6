"""Alignment of a file: whether ``obs[t]`` was seen before or after executing ``actions[t]``."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from .. import schema
from .demo_files import DemoFileError, data_group, demo_names, open_demo_file, text_attribute

MIN_MOTION = 1e-6  # rad^2, mean over steps; below it the arm stands still
MAX_RESIDUAL = 0.2  # share of the motion that the fitted fraction may leave unexplained
HALF_SUBSTEP = 0.02  # of a control step; an observation after its action is >= 0.04 into it
# Control steps by which the end effector follows the actions, in simulation with smooth, noisy and
# scripted motion: 0.9 to 1.4 in raw files, -0.1 to 0.4 in shift files. Near the middle: unknown.
MIDDLE_DELAY = 0.65
DELAY_MARGIN = 0.15
_DEMOS = 10  # the first demonstrations of a file, which are measured


def measure_alignment(path: str | Path) -> tuple[str, dict]:
    """``raw`` if ``obs[t]`` was seen before executing ``actions[t]``, ``shift`` if after it.

    ``states[t]``, the simulator's state when ``actions[t]`` is chosen, holds the arm's joints q[t].
    The stored ``joint_states[t]`` lie on the arm's path, a fraction f of a control step from q[t]:
    f in (-1, 0] means the previous step returned them, hence ``raw`` (0: rendered again from the
    state), f in (0, 1] the step with ``actions[t]``, hence ``shift``. f is fitted by least squares
    over the first ten demonstrations.

    Without states, or with a fit that explains too little, the delay decides at which the end
    effector's displacement ``ee_pos[t+1] - ee_pos[t]`` correlates best with the actions. This is
    weaker evidence: the controller answers about one step late, so the peak is near
    ``actions[t-1]`` for ``raw`` and ``actions[t]`` for ``shift``, and broad for smooth motion.
    Stored actions other than the executed ones (a disturbed demonstrator) mislead it.

    Returns the name, ``unknown`` without evidence, and the evidence: ``method`` (``joints`` or
    ``delay``), ``fraction``, ``residual`` (unexplained share of the motion) and ``delay`` (control
    steps); None for what could not be measured.
    """
    with open_demo_file(path) as file:
        demos = [file[schema.DATA_GROUP][name] for name in demo_names(file)[:_DEMOS]]
        fraction, residual = _joint_fraction(demos)
        delay = _action_delay(demos)
    evidence = {"method": "joints", "fraction": fraction, "residual": residual, "delay": delay}
    if fraction is not None and residual <= MAX_RESIDUAL and abs(fraction) <= 1 + HALF_SUBSTEP:
        return ("raw" if fraction < HALF_SUBSTEP else "shift"), evidence
    evidence["method"] = "delay"
    if delay is None or abs(delay - MIDDLE_DELAY) < DELAY_MARGIN:
        return "unknown", evidence
    return ("raw" if delay > MIDDLE_DELAY else "shift"), evidence


def _joint_fraction(demos: list[h5py.Group]) -> tuple[float | None, float | None]:
    """Least-squares f with ``joint_states[t] = q[t] + f * step``, and the residual's share.

    The step is the one before q[t] for f <= 0 and the one after it for f > 0; the better of the
    two fits is returned, (None, None) when states are missing or the arm stands still.
    """
    offsets, before, after = [], [], []
    for demo in demos:
        if "states" not in demo or demo["states"].ndim != 2 or demo["states"].shape[1] < 8:
            continue
        joints = demo["states"][:, 1:8].astype(np.float64)  # flattened state: time, qpos, qvel
        steps = np.diff(joints, axis=0)
        offsets.append(demo["obs/joint_states"][1:-1] - joints[1:-1])
        before.append(steps[:-1])
        after.append(steps[1:])
    if sum(map(len, offsets)) == 0:
        return None, None
    offset, fits = np.concatenate(offsets), []
    for steps, low, high in ((np.concatenate(before), -np.inf, 0.0),
                             (np.concatenate(after), 0.0, np.inf)):
        motion = (steps**2).sum()
        if motion < MIN_MOTION * len(steps):
            return None, None
        fraction = float(np.clip((offset * steps).sum() / motion, low, high))
        fits.append((float(((offset - fraction * steps) ** 2).sum() / motion), fraction))
    residual, fraction = min(fits)
    return fraction, residual


def _action_delay(demos: list[h5py.Group]) -> float | None:
    """Control steps from an action to the displacement that correlates best with it.

    Correlations with ``actions[t - delay]``, averaged over x, y and z, are taken at whole delays;
    the peak is the vertex of the parabola through the best and its neighbours. Axes without motion,
    or whose command does not change, are left out. None when none is left or the best delay is at
    either end.
    """
    delays = np.arange(-1, 4)
    moves, actions = [], []
    for demo in demos:
        move = np.diff(demo["obs/ee_pos"][()].astype(np.float64), axis=0)
        steps = np.arange(delays.max(), len(move) + delays.min())
        moves.append(move[steps])
        actions.append(demo["actions"][()][steps - delays[:, None], :3])  # (delays, steps, 3)
    move, action = np.concatenate(moves), np.concatenate(actions, axis=1)
    moving = [i for i in range(3)
              if len(move) and move[:, i].std() and action[:, :, i].std(axis=1).all()]
    if not moving:
        return None
    score = [np.mean([np.corrcoef(move[:, i], late[:, i])[0, 1] for i in moving])
             for late in action]
    best = int(np.argmax(score))
    if best in (0, len(delays) - 1):
        return None
    before, peak, after = score[best - 1 : best + 2]
    return float(delays[best] + (before - after) / (2 * (before - 2 * peak + after)))


def resolve_alignment(path: str | Path, setting: str = "auto") -> str:
    """The file's alignment, ``raw`` or ``shift``.

    ``auto`` takes the file's own attribute, else the result of :func:`measure_alignment`. Raises
    ``ValueError`` for another setting, and :class:`DemoFileError` when the attribute or the joints
    contradict the setting (or each other), or when ``auto`` finds no evidence.
    """
    schema.check_option("alignment", setting, schema.ALIGNMENT_OPTIONS)
    with open_demo_file(path) as file:
        attribute = text_attribute(data_group(file), schema.ALIGNMENT_ATTR)
    if attribute not in ("", *schema.ALIGNMENTS):
        raise DemoFileError(
            f"{path}: attribute alignment={attribute!r}; expected one of {schema.ALIGNMENTS}")
    measured, evidence = measure_alignment(path)
    claims = {"the setting": setting.removeprefix("auto"), "the file's attribute": attribute,
              "the stored joint angles": measured if evidence["method"] == "joints" else ""}
    claims = {who: name for who, name in claims.items() if name}
    if len(set(claims.values())) > 1:
        said = ", ".join(f"{name!r} by {who}" for who, name in claims.items())
        raise DemoFileError(f"{path}: contradictory alignment: {said} (evidence: {evidence})")
    name = next(iter(claims.values()), measured)
    if name == "unknown":
        raise DemoFileError(f"{path}: alignment cannot be measured ({evidence}); "
                            "set alignment to raw or shift")
    return name
