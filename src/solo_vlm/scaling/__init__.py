"""How cost and quality grow with size: FLOPs of SOLO and of LLaVA."""
