"""Faults of evaluations: each check passes on ours, finds its own fault, and is not empty."""

import json

import numpy as np
import pytest

from trm_helpers import selftest as module
from trm_helpers.__main__ import main
from trm_helpers.preflight import Check, table
from trm_helpers.selftest import FAULTS, SCENE, Subject, Wrapper, examine, run_check
from trm_helpers.sim.env import LiberoEnv

NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def subject():
    with LiberoEnv(*SCENE) as env:
        yield Subject(env)


@pytest.mark.sim
@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_a_check_passes_without_its_fault_and_finds_it(subject, fault):
    """A check whose body is emptied fails one half or the other."""
    healthy = run_check(fault, subject)
    assert (healthy.status, healthy.hint) == ("ok", ""), healthy
    seeded = run_check(fault, fault.seed(subject))
    assert seeded.status == "fail" and seeded.hint == fault.hint
    assert "Error" not in seeded.found  # it measured something
    assert seeded.found != healthy.found


@pytest.mark.sim
def test_the_order_of_a_chunk_is_examined_too(subject):
    (fault,) = (fault for fault in FAULTS if fault.check is module.check_chunk)
    backwards = Subject(subject.env, policy=lambda chunk: module.chunk_policy(chunk[::-1].copy()))
    assert run_check(fault, backwards).status == "fail"


@pytest.mark.sim
def test_a_wrapper_that_changes_nothing_passes_where_it_is_examined(subject, monkeypatch):
    monkeypatch.setattr(module, "FAULTS", [fault for fault in FAULTS if fault.name in (
        "cameras exchanged", "image flipped", "gripper's other sign")])
    rows = examine(Subject(Wrapper(subject.env)))
    assert [row.status for row in rows] == ["ok"] * 3
    assert [row.status for row in examine(Subject(module.FlippedFrames(subject.env)))] == [
        "ok" if row.name != "image flipped" else "fail" for row in rows]


class FakeEnv:
    """Stands in for the simulator."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(("finds", "status"), [
    (lambda subject: ("", subject.env != "spoilt"), "ok"),
    (lambda subject: ("", True), "fail"),  # an emptied check
    (lambda subject: ("", False), "fail"),
    (lambda subject: 1 / 0, "fail"),
])
def test_a_check_that_finds_nothing_or_too_much_is_noticed(monkeypatch, capsys, finds, status):
    monkeypatch.setattr(module, "LiberoEnv", FakeEnv)
    fault = module.Fault("a fault", finds, lambda subject: Subject("spoilt"), "do this")
    monkeypatch.setattr(module, "FAULTS", (fault,))
    assert [row.status for row in module.selftest()] == [status]
    assert main(["preflight", "--selftest", "--json"]) == (0 if status == "ok" else 3)
    assert json.loads(capsys.readouterr().out)[0]["status"] == status


def test_there_are_twelve_faults_and_their_table_fits():
    assert len(FAULTS) == len({fault.check for fault in FAULTS}) == len(set(NAMES)) == 12
    rows = [Check(fault.name, "fail", "found " * 40, fault.hint) for fault in FAULTS]
    assert max(map(len, table(rows).splitlines())) <= 100
    assert np.array_equal(module._Still().act({}), [0, 0, 0, 0, 0, 0, -1])
