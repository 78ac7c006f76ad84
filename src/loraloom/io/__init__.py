"""Files: safetensors, quantized storage, atomic writes, the hub."""
