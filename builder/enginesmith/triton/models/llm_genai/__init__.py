"""The engine of a served model that onnxruntime-genai generates for; placed beside the files of ``llm_onnxruntime``."""
