"""Keep everything that relies on the internals of Detectron2, fvcore and torch in one place.

Each workaround names the versions that need it. `tests/test_compat.py` fails when a workaround can go.

- `imports`: import Detectron2 v0.6 on current packages. It must run before any import of Detectron2.
- `processes`: Detectron2's process groups and torch's store.
- `training`: the trainer's steps, and BatchNorm.
- `evaluation`: COCO's metrics.
- `checkpoint`: the steps of loading a checkpoint.
"""

from .imports import has_compiled_ops, require_detectron2

__all__ = ["has_compiled_ops", "require_detectron2"]
