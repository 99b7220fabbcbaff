"""One sweep file and its overrides, composed by Hydra into a plain mapping."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jmedlora.config.faults import BadInput, Fault, first_line
from jmedlora.config.locate import absolute, conf_dir
from jmedlora.config.origin import COMMAND_LINE, Origin
from jmedlora.config.parts import FILE_NAME
from jmedlora.config.validate import unknown_name

_RESOLVER = re.compile(r"\$\{\s*oc\.(env|decode|create)[^}]*\}")
_SECRET = re.compile(r"(^|_)(token|key|password|passwd|secret|credential|credentials)$", re.IGNORECASE)


def sweep_names() -> list[str]:
    """The shipped sweeps."""
    return sorted(path.stem for path in (conf_dir() / "sweep").glob("*.yaml"))


def find_sweep(sweep: str, cwd: Path) -> Path:
    """The file of a shipped sweep by name, or of the user's own by path; raises BadInput where there is none."""
    if sweep.endswith((".yaml", ".yml")) or "/" in sweep:
        path = Path(absolute(sweep, cwd))
        problem, allowed = f"{sweep} does not exist", "a sweep file, or one of " + ", ".join(sweep_names())
        if path.is_dir():
            problem = f"{sweep} is a folder"
        elif path.is_file() and (path.suffix != ".yaml" or not re.fullmatch(FILE_NAME, path.stem)):
            # the name becomes the name of folders and of the experiment
            problem, allowed = f"{path.name!r} is not a name for a sweep", "NAME.yaml, with letters, digits, -, _ and . in the name"
            raise BadInput([Fault(COMMAND_LINE, "SWEEP", problem, allowed)])
    else:
        path = conf_dir() / "sweep" / f"{sweep}.yaml"
        problem, allowed = f"unknown sweep {sweep!r}", unknown_name(sweep, sweep_names()) + ", or a path to a YAML file"
    if not path.is_file():
        raise BadInput([Fault(COMMAND_LINE, "SWEEP", problem, allowed)])
    return path


def compose_sweep(origin: Origin) -> dict[str, Any]:
    """The keys of the sweep with all overrides; raises BadInput, Hydra's errors being told in one line.

    Hydra composes the file and what its defaults list names. Overrides are read by Hydra's grammar and applied here: to
    Hydra, an entry such as `resources: local` is a plain text, and a folder `resources/` beside the file another thing.
    """
    changes, faults = _parsed(origin)
    search = ",".join(f"file://{folder / 'sweep'}" for folder in origin.search if (folder / "sweep").is_dir())
    try:
        with warnings.catch_warnings(), initialize_config_dir(version_base=None, config_dir=str(origin.path.parent)):
            warnings.simplefilter("ignore")  # a defaults list without _self_ is a matter of taste
            composed = compose(config_name=origin.path.stem, overrides=[f"hydra.searchpath=[{search}]"])
        faults += refuse_resolvers(OmegaConf.to_yaml(composed, resolve=False), origin.where)
        content = OmegaConf.to_container(composed, resolve=not faults)
        assert isinstance(content, dict)
        plain = {str(key): value for key, value in content.items()}
        for change in changes:
            faults += apply_override(plain, change)
    except RecursionError:
        faults.append(Fault(origin.where, "defaults", f"{origin.path.stem} is this file itself", "the name of another sweep"))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        faults.append(yaml_fault(error, origin.where))
    if faults:
        raise BadInput(faults)
    return plain


def yaml_fault(error: BaseException, where: str) -> Fault:
    """What is wrong with a file, in one line, with the line where it is known."""
    inner = error.__cause__ if isinstance(error, HydraException) and error.__cause__ is not None else error
    if isinstance(inner, yaml.MarkedYAMLError) and inner.problem_mark is not None:
        return Fault(f"{where}:{inner.problem_mark.line + 1}", "", f"not YAML: {inner.problem or inner.context}")
    if isinstance(inner, UnicodeDecodeError):
        return Fault(where, "", f"not UTF-8: {inner.reason} at byte {inner.start}", "a UTF-8 file")
    return Fault(where, "", first_line(inner))


def refuse_resolvers(text: str, where: str) -> list[Fault]:
    """A fault where a YAML text would read the environment or run a function while it is resolved."""
    found = _RESOLVER.search(text)
    return [Fault(where, "", f"{found.group()} is not allowed", "values written out; secrets belong in the environment")] if found else []


def apply_override(content: dict[str, Any], override: Override) -> list[Fault]:
    """Changes `content` as the override says; returns what is wrong with it.

    A number in the key is a place in a list; without one, a key below a list of mappings is changed in each of them.
    Below a preset's name, the preset is taken with that change.
    """
    *path, last = str(override.key_or_group).split(".")
    holders: list[Any] = [content]
    for name in path:
        holders = [inner for holder in holders for inner in _below(holder, name, create=not override.is_delete())]
    told = f"{'~' if override.is_delete() else ''}{override.key_or_group}"
    done = False
    if not last.isdigit():
        holders = [item for holder in holders for item in (holder if isinstance(holder, list) else [holder])]
    for holder in holders:
        known = isinstance(holder, dict) or (isinstance(holder, list) and last.isdigit() and int(last) < len(holder))
        key: Any = int(last) if isinstance(holder, list) and known else last
        if override.is_delete() and known and (isinstance(holder, list) or key in holder):
            del holder[key]
            done = True
        elif not override.is_delete() and known:
            holder[key] = override.value()
            done = True
    return [] if done else [Fault(COMMAND_LINE, told, "there is no such key", "a key of the sweep")]


def _below(holder: Any, name: str, create: bool) -> list[Any]:
    """What lies at `name` below a mapping or list: itself, or for a list of mappings without a place, at `name` in each."""
    if isinstance(holder, list) and not name.isdigit():
        return [inner for item in holder for inner in _below(item, name, create)]
    key: Any = int(name) if isinstance(holder, list) else name
    known = (isinstance(holder, list) and key < len(holder)) or (isinstance(holder, dict) and key in holder)
    if not known and not (create and isinstance(holder, dict) and not name.isdigit()):
        return []
    if not known or holder[key] is None:
        holder[key] = {}
    elif isinstance(holder[key], str):
        holder[key] = {"preset": holder[key]}
    return [holder[key]]


def _parsed(origin: Origin) -> tuple[list[Override], list[Fault]]:
    parser = OverridesParser.create()
    overrides, faults = [], []
    for text in origin.overrides:
        told = "key=value in Hydra's syntax, such as grid.rank=[8,64]; quote what holds blanks, commas or brackets: 'note=\"a, b\"'"
        try:
            override = parser.parse_override(text)
        except HydraException:
            faults.append(Fault(COMMAND_LINE, text, "cannot be read", told))
            continue
        if not override.key_or_group:
            faults.append(Fault(COMMAND_LINE, text, "has no key", told))
        elif override.is_sweep_override() or (not override.is_delete() and "=" not in text):
            faults.append(Fault(COMMAND_LINE, text, "is not one value", told))
        elif not override.is_delete() and "${" in str(override.value()):
            faults.append(Fault(COMMAND_LINE, text, "${...} is not allowed", "values written out"))
        else:
            overrides.append(override)
    return overrides, faults


def find_secrets(value: Any, where_of: Callable[[str], str], key: str = "") -> list[Fault]:
    """A fault for every key that is named like a secret and has a value."""
    faults = []
    if isinstance(value, dict):
        for name, item in value.items():
            dotted = f"{key}.{name}" if key else str(name)
            if _SECRET.search(str(name)) and item not in (None, ""):
                faults.append(
                    Fault(where_of(dotted), dotted, "looks like a secret, which a configuration must not hold", "the environment")
                )
            faults += find_secrets(item, where_of, dotted)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            faults += find_secrets(item, where_of, f"{key}[{position}]")
    return faults
