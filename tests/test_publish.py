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


def test_cards_of_numbers_of_demonstrations_are_drawn_against_them(publish):
    def stored(label, successes):
        row = {"name": "plain", "title": "nothing changed", "successes": successes, "episodes": 20,
               "success_rate": successes / 20, "wilson_low": 0.3, "wilson_high": 0.8,
               "failures": {"nothing lifted": 20 - successes}}
        return {"label": label, "kind": "robustness", "card": {
            "suite": "libero_goal", "task_ids": [1, 3], "num_episodes": 10, "rows": [row]}}

    text, fig = publish["show_cards"]([stored("10 with", 12), stored("5 with", 9),
                                       stored("5 without", 7)])
    assert text.splitlines()[2:] == ["| without | 7 of 20 (30 to 80 %) |  |",
                                     "| with | 9 of 20 (30 to 80 %) | 12 of 20 (30 to 80 %) |"]
    (axes,) = fig.axes
    assert [list(each[0].get_xdata()) for each in axes.containers] == [[5], [5, 10]]
    assert axes.get_title().endswith("libero_goal, task 1, 3: 10 episodes of each")


def test_depth_cards_of_several_policies_make_one_table(publish):
    path = next((repo_root() / "docs" / "recursion" / "depth-spatial").glob("*.json"))
    one = json.loads(path.read_text())
    text, fig = publish["show_cards"]([one, {**one, "label": "other"}])
    names = [line.split(" | ")[0] for line in text.splitlines()[2:]]
    assert names[0] == "| trm, as trained" and "| other, fixed 1" in names
    assert len(names) == 2 * len(one["card"]["rows"])
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels[:4] == ["trm", "other", "as trained", "another depth"]
    assert labels.count("another depth") == 1 and "fixed 1" not in labels
