"""What must be here before a sweep starts."""

from __future__ import annotations

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.sweep import SweepConfig
from jmedlora.models.source import materialise
from jmedlora.plan.planner import make_plan
from jmedlora.plan.specs import Plan
from jmedlora.plan.weights import locate_weights


def fetch_missing(config: SweepConfig, plan: Plan) -> Plan:
    """Downloads base models from the hub where the network may be used, and plans again with their revisions.

    Raises BadInput for everything else that is not here yet.
    """
    if not plan.missing:
        return plan
    on_hub = [
        model
        for model in config.models.values()
        if model.source.kind == "hub" and locate_weights(model, config.sources_path, config.offline).missing
    ]
    hub_lines = {line for model in on_hub for line in plan.missing if line.startswith(f"model {model.name}:")}
    absent = [line for line in plan.missing if line not in hub_lines or config.offline]
    if absent:
        raise BadInput(
            [Fault(line.split(":", 1)[0], "", f"not here yet:{line.split(':', 1)[1]}", "bring it there, or name a path") for line in absent]
        )
    for model in on_hub:
        try:
            materialise(model, config.sources_path, config.offline)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInput(
                [
                    Fault(
                        f"model {model.name}",
                        "source.repo",
                        f"cannot be fetched: {reason}",
                        "a repository that can be reached, or a local path",
                    )
                ]
            ) from None
    return make_plan(config)
