"""Hydra composes a recipe; what does not fit the typed dataclasses is refused, all at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import RateConfig, in_turn
from unimoe_mcore.config.validate import validate

# Every recipe's first default: gives all keys their types and default values.
ConfigStore.instance().store(name="recipe_schema", node=Recipe)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def compose_recipe(
    name: str,
    overrides: Sequence[str] = (),
    folder: Path = RECIPES,
    world_size: int | None = None,
) -> Recipe:
    """Compose, type-check and validate a recipe.

    Args:
        name: a file of ``recipes/`` without ``.yaml``.
        overrides: Hydra overrides such as ``trainer.lr=1e-4``.
        world_size: processes of the run; None to assume ``parallel.processes``.

    Raises:
        UserError: with every problem found, before anything starts.
    """
    available = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in available:
        raise UserError(f"There is no recipe {name!r} in {folder}: choose {', '.join(available)}.")
    with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        composed = _compose(name, overrides)
    return typed(composed, world_size)


OPEN = (
    "stage.connectors.",
    "stage.expert_datasets.",
    "stage.expert_steps.",
    "stage.rates",
    "data.datasets.",
    "data.combinations",
)
"""Groups whose keys the user makes up; elsewhere Hydra wants a ``+`` in front of a new key."""


_RATE = re.compile(rf"stage\.rates\.(.+?)(?:\.({'|'.join(vars(RateConfig()))}))?=(.*)")


def _opened(override: str) -> str:
    rate = _RATE.fullmatch(override)
    if rate:  # Hydra makes no typed entry of a path, and a part's name may hold a dot
        part, key, value = rate.groups()
        override = f"stage.rates={{{part}: {f'{{{key}: {value}}}' if key else value}}}"
    return f"++{override}" if override.startswith(OPEN) else override


def _compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    problems = []
    overrides = [_opened(override) for override in overrides]
    try:
        return _plain(compose(name, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        failed = error
    for override in overrides:  # Hydra stops at the first bad one: name all of them
        try:
            compose(name, overrides=[override])
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(f"{override.removeprefix('++')!r}: {_first_line(error)}")
    raise UserError(_sentence(problems or [_first_line(failed)]))


def _plain(config: Any) -> dict[str, Any]:
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return plain


def _first_line(error: Exception) -> str:
    if "To append to your config use" in str(error) or "not in '" in str(error):
        return "there is no such key"
    lacking = re.search(r"Interpolation key 'stage\.expert_(?:datasets|steps)\.(.*)'", str(error))
    if lacking:
        return f"stage.expert is {lacking[1]!r}, of which stage.expert_datasets knows nothing"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if "is not a subclass of RateConfig" in str(cause):
        return f"it must be a group of {', '.join(vars(RateConfig()))}"
    return str(cause).strip().splitlines()[0].rstrip(".")


def _sentence(problems: Sequence[str], what: str = "The recipe") -> str:
    if len(problems) == 1:
        return f"{what} is wrong: {problems[0]}."
    listed = "".join(f"\n  - {problem}" for problem in problems)
    return f"{what} has {len(problems)} problems:{listed}"


def typed(plain: dict[str, Any], world_size: int | None = None, what: str = "The recipe") -> Recipe:
    """A recipe object from a plain nested dict.

    Args:
        plain: the settings.
        world_size: as in ``compose_recipe``.
        what: what messages call it.

    Raises:
        UserError: with every unknown key, wrong type and impossible value.
    """
    problems = list(_type_problems(Recipe, plain, ""))
    if problems:
        raise UserError(_sentence(problems, what))
    merged = OmegaConf.merge(OmegaConf.structured(Recipe), plain)
    recipe: Recipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
    recipe.stage.experts = in_turn(recipe.stage.experts, recipe.model.moe.experts)
    problems = validate(recipe, world_size)
    if problems:
        raise UserError(_sentence(problems, what))
    return recipe


def _type_problems(kind: Any, value: Any, key: str) -> Iterator[str]:
    """Unknown keys and values of another type, down to the leaves."""
    if type(None) in get_args(kind):  # what may be left out
        if value is None:
            return
        kind = next(each for each in get_args(kind) if each is not type(None))
    if is_dataclass(kind):
        if not isinstance(value, dict):
            yield f"{key or 'the recipe'} is {value!r}, it must be a group of settings"
            return
        fields = get_type_hints(kind)
        for name, inner in value.items():
            path = f"{key}.{name}" if key else str(name)
            if name not in fields:
                yield f"there is no key {path} (known here: {', '.join(fields)})"
            else:
                yield from _type_problems(fields[name], inner, path)
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            yield f"{key} is {value!r}, it must map names to values"
            return
        for name, inner in value.items():
            yield from _type_problems(get_args(kind)[1], inner, f"{key}.{name}")
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            yield f"{key} is {value!r}, it must be a list"
            return
        for number, inner in enumerate(value):
            yield from _type_problems(get_args(kind)[0], inner, f"{key}[{number}]")
    elif not _fits(kind, value):
        yield f"{key} is {value!r}, it must be {_WORDS[kind]}"


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _fits(kind: type, value: Any) -> bool:
    if kind is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
            try:
                float(value)
            except ValueError:
                return False
            return True
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def load(path: Path, world_size: int | None = None) -> Recipe:
    """A recipe from a resolved file.

    Raises:
        UserError: if the file is missing or wrong.
    """
    return typed(_read(path), world_size, str(path))


def load_past(path: Path) -> Recipe:
    """The recipe of a run as it was trained, which is not to be trained by it.

    How it was logged is left out: it changes nothing that the run has given, and the settings of
    mirrors may have been others when it was trained.

    Raises:
        UserError: if the file is missing or wrong.
    """
    plain = _read(path)
    plain.pop("logging", None)
    return typed(plain, what=str(path))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no resolved recipe at {path}: compose it first.")
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # PyYAML and OmegaConf raise many kinds
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path} is no recipe: it must be a group of settings.")
    return plain
