"""Scores settings of the policy gradient and of its competitors: four tries a method, alike.

    python study/tune.py                       # an hour and a half on two CPU cores
    python study/tune.py --only jump own       # some of the methods

Each try learns at K = 4 with seed 0 and is scored on 128 noises that no table of the study and no
training sees (seeds from HELD_OUT + 2 000 000). Lines go to study/tuning.jsonl. The best try of a
method became its constants and defaults in rl_distill.py and arms.py: of pixels those of 'landing';
of 'pixels', the paper's channel, its --lr 3e-5. Two numbers and the control were not tuned.
"""
import argparse
import copy
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import arms                                     # puts the repository on the path
import run
# From the repository:
import rl_distill
from harness.runs import ROOT, log_line, run_main
from reward import standard_error
from teacher import HELD_OUT, noise_and_targets

STEPS, TUNE, NOISES = 4, HELD_OUT + 2 * 10 ** 6, 128
TRIES = {                                       # {method: flags, or constants of arms.py}
    "jump": [dict(group=group, updates=updates, lr=lr) for group, updates, lr in (
        (8, 20, 0.05), (4, 40, 0.05), (2, 80, 0.05), (4, 40, 0.025))],
    "pixels": [dict(channel="pixels", eta=0.3, group=group, updates=updates, epochs=epochs, lr=lr)
               for group, updates, epochs, lr in (
                   (8, 20, 1, 3e-5), (8, 20, 1, 1e-4), (8, 6, 4, 1e-5), (2, 80, 1, 1e-5))],
    "landing": [dict(channel="pixels", group=group, updates=updates, epochs=epochs, lr=lr)
                for group, updates, epochs, lr in (             # from the bundled policy's jumps
                    (8, 20, 1, 3e-5), (8, 20, 1, 1e-5), (8, 20, 4, 1e-5), (2, 80, 1, 1e-5))],
    "own": [dict(OWN_LR=lr) for lr in (0.01, 0.03, 0.1, 0.2)],
    "search": [dict(SEARCH_STD=std) for std in (
        (0.15, 0.03), (0.07, 0.01), (0.3, 0.03), (0.15, 0.01))],
    "cem": [dict(CEM_STD=std) for std in ((0.1, 0.01), (0.2, 0.01), (0.4, 0.01), (0.2, 0.03))]}


def attempt(method, settings, world):
    """Learn with these settings: (net, policy, network evaluations)."""
    args = rl_distill.parse_args(["--steps", str(STEPS), *world.smoke])
    flags = {k: value for k, value in settings.items() if k.islower()}
    vars(args).update(flags)
    net, train_set = copy.deepcopy(world.teacher), world.noises(0, args.noises)
    _, solver = world.start("teacher", net, world.reward, args, STEPS)
    if method == "landing":
        _, solver, _ = rl_distill.load_policy("checkpoints/policy.pt", world.device)
    policy = rl_distill.JumpPolicy(solver).to(world.device)
    constants = {k: value for k, value in settings.items() if k not in flags}
    with mock.patch.dict(vars(arms), constants):
        if method in arms.COMPETITORS:
            return net, *arms.COMPETITORS[method](net, policy, train_set, world.reward,
                                                  arms.evaluations(args) // STEPS,
                                                  world.alpha_bar, 0)
        with tempfile.TemporaryDirectory() as out:
            monitor_set = world.noises(HELD_OUT + 10 ** 6, rl_distill.MONITOR)
            rl_distill.train(net, policy, train_set, monitor_set, world.reward, args, Path(out),
                             world.device)
    return net, policy, arms.evaluations(args)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="+", choices=TRIES, default=TRIES, help="some of the methods")
    methods = p.parse_args(argv).only
    world = run.World(SimpleNamespace(device="auto", smoke=False))
    tune_set = noise_and_targets(world.teacher, TUNE, NOISES, world.device)
    for method in methods:
        for settings in TRIES[method]:
            began = time.time()
            net, policy, spent = attempt(method, settings, world)
            solver = policy.solver()
            score = rl_distill.deployed(net, solver, *tune_set, world.reward,
                                        world.alpha_bar)["reward"]
            row = dict(method=method, settings=settings, reward=score.mean().item(),
                       error=standard_error(score), times=solver.grid,
                       leans=solver.leans, train_nfe=spent, minutes=(time.time() - began) / 60,
                       commit=run.commit())
            log_line(ROOT / "study" / "tuning.jsonl", **row)
            print(row, flush=True)


if __name__ == "__main__":
    run_main(main)
