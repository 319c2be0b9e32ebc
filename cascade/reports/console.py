"""The results table that a pipeline run prints at its end."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from cascade.reports.summary import MODELS, Summary

SMALLEST_P = 1e-300
"""Below it, a thousand tasks gained and none lost, numbers of 64 bits come to 0."""


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the figures of a run as tables.

    Args:
        console: where to; by default the terminal (or the pipe) of standard output.
    """
    console = console or Console()
    console.print(_accuracy_table(summary))
    console.print(_figures_table(summary))
    if any(t.answer_key for t in summary.teachers):
        console.print(Panel(summary.teacher_statement, title="About the teachers", border_style="yellow"))


def _accuracy_table(s: Summary) -> Table:
    table = Table(title=f"{s.domain}: {s.base_model} on {s.n} held-out test tasks", title_justify="left")
    table.add_column("model")
    for heading in ("accuracy", "95 % interval", "passed", "unparsed", "of the readable"):
        table.add_column(heading, justify="right")
    for name in MODELS:
        score = s.scores[name]
        row = (
            f"{score.accuracy:.1%}",
            f"{score.low:.1%} – {score.high:.1%}",
            f"{score.passed}/{score.n}",
            str(score.unparsed),
            f"{score.parsed_accuracy:.1%}",
        )
        table.add_row(name, *row, style="bold" if name == "compressed" else "")
    return table


def _figures_table(s: Summary) -> Table:
    low, high = s.gain_interval
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("gain over the base", f"{points(s.gain)} points [{points(low)}, {points(high)}], {p_value(s)}")
    loss_low, loss_high = s.compression_loss_interval
    loss = f"{points(-s.compression_loss)} points [{points(-loss_high)}, {points(-loss_low)}]"
    table.add_row("change by compression", loss)
    limit = f" (limit {s.max_ratio:.1%})" if s.max_ratio is not None else ""
    size = f"{megabytes(s.compressed_bytes)} of {megabytes(s.adapter_bytes)} in fp16 = {s.ratio:.1%}{limit}"
    table.add_row("modifier on disk", size)
    shares = " / ".join(f"{share:.1%}" for share in s.tier_shares.values())
    table.add_row("failures settled by tier", f"{shares} of {s.failures}, {s.unsolved_share:.1%} unsolved")
    table.add_row("teachers", ", ".join(t.name for t in s.teachers))
    cost = f"${s.cost_usd:.4f} against ${s.cost_single_teacher_usd:.4f} with the last tier alone"
    table.add_row("cost", f"{cost}: {s.saving:.1%} saved")
    table.add_row("time and memory", f"{duration(s.wall_seconds)}, at most {s.peak_rss_bytes / 2**30:.2f} GiB resident")
    return table


def points(share: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return f"{100 * share:+z.1f}"


def p_value(summary: Summary) -> str:
    """The McNemar p-value in words, never as a bare 0."""
    p = summary.mcnemar_p
    if p < SMALLEST_P:
        return f"p < {SMALLEST_P:.0e}"
    return f"p = {p:.1e}" if p < 0.001 else f"p = {p:.3f}"


def megabytes(size: int) -> str:
    """Bytes as MB (10^6), with as many digits as a small adapter needs."""
    return f"{size / 1e6:.2f} MB" if size < 10e6 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as "14 min 3 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
