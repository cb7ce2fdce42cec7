"""What the Python models of a TensorRT-LLM deployment share; copied beside each of them."""
