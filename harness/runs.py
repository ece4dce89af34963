"""Command line, folders of runs, their log, errors and devices: nothing of the paper."""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent        # of the repository
CLAIMED = []                                         # folders that this process writes to


class BadInput(Exception):
    """Something the user gave is unusable; the message is the one sentence that is printed."""


@contextlib.contextmanager
def rebuilding(path, what):
    """Within: whatever the content of a file makes go wrong is BadInput, one sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:                 # hostile content can make a reader raise anything
        raise BadInput(f"{path} has no usable {what} ({error!r:.120}); get it anew") from None


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
            path = Path(args.out or "", "config.json")
            if not args.out or not path.is_file():
                raise BadInput("--resume needs --out DIR of a run; there is no run to resume"
                               + f" in {args.out}" * bool(args.out))
            with rebuilding(path, "settings"):
                self.set_defaults(**json.loads(path.read_bytes())["flags"])
            args = super().parse_args(argv)
        return args


def parser_for(doc, example):
    """The argument parser every script starts from: defaults are shown, one example at the end."""
    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return super()._get_help_string(action) if action.default else action.help
    return Parser(description=(doc or "").split("\n")[0],                      # -OO has no doc
                  epilog=f"example: {example}", formatter_class=Help)


def run_flags(p, trains=True):
    """Add the flags every script has; --resume and --smoke where it trains."""
    add = p.add_argument_group("the run").add_argument
    add("--out", type=os.path.expanduser,                                   # of --out=~/x too
        help="folder of the result, new or empty (default: the next free one in runs/)")
    add("--seed", type=number(int, 0, 2 * 10 ** 9), default=0, help="of chance; start noises are fixed")
    add("--device", default="auto", help="auto (cuda, or else cpu), cuda, cpu or mps")
    if trains:
        add("--resume", action="store_true", help="go on with the run in --out, with its flags")
        add("--smoke", action="store_true", help="tiny, seconds; its numbers mean nothing")


def settings(args):
    """The flags that decide the result, as plain values; not those that say where."""
    return {k: value for k, value in vars(args).items() if k not in ("out", "resume", "device")}


def find(path):
    """The path; where it is not there but in the repository (a bundled file), that one."""
    return ROOT / path if not Path(path).exists() and (ROOT / path).exists() else Path(path)


def checksum(names):
    """A short word that tells whether the files of these names, or the coach there, changed; what
    names no file does not count."""
    files = [file for name in names for file in (find(name), find(f"{name}/coach.pt"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.is_file())).hexdigest()[:12]


def weights_checksum(net):
    """A short word that tells whether a network's weights changed."""
    return hashlib.sha256(b"".join(w.detach().cpu().contiguous().numpy().tobytes()
                                   for w in net.state_dict().values())).hexdigest()[:12]


def write_whole(path, data, new=False):
    """Write bytes under a temporary name, to the disk, then rename: the old file or the new, never
    half a one, whenever the power fails. new: FileExistsError where there is a file already."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            open(path, "xb").close()                          # takes no other file's place
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def claim_run(args, default, images=None):
    """Claim a run's folder, when all its inputs are read: --out, or the next free runs/default-N.
    BadInput: it is taken, or the run that is to go on began with other images or checkpoints."""
    flags = settings(args)
    words = [word for value in flags.values() for word in (
        value if isinstance(value, list) else [value]) if isinstance(word, str)]
    content = [checksum(words)] if images is None else [
        checksum(words), hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()[:12]]
    if getattr(args, "resume", False):
        path = Path(args.out, "config.json")
        with rebuilding(path, "settings"):
            if json.loads(path.read_bytes())["content"] != content:
                raise BadInput(f"{args.out} began with images or checkpoints of other content; "
                               "give those")
        for file in path.parent.glob("*.tmp"):                     # of a save that was killed
            file.unlink()
        CLAIMED.append(path.parent)
        return path.parent
    numbered = (f"runs/{default}-{n}" if n > 1 else f"runs/{default}" for n in range(1, 10000))
    for folder in map(Path, [args.out] if args.out else numbered):
        with contextlib.suppress(FileExistsError):             # taken, perhaps a moment ago
            folder.mkdir(parents=True, exist_ok=bool(args.out))
            if all(file.suffix == ".tmp" for file in folder.iterdir()):
                text = json.dumps(dict(flags=flags, content=content), default=str)
                write_whole(folder / "config.json", text.encode(), new=True)
                CLAIMED.append(folder)
                return folder
    raise BadInput(f"{folder} is not empty, or no folder; give another --out, or go on by --resume")


def new_file(path):
    """Test, before the work, that a file can be written there; BadInput or OSError: it cannot."""
    if Path(path).exists():
        raise BadInput(f"{path} exists already; give another name")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=Path(path).parent).close()


def log_line(path, /, **row):
    """Append a row to a .jsonl file, on a line of its own; NaN becomes null."""
    row = json.loads(json.dumps(row), parse_constant=lambda name: None)
    with open(path, "a+b") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        mend = b"" if file.read() in (b"\n", b"") else b"\n"   # a kill tore the last line
        file.write(mend + json.dumps(row).encode() + b"\n")


def read_log(path):
    """The rows that log_line wrote, without torn lines; [] where there is no file."""
    rows = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def run_main(main, memory="--batch-size"):
    """Run a script's main: bad input, or no memory for these flags, ends in one sentence and exit
    code 2, Ctrl-C in the command that goes on and 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                         # closed, by 2>&-
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")   # an ascii terminal has no ± or é
    try:
        return main()
    except (BadInput, OSError) as error:                       # OSError: full disk, no rights, ...
        sentence, code = error, 2
    except (RuntimeError, MemoryError) as error:
        sentence, code = f"memory ran out; lower {memory}, or use another --device", 2
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            sentence = "torch.compile does not work here (a compiler may lack); leave out --compile"
        elif not any(s in repr(error) for s in ("of memory", "te memory", "ALLOC", "MemoryE")):
            raise
    except KeyboardInterrupt:
        sentence, code = "interrupted before a checkpoint; start it again, with a new --out", 130
        if CLAIMED and any(CLAIMED[-1].glob("state*.pt")):
            quoted = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
            words = "python", sys.argv[0], "--out", str(CLAIMED[-1]), "--resume"
            sentence = f"interrupted; to go on: {quoted(words)}"
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(code)


def pick_device(name="auto", trains=False):
    """'auto' takes cuda, then cpu; any other name must be usable here, else BadInput. trains: are
    networks trained? Not on mps, where several releases of torch get gradients wrong."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception:                                          # what is raised depends on the name
        raise BadInput(f"device '{name}' cannot be used here; try --device cpu") from None
    if trains and torch.device(name).type == "mps":
        raise BadInput("networks are not trained on mps, whose gradients several releases of torch "
                       "get wrong; give --device cpu")
    torch.backends.cudnn.allow_tf32 = False                    # where we say fp32 we mean it
    return torch.device(name)


def autocast(device):
    """bf16 where the hardware computes in it: GPUs from Ampere on, CPUs with AVX512-BF16."""
    enabled = device.type == "cpu" and getattr(             # what has AMX has it
        torch.cpu, "_is_avx512_bf16_supported", bool)()
    if device.type == "cuda":
        enabled = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def chunk_size(device):
    """Images per forward pass where nothing is learned: fills the device, not its memory."""
    return 64 if device.type == "cpu" else 512


def device_name(device):
    """A short honest name of the hardware: the GPU's, or the number of CPU threads."""
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{device.type}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
