"""The files of a search: the best config, a table of all trials, and a report with Optuna's charts."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from refract.pipeline.files import write_atomically


def write_report(study: optuna.Study, best: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write best.yaml, trials.csv and report.html to the folder, and return their paths. OSError if that fails."""
    import yaml
    from jinja2 import Environment, PackageLoader, StrictUndefined

    head = f"# Trial {study.best_trial.number} of {study.study_name}: {study.best_value:.4f} on validation\n"
    write_atomically(
        folder / "best.yaml", (head + yaml.safe_dump(dict(best), sort_keys=False, allow_unicode=True)).encode()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Optuna's experimental features
        frame = study.trials_dataframe(attrs=("number", "value", "params", "state", "duration"))
        charts = _charts(study)
    write_atomically(folder / "trials.csv", frame.to_csv(index=False).encode())
    env = Environment(loader=PackageLoader("refract.pipeline.tuning", "."), autoescape=True, undefined=StrictUndefined)
    html = env.get_template("report.html").render(
        name=study.study_name,
        best=study.best_trial,
        drawn=json.dumps(study.best_trial.user_attrs["drawn"], indent=1),
        charts=charts,
        trials=sorted(study.trials, key=lambda trial: -1.0 if trial.value is None else trial.value, reverse=True),
    )
    write_atomically(folder / "report.html", html.encode())
    return [folder / name for name in ("best.yaml", "trials.csv", "report.html")]


def _charts(study: optuna.Study) -> dict[str, str]:
    """Return title → data URL. Charts that need more trials are omitted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from refract.pipeline.evaluation.report.figures import data_url

    draw = optuna.visualization.matplotlib
    charts = {}
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    kinds: dict[str, Any] = {
        "Best score by trial": draw.plot_optimization_history,
        "Score by epoch": draw.plot_intermediate_values,
        "Score by value of each key": draw.plot_slice,
    }
    if len(done) >= 4 and len({trial.value for trial in done}) > 1:
        kinds["Importance of each key"] = draw.plot_param_importances
    for title, plot in kinds.items():
        axes = plot(study)
        first = axes.flat[0] if hasattr(axes, "flat") else axes
        charts[title] = data_url(first.figure)
        plt.close(first.figure)
    return charts
