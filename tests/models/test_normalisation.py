"""Normalisation: closed forms, the way between two, channels, and what is refused."""

import pytest
import torch

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.models.normalisation import Normalisation
from timm_collapse.order.constants import constant

RGB = Normalisation((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
OTHER = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def test_closed_forms():
    pixels = torch.rand(2, 3, 4, 5)
    images = RGB.apply(pixels)
    assert torch.allclose(images[:, 2], (pixels[:, 2] - 0.3) / 2.0) and torch.allclose(RGB.undo(images), pixels)
    assert torch.allclose(RGB.apply(pixels[0]), images[0])
    assert torch.allclose(RGB.to(OTHER, images), OTHER.apply(pixels), atol=1e-5)
    assert RGB.to(RGB, images) is images
    assert RGB.to(OTHER, images.half()).dtype == torch.half


def test_one_value_stands_for_all_channels():
    half = Normalisation((0.5,), 0.25)
    assert half.std == (0.25,) and half.for_channels(4).mean == (0.5,) * 4
    assert Normalisation((0.1, 0.2), [0.5]).std == (0.5, 0.5)
    pixels = torch.rand(2, 4, 3, 3)
    assert torch.allclose(half.to(Normalisation((0.5,) * 3, (0.5,) * 3), half.apply(pixels)), (pixels - 0.5) / 0.5)
    grey = torch.rand(2, 1, 3, 3)
    assert torch.allclose(half.to(OTHER, half.apply(grey)), OTHER.apply(grey.expand(-1, 3, -1, -1)), atol=1e-6)
    assert RGB.grey().mean == pytest.approx((0.2,))


def test_of_an_orderer_and_of_a_configuration():
    assert Normalisation.of(CollapseOrder("bayer")) == Normalisation((0.5,) * 3, (0.5,) * 3)
    assert Normalisation.of({"mean": [0.1, 0.2, 0.3], "std": torch.tensor([0.5, 0.25, 2.0])}).std == RGB.std


@pytest.mark.parametrize(
    "mean, std, message",
    [
        ((0.5, 0.5), (0.5, 0.5, 0.5), "mean and std must be one number each, or one for each of the 3 channels"),
        ((), 0.5, "mean must be one finite number"),
        ("ab", 0.5, "mean must be"),
        ((0.5, float("nan")), 0.5, "mean must be"),
        (0.5, None, "std must be one finite number, or one a channel, got NoneType None"),
        (0.5, (0.5, 0.0), "std must be positive"),
    ],
)
def test_wrong_values(mean, std, message):
    with pytest.raises(CollapseError, match=message):
        Normalisation(mean, std)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(CollapseError, match="for each of the 4 channels"):
        RGB.for_channels(4)
    with pytest.raises(CollapseError, match="channels"):
        Normalisation((0.1, 0.2, 0.3, 0.4), 0.5).to(RGB, torch.rand(1, 4, 2, 2))


made = []


def numbers(count):
    made.append(count)
    return torch.arange(count, dtype=torch.float32)


def test_constants_are_made_once_and_can_be_trained_with():
    device = torch.device("cpu")
    with torch.inference_mode():
        first = constant(numbers, 3, device=device)
    assert constant(numbers, 3, device=device) is first and made == [3]
    weight = torch.ones(3, requires_grad=True)
    (weight * first).sum().backward()  # also where it was first needed in inference mode
    assert weight.grad.tolist() == [0, 1, 2]
    assert constant(numbers, 4, device=device).shape == (4,) and made == [3, 4]
    assert constant(numbers, 3, device=torch.device("meta")).is_meta


def test_constants_do_not_leak_into_or_out_of_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    device = torch.device("cpu")
    constant(numbers, 5, device=device)
    with FakeTensorMode():
        assert isinstance(constant(numbers, 5, device=device), FakeTensor)
        assert isinstance(constant(numbers, 6, device=device), FakeTensor)
    assert constant(numbers, 6, device=device).tolist() == [0, 1, 2, 3, 4, 5]
