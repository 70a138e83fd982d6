"""Faults of evaluations: each check passes on ours, detects its fault, and is not empty."""

import json

import numpy as np
import pytest

from trm_helpers import schema
from trm_helpers import selftest as module
from trm_helpers.__main__ import main
from trm_helpers.preflight import Check, run_check, table
from trm_helpers.selftest import FAULTS, SCENE, Subject, Wrapper, examine
from trm_helpers.sim import checks
from trm_helpers.sim.checks import SimulatorCheck, contacts, frames
from trm_helpers.sim.env import LiberoEnv

NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def subject():
    with LiberoEnv(*SCENE) as env:
        yield Subject(env)


@pytest.mark.sim
@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_a_check_passes_without_its_fault_and_detects_it(subject, fault, monkeypatch):
    """A check whose body is emptied fails one half or the other."""
    for suite, steps in (("libero_spatial", 6), ("libero_object", 8)):  # in place of 220 and 280
        monkeypatch.setitem(schema.HORIZONS, suite, steps)
    healthy = run_check(fault.check, subject)
    assert (healthy.status, healthy.hint) == ("ok", ""), healthy
    for seed in fault.seeds:
        seeded = run_check(fault.check, seed(subject))
        assert seeded.status == "fail" and seeded.hint == fault.check.hint
        assert "Error" not in seeded.found  # it measured something
        assert seeded.found != healthy.found


@pytest.mark.sim
def test_contacts_are_checked_by_the_version_and_by_a_bowl_that_slides(subject):
    (version, slide) = FAULTS[0].seeds
    assert run_check(contacts, version(subject)).found.startswith("MuJoCo 3.17.0, bowl 1.5 cm")
    found = run_check(contacts, slide(subject)).found
    assert found.startswith("MuJoCo 3.3.2") and 4 < float(found.split()[3]) < 7  # 5.6 with 3.17


@pytest.fixture(scope="module")
def seen(subject):
    """What a view is found from, by camera: two frames and where the bowl is projected."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_view", lambda *each: given.append(each))
        assert [*Subject(subject.env).views] == [*schema.CAMERAS]
    return dict(zip(schema.CAMERAS, given, strict=True))


@pytest.mark.sim
@pytest.mark.parametrize(("rows", "columns", "orientation"), [
    (1, 1, "upside down"), (-1, 1, "upright"), (-1, -1, "mirrored"),
    (1, -1, "turned by 180 degrees")])
def test_orientation_and_camera_are_found_apart_from_each_other(seen, rows, columns, orientation):
    """From frames alone, whatever camera they are named after."""
    for camera, (without, frame, projected) in seen.items():
        turned = checks._view(without[::rows, ::columns], frame[::rows, ::columns], projected)
        assert turned[:2] == (camera, orientation)


@pytest.mark.sim
def test_frames_of_another_scene_show_nothing_known(subject):
    frame = np.random.default_rng(0).integers(0, 255, (128, 128, 3))
    other = Wrapper(subject.env, observe=lambda *_: dict.fromkeys(schema.CAMERAS, frame))
    views = Subject(other).views.values()
    assert {view[:2] for view in views} == {("nothing known", "unknown")}
    assert all(view.spread > 50 for view in views)


@pytest.mark.sim
def test_a_wrapper_that_changes_nothing_passes_where_it_is_examined(subject, monkeypatch):
    monkeypatch.setattr(module, "FAULTS", [fault for fault in FAULTS if fault.name in (
        "cameras exchanged", "frames flipped", "gripper command negated")])
    rows = examine(Subject(Wrapper(subject.env)))
    assert [row.status for row in rows] == ["ok"] * 3
    flipped = Subject(Wrapper(subject.env, observe=module._flip))
    assert [row.status for row in examine(flipped)] == [
        "ok" if row.name != "image orientation" else "fail" for row in rows]


class FakeEnv:
    """Stands in for the simulator."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(("measure", "status"), [
    (lambda subject: ("", subject.env != "spoilt"), "ok"),
    (lambda subject: ("", True), "fail"),  # an emptied check
    (lambda subject: ("", False), "fail"),
    (lambda subject: 1 / 0, "fail"),
])
def test_a_check_that_detects_nothing_or_too_much_is_noticed(monkeypatch, capsys, measure, status):
    monkeypatch.setattr(module, "LiberoEnv", FakeEnv)
    check = SimulatorCheck("a check", measure, "do this")
    fault = module.Fault("a fault", check, (lambda subject: Subject("spoilt"),))
    monkeypatch.setattr(module, "FAULTS", (fault,))
    assert [row.status for row in module.selftest()] == [status]
    assert main(["preflight", "--selftest", "--json"]) == (0 if status == "ok" else 3)
    assert json.loads(capsys.readouterr().out)[0]["status"] == status


def test_every_variant_of_a_fault_is_to_be_detected(monkeypatch):
    monkeypatch.setattr(module, "LiberoEnv", FakeEnv)
    check = SimulatorCheck("a check", lambda subject: (str(subject.env), subject.env != "unit"), "")
    seeds = [lambda subject, name=name: Subject(name) for name in ("unit", "order")]
    monkeypatch.setattr(module, "FAULTS", (module.Fault("chunk", check, tuple(seeds)),))
    (row,) = module.selftest()
    assert row.status == "fail" and row.hint == "the seeded fault was not detected"
    assert row.found.endswith("; seeded: unit; seeded: order")


def test_twelve_distinct_checks_detect_twelve_distinct_faults_and_say_what_to_do():
    distinct = {len(set(each)) for each in (
        NAMES, [fault.check.name for fault in FAULTS], [fault.check.measure for fault in FAULTS],
        [fault.check.hint for fault in FAULTS], [fault.seeds for fault in FAULTS])}
    assert len(FAULTS) == 12 and distinct == {12}
    assert all(len(fault.check.hint) > 30 for fault in FAULTS)
    assert [len(fault.seeds) for fault in FAULTS if len(fault.seeds) > 1] == [2, 2]
    assert "MUJOCO_GL=osmesa" in frames.hint and "TRM_RENDERER" in frames.hint
    rows = [Check(fault.name, "fail", "found " * 40, fault.check.hint) for fault in FAULTS]
    assert max(map(len, table(rows).splitlines())) <= 100
