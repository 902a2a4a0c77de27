import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from lightning_plasticity import metrics as M

from .cases import CASES

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def fed(name: str):
    metric = CASES[name].make()
    for arguments in CASES[name].updates(0):
        metric.update(*arguments)
    return metric


def test_a_value_is_a_bar_and_a_history_a_curve():
    metric = fed("DeadUnits")
    _, ax = metric.plot()
    assert [bar.get_width() for bar in ax.patches] == [metric.compute().item()]
    assert ax.get_xlabel() == "DeadUnits"
    history = [torch.tensor(0.1), torch.tensor(0.3), torch.tensor(0.2)]
    _, ax = metric.plot(history)
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0.1, 0.3, 0.2])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "DeadUnits")
    low, high = ax.get_ylim()
    assert low < 0 < 1 < high  # the measure's bounds
    _, ax = metric.plot(torch.stack(history))
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0.1, 0.3, 0.2])


def test_norms_are_bars_by_layer_and_a_history_of_them_curves_by_layer():
    metric = fed("WeightNorm")
    _, ax = metric.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(metric.per_layer())
    assert [bar.get_width() for bar in ax.patches] == [norm.item() for norm in metric.per_layer().values()]
    _, ax = metric.plot([metric.per_layer()] * 3)
    assert [line.get_label() for line in ax.lines] == list(metric.per_layer())
    assert ax.get_legend() is not None


@pytest.mark.parametrize("count", [1, 4])
def test_bars_have_room_beside_them_and_for_their_numbers(count):
    _, ax = M.UpdateRatio().plot({str(number): torch.tensor(2.0) for number in range(count)})
    assert [text.get_text() for text in ax.texts] == ["2"] * count
    width, height = 2.0, count - 1 + 0.8  # of all bars, each 0.8 high
    assert ax.get_xlim()[1] == pytest.approx(width * 1.15)
    bottom, top = ax.get_ylim()  # the first bar on top
    assert (bottom, top) == pytest.approx((count - 0.6 + 0.5 / count * height, -0.4 - 0.5 / count * height))


def test_covariance_is_a_heat_map_from_minus_1_to_1():
    metric = fed("GradientCovariance")
    figure, ax = metric.plot()
    (image,) = ax.images
    assert image.get_clim() == (-1, 1)
    assert image.get_cmap().name == "RdBu_r"
    torch.testing.assert_close(torch.tensor(image.get_array().data), metric.matrix())
    assert len(figure.axes) == 2  # with its scale


def test_tasks_are_a_curve():
    metric = fed("TaskAccuracy")
    _, ax = metric.plot()
    assert ax.get_xlabel() == "task"
    torch.testing.assert_close(torch.tensor(ax.lines[0].get_ydata()), metric.per_task(), equal_nan=True)


def test_a_plot_may_stand_in_a_part_of_a_figure():
    figure = plt.figure()
    ax = figure.subfigures(1, 2)[0].subplots()
    assert fed("GradientCovariance").plot(ax=ax) == (figure, ax)


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="At least one value is required to plot"):
        M.DeadUnits().plot([])


def test_nan_can_be_drawn():
    for values in (torch.tensor(float("nan")), [torch.tensor(float("nan")), torch.tensor(1.0)]):
        figure, _ = M.UpdateRatio().plot(values)
        figure.canvas.draw()


def test_our_modules_load_matplotlib_only_to_draw():
    """torchmetrics loads it where it is installed: here it is taken away again before our package is imported."""
    program = (
        "import sys, torchmetrics\n"
        "for name in [name for name in sys.modules if name.startswith('matplotlib')]: sys.modules[name] = None\n"
        "import torch, lightning_plasticity.metrics as M\n"
        "metric = M.EffectiveRank(); metric.update(torch.eye(3)); metric.compute()\n"
        "try: metric.plot()\n"
        "except ImportError: print('only plot needs it')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "only plot needs it", done.stderr
