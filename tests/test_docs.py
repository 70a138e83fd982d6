"""What the pages say to type is accepted by the real parsers; their links and paths exist."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from papermill.cli import papermill
from test_structure import PACKAGE, ROOMS, modules

from trm_helpers.__main__ import COMMANDS, parse
from trm_helpers.config import (
    PRESETS,
    check_parameters,
    from_flat,
    parse_parameter,
    settings_by_part,
)
from trm_helpers.notebooks import notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md",
                ROOT / "artifacts" / "README.md", *(ROOT / "docs").glob("*.md"),
                *(ROOT / "pretrained").glob("*/*.md")})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\S.*\n)+", re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^(?:make|papermill|%run|torchrun|python|wandb)\b")
OTHERS = ("git ", "cd ", "cp ", "export ", "source ", "%cd ", "dask ", "ssh ")  # of the system
OF_PYTHON = ("python -m pip wheel --no-deps --wheel-dir dist .",  # as tests/test_wheel.py does
             "python -m venv build/peers")
PATH = re.compile(r"(?:trm_helpers|tests|notebooks|benchmarks|docs|pretrained)/[\w./-]*\w")
MAKEFILE = (ROOT / "Makefile").read_text()
MAKES = re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)
VARIABLES = re.findall(r"^(\w+) [:?]=", MAKEFILE, re.MULTILINE)


SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=name)(test)


def commands(page: Path) -> list[str]:
    """Commands of a page or of a script's docstring, without the environment's folder."""
    text, found = page.read_text(), []
    if page.suffix == ".py":
        text = (ast.get_docstring(ast.parse(text), clean=True) or "") + "\n"
    blocks = [block for language, block in FENCE.findall(text) if language in ("", "bash")]
    text = FENCE.sub("", text)
    blocks += [re.sub("^    ", "", block, flags=re.MULTILINE) for block in INDENTED.findall(text)]
    for block in blocks:
        found += block.replace("\\\n", " ").splitlines()
    found += [" ".join(span.split()) for span in SPAN.findall(INDENTED.sub("", text))]
    found = [part.split("#")[0].strip().removeprefix("!")
             for line in found for part in line.split("&&")]
    found = [re.sub(r"^(?:\.venv|build/peers)/bin/", "", command) for command in found]
    found = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command) for command in found]
    return [command for command in dict.fromkeys(found) if COMMAND.match(command)]


EVERY = [pytest.param(command, id=f"{page.stem}: {command}")
         for page in [*PAGES, *SCRIPTS] for command in commands(page)]


def test_commands_are_found_in_blocks_and_in_the_text():
    assert len(EVERY) > 60
    found = [command for page in PAGES for command in commands(page)]
    for command in ("make demo", "make test-fast",
                    "papermill 04_train.ipynb ../artifacts/trained.ipynb -p lr 5e-4",
                    "python benchmarks/suite/publish.py write", "make kaggle KAGGLE_USERNAME=you"):
        assert command in found


@each_page
def test_blocks_hold_commands_that_are_checked(page):
    """A line of a shell block is checked here, or is one of the system's own commands."""
    for language, block in FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            if language == "bash" and line.split("#")[0].strip():
                assert line.startswith(OTHERS) or COMMAND.match(line), f"{name(page)}: {line}"


class Parsed(Exception):
    """Raised in place of a script's work."""


@pytest.mark.parametrize("command", EVERY)
def test_a_command_is_accepted(command, monkeypatch, capsys):
    words = [word for word in shlex.split(command) if word not in ("...", "…")]
    kind = words[0]
    if kind == "make":
        given = [word.split("=")[0] for word in words[1:]]
        assert set(given) <= {*MAKES, *VARIABLES}, command
    elif kind == "%run":
        assert (ROOT / "notebooks" / words[1]).exists()
    elif kind == "papermill":
        accepted_by_papermill(words[1:])
    elif kind == "torchrun":
        accepted_by_the_command_line(words[words.index("trm_helpers") + 1:])
    elif words[1:3] == ["-m", "trm_helpers"]:
        if any(word in ("COMMAND", "command") for word in words[3:]) or not words[3:]:
            return
        accepted_by_the_command_line(words[3:])
    elif kind == "python" and words[1:] and words[1].startswith("benchmarks/"):
        accepted_by_a_script(words[1:], monkeypatch)
    elif kind == "python" and words[1:2] != ["-m"] and words[1:]:
        assert (ROOT / words[1]).exists(), command
    else:
        assert command in OF_PYTHON, f"nothing here checks {command}"


def accepted_by_the_command_line(arguments: list[str]) -> None:
    arguments = [argument for argument in arguments if argument != "--json"]
    if len(arguments) == 1 and arguments[0] in COMMANDS:  # named, not given in full
        return
    command = parse(arguments)
    if arguments[0] != "run":
        return
    given = {key: parse_parameter(key, text) for key, text in command.parameter}
    if command.what in PRESETS:
        known = {key for path in (ROOT / "notebooks").glob("0*.ipynb")
                 for key in notebook_parameters(path)}
    else:
        known = set(notebook_parameters(ROOT / "notebooks" / f"{command.what}.ipynb"))
    assert set(given) <= known
    check_parameters(**given)


def accepted_by_papermill(arguments: list[str]) -> None:
    given = papermill.make_context("papermill", arguments).params
    notebook = ROOT / "notebooks" / Path(given["notebook_path"]).name
    known = notebook_parameters(notebook)
    parameters = {key: parse_parameter(key, text) for key, text in given["parameters"]}
    for text in given["parameters_yaml"]:
        parameters |= yaml.safe_load(text)
    assert set(parameters) <= set(known), f"{notebook.name} has {sorted(known)}"
    check_parameters(**parameters)


def accepted_by_a_script(words: list[str], monkeypatch) -> None:
    script, parse_args = ROOT / words[0], argparse.ArgumentParser.parse_args
    assert script.exists()
    if "ArgumentParser" not in script.read_text():
        assert not words[1:], f"{words[0]} takes no arguments"
        return

    def parsed(self, *arguments, **settings):
        raise Parsed(parse_args(self, *arguments, **settings))

    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    main = runpy.run_path(str(script))["main"]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    with pytest.raises(Parsed):
        main()


@pytest.mark.parametrize("command", [
    "python -m trm_helpers evaluate RUN --episodes 3", "python -m trm_helpers paly RUN",
    "papermill 04_train.ipynb out.ipynb -p learning_rate 1e-3", "make everything",
    "papermill 06_eval.ipynb out.ipynb -p num_episodes many", "%run 09_more.ipynb",
    "python benchmarks/latency.py --round 3 --speed 2", "python benchmarks/none.py",
    "python -m trm_helper report RUN", "python -m pip whel .", "wandb sync"])
def test_a_wrong_command_is_noticed(command, monkeypatch, capsys):
    with pytest.raises((SystemExit, AssertionError, ValueError)):
        test_a_command_is_accepted(command, monkeypatch, capsys)


def test_the_makefile_calls_the_command_line_as_it_is():
    of_play = dict(re.findall(r"^(POLICY|TASKS) := (.+)$", MAKEFILE, re.MULTILINE))
    assert (ROOT / of_play["POLICY"]).is_dir()
    calls = re.findall(r"python -m trm_helpers (.+?)(?: \||$)", MAKEFILE, re.MULTILINE)
    assert len(calls) == 5  # preflight, evaluate, report, run twice
    for call in calls:
        for variable, value in of_play.items():
            call = call.replace(f"$({variable})", value)
        accepted_by_the_command_line(shlex.split(call))


# --- links and paths -----------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_and_their_anchors_exist(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {link}"


@each_page
def test_paths_in_code_exist(page):
    for span in SPAN.findall(FENCE.sub("", page.read_text())):
        if path := PATH.match(span):
            assert (ROOT / path[0]).exists(), f"{name(page)}: {span}"


def test_the_table_of_changes_names_a_file_and_a_test_for_each():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## Where does my code go?")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for change, file, test in rows[1:]:
        for cell, folder in ((file, ("trm_helpers/", "benchmarks/")), (test, "tests/")):
            paths = [path for path in SPAN.findall(cell) if path.endswith(".py") and "/" in path]
            assert paths, change
            for path in paths:
                assert path.startswith(folder) and (ROOT / path).exists(), path
        for path, symbol in re.findall(r"`([\w/]+\.py)` \(`(\w+)`", file):
            assert re.search(rf"\b{symbol}\b", (ROOT / path).read_text()), (path, symbol)


def test_the_readme_is_short_and_shows_every_notebook():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    for notebook in (ROOT / "notebooks").glob("0*.ipynb"):
        row = next(line for line in text.splitlines() if f"(notebooks/{notebook.name})" in line)
        thumb = f"docs/images/thumbs/{notebook.name[:2]}.webp"
        assert f"({thumb})](docs/notebooks/{notebook.name})" in row
    for title in ("Tiny Recursive Models for robot control", "Less is More", "{LIBERO}"):
        assert f"title = {{{title}" in text
    for image in re.findall(r"!\[(.*?)\]\((?:.*?)\)", text):
        assert len(image) > 15  # alt text


def test_the_glossary_is_short_and_linked():
    rows = re.findall(r"^\| (?!term \|)(.+?) \|", (ROOT / "docs" / "glossary.md").read_text(),
                      re.MULTILINE)
    assert 10 < len(rows) <= 20 and rows == sorted(rows, key=lambda term: term.lower().strip("`"))
    for page in ("README.md", "notebooks/00_setup.py"):
        assert "docs/glossary.md)" in (ROOT / page).read_text()


def test_the_table_of_presets_has_their_settings():
    table = (ROOT / "docs" / "commands.md").read_text().split("## Presets")[1].split("\n## ")[0]
    head, *rows = [re.findall(r"[^|]+", line)
                   for line in re.findall(r"^\| .*", table, re.MULTILINE)]
    presets = [cell.strip().strip("`") for cell in head[1:]]
    assert presets == list(PRESETS) and len(rows) > 10
    for setting, *cells in rows:
        setting = setting.strip().strip("`")
        for preset, cell in zip(presets, cells, strict=True):
            config = from_flat(preset)
            value = getattr(getattr(config, settings_by_part()[setting]), setting)
            values = value if isinstance(value, tuple) else (value,)
            assert cell.strip() == ", ".join(map(str, values)), (setting, preset)


def test_the_table_of_rooms_lists_every_module_from_the_bottom_up():
    section = (ROOT / "docs" / "design.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    listed = [room + "." * (room != "") + file
              for room, files in re.findall(r"^\| (`\w+`|root) \| (.+?) \|", section, re.MULTILINE)
              for room in [room.strip("`").replace("root", "")] for file in SPAN.findall(files)]
    assert sorted(listed) == sorted(name for name, path in modules(PACKAGE).items()
                                    if path.name != "__init__.py")
    rooms = list(dict.fromkeys(file.split(".")[0] for file in listed))
    assert rooms == list(ROOMS)


@each_page
def test_pages_use_the_fields_words(page):
    """Image, object, trained, exactly; see the glossary."""
    found = re.findall(r"\b(?:pictures?|things?|taught|luck|fates?|lest|to the bit|so many)\b",
                       page.read_text(), re.IGNORECASE)
    assert not found, f"{name(page)}: {found}"


def test_executed_copies_hold_pictures_and_no_path_of_the_machine_that_made_them():
    copies = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert [copy.name for copy in copies] == [
        path.name for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    assert sum(copy.stat().st_size for copy in copies) < 12e6
    for copy in copies:
        text = copy.read_text()
        links = [link for link in LINK.findall(text) if not link.startswith("http")]
        assert links and all((copy.parent / link).exists() for link in links), (copy, links)
        assert '"image/png"' in text and not re.search(r"/(?:tmp|home|root|Users)/", text), copy
