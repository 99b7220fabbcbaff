"""Generation and metrics; knows neither Ray nor MLflow. `metrics` needs no torch."""
