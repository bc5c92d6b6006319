"""Published files of other libraries to ours and back: LoRA adapters, whole checkpoints."""
