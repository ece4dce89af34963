"""Tables of the study, from the rows of results.jsonl, into study/README.md between two markers,
and figures/study.png.

Called by study/run.py. A line is a sampler, a column a number of evaluations K.
"""
import re
import statistics

import arms                                     # puts the repository on the path
# From the repository:
from harness.figures import new_figure
from harness.runs import ROOT, BadInput, write_whole

FIGURE = ROOT / "figures" / "study.png"
MARKERS = "<!-- tables: begin -->", "<!-- tables: end -->"
COMPARED = 3                                    # evaluations K of the figure's second panel

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


def learned(rows):
    """Rows of what was learned."""
    return [row for row in rows if row["group"] != "baseline"]


def table(rows, cell):
    """Lines of markdown; cell: the text for the rows of all seeds of a sampler at one K."""
    lines = lines_of(rows)
    counts = sorted({K for at in lines.values() for K in at})
    return ["| network, sampler | " + " | ".join(f"K = {K}" for K in counts) + " |",
            "|---|" + "---|" * len(counts),
            *(f"| {init}, {name} | " + " | ".join(
                cell(at[K]) if K in at else "" for K in counts) + " |"
              for (init, name), at in lines.items())]


def column(name, form, error=None, scale=1):
    """A cell for table(): mean ± std over seeds of a column (mean of its error over noises)."""
    def cell(same):
        text = mean_std([scale * row[name] for row in same], form)
        errors = [scale * row[error] for row in same] if error else []
        return text + (f" ({statistics.fmean(errors):{form}})" if errors else "")
    return cell


def costs(rows):
    """Lines of markdown: what each learned sampler cost, its K in one line."""
    lines = ["| network, sampler | K | training evaluations, thousands | of these cloning "
             "| minutes | numbers changed | needs the reward's gradient |", "|---|" + "---|" * 6]
    for (init, name), at in lines_of(rows).items():
        cells = [[str(K) for K in at],
                 [f"{same[0]['trained'] / 1000:.1f}" for same in at.values()],
                 dict.fromkeys(f"{same[0]['cloned'] / 1000:.0f}" for same in at.values()),
                 [f"{statistics.fmean(r['minutes'] for r in same):.1f}" for same in at.values()],
                 [f"{same[0]['numbers']:,d}" for same in at.values()],
                 ["yes" if any(same[0]["needs_gradient"] for same in at.values()) else "no"]]
        lines.append(f"| {init}, {name} | " + " | ".join("; ".join(cell) for cell in cells) + " |")
    return lines


def tables(rows, missing):
    """All that stands between the markers, as lines; missing: samplers that have no row yet."""
    lines = [f"**Not complete yet: {missing} samplers are still to do.**", ""] if missing else []
    if not rows:
        return lines

    def words(name):
        return ", ".join(sorted({str(row[name]) for row in rows}))
    target = [f" The target itself, {row['nfe']} evaluations: {row['frechet']:.2f}."
              for row in rows if row["name"] == "target"]
    lines += [f"Made with {words('device')}; torch {words('torch')}; commits {words('commit')}. "
              f"{words('n')} held-out noises, the same in all rows. ± is the standard deviation "
              "over training seeds; in brackets the standard error over noises.", "",
              "Reward `feature+perceptual`, 0 is the target's. Baselines on the grid that is best "
              "on these very noises:", "", *table(rows, column("reward", ".3f", "reward_error"))]
    if learned(rows):
        lines += ["", "Per cent closed of what the strongest baseline of the same network and K "
                  "leaves to the target, paired:", "", *table(learned(rows), column(
                      "closed", ".0f", "closed_error", 100))]
    lines += ["", f"Fréchet distance in the judge's features of these {words('n')} images to all "
              f"training images.{''.join(target)}", "", *table(rows, column("frechet", ".2f"))]
    if learned(rows):
        lines += ["", "What it learned from (a backward pass counts two; with what its start "
                  "learned from), minutes without cloning, and how many numbers change:", "",
                  *costs(learned(rows))]
    return lines


# ==== FIGURE ==================================================================================

def picture(rows, path):
    """Distance to the target against K, of baselines and both policy gradients; and against
    training evaluations at K = COMPARED, of every method."""
    figure, axes = new_figure(1, 2, (15, 5))
    lines = lines_of(rows)

    def distance(same):
        return max(1e-4, -statistics.fmean(row["reward"] for row in same))  # 0: no place on a log
    for i, ((init, name), at) in enumerate(lines.items()):
        baseline = all(row["group"] == "baseline" for same in at.values() for row in same)
        if baseline or name in (arms.JUMPS, "weights"):
            style = ":" if baseline and init == "teacher" else "--" if baseline else "-"
            axes[0].plot([*at], [distance(same) for same in at.values()], "o" + style, markersize=4,
                         label=f"{init}, {name}")
        if COMPARED in at:
            y, x = distance(at[COMPARED]), at[COMPARED][0]["trained"]
            if x:
                error = statistics.fmean(row["reward_error"] for row in at[COMPARED])
                axes[1].errorbar(x, y, error, fmt="os^D"[i // 10 % 4], label=f"{init}, {name}")
            else:
                axes[1].axhline(y, color="grey", linestyle=":")
                axes[1].annotate(f"{init}, {name}", (0, y), xycoords=("axes fraction", "data"),
                                 fontsize=7, color="grey", va="bottom")
    axes[0].set(xscale="log", yscale="log", xlabel="network evaluations K",
                ylabel="distance to the target, -reward")
    ticks = sorted({K for at in lines.values() for K in at})
    axes[0].set_xticks(ticks, ticks)
    axes[0].minorticks_off()
    axes[1].set(xscale="log", yscale="log", xlabel="training evaluations",
                title=f"K = {COMPARED}; error bars over noises")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="upper left" if axis is axes[1] else "lower left",
                        **(dict(bbox_to_anchor=(1, 1)) if axis is axes[1] else {}))
    figure.savefig(path)


# ==== INTO THE README =========================================================================

def write(rows, missing, path, figure=FIGURE):
    """Print the tables, and put them between the markers of `path`, if any, and the picture into
    `figure`; BadInput where there are no markers."""
    text = "\n".join(tables(rows, missing))
    print(text)
    if path is None:
        return
    old = path.read_text(encoding="utf-8")
    between = re.compile(f"(?<={MARKERS[0]}).*?(?={MARKERS[1]})", re.DOTALL)
    if not between.search(old):
        raise BadInput(f"{path} has no markers {' and '.join(MARKERS)}; put them back")
    write_whole(path, between.sub(lambda _: f"\n{text}\n", old, count=1).encode())
    if rows:
        picture(rows, figure)
    print(f"wrote {path}")
