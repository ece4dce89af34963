"""Training images: one uint8 tensor (N, 3, 32, 32) from CIFAR-10, a folder, or drawn here."""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from harness.runs import BadInput, rebuilding


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


SPLITS = "train", "training", "test", "testing", "val", "valid", "validation"


def read_square(path):
    """The central square of an image of 8 bits, upright, transparency on white: (32, 32, 3)."""
    from PIL import Image, ImageOps
    with rebuilding(path, "image of 8 bits", "convert it or take it out"):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":
            raise ValueError("deep greyscale of unknown range")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), (32, 32), Image.BILINEAR))


def load_images(data, train=True):
    """--data cifar10 | shapes | DIR -> (images uint8 (N, 3, 32, 32), labels (N,)). DIR holds
    subfolders called as SPLITS alone, those of the classes in them, or these itself (then there is
    no test split). BadInput or FileNotFoundError: what cannot be read."""
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
        images = np.stack(images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
