import pytest
import torch
import torch.nn.functional as F

from trm_helpers.data.augment import augment_images, resize_images


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- resizing ------------------------------------------------------------------------------------
def test_resize_takes_the_mean_of_the_covered_pixels():
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[0, :2, :2, 0] = torch.tensor([[10, 20], [30, 41]])  # mean 25.25
    image[0, 2:, 2:, 1] = torch.tensor([[0, 0], [0, 255]])  # mean 63.75
    resized = resize_images(image, 2)
    assert resized.shape == (1, 2, 2, 3) and resized.dtype == torch.uint8
    expected = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    expected[0, 0, 0, 0], expected[0, 1, 1, 1] = 25, 64
    assert torch.equal(resized, expected)


@pytest.mark.parametrize("size", [48, 24, 16, 8, 6, 4, 5])
def test_resizing_by_whole_pixels_is_pytorchs_to_the_bit(size):
    images = torch.randint(256, (4, 48, 48, 3), generator=seeded(), dtype=torch.uint8)
    images[0] = 255
    means = F.interpolate(images.permute(0, 3, 1, 2).float(), size=(size, size), mode="area")
    assert torch.equal(resize_images(images, size), means.round().byte().permute(0, 2, 3, 1))


def test_half_a_grey_is_rounded_to_even():
    images = torch.tensor([[0, 1], [0, 1]], dtype=torch.uint8)  # mean 0.5; then 1.5
    images = torch.stack([images, images + 1]).unsqueeze(-1).expand(2, 2, 2, 3)
    assert resize_images(images, 1)[:, 0, 0, 0].tolist() == [0, 2]
    wide = torch.zeros(1, 2, 4, 3, dtype=torch.uint8)
    assert resize_images(wide, 1).shape == (1, 1, 1, 3)


def test_resize_is_the_identity_at_the_same_size_and_square_from_any_shape():
    images = torch.randint(0, 256, (2, 8, 8, 3), generator=seeded(), dtype=torch.uint8)
    assert torch.equal(resize_images(images, 8), images)
    assert resize_images(images[:, :6], 4).shape == (2, 4, 4, 3)


def test_resizing_one_frame_equals_resizing_many():
    images = torch.randint(0, 256, (5, 128, 128, 3), generator=seeded(), dtype=torch.uint8)
    alone = torch.cat([resize_images(image[None], 84) for image in images])
    assert torch.equal(resize_images(images, 84), alone)


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (torch.zeros(1, 4, 4, 3), 2, r"torch.float32; expected \(N, H, W, 3\) and torch.uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), 2, r"shape \(4, 4, 3\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2, r"shape \(1, 3, 4, 4\)"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 0, "size=0"),
    ],
)
def test_resize_refuses(images, size, message):
    with pytest.raises(ValueError, match=message):
        resize_images(images, size)


# --- augmentation --------------------------------------------------------------------------------
def gradient(batch, size):
    """Each pixel of the first two channels holds its row and column, in units of the size."""
    image = torch.full((size, size, 3), 0.5)
    image[..., 0] = ((torch.arange(size) + 0.5) / size)[:, None]
    image[..., 1] = (torch.arange(size) + 0.5) / size
    return image.expand(batch, size, size, 3).clone()


def test_none_returns_the_images():
    images = torch.rand(3, 8, 8, 3, generator=seeded())
    assert augment_images(images, "none", seeded()) is images


@pytest.mark.parametrize("mode", ["reference", "shift"])
def test_brightness_is_drawn_per_sample_with_probability_one_half(mode):
    """A constant image shows the factor alone, for crops and shifts keep constants."""
    images = torch.full((4000, 4, 4, 3), 0.5)
    out = augment_images(images, mode, seeded())
    factor = 2 * out[:, 0, 0, 0]
    assert torch.allclose(out, out[:, :1, :1, :1].expand_as(out), atol=1e-6)
    changed = (factor - 1).abs() > 1e-6
    assert abs(changed.float().mean() - 0.5) < 4 * (0.25 / 4000) ** 0.5
    drawn = factor[changed]
    assert drawn.min() >= 0.8 - 1e-6 and drawn.max() <= 1.2 + 1e-6
    assert drawn.min() < 0.81 and drawn.max() > 1.19 and abs(drawn.mean() - 1) < 0.01
    assert drawn.round(decimals=5).unique().numel() > 1000  # not one draw for the batch


def test_brightness_is_clamped():
    out = augment_images(torch.full((200, 4, 4, 3), 0.95), "shift", seeded())
    assert out.max() == 1.0 and (out == 1.0).any() and out.min() >= 0.95 * 0.8 - 1e-6


def test_colours_are_turned_about_grey_in_half_of_the_samples():
    colour = torch.tensor([0.6, 0.5, 0.4])
    images = colour.expand(4000, 2, 2, 3).clone()
    out = augment_images(images, "colour", seeded())
    assert torch.allclose(out, out[:, :1, :1].expand_as(out), atol=1e-6)
    pixel = out[:, 0, 0]
    grey = pixel.mean(1, keepdim=True)
    chroma = (pixel - grey) / (2 * grey)  # without the brightness
    before = colour - 0.5
    stretch = chroma.norm(dim=1) / before.norm()
    turned = (chroma - before).norm(dim=1) > 1e-5
    assert abs(turned.float().mean() - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert 0.5 - 1e-4 < stretch[turned].min() < 0.55 and 1.45 < stretch[turned].max() < 1.5 + 1e-4
    cosine = (chroma @ before) / chroma.norm(dim=1) / before.norm()
    assert 0.5 - 1e-4 < cosine[turned].min() < 0.52  # up to 60 degrees
    way = torch.linalg.cross(before.expand_as(chroma), chroma).sum(1)[turned].sign()
    assert abs(way.mean()) < 0.1  # either way
    plain = augment_images(torch.full((200, 2, 2, 3), 0.5), "colour", seeded())
    assert torch.allclose(plain, plain[..., :1].expand_as(plain), atol=1e-6)  # grey stays grey


def position(out):
    """Undo the brightness with the constant third channel: row and column in [0, 1]."""
    return out[..., :2] / (2 * out[..., 2:])


def test_crop_enlarges_nine_tenths_with_probability_three_tenths():
    size, count = 20, 3000
    images = 0.5 * gradient(count, size)  # halved, so that no brightness is clamped
    out = position(augment_images(images, "reference", seeded()))
    # between two pixel centres well inside, positions advance by the crop's share of the side
    step_y = (out[:, 15, 10, 0] - out[:, 5, 10, 0]) * size / 10
    step_x = (out[:, 10, 15, 1] - out[:, 10, 5, 1]) * size / 10
    cropped = (step_y - 1).abs() > 1e-3
    assert torch.allclose(step_y[cropped], torch.tensor(0.9), atol=1e-4)
    assert torch.allclose(step_x[cropped], torch.tensor(0.9), atol=1e-4)
    assert torch.allclose(step_x[~cropped], torch.tensor(1.0), atol=1e-4)
    assert abs(cropped.float().mean() - 0.3) < 4 * (0.21 / count) ** 0.5
    # the centre of the crop moves over +-0.05 of the side, both ways on their own
    centre = out[cropped, 9:11, 9:11].mean(dim=(1, 2)) - 0.5
    assert centre.abs().max() <= 0.05 + 1e-4
    assert (centre.amin(0) < -0.045).all() and (centre.amax(0) > 0.045).all()
    assert abs(torch.corrcoef(centre.T)[0, 1]) < 0.15


def test_shift_moves_whole_pixels_and_repeats_the_edge():
    size, count = 32, 2000  # up to 32 * 4 / 64 = 2 pixels
    images = 0.5 * gradient(count, size)
    out = position(augment_images(images, "shift", seeded())) * size - 0.5  # pixel read from
    move = out[:, 16, 16] - 16
    assert torch.allclose(move, move.round(), atol=1e-3)
    for axis in range(2):
        values, counts = move[:, axis].round().unique(return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert (counts - count / 5).abs().max() < 4 * (count * 0.2 * 0.8) ** 0.5
    rows = (torch.arange(size) + move[:, :1]).clamp(0, size - 1)
    columns = (torch.arange(size) + move[:, 1:]).clamp(0, size - 1)
    assert torch.allclose(out[..., 0], rows[:, :, None].expand(-1, -1, size), atol=1e-3)
    assert torch.allclose(out[..., 1], columns[:, None, :].expand(-1, size, -1), atol=1e-3)


@pytest.mark.parametrize(("size", "furthest"), [(8, 1), (24, 2), (64, 4), (84, 5), (128, 8)])
def test_a_shift_goes_as_far_as_a_sixteenth_of_the_side(size, furthest):
    image = torch.zeros(400, size, 1, 3)
    image[:, size // 2] = 0.5
    row = augment_images(image, "shift", seeded())[:, :, 0, 0].argmax(1) - size // 2
    assert (row.min(), row.max()) == (-furthest, furthest)


def test_cutout_covers_a_rectangle_of_half_of_the_samples_with_one_colour():
    size, count = 32, 2000
    images = 0.5 * gradient(count, size)
    plain = augment_images(images, "shift", seeded())
    out = augment_images(images, "cutout", seeded())
    covered = (out != plain).all(-1)  # (B, H, W)
    some = covered.any(dim=(1, 2))
    assert abs(some.float().mean() - 0.5) < 0.05
    rows, columns = covered.any(2), covered.any(1)
    assert torch.equal(covered, rows.unsqueeze(2) & columns.unsqueeze(1))
    for lines in (rows, columns):  # one stretch of at most 0.6 of the side; at the edge it is cut
        assert (lines.diff(dim=1).sum(1) <= 2).all() and lines.sum(1).max() <= 0.6 * size + 1
        inner = some & ~lines[:, 0] & ~lines[:, -1]
        assert lines[inner].sum(1).max() >= 0.6 * size - 1
        assert lines[inner].sum(1).min() >= 0.2 * size - 1 and inner.sum() > 100
    colours = torch.stack([image[mask].unique(dim=0) for image, mask in
                           zip(out[some], covered[some], strict=True)])
    assert colours.shape[1:] == (1, 3) and colours.std(0).min() > 0.2


@pytest.mark.parametrize("mode", ["reference", "shift", "cutout"])
def test_frames_of_a_sequence_share_their_draw_and_equal_single_frames(mode):
    images = torch.rand(16, 16, 16, 3, generator=seeded())
    sequence = torch.stack([images, images.flip(0), images], dim=1)  # (B, T, H, W, 3)
    out = augment_images(sequence, mode, seeded(1))
    assert out.shape == sequence.shape
    assert torch.allclose(out[:, 0], out[:, 2])
    assert torch.allclose(out[:, 0], augment_images(images, mode, seeded(1)), atol=1e-6)
    assert torch.allclose(out[:, 1], augment_images(images.flip(0), mode, seeded(1)), atol=1e-6)


@pytest.mark.parametrize("mode", ["reference", "shift"])
def test_the_generator_decides_everything_and_advances(mode):
    images = torch.rand(8, 16, 16, 3, generator=seeded())
    untouched = images.clone()
    generator = seeded(3)
    first, second = (augment_images(images, mode, generator) for _ in range(2))
    assert torch.equal(first, augment_images(images, mode, seeded(3)))
    assert not torch.equal(first, second)  # two cameras get draws of their own
    assert torch.equal(images, untouched)


def test_images_need_not_be_square():
    images = torch.rand(4, 8, 12, 3, generator=seeded())
    for mode in ("reference", "shift"):
        assert augment_images(images, mode, seeded()).shape == (4, 8, 12, 3)


@pytest.mark.parametrize(
    ("images", "mode", "message"),
    [
        (torch.rand(1, 4, 4, 3), "rotate", "mode=.rotate..*'none', 'brightness', 'colour'"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "shift", "torch.uint8; expected"),
        (torch.rand(4, 4, 3), "shift", r"shape \(4, 4, 3\)"),
        (torch.rand(1, 3, 4, 4), "shift", r"shape \(1, 3, 4, 4\)"),
    ],
)
def test_augment_refuses(images, mode, message):
    with pytest.raises(ValueError, match=message):
        augment_images(images, mode, seeded())
