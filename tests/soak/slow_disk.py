"""Run train_net.py with a slow sync of files, so that a kill can come while a checkpoint is written.

The total loss of each iteration is appended to OUTPUT_DIR/losses.txt, without rounding.
"""

import gdetkd  # imported first: it prepares the import of Detectron2

import multiprocessing  # isort: skip
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from detectron2.engine import HookBase

from gdetkd.engine.launch import run_everywhere

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


def train(config_file, folder):
    """Do what `python train_net.py --config-file FILE --resume OUTPUT_DIR FOLDER` does."""
    with open(os.path.join(folder, "stdout.txt"), "a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno()), os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    # Fork the workers of the loader, as in any training. Otherwise they would start like this process.
    multiprocessing.set_start_method("fork", force=True)
    os.fsync = slow_sync
    gdetkd.DistillTrainer.build_hooks = build_hooks
    train_net = runpy.run_path(str(ROOT / "train_net.py"), run_name="train_net")
    arguments = ["--config-file", config_file, "--resume", "OUTPUT_DIR", folder]
    run_everywhere(train_net["main"], train_net["parser"]().parse_args(arguments))
