#!/usr/bin/env python
"""Times SGFI, CKD, CLS and REG, forward and backward, against the equations written down plainly, as the sizes grow.

python benchmarks/losses.py [--device cuda] [--regions 64,256,1024,4096] [--levels 3,4,6] [--queues 0,8192,65536]
    [--classes 20,80,365,1203] [--rounds 5] [--json FILE]

Widths are those of the R50 -> R18 pair: 256 channels, 7x7 cells, embeddings of 1,024. Memory is, on a GPU, the peak of
a step; on a CPU what a step keeps for its backward pass.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

from gdetkd import add_gdetkd_config
from gdetkd.engine.step_costs import peak_memory, time_in_rounds
from gdetkd.losses import CKD, CLS, REG, SGFI, semantic_guided_imitation
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions

import torch  # isort: skip
from detectron2.config import get_cfg
from detectron2.structures import Boxes
from tabulate import tabulate
from timing import machine, numbers, quartiles
from torch import nn
from torchvision.ops import box_iou

CHANNELS, SIZE, EMBEDDING = 256, 7, 1024
IMAGES = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--regions", type=numbers, default=[64, 256, 1024, 4096])
    parser.add_argument("--levels", type=numbers, default=[3, 4, 5, 6])
    parser.add_argument("--queues", type=numbers, default=[0, 8192, 65536])
    parser.add_argument("--classes", type=numbers, default=[20, 80, 365, 1203])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def build(device: str, queue: int = 0, classes: int = 80) -> Dict[str, nn.Module]:
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.DISTILL.CKD.QUEUE_SIZE = queue
    spec = DetectorSpec(CHANNELS, {"p2": 4}, (SIZE, SIZE), EMBEDDING, classes, (10.0, 10.0, 5.0, 5.0))
    return {loss.__name__: loss(cfg, spec, spec).to(device) for loss in (SGFI, CKD, CLS, REG)}


def plain_sgfi(loss: SGFI, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
    """Every level adapted, every adapted level embedded, then aggregated."""
    count, levels = student.level_pooled.shape[:2]
    adapted = loss.adapter(student.level_pooled.flatten(0, 1))  # (N L, C_T, H, W)
    keys = loss.embed(adapted).view(count, levels, -1)
    adapted = adapted.view(count, levels, *adapted.shape[1:])
    return semantic_guided_imitation(adapted, teacher.pooled, keys, loss.embed(teacher.pooled), loss.tau)[0]


def plain_ckd(loss: CKD, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
    """g of every pair of embeddings, the overlapping regions taken out image by image."""
    ours = loss.projection(loss.adapter(student.embeddings))
    its = loss.projection(torch.cat([teacher.embeddings, loss.queue.contents()]))
    cosines = nn.functional.normalize(ours, dim=1) @ nn.functional.normalize(its, dim=1).t()
    g = torch.exp(cosines / loss.gamma)  # (N, N + K)
    count, start = len(ours), 0
    counts = torch.ones_like(g)
    for boxes in student.regions.boxes:
        of_image = slice(start, start + len(boxes))
        counts[of_image, of_image] = (box_iou(boxes.tensor, boxes.tensor) <= loss.iou_threshold).float()
        start += len(boxes)
    counts[range(count), range(count)] = 1.0
    return -torch.log(g.diagonal() / (g * counts).sum(dim=1)).mean()


def plain_cls(student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
    ours, its = (torch.softmax(outputs.logits, dim=1) for outputs in (student, teacher))
    return -(its * ours.log()).sum(dim=1).mean()


def plain_reg(student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
    probability = torch.softmax(teacher.logits, dim=1)[:, :-1, None]  # (N, n, 1)
    ours, its = (outputs.deltas.view(len(outputs.deltas), -1, 4) for outputs in (student, teacher))
    return (probability * (its - ours)).sum(dim=1).abs().sum(dim=1).mean()


def make_outputs(count: int, levels: int, device: str, classes: int = 0) -> List[DetectorOutputs]:
    """Of a student, whose tensors want gradients, and of a teacher."""
    corners = torch.rand(count, 2, device=device) * 600
    boxes = torch.cat([corners, corners + 20 + torch.rand(count, 2, device=device) * 200], dim=1)
    regions = Regions([Boxes(part) for part in boxes.chunk(IMAGES)])
    both = []
    for is_student in (True, False):
        outputs = DetectorOutputs({}, {}, regions)
        outputs.embeddings = torch.randn(count, EMBEDDING, device=device, requires_grad=is_student)
        if is_student:
            cells = torch.randn(count, levels, SIZE, SIZE, CHANNELS, device=device, requires_grad=True)
            outputs.level_pooled = cells.permute(0, 1, 4, 2, 3)
        outputs.pooled = torch.randn(count, CHANNELS, SIZE, SIZE, device=device)
        outputs.logits = torch.randn(count, classes + 1, device=device, requires_grad=is_student)
        outputs.deltas = torch.randn(count, 4 * classes, device=device, requires_grad=is_student)
        both.append(outputs)
    return both


def compare(ours: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor], rounds: int) -> Dict[str, Any]:
    """
    Raises:
        AssertionError: the two are not equal.
    """
    torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-4)
    works = {"ours": lambda: ours().backward(), "plain": lambda: plain().backward()}
    seconds = time_in_rounds(works, rounds, warm_up=1)
    result: Dict[str, Any] = {f"{name}, s": quartiles(values) for name, values in seconds.items()}
    result.update({f"{name}, MB": peak_memory(work) for name, work in works.items()})
    result["ratio"] = result["ours, s"][1] / result["plain, s"][1]
    return result


def run(args: argparse.Namespace) -> List[Dict[str, Any]]:
    results = []
    sgfi = build(args.device)["SGFI"]
    for levels in args.levels:
        for count in args.regions if levels == 4 else args.regions[:3]:
            pair = make_outputs(count, levels, args.device)
            compared = compare(lambda: sgfi.compute(*pair), lambda: plain_sgfi(sgfi, *pair), args.rounds)
            results.append({"loss": "SGFI", "regions": count, "levels": levels, **compared})
    results += [result for classes in args.classes for result in run_predictions(classes, args)]
    for size in args.queues:
        ckd = build(args.device, size)["CKD"]
        ckd.queue.push(torch.randn(size, EMBEDDING, device=args.device))
        ckd.queue.contents()
        for count in args.regions:
            pair = make_outputs(count, 1, args.device)
            # What a step pushes is not written before the next, and here never.
            compared = compare(lambda: without_push(ckd, *pair), lambda: plain_ckd(ckd, *pair), args.rounds)
            results.append({"loss": "CKD", "regions": count, "queue": size, **compared})
    return results


def run_predictions(classes: int, args: argparse.Namespace) -> List[Dict[str, Any]]:
    losses, results = build(args.device, classes=classes), []
    for name, plain in (("CLS", plain_cls), ("REG", plain_reg)):
        for count in args.regions:
            pair = make_outputs(count, 1, args.device, classes)
            compared = compare(lambda: losses[name].compute(*pair), lambda: plain(*pair), args.rounds)
            results.append({"loss": name, "regions": count, "classes": classes, **compared})
    return results


def without_push(loss: CKD, *pair: DetectorOutputs) -> torch.Tensor:
    value = loss.compute(*pair)
    loss.queue._pending = None  # both sides are to see the same queue in every round
    return value


def as_text(results: List[Dict[str, Any]], device: str) -> str:
    rows = []
    for result in results:
        grown = next(result[key] for key in ("levels", "queue", "classes") if key in result)
        times = [f"{result[f'{name}, s'][1]:.4f}" for name in ("ours", "plain")]
        memory = [f"{result[f'{name}, MB']:.0f}" for name in ("ours", "plain")]
        rows.append([result["loss"], result["regions"], grown, *times, f"{result['ratio']:.2f}", *memory])
    headers = ["loss", "regions", "levels, queue or classes", "ours, s", "plain, s", "ratio", "ours, MB", "plain, MB"]
    return f"{machine(device)}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}"


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    results = run(args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(as_text(results, args.device))


if __name__ == "__main__":
    main()
