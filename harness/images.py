"""Training images: one uint8 tensor (N, 3, 32, 32) from CIFAR-10, a folder, or drawn here."""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from harness.runs import BadInput, rebuilding


def to_unit(images):
    """(B, 3, H, W) in [-1, 1] -> float in [0, 1], values outside are clipped."""
    return (images.float().clamp(-1, 1) + 1) / 2


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 in 0..255, values outside are clipped."""
    return (to_unit(images) * 255).round().to(torch.uint8)


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


SPLITS = dict(train=("train", "training"), test=("test", "testing", "val", "valid", "validation"))


def folder_images(root, known):
    """The central squares of all images below root/<class>/, upright, transparency on white: uint8
    (N, 32, 32, 3), and labels that count the subfolders of `known`. What is hidden, linked or no
    image of 8 bits is named. BadInput: subfolders that `known` has not, or no image."""
    from PIL import Image, ImageOps
    from torchvision.datasets.folder import IMG_EXTENSIONS
    names, classes = (sorted(path.name for path in Path(folder).glob("[!.]*") if path.is_dir())
                      for folder in (root, known))
    if not names or not set(names) <= set(classes):
        raise BadInput(f"--data {root}: no such folder, or no class subfolders that fit: {names}")
    found = [file for entry in Path(root).iterdir() for file in [*entry.rglob("*")] or [entry]]
    files = sorted(file for file in found if file.is_symlink() or not file.is_dir())
    images, labels, left_out = [], [], []
    for file in tqdm(files, desc="reading images", disable=len(files) < 1000):
        words = file.relative_to(root).parts
        try:
            label, is_image = classes.index(words[0]), file.suffix.lower() in IMG_EXTENSIONS
            if not is_image or not file.is_file() or any(word[0] == "." for word in words):
                raise ValueError("no image, a pipe that would block, or hidden")
            image = ImageOps.exif_transpose(Image.open(file))
            if image.mode[0] in "IF":
                raise ValueError("deep greyscale of unknown range")
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            images.append(np.asarray(ImageOps.fit(image.convert("RGB"), (32, 32), Image.BILINEAR)))
            labels.append(label)
        except Exception:                     # decoders of hostile bytes can raise anything
            left_out.append(str(file))
    if left_out:
        print(f"left out {len(left_out)} files, hidden or no image of 8 bits:", *left_out[:9])
    if not images:
        raise BadInput(f"--data {root} has no readable image below its class subfolders")
    print(f"read {len(images)} images of {len(names)} classes below {root}: {' '.join(names):.300}")
    return np.stack(images), labels


def load_images(data, train=True):
    """--data cifar10 | shapes | DIR -> (images uint8 (N, 3, 32, 32), labels (N,)). DIR holds
    subfolders named as SPLITS alone, with those of the classes in them, or these itself (then there
    is no test split)."""
    if data == "shapes":
        return shapes_images(seed=0 if train else 1)
    if data == "cifar10":
        from torchvision.datasets import CIFAR10
        with rebuilding("--data cifar10", "copy or download; try --data DIR or shapes"):
            found = CIFAR10("data", train, download=True)     # a copy that is there is only checked
        images, labels = found.data, found.targets
    else:
        names = {path.name: path for path in Path(data).glob("[!.]*") if path.is_dir()}
        split = {s: next((names[name] for name in names if name.lower() in SPLITS[s]), None)
                 for s in SPLITS}
        known = {*sum(SPLITS.values(), ())}
        if not split["train"] or not {name.lower() for name in names} <= known:
            split = dict(train=data, test=Path(data, "test"))       # its subfolders are the classes
        images, labels = folder_images(split["train" if train else "test"], split["train"])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
