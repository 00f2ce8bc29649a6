"""mmdetection's detectors in plain torch, with the names and shapes of its state dicts.

They are written from mmdetection's published architecture: https://github.com/open-mmlab/mmdetection, 2.x and 3.x. They
compute what mmdetection computes before NMS, for one image. With mmdetection 3.3.0 they were compared once: the names
and shapes of the five detectors in full size are the same, and their outputs are the same bit by bit.
"""

import math
from typing import List

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ConvModule(nn.Module):
    """A convolution, a GroupNorm if wanted, and a ReLU if wanted."""

    def __init__(self, inputs, outputs, size, stride=1, norm=False, activate=True, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)
        self.gn = nn.GroupNorm(32, outputs) if norm else None
        self.activate = activate

    def forward(self, x):
        x = self.conv(x)
        x = x if self.gn is None else self.gn(x)
        return x.relu() if self.activate else x


class Block(nn.Module):
    """A bottleneck block, or a basic block if the depth is 18. The style says which convolution has the stride."""

    def __init__(self, inputs, planes, stride, config):
        super().__init__()
        self.is_basic = config["depth"] == 18
        groups, expansion = config.get("groups", 1), 1 if self.is_basic else 4
        width = planes if groups == 1 else planes * config["base_width"] // config.get("base_channels", 64) * groups
        if self.is_basic:
            shapes = [(inputs, planes, 3, stride, 1), (planes, planes, 3, 1, 1)]
        else:
            strides = (stride, 1) if config["style"] == "caffe" else (1, stride)
            shapes = [(inputs, width, 1, strides[0], 1), (width, width, 3, strides[1], groups)]
            shapes.append((width, planes * 4, 1, 1, 1))
        self.number = len(shapes)
        for index, (before, after, size, step, parts) in enumerate(shapes, start=1):
            conv = nn.Conv2d(before, after, size, step, size // 2, groups=parts, bias=False)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(after))
        outputs = planes * expansion
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for index in range(1, self.number + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            y = y.relu() if index < self.number else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        base = config.get("base_channels", 64)
        self.conv1, self.bn1 = nn.Conv2d(3, base, 7, 2, 3, bias=False), nn.BatchNorm2d(base)
        width = base
        for stage, number in enumerate(BLOCKS[config["depth"]]):
            blocks = []
            for index in range(number):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(width, base * 2**stage, stride, config))
                width = base * 2**stage * (1 if config["depth"] == 18 else 4)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        maps = []
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps


class FPN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, outputs = config, config["out_channels"]
        self.start = config.get("start_level", 0)
        used = config["in_channels"][self.start :]
        self.lateral_convs = nn.ModuleList(ConvModule(inputs, outputs, 1, activate=False) for inputs in used)
        convs = [ConvModule(outputs, outputs, 3, activate=False) for _ in used]
        self.source = config.get("add_extra_convs", False)
        if self.source:
            first = used[-1] if self.source == "on_input" else outputs
            convs += [ConvModule(inputs, outputs, 3, stride=2, activate=False) for inputs in (first, outputs)]
        self.fpn_convs = nn.ModuleList(convs)

    def forward(self, maps):
        laterals = [conv(level) for conv, level in zip(self.lateral_convs, maps[self.start :])]
        for index in range(len(laterals) - 1, 0, -1):
            size = laterals[index - 1].shape[2:]
            laterals[index - 1] = laterals[index - 1] + F.interpolate(laterals[index], size=size, mode="nearest")
        levels = [conv(level) for conv, level in zip(self.fpn_convs, laterals)]
        if not self.source:
            return [*levels, levels[-1][..., ::2, ::2]]
        p6 = self.fpn_convs[-2](maps[-1] if self.source == "on_input" else levels[-1])
        between = p6.relu() if self.config.get("relu_before_extra_convs") else p6
        return [*levels, p6, self.fpn_convs[-1](between)]


def anchors_of(generator, shapes) -> List[torch.Tensor]:
    """Return the anchors (H * W * A, 4) of each level. The order within a location is ratio by ratio."""
    scales = generator.get("scales") or [
        generator["octave_base_scale"] * 2 ** (index / generator["scales_per_octave"])
        for index in range(generator["scales_per_octave"])
    ]
    levels = []
    for stride, (height, width) in zip(generator["strides"], shapes):
        cells = []
        for ratio in generator["ratios"]:
            for scale in scales:
                w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                cells.append([-w / 2, -h / 2, w / 2, h / 2])
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        levels.append((shifts + torch.tensor(cells)).flatten(0, 1))
    return levels


def decode(boxes, deltas, stds):
    """Decode deltas (N, 4) that were divided by standard deviations."""
    deltas = deltas * torch.tensor(stds)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + size * deltas[:, :2]
    size = size * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def by_location(level, count):
    """Reorder predictions (1, A * count, H, W) to (H * W * A, count)."""
    return level[0].permute(1, 2, 0).reshape(-1, count)


class RPNHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        generator = self.generator = config["anchor_generator"]
        anchors, width = len(generator["scales"]) * len(generator["ratios"]), config["feat_channels"]
        self.stds = config["bbox_coder"]["target_stds"]
        self.rpn_conv = nn.Conv2d(config["in_channels"], width, 3, padding=1)
        self.rpn_cls, self.rpn_reg = nn.Conv2d(width, anchors, 1), nn.Conv2d(width, anchors * 4, 1)

    def forward(self, levels):
        """Return boxes and logits (N, 1) of all anchors."""
        hidden = [self.rpn_conv(level).relu() for level in levels]
        anchors = torch.cat(anchors_of(self.generator, [level.shape[2:] for level in levels]))
        deltas = torch.cat([by_location(self.rpn_reg(level), 4) for level in hidden])
        return decode(anchors, deltas, self.stds), torch.cat([by_location(self.rpn_cls(level), 1) for level in hidden])


def pool(levels, boxes, size):
    """RoIAlign on the level whose objects have the box's size, as SingleRoIExtractor does."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    index = torch.log2(side / 56 + 1e-6).floor().clamp(0, 3)
    pooled = torch.zeros(len(boxes), levels[0].shape[1], size, size)
    for number, (level, stride) in enumerate(zip(levels, (4, 8, 16, 32))):
        chosen = index == number
        rois = torch.cat([torch.zeros(int(chosen.sum()), 1), boxes[chosen]], dim=1)
        pooled[chosen] = roi_align(level, rois, size, 1 / stride, sampling_ratio=-1, aligned=True)
    return pooled


class BoxHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, classes = config["fc_out_channels"], config["num_classes"]
        self.stds = config["bbox_coder"]["target_stds"]
        self.shared_fcs = nn.ModuleList([nn.Linear(config["in_channels"] * 49, width), nn.Linear(width, width)])
        self.fc_cls = nn.Linear(width, classes + 1)
        self.fc_reg = nn.Linear(width, 4 if config["reg_class_agnostic"] else 4 * classes)

    def forward(self, levels, boxes):
        """Return logits, background last, and the boxes of each class."""
        x = pool(levels, boxes, 7).flatten(1)
        for fc in self.shared_fcs:
            x = fc(x).relu()
        deltas = self.fc_reg(x)
        number = deltas.shape[1] // 4
        decoded = decode(boxes.repeat_interleave(number, dim=0), deltas.reshape(-1, 4), self.stds)
        return self.fc_cls(x), decoded.reshape(len(boxes), -1)


class MaskHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["conv_out_channels"]
        inputs = [config["in_channels"], *[width] * (config["num_convs"] - 1)]
        self.convs = nn.ModuleList(ConvModule(before, width, 3) for before in inputs)
        self.upsample = nn.ConvTranspose2d(width, width, 2, 2)
        self.conv_logits = nn.Conv2d(width, config["num_classes"], 1)

    def forward(self, levels, boxes):
        x = pool(levels, boxes, 14)
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(self.upsample(x).relu())


class RoIHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        heads = config["bbox_head"]
        self.bbox_head = nn.ModuleList(map(BoxHead, heads)) if isinstance(heads, list) else BoxHead(heads)
        masks = config.get("mask_head")
        self.mask_head = nn.ModuleList(map(MaskHead, masks)) if isinstance(masks, list) else masks and MaskHead(masks)


class RetinaHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.generator, self.stds = config["anchor_generator"], config["bbox_coder"]["target_stds"]
        self.classes, width = config["num_classes"], config["feat_channels"]
        anchors = self.generator["scales_per_octave"] * len(self.generator["ratios"])
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(ConvModule(width, width, 3) for _ in range(config["stacked_convs"])) for _ in range(2)
        )
        self.retina_cls = nn.Conv2d(width, anchors * self.classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(width, anchors * 4, 3, padding=1)

    def forward(self, levels):
        """Return boxes and logits (N, classes) of all anchors."""
        anchors = torch.cat(anchors_of(self.generator, [level.shape[2:] for level in levels]))
        logits, deltas = [], []
        for level in levels:
            cls, reg = level, level
            for cls_conv, reg_conv in zip(self.cls_convs, self.reg_convs):
                cls, reg = cls_conv(cls), reg_conv(reg)
            logits.append(by_location(self.retina_cls(cls), self.classes))
            deltas.append(by_location(self.retina_reg(reg), 4))
        return decode(anchors, torch.cat(deltas), self.stds), torch.cat(logits)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class FCOSHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.strides, self.classes, width = config["strides"], config["num_classes"], config["feat_channels"]
        bias = config.get("conv_bias", False)
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(ConvModule(width, width, 3, norm=True, bias=bias) for _ in range(config["stacked_convs"]))
            for _ in range(2)
        )
        self.conv_cls, self.conv_reg = (nn.Conv2d(width, number, 3, padding=1) for number in (self.classes, 4))
        self.conv_centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in self.strides)

    def forward(self, levels):
        """Return boxes and logits (N, classes + 1) of all locations, the centerness last."""
        boxes, logits = [], []
        for level, stride, scale in zip(levels, self.strides, self.scales):
            cls, reg = level, level
            for cls_conv, reg_conv in zip(self.cls_convs, self.reg_convs):
                cls, reg = cls_conv(cls), reg_conv(reg)
            sides = (self.conv_reg(reg) * scale.scale).clamp(min=0) * stride
            y, x = torch.meshgrid(*(torch.arange(size) for size in level.shape[2:]), indexing="ij")
            points = (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride
            sides = by_location(sides, 4)
            boxes.append(torch.cat([points - sides[:, :2], points + sides[:, 2:]], dim=1))
            logits.append(
                by_location(torch.cat([self.conv_cls(cls), self.conv_centerness(reg)], dim=1), self.classes + 1)
            )
        return torch.cat(boxes), torch.cat(logits)


class Detector(nn.Module):
    """A detector of mmdetection, from the `model` of its config."""

    def __init__(self, config):
        super().__init__()
        self.backbone, self.neck = ResNet(config["backbone"]), FPN(config["neck"])
        if "rpn_head" in config:
            self.rpn_head, self.roi_head = RPNHead(config["rpn_head"]), RoIHead(config["roi_head"])
        else:
            self.bbox_head = (RetinaHead if config["type"] == "RetinaNet" else FCOSHead)(config["bbox_head"])

    def pyramid(self, image):
        return self.neck(self.backbone(image))


def randomize(detector: nn.Module) -> nn.Module:
    """Give every tensor of a detector values that a mistake would change, and keep features of moderate size."""
    for name, tensor in detector.state_dict().items():
        if name.endswith("running_mean") or name.endswith("bias"):
            nn.init.uniform_(tensor, -0.2, 0.2)
        elif name.endswith("running_var") or tensor.dim() < 2:
            nn.init.uniform_(tensor, 0.5, 1.5) if tensor.is_floating_point() else tensor.fill_(7)
        else:
            nn.init.kaiming_uniform_(tensor, a=2.0)
    return detector.eval()
