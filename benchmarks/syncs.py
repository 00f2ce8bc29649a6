#!/usr/bin/env python
"""Print the operations of a training step that make the CPU wait for a GPU, and where they stand. This needs no GPU.

python benchmarks/syncs.py --config-file FILE [--random-weights] [KEY VALUE ...]
"""

import tempfile
from pathlib import Path

from gdetkd.program import explained_errors

from inputs import make_batch  # isort: skip
from step import build, make_config, parse_arguments
from tabulate import tabulate
from waits import Place, count_waits


def short(place: Place) -> str:
    """Return the file from its package on, and the line."""
    parts = Path(place[0]).parts
    start = max((index for index, part in enumerate(parts) if part in ("detectron2", "gdetkd")), default=0)
    return f"{'/'.join(parts[start:])}:{place[1]}"


def main() -> None:
    args = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        cfg = make_config(args, folder)
        model = build(cfg, tuple(cfg.DISTILL.LOSSES))
    side = cfg.INPUT.MIN_SIZE_TRAIN[-1]
    batch = make_batch(cfg.SOLVER.IMS_PER_BATCH, *(args.image_size or (side, side * 4 // 3)))
    plain, distilled = count_waits(model.student, batch), count_waits(model, batch)
    rows = [
        [short(place), place[2], plain[place], distilled[place], max(0, distilled[place] - plain[place])]
        for place in sorted({*plain, *distilled})
    ]
    rows.append(["sum", "", *(sum(row[column] for row in rows) for column in (2, 3, 4))])
    print(f"{len(batch)} images")
    print(tabulate(rows, ["place", "kind", "plain step", "distilled step", "added by distillation"]))


if __name__ == "__main__":
    with explained_errors():
        main()
