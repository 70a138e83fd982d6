import shutil
from functools import partial

import pytest
import torch

from trm_helpers.opengl import configure_gl

_GPU_SEEN = {name: getattr(torch.cuda, name) for name in ("is_available", "device_count")}


def pytest_configure(config):
    """Before any test module imports MuJoCo."""
    configure_gl()


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # a process of several: the longest files first
        long = {mark: {item.path for item in items if item.get_closest_marker(mark)}
                for mark in ("notebooks", "sim")}
        items.sort(key=lambda item: (item.path not in long["notebooks"],
                                     item.path not in long["sim"]))
    if any(item.get_closest_marker("gpu") for item in items) and not _GPU_SEEN["is_available"]():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope
def pytest_runtest_setup(item):
    """Only tests marked ``gpu`` see one: for all others ``auto`` is the CPU on every machine."""
    hidden = {"is_available": lambda: False, "device_count": lambda: 0}
    for name, seen in (_GPU_SEEN if item.get_closest_marker("gpu") else hidden).items():
        setattr(torch.cuda, name, seen)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test reads or writes the checkout's data/ and artifacts/."""
    monkeypatch.setenv("TRM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", str(tmp_path / "artifacts"))


SMALL = dict(
    num_demos=5, hidden_dim=16, num_recursions=2, image_size=36, cameras=("agentview_rgb",),
    chunk=2, execution_horizon=1, epochs=2, batch_size=8, num_threads=1, precision="fp32",
)


def _run_maker(folder, monkeypatch):
    """The function of ``small_run``, with its file in ``folder``."""
    from demo_files import write_demo_file

    from trm_helpers.config import from_flat
    from trm_helpers.policy.keypoints import trained_localizer
    from trm_helpers.training import runs
    from trm_helpers.training.train import BehaviorCloningTrainer

    monkeypatch.setattr(runs, "software_versions", dict)
    file = write_demo_file(folder / "soup_demo.hdf5", (6, 7, 8, 9, 10), image_size=36)

    def make(name="small", resume=False, roll_out=None, **settings):
        config = from_flat("tiny", **{**SMALL, **settings})
        run = runs.create_run(config, name, resume)
        return BehaviorCloningTrainer.from_config(config, {0: file}, run, roll_out,
                                                  partial(trained_localizer, run, config))

    return make


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A function: a trainer of a small policy on a small file, in ``artifacts/<name>``."""
    return _run_maker(tmp_path, monkeypatch)


@pytest.fixture
def trainer(small_run):
    return small_run()


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The ``artifacts`` folder of :func:`trained`, and its demonstration file."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRM_ARTIFACTS_DIR", str(folder / "artifacts"))
        patch.setenv("TRM_DATA_DIR", str(folder / "data"))
        _run_maker(folder, patch)().fit()
    return folder


@pytest.fixture
def trained(request, tmp_path, small_run, trained_once):
    """A run folder after two epochs; that of ``trainer`` in a test that asks for it as well."""
    if "trainer" in request.fixturenames:
        trainer = request.getfixturevalue("trainer")
        trainer.fit()
        return trainer.run
    run = shutil.copytree(trained_once / "artifacts" / "small", tmp_path / "artifacts" / "small")
    described = run / "policy.json"  # names the demonstration file, which small_run has written
    described.write_text(described.read_text().replace(str(trained_once), str(tmp_path)))
    return run
