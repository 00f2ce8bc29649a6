"""Find the images to label, and read their sizes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from tqdm import tqdm

from ..data.catalog import load_dataset
from ..data.folders import leaves, list_images, resolve
from ..data.headers import Header, read_headers
from ..errors import GDetKDError, some

Sample = Dict[str, Any]  # an image in Detectron2's format
# Images whose headers are read between two steps of the progress bar.
CHUNK = 256
# Images that a message names.
MOST_NAMED = 3


@dataclass(frozen=True)
class ImageFile:
    """Describe a readable image.

    Attributes:
        name: path from the folder of all images on, with forward slashes.
        path: path of the file.
        width, height: size in pixels after EXIF turned the image, as Detectron2 reads it.
        bytes: size of the file in bytes.
        identity: the id of the image in its dataset. In a folder, it is the name.
    """

    name: str
    path: str
    width: int
    height: int
    bytes: int
    identity: Any


class Candidates(NamedTuple):
    """Hold images that are not opened yet.

    Attributes:
        folder: the folder from which the names of images start.
        samples: `file_name` and `image_id`, and also `width` and `height` if they are known.
    """

    folder: str
    samples: List[Sample]


def find_in_folder(folder: str) -> Candidates:
    """Find the images of a folder and its subfolders.

    Raises:
        GDetKDError: there is no such folder, or it has no image.
    """
    if not os.path.isdir(folder):
        raise GDetKDError(
            f"--images {folder!r} is not a folder. The current folder is {os.getcwd()}. Correct the path."
        )
    names, others = list_images(folder)
    if not names:
        found = ", ".join(f"{count} {ending}" for ending, count in others.items()) or "no file"
        raise GDetKDError(
            f"--images {folder!r} has no image (.jpg, .jpeg, .png, .bmp, .webp or .tif) in it or in its subfolders. It "
            f"has {found}. Name the folder of the images."
        )
    return Candidates(folder, [{"file_name": os.path.join(folder, name), "image_id": name} for name in names])


def find_in_dataset(name: str) -> Candidates:
    """Find the images of a registered dataset. The labels of the dataset are not used.

    Raises:
        GDetKDError: the dataset is not registered, or it has no image.
    """
    dicts = load_dataset(name)
    keys = ("file_name", "image_id", "width", "height")
    samples = [{key: sample[key] for key in keys if key in sample} for sample in dicts]
    entry = MetadataCatalog.get(name).get("gdetkd_entry") or {}
    root = MetadataCatalog.get(name).get("image_root") or (resolve(entry["images"]) if "images" in entry else "")
    paths = [os.path.abspath(sample["file_name"]) for sample in samples]
    if not root or any(leaves(os.path.relpath(path, root)) for path in paths):
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Candidates(root, samples)


def find_in_annotations(images: Sequence[Mapping[str, Any]], folder: str) -> Candidates:
    """Find the images that the `images` of a COCO JSON name, in a folder."""
    samples = []
    for image in images:
        size = {key: image[key] for key in ("width", "height") if isinstance(image.get(key), int)}
        samples.append({"file_name": os.path.join(folder, image["file_name"]), "image_id": image["id"], **size})
    return Candidates(folder, samples)


def read_images(candidates: Candidates) -> Tuple[List[ImageFile], Dict[str, str]]:
    """Open all images, and leave out those that cannot be read completely. The processes share this work.

    Returns:
        the readable images, sorted by name, and the reason for each image that is left out, by its name.

    Raises:
        GDetKDError: no image can be read.
    """
    samples, folder = candidates.samples, candidates.folder
    names = [Path(os.path.relpath(sample["file_name"], folder)).as_posix() for sample in samples]
    readable: Dict[str, ImageFile] = {}
    faults: Dict[str, str] = {}
    for name, sample, header in zip(names, samples, _read_together(samples)):
        path = sample["file_name"]
        if header.fault is not None:
            faults[name] = header.fault
        elif header.size is None:
            faults[name] = "is not on this machine: copy it to a folder"
        else:
            identity = sample.get("image_id", name)
            readable[name] = ImageFile(name, path, *header.size, os.path.getsize(path), identity)
    if not readable:
        raise GDetKDError(f"No image in {folder!r} can be read: {name_faults(faults)}. Name the folder of the images.")
    return [readable[name] for name in sorted(readable)], faults


def _read_together(samples: Sequence[Sample]) -> List[Header]:
    """Return the header of each image. Each process decodes its part of the images."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    own = samples[rank::world_size]
    headers: List[Header] = []
    with tqdm(total=len(own), desc="opening images", disable=rank > 0) as progress:
        for start in range(0, len(own), CHUNK):
            headers += read_headers(own[start : start + CHUNK], whole=True)
            progress.update(len(headers) - progress.n)
    parts = comm.all_gather(headers)
    return [parts[index % world_size][index // world_size] for index in range(len(samples))]


def name_faults(faults: Mapping[str, str]) -> str:
    """Name up to three images that cannot be read, with the reasons, and count the rest."""
    return some([f"{name} {reason}" for name, reason in sorted(faults.items())], MOST_NAMED)
