"""Batch inference with quantized transformers models on Ray. Start reading at
`quantbatch.pipeline.run`.
"""

__version__ = "0.1.0"
