"""Labels from dataset.json and labels.csv, in folders and zip files."""

import json
import zipfile

import pytest
from PIL import Image

from fastgan._checks import InputError
from fastgan.data import image_folder, load_data


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{i % 2}" / f"{i}.png")
    return tmp_path


ROWS = [["0/0.png", 2], ["0/2.png", 0], ["1/1.png", 2], ["1/3.png", 1]]


def write(folder, rows):
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))


def test_dataset_json(folder):
    write(folder, ROWS)
    data = image_folder(folder, 16)
    assert (data.labels.tolist(), data.class_names) == ([2, 0, 2, 1], ("0", "1", "2"))
    with zipfile.ZipFile(folder / "all.zip", "w") as file:
        for path in [*folder.rglob("*.png"), folder / "dataset.json"]:
            file.write(path, path.relative_to(folder))
    assert image_folder(folder / "all.zip", 16).labels.tolist() == [2, 0, 2, 1]
    write(folder, None)
    assert image_folder(folder, 16).class_names == ("0", "1")  # of the folders


@pytest.mark.parametrize("header", ["", "file,class\n", "\ufefffile,class\n"])
def test_labels_csv(folder, header):
    rows = "".join(f"{path},{'zebra' if label == 2 else 'ant'}\n" for path, label in ROWS)
    (folder / "labels.csv").write_text(header + rows, encoding="utf-8")
    data = image_folder(folder, 16)
    assert (data.labels.tolist(), data.class_names) == ([1, 0, 1, 0], ("ant", "zebra"))
    assert "2 classes: ant 2, zebra 2" in load_data(folder, 16).found


def test_mistakes_name_the_file(folder):
    write(folder, ROWS[:2])
    with pytest.raises(InputError, match=r"dataset.json has no label for 2 of 4 images: 1/1.png, 1/3.png"):
        image_folder(folder, 16)
    (folder / "dataset.json").write_text("[1]")
    with pytest.raises(InputError, match=r"dataset.json must hold 'labels'"):
        image_folder(folder, 16)
    (folder / "dataset.json").unlink()
    (folder / "labels.csv").write_text("0/0.png\n")
    with pytest.raises(InputError, match=r"labels.csv must have rows of a path and a label, got '0/0.png'"):
        image_folder(folder, 16)


def test_article_numbers_are_no_classes(folder):
    write(folder, [[name, 10**9] for name, _ in ROWS])
    with pytest.raises(InputError, match=r"dataset.json reach 1000000000 for 4 images: number the classes 0, 1, 2"):
        image_folder(folder, 16)


@pytest.mark.parametrize("label", [-1, 0.5, [0, 1], None, True])
def test_labels_that_are_neither_numbers_nor_names(folder, label):
    write(folder, [*ROWS[:3], ["1/3.png", label]])
    with pytest.raises(InputError, match=r"labels of .*dataset.json must be whole numbers from 0 or names, got .* 1/3"):
        image_folder(folder, 16)


def test_a_label_file_is_not_left_out(folder):
    write(folder, ROWS)
    (folder / "notes.txt").write_text("")
    told = []
    image_folder(folder, 16, tell=told.append)
    assert told == [f"{folder}: left out 1 no image (.txt)"]


def test_two_labels_of_one_image(folder):
    for name, content in (
        ("labels.csv", "0/0.png,a\n1/1.png,b\n0/0.png,b\n"),
        ("dataset.json", json.dumps({"labels": [["0/0.png", 0], ["0/0.png", 1]]})),
    ):
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=f"{name} has two labels for 0/0.png"):
            image_folder(folder, 16)
        (folder / name).unlink()
