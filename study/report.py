"""Tables and figures of the study, from the rows of results.jsonl and the checkpoints of its runs.

Imported by study/run.py; writes study/README.md and figures/study_*.png.
"""
import statistics
from collections import defaultdict

import torch

import run as study
from ddpm import make_grid, pyplot, save_figure
from rl_distill import deployed, plot_strips
from sample import save_frontier
from teacher import tile

COLUMNS = (("reward", "reward", 4), ("feature", "feature", 4), ("perceptual", "perceptual", 4),
           ("mse", "MSE", 4), ("histogram", "histogram", 3), ("frechet", "Fréchet", 3),
           ("precision", "prec.", 3), ("recall", "recall", 3), ("density", "dens.", 3),
           ("coverage", "cover.", 3))
TITLES = {
    "hand": "Hand grids, no training",
    "steps": "Step sizes reinforced, and the same on the average of its grids",
    "search": "Random search of a grid, with as many rollouts",
    "pixels": "Landings reinforced",
    "both": "Both channels in turns",
    "backprop": "The reward's own gradient in place of the policy gradient",
    "rewards": "One reward alone (the columns are the same for all)",
    "cost": "A price per evaluation: the number of steps becomes part of what is learned",
    "ablation": "The policy gradient, varied",
}
INITS = {"teacher": "teacher, DDIM", "teacher, 2nd": "teacher, 2nd order", "student": "student"}
BRIEF = {("hand", "uniform"): "uniform grid", ("hand", "quadratic"): "quadratic grid",
         ("search", "random search"): "searched grid", ("steps", "RL steps"): "RL steps",
         ("pixels", "RL pixels"): "RL landings", ("both", "RL both, in turns"): "RL both",
         ("backprop", "backprop-last"): "own gradient, last jump",
         ("backprop", "backprop"): "own gradient, all jumps"}


def mean_std(values, digits):
    """'mean ± std' over seeds; one value alone without a spread."""
    values = list(values)
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def groups_of(rows):
    """{(group, init, steps, name): rows of all seeds}, in the order of the study."""
    out = defaultdict(list)
    order = {group: i for i, group in enumerate(study.GROUPS)}
    for row in sorted(rows, key=lambda r: (order[r["group"]], r["init"], r["steps"])):
        out[row["group"], row["init"], row["steps"], row["name"]].append(row)
    return out


def verdict(rows):
    """Gain over the best hand grid: mean ± std over seeds, and whether it can be told from 0.

    'better' or 'worse' where every seed's paired gain is beyond two standard errors on that side
    and their mean beyond two standard deviations of the seeds; one seed is never told apart.
    """
    gains, errors = [r["gain"] for r in rows], [r["gain_error"] for r in rows]
    mean = statistics.fmean(gains)
    spread = statistics.stdev(gains) if len(gains) > 1 else float("inf")
    clear = (all(abs(g) > 2 * e and g * mean > 0 for g, e in zip(gains, errors))
             and abs(mean) > 2 * spread)
    text = f"{mean:+.4f}" + (f" ± {spread:.4f}" if len(gains) > 1 else "")
    return text, f"{statistics.fmean(errors):.4f}", ("better" if mean > 0 else "worse") if clear \
        else "not told apart"


def brief(rows, key, digits):
    """Markdown table of one quantity: a line per sampler, a column per number of evaluations.

    Trained samplers are mean ± standard deviation over the seeds.
    """
    counts = sorted({r["steps"] for r in rows if r["group"] == "hand"})
    found = groups_of(rows)
    lines = ["| evaluations | " + " | ".join(map(str, counts)) + " |",
             "|---|" + "---|" * len(counts)]
    for init, start in INITS.items():
        for (group, name), label in BRIEF.items():
            cells = [mean_std((r[key] for r in found[group, init, k, name]), digits)
                     if (group, init, k, name) in found else "" for k in counts]
            if any(cells):
                lines.append(f"| {start}, {label} | " + " | ".join(cells) + " |")
    return lines


def tables(rows, missing):
    """study/README.md as a list of lines; missing: runs that have no row yet."""
    lines = ["# What does reinforcement add, and where?", "",
             "Written by `python study/run.py`; every line of `results.jsonl` has its command and "
             f"commit. Held-out noise, n = {rows[0]['n']}; ± is the standard deviation over "
             "training seeds. *reward* is feature+perceptual, 0: the teacher's own 50 steps, "
             "whatever was trained on. *gain* is that reward minus the one of the hand grid that "
             "is best on these very noises, with the same model and (rounded) number of "
             "evaluations; *error* its standard error over noises, paired. *told apart?*: every "
             "seed is beyond two errors on one side, and their mean beyond two standard "
             "deviations of the seeds; the seeds share noises and baseline, and no correction is "
             "made for the many rows. Fréchet distance, precision, recall, density and coverage "
             "are in the judge's features. *ms*: per image of a batch of 64 with that many "
             "evaluations, measured alone on all cores. *training*: network evaluations, a "
             "backward pass counting two; 256 teacher images of 50 evaluations come on top, once "
             "for all. *min*: minutes on one CPU thread, other runs on the other cores. The search "
             "spends as many rollouts as RL steps, each try on the same 64 training noises.", ""]
    if missing:
        lines += [f"**Not complete: {missing} runs are still to do (`python study/run.py` goes "
                  "on).**", ""]
    lines += ["## In short", "", "Reward (0: the teacher's 50-step image):", "",
              *brief(rows, "reward", 3), "", "Fréchet distance in the judge's features:", "",
              *brief(rows, "frechet", 2), ""]
    grouped, last = groups_of(rows), None
    ms = {(init, k): same[0]["ms"] for (group, init, k, _), same in grouped.items()
          if group == "clock"}
    for (group, init, steps, name), same in grouped.items():
        if group == "clock":
            continue
        trained = "gain" in same[0]
        if group != last:
            head = ["start", "sampler", "K", "evaluations", *(c[1] for c in COLUMNS), "ms"]
            head += ["gain", "error", "told apart?", "training", "min", "seeds"] * trained
            lines += ["", f"## {TITLES[group]}", "", "| " + " | ".join(head) + " |",
                      "|" + "---|" * len(head)]
            last = group
        cells = [init, name, str(steps), mean_std((r["nfe"] for r in same), 2)]
        cells += [mean_std((r[key] for r in same), digits) for key, _, digits in COLUMNS]
        nfe = statistics.fmean(r["nfe"] for r in same)
        cells.append(f"{ms[init, steps] * nfe / steps:.1f}" if (init, steps) in ms else "")
        if trained:
            cells += [*verdict(same), f"{same[0]['train_nfe'] / 1000:.0f} k",
                      f"{statistics.fmean(r['minutes'] for r in same):.1f}", str(len(same))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot_frontier(rows, path):
    """Fréchet distance and reward against evaluations, all methods; + where steps cost."""
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 5))
    colors = dict(zip(INITS, ("tab:blue", "tab:green", "tab:red")))
    styles = {"uniform grid": (":", "."), "quadratic grid": ("-", "."), "searched grid": ("", "x"),
              "RL steps": ("--", "o"), "RL landings": ("--", "s"), "RL both": ("--", "D"),
              "own gradient, last jump": ("-.", "v"), "own gradient, all jumps": ("-.", "^"),
              "RL steps, by cost": ("", "+")}
    lines = defaultdict(list)
    for (group, init, steps, name), same in groups_of(rows).items():
        label = "RL steps, by cost" if group == "cost" else BRIEF.get((group, name))
        if label:
            lines[init, label].append([statistics.fmean(r[c] for r in same)
                                       for c in ("nfe", "frechet", "reward")])
    for (init, label), points in sorted(lines.items(), key=lambda item: list(styles).index(
            item[0][1])):
        points, (dashes, marker) = sorted(points), styles[label]
        for axis, column in zip(axes, (1, 2)):
            axis.plot([p[0] for p in points], [p[column] for p in points], markersize=5,
                      linestyle=dashes, marker=marker, color=colors[init], linewidth=1,
                      label=f"{INITS[init]}, {label}")
    axes[0].set_yscale("log")
    axes[0].set_yticks((1.5, 2, 3, 5, 10, 20), ("1.5", "2", "3", "5", "10", "20"))
    axes[0].set_yticks([], minor=True)
    axes[1].set_yscale("symlog", linthresh=0.1)
    ticks = (-5, -2, -1, -0.5, -0.2, -0.1, 0)
    axes[1].set_yticks(ticks, map(str, ticks))
    save_frontier(figure, axes, (1, 2, 3, 4, 6, 8, 10, 20, 50), path)


def plot_grids(rows, path, steps=4):
    """Learned times over training, four evaluations, every seed."""
    chosen = [same for (group, _, k, name), same in groups_of(rows).items()
              if (group, k, name) == ("steps", steps, "RL steps")]
    panels = max(1, len(chosen))                # an empty one where no such run has a row yet
    figure, axes = pyplot().subplots(1, panels, figsize=(4 * panels, 3.4), sharey=True,
                                     squeeze=False)
    for axis, same in zip(axes[0], chosen):
        for row in same:
            updates = range(1, len(row["grids"]) + 1)
            for k in range(1, steps):
                axis.plot(updates, [grid[k] for grid in row["grids"]], color=f"C{k - 1}",
                          linestyle=("-", "--", ":", "-.")[row["seed"]])
        for k, t in enumerate(make_grid("quadratic", steps)[1:-1]):
            axis.axhline(t, color=f"C{k}", alpha=0.3)
        axis.set(title=f"{INITS[same[0]['init']]} (faint: quadratic)", xlabel="updates")
    axes[0, 0].set_ylabel("mean t after each step")
    save_figure(figure, path)


def played(arm, seed, world, n):
    """deployed() of a trained arm on the first n held-out noises, from its checkpoint."""
    net, policy, args, _ = study.reinforce(arm, seed, world)
    return deployed(net, policy, *(x[:n] for x in world.held_set), world.every, arm.steps,
                    world.alpha_bar, may_stop=args.step_cost > 0)


def plot_panels(rows, world, arms, path, n=10):
    """The same noise through the teacher's 50 steps and through every method at 4 evaluations."""
    z, target = (x[:n] for x in world.held_set)
    panels = [("teacher, 50 evaluations", target)]
    for init in ("teacher", "teacher, 2nd", "student"):
        panels += [(f"{init}, quadratic grid", deployed(
            world.start(init), None, z, target, world.every, 4, world.alpha_bar,
            make_grid("quadratic", 4))["images"])]
        panels += [(f"{init}, {arm.name}", played(arm, 0, world, n)["images"])
                   for arm in arms if arm.init == init]
    plot_strips(panels, n, (7, 0.95 * len(panels)), path)


def plot_early(rows, world, arms, path, n=8):
    """Where steps cost: how many evaluations the noises get; images of those that get the fewest
    and the most, where they differ most; what goes with getting more (correlations)."""
    results = {arm: played(arm, 0, world, world.n) for arm in arms}
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 3.4), width_ratios=(1, 1.6))
    axes[0].hist([r["nfe"].tolist() for r in results.values()], bins=[k + 0.5 for k in range(9)],
                 label=[arm.name.removeprefix("RL steps, ") for arm in arms])
    axes[0].set(xlabel="evaluations", ylabel="noises", title="student, at most 8, seed 0")
    axes[0].legend()
    arm = min(arms, key=lambda arm: results[arm]["nfe"].long().bincount().max())
    target, once = world.held_set[1], deployed(
        world.start("student"), None, *world.held_set, world.every, 1, world.alpha_bar,
        make_grid("uniform", 1))
    what = {"contrast of the teacher's image": target.std((1, 2, 3)),
            "error in one evaluation": -world.main_reward(once["raw"])}
    nfe, images = results[arm]["nfe"], results[arm]["images"]
    counts = [nfe] + [played(arm, seed, world, world.n)["nfe"] for seed in (1, 2)
                      if study.is_trained(arm, seed, world)]
    told = [f"{name} " + ", ".join(f"{torch.corrcoef(torch.stack([c, x]))[0, 1]:.2f}"
                                   for c in counts) for name, x in what.items()]
    order = nfe.argsort(stable=True)
    strips = [x[i] for i in (order[:n], order[-n:]) for x in (target, images)]
    axes[1].imshow(tile(torch.cat(strips), n), interpolation="nearest")
    axes[1].set_title(f"{arm.name.removeprefix('RL steps, ')}, from above: fewest "
                      f"({nfe.min():.0f}), teacher and student; most ({nfe.max():.0f}), likewise\n"
                      "correlation of the evaluations (by seed) with " + ";\n".join(told),
                      fontsize=8)
    axes[1].axis("off")
    save_figure(figure, path)


def plot_hacking(rows, world, arms, path, n=10):
    """Coach against judge at two evaluations of the student, every reward and estimator: to the
    right the coach is happier, upwards the judge is less so. Images of the extreme cases."""
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 4.2), width_ratios=(1, 1.5))
    marks = [("before, quadratic grid", r) for r in rows if r["group"] == "hand" and
             (r["init"], r["steps"], r["name"]) == ("student", 2, "quadratic")]
    marks += [(r["name"], r) for r in rows
              if r["group"] == "rewards" or (r["group"], r["init"], r["steps"]) in (
                  ("pixels", "student", 2), ("both", "student", 2), ("backprop", "student", 2))]
    names = list(dict.fromkeys(name for name, _ in marks))
    for name in names:
        same = [r for other, r in marks if other == name]
        axes[0].plot([r["feature"] for r in same], [r["frechet"] for r in same], "o", label=name,
                     color=f"C{names.index(name)}")
    axes[0].set(xlabel="coach: feature cosine to the teacher's image",
                ylabel="judge: Fréchet distance")
    axes[0].locator_params(axis="x", nbins=5)
    axes[0].legend(fontsize=7)
    axes[0].grid(alpha=0.3)
    z, target = (x[:n] for x in world.held_set)
    strips = {"teacher's 50 steps": target, "before": deployed(
        world.start("student"), None, z, target, world.every, 2, world.alpha_bar,
        make_grid("quadratic", 2))["images"]}
    strips.update({arm.name: played(arm, 0, world, n)["images"] for arm in arms})
    axes[1].imshow(tile(torch.cat([*strips.values()]), n), interpolation="nearest")
    axes[1].set_title("from above: " + "; ".join(strips), fontsize=8)
    axes[1].axis("off")
    save_figure(figure, path)


# Figures with images: which trained arms (seed 0) they show
SHOWN = {
    plot_panels: lambda arm: arm.steps == 4 and arm.group in ("steps", "pixels", "both",
                                                              "backprop"),
    plot_early: lambda arm: arm.group == "cost" and arm.init == "student",
    plot_hacking: lambda arm: (arm.name, arm.init, arm.steps) in (
        ("backprop", "student", 2), ("backprop, feature, fast", "student", 2)),
}


def write(rows, world, missing=0):
    """All of it. Says what it wrote, and which figures had to stay as they were."""
    if not rows:
        return print("no rows yet")
    out = world.folder if world.smoke else study.ROOT / "figures"
    table = (world.folder if world.smoke else study.ROOT / "study") / "README.md"
    table.write_text("\n".join(tables(rows, missing)) + "\n", encoding="utf-8")
    plot_frontier(rows, out / "study_frontier.png")
    plot_grids(rows, out / "study_grids.png")
    written = [table, out / "study_frontier.png", out / "study_grids.png"]
    for plot, shows in SHOWN.items():
        path = out / f"study_{plot.__name__.removeprefix('plot_')}.png"
        arms = [arm for arm in study.arms() if shows(arm)]
        absent = {arm.group for arm in arms if not study.is_trained(arm, 0, world)}
        if absent:
            print(f"{path.name} stays as it is: its images need runs of another machine; python "
                  f"study/run.py --again --seeds 0 --only {' '.join(sorted(absent))} repeats them")
            continue
        plot(rows, world, arms, path)
        written.append(path)
    print(f"{len(rows)} rows: wrote " + ", ".join(str(p.relative_to(study.ROOT)) for p in written))
