"""Tables of the study, from the rows of results.jsonl and fresh.jsonl, into study/README.md, each
between two markers, and the pictures figures/study*.png.

Called by study/run.py. A line is a sampler, a column a number of evaluations K.
"""
import re
import statistics

import arms                                     # puts the repository on the path
# From the repository:
from harness.images import new_figure
from harness.runs import ROOT, BadInput, read_log, write_whole

FIGURE, FRESH = ROOT / "figures" / "study.png", ROOT / "study" / "fresh.jsonl"
SUMMED, ASIDE = ("jumps", "search", "fixed", "pathwise", "weights", "paper"), \
    "times and leans|channel|learned jumps"         # arms of the first table: groups, and not these

# ==== TABLES ==================================================================================


def mean_std(values, form):
    """'mean ± std' over seeds in a format such as '.3f'; one value alone without a spread."""
    std = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{std}"


def lines_of(rows):
    """{(init, name): {K: its rows, one a seed}}, in the order of arms.py; not the target."""
    found = {}
    for init, name in dict.fromkeys((arm.init, arm.name) for arm in arms.arms()):
        mine = [row for row in rows if (row["init"], row["name"]) == (init, name)]
        if mine and name != "target":
            found[init, name] = {K: [row for row in mine if row["steps"] == K]
                                 for K in sorted({row["steps"] for row in mine})}
    return found


def table(rows, cell):
    """Lines of markdown; cell: the text for the rows of all seeds of a sampler at one K."""
    lines = lines_of(rows)
    counts = sorted({K for at in lines.values() for K in at})
    return ["| network, sampler | " + " | ".join(f"K = {K}" for K in counts) + " |",
            "|---|" + "---|" * len(counts),
            *(f"| {init}, {name} | " + " | ".join(
                cell(at[K]) if K in at else "" for K in counts) + " |"
              for (init, name), at in lines.items())]


def closed_cell(same):
    """A cell for table(): per cent closed; or, far below, where it started."""
    if statistics.fmean(row["closed"] for row in same) < -1:
        return f"far below {same[0]['start']}"
    return column("closed", ".0f", "closed_error", 100)(same)


def column(name, form, error=None, scale=1):
    """A cell for table(): mean ± std over seeds of a column (mean of its error over noises)."""
    def cell(same):
        text = mean_std([scale * row[name] for row in same], form)
        errors = [scale * row[error] for row in same] if error else []
        return text + (f" ({statistics.fmean(errors):{form}})" if errors else "")
    return cell


def cost(row):
    """All that a sampler learned from, in thousands of evaluations."""
    return (row["trained"] + arms.COACH * row["calls"]) / 1000


def summary(rows, fresh):
    """Lines of markdown: the main arms at three evaluations, what closes most first."""
    likeness = {row["name"]: f"{100 * row['likeness']:.0f}" for row in fresh if row["steps"] == 3}
    found = {name: at[3] for (init, name), at in lines_of(rows).items() if init == "teacher" and
             3 in at and at[3][0]["group"] in SUMMED and not re.search(ASIDE, name)}
    return ["| sampler, three evaluations | cost, thousands | of this evaluations | closed, % | "
            "likeness, % | Fréchet | squared error |", "|---|" + "---|" * 6,
            *(f"| {name} | {cost(same[0]):.0f} | {same[0]['trained'] / 1000:.0f} | "
              f"{column('closed', '.0f', scale=100)(same)} | {likeness.get(name, '')} | "
              f"{column('frechet', '.2f')(same)} | {column('mse', '.4f')(same)[:6]} |"
              for name, same in sorted(found.items(), key=lambda item: -statistics.fmean(
                  row["closed"] for row in item[1])))]


def fresh_rows():
    """What fresh.py has measured so far."""
    return read_log(FRESH) if FRESH.exists() else []


def fresh_table(rows):
    """Lines of markdown: every sampler on fresh noises; in brackets differences to another."""
    def cell(row, kind, scale, form):
        more = (f" ({scale * row['more_' + kind]:+{form}} ± "
                f"{scale * row[f'more_{kind}_error']:{form}})" if row["more_frechet_error"] else "")
        return f"{scale * row[kind]:{form}}{more}"
    return ["| K | seed | sampler | cost, thousands | closed, % | likeness, % | Fréchet | "
            "Fréchet of patches |", "|---|" + "---|" * 7,
            *("| {steps} | {seed} | {name} | {cost:.0f} | ".format(**row) + " | ".join(
                cell(row, *kind) for kind in (("reward", 100, ".1f"), ("likeness", 100, ".1f"),
                                              ("frechet", 1, ".2f"), ("patches", 1, ".2f"))) + " |"
              for row in sorted(rows, key=lambda row: (row["steps"], row["seed"], row["reward"])))]


def costs(rows):
    """Lines of markdown: what each learned sampler cost, its K in one line."""
    lines = ["| network, sampler | K | training evaluations, thousands | of these cloning | calls of "
             "the reward, thousands | minutes | numbers changed | needs the reward's gradient |",
             "|---|" + "---|" * 7]
    for (init, name), at in lines_of(rows).items():
        cells = [[str(K) for K in at],
                 [f"{same[0]['trained'] / 1000:.1f}" for same in at.values()],
                 dict.fromkeys(f"{same[0]['cloned'] / 1000:.0f}" for same in at.values()),
                 [f"{same[0]['calls'] / 1000:.1f}" for same in at.values()],
                 [f"{statistics.fmean(r['minutes'] for r in same):.1f}" for same in at.values()],
                 [f"{same[0]['numbers']:,d}" for same in at.values()],
                 ["yes" if any(same[0]["needs_gradient"] for same in at.values()) else "no"]]
        lines.append(f"| {init}, {name} | " + " | ".join("; ".join(cell) for cell in cells) + " |")
    return lines


def tables(rows, missing):
    """All that stands between the markers, as lines; missing: samplers that have no row yet."""
    lines = [f"**Not complete yet: {missing} samplers are still to do.**", ""] if missing else []
    learned = [row for row in rows if row["group"] != "baseline"]

    def words(name):
        return ", ".join(sorted({str(row[name]) for row in rows}))
    target = [f" The target itself, {row['nfe']} evaluations: {row['frechet']:.2f}."
              for row in rows if row["name"] == "target"]
    lines += [f"Made with {words('device')}; torch {words('torch')}; commits {words('commit')}. "
              f"{words('n')} held-out noises, the same in all rows. ± is the standard deviation "
              "over training seeds; in brackets the standard error over noises.", "",
              "Reward `feature+perceptual`, 0 is the target's. Baselines on the grid that is best "
              "on these very noises:", "", *table(rows, column("reward", ".3f", "reward_error"))]
    lines += ["", "Per cent closed of what the strongest baseline of the same network and K leaves "
              "to the target, paired:", "", *table(learned, closed_cell)]
    lines += ["", f"Fréchet distance in the judge's features of these {words('n')} images to all "
              f"training images.{''.join(target)}", "", *table(rows, column("frechet", ".2f"))]
    lines += ["", "What it learned from (a backward pass counts two; with what its start learned "
              "from), minutes without cloning, and how many numbers change:", "", *costs(learned)]
    return lines


# ==== FIGURE ==================================================================================

COLOURS = {"policy gradient": "tab:red", "search": "grey", "pathwise gradient": "tab:green",
           "fixed loss": "tab:blue"}
KINDS = {"random": "search", "cross-entropy": "search", "pathwise": "pathwise gradient",
         "regression": "fixed loss", "cloning": "fixed loss", "progressive": "fixed loss",
         "consistency": "fixed loss", "DDIM": "fixed loss"}     # by first word; all others are ours
PANELS = 2, 3, 4


def kind_of(name):
    """Which of COLOURS an arm is."""
    return KINDS.get(re.split("[ ,]", name)[0], "policy gradient")


def best_baselines(rows):
    """{K: reward of the teacher's best baseline}."""
    best = {}
    for row in rows:
        if (row["group"], row["init"]) == ("baseline", "teacher"):
            best[row["steps"]] = max(row["reward"], best.get(row["steps"], row["reward"]))
    return best


def picture(rows, path):
    """Per cent closed of what the teacher's best baseline leaves, a line per method, a panel per K;
    a dot per seed; above, what is best at 3. Clones are shown too, whatever they cost."""
    best, shown = {K: R for K, R in best_baselines(rows).items() if K in PANELS}, {}
    for (init, name), at in lines_of(rows).items():
        group = next(iter(at.values()))[0]["group"]
        if (init == "teacher") != (group == "baseline"):
            cost = max(row["trained"] for same in at.values() for row in same) / 1e6
            label = name if init == "teacher" else f"{init} after {cost:.1f} M of cloning"
            closed = {K: [100 * (1 - row["reward"] / best[K]) for row in at[K]]
                      for K in best if K in at}
            if closed:
                shown[label] = closed, kind_of(name)
    order = sorted(shown, key=lambda label: statistics.fmean(
        shown[label][0].get(3, next(iter(shown[label][0].values())))))
    figure, axes = new_figure(1, len(PANELS), (13, 1.2 + 0.25 * len(order)), sharey=True)
    for axis, K in zip(axes, PANELS):
        for y, label in enumerate(order):
            values, kind = shown[label][0].get(K, []), shown[label][1]
            axis.plot([max(v, -30) for v in values], [y] * len(values), "o", alpha=0.7,
                      color=COLOURS[kind])
        axis.set(title=f"{K} evaluations", xlabel="% closed (-30: or less)", xlim=(-33, 100),
                 yticks=range(len(order)), yticklabels=order)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
    for kind, colour in COLOURS.items():
        axes[-1].plot([], [], "o", color=colour, label=kind)
    axes[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def sizes(rows, path):
    """Per cent closed at 3 evaluations against how many numbers are learned, a line per method."""
    figure, axis = new_figure(size=(5.5, 3.4))
    for method, colour in ((arms.GRADIENT, "tab:red"), ("cross-entropy", "black"),
                           ("random search", "grey")):
        found = [same for what in arms.GAINS if (same := [row for row in rows if (
            row["init"], row["name"], row["steps"]) == ("teacher", f"{method}, {what}", 3)])]
        axis.plot([same[0]["numbers"] for same in found], [statistics.fmean(
            100 * row["closed"] for row in same) for same in found], "-", color=colour)
        axis.plot([row["numbers"] for same in found for row in same],
                  [100 * row["closed"] for same in found for row in same], "o", color=colour,
                  label=method)
    axis.set(xscale="log", xlabel="numbers learned, at 23 thousand evaluations", ylabel="% closed")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path)


LEFT_OUT = "learned jumps|from DDIM|^pathwise, times|^regression, times"        # of this picture


def budgets(rows, path):
    """Per cent closed and Fréchet distance at 3 evaluations against all that was spent, of the main
    arms, a line where a method had several budgets; and of the bundled copy."""
    rows, lines = [row for row in rows if row["steps"] == 3], {}
    best = best_baselines(rows).get(3)
    for (init, name), at in lines_of(rows).items():
        if (init, name) == ("copy", "DDIM") or (
                init == "teacher" and at[3][0]["group"] in ("jumps", "fixed", "pathwise", "weights")
                and not re.search(LEFT_OUT, name)):
            method = "cloning of any jumps" if init == "copy" else re.sub(", (half|equal).*", "", name)
            lines.setdefault(method, []).append((
                cost(at[3][0]), 100 * (1 - statistics.fmean(r["reward"] for r in at[3]) / best),
                statistics.fmean(r["frechet"] for r in at[3])))
    figure, (*axes, key) = new_figure(1, 3, (13, 4), width_ratios=[4, 4, 2.6])
    drawn = dict.fromkeys(COLOURS, 0)
    for method, points in lines.items():
        kind = kind_of(method)
        x, *both = zip(*sorted(points))
        for axis, y in zip(axes, both):
            axis.plot(x, y, "osD^v*"[drawn[kind]] + "-", color=COLOURS[kind], label=method)
        drawn[kind] += 1
    for axis, label, title in zip(axes, ("% closed: more is nearer", "distance: less is nearer"),
                                  ("to the target, by the reward", "to photographs, Fréchet")):
        axis.set(xscale="log", ylabel=label, title=f"Nearer {title}",
                 xlabel="cost, thousand evaluations")
        axis.grid(alpha=0.3)
    key.axis("off")
    key.legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=8)
    figure.savefig(path)


# ==== INTO THE README =========================================================================

def write(rows, missing, path, figure=FIGURE):
    """Print the tables, put each between its markers in `path`, and the pictures beside `figure`;
    BadInput where markers are missing."""
    fresh, text = fresh_rows(), path.read_text(encoding="utf-8")
    for name, lines in (("summary", summary(rows, fresh)), ("fresh", fresh_table(fresh)),
                        ("tables", tables(rows, missing))):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        print("\n".join(lines))
        text, found = re.subn(f"(?<={begin}).*?(?={end})", lambda _: "\n".join(["", *lines, ""]),
                              text, count=1, flags=re.DOTALL)
        if not found:
            raise BadInput(f"{path} has no markers {begin} and {end}; put them back")
    write_whole(path, text.encode())
    picture(rows, figure)
    sizes(rows, figure.with_name("study_sizes.png"))
    budgets(rows, figure.with_name("study_budgets.png"))
    print(f"wrote {path}")
