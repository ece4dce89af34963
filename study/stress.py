"""Proof of what README promises about long runs: kills, damaged files, hostile images.

    python study/stress.py                 # all of it, about ten minutes on two CPU cores
    python study/stress.py --kills 40      # more kills; --mutants, --seed likewise

Every run is a real process with tiny sizes. Prints one line per part, the figures of README, and
ends with exit code 0 where nothing was lost, loaded or left hanging, else 1.
"""
import argparse
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ddpm                                                                    # noqa: E402
import reward                                                                  # noqa: E402
import student                                                                 # noqa: E402
import teacher                                                                 # noqa: E402

# --smoke, with enough updates to be killed in the middle
SIZES = {"teacher": dict(updates=40, save_every=3), "student": dict(updates=40, save_every=3),
         "reward": dict(epochs=5, save_every=3), "rl_distill": dict(updates=12, save_every=2)}
CHILD = """
import sys
sys.path.insert(0, {root!r})
import ddpm, {script} as script
real = script.parse_args
def parse_args(argv=None):
    args = real(argv)
    vars(args).update({sizes!r})
    return args
script.parse_args = parse_args
ddpm.run_main(script.main)
"""


def launch(script, *flags, sizes=None):
    """Start one script with --smoke in a process of its own."""
    code = CHILD.format(root=str(ROOT), script=script, sizes=sizes or SIZES[script])
    words = [sys.executable, "-c", code, "--smoke", "--device", "cpu", *map(str, flags)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))


def finish(process, seconds=600):
    """Wait for a process; returns (exit code, what it printed)."""
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]
    return process.returncode, text


def equal(a, b):
    """Same structure, same values, same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def results(folder):
    """Everything in the checkpoints of a run that does not measure time."""
    out = {}
    for path in sorted(folder.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        for name in ("seconds", "provenance", "log_bytes"):
            content.pop(name, None)
        out[path.name] = content
    return out


def kills(folder, wanted, rng):
    """Kill each script at random moments, resume, and compare with the run that was left alone."""
    count, copies, same, seconds = 0, 0, 0, time.time()
    inputs = dict(teacher=[], reward=[],
                  student=["--teacher", folder / "teacher-a/teacher.pt"],
                  rl_distill=["--teacher", folder / "teacher-a/teacher.pt", "--student",
                              folder / "student-a/student.pt", "--coach",
                              folder / "reward-a/coach.pt"])
    for script in ("teacher", "student", "reward", "rl_distill"):
        flags = [*(["--data", "shapes"] if script == "teacher" else []), *inputs[script]]
        began = time.time()
        code, text = finish(launch(script, *flags, "--out", folder / f"{script}-a"))
        whole = time.time() - began
        if code != 0:
            raise SystemExit(f"{script} failed undisturbed:\n{text}")
        mine = 0
        while mine < -(-wanted // 4):               # copies of the run, each killed until it ends
            out = folder / f"{script}-{copies}"
            code = None
            while code is None:
                again = ["--resume"] if out.is_dir() and any(out.iterdir()) else []
                process = launch(script, *flags, "--out", out, *again)
                try:
                    text = process.communicate(timeout=rng.uniform(0.3, 0.9) * whole)[0]
                    code = process.returncode
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    mine += 1
            if code != 0:
                raise SystemExit(f"{script} did not resume after {mine} kills:\n{text}")
            same += equal(results(folder / f"{script}-a"), results(out))
            copies += 1
        count += mine
    print(f"kills: {count} times SIGKILL over 4 scripts, {same} of {copies} runs ended in the bits "
          f"of the undisturbed one, {time.time() - seconds:.0f} s", flush=True)
    return same == copies


def mutants(whole, n, rng):
    """Damaged versions of a checkpoint's bytes: cut, flipped, overwritten, lengthened, swapped."""
    for i in range(n):
        data, kind = bytearray(whole), i % 6
        where = rng.randrange(len(data))
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
            half = len(data) // 2
            data = data[half:] + data[:half]
        yield bytes(data)


class Trap:
    """An object that would run code when unpickled."""
    def __reduce__(self):
        return os.system, ("touch trapped",)


def wrong_contents(good):
    """Checkpoints whose checksum fits and whose content is wrong."""
    weights, config = dict(good["weights"]), dict(good["config"])
    first = next(iter(weights))
    yield dict(good, weights={k: v for k, v in weights.items() if k != first})
    yield dict(good, weights={**weights, "more": torch.zeros(3)})
    yield dict(good, weights={**weights, first: torch.zeros(7, 7)})
    yield dict(good, weights={**weights, first: "text"})
    yield dict(good, weights={**weights, first: torch.full_like(weights[first], float("nan"))})
    yield dict(good, weights=[])
    yield {k: v for k, v in good.items() if k != "weights"}
    yield {k: v for k, v in good.items() if k != "config"}
    for name, value in (("width", 10 ** 9), ("width", 0), ("width", -3), ("width", "32"),
                        ("mults", []), ("mults", [10 ** 9]), ("blocks", 10 ** 9),
                        ("image_size", 10 ** 9), ("attention", None), ("unknown", 1)):
        yield dict(good, config={**config, name: value})
    yield dict(good, config=None)
    yield dict(good, weights=Trap())


def damaged(folder, n, rng):
    """Try to load n mutated files and a score of wrong ones; each must be refused in a sentence."""
    began, refused, tried, slowest = time.time(), 0, 0, 0.0
    loaders = {"teacher-a/teacher.pt": ddpm.load_teacher, "student-a/student.pt":
               student.load_student, "reward-a/coach.pt": lambda p: reward.load_encoder(p, "coach")}
    path = folder / "mutant.pt"

    def attempt(loader):
        nonlocal refused, tried, slowest
        start, tried = time.time(), tried + 1
        try:
            loader(path)
            print(f"loaded a damaged file, number {tried}")
        except ddpm.BadInput as error:
            refused += "\n" not in str(error)
        slowest = max(slowest, time.time() - start)
    for name, loader in loaders.items():
        for data in mutants((folder / name).read_bytes(), -(-n // 3), rng):
            path.write_bytes(data)
            attempt(loader)
    good = torch.load(folder / "teacher-a/teacher.pt", weights_only=True)
    kind = good.pop("kind")
    good.pop("format")
    for content in wrong_contents(good):
        ddpm.save_checkpoint(path, kind, **content)
        attempt(ddpm.load_teacher)
    for save in (lambda: ddpm.save_checkpoint(path, "judge", **good),
                 lambda: torch.save(dict(good, format=ddpm.FORMAT, kind=kind), path)):
        save()
        attempt(ddpm.load_teacher)
    print(f"damaged checkpoints: {refused} of {tried} refused in one sentence, slowest "
          f"{slowest:.2f} s, {time.time() - began:.0f} s", flush=True)
    return refused == tried and not Path("trapped").exists()


def hostile_folder(root, rng):
    """Make image files good and bad below root; returns (usable, unusable)."""
    from PIL import Image
    one, two = root / "one", root / "two"
    one.mkdir(parents=True)
    two.mkdir()
    color = Image.new("RGB", (48, 40), (200, 30, 60))
    color.save(one / "plain.png")
    color.convert("L").save(one / "gray.png")
    color.convert("P").save(one / "palette.png")
    color.convert("CMYK").save(one / "cmyk.jpg")
    color.convert("1").save(two / "bits.png")
    Image.new("RGBA", (33, 90), (0, 0, 255, 128)).save(two / "clear.png")
    Image.new("LA", (5, 900), (7, 128)).save(two / "narrow.png")
    Image.new("RGB", (1, 1)).save(two / "dot.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    color.save(two / "turned.jpg", exif=turned)
    usable = 9
    buffer = io.BytesIO()
    color.save(buffer, "JPEG")
    bad = [b"", b"not an image", rng.randbytes(3000), buffer.getvalue()[:90]]
    for i, data in enumerate(bad):
        (one / f"bad{i}.jpg").write_bytes(data)
    buffer = io.BytesIO()
    color.save(buffer, "PNG")
    for i in range(60):                                     # some of these decode, most do not
        data = bytearray(buffer.getvalue())
        for _ in range(4):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (two / f"flip{i}.png").write_bytes(data)
    Image.new("1", (9000, 9000)).save(one / "huge.png")      # 10 kB that unpack to 81 M pixels
    (one / "notes.txt").write_text("no image")
    (one / "folder.png").mkdir()
    with contextlib.suppress(OSError):                      # where links are allowed
        (two / "circle").symlink_to(root, target_is_directory=True)
        (two / "dangling.png").symlink_to(root / "nowhere.png")
    return usable, len(bad) + 1


def hostile_images(folder, rng):
    """Train on a folder of such images, and on one of bad ones alone."""
    began = time.time()
    usable, bad = hostile_folder(folder / "images", rng)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        images, labels = teacher.load_images(str(folder / "images"))
    fine = len(images) >= usable and images.shape[1:] == (3, 32, 32)
    fine &= "skipped" in text.getvalue()
    code, printed = finish(launch("teacher", "--data", folder / "images", "--out",
                                  folder / "images-run", sizes=dict(updates=3)))
    fine &= code == 0
    worst = folder / "worst" / "class"
    worst.mkdir(parents=True)
    (worst / "a.png").write_bytes(b"no")
    code, printed = finish(launch("teacher", "--data", folder / "worst"))
    fine &= code == 2 and "no readable image" in printed and "Traceback" not in printed
    skipped = text.getvalue().split()[1]
    print(f"hostile images: {len(images)} used ({usable} sound, the rest flipped bits that still "
          f"decode), {skipped} skipped and named, an all-bad folder refused: "
          f"{'yes' if fine else 'NO'}, {time.time() - began:.0f} s", flush=True)
    return fine


def full_disk():
    """In a child: no file may grow beyond 100 kB, as on a disk that is full."""
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def accidents(folder):
    """Ctrl-C, SIGTERM, two processes on one folder, a full disk, a folder in a file's place."""
    began, good, parts = time.time(), 0, 0

    def check(name, holds, text=""):
        nonlocal good, parts
        good, parts = good + bool(holds), parts + 1
        if not holds:
            print(f"FAILED: {name}\n{text}")
    long = dict(updates=100_000, save_every=50_000, log_every=1)
    flags = ["--data", "shapes", "--out"]
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = folder / f"stop-{int(number)}"
        process = launch("teacher", *flags, out, sizes=long)
        while not (out / "log.jsonl").exists():
            time.sleep(0.1)
        second, said = finish(launch("teacher", *flags, out, "--resume", sizes=long))
        check("a second process is refused", second == 2 and "another process" in said, said)
        process.send_signal(number)
        code, said = finish(process)
        check(f"signal {int(number)} saves and says how to go on", code == expected
              and "--resume" in said and (out / "state.pt").exists()
              and "Traceback" not in said, said)
        done = torch.load(out / "state.pt", weights_only=True)["update"]
        code, said = finish(launch("teacher", *flags, out, "--resume",
                                   sizes=dict(long, updates=100_000)), 20)
        check("the stopped run resumes", f"resumed at update {done}" in said, said)
    out = folder / "full"
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(root=str(ROOT), script="teacher",
                                            sizes=SIZES["teacher"]), "--smoke", *flags, str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=full_disk)
    code, said = finish(process)
    check("a full disk is one sentence", code == 2 and "Traceback" not in said
          and not list(out.glob("*.pt")) and not list(out.glob(".*tmp")), said)
    out = folder / "taken"
    (out / "teacher.pt").mkdir(parents=True)
    code, said = finish(launch("teacher", *flags, out))
    check("a folder that is not empty is refused", code == 2 and "not empty" in said, said)
    code, said = finish(launch("teacher", *flags, folder / "teacher-a/teacher.pt"))
    check("a file in a folder's place is refused", code == 2 and "is a file" in said, said)
    print(f"accidents: {good} of {parts} ended as promised, {time.time() - began:.0f} s",
          flush=True)
    return good == parts


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=ddpm.number(int, 4, 10_000), default=24)
    p.add_argument("--mutants", type=ddpm.number(int, 3, 10 ** 6), default=360)
    p.add_argument("--seed", type=ddpm.number(int, 0), default=0)
    args = p.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [kills(folder, args.kills, rng), damaged(folder, args.mutants, rng),
                 hostile_images(folder, rng), accidents(folder)]
    print("all promises held" if all(parts) else "SOMETHING FAILED")
    sys.exit(0 if all(parts) else 1)


if __name__ == "__main__":
    main()
