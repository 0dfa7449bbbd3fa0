"""Claims on trainings by MBF: races, their variants, and the settings found.

What a training costs or fails at is in its result; the reasons are made from it.
"""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Final

import matplotlib.pyplot as plt
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.plots.style import publication
from fisherlab.problems import describe
from fisherlab.reproduce.experiment import CONTROL, Bound, Claim, Experiment, Row, Setting
from fisherlab.reproduce.races import FRESH, RACES
from fisherlab.reproduce.training_races import MINUTES, at_end, ends_below, raced, short_run
from fisherlab.showing import number, percent, quoted


def _short_or_stale(ds: xr.Dataset) -> str:
    """Say how MBF ended with the published inverses, 20 steps old, and with fresh ones."""
    said, last = short_run(ds), at_end(ds)
    if FRESH not in last:
        return said
    loss = last[FRESH]
    return f"{said} With inverses of every step MBF's loss is {number(loss)} at the end."


def _training_row(place: str, data: str, losses: tuple[float, ...]) -> Row:
    names = ("mbf-shared", "kfac-goldfarb", "shampoo", "adam", "sgd-momentum")
    published = dict(zip(names, losses, strict=True))
    return Row(
        place,
        f"Training losses of five optimisers over epochs and time, {data}.",
        f"mbf-training-{data.lower()}",
        (
            Claim(
                "Final training losses at the tuned settings.",
                published,
                at_end,
                "nats a picture (FACES: half the squared error); CURVES and FACES are "
                "surrogates",
                0.05,
                tuple(sorted(published, key=lambda name: published[name])),
                reason=_short_or_stale,
            ),
            Claim(
                "The same without MBF.",
                others := {name: published[name] for name in names[1:]},
                at_end,
                tolerance=0.05,
                order=tuple(sorted(others, key=lambda name: others[name])),
                reason=short_run,
            ),
        ),
    )


CONVOLUTIONAL: Final = ("mbf", "kfac-eigen", "shampoo", "adam", "sgd-momentum")


def _accuracies(ds: xr.Dataset, problem: str) -> dict[str, float]:
    """Return the last accuracies, if they are of this data set."""
    same = problem.split("-", maxsplit=1)[0] == str(ds.attrs["problem"]).split("-")[0]
    return at_end(ds, "test_accuracy") if same else {}


def _lead(ds: xr.Dataset, problem: str) -> dict[str, float]:
    """Return by how much MBF's last accuracy is above the others'."""
    last = _accuracies(ds, problem)
    return {name: last["mbf"] - last[name] for name in last if name != "mbf"}


def _trained_other(ds: xr.Dataset, problem: str) -> str:
    """Say what was trained instead, how short, and how each ended."""
    trained = str(ds.attrs["problem"])
    said = f"Trained is `{trained}`, not `{problem}`. " if trained != problem else ""
    if not _accuracies(ds, problem):
        files = quoted([file.name for file in describe(problem).files])
        hours = MINUTES["mbf-training-cnn"][1] / 60
        return (
            f"{said}With {files} there: `--problem {problem}`, some {hours:.0f} hours of "
            "one core."
        )
    ends = [f"`{n}` {percent(v)}" for n, v in at_end(ds, "test_accuracy").items()]
    return f"{said}{short_run(ds)} Accuracies: {', '.join(ends)}."


def _accuracy_row(data: str, problem: str, accuracies: tuple[float, ...]) -> Row:
    published = {
        name: one / 100 for name, one in zip(CONVOLUTIONAL, accuracies, strict=True)
    }
    reason = partial(_trained_other, problem=problem)
    return Row(
        f"Figures 9 to 11, Table 1 ({data})",
        f"Validation accuracies of five optimisers, {problem}.",
        "mbf-training-cnn",
        (
            Claim(
                "Validation accuracies.",
                published,
                partial(_accuracies, problem=problem),
                "of Table 1, at the end",
                0.01,
                tuple(sorted(published, key=lambda name: published[name])),
                reason=reason,
            ),
            Claim(
                "MBF ends with the best accuracy.",
                dict.fromkeys(CONVOLUTIONAL[1:], Bound(at_least=0.0)),
                partial(_lead, problem=problem),
                "MBF's accuracy less another's",
                reason=reason,
            ),
        ),
        "the rates of all but MBF, which are ours",
    )


def _best(ds: xr.Dataset) -> dict[str, float]:
    """Return the setting of the smallest loss on the grid."""
    lowest = ds["loss"].where(ds["loss"] == ds["loss"].min(), drop=True)
    return {name: float(lowest[name][0]) for name in ("lr", "damping")}


def _scale_of_settings(ds: xr.Dataset) -> str:
    best, told = _best(ds), RACES["mbf-training-mnist"]
    published = told.runners["mbf-shared"]
    return (
        f"The best of the grid is lr {best['lr']:g}, λ {best['damping']:g} after "
        f"{int(ds.attrs['steps'])} steps of {str(ds.attrs['settings']).split(',')[0]}; "
        f"published are lr {published['lr']:g}, λ {published['damping']:g} after "
        f"{told.steps[1]:,} of {told.problem}. {percent(_finite(ds))} of the grid ended "
        "with a finite loss."
    )


def _finite(ds: xr.Dataset) -> float:
    return float(ds["loss"].notnull().mean())


def _stable(ds: xr.Dataset) -> dict[str, float]:
    """Return how many settings end, and how many of those with λ ≥ lr at 100 times."""
    large = ds["damping"] >= 100 * ds["lr"]
    safe = ds["loss"].where(large) < ds["start"]
    return {"λ ≥ 100 lr": float(safe.sum() / large.sum()), "all": _finite(ds)}


TRAINING_ROWS: Final = (
    _training_row(
        "Algorithm 2, Figures 7, 8, Table 4 (MNIST)",
        "MNIST",
        (51.49, 53.56, 53.80, 53.67, 55.63),
    ),
    _training_row("Figures 7, 8, Table 4 (FACES)", "FACES", (5.17, 5.55, 7.21, 5.55, 7.08)),
    _training_row(
        "Figure 15, Table 4 (CURVES)", "CURVES", (55.14, 56.47, 54.86, 55.23, 55.49)
    ),
    _accuracy_row("CIFAR-10", "cifar10-resnet32", (93.42, 93.02, 92.97, 93.34, 93.23)),
    _accuracy_row("CIFAR-100", "cifar100-vgg16", (74.80, 74.38, 73.37, 72.95, 73.99)),
    _accuracy_row("SVHN", "svhn-vgg11", (96.59, 96.37, 96.15, 96.34, 96.63)),
    Row(
        "Tables 5, 7, 8",
        "Ranges of the grid search and the settings chosen.",
        "mbf-settings",
        (
            Claim(
                "The best setting is that of the tables, within ten times.",
                {
                    "lr": Bound(at_least=1e-6, at_most=1e-4),
                    "damping": Bound(at_least=3e-5, at_most=3e-3),
                },
                _best,
                "lr 1e-5 and λ 3e-4 were chosen for MNIST and CURVES",
                reason=_scale_of_settings,
            ),
        ),
        "the whole ranges, which `fisherlab tune --grid bahamou` searches",
    ),
    Row(
        "Figure 18",
        "Sensitivity to learning rate and damping.",
        "mbf-settings",
        (
            Claim(
                "Training is stable over the grid.",
                {"all": Bound(at_least=0.9)},
                _stable,
                "share of the settings whose loss is finite",
                basis=CONTROL,
                reason=_scale_of_settings,
            ),
            Claim(
                "It is where λ is a hundred times the rate and more.",
                {"λ ≥ 100 lr": Bound(at_least=1.0)},
                _stable,
                "share of the settings that end below the loss of the beginning",
                basis=CONTROL,
                reason=_scale_of_settings,
            ),
        ),
    ),
    Row(
        "Algorithm 3",
        "Spatial averaging: one matrix a layer.",
        "mbf-variants",
        (
            ends_below(
                "It trains as well as all mini-blocks do.",
                {"shared / MBF": ("mbf-shared", "mbf")},
                most=1.05,
                basis=CONTROL,
            ),
        ),
    ),
    Row(
        "Algorithm 4, Figures 16, 17",
        "MBF-True beside MBF in training.",
        "mbf-variants",
        (
            ends_below(
                "MBF is as good as MBF-True, which samples labels.",
                {"MBF / MBF-True": ("mbf", "mbf-true")},
                most=1.05,
                how="ratio of the last training losses at equal steps",
            ),
        ),
        "convolutional networks",
    ),
    Row(
        "Update frequencies T₁, T₂",
        "MBF with fresh, with stale and with rare statistics and inverses.",
        "mbf-variants",
        (
            ends_below(
                "Inverses 20 steps old cost no more than 5 % of the loss.",
                {"T₂ = 20 / T₂ = 1": ("mbf", "mbf, inverses of every step")},
                most=1.05,
                basis=CONTROL,
            ),
            ends_below(
                "Nor do statistics of every tenth step.",
                {"T₁ = 10 / T₁ = 1": ("mbf, statistics every 10", "mbf")},
                most=1.05,
                basis=CONTROL,
            ),
        ),
    ),
)


RATES: Final = (1e-5, 1e-4, 1e-3)
DAMPINGS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS: Final = (30, 1_000)  # after 20 an inverse may be stale


def settings(setting: Setting) -> xr.Dataset:
    """Train with every rate and damping.

    Returns
    -------
    xarray.Dataset
        ``loss`` of the training examples at the end (lr, damping), NaN where it is not
        finite or the training failed; ``start``, that of the first weights.
    """
    steps = setting.steps or STEPS[not setting.quick]
    pairs = list(product(RATES, DAMPINGS))
    base = RACES["mbf-variants"]
    losses = []
    for lr, damping in pairs:
        one = {"mbf": {"lr": lr, "damping": damping}}
        chosen = replace(base, runners=one, looks=1)
        stored = ("mbf-settings", f"lr {lr:g} damping {damping:g}")
        losses.append(
            raced(chosen, steps, setting, *stored)["train_loss"].isel(optimizer=0)
        )
    ends = [float(loss[-1]) for loss in losses]
    table = xr.DataArray(ends, {"pair": range(len(pairs))}, ["pair"])
    table = table.assign_coords(
        lr=("pair", [lr for lr, _ in pairs]), damping=("pair", [d for _, d in pairs])
    )
    start = max(float(loss[0]) for loss in losses if loss[0].notnull())
    told = (
        f"{base.problem}, batch {base.batch}, float32, torch's first weights; MBF of all "
        f"mini-blocks, {steps} steps, T₁ = 1, T₂ = 20{setting.place}"
    )
    return xr.Dataset(
        {"loss": table.set_index(pair=["lr", "damping"]).unstack("pair"), "start": start},
        attrs={"settings": told, "steps": steps},
    )


def draw(result: xr.Dataset) -> Drawing:
    """Draw the loss over rate and damping; a field without a number did not end."""
    loss = result["loss"].mean("seed") if "seed" in result.dims else result["loss"]
    shown = loss.where(loss < 2 * float(result["start"].mean()))
    rows = shown.transpose("lr", "damping").to_pandas()
    with publication():
        figure, ax = plt.subplots(figsize=(4.6, 2.6), layout="constrained")
        sns.heatmap(
            rows,
            annot=True,
            fmt=".4g",
            cmap="viridis_r",
            ax=ax,
            xticklabels=[f"{d:g}" for d in rows.columns],
            yticklabels=[f"{lr:g}" for lr in rows.index],
            cbar_kws={"label": "training loss / nat"},
        )
        ax.set(xlabel="λ", ylabel="learning rate", facecolor="0.85")
        ax.set_title("grey: no end, or above twice the first loss", fontsize=8)
        ax.tick_params(axis="y", rotation=0)
        ax.grid(visible=False)
    return figure


EXPERIMENTS: Final = (
    Experiment(
        "mbf-settings",
        "MBF: training loss over learning rate and damping in short runs",
        settings,
        draw,
        ("digits-autoencoder",),
        (0.8, 20.0),
        trains=True,
    ),
)
