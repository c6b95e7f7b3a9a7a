"""What runs on the device: read a bundle, tokenize, run ONNX or TFLite, decode, verify.

Needs numpy, tokenizers and one of onnxruntime, ai-edge-litert, tflite-runtime; nothing else.
"""
