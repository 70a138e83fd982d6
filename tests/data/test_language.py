import importlib.util
import json
import runpy

import h5py
import numpy as np
import pytest
import torch
from demo_files import data_set, write_demo_file

from trm_helpers import schema
from trm_helpers.config import ModelConfig, from_flat
from trm_helpers.data import language
from trm_helpers.data.dataset import LIBERODataset
from trm_helpers.data.language import embed_instruction
from trm_helpers.demos.demo_files import normalize_instruction
from trm_helpers.paths import repo_root
from trm_helpers.policy.model import TRMPolicy
from trm_helpers.sim.env import Observation, load_task

STOVE = "turn on the stove"
needs_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sentence_transformers", language.MODEL_PACKAGE))),
    reason="the extra 'language' is not installed",
)


def embedding_table():
    return dict(language._table()[0])


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(language, "MODEL_PACKAGE", "no_such_package")


# --- the table -----------------------------------------------------------------------------------
def test_table_holds_unit_vectors_that_differ():
    table = embedding_table()
    embeddings = np.stack(list(table.values()))
    assert embeddings.shape == (175, schema.LANGUAGE_DIM) and embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    likeness = embeddings @ embeddings.T - 2 * np.eye(len(table))
    assert likeness.max() < 0.9995  # "stack the right bowl on the left bowl ...", and reversed


def test_table_puts_paraphrases_together():
    def likeness(a, b):
        return float(embed_instruction(a) @ embed_instruction(b))

    place = likeness("pick up the ketchup and put it in the basket",
                     "pick up the ketchup and place it in the basket")
    assert place > 0.99
    assert place > likeness("pick up the ketchup and put it in the basket",
                            "pick up the butter and put it in the basket")
    assert likeness(STOVE, "pick up the milk and place it in the basket") < 0.4


def test_table_has_every_task_of_every_suite():
    """112 instructions of 130 tasks, 29 of them worded otherwise in their BDDL source, and 62 more.

    Those are LIBERO-PRO's own; the first is none at all.
    """
    script = runpy.run_path(str(repo_root() / "benchmarks/embed_instructions.py"))
    instructions, aliases = script["libero_instructions"]()
    standard = {normalize_instruction(load_task(suite, task_id).language)
                for suite in schema.HORIZONS for task_id in range(schema.SUITES[suite])}
    assert len(standard) == 112 and len(aliases) == 29
    assert list(embedding_table()) == ["", *instructions] and len(instructions) == 112 + 62
    for wording, instruction in aliases.items():
        assert np.array_equal(embed_instruction(wording), embedding_table()[instruction])


def test_every_task_is_told_in_words_of_the_table(no_model):
    for suite, count in schema.SUITES.items():
        for task_id in range(count):
            assert embed_instruction(load_task(suite, task_id).language).any()


@needs_model
def test_table_is_what_the_model_computes():
    table = embedding_table()
    computed = language.compute_embeddings(list(table))
    assert np.allclose(computed, np.stack(list(table.values())), atol=1e-5)


# --- one instruction -----------------------------------------------------------------------------
@pytest.mark.parametrize("written", [
    STOVE, "Turn on the stove", f'"{STOVE}"', " turn  on the\nstove ", "Turn on the stove.",
])
def test_every_way_of_writing_an_instruction_means_it(written, no_model):
    assert normalize_instruction(written) == STOVE
    assert np.array_equal(embed_instruction(written), embedding_table()[STOVE])


def test_wordings_of_upstream_files_mean_the_task_of_the_benchmark(no_model):
    found = embed_instruction(
        "Pick the akita black bowl on the cookies box and place it on the plate")
    expected = embedding_table()[
        "pick up the black bowl on the cookie box and place it on the plate"]
    assert np.array_equal(found, expected)


def test_an_embedding_is_the_callers_own():
    embed_instruction(STOVE)[:] = 0
    assert np.linalg.norm(embed_instruction(STOVE)) == pytest.approx(1)


def test_an_instruction_without_table_and_model_is_refused(no_model):
    message = "'juggle the bowls' is not one of the 175.*no_such_package.*pip install"
    with pytest.raises(ValueError, match=message):
        embed_instruction("juggle the bowls")


def test_no_words_are_unlike_any_instruction(no_model):
    nothing = embed_instruction("")
    assert np.linalg.norm(nothing) == pytest.approx(1)
    assert np.array_equal(nothing, embed_instruction(' "" '))
    assert max(nothing @ known for text, known in embedding_table().items() if text) < 0.2


def test_a_new_instruction_is_computed_once(monkeypatch):
    asked = []

    def compute(texts):
        asked.extend(texts)
        return np.ones((len(texts), schema.LANGUAGE_DIM), np.float32)

    monkeypatch.setattr(language, "compute_embeddings", compute)
    for _ in range(2):
        assert embed_instruction("Dance with the bowls")[0] == 1
    assert asked == ["dance with the bowls"]


@needs_model
def test_a_new_instruction_is_embedded_near_its_paraphrase():
    new = embed_instruction("switch the stove on")
    likeness = {text: float(new @ known) for text, known in embedding_table().items()}
    assert sorted(likeness, key=likeness.get)[-2:] == [STOVE, "switch on the stove"]
    assert likeness[STOVE] > 0.8


def test_a_missing_table_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "TABLE", tmp_path / "task_embeddings.npz")
    language._table.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"embeddings.npz does not exist; .*install it"):
        embedding_table()


# --- conditioning --------------------------------------------------------------------------------
def told(path, instruction):
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": instruction})
    return path


@pytest.fixture
def files(tmp_path):
    """A file as ours and one as upstream's: quoted, in pieces, worded as the BDDL source."""
    ours = write_demo_file(tmp_path / "a_demo.hdf5", (5, 6), image_size=36)
    upstream = write_demo_file(tmp_path / "b_demo.hdf5", (5, 6), None, image_size=36)
    quoted = '"Pick the milk and place it in the basket"'
    return [told(ours, STOVE), told(upstream, list(quoted))]


def test_samples_hold_the_embedding_of_their_file(files, no_model):
    data = data_set(files, conditioning="language", sequence_length=2)
    found = data.batch([0, len(data) - 1])["observations"]["language"]
    assert found.shape == (2, 2, schema.LANGUAGE_DIM) and found.dtype == torch.float32
    table = embedding_table()
    for row, text in zip(found, (STOVE, "pick up the milk and place it in the basket"),
                         strict=True):
        assert np.array_equal(row, [table[text]] * 2)
    assert data[0]["observations"]["language"].shape == (2, schema.LANGUAGE_DIM)


def test_a_file_without_instruction_is_named(files, no_model):
    for text, message in (("", "is empty"), ("juggle", "is not one of the 175")):
        told(files[1], text)
        with pytest.raises(ValueError, match=f"b_demo.hdf5: instruction '{text}' {message}"):
            data_set(files, conditioning="language")


@pytest.mark.parametrize(("conditioning", "added"), [
    ("none", None), ("task_id", "task_id"), ("language", "language"),
])
def test_training_and_evaluation_are_told_the_same(files, conditioning, added):
    """What the policy is given for an observation of the simulator is what it was trained on."""
    config = from_flat("tiny", suite="libero_goal", task_ids=(7,), conditioning=conditioning,
                       image_size=36, hidden_dim=16, cameras=("agentview_rgb",))
    train, _ = LIBERODataset.from_config({7: files[0]}, config)
    sample = train[0]["observations"]
    assert {"task_id", "language"} & sample.keys() == ({added} if added else set())
    seen = Observation({
        "agentview_rgb": np.zeros((36, 36, 3), np.uint8), "joint_states": np.zeros(7),
        "gripper_states": np.zeros(2), "ee_pos": np.zeros(3), "task_id": 7, "language": STOVE,
    })
    prepared = TRMPolicy(config.model, train.normalizer, train.proprio_stats).prepare(seen)
    assert prepared.keys() == sample.keys()
    if added:
        assert torch.equal(prepared[added], sample[added])


def test_the_instruction_changes_the_action(files):
    config = ModelConfig(hidden_dim=16, num_recursions=1, image_size=36, conditioning="language")
    torch.manual_seed(0)
    policy = TRMPolicy(config).eval()
    seen = {"agentview_rgb": np.zeros((36, 36, 3), np.uint8)}
    actions = []
    for text in (STOVE, "Turn on the stove", "close the microwave"):
        policy.reset()
        actions.append(policy.act({**seen, "language": text}))
    assert np.array_equal(actions[0], actions[1])
    assert not np.allclose(actions[0], actions[2])
    with pytest.raises(ValueError, match="'language' is missing"):
        policy.reset()
        policy.act(seen)
