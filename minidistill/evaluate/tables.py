"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Rows of cells as a Markdown table: the heads first. Columns after the ``text_columns`` are aligned right."""
    heads, *rows = [[cell.replace("|", "\\|") for cell in line] for line in lines]  # a bare | begins another cell
    alignment = ["---"] * text_columns + ["---:"] * (len(heads) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, alignment, *rows))
