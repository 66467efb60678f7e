"""Do for several processes that train together what torch, accelerate and transformers leave open."""
