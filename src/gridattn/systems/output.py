"""The folder of a run, and files that are there whole or not at all."""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; on leaving without an error the file takes the name `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON, indented, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, atomically; the columns are the union of the rows' keys, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


class RunFolder:
    """Names of what a training run keeps in its folder.

    Attributes:
        settings: the settings, YAML.
        history: one row an epoch, CSV.
        last: checkpoint of the whole state of the training, to resume from.
        best: the same, of the epoch with the best validation.
        model: folder of the exported model of that epoch.
        last_model: folder of the exported model of the last epoch.
        result: metrics of the finished run, JSON.
        tensorboard: TensorBoard's event files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings = self.path / "settings.yaml"
        self.history = self.path / "history.csv"
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.model = self.path / "model"
        self.last_model = self.path / "last_model"
        self.result = self.path / "result.json"
        self.tensorboard = self.path / "tensorboard"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raises ValueError where the folder holds a run that is neither resumed nor to be replaced."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output={str(self.path)!r} is a file; a folder is needed")
        if self.settings.exists() and not (resume or overwrite):
            raise ValueError(
                f"output={str(self.path)!r} holds a run; add --resume to go on or --overwrite to replace it"
            )

    def clear(self) -> None:
        """Removes what an earlier run left under the names above; other files stay."""
        for folder in (self.last.parent, self.tensorboard, self.model, self.last_model):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.settings, self.history, self.result):
            file.unlink(missing_ok=True)

    def write_settings(self, system: str, settings: Mapping[str, Any]) -> None:
        """Stores the settings of the run of `system`."""
        with atomic(self.settings) as temporary:
            text = yaml.safe_dump(dict(settings), sort_keys=False)
            temporary.write_text(f"# gridattn train {system}\n{text}", encoding="utf-8")


def load_run_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of a run, tensors and plain values only.

    Raises:
        ValueError: a file that is missing or is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load reports a damaged file by errors of many kinds
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or "gridattn" not in content:
        raise ValueError(f"{str(path)!r} is not a checkpoint of a gridattn run")
    return content
