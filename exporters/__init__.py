"""torch module -> ONNX and TFLite files -> int8 -> proof of parity -> bundle folder."""
