"""The evidence: what does the policy gradient add to hand solvers, and what do its competitors?

    python study/run.py --seeds 0 1 2          # all of it; the same command goes on after a kill
    python study/run.py --only hand jump       # some groups of arms.py
    python study/run.py --report               # tables again, from the rows that are there
    python study/run.py --smoke                # tiny, minutes, numbers mean nothing; no tables kept

Every line of study/results.jsonl is one deployed sampler on held-out noise, with its command and
commit. Arms that have their row are skipped; runs/study/<hash of the checkpoints>/ keeps targets,
hand solvers, and the runs of rl_distill.py, which go on from their last checkpoint. On CPUs the
arms run side by side, one thread each. Tables go to study/README.md (report.py).
"""
import argparse
import contextlib
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import arms                                     # puts the repository on the path
import report
# From the repository:
import rl_distill
from ddpm import linear_alpha_bar
from harness.checkpoints import load_checkpoint, provenance, save_checkpoint, write_whole
from harness.runs import (ROOT, checksum, chunk_size, claim_run, device_name, log_line, number,
                          pick_device, read_log, run_main)
from reward import encode, judged_frechet, standard_error
from rl_distill import (HAND_NOISES, MONITOR, JumpPolicy, best_by_hand, deployed, load_inputs,
                        load_policy, save_policy, train)
from teacher import HELD_OUT, noise_and_targets

RESULTS, README = ROOT / "study" / "results.jsonl", ROOT / "study" / "README.md"
KEY = "group", "name", "init", "steps", "seed", "n", "weights"      # what makes a row the same row

# ==== ROWS AND CLAIMS =========================================================================


def read_rows(path):
    """{values of KEY: row} of a .jsonl, the newest of equal ones; a torn line is no row."""
    rows = {}
    for row in read_log(path):
        with contextlib.suppress(KeyError, TypeError):         # another JSON value is no row either
            rows[tuple(row[name] for name in KEY)] = row
    return rows


def alive(pid):
    """'pid start' of a living process, '' of a dead one: numbers are given again, so that where
    /proc tells (not on macOS) the time of its start belongs to its name."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(int(pid), 0)
        state, *more = stat.read_text().rpartition(")")[2].split() if stat.exists() else "-"
    except OSError:
        return ""
    return "" if state == "Z" else f"{pid} {more[18] if more else state}"


def claim(path):
    """True for one process alone, until that one is dead. It wrote its name to the first of path.0,
    path.1, ... that there was not; all before hold names of the dead."""
    for n in range(10 ** 6):
        holder = Path(f"{path}.{n}")
        with contextlib.suppress(FileExistsError):
            write_whole(holder, alive(os.getpid()).encode(), new=True)
            return True
        if alive(holder.read_text().split()[0]) == holder.read_text():
            return False


# ==== WHAT ALL ARMS SHARE =====================================================================

def command(arm, seed):
    """The flags of rl_distill.py that are this arm's."""
    return [*arms.INIT[arm.init], *arm.flags, "--steps", str(arm.steps), "--seed", str(seed)]


class World:
    """Networks, reward, judge and noises. Targets and hand solvers are computed once and kept."""

    def __init__(self, args):
        self.device, self.smoke = pick_device(args.device), ["--smoke"] * args.smoke
        self.alpha_bar = linear_alpha_bar(self.device)
        self.args = rl_distill.parse_args(self.smoke)
        self.teacher, _, self.reward, self.judge = load_inputs(self.args, self.device)
        self.n = self.args.held_out
        self.weights = checksum([self.args.teacher, self.args.student, self.args.encoders,
                                 f"{self.args.encoders}/judge.pt"]) + "-smoke" * args.smoke
        self.code = checksum([rl_distill.__file__])[:6]
        self.folder = ROOT / "runs" / "study" / self.weights
        self.results = self.folder / "results.jsonl" if args.smoke else RESULTS

    def kept(self, name, make):
        """The dict that make() returns, from the disk where it was made before."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            save_checkpoint(path, "kept", **make())
        return load_checkpoint(path, "kept")

    @functools.cached_property
    def sets(self):
        """Training, held-out and monitor noise with targets, as rl_distill.main has them."""
        def make(first, n):
            z, target = noise_and_targets(self.teacher, first, n, self.device)
            return dict(z=z.cpu(), target=target.cpu())
        found = [self.kept(f"targets {first} {n}", functools.partial(make, first, n))
                 for first, n in ((0, self.args.noises), (HELD_OUT, self.n),
                                  (HELD_OUT + 10 ** 6, MONITOR))]
        return [tuple(kept[k].to(self.device) for k in ("z", "target")) for kept in found]

    def measured(self, nets, solver):
        """What a row says of a solver on held-out noise: reward (n,), frechet, times, leans."""
        result = deployed(nets, solver, *self.sets[1], self.reward, self.alpha_bar)
        return dict(self.facts(**result), times=solver.grid, leans=solver.leans)

    def facts(self, images, reward):
        """reward (n,) and frechet of held-out images."""
        judge, content = self.judge
        return dict(reward=reward.cpu(), frechet=judged_frechet(encode(judge, images), content))

    def hand(self, init, steps, name):
        """measured() of a hand solver."""
        def make():
            args = rl_distill.parse_args([*arms.INIT[init], *self.smoke])
            args.steps = steps                  # one is none too few where nothing is learned
            nets = load_inputs(args, self.device)[1]
            solver = arms.hand_solvers(init, steps)[name]
            if not isinstance(solver, arms.Ipndm):
                return self.measured(nets, solver)
            z, target = (x.split(chunk_size(self.device)) for x in self.sets[1])
            images = [solver(nets[0], x, self.alpha_bar) for x in z]
            rewards = [self.reward(x, y)[0] for x, y in zip(images, target)]
            facts = self.facts(torch.cat(images), torch.cat(rewards))
            return dict(facts, times=solver.grid, leans=[])
        return self.kept(f"hand {init} {steps} {name}", make)

    def best_hand(self, init, steps):
        """Reward (n,) of the hand solver that is best on these very noises: on the teacher, and on
        the networks an arm starts from."""
        rewards = [self.hand(who, steps, name)["reward"] for who in dict.fromkeys(
            ("teacher", init)) for name in arms.hand_solvers(who, steps)]
        return max(rewards, key=torch.mean)

    def start(self, nets, args):
        """(name, policy) of the hand solver at which rl_distill.py starts."""
        some = (x[:HAND_NOISES] for x in self.sets[0])
        hand = best_by_hand(nets, *some, self.reward, self.alpha_bar)
        name = next(name for name in hand if args.eta == 0 or "DDIM" in name)
        return name, JumpPolicy(hand[name]).to(self.device)

    @functools.cached_property
    def target(self):
        """reward (n,) and frechet of the targets themselves."""
        _, target = self.sets[1]
        return self.kept("target", lambda: self.facts(target, torch.zeros(self.n)))


# ==== PLAYING ONE ARM =========================================================================

def place(arm, seed, world):
    """Where the run of an arm by this rl_distill.py lives; its claims stand beside it."""
    words = f"{arm.group} {arm.name} {arm.init} {arm.steps} {seed} {world.code}"
    return world.folder / "".join(c if c.isalnum() else "-" for c in words)


def play(arm, seed, world):
    """Find the policy of an arm, as rl_distill.main does, or by a competitor, and measure it.
    Returns (measured(), minutes, network evaluations)."""
    if arm.group == "hand":
        return world.hand(arm.init, arm.steps, arm.name), 0.0, 0
    out, began = place(arm, seed, world), time.time()
    args = rl_distill.parse_args([*command(arm, seed), "--out", str(out), *world.smoke])
    _, nets, reward, _ = load_inputs(args, world.device)
    train_set, _, monitor_set = world.sets
    if not (out / "policy.pt").exists():
        hand, policy = world.start(nets, args)
        if arm.group in arms.COMPETITORS:
            policy, spent = arms.COMPETITORS[arm.group](
                nets, policy, train_set, reward, arms.rollouts(args), world.alpha_bar, seed)
            return world.measured(nets, policy.solver()), (time.time() - began) / 60, spent
        args.resume = (out / "config.json").exists()
        claim_run(args, "study")
        with open(out / "printed.txt", "a", encoding="utf-8") as log, \
                contextlib.redirect_stdout(log):
            seconds = train(nets, policy, train_set, monitor_set, reward, args, out, world.device)
        save_policy(out / "policy.pt", nets, policy.solver(), provenance(
            "rl_distill.py", args, seconds, world.device, start=hand), args.channel == "jump")
    nets, solver, content = load_policy(out / "policy.pt", world.device)
    return world.measured(nets, solver), content["provenance"]["minutes"], arms.evaluations(args)


def commit():
    """Commit of the code that makes the rows, '+' where tracked files were changed since."""
    def git(*words):
        return subprocess.run(["git", "--no-optional-locks", *words], cwd=ROOT, text=True,
                              capture_output=True).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", "*.py", "checkpoints")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def row_of(arm, seed, world, version):
    """Play an arm; its row, all plain values. gain: paired, over the best hand solver; closed: its
    share of what that one leaves to the target."""
    result, minutes, spent = play(arm, seed, world)
    reward, best = result["reward"], world.best_hand(arm.init, arm.steps)
    gain, left = reward - best, world.target["reward"] - best
    words = (["study/run.py", "--only", arm.group, "--seeds", str(seed)]
             if arm.group in ("hand", *arms.COMPETITORS) else
             ["rl_distill.py", *command(arm, seed)])
    return dict(group=arm.group, name=arm.name, init=arm.init, steps=arm.steps, seed=seed,
                n=world.n, reward=reward.mean().item(), reward_error=standard_error(reward),
                gain=gain.mean().item(), gain_error=standard_error(gain),
                closed=(gain.mean() / left.mean()).item(), frechet=result["frechet"],
                target_frechet=world.target["frechet"], times=result["times"],
                leans=result["leans"], minutes=minutes, train_nfe=spent,
                command=" ".join(["python", *words, *world.smoke]), commit=version,
                weights=world.weights, torch=str(torch.__version__),
                device=device_name(world.device))


# ==== THE LOOP ================================================================================

def todo(args, world):
    """[(arm, seed)] of everything that has no row yet, the most important first."""
    done = read_rows(world.results)
    chosen = [(arm, seed) for group in arms.GROUPS if group in (args.only or arms.GROUPS)
              for seed in (args.seeds if group != "hand" else [0])
              for arm in arms.arms() if arm.group == group]
    return [(arm, seed) for arm, seed in chosen
            if (*arm[:4], seed, world.n, world.weights) not in done]


def work(args, world):
    """Play what has no row and no living player, until nothing is left."""
    version, everything = commit(), todo(args, world)
    for arm, seed in everything:
        path = place(arm, seed, world)
        if claim(path.with_name(path.name + ".claim")) and (arm, seed) in todo(args, world):
            row = row_of(arm, seed, world, version)
            log_line(world.results, **row)
            print(f"{arm.init:8s} {arm.name:26s} K {arm.steps:2d} seed {seed}  reward "
                  f"{row['reward']:8.4f}  closed {100 * row['closed']:4.0f} %  Fréchet "
                  f"{row['frechet']:7.3f}  {row['minutes']:5.1f} min", flush=True)


def work_side_by_side(args, words):
    """One process per worker, one thread each; SystemExit if one of them failed."""
    workers = [subprocess.Popen([sys.executable, __file__, *words, "--worker"],
                                env=dict(os.environ, OMP_NUM_THREADS="1"))
               for _ in range(args.workers)]
    try:
        if any([worker.wait() for worker in workers]):
            sys.exit("study/run.py: a worker failed; the same command goes on")
    finally:
        for worker in workers:
            worker.terminate()


def parse_args(argv=None):
    """Command line of study/run.py."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=number(int, 0, 10 ** 6), nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=arms.GROUPS, help="groups of arms")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--workers", type=number(int, 1, 64), help="processes (default: one per core "
                   "on CPUs, else one)")
    p.add_argument("--report", action="store_true", help="only the tables")
    p.add_argument("--smoke", action="store_true", help="tiny sizes; numbers mean nothing")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if not args.workers:
        args.workers = os.cpu_count() if pick_device(args.device).type == "cpu" else 1
    return args


def main(argv=None):
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(words)
    world = World(args)
    try:
        if args.worker or args.workers == 1 and not args.report:
            work(args, world)
        elif not args.report:
            world.sets, world.target            # before the workers, with all threads
            print(f"{len(todo(args, world))} runs to do, {args.workers} at a time", flush=True)
            work_side_by_side(args, words)
    except KeyboardInterrupt:
        sys.exit(1 if args.worker else "study/run.py: interrupted; the same command goes on")
    if not args.worker:
        rows = [r for r in read_rows(world.results).values() if r["weights"] == world.weights]
        args.only = None
        report.write(rows, len(todo(args, world)), None if args.smoke else README)


if __name__ == "__main__":
    run_main(main, "--workers")
