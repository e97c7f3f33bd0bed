"""From a trained model to the files that llama.cpp and Ollama open."""
