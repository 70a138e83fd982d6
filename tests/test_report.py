"""Both pages on a run show the contents of its folder."""

import base64
import hashlib
import json
import re
import shlex
import struct
import zlib
from html.parser import HTMLParser

import imageio.v3 as imageio
import numpy as np
import pytest

from trm_helpers.__main__ import main, parse
from trm_helpers.evaluation.plan import WIDE_SEED, tasks_in_words
from trm_helpers.evaluation.play import weights_digest
from trm_helpers.files import append_jsonl, read_json, write_json
from trm_helpers.paths import repo_root, run_dir
from trm_helpers.report import page, sections, write_report
from trm_helpers.stats import summarize_episodes
from trm_helpers.training.runs import find_run, load_config
from trm_helpers.visuals.figure import describe, new_axes, save_figure
from trm_helpers.visuals.films import write_video

PROTOCOL = dict(protocol="quick", source="OpenVLA's with ten episodes", num_episodes=10,
                suite="libero_object", first_init_state=0, horizon=280, weights="best")


def failed(error: str) -> dict:
    return {"suite": "libero_spatial", "task_id": 2, "init_state": 3, "seed": 0,
            "placement": "benchmark", "error": error}


def results(successes: int, tasks: int = 1, episodes: int = 10) -> dict:
    rows = [dict(suite="libero_object", task_id=task, init_state=i, success=i < successes, steps=90)
            for task in range(tasks) for i in range(episodes)]
    return {**summarize_episodes(rows), "protocol": PROTOCOL, "errors": [],
            "software": {"mujoco": "3.3.2", "gl_renderer": "llvmpipe", "torch": None}}


def markdown(run):
    return write_report(run).with_suffix(".md").read_text()


def test_a_run_that_was_only_trained_says_so(trained):
    text = markdown(trained)
    assert text.startswith(f"# {trained.name}\n")
    assert "Not evaluated yet" in text and "2 epochs in" in text and "| lr | " in text
    assert "in 0.0 minutes" not in text
    assert not any(heading in text for heading in ("## Search", "## Inside", "## Films", "## When"))


def test_results_on_some_tasks_are_shown_if_there_are_no_others(trained):
    write_json(trained / "results-tasks-0.json", results(9))
    assert "9 of 10 episodes" in markdown(trained)
    write_json(trained / "results.json", results(8))
    assert "9 of 10" not in markdown(trained) and "8 of 10 episodes" in markdown(trained)


def test_results_in_another_suite_are_shown(trained):
    swap = {**results(7), "protocol": {**PROTOCOL, "suite": "libero_object_swap"}}
    write_json(trained / "robustness" / "libero_object_swap-none" / "results.json", swap)
    write_json(trained / "robustness" / "libero_object-none" / "results.json", results(9))  # plain
    text = markdown(trained)
    assert "Not evaluated yet" in text and "9 of 10" not in text
    said = "In other suites: libero_object_swap 7 of 10 (40 to 89 %)."
    assert said in text
    write_json(trained / "robustness" / "libero_object_swap-wide-none" / "results.json", swap)
    write_json(trained / "results.json", results(8))
    text = markdown(trained)
    assert "8 of 10 episodes" in text and said in text
    home = trained / "robustness" / "libero_object_swap-none"
    write_json(home / "results-tasks-0.json", {**swap, "tasks": swap["tasks"][:1]})
    tasks = tasks_in_words([swap["tasks"][0]["task_id"]])
    assert f"libero_object_swap {tasks} 7 of 10 (40 to 89 %); libero_object_swap 7 of 10" \
        in markdown(trained)


def test_results_of_other_weights_in_another_suite_are_marked(trained):
    made = {**results(7), "protocol": {**PROTOCOL, "suite": "libero_object_swap"}}
    digest = weights_digest(trained, "best")
    for sha256, mark in ((digest, "."), ("0" * 16, " with other weights or settings than the run")):
        made["protocol"]["sha256"] = sha256
        write_json(trained / "robustness" / "libero_object_swap-none" / "results.json", made)
        assert f"libero_object_swap 7 of 10 (40 to 89 %){mark}" in markdown(trained)


def test_bounds_of_other_tasks_belong_to_the_results_on_these(trained):
    write_json(trained / "results-tasks-0.json", results(9))
    write_json(trained / "bounds" / "no-op" / "results-tasks-0.json", results(1))
    assert "| no-op | 1 of 10 |" in markdown(trained)
    write_json(trained / "bounds" / "no-op" / "results.json", results(2))
    assert "| no-op | 1 of 10 |" in markdown(trained)
    write_json(trained / "results.json", results(8))
    assert "| no-op | 2 of 10 |" in markdown(trained)


def test_results_of_an_evaluation_that_was_stopped_say_so(trained):
    write_json(trained / "results.json", {**results(9), "not_run": 30})
    assert "Not finished: 30 of 40 episodes are not run; 06_eval plays them." in markdown(trained)
    write_json(trained / "results.json", {**results(9), "not_run": 0})
    assert "Not finished" not in markdown(trained)


def test_everything_in_the_folder_is_on_the_page(trained, capsys):
    write_json(trained / "results.json", results(9, tasks=2))
    write_json(trained / "bounds" / "no-op" / "results.json", results(0))
    row = {"title": "actions 0.1 s late", "successes": 6, "episodes": 10, "success_rate": 0.6,
           "wilson_low": 0.31, "wilson_high": 0.83, "gap": -0.3, "p_value": 0.25, "errors": 0}
    black = {"title": "wrist camera black", "reason": "it has none"}
    write_json(trained / "robustness.json",
               {"suite": "libero_object", "task_ids": [0, 3], "num_episodes": 10, "rows": [row],
                "not_used": [black], "failed": []})
    write_json(trained / "explain.json", {"sentences": ["The recursion has converged."]})
    write_json(trained / "search" / "trials.json", [
        {"trial": f"lr{lr:g}", "state": "complete", "seeds": [0], "final_val_loss": 0.1}
        for lr in (1e-3, 1e-4)])
    (trained / "search" / "best.yaml").write_text("lr: 0.001\n")
    for name in ("figures/06_success.png", "videos/success/a.mp4", "videos/all.mp4",
                 "videos/.all.mp4.7.part.mp4", "../outside.mp4"):
        (trained / name).parent.mkdir(parents=True, exist_ok=True)
        (trained / name).touch()
    (trained / "videos" / "link.mp4").symlink_to(trained.parent / "outside.mp4")
    assert main(["report", trained.name]) == 0
    assert capsys.readouterr().out.strip() == str(trained / "report.html")
    text = (trained / "report.md").read_text()
    for expected in (
        "18 of 20 episodes",
        "Protocol quick (OpenVLA's with ten episodes): 10 episodes per task from official init",
        "| task 1 | 9 of 10 | 90.0 | 60 to 98 | 90.0 |",
        "| all | 18 of 20 | 90.0 | 70 to 97 | 90.0 |", "| no-op | 0 of 10 | 0.0 | 0 to 28 | 90.0 |",
        "| actions 0.1 s late | 6 of 10 | 60.0 | 31 to 83 | -30 | 0.25 | 0 |",
        "- cannot matter for this policy: wrist camera black, because it has none",
        "mujoco 3.3.2; gl_renderer llvmpipe", "- The recursion has converged.",
        "no difference can be claimed, because another seed changes a loss too. "
        "Best of 2 configurations:\n\n    lr: 0.001\n\n",
        "- [videos/all.mp4](videos/all.mp4)\n- [videos/success/a.mp4]",
        "![figures/06_success.png](figures/06_success.png)",
        "libero_object, tasks 0 and 3: 10 episodes each per row. Rows of LIBERO-PRO and of",
    ):
        assert expected in text
    assert text.count(".mp4](") == 2  # neither a link out of the folder nor half of a film


def test_a_piece_that_cannot_be_read_costs_no_other(trained, tmp_path):
    write_json(trained / "results.json", results(9))
    (trained / "robustness.json").write_text('{"rows": [')
    (trained / "depth.json").write_text("[]")
    (trained / "search").mkdir()
    write_json(trained / "search" / "trials.json", [{"trial": "a", "state": "failed"}])
    (tmp_path / "secret").write_text("nobody's business")
    (trained / "search" / "best.yaml").symlink_to(tmp_path / "secret")
    text = markdown(trained)
    assert "9 of 10 episodes" in text and "2 epochs in" in text and "| lr | " in text
    for name in ("Robustness", "Depth"):
        assert (f"## {name}\n\nCould not be read from {name.lower()}.json: ValueError: "
                f"{trained / name.lower()}.json") in text
    assert "nobody's business" not in text


@pytest.mark.parametrize(("file", "content", "section"), [
    ("results.json", '{"protocol": 3}', "Success"), ("metrics.jsonl", '{"epoch": 1}\n', "Training"),
    ("depth.json", '{"rows": 3}', "Depth"), ("explain.json", '{"a": 1}', "Inside")])
def test_a_file_without_what_belongs_into_it_is_named(trained, file, content, section):
    (trained / file).write_text(content)
    text = markdown(trained)
    assert re.search(rf"## {section}\n\nCould not be read from {file}.*: (Key|Value)Error", text)
    assert all(file in line for line in text.splitlines() if line.startswith("Could not be read"))


def test_markdown_and_html_in_names_and_texts_are_escaped(trained):
    trained = trained.rename(trained.with_name("a<b>|`"))
    name = "<b>a|`b`&c](x).mp4"
    (trained / "videos").mkdir()
    (trained / "videos" / name).touch()
    write_json(trained / "bounds" / "<i>|`" / "results.json", results(0))
    write_json(trained / "results.json", {**results(9), "errors": [failed("<script> | `x`")]})
    write_json(trained / "explain.json", {"sentences": ["a <b> & [c](d)"]})
    text = markdown(trained)
    for expected in (
        r"# a\<b\>\|\`",
        r"- [videos/\<b\>a\|\`b\`\&c\](x).mp4](videos/%3Cb%3Ea%7C%60b%60%26c%5D%28x%29.mp4)",
        r"| \<i\>\|\` | 0 of 10 |", r"init state 3: \<script\> \| \`x\`", r"- a \<b\> \& \[c\](d)",
    ):
        assert expected in text


def test_episodes_with_errors_are_named_apart(trained):
    write_json(trained / "results.json", {**results(9), "errors": [failed("it hung")]})
    assert ("Excluded: 1 episode that could not be run; the first, libero_spatial task 2, "
            "init state 3: it hung") in markdown(trained)


def test_a_folder_without_a_run_is_refused():
    with pytest.raises(FileNotFoundError, match="no trained run 'nobody'"):
        write_report("nobody")


# --- report.html --------------------------------------------------------------------------------


class Page(HTMLParser):
    """A parsed page: its elements as (tag, attributes, text inside)."""

    VOID = {"meta", "img", "input"}

    def __init__(self, run):
        super().__init__()
        self.source = write_report(run).read_text()
        self.elements, self.open = [], []
        self.feed(self.source)
        assert not self.open, self.open  # every element is closed

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in self.VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):  # of a drawing
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert tag == self.open.pop()[0]

    def handle_data(self, text):
        for element in self.open:
            element[2] += text

    def all(self, tag, **attributes):
        return [(found, " ".join(text.split())) for name, found, text in self.elements
                if name == tag and attributes.items() <= found.items()]

    @property
    def text(self):
        return self.all("body")[0][1]

    @property
    def images(self):
        """Attributes of all images, without the curve of the training."""
        return [found for found, _ in self.all("img") if not found["alt"].startswith("Training: ")]


FRAMES = np.random.default_rng(0).integers(0, 256, (30, 32, 64, 3), np.uint8)
PLAYED = dict(suite="libero_object", seed=0, horizon=280, protocol="quick", weights="best",
              lifted=["alphabet_soup_1"], objects_to_move=["alphabet_soup_1"])


def play(run, outcomes, filmed=()):
    """Episodes of a run by (task, init state), with films of those in ``filmed``."""
    for (task, init_state), success in outcomes.items():
        row = {**PLAYED, "task_id": task, "init_state": init_state, "success": success,
               "steps": 90 if success else 280,
               "phases": [["reach", 60], ["grasp", 8]] * (1 if success else 9)}
        if (task, init_state) in filmed:
            row["video"] = f"{task}-{init_state}.mp4"
            write_video(run / "videos" / row["video"], FRAMES)
        append_jsonl(run / "episodes.jsonl", row)


def films(parsed):
    """Bytes of each film by the number of its episode."""
    return [base64.b64decode(found["src"].removeprefix("data:video/mp4;base64,"))
            for found, _ in parsed.all("video") if "src" in found]


def test_the_page_of_a_run_that_was_only_trained_says_how_to_make_the_rest(trained):
    parsed = Page(trained)
    for name in ("05_search", "06_eval", "07_visualize", "robustness_episodes", "depth_episodes"):
        assert name in parsed.text
    assert "Trained; not evaluated yet." in parsed.text
    assert "pick up the alphabet soup and place it in the basket" in parsed.text
    assert not parsed.all("button") and not parsed.all("video")
    (curve, _), = parsed.all("img")
    assert curve["alt"].startswith("Training: 2 epochs in ") and "in epoch 2." in curve["alt"]


def test_each_episode_is_a_tile_with_its_mark_seconds_and_film(trained):
    play(trained, {(3, 0): True, (0, 10): False, (0, 2): True}, filmed=[(0, 10), (3, 0)])
    append_jsonl(trained / "episodes.jsonl",
                 {**PLAYED, "task_id": 3, "init_state": 1, "error": "it hung"})
    write_json(trained / "results.json", results(9))
    parsed = Page(trained)
    tiles = parsed.all("button")
    assert [(found["class"], text) for found, text in tiles] == [
        ("tile success", "2✓4.5 s"), ("tile failure", "10 ▶✗14.0 s"),
        ("tile success", "0 ▶✓4.5 s"), ("tile excluded", "1–")]
    assert tiles[1][0]["aria-label"] == ("Init state 10: Failure: not solved within 14.0 s; "
                                         "the right one lifted. Film.")
    assert len({found["aria-controls"] for found, _ in tiles}) == 4
    assert films(parsed) == [(trained / "videos" / name).read_bytes()
                             for name in ("0-10.mp4", "3-0.mp4")]
    hero, = parsed.all("video", id="hero")
    assert hero[0]["data-episode"] == "2" and hero[0]["poster"].startswith("data:image/webp")
    assert "reach 3.0 s" in parsed.text and "Could not be run, excluded: it hung" in parsed.text
    assert "9 of 10 episodes succeeded (90 %)" in parsed.text
    whisker, = parsed.all("span", **{"class": "whisker"})
    assert whisker[0]["style"] == f"left:59.6%;width:{98.2 - 59.6}%"


def test_episodes_under_changes_can_be_looked_at_too(trained, tmp_path):
    play(trained, {(0, 0): True})
    for folder in (trained / "robustness" / "libero_object-brightness", tmp_path / "elsewhere"):
        (folder / "videos").mkdir(parents=True)
        play(folder, {(0, 1): False, (0, 2): False}, filmed=[(0, 1)])
    (trained / "robustness" / "link").symlink_to(tmp_path / "elsewhere")
    parsed = Page(trained)
    assert [(found["class"], text) for found, text in parsed.all("button")] == [
        ("tile success", "0✓4.5 s"), ("tile failure", "1 ▶✗14.0 s"), ("tile failure", "2✗14.0 s")]
    assert "Episodes of libero_object-brightness" in parsed.text and "of link" not in parsed.text
    assert "1 episode, of which 0 failed" in parsed.text and len(films(parsed)) == 1


def test_the_film_of_the_task_is_of_the_runs_own_episodes(trained):
    changed = trained / "robustness" / "libero_object-brightness"
    (changed / "videos").mkdir(parents=True)
    play(changed, {(0, 0): True}, filmed=[(0, 0)])
    play(trained, {(0, 0): True, (0, 1): False})
    hero, = Page(trained).all("video", id="hero")
    assert hero[0]["aria-label"].endswith(
        "init state 0. Success after 4.5 s. Not the run's own evaluation: "
        "libero_object-brightness.")
    play(trained, {(0, 2): False}, filmed=[(0, 2)])
    hero, = Page(trained).all("video", id="hero")
    assert "init state 2. Failure" in hero[0]["aria-label"]
    assert "Not the run's own" not in hero[0]["aria-label"]


def test_randomised_layouts_are_numbered_as_init_states_are(trained):
    play(trained, {(0, 0): True})
    wide = trained / "robustness" / "libero_object-wide-none"
    wide.mkdir(parents=True)
    for number in range(2):
        append_jsonl(wide / "episodes.jsonl", {
            **PLAYED, "task_id": 0, "init_state": None, "seed": WIDE_SEED + number, "steps": 90,
            "placement": "wide", "success": True})
    tiles = Page(trained).all("button")
    assert [text for _, text in tiles] == ["0✓4.5 s", "0✓4.5 s", "1✓4.5 s"]
    assert tiles[2][0]["aria-label"].startswith("Layout 1: ")


def test_films_are_announced_where_an_episode_has_one(trained):
    (trained / "videos").mkdir()
    write_video(trained / "videos" / "01_demonstration.mp4", FRAMES)
    play(trained, {(0, 0): True})
    assert "▶" not in Page(trained).text
    play(trained, {(0, 1): True}, filmed=[(0, 1)])
    assert "▶ filmed: click to play" in Page(trained).text


def test_code_in_texts_is_shown_as_code(trained):
    said = "start one with `dask scheduler`"
    play(trained, {(0, 0): True}, filmed=[(0, 0)])
    append_jsonl(trained / "episodes.jsonl", {
        **PLAYED, "task_id": 0, "init_state": 1, "success": False, "steps": 9,
        "policy_error": said, "phases": []})
    write_json(trained / "results.json", {**results(9), "errors": [failed(said)]})
    write_json(trained / "explain.json", {"sentences": [said], "moments": [MOMENT]})
    write_json(trained / "quality.json", [
        {"check": "a", "found": said, "expected": "b", "verdict": "bad"}])
    parsed = Page(trained)
    (script,) = [text for _, text in parsed.all("script")]
    assert parsed.text.count("start one with dask scheduler") == 4
    assert "`" not in parsed.text.replace(script, "") and "at four moments" not in parsed.text


def test_a_success_rate_of_other_weights_is_marked_where_it_comes_first(trained):
    write_json(trained / "results.json", results(9))
    assert "(90 %) in the simulator." in Page(trained).text
    write_json(trained / "results.json",
               {**results(9), "protocol": {**PROTOCOL, "sha256": "0" * 16}})
    assert "(90 %) in the simulator, with other weights or settings than" in Page(trained).text


MOMENT = {"title": "0.8 s, reach", "demonstrated": [0.1] * 7, "recursions": [
    {"action": [0.2] * 7, "change": 0.9, "sentence": "one"},
    {"action": [0.1] * 7, "change": 0.1, "sentence": "two"}]}


def test_the_recursion_has_a_slider_over_the_moments_of_07_visualize(trained):
    found = {"sentences": ["It has converged."], "moments": [MOMENT, {**MOMENT, "title": "end"}]}
    write_json(trained / "explain.json", found)
    colours = np.repeat(np.uint8([[[255, 0, 0], [0, 0, 255]]]), 64, axis=1).repeat(64, axis=0)
    (trained / "figures").mkdir()
    imageio.imwrite(trained / "figures" / "07_moments.png", colours)
    parsed = Page(trained)
    assert json.loads(parsed.all("div", id="recursion")[0][0]["data-moments"]) == found["moments"]
    assert parsed.all("input", type="range")[0][0]["max"] == "2" and "one" in parsed.text
    assert [text for found, text in parsed.all("button")] == ["0.8 s, reach", "end"]
    images = [imageio.imread(base64.b64decode(found["src"].partition(",")[2])).mean(axis=(0, 1))
              for found in parsed.images]
    assert [(image[[0, 2]] > 127).tolist() for image in images] == [[True, False], [False, True]]
    assert [found["alt"] for found in parsed.images] == [
        f"The view of the policy's first camera at {moment}" for moment in ("0.8 s, reach", "end")]


def test_moments_without_their_images_say_so(trained):
    write_json(trained / "explain.json", {"sentences": [], "moments": [MOMENT]})
    text = Page(trained).text
    assert "figures/07_moments.png is missing or damaged" in text
    assert "The view of the policy's first camera at this moment" not in text


@pytest.mark.parametrize("recursions", [[], *(
    [{"action": action, "change": 0, "sentence": ""}]
    for action in ([0.1] * 6, [0.1] * 6 + [float("nan")], ["</script>"] * 7))])
def test_a_moment_that_cannot_be_drawn_is_named(trained, recursions):
    moment = {**MOMENT, "recursions": recursions}
    (trained / "explain.json").write_text(json.dumps({"sentences": [], "moments": [moment]}))
    parsed = Page(trained)
    assert "Could not be read from explain.json: ValueError" in parsed.text
    assert not parsed.all("input")


def test_films_that_do_not_fit_are_stills_and_failures_come_first(trained, monkeypatch):
    play(trained, {(0, i): i != 5 for i in range(6)}, filmed=[(0, i) for i in range(6)])
    whole = Page(trained)
    film = 4 * len(films(whole)[0]) / 3
    assert len(films(whole)) == 6 and "not in this page" not in whole.text
    assert "Not finished; 06_eval plays the missing episodes." in whole.text  # no results yet
    monkeypatch.setattr(page, "_STILL_BYTES", int(film / 5))  # a film takes the place of a still
    rest = len(whole.source) - 6 * film + page._RESERVE + 6 * page._STILL_BYTES
    monkeypatch.setattr(page, "MAX_BYTES", int(rest + 1.9 * film))
    parsed = Page(trained)
    assert len(parsed.source) < page.MAX_BYTES and "4 film(s) do not fit into this" in parsed.text
    shown = [found["id"] for found, _ in parsed.all("figure") if "id" in found]
    playing = [name for name in shown if re.search(rf'id="{name}" hidden>\s*<video',
                                                   parsed.source)]
    assert playing == ["episode-0", "episode-5"]  # the film of the task, then the failure
    assert [found["alt"][:10] for found in parsed.images] == 4 * ["Last frame"]


def test_stills_of_many_films_take_at_most_half_of_the_room(trained, monkeypatch):
    play(trained, {(0, i): i != 5 for i in range(6)}, filmed=[(0, i) for i in range(6)])
    still = len(page._still(trained / "videos" / "0-0.mp4"))
    for name, value in (("_STILL_BYTES", still), ("_RESERVE", 0), ("MAX_BYTES", 0)):
        monkeypatch.setattr(page, name, value)
    without = Page(trained)
    assert "6 film(s) do not fit into this" in without.text and not without.images
    monkeypatch.setattr(page, "MAX_BYTES", len(without.source) + 5 * still)
    parsed = Page(trained)
    assert len(parsed.source) < page.MAX_BYTES and not films(parsed)
    # of the task, there and among the episodes, and of the failure
    assert ["init state 0" in found["alt"] for found in parsed.images] == [True, True, False]


def test_a_film_full_of_detail_is_shown_with_a_still_of_less_quality(trained):
    play(trained, {(0, 0): True}, filmed=[(0, 0)])
    detailed = np.random.default_rng(1).integers(0, 256, (12, 256, 512, 3), np.uint8)
    write_video(trained / "videos" / "0-0.mp4", detailed)
    parsed = Page(trained)
    assert len(films(parsed)) == 1 and "Left out" not in parsed.text
    still = page._still(trained / "videos" / "0-0.mp4")
    assert 10_000 < len(still) <= page._STILL_BYTES


def test_figures_have_alt_text_and_damaged_or_foreign_files_are_left_out(trained, tmp_path):
    axes = new_axes(2, 2)
    axes.set_title("Where it looks")
    describe(axes.figure, "Nowhere.")
    save_figure(axes.figure, trained / "figures" / "07_saliency.png")
    save_figure(axes.figure, tmp_path / "elsewhere.png")
    write_video(tmp_path / "elsewhere.mp4", FRAMES)
    (trained / "figures" / "05_search.png").symlink_to(tmp_path / "elsewhere.png")
    (trained / "figures" / "damaged.png").write_bytes(b"\x89PNG")
    play(trained, {(0, 0): True, (0, 1): True})
    for init_state, name in ((2, "../../../elsewhere.mp4"), (3, "link.mp4"), (4, 7)):
        append_jsonl(trained / "episodes.jsonl", {
            **PLAYED, "task_id": 0, "init_state": init_state, "success": True, "steps": 9,
            "video": name})
    (trained / "videos").mkdir()
    (trained / "videos" / "link.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    size = struct.pack(">II", 30_000, 30_000) + bytes([8, 2, 0, 0, 0])  # 2.7 GB once it is open
    (trained / "figures" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(9))))))
    parsed = Page(trained)
    image, = parsed.images
    assert image["alt"].startswith("Where it looks. Nowhere.") and not parsed.all("video")
    assert "Where it looks. Nowhere. Bright pixels" in parsed.text
    assert "figures/bomb.png (DecompressionBombError)" in parsed.text
    assert "figures/damaged.png (UnidentifiedImageError)" in parsed.text


def test_a_damaged_film_is_left_out_and_named(trained):
    play(trained, {(0, 0): True, (0, 1): True}, filmed=[(0, 0), (0, 1)])
    (trained / "videos" / "0-0.mp4").write_bytes(b"")
    parsed = Page(trained)
    assert len(films(parsed)) == 1 and parsed.source.count("▶</span>") == 1
    assert "0-0.mp4 (" in parsed.text and "not in this page" not in parsed.text


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_folder_in_the_place_of_a_page_is_named_before_anything_is_written(trained, name):
    (trained / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} is a folder; expected a file or nothing"):
        write_report(trained)
    assert [path.name for path in trained.glob("report.*")] == [name]


def test_nothing_from_a_run_becomes_markup_or_is_loaded(trained):
    trained = trained.rename(trained.with_name("a<script>'\""))
    evil = "</script><script>alert(1)</script><img src=http://a.b onerror='x'>\" onload=\"x"
    play(trained, {(0, 0): True})
    append_jsonl(trained / "episodes.jsonl", {
        **PLAYED, "task_id": 0, "init_state": 1, "success": False, "steps": 9,
        "policy_error": evil, "phases": [[evil, 9]]})
    write_json(trained / "bounds" / evil.replace("/", "") / "results.json", results(0))
    write_json(trained / "results.json", {**results(9), "errors": [{"error": evil}],
                                          "software": {"mujoco": evil}})
    write_json(trained / "explain.json", {"sentences": [evil]})
    write_json(trained / "quality.json", [
        {"check": evil, "found": evil, "expected": evil, "verdict": evil}])
    parsed = Page(trained)
    script, = parsed.all("script")
    assert script[0] == {} and not parsed.images and parsed.text.count("alert(1)") > 5
    policy = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    body = re.search("<script>(.*?)</script>", parsed.source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"'sha256-{digest}'" in policy
    for tag, attributes, _ in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_the_commands_make_the_same_run_again(trained):
    made = results(9)
    made["protocol"] = {**PROTOCOL, "task_ids": [0, 4]}
    write_json(trained / "results-tasks-0-4.json", made)
    lines = re.findall("^    python -m .*", markdown(trained), re.MULTILINE)
    train, evaluate = (parse(shlex.split(line)[3:]) for line in lines)
    made = load_config(trained)
    assert train.run_name == "small-again"
    assert (train.config.data, train.config.model) == (made.data, made.model)
    assert train.config.train.epochs == 2 and train.config.train.lr == made.train.lr
    assert (evaluate.run, evaluate.eval.episodes, evaluate.weights) == ("small-again", 10, "best")
    assert evaluate.task_ids == (0, 4)
    page = Page(trained)
    (code,) = [text for _, text in page.all("pre") if "make setup" in text]
    assert code.index("make setup") < code.index("bin/activate") < code.index("python -m")
    before, _, after = page.text.partition("In a checkout of the project")
    assert "trm_helpers train" not in before and "trm_helpers train" in after


@pytest.mark.parametrize(("bounds", "again"), [({}, ""), ({"bound_episodes": 0}, ""),
                                               ({"bound_episodes": 2}, "/their files")])
def test_the_commands_name_the_folder_of_demonstrations_rollouts_and_bounds(trained, bounds, again):
    trained = trained.rename(trained.with_name("a" * 100))
    settings = json.loads((trained / "config.json").read_text())
    settings["data"]["demo_dir"] = "/their files"
    settings["train"]["rollout_every"] = 1  # in rollouts as long as those of the run
    settings["eval"]["horizon"] = 17
    write_json(trained / "config.json", settings)
    write_json(trained / "results.json", {**results(9), "protocol": {**PROTOCOL, **bounds}})
    lines = re.findall("^    python -m .*", markdown(trained), re.MULTILINE)
    train, evaluate = (parse(shlex.split(line)[3:]) for line in lines)
    assert train.config.data.demo_dir == "/their files"
    assert (train.config.train.rollout_every, train.config.eval.horizon) == (1, 17)
    assert run_dir(train.run_name).name == "a" * 94 + "-again" == evaluate.run
    assert evaluate.eval.bound_episodes == bounds.get("bound_episodes", 0)
    assert evaluate.demo_dir == again  # refused without bounds
    for section in sections._inside(trained), sections._saliency(trained):
        assert section.missing.endswith("-p demo_dir '/their files'`")


@pytest.mark.parametrize(("changes", "words"), [
    ({"num_episodes": 1}, ", with 1 episode instead of 10: "),
    ({"horizon": 16}, ", with 16 steps instead of 280: "),
    ({"num_episodes": 20, "horizon": 16},
     ", with 20 episodes instead of 10 and 16 steps instead of 280: "), ({}, ": ")])
def test_episodes_or_steps_other_than_the_protocols_are_named(trained, changes, words):
    made = {**results(9), "protocol": {**PROTOCOL, **changes}}
    write_json(trained / "results.json", made)
    assert f"Protocol quick (OpenVLA's with ten episodes){words}" in markdown(trained)


def test_the_sections_that_are_there_are_linked_and_no_others(trained):
    save_figure(new_axes(2, 2).figure, trained / "figures" / "mine.png")
    parsed = Page(trained)
    links = [attributes["href"] for attributes, _ in parsed.all("a")]
    assert links == [f"#{attributes['id']}" for attributes, _ in parsed.all("h2")]
    assert {"#task", "#limits", "#settings", "#absent", "#others"} <= {*links}
    assert not {"#episodes", "#inside", "#robustness"} & {*links}
    assert parsed.all("li", id="episodes") == [({"id": "episodes"}, "Every episode. 06_eval plays "
                                                "the episodes.")]


@pytest.mark.parametrize("error", [ImportError, FileNotFoundError, RuntimeError, ValueError])
def test_a_task_whose_suite_is_not_installed_has_its_number(monkeypatch, error):
    def load_task(suite, task_id):
        raise error

    monkeypatch.setattr(sections, "load_task", load_task)
    assert sections.in_words("libero_goal", 3) == "libero_goal 3"


def test_a_run_of_four_suites_shows_a_bar_for_each_and_its_tasks_on_demand():
    run = find_run("pretrained/four-suites", to_write=True)
    page = Page(run)
    assert "Shipped with the project; not evaluated on this machine yet." in page.text
    assert "rates are in its card, pretrained/four-suites/README.md." in page.text
    assert any(text.startswith("Each of the 40 files") for _, text in page.all("details"))
    published = read_json(repo_root() / "docs/results/four-suites/four-suites-dagger.json")
    write_json(run / "results.json", published["results"])
    page = Page(run)
    [task] = [text for _, text in page.all("p") if "This one was trained on" in text]
    assert "40 tasks of the suites libero_spatial, libero_object, libero_goal, libero_10." in task
    folded = [text for _, text in page.all("details")]
    assert folded[0].startswith("The 40 tasksTask 0: pick up the black bowl between")
    assert folded[1].startswith("Each task") and "task 39" in folded[1]
    bars = sections.read_sections(run)["success"].shown["bars"]
    assert [(bar["label"], bar["counts"]) for bar in bars] == [
        ("libero_spatial", "95 of 100"), ("libero_object", "97 of 100"),
        ("libero_goal", "93 of 100"), ("libero_10", "75 of 100"), ("all", "360 of 400")]


def test_the_ends_of_an_interval_are_rounded_once(trained):
    write_json(trained / "results.json", results(36, episodes=50))
    text = Page(trained).text
    assert "(36 of 50; 58 to 83 %)" in text  # 82.53, not 82 from 82.5
