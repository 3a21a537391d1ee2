"""What every method is, and where it is from: those of ``quantize(method=...)``, and what can be done beside them."""

DYNAMIC = {"dynamic": "tensor", "dynamic-sample": "sample", "dynamic-token": "token"}
METHODS = {
    "minmax": "one interval: the range of all calibration data (standard)",
    "momentum": "one interval: the range, a moving average over batches (standard)",
    "percentile": "one interval: up to a percentile of the magnitude (standard)",
    "mse": "one interval: least squared error (standard)",
    "ptq4dm": "one interval: least squared error, t drawn towards the clean end (PTQ4DM: Shang et al. 2023, arXiv 2211.15736)",
    "learned": "one interval, learned by gradient descent (LSQ: Esser et al. 2020, arXiv 1902.08153)",
    "table": "an interval for each t: least squared error (the rival of TDQ; cf. EfficientDM: He et al. 2023, arXiv 2310.03270)",
    "finite-set": "an interval and a zero level for each t, from its range (TFMQ-DM: Huang et al. 2024, arXiv 2311.16503)",
    "tdq": "an interval that a small network predicts from t (TDQ: So et al. 2023, arXiv 2306.02316)",
    "dynamic": "the range of the tensor at hand, at run time (standard)",
    "dynamic-sample": "the range of each sample at hand, at run time (standard)",
    "dynamic-token": "the range of each token at hand, at run time (standard)",
}
CALIBRATED = tuple(name for name in METHODS if name not in DYNAMIC)
# Beside a method: the function, what it does, and where it is from.
NEIGHBOURS = {
    "bins": "freeze(model, bins=n): neighbouring t share an interval (Pruna's time-aware quantization)",
    "temporal features": "quantize_temporal: the layers that carry t, reconstructed together (TFMQ-DM: arXiv 2311.16503)",
    "cache": "cache_temporal: what depends on t alone, looked up (Temporal Feature Matters: arXiv 2407.19547)",
    "precision": "Precisions: bits that follow t (TMPDiff: arXiv 2603.14062; DyQ-VLA: arXiv 2603.07904; PTQD; NVIDIA)",
}
