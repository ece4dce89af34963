"""Training images from CIFAR-10, a folder, or drawn here; pictures and plots of results, which open
no window, draw no random numbers, and heed no MPLBACKEND."""
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps                      # comes with torchvision
from tqdm import tqdm

from harness.runs import BadInput, read_log, rebuilding

SPLITS = "train", "training", "test", "testing", "val", "valid", "validation"


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 in 0..255, values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def shapes_images(n=2000, size=32, seed=0):
    """Discs, squares and stripes in random colours: (uint8 (n, 3, size, size), labels in 0..2)."""
    rng, yx = np.random.default_rng(seed), np.mgrid[:size, :size][:, None]
    ground, colour = rng.integers(0, 256, (2, n, 3, 1, 1))
    y, x = yx - rng.uniform(0.3, 0.7, (2, n, 1, 1)) * size    # from the centre: (n, size, size)
    labels, radius = rng.integers(0, 3, n), rng.uniform(5, 12, (n, 1, 1))
    mask = np.choose(labels[:, None, None], [
        y ** 2 + x ** 2 < radius ** 2, np.maximum(abs(y), abs(x)) < radius,
        (np.cos(y / radius * 3) > 0) & (abs(x) < 12)])
    images = np.where(mask[:, None], colour, ground).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


def read_square(path):
    """The central square of an image of 8 bits, upright, transparency on white: (32, 32, 3)."""
    with rebuilding(path, "image of 8 bits", "convert it or take it out"):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":
            raise ValueError("deep greyscale of unknown range")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(ImageOps.fit(image.convert("RGB"), (32, 32), Image.BILINEAR))


def load_images(data, train=True):
    """--data cifar10 | shapes | DIR -> (images uint8 (N, 3, 32, 32), labels (N,)). DIR holds
    class subfolders, or those in subfolders called as SPLITS. BadInput, FileNotFoundError."""
    from torchvision.datasets import CIFAR10, ImageFolder

    class Visible(ImageFolder):
        def find_classes(self, folder):
            names = [name for name in super().find_classes(folder)[0] if name[0] != "."]
            return names, {name: i for i, name in enumerate(names)}
    if data == "shapes":
        return shapes_images(seed=0 if train else 1)
    if data == "cifar10":
        with rebuilding("--data cifar10", "copy or download", "try --data DIR or --data shapes"):
            found = CIFAR10("data", train, download=True)     # a copy that is there is only checked
        images, labels = found.data, found.targets
    else:
        split = {path.name.lower(): path for path in Path(data).glob("[!.]*") if path.is_dir()}
        split = split if set(split) <= set(SPLITS) else {}    # its subfolders are the classes
        first = split.get("train") or split.get("training") or Path(data)
        test = next((split[name] for name in SPLITS[2:] if name in split), Path(data, "test"))
        found = Visible(first if train else test, loader=read_square)
        if found.classes != (classes := Visible(first).classes):
            raise BadInput(f"the classes of {test} must be those of {first}: {classes}")
        print(f"reads {len(found)} images of {len(classes)} classes below {found.root}")
        images, labels = zip(*tqdm(found, desc="reading images", delay=3, leave=False))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


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
    figure, axes = new_figure(1, len(panels), (min(5.5 * len(panels), 15), 3.6), squeeze=False)
    for axis, (x_label, y_label, lines) in zip(axes.flat, panels):
        for label, x, y, style in lines:
            axis.plot(x, y, style, label=label, markersize=2 if style == "." else 4,
                      color="grey" if style == "--" else None)         # for what is not learned
        axis.set(xlabel=x_label, ylabel=y_label, **axes_settings)
        axis.grid(alpha=0.3)
        if len(ticks := sorted({at for _, x, _, _ in lines for at in x})) < 14:     # at every x
            axis.set_xticks(ticks, ticks)
            axis.minorticks_off()
        if style == ".":
            axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        else:
            axis.legend(fontsize=8)
    figure.savefig(path)


def plot_learned(folder, start, learned):
    """learned.png: reward over training, from log.jsonl; of its first and last row the times, leans
    and gains, where they moved. start, learned: Rows of the table."""
    log = read_log(Path(folder, "log.jsonl"))
    first, last, updates = log[0], log[-1], [row["update"] for row in log]
    panels = [("update", "reward", [
        ("validation", updates, [row["validation"] for row in log], "o-"),
        ("batch, exploring", updates, [row.get("batch") for row in log], "-")])]
    for x, y, name in (("jumps made", "t", "times"), ("jump", "lean", "leans")):
        if first[name] != last[name]:
            at = range(y == "lean", len(last["times"]))
            panels.append((x, y, [(start.name, at, first[name], "--"),
                                  (learned.name, at, last[name], "o-")]))
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
