"""Notebook kernels and subprocesses that pytest starts get no network, and share the cores.

No network: the default path must not need one. Sharing: two notebooks at a time have two threads each, so a thread that waits
must give up its core instead of spinning on it.
"""

import os
from pathlib import Path

from tdq_utils.run.integer import INT8_FLAGS, cpu_flags

OFFLINE = Path(__file__).parent / "tests" / "offline"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The lesson on integers runs them; elsewhere it can only be read.
collect_ignore = [] if INT8_FLAGS & cpu_flags() else ["notebooks/08_integer_inference.ipynb"]
