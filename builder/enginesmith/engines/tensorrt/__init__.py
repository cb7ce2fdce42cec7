"""TensorRT plans and TensorRT for RTX engines, built and inspected through Polygraphy."""
