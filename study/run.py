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
from unittest import mock

import torch

import arms                                     # puts the repository on the path
import report
# From the repository:
import rl_distill
from ddpm import SOLVERS, Solver, linear_alpha_bar, seeded_noise
from harness.checkpoints import load_checkpoint, provenance, save_checkpoint
from harness.runs import (ROOT, checksum, chunk_size, claim_run, device_name, log_line, number,
                          pick_device, read_log, run_main, write_whole)
from reward import encode, judged_frechet, rewards, standard_error
from rl_distill import (HAND_NOISES, JumpPolicy, best_by_hand, load_inputs, load_policy,
                        save_policy, train)
from teacher import HELD_OUT, draw, noise_and_targets

RESULTS, README = ROOT / "study" / "results.jsonl", ROOT / "study" / "README.md"
IMAGES, RESAMPLED = 2000, 100                   # of a Fréchet distance; of its bootstrap
WATCHED = 4                                     # noises of a run's own log; in no table
RUNS = "jump", "student", "reward", "transfer", "ablation", "pixels"   # by rl_distill.py
KEY = "group", "name", "init", "steps", "seed", "n", "images", "weights"     # of the same row

# ==== ROWS AND CLAIMS =========================================================================


@functools.cache
def weights(init):
    """A short word for the checkpoints that an arm of this start reads."""
    args = rl_distill.parse_args(arms.INIT[init])
    return checksum([args.teacher, args.encoders, f"{args.encoders}/judge.pt"]
                    + [args.student] * (args.init == "student"))


def current(row):
    """Whether a row was made with the checkpoints that are there now."""
    return row["init"] in arms.INIT and row["weights"] == weights(row["init"])


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
    me = alive(os.getpid())
    for n in range(10 ** 6):
        holder = Path(f"{path}.{n}")
        with contextlib.suppress(FileExistsError):
            write_whole(holder, me.encode(), new=True)
        name = holder.read_text()
        if name and alive(name.split()[0]) == name:
            return name == me


def mine(path, claimed):
    """Whether it is for this process to make a file, under a claim; else waits until it is there,
    or until who is making it died."""
    while not path.exists():
        if claim(f"{claimed}.claim"):
            return not path.exists()
        time.sleep(1)
    return False


# ==== WHAT ALL ARMS SHARE =====================================================================

def command(arm, seed):
    """The flags of rl_distill.py that are this arm's."""
    return [*arms.INIT[arm.init], *arm.flags, "--steps", str(arm.steps), "--seed", str(seed)]


def frechet_error(features, content):
    """Standard error of judged_frechet by the bootstrap (Efron 1979): its spread over RESAMPLED
    choices of as many of the images' features (N, C), with replacement."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(features), (len(features),), generator=generator)
            for _ in range(RESAMPLED)]
    return torch.tensor([judged_frechet(features[i], content) for i in rows]).std().item()


class World:
    """Networks, reward, judge and noises. Targets and hand solvers are computed once and kept."""

    def __init__(self, args):
        self.device, self.smoke = pick_device(args.device), ["--smoke"] * args.smoke
        self.alpha_bar = linear_alpha_bar(self.device)
        self.args = rl_distill.parse_args(self.smoke)
        self.teacher, _, self.reward, self.judge = load_inputs(self.args, self.device)
        self.n, self.more = self.args.held_out, 16 if args.smoke else IMAGES
        self.code = checksum([rl_distill.__file__, arms.__file__])[:6]
        self.home = ROOT / "runs" / ("study-smoke" if args.smoke else "study")
        self.results = self.home / "results.jsonl" if args.smoke else RESULTS

    def folder(self, init):
        """Where everything lives that was made with the checkpoints of a start."""
        return self.home / weights(init)

    def kept(self, init, name, make):
        """The dict that make() returns, from the disk where it was made before; of several
        processes one makes it. Delete runs/study where ddpm.py's solvers changed."""
        path = self.folder(init) / f"{name}.pt"
        if mine(path, path):
            save_checkpoint(path, "kept", **make())
        return load_checkpoint(path, "kept")

    def noises(self, first, n, init="teacher"):
        """noise_and_targets() of the teacher of a start."""
        def make():
            teacher = load_inputs(self.parsed(init), self.device)[0]
            z, target = noise_and_targets(teacher, first, n, self.device)
            return dict(z=z.cpu(), target=target.cpu())
        teacher = "earlier" if init == "earlier" else "teacher"
        kept = self.kept(teacher, f"targets {first} {n}", make)
        return kept["z"].to(self.device), kept["target"].to(self.device)

    def parsed(self, init):
        """Arguments of rl_distill.py for a start."""
        return rl_distill.parse_args([*arms.INIT[init], *self.smoke])

    def images(self, arm):
        """Of how many images the Fréchet distance of an arm is: more where it is worth it."""
        judged = arm.init != "earlier" and arm.name in SOLVERS or arm.group in arms.JUDGED
        return max(self.n, self.more) if judged else self.n

    def drawn(self, net, solver, z):
        """Images (B, 3, H, W) of start noise z by a Solver or an Ipndm."""
        if isinstance(solver, arms.Ipndm):
            return torch.cat([solver(net, x, self.alpha_bar) for x in
                              z.split(chunk_size(self.device))])
        return draw(net, solver, z, self.alpha_bar)

    def measured(self, net, solver, arm, images=None):
        """What a row says of a solver's images: reward (n,) and Fréchet distance on the held-out
        noises, and the distance and its error of images(arm) noises, these among them. images:
        of the held-out noises, where they are drawn already."""
        z, target = self.noises(HELD_OUT, self.n, arm.init)
        images = self.drawn(net, solver, z) if images is None else images
        more = range(HELD_OUT + self.n, HELD_OUT + self.images(arm))
        if more:
            z = seeded_noise(more, z.shape[1:], device=self.device)
            images = torch.cat([images, self.drawn(net, solver, z)])
        judge, content = self.judge
        features = encode(judge, images)
        return dict(reward=rewards(self.reward, images[:self.n], target).cpu(), images=len(images),
                    frechet_held=judged_frechet(features[:self.n], content),
                    frechet=judged_frechet(features, content),
                    frechet_error=frechet_error(features, content))

    def hand(self, arm):
        """measured() of a hand solver, on the grid that is best on these very noises."""
        kind, init, steps = arm.name, arm.init, arm.steps

        def make():
            net, solvers = load_inputs(self.parsed(init), self.device)[1], arms.hand_solvers(
                kind, steps)
            z, target = self.noises(HELD_OUT, self.n, init)
            images = [self.drawn(net, solver, z) for solver in solvers]
            scores = [rewards(self.reward, x, target).mean().item() for x in images]
            i = scores.index(max(scores))
            return dict(self.measured(net, solvers[i], arm, images[i]),
                        times=solvers[i].grid, leans=getattr(solvers[i], "leans", []))
        return self.kept(init, f"hand {kind} {steps}", make)

    def best_hand(self, init, steps):
        """Reward (n,) of the hand solver that is best on these very noises: on the teacher, and on
        the networks an arm starts from."""
        starts = {init} if init == "earlier" else {"teacher", init}
        return max((self.hand(arms.Arm("hand", kind, who, steps))["reward"]
                    for who in starts for kind in arms.hand_kinds(who, steps)), key=torch.mean)

    def start(self, init, net, reward, args, K):
        """(name, Solver) of the hand solver at which rl_distill.py starts with K evaluations."""
        def make():
            some = (x[:HAND_NOISES] for x in self.noises(0, args.noises, init))
            hand = best_by_hand(net, K, *some, reward, self.alpha_bar)
            return dict(hand={name: [*map(list, solver)] for name, solver in hand.items()})
        name = f"start {K} {min(args.noises, HAND_NOISES)} {args.reward}"
        hand = self.kept(init, name, make)["hand"]
        return next((name, Solver(*hand[name])) for name in hand
                    if args.eta == 0 or "DDIM" in name)


# ==== PLAYING ONE ARM =========================================================================

def place(arm, seed, world):
    """Where the run of an arm by this rl_distill.py lives; its claims stand beside it."""
    words = f"{arm.group} {arm.name} {arm.steps} {seed} {world.code}"
    return world.folder(arm.init) / "".join(c if c.isalnum() else "-" for c in words)


def learned(arm, seed, world):
    """(net, Solver, minutes) of a run of rl_distill.py with the flags of an arm: the one that is
    there, or one that is played now, from its last checkpoint."""
    out = place(arm, seed, world)
    args = rl_distill.parse_args([*command(arm, seed), "--out", str(out), *world.smoke])
    if mine(out / "policy.pt", out):
        _, net, reward, _ = load_inputs(args, world.device)
        start, solver = (("learned jumps", learned(jump_arm(arm), seed, world)[1]) if arm.learned
                         else world.start(arm.init, net, reward, args, arm.steps))
        policy = JumpPolicy(solver).to(world.device)
        args.resume = (out / "config.json").exists()
        claim_run(args, "study")
        with open(out / "printed.txt", "a", encoding="utf-8") as log, \
                contextlib.redirect_stdout(log), \
                mock.patch.dict(vars(rl_distill), arms.CHANGES[arm.change]):
            seconds = train(net, policy, world.noises(0, args.noises),
                            world.noises(HELD_OUT + 10 ** 6, WATCHED), reward, args, out,
                            world.device)
        save_policy(out / "policy.pt", net, policy.solver(),
                    provenance("rl_distill.py", args, seconds, world.device, start=start),
                    args.channel == "jump")
    net, solver, content = load_policy(out / "policy.pt", world.device)
    return net, solver, content["provenance"]["minutes"]


def jump_arm(arm):
    """The policy gradient of the main job with as many evaluations."""
    return arms.Arm("jump", "policy gradient", "teacher", arm.steps)


def play(arm, seed, world):
    """Find the policy of an arm, as rl_distill.main does, or by a competitor, and measure it.
    Returns (measured() with times and leans, minutes, network evaluations)."""
    if arm.group == "hand":
        return world.hand(arm), 0.0, 0
    began, args = time.time(), rl_distill.parse_args([*command(arm, seed), *world.smoke])
    teacher, net, reward, _ = load_inputs(args, world.device)
    train_set, spent = world.noises(0, args.noises), arms.evaluations(args)
    if arm.group == "transfer" and arm.learned:
        solver, minutes, spent = learned(jump_arm(arm), seed, world)[1], 0.0, 0
    elif arm.group == "all":
        def make():
            hand = {K: world.start("teacher", teacher, reward, args, K)[1] for K in arms.COUNTS}
            solvers = arms.learn_shared(teacher, hand, train_set, reward, args, world.alpha_bar)
            return dict({str(K): [*map(list, solver)] for K, solver in solvers.items()},
                        minutes=(time.time() - began) / 60 / len(solvers))
        kept = world.kept("teacher", f"all {seed} {world.code}", make)
        solver, minutes = Solver(*kept[str(arm.steps)]), kept["minutes"]
    elif arm.group in arms.COMPETITORS:
        solver = (learned(jump_arm(arm), seed, world) if arm.learned else
                  world.start(arm.init, net, reward, args, arm.steps))[1]
        policy, spent = arms.COMPETITORS[arm.group](
            net, JumpPolicy(solver).to(world.device), train_set, reward, spent // args.steps,
            world.alpha_bar, seed)
        solver, minutes = policy.solver(), (time.time() - began) / 60
    else:
        net, solver, minutes = learned(arm, seed, world)
    result = world.measured(net, solver, arm)
    return dict(result, times=solver.grid, leans=solver.leans), minutes, spent


def commit():
    """Commit of the code that makes the rows, '+' where tracked files were changed since."""
    def git(*words):
        return subprocess.run(["git", "--no-optional-locks", *words], cwd=ROOT, text=True,
                              capture_output=True).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", "*.py", "checkpoints")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def row_of(arm, seed, world, version):
    """Play an arm; its row, all plain values. gain: paired, over the best hand solver, 0 of a hand
    solver; closed: its share of what that one leaves to the target."""
    result, minutes, spent = play(arm, seed, world)
    reward = result["reward"]
    best = reward if arm.group == "hand" else world.best_hand(arm.init, arm.steps)
    gain, left = reward - best, -best                   # the target has reward 0
    words = (["study/run.py", "--only", arm.group, "--seeds", str(seed)]
             if arm.group not in RUNS or arm.change or arm.learned else
             ["rl_distill.py", *command(arm, seed)])
    return dict(group=arm.group, name=arm.name, init=arm.init, steps=arm.steps, seed=seed,
                n=world.n, reward=reward.mean().item(), reward_error=standard_error(reward),
                gain=gain.mean().item(), gain_error=standard_error(gain),
                closed=(gain.mean() / left.mean()).item(), frechet_held=result["frechet_held"],
                frechet=result["frechet"], frechet_error=result["frechet_error"],
                images=result["images"], times=result["times"], leans=result["leans"],
                minutes=minutes, train_nfe=spent,
                command=" ".join(["python", *words, *world.smoke]), commit=version,
                weights=weights(arm.init), torch=str(torch.__version__),
                device=device_name(world.device))


# ==== THE LOOP ================================================================================

def todo(args, world):
    """[(arm, seed)] of everything that has no row yet, the most important first."""
    done = read_rows(world.results)
    chosen = [(arm, seed) for group in arms.GROUPS if group in (args.only or arms.GROUPS)
              for seed in ([0] if group in arms.ONCE else args.seeds)
              for arm in arms.arms() if arm.group == group]
    return [(arm, seed) for arm, seed in chosen
            if (*arm[:4], seed, world.n, world.images(arm), weights(arm.init)) not in done]


def work(args, world):
    """Play what has no row and no living player, until nothing is left."""
    version, everything = commit(), todo(args, world)
    for arm, seed in everything:
        if claim(f"{place(arm, seed, world)}.claim") and (arm, seed) in todo(args, world):
            row = row_of(arm, seed, world, version)
            log_line(world.results, **row)
            closed = f"closed {100 * row['closed']:4.0f} %" if arm.group != "hand" else " " * 13
            print(f"{arm.init:8s} {arm.name:26s} K {arm.steps:2d} seed {seed}  reward "
                  f"{row['reward']:8.4f}  {closed}  Fréchet {row['frechet']:7.3f}  "
                  f"{row['minutes']:5.1f} min", flush=True)


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
            for first, n in ((0, world.args.noises), (HELD_OUT, world.n)):
                world.noises(first, n)          # before the workers, with all threads
            print(f"{len(todo(args, world))} runs to do, {args.workers} at a time", flush=True)
            work_side_by_side(args, words)
    except KeyboardInterrupt:
        sys.exit(1 if args.worker else "study/run.py: interrupted; the same command goes on")
    if not args.worker:
        rows = [*filter(current, read_rows(world.results).values())]
        args.only = None
        report.write(rows, len(todo(args, world)), None if args.smoke else README)


if __name__ == "__main__":
    run_main(main, "--workers")
