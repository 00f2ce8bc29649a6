"""Name the method in which a cascade labels the proposals of its later stages."""

# Neither v0.6 nor main has a public name for it. It takes (proposals, stage, targets), and returns the proposals.
LABEL_LATER_STAGE = "_match_and_label_boxes"
