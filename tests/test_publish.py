"""docs/results.md says what the committed results say."""

import json
import runpy
import shutil

import pytest

from trm_helpers.paths import repo_root

SCRIPT = repo_root() / "benchmarks" / "suite" / "publish.py"


@pytest.fixture
def publish(tmp_path):
    """The script's names, with a copy of the page and of the results."""
    names = runpy.run_path(str(SCRIPT))
    shutil.copytree(repo_root() / "docs", tmp_path / "docs")
    names["write"].__globals__.update(DOCS=tmp_path / "docs")
    return names


def test_the_page_is_what_its_results_say(publish, tmp_path):
    publish["write"]()
    assert (tmp_path / "docs" / "results.md").read_text() == (
        repo_root() / "docs" / "results.md").read_text()


def test_a_number_that_changes_changes_the_page(publish, tmp_path):
    path = next((tmp_path / "docs" / "results").glob("*/*.json"))
    content = json.loads(path.read_text())
    content["results"]["successes"] = 41
    path.write_text(json.dumps(content))
    publish["write"]()
    assert "| 41 of " in (tmp_path / "docs" / "results.md").read_text()


def test_results_without_a_place_on_the_page_are_refused(publish, tmp_path):
    shutil.copytree(next((tmp_path / "docs" / "results").iterdir()),
                    tmp_path / "docs" / "results" / "elsewhere")
    with pytest.raises(SystemExit, match="no mark <!-- elsewhere -->"):
        publish["write"]()


def test_committed_results_agree_with_their_episodes():
    paths = list((repo_root() / "docs" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text())
        played = content["episodes"]
        assert len({(row["task_id"], row["init_state"]) for row in played}) == len(played)
        assert len(played) == content["results"]["episodes"]
        assert sum(row["success"] for row in played) == content["results"]["successes"]
