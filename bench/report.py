"""Tables and plots of the documentation and of the model cards, made from bench/results/.

    python bench/report.py [--check]

Text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced. ``--check`` changes
nothing and fails if a page is not what the results say (plots are not compared).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import report_evaluation
import report_performance

ROOT = Path(__file__).resolve().parent.parent
PAGES: dict[str, Mapping[str, Callable[[], str]]] = {
    "docs/performance.md": report_performance.SECTIONS,
    "docs/results.md": report_evaluation.SECTIONS,
    "python/armt/models/babilong/README.md": {
        "babilong": report_evaluation.SECTIONS["babilong"],
    },
    "python/armt/models/retrieval/README.md": {
        "retrieval": report_evaluation.retrieval_table,
    },
}


def filled(path: Path, sections: Mapping[str, Callable[[], str]]) -> str:
    """The page with its tables made anew."""
    page = path.read_text(encoding="utf-8")
    for name, make in sections.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{path}: no place for {name}")
        text = make()
        page = pattern.sub(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    pages = {ROOT / name: filled(ROOT / name, sections) for name, sections in PAGES.items()}
    old = [str(path) for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    if check:
        sys.exit(
            f"{', '.join(old)}: not what bench/results says; run bench/report.py" if old else 0
        )
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    report_performance.draw()


if __name__ == "__main__":
    main()
