"""train_net.py on a disk that takes its time, so that a kill can come while a checkpoint is written.

Each iteration's total loss is appended, exactly, to OUTPUT_DIR/losses.txt.
"""

import gdetkd  # first: it prepares the import of Detectron2

import os  # isort: skip
import runpy
import sys
import time
from pathlib import Path

from detectron2.engine import HookBase

ROOT = Path(__file__).resolve().parents[2]
SYNC_SECONDS = 0.05


def slow_sync(handle, sync=os.fsync):
    time.sleep(SYNC_SECONDS)
    sync(handle)


class Losses(HookBase):
    def after_step(self):
        loss = self.trainer.storage.latest()["total_loss"][0]
        with open(os.path.join(self.trainer.cfg.OUTPUT_DIR, "losses.txt"), "a") as file:
            file.write(f"{self.trainer.iter} {float(loss).hex()}\n")


def build_hooks(trainer, build=gdetkd.DistillTrainer.build_hooks):
    *hooks, guard = build(trainer)
    return [*hooks, Losses(), guard]


os.fsync = slow_sync
gdetkd.DistillTrainer.build_hooks = build_hooks
sys.argv[0] = str(ROOT / "train_net.py")
runpy.run_path(sys.argv[0], run_name="__main__")
