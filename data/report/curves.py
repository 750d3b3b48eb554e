"""Draws a training run's metrics.jsonl as curves.png.

python -m data.report.curves runs/NAME/sft runs/NAME/mpo
"""

import argparse
from pathlib import Path

import common
from data.report import figures
from data.report.tables import column

TRAINING_METRICS = ("loss", "reward_accuracy", "reward_margin", "lr", "grad_norm")


def draw(log: list[dict], path: Path) -> None:
    """The metrics of a training run over its steps, training and held out, a panel each."""
    names = [name for name in TRAINING_METRICS if name in log[0]]
    steps = column(log, "step")
    figure, panels = figures.new_figure(4 * len(names), 3, len(names))
    for panel, name in zip(panels, names, strict=True):
        panel.plot(steps, column(log, name), label="training")
        held_out = [row for row in log if f"eval_{name}" in row]
        if held_out:
            values = column(held_out, f"eval_{name}")
            panel.plot(column(held_out, "step"), values, "o-", label="held out")
            panel.legend()
        panel.set(title=name.replace("_", " "), xlabel="optimizer step")
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser("python -m data.report.curves", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a trained model")
    folders = parser.parse_args().folders
    for folder in map(Path, folders):
        try:
            log = common.read_rows(folder / "metrics.jsonl", ("step", "loss"))
        except common.InputError as e:
            parser.exit(2, f"error: {e}\n")
        if log:
            draw(log, folder / "curves.png")


if __name__ == "__main__":
    main()
