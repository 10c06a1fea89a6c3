"""Copy the result pages into the pages that include them: `python docs/include.py`.

A page says what it includes, with a path below docs/, and ends the copy:

    <!-- include: results/low-memory/results.md -->
    <!-- end -->

`<!-- include: results/compare-digits/results.md table -->` takes the table only.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
INCLUDE = re.compile(
    r"^(?P<begin><!-- include: (?P<path>\S+)(?P<table> table)? -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL | re.MULTILINE,
)


def pages() -> list[Path]:
    """The README and every page below docs/ that is not a result itself."""
    results = DOCS / "results"
    found = [page for page in DOCS.rglob("*.md") if results not in page.parents]
    return [DOCS.parent / "README.md", *sorted(found)]


def included(path: str, table: bool) -> str:
    """The text of a result page, or only the lines of its tables."""
    text = (DOCS / path).read_text("utf-8").strip()
    if table:
        text = "\n".join(re.findall(r"^\|.*", text, re.MULTILINE))
        if not text:
            raise ValueError(f"{path} has no table")
    return text


def fill(page: str) -> str:
    """The page with the current text of everything that it includes."""

    def replace(match: re.Match[str]) -> str:
        text = included(match["path"], bool(match["table"]))
        return f"{match['begin']}\n{text}\n\n{match['end']}"

    markers = re.findall("^<!-- include: ", page, re.MULTILINE)
    if len(markers) != len(INCLUDE.findall(page)):
        raise ValueError("an include without its <!-- end -->")
    return INCLUDE.sub(replace, page)


if __name__ == "__main__":
    for path in pages():
        before = path.read_text("utf-8")
        after = fill(before)
        if after != before:
            path.write_text(after, "utf-8")
            print(path.relative_to(DOCS.parent), file=sys.stderr)
