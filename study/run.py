"""The evidence: what does the policy gradient add to baseline solvers, and what do competitors?

    python study/run.py --seeds 0 1 2          # all of it; the same command goes on after a kill
    python study/run.py --only baseline jumps  # some groups of arms.py
    python study/run.py --report               # tables again, from the rows that are there

One process. Every line of study/results.jsonl is one deployed sampler on held-out noises, with its
command and commit; arms that have their row are skipped. runs/study/COMMIT/ keeps what was learned:
a policy.pt and a log of every arm. Tables go to study/README.md (report.py).
"""
import argparse
import contextlib
import copy
import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from unittest import mock

import torch

import arms                                     # puts the repository on the path
import report
# From the repository:
import rl_distill
from ddpm import GRIDS, baseline_kinds, baseline_solver, linear_alpha_bar, parameter_count
from harness.checkpoints import kept, provenance, save_network
from harness.runs import ROOT, checksum, device_name, log_line, number, pick_device, run_main
from reward import best_baselines, closed, deploy, judged, standard_error
from rl_distill import load_inputs, load_model, training_evaluations
from teacher import HELD_OUT, TARGET, noise_and_targets

N, VALIDATION = rl_distill.HELD_NOISES, 4       # noises of a row; of the logs, in no table
RESULTS, README = ROOT / "study" / "results.jsonl", ROOT / "study" / "README.md"
KEY = "group", "name", "init", "steps", "seed"  # what a row is of

# ==== WHAT ALL ARMS SHARE =====================================================================


class World:
    """Networks, reward, judge and noises; baselines, which are scored once."""

    def __init__(self, device, n=None):
        """n: of held-out noises, N where it is not given."""
        args, self.device = rl_distill.parse_args(["--init", "teacher"]), device
        self.home = Path("runs", "study", commit())
        self.teacher, _, self.reward, self.judge = load_inputs(args, device)
        self.files = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in (
            args.teacher, *(f"{args.encoders}/{role}.pt" for role in ("coach", "judge")),
            *list(arms.INIT.values())[1:]))).hexdigest()[:12]
        self.alpha_bar, self.starts = linear_alpha_bar(device), {}
        self.train_set, self.validation_set, self.held_set = (
            (z, self.reward.view(target)) for z, target in (
                noise_and_targets(self.teacher, *seeds, device) for seeds in (
                    (0, rl_distill.NOISES), (HELD_OUT + 10 ** 6, VALIDATION), (HELD_OUT, n or N))))

    def learner(self, init):
        """(a network that may be changed, evaluations of its cloning)."""
        if init == "teacher":
            return copy.deepcopy(self.teacher), 0
        args = rl_distill.parse_args(["--init", arms.INIT[init]])
        _, net, _, spent = load_inputs(args, self.device)[1][0]
        return net, spent

    def start(self, init, steps, kind):
        """(name, Solver) of a kind, or of the best, on the grid that is best on training noises:
        where rl_distill.distil() starts."""
        if (init, steps) not in self.starts:
            z, target = (rows[:rl_distill.BASELINE_NOISES] if torch.is_tensor(rows) else
                         rows.rows(slice(rl_distill.BASELINE_NOISES)) for rows in self.train_set)
            self.starts[init, steps] = best_baselines(self.learner(init)[0], steps, z, target,
                                                      self.reward, self.alpha_bar)
        found = self.starts[init, steps]
        kind = next(iter(found)) if kind == "best" else kind
        return f"{kind} {found[kind][0]}", found[kind][1]

    def baselines(self, init, steps):
        """{(kind, grid): reward (n,)} of all baseline solvers on the held-out noises; kept."""
        net, n = self.learner(init)[0], len(self.held_set[0])
        names = [(kind, grid) for kind in baseline_kinds(net, steps) for grid in GRIDS]
        key = dict(files=self.files, net=checksum(net), steps=steps, n=n, names=names)
        return dict(zip(names, kept("study-baselines", key, lambda: torch.stack([
            deploy(net, baseline_solver(*name, steps), *self.held_set, self.reward,
                  self.alpha_bar)[1] for name in names]), self.device)))

    def strongest(self, init, steps):
        """(name, reward (n,)) of the baseline that is best on the held-out noises themselves."""
        found = self.baselines(init, steps)
        best = max(found, key=lambda name: found[name].mean().item())
        return " ".join(best), found[best]


# ==== PLAYING ONE ARM =========================================================================

class Counted:
    """A reward that counts the images it is asked of; one that gets a gradient counts three."""

    def __init__(self, reward):
        self.reward, self.calls = reward, 0

    def __call__(self, images, target):
        self.calls += len(images) * (3 if images.requires_grad else 1)
        return self.reward(images, target)


def arguments(arm, seed):
    """The arguments of rl_distill.py that are this arm's."""
    return rl_distill.parse_args(["--init", arms.INIT[arm.init], *arm.flags, "--steps",
                                  str(arm.steps), "--seed", str(seed)])


def arm_before(arm):
    """The arm whose result another starts at; None where that is a baseline."""
    return next((a for a in arms.arms() if a.name == arms.LEARNED.get(arm.start)
                 and (a.init, a.steps) == (arm.init, arm.steps)), None)


def place(arm, seed, world):
    """Folder of an arm's policy.pt, below that of this commit."""
    words = f"{arm.group} {arm.name} {arm.init} {arm.steps} {seed}"
    return world.home / "".join(c if c.isalnum() else "-" for c in words)


def play(arm, seed, world):
    """The policy.pt of an arm that learns: the one that is there, or one learned now, as
    rl_distill.distil() does, or by a competitor. Its content has 'study': trained and cloned
    (network evaluations), calls of the reward, minutes, numbers, all with those of its start."""
    out = place(arm, seed, world)
    if (out / "policy.pt").exists():
        return out / "policy.pt"
    args = arguments(arm, seed)
    if before := arm_before(arm):
        net, content, solver = load_model(play(before, seed, world), world.device)
        start, past = before.name, content["study"]
    else:
        net, cloned = world.learner(arm.init)
        start, solver = world.start(arm.init, args.steps, arm.start)
        past = dict(trained=cloned, cloned=cloned, calls=0, minutes=0.0, numbers=0)
    if arm.start == "learned" and args.gains == "channel":
        solver = arms.channel_gains(solver, net.branches)
    shutil.rmtree(out, ignore_errors=True)                          # of a run that was killed
    out.mkdir(parents=True)
    spent = training_evaluations(args, min(args.noises, len(world.train_set[0])))
    torch.manual_seed(seed)                     # of the layer that a JumpUNet adds to the teacher
    jumps, began, reward = args.learn == "jumps", time.time(), Counted(world.reward)
    with open(out / "printed.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            mock.patch.object(rl_distill, "LOG_EVERY", args.updates), \
            arms.within(arm.method, seed):
        if arm.method in arms.COMPETITORS:
            solver, spent, *other = arms.COMPETITORS[arm.method](
                net, solver, world.train_set, reward, args, spent)
            net = other[0] if other else net
        else:
            solver, _ = rl_distill.train(net, solver, world.train_set, world.validation_set,
                                         reward, args, out)
        numbers = (rl_distill.action_mask(args.steps, len(solver.gains[0])).sum().item() if jumps
                   else past["numbers"] % parameter_count(net) + parameter_count(net))
    seconds = time.time() - began
    study = dict(trained=past["trained"] + spent, cloned=past["cloned"], numbers=numbers,
                 calls=past["calls"] + reward.calls, minutes=past["minutes"] + seconds / 60)
    save_network(out / "policy.pt", "policy", net, provenance(
        "study/run.py", args, seconds, world.device, start=start, trained=study["trained"],
        teacher=checksum(world.teacher)), half=jumps, network=type(net).__name__,
        solver=list(solver), study=study)
    (out / "state.pt").unlink(missing_ok=True)
    return out / "policy.pt"


def commit():
    """Commit of the code that makes the rows, '+' where tracked files were changed since."""
    def git(*words):
        return subprocess.run(["git", "--no-optional-locks", *words], cwd=ROOT, text=True,
                              capture_output=True).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", "*.py", "checkpoints")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def row_of(arm, seed, world, version):
    """Play an arm and measure it on the held-out noises; its row, all plain values. reward_error:
    standard error over noises; closed: of what the strongest baseline `start` leaves, paired."""
    (z, target), more = world.held_set, dict(trained=0, cloned=0, calls=0, numbers=0,
                                             minutes=0.0)
    if arm.name == "target":
        images, reward, solver = target.images, torch.zeros(len(z), device=world.device), TARGET
        against = {}
    else:
        name, best = world.strongest(arm.init, arm.steps)
        if arm.group == "baseline":
            net, cloned = world.learner(arm.init)
            rewards = {grid: R for (kind, grid), R in world.baselines(arm.init, arm.steps).items()
                       if kind == arm.name}
            more.update(trained=cloned, cloned=cloned, grid=max(
                rewards, key=lambda grid: rewards[grid].mean().item()))
            solver = baseline_solver(arm.name, more["grid"], arm.steps)
        else:
            net, content, solver = load_model(play(arm, seed, world), world.device)
            more.update(content["study"])                           # measured is the file
        images, reward = deploy(net, solver, z, target, world.reward, world.alpha_bar)
        share, error = closed(reward, best)
        against = dict(start=name, start_reward=best.mean().item(), closed=share,
                       closed_error=error)
    return dict(group=arm.group, name=arm.name, init=arm.init, steps=arm.steps, seed=seed, n=len(z),
                reward=reward.mean().item(), reward_error=standard_error(reward), **against,
                mse=(images - target.images).square().mean().item(),
                frechet=judged(images, world.judge), nfe=len(solver.leans), **more,
                needs_gradient=arm.method in arms.NEED_GRADIENT, times=solver.times,
                leans=solver.leans, gains=solver.gains if more["numbers"] < 999 else None,
                commit=version,
                command=f"python study/run.py --only {arm.group} --seeds {seed}",
                torch=str(torch.__version__), device=device_name(world.device))


# ==== THE LOOP ================================================================================

def read_rows(path):
    """{values of KEY: row} of a .jsonl, the first of equal ones; a torn line is no row."""
    rows = {}
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows.setdefault(tuple(row[name] for name in KEY), row)
    return rows


def todo(rows, seeds, groups=None):
    """[(arm, seed)] of all that has no row yet, the most important first."""
    return [(arm, seed) for group in arms.GROUPS if group in (groups or arms.GROUPS)
            for seed in seeds for arm in arms.arms() if arm.group == group
            and not (arm.once and seed) and (*arm[:4], seed) not in rows]


def parse_args(argv=None):
    """Command line of study/run.py."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=number(int, 0, 10 ** 6), nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=arms.GROUPS, help="groups of arms")
    p.add_argument("--device", default="auto", help="auto, cuda or cpu")
    p.add_argument("--report", action="store_true", help="only the tables")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    os.chdir(ROOT)                                              # targets are kept in its runs/
    if args.report:
        rows = read_rows(RESULTS)
        return report.write([*rows.values()], len(todo(rows, args.seeds)), README)
    world = World(pick_device(args.device))
    world.home.mkdir(parents=True, exist_ok=True)
    open(RESULTS, "a").close()                                  # it can be written, before the work
    left = todo(read_rows(RESULTS), args.seeds, args.only)
    print(f"{len(left)} samplers to do", flush=True)
    for arm, seed in left:
        began, row = time.time(), row_of(arm, seed, world, world.home.name)
        log_line(RESULTS, **row)
        print(f"{arm.init:8s}{arm.name:37s} K {arm.steps:2d} seed {seed}  reward "
              f"{row['reward']:8.4f}  closed {100 * (row.get('closed') or 0):4.0f} %  Fréchet "
              f"{row['frechet']:7.3f}  {time.time() - began:5.0f} s", flush=True)
    rows = read_rows(RESULTS)
    report.write([*rows.values()], len(todo(rows, args.seeds)), README)


if __name__ == "__main__":
    run_main(main)
