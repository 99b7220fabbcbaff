"""The only place that imports ray: trials, workers, actors, the driver of a sweep, job submission."""
