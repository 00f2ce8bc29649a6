"""Names of earlier versions: config keys and files that configs and run folders may still have."""

from detectron2.config import CfgNode

# Keys that do nothing any more. A file or a command line may still set them.
REMOVED_KEYS = ("DISTILL.TEACHER.COMPILE", "DISTILL.FGFI.PER_LEVEL")
# Keys that have another name now: the old name, and the new one, which gets the value.
RENAMED_KEYS = {
    "DISTILL.VIS_PERIOD": "DISTILL.INSIGHT.PERIOD",
    "DISTILL.VIS_IMAGES": "DISTILL.INSIGHT.IMAGES",
    "DISTILL.VIS_BASELINE": "DISTILL.INSIGHT.BASELINE",
}
# Folder in a run's OUTPUT_DIR that is called "insight" now.
OLD_INSIGHT_FOLDER = "visualization"


def register_old_keys(cfg: CfgNode) -> None:
    """Make a config know the keys of earlier versions, in place.

    `merge_config_file` and `merge_words` carry the value of a renamed key over. Detectron2's own merge functions raise
    an error that names the new key.
    """
    for key in REMOVED_KEYS:
        cfg.register_deprecated_key(key)
    for old, new in RENAMED_KEYS.items():
        cfg.register_renamed_key(old, new)
