"""Readers of the published folders, embedded pictures, and batches by identity."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from gridattn.data.sampling import EpochSampler
from gridattn.systems.dcal import beetles, marks
from gridattn.systems.dcal.data import IdentityData, IdentitySamples, SightingSamples, SortData, load_data
from gridattn.systems.dcal.metrics import GALLERY, PADDING, QUERY
from gridattn.systems.dcal.transforms import Views

VIEWS = Views((16, 8))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 17), (len(path.name), 80, 90)).save(path)


def cub(root: Path) -> None:
    names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auk/c.jpg", "002.Auk/d.jpg"]
    folder = root / "CUB_200_2011"
    for name in names:
        picture(folder / "images" / name)
    (folder / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (folder / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n")
    (folder / "classes.txt").write_text("1 001.Albatross\n2 002.Auk\n")


def aircraft(root: Path) -> None:
    folder = root / "data"
    for number in ("0000001", "0000002", "0000003"):
        picture(folder / "images" / f"{number}.jpg")
    (folder / "variants.txt").write_text("707-320\nDC 3\n")
    (folder / "images_variant_trainval.txt").write_text("0000001 707-320\n0000002 DC 3\n")
    (folder / "images_variant_test.txt").write_text("0000003 DC 3\n")


def cars(root: Path) -> None:
    kind = [("fname", object), ("class", object)]
    for folder, file, labels in (
        ("cars_train", "devkit/cars_train_annos.mat", [2, 1]),
        ("cars_test", "cars_test_annos_withlabels.mat", [2]),
    ):
        rows = np.array([(f"{i:05d}.jpg", label) for i, label in enumerate(labels, 1)], dtype=kind)
        for row in rows:
            picture(root / folder / row["fname"])
        (root / file).parent.mkdir(exist_ok=True)
        savemat(root / file, {"annotations": rows})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})


def market(root: Path) -> None:
    folder = root / "Market-1501-v15.09.15"
    for name in (
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c2s1_000451_03.jpg",
        "bounding_box_train/0007_c3s1_000451_03.jpg",
        "query/0001_c1s1_001051_00.jpg",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/0000_c1s1_000151_01.jpg",
        "bounding_box_test/0001_c2s1_000301_00.jpg",
    ):
        picture(folder / name)


def duke(root: Path) -> None:
    for name in ("bounding_box_train/0005_c2_f0046985", "query/0001_c1_f0044158", "bounding_box_test/0001_c8_f0054106"):
        picture(root / "DukeMTMC-reID" / f"{name}.jpg")


def msmt17(root: Path, folders: tuple[str, str] = ("train", "test")) -> None:
    lists = {
        "train": "0000/0000_000_01_0303morning_0015_0.jpg 0\n0001/0001_000_05_0303noon_0015_0.jpg 1\n",
        "val": "0000/0000_003_14_0303morning_0015_0.jpg 0\n",
        "query": "0000/0000_001_02_0303morning_0015_0.jpg 0\n",
        "gallery": "0000/0000_002_03_0303morning_0015_0.jpg 0\n0001/0001_000_15_0303morning_0015_0.jpg 1\n",
    }
    for name, text in lists.items():
        folder = root / "MSMT17_V1" / folders[name in ("query", "gallery")]
        for line in text.splitlines():
            picture(folder / line.split()[0])
        (root / "MSMT17_V1" / f"list_{name}.txt").write_text(text)


def msmt17_v2(root: Path) -> None:
    msmt17(root, ("mask_train_v2", "mask_test_v2"))


def veri(root: Path) -> None:
    for name, file in (
        ("train", "0001_c001_00016450_0.jpg"),
        ("query", "0002_c002_00030600_0.jpg"),
        ("test", "0002_c003_00084280_0.jpg"),
    ):
        picture(root / "VeRi" / f"image_{name}" / file)
        (root / "VeRi" / f"name_{name}.txt").write_text(f"{file}\n")


@pytest.mark.parametrize(
    ("kind", "make", "classes", "train", "val"),
    [
        ("cub", cub, ("001.Albatross", "002.Auk"), [0, 1], [0, 1]),
        ("aircraft", aircraft, ("707-320", "DC 3"), [0, 1], [1]),
        ("cars", cars, ("Audi", "BMW"), [1, 0], [1]),
    ],
)
def test_pictures_by_sort(
    kind: str, make: Callable, classes: tuple[str, ...], train: list[int], val: list[int], tmp_path: Path
) -> None:
    make(tmp_path)
    data = load_data(f"{kind}:{tmp_path}")
    assert isinstance(data, SortData)
    assert (data.classes, data.train.labels, data.val.labels) == (classes, train, val)
    image, label = data.val[0]
    assert (image.size, image.mode, label) == ((9, 17), "RGB", val[0])


@pytest.mark.parametrize(
    ("kind", "make", "train", "query", "gallery"),
    [
        ("market", market, [(0, 1), (0, 2), (1, 3)], [(1, 1)], [(0, 1), (1, 2)]),
        ("duke", duke, [(0, 2)], [(1, 1)], [(1, 8)]),
        ("msmt17", msmt17, [(0, 1), (1, 5), (0, 14)], [(0, 2)], [(0, 3), (1, 15)]),
        ("msmt17", msmt17_v2, [(0, 1), (1, 5), (0, 14)], [(0, 2)], [(0, 3), (1, 15)]),
        ("veri", veri, [(0, 1)], [(2, 2)], [(2, 3)]),
    ],
)
def test_pictures_by_identity(
    kind: str, make: Callable, train: list, query: list, gallery: list, tmp_path: Path
) -> None:
    make(tmp_path)
    data = load_data(f"{kind}:{tmp_path}")
    assert isinstance(data, IdentityData)
    for part, expected in ((data.train, train), (data.query, query), (data.gallery, gallery)):
        assert [(seen.identity, seen.camera) for seen in part] == expected
    assert data.identities == len({identity for identity, _ in train})
    image, identity, camera, kind_of = SightingSamples(data.query, data.gallery, VIEWS.fixed())[0]
    assert (image.shape, identity, camera, kind_of) == ((3, 16, 8), *query[0], QUERY)


def edit(root: Path, name: str, text: str | None) -> None:
    (file,) = root.rglob(name)
    file.unlink() if text is None else file.write_text(text)


@pytest.mark.parametrize(
    ("kind", "make", "file", "text", "message"),
    [
        ("cub", cub, "images.txt", None, r"images\.txt.* is missing"),
        ("cub", cub, "train_test_split.txt", "1 1\n2 0\n3 1\n", r"train_test_split\.txt.* has no line for image 4"),
        ("cub", cub, "train_test_split.txt", "1 1\n2 1\n3 1\n4 1\n", r"has no test pictures"),
        ("cub", cub, "train_test_split.txt", "1 1\n2 0\n3 1\n4 2\n", r"split '2'"),
        ("cub", cub, "image_class_labels.txt", "1 1\n2 1\n3 2\n4 3\n", r"label '3'"),
        ("cub", cub, "image_class_labels.txt", "1 1\n2\n", r"line '2'"),
        ("cub", cub, "classes.txt", "", r"classes\.txt.* is empty"),
        ("cub", cub, "d.jpg", None, r"d\.jpg' is missing"),
        ("aircraft", aircraft, "images_variant_test.txt", "0000003 A380\n", r"'A380'"),
        ("cars", cars, "cars_train_annos.mat", "no matrix", r"cars_train_annos\.mat' cannot be read"),
        ("cars", cars, "cars_test_annos_withlabels.mat", None, r"withlabels\.mat' is missing"),
        ("market", market, "0001_c1s1_001051_00.jpg", None, r"query' holds no pictures"),
        ("market", market, "bounding_box_test", None, r"bounding_box_test' is missing"),
        ("msmt17", msmt17, "list_val.txt", None, r"list_val\.txt' is missing"),
        ("msmt17", msmt17, "list_query.txt", "0000/a.jpg 0\n", r"line '0000/a\.jpg 0'"),
        ("msmt17", msmt17, "0000_002_03_0303morning_0015_0.jpg", None, r"0000_002_03.* is missing"),
        ("veri", veri, "name_test.txt", "", r"name_test\.txt' holds no pictures"),
        ("veri", veri, "name_query.txt", "b.jpg\n", r"b\.jpg' is missing"),
    ],
)
def test_what_is_wrong_is_named(
    kind: str, make: Callable, file: str, text: str | None, message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    if file == "bounding_box_test":
        (folder,) = tmp_path.rglob(file)
        folder.rename(folder.with_name("elsewhere"))
    else:
        edit(tmp_path, file, text)
    with pytest.raises(ValueError, match=message) as error:
        load_data(f"{kind}:{tmp_path}")
    assert "\n" not in str(error.value)


def test_a_name_without_camera_is_named(tmp_path: Path) -> None:
    market(tmp_path)
    picture(next(tmp_path.rglob("query")) / "somebody.jpg")
    with pytest.raises(ValueError, match=r"somebody\.jpg' tells no identity"):
        load_data(f"market:{tmp_path}")
    with pytest.raises(ValueError, match="does not exist"):
        load_data(f"market:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"data='birds' is not known"):
        load_data("birds")


def test_a_batch_holds_several_pictures_of_every_identity() -> None:
    data = load_data("marks-reid")
    assert isinstance(data, IdentityData)
    samples = IdentitySamples(data, Views((32, 32)).drawn(), 3, seed=0)
    assert len(samples) == data.identities == 48
    draws = list(EpochSampler(samples, 4, shuffle=True))[:4]
    images, labels = samples.collate(samples.__getitems__(draws))
    assert images.shape == (12, 3, 32, 32)
    assert labels.tolist() == [draw for draw in draws for _ in range(3)]
    assert len(set(draws)) == 4
    for group in images.unflatten(0, (4, 3)):
        assert not torch.equal(group[0], group[1])
    again, _ = samples[draws[0]]
    assert torch.equal(again, images[:3])


def test_padding_has_a_kind_of_its_own() -> None:
    data = load_data("marks-reid")
    assert isinstance(data, IdentityData)
    samples = SightingSamples(data.query[:2], data.gallery[:3], Views((32, 32)).fixed())
    assert [samples[i][3] for i in (0, 1, 2, 4, -1)] == [QUERY, QUERY, GALLERY, GALLERY, PADDING]


@pytest.mark.parametrize("spec", ["marks-reid", "beetles-reid"])
def test_unseen_identities_are_looked_for_in_other_cameras_too(spec: str) -> None:
    data = load_data(spec)
    assert isinstance(data, IdentityData)
    identities = {seen.identity for seen in data.query}
    assert len(identities) == 16
    for query in data.query:
        others = [seen for seen in data.gallery if seen.identity == query.identity and seen.camera != query.camera]
        assert len(others) >= 5
    wanted = {(seen.identity, seen.camera) for seen in data.query}
    assert {camera for _, camera in wanted} == {0, 1}


def test_embedded_pictures_are_the_same_every_time_and_the_parts_share_none() -> None:
    for module in (marks, beetles):
        train, val = module.sorts()
        module.sorts.cache_clear()
        again, _ = module.sorts()
        assert all(np.array_equal(a, b) for a, b in zip(train[0], again[0]))
        assert not {a.tobytes() for a in train[0]} & {a.tobytes() for a in val[0]}
        for _, labels in (train, val):
            assert np.bincount(labels).min() == np.bincount(labels).max()


def test_views_cut_what_the_network_sees() -> None:
    image = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3))
    plain, cut = Views((16, 8)), Views((16, 8), (20, 12))
    assert plain.fixed()(image).shape == cut.fixed()(image).shape == cut.drawn(0.5, 2, 0.5)(image).shape == (3, 16, 8)
    assert cut.show(image).size == plain.show(image).size == (8, 16)
    assert Views.of(cut.plain()) == cut
    with pytest.raises(ValueError, match="resize"):
        Views((16, 8), (20, 7))
