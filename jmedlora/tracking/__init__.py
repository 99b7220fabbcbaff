"""The only place that imports mlflow."""

import os

# Read by mlflow: nothing leaves the machine unasked, and no address is printed for every run that ends.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
