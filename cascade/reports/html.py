"""One self-contained HTML page per pipeline run, with its numbers as Parquet beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cascade.reports import figures
from cascade.reports.console import p_value, points
from cascade.reports.data import CurvePoint, ReportData, front_of, plain, save_tables, tables_folder
from cascade.reports.heat_map import heat_map, heat_rows
from cascade.reports.summary import MODELS, ModelScore
from cascade.reports.templates import environment
from cascade.scoring.statistics import Score, breakdown, wilson

MAX_SAMPLES = 24
"""Sample answers shown; the table beside the page has all that were given."""
MAX_GROUPS = 30
"""Categories drawn; a benchmark with more is shown by its largest."""


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the page and, in `<name>.tables/`, the Parquet tables from which each of its numbers can be recomputed.

    Args:
        path: of the HTML file; a file that is there is replaced.

    Returns:
        The path of the page.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_tables(data, target)
    partial = target.with_name(target.name + ".tmp")
    partial.write_text(render(data, tables=tables_folder(target).name), encoding="utf-8")
    partial.replace(target)
    return target


def render(data: ReportData, *, tables: str) -> str:
    """The page as text.

    Args:
        tables: name of the folder beside the page that holds the tables.
    """
    return (
        environment()
        .get_template("report.html")
        .render(
            data=data,
            summary=data.summary,
            models=MODELS,
            p_value=p_value(data.summary),
            figure=_figures(data),
            categories=by_group(data, "category"),
            difficulties=by_group(data, "difficulty"),
            outcomes=outcomes(data),
            chosen=next((t for t in data.trials if t.chosen), None),
            front=front_of(data.trials),
            looks=[(p, wilson(p.passed, p.answered) if p.answered else None) for p in data.curve if _is_look(p)],
            heat=heat_rows(data.layers),
            policies=policies(data.router),
            router_rows=router_rows(data.router) if data.router else [],
            samples=list(data.samples)[:MAX_SAMPLES],
            tier_shares={t.tier: wilson(t.settled, data.summary.failures) for t in data.tiers},
            any_skipped=any(t.skipped for t in data.tiers),
            tables=tables,
        )
    )


def by_group(data: ReportData, key: str) -> dict[str, dict[str, Score]]:
    """Scores of the three models per category or difficulty, largest groups first kept, in sorted order."""
    rows: dict[str, dict[str, Score]] = {}
    for model in MODELS:
        group: Any = key
        for name, score in breakdown(data.tasks, data.verdicts[model], group).items():
            rows.setdefault(str(name) or "(none)", {})[model] = score
    kept = sorted(rows, key=lambda name: -rows[name][MODELS[0]].n)[:MAX_GROUPS]
    return {name: scores for name, scores in rows.items() if name in kept}


def outcomes(data: ReportData) -> dict[str, dict[str, int]]:
    """Outcome -> model -> number of test tasks."""
    table = {o: dict.fromkeys(MODELS, 0) for o in ("pass", "fail", "unparsed", "timeout", "error")}
    for model in MODELS:
        for verdict in data.verdicts[model]:
            table[verdict.outcome][model] += 1
    return table


def _is_look(point: CurvePoint) -> bool:
    """Whether validation tasks were looked at after this step."""
    return point.validation_loss is not None or point.answered > 0


def policies(router: Any) -> list[tuple[str, str]]:
    """How good routing is beside the base, the best single model, chance and an oracle: policy and share of right."""
    quality = plain(router).get("quality", {})
    return [(name.replace("_", " "), _measured(figure)) for name, figure in quality.items()]


def router_rows(router: Any) -> list[tuple[str, str]]:
    """What else a router report (`cascade.routing.train.RouterReport`) says, as name and text."""
    report = plain(router)
    rows = [(f"routed minus {name.replace('_', ' ')}", _measured(f, points)) for name, f in report["gain"].items()]
    rows.append(("best single", report["best_single"]))
    rows.append(("as good as any candidate", _measured(report["accuracy"])))
    rows.append(("decided, not fallen back to the base", _measured(report["coverage"])))
    rows.append(("queries of other kinds sent to the base", _measured(report["other_to_base"])))
    rows.append(("follow-ups taken for such", _measured(report["follow_ups"])))
    rows.append(("other queries not taken for follow-ups", _measured(report["no_follow_ups"])))
    rows.append(
        ("calibration error", f"{report['ece_before']:.3f} before, {report['ece_after']:.3f} after calibration")
    )
    rows.append(("learned from and, cross-fitted, measured on", f"{report['queries']} tasks"))
    return rows


def _measured(figure: dict[str, Any], form: Callable[[float], str] = "{:.1%}".format) -> str:
    """A figure with its interval and n."""
    value, low, high = (form(figure[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}], n = {figure['n']}"


def _figures(data: ReportData) -> dict[str, Markup]:
    """Name -> SVG; a figure without data is left out."""
    s = data.summary
    overall = {"all test tasks": {m: _as_score(s.scores[m]) for m in MODELS}}
    categories, difficulties = by_group(data, "category"), by_group(data, "difficulty")
    limit = s.max_ratio * s.adapter_bytes if s.max_ratio is not None else None
    outputs = plain(data.router).get("outputs", {})
    reliability = {name: output["bins"] for name, output in outputs.items()}
    draw: dict[str, tuple[bool, Callable[[], str]]] = {
        "overall": (True, lambda: figures.accuracy(overall, "Accuracy on all test tasks")),
        "category": (len(categories) > 1, lambda: figures.accuracy(categories, "Accuracy by category")),
        "difficulty": (len(difficulties) > 1, lambda: figures.accuracy(difficulties, "Accuracy by difficulty")),
        "flow": (bool(data.tiers), lambda: figures.tier_flow(data.tiers)),
        "cost": (bool(data.tiers), lambda: figures.cost(data.tiers, s.cost_single_teacher_usd)),
        "kinds": (bool(data.kinds), lambda: figures.kinds(data.kinds)),
        "training": (bool(data.curve), lambda: figures.training_curves(data.curve)),
        "pareto": (bool(data.trials), lambda: figures.pareto(data.trials, limit)),
        "layers": (bool(data.layers), lambda: heat_map(data.layers)),
        "reliability": (bool(reliability), lambda: figures.reliability(reliability)),
    }
    return {name: Markup(make()) for name, (wanted, make) in draw.items() if wanted}


def _as_score(s: ModelScore) -> Score:
    return Score(n=s.n, passed=s.passed, unparsed=s.unparsed, accuracy=s.accuracy, low=s.low, high=s.high)
