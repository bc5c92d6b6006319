"""What is trained: LoRA adapters of a frozen network, and averages of them."""
