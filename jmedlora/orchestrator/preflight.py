"""What must be here before a sweep starts."""

from __future__ import annotations

from jmedlora.config.faults import BadInput, Fault, first_line
from jmedlora.config.sweep import SweepConfig
from jmedlora.data.fetch import fetch_benchmark
from jmedlora.plan.fitting import check_fit
from jmedlora.plan.layout import Storage
from jmedlora.plan.planner import make_plan
from jmedlora.plan.specs import Plan
from jmedlora.plan.weights import locate_weights


def fetch_missing(config: SweepConfig, plan: Plan) -> Plan:
    """Downloads base models and benchmarks that are pinned to a place on the network, and plans again with what they are.

    Raises BadInput for everything else that is not here yet, where the network may not be used, and, before anything is
    downloaded, for what does not fit the machines.
    """
    if not plan.missing:
        return plan
    models = [
        model
        for model in config.models.values()
        if model.source.kind == "hub" and locate_weights(model, config.sources_path, config.offline).missing
    ]
    missing = {line.split(":", 1)[0] for line in plan.missing}
    benchmarks = [part for part in config.benchmarks if f"benchmark {part.name}" in missing and part.source and part.source.kind != "named"]
    to_fetch = {f"model {model.name}" for model in models} | {f"benchmark {part.name}" for part in benchmarks}
    absent = [line.split(":", 1) for line in plan.missing if config.offline or line.split(":", 1)[0] not in to_fetch]
    if absent:
        raise BadInput([Fault(what, "", f"not here yet:{told}", "bring it there, or name a path") for what, told in absent])
    check_fit(plan, config, Storage(config.storage_path))
    for part in benchmarks:
        fetch_benchmark(part, config.sources_path, config.offline)
    for model in models:
        from jmedlora.models.source import materialise  # with torch, which refusals need not wait for

        try:
            materialise(model, config.sources_path, config.offline)
        except Exception as error:
            allowed = "a repository that can be reached, or a local path"
            raise BadInput([Fault(f"model {model.name}", "source.repo", f"cannot be fetched: {first_line(error)}", allowed)]) from None
    return make_plan(config)
