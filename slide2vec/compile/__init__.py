"""From encoder to engine: export to ONNX, compile, compare with PyTorch."""
