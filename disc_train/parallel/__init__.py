"""What several processes that train together need beside what torch, accelerate and transformers do."""
