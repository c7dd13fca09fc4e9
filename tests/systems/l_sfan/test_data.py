"""Windows, statistics, metrics and the readers of files on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.metrics import f1_score, matthews_corrcoef

from gridattn.systems.l_sfan import Recording, Standardise, Windows, load_sensors
from gridattn.systems.l_sfan.augment import SignalAugment
from gridattn.systems.l_sfan.files import read_csv, read_watch
from gridattn.systems.l_sfan.metrics import class_f1, matthews, overall, subject_report, weighted_loss
from gridattn.systems.l_sfan.windows import class_weights, frame_scores, majority, window_starts


def recording(subject: str, frames: int = 40, offset: float = 0.0) -> Recording:
    x = np.random.default_rng(frames).normal(offset, 2, (frames, 3)).astype(np.float32)
    return Recording(x, np.arange(frames) % 2, subject, "", f"{subject}.npz")


def write_npz(folder: Path, subject: str, offset: float = 0.0, **changes: object) -> Path:
    made = recording(subject, offset=offset)
    entries = {"x": made.x, "y": made.y, "subject": subject, "activity": "bend", "rate": 60.0} | changes
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{subject}.npz", **{name: value for name, value in entries.items() if value is not None})
    return folder / f"{subject}.npz"


@pytest.mark.parametrize(("frames", "window", "hop"), [(180, 180, 45), (359, 180, 45), (100, 7, 3), (8, 4, 9)])
def test_the_number_of_windows(frames: int, window: int, hop: int) -> None:
    assert len(window_starts(frames, window, hop)) == (frames - window) // hop + 1


def test_half_of_the_frames_make_a_window_protective() -> None:
    assert majority(np.repeat([0, 1], [90, 90])) == 1
    assert majority(np.repeat([0, 1], [91, 89])) == 0


def test_statistics_come_from_the_training_subjects_alone(tmp_path: Path) -> None:
    for name, offset in (("here", 0.0), ("there", 50.0)):
        for subject in "ab":
            write_npz(tmp_path / name, subject)
        write_npz(tmp_path / name, "c", offset)
    here, there = (load_sensors(f"folder:{tmp_path / name}").split(["c"], 10, 5)[2] for name in ("here", "there"))
    assert here == there
    assert here != load_sensors(f"folder:{tmp_path / 'there'}").split(["a"], 10, 5)[2]


def test_standardised_training_windows_have_mean_0_and_deviation_1() -> None:
    windows = Windows([recording("a", offset=1e4)], 10, 10)
    fitted = Standardise.fit(windows)
    z = torch.cat([fitted(windows.frames(i)) for i in range(len(windows))], 1)
    torch.testing.assert_close(z.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_no_subject_is_in_both_parts() -> None:
    data = load_sensors("tension")
    train, val, _ = data.split(data.validation_subjects(None, 0), 180, 45)
    assert (len(train), len(val)) == (800, 300)
    assert not set(train.subjects) & set(val.subjects)


def test_class_weights_average_to_1() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [3])
    weights = class_weights(labels, 4)
    assert weights[labels].mean() == pytest.approx(1)
    assert weights[2] == 0


def test_correlation_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        true, claimed = rng.integers(0, classes, (2, 60))
        matrix = torch.zeros(classes, classes)
        for i, j in zip(true, claimed):
            matrix[i, j] += 1
        assert matthews(matrix) == pytest.approx(matthews_corrcoef(true, claimed))
        assert float(class_f1(matrix).mean()) == pytest.approx(f1_score(true, claimed, average="macro"))
    assert matthews(torch.tensor([[5, 0], [3, 0]])) == 0
    assert matthews(torch.tensor([[5, 0], [0, 3]])) == pytest.approx(1)
    assert matthews(torch.tensor([[0, 5], [3, 0]])) == pytest.approx(-1)


def test_a_subject_of_one_class_is_left_out_of_the_means() -> None:
    both, one = torch.tensor([[3, 1], [0, 4]]), torch.tensor([[5, 0], [0, 0]])
    report = subject_report({"a": both, "b": one}, ("no", "yes"))
    assert report["over_subjects"]["undefined"] == 1
    assert report["over_subjects"]["mcc"]["mean"] == overall(both)["mcc"]
    assert report["over_subjects"]["accuracy"]["subjects"] == 2
    assert report["windows"] == 13


def test_the_loss_is_cross_entropy_and_passes_over_padding() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, -1, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1)
    torch.testing.assert_close(weighted_loss(logits, labels, torch.ones(3)), expected)
    assert weighted_loss(logits, labels, torch.ones(3), 2.0) < expected


def test_constant_probabilities_give_that_constant_on_every_covered_frame() -> None:
    scores = frame_scores(torch.full((3, 2, 1), 0.3), [0, 3, 6], 12, 4)
    torch.testing.assert_close(scores[:, :10], torch.full((2, 10), 0.3))
    assert scores[:, 10:].isnan().all()


def test_augmentation_keeps_the_shape_and_checks_its_options() -> None:
    x = torch.randn(3, 20)
    assert torch.equal(SignalAugment()(x), x)
    assert SignalAugment(0.1, 0.9, 0.5)(x).shape == x.shape
    with pytest.raises(ValueError, match="jitter"):
        SignalAugment.of({"jiter": 1})


def test_emopain_files_are_read_by_subject(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 180, 30))
    savemat(tmp_path / "C1_test.mat", {"subdata": x, "sublabel": np.zeros((4, 1))})
    savemat(tmp_path / "P13.mat", {"subdata": x[:3] + 1, "sublabel": np.array([[0, 1, 1]])})
    savemat(tmp_path / "train1.mat", {"data": x, "label": np.zeros((1, 4))})
    data = load_sensors(f"emopain:{tmp_path}")
    assert data.subjects == ["C1", "P13"]
    assert len(data.channels) == 30
    windows = data.windows(["P13"], 180, 45)
    assert windows.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(windows.frames(2), (x[2] + 1).astype(np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"subdata": np.ones((2, 9, 3))}, "sublabel"),
        ({"subdata": np.ones((2, 9)), "sublabel": [0, 1]}, "windows, frames, features"),
        ({"subdata": np.ones((2, 9, 3)), "sublabel": [0]}, "1 entries for 2 windows"),
        ({"subdata": np.full((2, 9, 3), np.nan), "sublabel": [0, 1]}, "not finite"),
        ({"subdata": np.ones((2, 9, 3)), "sublabel": [0.5, 1]}, "class indices"),
    ],
)
def test_inconsistent_emopain_files_are_named(tmp_path: Path, content: dict, message: str) -> None:
    savemat(tmp_path / "P1.mat", content)
    with pytest.raises(ValueError, match=rf"P1\.mat.*{message}"):
        load_sensors(f"emopain:{tmp_path}")


def test_damaged_files_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        load_sensors(f"emopain:{tmp_path / 'absent'}")
    with pytest.raises(ValueError, match="no subject file"):
        load_sensors(f"emopain:{tmp_path}")
    (tmp_path / "P1.mat").write_bytes(b"MATLAB")
    with pytest.raises(ValueError, match=r"P1\.mat"):
        load_sensors(f"emopain:{tmp_path}")
    file = write_npz(tmp_path / "npz", "a")
    file.write_bytes(file.read_bytes()[:90])
    with pytest.raises(ValueError, match=r"a\.npz"):
        load_sensors(f"folder:{file.parent}")
    write_npz(tmp_path / "npz", "a", y=None)
    with pytest.raises(ValueError, match=r"a\.npz.*'y'"):
        load_sensors(f"folder:{file.parent}")


def test_signals_of_csv_files_are_sensors_by_time(tmp_path: Path) -> None:
    x = np.arange(12.0).reshape(3, 4)
    rows = [",".join(map(str, row)) for row in x]
    for number, text in enumerate(
        ("\n".join(rows), "\n".join(f"s{i},{row}" for i, row in enumerate(rows)), "a,b,c,d\n" + "\n".join(rows))
    ):
        file = tmp_path / f"{number}.csv"
        file.write_text(text)
        np.testing.assert_array_equal(read_csv(file, 3).x, x.T.astype(np.float32))
    np.testing.assert_array_equal(read_csv(tmp_path / "0.csv", 4).x, x.astype(np.float32))
    for text, message in (
        ("", "no table"),
        ("1,2\n3", "no table"),
        ("1,2,3,4\n" * 2, "2 rows"),
        ("1,nan\n" * 3, "fin"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_csv(tmp_path / "bad.csv", 3)


def test_watch_files_are_read_without_running_what_they_hold(tmp_path: Path) -> None:
    labels = {"y_labels": np.array(["PEN", "ABD"]), "X_labels": np.array(["ax", "ay"])}
    signals = [np.ones((5, 2)), np.zeros((6, 2))]
    content = {"X": signals, "y": np.array([1, 0]), "subject": np.array([3, 10]), **labels}
    np.save(tmp_path / "watch.npy", np.array(content, object), allow_pickle=True)
    found, classes, channels = read_watch(tmp_path / "watch.npy")
    assert [r.subject for r in found] == ["3", "10"]
    assert (classes, channels) == (("PEN", "ABD"), ("ax", "ay"))
    np.save(tmp_path / "bad.npy", np.array({"X": Path("x")}, object), allow_pickle=True)
    with pytest.raises(ValueError, match="is not allowed"):
        read_watch(tmp_path / "bad.npy")
