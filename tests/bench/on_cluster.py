"""`python -m tests.bench.on_cluster ADDRESS SCRIPT ARGUMENTS`: a script that starts a Ray of its own, run on one that is up.

Nothing of the script is changed but where its `ray.init` leads.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import ray


def main() -> None:
    address, script = sys.argv[1:3]
    join = ray.init

    def init(*_: Any, log_to_driver: bool = True, **__: Any) -> Any:
        return join(address=address, log_to_driver=log_to_driver)

    ray.init = init
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
