"""Settings come from a recipe and then from the command line; what is wrong is told in one line."""

from pathlib import Path

import pytest

from gridattn.systems import get_system, list_systems, recipe_names
from gridattn.systems.classify import ClassifySettings
from gridattn.systems.settings import parse_settings


def _parse(*argv: str) -> ClassifySettings:
    return parse_settings("classify", ClassifySettings, argv)


def test_the_command_line_is_laid_over_the_recipe_wherever_it_stands() -> None:
    settings = _parse("--epochs", "2", "--recipe", "paper", "--trainer.devices=4", "--augment.re_prob", "0.5")
    assert (settings.epochs, settings.model, settings.mixup) == (2, "nat_mini", 0.8)
    assert settings.trainer == {"precision": "16-mixed", "devices": 4}
    assert settings.augment["re_prob"] == 0.5
    assert settings.augment["re_mode"] == "pixel"


def test_the_paper_recipe_is_the_published_one() -> None:
    settings = _parse("--recipe", "paper")
    assert (settings.opt, settings.lr, settings.weight_decay, settings.min_lr) == ("adamw", 1e-3, 0.05, 5e-6)
    assert (settings.epochs, settings.cooldown_epochs, settings.warmup_epochs) == (300, 10, 20)
    assert (settings.label_smoothing, settings.mixup, settings.cutmix, settings.clip_grad) == (0.1, 0.8, 1.0, 5.0)
    assert settings.augment["auto_augment"] == "rand-m9-mstd0.5-inc1"


@pytest.mark.parametrize("slug", list_systems())
def test_every_recipe_of_every_system_is_valid(slug: str) -> None:
    assert {"demo", "paper"} <= set(recipe_names(slug))
    for recipe in recipe_names(slug):
        assert get_system(slug).parse(["--recipe", recipe])


def test_flags_need_no_value() -> None:
    settings = _parse("--overwrite", "--resume", "--lr", "2e-3")
    assert (settings.overwrite, settings.resume, settings.lr) == (True, "auto", 2e-3)


def test_resuming_starts_from_the_settings_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("lr: 0.125\nepochs: 7\n")
    settings = _parse("--resume", "--output", str(tmp_path), "--epochs", "9")
    assert (settings.lr, settings.epochs) == (0.125, 9)


def test_stored_settings_are_a_recipe(tmp_path: Path, tiny) -> None:
    import yaml

    settings = tiny(ema_decay=0.9, augment={"hflip": 0.0})
    path = tmp_path / "stored.yaml"
    path.write_text(yaml.safe_dump(settings.stored()))
    assert _parse("--recipe", str(path), "--output", settings.output) == settings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rate", "1"], "setting 'learning-rate' is not known"),
        (["--epoch", "3"], "setting 'epoch' is not known; did you mean epochs"),
        (["--trainer.precison", "16"], "trainer option 'precison' is not known; did you mean precision"),
        (["--trainer.max_epochs", "3"], "trainer.max_epochs is set by the run; use epochs instead"),
        (["--recipe", "nowhere"], "recipe='nowhere' is not known; allowed: demo, paper"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "0"], "epochs=0 is not allowed; it must be at least 1"),
        (["--batch_size", "0"], "batch_size=0"),
        (["--lr", "-1"], "lr=-1"),
        (["--lr", ".nan"], "lr=nan"),
        (["--ema_decay", "1"], "ema_decay=1"),
        (["--label_smoothing", "1.5"], "label_smoothing=1.5"),
        (["--mixup", "0.2", "--batch_size", "7"], "batch_size=7 is odd"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _parse(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("lr: [", "is not YAML"), ("- lr", "is not a mapping"), ("lrr: 1", "'lrr' is not known; did you mean lr")],
)
def test_wrong_recipes_are_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        _parse("--recipe", str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_system_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"system 'classfy' is not known; allowed: .*classify"):
        get_system("classfy")
