"""Trained models for other programs: NumPy's archives, safetensors and ONNX."""
