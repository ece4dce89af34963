"""The evidence: what does reinforcement add, and where? Bookkeeping around the seven files.

    python study/run.py --seeds 0 1 2          # all of it; an interrupted study goes on
    python study/run.py --only hand steps      # some groups of arms
    python study/run.py --again                # replaces the rows that another machine made
    python study/run.py --report               # tables and figures again, from what is there

Every line of study/results.jsonl is one deployed sampler on held-out noise: reward and its terms,
the judge's metrics, cost of its training, command, commit. Rows that are there are skipped;
runs/study keeps the checkpoints, which the figures with images need. Tables go to study/README.md,
figures to figures/. On CPUs the arms run side by side, one thread each; the clock comes last.
"""
import argparse
import ast
import contextlib
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rl_distill                                                              # noqa: E402
from ddpm import (GRIDS, STOP, Stopped, linear_alpha_bar, load_checkpoint,     # noqa: E402
                  load_teacher, lock_file, make_grid, number, pick_device, read_log, run_main,
                  save_checkpoint, wait_for)
from student import HELD_OUT, deploy, load_student, student_from_teacher       # noqa: E402
from teacher import TEACHER_STEPS                                              # noqa: E402
from reward import TERMS, Reward, load_encoder                                 # noqa: E402
from rl_distill import deployed, noise_and_targets, standard_error             # noqa: E402
from sample import judged, search_grid                                         # noqa: E402

RUNS = ROOT / "runs" / "study"
NFE, LONG = (1, 2, 3, 4, 6, 8), (10, 20)        # evaluations of hand grids; of the teacher also
LEARNED = {"student": (2, 3, 4, 6, 8), "teacher": (2, 4), "teacher, 2nd": (3, 4, 6, 8)}  # grids
UPDATES = ("--updates", "20")                   # of most trained arms: the CPU scale
SEARCH_NOISES = 64                              # noises that each try of the search is scored on
COSTS = {"student": ("0.01", "0.03", "0.1"), "teacher, 2nd": ("0.3",)}  # prices per evaluation


class Arm(NamedTuple):
    """One sampler. init: 'teacher' (DDIM jumps), 'teacher, 2nd' (second order) or 'student'."""
    group: str
    name: str
    init: str
    steps: int
    flags: tuple = ()                           # of rl_distill.py; none: nothing is trained

    @property
    def trained(self):
        return self.group not in ("hand", "clock")


def arms():
    """Every arm, in the order in which they run."""
    teachers, out = ("teacher", "teacher, 2nd"), []
    for init in (*teachers, "student"):
        out += [Arm("hand", grid, init, k) for k in NFE + (LONG if init != "student" else ())
                for grid in GRIDS]
    out.append(Arm("hand", "uniform", "teacher", TEACHER_STEPS))
    for init, k in ((init, k) for init, counts in LEARNED.items() for k in counts):
        out.append(Arm("steps", "RL steps", init, k, ("--learn", "steps")))
        out.append(Arm("search", "random search", init, k))
    for init, k in (("student", 1), ("student", 2), ("student", 4), ("teacher, 2nd", 4)):
        out.append(Arm("pixels", "RL pixels", init, k, ("--learn", "pixels")))
        slow = ("--lr-pixels", "3e-6") if init != "student" else ()     # the student's own rate
        if slow:
            out.append(Arm("pixels", "RL pixels, student's rate", init, k,
                           ("--learn", "pixels", *slow)))
        for estimator in ("backprop", "backprop-last")[:k]:             # equal at one evaluation
            out.append(Arm("backprop", estimator, init, k,
                           ("--learn", "pixels", "--estimator", estimator, *slow)))
        if k > 1:
            out.append(Arm("both", "RL both, in turns", init, k,
                           ("--learn", "both", "--updates", "40")))
    for term in TERMS:
        out.append(Arm("rewards", f"RL pixels, {term}", "student", 2,
                       ("--learn", "pixels", "--reward", term)))
    out.append(Arm("rewards", "backprop, feature, fast", "student", 2, (
        "--learn", "pixels", "--reward", "feature", "--estimator", "backprop",
        "--lr-pixels", "1e-4", "--updates", "60")))
    out += [Arm("cost", f"RL steps, cost {c}", init, 8,
                ("--learn", "steps", "--step-cost", c, "--updates", "40"))
            for init, costs in COSTS.items() for c in costs]
    for name, *flags in (("REINFORCE (PPO with 1 epoch)", "--estimator", "reinforce"),
                         ("REINFORCE, 4 x rate", "--estimator", "reinforce", "--lr-steps", "8e-3"),
                         ("PPO, batch baseline", "--baseline", "batch"),
                         ("PPO, group std", "--baseline", "group")):
        out.append(Arm("ablation", name, "teacher, 2nd", 4, ("--learn", "steps", *flags)))
    out += [arm._replace(group="clock", name="ms") for arm in out
            if (arm.group, arm.name) == ("hand", "uniform")]
    return sorted(out, key=lambda arm: GROUPS.index(arm.group))


GROUPS = ("hand", "steps", "pixels", "backprop", "search", "both", "rewards", "cost",
          "ablation", "clock")


class World:
    """Networks, rewards and noises that all arms share; targets are computed once and kept."""

    def __init__(self, args):
        self.device = pick_device(args.device)
        self.alpha_bar = linear_alpha_bar(self.device)
        self.paths = {n: ROOT / "checkpoints" / f"{n}.pt"
                      for n in ("teacher", "student", "coach", "judge")}
        self.teacher, _ = load_teacher(self.paths["teacher"], self.device)
        self.coach, self.coach_file = load_encoder(self.paths["coach"], "coach", self.device)
        self.judge, self.judge_file = load_encoder(self.paths["judge"], "judge", self.device)
        self.every = self.reward("+".join(TERMS))
        self.weights = hashlib.sha256(b"".join(
            p.read_bytes() for p in self.paths.values())).hexdigest()[:12]
        self.folder, self.n = RUNS / (self.weights + "-smoke" * args.smoke), args.held_out
        self.smoke = args.smoke
        self.train_set, self.held_set, self.monitor_set = (self.targets(*what) for what in (
            (0, 256 if not args.smoke else 8), (HELD_OUT, args.held_out),
            (HELD_OUT + 10 ** 6, 8)))

    def reward(self, words):
        return Reward(words, self.coach, self.coach_file["scales"])

    def targets(self, first, n):
        """Noise and the teacher's images of n seeds from `first` on."""
        name = f"targets-{first}-{n}"
        return self.kept(name, lambda: noise_and_targets(
            self.teacher, first, n, self.alpha_bar, self.device, name))

    def kept(self, name, make):
        """The list of tensors that make() returns, kept in runs/study from the first call on."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            save_checkpoint(path, "kept", tensors=[x.cpu() for x in make()])
        return [x.to(self.device) for x in load_checkpoint(path, "kept")["tensors"]]

    def start(self, init):
        """The student an arm starts from."""
        if init == "student":
            return load_student(self.paths["student"], self.device)[0]
        return student_from_teacher(self.teacher, 2 if "2nd" in init else 1).to(self.device).eval()

    def main_reward(self, raw):
        """feature+perceptual, the default reward, from raw terms {name: (B,)}: (B,)."""
        scales = self.coach_file["scales"]
        return sum((raw[n] - TERMS[n].best) / scales[n] for n in ("feature", "perceptual"))

    def best_hand(self, init, steps):
        """Main reward of each held-out noise on the hand grid that is best on these noises: (n,).

        Chosen on the noises it is compared on, so the baseline errs on the strong side.
        """
        def make():
            net = self.start(init)
            results = [deployed(net, None, *self.held_set, self.every, steps, self.alpha_bar,
                                make_grid(grid, steps))["raw"] for grid in GRIDS]
            return [max(map(self.main_reward, results), key=torch.mean)]
        return self.kept(f"hand-{init}-{steps}-{self.n}", make)[0]


# ==============================================================================================
# RUNNING
# ==============================================================================================

@functools.cache
def fingerprint(*files):
    """Hash of the code in these files; comments and docstrings do not count."""
    trees = [ast.parse(Path(file).read_text(encoding="utf-8")) for file in files]
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, documented) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()


def folder(arm, seed, world):
    """Where the run of a trained arm lives; another command or other code is another folder."""
    words = f"{arm.group} {arm.name} {arm.init} {arm.steps} {seed}"
    code = fingerprint(*(ROOT / f"{n}.py" for n in ("ddpm", "student", "reward", "rl_distill")))
    code = hashlib.sha256(" ".join((*UPDATES, *arm.flags, code)).encode()).hexdigest()[:6]
    return world.folder / ("".join(c if c.isalnum() or c == "." else "-" for c in words)
                           + f"-{code}")


def is_trained(arm, seed, world):
    """Is the checkpoint of this arm on this machine, made by this code?"""
    return (folder(arm, seed, world) / "student.pt").exists()


def arguments(arm, seed, world):
    """The command of a trained arm, as rl_distill.py reads it. Returns (words, parsed)."""
    words = [*UPDATES, *arm.flags, "--steps", str(arm.steps), "--seed", str(seed)]
    if arm.init != "student":
        words += ["--init", "teacher", "--order", "2" if "2nd" in arm.init else "1"]
    words += ["--smoke"] * world.smoke
    return words, rl_distill.parse_args([*words, "--out", str(folder(arm, seed, world))])


def reinforce(arm, seed, world, version=""):
    """Train an arm as rl_distill.main does, or find it trained. Returns (net, policy, args,
    provenance)."""
    _, args = arguments(arm, seed, world)
    out = Path(args.out)
    if not is_trained(arm, seed, world):
        args.resume = (out / "state.pt").exists()
        if not args.resume:
            (out / "log.jsonl").unlink(missing_ok=True)    # of a run that was stopped early
        out.mkdir(parents=True, exist_ok=True)
        _, net, reward = rl_distill.load_inputs(args, world.device)
        with open(out / "printed.txt", "a", encoding="utf-8") as log, \
                contextlib.redirect_stdout(log):
            rl_distill.train_and_save(net, world.train_set, world.monitor_set, reward, args, out,
                                      world.device, commit=version)
    net, policy, content = load_student(out / "student.pt", world.device)
    return net, policy, args, content["provenance"]


def training_cost(args):
    """Network evaluations that training spent; a backward pass counts as two."""
    trained = args.steps if args.estimator == "backprop" else 1     # calls that have a gradient
    again = args.steps - 1 if args.estimator == "backprop-last" else 0      # forward to the last
    update = dict(steps=args.group * args.steps,                    # the draws share their calls
                  pixels=args.steps + args.inner_epochs * (again + 3 * trained))
    return args.noises_per_update * sum(update[c] for c in rl_distill.turns(args))


def play(arm, seed, world, version=""):
    """Run one arm. Returns a list of (name, what deployed() returned, cost of its training)."""
    where = *world.held_set, world.every, arm.steps, world.alpha_bar
    if arm.group == "hand":
        return [(arm.name, deployed(world.start(arm.init), None, *where,
                                    make_grid(arm.name, arm.steps)), {})]
    if arm.group == "search":                   # as many rollouts as RL steps gets
        net, began = world.start(arm.init), time.time()
        args = rl_distill.parse_args(
            [*UPDATES, "--learn", "steps", "--steps", str(arm.steps), *["--smoke"] * world.smoke])
        rollouts = rl_distill.rollouts(args, args.updates)
        some = torch.randperm(len(world.train_set[0]),
                              generator=torch.Generator().manual_seed(seed))[:SEARCH_NOISES]
        z, target = (x[some.to(world.device)] for x in world.train_set)
        grid = search_grid(net, z, target, world.reward(args.reward), arm.steps,
                           rollouts // len(z), world.alpha_bar, seed)
        cost = dict(train_nfe=rollouts * arm.steps, minutes=(time.time() - began) / 60)
        return [(arm.name, deployed(net, None, *where, grid), cost)]
    net, policy, args, origin = reinforce(arm, seed, world, version)
    cost = dict(train_nfe=training_cost(args), minutes=origin["minutes"], commit=origin["commit"])
    result = deployed(net, policy, *where, may_stop=args.step_cost > 0)
    rows = [(arm.name, result, cost)]
    if arm.group == "steps":                    # what does reading the state buy?
        cost["grids"] = [[round(t) for t in row["grid"]] for row in read_log(args.out)]
        average = result["times"].float().mean(0).round().long().tolist()
        rows.append(("its average grid", deployed(net, None, *where, average), cost))
    return rows


def clock(arm, world, n=64, rounds=5):
    """Milliseconds per image of a sampler in a batch of n, alone on the machine; median."""
    net, z, seconds = world.start(arm.init), world.held_set[0][:n], []
    for _ in range(rounds + 1):                 # the first one warms up
        wait_for(world.device)
        start = time.time()
        deploy(net, z, arm.steps, world.alpha_bar, grid=make_grid("uniform", arm.steps))
        wait_for(world.device)
        seconds.append(time.time() - start)
    return 1000 * statistics.median(seconds[1:]) / len(z)


def key(row):
    """What makes a row the same row."""
    return tuple(row[k] for k in ("group", "name", "init", "steps", "seed", "weights", "n"))


def results_file(smoke):
    return RUNS / "smoke.jsonl" if smoke else ROOT / "study" / "results.jsonl"


def read_results(smoke=False):
    """Rows of results.jsonl, the newest of equal ones; a line cut off by a crash is left out."""
    rows, path = {}, results_file(smoke)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[key(row)] = row
    return list(rows.values())


def commit():
    """Commit of the code that makes the rows, '+' where tracked files were changed since."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    changed = git("status", "--porcelain", "-uno", "--", "*.py", "checkpoints")
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed.strip() else "")


def done_here(arm, seed, world):
    """The empty file that says that this arm's rows were made on this machine."""
    return Path(f"{folder(arm, seed, world)}.done")


def todo(args, world):
    """(arm, seed) of everything that has no row yet; with --again also what another machine did."""
    done = {key(row) for row in read_results(args.smoke)}
    chosen = [(arm, seed) for arm in arms() if not args.only or arm.group in args.only
              for seed in (args.seeds if arm.trained else [0])]
    return [(arm, seed) for arm, seed in chosen
            if (*arm[:4], seed, world.weights, args.held_out) not in done
            or args.again and not done_here(arm, seed, world).exists()]


def run(args, world, alone=False):
    """Play the arms that have no row yet and that no other worker is playing; alone: the clock."""
    version = commit()
    for arm, seed in todo(args, world):
        if (arm.group == "clock") != alone:
            continue
        lock = lock_file(f"{folder(arm, seed, world)}.lock")
        if lock is None:
            continue
        with lock:
            if (arm, seed) in todo(args, world):                   # not done in the meantime
                run_one(arm, seed, world, version, args)


def run_one(arm, seed, world, version, args):
    """Play one arm and append its rows."""
    command = f"python study/run.py --only {arm.group} --seeds {seed} --held-out {world.n}"
    same = dict(group=arm.group, init=arm.init, steps=arm.steps, seed=seed, weights=world.weights,
                n=world.n, commit=version, torch=torch.__version__)
    if arm.group == "clock":
        ms = clock(arm, world)
        print(f"{arm.init:12s} K {arm.steps:2d} {ms:.2f} ms per image", flush=True)
        return append([dict(same, name=arm.name, command=command, ms=ms)], arm, seed, world)
    if arm.flags:
        command = " ".join(["python rl_distill.py", *arguments(arm, seed, world)[0]])
    rows = []
    for name, result, cost in play(arm, seed, world, version):
        result["reward"] = world.main_reward(result["raw"])
        if arm.trained:
            fair = max(1, round(result["nfe"].mean().item()))      # fewer where steps cost
            gain = result["reward"] - world.best_hand(arm.init, fair)
            cost.update(gain=gain.mean().item(), gain_error=standard_error(gain))
        times = result["times"].float()
        row = judged(result, world.judge, world.judge_file)
        del row["ms"]                           # others run beside: the clock comes later, alone
        rows.append(dict(name=name, command=command, **row, times=times.mean(0).tolist(),
                         times_std=times.std(0).tolist(), **{**same, **cost}))
        print(f"{arm.init:12s} {name:24s} K {arm.steps:2d} seed {seed} reward "
              f"{row['reward']:8.4f} Fréchet {row['frechet']:8.4f}", flush=True)
    append(rows, arm, seed, world)


def append(rows, arm, seed, world):
    """Add the rows of an arm to the results, all of them or none, after a line cut off by a crash
    too."""
    path = results_file(world.smoke)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + "".join(json.dumps(row) + "\n" for row in rows))
    done_here(arm, seed, world).touch()


def tidy(smoke):
    """Leave only the newest of equal rows in the results."""
    path, rows = results_file(smoke), read_results(smoke)
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(new, path)


def run_side_by_side(args, words):
    """One process per worker, one thread each, until none is left; raises if one failed."""
    workers = [subprocess.Popen([sys.executable, __file__, *words, "--worker"],
                                env=dict(os.environ, OMP_NUM_THREADS="1"),
                                start_new_session=True)            # Ctrl-C is passed on, once
               for _ in range(args.workers)]
    try:
        codes = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        print("stopping once the updates at hand are saved", file=sys.stderr)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        raise
    if any(codes):
        raise SystemExit(f"study/run.py: a worker ended with exit code {max(map(abs, codes))}; "
                         "the same command goes on where it stopped")


def parse_args(argv=None):
    """Command line of study/run.py."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=number(int, 0, 3), nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=GROUPS, help="groups of arms")
    p.add_argument("--held-out", type=number(int, 8), default=256, help="noises of every row")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--workers", type=number(int, 1, 64), help="processes (default: one per core "
                   "on CPUs, else one)")
    p.add_argument("--again", action="store_true", help="also what has rows, unless they were made "
                   "on this machine: their checkpoints are missing, and a rerun checks them")
    p.add_argument("--report", action="store_true", help="only tables and figures")
    p.add_argument("--smoke", action="store_true", help="tiny sizes; numbers mean nothing")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.smoke:
        args.held_out = 8
    if not args.workers:
        args.workers = os.cpu_count() if pick_device(args.device).type == "cpu" else 1
    return args


def main(argv=None):
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(words)
    world = World(args)
    if args.worker:
        try:
            return run(args, world)
        except Stopped:                         # asked to stop, and saved
            sys.exit(128 + STOP["signal"])
    if not args.report:
        left = todo(args, world)
        print(f"{len(left)} runs to do, {args.workers} at a time")
        if any(arm.group != "clock" for arm, _ in left):
            run_side_by_side(args, words)
        run(args, world, alone=True)
        tidy(args.smoke)
    import report                                # tables and figures, from the rows
    report.write([row for row in read_results(args.smoke)
                  if (row["weights"], row["n"]) == (world.weights, world.n)], world,
                 len(todo(args, world)))


if __name__ == "__main__":
    run_main(main)
