"""Checkpoints: tensors and plain values in one dict, written whole or not at all, read as data."""
import contextlib
import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from harness.runs import BadInput, device_name, find, rebuilding, settings, write_whole

FORMAT = "redif-3"


def save_npz(path, array):
    """Write an array as arr_0 of a new .npz, as FID tools read; FileExistsError: it is there."""
    memory = io.BytesIO()
    np.savez(memory, array)
    write_whole(path, memory.getbuffer(), new=True)


def all_finite(content):
    """Is every tensor in nested dicts, lists and tuples free of NaN and infinities?"""
    return all(x.isfinite().all() for x in tree_leaves(content) if isinstance(x, torch.Tensor))


def save_checkpoint(path, kind, **content):
    """Write tensors, plain values, dicts and lists; BadInput where a tensor is not finite."""
    if not all_finite(content):
        raise BadInput(f"{path} would hold numbers that are not finite, and is not written"
                       f"{' over the last good one' * Path(path).exists()}; start again with a "
                       "lower --lr and a new --out")
    memory = io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, **content}, memory)
    write_whole(path, memory.getbuffer())


def load_checkpoint(path, kind):
    """The content of a checkpoint of this kind, or one of these kinds, on the CPU; BadInput where
    it is missing, truncated, changed, foreign, of another kind, or not finite."""
    path, kinds = find(path), (kind,) if isinstance(kind, str) else kind
    if not path.is_file():
        raise BadInput(f"there is no checkpoint {path}; train one, or give the path of another")
    with rebuilding(f"{path} cannot be read: it", "content"), zipfile.ZipFile(path) as file:
        content = torch.load(path, map_location="cpu", weights_only=True)     # runs no code
        if file.testzip() or content["format"] != FORMAT or not all_finite(content):
            raise ValueError(f"damaged, not of format {FORMAT}, or with numbers not finite")
        if content["kind"] not in kinds:
            raise BadInput(f"{path} holds a {content['kind']}; a {' or '.join(kinds)} is needed")
        return content


def frozen_network(net, weights, path, device):
    """net with these weights, frozen, on the device; BadInput where names or shapes differ."""
    with rebuilding(f"{path} does not fit the network its config describes: it", "weights"):
        net.load_state_dict(weights)                          # copies fp16 to fp32
    return net.to(device).eval().requires_grad_(False)


def half_weights(net):
    """State dict in fp16, for the small files that are handed on (loaded back as fp32)."""
    weights = {k: v.cpu() for k, v in net.state_dict().items()}
    return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def save_network(path, kind, net, origin, half=True, **more):
    """The small file that is handed on: net's config, weights, fp16 or as they are, and where they
    come from."""
    save_checkpoint(path, kind, config=net.config, provenance=origin, **more,
                    weights=half_weights(net) if half else net.state_dict())


def load_network(path, kind, build, device="cpu"):
    """The network of save_network, frozen, from build(**config). Returns (net, checkpoint)."""
    content = load_checkpoint(path, kind)
    with rebuilding(path, f"{kind} config"):
        return frozen_network(build(**content["config"]), content["weights"], path, device), content


def save_state(path, parts, update, seconds):
    """All that --resume needs. parts: {name: torch.Generator, or what has a state_dict}."""
    log = Path(path).with_name("log.jsonl")
    log.touch()
    saved = {name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
             for name, part in parts.items()}
    device = device_of(parts)
    save_checkpoint(path, "state", parts=saved, update=update, seconds=seconds,
                    log_bytes=log.stat().st_size, rng=torch.get_rng_state(), device=device.type,
                    gpu_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def device_of(parts):
    """The device of the networks among the parts of a run; CPU where there is none."""
    nets = (part for part in parts.values() if isinstance(part, torch.nn.Module))
    return next((p.device for net in nets for p in net.parameters()), torch.device("cpu"))


def load_state(path, parts):
    """Put back what save_state found, and log.jsonl too; returns (update, seconds)."""
    log = Path(path).with_name("log.jsonl")
    if not Path(path).exists():                # killed before the first: start from the beginning
        log.unlink(missing_ok=True)
        save_state(path, parts, 0, 0.0)
    state, device = load_checkpoint(path, "state"), device_of(parts)
    with rebuilding(path, "state for the flags given"):
        if state["device"] != device.type:
            raise BadInput(f"{path} was made on {state['device']} and goes on there alone, not on "
                           f"{device.type}: give --device {state['device']}")
        for name, part in parts.items():
            (getattr(part, "set_state", None) or part.load_state_dict)(state["parts"][name])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["gpu_rng"], device)
        update, seconds, log_bytes = int(state["update"]), state["seconds"], state["log_bytes"]
    log.touch()                                               # it may have been lost, or cut short
    os.truncate(log, min(log_bytes, log.stat().st_size))
    print(f"resumed at update {update}")
    return update, seconds


def kept(folder, key, make, device):
    """The tensor that make() returns, kept in runs/folder/ for the next run that asks for `key`, a
    dict of plain values. A file there that is damaged or of another key is told and made anew."""
    word = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = Path("runs", folder, f"{word}.pt")
    if path.exists():
        try:
            content = load_checkpoint(path, "kept")
            if content["key"] == key:
                return content["value"].to(device)
            print(f"{path} is of something else: made anew")
        except BadInput as error:
            print(f"{error}: made anew")
    value = make()
    with contextlib.suppress(OSError):                        # a folder that cannot be written
        save_checkpoint(path, "kept", key=key, value=value.cpu())
    return value


def provenance(script, args, seconds, device, **more):
    """Where a checkpoint comes from: flags, minutes, hardware, torch version; plain values."""
    def plain(v):
        return [plain(x) for x in v] if isinstance(v, list) else (
            Path(v).name or v if isinstance(v, str) else v)
    flags = {k: plain(v) for k, v in settings(args).items()}
    return dict(script=script, settings=flags, minutes=round(seconds / 60, 1),
                device=device_name(device), torch=str(torch.__version__), **more)
