"""Convert mmdetection's checkpoints to Detectron2 checkpoints with a config. mmdetection itself is not needed."""

from .convert import Converted, convert, write

__all__ = ["Converted", "convert", "write"]
