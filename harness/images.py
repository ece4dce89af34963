"""Training images: one uint8 tensor (N, 3, 32, 32) from CIFAR-10, a folder, or drawn here."""
import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from harness.runs import BadInput

MOST_PIXELS = 50_000_000                      # a small file can unpack to all of the memory


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 in 0..255, values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_unit(images):
    """(B, 3, H, W) in [-1, 1] -> float in [0, 1], values outside are clipped."""
    return (images.float().clamp(-1, 1) + 1) / 2


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


def cifar10_images(root="data", train=True):
    """CIFAR-10 by torchvision, its copy in root or a download (170 MB): (uint8 images, labels)."""
    from torchvision.datasets import CIFAR10
    if not Path(root, CIFAR10.base_folder).is_dir():
        print(f"downloading CIFAR-10 (170 MB) to {root}/; at the 50 kB/s its host gives of late "
              "this takes an hour, and --data DIR takes an existing copy as a folder of images")
    try:
        data = CIFAR10(root, train=train, download=True)      # a copy that is there is only checked
    except Exception as error:                                # no network, a broken archive, ...
        raise BadInput(f"CIFAR-10 could not be downloaded ({error}); give a folder of images with "
                       "--data DIR, or use --data shapes") from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def read_image(path, size):
    """One image file as RGB, size x size: turned as its EXIF data say, transparency on white,
    16-bit grey as 8-bit. ValueError for what is no picture of these kinds."""
    from PIL import Image, ImageOps
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")                       # of odd metadata
        if image.width * image.height > MOST_PIXELS or image.mode == "F":
            raise ValueError("too large, or grey values of no known range")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":              # more than 8 bits: convert() would turn them white
            grey = np.asarray(image) / (257 if np.max(image) > 255 else 1)
            if grey.min() < 0 or grey.max() > 255:
                raise ValueError("more than 16 bits")
            image = Image.fromarray(grey.round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR)


def class_names(root):
    """Names of the subfolders of root that are not hidden, sorted; BadInput where there is none."""
    found = Path(root).iterdir() if Path(root).is_dir() else []
    names = sorted(f.name for f in found if f.is_dir() and f.name[0] != ".")
    if not names:
        raise BadInput(f"--data {root}: no such folder, or no class subfolders with images in it")
    return names


def folder_images(root, classes=None, size=32):
    """Every image below root/<class>/, its central square: (uint8 (N, 3, size, size), labels (N,)).
    Labels count `classes` (default: the subfolders). What is hidden, linked or no image is named.
    BadInput where a subfolder is none of `classes`, and where no image is left."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.transforms.functional import pil_to_tensor
    names, images, labels, left_out = class_names(root), [], [], []
    classes = classes or names
    if unknown := set(names) - set(classes):
        raise BadInput(f"{root} has classes that the training images have not: {sorted(unknown)}")
    files = [(file, entry) for entry in sorted(Path(root).iterdir())
             for file in sorted([entry, *entry.rglob("*")])]
    for file, entry in tqdm(files, desc="reading images", disable=len(files) < 1000):
        try:
            label, words = classes.index(entry.name), file.relative_to(root).parts
            usual = file.is_file() and file.suffix.lower() in IMG_EXTENSIONS     # a pipe blocks
            if not usual or any(word[0] == "." for word in words):
                raise ValueError
            images.append(pil_to_tensor(read_image(file, size)))
            labels.append(label)
        except Exception:                     # decoders of hostile bytes can raise anything
            left_out += [str(file)] * (not file.is_dir() or file.is_symlink() and file != entry)
    if left_out:
        print(f"left out {len(left_out)} files, hidden or no usable image: "
              + ", ".join(left_out[:3] + ["..."] * (len(left_out) > 3)))
    if not images:
        raise BadInput(f"--data {root} has no readable image below its class subfolders")
    return torch.stack(images), torch.tensor(labels)


def load_images(data, train=True):
    """--data cifar10 | shapes | DIR -> (images uint8 (N, 3, 32, 32), labels (N,)). DIR holds
    DIR/train and DIR/test, or the class subfolders itself (then there is no test split)."""
    if data == "shapes":
        return shapes_images(seed=0 if train else 1)
    if data == "cifar10":
        return cifar10_images(train=train)
    split = Path(data, "train")
    if train:
        return folder_images(split if split.is_dir() else data)
    return folder_images(Path(data, "test"), class_names(split))


def fingerprint(images):
    """Number and hash of images, a short word that tells whether they changed."""
    return f"{len(images)}-{hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()[:16]}"
