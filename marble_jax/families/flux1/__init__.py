"""FLUX.1: double and single blocks with rotary positions, a guidance embedding, CLIP-L and T5."""
