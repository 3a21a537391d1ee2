"""What methods are called in tables and figures."""

NAMES = {
    "full precision": "full precision", "minmax": "static, min-max", "momentum": "static, momentum",
    "percentile": "static, percentile", "mse": "static, MSE", "ptq4dm": "static, PTQ4DM", "learned": "static, learned",
    "table": "per-step table", "tdq": "TDQ", "dynamic": "dynamic, per tensor", "dynamic-sample": "dynamic, per sample",
    "pact": "PACT", "lsq": "LSQ", "nipq": "NIPQ", "tdq-pact": "TDQ on PACT", "tdq-nipq": "TDQ on NIPQ",
    "fine-tuned": "full precision, fine-tuned",
}  # fmt: skip
