"""Exercises 8 and 9: the main job, shortened, in groups of eight, a line or a few changed.

    python assignments/bugs.py none       # as it should be
    python assignments/bugs.py a          # with silent mistake a (or b)
    python assignments/bugs.py a --show   # the changed lines: after you have made up your mind
    python assignments/bugs.py wide       # ten times the exploration; 'lean', 'rho': of one alone;
                                          # 'third': a third number, a factor on the noise;
                                          # 'search': random search in place of the gradient
"""
import argparse
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "study")]

JOB = ["--steps", "4", "--updates", "12", "--group", "8", "--noises", "64", "--held-out", "64"]
# (what stands in rl_distill.py, what the variant puts there)
VARIANTS = {
    "none": [],
    "a": [("logp = jump_logp(policy(j.k) * acts, j.u, std, acts)",
           "logp = jump_logp(policy(j.k) * acts, j.u, STD[0], acts)")],
    "b": [("t_next = next_time(t, u[:, 0], K - k)", "t_next = next_time(t, mean_u[:, 0], K - k)")],
    "wide": [("STD = 0.07, 0.01 ", "STD = 0.7, 0.1 ")],
    "lean": [("u = mean_u + std *", "u = mean_u + std * torch.tensor([0, 1], device=z.device) *")],
    "rho": [("u = mean_u + std *", "u = mean_u + std * torch.tensor([1, 0], device=z.device) *")],
    "search": [("seconds = train(net, policy, train_set, monitor_set, reward, args, out, device)",
                "import arms\n"
                "    rollouts, seconds = args.updates * NOISES_PER_UPDATE * args.group, 0.0\n"
                "    policy, _ = arms.random_search(net, policy, train_set, reward, rollouts,\n"
                "                                   alpha_bar, args.seed)")],
    "third": [                          # deployed by rollout(): a Solver has no third number
        ("torch.stack([logit_rho, leans], 1)", "torch.stack([logit_rho, leans, 0 * leans], 1)"),
        (".expand(len(x), 2)", ".expand(len(x), 3)"),
        ("logit_rho, lean = self(k) *", "logit_rho, lean, _ = self(k) *"),
        ("torch.tensor([k < steps - 1, k > 0]", "torch.tensor([k < steps - 1, k > 0, True]"),
        ("    return mean, sigma, x0_hat",
         "    D = x0_hat + spread(u[:, 1], x_t) * (x0_hat - x0_last)\n"
         "    noise = mean - spread(alpha_bar[t_next].sqrt(), x_t) * D\n"
         "    return mean + spread(u[:, 2], x_t) * noise, sigma, x0_hat"),
        ("policy = JumpPolicy(hand[start])",
         "policy = globals()['POLICY'] = JumpPolicy(hand[start])"),
        ("images = draw(net, solver, z, alpha_bar)",
         "learned = 'POLICY' in globals() and solver == POLICY.solver()\n"
         "    images = (rollout(net, POLICY, z, alpha_bar)[0] if learned else\n"
         "              draw(net, solver, z, alpha_bar))")],
}


def changed(which):
    """Source of rl_distill.py with the lines of a variant."""
    source = (ROOT / "rl_distill.py").read_text(encoding="utf-8")
    for right, wrong in VARIANTS[which]:
        if source.count(right) != 1:
            sys.exit(f"bugs.py: '{right}' must stand once in rl_distill.py; use the unchanged file")
        source = source.replace(right, wrong)
    return source


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("which", choices=VARIANTS)
    p.add_argument("--show", action="store_true", help="print what was changed, run nothing")
    args, more = p.parse_known_args(argv)
    source = changed(args.which)
    if args.show:
        for right, wrong in VARIANTS[args.which]:
            print(f"- {right}\n+ {wrong}")
        return
    from harness.runs import run_main
    module = types.ModuleType("rl_distill")
    module.__file__ = str(ROOT / "rl_distill.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    module.LOG_EVERY = 1                # every update is printed
    run_main(lambda: module.main([*JOB, *more]), "--group")


if __name__ == "__main__":
    main()
