"""The pages say what the committed results say, and mark what no file stands for."""

import argparse
import json
import re
import runpy
import shutil

import numpy as np
import pytest
from PIL import Image

from trm_helpers import schema
from trm_helpers.paths import repo_root
from trm_helpers.sim.env import load_task
from trm_helpers.stats import paired_mcnemar, rate_text, summarize_episodes
from trm_helpers.visuals.figure import alt_text

SCRIPT = repo_root() / "benchmarks" / "suite" / "publish.py"


@pytest.fixture
def publish(tmp_path):
    """The script's names, with a copy of the page and of the results."""
    names = runpy.run_path(str(SCRIPT))
    shutil.copytree(repo_root() / "docs", tmp_path / "docs")
    names["write"].__globals__.update(DOCS=tmp_path / "docs")
    return names


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A copy of docs/ whose generated tables were made anew."""
    copy = tmp_path_factory.mktemp("written") / "docs"
    shutil.copytree(repo_root() / "docs", copy)
    names = runpy.run_path(str(SCRIPT))
    names["write"].__globals__.update(DOCS=copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names["figure"], "save_figure", lambda *_: None)
        names["write"]()
    return copy


def test_the_stored_drawing_of_both_recursions_is_the_current_one(publish):
    with Image.open(publish["DRAWING"]) as image:
        assert image.info["Description"] == alt_text(publish["plot_recursions"]())


@pytest.mark.parametrize("page", ["results.md", "recursion.md"])
def test_the_page_is_what_its_results_say(written, page):
    assert (written / page).read_text() == (repo_root() / "docs" / page).read_text()


PAGES = sorted({*(repo_root() / "docs").glob("*.md"), *(repo_root() / "pretrained").glob("*/*.md"),
                repo_root() / "README.md"})
TABLE = re.compile(r"^\|( ?-{3,} ?\|)+$", re.MULTILINE)
MOST_COLUMNS = 6
GENERATED = re.compile(r"<!-- [\w-]+ -->\n.*?<!-- end -->", re.DOTALL)
SOURCES = ("*Typed by hand", "*As published", "<!-- no measurement -->")


def result(name: str) -> dict:
    return json.loads((repo_root() / "docs" / "results" / f"{name}.json").read_text())


def spatial(name: str) -> dict:
    return result(f"spatial-all/{name}")


COMPARED = {  # in the README: the results with SiLU, those with ReLU
    "`block`, 4": ("spatial-block-silu", "libero_spatial-block-depth-4-s0"),
    "`trm`, 12": ("spatial-trm-silu", "libero_spatial-trm-s0"),
    "`trm`, 2": ("spatial-one-silu",
                 "libero_spatial-trm-one-recursion-one-cycle-one-update-s0")}


def readme_rows() -> list[str]:
    rows = []
    for policy, (silu, relu) in COMPARED.items():
        new, old = spatial(silu), spatial(relu)
        found = new["results"]
        assert new["parameters"] == old["parameters"] and "relu" in old["policy"]
        rows.append(f"| {policy} | {new['parameters'] / 1e6:.1f} M | {found['successes']} "
                    f"({100 * found['wilson_low']:.0f}–{100 * found['wilson_high']:.0f} %) | "
                    f"{old['results']['successes']} | {new['minutes']:.0f} minutes |\n")
    return rows


def readme_suites() -> list[str]:
    """Rows of the README's first table: a policy per suite, and one for all."""
    def solved(*names: str) -> str:
        found = [result(name)["results"] for name in names]
        (episodes,) = {each["episodes"] for each in found}
        return f"{', '.join(str(each['successes']) for each in found)} of {episodes}"

    own = [solved("spatial-all/spatial-block-silu"),
           *(solved(*(f"{suite}-all/libero_{suite}-block-depth-4-s{seed}" for seed in range(2)))
             for suite in ("object", "goal")),
           solved("long/sooner-release,-SiLU-in-the-head,-DAgger-from-20")]
    joined = result("four-suites/four-suites-dagger")["results"]["suites"]
    one = [f"{joined[suite]['successes']} of {joined[suite]['episodes']}"
           for suite in schema.JOINED]
    return [f"| {' | '.join(cells)} |\n" for cells in (
        ["a policy for each suite (`block`, a simple recursion; two seeds: two numbers)", *own],
        ["[one policy for all four](pretrained/four-suites/README.md)", *one])]


def test_the_readme_compares_as_the_results_do():
    gains = [spatial(silu)["results"]["successes"] - spatial(relu)["results"]["successes"]
             for silu, relu in COMPARED.values()]
    twelve, two = (spatial(COMPARED[policy][0]) for policy in ("`trm`, 12", "`trm`, 2"))
    test = paired_mcnemar(twelve["episodes"], two["episodes"])
    forty, long = (result(name)["results"]["successes"] for name in (
        "four-suites/four-suites", "long/sooner-release,-SiLU-in-the-head-from-20"))
    text = " ".join((repo_root() / "README.md").read_text().split())
    assert test["pairs"] == 200
    for said in (f"solved {min(gains)} to {max(gains)} more of 200 episodes",
                 f"solved {twelve['results']['successes']} of 200 episodes; trained with two, "
                 f"{two['results']['successes']} (p = {test['p_value']:.2f}, McNemar",
                 f"(docs/results.md) {forty} of 400 (after which it was tried) and {long} of 50"):
        assert said in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(repo_root())))
def test_every_table_is_generated_or_says_where_it_is_from(page):
    text = GENERATED.sub("", page.read_text())
    if page.name == "README.md" and page.parent == repo_root():
        for row in (*readme_rows(), *readme_suites()):
            assert row in text
            text = text.replace(row, "")
    if page.name == "design.md" or page.parent == repo_root():
        assert not re.search(r"^\|.*\d (of \d|%)", text, re.MULTILINE)  # nothing else measured
        return
    for table in TABLE.finditer(text):
        before = text[:table.start()].rstrip("\n").splitlines()[:-1]  # without the table's head
        source = next(line for line in reversed(before) if line.strip())
        if source.startswith("*From ["):
            (link,) = re.findall(r"\((.+?)\)", source)
            assert (page.parent / link).exists()
        else:
            assert source.startswith(SOURCES), f"{page}: {text[table.start() - 80:table.start()]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(repo_root())))
def test_tables_are_narrow_enough_to_read(page):
    rules = [rule[0] for rule in TABLE.finditer(page.read_text())]
    measured_per_task = page.parent.name == "spatial-trm"  # ten tasks side by side
    assert all(rule.count("|") - 1 <= (11 if measured_per_task else MOST_COLUMNS)
               for rule in rules)


def test_the_card_of_the_shipped_policy_says_what_its_results_say():
    tasks = " | ".join(str(task["successes"])
                       for task in spatial("spatial-trm-silu")["results"]["tasks"])
    assert f"| of 20 | {tasks} |" in (
        repo_root() / "pretrained" / "spatial-trm" / "README.md").read_text()


def test_what_is_said_of_the_policy_for_four_suites_is_what_its_results_say():
    before, found = (result(f"four-suites/{name}") for name in ("four-suites",
                                                                "four-suites-dagger"))
    results, counts = found["results"], [
        found["results"]["suites"][suite] for suite in schema.JOINED]
    low, high = (f"{100 * results[end]:.0f}" for end in ("wilson_low", "wilson_high"))
    won = f"{results['successes']} of {results['episodes']} episodes"
    readme, card, page = (" ".join((repo_root() / name).read_text().split()) for name in (
        "README.md", "pretrained/four-suites/README.md", "docs/results.md"))
    assert f"{won} ({low} to {high} %" in readme and f"{won} ({low} to {high} %" in page
    cells = " | ".join(rate_text(each["successes"], each["episodes"]) for each in counts)
    assert f"| {cells} |" in card and f"epoch {found['best_epoch']}" in card
    assert sum(task["success_rate"] == 1 for task in results["tasks"]) == int(
        re.search(r"solves all ten episodes of (\d+) tasks", page)[1])
    test = paired_mcnemar(before["episodes"], found["episodes"])
    assert f"gains {test['only_b']} and loses {test['only_a']} (p < 0.001)" in page
    assert test["p_value"] < 0.001 and f"({before['results']['successes']} of 400)" in card


@pytest.mark.parametrize(("software", "taken"), [
    ({"dirty": False}, True), ({"dirty": True}, False), ({"dirty": None}, False), ({}, False)])
def test_only_results_of_a_clean_commit_are_taken(publish, tmp_path, software, taken):
    path = tmp_path / "robustness.json"
    path.write_text(json.dumps({"rows": [], "software": software}))
    stored = tmp_path / "docs" / "recursion" / "new" / "one-more.json"
    if not taken:
        with pytest.raises(SystemExit, match="robustness.json was made by code with uncommitted"):
            publish["card"]("new", "one more", path)
        assert not stored.exists()
    publish["card"]("new", "one more", path, dirty=not taken)
    content = json.loads(stored.read_text())
    assert content["card"]["software"] == software
    assert publish["provenance"]([content]) == ("" if taken else (
        "\n1 of 1 results came from uncommitted code; no revision repeats them exactly.\n"))


def test_a_number_that_changes_changes_the_page(publish, tmp_path, monkeypatch):
    monkeypatch.setattr(publish["figure"], "save_figure", lambda *_: None)
    path = next((tmp_path / "docs" / "results" / "goal-all").glob("*.json"))
    content = json.loads(path.read_text())
    content["results"]["successes"] = 41
    path.write_text(json.dumps(content))
    publish["write"]()
    assert "| 41 of " in (tmp_path / "docs" / "results.md").read_text()


@pytest.mark.parametrize("label", ["../x", "a/b", "a|b", ".hidden", " ", "", "a\nb", "a\\b"])
def test_a_label_is_a_files_name_and_a_cell_of_a_table(publish, label):
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be a file's name"):
        publish["as_label"](label)
    assert all(publish["as_label"](good) == good for good in ("x", "10 with, 128 pixels"))


def test_a_label_of_another_run_is_refused(publish, tmp_path):
    path, content = tmp_path / "same.json", {"dirty": False, "run": "one"}
    publish["store"](path, content, tmp_path, False)
    publish["store"](path, content, tmp_path, False)  # again, after a new evaluation
    with pytest.raises(SystemExit, match="same.json holds another run"):
        publish["store"](path, {**content, "run": "two"}, tmp_path, False)
    cards = [{"card": {"run": run, "dirty": False}} for run in ("one", "two")]
    publish["store"](tmp_path / "card.json", cards[0], tmp_path, False)
    with pytest.raises(SystemExit, match="card.json holds another run"):
        publish["store"](tmp_path / "card.json", cards[1], tmp_path, False)


def test_only_runs_on_the_same_init_states_are_compared(publish):
    def stored(first, successes, **more):
        row = json.loads(json.dumps(spatial("libero_spatial-block-depth-4-s0")))
        for episode in row["episodes"]:
            episode["init_state"] += first
        row["results"]["protocol"]["first_init_state"] = first
        row["results"]["successes"] = successes
        return {**row, **more}

    text, fig = publish["show_results"]([
        stored(20, 170, label="later", actor="earlier"), stored(20, 160), stored(0, 182)])
    head, _, *lines = [line.split(" | ") for line in text.split("\n\n")[0].splitlines()]
    states, against = head.index("init states"), -1
    assert head[against] == "against the first on the same init states: gap, paired p |"
    assert [(line[1], line[states], line[against]) for line in lines] == [
        ("182 of 200", "0 to 19", "reference |"), ("160 of 200", "20 to 39", "reference |"),
        ("170 of 200", "20 to 39", "+0.0 points, p = 1 |")]
    assert lines[-1][0] == "| later" and "182" not in alt_text(fig) and "160" in alt_text(fig)


def test_a_run_that_is_none_of_the_policies_is_named(publish, tmp_path):
    config = {"data": {}, "model": {"hidden_dim": 3}, "train": {"lr": 3.0}}
    with pytest.raises(SystemExit, match="a-run has the settings of none of benchmarks/policies"):
        publish["policy_name"](tmp_path / "a-run", config)


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
    assert text.splitlines()[2:] == ["| without | 7 of 20 (18 to 57 %) | — |",
                                     "| with | 9 of 20 (26 to 66 %) | 12 of 20 (39 to 78 %) |",
                                     "", "—: not run."]
    (axes,) = fig.axes
    assert [list(each[0].get_xdata()) for each in axes.containers] == [[5], [5, 10]]
    assert axes.get_title().endswith("libero_goal, tasks 1 and 3: 10 episodes each")


def test_cards_of_several_policies_side_by_side(publish):
    def card(**successes):
        return {"suite": "libero_goal", "task_ids": [1], "num_episodes": 4, "rows": [
            {"name": name, "title": name, "successes": count, "episodes": 4,
             "success_rate": count / 4, "wilson_low": count / 8, "wilson_high": 1.0}
            for name, count in successes.items()]}

    fig = publish["plot_cards"]({"one": card(plain=4, delay=2),
                                 "the other": card(plain=4, delay=2, swap=1)})
    (axes,) = fig.axes
    bars = axes.containers[1::2]
    assert [[bar.get_width() for bar in row] for row in bars] == [[100, 50], [100, 50, 25]]
    places = [[bar.get_y() + bar.get_height() / 2 for bar in row] for row in bars]
    np.testing.assert_allclose(places[0], [-0.2, 0.8])
    np.testing.assert_allclose(places[1], [0.2, 1.2, 2.2])
    assert axes.get_legend_handles_labels()[1] == ["one", "the other"]
    assert [text.get_text() for text in axes.texts] == ["4/4", "2/4", "4/4", "2/4", "1/4"]


def test_depth_cards_of_several_policies_share_their_tables(publish):
    path = next((repo_root() / "docs" / "recursion" / "depth-spatial").glob("*.json"))
    one = json.loads(path.read_text())
    text, fig = publish["show_cards"]([one, {**one, "label": "other"}])
    success, cost = text.split("\n\n")  # no demonstrations were left to measure an action error
    for table in (success, cost):
        names = [line.split(" | ")[0] for line in table.splitlines()[2:]]
        assert names[0] == "| trm, as trained" and "| other, fixed 1" in names
        assert len(names) == 2 * len(one["card"]["rows"])
    assert "| trm, as trained | 57 of 60 | 86 to 98 | reference | 108 |" in success
    assert "| trm, fixed 1 | 59 of 60 | 91 to 100 | +3, p = 0.5 | 104 |" in success
    assert "| trm, fixed 4 | 4.0 | 4.0 / 4.0 / 4.0 / 4.0 | 4.7 |" in cost
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels[:4] == ["trm", "other", "as trained", "another depth"]
    assert labels.count("another depth") == 1 and "fixed 1" not in labels


def test_looks_are_compared_scene_by_scene_and_over_the_seeds_that_have_an_arm(publish):
    from suite import scenes

    def run(suite, seed, **arms):
        arms = {arm: {"close": close, "near": "1111", "close by looks": [0.5] * 7}
                for arm, close in arms.items()}
        return {"kind": "look-again", "suite": suite, "seed": seed,
                "splits": {split: {"tasks": "0011", "arms": arms} for split in ("test", "swap")}}

    every = dict.fromkeys(scenes.LOOKS, "0100") | {"look again": "0110"}
    forward = scenes.LOOKS[1]
    without = {arm: close for arm, close in every.items() if arm != forward}
    stored = [run("libero_object", 0, **every), run("libero_object", 1, **without)]
    lines = {line[0]: line[1:] for line in scenes.lines(stored, "test", scenes.LOOKS, "look again",
                                                        scenes.CLOSE)}
    assert lines["look again"] == ["50.0 %", "21.5 to 78.5 %", "reference", "", "100.0 %"]
    assert lines["one look"][0] == "25.0 %"
    assert lines["one look"][2] == "+25.0, p = 0.5 (2 against 0)"
    assert lines["one look"][3] == "+0.0 to +50.0"  # the gap is in the second task only
    assert lines[f"{forward} (seed 0)"][2] == "+25.0, p = 1 (1 against 0)"
    text, fig = publish["show_cards"](stored)
    assert text.count("| one look, wide |") == 2 and "look again" in alt_text(fig)


def test_bowls_are_compared_by_steps_with_untrained_numbers_of_bowls_apart(publish):
    from suite import scenes

    def run(seed):
        arms = {arm: {"right": "0100"} for arm in scenes.BOWLS} | {"recursion": {"right": "0111"}}
        more = {arm: {"right": "0000"} for arm in scenes.BOWLS}
        return {"kind": "which-bowl", "suite": "own scenes", "seed": seed,
                "splits": {"test": {"tasks": [0, 0, 20, 20], "arms": arms},
                           "more": {"tasks": [0, 1, 2, 3], "arms": more}}}

    text, fig = publish["show_cards"]([run(0), run(1)])
    test, more = text.split("Five and six bowls")
    assert ("| two layers | 25.0 % | 7.1 to 59.1 % | +50.0, p = 0.12 (4 against 0) "
            "| +0.0 to +100.0 |") in test
    assert "| recursion | 75.0 % |" in test and "| recursion | 0.0 %" in more
    assert [line.get_xdata()[-1] for line in fig.axes[0].lines[:1]] == [18]
    assert "recursion: 75 % of the scenes with two to four bowls, 0 % with more" in alt_text(fig)


def test_policies_with_one_look_and_with_six_are_compared_in_the_same_episodes(publish):
    def played(suite, label, successes):
        episodes = [{"task_id": number // 2, "init_state": number % 2, "success": digit == "1"}
                    for number, digit in enumerate(successes)]
        return {"seed": 0, "label": label, "results": {"protocol": {"suite": suite}},
                "episodes": episodes}

    stored = [played("b", "six looks", "1111"), played("a", "one look", "1000"),
              played("b", "one look", "1010"), played("a", "six looks", "0111")]
    text, fig = publish["scenes"].show_control(stored, publish["markdown"])
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in text.splitlines()[2:]]
    assert fig is None and [row[:4] for row in cells] == [
        ["a, seed 0", "1 of 4 (5 to 70 %)", "3 of 4 (30 to 95 %)", "+50.0, p = 0.62 (3 against 1)"],
        ["b, seed 0", "2 of 4 (15 to 85 %)", "4 of 4 (51 to 100 %)",
         "+50.0, p = 0.5 (2 against 0)"],
        ["all", "3 of 8 (14 to 69 %)", "7 of 8 (53 to 98 %)", "+50.0, p = 0.22 (5 against 1)"]]
    # tasks are resampled: in suite a their gaps are 0 and 100 points, in suite b 50 and 50
    assert [row[4] for row in cells[:2]] == ["+0.0 to +100.0", "+50.0 to +50.0"]
    assert "95 %, tasks resampled |" in text
    later = [played("a", "one look", "1000") | {"seed": 1},
             played("a", "six looks", "0111") | {"seed": 1},
             played("b", "one look", "0000") | {"seed": 1}]  # the other arm is still to come
    text, _ = publish["scenes"].show_control(stored + later, publish["markdown"])
    assert "| b, seed 0 |" in text and "b, seed 1" not in text and "seeds resampled |" in text
    assert "| all | 4 of 12 " in text and "(8 against 2) |  |" in text  # three of four parts


def test_policies_with_a_memory_are_compared_in_the_same_episodes(publish):
    def trained(condition, seed, arms):
        return {"kind": "memory", "condition": condition, "seed": seed, "arms": {
            arm: [{"task_id": number // 2, "init_state": number % 2, "success": digit == "1"}
                  for number, digit in enumerate(digits)] for arm, digits in arms.items()}}

    every = {arm: "0000" for arm in publish["scenes"].MEMORY} | {"carried": "0111"}
    stored = [trained("first", 0, {"carried": "1000", "reset": "0000"}),
              trained("fourth", 0, every), trained("fourth", 1, every | {"reset": "1111"})]
    stored[1]["arms"]["carried"].reverse()  # the order of the episodes does not matter
    text, fig = publish["show_cards"](stored)
    fourth, first = text.split("seen at the first decision only:")
    assert "| carried | 75.0 % | 40.9 to 92.9 % | reference |  |" in fourth
    assert "| reset | 50.0 % | 21.5 to 78.5 % | +25.0, p = 0.62 (3 against 1) |" in fourth
    assert "| carried | 25.0 % |" in first and "gru" not in first
    assert "carried, seen at every fourth decision: 6 of 8" in alt_text(fig)
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == list(
        publish["scenes"].MEMORY)
    assert "| reset | 50.0 % | 21.5 to 78.5 % | -50.0, p = 0.12 (0 against 4) |" in \
        fourth.split("With a gate")[1]
    fewer = {arm: every[arm] for arm in ("reset", "memory token")}  # a later seed without `carried`
    text, _ = publish["show_cards"]([*stored, trained("fourth", 2, fewer | {"reset": "1111"})])
    assert "| reset | 66.7 % | 39.1 to 86.2 % | +25.0, p = 0.62 (3 against 1) |" in text
    assert "| carried (seed 0, 1) |" in text
    _, fig = publish["show_cards"](stored[:1])  # what was not run has no line
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == ["reset", "carried"]
    stored[0]["arms"]["reset"].pop()
    with pytest.raises(ValueError):
        publish["show_cards"](stored)


def test_a_policy_of_forty_tasks_is_shown_by_suite_and_task(publish):
    suites = dict(zip(schema.JOINED, (2, 1, 2, 0), strict=True))
    played = {("libero_40", 0): 2, ("libero_40", 10): 1, ("libero_40", 20): 2, ("libero_40", 30): 0}
    episodes = [{"suite": suite, "task_id": task, "init_state": 40 + number, "steps": 100,
                 "success": number < won} for (suite, task), won in played.items()
                for number in range(2)]
    results = {**summarize_episodes(episodes),
               "protocol": {"suite": "libero_40", "first_init_state": 40},
               "suites": {suite: {"successes": won, "episodes": 2}
                          for suite, won in suites.items()}}
    row = {"policy": "block, depth 4", "seed": 0, "parameters": 2_500_000, "epochs": 12,
           "best_epoch": 11, "minutes": 40.0, "demonstrations": 15, "results": results,
           "episodes": episodes}
    text, fig = publish["show_results"]([row])
    success, training = ([cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
                         for table in text.split("\n\n"))
    assert success == ["block, depth 4", "2 of 2 (34 to 100 %)", "1 of 2 (9 to 91 %)",
                       "2 of 2 (34 to 100 %)", "0 of 2 (0 to 66 %)", "62 % (25 to 100 %)"]
    assert training == ["block, depth 4", "2.5 M", "100", "11 of 12", "40"]
    signs = [sorted(text.get_text() for text in axes.texts) for axes in fig.axes]
    assert signs == [["2/2", "✓", "✓"], ["1/2", "✓", "✗"], ["2/2", "✓", "✓"], ["0/2", "✗", "✗"]]
    assert [label.get_text() for axes in fig.axes for label in axes.get_yticklabels()] == [
        load_task(suite, 0).language for suite in schema.JOINED]
    assert "Least often solved: put both the alphabet soup and the tomato sauce in the basket, " \
           "0 of 2" in alt_text(fig)
