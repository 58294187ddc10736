"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table. The second row sets the alignment, such as ["---", "---:"]."""
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)  # a | would begin another cell
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
