"""Proof of what README promises about long runs: they survive kills, and damaged files are refused.

    python study/stress.py                 # all of it, about ten minutes on two CPU cores
    python study/stress.py --kills 40      # more kills; --mutants, --seed likewise

Every run is a real process with tiny sizes. Prints one line per part, and ends with exit code 0
where nothing was lost or loaded, else 1.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "checkpoints")

# From the repository:
from harness.runs import BadInput, number                                      # noqa: E402
from reward import load_encoder                                                # noqa: E402
from rl_distill import load_policy                                             # noqa: E402
from student import load_student                                               # noqa: E402
from teacher import load_teacher                                               # noqa: E402

# --smoke, with enough updates to be killed in the middle: flags and constants of the module
SIZES = {"teacher": dict(updates=40, SAVE_EVERY=3, LOG_EVERY=1),
         "student": dict(updates=40, SAVE_EVERY=3, LOG_EVERY=1),
         "train_encoders": dict(epochs=5, SAVE_EVERY=3, LOG_EVERY=1),
         "rl_distill": dict(updates=12, LOG_EVERY=1)}
CHILD = """
import sys
sys.path[:0] = {root!r}, {root!r} + "/checkpoints"
import {script} as script
from harness.runs import run_main
real, sizes = script.parse_args, {sizes!r}
def parse_args(argv=None):
    args = real(argv)
    vars(args).update((k, v) for k, v in sizes.items() if k.islower())
    return args
for name in filter(str.isupper, sizes):
    assert hasattr(script, name), name
    setattr(script, name, sizes[name])
script.parse_args = parse_args
run_main(script.main)
"""
LOADERS = {"teacher-a/teacher.pt": load_teacher, "student-a/student.pt": load_student,
           "train_encoders-a/coach.pt": lambda path: load_encoder(path, "coach"),
           "train_encoders-a/judge.pt": lambda path: load_encoder(path, "judge"),
           "rl_distill-a/policy.pt": lambda path: load_policy(path)[1:]}

# ==== PROCESSES ===============================================================================


def launch(script, *flags, sizes=None):
    """Start one script with --smoke, and other sizes, in a process of its own."""
    code = CHILD.format(root=str(ROOT), script=script, sizes=sizes or SIZES[script])
    words = [sys.executable, "-c", code, "--smoke", "--device", "cpu", *map(str, flags)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))


def equal(a, b):
    """Same structure, same values, same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def results(folder):
    """What a run's checkpoints hold, without clocks and the global random numbers (where a script
    draws from these, its weights tell)."""
    out = {}
    for path in sorted(folder.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        out[path.name] = {k: v for k, v in content.items()
                          if k not in ("seconds", "provenance", "log_bytes", "rng")}
    return out


# ==== KILLS ===================================================================================

def kills(folder, wanted, rng):
    """Kill each script at random moments, resume, and compare with the run that was left alone."""
    count, copies, same, began = 0, 0, 0, time.time()
    teacher = "--teacher", folder / "teacher-a/teacher.pt"
    inputs = dict(teacher=("--data", "shapes"), student=teacher, train_encoders=(), rl_distill=(
        *teacher, "--student", folder / "student-a/student.pt",
        "--encoders", folder / "train_encoders-a"))
    for script, flags in inputs.items():
        start = time.time()
        process = launch(script, *flags, "--out", folder / f"{script}-a")
        text = process.communicate()[0]
        if process.returncode != 0:
            raise SystemExit(f"{script} failed undisturbed:\n{text}")
        whole, mine = time.time() - start, 0
        while mine < -(-wanted // len(inputs)):     # copies of the run, each killed until it ends
            out, code = folder / f"{script}-{copies}", None
            while code is None:
                again = ["--resume"] if out.is_dir() and any(out.iterdir()) else []
                process = launch(script, *flags, "--out", out, *again)
                try:
                    text = process.communicate(timeout=rng.uniform(0.3, 0.9) * whole)[0]
                    code = process.returncode
                except subprocess.TimeoutExpired:
                    process.kill()                  # SIGKILL: nothing can be tidied
                    process.communicate()
                    mine += 1
            if code != 0:
                raise SystemExit(f"{script} did not resume after {mine} kills:\n{text}")
            same, copies = same + equal(results(folder / f"{script}-a"), results(out)), copies + 1
        count += mine
    print(f"kills: {count} times SIGKILL over {len(inputs)} scripts, {same} of {copies} runs ended "
          f"in the bits of the undisturbed one, {time.time() - began:.0f} s", flush=True)
    return same == copies


# ==== DAMAGED CHECKPOINTS =====================================================================

def mutants(whole, n, rng):
    """n damaged versions of a file's bytes: cut, flipped, overwritten, lengthened, shortened,
    halves swapped."""
    for i in range(n):
        data, kind, where = bytearray(whole), i % 6, rng.randrange(len(whole))
        if kind == 0:
            data = data[:where]
        elif kind == 1:
            data[where] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[where:where + 64] = rng.randbytes(len(data[where:where + 64]))
        elif kind == 3:
            data[where:where] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 4:
            del data[where:where + rng.randrange(1, 64)]
        else:
            data = data[len(data) // 2:] + data[:len(data) // 2]
        yield bytes(data)


def damaged(folder, n, rng):
    """Load n damaged files: each is refused in one sentence, or holds what the sound one holds (the
    damage hit a date, or filling between the parts of the zip file)."""
    began, refused, harmless, slowest, path = time.time(), 0, 0, 0.0, folder / "mutant.pt"
    each = -(-n // len(LOADERS))
    for name, load in LOADERS.items():
        sound = load(folder / name)[1]
        for data in mutants((folder / name).read_bytes(), each, rng):
            path.write_bytes(data)
            start = time.time()
            try:
                harmless += equal(sound, load(path)[1])
            except BadInput as error:
                refused += "\n" not in str(error)
            slowest = max(slowest, time.time() - start)
    tried = each * len(LOADERS)
    print(f"damaged checkpoints: {refused} of {tried} refused in one sentence, {harmless} with "
          f"harmless damage, slowest {slowest:.2f} s, {time.time() - began:.0f} s", flush=True)
    return refused + harmless == tried


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=number(int, 4, 10_000), default=24)
    p.add_argument("--mutants", type=number(int, 3, 10 ** 6), default=360)
    p.add_argument("--seed", type=number(int, 0), default=0)
    args = p.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        parts = [kills(Path(name), args.kills, rng), damaged(Path(name), args.mutants, rng)]
    print("all promises held" if all(parts) else "SOMETHING FAILED")
    sys.exit(0 if all(parts) else 1)


if __name__ == "__main__":
    main()
