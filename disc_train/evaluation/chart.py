"""Draw results as a chart, where matplotlib is installed."""

from pathlib import Path

from disc_train.evaluation.results import Series

COLUMNS = 3


def draw(runs: dict[str, list[Series]], path: Path) -> bool:
    """Draw a panel for each measure, with a bar for each group and run; return False if there is no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels: dict[tuple[str, str], dict[str, list[Series]]] = {}  # (measure, unit) -> run -> what to draw
    for name, measured in runs.items():
        for series in measured:
            if series.value is not None and series.unit != "perplexity":
                panels.setdefault((series.measure, series.unit), {}).setdefault(name, []).append(series)
    rows = {key: list(dict.fromkeys(s.row for drawn in panels[key].values() for s in drawn)) for key in panels}
    bars = max(map(len, rows.values()), default=1) * len(runs)
    height = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(5 * COLUMNS, height * (1.5 + 0.25 * bars)), layout="constrained")
    FigureCanvasAgg(figure)
    thickness = 0.8 / len(runs)
    for number, ((measure, unit), drawn) in enumerate(panels.items()):
        axes = figure.add_subplot(height, COLUMNS, number + 1)
        here = rows[measure, unit]
        for place, name in enumerate(runs):
            bars_of_run = drawn.get(name, [])
            drawn_bars = axes.barh(
                [here.index(s.row) + (place - (len(runs) - 1) / 2) * thickness for s in bars_of_run],
                [s.mean for s in bars_of_run if s.mean is not None],  # as in all of them, see above
                thickness,
                xerr=[s.standard_error or 0.0 for s in bars_of_run],
                label=name,
            )
            axes.bar_label(drawn_bars, fmt="{:.1%}" if unit == "share" else "{:.3g}", padding=3, fontsize=8)
        axes.set_yticks(range(len(here)), here)
        axes.set_ylim(max(len(here), 3) - 0.5, -0.5)  # from the top; one bar does not fill a panel
        axes.set_title(measure)
        axes.set_xlabel({"nats": "nats a token", "share": "share"}.get(unit, ""))
        if unit == "share":
            axes.set_xlim(0, 1.25)  # room for the values
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        else:
            axes.margins(x=0.2)
    if panels:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left")
    figure.savefig(path, dpi=100)
    return True
