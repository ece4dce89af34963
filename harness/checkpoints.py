"""Checkpoints: tensors and plain values in one dict, written whole or not at all, read as data."""
import contextlib
import hashlib
import io
import os
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

from harness.runs import ROOT, BadInput, device_name, rebuilding, settings, write_whole

FORMAT = "redif-3"


def save_checkpoint(path, kind, **content):
    """Write tensors, plain values, dicts and lists; BadInput where a tensor is not finite."""
    if not all(x.isfinite().all() for x in tree_leaves(content) if torch.is_tensor(x)):
        raise BadInput(f"{path} would hold numbers that are not finite, and is not written"
                       f"{' over the last good one' * Path(path).exists()}; start again with a "
                       "lower --lr and a new --out")
    memory = io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, **content}, memory)
    write_whole(path, memory.getbuffer())


def load_checkpoint(path, *kinds):
    """The content of a checkpoint of one of these kinds, on the CPU; BadInput where it is missing,
    truncated, changed, foreign, or of another kind."""
    place = Path(path) if Path(path).exists() else ROOT / path       # a bundled one, from anywhere
    if not place.is_file():
        raise BadInput(f"there is no checkpoint {path}; train one, or give the path of another")
    with rebuilding(f"{path} cannot be read: it", "content"), zipfile.ZipFile(place) as file:
        content = torch.load(place, map_location="cpu", weights_only=True)     # runs no code
        if file.testzip() or content["format"] != FORMAT:
            raise ValueError(f"damaged, or not of format {FORMAT}")
        if content["kind"] not in kinds:
            raise BadInput(f"{path} holds a {content['kind']}; a {' or '.join(kinds)} is needed")
        return content


def rebuild(build, content, path, device="cpu"):
    """The network build(**config) with the weights of a checkpoint, frozen, in eval mode; BadInput
    where they do not fit."""
    with rebuilding(f"{path} does not fit the code: it", content["kind"]):
        net = build(**content["config"])
        net.load_state_dict(content["weights"])               # copies fp16 to fp32
    return net.to(device).eval().requires_grad_(False)


def save_network(path, kind, net, origin, half=True, **more):
    """The small file that is handed on: net's config, weights, fp16 or as they are, and origin."""
    save_checkpoint(path, kind, config=net.config, provenance=origin, **more, weights={
        k: v.half() if half and v.is_floating_point() else v for k, v in net.state_dict().items()})


def save_state(path, parts, update, seconds):
    """All that --resume needs. parts: {name: torch.Generator, or what has a state_dict}."""
    log = Path(path).with_name("log.jsonl")
    saved = {name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
             for name, part in parts.items()}
    save_checkpoint(path, "state", parts=saved, update=update, seconds=seconds,
                    log_bytes=log.stat().st_size if log.exists() else 0)


def load_state(path, parts):
    """Put back what save_state found, and log.jsonl too; returns (update, seconds)."""
    log = Path(path).with_name("log.jsonl")
    if not Path(path).exists():                # killed before the first: start from the beginning
        log.unlink(missing_ok=True)
        return 0, 0.0
    state = load_checkpoint(path, "state")
    with rebuilding(path, "state for this", "give the --device and the flags that it began with"):
        for name, part in parts.items():
            (getattr(part, "set_state", None) or part.load_state_dict)(state["parts"][name])
    if log.exists():                                          # it may be lost, or cut short
        os.truncate(log, min(state["log_bytes"], log.stat().st_size))
    print(f"resumed at update {state['update']}")
    return state["update"], state["seconds"]


def kept(folder, key, make, device):
    """The tensor that make() returns, kept in runs/folder/ for the next run that asks for `key`, a
    dict of plain values. A file there that is damaged or of another key is told and made anew."""
    word = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = Path("runs", folder, f"{word}.pt")
    if path.exists():
        try:
            return load_checkpoint(path, word)["value"].to(device)
        except BadInput:
            print(f"{path} is damaged or of something else: made anew")
    value = make()
    with contextlib.suppress(OSError):       # no right to write, or another run is faster
        save_checkpoint(path, word, value=value.cpu())
    return value


def provenance(script, args, seconds, device, **more):
    """Where a checkpoint comes from: flags, minutes, hardware, torch version; plain values."""
    plain = tree_map(lambda x: Path(x).name if isinstance(x, str) else x, settings(args))
    return dict(script=script, settings=plain, minutes=round(seconds / 60, 1), **more,
                device=device_name(device), torch=str(torch.__version__))   # no folder of yours
