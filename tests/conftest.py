import pytest

from trm_helpers.preflight import configure_gl


def pytest_configure(config):
    """Before any test module imports MuJoCo."""
    configure_gl()


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test reads or writes the checkout's data/ and artifacts/."""
    monkeypatch.setenv("TRM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", str(tmp_path / "artifacts"))
