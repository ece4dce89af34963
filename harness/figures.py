"""Pictures and plots. They open no window, draw no random numbers, and heed no MPLBACKEND."""
import os
from pathlib import Path

from harness.images import to_uint8
from harness.runs import read_log


def new_figure(rows=1, columns=1, size=(6, 3.5), **more):
    """(figure, axes) as plt.subplots gives them, without pyplot and so without any screen."""
    os.environ.pop("MPLBACKEND", None)               # with a wrong one matplotlib does not load
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, dpi=120, layout="tight")
    return figure, figure.subplots(rows, columns, **more)


def tile(images, columns=8, gap=1):
    """(B, 3, H, W) in [-1, 1] -> one uint8 array (rows H, columns W, 3), gaps of `gap` pixels."""
    from torchvision.utils import make_grid
    return make_grid(to_uint8(images.cpu()), columns, gap, pad_value=255).permute(1, 2, 0).numpy()


def save_picture(path, images, columns=8, scale=3, gap=1):
    """Write images as one PNG, each pixel scale x scale."""
    from PIL import Image                            # comes with torchvision
    Image.fromarray(tile(images, columns, gap).repeat(scale, 0).repeat(scale, 1)).save(path)


def plot_strips(panels, columns, path):
    """One strip per panel (title, images (B, 3, H, W)): the first `columns` images of each."""
    figure, axes = new_figure(len(panels), 1, (9, 1.15 * len(panels)), squeeze=False)
    for axis, (title, images) in zip(axes.flat, panels):
        axis.imshow(tile(images[:columns], columns), interpolation="nearest")
        axis.set_title(title, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(path)


def plot_panels(panels, path, **axes_settings):
    """Plots side by side. panels: (x label, y label, lines); a line: (label, x, y, style), of which
    '.' is points in the plane."""
    width = min(5.5 * len(panels), 15)
    figure, axes = new_figure(1, len(panels), (width, 3.6), squeeze=False)
    for axis, (x_label, y_label, lines) in zip(axes.flat, panels):
        for label, x, y, style in lines:
            grey = "grey" if style in ("--", ":", "-.") else None      # for what is not learned
            axis.plot(x, y, style, label=label, markersize=2 if style == "." else 4, color=grey)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel=x_label, ylabel=y_label, **axes_settings)
        if axes_settings.get("xscale") == "log":               # a tick at every x, and no others
            axis.set_xticks(ticks := sorted({at for _, x, _, _ in lines for at in x}), ticks)
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        if style == ".":
            axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        else:
            axis.legend(fontsize=8)
    figure.savefig(path)


def plot_learned(folder, start, learned):
    """learned.png: reward over training, from log.jsonl; of its first and last row the times, leans
    and gains, where they moved. start, learned: Rows of the table."""
    log = read_log(Path(folder, "log.jsonl"))
    first, *_, last = log
    panels = [("update", "reward", [
        (label, [row["update"] for row in log], [row.get(key) for row in log], style)
        for label, key, style in (("held out", "held_out", "o-"),
                                  ("batch, exploring", "batch", "-"))])]
    for x, y, name in (("jumps made", "t", "times"), ("jump", "lean", "leans")):
        if first[name] != last[name]:
            panels.append((x, y, [(row.name, range(y == "lean", len(last["times"])), of[name], style)
                                  for row, of, style in ((start, first, "--"),
                                                         (learned, last, "o-"))]))
    if first["gains"] != last["gains"]:
        panels.append(("residual block" if len(last["gains"][0]) < 99 else "channel", "gain", [
            (f"jump {k + 1}", range(1, len(gains) + 1), gains, "-")
            for k, gains in enumerate(last["gains"])]))
    plot_panels(panels, Path(folder, "learned.png"))


def plot_loss(folder, unit, label):
    """loss.png from log.jsonl: the loss against thousands of `unit` ('images', 'jumps')."""
    rows = [row for row in read_log(Path(folder, "log.jsonl")) if row.get("loss") and unit in row]
    line = label, [r[unit] / 1e3 for r in rows], [r["loss"] for r in rows], "-"
    plot_panels([(f"thousand training {unit}", "", [line])], Path(folder, "loss.png"), yscale="log")
