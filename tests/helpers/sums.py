"""Sums as a user's own tasks: files, read at once, where every process that wants drawn tasks starts others for them.

What draws tasks takes longer to start than a tiny base takes to answer them all; where it is not what is tested, these
stand in.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

QUESTION = "State the final answer to the following arithmetic problem: "


def own_sums(folder: Path, *, levels: int = 1, **counts: int) -> dict[str, object]:
    """Write so many sums for each part, none of them twice; one of difficulty n has n + 1 terms of one digit.

    Returns:
        The section `tasks` of a config that asks for them all.
    """
    drawn, asked, section = random.Random(7), set[str](), dict[str, object]()
    for part, count in counts.items():
        lines: list[str] = []
        while len(lines) < count:
            level = len(lines) % levels + 1
            terms = [drawn.randint(1, 9) for _ in range(level + 1)]
            prompt = f"{QUESTION}{' + '.join(map(str, terms))} ="
            if prompt not in asked:
                asked.add(prompt)
                line = {"id": len(lines), "kind": "exact", "prompt": prompt, "answer": sum(terms), "difficulty": level}
                lines.append(json.dumps(line | {"max_tokens": 8}))
        path = folder / "tasks" / f"{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
        section[part] = {"count": count, "sources": [{"benchmark": "jsonl", "options": {"path": str(path)}}]}
    return section
