"""What every scripted skill shares: scene geometry, motion; and the skills on a fixture's joint.

A skill is a state machine on privileged positions. Its phase is re-decided from the scene in every
step, so that it recovers when it is pushed or loses its grip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import schema
from .sim import LiberoEnv

# One control step at full command moves the end effector 13 mm (measured, OSC_POSE at 20 Hz), so
# the error is scaled to command less than the distance left; 1.0 overshoots by 9 mm, 0.7 by 2 mm.
_GAIN = 0.7
_METRES_PER_UNIT = 0.05
_RADIANS_PER_UNIT = 0.5
_TURN_LIMIT = 0.5  # largest command about an axis: the arm follows faster turns badly
# the end-effector site with the gripper pointing down and the fingers closing along y
DOWNWARD = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
UP = np.array([0.0, 0.0, 1.0])
CLOSE_STEPS = 9  # until the fingers hold
OPEN_STEPS = 4
_ROOM = 0.003  # metres that the gripper keeps from what it must not touch
# The Panda from its base: the shoulder's height, what the wrist stands above the site of a gripper
# that points down and beside it (joint 7's offset); the elbow is straight at 0.71 m.
_SHOULDER_HEIGHT = 0.333
_WRIST_ABOVE = 0.21
_WRIST_BESIDE = 0.088
_COMFORTABLE_REACH = 0.68


@dataclass(frozen=True)
class Style:
    """What varies from one demonstration to the next, as it does for a person."""

    speed: float = 1.0  # largest command along any axis
    hover: float = 0.06  # metres above the grasp before descending
    clearance: float = 0.04  # metres between the carried object and what it passes over
    grasp_offset: tuple[float, float] = (0.0, 0.0)  # metres along the jaw and in height

    @classmethod
    def sample(cls, generator: np.random.Generator) -> Style:
        return cls(
            speed=generator.uniform(0.85, 1.0),
            hover=generator.uniform(0.05, 0.08),
            clearance=generator.uniform(0.03, 0.05),
            grasp_offset=(generator.uniform(-0.004, 0.004), generator.uniform(-0.003, 0.003)),
        )


# --- geometry -------------------------------------------------------------------------------------


def turned(yaw: float) -> np.ndarray:
    """Rotation matrix (3, 3) about the vertical."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Boxes:
    """Boxes around collision geometries, each in its own axes, where they are now."""

    centre: np.ndarray  # (G, 3)
    rotation: np.ndarray  # (G, 3, 3)
    half: np.ndarray  # (G, 3)

    @classmethod
    def of_geoms(cls, env: LiberoEnv, geoms: list[int]) -> Boxes:
        model, data = env.sim.model._model, env.sim.data._data
        rotation = data.geom_xmat[geoms].reshape(-1, 3, 3)
        offset = np.einsum("gij,gj->gi", rotation, model.geom_aabb[geoms, :3])
        return cls(data.geom_xpos[geoms] + offset, rotation, model.geom_aabb[geoms, 3:])

    @classmethod
    def of(cls, env: LiberoEnv, *names: str) -> Boxes:
        """Of objects and fixtures named in the BDDL file."""
        geoms = [env.sim.model.geom_name2id(geom)
                 for name in names for geom in env.raw.get_object(name).contact_geoms]
        return cls.of_geoms(env, geoms)

    @classmethod
    def of_all_but(cls, env: LiberoEnv, name: str) -> Boxes:
        return cls.of(env, *(other for other in env.raw.obj_body_id if other != name))

    def corners(self, yaw: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corners (G, 3) in world axes turned by ``yaw``."""
        frame = turned(yaw).T
        reach = np.einsum("gij,gj->gi", np.abs(frame @ self.rotation), self.half)
        return self.centre @ frame.T - reach, self.centre @ frame.T + reach

    def bounds(self, yaw: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (3,) of them all."""
        low, high = self.corners(yaw)
        return low.min(axis=0), high.max(axis=0)

    def share_inside(self, points: np.ndarray) -> float:
        """Which share of ``points`` (N, 3) is in a box."""
        local = np.einsum("gji,ngj->ngi", self.rotation, points[:, None] - self.centre)
        return float((np.abs(local) < self.half).all(axis=-1).any(axis=-1).mean())

    def near(self, point: np.ndarray, distance: float) -> Boxes:
        """Those whose middle and corners may come nearer than ``distance`` to ``point`` (3,)."""
        size = np.linalg.norm(self.half, axis=1)
        some = np.linalg.norm(self.centre - point, axis=1) < size + distance
        return Boxes(self.centre[some], self.rotation[some], self.half[some])

    def tops_along(self, start: np.ndarray, end: np.ndarray, corridor: float) -> np.ndarray:
        """Heights of those nearer than ``corridor`` metres to the straight way between points."""
        low, high = self.corners()
        path = np.linspace(start[:2], end[:2], 20)[:, None]  # (20, 1, 2)
        beside = path - np.clip(path, low[:, :2], high[:, :2])  # from the nearest point of each
        return high[np.linalg.norm(beside, axis=-1).min(axis=0) < corridor, 2]


def _grid(*axes) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _open_gripper() -> np.ndarray:
    """Points (N, 3) of the open Panda gripper, in metres from its site, pointing down.

    Axes: along the jaw, the way in which it closes, up. Measured on the collision meshes; 8 mm
    apart, as drawers have thin walls.
    """
    along = (-0.011, 0.0, 0.011)
    tips = _grid(along, (0.037, 0.045, 0.053), np.arange(-0.009, 0.025, 0.008))
    roots = _grid(along, (0.033, 0.041, 0.049, 0.057, 0.065), np.arange(0.025, 0.050, 0.008))
    hand = _grid((-0.022, -0.007, 0.007, 0.022), np.linspace(-0.1, 0.1, 26),
                 (0.033, 0.041, 0.05, 0.07, 0.09))
    flange = _grid((-0.045, 0.0, 0.045), (-0.045, 0.0, 0.045), np.arange(0.1, 0.21, 0.02))
    fingers = np.concatenate([tips, roots])
    return np.concatenate([fingers, fingers * (1, -1, 1), hand, flange])


_GRIPPER = _open_gripper()


def crowding(point: np.ndarray, yaw: float, boxes: Boxes) -> float:
    """Which share of the open gripper's outline would be in boxes with the site at ``point`` (3,).

    Zero: it has room there.
    """
    roomy = Boxes(boxes.centre, boxes.rotation, boxes.half + _ROOM)
    return roomy.share_inside(point + _GRIPPER @ turned(yaw).T)


def way_out(points: np.ndarray, height: float, boxes: Boxes) -> np.ndarray:
    """The shortest horizontal move (3,) after which ``points`` (N, 3) can go up by ``height``.

    No move when there is nothing above, or no free place within 12 cm.
    """
    directions = [turned(angle)[0] for angle in np.radians(np.arange(0, 360, 45))]
    moves = [np.zeros(3)] + [r * way for r in (0.04, 0.08, 0.12) for way in directions]
    steps = np.arange(0.02, height, 0.03)[:, None, None] * UP  # (L, 1, 3)
    for move in moves:
        if boxes.share_inside((points + move + steps).reshape(-1, 3)) == 0:
            return move
    return moves[0]


def overreach(env: LiberoEnv, point: np.ndarray) -> float:
    """Metres by which the arm stretches further than it likes to, pointing down at ``point``."""
    from_base = point - env.sim.data.body_xpos[env.sim.model.body_name2id("robot0_base")]
    out = np.linalg.norm(from_base[:2]) - _WRIST_BESIDE
    return max(0.0, np.hypot(out, from_base[2] + _WRIST_ABOVE - _SHOULDER_HEIGHT)
               - _COMFORTABLE_REACH)


# --- motion ---------------------------------------------------------------------------------------


class Skill:
    """A state machine that drives the end effector to a goal that each phase sets.

    A subclass gives ``_next_phase()``, ``_goal()`` in metres, ``_orientation()`` of the site, and
    names the phases in which the gripper is closed.
    """

    closed: tuple[str, ...] = ()

    def __init__(self, env: LiberoEnv, style: Style | None = None):
        self.env = env
        self.style = style or Style()
        self.phase = "approach"
        self._steps_in_phase = 0

    def act(self) -> np.ndarray:
        """The action (7,) for the scene as it is now, in [-1, 1]."""
        phase = self._next_phase()
        self._steps_in_phase = self._steps_in_phase + 1 if phase == self.phase else 0
        self.phase = phase
        gripper = schema.GRIPPER_CLOSED if phase in self.closed else schema.GRIPPER_OPEN
        turn = np.clip(_GAIN * self._turn_left() / _RADIANS_PER_UNIT, -_TURN_LIMIT, _TURN_LIMIT)
        return np.concatenate([self._servo(self._goal()), turn, [gripper]])

    def finished(self) -> bool:
        """Whether the next skill of a sequence may begin."""
        return False

    def _next_phase(self) -> str:
        raise NotImplementedError

    def _goal(self) -> np.ndarray:
        raise NotImplementedError

    def _orientation(self) -> np.ndarray:
        return DOWNWARD

    def _servo(self, goal: np.ndarray) -> np.ndarray:
        command = _GAIN * (goal - self.env.end_effector()) / _METRES_PER_UNIT
        return command * min(1.0, self.style.speed / max(np.abs(command).max(), 1e-9))

    def _turn_left(self) -> np.ndarray:
        """Axis-angle (3,) in radians from the gripper's orientation to the wanted one."""
        from robosuite.utils.transform_utils import mat2quat, quat2axisangle

        return quat2axisangle(mat2quat(self._orientation() @ self._site_rotation().T))

    def _site_rotation(self) -> np.ndarray:
        site = self.env.raw.robots[0].eef_site_id
        return np.array(self.env.sim.data.site_xmat[site]).reshape(3, 3)


# --- skills on a joint ----------------------------------------------------------------------------


class Joint:
    """A fixture's joint: where it is, which way it opens, what moves with it."""

    def __init__(self, env: LiberoEnv, name: str):
        self.env = env
        model = env.sim.model._model
        self.id = env.sim.model.joint_name2id(name)
        low, high = model.jnt_range[self.id]
        self.sign = 1.0 if high > -low else -1.0  # it rests at zero, at one end of its range
        self.end = max(high, -low)
        body = model.jnt_bodyid[self.id]
        self.geoms = [geom for geom in range(model.ngeom)
                      if model.geom_bodyid[geom] == body and model.geom_contype[geom]]

    def opened(self) -> float:
        """How far it is from rest, in metres or radians."""
        address = self.env.sim.model._model.jnt_qposadr[self.id]
        return self.sign * float(self.env.sim.data.qpos[address])

    def direction(self) -> np.ndarray:
        """Unit vector (3,) along which, or about which, it opens."""
        return self.sign * np.array(self.env.sim.data._data.xaxis[self.id])

    def anchor(self) -> np.ndarray:
        return np.array(self.env.sim.data._data.xanchor[self.id])


class OpenDrawer(Skill):
    """Grasps a drawer's handle with the gripper tilted towards it, and pulls along its rail.

    Args:
        env: the environment, already reset.
        joint: the sliding joint.
        style: timing and path.
    """

    closed = ("close", "pull")
    _TILT = np.radians(75)  # from pointing down: flatter, the hand meets what lies on the table
    _BEFORE = 0.10  # metres in front of the handle where the gripper is brought into line
    _BACK = 0.004  # metres short of the handle's middle, or the upper finger meets the drawer

    def __init__(self, env: LiberoEnv, joint: Joint, style: Style | None = None):
        super().__init__(env, style)
        self.joint = joint
        out = joint.direction()
        low, high = Boxes.of_geoms(env, joint.geoms).corners()
        handle = int(np.argmax((low + high) @ out))  # it stands out furthest
        self._handle_geom = joint.geoms[handle]
        self._pointing = -np.cos(self._TILT) * UP - np.sin(self._TILT) * out
        self._wide = np.cos(self._TILT) * out - np.sin(self._TILT) * UP  # the jaw closes along it

    def finished(self) -> bool:
        upright = np.abs(self._turn_left()).max() < 0.2
        return self.phase == "away" and (upright or self._steps_in_phase > 50)

    def _handle(self) -> np.ndarray:
        middle = np.array(self.env.sim.data.geom_xpos[self._handle_geom])
        return middle - self._BACK * self._pointing

    def _orientation(self) -> np.ndarray:
        if self.phase == "away":
            return DOWNWARD
        return np.column_stack(
            [self._wide, np.cross(self._pointing, self._wide), self._pointing])

    def _next_phase(self) -> str:
        from_handle = self.env.end_effector() - self._handle()
        along = from_handle @ self._pointing
        beside = np.linalg.norm(from_handle - along * self._pointing)
        match self.phase:
            case "approach":
                if beside < 0.01 and along < -0.05 and np.abs(self._turn_left()).max() < 0.1:
                    return "reach"
            case "reach":
                if beside > 0.02:
                    return "approach"
                if np.linalg.norm(from_handle) < 0.007 or self._steps_in_phase > 40:
                    return "close"
            case "close":
                if self._steps_in_phase >= CLOSE_STEPS:
                    return "pull"
            case "pull":
                if self.env.fingers() < 0.003 or np.linalg.norm(from_handle) > 0.03:
                    return "release"
                if self.joint.opened() > 0.97 * self.joint.end:
                    return "release"
            case "release":
                if self._steps_in_phase >= OPEN_STEPS:
                    return "back"
            case "back":
                if self._steps_in_phase >= 8:
                    return "away" if self.joint.opened() > 0.9 * self.joint.end else "approach"
        return self.phase

    def _goal(self) -> np.ndarray:
        ee, out = self.env.end_effector(), self.joint.direction()
        match self.phase:
            case "approach":
                return self._handle() - self._BEFORE * self._pointing
            case "reach" | "close":
                return self._handle()
            case "pull":
                return self._handle() + _METRES_PER_UNIT * out
            case "release":
                return ee
            case "back":
                return ee - 0.05 * self._pointing
        return ee + 0.02 * UP + 0.02 * out  # away


class TurnKnob(Skill):
    """Grasps a knob's ridge from above and turns it until the predicate holds.

    Args:
        env: the environment, already reset.
        joint: the hinge, with a vertical axis.
        style: timing and path.
    """

    closed = ("close", "turn")
    _STEP = 0.4  # radians by which the commanded turn is ahead
    _FINGER_DEPTH = 0.014  # metres that the ridge goes between the fingers

    def __init__(self, env: LiberoEnv, joint: Joint, style: Style | None = None):
        super().__init__(env, style)
        self.joint = joint
        self._plan()

    def _plan(self) -> None:
        """The yaw at which the jaw is across the ridge, the highest part of the knob."""
        _, high = Boxes.of_geoms(self.env, self.joint.geoms).corners()
        self._ridge = self.joint.geoms[int(np.argmax(high[:, 2]))]

        def width(yaw: float) -> float:
            low, high = Boxes.of_geoms(self.env, [self._ridge]).bounds(yaw)
            return (high - low)[1] + 0.001 * abs(yaw)

        self._yaw = min(np.radians(np.arange(-60, 61, 10)), key=width)

    def _grasp_point(self) -> np.ndarray:
        low, high = Boxes.of_geoms(self.env, [self._ridge]).bounds()
        along, up = self.style.grasp_offset
        middle = (low + high) / 2
        return np.array([middle[0] + along, middle[1], high[2] - self._FINGER_DEPTH + up])

    def _orientation(self) -> np.ndarray:
        if self.phase == "turn":
            return turned(self._STEP * self.joint.direction()[2]) @ self._site_rotation()
        return turned(self._yaw) @ DOWNWARD

    def _next_phase(self) -> str:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        off_axis = np.linalg.norm((ee - grasp)[:2])
        match self.phase:
            case "approach":
                aligned = np.abs(self._turn_left()).max() < 0.1
                if aligned and off_axis < 0.008 and ee[2] - grasp[2] < self.style.hover + 0.02:
                    return "descend"
            case "descend":
                if off_axis > 0.03:
                    return "approach"
                if ee[2] - grasp[2] < 0.006 or self._steps_in_phase > 40:
                    return "close"
            case "close":
                if self._steps_in_phase >= CLOSE_STEPS:
                    return "turn"
            case "turn":
                if off_axis > 0.03 or self.env.fingers() < 0.003 or self._steps_in_phase > 60:
                    return "release"
            case "release":
                if self._steps_in_phase >= OPEN_STEPS:
                    return "retreat"
            case "retreat":
                if self._steps_in_phase >= 10:
                    self._plan()
                    return "approach"
        return self.phase

    def _goal(self) -> np.ndarray:
        ee, grasp = self.env.end_effector(), self._grasp_point()
        match self.phase:
            case "approach":
                return grasp + self.style.hover * UP
            case "descend" | "close" | "turn":
                return grasp
            case "release":
                return ee
        return ee + 0.03 * UP  # retreat
