"Pictures arrive whole and the right way round; a patch's place is known."

import pickle

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torch.testing import assert_close
from tower_checks import (
    check_copy,
    check_depth_0,
    check_gradients,
    check_order,
    make,
    mean_peak,
    no_peak,
)

from speechimg import speech
from speechimg.core import Config, InputError
from speechimg.image import ImageTower, Pixels, square

# ------------------------------------------------------------------------------------------------
# square


def cropped(picture, size):
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size))


def stretched(picture, size):
    return picture.resize((size, size))


def mirrored(picture, size):
    return square(picture, size).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def blackened(picture, size):
    canvas = Image.new("RGB", (max(picture.size),) * 2)
    canvas.paste(
        picture, ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2)
    )
    return canvas.resize((size, size))


def check_square(way):
    """Four coloured corner spots of wide, tall and square pictures: all there, in their corners, as
    wide as high, on white.
    """
    for width, height in ((200, 100), (100, 200), (160, 160)):
        picture = Image.new("RGB", (width, height), "gray")
        draw, spot = ImageDraw.Draw(picture), 20
        corners = {
            "red": (0, 0),
            "lime": (width - spot, 0),
            "blue": (0, height - spot),
            "yellow": (width - spot, height - spot),
        }
        for colour, (x, y) in corners.items():
            draw.rectangle((x, y, x + spot - 1, y + spot - 1), fill=colour)
        out = np.asarray(way(picture, 96)).astype(int)
        assert out.shape == (96, 96, 3)
        centres = {}
        for colour, target in {
            "red": (255, 0, 0),
            "lime": (0, 255, 0),
            "blue": (0, 0, 255),
            "yellow": (255, 255, 0),
        }.items():
            ys, xs = np.nonzero((np.abs(out - target) < 60).all(-1))
            assert len(ys), f"{colour} is gone"
            assert abs((np.ptp(xs) + 1) - (np.ptp(ys) + 1)) <= 2, f"{colour} is stretched"
            centres[colour] = xs.mean(), ys.mean()
        assert (
            centres["red"][0] < centres["lime"][0] and centres["blue"][0] < centres["yellow"][0]
        ), "left is not left"
        assert (
            centres["red"][1] < centres["blue"][1] and centres["lime"][1] < centres["yellow"][1]
        ), "top is not top"
        if width != height:
            assert (out[:10] if width > height else out[:, :10]).min() > 250, (
                "the margin is not white"
            )


def test_square():
    check_square(square)


@pytest.mark.parametrize("mutant", [cropped, stretched, mirrored, blackened])
def test_square_mutants(mutant):
    with pytest.raises(AssertionError):
        check_square(mutant)


@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"]),
)
def test_pixels_of_any_picture(width, height, mode):
    pixels = Pixels(32)(Image.new(mode, (width, height)))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous


def test_pixels_order_of_axes():
    picture = Image.new("RGB", (96, 96))
    picture.putpixel((70, 5), (10, 20, 30))  # PIL says (x, y)
    assert Pixels()(picture)[:, 5, 70].tolist() == [10, 20, 30]


@pytest.mark.parametrize("size", [0, -16, 100])
def test_pixels_bad_size(size):
    with pytest.raises(InputError, match="multiple of 16"):
        Pixels(size)


def test_pixels_travel():
    assert pickle.loads(pickle.dumps(Pixels(64))).params == Pixels(64).params != Pixels(96).params


# ------------------------------------------------------------------------------------------------
# the tower


def check_grid(patches_of):
    "A spot in each patch of a picture is noticed most by the token of that place, row by row."
    for row in range(6):
        for column in range(6):
            plain = torch.zeros(1, 3, 96, 96)
            spot = plain.clone()
            spot[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
            change = (patches_of(spot) - patches_of(plain)).abs().sum(-1)[0]
            assert change.argmax() == 6 * row + column


def stem_patches(order):
    torch.manual_seed(0)
    tower = ImageTower(Config(width=16, heads=2)).eval()

    def patches(x):
        with torch.no_grad():
            return rearrange(tower.stem(x), f"b w y x -> b {order} w")

    return patches


def test_grid_is_row_by_row():
    check_grid(stem_patches("(y x)"))
    with pytest.raises(AssertionError):
        check_grid(stem_patches("(x y)"))


def test_codes_belong_to_rows_and_columns():
    "Without content and attention, a patch token is the norm of its row's plus its column's code."
    tower = make(ImageTower, image_depth=0)
    tower.norm_tokens.weight.data.zero_()
    tower.norm_tokens.bias.data.zero_()
    tokens = tower(torch.rand(1, 3, 96, 96)).tokens[0, 1:]
    for row in range(6):
        for column in range(6):
            assert_close(
                tokens[6 * row + column], tower.reader.norm(tower.rows[row] + tower.columns[column])
            )


def test_codes_are_as_loud_as_tokens():
    tower = ImageTower(Config())
    assert 0.9 < tower.rows.std() < 1.1 and 0.9 < tower.columns.std() < 1.1


class Means(nn.Module):
    "A stem that only averages: a mirrored picture gives exactly the mirrored grid."

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Conv2d(3, width, 16, stride=16)
        nn.init.constant_(self.mix.weight, 1 / 256)
        self.mix.weight.data *= torch.randn(width, 3, 1, 1)

    def forward(self, x):
        return self.mix(x)


@pytest.mark.parametrize("size", [1.0, 0.02, 0.0])
def test_place_is_seen(size):
    tower = make(ImageTower)
    tower.stem = Means(16)
    tower.rows.data *= size
    tower.columns.data *= size
    x = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    x[:, :, :, :48] = x[:, :, :, :48] * 0.3  # dark at the left
    if size == 1:
        check_order(tower, x, x.flip(3))
    else:
        with pytest.raises(AssertionError):
            check_order(tower, x, x.flip(3))


def check_small_thing(tower):
    "[CLS] of a fresh tower notices one patch of 36 on a plain background."
    plain = torch.full((1, 3, 96, 96), 0.5)
    spot = plain.clone()
    spot[..., 32:48, 64:80] = 1.0
    with torch.no_grad():
        before, after = (tower(x).tokens[0, 0] for x in (plain, spot))
    assert (after - before).norm() > 0.4 * before.norm(), "one patch of 36 fades"


@pytest.mark.parametrize("mutant", [None, mean_peak, no_peak])
def test_small_thing_is_seen(mutant, monkeypatch):
    if mutant is None:
        return check_small_thing(make(ImageTower))
    monkeypatch.setattr(speech, "peak", mutant)
    with pytest.raises(AssertionError):
        check_small_thing(make(ImageTower))


def check_alone(tower):
    x = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(tower(x[1:2]).tokens, tower(x).tokens[1:2], rtol=0, atol=1e-5)


def test_company_does_not_matter_in_eval():
    check_alone(make(ImageTower))
    with pytest.raises(AssertionError):
        check_alone(
            make(ImageTower, dropout=0.0).train()
        )  # batch statistics: why teachers are in eval


def test_shapes_and_mask():
    encoded = make(ImageTower)(
        torch.rand(2, 3, 96, 96), torch.tensor([1, 1])
    )  # lengths are ignored
    assert (
        encoded.tokens.shape == (2, 37, 16) and encoded.mask.shape == (2, 37) and encoded.mask.all()
    )
    small = ImageTower(Config(width=16, heads=2), Pixels(64))
    assert small(torch.rand(2, 3, 64, 64)).tokens.shape == (2, 17, 16)


def test_everything_learns():
    check_gradients(make(ImageTower), torch.rand(3, 3, 96, 96))


def test_teacher_can_be_copied():
    check_copy(make(ImageTower), torch.rand(3, 3, 96, 96))


def test_depth_0():
    check_depth_0(ImageTower, torch.rand(3, 3, 96, 96))


def test_odd_width():
    assert ImageTower(Config(width=9, heads=3))(torch.rand(2, 3, 96, 96)).tokens.shape == (
        2,
        37,
        9,
    )  # nothing walks both ways here


def test_sizes():
    assert (
        1e6
        < sum(p.numel() for p in ImageTower(Config(width=192, image_depth=2)).parameters())
        < 2e6
    )
