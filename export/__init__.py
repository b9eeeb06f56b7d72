"""From a trained MONAI bundle to an artifact: capture, graph passes, ONNX, verification."""
