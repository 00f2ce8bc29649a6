"""Read dense detectors: the base class of the adapters of RetinaNet and FCOS.

Shapes: B images, L levels, A anchors of a location, n classes, K candidates of an image, N regions.
"""

import math
from abc import abstractmethod
from functools import cached_property, partial
from typing import Any, Callable, ClassVar, Collection, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.ops import roi_align

from ..device import on_device
from ..errors import GDetKDError
from ..recorder import Call, Recorder, replaced
from ..regions import SAMPLING_RATIO, match_and_sample, suppress
from ..roi_align import pool_on_levels
from ..structures import DenseSpec, DetectorOutputs, DetectorSpec, Regions, full_precision
from .base import REGION_FIELDS, DetectorAdapter
from .dense_head import DenseHead
from .doubt import mark_ignored
from .sources import by_anchor, gather, places, without_anchor

# Pooled size of a dense teacher's regions. It has no box head that sets one. Two-stage detectors use 7 x 7.
POOLED_SIZE = (7, 7)


class DenseAdapter(DetectorAdapter):
    """Read a dense detector.

    The regions of a student are its own decoded predictions, matched with ground truth and sampled. An embedding is a
    vector of the classification tower's last features:

    - The student's embedding lies at the location that predicted the region.
    - The teacher's embedding lies at the region's centre, interpolated. The teacher's label assignment chooses the
      level, as if the region were an object.
    """

    anchor_based: ClassVar[bool] = True
    losses_are_means = False

    def __init__(self, model: nn.Module, role: str, cfg: CfgNode) -> None:
        super().__init__(model, role, cfg)
        self._features = self.feature_names
        if len(self._features) < 2:
            raise GDetKDError(
                f"The {role} has no FPN: its head reads {self._features[0]} alone, and GDetKD imitates pyramids. "
                "Choose a config whose MODEL.BACKBONE.NAME builds an FPN."
            )

    @property
    def feature_names(self) -> List[str]:
        """Return the names of the maps that the head reads, finest first."""
        return list(self.model.head_in_features)

    @property
    def num_scores(self) -> int:
        """Return the number of class scores of an anchor."""
        return self.model.num_classes

    @abstractmethod
    def choose_levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """Return the index (N,) of the level that is trained to find objects of a box's size.

        Args:
            boxes: (N, 4) xyxy in pixels.
        """

    @abstractmethod
    def scores(self, predictions: Sequence[List[torch.Tensor]]) -> List[torch.Tensor]:
        """Return the highest class score of each prediction of the head: by level, (B, A, H, W)."""

    @cached_property
    def spec(self) -> DetectorSpec:
        model = self.model
        shapes = model.backbone.output_shape()
        strides = {name: shapes[name].stride for name in self._features}
        cells = [tuple(map(tuple, anchors.tolist())) for anchors in model.anchor_generator.cell_anchors]
        weights = getattr(model.box2box_transform, "weights", None)
        return DetectorSpec(
            channels=shapes[self._features[0]].channels,
            strides=strides,
            pooled_size=POOLED_SIZE,
            embedding_dim=model.head.cls_score.in_channels,
            num_classes=model.num_classes,
            regression_weights=None if weights is None else tuple(weights),
            location_anchors=dict(zip(strides, cells)) if self.anchor_based else None,
            anchor_offset=model.anchor_generator.offset,
            independent_classes=True,
            regions_per_image=self.cfg.DISTILL.REGIONS.BATCH_SIZE_PER_IMAGE,
            dense=DenseSpec(
                tuple(zip(strides.values(), cells)),
                DenseHead(model).channels,
                self.anchor_based,
                hasattr(model.head, "level_scales"),  # an FCOS with MODEL.FCOS.LEVEL_SCALES
            ),
        )

    def points(self) -> Dict[str, nn.Module]:
        points = {
            "head": self.model.head,
            "tower": self.model.head.cls_subnet,
            "anchors": self.model.anchor_generator,
        }
        return {**points, **DenseHead(self.model).points()} if "towers" in self.needs else points

    def observe(self, calls: Dict[str, List[Call]], batched_inputs: List[Dict[str, Any]]) -> DetectorOutputs:
        maps = calls["head"][0].inputs[0]
        predictions = calls["head"][0].output
        outputs = DetectorOutputs(dict(zip(self._features, maps)), self.spec.strides)
        if "towers" in self.needs:
            outputs.towers = DenseHead(self.model).towers(calls)
        if not REGION_FIELDS & set(self.needs):
            return outputs  # finding regions takes time, and random draws
        anchors = torch.cat([level.tensor for level in calls["anchors"][0].output])
        outputs.regions = regions = self._find_regions(anchors, predictions, batched_inputs)
        outputs.embeddings = gather(
            [call.output[:, None] for call in calls["tower"]], regions.image_ids(), without_anchor(regions.sources)
        )
        self.fill_predictions(outputs, predictions)
        return outputs

    def ignoring(self, doubtful: Sequence[Boxes]) -> ContextManager[None]:
        """Ignore anchors or locations."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            @torch.no_grad()
            def label(anchors: List[Boxes], gt_instances: List[Instances]) -> Any:
                labels, matched_boxes = original(anchors, gt_instances)
                objects = [
                    Instances(image.image_size, gt_boxes=boxes, gt_classes=image.gt_classes.new_zeros(len(boxes)))
                    for image, boxes in zip(gt_instances, doubtful)
                ]
                background = self.model.num_classes
                mark_ignored(labels, background, [found != background for found in original(anchors, objects)[0]])
                return labels, matched_boxes

            return label

        return replaced(self.model, "label_anchors", make)

    def look(
        self,
        features: Dict[str, torch.Tensor],
        regions: Optional[Regions],
        needs: Collection[str],
        later_regions: Sequence[Regions] = (),
    ) -> DetectorOutputs:
        model = self.model
        maps = [features[name] for name in self._features]
        outputs = DetectorOutputs(dict(zip(self._features, maps)), self.spec.strides, regions)
        if "head" in needs:
            outputs.head = DenseHead(model)
        if {"levels", "pooled", "embeddings"} & set(needs):
            outputs.levels = self.choose_levels(regions.tensor())
        if "pooled" in needs:
            strides = list(self.spec.strides.values())
            outputs.pooled = pool_on_levels(maps, strides, regions, outputs.levels, POOLED_SIZE, SAMPLING_RATIO)
        # The tower runs on all levels in order, because a head with BatchNorm steps from level to level by itself.
        if {"logits", "deltas"} & set(needs):
            with Recorder({"tower": self.classification_tower} if "embeddings" in needs else {}) as calls:
                self.fill_predictions(outputs, self.predict(maps))
            towers = [call.output for call in calls.get("tower", ())]
        elif "embeddings" in needs:
            towers = [self.classification_tower(level) for level in maps]
        if "embeddings" in needs:
            outputs.embeddings = self._embed_at_centres(towers, regions, outputs.levels)
        return outputs

    @property
    def classification_tower(self) -> nn.Module:
        """Return the classification tower, which maps (B, C, H, W) to (B, D, H, W)."""
        return self.model.head.cls_subnet

    def predict(self, maps: List[torch.Tensor]) -> Sequence[List[torch.Tensor]]:
        """Return the head's outputs on all maps: logits (B, A n, H, W) by level, deltas (B, A 4, H, W) by level, ..."""
        return self.model.head(maps)

    def fill_predictions(self, outputs: DetectorOutputs, predictions: Sequence[List[torch.Tensor]]) -> None:
        """Fill the logits (N, n) and deltas (N, 4) of the predictions that became regions."""
        image_ids, sources = outputs.regions.image_ids(), outputs.regions.sources
        logits, deltas = predictions[0], predictions[1]
        outputs.logits = gather([by_anchor(level, self.num_scores) for level in logits], image_ids, sources)
        outputs.deltas = gather([by_anchor(level, 4) for level in deltas], image_ids, sources)

    @torch.no_grad()
    def _find_regions(
        self, anchors: torch.Tensor, predictions: Sequence[List[torch.Tensor]], batched_inputs: List[Dict[str, Any]]
    ) -> Regions:
        boxes, best_anchors, sources, scores = self._decode_best(anchors, predictions)
        boxes, is_candidate = self._clip(boxes, best_anchors, scores, batched_inputs)
        config = self.cfg.DISTILL.REGIONS
        kept, sampled = [], []
        for image, inputs in enumerate(batched_inputs):
            best = suppress(boxes[image], scores[image].where(is_candidate[image], -math.inf), config)
            gt_boxes = inputs["instances"].gt_boxes.tensor
            sampled.append(match_and_sample(boxes[image, best], is_candidate[image, best], gt_boxes, config))
            kept.append(best)
        counts = torch.stack([mask.sum() for mask in sampled]).tolist()
        chosen = [
            best[mask.long().argsort(descending=True, stable=True)[:count]]
            for best, mask, count in zip(kept, sampled, counts)
        ]
        return Regions(
            [Boxes(boxes[image, indices]) for image, indices in enumerate(chosen)],
            torch.cat([sources[image, indices] for image, indices in enumerate(chosen)]),
        )

    def _decode_best(
        self, anchors: torch.Tensor, predictions: Sequence[List[torch.Tensor]]
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode the K best predictions of each image, K = PRE_NMS_TOPK.

        Args:
            anchors: (R, 4) of all levels, R the number of anchors.

        Returns:
            boxes, anchors and sources, (B, K, 4) each, and scores (B, K).
        """
        scores = self.scores(predictions)
        all_places = torch.cat([places(level, level_scores[0]) for level, level_scores in enumerate(scores)])
        flat = torch.cat([level_scores.permute(0, 2, 3, 1).flatten(1) for level_scores in scores], dim=1).float()
        best = flat.nan_to_num(nan=-1.0).topk(min(self.cfg.DISTILL.REGIONS.PRE_NMS_TOPK, flat.shape[1])).indices
        sources = all_places[best]
        anchors = anchors[best]
        image_ids = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
        # `gather` copies. Decoding the head's outputs themselves would change them in place.
        deltas = gather([by_anchor(level, 4) for level in predictions[1]], image_ids, sources.flatten(0, 1))
        boxes = self.model.box2box_transform.apply_deltas(deltas.float(), anchors.flatten(0, 1))
        return boxes.view_as(anchors), anchors, sources, flat.gather(1, best)

    def _clip(
        self, boxes: torch.Tensor, anchors: torch.Tensor, scores: torch.Tensor, batched_inputs: List[Dict[str, Any]]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Clip decoded boxes to their images, which are not padded.

        Returns:
            boxes (B, K, 4), and a mask (B, K) of the candidates. A candidate is finite, not smaller than MIN_SIZE, and
            its anchor's centre lies in the image. The other boxes are 0, so that NMS suppresses nothing by them.
        """
        sides = [inputs["image"].shape[:-3:-1] for inputs in batched_inputs]
        sides = on_device(sides, like=boxes)[:, None]  # (B, 1, 2) width and height
        is_inside = (anchors[..., :2] + anchors[..., 2:]) / 2 < sides
        is_candidate = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores) & is_inside.all(dim=2)
        clipped = torch.minimum(boxes.nan_to_num().clamp(min=0), sides.repeat(1, 1, 2))
        is_large = (clipped[..., 2:] - clipped[..., :2] > self.cfg.DISTILL.REGIONS.MIN_SIZE).all(dim=2)
        is_candidate = is_candidate & is_large
        return clipped * is_candidate[..., None], is_candidate

    def _embed_at_centres(self, towers: List[torch.Tensor], regions: Regions, levels: torch.Tensor) -> torch.Tensor:
        """Interpolate the tower's map of a region's level at the region's centre (bilinear).

        Args:
            towers: by level, (B, D, H, W).
            levels: (N,) index of each region's level.

        Returns:
            (N, D)
        """

        def interpolate(tower: torch.Tensor, steps: Tuple[int, int], part: Regions) -> torch.Tensor:
            # RoIAlign of one cell is interpolation at its centre. RoIAlign puts the centre of cell i at i + 0.5, the
            # detector puts its anchors at i + offset.
            x1, y1, x2, y2 = part.tensor().unbind(dim=1)
            centre = torch.stack([(x1 + x2) / 2 / steps[0], (y1 + y2) / 2 / steps[1]], dim=1)
            centre = centre + 0.5 - self.spec.anchor_offset
            cell = torch.cat([part.image_ids()[:, None], centre - 0.5, centre + 0.5], dim=1)
            return roi_align(tower, cell.to(tower.dtype), 1, 1.0, sampling_ratio=1, aligned=True).flatten(1)

        pairs = zip(map(full_precision, towers), self.location_steps(towers))
        return regions.on_levels(levels, [partial(interpolate, *pair) for pair in pairs])

    def location_steps(self, towers: Sequence[torch.Tensor]) -> List[Tuple[int, int]]:
        """Return, for each level, the pixels between neighbouring locations in x and in y."""
        return [(stride, stride) for stride in self.spec.strides.values()]
