"""The config keys that GDetKD adds to Detectron2's, with meaning, unit and source beside the defaults.

The authors of G-DetKD published no code, so the method's values have three sources. The comments name them like this:

- "a write-up": a public description of the paper gives the value.
- "a re-implementation": the configuration of a public re-implementation gives the value. The authors may use another.
- "our choice": no source gives the value, and we chose it.
"""

from detectron2.config import CfgNode, get_cfg

from .backbones import add_backbone_config
from .backbones.config import node_of
from .losses import DISTILL_LOSS_REGISTRY


def add_gdetkd_config(cfg: CfgNode) -> None:
    """Add GDetKD's keys to a Detectron2 config, in place."""
    # Datasets to register at the start. An entry is a mapping with `name`, `kind` and paths:
    #   {name: my_train, kind: coco, json: my/train.json, images: my/train}
    #   {name: my_train, kind: voc, root: my/VOC, split: train, classes: [cat, dog]}
    #   {name: my_train, kind: yolo, yaml: my/data.yaml, split: train}
    #   {name: my_images, kind: images, images: my/images}, unlabelled images, for which --eval-only writes detections
    #   {name: my_pseudo, kind: pseudo, json: pseudo.json, images: my/images}, unlabelled images with a teacher's boxes;
    #       `min_score` and `ignore_score` replace the thresholds that tools/label.py wrote into the file
    # `limit: N` keeps the first N images. Relative paths start at the folder that the environment variable
    # DETECTRON2_DATASETS names (`datasets` by default), as for Detectron2's own datasets.
    cfg.DATASETS.REGISTER = []
    # Allow datasets to read files outside of their folders. If False, these paths are errors:
    # - a relative path of an entry that leaves the folder above,
    # - a file name in a COCO JSON that is absolute or leaves the entry's `images`,
    # - a name in a VOC list that leaves the entry's `root`,
    # - a path in a data.yaml that leaves the folder of that file and DETECTRON2_DATASETS.
    cfg.DATASETS.ALLOW_OUTSIDE = False
    # Datasets without labels to train on as well, from entries of kind `pseudo`. tools/label.py finds their boxes.
    cfg.DATASETS.UNLABELED = ()

    _add_sampler_keys(cfg)

    # "SGD" (Detectron2's, unchanged) or "AdamW", which trains small detectors from scratch much faster.
    # SOLVER.WEIGHT_DECAY, SOLVER.BIAS_LR_FACTOR and similar keys apply to both.
    cfg.SOLVER.OPTIMIZER = "SGD"

    # Keep model_best.pth: the student with the highest bbox/AP (percent) so far, checked at every TEST.EVAL_PERIOD. If
    # DATASETS.TEST has several datasets, the first one counts.
    cfg.TEST.KEEP_BEST = True
    # End a training whose best bbox/AP, as above, has not risen for this many evaluations in a row. 0: never.
    cfg.TEST.PATIENCE = 0
    # Program that computes COCO's metrics:
    # - "pycocotools",
    # - "faster-coco-eval", which gives the same figures several times faster on large datasets, but supports no
    #   keypoints (pip install faster-coco-eval),
    # - empty: Detectron2's compiled program, or pycocotools if Detectron2 is not compiled.
    cfg.TEST.COCO_EVAL = ""

    cfg.LOG = CfgNode()
    # Experiment trackers to log to, beside metrics.json and TensorBoard: "wandb" (pip install wandb) and
    # "mlflow" (pip install mlflow).
    cfg.LOG.WRITERS = ()
    # The project of W&B, or the experiment of MLflow.
    cfg.LOG.PROJECT = "gdetkd"
    # Name of the run in the tracker. Empty: the name of the folder OUTPUT_DIR.
    cfg.LOG.NAME = ""

    # Largest share of bad images in a dataset. A bad image is missing, cannot be opened, or has another size than its
    # annotations say. Training leaves bad images out. It stops if there are more than this share.
    cfg.INPUT.MAX_BAD_FRACTION = 0.01

    _add_instaboost_node(cfg)
    _add_fcos_node(cfg)
    add_backbone_config(cfg)

    cfg.DISTILL = CfgNode()
    # The student's own meta-architecture, which MODEL.META_ARCHITECTURE names in a plain run.
    cfg.DISTILL.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"
    # Distillation terms to add to the student's own losses. G-DetKD's are "SGFI", "CKD", "CLS" and "REG". Terms of
    # other papers are "FITNET", "GTMASK", "FGFI", "ROIFI", "CWD", "PKD", "FGD", "MGD" and "CROSSKD". Empty: plain
    # training. The keys of a term are in its node DISTILL.<name>. The term's file in losses/ explains them.
    cfg.DISTILL.LOSSES = ()
    # Copy the teacher's weights to the student before training, except the backbone's, if name and shape agree.
    cfg.DISTILL.HEAD_TRANSFER = False
    # Share of the iterations in which the student is distilled. After them it trains alone, without the teacher, and a
    # step is as cheap as a plain one (docs/performance.md). Source: our choice. 1: all iterations, as in the paper.
    cfg.DISTILL.UNTIL = 1.0
    # Evaluate the teacher once before training, and log its AP beside the student's.
    cfg.DISTILL.EVAL_TEACHER = False

    # CLS and REG compare the classes that student and teacher both have. Classes of the same name match. Pairs
    # [student class, teacher class] match classes of different names, for example [["car", "vehicle"]].
    cfg.DISTILL.CLASS_MAP = []
    # The weights of all terms rise linearly from 0 over this many iterations, or over a term's own WARMUP_ITERS if that
    # is larger.
    cfg.DISTILL.WARMUP_ITERS = 0

    # The factors on the terms in the total loss:
    # - "fixed": WEIGHT of each loss.
    # - "auto": they are computed in training, so that the gradient of a term in the backbone's outputs has SHARE times
    #   the norm of the gradient of the student's own losses (docs/weights.md).
    cfg.DISTILL.WEIGHTS = "fixed"
    _add_auto_node(cfg)

    # Number of steps that a run may skip, with a warning, because a loss is infinite or not a number. The next such
    # step stops the run.
    cfg.DISTILL.SKIP_NONFINITE = 0

    _add_teacher_node(cfg)
    _add_unlabeled_node(cfg)
    _add_regions_node(cfg)
    _add_loss_nodes(cfg)
    _add_insight_node(cfg)


def _add_sampler_keys(cfg: CfgNode) -> None:
    """Add the keys of Detectron2's samplers that the installed Detectron2 does not define.

    v0.6 defines none of them. The main branch defines only REPEAT_SQRT.
    """
    # Pairs [dataset in DATASETS.TRAIN, positive factor]. The samplers "WeightedTrainingSampler" and
    # "WeightedCategoryTrainingSampler" (DATALOADER.SAMPLER_TRAIN) repeat the images of a dataset by its factor. A
    # dataset that is not listed has the factor 1.
    if "TRAIN_REPEAT_FACTOR" not in cfg.DATASETS:
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = []
    # Take the square root of the repeat factors that DATALOADER.REPEAT_THRESHOLD gives to images of rare categories.
    if "REPEAT_SQRT" not in cfg.DATALOADER:
        cfg.DATALOADER.REPEAT_SQRT = True
    # Share of the images that "RandomSubsetTrainingSampler" trains on. SEED chooses the images.
    if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0


def student_architecture(cfg: CfgNode) -> str:
    """Return the meta-architecture of the detector that a config trains, with or without distillation."""
    name = cfg.MODEL.META_ARCHITECTURE
    return cfg.DISTILL.STUDENT_META_ARCHITECTURE if name == "GDetKD" else name


def plain_config(cfg: CfgNode) -> CfgNode:
    """Return the config of the plain Detectron2 detector that a GDetKD config trains. A plain config stays as it is."""
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD":
        return cfg
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.META_ARCHITECTURE = student_architecture(cfg)
    plain.freeze()
    return plain


def without_gdetkd_keys(cfg: CfgNode) -> CfgNode:
    """Return the config of the detector without GDetKD's keys, for plain Detectron2.

    A backbone of `gdetkd.backbones` keeps the keys of its node, because it cannot be built without them.
    """
    plain = plain_config(cfg).clone()
    plain.defrost()
    node = node_of(cfg)
    kept = plain.MODEL[node].clone() if node else None
    _keep_known(plain, get_cfg())
    if kept is not None:
        plain.MODEL[node] = kept
    return plain


def _keep_known(node: CfgNode, known: CfgNode) -> None:
    for key in list(node):
        if key not in known:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _keep_known(node[key], known[key])


def _add_teacher_node(cfg: CfgNode) -> None:
    cfg.DISTILL.TEACHER = CfgNode()
    # The teacher's own Detectron2 config file: a yaml, or a .py of LazyConfig, which is run as a program. A relative
    # path starts at the current folder. "torchvision:NAME" is a detector of torchvision (docs/teachers.md).
    cfg.DISTILL.TEACHER.CONFIG_FILE = ""
    # The teacher's weights: a path or URL that Detectron2 can read. For a detector of torchvision also the name of its
    # weights, such as "DEFAULT". Empty: MODEL.WEIGHTS of the teacher's yaml.
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    # Changes to the teacher's config, as on a command line: ["MODEL.ROI_HEADS.NUM_CLASSES", 6] for a yaml,
    # ["model.roi_heads.num_classes", 6] for a .py, ["num_classes", 7] for a torchvision detector.
    cfg.DISTILL.TEACHER.OPTS = []
    # Precision of the teacher: "float32", "float16" (CUDA only) or "bfloat16". Empty: float16 if SOLVER.AMP.ENABLED,
    # else float32.
    cfg.DISTILL.TEACHER.DTYPE = ""
    # Size of the images that the teacher sees in training, in multiples of the size of the student's images. Both are
    # made from the original pixels by the same augmentations. 1: the teacher sees the student's images.
    cfg.DISTILL.TEACHER.SCALE = 1.0
    # Main memory (MB) of each process in which the teacher's features are kept for the next time that the same pixels
    # come. It helps if a dataset has few views: a fixed size, flips, no crops. 0: keep none.
    cfg.DISTILL.TEACHER.CACHE_MB = 0
    # Lowest AP (percent) that `--check` accepts on a sample of the student's data. A lower AP suggests that the weights
    # are not loaded or the images are normalised wrongly.
    cfg.DISTILL.TEACHER.MIN_AP = 5.0
    # Names of the teacher's classes in order, for a teacher whose DATASETS.TRAIN is not registered here.
    cfg.DISTILL.TEACHER.CLASSES = []


def _add_unlabeled_node(cfg: CfgNode) -> None:
    """Add the keys of training on DATASETS.UNLABELED. Source of the values: our choice."""
    node = cfg.DISTILL.UNLABELED = CfgNode()
    # Share of the images of each batch that come from DATASETS.UNLABELED.
    node.FRACTION = 0.5
    # Factor on the student's own losses on these images. 1: an image counts as much as one with labels.
    node.WEIGHT = 1.0


def _add_auto_node(cfg: CfgNode) -> None:
    """Add the keys of DISTILL.WEIGHTS "auto". Source of the values: our choice."""
    node = cfg.DISTILL.AUTO = CfgNode()
    # Iterations between two measurements of the gradients. The first measurement is at the start.
    node.PERIOD = 20
    # Share of the earlier measurements in the smoothed logarithm of a weight.
    node.MOMENTUM = 0.8


def _add_loss_nodes(cfg: CfgNode) -> None:
    """Add a node for each registered loss. The class of the loss gives the default weight and further keys."""
    for name, loss in DISTILL_LOSS_REGISTRY:
        node = cfg.DISTILL[name] = CfgNode()
        # Factor on the term in the total loss.
        node.WEIGHT = loss.default_weight
        # For DISTILL.WEIGHTS "auto": norm of the term's gradient over the norm of the gradient of the student's own
        # losses, both in the backbone's outputs. Source: our choice (docs/weights.md).
        node.SHARE = loss.default_share
        # The weight rises linearly from 0 over this many iterations. 0: the weight is constant.
        node.WARMUP_ITERS = 0
        loss.add_keys(node)


def _add_insight_node(cfg: CfgNode) -> None:
    """Add the keys of the records that show what distillation does to the student."""
    node = cfg.DISTILL.INSIGHT = CfgNode()
    # Record every PERIOD iterations: level matching, tau, similarity of classes, gradients of the terms, detections.
    # OUTPUT_DIR/insight/index.html and TensorBoard show the records. 0: never.
    node.PERIOD = 0
    # Number of labelled images for these records, spread evenly over DATASETS.TEST[0].
    node.IMAGES = 32
    # OUTPUT_DIR of a finished run of the student alone, for comparison. Empty: no comparison.
    node.BASELINE = ""


def _add_regions_node(cfg: CfgNode) -> None:
    """Add the keys that choose the predictions of a dense student that become regions.

    A write-up of the paper gives the IoU of positives and their ratio to negatives. A re-implementation gives most
    other values, which mmdetection uses too.
    """
    node = cfg.DISTILL.REGIONS = CfgNode()
    # Number of predictions of an image to decode: those with the highest class score (for FCOS, times centerness) over
    # all levels. Source: a re-implementation.
    node.PRE_NMS_TOPK = 2000
    # IoU threshold of class-agnostic NMS. Source: a re-implementation.
    node.NMS_THRESH = 0.7
    # Largest number of boxes of an image after NMS. Source: a re-implementation.
    node.POST_NMS_TOPK = 1000
    # Smallest width and height of a region, in pixels after clipping to the image. Source: our choice.
    node.MIN_SIZE = 1.0
    # A box is positive if its IoU with an object is at least this. Source: a write-up.
    node.IOU_THRESHOLD = 0.5
    # Number of regions of an image. Source: a re-implementation.
    node.BATCH_SIZE_PER_IMAGE = 512
    # Largest share of positive regions: one positive to three negatives. Source: a write-up.
    node.POSITIVE_FRACTION = 0.25


def _add_instaboost_node(cfg: CfgNode) -> None:
    """Add the keys of InstaBoost, the augmentation of the paper's X-101 teacher.

    It needs masks and `pip install instaboostfast`. Names and values are those of InstaBoost's authors.
    """
    node = cfg.INPUT.INSTABOOST = CfgNode()
    node.ENABLED = False
    # Probability that an image is augmented.
    node.PROBABILITY = 0.5
    # Actions on an object: "normal" moves, scales and turns it; "horizontal" and "vertical" flip it as well; "skip"
    # leaves it.
    node.ACTION_CANDIDATE = ("normal", "horizontal", "skip")
    # Probability of each action.
    node.ACTION_PROB = (1.0, 0.0, 0.0)
    # Range of scales.
    node.SCALE = (0.8, 1.2)
    # Farthest move: the image's width / DX and height / DY.
    node.DX = 15
    node.DY = 15
    # Range of turns, in degrees.
    node.THETA = (-1, 1)
    # Probability that an augmented image changes in colour.
    node.COLOR_PROB = 0.5
    # Move objects to places whose surroundings look similar. This is slow.
    node.HEATMAP_FLAG = False


def _add_fcos_node(cfg: CfgNode) -> None:
    """Add the keys of FCOS, which Detectron2 lacks. The values are those of Detectron2's FCOS configuration.

    Set MODEL.META_ARCHITECTURE to "FCOS", and MODEL.BACKBONE.NAME to "build_fcos_resnet_fpn_backbone" or RetinaNet's
    backbone.
    """
    node = cfg.MODEL.FCOS = CfgNode()
    node.NUM_CLASSES = 80
    # Levels of the pyramid that the head reads.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Number of convolutions in a tower.
    node.NUM_CONVS = 4
    # Normalisation in the towers: "GN" as in the FCOS paper, "" for none.
    node.NORM = "GN"
    # Multiply the box predictions of each level by a learned scale, as the first FCOS and mmdetection do.
    node.LEVEL_SCALES = False
    # Probability of an object at the start of training.
    node.PRIOR_PROB = 0.01
    # A location is positive within this many strides of an object's centre.
    node.CENTER_SAMPLING_RADIUS = 1.5
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Inference: the lowest score, the number of candidates of a level before NMS, and the IoU threshold of NMS.
    node.SCORE_THRESH_TEST = 0.2
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.6
