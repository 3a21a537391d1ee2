"""Notebook kernels and subprocesses that pytest starts get no network: the default path must not need one."""

import os
from pathlib import Path

OFFLINE = Path(__file__).parent / "tests" / "offline"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
