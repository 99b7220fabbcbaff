"""jmedlora: sweeps of LoRA and QLoRA adapters for Japanese medicine, trained, evaluated and compared."""

__version__ = "0.1.0"
