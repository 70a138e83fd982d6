import copy
import pickle

import h5py
import numpy as np
import pytest
import torch
from demo_files import data_set as make_data_set
from demo_files import grey_at, write_demo_file

from trm_helpers import software
from trm_helpers.config import Config
from trm_helpers.data import storage
from trm_helpers.data.augment import resize_images
from trm_helpers.data.dataset import LIBERODataset
from trm_helpers.demos.demo_files import DemoFileError

BOTH = ("agentview_rgb", "eye_in_hand_rgb")
MIB = 2**20


@pytest.fixture(params=["raw", "shift", None])
def files(tmp_path, request):
    """Two files of different frames, of the alignment; None is a shift file as upstream's."""
    return [
        write_demo_file(tmp_path / f"{name}_demo.hdf5", lengths, request.param, 16, seed)
        for seed, (name, lengths) in enumerate({"soup": (5, 7), "milk": (6, 5, 9)}.items())
    ]


def data_set(files, kind="ram", **settings):
    defaults = dict(image_size=16, cameras=BOTH, proprioception=True, chunk=3)
    return make_data_set(files, storage=kind, **{**defaults, **settings})


def assert_same(a, b):
    for first, second in ((a["observations"], b["observations"]), (a, b)):
        assert first.keys() == second.keys()
        for key in first.keys() - {"observations"}:
            assert first[key].dtype == second[key].dtype
            assert torch.equal(first[key], second[key]), key


def with_images(path, **dataset_options):
    """Write the frames of one demonstration anew, with these options of ``create_dataset``."""
    with h5py.File(path, "a") as file:
        name = "data/demo_1/obs/eye_in_hand_rgb"
        frames = file[name][:]
        del file[name]
        file.create_dataset(name, data=frames, **dataset_options)
    return path


# --- the same samples from wherever they lie -----------------------------------------------------
@pytest.mark.parametrize("image_size", [16, 8, 6, 24])
@pytest.mark.parametrize("sequence_length", [1, 3])
def test_mapped_files_give_the_batches_of_memory_to_the_bit(files, image_size, sequence_length):
    settings = dict(image_size=image_size, sequence_length=sequence_length)
    ram, mapped = (data_set(files, kind, **settings) for kind in ("ram", "mmap"))
    everything = torch.randperm(len(ram), generator=torch.Generator().manual_seed(0))
    assert len(mapped) == len(ram)
    assert_same(mapped.batch(everything), ram.batch(everything))
    assert mapped.describe() == ram.describe()


@pytest.mark.parametrize("augmentation", ["reference", "shift"])
def test_mapped_files_give_the_augmented_epoch_of_memory(files, augmentation):
    ram, mapped = (data_set(files, kind, augmentation=augmentation) for kind in ("ram", "mmap"))
    for one, other in zip(ram.batches(4, 1, 2), mapped.batches(4, 1, 2), strict=True):
        assert_same(one, other)


def test_split_and_limit_hold_when_mapped(files):
    for ram, mapped in zip(*(data_set(files, kind, image_size=8, max_demos_per_task=2).train_val()
                             for kind in ("ram", "mmap")), strict=True):
        assert [demo.name for demo in mapped.demos] == [demo.name for demo in ram.demos]
        assert_same(mapped.batch(range(len(ram))), ram.batch(range(len(ram))))


@pytest.mark.parametrize("kind", ["ram", "mmap"])
def test_each_frame_is_the_one_of_its_step(files, kind):
    """Greys by hand: a shift file's frame t shows time t + 1, and its last is left out."""
    data = data_set(files, kind)
    late = 1 if data.describe()["files"][0]["alignment"] == "shift" else 0
    expected = [grey_at(t + late, demo) for lengths in ((5, 7), (6, 5, 9))
                for demo, length in enumerate(lengths) for t in range(length - late)]
    found = data.batch(range(len(data)), as_bytes=True)["observations"]
    greys = found["agentview_rgb"][:, 0, 0, 0, 0]
    assert greys.dtype == torch.uint8 and greys.tolist() == expected
    with h5py.File(files[1]) as file:  # the second file's last demonstration ends the data
        stored = file["data/demo_2/obs/eye_in_hand_rgb"][9 - late - 1]
    assert np.array_equal(found["eye_in_hand_rgb"][-1, 0], stored)


@pytest.mark.parametrize("kind", ["ram", "mmap"])
def test_frames_are_resized_as_control_resizes_them(files, kind):
    with h5py.File(files[0]) as file:
        stored = torch.from_numpy(file["data/demo_0/obs/eye_in_hand_rgb"][1:2])
    found = data_set(files, kind, image_size=6).batch([1])["observations"]["eye_in_hand_rgb"]
    assert torch.equal(found[:, 0], resize_images(stored, 6).float() / 255)


@pytest.mark.parametrize("kind", ["ram", "mmap"])
def test_bytes_are_the_floats_before_scaling_and_augmentation(files, kind):
    plain, augmented = (data_set(files, kind, augmentation=a) for a in ("none", "shift"))
    floats = plain.batch(range(20))
    bytes_ = augmented.batch(range(20), as_bytes=True)
    for camera in BOTH:
        assert bytes_["observations"][camera].dtype == torch.uint8
        scaled = bytes_["observations"][camera].float() / 255
        assert torch.equal(scaled, floats["observations"][camera])
    assert torch.equal(bytes_["actions"], floats["actions"])


def test_a_user_block_before_the_hdf5_content_shifts_the_frames(tmp_path):
    plain = write_demo_file(tmp_path / "a_demo.hdf5", image_size=8)
    shifted = tmp_path / "b_demo.hdf5"
    with h5py.File(plain) as source, h5py.File(shifted, "w", userblock_size=1024) as target:
        source.copy("data", target)
    everything = range(12)
    assert_same(data_set(shifted, "mmap", image_size=8).batch(everything),
                data_set(plain, "ram", image_size=8).batch(everything))


def moved(file, path, name, target="data/demo_1"):
    """``target`` of an open file, now in the file ``path`` as ``name``."""
    with h5py.File(path, "a") as other:
        file.copy(target, other, name)
    del file[target]


def apart_in_a_link(file, folder):
    moved(file, folder / "apart.hdf5", "kept/here")
    file["data/demo_1"] = h5py.ExternalLink("apart.hdf5", "kept/here")


def all_in_a_link(file, folder):
    moved(file, folder / "apart.hdf5", "data", "data")
    file["data"] = h5py.ExternalLink("apart.hdf5", "data")


def frames_in_a_link_to_a_soft_link(file, folder):
    target = "data/demo_1/obs/agentview_rgb"
    with h5py.File(folder / "apart.hdf5", "w", userblock_size=512) as other:
        other["near"] = h5py.SoftLink("/far/frames")
    moved(file, folder / "apart.hdf5", "far/frames", target)
    file[target] = h5py.ExternalLink("apart.hdf5", "near")


def a_soft_link(file, folder):
    file.move("data/demo_1", "elsewhere")
    file["data/demo_1"] = h5py.SoftLink("/elsewhere")


@pytest.mark.parametrize("change", [apart_in_a_link, all_in_a_link, a_soft_link,
                                    frames_in_a_link_to_a_soft_link])
def test_frames_are_read_where_they_lie(tmp_path, monkeypatch, change):
    paths = [write_demo_file(tmp_path / f"{name}_demo.hdf5", lengths, image_size=16, seed=seed)
             for seed, (name, lengths) in enumerate({"soup": (5, 7), "milk": (6, 5)}.items())]
    expected = data_set(paths).batch(range(23))
    with h5py.File(paths[0], "a") as file:
        change(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in paths]
    assert_same(data_set(names, "ram").batch(range(23)), expected)
    mapped = data_set(names, "mmap")
    monkeypatch.chdir("/")  # a worker may have another working folder
    assert_same(pickle.loads(pickle.dumps(mapped)).batch(range(23)), expected)


def test_numbers_may_be_of_any_floating_type(tmp_path):
    expected = data_set(write_demo_file(tmp_path / "a_demo.hdf5", image_size=8)).batch(range(12))
    for kind in (">f8", "g"):
        def change(values, demo, kind=kind):
            return values.astype(kind)

        path = write_demo_file(tmp_path / "b_demo.hdf5", image_size=8, actions=change,
                               joint_states=change, ee_pos=change)
        assert_same(data_set(path, image_size=16).batch(range(12)), expected)


# --- memory of batches ---------------------------------------------------------------------------
@pytest.fixture
def small_too(monkeypatch):
    """Batches of a few kilobytes count as large."""
    monkeypatch.setattr(storage.BatchMemory, "SMALLEST", 1)


@pytest.mark.parametrize("kind", ["ram", "mmap"])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_a_batch_in_use_is_never_written_over(files, small_too, kind, as_bytes):
    data, fresh = data_set(files, kind), data_set(files, kind)
    order = torch.arange(len(data)).split(3)
    held = [data.batch(indices, as_bytes=as_bytes) for indices in order]
    for batch, indices in zip(held, order, strict=True):
        assert_same(batch, fresh.batch(indices, as_bytes=as_bytes))


def test_one_view_keeps_the_memory_of_its_batch(files, small_too):
    data = data_set(files)
    frame = data.batch([4, 7, 1])["observations"]["eye_in_hand_rgb"][1, 0, 2:]
    expected = frame.clone()
    for index in range(12):
        data.batch([index] * 3)
        assert torch.equal(frame, expected)


def test_memory_is_used_again_when_nobody_holds_it(small_too):
    memory = storage.BatchMemory()

    def place(shape, dtype=torch.float32):
        tensor = memory.empty(shape, dtype)
        assert tensor.shape == shape and tensor.dtype == dtype
        return tensor.data_ptr()

    first = place((8, 5))
    assert place((8, 5)) == first
    assert place((7, 5)) == first  # an epoch's last batch
    assert place((80,), torch.uint8) == first  # other types too
    assert place((2, 5)) != first  # half of it would lie idle
    held = memory.empty((8, 5), torch.float32)
    assert held.data_ptr() == first != place((8, 5))


def test_memory_that_is_kept_is_bounded(small_too):
    memory = storage.BatchMemory()
    held = [memory.empty((100 * n,), torch.uint8) for n in range(1, 20)]
    assert len({tensor.data_ptr() for tensor in held}) == 19
    assert len(memory._kept) == memory.KEPT
    assert len(pickle.loads(pickle.dumps(memory))._kept) == 0


# --- other processes -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ram", "mmap"])
def test_a_copy_through_pickle_gives_the_same(files, kind):
    data = data_set(files, kind)
    assert_same(pickle.loads(pickle.dumps(data)).batch([0, 9]), data.batch([0, 9]))
    assert_same(copy.deepcopy(data).batch([0, 9]), data.batch([0, 9]))


def test_a_pickled_mapping_holds_no_frames(tmp_path):
    path = write_demo_file(tmp_path / "soup_demo.hdf5", (5, 7), image_size=128)
    frames = 12 * 128 * 128 * 3 * 2
    assert len(pickle.dumps(data_set(path, "mmap"))) < frames / 50
    assert len(pickle.dumps(data_set(path, "ram", image_size=128))) > frames


@pytest.mark.parametrize(("files", "start"), [
    ("raw", "fork"), ("shift", "fork"), (None, "fork"), ("shift", "spawn")], indirect=["files"])
def test_workers_read_mapped_files(files, start):
    data = data_set(files, "mmap")
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=1,
                                         multiprocessing_context=start)
    batches = list(loader)
    assert sum(len(batch["mask"]) for batch in batches) == len(data)
    for number, batch in enumerate(batches):
        first = 8 * number
        assert_same(batch, data.batch(range(first, min(first + 8, len(data)))))


# --- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [dict(compression="gzip"), dict(chunks=True)])
def test_compressed_or_chunked_frames_can_not_be_mapped(files, options):
    with_images(files[1], **options)
    with pytest.raises(DemoFileError, match="milk_demo.hdf5: /data/demo_1/obs/eye_in_hand_rgb is "
                                            "compressed, chunked.*storage='ram'"):
        data_set(files, "mmap")
    assert len(data_set(files, "mmap", cameras=BOTH[:1])) == len(data_set(files, "ram"))


def test_frames_of_two_shapes_can_not_be_mapped(tmp_path):
    files = [write_demo_file(tmp_path / f"{size}_demo.hdf5", image_size=size) for size in (8, 16)]
    with pytest.raises(DemoFileError, match=r"16_demo.hdf5: frames of /data/demo_0/.*_rgb have "
                                            r"shape \(16, 16, 3\); expected \(8, 8, 3\)"):
        data_set(files, "mmap", image_size=8)
    assert len(data_set(files, "ram", image_size=8)) == 24  # resized to one shape


@pytest.fixture
def free(monkeypatch):
    """A function that sets the bytes of memory that seem free."""
    def set_free(count):
        monkeypatch.setattr(storage, "free_memory", lambda: count)
    return set_free


def test_the_memory_needed_is_printed(tmp_path, free, capsys):
    path = write_demo_file(tmp_path / "a_demo.hdf5", (64,), image_size=128)
    free(10 * MIB)
    data_set(path, "ram", image_size=64)  # 64 frames of 64 x 64 x 3 bytes, two cameras
    assert "frames need 1.5 MiB of 10.0 MiB free (ram)" in capsys.readouterr().out
    data_set(path, "mmap", image_size=64)
    assert "no memory of their own: 6.1 MiB of files are mapped" in capsys.readouterr().out


def test_too_little_memory_is_refused_before_frames_are_read(tmp_path, free, monkeypatch):
    path = write_demo_file(tmp_path / "a_demo.hdf5", (64,), image_size=64)
    monkeypatch.setattr(storage, "_fill", lambda *given: pytest.fail("frames were read"))
    free(int(1.6 * MIB))  # 1.5 MiB of frames are more than the 90 % that may be used
    with pytest.raises(MemoryError, match=r"need 1.5 MiB with storage='ram'; expected at most "
                                          r"90 % of the 1.6 MiB free.*image_size.*storage='mmap'"):
        data_set(path, "ram", image_size=64)
    monkeypatch.undo()
    free(int(1.7 * MIB))
    assert len(data_set(path, "ram", image_size=64)) == 64
    free(0)
    assert len(data_set(path, "mmap", image_size=64)) == 64


def test_a_containers_limit_counts_before_frames_are_read(tmp_path, monkeypatch):
    """128 frames need 1.5 MiB; the control group leaves 1 MiB, whatever the machine has."""
    path = write_demo_file(tmp_path / "a_demo.hdf5", (64,), image_size=64)
    (tmp_path / "memory.max").write_text(str(5 * MIB))
    (tmp_path / "memory.current").write_text(str(4 * MIB))
    (tmp_path / "memory.stat").write_text("anon 1\n")
    own = tmp_path / "own"
    own.write_text("0::/\n")
    monkeypatch.setattr(storage, "free_memory", lambda: software.free_memory(tmp_path, own))
    monkeypatch.setattr(storage, "_fill", lambda *given: pytest.fail("frames were read"))
    with pytest.raises(MemoryError, match="need 1.5 MiB .* of the 1.0 MiB free.*storage='mmap'"):
        data_set(path, "ram", image_size=64)


def test_a_gpu_that_is_not_there_is_refused(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="storage='gpu' needs a CUDA GPU.*Expected 'ram'"):
        data_set(files, "gpu")
    with pytest.raises(ValueError, match="storage='disk'.*'ram', 'mmap', 'gpu'"):
        data_set(files, "disk")


def test_too_little_memory_on_the_gpu_is_refused(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 1024, 80 * 2**30))
    with pytest.raises(MemoryError, match="storage='gpu'.*storage='ram' or 'mmap'"):
        data_set(files, "gpu")


@pytest.mark.parametrize(("kind", "device", "expected"), [
    ("gpu", "cuda:1", "cuda:1"), ("gpu", "cpu", "cuda"), ("ram", "cuda:1", "cpu")])
def test_frames_are_kept_on_the_gpu_that_trains(monkeypatch, kind, device, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info",
                        lambda device: asked.append(device) or (80 * 2**30, 80 * 2**30))
    assert storage._reserve(1024, kind, device) == torch.device(expected)
    assert asked == [torch.device(expected)] * (kind == "gpu")


@pytest.mark.parametrize(("device", "free", "expected"), [
    ("cpu", 80 * 2**30, "ram"), ("cuda", 2 * 33792, "gpu"), ("cuda", 2 * 33792 - 2, "ram")])
def test_auto_keeps_frames_on_the_training_gpu_if_they_take_at_most_half_of_it(
        tmp_path, monkeypatch, device, free, expected):
    """22 steps of two cameras at 16 pixels: 33,792 bytes."""
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    monkeypatch.setattr(storage, "_reserve", lambda needed, kind, _: (
        asked.append((needed, kind)) or torch.device("cpu")))
    file = write_demo_file(tmp_path / "soup_demo.hdf5", (10, 12), "raw", 16)
    config = Config().replace(storage="auto", image_size=36, cameras=BOTH)
    LIBERODataset(file, image_size=16, config=config, device=device)
    assert asked == [(33792, expected)]


@pytest.mark.gpu
def test_frames_on_the_gpu_are_those_of_memory(files):
    ram, gpu = data_set(files, "ram", image_size=8), data_set(files, "gpu", image_size=8)
    assert gpu._steps.frames.images["agentview_rgb"].device.type == "cuda"
    everything = range(len(ram))
    assert_same(gpu.batch(everything, as_bytes=True), ram.batch(everything, as_bytes=True))
    settings = dict(seed=0, epoch=0, device="cuda")
    for one, other in zip(ram.batches(8, **settings), gpu.batches(8, **settings), strict=True):
        assert other["observations"]["agentview_rgb"].device.type == "cuda"
        assert_same(one, other)
