"""`python -m benchmarks.tables`: see the package."""

import argparse
import sys

from benchmarks.tables import ROOT, filled, pages


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of docs/ from the rows in docs/benchmarks.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    check = parser.parse_args().check
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new == text:
            continue
        if check:
            sys.exit(f"{page.relative_to(ROOT)} differs from its rows: python -m benchmarks.tables")
        page.write_text(new, encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
