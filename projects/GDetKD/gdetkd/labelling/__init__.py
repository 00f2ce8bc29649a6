"""Label images with a teacher: choose score thresholds on labelled images, and write the boxes as a COCO JSON."""
