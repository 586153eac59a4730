"""Eight virtual CPU devices for every test, and programs that compile quickly."""

import os

import jax

# Asked for before jax starts; afterwards it has no effect.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# The tests compile hundreds of programs and run most of them once. With LLVM's
# expensive passes they take three times as long; the HLO, and so what is computed
# and exchanged, is the same. `make test-all` runs them as users do.
if not os.environ.get("ALEXNET_TEST_OPTIMIZED"):
    jax.config.update("jax_disable_most_optimizations", True)
