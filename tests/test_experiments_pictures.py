"""Pictures from arrays with named axes, looked at through the figures' own artists."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import same_color, to_rgb
from matplotlib.text import Text
from PIL import Image

from experiments.framework import pictures
from experiments.framework.experiment import Settings

ARMS = ["plain", "batch norm"]
LABELS = {"step": "training step", "accuracy": "test accuracy", "std": "std"}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def results(**coordinates) -> xr.Dataset:
    """`accuracy` [arm, *coordinates, seed, step]: rises by steps, the second arm above the first, seeds 0.1 apart."""
    axes = {"arm": ARMS, **coordinates, "seed": [0, 1], "step": [10, 20, 30]}
    places = np.indices([len(values) for values in axes.values()])
    accuracy = 0.3 * places[0] + 0.1 * places[-2] + 0.1 * (places[-1] + 1)
    return xr.Dataset({"accuracy": (list(axes), accuracy)}, axes)


def drawn(found, *, seeds=2, data=None, **options):
    picture = pictures.curves(lambda r: r.accuracy, title="Does it learn?", labels=LABELS, **options)
    return picture(Settings(seeds=seeds, data=data), found)


def dotted_lines(ax):
    return [line for line in ax.get_lines() if line.get_linestyle() == ":"]


SHADES = ("#e69f00", "#c1440e", "#0b5fa5", "#4dac5e", "#9970ab", "#cc79a7", "#56b4e9", "#999999")


def pixels_of(path):
    """A picture's colours: uint8 [height, width, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def distance(shade, color):
    """How far a colour of 0 to 255 is from one of 0 to 1: the sum over red, green and blue."""
    return np.abs(np.array(shade) - 255 * np.array(color)).sum()


def panels_of(figure):
    return [ax for ax in figure.axes if ax.has_data()]


@pytest.mark.parametrize(
    ("coordinates", "options", "titles"),
    [
        ({}, {}, [""]),
        ({"rate": [0.1, 1.0]}, {"col": "rate"}, ["rate 0.1", "rate 1"]),
        ({"net": ["relu", "tanh"]}, {"row": "net"}, ["relu", "tanh"]),
        (
            {"net": ["relu", "tanh"], "rate": [0.1, 1.0]},
            {"row": "net", "col": "rate"},
            ["relu, rate 0.1", "relu, rate 1", "tanh, rate 0.1", "tanh, rate 1"],
        ),
    ],
)
def test_each_value_of_row_and_col_has_a_panel_that_says_which(coordinates, options, titles):
    figure = drawn(results(**coordinates), **options).figure
    assert [ax.get_title() for ax in panels_of(figure)] == titles


def test_lines_are_means_over_seeds_in_the_colours_of_their_arms():
    (ax,) = panels_of(drawn(results()).figure)
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
    for number, (arm, line) in enumerate(zip(ARMS, lines, strict=True)):
        assert same_color(line.get_color(), pictures.COLORS[arm])
        np.testing.assert_array_equal(line.get_xdata(), [10, 20, 30])
        np.testing.assert_allclose(line.get_ydata(), 0.3 * number + 0.05 + np.array([0.1, 0.2, 0.3]))


def test_bands_reach_from_the_lowest_seed_to_the_highest():
    (ax,) = panels_of(drawn(results()).figure)
    band = ax.collections[0].get_datalim(ax.transData)
    np.testing.assert_allclose([band.y0, band.y1], [0.1, 0.4])


def test_published_figures_are_dotted_lines_in_the_panel_and_colour_of_their_own():
    published = xr.DataArray([[0.5, np.nan], [0.8, 0.9]], {"rate": [0.1, 1.0], "arm": ARMS}, ("rate", "arm"))
    picture = drawn(results(rate=[0.1, 1.0]), col="rate", dotted=published)
    first, second = map(dotted_lines, panels_of(picture.figure))
    assert [line.get_ydata()[0] for line in first] == [0.5]  # the other is not known
    assert [line.get_ydata()[0] for line in second] == [0.8, 0.9]
    assert same_color(second[1].get_color(), pictures.COLORS["batch norm"])
    assert "Dotted: published." in picture.caption


def test_axes_are_labelled_in_words_and_scaled_as_asked():
    (ax,) = panels_of(drawn(results(), logx=True, logy=True, ylim=(0.01, 2.0)).figure)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "test accuracy")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_ylim() == (0.01, 2.0)


@pytest.mark.parametrize(
    ("seeds", "data", "words"),
    [
        (2, None, "Line: mean of 2 seeds; band: their range. Look."),
        (1, "mnist5k", "One seed. Look. Data: mnist5k."),
    ],
)
def test_the_caption_says_what_lines_and_bands_are(seeds, data, words):
    assert drawn(results(), seeds=seeds, data=data, caption="Look.").caption == words


def inside(figure, artist) -> bool:
    """Whether all of an artist is within the figure."""
    extent = artist.get_window_extent(figure.canvas.get_renderer())
    width, height = figure.canvas.get_width_height()
    return extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= width and extent.y1 <= height


def apart(figure, artist, ax) -> bool:
    """Whether an artist covers no part of a panel, its labels included."""
    renderer = figure.canvas.get_renderer()
    return not artist.get_window_extent(renderer).overlaps(ax.get_tightbbox(renderer))


@pytest.mark.parametrize("columns", [1, 3])
def test_the_title_stands_inside_the_figure_and_above_the_panels(columns):
    found = results(rate=[float(rate) for rate in range(columns)])
    figure = drawn(found, col="rate").figure
    figure.canvas.draw()
    title = figure._suptitle  # matplotlib has no public way to get at it
    assert title.get_text() == "Does it learn?"
    assert inside(figure, title)
    assert all(apart(figure, title, ax) for ax in panels_of(figure))


def test_the_caption_goes_with_the_picture_and_is_not_drawn():
    caption = "A caption that a reader on a small screen can read too."
    found = drawn(results(), caption=caption)
    assert caption in found.caption
    assert not any(caption[:9] in text.get_text() for text in found.figure.findobj(Text))


def test_the_legend_names_every_arm_and_covers_no_panel():
    figure = drawn(results(rate=[0.1, 1.0]), col="rate").figure
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ARMS
    assert inside(figure, legend)
    assert all(apart(figure, legend, ax) for ax in panels_of(figure))


def test_known_arms_keep_their_colours_and_others_get_different_ones():
    colors = pictures.palette(["ghost", "batch norm", "renorm", "plain"])
    assert {arm: colors[arm] for arm in ARMS} == pictures.COLORS
    assert len(set(colors.values())) == 4


def test_panels_stand_side_by_side_with_what_each_was_given():
    def draw(ax, settings, found):
        pictures.lines(ax, found.accuracy.sel(arm="plain"), "step", color="black", errorbar=None)
        ax.set_title(f"{settings.seeds} seeds")

    picture = pictures.panels(draw, draw, title="T", caption="C", file="two.png")(Settings(seeds=2), results())
    axes = panels_of(picture.figure)
    assert [ax.get_title() for ax in axes] == ["2 seeds"] * 2
    np.testing.assert_allclose(axes[0].get_lines()[0].get_ydata(), [0.15, 0.25, 0.35])
    assert (picture.file, picture.caption) == ("two.png", "C")


def test_the_same_results_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        pictures.save(drawn(results()), tmp_path / name)
    first, second = ((tmp_path / name / "curves.png").read_bytes() for name in ("first", "second"))
    assert first == second
    shades = {tuple(shade) for shade in pixels_of(tmp_path / "first" / "curves.png").reshape(-1, 3).tolist()}
    for arm in ARMS:  # and it is no empty picture
        assert min(distance(shade, to_rgb(pictures.COLORS[arm])) for shade in shades) < 20


def test_no_colour_is_lost_where_there_are_few(tmp_path):
    figure, ax = plt.subplots(figsize=(12, 5))
    values = np.random.default_rng(0).normal(size=(8, 50)).cumsum(1)
    for number, (line, shade) in enumerate(zip(values, SHADES, strict=True)):
        ax.plot(line, color=shade, linewidth=0.8)
        ax.fill_between(range(50), -number, 0.3 - number, color=shade, alpha=0.15)
    ax.inset_axes([0.6, 0.6, 0.3, 0.3]).imshow(values)
    figure.savefig(tmp_path / "all.png", dpi=110)
    pictures.write_png(figure, tmp_path / "few.png")
    every, few = (pixels_of(tmp_path / name).astype(int) for name in ("all.png", "few.png"))
    assert np.abs(every - few).sum(-1).max() < 60  # of 765; a median cut is off by more than 90
