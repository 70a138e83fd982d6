import h5py
import numpy as np
import pytest
from demo_files import LONG, joints_at, position_at, small

from trm_helpers.demos import alignment as alignments
from trm_helpers.demos.alignment import measure_alignment, resolve_alignment
from trm_helpers.demos.demo_files import DemoFileError


@pytest.mark.parametrize(("alignment", "fraction"), [("raw", -0.1), ("shift", 0.9)])
def test_alignment_is_located_on_the_joints_path(tmp_path, alignment, fraction):
    path = small(tmp_path / "soup_demo.hdf5", LONG, alignment)
    name, evidence = measure_alignment(path)
    assert name == alignment and evidence["method"] == "joints"
    assert evidence["fraction"] == pytest.approx(fraction, abs=0.01)  # the path is curved
    assert evidence["residual"] < 1e-3


def test_observations_drawn_again_from_the_states_are_raw(tmp_path):
    def regenerate(values, demo):
        return np.array([joints_at(t) for t in range(len(values))])

    path = small(tmp_path / "soup_demo.hdf5", LONG, None, joint_states=regenerate)
    name, evidence = measure_alignment(path)
    assert (name, evidence["fraction"], evidence["residual"]) == ("raw", 0.0, 0.0)


@pytest.mark.parametrize(("alignment", "delay"), [("raw", 1.1), ("shift", 0.1)])
def test_without_states_the_delay_decides(tmp_path, alignment, delay):
    """The hand follows one step late; a tenth of a step more is when the observation is drawn."""
    path = small(tmp_path / "soup_demo.hdf5", LONG, alignment, states=None)
    name, evidence = measure_alignment(path)
    assert name == alignment and evidence["method"] == "delay"
    assert evidence["fraction"] is None
    assert evidence["delay"] == pytest.approx(delay, abs=0.1)


def test_a_delay_between_the_two_tells_nothing(tmp_path):
    def between(values, demo):
        return np.array([position_at(t + 0.45, demo) for t in range(len(values))])

    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=None, ee_pos=between)
    name, evidence = measure_alignment(path)
    assert name == "unknown" and evidence["delay"] == pytest.approx(0.65, abs=0.15)


def test_joints_off_the_path_are_no_evidence(tmp_path):
    def noise(values, demo):
        return values + np.random.default_rng(demo).normal(0, 0.3, values.shape)

    path = small(tmp_path / "soup_demo.hdf5", LONG, "raw", joint_states=noise)
    name, evidence = measure_alignment(path)
    assert abs(evidence["fraction"]) < 1 and evidence["residual"] > alignments.MAX_RESIDUAL
    assert (name, evidence["method"]) == ("raw", "delay")


def on_the_way(fraction, noise=0.0):
    """Joint angles that lie this share of a step after the state, on a straight path."""
    def change(values, demo):
        steps = np.arange(len(values))[:, None] + fraction
        wobble = noise * (-1.0) ** np.arange(len(values))[:, None]
        return 0.05 * np.arange(1, 8) * (steps + wobble)
    return change


def straight(values, demo):
    values = values.copy()
    values[:, 1:8] = on_the_way(0)(values, demo)
    return values


@pytest.mark.parametrize(("fraction", "noise", "expected"), [
    (-1.0, 0, "raw"), (-0.9, 0, "raw"), (0.01, 0, "raw"), (0.03, 0, "shift"), (0.9, 0, "shift"),
    (1.01, 0, "shift"), (1.1, 0, None), (-1.1, 0, None),  # further than one step: no observation
    (0.5, 0.4, "shift"), (0.5, 0.5, None),  # unexplained: 0.16 and 0.25 of the motion
])
def test_where_the_joints_lie_decides_within_limits(tmp_path, fraction, noise, expected):
    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=straight,
                 joint_states=on_the_way(fraction, noise))
    name, evidence = measure_alignment(path)
    assert evidence["fraction"] == pytest.approx(fraction, abs=0.02)
    assert evidence["residual"] == pytest.approx(noise**2, abs=0.02)
    assert evidence["method"] == ("joints" if expected else "delay")
    assert expected in (None, name)


@pytest.mark.parametrize(("delay", "expected"), [
    (-0.4, "shift"), (0.49, "shift"), (0.51, "unknown"), (0.79, "unknown"), (0.81, "raw"),
    (1.4, "raw"), (None, "unknown")])
def test_a_delay_near_the_middle_decides_nothing(tmp_path, monkeypatch, delay, expected):
    monkeypatch.setattr(alignments, "_action_delay", lambda demos: delay)
    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=None)
    assert measure_alignment(path)[0] == expected


@pytest.mark.parametrize("step", [0, 1, -3, -2])
def test_an_axis_that_is_commanded_in_one_step_tells_nothing(tmp_path, step):
    """At some of the delays its commands do not vary: it correlates with nothing."""
    def once_upwards(values, demo):
        values = values.copy()
        values[:, 2], values[step, 2] = 0, 0.3
        return values

    path = small(tmp_path / "soup_demo.hdf5", (40,), "raw", states=None, actions=once_upwards)
    name, evidence = measure_alignment(path)
    assert name == "raw" and evidence["delay"] == pytest.approx(1.1, abs=0.1)


def still(values, demo):
    return np.zeros_like(values)


def test_a_still_arm_tells_nothing(tmp_path):
    path = small(tmp_path / "soup_demo.hdf5", LONG, None, states=still, ee_pos=still)
    name, evidence = measure_alignment(path)
    assert name == "unknown" and evidence["delay"] is None
    with pytest.raises(DemoFileError, match="cannot be measured.*set alignment to raw or shift"):
        resolve_alignment(path)
    assert resolve_alignment(path, "shift") == "shift"


def test_resolve_takes_attribute_then_measurement(tmp_path):
    raw = small(tmp_path / "raw_demo.hdf5", LONG, "raw")
    human = small(tmp_path / "human_demo.hdf5", LONG, None)
    quiet = small(tmp_path / "quiet_demo.hdf5", LONG, "raw", states=None, ee_pos=still)
    assert resolve_alignment(raw) == resolve_alignment(raw, "raw") == "raw"
    assert resolve_alignment(human) == resolve_alignment(human, "shift") == "shift"
    assert resolve_alignment(quiet) == "raw"


def test_resolve_refuses_contradictions(tmp_path):
    human = small(tmp_path / "human_demo.hdf5", LONG, None)
    with pytest.raises(DemoFileError, match="'raw' by the setting, 'shift' by the stored joint"):
        resolve_alignment(human, "raw")
    with h5py.File(human, "a") as file:
        file["data"].attrs["alignment"] = "raw"
    with pytest.raises(DemoFileError, match="'raw' by the file's attribute, 'shift' by the stored"):
        resolve_alignment(human)
    with h5py.File(human, "a") as file:
        file["data"].attrs["alignment"] = "late"
    with pytest.raises(DemoFileError, match="attribute alignment='late'"):
        resolve_alignment(human)
    with pytest.raises(ValueError, match="alignment='regenerate' is not valid"):
        resolve_alignment(human, "regenerate")
