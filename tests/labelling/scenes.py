"""A labelled validation set, and images to label, of which the perfect boxes are known."""

import json
import shutil

from detectron2.data import MetadataCatalog

from conftest import write_coco
from gdetkd.labelling.run import Options


def results_of(annotations, score=0.9):
    """Return a COCO JSON's own boxes as the results of a perfect detector."""
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: item[key] for key in keys}, "score": score} for item in annotations["annotations"]]


class Scene:
    """Hold the folders of a test.

    Attributes:
        images: folder of eight images to label, one of them in a subfolder.
        annotations: their COCO JSON as a file, and `content` as a dictionary.
        validation: the content of the validation set's COCO JSON.
        output: the file to write.
        keys: config keys that name the training and validation sets.
    """

    def __init__(self, folder):
        self.folder, self.images, self.output = folder, folder / "new", folder / "out" / "pseudo.json"
        (self.images / "sub").mkdir(parents=True)
        (folder / "val").mkdir()
        write_coco(self.images, 8, "new", seed=1)
        write_coco(folder / "val", 6, "val", seed=2)
        shutil.move(self.images / "new3.png", self.images / "sub" / "new3.png")
        self.annotations = folder / "new.json"
        shutil.move(self.images / "new.json", self.annotations)
        self.content = json.loads(self.annotations.read_text().replace("new3.png", "sub/new3.png"))
        self.annotations.write_text(json.dumps(self.content))
        self.validation = json.loads((folder / "val" / "val.json").read_text())
        entry = {"name": "val", "kind": "coco", "json": str(folder / "val" / "val.json"), "images": str(folder / "val")}
        entries = [dict(MetadataCatalog.get("tiny").gdetkd_entry), entry]
        self.keys = {"DATASETS.REGISTER": entries, "DATASETS.TEST": ("val",)}

    def write(self, name, content):
        path = self.folder / name
        path.write_text(json.dumps(content))
        return str(path)

    def read(self):
        return json.loads(self.output.read_text())

    @property
    def part(self):
        return self.folder / "out" / "pseudo.json.part"

    def perfect(self, **changes):
        """Return the options to take perfect results of another program, on both sets of images."""
        results = {
            "results": self.write("results.json", results_of(self.content)),
            "validation_results": self.write("val_results.json", results_of(self.validation)),
        }
        values = {"output": self.output, "images": str(self.images), "annotations": str(self.annotations), **results}
        return Options(**{**values, **changes})
