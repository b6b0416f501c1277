"""Several fake devices of one CPU and the persistent compilation cache, made to get along."""

import os

# A program that comes out of the cache starts its independent collectives in an order of its
# own on every device (jaxlib 0.10.2), so that the devices wait for each other for ever. This
# scheduler fixes the order. XLA reads its flags when the first test asks for a device.
_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
