"""One trial's loop on a DeepSpeed engine; schedules; checkpoints. No Ray, no MLflow: it runs in a plain process."""

import sys

import jmedlora.models  # noqa: F401  what it sets has to stand before PEFT is imported

if "mlflow" not in sys.modules:
    # DeepSpeed's autotuner, which nothing here uses, would import it: a second for every worker
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules["mlflow"]
