"""Base weights, LoRA layers and adapter files."""

import logging
import os

import torch

# bitsandbytes tells on import that it could fetch further CPU kernels from the network; they are not wanted.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if not torch.cuda.is_available():
    # PEFT imports DeepSpeed on the way, which otherwise looks for an accelerator and warns that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
