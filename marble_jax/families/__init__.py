"""Model families: what one kind of diffusion model is made of, behind one interface."""
