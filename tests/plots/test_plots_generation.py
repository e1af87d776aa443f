"""Pictures of generated images: what stands where."""

import numpy as np
import pytest
import torch

from timm_collapse import CollapseError, Order
from timm_collapse.models import PixelCodec
from timm_collapse.plots import Film, plot_film, plot_samples
from timm_collapse.plots.style import BLANK


def cells(figure, rows, columns):
    """The middle pixel of each cell of the grid (rows, columns, 3)."""
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    height, width = canvas.shape[0] // rows, canvas.shape[1] // columns
    return canvas[height // 2 :: height, width // 2 :: width]


def grey(values, side=8):
    """One plain image (3, side, side) a value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def test_samples_of_a_label_stand_in_its_rows():
    figure = plot_samples(grey([0.1, 0.2, 0.3, 0.4, 0.5]), [3, 5, 3, 3, 5], columns=2)
    expected = [[0.1, 0.3], [0.4, 1.0], [0.2, 0.5]]  # 3, 3 continued, 5; an empty place is white
    np.testing.assert_allclose(cells(figure, 3, 2)[..., 0], expected, atol=1e-6)
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["3", "", "5"]
    np.testing.assert_allclose(ax.get_yticks(), (np.arange(3) + 0.5) * ax.images[0].get_array().shape[0] / 3)


def test_samples_without_labels_fill_rows_and_pixels_stay_squares():
    figure = plot_samples(grey([0.1, 0.2, 0.3]), columns=2)
    np.testing.assert_allclose(cells(figure, 2, 2)[..., 1], [[0.1, 0.2], [0.3, 1.0]], atol=1e-6)
    image = torch.rand(1, 3, 8, 8)
    canvas = np.asarray(plot_samples(image).axes[0].images[0].get_array())
    np.testing.assert_allclose(canvas[:96:12, :96:12], image[0].permute(1, 2, 0))  # each pixel is 12 x 12
    np.testing.assert_allclose(canvas[11:96:12, 11:96:12], image[0].permute(1, 2, 0))
    large = plot_samples(torch.rand(1, 3, 128, 128)).axes[0].images[0].get_array()
    assert large.shape == (133, 133, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.rand(3, 8, 8),), "images must be"),
        ((torch.rand(257, 3, 1, 1),), "in \\[1, 256\\]"),
        ((torch.rand(2, 3, 8, 8) * 2, None), "must be in \\[0, 1\\]"),
        ((torch.rand(2, 3, 8, 8), [1]), "labels must be 2"),
        ((torch.rand(2, 3, 8, 8), None, 0), "columns must be at least 1"),
    ],
)
def test_samples_refuses(arguments, message):
    with pytest.raises(CollapseError, match=message):
        plot_samples(*arguments)


def test_film_hides_what_is_not_yet_known_and_shows_equal_scores_alike():
    states, known = torch.rand(2, 1, 3, 4, 4) * 0.9, torch.zeros(2, 1, 4, dtype=torch.bool)
    known[0, 0, 1] = known[1] = True
    order = Order(torch.tensor([[-2.0, -1.0, float("inf"), -2.0]]), (2, 2))
    figure = plot_film(states, known, order)
    first, last, heat = (np.asarray(ax.images[0].get_array().filled(-1)) for ax in figure.axes[:3])
    image = states[0, 0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(first[:2, 2:], image[:2, 2:])
    assert first[2:].min() == first[2:].max() == first[:, :2].min() == first[:, :2].max() == np.float32(BLANK)
    np.testing.assert_allclose(last, states[1, 0].permute(1, 2, 0))
    assert heat.tolist() == [[1, 0], [-1, 1]]  # the token that was there before has no place
    assert [ax.get_title() for ax in figure.axes[:3]] == ["1 of 4", "4 of 4", "order"]


def test_film_refuses():
    states, known, order = (
        torch.rand(2, 1, 3, 4, 4),
        torch.ones(2, 1, 4, dtype=torch.bool),
        Order(torch.rand(1, 4), (2, 2)),
    )
    for arguments, message in (
        ((states[0], known, order), "states must be"),
        ((states.expand(2, 5, 3, 4, 4), known, order), "B in \\[1, 4\\]"),
        ((states, known[:1], order), "known must be"),
        ((states, known.float(), order), "known must be"),
        ((states, known, Order(torch.rand(2, 4), (2, 2))), "known must be"),
    ):
        with pytest.raises(CollapseError, match=message):
            plot_film(*arguments)
    with pytest.raises(CollapseError, match="holds no states"):
        Film((2, 2), 3).plot(PixelCodec())


def test_film_records_the_iteration_of_each_token():
    film = Film((2, 2), 3, given=torch.tensor([True, False, False, False]), samples=1, states=2)
    known = torch.tensor([[True, False, False, False]] * 2)
    for step, tokens in enumerate(([2], [1], [3])):
        known = known.clone()
        known[:, tokens] = True
        film(step, torch.full((2, 3, 4, 4), float(step)), known)
    assert film.iterations.tolist() == [[0, 1, 0, 2]]
    assert [latents.shape[0] for latents in film.latents] == [1, 1]
    assert [float(latents.mean()) for latents in film.latents] == [0, 2]  # first and last
    heat = film.plot(PixelCodec()).axes[2].images[0].get_array()
    assert heat.filled(-1).tolist() == [[-1, 1], [0, 2]]
