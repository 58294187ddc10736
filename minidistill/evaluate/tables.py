"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table. The second row sets the alignment, such as ["---", "---:"]."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
