"""DiffusionNFT: the forward-process objective and the policies it needs."""
