"""Command line, folders of runs, their log, errors and devices: nothing of the paper."""
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent        # of the repository


class BadInput(Exception):
    """Something the user gave is unusable; the message is the one sentence that is printed."""


@contextlib.contextmanager
def rebuilding(path, what, advice="get it anew"):
    """Within: whatever the content of a file makes go wrong is BadInput, one sentence."""
    try:
        yield
    except (BadInput, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:                 # hostile content can make a reader raise anything
        raise BadInput(f"{path} has no usable {what} ({error!r:.120}); {advice}") from None


def number(kind, low, high=math.inf):
    """argparse type: an int or float within low..high, both included; never NaN or infinite."""
    def number(text):
        if low <= kind(text) <= high and kind(text) != math.inf:
            return kind(text)
        raise argparse.ArgumentTypeError(f"must be between {low} and {high}, not {text}")
    return number


class Parser(argparse.ArgumentParser):
    """With --resume the defaults are the flags that the run in --out had."""

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        if getattr(args, "resume", False):
            with rebuilding(f"--out {args.out}", "settings", "--resume needs --out DIR of a run of "
                            "this script"):
                flags = json.loads(Path(args.out, "config.json").read_bytes())
                if not flags.keys() <= vars(args).keys():
                    raise ValueError("flags of another script")
                self.set_defaults(**flags)
            args = super().parse_args(argv)
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def parser_for(doc, example, trains=True):
    """The argument parser of every script: the flags all have, --resume and --smoke where it
    trains; defaults are shown, one example at the end."""
    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return super()._get_help_string(action) if action.default else action.help
    p = Parser(description=(doc or "").split("\n")[0],                         # -OO has no doc
               epilog=f"example: {example}", formatter_class=Help)
    add = p.add_argument_group("the run").add_argument
    add("--out", type=os.path.expanduser,                                   # of --out=~/x too
        help="folder of the result, new or empty (default: the next free one in runs/)")
    add("--seed", type=number(int, 0, 2 * 10 ** 9), default=0, help="of chance")
    add("--device", type=pick_device, default="auto", help="cuda or cpu; auto: cuda if any")
    if trains:
        add("--resume", action="store_true", help="go on with the run in --out, with its flags")
        add("--smoke", action="store_true", help="tiny, seconds; its numbers mean nothing")
    return p


def settings(args):
    """The flags that decide the result, as plain values; not those that say where."""
    return {k: value for k, value in vars(args).items() if k not in ("out", "resume", "device")}


def write_whole(path, data):
    """Write bytes to a temporary file, then rename: the old file or the new, never half a one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def claim_run(args, default):
    """Claim a run's folder, when all its inputs are read: --out, or the next free runs/default-N.
    Prints flags and hardware; a new run's config.json has the flags. BadInput: --out is taken."""
    folder, n = Path(args.out or f"runs/{default}"), 1
    while not getattr(args, "resume", False):
        with contextlib.suppress(FileExistsError):             # taken, perhaps a moment ago
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                with open(folder / "config.json", "x") as file:
                    json.dump(settings(args), file, default=str)
                break
        if args.out:
            raise BadInput(f"{folder} is not empty, or no folder; give another --out, or --resume")
        folder, n = Path(f"runs/{default}-{n + 1}"), n + 1
    print("config:", vars(args) | dict(out=str(folder), device=device_name(args.device)))
    return folder


def log_line(path, /, **row):
    """Append a row to a .jsonl file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path):
    """The rows that log_line wrote."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def run_main(main):
    """Run main(): bad input and too little memory end in one sentence and code 2, Ctrl-C in 130."""
    code = 2
    for name in ("stdout", "stderr"):
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")   # an ascii terminal has no ± or é
    try:
        return main()
    except (BadInput, OSError) as error:                       # OSError: full disk, no rights, ...
        sentence = error
    except (RuntimeError, MemoryError) as error:
        sentence = "memory ran out; take smaller numbers (--help names them), or another --device"
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            sentence = "torch.compile does not work here (a compiler may lack); leave out --compile"
        elif not any(s in repr(error) for s in ("of memory", "te memory", "ALLOC", "MemoryE")):
            raise
    except KeyboardInterrupt:
        code, sentence = 130, "interrupted; what has a state.pt goes on with --out FOLDER --resume"
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(code)


def pick_device(name="auto"):
    """The torch.device; BadInput. Not mps, whose gradients several releases of torch get wrong."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with rebuilding(f"device '{name}'", "hardware here", "try --device cpu"):
        torch.zeros(1, device=name).item()
        if torch.device(name).type not in ("cuda", "cpu"):
            raise ValueError("this project computes on cuda or cpu")
    torch.backends.cudnn.allow_tf32 = False                    # where we say fp32 we mean it
    return torch.device(name)


def autocast(device):
    """bf16 where the hardware computes in it: GPUs from Ampere on, CPUs with AVX512-BF16."""
    enabled = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else
               getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def device_name(device):
    """A short honest name of the hardware: the GPU's, or the number of CPU threads."""
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{device.type}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")


def checksum(net):
    """A short word that tells whether a network's weights changed."""
    return hashlib.sha256(b"".join(w.detach().cpu().contiguous().numpy().tobytes()
                                   for w in net.state_dict().values())).hexdigest()[:12]
