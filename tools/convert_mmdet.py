#!/usr/bin/env python
"""Convert an mmdetection checkpoint to Detectron2 weights and a config, which can be a teacher.

python tools/convert_mmdet.py mask_rcnn_x101.pth weights/mask_rcnn_x101.pth

This reads Faster, Mask and Cascade R-CNN, RetinaNet and FCOS of mmdetection 2.x and 3.x, without mmdetection and
without running what the file holds. It writes weights/mask_rcnn_x101.pth and weights/mask_rcnn_x101.yaml. A detector
that Detectron2 cannot reproduce is refused. See docs/teachers.md.
"""

import argparse
from pathlib import Path

import gdetkd  # noqa: F401  imported first, because it prepares the import of Detectron2
from gdetkd.errors import GDetKDError
from gdetkd.mmdetection import convert, write
from gdetkd.program import explained_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="mmdetection's .pth")
    parser.add_argument("output", type=Path, help="the weights file to write, ending in .pth")
    parser.add_argument("--config", default="", help="the detector's config file of mmdetection, which is not run")
    parser.add_argument("--drop-masks", action="store_true", help="leave out the mask heads, which no loss distils")
    args = parser.parse_args()
    if args.output.suffix != ".pth" or args.output.absolute() == args.checkpoint.absolute():
        raise GDetKDError(f"The output {str(args.output)!r} has to end in .pth, and to be another file than the input.")
    converted = convert(str(args.checkpoint), args.config, args.drop_masks)
    config = write(converted, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, {len(converted.tensors)} tensors")
    print(f"{config}: DISTILL.TEACHER.CONFIG_FILE can name it")
    for note in converted.notes():
        print(note)


if __name__ == "__main__":
    with explained_errors():
        main()
