"""Tables in Markdown, for the evaluation and the benchmarks."""

from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table. The first line holds the titles; columns after the first ``left`` are aligned right."""
    titles, *rows = lines
    rule = ["---"] * left + ["---:"] * (len(titles) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, rule, *rows])
