"""Models: loading by structure, and LoRA adapters."""

import logging

# PEFT imports bitsandbytes, which then warns of an optional CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
