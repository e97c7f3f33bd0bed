"""The frozen base model: finding it, loading it quantized, and what is known of its weights and device."""
