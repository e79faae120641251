"""Put the cells of finished studies into one compressed file each.

    python -m experiments.pack_cells docs/results/tiny-x8 docs/results/tiny-x16 ...

`skipwise study FILE --output DIRECTORY --summary` makes the tables from that file again.
"""

import argparse
from pathlib import Path

from skipwise.study.cell import StudyDir, pack_cells


def main() -> None:
    """Pack each study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    for path in parser.parse_args().studies:
        count = pack_cells(StudyDir(path))
        print(f"{path}: {count} cells")


if __name__ == "__main__":
    main()
