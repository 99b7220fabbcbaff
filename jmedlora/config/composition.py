"""One sweep file and its overrides, composed by Hydra into a plain mapping."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jmedlora.config.faults import BadInput, Fault, first_line
from jmedlora.config.locate import absolute, conf_dir
from jmedlora.config.origin import COMMAND_LINE, Origin
from jmedlora.config.validate import unknown_name

_INSIDE_PART = re.compile(r"\+*(resources|data|deepspeed)\.")
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
    else:
        path = conf_dir() / "sweep" / f"{sweep}.yaml"
        problem, allowed = f"unknown sweep {sweep!r}", unknown_name(sweep, sweep_names()) + ", or a path to a YAML file"
    if not path.is_file():
        raise BadInput([Fault(COMMAND_LINE, "SWEEP", problem, allowed)])
    return path


def compose_sweep(origin: Origin) -> dict[str, Any]:
    """The keys of the sweep with all overrides; raises BadInput, Hydra's errors being told in one line."""
    bad = [override for override in origin.overrides if "=" not in override and not override.startswith("~")]
    if bad:
        raise BadInput([Fault(COMMAND_LINE, override, "not an override", "key=value, for example grid.rank=[8,64]") for override in bad])
    # a part such as `resources: local` is a preset's name to Hydra: changes inside it are applied afterwards
    inside_parts = [override for override in origin.overrides if _INSIDE_PART.match(override)]
    overrides = [override if override[0] in "+~" else f"++{override}" for override in origin.overrides if override not in inside_parts]
    search = ",".join(f"file://{folder / 'sweep'}" for folder in origin.search if (folder / "sweep").is_dir())
    try:
        with initialize_config_dir(version_base=None, config_dir=str(origin.path.parent)):
            composed = compose(config_name=origin.path.stem, overrides=[*overrides, f"hydra.searchpath=[{search}]"])
        _refuse_resolvers(composed, origin)
        content = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(content, dict)
        for override in OverridesParser.create().parse_overrides([override.lstrip("+") for override in inside_parts]):
            _change_part(content, override.key_or_group, override.value())
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise BadInput([_translated(error, origin)]) from None
    return {str(key): value for key, value in content.items()}


def find_secrets(value: Any, origin: Origin, key: str = "") -> list[Fault]:
    """A fault for every key that is named like a secret and has a value."""
    faults = []
    if isinstance(value, dict):
        for name, item in value.items():
            dotted = f"{key}.{name}" if key else str(name)
            if _SECRET.search(str(name)) and item not in (None, ""):
                faults.append(
                    Fault(origin.of(dotted), dotted, "looks like a secret, which a configuration must not hold", "the environment")
                )
            faults += find_secrets(item, origin, dotted)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            faults += find_secrets(item, origin, f"{key}[{position}]")
    return faults


def _translated(error: Exception, origin: Origin) -> Fault:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return Fault(f"{origin.where}:{error.problem_mark.line + 1}", "", f"not YAML: {error.problem or error.context}")
    text = str(error)
    for override in origin.overrides:
        if override in text:
            return Fault(COMMAND_LINE, override, "cannot be read", "key=value in Hydra's syntax, for example grid.rank=[8,64]")
    return Fault(COMMAND_LINE if "override" in text.lower() else origin.where, "", first_line(error))


def _refuse_resolvers(composed: DictConfig, origin: Origin) -> None:
    found = _RESOLVER.search(OmegaConf.to_yaml(composed, resolve=False))
    if found:
        raise BadInput(
            [Fault(origin.where, "", f"{found.group()} is not allowed", "values written out; secrets belong in the environment")]
        )


def _change_part(content: Any, dotted: str, value: Any) -> None:
    """Changes one key of a part; where the part is a preset's name, the preset is taken with that change."""
    group, *path = dotted.split(".")
    part = content.get(group)
    content[group] = part = {"preset": part} if isinstance(part, str) else part if isinstance(part, dict) else {}
    for name in path[:-1]:
        part = part.setdefault(name, {})
    part[path[-1]] = value
