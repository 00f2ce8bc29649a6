"""Images without labels: every image of the folder is read, and skipped files are counted."""

import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image

from conftest import make_cfg
from gdetkd.data import register_datasets
from gdetkd.data.folders import Listing, is_inside, walk

FILES = ["b.JPG", "a.png", "sub/deep/c.jfif", "sub/d.gif", "e.tiff"]


def register_images(folder, files=FILES):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        ending = name.rsplit(".", 1)[1].lower()
        Image.new("RGB", (8, 6)).save(folder / name, {"jfif": "jpeg", "jpg": "jpeg", "heic": "png"}.get(ending, ending))
    register_datasets(make_cfg({"DATASETS.REGISTER": [{"name": "mine", "kind": "images", "images": str(folder)}]}))


def test_subfolders_and_all_endings_are_read_in_order(tmp_path, caplog):
    register_images(tmp_path)
    images = DatasetCatalog.get("mine")
    assert [image["image_id"] for image in images] == sorted(FILES)
    assert all(read_image(image["file_name"], "BGR").shape == (6, 8, 3) for image in images)
    assert "mine:" not in caplog.text


def test_skipped_files_are_counted_once_by_their_ending(tmp_path, caplog):
    register_images(tmp_path, ["a.png", "x.heic", "sub/y.HEIC"])
    (tmp_path / "README").write_text("")
    for _ in range(2):
        assert len(DatasetCatalog.get("mine")) == 1
    warning = "mine: 3 files are skipped because they are not images (2 .heic, 1 without an ending)"
    assert caplog.text.count(warning) == 1


def test_hidden_files_are_skipped_and_links_are_followed_once(tmp_path, caplog):
    register_images(tmp_path / "images", ["a.png", "._a.png", ".git/b.png", "__MACOSX/a.png"])
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "elsewhere/c.png")
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images")
    assert walk(str(tmp_path / "images")) == ["a.png", "linked/c.png"]
    assert [image["image_id"] for image in DatasetCatalog.get("mine")] == ["a.png", "linked/c.png"]
    assert "mine:" not in caplog.text


def test_a_link_beside_its_folder_is_left_out(tmp_path):
    for name in ("2024/x.png", ".store/y.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "1-latest").symlink_to(tmp_path / "2024")
    (tmp_path / "hidden").symlink_to(tmp_path / ".store")
    assert walk(str(tmp_path)) == ["2024/x.png", "hidden/y.png"]
    assert walk(str(tmp_path), recursive=False) == []


def test_a_listing_finds_a_file_whose_name_differs_in_case_or_accents(tmp_path):
    for name in ("One.png", "two.png", "Two.png", "e\u0301.png"):
        (tmp_path / name).touch()
    listing = Listing(str(tmp_path))
    assert listing.find("one.PNG") == "One.png" and listing.find("two.png") == "two.png"
    assert listing.find("TWO.png") is None and listing.find("three.png") is None
    assert listing.find("\u00e9.png") == "e\u0301.png"
    assert listing.images_of("one") == ["One.png"] and listing.images_of("two") == ["two.png"]


@pytest.mark.parametrize("path, inside", [("a/b", True), ("a", True), ("a/../c", False), ("ab", False), ("..", False)])
def test_is_inside(path, inside):
    assert is_inside(path, "a") == inside
