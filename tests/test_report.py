"""The page on a run shows the contents of its folder."""

import re

import pytest

from trm_helpers.__main__ import main
from trm_helpers.files import write_json
from trm_helpers.report import write_report
from trm_helpers.stats import summarize_episodes

PROTOCOL = dict(protocol="quick", source="openvla with ten episodes", num_episodes=10,
                first_init_state=0, horizon=280, weights="best")


def results(successes: int, tasks: int = 1) -> dict:
    rows = [dict(suite="libero_object", task_id=task, init_state=i, success=i < successes, steps=90)
            for task in range(tasks) for i in range(10)]
    return {**summarize_episodes(rows), "protocol": PROTOCOL, "errors": [],
            "software": {"mujoco": "3.3.2", "gl_renderer": "llvmpipe", "torch": None}}


def test_a_run_that_was_only_trained_says_so(trained):
    text = write_report(trained).read_text()
    assert text.startswith(f"# {trained.name}\n")
    assert "Not evaluated yet" in text and "2 epochs in" in text and "| lr | " in text
    assert not any(heading in text for heading in ("## Search", "## Inside", "## Films", "## When"))


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
    assert capsys.readouterr().out.strip() == str(trained / "report.md")
    text = (trained / "report.md").read_text()
    for expected in (
        "18 of 20 episodes",
        "Protocol quick (openvla with ten episodes): 10 episodes per task from official init",
        "| libero_object 1 | 9 of 10 | 90.0 | 60 to 98 | 90.0 |",
        "| all | 18 of 20 | 90.0 | 70 to 97 | 90.0 |", "| no-op | 0 of 10 | 0.0 | 0 to 28 | 90.0 |",
        "| actions 0.1 s late | 6 of 10 | 60.0 | 31 to 83 | -30 | 0.25 | 0 |",
        "- not used by this policy: wrist camera black: it has none",
        "mujoco 3.3.2; gl_renderer llvmpipe", "- The recursion has converged.",
        "no significant difference can be claimed, since another seed changes a loss too. "
        "Best of 2 configurations:\n\n    lr: 0.001\n\n",
        "- [videos/all.mp4](videos/all.mp4)\n- [videos/success/a.mp4]",
        "![figures/06_success.png](figures/06_success.png)",
        "libero_object, task 0, 3: 10 episodes of each per row. Perturbed episodes start from",
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
    text = write_report(trained).read_text()
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
    assert re.search(rf"## {section}\n\nCould not be read from {file}.*: KeyError",
                     write_report(trained).read_text())


def test_markdown_and_html_in_names_and_texts_are_escaped(trained):
    trained = trained.rename(trained.with_name("a<b>|`"))
    name = "<b>a|`b`&c](x).mp4"
    (trained / "videos").mkdir()
    (trained / "videos" / name).touch()
    write_json(trained / "bounds" / "<i>|`" / "results.json", results(0))
    write_json(trained / "results.json", {**results(9), "errors": [{"error": "<script> | `x`"}]})
    write_json(trained / "explain.json", {"sentences": ["a <b> & [c](d)"]})
    text = write_report(trained).read_text()
    for expected in (
        r"# a\<b\>\|\`",
        r"- [videos/\<b\>a\|\`b\`\&c\](x).mp4](videos/%3Cb%3Ea%7C%60b%60%26c%5D%28x%29.mp4)",
        r"| \<i\>\|\` | 0 of 10 |", r"the first: \<script\> \| \`x\`", r"- a \<b\> \& \[c\](d)",
    ):
        assert expected in text


def test_episodes_with_errors_are_named_apart(trained):
    write_json(trained / "results.json", {**results(9), "errors": [{"error": "it hung"}]})
    assert "1 episode(s) could not be run and are excluded; the first: it hung" \
        in write_report(trained).read_text()


def test_a_folder_without_a_run_is_refused():
    with pytest.raises(FileNotFoundError, match="no trained run 'nobody'"):
        write_report("nobody")
