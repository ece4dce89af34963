"""Checkpoints: tensors and plain values in one dict, written whole or not at all, read as data."""
import contextlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from harness.runs import BadInput, device_name, find, settings, write_whole

FORMAT = "redif-3"


def save_npz(path, array):
    """Write an array as arr_0 of a new .npz, as FID tools read; BadInput where the file exists."""
    memory = io.BytesIO()
    np.savez(memory, array)
    try:
        write_whole(path, memory.getbuffer(), new=True)
    except FileExistsError:
        raise BadInput(f"{path} exists already; give another name") from None


def all_finite(content):
    """Is every tensor in nested dicts, lists and tuples free of NaN and infinities?"""
    if isinstance(content, torch.Tensor):
        return not content.is_floating_point() or content.isfinite().all().item()
    inner = content.values() if isinstance(content, dict) else content
    return not isinstance(content, (dict, list, tuple)) or all(map(all_finite, inner))


def save_checkpoint(path, kind, **content):
    """Write {format, kind, **content}: tensors, plain values, dicts and lists of them. BadInput
    for a tensor that is not finite: the old file stays."""
    if not all_finite(content):
        raise BadInput(f"a number for {Path(path).name} is not finite; the last checkpoint is "
                       "kept; start again with a lower learning rate")
    memory = io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, **content}, memory)
    write_whole(path, memory.getbuffer())


@contextlib.contextmanager
def rebuilding(path, what):
    """Within: whatever the content of a checkpoint makes go wrong is one sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:                 # hostile content can make a reader raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise BadInput(f"{path} has no usable {what} ({reason}); get or train it anew") from None


def load_checkpoint(path, kind):
    """Read a checkpoint on the CPU; kind: a name, or a tuple of names that are all welcome.
    BadInput: missing, truncated, changed, foreign, of another kind, or not finite."""
    path, kinds = find(path), (kind,) if isinstance(kind, str) else kind
    if not path.is_file():
        raise BadInput(f"there is no checkpoint {path}; train one, or give the path of another")
    with rebuilding(f"{path} cannot be read: it", "content"), zipfile.ZipFile(path) as file:
        if file.testzip():
            raise ValueError("a checksum does not fit")
        content = torch.load(path, map_location="cpu", weights_only=True)     # runs no code
        if content["format"] != FORMAT:
            raise BadInput(f"{path} is not a checkpoint of this project (format {FORMAT})")
        if content["kind"] not in kinds:
            raise BadInput(f"{path} holds a {content['kind']}; a {' or '.join(kinds)} is needed")
        if not all_finite(content):
            raise BadInput(f"{path} holds numbers that are not finite; train it again")
    return content


def frozen_network(net, weights, path, device):
    """net with these weights on the device, in eval mode, its weights frozen; BadInput where names
    or shapes differ."""
    with rebuilding(f"{path} does not fit the network its config describes: it", "weights"):
        net.load_state_dict(weights)                          # copies fp16 to fp32
    return net.to(device).eval().requires_grad_(False)


def half_weights(net):
    """State dict in fp16, for the small files that are handed on (loaded back as fp32)."""
    return {k: (v.half() if v.is_floating_point() else v).detach().cpu()      # a counter is none
            for k, v in net.state_dict().items()}


def save_network(path, kind, net, origin):
    """The small file that is handed on: net's config, fp16 weights and where they come from."""
    save_checkpoint(path, kind, config=net.config, weights=half_weights(net), provenance=origin)


def load_network(path, kind, build, device="cpu"):
    """The network of save_network, frozen, from build(**config). Returns (net, checkpoint)."""
    content = load_checkpoint(path, kind)
    with rebuilding(path, f"{kind} config"):
        return frozen_network(build(**content["config"]), content["weights"], path, device), content


def save_state(path, parts, update, seconds):
    """All that --resume needs. parts: {name: network, optimizer, schedule, torch.Generator, or what
    else has a state_dict}."""
    log = Path(path).with_name("log.jsonl")
    saved = {name: p.get_state() if isinstance(p, torch.Generator) else p.state_dict()
             for name, p in parts.items()}
    save_checkpoint(path, "state", parts=saved, update=update, seconds=seconds,
                    rng=torch.get_rng_state(), log_bytes=log.stat().st_size if log.exists() else 0,
                    gpu_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


def load_state(path, parts):
    """Put parts, random numbers and log.jsonl back to where save_state found them. Returns (update,
    seconds), zeros where no checkpoint was saved yet."""
    path, log = Path(path), Path(path).with_name("log.jsonl")
    if not path.exists():
        if not any(path.parent.glob("state*.pt")):            # of another network of this run
            log.unlink(missing_ok=True)
        print("this run had no checkpoint yet, so it starts from the beginning")
        return 0, 0.0
    state = load_checkpoint(path, "state")
    with rebuilding(path, "state for this run"):
        for name in {**parts, **state["parts"]}:
            part = parts[name]
            (getattr(part, "set_state", None) or part.load_state_dict)(state["parts"][name])
        torch.set_rng_state(state["rng"])
        if len(state["gpu_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["gpu_rng"])
        if (log.stat().st_size if log.exists() else 0) < state["log_bytes"]:
            print("log.jsonl lost lines from before the checkpoint; the training goes on")
        elif log.exists():
            os.truncate(log, state["log_bytes"])              # lines from after the checkpoint
        print(f"resumed at update {state['update']}")
        return state["update"], state["seconds"]


def provenance(script, args, seconds, device, **more):
    """Where a checkpoint comes from: flags, minutes, hardware, torch version; plain values."""
    flags = {k: Path(v).name or v if isinstance(v, str) else v for k, v in settings(args).items()}
    return dict(script=script, settings=flags, minutes=round(seconds / 60, 1),
                device=device_name(device), torch=str(torch.__version__), **more)
