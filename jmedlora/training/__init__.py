"""One trial's loop on a DeepSpeed engine; schedules; checkpoints. No Ray, no MLflow: it runs in a plain process."""

import jmedlora.models  # noqa: F401  what it sets has to stand before PEFT is imported
